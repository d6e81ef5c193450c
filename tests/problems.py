"""Small problems of odd shapes, and the call that computes them."""

from collections.abc import Callable
from dataclasses import replace

import torch

from smile_kernels.functional import smile_linear
from smile_kernels.ops import library, reference
from smile_kernels.testing import Problem, assert_close, expectations

# Outputs of each part, and the rank of its experts; m is 2.
PARTS = {
    "one": ((70,), (3,)),
    "two": ((7, 1), (4, 4)),
    "three": ((70, 3, 130), (5, 5, 5)),
    "three, one dense": ((70, 3, 130), (6, 0, 2)),
    "four": ((64, 64, 33, 9), (5, 2, 1, 5)),
}
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


def problems_of_parts(
    sizes: tuple[int, ...], ranks: tuple[int, ...], tokens: int, d: int, n: int, g: int, m: int, **options
) -> list[Problem]:
    """One problem for each part, with the same x. The experts of a part of rank 0 are not those of the layer."""
    problems = [
        Problem.random(tokens, d, o, n, max(rank, 1), g, m, seed=seed, **options)
        for seed, (o, rank) in enumerate(zip(sizes, ranks))
    ]
    return [replace(p, x=problems[0].x) for p in problems]


def side_by_side(problems: list[Problem], ranks: tuple[int, ...]) -> dict[str, torch.Tensor | None]:
    """The tensors of a layer of these parts, with NaN in numbers that it must not read."""
    r, rows = max(ranks), max(p.vh.shape[1] for p in problems)

    def padded(t: torch.Tensor, ranks: int, rank: int, dim: int = -1) -> torch.Tensor:
        t = t if rank else torch.full_like(t, torch.nan)
        missing = t.new_full((*t.shape[:dim], ranks - t.shape[dim], *t.shape[dim:][1:]), torch.nan)
        return torch.cat([t, missing], dim)

    def stacked(name: str, ranks_of: int, dim: int = -1) -> torch.Tensor:
        return torch.stack([padded(getattr(p, name), ranks_of, rank, dim) for p, rank in zip(problems, ranks)])

    first = problems[0]
    return {
        "weight": torch.cat([p.weight for p in problems]),
        "bias": None if first.bias is None else torch.cat([p.bias for p in problems]),
        "vh": stacked("vh", max(r, rows), 1),
        "s": stacked("s", r),
        "u": torch.cat([padded(p.u, r, rank) for p, rank in zip(problems, ranks)], 1),
        "expert_bias": None if first.expert_bias is None else torch.cat([p.expert_bias for p in problems], 1),
        "router": None if first.router is None else torch.stack([p.router for p in problems]),
    }


def check_parts(
    problems: list[Problem],
    ranks: tuple[int, ...],
    layer: Callable[..., torch.Tensor],
    *,
    backward: bool = True,
    routing: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> None:
    """Compare `layer` of parts, called like smile_linear, with the float64 reference of each part.

    routing: weights and ids [T, P, m], or the layer's own.
    """
    x, tensors = problems[0].x.clone(), side_by_side(problems, ranks)
    leaves = {"x": x} | {name: t for name, t in tensors.items() if t is not None}
    if routing is not None:
        leaves["weights"] = routing[0].clone()
    leaves = {name: t.requires_grad_(backward) for name, t in leaves.items()}
    m, g, sizes = problems[0].num_experts_per_tok, problems[0].rank_of_router, [len(p.weight) for p in problems]
    arguments = [leaves.get(name) for name in ("x", "weight", "bias", "vh", "s", "u", "expert_bias", "router")]
    options = {"num_experts_per_tok": m, "rank_of_router": g, "parts": sizes, "rank_of_parts": ranks}
    y = layer(*arguments, **options, routing=routing and (leaves["weights"], routing[1]))
    dy = torch.randn(y.shape).to(y) if backward else None
    gradients = torch.autograd.grad(y, list(leaves.values()), dy, allow_unused=True) if backward else []
    got, end, wanted = dict(zip(leaves, gradients)), 0, []
    for part, (p, rank) in enumerate(zip(problems, ranks)):
        o = slice(end, end := end + sizes[part])
        weights, ids = (None, None) if routing is None else (t[:, part] for t in routing)
        if rank == 0:
            weights, ids = x.new_zeros(len(x), m, dtype=p.s.dtype), torch.full((len(x), m), -1, dtype=torch.int32)
        elif ids is None:
            ids = reference.select(reference.scores(p.x.detach().double(), p.rows().double()), m)[1]
        wanted.append((o, expectations(p, ids.to(x.device), weights=weights, dy=None if dy is None else dy[:, o])))
    # Plain PyTorch's error for the whole layer: a gradient of few numbers may be exact by chance.
    errors = {name: max(want[name][1] for _, want in wanted if name in want) for _, want in wanted for name in want}
    for part, ((o, want), p, rank) in enumerate(zip(wanted, problems, ranks)):
        assert_close(f"y of part {part}", y[:, o].detach(), want["y"][0], errors["y"])
        if not backward:
            continue
        own = {
            "weight": got["weight"][o],
            "bias": None if got.get("bias") is None else got["bias"][o],
            "vh": got["vh"][part, :, : p.vh.shape[1]],
            "s": got["s"][part, :, : p.s.shape[1]],
            "u": got["u"][:, o, : p.s.shape[1]],
            "expert_bias": None if got.get("expert_bias") is None else got["expert_bias"][:, o],
            "router": None if got.get("router") is None else got["router"][part],
            "weights": None if got.get("weights") is None else got["weights"][:, part],
        }
        for name, gradient in own.items():
            if gradient is not None and name in want:
                assert_close(f"d{name} of part {part}", gradient, want[name][0], errors[name])
        for past in (got["s"][part, :, rank:], got["u"][:, o, rank:], got["vh"][part, :, max(rank, g) :]):
            assert not past.any(), f"a gradient past rank {rank} of part {part}"
    if backward:
        dx, errors = zip(*(want["x"] for _, want in wanted))
        assert_close("dx", got["x"], sum(dx), sum(errors))
