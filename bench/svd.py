"""Truncated SVD of one weight difference, one thread, compared with other implementations.

The peers run in one process on the same float32 matrix: fusion_bench's `svd` (the full decomposition, which its
upscaling truncates), `torch.linalg.svd(full_matrices=False)` and `torch.svd_lowrank(q=rank + 16, niter=4)`. Each record
contains the times, and the accuracy of each peer's factors relative to the full decomposition.
"""

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from smile_kernels.benchmark.measure import Record
from smile_kernels.svd import truncated_svd

RANK, ROUTER = 32, 16
SPECTRA = ("decaying", "power law", "flat")


def difference(spectrum: str, size: int) -> Tensor:
    """A square float32 matrix: s_i = exp(-i / 10), s_i = i^-0.5, or independent normal entries (flat)."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(size, size, generator=generator)
    if spectrum == "flat":
        return a
    i = torch.arange(1, size + 1)
    s = (-i / 10).exp() if spectrum == "decaying" else i**-0.5
    left, right = (torch.linalg.qr(torch.randn(size, size, generator=generator))[0] for _ in range(2))
    return (left * s) @ right


def peers(a: Tensor) -> dict[str, Callable[[], tuple[Tensor, Tensor, Tensor]]]:
    """Name -> a call that returns u [O, >= r], s, and v [D, >= r], the slow ones last."""
    from fusion_bench.models.smile_moe.linear_from_hf_config import svd

    def ours() -> tuple[Tensor, Tensor, Tensor]:
        result = truncated_svd(a, RANK, rank_of_router=ROUTER)
        return result.u, result.s, result.vh.T

    def exact() -> tuple[Tensor, Tensor, Tensor]:
        u, s, vh = torch.linalg.svd(a, full_matrices=False)
        return u, s, vh.T

    return {
        "smile": ours,
        "torch.svd_lowrank": lambda: torch.svd_lowrank(a, q=RANK + 16, niter=4),
        "torch.linalg.svd": exact,
        "fusion_bench": lambda: svd(a),
    }


def measure_svd(spectrum: str, size: int, rounds: int) -> Record:
    """Times of every peer (the quick ones three times a round), excess error at r = 32, sine of the router's rows."""
    torch.set_num_threads(1)
    a = difference(spectrum, size)
    record: Record = {"spectrum": spectrum, "size": size, "rank": RANK, "router": ROUTER, "threads": 1, "peers": {}}
    calls, results = peers(a), {}
    for _ in range(rounds):
        for name, call in calls.items():
            times = record["peers"].setdefault(name, {"wall_s": [], "process_s": []})
            for _ in range(3 if name in ("smile", "torch.svd_lowrank") else 1):
                wall, process = time.perf_counter(), time.process_time()
                results[name] = call()
                times["wall_s"].append(round(time.perf_counter() - wall, 4))
                times["process_s"].append(round(time.process_time() - process, 4))
    _, s, v = results["torch.linalg.svd"]
    optimal, router = s[RANK:].double().norm().item(), v[:, :ROUTER].double()
    for name, (u, s, v) in results.items():
        error = (a - (u[:, :RANK] * s[:RANK]) @ v[:, :RANK].T).double().norm().item()
        rows = v[:, :ROUTER].double()
        record["peers"][name]["excess"] = error / optimal - 1
        record["peers"][name]["sine"] = torch.linalg.matrix_norm(rows - router @ (router.T @ rows), 2).item()
    ours = statistics.median(record["peers"]["smile"]["process_s"])
    for name, peer in record["peers"].items():
        times = statistics.median(peer["process_s"]) / ours
        print(f"  {name}: {times:.1f}x ours, excess {peer['excess']:.1e}, sine {peer['sine']:.1e}", flush=True)
    return record


def plan(device: str) -> dict[str, Callable[[], Record]]:
    """Name -> the function that measures it."""
    return {
        f"{spectrum} {size}": lambda spectrum=spectrum, size=size: measure_svd(spectrum, size, 1 if size > 2048 else 3)
        for size in (1024, 2048, 4096)
        for spectrum in SPECTRA
    }
