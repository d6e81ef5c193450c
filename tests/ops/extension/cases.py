"""Checks of compiled operators for every library; also used by sanitize.py."""

import torch

from smile_kernels.ops import reference
from smile_kernels.testing import Problem, assert_close, expectations

# tokens, in_features, out_features, experts, rank of expert, rank of router, experts per token
SHAPES = [
    (1, 64, 48, 4, 8, 4, 1),
    (1, 1, 1, 1, 1, 1, 1),
    (7, 33, 29, 3, 5, 2, 2),
    (5, 100, 130, 8, 16, 16, 8),
    (13, 257, 65, 17, 70, 9, 3),
    (300, 40, 150, 5, 33, 40, 2),
    (65, 1100, 31, 2, 4, 7, 1),
    (8, 19, 203, 70, 2, 1, 5),
    (100, 20, 112, 3, 40, 8, 1),
]
# For the CPU: x that fill one to four vectors of a panel or not, several panels, and several chunks.
SHAPES_OF_PANELS = [
    (12, 70, 49, 3, 5, 4, 1),
    (16, 300, 97, 3, 5, 4, 2),
    (30, 33, 48, 5, 6, 3, 1),
    (48, 129, 50, 4, 7, 5, 1),
    (64, 515, 61, 3, 20, 8, 2),
    (128, 40, 70, 3, 5, 4, 1),
    (8, 1030, 97, 4, 20, 8, 1),
    (70, 77, 61, 3, 33, 4, 1),
    (1100, 21, 53, 3, 4, 2, 1),
    (150, 1300, 131, 3, 20, 8, 2),
    (450, 520, 128, 2, 33, 5, 1),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def check_routing(problem: Problem, weights: torch.Tensor, ids: torch.Tensor) -> None:
    """`ids` are the m best by exact score up to rounding, each once; `weights` the softmax of their scores."""
    m = problem.num_experts_per_tok
    scores = reference.scores(problem.x.double(), problem.rows().double())
    chosen, best = scores.gather(1, ids.long()), scores.sort(-1, descending=True).values[:, :m]
    eps = torch.finfo(weights.dtype).eps
    tolerance = 4 * eps * problem.x.shape[1] ** 0.5 * (1 + scores.abs().max().item()) if scores.numel() else 0
    assert_close("scores of the chosen experts", chosen, best, tolerance)
    assert all(len(set(row)) == m for row in ids.tolist())
    assert_close("weights", weights, chosen.softmax(-1), tolerance)


def check_forward(ops, problem: Problem) -> None:
    """route, apply and linear of `ops` against the float64 reference, and against each other."""
    p, m, r = problem, problem.num_experts_per_tok, problem.s.shape[1]
    y, weights, ids, h = ops.linear(*p.arguments(), m, p.rank_of_router, True)
    check_routing(p, weights, ids)
    assert_close("y", y, *expectations(p, ids, weights=weights)["y"])
    every = [torch.einsum("td,nrd->tnr", p.x.to(t), p.vh[:, :r].to(t)).double() for t in (torch.float64, h.dtype)]
    exact = every[0].gather(1, ids.long()[..., None].expand(-1, -1, r))
    error = (every[1] - every[0]).abs().max().item()
    assert_close("h", h, exact, error)

    for got, want in zip(ops.route(p.x, p.rows(), m), (weights, ids)):
        assert torch.equal(got, want), "route and linear choose differently"
    y_apply, h_apply = ops.apply(*p.arguments()[:7], weights, ids, True)
    assert_close("y of apply", y_apply, *expectations(p, ids, weights=weights)["y"])
    assert_close("h of apply", h_apply, exact, error)
    assert ops.linear(*p.arguments(), m, p.rank_of_router, False)[3].numel() == 0

    leading, (x, *layer) = (1, p.x.shape[0], 1), p.arguments()
    x, given = x.reshape(*leading, -1), [t.reshape(*leading, m) for t in (weights, ids)]
    y_linear, *choice = ops.linear(x, *layer, m, p.rank_of_router, True)
    y_apply, *of_apply = ops.apply(x, *layer[:6], *given, True)
    for got, want in zip((*choice, *of_apply), (*given, *(t.reshape(*leading, m, r) for t in (h, h_apply)))):
        assert torch.equal(got, want), "the leading dimensions of x matter"
    for got in (y_linear, y_apply):
        assert got.shape == (*leading, layer[0].shape[0])
        assert_close("y of rows", got.reshape(y.shape), *expectations(p, ids, weights=weights)["y"])

    base = torch.nn.functional.linear(p.x, p.weight, p.bias)
    experts = p.x, p.vh, p.s, p.u, p.expert_bias, p.router
    for routing in ((None, None), (weights, ids)):
        onto = torch.full((base.shape[0], base.shape[1] + 3), torch.nan, dtype=base.dtype)[:, 1:-2].copy_(base)
        own_weights, own_ids, h_delta = ops.delta_(onto, *experts, *routing, m, p.rank_of_router, True)
        assert_close("y of delta_", onto, *expectations(p, ids, weights=weights)["y"])
        assert_close("h of delta_", h_delta, exact, error)
        if routing[1] is None:
            assert torch.equal(own_weights, weights)
            assert torch.equal(own_ids, ids)
        if hasattr(ops, "delta"):  # only the module `extension` has delta_
            apart = ops.delta(base, *experts, *routing, m, p.rank_of_router, False)
            assert torch.equal(apart[0], onto)
            assert apart[3].numel() == 0


def check_backward(ops, problem: Problem) -> None:
    """apply_backward under fixed weights, and with route_backward added through the router, against the reference."""
    p, m = problem, problem.num_experts_per_tok
    y, weights, ids, h = ops.linear(*p.arguments(), m, p.rank_of_router, True)
    dy = torch.randn_like(y)
    arguments = (dy, p.x, p.weight, p.vh, p.s, p.u, p.expert_bias, weights, ids, h)
    names = ["x", "weight", "bias", "vh", "s", "u", "expert_bias", "weights"]
    got = dict(zip(names, ops.apply_backward(*arguments, 0xFF)))
    want = expectations(p, ids, weights=weights, dy=dy)
    for name in names:
        if name in want:
            assert_close(f"d{name}", got[name], *want[name])

    again = dict(zip(names, ops.apply_backward(*arguments, 0xFF)))
    assert all(torch.equal(got[name], again[name]) for name in names), "two runs differ"
    for i, name in enumerate(names):
        alone = ops.apply_backward(*arguments, 1 << i)
        assert torch.equal(alone[i], got[name]), f"d{name} asked for alone"
        assert all(t.numel() == 0 for k, t in enumerate(alone) if k != i), f"more than d{name}"

    if m > 1:
        want = expectations(p, ids, dy=dy)
        dx, drouter = ops.route_backward(got["weights"], p.x, p.rows(), weights, ids, 3)
        got["x"] = got["x"] + dx
        if p.router is None:
            got["vh"][:, : p.rank_of_router] += drouter
        else:
            got["router"] = drouter
        for name in ("x", "vh", "router"):
            if name in want:
                assert_close(f"d{name} through the router", got[name], *want[name])
        assert ops.route_backward(got["weights"], p.x, p.rows(), weights, ids, 1)[1].numel() == 0
