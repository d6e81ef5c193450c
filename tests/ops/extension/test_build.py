"""setup.py on machines where the extension can be built, and where it cannot."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from smile_kernels.ops import extension
from tests.ops.extension.builds import ROOT

LIBRARY = "smile_kernels/ops/_extension_cpu.so"


def wheel(folder: Path, **environment: str) -> zipfile.ZipFile:
    """The wheel of a copy of the sources, so that builds are independent."""
    names = ("csrc", "smile_kernels", "setup.py", "pyproject.toml", "README.md", "LICENSE")
    source = folder / "source"
    source.mkdir()
    for name in names:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-w", folder, source]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return zipfile.ZipFile(next(folder.glob("*.whl")))


def test_a_failed_compile_gives_a_wheel_for_every_platform_that_says_why(tmp_path):
    compiler = tmp_path / "broken"
    compiler.write_text("#!/bin/sh\necho 'smile.h:1: error: unheard of' >&2\nexit 1\n")
    compiler.chmod(0o755)
    built = wheel(tmp_path, CXX=str(compiler))
    assert built.filename.endswith("-py3-none-any.whl")
    assert LIBRARY not in built.namelist(), "a library of an earlier build"
    reason = built.read(LIBRARY.replace(".so", ".txt")).decode()
    assert reason == "compiling it failed: smile.h:1: error: unheard of\n"


def test_a_skipped_build_takes_no_library_of_an_earlier_one(tmp_path):
    built = wheel(tmp_path, SMILE_KERNELS_SKIP_BUILD="1")
    assert built.filename.endswith("-py3-none-any.whl")
    assert not [name for name in built.namelist() if name.endswith(".so")]


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_the_recorded_reason_is_reported(kind, tmp_path, monkeypatch):
    for library in ("_extension_cpu", "_extension_cuda"):
        source = Path(extension.__file__).with_name(f"{library}.so")
        if library != f"_extension_{kind}" and source.exists():
            shutil.copy(source, tmp_path)
    (tmp_path / f"_extension_{kind}.txt").write_text("there was no nvcc\n")
    monkeypatch.setattr(extension, "__file__", str(tmp_path / "extension.py"))
    monkeypatch.setattr(extension, "_load", lambda path: None)
    assert f"its {kind} library was not built when smile_kernels was installed (there was no nvcc)" in (
        extension.unavailable.__wrapped__(kind)
    )
