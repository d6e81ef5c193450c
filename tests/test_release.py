"""Metadata of a release: one version, its changelog, its extras, and the files for GitHub."""

import re
import sys
from pathlib import Path

import pytest
import yaml

import smile_kernels
from tests.upscaling.checkpoints import run

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_version_stands_in_one_place():
    assert "version" not in PROJECT
    assert PROJECT["dynamic"] == ["version"]
    assert run("--version") == f"smile-kernels {smile_kernels.__version__}\n"
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest[1] == smile_kernels.__version__


def test_extras():
    extras = PROJECT["optional-dependencies"]
    assert {"transformers", "peft", "vllm", "demo", "test", "docs", "dev"} <= extras.keys()
    named = {
        extra for lines in extras.values() for line in lines for extra in re.findall(r"^smile-kernels\[(\w+)", line)
    }
    assert named <= extras.keys()


@pytest.mark.parametrize("file", sorted(ROOT.glob(".github/**/*.yml")), ids=lambda file: file.name)
def test_workflows_call_targets_that_exist(file):
    content = yaml.safe_load(file.read_text())
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    steps = [step for job in content.get("jobs", {}).values() for step in job["steps"]]
    for command in filter(None, (step.get("run") for step in steps)):
        assert command.split()[0] == "make"
        assert command.split()[1] in targets
    assert "jobs" not in content or any("run" in step for step in steps)


def test_bug_reports_ask_for_the_file_of_doctor():
    form = yaml.safe_load((ROOT / ".github/ISSUE_TEMPLATE/bug.yml").read_text())
    asked = {field["id"]: field for field in form["body"]}
    assert asked["verify"]["validations"]["required"]
    assert "doctor --verify" in asked["verify"]["attributes"]["label"]


def test_the_citation_file_names_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert citation["references"][0]["url"] == PROJECT["urls"]["Paper"]
    assert "version" not in citation
