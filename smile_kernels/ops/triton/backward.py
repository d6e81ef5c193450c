"""Gradients of a SMILE layer, each only if asked for; sums have a fixed order, so that equal inputs give equal bits."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs, grouped
from .common import cast, dot, sum_splits
from .grouped import Groups
from .route import add_squares, finite_norm


@triton.jit(do_not_specialize=["T", "SPLITS", "BIAS_SPLITS"])
def _scale_backward(
    partial,  # [SPLITS, T, M, R] float32: a_i = u_i^T dy
    partial_bias,  # [BIAS_SPLITS, T, M, 1] float32: dy . expert_bias_i
    h,  # [T, M, R] float32
    weights,  # [T, M] float32
    ids,  # [T, M] int32
    s,  # [N, R] float32
    dh,  # [T, M, R]
    dzh,  # [T, M, R] float32: each entry's share of ds
    dweights,  # [T, M] float32
    # dimensions
    T,
    SPLITS,
    BIAS_SPLITS,
    R: tl.constexpr,
    M: tl.constexpr,
    # meta-parameters
    NEEDS_H: tl.constexpr,
    NEEDS_S: tl.constexpr,
    NEEDS_WEIGHTS: tl.constexpr,
    HAS_EXPERT_BIAS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    entry = (tl.program_id(0).to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E))[:, None]
    entries = T.to(tl.int64) * M
    w = tl.load(weights + entry, mask=entry < entries, other=0.0)
    expert = tl.load(ids + entry, mask=entry < entries, other=0)
    dw = tl.zeros((BLOCK_E, BLOCK_K), tl.float32)
    for first in range(0, R, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)[None, :]
        mask = (entry < entries) & (k < R)
        a = sum_splits(partial, entry * R + k, mask, SPLITS, entries * R)
        sv = tl.load(s + expert * R + k, mask=mask, other=0.0)
        if NEEDS_H:
            tl.store(dh + entry * R + k, cast(w * a * sv, dh.dtype.element_ty), mask=mask)
        if NEEDS_S or NEEDS_WEIGHTS:
            ah = a * tl.load(h + entry * R + k, mask=mask, other=0.0)
            dw += ah * sv
            if NEEDS_S:
                tl.store(dzh + entry * R + k, w * ah, mask=mask)
    if NEEDS_WEIGHTS:
        total = tl.sum(dw, 1)[:, None]
        if HAS_EXPERT_BIAS:
            total += sum_splits(partial_bias, entry, entry < entries, BIAS_SPLITS, entries)
        tl.store(dweights + entry, total, mask=entry < entries)


@triton.jit(do_not_specialize=["T"])
def _outer(
    left,  # [T, M, R]
    right,  # [T, D]
    order,  # [M, T] int32
    start,  # [M, N + 1] int32
    out,  # [N, R, D] by its strides
    # dimensions
    T,
    D,
    N: tl.constexpr,
    R: tl.constexpr,
    M: tl.constexpr,
    # strides
    right_stride_t,
    out_stride_n,
    out_stride_r,
    out_stride_d,
    # meta-parameters
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    rank_blocks: tl.constexpr = (R + BLOCK_R - 1) // BLOCK_R
    k = tl.program_id(0) % rank_blocks * BLOCK_R + tl.arange(0, BLOCK_R)
    d = (tl.program_id(0) // rank_blocks).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    expert = tl.program_id(1)
    acc = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for j in range(M):
        first = tl.load(start + j * (N + 1) + expert)
        last = tl.load(start + j * (N + 1) + expert + 1)
        for begin in range(first, last, BLOCK_T):
            entry = begin + tl.arange(0, BLOCK_T)
            t = tl.load(order + j * T.to(tl.int64) + entry, mask=entry < last, other=0).to(tl.int64)
            real = (entry < last)[:, None]
            a = tl.load(left + (t[:, None] * M + j) * R + k[None, :], mask=real & (k < R)[None, :], other=0.0)
            b = tl.load(right + t[:, None] * right_stride_t + d[None, :], mask=real & (d < D)[None, :], other=0.0)
            acc = dot(tl.trans(a), b, acc, PRECISION)
    out_ptrs = (
        out + expert.to(tl.int64) * out_stride_n + k[:, None].to(tl.int64) * out_stride_r + d[None, :] * out_stride_d
    )
    tl.store(out_ptrs, cast(acc, out.dtype.element_ty), mask=(k < R)[:, None] & (d < D)[None, :])


def outer(left: Tensor, right: Tensor, groups: Groups, out: Tensor) -> None:
    """out_i = sum over the entries of expert i of left right^T: left [T, m, r], right [T, D], out [N, r, D]."""
    (tokens, m, r), (n, _, d) = left.shape, out.shape
    device = configs.device(left.device)
    config = configs.tile("outer", device, left.dtype, r, d, tokens, copies=n)
    _outer[triton.cdiv(r, config["BLOCK_R"]) * triton.cdiv(d, config["BLOCK_D"]), n](
        left, right, groups.order, groups.start, out,
        tokens, d, n, r, m,
        right.stride(0), *out.stride(),
        PRECISION=configs.precision(left.dtype, device), **config,
    )  # fmt: skip


@triton.jit(do_not_specialize=["T"])
def _sum(
    values,  # [T, M, R] float32
    order,  # [M, T] int32
    start,  # [M, N + 1] int32
    out,  # [N, R] float32
    # dimensions
    T,
    N: tl.constexpr,
    R: tl.constexpr,
    M: tl.constexpr,
    # meta-parameters
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    expert = tl.program_id(1)
    acc = tl.zeros((BLOCK_E, BLOCK_K), tl.float32)
    for j in range(M):
        first = tl.load(start + j * (N + 1) + expert)
        last = tl.load(start + j * (N + 1) + expert + 1)
        for begin in range(first, last, BLOCK_E):
            entry = begin + tl.arange(0, BLOCK_E)[:, None]
            t = tl.load(order + j * T.to(tl.int64) + entry, mask=entry < last, other=0).to(tl.int64)
            acc += tl.load(values + (t * M + j) * R + k, mask=(entry < last) & (k < R), other=0.0)
    tl.store(out + expert * R + k, tl.sum(acc, 0)[None, :], mask=k < R)


def apply_backward(dy, x, weight, vh, s, u, expert_bias, weights, ids, h, needs):
    """Gradients of x, weight, bias, vh, s, u, expert_bias and weights; None where `needs` says so.

    With a_i = u_i^T dy and z_i = s_i h_i: dw_i = a_i . z_i + dy . expert_bias_i, dh_i = w_i s_i a_i,
    dx = dy W + sum_i V_i dh_i; and summed over tokens, dvh_i = dh_i x^T, ds_i = w_i a_i h_i, du_i = w_i dy z_i^T,
    dexpert_bias_i = w_i dy.
    """
    (tokens, m), (n, r) = ids.shape, s.shape
    needs_x, needs_weight, needs_bias, needs_vh, needs_s, needs_u, needs_expert_bias, needs_weights = needs
    dweight = dy.T @ x if needs_weight else None
    dbias = dy.sum(0) if needs_bias else None
    dx = dvh = ds = du = dexpert_bias = dweights = None
    if needs_x or any(needs[3:]):
        groups = grouped.group(ids, n, x.dtype)
    if needs_x or needs_vh or needs_s or needs_weights:
        partial = grouped.shrink(dy, u.mT, groups)
        partial_bias = None
        if needs_weights and expert_bias is not None:
            partial_bias = grouped.shrink(dy, expert_bias[:, None], groups)
        needs_h = needs_x or needs_vh
        dh = torch.empty(tokens, m, r, dtype=x.dtype, device=x.device) if needs_h else None
        dzh = torch.empty_like(h) if needs_s else None
        dweights = torch.empty_like(weights) if needs_weights else None
        config = configs.entries(r)
        _scale_backward[(triton.cdiv(tokens * m, config["BLOCK_E"]),)](
            partial, partial_bias, h, weights, ids, s, dh, dzh, dweights,
            tokens, len(partial), 0 if partial_bias is None else len(partial_bias), r, m,
            NEEDS_H=needs_h, NEEDS_S=needs_s, NEEDS_WEIGHTS=needs_weights, HAS_EXPERT_BIAS=partial_bias is not None,
            **config,
        )  # fmt: skip
    if needs_x:
        dx = grouped.expand(dh, vh[:, :r], groups).addmm_(dy, weight)
    if needs_vh:
        dvh = torch.empty_like(vh) if vh.shape[1] == r else torch.zeros_like(vh)
        outer(dh, x, groups, dvh[:, :r])
    if needs_s:
        ds = torch.empty_like(s)
        config = configs.entries(r)
        _sum[triton.cdiv(r, config["BLOCK_K"]), n](dzh, groups.order, groups.start, ds, tokens, n, r, m, **config)
    if needs_u:
        du = torch.empty_like(u)
        scaled, _ = grouped.scale(h[None], s, weights, ids, x.dtype, save=False)
        outer(scaled, dy, groups, du.mT)
    if needs_expert_bias:
        dexpert_bias = torch.empty_like(expert_bias)
        outer(weights.to(x.dtype)[..., None], dy, groups, dexpert_bias[:, None])
    return dx, dweight, dbias, dvh, ds, du, dexpert_bias, dweights


@triton.jit(do_not_specialize=["T", "SPLITS"])
def _score_backward(
    partial,  # [SPLITS, T, M, G] float32
    weights,  # [T, M] float32
    dweights,  # [T, M] float32
    dq,  # [T, M, G]
    # dimensions
    T,
    SPLITS,
    G: tl.constexpr,
    M: tl.constexpr,
    # meta-parameters
    BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    t = (tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T))[:, None]
    slot = tl.arange(0, BLOCK_M)[None, :]
    inside = (t < T) & (slot < M)
    w = tl.load(weights + t * M + slot, mask=inside, other=0.0)
    dw = tl.load(dweights + t * M + slot, mask=inside, other=0.0)
    dscore = w * (dw - tl.sum(w * dw, 1)[:, None])
    entries = (t * M + slot)[:, :, None] * G
    split_stride = T.to(tl.int64) * (M * G)
    peak = tl.zeros((BLOCK_T, BLOCK_M), tl.float32)
    squares = tl.zeros((BLOCK_T, BLOCK_M), tl.float32)
    for first in range(0, G, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        q = sum_splits(partial, entries + k, inside[:, :, None] & (k < G), SPLITS, split_stride)
        peak, squares = add_squares(peak, squares, q)
    norm = finite_norm(peak, squares)[:, :, None]
    for first in range(0, G, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        mask = inside[:, :, None] & (k < G)
        q = sum_splits(partial, entries + k, mask, SPLITS, split_stride)
        value = tl.where(norm > 0, dscore[:, :, None] * (q / tl.where(norm > 0, norm, 1.0)), 0.0)
        tl.store(dq + entries + k, cast(value, dq.dtype.element_ty), mask=mask)


def route_backward(dweights, x, router, weights, ids, needs):
    """Gradients of x and router; None where `needs` says so.

    With q_i = router_i x and dq_i = w_i (dw_i - sum_j w_j dw_j) q_i / ||q_i||: dx = sum_i router_i^T dq_i, and
    drouter_i = dq_i x^T summed over tokens.
    """
    (tokens, m), (n, g, _) = ids.shape, router.shape
    groups = grouped.group(ids, n, x.dtype)
    partial = grouped.shrink(x, router, groups, routes=True)
    dq = torch.empty(tokens, m, g, dtype=x.dtype, device=x.device)
    blocks = configs.route(1, m, g)
    _score_backward[(triton.cdiv(tokens, blocks["BLOCK_T"]),)](
        partial,
        weights,
        dweights,
        dq,
        tokens,
        len(partial),
        g,
        m,
        **{k: v for k, v in blocks.items() if k != "BLOCK_N"},
    )
    dx = grouped.expand(dq, router, groups) if needs[0] else None
    drouter = None
    if needs[1]:
        drouter = torch.empty(router.shape, dtype=router.dtype, device=router.device)
        outer(dq, x, groups, drouter)
    return dx, drouter
