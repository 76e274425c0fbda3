"""Keeps what docs/results.md needs of runs: `python results/records.py out/results docs/results/runs`.

`make results` calls it. A record is small and has no text of the benchmarks: settings, commit and command of
a run, of TruthfulQA the metrics of every question. So tables and tests can be made again without the runs,
and runs made on several machines come together.
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

from imae_jax.evaluate.questions import Question, load_data, select
from imae_jax.evaluate.runs import read_lines

METRICS = ("mc1", "mc2", "mc3")
# MC2 and MC3 of a question, as shares: a mean over hundreds is exact to a hundredth of a percentage point.
DECIMALS = 4
# Of a training run, of which the mean gates are kept.
LAST_STEPS = 10


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def source(results: Mapping[str, Any]) -> dict[str, Any]:
    """How an evaluation was run. Where its data lay is one machine's affair."""
    kept = {
        key: results.get(key) for key in ("command", "git", "versions", "machine", "cpu_cores", "protocol")
    }
    path = results.get("data", {}).get("path")
    if path is not None:
        kept["command"] = kept["command"].replace(path, f"DATA/{Path(path).name}")
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
    for line in sorted(read_lines(run), key=lambda line: line["index"]):
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


def of_evaluation(run: Path) -> dict[str, Any]:
    results = read_json(run / "results.json")
    if "batch_sizes" in results:
        return {"source": source(results), "batch_sizes": results["batch_sizes"]}
    of_benchmark = {"truthfulqa": lambda r: of_truthfulqa(run, r), "halueval": of_halueval, "harm": of_harm}
    settings = {label: row["settings"] for label, row in results["methods"].items()}
    found = of_benchmark[results["benchmark"]](results)
    return {"source": source(results), "methods": settings, **found}


def of_training(run: Path) -> dict[str, Any]:
    """Settings, every start (a resumed run has several), and what the token filter and the gates came to."""
    shown = ("started", "git", "versions", "machine", "cpu_cores")
    config = (run / "config.yaml").read_text(encoding="utf-8")
    record: dict[str, Any] = {
        "config": re.sub(r"^(\s+path: ).*/", r"\1DATA/", config, flags=re.M),
        "starts": [
            {k: start[k] for k in shown if k in start} for start in read_json(run / "environment.json")
        ],
    }
    trained = run / "imae" / "imae_config.json"
    if trained.is_file():
        steps = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-LAST_STEPS:]
        record["last_steps"] = {
            key: statistics.mean(json.loads(step)[key] for step in steps)
            for key in ("anti", "expert", "gate_on_fact", "gate_off_fact")
        }
        record["kept_share"] = read_json(trained)["training"]["data"]["kept_share"]
    return record


def finished(root: Path) -> Iterator[tuple[str, Path, bool]]:
    """Name and directory of every finished run, and whether it is of training."""
    for path in sorted(root.rglob("results.json")):
        yield str(path.parent.relative_to(root)), path.parent, False
    for path in sorted(root.rglob("environment.json")):
        run = path.parent
        if (run / "imae" / "imae_config.json").is_file() or (run / "icd" / "adapter").is_dir():
            name = run.relative_to(root)
            yield str(name if name.parts[0] == "train" else name / "train"), run, True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("root", type=Path, help="where `make results` keeps its runs")
    parser.add_argument("records", type=Path, help="where to keep what is published of them")
    args = parser.parse_args()
    for name, run, trained in finished(args.root):
        record = of_training(run) if trained else of_evaluation(run)
        path = args.records / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        # A line for every list of numbers.
        text = json.dumps(record, indent=1, ensure_ascii=False)
        text = re.sub(r"\[\s+([-\d.,\snul]+?)\s+\]", lambda m: f"[{' '.join(m[1].split())}]", text)
        path.write_text(text + "\n", encoding="utf-8")
    curves = args.root / "train" / "seed0" / "training.png"
    if curves.is_file():
        shutil.copy(curves, args.records.parent)


if __name__ == "__main__":
    main()
