"""Keep what the results pages need of finished runs: `python results/records.py out/results results/records`.

RUN.json.bz2     MC1, MC2 and MC3 of every test question for each method of a TruthfulQA run
summaries.json   aggregates of all other runs: training, neutral text, HaluEval pairs, cost of decoding
questions.json   the test questions: indices in TruthfulQA.csv, and what answer lengths alone would score

Records hold no text of the benchmarks. A record stays until its run is recorded again, so that runs of
several machines come together.
"""

import argparse
import bz2
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from imae_jax.evaluate.benchmarks.questions import Question, load_data
from imae_jax.files import read_json
from imae_jax.train.run_directory import ENVIRONMENT_FILE, IMAE_DIR, METRICS_FILE

METRICS = ("mc1", "mc2", "mc3")
SCALE = 10_000  # Scores are recorded as integers: four decimals.
FILE_SETTINGS = {"anti_expert", "amateur", "directions"}
OWN_MODEL, OWN_MODEL_NAME = "merged", "icd-model"  # ICD with an LLM of its own instead of a LoRA adapter.
LAST_STEPS = 10  # Mean gates are those of the last training steps.


def method_name(label: str) -> str:
    """A method's label without the files that it reads and without `renormalize=false`."""
    name, _, settings = label.partition(":")
    values = dict(setting.split("=", 1) for setting in settings.split(",") if setting)
    if Path(values.get("anti_expert", "")).name == OWN_MODEL:
        name = OWN_MODEL_NAME
    kept = [
        f"{key}={value}"
        for key, value in values.items()
        if key not in FILE_SETTINGS and (key, value) != ("renormalize", "false")
    ]
    return f"{name}:{','.join(kept)}" if kept else name


def write_scores(path: Path, source: Mapping[str, Any], scores: Mapping[str, Mapping[str, Sequence]]) -> None:
    """Write one run's record.

    Args:
        path: ends in `.json.bz2`.
        source: command and commit of the run.
        scores: by method and metric, a value in [0, 1], or None where undefined, for every test question.
    """
    integers = {
        method: {m: [None if x is None else round(x * SCALE) for x in own[m]] for m in METRICS}
        for method, own in scores.items()
    }
    text = json.dumps({"source": source, "scores": integers}, separators=(",", ":"))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bz2.compress(text.encode()))


def read_scores(path: Path) -> dict[str, Any]:
    """The record that `write_scores` wrote; scores in [0, 1], None as NaN."""
    record = json.loads(bz2.decompress(path.read_bytes()))
    record["scores"] = {
        method: {m: [float("nan") if x is None else x / SCALE for x in own[m]] for m in METRICS}
        for method, own in record["scores"].items()
    }
    return record


def question_facts(questions: Sequence[Question], indices: Sequence[int]) -> dict[str, Any]:
    """Where the best answer is longer than the mean of the false ones, the longest or the shortest of all."""
    by_index = {question.index: question for question in questions}
    facts: dict[str, Any] = {"index": list(indices), "best_longer": "", "longest": "", "shortest": ""}
    for question in map(by_index.__getitem__, indices):
        best, false = len(question.true[question.best]), [len(answer) for answer in question.false]
        facts["best_longer"] += str(int(best > statistics.mean(false)))
        facts["longest"] += str(int(best > max(false)))
        facts["shortest"] += str(int(best < min(false)))
    return facts


def source(results: Mapping[str, Any]) -> dict[str, Any]:
    return {"command": results["command"], "commit": (results["git"] or {}).get("commit")}


def record_truthfulqa(run: Path, results: Mapping[str, Any], records: Path, name: Path) -> None:
    lines = map(json.loads, (run / "scores.jsonl").read_text(encoding="utf-8").splitlines())
    by_method: dict[str, dict[int, dict[str, Any]]] = {}
    for line in lines:
        by_method.setdefault(method_name(line["method"]), {})[line["index"]] = line
    indices = sorted(next(iter(by_method.values())))
    facts = question_facts(load_data(results["data"]["path"]).questions, indices)
    facts["data_sha256"] = results["data"]["sha256"]
    path = records / "questions.json"
    if path.is_file() and read_json(path) != facts:
        raise SystemExit(f"error: {run} asked other questions than {path} has: remove the older records")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(facts) + "\n", encoding="utf-8")
    scores = {
        method: {m: [own[index][m] for index in indices] for m in METRICS}
        for method, own in by_method.items()
        if is_shown(name, method)
    }
    write_scores(records / f"{name}.json.bz2", source(results), scores)


def is_shown(run: Path, method: str) -> bool:
    """Whether the pages show a method of a run: of ablations, for example, the expert and its target."""
    if run.parts[0] == "ablations" and not run.parts[1].startswith("trivia"):
        return method in ("base", "expert") or method.endswith("renormalize=true")
    return run.name == "seed0" or method not in (
        f"{name}:renormalize=true" for name in ("in-model-contrast", "icd")
    )


def summarize(results: Mapping[str, Any]) -> dict[str, Any]:
    """Aggregates of a run other than TruthfulQA, by method."""
    if "batch_sizes" in results:
        fields = ("ms_per_token", "memory_bytes")
        rows = results["batch_sizes"]["1"]
    elif results["benchmark"] == "halueval":
        fields = ("raw", "interval")
        rows = {k: row | {"interval": row["intervals"]["raw"]} for k, row in results["parts"]["all"].items()}
    else:
        fields, rows = ("kl", "top1_agreement"), results["methods"]
    return {method_name(label): {f: rounded(row[f]) for f in fields} for label, row in rows.items()}


def rounded(value: Any) -> Any:
    """Six significant digits are more than the pages show."""
    return [rounded(x) for x in value] if isinstance(value, list) else float(f"{value:.6g}")


def summarize_training(run: Path) -> dict[str, Any]:
    """Share of tokens in T_fact, and mean gates on T_fact and off it at the end of training."""
    steps = (run / METRICS_FILE).read_text(encoding="utf-8").splitlines()[-LAST_STEPS:]
    summary: dict[str, Any] = {
        "commit": (read_json(run / ENVIRONMENT_FILE, list)[0]["git"] or {}).get("commit")
    }
    summary["kept_share"] = rounded(
        read_json(run / IMAE_DIR / "imae_config.json")["training"]["data"]["kept_share"]
    )
    for key in ("gate_on_fact", "gate_off_fact"):
        values = [value for step in steps if (value := json.loads(step)[key]) is not None]
        summary[key] = rounded(statistics.mean(values)) if values else None
    return summary


def record(run: Path, root: Path, records: Path) -> None:
    """Record one finished run.

    Args:
        run: directory of the run.
        root: directory of all runs; a run's name is its path from there.
        records: directory of the records.
    """
    name = run.relative_to(root)
    if (run / "results.json").is_file():
        results = read_json(run / "results.json")
        if results.get("benchmark") == "truthfulqa":
            record_truthfulqa(run, results, records, name)
            return
        summary = summarize(results)
    else:
        summary = summarize_training(run)
    path = records / "summaries.json"
    summaries = (read_json(path) if path.is_file() else {}) | {str(name): summary}
    lines = (f"{json.dumps(key)}: {json.dumps(summaries[key])}" for key in sorted(summaries))
    records.mkdir(parents=True, exist_ok=True)
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("root", type=Path, help="directory of the runs of `make results`")
    parser.add_argument("records", type=Path, help="directory of the records")
    args = parser.parse_args()
    evaluations = {path.parent for path in args.root.rglob("results.json")}
    trainings = {path.parents[1] for path in args.root.rglob("imae/imae_config.json")}
    for run in sorted(evaluations | trainings):
        if run.relative_to(args.root).parts[0] != "pairs":  # Not on the pages.
            record(run, args.root, args.records)


if __name__ == "__main__":
    main()
