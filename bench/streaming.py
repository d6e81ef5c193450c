"""Peak memory of `smile-kernels upscale` against the size of the model.

Random checkpoints of a Llama's shapes (hidden 1024, MLP 2816, bfloat16) and two fine-tuned versions of each are
written to a temporary folder; each size is fused by a separate process, whose peak resident memory the kernel reports.
The memory of an idle process is measured on a model of one small layer, and subtracted.
"""

import functools
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import torch

from smile_kernels.benchmark.measure import Record
from smile_kernels.storage import StoredTensor, read_tensors, write_tensors

HIDDEN, INNER, EXPERTS = 1024, 2816, 2
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN // 4, HIDDEN),
    "self_attn.v_proj": (HIDDEN // 4, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}


def write_checkpoint(folder: Path, blocks: int, shapes: dict[str, tuple[int, int]], expert: int) -> None:
    """Expert 0 is the base; the others differ from it by a matrix whose singular values decay."""

    def tensor(name: str, shape: tuple[int, int]) -> torch.Tensor:
        def draw(seed: int) -> torch.Tensor:
            generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {seed}".encode()))
            return torch.randn(shape, generator=generator)

        weight = 0.02 * draw(0)
        if expert:
            weight += 2e-3 * draw(expert) * 0.97 ** torch.arange(shape[1])  # a decaying spectrum
        return weight.bfloat16()

    folder.mkdir(parents=True)
    names = {f"model.layers.{i}.{layer}.weight": shape for i in range(blocks) for layer, shape in shapes.items()}
    tensors = [
        StoredTensor(name, torch.bfloat16, shape, lambda name=name, shape=shape: tensor(name, shape), "random")
        for name, shape in names.items()
    ]
    write_tensors(folder, tensors, max_shard_size="200MB")


# A process reports its own peak: the value of wait4 is at least the size of the parent.
PROGRAM = r"""
import re
from smile_kernels.cli import app
try:
    app()
finally:
    print(re.search(r"VmHWM:\s+(\d+) kB", open("/proc/self/status").read())[1])
"""


def peak_memory(folder: Path, workers: int) -> tuple[int, float]:
    """Peak resident bytes and seconds of a process that fuses the checkpoints in `folder`."""
    experts = [option for i in range(1, EXPERTS + 1) for option in ("--expert", str(folder / str(i)))]
    command = [sys.executable, "-c", PROGRAM, "upscale", "--base", str(folder / "0"), *experts]
    command += ["--rank-of-expert", "16", "--rank-of-router", "8", "--workers", str(workers)]
    command += ["--out", str(folder / f"out{workers}"), "--out-shard-size", "200MB"]
    start = time.perf_counter()
    process = subprocess.run(command, capture_output=True, text=True)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)}: status {process.returncode}: {process.stderr[-2000:]}")
    return int(process.stdout.split()[-1]) * 1024, time.perf_counter() - start


@functools.cache
def idle_memory() -> int:
    """Peak resident bytes of a process that fuses a model of one small layer."""
    with tempfile.TemporaryDirectory() as folder:
        for expert in range(EXPERTS + 1):
            write_checkpoint(Path(folder) / str(expert), 1, {"small": (32, 32)}, expert)
        return peak_memory(Path(folder), 1)[0]


def measure_streaming(blocks: int, workers: int) -> Record:
    """A model of `blocks` Llama blocks, `workers` layers at a time."""
    with tempfile.TemporaryDirectory() as folder:
        for expert in range(EXPERTS + 1):
            write_checkpoint(Path(folder) / str(expert), blocks, SHAPES, expert)
        size = sum(tensor.nbytes for tensor in read_tensors(Path(folder) / "0").values())
        peak, seconds = peak_memory(Path(folder), workers)
    return {
        "blocks": blocks,
        "workers": workers,
        "experts": EXPERTS,
        "base_bytes": size,
        "input_bytes": size * (1 + EXPERTS),
        "largest_layer_bytes": HIDDEN * INNER * 2,
        "idle_bytes": idle_memory(),
        "peak_bytes": peak,
        "seconds": seconds,
    }


def plan(device: str) -> dict[str, Callable[[], Record]]:
    """Name -> the function that measures it."""
    return {
        f"{blocks} blocks, {workers} at a time": lambda b=blocks, w=workers: measure_streaming(b, w)
        for blocks in (2, 8, 32)
        for workers in (1, 2)
    }
