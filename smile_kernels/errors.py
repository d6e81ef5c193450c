"""The error for invalid arguments and files, names and reasons in the errors of others, and a check for integers."""

import operator
import reprlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["SmileError", "check_integer", "check_seed", "naming", "reason"]


class SmileError(ValueError):
    """An invalid argument, setting or file. The message names it, its value and what was expected, in one line."""

    def __init__(self, message: str):
        line = " ".join(message.split())  # values may have several lines, as models do, or a million characters
        super().__init__(line if len(line) <= 4000 else f"{line[:2000]} ... {line[-1000:]}")


def reason(error: BaseException) -> str:
    """The kind and the message of an error of another library, in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text if len(text) <= 500 else f'{text[:500]}...'}".removesuffix(": ")


@contextmanager
def naming(file: Path) -> Iterator[None]:
    """Give the errors of reading or closing an open file its name, which Python does not."""
    try:
        yield
    except OSError as error:
        if error.errno is None and str(file) not in str(error):  # of a library, with its message alone
            raise OSError(f"{file}: {error}") from error
        if error.errno is not None and error.filename is None:
            error.filename = str(file)
        raise


def check_integer(name: str, value: Any, least: int, most: int | None = None, meaning: str = "") -> int:
    """`value` as an int.

    Raises:
        SmileError: not an integer (bool is refused), or outside [least, most]; `meaning` explains `most`.
    """
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < least or (most is not None and number > most):
        kind = "an integer, " if number is None else ""
        span = f"{least} or more" if most is None else f"{least} to {most}"
        shown = " ".join(reprlib.repr(value).split())  # of a model or a tensor, one line
        raise SmileError(f"{name}: is {shown}; expected {kind}{span}{meaning and f', {meaning}'}")
    return number


def check_seed(seed: Any) -> None:
    """Raise SmileError unless torch takes `seed`."""
    check_integer("seed", seed, 0, 2**63 - 1, "in 63 bits")
