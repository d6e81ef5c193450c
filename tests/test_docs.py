"""The site builds without warnings; its pages name every public function and error, and no option that is not there."""

import ast
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import typer.main

import smile_kernels
from smile_kernels.cli import app

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("bench/*.md")])


def page(name: str) -> str:
    return (ROOT / "docs" / name).read_text()


@pytest.mark.exhaustive
def test_the_site_builds_without_warnings_and_its_links_lead_somewhere(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "smile-kernels upscale" in (tmp_path / "cli" / "index.html").read_text()
    assert "rank_of_expert" in (tmp_path / "api" / "index.html").read_text()


def test_the_reference_has_every_public_name():
    listed = set(re.findall(r"^::: smile_kernels\.(\w+)", page("api.md"), re.MULTILINE))
    assert set(smile_kernels.__all__) - listed == set()
    functions = set(re.findall(r"^::: smile_kernels\.functional\.(\w+)", page("api.md"), re.MULTILINE))
    assert set(smile_kernels.functional.__all__) == functions


def messages() -> Iterator[str]:
    """What the package raises, where a message is written out: with ... for what it fills in."""
    package = ROOT / "smile_kernels"
    for file in sorted(set(package.rglob("*.py")) - set(package.glob("benchmark/*.py"))):  # which lists what cannot run
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.Raise) or not isinstance(node.exc, ast.Call):
                continue
            for argument in node.exc.args:
                parts = argument.values if isinstance(argument, ast.JoinedStr) else [argument]
                texts = [getattr(part, "value", None) for part in parts]
                message = "".join(text if isinstance(text, str) else "..." for text in texts)
                if len(re.findall(r"\w{2,}", message)) > 1:
                    yield message


def explained(message: str) -> bool:
    """Whether a message says what is expected, or the table of troubleshooting has it."""
    if "expected" in message or message == "SMILE_SUMS computes no attention":  # vLLM calls no such method
        return True
    table = re.findall(r"`([^`]+)`", page("troubleshooting.md"))
    fragments = [[part.strip() for part in entry.split("...")] for entry in table]
    return any(all(part in message for part in parts) for parts in fragments if len("".join(parts)) > 8)


def test_every_error_says_what_is_expected_or_stands_under_troubleshooting():
    found = list(messages())
    assert len(found) > 120
    assert [message for message in found if not explained(message)] == []
    assert not explained("layer: has gone away")


def commands(text: str) -> Iterator[list[str]]:
    """The smile-kernels commands in code of a page, as lists of arguments."""
    lines = text.replace("\\\n", " ").splitlines()
    code = [match[1] for line in lines if (match := re.match(r"\s*(?:\.venv/bin/)?(smile-kernels [a-z].*)", line))]
    for line in (*(line for line in code if "`" not in line), *re.findall(r"`(smile-kernels [^`]+)`", text)):
        yield shlex.split(line, comments=True)


@pytest.mark.parametrize("file", PAGES, ids=lambda file: file.name)
def test_commands_have_the_options_that_pages_give_them(file):
    group = typer.main.get_command(app)
    for _, name, *arguments in commands(file.read_text()):
        if name == "COMMAND":
            continue
        command = group.get_command(click.Context(group), name)
        assert command is not None, name
        options = {option for parameter in command.params for option in parameter.opts}
        given = {argument for argument in arguments if argument.startswith("--")}
        assert given <= options | {"--help"}, (file.name, name)


def test_pages_hold_commands():
    assert len(list(commands((ROOT / "README.md").read_text()))) > 3


@pytest.mark.parametrize("file", PAGES, ids=lambda file: file.name)
def test_the_python_of_a_page_parses(file):
    for block in re.findall(r"```python\n(.*?)```", file.read_text(), re.DOTALL):
        compile(block, file.name, "exec")
