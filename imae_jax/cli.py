"""What the commands share: messages, reports of errors, arguments that name a model or its sampling.

The library logs to loggers named after its modules and configures none; a command shows them on stderr.
"""

import argparse
import contextlib
import contextvars
import functools
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from imae_jax.errors import Stopped, Terminated, UserError, first_line, is_out_of_memory

MODULES = "python -m imae_jax"
DEBUG_VARIABLE = "IMAE_JAX_DEBUG"
# A module that `python -m` runs is called __main__; in a checkout that may be evaluate.truthfulqa.
OUR_LOGGERS = ("imae_jax", "evaluate", "__main__")
_until_end: contextvars.ContextVar[contextlib.ExitStack] = contextvars.ContextVar("until_end")
FAULT = "this is a fault of imae_jax, not of yours: please report it with the lines above"


def _message_options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False)
    group = parser.add_argument_group("messages")
    group.add_argument(
        "-v", "--verbose", action="store_true", help="details, and what other libraries have to say"
    )
    group.add_argument(
        "-q", "--quiet", action="store_true", help="only warnings and errors: no notes, no progress bars"
    )
    group.add_argument(
        "--debug",
        action="store_true",
        help=f"show the exceptions that led to an error (as the environment variable {DEBUG_VARIABLE}=1)",
    )
    return parser


def program() -> str:
    """How the user has called the command of all commands: `imae`, or `python -m imae_jax`."""
    return "imae" if Path(sys.argv[0]).stem == "imae" else MODULES


class ArgumentParser(argparse.ArgumentParser):
    """An `argparse.ArgumentParser` for a `command`: with --verbose, --quiet and --debug.

    Its errors are `UserError`s.

    Args:
        prog: `python -m imae_jax.…`; under `imae` it reads as the user has typed it.
    """

    def __init__(self, *, prog: str, **options: Any):
        path = Path(sys.argv[0])
        if path.stem == "imae" or path.parts[-2:] == ("imae_jax", "__main__.py"):
            prog = prog.replace(f"{MODULES}.", f"{program()} ").replace(".", " ")
        super().__init__(prog=prog, parents=[_message_options()], **options)

    def error(self, message: str):
        raise UserError(f"{message} (see {self.prog} --help)") from sys.exception()


def command(main: Callable[[Sequence[str] | None], None]) -> Callable[..., int]:
    """Wraps a command's `main(argv)`: shows log messages, reports what ends it, and returns the exit code."""

    @functools.wraps(main)
    def wrapped(argv: Sequence[str] | None = None) -> int:
        with _messages(argv):
            try:
                with _sigterm_unwinds(), contextlib.ExitStack() as stack:
                    token = _until_end.set(stack)
                    try:
                        main(argv)
                    finally:
                        _until_end.reset(token)
            except BrokenPipeError:
                # The reader of a pipe has gone (`… | head`): not an error of ours.
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                return 141
            except (Exception, KeyboardInterrupt) as error:
                from imae_jax import distributed

                if distributed.is_one_of_several() and not isinstance(error, Stopped):
                    with distributed.end_together():
                        raise
                return report(error)
        return 0

    return wrapped


def lock_outputs(*paths: str | os.PathLike | None) -> None:
    """Keeps other processes from writing to a command's outputs until it ends; a None is no output.

    Every command that writes calls it before it loads a model; of processes that have joined, all do.

    Raises:
        UserError: another process is writing to one of them.
    """
    from imae_jax.distributed import locked

    for path in paths:
        if path is not None:
            _until_end.get().enter_context(locked(path))


def report(error: BaseException, process: str = "") -> int:
    """Says on stderr what ended a command.

    Args:
        error: the exception.
        process: which of several processes it ended, as the beginning of a message; empty where there is one.

    Returns:
        The exit code: 2 for what the user can mend, which is one line (with --debug, below the exceptions
        that led to it); 128 + its number for a signal; 1 for a fault of this package, below its traceback.
    """
    if isinstance(error, Stopped):
        message, code = str(error), 128 + error.signal
    elif isinstance(error, Terminated):
        message, code = "terminated", 128 + signal.SIGTERM
    elif isinstance(error, KeyboardInterrupt):
        message, code = "interrupted", 128 + signal.SIGINT
    elif isinstance(error, UserError):
        message, code = f"error: {process}{error}", 2
    elif is_out_of_memory(error):
        message, code = f"error: {process}out of memory ({first_line(error)}): take less at a time", 2
    elif process:
        message = f"error: {process}{FAULT}, unless another process ended first: see its output"
        message, code = f"{message}, and start all of them again with --resume", 1
    else:
        message, code = f"error: {FAULT}", 1
    if code == 1 or (code == 2 and os.environ.get(DEBUG_VARIABLE, "0") not in ("", "0")):
        traceback.print_exception(error)
    print(" ".join(message.split()), file=sys.stderr, flush=True)
    return code


class _Handler(logging.Handler):
    """Writes one line for a message to stderr, above progress bars."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        tqdm.write(self.format(record), file=sys.stderr)

    def format(self, record: logging.LogRecord) -> str:
        level = "" if record.levelno == logging.INFO else f"{record.levelname.lower()}: "
        library = "" if record.name.split(".")[0] in OUR_LOGGERS else f"{record.name}: "
        line = " ".join(f"{level}{library}{record.getMessage()}".split())
        return (
            line if not record.exc_info else f"{line}\n{logging.Formatter().formatException(record.exc_info)}"
        )


@contextlib.contextmanager
def _messages(argv: Sequence[str] | None) -> Iterator[None]:
    """Shows log messages as the command line wants it, even if something else in it is wrong."""
    try:
        options, _ = _message_options().parse_known_args(argv)
    except argparse.ArgumentError:  # The command's own parser reports it.
        options = argparse.Namespace(verbose=False, quiet=False, debug=False)
    level = logging.DEBUG if options.verbose else logging.WARNING if options.quiet else logging.INFO
    levels = {"": logging.INFO if options.verbose else logging.WARNING, **dict.fromkeys(OUR_LOGGERS, level)}
    # Orbax logs through absl what it raises as well, asyncio what failed beside it.
    levels |= dict.fromkeys(("absl", "asyncio"), logging.INFO if options.verbose else logging.CRITICAL)
    before = {name: logging.getLogger(name).level for name in levels}
    handler, debug = _Handler(), os.environ.get(DEBUG_VARIABLE)
    try:
        logging.getLogger().addHandler(handler)
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        if options.debug:
            os.environ[DEBUG_VARIABLE] = "1"
        yield
    finally:
        logging.getLogger().removeHandler(handler)
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)
        if options.debug:
            os.environ.pop(DEBUG_VARIABLE)
            if debug is not None:
                os.environ[DEBUG_VARIABLE] = debug


@contextlib.contextmanager
def _sigterm_unwinds() -> Iterator[None]:
    """Raises `Terminated` at a SIGTERM, which would otherwise end the process and leave temporary files."""

    process = os.getpid()

    def terminate(number, frame):
        if os.getpid() != process:  # A worker that was forked holds nothing open: it ends without a word.
            os._exit(128 + number)
        signal.signal(number, signal.SIG_IGN)  # A second one must not stop the cleaning up.
        raise Terminated

    # Only the main thread may listen; and whoever set a handler before wants it kept.
    ours = threading.current_thread() is threading.main_thread()
    ours = ours and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if ours:
        signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def at_least(least: float) -> Callable[[str], float]:
    """The argparse `type` of numbers from `least` on, which are of its type."""

    def number(text: str) -> float:
        value = type(least)(text)
        if not value >= least:
            raise argparse.ArgumentTypeError(f"give at least {least}, not {text}")
        return value

    number.__name__ = type(least).__name__  # `invalid int value`
    return number


def add_model_arguments(parser: argparse.ArgumentParser, *, with_mesh: bool = True) -> None:
    """Adds `--model` and what goes with it; `model_arguments` reads them.

    Args:
        with_mesh: False for commands that write weights, which run on one device.
    """
    parser.add_argument("--model", required=True, help="model reference: see imae_jax.convert.references")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16 (default: the checkpoint's)")
    parser.add_argument("--revision", help="branch, tag or commit of a hub model")
    parser.add_argument("--tokenizer", help="directory or hub id of another tokenizer than the model's own")
    if with_mesh:
        parser.add_argument(
            "--mesh",
            default="auto",
            metavar="SIZES",
            help="devices along data, fsdp and tensor, such as fsdp=2,tensor=4: tensor and fsdp spread the "
            "model, data and fsdp the rows (default: all devices, with the largest tensor that divides the "
            "model; on a CPU one)",
        )
    parser.add_argument("--base", help="where the base of an IMAE directory or adapter is now")


def model_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments of `imae_jax.convert.load_model` besides the reference."""
    names = ("dtype", "revision", "tokenizer", "base", "mesh")
    return {name: getattr(args, name, None) for name in names}


def add_process_arguments(parser: argparse.ArgumentParser) -> None:
    """How several processes that run the same command find each other; `join_processes` reads them."""
    many = parser.add_argument_group("many processes")
    many.add_argument(
        "--distributed",
        action="store_true",
        help="find the run's other processes through the cluster's environment (TPU pods; in an srun step of "
        "several tasks this is the default)",
    )
    many.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0")
    many.add_argument("--num-processes", type=int, metavar="N")
    many.add_argument("--process-id", type=int, metavar="I", help="from 0")
    many.add_argument(
        "--heartbeat-timeout",
        type=int,
        default=60,
        metavar="SECONDS",
        help="after which the others end if a process no longer answers (default: 60)",
    )


def join_processes(args: argparse.Namespace) -> None:
    """Joins this process with the others of its run; must come before anything else touches a device.

    From then on the main one alone talks, and an error of one ends it at once (see `command`).
    """
    from imae_jax import distributed, runtime

    runtime.set_up()
    distributed.initialize(
        args.coordinator,
        args.num_processes,
        args.process_id,
        detect=args.distributed,
        heartbeat_timeout=args.heartbeat_timeout,
    )
    if not distributed.is_main():
        args.quiet = True
        logging.disable(logging.WARNING)
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the settings of `decode.Sampler`, in its order."""
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--top-k", type=int, default=0, help="0 is off")
    parser.add_argument("--top-p", type=float, default=1.0, help="1 is off")
    parser.add_argument("--repetition-penalty", type=float, default=1.0, help="1 is off")
