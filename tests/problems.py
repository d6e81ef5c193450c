"""Small problems of odd shapes, and the call that computes them."""

import torch

from smile_kernels.functional import smile_linear
from smile_kernels.ops import library
from smile_kernels.testing import Problem

ON_CPU = [backend for backend in ("torch", "cpu") if library.why_not(backend, "cpu") is None]
# tokens, D, O, N, r, g, m
SHAPES = {
    "one-token": (1, 24, 16, 4, 4, 3, 1),
    "top-1": (33, 24, 16, 5, 4, 3, 1),
    "top-2": (17, 23, 29, 5, 3, 7, 2),
    "all": (9, 16, 31, 3, 6, 2, 3),
    "single-expert": (7, 12, 10, 1, 5, 5, 1),
    "rank-1": (60, 12, 10, 4, 1, 1, 2),
    "many-tokens": (300, 16, 24, 8, 4, 4, 1),
}


def problem(shape: str, seed: int = 0, **options) -> Problem:
    t, d, o, n, r, g, m = SHAPES[shape]
    return Problem.random(t, d, o, n, r, g, m, seed=seed, **options)


def call(p: Problem, **options) -> torch.Tensor:
    options = {"num_experts_per_tok": p.num_experts_per_tok, "rank_of_router": p.rank_of_router, **options}
    return smile_linear(*p.arguments(), **options)
