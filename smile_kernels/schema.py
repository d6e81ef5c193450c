"""Validates the contents of files and the arguments of public functions against type annotations."""

import functools
import inspect
import json
import re
import reprlib
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

import numpy as np
from torch import nn

from .errors import SmileError

__all__ = ["KNOWN_KEYS_ONLY", "check_arguments", "check_inputs", "parse"]

_T = TypeVar("_T")
_F = TypeVar("_F", bound=Callable[..., Any])

KNOWN_KEYS_ONLY = {"extra": "forbid"}  # as `__pydantic_config__` of a dataclass: `parse` refuses keys that no field has


def parse(kind: type[_T], values: Any, where: str) -> _T:
    """Convert the values of a JSON or YAML file to an annotated type such as a dataclass; no silent conversions.

    Raises:
        ValueError: a value that does not fit; the message begins with `where` and names it.
    """
    import pydantic

    try:
        text = json.dumps(values, default=str)
    except (TypeError, ValueError, RecursionError) as error:  # a key that is not a string, or a value inside itself
        raise SmileError(f"{where}: {error}; expected values that JSON has") from None
    try:
        return pydantic.TypeAdapter(kind).validate_json(text, strict=True)
    except pydantic.ValidationError as error:
        raise SmileError(f"{where}: {_misfit(kind, values, error.errors())}") from None


def check_arguments(function: _F) -> _F:
    """Make a function refuse, by name, arguments that do not fit its annotations.

    Integers of NumPy become int, and other numbers, such as fractions and tensors of one number, float.
    """
    signature = inspect.signature(function)

    @functools.cache
    def adapters() -> dict[str, Any]:
        import pydantic

        hints = typing.get_type_hints(inspect.unwrap(function))
        options = pydantic.ConfigDict(arbitrary_types_allowed=True)
        return {
            name: pydantic.TypeAdapter(_unread(hints[name]), config=None if is_dataclass(hints[name]) else options)
            for name, parameter in signature.parameters.items()
            if name in hints and parameter.kind is not parameter.VAR_KEYWORD
        }

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        from pydantic import ValidationError

        bound, changed = signature.bind(*args, **kwargs), False
        for name, value in bound.arguments.items():
            if name not in adapters():
                continue
            if isinstance(value, np.integer):  # which JSON and torch's generators do not take
                bound.arguments[name] = value = int(value)
                changed = True
            if isinstance(value, nn.ModuleList):  # accepted like a list
                value = list(value)
            try:
                valid = adapters()[name].validate_python(value, strict=True)
            except ValidationError as error:
                path, _, misfit = f": {_misfit(None, value, error.errors())}".rpartition(": is ")
                step = "".join(f"[{part}]" for part in path.removeprefix(": ").split(".") if part)
                raise SmileError(f"{name}{step}: is {misfit}") from None
            if isinstance(valid, float) and not isinstance(value, (int, float)):
                bound.arguments[name] = valid
                changed = True
        return function(*bound.args, **bound.kwargs) if changed else function(*args, **kwargs)

    return typing.cast(_F, checked)


def _unread(hint: Any) -> Any:
    """An annotation without reading mappings: their values may be tensors on disk."""
    import pydantic

    origin: Any = typing.get_origin(hint)
    arguments = tuple(map(_unread, typing.get_args(hint)))
    if origin is Mapping:
        return pydantic.InstanceOf[Mapping]
    if origin in (typing.Union, types.UnionType):
        return typing.Union[arguments]  # noqa: UP007
    return types.GenericAlias(origin, arguments[:1]) if origin in (Sequence, Iterable) else hint


def check_inputs(model: nn.Module, inputs: Mapping[str, Any]) -> None:
    """Raises ValueError unless `inputs` are keyword arguments that the model's forward takes."""
    try:
        inspect.signature(model.forward).bind(**inputs)
    except TypeError as error:
        raise SmileError(f"inputs: {error}; expected the arguments of {type(model).__name__}.forward") from None


def _misfit(kind: Any, values: Any, errors: list[Any]) -> str:
    """An unknown key, or else the deepest of pydantic's errors, as "path: is value; expected this or that"."""
    unknown = ("extra_forbidden", "unexpected_keyword_argument")
    worst = max(errors, key=lambda error: (error["type"] in unknown, len(error["loc"])))
    problem, path = worst["type"], _path(values, worst["loc"])
    if problem in unknown and not path:  # a key that is not a string
        path = str(worst["loc"][-1])
    if problem == "value_error":
        return f"{path}: {worst['ctx']['error']}".removeprefix(": ")
    if problem == "json_invalid":
        return "is nested too deeply"
    if problem == "missing":
        return f"{'.'.join(filter(None, (path, str(worst['loc'][-1]))))} is missing"
    if problem in unknown:
        known = ", ".join(field.name for field in fields(kind)) if len(worst["loc"]) == 1 else ""
        return f"unknown key {path!r}" + (known and f"; expected {known}")
    same = dict.fromkeys(error["msg"] for error in errors if _path(values, error["loc"]) == path)  # a union has several
    expected = re.sub(r"\ba (?=[aeio])", "an ", " or ".join(same).replace("Input should be ", "").replace("valid ", ""))
    expected = expected.replace("'str' instances are not allowed as a Sequence value", "a list")
    expected = expected.replace("an instance of Sequence", "a list")
    shown = " ".join(reprlib.repr(worst["input"]).split())
    return f"{path}: is {shown}; expected {expected}".removeprefix(": ")


def _path(values: Any, steps: Iterable[str | int]) -> str:
    """The path into `values`, joined by dots, without the union members that pydantic adds to it."""
    path = []
    for step in steps:
        if (isinstance(values, dict) and step in values) or (isinstance(values, list) and isinstance(step, int)):
            values = values[step]  # type: ignore[index]
            path.append(str(step))
    return ".".join(path)
