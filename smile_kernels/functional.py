"""The functional interface: one SMILE layer, its router, and its scores, as functions of tensors."""

import reprlib
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import SmileError, check_integer
from .ops import library, reference

__all__ = ["route", "router_projections", "router_scores", "select_experts", "smile_linear"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_ID_DTYPES = (torch.int32, torch.int64, torch.int16, torch.int8)


def smile_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    vh: Tensor,
    s: Tensor,
    u: Tensor,
    expert_bias: Tensor | None = None,
    router: Tensor | None = None,
    *,
    num_experts_per_tok: int,
    rank_of_router: int,
    routing: tuple[Tensor, Tensor] | None = None,
    routing_weights: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """A linear layer plus a sparse mixture of low-rank experts, routed token by token.

        y = W x + b + sum over the m selected i of w_i (U_i (s_i * V_i[:, :r]^T x) + expert_bias_i)

    where the m selected experts have the largest score_i = ||V_i[:, :g]^T x||_2 and w is the softmax of their scores.

    Equivalent to (T tokens, one dtype)::

        score = torch.einsum("td,ngd->tng", x, vh[:, :rank_of_router]).norm(dim=-1)
        p, ids = score.softmax(-1).topk(num_experts_per_tok)
        w = p / p.sum(-1, keepdim=True)
        y = F.linear(x, weight, bias)
        for j in range(num_experts_per_tok):
            i = ids[:, j]
            z = s[i] * torch.einsum("td,trd->tr", x, vh[i, :r])
            y = y + w[:, j, None] * (torch.einsum("tr,tor->to", z, u[i]) + expert_bias[i])

    Args:
        x: [..., D] input; any leading shape, (D,) and no tokens included; any strides.
        weight: [O, D] shared weight W.
        bias: [O] shared bias, or None.
        vh: [N, max(r, g), D] right singular vectors as rows.
        s: [N, r] singular values, float32 (float64 where x is float64); applied in float32.
        u: [N, O, r] left singular vectors as columns.
        expert_bias: [N, O] difference of each expert's bias to the shared one, or None.
        router: [N, g, D] router rows, where they are not the first g rows of `vh`.
        num_experts_per_tok: m, 1 <= m <= N.
        rank_of_router: g.
        routing: (weights [..., m], ids [..., m]) to use instead of the router's choice; ids are integers in [0, N), or
            -1 for no expert, whose weight is then ignored; m = 0: the shared layer alone. Others raise on a CPU; on a
            GPU, where looking at them would wait for it, they are no expert either.
        routing_weights: [..., N] non-negative weights from elsewhere: the m largest are used, divided by their sum.
        backend: "triton", "cuda", "cpu" or "torch"; by default the environment variable SMILE_KERNELS_BACKEND, then
            the best that runs on x's device (see `smile_kernels.backends`).

    Returns:
        y: [..., O] in x's dtype. Under autocast the inputs are cast as for F.linear.

    Routing is computed in float32 whatever x's dtype (float64 for float64); ties go to the lower index; a NaN score
    ranks last. x, weight, bias, vh, u, expert_bias and router share one dtype: float32, bfloat16, float16 or float64.
    Differentiable once in every floating-point argument; with m = 1 the weight is exactly 1 and the router gets no
    gradient.

    Raises:
        ValueError: shapes, dtypes or num_experts_per_tok do not fit; the message names the argument.
        RuntimeError: the requested backend cannot run here; the message says why.

    Source: SMILE, arXiv 2408.10174.
    """
    if isinstance(x, Tensor) and _autocasts(x):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, vh, u = (_cast(t, dtype) for t in (x, weight, vh, u))
        bias, expert_bias, router = (None if t is None else _cast(t, dtype) for t in (bias, expert_bias, router))
    _check(x, weight, bias, vh, s, u, expert_bias, router, num_experts_per_tok, rank_of_router)
    leading = x.shape[:-1]
    is_flat = x.dim() == 2  # a view costs a microsecond, a small layer tens of them
    tokens = x if is_flat else x.reshape(-1, x.shape[-1])
    if routing_weights is not None:
        if routing is not None:
            raise SmileError("routing_weights: given together with routing; expected one of the two")
        _check_tensor("routing_weights", routing_weights)
        if routing_weights.shape != (*leading, s.shape[0]):
            raise _shape_error("routing_weights", routing_weights, (*leading, s.shape[0]))
        # The softmax over log-weights divides the selected weights by their sum.
        routing = select_experts(routing_weights.to(s.dtype).log(), num_experts_per_tok)
    if routing is None:
        y = library.linear(
            tokens, weight, bias, vh, s, u, expert_bias, router, num_experts_per_tok, rank_of_router, backend
        )
    else:
        if not isinstance(routing, (tuple, list)) or len(routing) != 2:
            raise SmileError(f"routing: is {reprlib.repr(routing)}; expected (weights, ids)")
        weights, ids = routing
        _check_tensor("routing[0]", weights)
        _check_tensor("routing[1]", ids)
        if ids.shape[:-1] != leading:
            raise _shape_error("routing[1]", ids, (*leading, "m"))
        if weights.shape != ids.shape:
            raise _shape_error("routing[0]", weights, ids.shape)
        if ids.dtype not in _ID_DTYPES:
            raise SmileError(f"routing[1]: is {ids.dtype}; expected one of {_ID_DTYPES}")
        for i, tensor in enumerate(routing):
            _check_device(f"routing[{i}]", tensor, x)
        if ids.dtype == torch.int64:  # so that none wraps round into the range
            ids = ids.clamp(-2, s.shape[0])
        m = ids.shape[-1]
        if m == 0:
            return F.linear(x, weight, bias)
        weights, ids = weights.reshape(-1, m).to(s.dtype), ids.reshape(-1, m).int()
        y = library.apply(tokens, weight, bias, vh, s, u, expert_bias, weights, ids, backend)
    return y if is_flat else y.view(*leading, weight.shape[0])


def route(
    x: Tensor, vh: Tensor, *, num_experts_per_tok: int, rank_of_router: int, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """The m experts with the largest score_i = ||vh[i, :g] x||_2, and the softmax of their scores.

    Args:
        x: [..., D] input.
        vh: [N, >= g, D]; its first g rows are the router's.
        num_experts_per_tok: m, 1 <= m <= N.
        rank_of_router: g.
        backend: as in `smile_linear`.

    Returns:
        weights [..., m] float32 (float64 where x is float64), largest first, and ids [..., m] int32.

    Raises:
        ValueError: shapes, dtypes or num_experts_per_tok do not fit.
    """
    _check_router(x, vh, rank_of_router)
    check_integer("num_experts_per_tok", num_experts_per_tok, 1, vh.shape[0], "the number of experts")
    weights, ids = library.route(x.reshape(-1, x.shape[-1]), vh[:, :rank_of_router], num_experts_per_tok, backend)
    shape = (*x.shape[:-1], num_experts_per_tok)
    return weights.view(shape), ids.view(shape)


def router_projections(x: Tensor, vh: Tensor, router: Tensor | None = None, *, rank_of_router: int) -> Tensor:
    """q_i(x) = vh[i, :g] x for every expert: x [..., D], vh [N, >= g, D] -> [..., N, g] float32.

    Where x and vh are split along D, the projections add up over the parts; their norms, the scores, do not. float64
    where x is float64. Differentiable.

    router: [N, g, D] rows instead of those of `vh`.
    """
    _check_router(x, vh if router is None else router, rank_of_router)
    rows = reference.router_rows(vh, router, rank_of_router)
    if not _autocasts(x):
        return reference.projections(x, rows)
    with torch.autocast(x.device.type, enabled=False):
        return reference.projections(x, rows)


def router_scores(x: Tensor, vh: Tensor, *, rank_of_router: int) -> Tensor:
    """score_i(x) = ||vh[i, :g] x||_2 for every expert: x [..., D], vh [N, >= g, D] -> [..., N] float32.

    The one seam for every routing policy: feed what a policy makes of it to `select_experts`, and that to
    `smile_linear(routing=...)`. float64 where x is float64. Differentiable.
    """
    return torch.linalg.vector_norm(router_projections(x, vh, rank_of_router=rank_of_router), dim=-1)


def select_experts(scores: Tensor, num_experts_per_tok: int) -> tuple[Tensor, Tensor]:
    """The m largest of scores [..., N], ties to the lower index -> their softmax [..., m] and ids [..., m] int32."""
    _check_tensor("scores", scores)
    if scores.dim() < 1:
        raise _shape_error("scores", scores, ("...", "N"))
    if scores.dtype not in _DTYPES:
        raise SmileError(f"scores: is {scores.dtype}; expected one of {_DTYPES}")
    check_integer("num_experts_per_tok", num_experts_per_tok, 1, scores.shape[-1], "the number of experts")
    return reference.select(scores, num_experts_per_tok)


def _autocasts(x: Tensor) -> bool:
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)


def _cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t if t.dtype == torch.float64 else t.to(dtype)


def _shape_error(name: str, tensor: Tensor, expected: Sequence[int | str]) -> SmileError:
    return SmileError(f"{name}: has shape {list(tensor.shape)}; expected [{', '.join(map(str, expected))}]")


def _check_device(name: str, tensor: Tensor, x: Tensor) -> None:
    if tensor.device != x.device:
        raise SmileError(f"{name}: is on {tensor.device}; expected x's device, {x.device}")


def _check_tensor(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise SmileError(f"{name}: is {reprlib.repr(tensor)}; expected a tensor")


def _check_router(x: Tensor, vh: Tensor, rank_of_router: int) -> None:
    _check_tensor("x", x)
    _check_tensor("vh", vh)
    if vh.dim() != 3:
        raise _shape_error("vh", vh, ("N", "max(r, g)", "D"))
    if x.dim() < 1 or x.shape[-1] != vh.shape[2]:
        raise _shape_error("x", x, ("...", vh.shape[2]))
    _check_device("vh", vh, x)
    if x.dtype not in _DTYPES or (x.dtype != vh.dtype and not _autocasts(x)):
        raise SmileError(f"x: is {x.dtype} and vh {vh.dtype}; expected one floating-point dtype of {_DTYPES}")
    check_integer("rank_of_router", rank_of_router, 1, vh.shape[1], "the rows of vh an expert has")


def _check(x, weight, bias, vh, s, u, expert_bias, router, num_experts_per_tok, rank_of_router) -> None:
    for name, tensor in (("x", x), ("weight", weight), ("vh", vh), ("s", s), ("u", u)):
        _check_tensor(name, tensor)
    if weight.dim() != 2:
        raise _shape_error("weight", weight, ("O", "D"))
    (o, d), (n, r) = weight.shape, s.shape if s.dim() == 2 else (0, 0)
    _check_device("weight", weight, x)
    _check_device("s", s, x)
    if n == 0 or r == 0:
        raise _shape_error("s", s, ("N", "r"))
    check_integer("rank_of_router", rank_of_router, 1, d, "in_features")
    check_integer("num_experts_per_tok", num_experts_per_tok, 1, n, "the number of experts")
    rows = rank_of_router if router is None else 1
    expected = (
        ("bias", bias, (o,)),
        ("vh", vh, (n, max(r, rows), d)),
        ("u", u, (n, o, r)),
        ("expert_bias", expert_bias, (n, o)),
        ("router", router, (n, rank_of_router, d)),
    )
    for name, tensor, shape in expected:
        if tensor is None:
            continue
        _check_tensor(name, tensor)
        _check_device(name, tensor, x)
        if tensor.shape != shape and not (name == "vh" and _longer(tensor.shape, shape)):
            raise _shape_error(name, tensor, shape)
        if tensor.dtype != weight.dtype:
            raise SmileError(f"{name}: is {tensor.dtype}; expected weight's dtype, {weight.dtype}")
    if x.dim() < 1 or x.shape[-1] != d:
        raise _shape_error("x", x, ("...", d))
    if x.dtype != weight.dtype or x.dtype not in _DTYPES:
        raise SmileError(f"x: is {x.dtype} and weight {weight.dtype}; expected one floating-point dtype of {_DTYPES}")
    if s.dtype != reference.accumulate_dtype(x):
        raise SmileError(f"s: is {s.dtype}; expected {reference.accumulate_dtype(x)} for {x.dtype} inputs")


def _longer(shape: Sequence[int], least: Sequence[int]) -> bool:
    """vh may carry more rows than are used, as when a router of its own has fewer than it."""
    return len(shape) == 3 and shape[0] == least[0] and shape[1] >= least[1] and shape[2] == least[2]
