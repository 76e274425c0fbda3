"""Write the tables of the results pages and of README.md from the records: `python results/tables.py`.

A table stands between `<!-- NAME -->` and `<!-- /NAME -->`. Differences are paired by question, in points.
"""

import argparse
import re
import statistics
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from records import METRICS, OWN_MODEL_NAME, read_scores

from imae_jax import stats
from imae_jax.files import read_json

ROOT = Path(__file__).parents[1]
RECORDS = Path(__file__).parent / "records"
EXPERT, ANTI_EXPERT, STRONGER = "expert", "anti-expert", "-2"
CONTRAST, ICD = "in-model-contrast", "icd"
TARGET, ICD_2 = f"{CONTRAST}:beta=2,renormalize=true", f"{ICD}:beta=2,renormalize=true"
# Methods by the names of the records, in the order of the tables.
NAMES = {
    "base": "base",
    EXPERT: "expert",
    "-0.5": "strength −0.5",
    STRONGER: "strength −2",
    ANTI_EXPERT: "anti-expert",
    TARGET: "in-model contrast, β 2",
    ICD_2: "ICD, β 2",
    f"{CONTRAST}:renormalize=true": "in-model contrast, β 1",
    f"{ICD}:renormalize=true": "ICD, β 1",
    "cd:renormalize=true": "CD",
    "dola:renormalize=true": "DoLa",
    "sled": "SLED",
    "iti": "ITI",
    CONTRAST: "in-model contrast, raw sums",
    ICD: "ICD, raw sums",
    "cd": "CD, raw sums",
    "dola": "DoLa, raw sums",
    OWN_MODEL_NAME: "ICD, a model of its own",
}
SHORT = (EXPERT, STRONGER, TARGET, ICD_2, CONTRAST, ICD)
UNTRAINED = ("cd:renormalize=true", "dola:renormalize=true", "sled", "iti")
CONTROLS = {"right": "LoRA on right answers, as a model", "instruction": "“Answer truthfully.” in the prompt"}
HALUEVAL, CHAT, SENTENCES = "tqa/primer/seed{}", "tqa/chat/seed0", "ablations/trivia{}/tqa"
# Training data with seed and prompts; the run on hallucinated answers, and its placebo on right ones.
PLACEBOS = {
    "HaluEval, seed 0": (HALUEVAL.format(0), "tqa/primer/placebo"),
    "HaluEval, seed 0, chat": (CHAT, "tqa/chat/placebo"),
    "sentences, seed 0": (SENTENCES.format(""), SENTENCES.format("-right")),
    "sentences, seed 1": (SENTENCES.format("-seed1"), SENTENCES.format("-right-seed1")),
}
SEEDS = {f"HaluEval, seed {i}": HALUEVAL.format(i) for i in range(3)} | {
    f"sentences, seed {i}": SENTENCES.format(end) for i, end in enumerate(("", "-seed1"))
}
ABLATIONS = {
    "reference": "nothing: the reference",
    "beta1": "β 1 instead of 2",
    "beta1.25": "β 1.25",
    "beta4": "β 4",
    "delta0.1": "δ 0.1 instead of 0.001",
    "logit0.1": "plausible tokens by logits, δ 0.1",
    "logit1": "plausible tokens by logits, δ 1",
    "gamma0": "token filter γ 0 instead of 1",
    "gamma2": "token filter γ 2",
    "nofilter": "no token filter",
    "nogate": "no gate loss",
    "width0.1": "unit width A/F 0.1 instead of 0.37",
    "width1": "unit width A/F 1",
    "upper": "units in the upper 15 layers alone",
    "example": "mean over examples, not tokens",
    "matched": "pairs whose lengths differ by a factor of 2 at most",
}
DELTAS = ("Δ MC1", "Δ MC2", "Δ MC3")
Row = tuple[str, ...]
Table = tuple[Row, list[Row]]


@cache
def scores(run: str) -> dict[str, dict[str, np.ndarray]]:
    """Per-question metrics of a run's methods."""
    methods = read_scores(RECORDS / f"{run}.json.bz2")["scores"]
    return {method: {m: np.array(own[m]) for m in METRICS} for method, own in methods.items()}


@cache
def compare(run: str, method: str, other_run: str, other: str) -> tuple[tuple[float, float, float], ...]:
    """(difference, low, high) of every metric, in points, with a 95 % interval of the paired bootstrap."""
    pairs = zip(scores(run)[method].values(), scores(other_run)[other].values(), strict=True)
    return tuple(interval(values - others) for values, others in pairs)


def interval(values: np.ndarray) -> tuple[float, float, float]:
    mean = stats.mean(values, seed=0).scaled(100)
    return (mean["value"], *mean["interval"])


def is_clear(estimate: tuple[float, float, float]) -> bool:
    """Whether the interval excludes 0."""
    _, low, high = estimate
    return low > 0 or high < 0


def cell(estimate: tuple[float, float, float], sign: str = "+") -> str:
    text = "{:{s}.1f} [{:{s}.1f}, {:{s}.1f}]".format(*estimate, s=sign)
    return f"**{text}**" if sign and is_clear(estimate) else text


def cells(run: str, method: str, other_run: str = "", other: str = "base") -> Row:
    return tuple(map(cell, compare(run, method, other_run or run, other)))


def short_cell(run: str, method: str, other_run: str = "", other: str = "base") -> str:
    """All metrics in one cell, bold where the interval excludes 0."""
    estimates = compare(run, method, other_run or run, other)
    return " / ".join(f"**{e[0]:+.1f}**" if is_clear(e) else f"{e[0]:+.1f}" for e in estimates)


def base_cells(run: str, method: str = "base") -> Row:
    return tuple(cell(interval(x), "") for x in scores(run)[method].values())


def summary_table() -> Table:
    """README: base, expert, its placebo, in-model contrast as probabilities."""
    run, placebo = PLACEBOS["HaluEval, seed 0"]
    rows = [("base", *base_cells(run)), ("expert (difference to base)", *cells(run, EXPERT))]
    rows.append(("its placebo: trained on *right* answers", *cells(placebo, EXPERT)))
    rows.append(("in-model contrast, β 2, as probabilities", *cells(run, TARGET)))
    return ("", "MC1", "MC2", "MC3"), rows


def main_table() -> Table:
    """What is trained on hallucinated answers and its placebo."""
    run, _ = PLACEBOS["HaluEval, seed 0"]
    rows = [("base (scores)", "", *base_cells(run))]
    for data, runs in PLACEBOS.items():
        if data in ("HaluEval, seed 0", "sentences, seed 0"):
            for method in SHORT:
                for kind, trained in zip(("hallucinated", "right"), runs, strict=True):
                    of = f"{data.removesuffix(', seed 0')}, {kind}"
                    rows.append((NAMES[method], of, *cells(trained, method)))
    rows += [(NAMES[method], "", *cells(run, method)) for method in UNTRAINED]
    return ("method", "trained on", *DELTAS), rows


def methods_table(protocol: str) -> Table:
    run = f"tqa/{protocol}/seed0"
    rows = [("base (scores)", *base_cells(run))]
    rows += [(NAMES[method], *cells(run, method)) for method in NAMES if method in scores(run)][1:]
    rows += [(name, *cells(f"tqa/{protocol}/{key}", "base", run)) for key, name in CONTROLS.items()]
    return ("method", *DELTAS), rows


def pairs_table() -> Table:
    """Methods of one run against each other: the expert and its target, both contrasts."""
    runs = {**SEEDS, "HaluEval, seed 0, chat": CHAT}
    runs |= {f"{data}, placebo": right for data, (_, right) in PLACEBOS.items()}
    pairs = ((EXPERT, TARGET), (TARGET, ICD_2), (CONTRAST, ICD))
    return ("methods", "trained on", *DELTAS), [
        (f"{NAMES[one]} − {NAMES[other]}", data, *cells(run, one, run, other))
        for one, other in pairs
        for data, run in sorted(runs.items())
    ]


def seeds_table() -> Table:
    return ("method", "trained on", *DELTAS), [
        (NAMES[method], data, *cells(run, method))
        for method in (*SHORT, ANTI_EXPERT)
        for data, run in SEEDS.items()
    ]


def deviations_table() -> Table:
    """Mean and standard deviation of scores over HaluEval's training seeds."""
    rows = []
    for method in (*SHORT, ANTI_EXPERT):
        row = [NAMES[method]]
        for metric in METRICS:
            means = [100 * np.nanmean(scores(HALUEVAL.format(i))[method][metric]) for i in range(3)]
            row.append(f"{statistics.mean(means):.1f} ± {statistics.stdev(means):.1f}")
        rows.append(tuple(row))
    return ("method", "MC1", "MC2", "MC3"), rows


def placebo_table() -> Table:
    runs = {f"HaluEval, seed {i}": (HALUEVAL.format(i), "tqa/primer/placebo") for i in range(3)} | PLACEBOS
    return ("method", "trained on", *DELTAS), [
        (NAMES[method], data, *cells(run, method, right, method))
        for method in (*SHORT, ANTI_EXPERT)
        for data, (run, right) in runs.items()
    ]


def length_table() -> Table:
    """Scores where the best answer is longer than the mean false one, and where it is not."""
    facts = read_json(RECORDS / "questions.json")
    flags = {key: np.array([x == "1" for x in facts[key]]) for key in ("best_longer", "longest", "shortest")}
    parts = (flags["best_longer"], ~flags["best_longer"])
    rows = [
        (
            f"always the {key} answer (scores)",
            *(cell(interval(flags[key][part]), "") for part in parts),
            "",
            "",
        )
        for key in ("longest", "shortest")
    ]
    methods = scores(HALUEVAL.format(0))
    columns = [(metric, part) for metric in ("mc1", "mc2") for part in parts]
    base = [cell(interval(methods["base"][metric][part]), "") for metric, part in columns]
    rows.append(("base (scores)", *base))
    sources = [("", HALUEVAL.format(0)), (", placebo", "tqa/primer/placebo")]
    for method in (*SHORT, *UNTRAINED):
        for suffix, run in sources:
            if method in scores(run):
                minus = {m: scores(run)[method][m] - scores(run)["base"][m] for m in METRICS}
                rows.append((NAMES[method] + suffix, *(cell(interval(minus[m][p])) for m, p in columns)))
    heads = [f"{m} where the best answer is {x}" for m in ("MC1", "MC2") for x in ("longer", "not longer")]
    return ("method", *heads), rows


def side_effects_table() -> Table:
    """HaluEval's pairs of about equal length, neutral text, time and memory."""
    summaries = read_json(RECORDS / "summaries.json")
    cost, rows = summaries["cost"], []
    for run, suffix in (("seed0", ""), ("placebo", ", placebo")):
        pairs, texts = summaries[f"halueval/{run}"], summaries[f"harm/{run}"]
        for method in (method for method in NAMES if method in pairs or (not suffix and method in cost)):
            pair, text = pairs.get(method), texts.get(method)
            rows.append(
                (
                    NAMES[method] + suffix,
                    cell((pair["raw"], *pair["interval"]), "") if pair else "",
                    f"{text['kl']:.3g}" if text else "",
                    f"{100 * text['top1_agreement']:.1f}" if text else "",
                    *(cost_cells(cost, method) if method in cost and not suffix else ("", "")),
                )
            )
    right = summaries["halueval/right"]["base"]
    rows.append((CONTROLS["right"], cell((right["raw"], *right["interval"]), ""), "", "", "", ""))
    heads = ("method", "right answer preferred, %", "KL from base, nats", "same first token, %")
    return (*heads, "ms/token (× base)", "GB (× base)"), rows


def cost_cells(cost: Mapping[str, Mapping[str, float]], method: str) -> Row:
    fields = (("ms_per_token", 1, 1), ("memory_bytes", 1e9, 2))
    values = ((cost[method][field], cost["base"][field], unit, digits) for field, unit, digits in fields)
    return tuple(f"{x / unit:.{digits}f} ({x / base:.2f})" for x, base, unit, digits in values)


def ablations_table() -> Table:
    summaries = read_json(RECORDS / "summaries.json")
    runs = {
        name: (f"ablations/{name}", f"ablations/{name}/harm", f"ablations/{name}/tqa") for name in ABLATIONS
    }
    runs["seed0"] = ("train/seed0", "harm/seed0", HALUEVAL.format(0))
    rows = []
    for name, (train, harm, tqa) in runs.items():
        training = summaries[train]
        gates = (training["gate_on_fact"], training["gate_off_fact"])
        targets = [method for method in scores(tqa) if method.startswith(f"{CONTRAST}:beta=")]
        row = [ABLATIONS.get(name, "16 rows a step instead of 8: the reported run")]
        row.append(f"{100 * training['kept_share']:.0f}")
        row.append(" / ".join("–" if gate is None else f"{gate:.2f}" for gate in gates))
        row.append(f"{summaries[harm][EXPERT]['kl']:.3g}")
        row.append(short_cell(tqa, EXPERT))
        reference = runs["reference"][2]
        row.append("" if name == "reference" else short_cell(tqa, EXPERT, reference, EXPERT))
        row.append(short_cell(tqa, EXPERT, tqa, targets[0]))
        rows.append(tuple(row))
    heads = ("changed", "T_fact, %", "gate on / off T_fact", "KL, nats")
    return (*heads, "expert − base", "expert − reference's", "expert − its target"), rows


# By page and mark.
TABLES: dict[str, dict[str, Callable[[], Table]]] = {
    "README.md": {"summary": summary_table},
    "docs/results.md": {"main": main_table},
    "docs/results/methods.md": {
        "primer": lambda: methods_table("primer"),
        "chat": lambda: methods_table("chat"),
        "pairs": pairs_table,
    },
    "docs/results/seeds.md": {"seeds": seeds_table, "deviations": deviations_table},
    "docs/results/placebo.md": {"placebo": placebo_table},
    "docs/results/length.md": {"length": length_table},
    "docs/results/side-effects.md": {"side-effects": side_effects_table},
    "docs/results/ablations.md": {"ablations": ablations_table},
}


def markdown(table: Table) -> str:
    columns, rows = table
    lines = [columns, ("---", *["---:"] * (len(columns) - 1)), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def fill(text: str, tables: Mapping[str, str]) -> str:
    """The page with its tables replaced.

    Raises:
        SystemExit: a table has no marks on the page.
    """
    for name, table in tables.items():
        marks = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if not marks.search(text):
            raise SystemExit(f"error: no page has the marks <!-- {name} --> and <!-- /{name} -->")
        text = marks.sub(lambda match, table=table: match[1] + table + match[2], text)
    return text


def pages() -> Iterator[tuple[Path, str]]:
    """Every page and its text with the tables of the records."""
    for page, tables in TABLES.items():
        path = ROOT / page
        shown: dict[str, Any] = {name: markdown(make()) for name, make in tables.items()}
        yield path, fill(path.read_text(encoding="utf-8"), shown)


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    for path, text in pages():
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
