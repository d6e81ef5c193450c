"""Peak memory of `smile-kernels upscale` against the size of the model: python bench/streaming.py [--blocks 2 8 32].

Random checkpoints of a Llama's shapes (hidden 1024, MLP 2816, bfloat16) and two fine-tuned versions of each are
written to a temporary folder; each size is fused by a process of its own, whose peak resident memory the kernel
reports. What an idle process needs is measured on a model of one small layer, and subtracted.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path

import torch

from smile_kernels.files import StoredTensor, read_tensors, write_tensors, write_text

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
            weight += 2e-3 * draw(expert) * 0.97 ** torch.arange(shape[1])  # a spectrum that decays
        return weight.bfloat16()

    folder.mkdir(parents=True)
    names = {f"model.layers.{i}.{layer}.weight": shape for i in range(blocks) for layer, shape in shapes.items()}
    tensors = [
        StoredTensor(name, torch.bfloat16, shape, lambda name=name, shape=shape: tensor(name, shape), "random")
        for name, shape in names.items()
    ]
    write_tensors(folder, tensors, max_shard_size="200MB")


def peak_memory(folder: Path, workers: int) -> tuple[int, float]:
    """Peak resident bytes and seconds of a process that fuses the checkpoints in `folder`."""
    experts = [option for i in range(1, EXPERTS + 1) for option in ("--expert", str(folder / str(i)))]
    command = [sys.executable, "-m", "smile_kernels", "upscale", "--base", str(folder / "0"), *experts]
    command += ["--rank-of-expert", "16", "--rank-of-router", "8", "--workers", str(workers)]
    command += ["--out", str(folder / f"out{workers}"), "--out-shard-size", "200MB"]
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{' '.join(command)}: status {status}")
    return usage.ru_maxrss * 1024, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, nargs="+", default=[2, 8, 32], help="sizes of model")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="layers at a time")
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "cpu" / "streaming.json")
    options = parser.parse_args()
    largest = HIDDEN * INNER * 2
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        idle = Path(temporary) / "idle"
        for expert in range(EXPERTS + 1):
            write_checkpoint(idle / str(expert), 1, {"small": (32, 32)}, expert)
        idle_bytes = peak_memory(idle, 1)[0]
        print(f"an idle process: {idle_bytes / 1e6:.0f} MB; the largest layer: {largest / 1e6:.1f} MB in bfloat16")
        for blocks in options.blocks:
            folder = Path(temporary) / f"blocks{blocks}"
            for expert in range(EXPERTS + 1):
                write_checkpoint(folder / str(expert), blocks, SHAPES, expert)
            size = sum(tensor.nbytes for tensor in read_tensors(folder / "0").values())
            for workers in options.workers:
                peak, seconds = peak_memory(folder, workers)
                row = {
                    "blocks": blocks,
                    "workers": workers,
                    "base_bytes": size,
                    "input_bytes": size * (1 + EXPERTS),
                    "peak_bytes": peak,
                    "above_idle_bytes": peak - idle_bytes,
                    "above_idle_largest_layers": (peak - idle_bytes) / largest,
                    "seconds": seconds,
                }
                rows.append(row)
                print(
                    f"{blocks:3} blocks, {size / 1e6:7.0f} MB base, {row['input_bytes'] / 1e6:7.0f} MB read, "
                    f"{workers} at a time: {row['above_idle_bytes'] / 1e6:5.0f} MB above idle, "
                    f"{row['above_idle_largest_layers']:.1f} largest layers, {seconds:.0f} s",
                    flush=True,
                )
    result = {
        "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "shapes": SHAPES,
        "experts": EXPERTS,
        "largest_layer_bytes": largest,
        "idle_bytes": idle_bytes,
        "rows": rows,
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    write_text(options.json, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
