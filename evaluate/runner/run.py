"""One run of any benchmark: its items through every method, resumable, then what they come to."""

import argparse
import dataclasses
import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

from tqdm import tqdm

from imae_jax.cli import lock_outputs, model_arguments
from imae_jax.convert import load_model
from imae_jax.decode import Method
from imae_jax.errors import UserError
from imae_jax.evaluate.benchmarks.benchmark import Benchmark, Item, Task
from imae_jax.evaluate.benchmarks.questions import select
from imae_jax.evaluate.reporting.aggregate import choose_baseline
from imae_jax.evaluate.reporting.controls import decompose
from imae_jax.evaluate.reporting.tables import show
from imae_jax.evaluate.runner.arguments import check_arguments, parse_methods
from imae_jax.evaluate.runner.controls import Controls, base_label, match_sizes, with_controls
from imae_jax.evaluate.runner.directory import MARKDOWN_FILE, RUN_FILE, SCORES_FILE, Run, markdown
from imae_jax.evaluate.runner.identity import environment, model_settings
from imae_jax.evaluate.runner.passes import KINDS, Pass, prepare
from imae_jax.files import dumps, read_json
from imae_jax.language_model import LanguageModel

logger = logging.getLogger(__name__)

LONGEST_LABEL = 40  # characters


@dataclasses.dataclass(frozen=True)
class Request:
    """A run that has been checked as far as that goes without its model.

    Attributes:
        benchmark, args: what is run, with the arguments of its command.
        command: command line, for the results.
        methods: methods and their controls by label.
        controls: which controls are whose.
        data: from `Benchmark.load`.
    """

    benchmark: Benchmark
    args: argparse.Namespace
    command: str
    methods: Mapping[str, Method]
    controls: Mapping[str, Controls]
    data: Any


def run_benchmark(benchmark: Benchmark, args: argparse.Namespace, command: str) -> None:
    """Evaluates methods, writes the run's directory and shows its tables.

    Raises:
        UserError: what is asked for cannot be run; says what to change.
    """
    lock_outputs(args.out)
    request = check(benchmark, args, command)
    run(request, load_model(args.model, **model_arguments(args)))


def check(benchmark: Benchmark, args: argparse.Namespace, command: str) -> Request:
    """Refuses what can be refused before a model is loaded, and reads the data."""
    methods, controls = with_controls(parse_methods(args.methods), args, needs_base=benchmark.questions)
    check_arguments(args, methods)
    return Request(benchmark, args, command, methods, controls, benchmark.load(args, methods))


def run(request: Request, lm: LanguageModel) -> None:
    """`run_benchmark` with a loaded model."""
    benchmark, args, methods, controls = request.benchmark, request.args, request.methods, request.controls
    task = benchmark.task(args, request.data, lm)
    if benchmark.questions:
        task = choose_items(task, args)
    if controls:
        recorded = read_json(args.out / RUN_FILE) if args.resume else {}
        methods, controls = match_sizes(lm, methods, controls, task.items, recorded)
    outputs = KINDS[benchmark.output](lm, task)
    settings, passes = prepare(lm, methods, task.items, generating=outputs.generating)
    passes = outputs.plan(passes)
    common = {
        "benchmark": benchmark.name,
        "protocol": task.protocol,
        **model_settings(lm, args),
        **task.settings,
    }
    identity = {**common, "methods": settings}
    if controls:
        identity["controls"] = {label: runs.kl for label, runs in controls.items()}
    directory = Run(args.out, identity, resume=args.resume, overwrite=args.overwrite)
    costs = {}
    for each in passes:
        add_costs(costs, each, run_pass(benchmark, directory, outputs, each, task.items, lm, args.quiet))
    baseline = choose_baseline(settings, getattr(args, "baseline", None))
    index = [item.index for item in task.items]
    records = {label: directory.of_method(label, index) for label in methods}
    results = common | {
        **outputs.facts,
        "command": request.command,
        **environment(lm.mesh),
        "resumed_lines": directory.resumed,
        **task.details,
        **benchmark.aggregate(args, task, records, baseline),
    }
    for label, summary in results["methods"].items():
        summary |= {**costs[label], "settings": settings[label], "normalized": methods[label].normalized}
    lines = [record for label in methods for record in records[label]]
    if controls and benchmark.questions:
        move_controls(results, records, controls, base_label(methods), args.seed)
    tables = benchmark.tables(results) + benchmark.control_tables(results)
    sentences = benchmark.control_sentences(results)
    texts = {
        SCORES_FILE: "".join(f"{dumps(line)}\n" for line in lines),
        MARKDOWN_FILE: "\n".join([markdown(tables), *sentences]),
        **benchmark.texts(results, lines),
    }
    directory.finish(results, texts, benchmark.plots(results) | benchmark.control_plots(results))
    for note in benchmark.warnings(results):
        logger.warning(note)
    show(tables)
    for sentence in sentences:
        print(sentence)


def move_controls(
    results: dict[str, Any],
    records: Mapping[str, Sequence[Mapping[str, Any]]],
    controls: Mapping[str, Controls],
    base: str,
    seed: int,
) -> None:
    """Moves summaries of control runs from `methods` to `controls`, with what they say of their methods."""
    metrics = decompose(records, results["metrics"], controls, base=base, seed=seed)
    results["controls"] = {
        label: {
            "metrics": metrics[label],
            "kl": runs.kl,
            "flip": runs.flip,
            "noise": runs.noise,
            "runs": {name: results["methods"].pop(name) for name in runs.labels()},
        }
        for label, runs in controls.items()
    }
    for part in results.get("parts", {}).values():
        for name in (name for runs in controls.values() for name in runs.labels()):
            part.pop(name, None)


def choose_items(task: Task, args: argparse.Namespace) -> Task:
    """The task with the items of the split that are not excluded, up to the limit."""
    split = select(
        [item.question for item in task.items], args.split, seed=args.split_seed, dev_share=args.dev_share
    )
    # The split is drawn from all, so that no exclusion moves a question from one split to the other.
    chosen = [task.items[i] for i in split if task.items[i].question not in task.excluded][: args.limit]
    excluded = sum(item.question in task.excluded for item in task.items)
    if not chosen:
        raise UserError(
            f"--split {args.split} holds none of {len(task.items)} questions, of which {excluded} are "
            "excluded: give another --dev-share"
        )
    settings = {
        **task.settings,
        "split": {"name": args.split, "seed": args.split_seed, "dev_share": args.dev_share},
        "limit": args.limit,
    }
    details = {**task.details, "n_excluded": excluded}
    return dataclasses.replace(task, items=tuple(chosen), settings=settings, details=details)


def run_pass(
    benchmark: Benchmark,
    run: Run,
    outputs: Any,
    each: Pass,
    items: Sequence[Item],
    lm: Any,
    quiet: bool,
) -> float:
    """Adds the records that a pass still lacks. Returns the seconds that it took."""
    start, label = time.perf_counter(), ", ".join(each.labels)
    missing = [i for i in each.items if any((k, items[i].index) not in run.records for k in each.labels)]
    bar = tqdm(
        outputs.run(each, missing),
        total=len(each.items),
        initial=len(each.items) - len(missing),
        desc=label if len(label) <= LONGEST_LABEL else f"{len(each.labels)} methods",
        unit="item",
        disable=quiet,
    )
    for i, of_methods in bar:
        for k, output in zip(each.labels, of_methods, strict=True):
            if (k, items[i].index) not in run.records:
                fields = benchmark.record(items[i], output, lm.tokenizer)
                run.add(k, items[i].index, {"question": items[i].question, **fields})
    return time.perf_counter() - start


def add_costs(costs: dict[str, dict[str, Any]], each: Pass, seconds: float) -> None:
    """Adds a pass's seconds to its methods, and which other methods it held."""
    for label in each.labels:
        cost = costs.setdefault(label, {"seconds": 0.0, "scored_with": []})
        cost["seconds"] += seconds
        cost["scored_with"] = [other for other in each.labels if other != label]
