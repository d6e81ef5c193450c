"""The error for what a caller can correct, and the check of integers that every argument list needs."""

import operator
from typing import Any

__all__ = ["SmileError", "check_integer"]


class SmileError(ValueError):
    """An argument, a setting or a file that does not fit; the message names it, its value and what was expected."""


def check_integer(name: str, value: Any, least: int, most: int | None = None, meaning: str = "") -> int:
    """`value` as an int.

    Raises:
        SmileError: not an integer (a bool is none), or outside [least, most]; `meaning` says what `most` is.
    """
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < least or (most is not None and number > most):
        kind = "an integer, " if number is None else ""
        span = f"{least} or more" if most is None else f"{least} to {most}"
        raise SmileError(f"{name}: is {value!r}; expected {kind}{span}{meaning and f', {meaning}'}")
    return number
