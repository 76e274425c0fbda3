"""Writes the tables of docs/results.md and README.md from the records: `python results/tables.py`.

`make results` calls it. A table stands between `<!-- NAME -->` and `<!-- /NAME -->`. What the page's tables
show is in docs/results/figures.json.
"""

import argparse
import json
import re
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from imae_jax.decode.methods import parse_method
from imae_jax.evaluate.reporting import plots, stats
from imae_jax.evaluate.reporting.aggregate import sums_of
from imae_jax.evaluate.reporting.tables import Estimate, Table, number, p_value

DOCS = Path(__file__).parent.parent / "docs"
METRICS = {"mc1": "MC1", "mc2": "MC2", "mc3": "MC3"}
PROTOCOLS = {"primer": "tqa-v1/qa-primer", "chat": "tqa-v1/chat"}
SPLITS = {"test": "the 80 % not used for choosing", "all": "all questions"}
BASE = ("base", "log p")
CONTROLS = {"right": "LoRA, right answers", "instruction": "“Answer truthfully.”"}
MODES = {-1.0: "IMAE expert", 0.0: "base", 1.0: "IMAE anti-expert"}
EXPERT, ANTI_EXPERT = (MODES[-1.0], "log p"), (MODES[1.0], "log p")
STRONGER = ("IMAE, strength -2", "log p")
NAMES = {
    "in-model-contrast": "in-model contrast",
    "icd": "ICD",
    "cd": "CD",
    "dola": "DoLa",
    "sled": "SLED",
    "iti": "ITI",
}
# Of the paper's smallest model.
PAPER_GAINS = {"mc1": 2.9, "mc2": 4.6, "mc3": 4.7}
# Times base.
MOST_COST = 1.25
# Settings that a run's name in the table leaves out: where it lies, whose anti-expert LLM and log-ratios it
# takes, what is measured meanwhile.
NOT_ABLATED = {"out", "eval_every", "icd.enabled", "filter.anti_expert_llm", "filter.reuse"}
DELTA_COLUMNS = tuple(f"Δ {head}" for head in METRICS.values())
TRAINING_COLUMNS = ("T_fact %", "gate on / off T_fact")
TEXT_COLUMNS = ("KL(base ‖ method)", "same top 1")
LENGTHS = {"lengths": "HaluEval, seed 0", "lengths-trivia": "Trivia, seed 0"}
# Data, a run of hallucinated answers, and the same of right ones, of which HaluEval has seed 0 alone.
PLACEBOS = (
    *((f"HaluEval, seed {seed}", f"tqa/primer/seed{seed}", "tqa/primer/placebo") for seed in range(3)),
    ("HaluEval, seed 0, chat", "tqa/chat/seed0", "tqa/chat/placebo"),
    ("trivia, seed 0", "ablations/trivia/tqa", "ablations/trivia-right/tqa"),
    ("trivia, seed 1", "ablations/trivia-seed1/tqa", "ablations/trivia-right-seed1/tqa"),
)
# A method in the tables: its name, and what it sums over an answer's tokens.
Key = tuple[str, str]


def key_of(settings: Mapping[str, Any]) -> Key:
    if settings["name"] == "imae":
        strength = settings["strength"]
        return MODES.get(strength, f"IMAE, strength {strength:g}"), "log p"
    name = NAMES[settings["name"]]
    # In `make results` the one that is no adapter.
    if Path(settings.get("anti_expert", "")).name == "merged":
        name = "ICD, second model"
    if settings.get("beta", 1) != 1:
        name += f", β {settings['beta']:g}"
    return name, sums_of(settings)


def placebo(key: Key) -> Key:
    return f"placebo: {key[0]}", key[1]


def deltas(compared: Mapping[str, Mapping[str, Any]]) -> tuple[str, ...]:
    """Cells of a paired comparison, from `stats.compare`."""
    return tuple(Estimate(c["value"], c["interval"], sign=True) for c in compared.values())


class Figures:
    """The records that tables are made of, and everything that a table shows."""

    def __init__(self, records: Path):
        self.records, self.values = records, {}
        self._read: dict[str, dict[str, Any] | None] = {}
        self._compared: dict[bytes, dict[str, Any]] = {}

    def record(self, name: str) -> dict[str, Any] | None:
        """What `results/records.py` kept of a run, or None where it is not there yet."""
        if name not in self._read:
            path = self.records / f"{name}.json"
            self._read[name] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
        return self._read[name]

    def truthfulqa(self, name: str) -> dict[str, dict[Key, dict[str, np.ndarray]]] | None:
        """Metrics of every method, question by question, of the splits that the run holds whole."""
        found = self.record(name)
        if found is None:
            return None
        keys = {label: key_of(settings) for label, settings in found["methods"].items()}
        if len(set(keys.values())) < len(keys):
            raise SystemExit(f"error: {name} has several methods of one name: {keys}")
        scores = {
            # None, where a metric is undefined, becomes NaN.
            keys[label]: {m: np.array(own[m], np.float64) for m in METRICS}
            for label, own in found["scores"].items()
        }
        test = np.array(found["questions"]["test"], bool)
        values = {"test": {key: {m: x[test] for m, x in own.items()} for key, own in scores.items()}}
        return values if test.all() else {**values, "all": scores}

    def compare(self, values: Mapping[str, np.ndarray], others: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """`stats.compare` of all metrics, once for all tables that show the same two methods."""
        key = b"".join(own[m].tobytes() for own in (values, others) for m in METRICS)
        if key not in self._compared:
            self._compared[key] = stats.compare(list(METRICS), values, others, seed=0)
        return self._compared[key]

    def facts(self, name: str) -> dict[str, np.ndarray]:
        """What is known of the test questions that such a run asked, in the order of its metrics."""
        facts = self.record(name)["questions"]
        facts = {key: np.array(x, bool) for key, x in facts.items() if key != "index"}
        return {key: x[facts["test"]] for key, x in facts.items()}


def main_tables(figures: Figures, protocol: str) -> Iterable[tuple[str, Table]]:
    """Scores and paired differences to base of all methods, of both splits."""
    seed0 = figures.truthfulqa(f"tqa/{protocol}/seed0")
    if seed0 is None:
        return
    controls = {name: figures.truthfulqa(f"tqa/{protocol}/{name}") for name in CONTROLS}
    placebos = figures.truthfulqa(f"tqa/{protocol}/placebo")
    second_model = figures.truthfulqa(f"tqa/{protocol}/second-model")
    for split, described in SPLITS.items():
        methods = dict(seed0[split])
        if second_model is not None:
            methods |= {key: own for key, own in second_model[split].items() if key != BASE}
        for name, found in controls.items():
            if found is not None:
                methods[CONTROLS[name], "log p"] = found[split][BASE]
        if placebos is not None:
            methods |= {placebo(key): own for key, own in placebos[split].items() if key != BASE}
        base, scores, differences, stored = methods[BASE], [], [], {}
        for key, own in methods.items():
            means = {m: stats.mean(own[m]).scaled(100) for m in METRICS}
            scores.append((*key, *(Estimate(mean["value"], mean["interval"]) for mean in means.values())))
            stored[" / ".join(key)] = {"scores": means}
            if key != BASE:
                compared = figures.compare(own, base)
                differences.append((*key, *deltas(compared), p_value(compared["mc1"]["mcnemar"]["p"])))
                stored[" / ".join(key)]["against_base"] = compared
        count = len(base["mc1"])
        figures.values[f"{protocol} {split}"] = {"n": count, "methods": stored}
        above = f"{PROTOCOLS[protocol]}, {described} (N = {count})"
        heads = METRICS.values()
        yield (
            f"{protocol}-{split}",
            Table(f"{above}, seed 0, [95 % interval]", ("method", "sums", *heads), tuple(scores)),
        )
        columns = ("method", "sums", *DELTA_COLUMNS, "McNemar p (MC1)")
        title = f"{above}: paired differences to base, [95 % interval]"
        yield f"{protocol}-{split}-differences", Table(title, columns, tuple(differences))


def targets_table(figures: Figures, protocol: str) -> Iterable[tuple[str, Table]]:
    """What was aimed at, what was found, and whether it was met."""
    methods = figures.truthfulqa(f"tqa/{protocol}/seed0")
    if methods is None:
        return
    own = methods["test"]
    contrast, icd = ("in-model contrast", "raw"), ("ICD", "raw")
    paper = "/".join(f"{gain:+.1f}" for gain in PAPER_GAINS.values())
    # Name, a method, what it is compared with, and which difference of a metric will do.
    targets = (
        ("expert above base", EXPERT, BASE, lambda metric, value: value > 0),
        (f"… by {paper} (paper)", EXPERT, BASE, lambda metric, value: value >= PAPER_GAINS[metric]),
        ("strength -2 above base", STRONGER, BASE, lambda metric, value: value > 0),
        ("anti-expert below base", ANTI_EXPERT, BASE, lambda metric, value: value < 0),
        ("ICD above base", icd, BASE, lambda metric, value: value > 0),
        ("in-model contrast at ICD's level", contrast, icd, lambda metric, value: value >= 0),
    )
    rows = []
    for name, key, other, will_do in targets:
        if key not in own or other not in own:
            continue
        compared = figures.compare(own[key], own[other])
        missed = [METRICS[m] for m, c in compared.items() if not will_do(m, c["value"])]
        clear = [METRICS[m] for m, c in compared.items() if excludes_0(c)]
        met = f"not in {', '.join(missed)}" if missed else "yes"
        # The paper's gains are another zero than the interval's.
        of_zero = "" if "(paper)" in name else ", ".join(clear) or "none"
        rows.append((name, *deltas(compared), met, of_zero))
    # One cost, whatever the prompts: it is shown once.
    cost = figures.record("cost") if protocol == "primer" else None
    measured = cost["batch_sizes"]["1"] if cost is not None else {}
    for label, row in measured.items():
        name, _ = key_of(parse_method(label).settings())
        if name in (EXPERT[0], contrast[0]):
            sizes = {"time": "ms_per_token", "memory": "memory_bytes"}
            ratios = {what: row[size] / measured["base"][size] for what, size in sizes.items()}
            missed = [what for what, ratio in ratios.items() if ratio > MOST_COST]
            cells = [f"{ratio:.2f} × {what}" for what, ratio in ratios.items()]
            limit = f"{name}: at most {MOST_COST} × base's time and memory"
            rows.append((limit, *cells, "", f"not in {', '.join(missed)}" if missed else "yes", ""))
    figures.values[f"{protocol} targets"] = {name: cells for name, *cells in rows}
    title = f"{PROTOCOLS[protocol]}, targets: differences on the test questions, seed 0, [95 % interval]"
    columns = ("target", *METRICS.values(), "met", "interval excludes 0")
    yield f"{protocol}-targets", Table(title, columns, tuple(rows))


def shares_table(figures: Figures) -> Iterable[tuple[str, Table]]:
    """How much of a contrast's gain is left once its scores are a distribution's log-probabilities."""
    methods = figures.truthfulqa("tqa/primer/seed0")
    if methods is None:
        return
    own, rows, stored = methods["test"], [], {}
    for name in [name for name, sums in own if sums == "raw" and (name, "renormalized") in own]:
        gains = [
            [100 * float(np.nanmean(own[name, sums][m] - own[BASE][m])) for m in METRICS]
            for sums in ("raw", "renormalized")
        ]
        cells = [
            f"{raw:+.1f} → {left:+.1f}" + (f" ({100 * left / raw:.0f} %)" if raw > 0 and left > 0 else "")
            for raw, left in zip(*gains, strict=True)
        ]
        rows.append((name, *cells))
        stored[name] = dict(zip(METRICS, zip(*gains, strict=True), strict=True))
    figures.values["raw, renormalized"] = stored
    title = "Gains over base, test questions, seed 0: raw sums → renormalized (share left)"
    yield "shares", Table(title, ("method", *METRICS.values()), tuple(rows))


def seeds_table(figures: Figures, protocol: str) -> Iterable[tuple[str, Table]]:
    """Every training seed, their mean and standard deviation, and each seed's differences to base."""
    names = sorted(path.stem for path in figures.records.glob(f"tqa/{protocol}/seed*.json"))
    runs = {name: figures.truthfulqa(f"tqa/{protocol}/{name}") for name in names}
    if len(runs) < 2:
        return
    for split, described in SPLITS.items():
        shared = [key for key in runs[names[0]][split] if all(key in run[split] for run in runs.values())]
        rows, stored = [], {}
        for key in [key for key in shared if key != BASE]:
            cells = []
            for metric in METRICS:
                of_seeds = [100 * float(np.nanmean(run[split][key][metric])) for run in runs.values()]
                mean, deviation = statistics.mean(of_seeds), statistics.stdev(of_seeds)
                stored.setdefault(" / ".join(key), {})[metric] = of_seeds
                cells.append(f"{mean:.2f} ± {deviation:.2f} ({', '.join(f'{x:.1f}' for x in of_seeds)})")
            rows.append((*key, *cells))
        figures.values[f"{protocol} {split} seeds"] = stored
        against_base, compared_of = [], {}
        for key in [key for key in shared if key != BASE]:
            for name, run in runs.items():
                compared = figures.compare(run[split][key], run[split][BASE])
                against_base.append((*key, name.removeprefix("seed"), *deltas(compared)))
                compared_of.setdefault(" / ".join(key), {})[name] = compared
        figures.values[f"{protocol} {split} seeds, against base"] = compared_of
        title = (
            f"{PROTOCOLS[protocol]}, {described}: mean ± standard deviation over {len(names)} training seeds"
        )
        yield f"{protocol}-{split}-seeds", Table(title, ("method", "sums", *METRICS.values()), tuple(rows))
        title = f"{PROTOCOLS[protocol]}, {described}: paired differences to base, [95 % interval]"
        columns = ("method", "sums", "training seed", *DELTA_COLUMNS)
        yield f"{protocol}-{split}-seeds-differences", Table(title, columns, tuple(against_base))


def lengths_tables(figures: Figures) -> Iterable[tuple[str, Table]]:
    """Gains where the best answer is the longer one, and where it is not.

    An anti-expert that learned to write long answers, as HaluEval's hallucinated ones are, would help
    short answers alone.
    """
    of_right = {run: right for _, run, right in PLACEBOS}
    for name, run in (("lengths", "tqa/primer/seed0"), ("lengths-trivia", "ablations/trivia/tqa")):
        found, right = figures.truthfulqa(run), figures.truthfulqa(of_right[run])
        if found is not None:
            methods = dict(found["test"])
            if right is not None:
                methods |= {placebo(key): own for key, own in right["test"].items() if key != BASE}
            yield name, lengths_table(figures, name, methods, figures.facts(run))


def lengths_table(
    figures: Figures, name: str, methods: Mapping[Key, Any], facts: Mapping[str, np.ndarray]
) -> Table:
    longer = facts["best_longer"]
    parts = {"the best answer is longer": longer, "it is not": ~longer}
    shown = ("mc1", "mc2")
    columns = [f"{METRICS[m]} where {part} ({mask.sum()})" for m in shown for part, mask in parts.items()]
    extremes = {f"the {extreme} answer": facts[extreme] for extreme in ("longest", "shortest")}
    rows, stored = [], {}
    for control, right in extremes.items():
        means = [stats.mean(right[mask]).scaled(100) for mask in parts.values()]
        cells = [Estimate(mean["value"], mean["interval"]) for mean in means]
        rows.append((control, "", *cells, *["–"] * len(parts)))
        stored[control] = dict(zip(columns, cells, strict=False))
    base = methods[BASE]
    for key, own in methods.items():
        of, minus = (own, None) if key == BASE else (own, base)
        cells = []
        for metric in shown:
            for mask in parts.values():
                values = of[metric][mask] - (minus[metric][mask] if minus else 0)
                mean = stats.mean(values).scaled(100)
                cells.append(Estimate(mean["value"], mean["interval"], sign=minus is not None))
        rows.append((*key, *cells))
        stored[" / ".join(key)] = dict(zip(columns, cells, strict=True))
    figures.values[name] = stored
    title = f"{LENGTHS[name]}, test questions: scores of base, differences to base of the others"
    return Table(title, ("method", "sums", *columns), tuple(rows))


def placebo_table(figures: Figures) -> Iterable[tuple[str, Table]]:
    """What is trained on hallucinated answers, against the same trained on right ones."""
    rows, stored = [], {}
    for data, *runs in PLACEBOS:
        found = [figures.truthfulqa(run) for run in runs]
        if None in found:
            continue
        of_hallucinated, of_right = (methods["test"] for methods in found)
        for key in [key for key in of_right if key != BASE and key in of_hallucinated]:
            compared = figures.compare(of_hallucinated[key], of_right[key])
            rows.append((data, *key, *deltas(compared)))
            stored.setdefault(data, {})[" / ".join(key)] = compared
    if rows:
        figures.values["placebo"] = stored
        columns = ("data", "method", "sums", *DELTA_COLUMNS)
        title = "Trained on hallucinated − on right answers, test questions, [95 % interval]"
        yield "placebo", Table(title, columns, tuple(rows))


def summary_table(figures: Figures) -> Iterable[tuple[str, Table]]:
    """Differences to base of the README, in short: beside each method its placebo."""
    shown = (
        EXPERT,
        STRONGER,
        ("in-model contrast, β 2", "renormalized"),
        ("ICD, β 2", "renormalized"),
        ("in-model contrast", "raw"),
        ("ICD", "raw"),
    )
    rows = []
    for data, *runs in PLACEBOS:
        found = [(figures.truthfulqa(run) or {}).get("test", {}) for run in runs]
        for key in [key for key in shown if key in found[0] and data.endswith("seed 0")]:
            cells = [
                in_short(figures.compare(methods[key], methods[BASE])) if key in methods else "–"
                for methods in found
            ]
            rows.append((data.removesuffix(", seed 0"), *key, *cells))
    if rows:
        columns = ("trained on", "method", "sums", "hallucinated answers", "right answers: a placebo")
        yield "summary", Table("Δ MC1 / MC2 / MC3", columns, tuple(rows))


def excludes_0(compared: Mapping[str, Any]) -> bool:
    low, high = compared["interval"]
    return not low <= 0 <= high


def in_short(compared: Mapping[str, Mapping[str, Any]]) -> str:
    """Differences of all metrics, bold where the interval excludes 0."""
    cells = (f"**{c['value']:+.1f}**" if excludes_0(c) else f"{c['value']:+.1f}" for c in compared.values())
    return " / ".join(cells)


def pairs_table(figures: Figures) -> Iterable[tuple[str, Table]]:
    """Methods of one run against each other: the expert and its target, both contrasts."""
    # Several seeds may share a placebo, which has the first one's.
    names: dict[str, str] = {}
    for data, run, right in PLACEBOS:
        names[run] = data
        names.setdefault(right, f"{data}, placebo")
    contrast, target, icd = "in-model contrast", "in-model contrast, β 2", "ICD, β 2"
    pairs = (
        (EXPERT, (target, "renormalized")),
        ((target, "renormalized"), (icd, "renormalized")),
        ((contrast, "renormalized"), ("ICD", "renormalized")),
        ((contrast, "raw"), ("ICD", "raw")),
    )
    rows, stored = [], {}
    for one, other in pairs:
        of_pair = f"{' / '.join(one)} − {' / '.join(other)}"
        for run, data in sorted(names.items(), key=lambda item: item[1]):
            own = (figures.truthfulqa(run) or {}).get("test", {})
            if one in own and other in own:
                compared = figures.compare(own[one], own[other])
                rows.append((f"{one[0]} − {other[0]}", other[1], data, *deltas(compared)))
                stored.setdefault(of_pair, {})[data] = compared
    if rows:
        figures.values["pairs"] = stored
        columns = ("methods", "sums", "data", *DELTA_COLUMNS)
        yield "pairs", Table("Against each other, test questions, [95 % interval]", columns, tuple(rows))


def side_effects(figures: Figures) -> Iterable[tuple[str, Table]]:
    """HaluEval's pairs of equal length, neutral text, time and memory."""
    columns_of = {
        "halueval": lambda row: {
            "right preferred": Estimate(row["raw"], row["interval"]),
            "per token": number(row["per_token"]),
        },
        "harm": lambda row: {
            "KL(base ‖ method)": number(row["kl"], 3),
            "same top 1": number(100 * row["top1_agreement"], 1),
        },
    }
    columns: dict[str, dict[Key, str]] = {}
    for run in ("seed0", *CONTROLS, "placebo"):
        for name, shown in columns_of.items():
            record = figures.record(f"{name}/{run}")
            for label, row in record["scores"].items() if record is not None else ():
                key = key_of(record["methods"][label])
                if run in CONTROLS:
                    key = CONTROLS[run], "log p"
                elif run == "placebo":
                    if key == BASE:
                        continue
                    key = placebo(key)
                for column, cell in shown(row).items():
                    columns.setdefault(column, {})[key] = cell
    cost = figures.record("cost")
    if cost is not None:
        rows = cost["batch_sizes"]["1"]
        for label, row in rows.items():
            ratios = [row[name] / rows["base"][name] for name in ("ms_per_token", "memory_bytes")]
            # Raw and renormalized differences cost the same; what is measured here alone has one row.
            name, sums = key_of(parse_method(label).settings())
            for key in [k for cells in columns.values() for k in cells if k[0] == name] or [(name, sums)]:
                columns.setdefault("ms/token (× base)", {})[key] = (
                    f"{row['ms_per_token']:.1f} ({ratios[0]:.2f})"
                )
                columns.setdefault("memory (× base)", {})[key] = (
                    f"{row['memory_bytes'] / 1e9:.2f} GB ({ratios[1]:.2f})"
                )
    keys = list(dict.fromkeys(key for cells in columns.values() for key in cells))
    if keys:
        rows = tuple((*key, *(cells.get(key, "–") for cells in columns.values())) for key in keys)
        figures.values["side effects"] = {
            " / ".join(row[:2]): dict(zip(columns, row[2:], strict=True)) for row in rows
        }
        title = "HaluEval QA, pairs of about equal length; neutral text; cost of decoding at batch 1"
        yield "side-effects", Table(title, ("method", "sums", *columns), rows)


class TrainedRun(NamedTuple):
    """A training's record, its scores on the test questions, and what its methods do to neutral text."""

    training: dict[str, Any]
    methods: dict[Key, dict[str, np.ndarray]]
    of_text: dict[Key, dict[str, float]]

    def training_cells(self) -> tuple[str, str]:
        """Share of T_fact, and mean gates on it and off it at the end."""
        gates = (number(self.training["last_steps"][f"gate_{part}_fact"], 2) for part in ("on", "off"))
        return number(100 * self.training["kept_share"], 0), " / ".join(gates)

    def effects(self, figures: Figures, key: Key) -> tuple[tuple[str, ...], dict[str, Any]]:
        """Cells and figures of a method: differences to base, and neutral text."""
        compared, text = figures.compare(self.methods[key], self.methods[BASE]), self.of_text[key]
        cells = (*deltas(compared), number(text["kl"], 3), number(100 * text["top1_agreement"], 1))
        return cells, {"against_base": compared, "kl": text["kl"]}


def trained_run(figures: Figures, train: str, tqa: str, harm: str) -> TrainedRun | None:
    training, found, text = figures.record(train), figures.truthfulqa(tqa), figures.record(harm)
    if training is None or found is None or text is None:
        return None
    of_text = {key_of(text["methods"][label]): row for label, row in text["scores"].items()}
    return TrainedRun(training, found["test"], of_text)


def ablated_runs(figures: Figures, *, other_data: bool) -> dict[str, TrainedRun]:
    """All that are there: either of other data, or of other settings."""
    names = sorted(path.name for path in (figures.records / "ablations").glob("*/"))
    found = {
        name: trained_run(figures, *(f"ablations/{name}/{kind}" for kind in ("train", "tqa", "harm")))
        for name in names
        if name.startswith("trivia") == other_data
    }
    return {name: run for name, run in found.items() if run is not None}


def flat(settings: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in settings.items():
        found |= flat(value, f"{above}{name}.") if isinstance(value, Mapping) else {above + name: value}
    return found


def changed(config: Mapping[str, Any], reference: Mapping[str, Any]) -> str:
    """Settings in which a run differs from the reference, as its command has them."""
    others = flat(reference)
    own = {k: v for k, v in flat(config).items() if k not in NOT_ABLATED and v != others.get(k)}
    return ", ".join(f"{name}={value}" for name, value in own.items())


def ablated_methods(target: Key) -> dict[Key, str]:
    """What is shown of a run with this target, and its names in the table."""
    return {
        EXPERT: "expert",
        target: "its target",
        ("IMAE, strength -0.5", "log p"): "strength -0.5",
        STRONGER: "strength -2",
        ANTI_EXPERT: "anti-expert",
        ("in-model contrast", "raw"): "in-model contrast, raw",
    }


def ablations_tables(figures: Figures) -> Iterable[tuple[str, Table]]:
    """What changed settings do: against base, against the run that has none changed, and expert to target."""
    runs = ablated_runs(figures, other_data=False)
    if "reference" not in runs:
        return
    reference = runs["reference"]
    reported = trained_run(figures, "train/seed0", "tqa/primer/seed0", "harm/seed0")
    if reported is not None:
        runs["seed0"] = reported
    labels = {
        name: changed(run.training["config"], reference.training["config"]) or name
        for name, run in runs.items()
    }
    order = sorted(runs, key=lambda name: (name != "reference", labels[name]))
    against_base, against_reference, against_target = {}, {}, []
    stored: dict[str, dict[str, Any]] = {
        table: {} for table in ("ablations", "ablations-reference", "ablations-target")
    }
    for name in order:
        run, label = runs[name], labels[name]
        beta = run.training["config"]["loss"]["beta"]
        target = key_of({"name": "in-model-contrast", "beta": beta, "renormalize": True})
        if EXPERT in run.methods and target in run.methods:
            compared = figures.compare(run.methods[EXPERT], run.methods[target])
            against_target.append((label, *deltas(compared)))
            stored["ablations-target"][name] = compared
        for key, shown in ablated_methods(target).items():
            if key not in run.methods or key not in run.of_text:
                continue
            cells, own = run.effects(figures, key)
            against_base.setdefault(shown, []).append((label, *run.training_cells(), shown, *cells))
            stored["ablations"].setdefault(name, {})[shown] = own
            if name != "reference" and key in reference.methods:
                compared = figures.compare(run.methods[key], reference.methods[key])
                against_reference.setdefault(shown, []).append((label, shown, *deltas(compared)))
                stored["ablations-reference"].setdefault(name, {})[shown] = compared
    figures.values |= stored
    rows = tuple(row for rows in against_base.values() for row in rows)
    title = "Settings changed, test questions: differences to base, [95 % interval]; neutral text"
    columns = ("changed", *TRAINING_COLUMNS, "method", *DELTA_COLUMNS, *TEXT_COLUMNS)
    yield "ablations", Table(title, columns, rows)
    rows = tuple(row for rows in against_reference.values() for row in rows)
    title = "Settings changed, test questions: differences to the reference's method, [95 % interval]"
    yield "ablations-reference", Table(title, ("changed", "method", *DELTA_COLUMNS), rows)
    title = "Settings changed, test questions: the expert − its target, [95 % interval]"
    yield "ablations-target", Table(title, ("changed", *DELTA_COLUMNS), tuple(against_target))


def other_data_table(figures: Figures) -> Iterable[tuple[str, Table]]:
    """What other training data do to scores and neutral text."""
    rows, stored = [], {}
    for name, run in ablated_runs(figures, other_data=True).items():
        for key in [key for key in run.methods if key != BASE and key in run.of_text]:
            cells, own = run.effects(figures, key)
            rows.append((name, *run.training_cells(), *key, *cells))
            stored.setdefault(name, {})[" / ".join(key)] = own
    if rows:
        figures.values["other-data"] = stored
        columns = ("run", *TRAINING_COLUMNS, "method", "sums", *DELTA_COLUMNS, *TEXT_COLUMNS)
        title = "Other training data, test questions: differences to base, [95 % interval]; neutral text"
        yield "other-data", Table(title, columns, tuple(rows))


def write_plot(figures: Figures, path: Path) -> None:
    """Differences of all methods to base."""
    found = figures.values.get("primer test")
    if found is None:
        return
    compared = {
        name.removesuffix(" / log p").replace(" / ", ", "): row["against_base"]
        for name, row in found["methods"].items()
        if "against_base" in row
    }
    title = f"Differences to base, TruthfulQA, N = {found['n']}, 95 % intervals"
    plots.differences(title, compared, METRICS).savefig(path, dpi=120)


def write_page(page: Path, tables: Iterable[tuple[str, Table]]) -> list[str]:
    """Puts tables between their marks, empties the others; returns the names of those without a place."""
    shown = {name: table.markdown() for name, table in tables}
    marks = re.compile(r"(<!-- ([\w-]+) -->\n).*?(<!-- /\2 -->)", re.DOTALL)
    text, placed = page.read_text(encoding="utf-8"), set()

    def filled(found: re.Match) -> str:
        placed.add(found[2])
        return f"{found[1]}{shown.get(found[2], '')}{found[3]}"

    page.write_text(marks.sub(filled, text), encoding="utf-8")
    return sorted(set(shown) - placed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--docs", type=Path, default=DOCS, help="holds results.md and results/runs")
    parser.add_argument("--readme", type=Path, default=DOCS.parent / "README.md", help="has a table, too")
    args = parser.parse_args()
    docs = args.docs
    figures = Figures(docs / "results" / "runs")
    tables = []
    for protocol in PROTOCOLS:
        for make in (targets_table, main_tables, seeds_table):
            tables += make(figures, protocol)
    tables += [
        *shares_table(figures),
        *lengths_tables(figures),
        *placebo_table(figures),
        *pairs_table(figures),
        *side_effects(figures),
        *ablations_tables(figures),
        *other_data_table(figures),
    ]
    pages = {"results.md": (docs / "results.md", tables), "README.md": (args.readme, summary_table(figures))}
    for page, (path, own) in pages.items():
        for name in write_page(path, own):
            print(f"{page} has no place for the table {name}")
    found = json.dumps(figures.values, indent=1, ensure_ascii=False)
    (docs / "results" / "figures.json").write_text(found + "\n", encoding="utf-8")
    write_plot(figures, docs / "results" / "differences.png")


if __name__ == "__main__":
    main()
