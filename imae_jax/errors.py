"""The user's mistakes, and how every command reports them."""

import argparse
import functools
import os
import sys
from collections.abc import Callable, Sequence


class UserError(ValueError):
    """A mistake that the user can mend.

    The message is one line: the thing, what is wrong with it, what to do.
    """


class ArgumentParser(argparse.ArgumentParser):
    """An `argparse.ArgumentParser` whose errors are one line (exit code 2)."""

    def error(self, message: str):
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


def command(main: Callable[[Sequence[str] | None], None]) -> Callable[..., int]:
    """Wraps a command's `main(argv)`: user errors become one line and exit code 2."""

    @functools.wraps(main)
    def wrapped(argv: Sequence[str] | None = None) -> int:
        try:
            main(argv)
        except UserError as error:
            print("error: " + " ".join(str(error).split()), file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130
        except BrokenPipeError:
            # The reader of a pipe has gone (`… | head`): not an error of ours.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 141
        return 0

    return wrapped
