"""What ends a command early: the user's mistakes, signals."""

from collections.abc import Iterator


class UserError(ValueError):
    """A mistake that the user can mend.

    The message is one line: the thing, what is wrong with it, what to do.
    """


class Stopped(Exception):
    """A signal asked a run to stop, and it has saved what it did.

    Attributes:
        signal: its number.
    """

    def __init__(self, message: str, signal: int):
        super().__init__(message)
        self.signal = signal


class Terminated(KeyboardInterrupt):
    """SIGTERM came: what is open is closed, and half-written files are removed, as after Ctrl-C."""


def chain(error: BaseException) -> Iterator[BaseException]:
    """The exception, then what it names as its cause, step by step.

    What was only being handled when it was raised did not lead to it.
    """
    while error is not None:
        yield error
        error = error.__cause__


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it was raised, or caused, by too little memory on the host or a device."""
    from jax.errors import JaxRuntimeError

    return any(
        isinstance(cause, MemoryError)
        or (isinstance(cause, JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(cause))
        for cause in chain(error)
    )


def first_line(error: BaseException) -> str:
    """The first line that says something of another library's error."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(":") if lines else type(error).__name__
