"""Evaluation runs: methods that score or write the answers of many items, so that a killed run goes on.

A run's directory holds

run.json        what the scores depend on; a run that goes on must have the same
scores.jsonl    a line for every item and method, written as it is scored
results.json    means, intervals and comparisons; there once all is scored
table.md, table.tex, and plots
"""

import argparse
import contextlib
import dataclasses
import hashlib
import json
import math
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from imae_jax import runtime
from imae_jax.cli import lock_outputs
from imae_jax.convert.identity import note, without_places
from imae_jax.distributed import barrier, is_main
from imae_jax.errors import UserError, first_line
from imae_jax.files import check_new_directory, new_directory, read_text, write_text

from .questions import SPLITS
from .tables import Table

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from imae_jax.decode import Continuation, Method
    from imae_jax.language_model import Completion, LanguageModel

RUN_FILE, SCORES_FILE, RESULTS_FILE = "run.json", "scores.jsonl", "results.json"
MARKDOWN_FILE, LATEX_FILE = "table.md", "table.tex"
COMPARISON_FILE, HARNESS_FILE = "comparison.json", "lm_eval.json"
# Of `model_settings`: what scores depend on.
IDENTITY = ("base_model", "units", "tokenizer")
LONGEST_LABEL = 40  # characters
MANY_METHODS = "comma-separated methods (base,expert,in-model-contrast:beta=2, a number, …), or a YAML file"


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """What all evaluations of methods share."""
    parser.add_argument("--methods", default="base", help=MANY_METHODS)
    parser.add_argument("--out", required=True, type=Path, help="directory to write")
    parser.add_argument("--limit", type=int, help="use the first N of the split")
    parser.add_argument(
        "--split", choices=SPLITS, default="all", help="questions drawn for choosing settings"
    )
    parser.add_argument("--split-seed", type=int, default=0, help="of the draw")
    parser.add_argument("--dev-share", type=float, default=0.2, help="of the questions that dev gets")
    parser.add_argument(
        "--baseline", help="method that others are compared to (default: base, else the first)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap")
    parser.add_argument("--resume", action="store_true", help="go on with the unfinished run in OUT")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing OUT")


def check_arguments(args: argparse.Namespace, methods: Mapping[str, "Method"]) -> None:
    """Refuses what can be refused before a model is loaded, and locks OUT until the command ends."""
    if args.limit is not None and args.limit < 1:
        raise UserError(f"--limit {args.limit}: give at least 1")
    if not 0 < args.dev_share < 1:
        raise UserError(f"--dev-share {args.dev_share}: give a share between 0 and 1")
    if min(args.seed, args.split_seed) < 0:
        raise UserError("--seed and --split-seed must be at least 0")
    if args.baseline is not None and args.baseline not in methods:
        raise UserError(f"--baseline {args.baseline} is not among --methods: {', '.join(methods)}")
    if args.resume and args.overwrite:
        raise UserError("--resume and --overwrite exclude each other: give one of them")
    out = args.out
    lock_outputs(out)
    if not out.exists() or args.overwrite:
        check_new_directory(out, marker=_marker(out), overwrite=args.overwrite)
        return
    unfinished = (out / RUN_FILE).is_file() and not (out / RESULTS_FILE).exists()
    if not args.resume:
        way_out = "pass --resume to go on with it, or --overwrite" if unfinished else "or pass --overwrite"
        state = "holds an unfinished run" if unfinished else "exists already: choose another output"
        raise UserError(f"{out} {state}{':' if unfinished else ','} {way_out}")
    if not (out / RUN_FILE).is_file():
        raise UserError(f"{out} holds no {RUN_FILE}, so there is no run to resume: choose another output")


def _marker(out: Path) -> str:
    """The file by which a run is known, finished or not."""
    return RESULTS_FILE if (out / RESULTS_FILE).exists() else RUN_FILE


def parse_methods(text: str) -> dict[str, "Method"]:
    """Methods by label, from a comma-separated list or a YAML file with a list of settings.

    In YAML an entry may carry a `label` of its own, which it needs where names repeat.
    """
    import yaml

    from imae_jax.decode.methods import parse_method, split_methods

    if text.endswith((".yaml", ".yml")):
        try:
            entries = yaml.safe_load(read_text(text, "methods file"))
        except yaml.YAMLError as error:
            raise UserError(f"methods file {text} is not valid YAML: {error}") from error
        are_settings = isinstance(entries, list) and all(
            isinstance(entry, dict) and "name" in entry for entry in entries
        )
        if not entries or not are_settings:
            raise UserError(f"methods file {text} must hold a list of `- {{name: …}}`")
    else:
        entries = split_methods(text)
    methods: dict[str, Any] = {}
    for entry in entries:
        label = entry
        if isinstance(entry, dict):
            label = str(entry.get("label", entry["name"]))
            entry = {key: value for key, value in entry.items() if key != "label"}
        if label in methods:
            raise UserError(f"method {label!r} is listed twice: give each a label of its own")
        methods[label] = parse_method(entry)
    return methods


@dataclasses.dataclass(frozen=True)
class Pass:
    """Methods that are scored together.

    Attributes:
        models, method: for `decode.score`; the method is a `Joint`.
        labels: of its methods, in its order.
        places: of the items that they score.
    """

    models: Any
    method: Any
    labels: tuple[str, ...]
    places: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Plan:
    """How methods are scored.

    Attributes:
        passes: with the models that they run on.
        settings: of every label, resolved, and the fingerprint of what they name.
    """

    passes: tuple[Pass, ...]
    settings: dict[str, dict[str, Any]]


def plan(
    lm: "LanguageModel",
    methods: Mapping[str, "Method"],
    keys: Sequence[str],
    groups: Sequence[Sequence["Continuation"]],
) -> Plan:
    """Prepares methods, and finds which of them share forward passes.

    Args:
        lm: the model.
        methods: by label.
        keys: the items' questions, by which ITI's folds are told apart.
        groups: the answers of every item.

    Raises:
        UserError: a method that the model cannot run, a resource that does not fit, or answers over the
            context.
    """
    from imae_jax.decode.joint import Joint, share_streams
    from imae_jax.decode.scoring import check_groups

    settings, prepared = _prepare(lm, methods, keys, generating=False)
    everything = tuple(range(len(keys)))
    whole = {label: parts[0][:2] for label, parts in prepared.items() if len(parts) == 1}
    labels = list(whole)
    shared = [
        Pass(models, joint, tuple(labels[i] for i in places), everything)
        for models, joint, places in share_streams(list(whole.values()))
    ]
    passes = [
        Pass(models, Joint((method,)), (label,), places)
        for label, parts in prepared.items()
        if label not in whole
        for models, method, places in parts
    ]
    for part in (*shared, *passes):
        check_groups(part.models, groups)
    return Plan((*shared, *passes), settings)


def plan_generation(
    lm: "LanguageModel",
    methods: Mapping[str, "Method"],
    keys: Sequence[str],
    prompts: Sequence[str],
    options: Mapping[str, Any],
) -> Plan:
    """As `plan`, of text that the methods write: no two share a pass.

    Args:
        lm, methods, keys: as for `plan`.
        prompts: of every item.
        options: of `LanguageModel.generate`.

    Raises:
        UserError: as `plan`, or a prompt that leaves no room for new tokens.
    """
    settings, prepared = _prepare(lm, methods, keys, generating=True)
    passes = [
        Pass(models, method, (label,), places)
        for label, parts in prepared.items()
        for models, method, places in parts
    ]
    longest = max(map(len, lm.encode_prompts(prompts, options["format"])))
    context = min(part.models.context_length for part in passes)
    if longest + options["max_new_tokens"] > context:
        raise UserError(
            f"the longest prompt has {longest} tokens, with {options['max_new_tokens']} new ones over the "
            f"model's context of {context}: lower --max-new-tokens, or give a shorter --primer"
        )
    return Plan(tuple(passes), settings)


def _prepare(
    lm: "LanguageModel", methods: Mapping[str, "Method"], keys: Sequence[str], *, generating: bool
) -> tuple[dict[str, dict[str, Any]], dict[str, list[tuple[Any, "Method", tuple[int, ...]]]]]:
    """Every method's settings, and its parts: models, resolved method, places of its items."""
    settings, prepared = {}, {}
    for label, method in methods.items():
        parts = _parts(method, keys)
        resolved = [lm.prepare(part, generating=generating) for part, _ in parts]
        settings[label] = method_settings(lm, parts[0][0], resolved[0][1])
        if len(parts) > 1:
            folds = [lm.resource_fingerprint(part) for part, _ in parts]
            # Which questions a file is for decides as much as what it holds.
            assigned = hashlib.sha256(json.dumps([list(places) for _, places in parts]).encode()).hexdigest()
            settings[label] |= {
                "directions": method.directions,
                "folds": len(parts),
                "fingerprint": folds,
                "assignment": assigned,
            }
        prepared[label] = [(*both, tuple(places)) for both, (_, places) in zip(resolved, parts, strict=True)]
    return settings, prepared


def _parts(method: Any, keys: Sequence[str]) -> list[tuple[Any, Sequence[int]]]:
    """A method with the places of its items; of ITI with a directory of folds, one for each fold."""
    from imae_jax.decode.methods.iti import ITI

    from .iti import fold_files

    if not isinstance(method, ITI) or not Path(method.directions).is_dir():
        return [(method, range(len(keys)))]
    files = fold_files(Path(method.directions), keys)
    return [(dataclasses.replace(method, directions=str(file)), places) for file, places in files.items()]


def method_settings(lm: "LanguageModel", method: "Method", resolved: "Method") -> dict[str, Any]:
    """A resolved method's settings, and the fingerprint of what they name, which `lm` has loaded."""
    settings, fingerprint = resolved.settings(), lm.resource_fingerprint(method)
    return settings if fingerprint is None else settings | {"fingerprint": fingerprint}


def model_settings(lm: "LanguageModel", args: argparse.Namespace) -> dict[str, Any]:
    """What identifies a model in `run.json` and `results.json`.

    Args:
        lm: the model.
        args: of `cli.add_model_arguments`, from which it was loaded.
    """
    return {
        "model": args.model,
        "base_model": dataclasses.asdict(lm.base),
        "dtype": lm.base.dtype,
        "tokenizer": {"path": args.tokenizer, "sha256": lm.tokenizer.fingerprint},
        "anti_expert": lm.imae and lm.imae["anti_expert"],
        "units": lm.units_fingerprint,
    }


def same_model(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Whether two runs' `model_settings` are of one model, wherever its directory is."""
    a, b = without_places(a), without_places(b)
    return all(a.get(name) == b.get(name) for name in IDENTITY)


def _shown(labels: Sequence[str]) -> str:
    """Labels in front of a progress bar, which must fit a line with it."""
    together = ", ".join(labels)
    return together if len(together) <= LONGEST_LABEL else f"{len(labels)} methods"


class Run:
    """The directory of a run. `lines` are those of `scores.jsonl`, by (method, index).

    Args:
        out: the directory.
        settings: what the scores depend on.
        resume: go on with what is there.
        overwrite: replace what is there.

    Raises:
        UserError: OUT may not be replaced, belongs to other settings, or holds a line that is none.
    """

    def __init__(self, out: Path, settings: dict[str, Any], *, resume: bool, overwrite: bool):
        self.out, self.lines = out, {}
        settings = jsonable(settings)
        barrier("arguments checked")  # What one process makes, no other may take for an older run.
        if resume and out.exists():
            self._check(settings)
            self._read()
        elif is_main():
            with new_directory(out, marker=_marker(out), overwrite=overwrite) as new:
                (new / RUN_FILE).write_text(dumps(settings, indent=2) + "\n", encoding="utf-8")
                (new / SCORES_FILE).touch()
        barrier("run begins")
        self.resumed = len(self.lines)

    def _check(self, settings: dict[str, Any]) -> None:
        try:
            before = json.loads((self.out / RUN_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(
                f"{self.out / RUN_FILE} cannot be read ({first_line(error)}): start anew"
            ) from error
        for name, old, new in differences(without_places(before), without_places(settings)):
            older = note(old) if name.endswith("fingerprint") else ""
            raise UserError(
                f"{self.out} was scored with another {name} ({old}, now {new}){older}: restore it, or choose "
                "another output"
            )

    def _read(self) -> None:
        """Reads `scores.jsonl`; an unfinished last line, which a kill leaves, is removed."""
        path = self.out / SCORES_FILE
        kept = []
        text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
        # Not `splitlines`: a question may hold what else Unicode breaks lines at.
        for place, line in enumerate(text.split("\n")[:-1], 1):
            try:
                entry = json.loads(line)
                key = entry["method"], entry["index"]
                is_new = key not in self.lines
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(
                    f"{path} line {place} is damaged: remove it, and it is scored again"
                ) from error
            if is_new:
                self.lines[key] = entry
                kept.append(line + "\n")
        write_text(path, "".join(kept))

    def score(
        self,
        lm: "LanguageModel",
        passes: Sequence[Pass],
        groups: Sequence[Sequence["Continuation"]],
        line: Callable[[int, list[np.ndarray]], dict[str, Any]],
        *,
        index: Sequence[int],
        quiet: bool = False,
    ) -> dict[str, dict[str, Any]]:
        """Scores what has no line yet.

        Args:
            lm: the model.
            passes: from `plan`.
            groups: the answers of every item.
            line: the fields of an item's line, from its place and its answers' token scores.
            index: every item's number in its data.
            quiet: no progress bar.

        Returns:
            For every method how long its pass took and which others it held.
        """
        from tqdm import tqdm

        from imae_jax.decode import score

        costs: dict[str, dict[str, Any]] = {}
        with self._appended() as append:
            for part in passes:
                start = time.perf_counter()
                missing = [
                    place
                    for place in part.places
                    if any((label, index[place]) not in self.lines for label in part.labels)
                ]
                results = score(
                    part.models,
                    lm.config,
                    [groups[p] for p in missing],
                    part.method,
                    where=lambda i, j, missing=missing: f"question {index[missing[i]]}, answer {j}",
                )
                bar = tqdm(
                    results,
                    total=len(part.places),
                    initial=len(part.places) - len(missing),
                    desc=_shown(part.labels),
                    unit="item",
                    disable=quiet,
                )
                for i, scored in bar:
                    place = missing[i]
                    for column, label in enumerate(part.labels):
                        if (label, index[place]) not in self.lines:
                            of_method = [answer[:, column] for answer in scored.scores]
                            append(label, index[place], line(place, of_method))
                _add_costs(costs, part, start)
        return costs

    def generate(
        self,
        lm: "LanguageModel",
        passes: Sequence[Pass],
        prompts: Sequence[str],
        line: Callable[[int, "Completion"], dict[str, Any]],
        *,
        index: Sequence[int],
        batch_size: int,
        options: Mapping[str, Any],
        quiet: bool = False,
    ) -> dict[str, dict[str, Any]]:
        """Continues the prompts that have no line yet.

        Args:
            lm: the model.
            passes: from `plan_generation`.
            prompts: of every item.
            line: the fields of an item's line, from its place and what its prompt was continued with.
            index: every item's number in its data.
            batch_size: prompts at a time.
            options: of `LanguageModel.generate`.
            quiet: no progress bar.

        Returns:
            As `score`.
        """
        from tqdm import tqdm

        costs: dict[str, dict[str, Any]] = {}
        with self._appended() as append:
            for part in passes:
                start = time.perf_counter()
                (label,) = part.labels
                with tqdm(total=len(part.places), desc=label, unit="item", disable=quiet) as bar:
                    # Cut from all items, those done too: what is drawn depends on a row's place in its batch.
                    for number, first in enumerate(range(0, len(part.places), batch_size)):
                        batch = part.places[first : first + batch_size]
                        missing = [place for place in batch if (label, index[place]) not in self.lines]
                        if missing:
                            seed = (options["seed"] + number) % 2**31
                            texts = [prompts[place] for place in batch]
                            written = lm.complete(texts, part.method, **{**options, "seed": seed})
                            for place, completion in zip(batch, written, strict=True):
                                if place in missing:
                                    append(label, index[place], line(place, completion))
                        bar.update(len(batch))
                _add_costs(costs, part, start)
        return costs

    @contextlib.contextmanager
    def _appended(self) -> Iterator[Callable[[str, int, dict[str, Any]], None]]:
        """Yields what adds the line of a method and item, there at once even if the process is killed."""
        path = self.out / SCORES_FILE
        try:
            with path.open("a", encoding="utf-8") if is_main() else contextlib.nullcontext() as file:

                def append(label: str, number: int, fields: dict[str, Any]) -> None:
                    entry = {"index": number, "method": label, **fields}
                    if file is not None:
                        file.write(dumps(entry) + "\n")
                        file.flush()
                    self.lines[label, number] = jsonable(entry)

                yield append
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror or error}") from error

    def of(self, label: str, index: Sequence[int]) -> list[dict[str, Any]]:
        """A method's lines, in the order of the items."""
        return [self.lines[label, i] for i in index]

    def finish(
        self,
        results: dict[str, Any],
        tables: Sequence[Table],
        plots: Mapping[str, Any],
        index: Sequence[int],
    ) -> None:
        """Writes results, tables, plots and the lines in their order: method by method, item by item.

        Args:
            results: for `results.json`.
            tables: for Markdown and LaTeX.
            plots: matplotlib figures by the name of their file.
            index: the items' numbers.
        """
        if not is_main():
            return
        lines = [line for label in results["methods"] for line in self.of(label, index)]
        write_text(self.out / SCORES_FILE, "".join(dumps(line) + "\n" for line in lines))
        write_outputs(self.out, tables, plots)
        write_text(self.out / RESULTS_FILE, dumps(results, indent=2) + "\n")


def _add_costs(costs: dict[str, dict[str, Any]], part: Pass, start: float) -> None:
    seconds = time.perf_counter() - start
    for label in part.labels:
        cost = costs.setdefault(label, {"seconds": 0.0, "scored_with": []})
        cost["seconds"] += seconds
        cost["scored_with"] = [other for other in part.labels if other != label]


def write_outputs(out: Path, tables: Sequence[Table], plots: Mapping[str, Any]) -> None:
    """Tables as Markdown and LaTeX, plots as PNG and SVG."""
    write_text(out / MARKDOWN_FILE, "\n".join(table.markdown() for table in tables))
    write_text(out / LATEX_FILE, "\n".join(table.latex() for table in tables))
    for name, figure in plots.items():
        for suffix in ("png", "svg"):
            try:
                figure.savefig(out / f"{name}.{suffix}", dpi=150)
            except OSError as error:
                raise UserError(f"{out / name}.{suffix} cannot be written: {error.strerror}") from error


def differences(a: Any, b: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Where two settings differ: dotted names with both values."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in [*a, *(key for key in b if key not in a)]:
            yield from differences(a.get(key), b.get(key), f"{name}.{key}" if name else key)
    elif a != b:
        yield name, a, b


def jsonable(value: Any) -> Any:
    """Values that strict JSON can hold: NaN is None, an infinity the text "inf" or "-inf"."""
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    if isinstance(value, float | np.floating):
        value = float(value)
        return value if math.isfinite(value) else None if math.isnan(value) else str(value)
    if isinstance(value, np.integer | np.bool_):
        return value.item()
    return str(value) if isinstance(value, Path) else value


def dumps(value: Any, **kwargs: Any) -> str:
    return json.dumps(jsonable(value), ensure_ascii=False, allow_nan=False, **kwargs)


def read_run(path: Path, benchmark: str | None = None) -> dict[str, Any]:
    """A finished run's `results.json`.

    Raises:
        UserError: there is none, it is damaged, or it is of another benchmark.
    """
    file = path / RESULTS_FILE
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        unfinished = (path / RUN_FILE).is_file()
        state = "its run is unfinished: go on with --resume" if unfinished else "give that of a finished run"
        raise UserError(f"{path} holds no {RESULTS_FILE}: {state}") from error
    except ValueError as error:
        raise UserError(f"{file} is not valid JSON: {error}") from error
    keys = ("benchmark", "protocol", "model", "dtype", "versions", "methods")
    missing = [key for key in keys if key not in results] if isinstance(results, dict) else keys
    if missing or not results["methods"]:
        raise UserError(f"{file} lacks {', '.join(missing) or 'methods'}: evaluate again")
    if benchmark not in (None, results["benchmark"]):
        raise UserError(f"{path} is a run of {results['benchmark']}, not of {benchmark}: give another")
    return results


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a finished run's `scores.jsonl`."""
    try:
        text = (path / SCORES_FILE).read_text(encoding="utf-8")
        return [json.loads(line) for line in text.split("\n") if line]
    except (OSError, ValueError) as error:
        raise UserError(f"{path / SCORES_FILE} cannot be read: {first_line(error)}") from error


def called(program: str, arguments: Sequence[str] | None) -> str:
    """The command line of this run.

    Args:
        program: `ArgumentParser.prog`.
        arguments: of `main`; None for those of the process.
    """
    return shlex.join([*program.split(), *(sys.argv[1:] if arguments is None else arguments)])


def environment(mesh: "Mesh | None" = None) -> dict[str, Any]:
    """What figures depend on besides the settings.

    Args:
        mesh: devices that the model is spread over.
    """
    return {
        "mesh": mesh and dict(mesh.shape),
        "versions": runtime.versions(),
        "git": runtime.git_state(),
        "machine": platform.machine(),
        "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    }
