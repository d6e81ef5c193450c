"""Many small tasks: pairs of the classes of the tasks that have four or more, for sweeps over the number of experts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

from ..data import TASKS, Rows, Task, balanced, distinct

SOURCES = ("newsgroups", "town", "reuters", "part of speech")


def rounds(classes: list[str]) -> Iterator[list[tuple[str, str]]]:
    """Every pair of an even number of classes once, in rounds of disjoint pairs: one stays, the others rotate."""
    first, rest = classes[0], classes[1:]
    for turn in range(len(rest)):
        circle = [first, *rest[turn:], *rest[:turn]]
        half = len(circle) // 2
        yield list(zip(circle[:half], circle[: -half - 1 : -1]))


def pair_of(task: Task, pair: tuple[str, str]) -> Task:
    """The task to tell two classes of `task` apart, with as many texts of each; its prompt names both."""

    def only(read: Callable[[Path], Rows]) -> Callable[[Path], Rows]:
        return lambda archive: balanced(distinct(row for row in read(archive) if row[1] in pair), 2)

    first, second = pair
    return replace(
        task,
        name=f"{task.name}: {first} or {second}",
        prompt=f"{task.prompt.rstrip('? ')}: {first} or {second}? ",
        read=only(task.read),
        read_test=task.read_test and only(task.read_test),
    )


def subtasks(folder: Path, count: int) -> list[Task]:
    """The first `count` pairs: the disjoint ones of all SOURCES before others, the sources interleaved.

    Args:
        folder: where the packages are.
        count: how many, up to the number of all pairs.
    """
    found = []
    for number, name in enumerate(SOURCES):
        (task,) = (one for one in TASKS if one.name == name)
        read_test = task.read_test and cache(task.read_test)
        task = replace(task, read=cache(task.read), read_test=read_test)  # every pair reads the same archive
        classes = sorted({label for _, label in task.read(task.package.fetch(folder))})
        for turn, pairs in enumerate(rounds(classes)):
            found += [((turn, place, number), pair_of(task, pair)) for place, pair in enumerate(pairs)]
    return [task for _, task in sorted(found, key=lambda one: one[0])[:count]]
