"""`python -m imae_jax.evaluate.report RUN…`: training and evaluation runs as one page, HTML and Markdown."""

import base64
import dataclasses
import hashlib
import html
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, ClassVar

from imae_jax import __version__
from imae_jax.cli import ArgumentParser, command, lock_outputs
from imae_jax.convert.identity import without_places
from imae_jax.errors import UserError, first_line
from imae_jax.files import new_directory
from imae_jax.train.run_directory import (
    ADAPTER_STAGES,
    CONFIG_FILE,
    ENVIRONMENT_FILE,
    EVALUATION_FILE,
    IMAE_DIR,
    METRICS_FILE,
)

from .questions import DATA_DIRECTORY
from .runs import (
    COMPARISON_FILE,
    HARNESS_FILE,
    RESULTS_FILE,
    RUN_FILE,
    SCORES_FILE,
    read_run,
    same_model,
)
from .summaries import (
    HARNESS_COLUMNS,
    against_baseline,
    differences_table,
    harness_rows,
    note_undefined,
    precision_of,
    scores_table,
    sums_of,
)
from .tables import Table, number

REPORT_FILE, PAGE_FILE = "report.md", "report.html"
PAPER_FILE = DATA_DIRECTORY / "paper_results.json"
IMAE_CONFIG = "imae_config.json"
COST, COMPARISON, HARNESS, UNITS = "cost", "comparison", "lm-eval", "anti-expert units"
# Directories of a training run's stages.
STAGES = {ADAPTER_STAGES["wrong"]: "anti-expert LLM", ADAPTER_STAGES["right"]: "right-answer LLM", ".": UNITS}
KINDS = {
    "truthfulqa": "TruthfulQA",
    "truthfulqa-answers": "answers",
    "halueval": "HaluEval QA",
    "harm": "neutral text",
    COST: "cost",
    COMPARISON: "comparison",
    HARNESS: "lm-eval",
}
# What a report reads of the files of each kind: types by name, where "*" is any name, METRIC each of the
# run's `metrics`, and "name?" may be missing or null.
METRIC = "each metric"
NUMBER, MEAN, INTERVAL = (int, float), (int, float, NoneType), (list, NoneType)
FIGURE = (*MEAN, str)  # An infinity is a text: `runs.jsonable`.
GIT = {"commit": str, "dirty": bool}
COMMON = {
    "benchmark": str,
    "dtype?": str,
    "metrics?": list,
    "versions": dict,
    "statistics?": dict,
    "git?": GIT,
}
MEASURED = {"memory_bytes": MEAN, "ms_per_token": MEAN, "settings": dict}
MCNEMAR = {"gained": int, "lost": int, "p": NUMBER}
COMPARED = {METRIC: {"value": MEAN, "interval": INTERVAL, "n": int, "mcnemar?": MCNEMAR}}
SUMMARY = {
    METRIC: MEAN,
    "intervals": {METRIC: INTERVAL},
    "n": int,
    "n_undefined": int,
    "undefined": list,
    "against_baseline?": COMPARED,
}
HARM = {"kl": FIGURE, "top1_agreement": NUMBER}
SCORED = SUMMARY | {"settings": dict, "harm?": HARM}
PAIRS = {"n": int, "auc": MEAN, "shorter": MEAN}
QUESTIONS = {
    "split": {"name": str, "seed": int, "dev_share": NUMBER},
    "limit": object,
    "n_questions": int,
    "metrics": list,
    "baseline": str,
}
FORMS: dict[str, Any] = {
    "truthfulqa": QUESTIONS | {"data": {"path": str, "sha256": str}, "methods": {"*": SCORED}},
    "truthfulqa-answers": QUESTIONS
    | {
        "shown": int,
        "generation": {"sampler": {"temperature": NUMBER}, "seed": int, "max_new_tokens": int},
        "methods": {"*": SCORED | {"tokens": {"value": MEAN}}},
    },
    "halueval": {
        "metrics": list,
        "baseline": str,
        "length": {"ratio": (float, str), "all": PAIRS, "matched": PAIRS},
        "parts": {"all": {"*": SUMMARY}, "matched": {"*": SUMMARY}},
        "methods": {"*": {"settings": dict}},
    },
    "harm": {
        "n_tokens": int,
        "methods": {
            "*": HARM
            | {
                "settings": dict,
                "cross_entropy": FIGURE,
                "perplexity": FIGURE,
                "infinite_kl": NUMBER,
                "ruled_out": NUMBER,
                "intervals": dict.fromkeys(("cross_entropy", "kl", "top1_agreement"), INTERVAL),
            }
        },
    },
    COST: {
        "model": str,
        "dtype": str,
        "memory": str,
        "random_weights": bool,
        "environment": {"versions": {"device": str}, "git?": GIT},
        "workload": {"prompt_tokens": int, "new_tokens": int},
        "batch_sizes": {"*": {"base": MEASURED, "*": MEASURED}},
    },
    COMPARISON: {
        "benchmark": str,
        "runs": list,
        "models": list,
        "protocols": list,
        "metrics": list,
        "differing": dict,
        "settings": dict,
        "parts": {"*": {"*": COMPARED}},
    },
    HARNESS: {
        "results": {"*": dict},
        "versions": dict,
        "config": {
            "imae_jax": {
                "arguments": {"model": str, "method": str, "limit": object},
                "base_model": {"dtype": str},
                "method": {"scoring": dict},
                "versions": dict,
                "git?": GIT,
            }
        },
    },
}
ANSWER = {"index": int, "question": str, "best": str, "method": str, "answer": str}
START = {"started": str, "command": list, "versions?": dict, "git?": GIT}
# Fields of results that tables show, or that are too long to be read.
SHOWN_ELSEWHERE = ("methods", "parts", "length", "batch_sizes", "benchmark", "rows")
LONGEST_LIST = 12
NOTE_INTERVALS = (
    "In square brackets: 95 % percentile bootstrap intervals over questions. They are about the choice of "
    "questions, not about training seeds. McNemar's test is of MC1 (or of the binary choice), exact and "
    "two-sided; p-values are not corrected for the number of methods."
)
NOTE_SUMS = (
    "The column *sums* says what was added up over an answer's tokens: `log p`, or differences of "
    "log-probabilities that are `raw` or `renormalized`. Raw sums are likelihood ratios, not "
    "log-probabilities of any one distribution: compare figures of the same kind."
)
NOTE_HARM = (
    "KL(base ‖ method), nats a token, and the share of tokens where the most likely one is base's, are of "
    "neutral text ({}): a gain bought with a broken model shows there."
)
NOTE_HARM_INTERVALS = (
    "In square brackets: 95 % percentile bootstrap intervals over blocks of consecutive tokens. All methods "
    "are measured on the same tokens."
)
NOTE_PAPER = (
    "Published figures, on other models and hardware and with other training than the runs of this "
    "report: not to be compared with them as equals. What can be held against each other is how far a method "
    "moves its own base. Source: {}."
)
NOTE_HALUEVAL = (
    "How often the right answer's score is above the hallucinated one's, in per cent; by sums over tokens "
    "and by their means. Hallucinated answers are longer, so that length alone tells much: *the shorter "
    "answer* is what preferring it would score."
)
NOTE_ANSWERS = (
    "What methods wrote. *acc*: share of answers that are more like a true reference than like any false "
    "one; *diff*: how much more. “I have no comment.” is a true reference of every question: "
    "*answered acc* is BLEU's acc where a refusal counts as 0. Likeness to references is not truth."
)
NOTE_COMPARISON = (
    "Two runs of evaluations, item by item: the second less the first, with 95 % percentile bootstrap "
    "intervals of the differences and McNemar's exact test of the first metric."
)
NOTE_HARNESS = (
    "Tasks of the LM Evaluation Harness with its own metrics and standard errors. A log-likelihood is the "
    "sum of the method's scores: where these are no log-probabilities, a perplexity or MC2 of them is none."
)
NOTE_COST = (
    "Memory: {}. ms/token is the time of a decoding step, without the prompt and without compiling; "
    "× base is against base in the same run and batch size."
)


@dataclasses.dataclass(frozen=True)
class Grid:
    """A table whose rows come in groups.

    Attributes:
        title: one line.
        columns: heads; the first column is left-aligned, the others right.
        groups: rows by the label of their group; an empty label has no line of its own.
    """

    kind: ClassVar[str] = "grid"
    title: str
    columns: tuple[str, ...]
    groups: Mapping[str, Sequence[Sequence[str]]]

    @classmethod
    def of(cls, table: Table) -> "Grid":
        return cls(table.title, table.columns, {"": table.rows})

    def markdown(self) -> str:
        rows: list[tuple[str, ...]] = []
        for label, of_group in self.groups.items():
            if label:
                rows.append((f"**{label}**", *[""] * (len(self.columns) - 1)))
            rows += map(tuple, of_group)
        return Table(self.title, self.columns, tuple(rows)).markdown()


@dataclasses.dataclass(frozen=True)
class Plot:
    """A picture.

    Attributes:
        name: of its PNG file in the report's directory.
        caption: one line.
        png: its bytes.
        svg: the same as SVG, which the page prefers.
    """

    kind: ClassVar[str] = "plot"
    name: str
    caption: str
    png: bytes
    svg: bytes | None = None

    def uri(self) -> str:
        """As a data URI."""
        kind, data = ("svg+xml", self.svg) if self.svg else ("png", self.png)
        return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"

    def markdown(self) -> str:
        return f"![{self.caption}]({self.name})\n"


@dataclasses.dataclass(frozen=True)
class Facts:
    """Names with their values, folded up.

    Attributes:
        title: one line.
        values: by name.
    """

    kind: ClassVar[str] = "facts"
    title: str
    values: Mapping[str, str]

    def markdown(self) -> str:
        title, *texts = (
            html.escape(text, quote=False)
            for text in (self.title, *(text for pair in self.values.items() for text in pair))
        )
        pairs = zip(texts[::2], texts[1::2], strict=True)
        lines = "".join(f"<dt>{name}</dt><dd><code>{value}</code></dd>\n" for name, value in pairs)
        return f"<details><summary>{title}</summary>\n<dl>\n{lines}</dl>\n</details>\n"


@dataclasses.dataclass(frozen=True)
class Note:
    """A paragraph of text; `warning` where it takes something from the figures' worth."""

    kind: ClassVar[str] = "note"
    text: str
    warning: bool = False

    def markdown(self) -> str:
        return f"{'**Note:** ' if self.warning else ''}{self.text}\n"


@dataclasses.dataclass(frozen=True)
class Section:
    """A heading and what is below it; level 2 or 3."""

    title: str
    blocks: tuple[Grid | Plot | Facts | Note, ...] = ()
    level: int = 2

    def markdown(self) -> str:
        return "\n".join([f"{'#' * self.level} {self.title}\n", *(block.markdown() for block in self.blocks)])


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """A finished evaluation run; `number` is its place among the report's runs, from 1."""

    number: int
    path: Path
    results: Mapping[str, Any]

    @property
    def kind(self) -> str:
        return self.results["benchmark"]

    def label(self) -> str:
        """What its rows are headed with."""
        return f"{self.results['model']} ({precision_of(self.results)}), run {self.number}"


@dataclasses.dataclass(frozen=True)
class Training:
    """A training run.

    Attributes:
        number, path: as of `Evaluation`.
        stages: lines of metrics and of held-out rows, by the stage's name.
        config: settings; empty where there are none.
        environment: of every start.
        data: statistics of the rows; empty where the run is unfinished.
    """

    number: int
    path: Path
    stages: Mapping[str, tuple[list[dict[str, Any]], list[dict[str, Any]]]]
    config: Mapping[str, Any]
    environment: Sequence[Mapping[str, Any]]
    data: Mapping[str, Any]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a stage's JSONL file; a last line that a killed run left unfinished is dropped.

    Raises:
        UserError: it cannot be read, or a line is damaged.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {first_line(error)}") from error
    lines = []
    for place, line in enumerate(text.splitlines(keepends=True), 1):
        try:
            entry = json.loads(line)
            if not isinstance(entry, dict) or "step" not in entry or "loss" not in entry:
                raise ValueError("it lacks a step or a loss")
        except ValueError as error:
            if not line.endswith("\n"):
                break
            raise UserError(f"{path} line {place} is damaged: {first_line(error)}") from error
        lines.append(entry)
    return lines


def read_training(number: int, path: Path) -> Training:
    """A training run, or one of its stages, whether finished or not.

    Raises:
        UserError: it has not trained yet, or a file is damaged.
    """
    import yaml

    stages = {}
    for part, name in STAGES.items():
        directory = path / part
        if not (directory / METRICS_FILE).is_file():
            continue
        lines = read_lines(directory / METRICS_FILE)
        held_out = directory / EVALUATION_FILE
        if lines:
            if "accuracy" in lines[0] and name == UNITS:  # `path` is a stage of a run.
                name = STAGES.get(path.resolve().name, STAGES[ADAPTER_STAGES["wrong"]])
            stages[name] = (lines, read_lines(held_out) if held_out.is_file() else [])
    if not stages:
        raise UserError(f"{path} holds no steps: the run has not trained yet")
    config_file, environment_file = path / CONFIG_FILE, path / ENVIRONMENT_FILE
    try:
        config = yaml.safe_load(config_file.read_text("utf-8")) if config_file.is_file() else {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{config_file} cannot be read: {first_line(error)}") from error
    _check(config_file, config, dict)
    environment = _read_json(environment_file) if environment_file.is_file() else []
    _check(environment_file, environment, list)
    for start in environment:
        _check(environment_file, start, START)
    recorded = path / IMAE_DIR / IMAE_CONFIG
    data = {}
    if recorded.is_file():
        units = _read_json(recorded)
        _check(recorded, units, {"training": dict})
        data = units["training"].get("data", {})
        if data:
            _check(recorded, data, {"rows": int, "kept_share": float}, "data")
    return Training(number, path, stages, config, environment, data)


def _check(file: Path, value: Any, form: Any, name: str = "it", metrics: Sequence[str] = ()) -> None:
    """Raises a `UserError` unless a value from a file has what a form, as in `FORMS`, names."""
    if not isinstance(value, dict if isinstance(form, dict) else form):
        raise _other_form(file, f"{name} is a {type(value).__name__}")
    for key, inner in form.items() if isinstance(form, dict) else ():
        optional = key.endswith("?")
        for found in value if key == "*" else metrics if key == METRIC else [key.removesuffix("?")]:
            if found in value and not (optional and value[found] is None):
                _check(file, value[found], inner, found, metrics)
            elif not optional:
                raise _other_form(file, f"{name} has no {found}")


def _check_results(file: Path, results: Any, kind: str) -> None:
    """As `_check`, of a run of a kind of `KINDS`, and of a comparison."""
    from .answers import DISTANCES, TEXTS
    from .compare import HEADS

    _check(file, results, COMMON)
    metrics, known = results.get("metrics", []), list(HEADS.get(results["benchmark"], ()))
    if "metrics" in FORMS[kind] and not (metrics and all(metric in known for metric in metrics)):
        raise _other_form(file, f"metrics is {json.dumps(metrics)}")
    # Runs of answers show more than they are compared by.
    more = [*DISTANCES, *TEXTS] if kind == "truthfulqa-answers" else []
    _check(file, results, FORMS[kind], metrics=[*metrics, *more])
    for part in results.get("parts", {}).values():
        name, form = ("settings", list) if kind == COMPARISON else ("methods", dict)
        _check(file, results[name], dict.fromkeys(part, form), name)


def _other_form(file: Path, problem: str) -> UserError:
    return UserError(f"{file} is of another form than expected ({problem}): make the run again")


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not readable JSON: {first_line(error)}") from error


def read_runs(paths: Sequence[Path]) -> list[Evaluation | Training]:
    """Runs of any kind.

    Args:
        paths: output directories of `imae_jax.train` and of evaluations.

    Raises:
        UserError: a directory is no run, an evaluation is unfinished, a file is damaged, or two are the same
            run.
    """
    runs: list[Evaluation | Training] = []
    seen: dict[str, Path] = {}
    for place, path in enumerate(paths, 1):
        evaluations = [path / name for name in (RESULTS_FILE, COMPARISON_FILE, HARNESS_FILE)]
        files = [*evaluations, *(path / stage / METRICS_FILE for stage in (".", ADAPTER_STAGES["wrong"]))]
        file = next(filter(Path.is_file, files), None)
        if file is None and not (path / RUN_FILE).is_file() and not (path / CONFIG_FILE).is_file():
            names = ", ".join(known.name for known in files[:-1])
            state = f"holds none of {names}" if path.exists() else "does not exist"
            raise UserError(f"{path} {state}: give output directories of imae_jax.train or imae_jax.evaluate")
        if file is not None:
            # A copy of a run is the same run, too.
            digest = hashlib.sha256(file.read_bytes()).hexdigest()
            if digest in seen:
                raise UserError(f"{path} is the same run as {seen[digest]}: name it once")
            seen[digest] = path
        if file in evaluations or (path / RUN_FILE).is_file():
            runs.append(Evaluation(place, path, read_results(path)))
        else:
            runs.append(read_training(place, path))
    return runs


def read_results(path: Path) -> dict[str, Any]:
    """The results of a finished evaluation run, of those too that have no benchmark of their own."""
    if (path / RESULTS_FILE).is_file():
        results = _read_json(path / RESULTS_FILE)
        if isinstance(results, dict) and "batch_sizes" in results:
            _check(path / RESULTS_FILE, results, FORMS[COST])
            return {**results, "benchmark": COST}
    elif (path / COMPARISON_FILE).is_file():
        comparison = _read_json(path / COMPARISON_FILE)
        _check_results(path / COMPARISON_FILE, comparison, COMPARISON)
        models = " → ".join(dict.fromkeys(comparison["models"]))
        return {**comparison, "of": comparison["benchmark"], "benchmark": COMPARISON, "model": models}
    elif (path / HARNESS_FILE).is_file():
        return read_harness(path / HARNESS_FILE)
    results = read_run(path)
    if results["benchmark"] not in KINDS:
        raise UserError(f"{path} is a run of {results['benchmark']}, which reports do not know: leave it out")
    _check_results(path / RESULTS_FILE, results, results["benchmark"])
    return results


def read_harness(file: Path) -> dict[str, Any]:
    """What a report shows of a result of lm-eval, in the form of other results."""
    found = _read_json(file)
    _check(file, found, FORMS[HARNESS])
    ours, kept = found["config"]["imae_jax"], ("n-samples", "n-shot", "date", "lm_eval_version")
    arguments = ours["arguments"]
    return {
        "benchmark": HARNESS,
        "model": arguments["model"],
        "dtype": ours["base_model"]["dtype"],
        "rows": harness_rows(found),
        "methods": {arguments["method"]: {"settings": ours["method"]["scoring"]}},
        "limit": arguments["limit"],
        "config": ours,
        "task_versions": found["versions"],
        **{name: found[name] for name in kept if name in found},
        "versions": ours["versions"],
        "git": ours.get("git"),
    }


def sections_of(runs: Sequence[Evaluation | Training]) -> list[Section]:
    """The report: results first, then training, pictures, and what all of it was made with."""
    by_kind: dict[str, list[Evaluation]] = {kind: [] for kind in KINDS}
    for run in runs:
        if isinstance(run, Evaluation):
            by_kind[run.kind].append(run)
    trainings = [run for run in runs if isinstance(run, Training)]
    paper = _read_json(PAPER_FILE)
    sections = truthfulqa_sections(by_kind["truthfulqa"], by_kind["harm"], paper)
    sections += answers_sections(by_kind["truthfulqa-answers"])
    sections += halueval_sections(by_kind["halueval"])
    sections += harm_sections(by_kind["harm"])
    sections += harness_sections(by_kind[HARNESS])
    sections += comparison_sections(by_kind[COMPARISON])
    sections += cost_sections(by_kind[COST], paper)
    sections += training_sections(trainings)
    return sections + provenance_sections(runs)


def truthfulqa_sections(
    runs: Sequence[Evaluation], harms: Sequence[Evaluation], paper: Mapping[str, Any]
) -> list[Section]:
    """Scores and differences, a section for each protocol and set of questions; the paper's scores last."""
    if not runs:
        return []
    together: dict[str, list[Evaluation]] = {}
    for run in runs:
        together.setdefault(_questions(run.results), []).append(run)
    plots = tuple(plot for run in runs for plot in plots_of(run))
    return [
        Section("TruthfulQA", (Note(NOTE_INTERVALS), Note(NOTE_SUMS))),
        *(Section(title, _scores(of_title, harms), level=3) for title, of_title in together.items()),
        _paper_scores(paper),
        *([Section("Plots of TruthfulQA", plots, level=3)] if plots else []),
    ]


def _scores(runs: Sequence[Evaluation], harms: Sequence[Evaluation]) -> tuple[Any, ...]:
    """Tables of runs of one protocol on the same questions."""
    from .truthfulqa import HEADS, harm_cells

    heads = {metric: HEADS[metric] for metric in runs[0].results["metrics"]}
    harm_of = {run.number: _harm_of(run, harms) for run in runs}
    sources = {source: None for found in harm_of.values() for _, source in found.values()}
    scores, compared, warnings = {}, {}, []
    for run in runs:
        methods, found = run.results["methods"], harm_of[run.number]
        rows = scores_table("", methods, heads).rows
        if sources:
            rows = [(*cells, *harm_cells(found.get(cells[0], (None,))[0])) for cells in rows]
        scores[run.label()] = rows
        differences = differences_table("", against_baseline(methods), heads).rows
        if differences:
            compared[f"{run.label()}, less {run.results['baseline']}"] = differences
        warnings += _warnings(run, methods)
    columns = scores_table("", {}, heads).columns
    if not sources:
        blocks = [Grid("Scores × 100 [95 % interval]", columns, scores)]
    else:
        columns += ("KL(base ‖ method)", "same top 1")
        blocks = [Grid("Scores × 100 [95 % interval], and harm on neutral text", columns, scores)]
        blocks.append(Note(NOTE_HARM.format(", ".join(sources))))
    if compared:
        columns = differences_table("", {}, heads).columns
        blocks.append(Grid("Differences on the same questions [95 % interval]", columns, compared))
    return (*blocks, *warnings)


def _warnings(run: Evaluation, methods: Mapping[str, Any]) -> list[Note]:
    return [Note(f"Run {run.number}: {note}.", warning=True) for note in note_undefined(methods)]


def _paper_scores(paper: Mapping[str, Any]) -> Section:
    from .truthfulqa import HEADS

    groups = {}
    for model, methods in paper["truthfulqa"]["models"].items():
        base = methods["base"]
        groups[model] = [
            (
                name,
                *map(number, values),
                *("–" if name == "base" else f"{a - b:+.2f}" for a, b in zip(values, base, strict=True)),
            )
            for name, values in methods.items()
        ]
    heads = [HEADS[metric] for metric in paper["truthfulqa"]["metrics"]]
    columns = ("method", *heads, *(f"Δ {head}" for head in heads))
    grid = Grid("As published; Δ is the difference to base of these figures", columns, groups)
    note = Note(NOTE_PAPER.format(paper["source"]), warning=True)
    return Section("The paper's results on TruthfulQA, on other models", (note, grid), level=3)


def _questions(results: Mapping[str, Any]) -> str:
    """Protocol and questions in words; equal for runs whose scores are of the same ones alone."""
    data, split, limit = results["data"], results["split"], results["limit"]
    drawn = ""
    if split["name"] != "all":
        drawn = f", {split['name']} split (seed {split['seed']}, dev share {split['dev_share']:g})"
    cut = "" if limit is None else f", the first {limit} alone"
    return (
        f"{results['protocol']}: {results['n_questions']} questions of {Path(data['path']).name} "
        f"(SHA-256 {data['sha256'][:8]}){drawn}{cut}"
    )


def _harm_of(run: Evaluation, harms: Sequence[Evaluation]) -> dict[str, tuple[Mapping[str, Any], str]]:
    """The harm of a run's methods, and where it is from.

    It is what the run itself was given, else that of the first run of the same model and settings.
    """
    methods = run.results["methods"]
    found = {k: (row["harm"], str(run.results["harm"])) for k, row in methods.items() if "harm" in row}
    for harm in harms:
        if not same_model(run.results, harm.results):
            continue
        for label, row in methods.items():
            for other in harm.results["methods"].values():
                if without_places(other["settings"]) == without_places(row["settings"]):
                    found.setdefault(label, (other, f"run {harm.number}"))
    return found


def answers_sections(runs: Sequence[Evaluation]) -> list[Section]:
    """Figures of generated answers, and the first of the texts."""
    from .answers import by_question, results_tables
    from .runs import read_lines as read_scores

    sections = [Section("Answers to TruthfulQA's questions", (Note(NOTE_ANSWERS),))] if runs else []
    for run in runs:
        texts = {}
        lines = read_scores(run.path)
        for line in lines:
            _check(run.path / SCORES_FILE, line, ANSWER, "a line")
        shown = by_question(lines)[: run.results["shown"]]
        for place, lines in enumerate(shown, 1):
            texts[f"{place}. {lines[0]['question']}"] = f"best answer: {lines[0]['best']}"
            texts |= {f"{place}. {line['method']}": line["answer"] for line in lines}
        facts = [Facts(f"Answers to {len(shown)} questions", texts)] if shown else []
        blocks = (*map(Grid.of, results_tables(run.results)), *plots_of(run), *facts)
        sections.append(Section(run.label(), blocks, level=3))
    return sections


def halueval_sections(runs: Sequence[Evaluation]) -> list[Section]:
    from .halueval import tables_of

    sections = [Section("HaluEval QA", (Note(NOTE_HALUEVAL),))] if runs else []
    for run in runs:
        blocks = [*map(Grid.of, tables_of(run.results)), *_warnings(run, run.results["parts"]["all"])]
        sections.append(Section(run.label(), (*blocks, *plots_of(run)), level=3))
    return sections


def harm_sections(runs: Sequence[Evaluation]) -> list[Section]:
    from .harm import results_table

    blocks: list[Any] = []
    for run in runs:
        blocks += [Grid.of(results_table(run.results)), *plots_of(run)]
    return [Section("Harm on neutral text", (Note(NOTE_HARM_INTERVALS), *blocks))] if runs else []


def harness_sections(runs: Sequence[Evaluation]) -> list[Section]:
    groups = {}
    for run in runs:
        (method,), limit = run.results["methods"], run.results["limit"]
        cut = "" if limit is None else f", {limit:g} documents a task"
        model = f"{run.results['model']} ({precision_of(run.results)})"
        groups[f"{model}, {method}{cut}, run {run.number}"] = run.results["rows"]
    grid = Grid("Results [± standard error]", HARNESS_COLUMNS, groups)
    return [Section("LM Evaluation Harness", (Note(NOTE_HARNESS), grid))] if runs else []


def comparison_sections(runs: Sequence[Evaluation]) -> list[Section]:
    from .compare import comparison_tables

    sections = [Section("Comparisons of two runs", (Note(NOTE_COMPARISON),))] if runs else []
    for run in runs:
        blocks = (
            *map(Grid.of, comparison_tables({**run.results, "benchmark": run.results["of"]})),
            *plots_of(run),
        )
        sections.append(Section(f"{run.path}, run {run.number}", blocks, level=3))
    return sections


def cost_sections(runs: Sequence[Evaluation], paper: Mapping[str, Any]) -> list[Section]:
    """Memory and time of decoding beside the paper's."""
    if not runs:
        return []
    columns = ("method", *paper["cost"]["columns"])
    groups: dict[str, list[tuple[str, ...]]] = {}
    kinds: dict[str, None] = {}
    for run in runs:
        kinds[run.results["memory"]] = None
        workload, versions = run.results["workload"], run.results["environment"]["versions"]
        for batch_size, figures in run.results["batch_sizes"].items():
            drawn = ", random weights" if run.results["random_weights"] else ""
            label = (
                f"{run.label()}{drawn}: batch {batch_size}, {workload['prompt_tokens']} + "
                f"{workload['new_tokens']} tokens, {versions['device']}"
            )
            base = figures["base"]
            groups[label] = [
                (
                    name,
                    number(row["memory_bytes"] and row["memory_bytes"] / 1e9),
                    number(_ratio(row["memory_bytes"], base["memory_bytes"])),
                    number(row["ms_per_token"]),
                    number(_ratio(row["ms_per_token"], base["ms_per_token"])),
                )
                for name, row in figures.items()
            ]
    plots = [plot for run in runs for plot in plots_of(run)]
    published = {"": [(name, *cells) for name, cells in paper["cost"]["methods"].items()]}
    notes = (Note(NOTE_PAPER.format(paper["source"]), warning=True), Note(paper["cost"]["note"]))
    measured = (Note(NOTE_COST.format("; ".join(kinds))), Grid("Measured", columns, groups), *plots)
    return [
        Section("Cost of decoding", measured),
        Section("The paper's cost", (*notes, Grid("As published", columns, published)), level=3),
    ]


def _ratio(value: float | None, base: float | None) -> float | None:
    return value / base if value and base else None


def training_sections(runs: Sequence[Training]) -> list[Section]:
    """Losses, gates and held-out rows of every stage, and their curves."""
    sections = [Section("Training")] if runs else []
    for run in runs:
        blocks: list[Any] = []
        for name, (lines, held_out) in run.stages.items():
            blocks += _stage_blocks(run, name, lines, held_out)
        if run.config and UNITS not in run.stages:
            blocks.append(Note("The units have not been trained.", warning=True))
        sections.append(Section(f"{run.path}, run {run.number}", tuple(blocks), level=3))
    return sections


def _stage_blocks(
    run: Training, name: str, lines: list[dict[str, Any]], held_out: list[dict[str, Any]]
) -> list[Any]:
    from imae_jax.train.plots import GATES, LOSSES, MEASURES, training_plot

    is_units = name == UNITS
    settings = run.config if is_units else run.config.get("icd", {})
    steps = settings.get("optimizer", {}).get("steps") if settings.get("epochs") is None else None
    done, last = lines[-1]["step"], lines[-1]
    parts = [f"{name}: {done} steps"]
    if settings:
        parts.append(f"batches of {settings['batch_size']} rows")
        parts.append(f"peak learning rate {settings['optimizer']['learning_rate']:g}")
    if run.data and is_units:
        parts.append(f"{run.data['rows']} training rows")
        parts.append(f"{100 * run.data['kept_share']:.1f} % of answer tokens in T_fact")
    parts.append(f"{last['tokens_per_second']:.0f} tokens/s at the end")
    text = ", ".join(parts)
    blocks: list[Any] = [Note(text[:1].upper() + text[1:] + ".")]
    if steps is not None and done < steps:
        blocks.append(Note(f"Unfinished: {done} of {steps} steps are done.", warning=True))
    rows_of = LOSSES | GATES if is_units else {"loss": "loss", "accuracy": "accuracy"}
    rows_of |= MEASURES
    columns: dict[str, Mapping[str, Any]] = {f"step {lines[0]['step']}": lines[0], f"step {done}": last}
    if held_out:
        columns |= {f"held out, step {line['step']}": line for line in (held_out[0], held_out[-1])}
    rows = tuple(
        (label, *(number(line.get(key), 3) for line in columns.values()))
        for key, label in rows_of.items()
        if any(key in line for line in columns.values())
    )
    blocks.append(Grid(f"Means over tokens, {name}; losses in nats", ("quantity", *columns), {"": rows}))
    slug = name.replace(" ", "-")
    png, svg = (_drawn(training_plot, suffix, lines, held_out) for suffix in ("png", "svg"))
    plot = "training" if is_units else slug
    blocks.append(Plot(f"{run.number}-{plot}.png", f"Training curves, {name}", png, svg))
    return blocks


def _drawn(draw: Any, suffix: str, lines: Sequence[Any], held_out: Sequence[Any]) -> bytes:
    import tempfile

    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / f"plot.{suffix}"
        draw(lines, path, held_out)
        return path.read_bytes()


def plots_of(run: Evaluation) -> list[Plot]:
    """The pictures that a run holds."""
    plots = []
    # Scores first, categories last.
    last = ("categories", "differences")
    for path in sorted(run.path.glob("*.png"), key=lambda path: ([name in path.stem for name in last], path)):
        svg = path.with_suffix(".svg")
        plots.append(
            Plot(
                f"{run.number}-{path.name}",
                f"Run {run.number}, {run.results['model']}: {path.stem.replace('-', ' ')}",
                path.read_bytes(),
                svg.read_bytes() if svg.is_file() else None,
            )
        )
    return plots


def provenance_sections(runs: Sequence[Evaluation | Training]) -> list[Section]:
    """All runs in one table, then everything that each of them recorded."""
    rows, blocks = [], []
    for run in runs:
        if isinstance(run, Training):
            environment = run.environment[-1] if run.environment else {}
            kind, model, seed = "training", run.config.get("model"), run.config.get("seed")
            facts = _flat({"config": run.config, "data": run.data})
            for start in run.environment:
                called = {**start, "command": shlex.join(start["command"])}
                facts |= _flat({f"start {start['started']}": called})
        else:
            results = run.results
            environment = results.get("environment", results)
            kind, model = KINDS[run.kind], results["model"]
            seed = results.get("statistics", {}).get("seed")
            facts = _flat({k: v for k, v in results.items() if k not in SHOWN_ELSEWHERE})
            for label, settings in _settings_of(results).items():
                facts[f"method {label}"] = json.dumps(settings, ensure_ascii=False)
        versions, git = environment.get("versions", {}), environment.get("git")
        commit = "–" if not git else git["commit"][:10] + (" + changes" if git["dirty"] else "")
        rows.append(
            (
                f"{run.number}: {run.path}",
                kind,
                str(model or "–"),
                str(versions.get("imae_jax", "–")),
                commit,
                str(versions.get("jax", "–")),
                str(versions.get("device", "–")),
                "–" if seed is None else str(seed),
            )
        )
        blocks.append(Facts(f"Run {run.number}, {kind}: {run.path}", facts))
    columns = ("run", "kind", "model", "imae_jax", "git", "jax", "device", "seed")
    return [Section("How these figures were made", (Grid("Runs", columns, {"": rows}), *blocks))]


def _settings_of(results: Mapping[str, Any]) -> dict[str, Any]:
    """Every method's settings, resolved."""
    if "batch_sizes" in results:
        methods = next(iter(results["batch_sizes"].values()), {})
    else:
        methods = results.get("methods", {})
    kept = ("settings", "scored_with", "seconds")
    return {
        label: {"sums": sums_of(row["settings"]), **{key: row[key] for key in kept if key in row}}
        for label, row in methods.items()
    }


def _flat(value: Any, name: str = "") -> dict[str, str]:
    """Nested settings by dotted name."""
    if isinstance(value, Mapping) and value:
        found: dict[str, str] = {}
        for key, item in value.items():
            found |= _flat(item, f"{name}.{key}" if name else str(key))
        return found
    if isinstance(value, list) and len(value) > LONGEST_LIST:
        return {name: f"{len(value)} values"}
    return {name: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}


def write_report(paths: Sequence[Path], out: Path) -> None:
    """Writes `report.html`, `report.md` and its plots for training and evaluation runs.

    Args:
        paths: output directories of `imae_jax.train` and of evaluations.
        out: an existing, empty directory.

    Raises:
        UserError: see `read_runs`.
    """
    from . import pages

    sections = sections_of(read_runs(paths))
    lead = f"{len(paths)} run{'s' * (len(paths) > 1)}, gathered by imae_jax {__version__}."
    text = "\n".join([f"# Report\n\n{lead}\n", *(section.markdown() for section in sections)])
    (out / REPORT_FILE).write_text(text, encoding="utf-8")
    page = pages.render("report", lead=lead, sections=sections)
    (out / PAGE_FILE).write_text(page, encoding="utf-8")
    for section in sections:
        for block in section.blocks:
            if isinstance(block, Plot):
                (out / block.name).write_bytes(block.png)


@command
def main(argv: Sequence[str] | None = None) -> None:
    parser = ArgumentParser(
        prog="python -m imae_jax.evaluate.report",
        description="Gathers training and evaluation runs into one page: OUT/report.html, which needs no "
        "other file, and OUT/report.md with its plots beside it.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", type=Path, help="output directory of a run")
    parser.add_argument("--out", required=True, type=Path, help="directory to write")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing OUT")
    args = parser.parse_args(argv)
    lock_outputs(args.out)
    with new_directory(args.out, marker=REPORT_FILE, overwrite=args.overwrite) as out:
        write_report(args.runs, out)
    print(f"wrote {args.out / PAGE_FILE} and {args.out / REPORT_FILE}")


if __name__ == "__main__":
    sys.exit(main())
