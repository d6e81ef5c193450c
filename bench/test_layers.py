"""`pytest bench/`: the forward of one layer on every peer that runs here, under pytest-benchmark."""

import pytest
import torch

from smile_kernels.benchmark.peers import PEERS, CannotRunError
from smile_kernels.benchmark.problems import Case, Setting
from smile_kernels.ops import reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("tokens", [1, 64, 2048])
@pytest.mark.parametrize("peer", PEERS)
def test_forward(benchmark, peer: str, tokens: int):
    benchmark.group = f"clip-b32.attn, {tokens} tokens"
    problem = Case("clip-b32.attn", Setting(8, 32, 16), tokens, torch.float32).problem(DEVICE)
    try:
        layer, _ = PEERS[peer].build(problem, *reference.route(problem.x, problem.rows(), 1))
    except CannotRunError as reason:
        pytest.skip(str(reason))

    def call():
        layer(problem.x)
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    with torch.no_grad():
        benchmark.pedantic(call, rounds=20, iterations=5, warmup_rounds=2)
