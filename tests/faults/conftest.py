"""A folder of checkpoints for each test: a base, a fine-tuned model, an adapter, and a fused model."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fuzzing import limited
from tests.test_malformed import write_inputs


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def folder(whole, tmp_path) -> Path:
    shutil.copytree(whole, tmp_path / "case")
    return tmp_path / "case"


@pytest.fixture(autouse=True)
def _limits() -> Iterator[None]:
    with limited(120):
        yield
