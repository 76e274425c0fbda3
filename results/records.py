"""Keeps what docs/results.md needs of runs: `python results/records.py out/results docs/results/runs`.

`make results` calls it. A record is small and has no text of the benchmarks: settings and commit of a run,
of TruthfulQA the metrics of every question. So tables and tests can be made again without the runs, and runs
made on several machines come together.
"""

import argparse
import json
import re
import shutil
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from imae_jax.evaluate.benchmarks.questions import Question, load_data, select
from imae_jax.evaluate.runner.directory import read_records

METRICS = ("mc1", "mc2", "mc3")
# Of MC2 and MC3, which are shares.
DECIMALS = 6
# What `make results` calls its directory, whatever it is on a machine.
ROOT = "out/results"
MADE_BY = ("command", "git", "versions", "machine", "cpu_cores")
MADE_OF = ("protocol", "split", "units", "workload", "dtype")
# What a finished training run leaves behind.
TRAINED = Path("imae/imae_config.json")
# Of a training run, of which the mean gates are kept.
LAST_STEPS = 10


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def place(path: str, root: Path) -> str:
    """Where a file lies for every reader: under `out/results`, or among the DATA that one brings along."""
    own = Path(path).is_relative_to(root)
    return f"{ROOT}/{Path(path).relative_to(root)}" if own else f"DATA/{Path(path).name}"


def source(results: Mapping[str, Any], root: Path) -> dict[str, Any]:
    """How an evaluation was run, and the hashes of what it was run on."""
    # Only `evaluate.cost` has an environment of its own.
    known = {**results, **results.get("environment", {})}
    kept = {key: known.get(key) for key in MADE_BY + MADE_OF}
    data = results.get("data", {})
    if "path" in data:
        kept["command"] = kept["command"].replace(data["path"], place(data["path"], root))
        kept["data_sha256"] = data.get("sha256")
    return {key: value for key, value in kept.items() if value is not None}


def question_facts(questions: list[Question]) -> dict[str, list[int]]:
    """Index and split of every question, and what its answers' lengths (in characters) alone would score."""
    test = set(select([q.text for q in questions], "test"))
    facts: dict[str, list[int]] = {"index": [], "test": [], "best_longer": [], "longest": [], "shortest": []}
    for i, question in enumerate(questions):
        best, false = len(question.true[question.best]), [len(answer) for answer in question.false]
        row = (question.index, i in test, best > np.mean(false), best > max(false), best < min(false))
        for name, value in zip(facts, row, strict=True):
            facts[name].append(int(value))
    return facts


def of_truthfulqa(run: Path, results: Mapping[str, Any]) -> dict[str, Any]:
    """Every method's metrics, question by question, in the data's order; None where one is undefined."""
    lines: dict[str, list[dict[str, Any]]] = {}
    for line in sorted(read_records(run), key=lambda line: line["index"]):
        lines.setdefault(line["method"], []).append(line)
    # The split is of all questions, also where the run has a part of them.
    facts = question_facts(sorted(load_data(results["data"]["path"]).questions, key=lambda q: q.index))
    asked = {line["index"] for own in lines.values() for line in own}
    here = [i for i, index in enumerate(facts["index"]) if index in asked]
    scores = {
        label: {m: [None if line[m] is None else round(line[m], DECIMALS) for line in own] for m in METRICS}
        for label, own in lines.items()
    }
    return {
        "questions": {name: [values[i] for i in here] for name, values in facts.items()},
        "scores": scores,
    }


def of_halueval(results: Mapping[str, Any]) -> dict[str, Any]:
    kept = ("raw", "per_token", "n")
    return {
        "scores": {
            label: {key: row[key] for key in kept} | {"interval": row["intervals"]["raw"]}
            for label, row in results["parts"]["all"].items()
        }
    }


def of_harm(results: Mapping[str, Any]) -> dict[str, Any]:
    kept = ("kl", "top1_agreement")
    rows = results["methods"].items()
    return {
        "n_tokens": results["n_tokens"],
        "scores": {label: {k: row[k] for k in kept} for label, row in rows},
    }


def of_evaluation(run: Path, root: Path) -> dict[str, Any]:
    results = read_json(run / "results.json")
    if "batch_sizes" in results:
        return {"source": source(results, root), "batch_sizes": results["batch_sizes"]}
    of_benchmark = {"truthfulqa": lambda r: of_truthfulqa(run, r), "halueval": of_halueval, "harm": of_harm}
    settings = {label: row["settings"] for label, row in results["methods"].items()}
    found = of_benchmark[results["benchmark"]](results)
    return {"source": source(results, root), "methods": settings, **found}


def of_training(run: Path, root: Path) -> dict[str, Any]:
    """Settings, every start (a resumed run has several), and what the token filter and the gates came to."""
    shown = ("started", "git", "versions")
    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    if config["data"]["path"] is not None:
        config["data"]["path"] = place(config["data"]["path"], root)
    steps = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-LAST_STEPS:]
    gates = {key: [json.loads(step)[key] for step in steps] for key in ("gate_on_fact", "gate_off_fact")}
    # Without a token filter there is nothing off T_fact: null, 0 in runs of an earlier version.
    found = {key: [value for value in own if value is not None and value > 0] for key, own in gates.items()}
    return {
        "config": config,
        "starts": [
            {k: start[k] for k in shown if k in start} for start in read_json(run / "environment.json")
        ],
        "last_steps": {key: statistics.mean(own) if own else None for key, own in found.items()},
        "kept_share": read_json(run / TRAINED)["training"]["data"]["kept_share"],
    }


def finished(root: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and record of every finished run."""
    for path in _files(root, "results.json"):
        yield str(path.parent.relative_to(root)), of_evaluation(path.parent, root)
    for path in _files(root, "environment.json"):
        run = path.parent
        if (run / TRAINED).is_file():
            name = run.relative_to(root)
            yield str(name if name.parts[0] == "train" else name / "train"), of_training(run, root)


def _files(root: Path, name: str) -> list[Path]:
    """Nothing on the page is of the runs on pairs."""
    return sorted(path for path in root.rglob(name) if path.relative_to(root).parts[0] != "pairs")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("root", type=Path, help="where `make results` keeps its runs")
    parser.add_argument("records", type=Path, help="where to keep what is published of them")
    args = parser.parse_args()
    for name, record in finished(args.root):
        path = args.records / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        # A line for every list of numbers.
        text = json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False)
        text = text.replace(f"{args.root}/", f"{ROOT}/")
        text = re.sub(r"\[\s+([-\d.,\snul]+?)\s+\]", lambda m: f"[{' '.join(m[1].split())}]", text)
        path.write_text(text + "\n", encoding="utf-8")
    curves = args.root / "train" / "seed0" / "training.png"
    if curves.is_file():
        shutil.copy(curves, args.records.parent)


if __name__ == "__main__":
    main()
