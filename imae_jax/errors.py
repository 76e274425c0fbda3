"""The user's mistakes."""


class UserError(ValueError):
    """A mistake that the user can mend.

    The message is one line: the thing, what is wrong with it, what to do.
    """


def first_line(error: BaseException) -> str:
    """The first line that says something of another library's error."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(":") if lines else type(error).__name__
