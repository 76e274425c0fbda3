"""What the commands share: how errors are reported, and arguments that name a model or its sampling."""

import argparse
import contextlib
import functools
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from imae_jax.errors import Stopped, Terminated, UserError

MODULES = "python -m imae_jax"


def program() -> str:
    """How the user has called the command of all commands: `imae`, or `python -m imae_jax`."""
    return "imae" if Path(sys.argv[0]).stem == "imae" else MODULES


class ArgumentParser(argparse.ArgumentParser):
    """An `argparse.ArgumentParser` whose errors are one line (exit code 2).

    Args:
        prog: `python -m imae_jax.…`; under `imae` it reads as the user has typed it.
    """

    def __init__(self, *, prog: str, **options: Any):
        path = Path(sys.argv[0])
        if path.stem == "imae" or path.parts[-2:] == ("imae_jax", "__main__.py"):
            prog = prog.replace(f"{MODULES}.", f"{program()} ").replace(".", " ")
        super().__init__(prog=prog, **options)

    def error(self, message: str):
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


def command(main: Callable[[Sequence[str] | None], None]) -> Callable[..., int]:
    """Wraps a command's `main(argv)`: a user error is one line and exit code 2, a signal 128 + its number."""

    @functools.wraps(main)
    def wrapped(argv: Sequence[str] | None = None) -> int:
        try:
            with _sigterm_unwinds():
                main(argv)
        except UserError as error:
            print("error: " + " ".join(str(error).split()), file=sys.stderr)
            return 2
        except Stopped as stopped:
            print(stopped, file=sys.stderr)
            return 128 + stopped.signal
        except Terminated:
            print("terminated", file=sys.stderr)
            return 128 + signal.SIGTERM
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130
        except BrokenPipeError:
            # The reader of a pipe has gone (`… | head`): not an error of ours.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 141
        return 0

    return wrapped


@contextlib.contextmanager
def _sigterm_unwinds() -> Iterator[None]:
    """Raises `Terminated` at a SIGTERM, which would otherwise end the process and leave temporary files."""

    def terminate(number, frame):
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


def add_model_arguments(parser: argparse.ArgumentParser, *, quantizable: bool = True) -> None:
    """Adds `--model` and what goes with it; `model_arguments` reads them.

    Args:
        quantizable: False for commands that write weights.
    """
    parser.add_argument("--model", required=True, help="model reference: see imae_jax.convert.references")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16 (default: the checkpoint's)")
    parser.add_argument("--revision", help="branch, tag or commit of a hub model")
    parser.add_argument("--tokenizer", help="directory or hub id of another tokenizer than the model's own")
    if quantizable:
        parser.add_argument("--int8", help="weights as 8-bit integers: units, base or all")
    parser.add_argument("--base", help="where the base of an IMAE directory or adapter is now")


def model_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments of `imae_jax.convert.load_model` besides the reference."""
    return {name: getattr(args, name, None) for name in ("dtype", "revision", "tokenizer", "base", "int8")}


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the settings of `decode.Sampler`, in its order."""
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--top-k", type=int, default=0, help="0 is off")
    parser.add_argument("--top-p", type=float, default=1.0, help="1 is off")
    parser.add_argument("--repetition-penalty", type=float, default=1.0, help="1 is off")
