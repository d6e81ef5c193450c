"""The reference: a simple implementation of a SMILE layer, differentiable by autograd, in float32 or float64.

Shapes: T tokens, D in_features, O out_features, N experts, m experts per token, r rank of an expert, g of the router.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def accumulate_dtype(x: Tensor) -> torch.dtype:
    """The dtype of routing and low-rank sums: float32, or float64 for float64 inputs."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def autocasts(x: Tensor) -> bool:
    """Whether autocast is enabled on x's device; the meta device has none."""
    kind = x.device.type
    return kind != "meta" and torch.is_autocast_enabled(kind)


def router_rows(vh: Tensor, router: Tensor | None, rank_of_router: int) -> Tensor:
    """The router's rows [N, g, D]: its own, or the first g of each vh_i [N, >= g, D]; [P, N, g, D] of P parts."""
    return vh[..., :rank_of_router, :] if router is None else router


def projections(x: Tensor, router: Tensor) -> Tensor:
    """q_i = router_i x: x [..., D], router [N, g, D] -> [..., N, g] float32."""
    acc = accumulate_dtype(x)
    return torch.einsum("...d,ngd->...ng", x.to(acc), router.to(acc))


def scores(x: Tensor, router: Tensor) -> Tensor:
    """score_i(x) = ||router_i x||_2: x [..., D], router [N, g, D] -> [..., N] float32."""
    return torch.linalg.vector_norm(projections(x, router), dim=-1)


def select(scores: Tensor, num_experts_per_tok: int) -> tuple[Tensor, Tensor]:
    """The m largest scores, ties to the lower index, and their softmax: scores [..., N] -> weights [..., m], ids int32.

    Softmax over the selected scores equals softmax over all, top-m, renormalise. NaN ranks last; an infinite score
    counts as the largest finite one, so that one bad value does not affect the other experts' weights.
    """
    scores = scores.nan_to_num(nan=torch.finfo(scores.dtype).min)
    if num_experts_per_tok == 1:
        ids = scores.argmax(-1, keepdim=True)
        return torch.ones_like(ids, dtype=scores.dtype), ids.int()
    values, ids = torch.sort(scores, dim=-1, descending=True, stable=True)
    return values[..., :num_experts_per_tok].softmax(-1), ids[..., :num_experts_per_tok].int()


def route(x: Tensor, router: Tensor, num_experts_per_tok: int) -> tuple[Tensor, Tensor]:
    """x [T, D], router [N, g, D] -> weights [T, m] float32, ids [T, m] int32."""
    return select(scores(x, router), num_experts_per_tok)


def apply(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    vh: Tensor,
    s: Tensor,
    u: Tensor,
    expert_bias: Tensor | None,
    weights: Tensor,
    ids: Tensor,
) -> Tensor:
    """y = W x + b + sum over the selected i of w_i (U_i (s_i * V_i^T x) + expert_bias_i); one rounding, at the end.

    An id that is not an expert's, such as -1 for an unused slot, adds nothing for any weight.
    """
    acc = accumulate_dtype(x)
    y = F.linear(x.to(acc), weight.to(acc), None if bias is None else bias.to(acc))
    return (y + _experts(x, vh, s, u, expert_bias, weights, ids)).to(x.dtype)


def _experts(
    x: Tensor, vh: Tensor, s: Tensor, u: Tensor, expert_bias: Tensor | None, weights: Tensor, ids: Tensor
) -> Tensor:
    """The sum over the selected experts, in the dtype of sums."""
    acc = accumulate_dtype(x)
    xa, r = x.to(acc), s.shape[1]
    y = xa.new_zeros(*x.shape[:-1], u.shape[1])
    for i in range(s.shape[0]):
        chosen = ids == i
        w = torch.where(chosen, weights.to(acc), 0).sum(-1, keepdim=True)
        delta = (xa @ vh[i, :r].to(acc).T * s[i].to(acc)) @ u[i].to(acc).T
        if expert_bias is not None:
            delta = delta + expert_bias[i].to(acc)
        y = y + torch.where(chosen.any(-1, keepdim=True), w * delta, 0)
    return y


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    vh: Tensor,
    s: Tensor,
    u: Tensor,
    expert_bias: Tensor | None,
    router: Tensor | None,
    num_experts_per_tok: int,
    rank_of_router: int,
) -> Tensor:
    """Route, then apply: x [T, D] -> y [T, O]."""
    weights, ids = route(x, router_rows(vh, router, rank_of_router), num_experts_per_tok)
    return apply(x, weight, bias, vh, s, u, expert_bias, weights, ids)


def weights_of(x: Tensor, router: Tensor, ids: Tensor) -> Tensor:
    """The weights of selected experts: x [T, D], router [P, N, g, D], ids [T, P, m] -> [T, P, m]; or all without P."""
    acc = accumulate_dtype(x)
    norms = _norms(torch.einsum("td,...ngd->t...ng", x.to(acc), router.to(acc)))
    return norms.nan_to_num(nan=torch.finfo(acc).min).gather(-1, ids.long().clamp_min(0)).softmax(-1)


def _norms(q: Tensor) -> Tensor:
    """||q||_2 over the last dimension, whose derivatives of any order are 0 where q is."""
    squares = q.square().sum(-1)
    return torch.where(squares > 0, torch.where(squares > 0, squares, 1).sqrt(), squares)


def delta(y, x, vh, s, u, expert_bias, weights, ids, parts: Sequence[tuple[int, slice, int]] | None = None) -> Tensor:
    """y [T, O] + the selected experts; `parts`: those with experts, of a layer of several."""
    if parts is None:
        return (y.to(accumulate_dtype(x)) + _experts(x, vh, s, u, expert_bias, weights, ids)).to(x.dtype)
    columns, end = [], 0
    for part, o, rank in parts:
        factors = vh[part], s[part, :, :rank], u[:, o, :rank], None if expert_bias is None else expert_bias[:, o]
        columns += [y[:, end : o.start], delta(y[:, o], x, *factors, weights[:, part], ids[:, part])]
        end = o.stop
    return torch.cat([*columns, y[:, end:]], dim=1)


def route_backward(dweights, x, router, weights, ids, needs) -> tuple[Tensor, Tensor]:
    """Gradients of x and router, which have derivatives if `weights` is that of `weights_of`."""
    q = projections(x, router)
    n = _norms(q)[..., None]
    dchosen = weights * (dweights - (weights * dweights).sum(-1, keepdim=True))
    dn = torch.zeros_like(n[..., 0]).scatter_add(-1, ids.long().clamp_min(0), torch.where(ids >= 0, dchosen, 0))
    dq = torch.where(n > 0, dn[..., None] * q / torch.where(n > 0, n, 1), 0)
    dx = torch.einsum("tng,ngd->td", dq, router.to(q.dtype))
    return dx.to(x.dtype), torch.einsum("tng,td->ngd", dq, x.to(q.dtype)).to(router.dtype)


def apply_backward(dy, x, weight, vh, s, u, expert_bias, weights, ids, h, needs) -> tuple[Tensor | None, ...]:
    """Gradients of x, weight, bias, vh, s, u, expert_bias and weights, which have derivatives; without `h`."""
    acc, (r, k) = accumulate_dtype(x), (s.shape[1], vh.shape[1])
    xa, g, wa = x.to(acc), dy.to(acc), weights.to(acc)
    dx, dw = torch.zeros_like(xa) if weight is None else g @ weight.to(acc), torch.zeros_like(wa)
    of_experts = []
    for i in range(s.shape[0]):
        chosen = ids == i
        v, si, ui = vh[i, :r].to(acc), s[i].to(acc), u[i].to(acc)
        p = xa @ v.T
        own = torch.where(chosen.any(-1, keepdim=True), g, 0)
        dout = torch.where(chosen, wa, 0).sum(-1, keepdim=True) * own
        dz = dout @ ui
        dx = dx + (dz * si) @ v
        out = (p * si) @ ui.T if expert_bias is None else (p * si) @ ui.T + expert_bias[i].to(acc)
        dw = dw + torch.where(chosen, (own * out).sum(-1, keepdim=True), 0)
        dvh = F.pad((dz * si).T @ xa, (0, 0, 0, k - r))
        of_experts.append((dvh, (dz * p).sum(0), dout.T @ (p * si), dout.sum(0)))
    like = vh, s, u, expert_bias
    experts = [None if t is None else torch.stack(d).to(t.dtype) for t, d in zip(like, zip(*of_experts))]
    dweight = None if weight is None else (g.T @ xa).to(weight.dtype)
    return dx.to(x.dtype), dweight, g.sum(0).to(x.dtype), *experts, dw.to(weights.dtype)
