"""Builds of csrc/ for tests: with sanitizers, for a CPU instead of a GPU, with nvcc's reports."""

import fcntl
import hashlib
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
CSRC = ROOT / "csrc"
TORCH = Path(torch.__path__[0])

SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-D_GLIBCXX_ASSERTIONS", "-O0")
EMULATION = ("-DSMILE_CUDA", "-DSMILE_EMULATION", "-Dsmile_kernels_ext=smile_kernels_emulated", f"-I{HERE}")
STABLE_ABI = ("-DTORCH_TARGET_VERSION=0x020a000000000000", f"-I{TORCH / 'include'}")
CUDA_SOURCES = ("project.cu", "route.cu", "decode.cu", "forward.cu", "backward.cu")
LINK = (f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-lc10")


def cached(name: str, command: Sequence[str | Path]) -> Path:
    """The file that `command` writes to the path appended to it, built once for each state of the sources."""
    digest = hashlib.sha256(repr((command, torch.__version__)).encode())
    for path in sorted([*CSRC.iterdir(), *HERE.glob("*.h"), *HERE.glob("*.cpp")]):
        digest.update(path.read_bytes())
    folder = ROOT / "build" / "tests"
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{digest.hexdigest()[:16]}-{name}"
    with open(folder / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            temporary = target.with_suffix(".partial")
            done = subprocess.run([*command, temporary], capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr
            target.with_suffix(".log").write_text(done.stdout + done.stderr)
            os.replace(temporary, target)
    return target


def cpu_library(*flags: str) -> Path:
    sources = (CSRC / "cpu.cpp", CSRC / "evidence.cpp", CSRC / "bindings.cpp")
    common = ("c++", "-std=c++17", "-fPIC", "-shared", "-Wno-psabi")
    return cached("cpu.so", (*common, *flags, *STABLE_ABI, *sources, *LINK, "-o"))


def emulated_library(*flags: str) -> Path:
    """The CUDA kernels and their bindings as CPU operators, torch.ops.smile_kernels_emulated.*."""
    sources = (
        "-xc++",
        *(CSRC / name for name in ("project.cu", "route.cu", "decode.cu", "forward.cu", "backward.cu", "bindings.cpp")),
    )
    common = ("c++", "-std=c++20", "-fPIC", "-shared", "-Wno-unknown-pragmas")
    return cached("emulated.so", (*common, *flags, *EMULATION, *STABLE_ABI, *sources, *LINK, "-o"))


def run_sanitized(library: Path, *arguments: str) -> str:
    """Run sanitize.py on a library built with SANITIZERS; findings fail the caller."""
    preload = [
        subprocess.check_output(["c++", f"-print-file-name={name}"], text=True).strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    environment = os.environ | {
        "LD_PRELOAD": ":".join(preload),
        "ASAN_OPTIONS": "detect_leaks=0",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, HERE / "sanitize.py", library, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
