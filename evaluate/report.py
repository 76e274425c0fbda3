"""`python -m imae_jax.evaluate.report RUN…`: training and evaluation runs on one page of Markdown."""

import hashlib
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from imae_jax import __version__
from imae_jax.cli import ArgumentParser, command, lock_outputs
from imae_jax.errors import UserError
from imae_jax.evaluate.benchmarks import benchmark_named
from imae_jax.evaluate.compare import COMPARISON_FILE, Comparison
from imae_jax.evaluate.cost import Cost
from imae_jax.evaluate.reporting.aggregate import sums_of
from imae_jax.evaluate.reporting.document import FinishedRun, Picture, Section, facts
from imae_jax.evaluate.reporting.harness import HARNESS_FILE, Harness
from imae_jax.evaluate.reporting.tables import DASH, Table
from imae_jax.evaluate.reporting.training import CONFIG_FILE, METRICS_FILE, STAGES, Training
from imae_jax.evaluate.runner.directory import RESULTS_FILE, RUN_FILE, read_run
from imae_jax.files import new_directory, read_json

REPORT_FILE = "report.md"
HARNESS, COMPARISON, COST, TRAINING = Harness(), Comparison(), Cost(), Training()
# Kinds that come behind the benchmarks, in this order.
LAST = (HARNESS, COMPARISON, COST, TRAINING)
# What a run is recognized by, the first that is there; None: `read_evaluation` tells its kind.
FILES = {
    RESULTS_FILE: None,
    COMPARISON_FILE: COMPARISON,
    HARNESS_FILE: HARNESS,
    **{str(Path(stage, METRICS_FILE)): TRAINING for stage in reversed(STAGES)},
    RUN_FILE: None,
    CONFIG_FILE: TRAINING,
}
# Result fields left out of the provenance section: tables show them, or they are too long.
SHOWN_ELSEWHERE = ("methods", "controls", "parts", "length", "batch_sizes", "benchmark", "rows", "stages")
SHOWN_ELSEWHERE += ("environment",)
LONGEST_LIST = 12


def read_runs(paths: Sequence[Path]) -> list[FinishedRun]:
    """Runs of any kind, from output directories of `imae_jax.train` and of evaluations.

    Raises:
        UserError: a directory is no run, an evaluation is unfinished, a file is damaged, or two are the same
            run.
    """
    runs, seen = [], {}
    for number, path in enumerate(paths, 1):
        name = next((name for name in FILES if (path / name).is_file()), None)
        if name is None:
            state = f"holds none of {', '.join([*FILES][:4])}" if path.exists() else "does not exist"
            raise UserError(f"{path} {state}: give output directories of imae_jax.train or imae_jax.evaluate")
        # A copy of a run is the same run, too.
        digest = hashlib.sha256((path / name).read_bytes()).hexdigest()
        if digest in seen:
            raise UserError(f"{path} is the same run as {seen[digest]}: name it once")
        seen[digest] = path
        kind = FILES[name]
        kind, results = (kind, kind.read(path)) if kind else read_evaluation(path)
        runs.append(FinishedRun(number, path, kind, results))
    return runs


def read_evaluation(path: Path) -> tuple[Any, Mapping[str, Any]]:
    """A finished run of a benchmark or of `cost`: its kind and its results."""
    file = path / RESULTS_FILE
    if file.is_file() and "batch_sizes" in read_json(file):
        return COST, COST.read(path)
    results = read_run(path)
    benchmark = benchmark_named(results["benchmark"])
    if benchmark is None:
        raise UserError(f"{path} is a run of {results['benchmark']}, which reports do not know: remove it")
    unknown = [metric for metric in results.get("metrics", ()) if metric not in benchmark.heads]
    if unknown:
        raise UserError(f"{file} has unknown metrics ({', '.join(map(str, unknown))}): make the run again")
    return benchmark, results


def report_sections(runs: Sequence[FinishedRun]) -> list[Section]:
    """The report: benchmarks in the order of their first runs, other kinds, then provenance."""
    kinds = list(dict.fromkeys(run.kind for run in runs))
    kinds.sort(key=lambda kind: LAST.index(kind) if kind in LAST else -1)
    evaluations = [run for run in runs if run.kind not in LAST]
    sections = []
    for kind in kinds:
        sections += kind.report([run for run in runs if run.kind is kind], evaluations)
    return [*sections, provenance_section(runs)]


def provenance_section(runs: Sequence[FinishedRun]) -> Section:
    """All runs in one table, then everything that each of them recorded."""
    rows, blocks = [], []
    for run in runs:
        model, seed, environment, recorded = _provenance(run)
        versions, git = environment.get("versions", {}), environment.get("git")
        commit = DASH if not git else git["commit"][:10] + (" + changes" if git["dirty"] else "")
        cells = (model, versions.get("imae_jax"), commit, versions.get("jax"), versions.get("device"), seed)
        cells = (DASH if cell is None else cell for cell in cells)
        rows.append((f"{run.number}: {run.path}", run.kind.title, *cells))
        blocks.append(facts(f"Run {run.number}, {run.kind.title}: {run.path}", recorded))
    columns = ("run", "kind", "model", "imae_jax", "git", "jax", "device", "seed")
    return Section("How these figures were made", (Table("Runs", columns, tuple(rows)), *blocks))


def _provenance(run: FinishedRun) -> tuple[Any, Any, Mapping[str, Any], dict[str, str]]:
    """Model, seed, environment and all other facts of a run."""
    results = run.results
    recorded = _flat({key: value for key, value in results.items() if key not in SHOWN_ELSEWHERE})
    if run.kind is TRAINING:
        starts = results["environment"]
        for start in starts:
            command = {"command": shlex.join(start["command"])}
            recorded |= _flat({f"start {start['started']}": {**start, **command}})
        config = results["config"]
        return config.get("model"), config.get("seed"), starts[-1] if starts else {}, recorded
    environment = results.get("environment", results)
    if environment is not results:
        recorded |= _flat({"environment": environment})
    for label, settings in _method_settings(results).items():
        recorded[f"method {label}"] = json.dumps(settings, ensure_ascii=False)
    return results["model"], results.get("statistics", {}).get("seed"), environment, recorded


def _method_settings(results: Mapping[str, Any]) -> dict[str, Any]:
    """Every method's settings, resolved."""
    methods = dict(results.get("methods", {}))
    for controlled in results.get("controls", {}).values():
        methods |= controlled["runs"]
    if "batch_sizes" in results:
        methods = next(iter(results["batch_sizes"].values()), {})
    kept = ("settings", "scored_with", "seconds")
    return {
        label: {"sums": sums_of(row), **{key: row[key] for key in kept if key in row}}
        for label, row in methods.items()
    }


def _flat(value: Any, name: str = "") -> dict[str, str]:
    """Nested settings by dotted name."""
    if isinstance(value, Mapping) and value:
        flat: dict[str, str] = {}
        for key, item in value.items():
            flat |= _flat(item, f"{name}.{key}" if name else str(key))
        return flat
    if isinstance(value, list) and len(value) > LONGEST_LIST:
        return {name: f"{len(value)} values"}
    return {name: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}


def write_report(paths: Sequence[Path], out: Path) -> None:
    """Writes `report.md` on runs, as `read_runs` takes them, and its plots into an existing directory."""
    sections = report_sections(read_runs(paths))
    lead = f"{len(paths)} run{'s' * (len(paths) > 1)}, gathered by imae_jax {__version__}."
    text = "\n".join([f"# Report\n\n{lead}\n", *(section.markdown() for section in sections)])
    (out / REPORT_FILE).write_text(text, encoding="utf-8")
    for section in sections:
        for block in section.blocks:
            if isinstance(block, Picture):
                (out / block.name).write_bytes(block.png)


@command
def main(argv: Sequence[str] | None = None) -> None:
    parser = ArgumentParser(
        prog="python -m imae_jax.evaluate.report",
        description="Gathers training and evaluation runs on one page: OUT/report.md and its plots.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", type=Path, help="output directory of a run")
    parser.add_argument("--out", required=True, type=Path, help="directory to write")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing OUT")
    args = parser.parse_args(argv)
    lock_outputs(args.out)
    contents = (REPORT_FILE, "report.html", "*.png")  # report.html: of earlier versions
    with new_directory(args.out, marker=REPORT_FILE, contents=contents, overwrite=args.overwrite) as out:
        write_report(args.runs, out)
    print(f"wrote {args.out / REPORT_FILE}")


if __name__ == "__main__":
    sys.exit(main())
