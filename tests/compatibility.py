"""Runs the tests in the current environment, and writes its versions and the outcomes to docs/compatibility.md.

    python tests/compatibility.py NAME [PYTEST ARGUMENTS]

NAME is a record of that page: the newest or oldest versions, or another set; `vllm`, for the row of the installed
version in the table of vLLM's; or `architectures`, for the table of the tests' results for each architecture of
transformers in docs/architectures.md.
"""

import datetime
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from _pytest.terminal import TerminalReporter  # public in pytest only from 8.1 on
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
VERSIONS, ARCHITECTURES = ROOT / "docs" / "compatibility.md", ROOT / "docs" / "architectures.md"
PLAIN = ("equal", "equal", "none")  # the cells of an architecture without exceptions
OUTCOMES = ("passed", "failed", "error", "skipped", "xfailed")


class Outcomes:
    """A pytest plugin that counts the tests by outcome, and records the names of those that failed."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self.failed: list[str] = []
        self.architectures: list[dict[str, Any]] = []

    def pytest_terminal_summary(self, terminalreporter: TerminalReporter) -> None:
        stats = terminalreporter.stats
        self.counts = {outcome: len(stats.get(outcome, ())) for outcome in OUTCOMES}
        self.failed = sorted({report.nodeid for kind in ("failed", "error") for report in stats.get(kind, ())})
        reports = [report for kind in OUTCOMES for report in stats.get(kind, ())]
        recorded = [dict(report.user_properties).get("architecture") for report in reports]
        self.architectures = sorted(filter(None, recorded), key=lambda row: row["model_type"])


def installed() -> list[tuple[str, str, str]]:
    """Name, bounds and installed version of every dependency in pyproject.toml, including extras, in its order."""
    found = {}
    for line in metadata.requires("smile-kernels") or ():
        requirement = Requirement(line)
        if requirement.name == "smile-kernels":  # an extra that includes another
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            version = "not installed"
        bounds = sorted(map(str, requirement.specifier), reverse=True)
        found[requirement.name] = (requirement.name, ",".join(bounds), version)
    return list(found.values())


def ran(commit: str, arguments: list[str], outcomes: Outcomes, seconds: float) -> str:
    """Date, commit and machine of the tests, and their outcomes."""
    ends = ", ".join(f"{count} {outcome}" for outcome, count in outcomes.counts.items() if count) or "no test ran"
    machine = f"Python {platform.python_version()}, {platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    return (
        f"{datetime.date.today()}, commit {commit}, {machine}. `pytest {shlex.join(arguments)}`: {ends}, in "
        f"{seconds:.0f} s."
    )


def record(outcomes: Outcomes) -> str:
    """Installed versions and failed tests."""
    lines = [
        "| package | bounds | installed |",
        "| --- | --- | --- |",
        *(f"| {' | '.join(row)} |" for row in installed()),
    ]
    if outcomes.failed:
        lines += ["", "Failed:", "", *(f"- `{name}`" for name in outcomes.failed)]
    return "\n".join(lines)


def architectures(how: str, outcomes: Outcomes) -> str:
    """How the tests ran, a list of architectures without exceptions, a row for each other one, and the untested ones.

    Model types that were not among these tests keep their entries, with the record of their run.
    """
    cells = {row["model_type"]: _cells(row) for row in outcomes.architectures}
    block = ARCHITECTURES.read_text().partition("<!-- tested:architectures -->")[2]
    before = {row[0]: row for row in re.findall("^" + r"\| ([^|]*?) " * 6 + r"\|$", block, re.MULTILINE)[2:]}
    before |= {name: (name, kind, n, *PLAIN) for name, kind, n in re.findall(r"`([^`]+)` \((\w+), (\d+)\)", block)}
    skipped = re.search(r"^Not tried: (.*)\.$", block, re.MULTILINE)
    before |= {name: None for name in skipped[1].split(", ")} if skipped and skipped[1] != "none" else {}
    rows = dict(sorted({**before, **cells}.items()))
    if before.keys() - cells.keys():
        first = block.partition("transformers ")[0].strip()
        how = (
            f"{first}\n\nAfterwards {', '.join(sorted(cells))}: {re.sub('`pytest .*`: ', '', how)}" if cells else first
        )
    tried = [row for row in rows.values() if row is not None]
    ends = [end.partition(" ")[0].rstrip(":;") for row in tried for end in row[3:5]]
    plain = [f"`{name}` ({kind}, {n})" for name, kind, n, *rest in tried if tuple(rest) == PLAIN]
    lines = [
        how,
        "",
        f"transformers {metadata.version('transformers')}: {len(tried)} architectures were made tiny and run, each "
        f"fine-tuned in full and by LoRA: {ends.count('equal')} times equal, {ends.count('refused')} times refused by "
        f"name, {ends.count('PEFT')} times no adapter that PEFT makes, {ends.count('failed')} times failed. The other "
        f"{len(rows) - len(tried)} model types have no tiny model that runs on random inputs here.",
        "",
        f"Equal in both ways, with experts in every linear layer (class, number of layers): {', '.join(plain)}.",
        "",
        "| model type | class | linear layers | full | LoRA | layers without experts, and why |",
        "| --- | --- | --- | --- | --- | --- |",
        *(f"| {' | '.join(row)} |" for row in tried if tuple(row[3:]) != PLAIN),
        "",
        f"Not tried: {', '.join(name for name, row in rows.items() if row is None) or 'none'}.",
    ]
    return "\n".join(lines)


def _cells(row: dict[str, Any]) -> tuple[str, ...] | None:
    """The cells of an architecture's row; None if it was not tested."""
    if "class" not in row:
        return None
    ends = (str(row.get(way, "failed")).replace("|", "/") for way in ("full", "lora"))
    return row["model_type"], row["class"], str(row["layers"]), *ends, "; ".join(row["unfit"]) or "none"


def vllm_versions(how: str, outcomes: Outcomes) -> str:
    """The table of vLLM's versions, in which the installed one replaces its row."""
    block = VERSIONS.read_text().partition("<!-- tested:vllm -->")[2].partition("<!-- /tested:vllm -->")[0]
    rows = dict(re.findall(r"^\| (\d[^|]*?) \| (.*) \|$", block, re.MULTILINE))
    failed = f" Failed: {', '.join(f'`{name}`' for name in outcomes.failed)}." if outcomes.failed else ""
    version = Version(metadata.version(metadata.packages_distributions()["vllm"][0])).public
    rows[version] = how.replace("|", "/") + failed
    lines = [f"| {version} | {text} |" for version, text in sorted(rows.items(), key=lambda row: Version(row[0]))]
    return "\n".join(["| vLLM | tests |", "| --- | --- |", *lines])


def write(name: str, text: str) -> None:
    """Writes `text` between the markers of record `name` in its page.

    Raises:
        ValueError: the page has no such record.
    """
    page = ARCHITECTURES if name == "architectures" else VERSIONS
    document = page.read_text()
    start, end = f"<!-- tested:{name} -->", f"<!-- /tested:{name} -->"
    pattern = re.compile(f"{re.escape(start)}.*?{re.escape(end)}", re.DOTALL)
    if not pattern.search(document):
        raise ValueError(f"NAME: is {name!r}; expected one of {re.findall('<!-- tested:(.*?) -->', document)}")
    page.write_text(pattern.sub(lambda _: f"{start}\n{text}\n{end}", document))


def main() -> int:
    name, *arguments = sys.argv[1:]
    outcomes, started = Outcomes(), time.monotonic()
    commit = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, text=True).strip()
    status = pytest.main([*arguments], plugins=[outcomes])
    how = ran(commit, arguments, outcomes, time.monotonic() - started)
    tables = {"architectures": architectures, "vllm": vllm_versions}
    write(name, tables[name](how, outcomes) if name in tables else f"{how}\n\n{record(outcomes)}")
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
