"""A SMILE layer composed of ordinary torch operators: runs on every device, forward and closed-form backward.

Only selected experts are computed. On a CPU (where reading ids is free) there is a loop over the experts present, each
on its own tokens: gathered, or as slices if consecutive tokens have the same expert. On other devices the host must not
wait, so the sorted tokens are padded to blocks of one expert each. The number of blocks depends only on shapes; each
block is one entry of a batched product. An "entry" is one (token, slot) pair: entry e belongs to token e // m.
"""

import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import SmileError
from . import registration
from .reference import accumulate_dtype, router_rows, select


def why_not(device_type: str, dtype: torch.dtype, num_experts: int, training: bool) -> str | None:
    """None: it supports every layer on every device."""
    return None


# Entries per block of the padded layout.
BLOCK = 64
# On a CPU the call overhead of small problems exceeds their arithmetic, in particular for bfloat16.
# Up to this (tokens x rank x (in + out features)) an expert processes every token, with weight 0 for those of others,
# instead of its own tokens gathered from x and added to y ...
EVERY_TOKEN = {torch.float64: 2**20, torch.float32: 2**20, torch.bfloat16: 2**23, torch.float16: 2**20}
# ... and in bfloat16, below this (experts x rank x (in + out features)) and rows of h, all experts are one product.
EVERY_EXPERT, EVERY_EXPERT_ROWS = 2**21, 2**16
# Average length of runs of equal choices from which experts process them as slices.
LONG_RUN = 128
# Up to this many tokens, copying the router's rows into one matrix takes longer than it saves.
FEW_TOKENS = 8
# From this (tokens x rows x in_features) on, two bfloat16 products are faster than one in float32.
TWO_PRODUCTS = 2**22


def route(x: Tensor, router: Tensor, num_experts_per_tok: int) -> tuple[Tensor, Tensor]:
    """x [T, D], router [N, g, D] -> weights [T, m] float32, ids [T, m] int32."""
    return select(torch.linalg.vector_norm(_project(x, router), dim=-1), num_experts_per_tok)


def _project(x: Tensor, router: Tensor) -> Tensor:
    """q = router x in float32: x [T, D], router [N, g, D] -> [T, N, g]."""
    acc = accumulate_dtype(x)
    if x.device.type == "cpu" and x.shape[0] <= FEW_TOKENS:
        # The rows of a tied router are a part of each expert's: a batched product reads them without a copy.
        return torch.bmm(x.to(acc).expand(router.shape[0], *x.shape), router.to(acc).mT).transpose(0, 1)
    if x.device.type == "cpu" and x.dtype == torch.bfloat16 and x.shape[0] * router.numel() >= TWO_PRODUCTS:
        return _two_products(x, router)[1]
    q = F.linear(x.to(acc), router.to(acc).reshape(-1, router.shape[-1]))
    return q.view(-1, *router.shape[:2])


def _two_products(x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """x [T, D], rows [N, R, D] in bfloat16 -> their product [T, N, R], and the same in float32.

    A bfloat16 product sums in float32 and rounds once; a second one recovers the rounding (relative error 2^-17).
    """
    flat = rows.reshape(-1, rows.shape[-1]).T
    q = x @ flat
    exact = q.float() + torch.addmm(q, x, flat, beta=-1)
    return q.view(-1, *rows.shape[:2]), exact.view(-1, *rows.shape[:2])


def route_backward(dweights, x, router, weights, ids, needs):
    """dq_i = w_i (dw_i - sum_j w_j dw_j) q_i / ||q_i|| on the selected experts -> dx [T, D], drouter [N, g, D]."""
    q = _project(x, router)
    picked = ids.long()[..., None].expand(-1, -1, q.shape[-1])
    q = q.gather(1, picked)
    norm = torch.linalg.vector_norm(q, dim=-1, keepdim=True)
    dscore = weights * (dweights - (weights * dweights).sum(-1, keepdim=True))
    dq = torch.where(norm > 0, dscore[..., None] * q / norm, 0)
    dq = dq.new_zeros(x.shape[0], *router.shape[:2]).scatter_add_(1, picked, dq).flatten(1)
    dx = (dq @ router.to(dq.dtype).reshape(-1, x.shape[1])).to(x.dtype) if needs[0] else None
    drouter = (dq.T @ x.to(dq.dtype)).to(router.dtype).view(router.shape) if needs[1] else None
    return dx, drouter


def linear(x, weight, bias, vh, s, u, expert_bias, router, num_experts_per_tok, rank_of_router, save):
    """Route, then apply."""
    every_h = None
    if router is None and _one_product_pays(x, vh, u, num_experts_per_tok, rank_of_router):
        every_h, q = _two_products(x, vh)
        weights, ids = select(torch.linalg.vector_norm(q[:, :, :rank_of_router], dim=-1), num_experts_per_tok)
    else:
        weights, ids = route(x, router_rows(vh, router, rank_of_router), num_experts_per_tok)
    y = F.linear(x, weight, bias)
    w = weights if num_experts_per_tok > 1 else None
    return y, weights, ids, _add_experts(y, x, vh, s, u, expert_bias, w, ids, save, every_h)


def _one_product_pays(x: Tensor, vh: Tensor, u: Tensor, num_experts_per_tok: int, rank_of_router: int) -> bool:
    """Whether to multiply x by all of vh, for the router and every expert: if few rows would be unused."""
    tokens, n = x.shape[0], vh.shape[0]
    return (
        _host_reads_are_free(x)
        and x.dtype == torch.bfloat16
        and tokens * vh.numel() >= TWO_PRODUCTS
        and _every_token_pays(x, u)
        and n <= tokens * num_experts_per_tok
        and vh.shape[1] <= 2 * rank_of_router
    )


def _every_token_pays(x: Tensor, u: Tensor) -> bool:
    (tokens, d), (_, o, r) = x.shape, u.shape
    return tokens * r * (d + o) <= EVERY_TOKEN[x.dtype]


def _every_expert_pays(x: Tensor, u: Tensor) -> bool:
    (tokens, d), (n, o, r) = x.shape, u.shape
    small = n * r * (d + o) < EVERY_EXPERT and tokens * n * r < EVERY_EXPERT_ROWS
    return x.dtype == torch.bfloat16 and small and _every_token_pays(x, u)


def apply(x, weight, bias, vh, s, u, expert_bias, weights, ids, save):
    """y = x W^T + b + sum over slots of w (U (s * V^T x) + expert_bias); h [T, m, r] = V^T x of each slot if `save`."""
    _check_ids(ids, s.shape[0])
    y = F.linear(x, weight, bias)
    return y, _add_experts(y, x, vh, s, u, expert_bias, weights, ids, save)


@registration.by_part
def delta_(y, x, vh, s, u, expert_bias, router, weights, ids, num_experts_per_tok, rank_of_router, save):
    """Add the experts to y in place -> weights and ids where it chose them, and h."""
    if ids is not None:
        _check_ids(ids, s.shape[0])
        return s.new_empty(0), ids.new_empty(0), _add_experts(y, x, vh, s, u, expert_bias, weights, ids, save)
    weights, ids = route(x, router_rows(vh, router, rank_of_router), num_experts_per_tok)
    w = weights if num_experts_per_tok > 1 else None
    return weights, ids, _add_experts(y, x, vh, s, u, expert_bias, w, ids, save)


def _add_experts(y, x, vh, s, u, expert_bias, weights, ids, save, every_h=None):
    """Add the selected experts to y in place and return h.

    weights None: all are 1; every_h [T, N, >= r]: V^T x of every expert, if already computed.
    """
    (tokens, m), r = ids.shape, s.shape[1]
    h = s.new_zeros((tokens, m, r) if save else 0)
    if tokens == 0:
        return h
    if not _host_reads_are_free(x):
        blocks = _Blocks(ids, s.shape[0])
        i = blocks.experts
        w = blocks.gather(s.new_ones(tokens * m, 1) if weights is None else weights.reshape(-1, 1))
        hi = torch.bmm(blocks.gather(x, m), vh[i, :r].mT).to(s.dtype)
        delta = torch.bmm((hi * (w * s[i, None])).to(x.dtype), u[i].mT)
        if expert_bias is not None:
            delta.addcmul_(w.to(x.dtype), expert_bias[i, None])
        y += blocks.scatter(delta).view(tokens, m, -1).sum(1)
        return blocks.scatter(hi).view(tokens, m, r) if save else h
    runs = _runs(ids)
    if not runs and _every_token_pays(x, u) and not _any_is_none(ids):
        w = _weight_of_every_expert(weights, ids, s.shape[0])
        if expert_bias is not None:
            y.addmm_(w.to(x.dtype), expert_bias)
        scale = w[:, :, None] * s
        one_product = _every_expert_pays(x, u)
        z: Any = None
        if one_product and every_h is None:
            every_h = F.linear(x, vh[:, :r].flatten(0, 1)).unflatten(1, s.shape)
        if every_h is not None:
            hi = every_h[:, :, :r]
            if save:
                h = hi.gather(1, ids.long()[:, :, None].expand(-1, -1, r)).to(s.dtype)
            z = (hi * scale).to(x.dtype)
        if one_product:
            y.addmm_(z.flatten(1), u.transpose(0, 1).flatten(1).T)
            return h
        for i in sorted(set(ids.view(-1).tolist())):
            if every_h is None:
                hi = F.linear(x, vh[i, :r])
                if save:
                    h = torch.where(ids[:, :, None] == i, hi[:, None].to(s.dtype), h)
                zi = hi.mul_(scale[:, i])
            else:
                zi = z[:, i]
            y.addmm_(zi, u[i].T)
        return h
    for i, entries, rows in runs or _sorted(ids):
        hi = F.linear(_take(x, rows), vh[i, :r])
        if save:
            h.view(-1, r)[entries] = hi.to(s.dtype)
        w = None if weights is None else _take(weights.view(-1), entries)[:, None]
        z = hi.mul_(s[i] if w is None else w * s[i])
        bias = None if expert_bias is None else expert_bias[i]
        if isinstance(rows, slice):
            delta = y[rows].addmm_(z, u[i].T)
            if bias is not None and w is None:
                delta += bias
        else:
            delta = F.linear(z, u[i], bias if w is None else None)
        if bias is not None and w is not None:
            delta.addcmul_(w.to(x.dtype), bias)
        if not isinstance(rows, slice):
            y.index_add_(0, rows, delta)
    return h


def apply_backward(dy, x, weight, vh, s, u, expert_bias, weights, ids, h, needs):
    """Gradients of x, weight, bias, vh, s, u, expert_bias and weights; None where `needs` says so.

    Without a weight, dx is that of the experts only.
    """
    dx = (torch.zeros_like(x) if weight is None else dy @ weight) if needs[0] else None
    dweight = dy.T @ x if needs[1] else None
    dbias = dy.sum(0) if needs[2] else None
    acc, (tokens, m) = s.dtype, ids.shape
    dvh, ds, du, dexpert_bias = (
        torch.zeros_like(p, dtype=acc, memory_format=torch.contiguous_format) if needed else None
        for p, needed in zip((vh, s, u, expert_bias), needs[3:7])
    )
    dweights = weights.new_zeros(tokens, m) if needs[7] else None
    if tokens and (needs[0] or any(needs[3:])):
        if not _host_reads_are_free(x):
            add = _add_gradients_in_blocks
        elif _every_expert_pays(x, u) and not _any_is_none(ids):
            add = _add_gradients_of_every_expert
        else:
            add = _add_gradients_by_expert
        gradients = dx, dvh, ds, du, dexpert_bias, dweights
        add(gradients, dy, x, vh, s, u, expert_bias, weights, ids, h)
    cast = [None if t is None else t.to(x.dtype) for t in (dvh, du, dexpert_bias)]
    return dx, dweight, dbias, cast[0], ds, cast[1], cast[2], dweights


def _add_gradients_of_every_expert(gradients, dy, x, vh, s, u, expert_bias, weights, ids, h) -> None:
    """Every expert processes every token, with weight 0 for tokens of others: all experts are one product."""
    dx, dvh, ds, du, dexpert_bias, dweights = gradients
    acc, (n, r), tokens = s.dtype, s.shape, ids.shape[0]
    slots, w = ids.long(), _weight_of_every_expert(weights, ids, n)
    hi = s.new_zeros(tokens, n, r).scatter_(1, slots[:, :, None].expand(-1, -1, r), h)
    a = (dy @ u.transpose(0, 1).flatten(1)).to(acc).view(tokens, n, r)
    z = hi * s
    dz = w[:, :, None] * a
    dh = (dz * s).to(x.dtype).flatten(1)
    if dx is not None:
        dx.addmm_(dh, vh[:, :r].flatten(0, 1))
    if dvh is not None:
        dvh[:, :r] = (dh.T @ x).view(n, r, -1)
    if ds is not None:
        ds += (dz * hi).sum(0)
    if du is not None:
        du.copy_((dy.T @ (w[:, :, None] * z).to(x.dtype).flatten(1)).view(-1, n, r).transpose(0, 1))
    if dexpert_bias is not None:
        dexpert_bias += w.T @ dy.to(acc)
    if dweights is not None:
        dw = (a * z).sum(-1)
        if expert_bias is not None:
            dw += (dy @ expert_bias.T).to(acc)
        dweights += dw.gather(1, slots)


def _add_gradients_by_expert(gradients, dy, x, vh, s, u, expert_bias, weights, ids, h) -> None:
    """Each expert processes its own tokens."""
    dx, dvh, ds, du, dexpert_bias, dweights = gradients
    acc, r = s.dtype, s.shape[1]
    for i, entries, rows in _runs(ids) or _sorted(ids):
        w = _take(weights.view(-1), entries)[:, None]
        hi = _take(h.view(-1, r), entries)
        dyi = _take(dy, rows)
        a = F.linear(dyi, u[i].T).to(acc)
        z = hi * s[i]
        dz = w * a
        dh = (dz * s[i]).to(x.dtype)
        if dx is not None and isinstance(rows, slice):
            dx[rows].addmm_(dh, vh[i, :r])
        elif dx is not None:
            dx.index_add_(0, rows, dh @ vh[i, :r])
        if dvh is not None:
            dvh[i, :r] += dh.T @ _take(x, rows)
        if ds is not None:
            ds[i] += (dz * hi).sum(0)
        if du is not None:
            du[i] += dyi.T @ (w * z).to(x.dtype)
        if dexpert_bias is not None:
            dexpert_bias[i] += (dyi * w).sum(0)
        if dweights is not None:
            dw = (a * z).sum(-1)
            if expert_bias is not None:
                dw += (dyi @ expert_bias[i]).to(acc)
            dweights.view(-1)[entries] = dw


def _add_gradients_in_blocks(gradients, dy, x, vh, s, u, expert_bias, weights, ids, h) -> None:
    """Tokens sorted by expert and padded to blocks of one expert each, without reads on the host."""
    dx, dvh, ds, du, dexpert_bias, dweights = gradients
    acc, (n, r), (tokens, m) = s.dtype, s.shape, ids.shape
    blocks = _Blocks(ids, n)
    i, w = blocks.experts, blocks.gather(weights.reshape(-1, 1))
    hi = blocks.gather(h.view(-1, r))
    dyi = blocks.gather(dy, m)
    a = torch.bmm(dyi, u[i]).to(acc)
    z = hi * s[i, None]
    dz = w * a
    dh = (dz * s[i, None]).to(x.dtype)
    if dx is not None:
        dx += blocks.scatter(torch.bmm(dh, vh[i, :r])).view(tokens, m, -1).sum(1)
    if dvh is not None:
        dvh[:, :r] = blocks.sum_by_expert(torch.bmm(dh.mT, blocks.gather(x, m)).to(acc))
    if ds is not None:
        ds += blocks.sum_by_expert((dz * hi).sum(1))
    if du is not None:
        du += blocks.sum_by_expert(torch.bmm(dyi.mT, (w * z).to(x.dtype)).to(acc))
    if dexpert_bias is not None:
        dexpert_bias += blocks.sum_by_expert((dyi * w).sum(1))
    if dweights is not None:
        dw = (a * z).sum(-1, keepdim=True)
        if expert_bias is not None:
            dw += torch.bmm(dyi, expert_bias[i, :, None]).to(acc)
        dweights += blocks.scatter(dw).view(tokens, m)


linear_backward = functools.partial(registration.linear_backward, apply_backward, route_backward)


def _check_ids(ids: Tensor, num_experts: int) -> None:
    """-1 means no expert; so do other ids outside [0, N) if checking them would wait for a device."""
    if _host_reads_are_free(ids) and ids.numel():
        least, most = ids.min().item(), ids.max().item()
        if least < -1 or most >= num_experts:
            worst = least if least < -1 else most
            raise SmileError(f"ids: contains {worst}; expected 0 to {num_experts - 1}, or -1 for no expert")


def _any_is_none(ids: Tensor) -> bool:
    return bool((ids < 0).any())


def _host_reads_are_free(x: Tensor) -> bool:
    return x.device.type == "cpu"


def _weight_of_every_expert(weights: Tensor | None, ids: Tensor, num_experts: int) -> Tensor:
    """weights, ids [T, m] -> [T, N], 0 for experts not chosen; weights None if m and each weight are 1."""
    chosen = ids[:, :, None] == torch.arange(num_experts, dtype=ids.dtype)
    return chosen[:, 0] if weights is None else (chosen * weights[:, :, None]).sum(1)


# (expert, its entries, their rows of x), the last two as slices or indices.
_Chosen = tuple[int, slice | Tensor, slice | Tensor]


def _runs(ids: Tensor) -> list[_Chosen]:
    """The expert of each run of tokens with equal choices, as slices; nothing if runs are short."""
    tokens, m = ids.shape
    if tokens < LONG_RUN:  # then there is one run or none, which is found faster on the host
        first, *others = ids.tolist()
        starts = [0]
        if any(other != first for other in others):
            return []
    else:
        changes = (ids[1:] != ids[:-1]).any(1)
        if tokens < LONG_RUN * int(changes.count_nonzero()):
            return []
        starts = [0, *(changes.nonzero()[:, 0] + 1).tolist()]
    return [
        (i, slice(a * m + j, b * m, m), slice(a, b))
        for a, b in zip(starts, [*starts[1:], tokens])
        for j, i in enumerate(ids[a].tolist())
        if i >= 0
    ]


def _sorted(ids: Tensor) -> Iterator[_Chosen]:
    """Each chosen expert once, with the indices of its entries."""
    m = ids.shape[1]
    flat = ids.reshape(-1)
    entries = flat.argsort(stable=True)
    counts = (flat + 1).bincount().tolist()  # entries without an expert, -1, come first
    rows = entries if m == 1 else entries // m
    for i, (e, t) in enumerate(zip(entries.split(counts), rows.split(counts)), start=-1):
        if i >= 0 and len(e):
            yield i, e, t


def _take(rows: Tensor, at: slice | Tensor) -> Tensor:
    return rows[at] if isinstance(at, slice) else rows.index_select(0, at)


class _Blocks:
    """Entries sorted by expert and padded so that each block of `BLOCK` has one expert, without reads on the host.

    experts [B] is each block's expert; `gather` and `scatter` move rows into and out of the [B, BLOCK, ...] layout.
    """

    def __init__(self, ids: Tensor, num_experts: int):
        flat = ids.reshape(-1).long()
        total = flat.numel()
        blocks = min(-(-total // BLOCK) + num_experts - 1, total)
        self.valid = (flat >= 0) & (flat < num_experts)
        flat = torch.where(self.valid, flat, 0)
        chosen = (flat[:, None] == torch.arange(num_experts, device=flat.device)) & self.valid[:, None]
        counts = chosen.sum(0)
        ends = ((counts + BLOCK - 1) // BLOCK).cumsum(0)
        starts = (ends - (counts + BLOCK - 1) // BLOCK) * BLOCK
        rank = (chosen.cumsum(0) - 1).gather(1, flat[:, None])[:, 0]
        self.position = torch.where(self.valid, starts[flat] + rank, 0)
        self.experts = torch.searchsorted(ends, torch.arange(blocks, device=flat.device), right=True)
        self.experts.clamp_(max=num_experts - 1)
        # Entries without an expert go to a position past the last block.
        place = torch.where(self.valid, self.position, blocks * BLOCK)
        self.entry = flat.new_full((blocks * BLOCK + 1,), total).scatter_(
            0, place, torch.arange(total, device=flat.device)
        )[:-1]
        self.num_experts = num_experts

    def gather(self, rows: Tensor, entries_per_row: int = 1) -> Tensor:
        """rows [R, ...] -> [B, BLOCK, ...], zero for padding."""
        valid = self.entry < rows.shape[0] * entries_per_row
        out = rows[torch.where(valid, self.entry // entries_per_row, 0)]
        return torch.where(valid[:, None], out, 0).view(-1, BLOCK, rows.shape[-1])

    def scatter(self, blocks: Tensor) -> Tensor:
        """[B, BLOCK, C] -> one row per entry, [T * m, C]; zeros for no expert."""
        return torch.where(self.valid[:, None], blocks.flatten(0, 1)[self.position], 0)

    def sum_by_expert(self, blocks: Tensor) -> Tensor:
        """[B, ...] -> [N, ...], summed over each expert's blocks in a fixed order."""
        member = self.experts == torch.arange(self.num_experts, device=self.experts.device)[:, None]
        return (member.to(blocks.dtype) @ blocks.flatten(1)).view(self.num_experts, *blocks.shape[1:])
