"""`python -m imae_jax.train`: trains anti-expert units on a frozen LLM, and what one wants to know before."""

import argparse
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from imae_jax import runtime, targets
from imae_jax.__main__ import MESSAGE_OPTIONS
from imae_jax.cli import ArgumentParser, add_process_arguments, command, join_processes
from imae_jax.errors import UserError

COMMANDS = {
    "run": "train anti-expert units and write OUT/imae (this COMMAND may be left out)",
    "icd": "train what the units are made from alone: the anti-expert LLM, or both adapters",
    "plan": "print the memory that a run needs on each device, without its weights and without allocating "
    "anything; exit code 1: it does not fit",
    "pairs": "examine pairs of right and wrong answers before anyone trains on them: lengths, shared words, "
    "what form alone gives away, repetitions, overlap with evaluation sets",
}


@command
def main(argv: Sequence[str] | None = None) -> None:
    words = list(sys.argv[1:] if argv is None else argv)
    messages = list(itertools.takewhile(MESSAGE_OPTIONS.__contains__, words))
    rest = words[len(messages) :]
    if rest[:1] not in (["-h"], ["--help"]):
        name, *rest = rest if rest and rest[0] in COMMANDS else ("run", *rest)
        words = [name, *messages, *rest]
    parser = ArgumentParser(
        prog="python -m imae_jax.train", description="Trains anti-expert units on a frozen LLM."
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, text in COMMANDS.items():
        subparser = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        _add_arguments(subparser, name)
        subparser.set_defaults(parser=subparser)
    # Settings may stand anywhere between the options.
    args, settings = parser.parse_known_args(words)
    unknown = [word for word in settings if word.startswith("-")]
    misplaced = [word for word in settings if word in COMMANDS]
    if misplaced:
        parser.error(f"the command comes first: {parser.prog} {misplaced[0]} …")
    if unknown:
        args.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    {"run": _run, "icd": _run, "plan": _plan, "pairs": _pairs}[args.command](args, settings)


def _add_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    parser.usage = f"{parser.prog} [options] {'FILE ' if name == 'pairs' else ''}[key=value …]"
    add = parser.add_argument
    if name == "pairs":
        add("source", metavar="FILE", help="any data.source: JSONL, JSON or CSV, demo, pairs, a hub id")
        text = (
            "evaluation sets whose questions must not be among the pairs: CSV, JSONL or JSON with a column "
        )
        text += "such as question or prompt; or a text, one question a line"
        add("--against", action="append", nargs="+", default=[], metavar="FILE", help=text)
        add("--tokenizer", metavar="MODEL", help="count this model's tokens instead of words")
        return
    add("--config", metavar="FILE", help="YAML file, or the name of a shipped config")
    if name == "plan":
        add("--device", default="h200", help=f"one of {', '.join(targets.TARGETS)} (default: h200)")
        text = "memory of one device, instead of --device: an estimate by XLA's compiler for CPUs"
        add("--memory", type=float, metavar="GIB", help=text)
        text = "how many the run will have (default: the mesh's; with mesh.data=-1 those of one replica)"
        add("--devices", type=int, metavar="N", help=text)
        text = "compile for this machine's own devices, which must be as many as the mesh has"
        add("--here", action="store_true", help=text)
        return
    text = "resume from the newest checkpoint; without --config the settings are those of the run in out"
    add("--resume", action="store_true", help=text)
    text = "resume from the checkpoint of step N and remove later ones"
    add("--from-step", type=int, metavar="N", help=text)
    add("--overwrite", action="store_true", help="replace a run in the same out")
    text = "separate LLM trained on hallucinations, for the token filter: filter.anti_expert_llm=MODEL"
    add("--anti-expert-llm", metavar="MODEL", help=text)
    add_process_arguments(parser)


def _run(args: argparse.Namespace, settings: list[str]) -> None:
    from imae_jax.distributed import is_main
    from imae_jax.train import run_directory
    from imae_jax.train.config import load_config
    from imae_jax.train.stages import train

    resume, file = args.resume or args.from_step is not None, args.config
    if args.anti_expert_llm is not None:
        settings = [*settings, f"filter.anti_expert_llm={args.anti_expert_llm}"]
    if resume and file is None:
        given = [word.removeprefix("out=") for word in settings if word.startswith("out=")]
        if not given:
            raise UserError("a run is resumed from its directory: pass out=DIR")
        out = Path(given[-1])
        run_directory.read_settings(out)  # Says what is wrong with a file that a run wrote.
        file = str(run_directory.config_file(out))
    config = load_config(file, settings)
    join_processes(args)
    path = train(
        config,
        only_icd=args.command == "icd",
        resume=resume,
        from_step=args.from_step,
        overwrite=args.overwrite,
        quiet=args.quiet,
    )
    if is_main():
        print(f"wrote {path}")


def _plan(args: argparse.Namespace, settings: list[str]) -> None:
    if args.here and args.devices is not None:
        raise UserError("--devices goes without --here, which takes all devices of this machine")
    asked = None if args.here or args.memory is not None else targets.find(args.device)
    ask = asked is not None and asked.compiler is not None
    if ask and asked.gpu is not None:
        targets.let_in()  # Before JAX is imported.
    from imae_jax.train.config import load_config
    from imae_jax.train.plan import plan, plan_table, verdict
    from imae_jax.train.setup import run_mesh

    # A plan writes nothing.
    config = load_config(args.config, ["out=unused", *settings])
    name, capacity = _capacity(args.device, args.memory)
    devices = _set_up_devices(config, args.devices, args.here, args.device if ask else None)
    mesh = run_mesh(config, bool(config.adapters_to_train()), devices)
    stages = plan(config, mesh)

    from rich.console import Console

    largest = max(stages, key=lambda stage: stage.total)
    sizes = " ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    print(f"{config.model} on {mesh.size} × {name}: {sizes}")
    print(f"worst case: rows of data.max_length={config.data.max_length} tokens")
    Console().print(plan_table(stages))
    print(_who_counted(asked, ask, args.here))
    print(verdict(config, largest, mesh, name, capacity))
    if largest.total > capacity:
        sys.exit(1)


def _who_counted(asked: targets.Target | None, ask: bool, here: bool) -> str:
    """One line: which compiler gave the activations."""
    if ask or here:
        compiler = asked.compiler if ask else "the compiler of this machine's devices"
        return f"activations: counted by {compiler}"
    how = f"; pip install 'imae-jax[{asked.extra}]' and ask its own" if asked and asked.extra else ""
    return f"activations: an estimate by XLA's compiler for CPUs{how}"


def _set_up_devices(config: Any, number: int | None, here: bool, target: str | None) -> list[Any] | None:
    """Devices to compile for, as many as the run's mesh has: abstract ones of a target, or None for this
    process's own, which are virtual CPU devices unless `here`."""
    runtime.set_up()
    import jax

    # A program from the cache does not know its memory.
    jax.config.update("jax_enable_compilation_cache", False)
    if here:
        return None
    sizes = config.mesh
    if number is None:
        number = abs(sizes.data) * sizes.fsdp * sizes.tensor
    if number < 1:
        raise UserError(f"a run on {number} devices: give at least 1")
    jax.config.update("jax_platforms", "cpu")
    if target is not None:
        return targets.abstract_devices(target, number)
    jax.config.update("jax_num_cpu_devices", number)
    return None


def _capacity(device: str, memory: float | None) -> tuple[str, float]:
    """What a device is called, and its memory in bytes."""
    if memory is not None:
        if not memory > 0:
            raise UserError(f"--memory {memory:g}: give GiB above 0")
        return f"a device of {memory:g} GiB", memory * 2**30
    return device, targets.find(device).memory * 1e9


def _pairs(args: argparse.Namespace, settings: list[str]) -> None:
    from imae_jax.train import pairs
    from imae_jax.train.config import load_config
    from imae_jax.train.data import read_source

    # After --against, settings look like more of its files.
    given = [*settings, *itertools.chain(*args.against)]
    settings = [word for word in given if "=" in word and not Path(word).exists()]
    against = [Path(word) for word in given if word not in settings]
    source = [f"data.source={args.source}", "model=unused", "out=unused"]
    config = load_config(None, [*settings, *source]).data
    tokenizer = None
    if args.tokenizer is not None:
        from imae_jax.convert.references import open_model

        tokenizer = open_model(args.tokenizer).tokenizer()
    records = read_source(config)[: config.limit]
    print("\n".join(pairs.describe(pairs.check(records, config, against, tokenizer))))


if __name__ == "__main__":
    sys.exit(main())
