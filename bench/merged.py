"""Projections of one x as one layer of parts, F.linear, and a layer for each: python -m bench.run merged."""

import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from smile_kernels import SmileLinear
from smile_kernels.benchmark.measure import Record, interleave
from smile_kernels.functional import smile_delta

EXPERTS, RANK = 4, 16
IN_FEATURES = 576  # of SmolLM2-135M
LAYERS = {"qkv": (576, 192, 192), "gate_up": (1536, 1536)}
TOKENS = 1, 8, 2048


def plan(device: str) -> dict[str, Callable[[], Record]]:
    """Name -> the function that measures one layer, bfloat16, on one thread."""
    return {
        f"{name}, {t} tokens": lambda sizes=sizes, t=t: measure_layer(sizes, t)
        for name, sizes in LAYERS.items()
        for t in TOKENS
    }


@torch.no_grad()
def measure_layer(sizes: tuple[int, ...], tokens: int) -> Record:
    """Samples of each call, and the median over rounds of its process time relative to F.linear."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    options = {"bias": False, "expert_bias": False, "dtype": torch.bfloat16}
    layers = [SmileLinear(IN_FEATURES, o, EXPERTS, RANK, RANK, **options) for o in sizes]
    one, x = SmileLinear.merge(layers), torch.randn(tokens, IN_FEATURES, dtype=torch.bfloat16)
    dense = nn.Linear(IN_FEATURES, sum(sizes), bias=False, dtype=torch.bfloat16)
    y, experts = dense(x), (one.vh, one.s, one.u)
    routed = {"num_experts_per_tok": 1, "rank_of_router": RANK, "parts": sizes, "inplace": True}
    calls = {
        "F.linear": lambda: F.linear(x, dense.weight),
        "one layer of parts": lambda: one(x),
        "its experts alone": lambda: smile_delta(y, x, *experts, **routed),
        "a layer each": lambda: torch.cat([layer(x) for layer in layers], -1),
    }
    peers = interleave(calls, "cpu", seconds=3)
    base = peers["F.linear"]["process_us"]
    for name, peer in peers.items():
        peer["over_first"] = statistics.median(a / b for a, b in zip(peer["process_us"], base))
        print(f"  {name:40}{peer['over_first']:8.2f}", flush=True)
    sizes_of = {"in_features": IN_FEATURES, "parts": sizes, "experts": EXPERTS, "rank": RANK, "router": RANK}
    return {**sizes_of, "tokens": tokens, "threads": 1, "peers": peers}
