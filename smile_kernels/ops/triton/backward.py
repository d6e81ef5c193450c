"""Gradients of a SMILE layer, each only if asked for; sums have a fixed order, so that equal inputs give equal bits.

As in the forward, either every expert takes every token, with zeros for those that did not choose it, or tokens are
grouped by expert.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs, grouped
from .common import cast, cdiv, dot, start_next_kernel, sum_splits, wait_for_previous_kernel
from .expand import expand
from .grouped import Groups
from .launch import launch
from .route import add_squares, by_expert, finite_norm, of_slot
from .shrink import shrink


@triton.jit(do_not_specialize=["T", "SPLITS", "BIAS_SPLITS"])
def _scale_backward(
    partial,  # [SPLITS, T, C, R] float32: a_i = u_i^T dy
    partial_bias,  # [BIAS_SPLITS, T, C, 1] float32: dy . expert_bias_i
    h,  # [T, M, R] float32
    weights,  # [T, M] float32
    ids,  # [T, M] int32
    s,  # [N, R] float32
    dh,  # [T, C, R]
    scaled,  # [T, C, R]: w_i s_i h_i
    gates,  # [T, C]: w_i
    ds,  # [T, M, R] float32 if GROUPED, else [T / BLOCK_T, N, R]: shares of ds
    present,  # [T / BLOCK_T, N] int8, unless GROUPED
    dweights,  # [T, M] float32
    # dimensions
    T,
    SPLITS,
    BIAS_SPLITS,
    C: tl.constexpr,
    N: tl.constexpr,
    G: tl.constexpr,
    R: tl.constexpr,
    M: tl.constexpr,
    # meta-parameters
    GROUPED: tl.constexpr,
    NEEDS_H: tl.constexpr,
    NEEDS_S: tl.constexpr,
    NEEDS_U: tl.constexpr,
    NEEDS_EXPERT_BIAS: tl.constexpr,
    NEEDS_WEIGHTS: tl.constexpr,
    HAS_EXPERT_BIAS: tl.constexpr,
    PDL: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # A token's columns are its slots if GROUPED, else all experts, of which those it did not choose are zero.
    start_next_kernel(PDL)
    block_t = tl.program_id(0).to(tl.int64)
    t = (block_t * BLOCK_T + tl.arange(0, BLOCK_T))[:, None]
    c = tl.arange(0, BLOCK_C)[None, :]
    slot = tl.arange(0, BLOCK_M)[None, :]
    inside = (t < T) & (c < C)
    slot_inside = (t < T) & (slot < M)
    wait_for_previous_kernel(PDL)
    w = tl.load(weights + t * M + slot, mask=slot_inside, other=0.0)
    e = tl.load(ids + t * M + slot, mask=slot_inside, other=0)
    if GROUPED:
        chosen, gate, expert, at = inside, w, e, c
    else:
        chosen, gate = by_expert(w, e, c, slot, M)
        chosen = chosen & inside
        expert = c
        at = tl.zeros((BLOCK_T, BLOCK_C), tl.int32)
        for j in range(M):
            at = tl.where(of_slot(e, slot, j) == c, j, at)
        seen = tl.max(chosen.to(tl.int32), 0)[None, :]
        tl.store(present + block_t * N + c, seen.to(tl.int8), mask=c < N)
    columns = (t * C + c)[:, :, None] * R
    rows = (t * M + at)[:, :, None] * R
    scales = expert[:, :, None] * R
    split_stride = T.to(tl.int64) * (C * R)
    if NEEDS_EXPERT_BIAS:
        tl.store(gates + t * C + c, cast(gate, gates.dtype.element_ty), mask=inside)

    if NEEDS_WEIGHTS or G > 0:
        dw = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
        peak = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
        squares = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
        if HAS_EXPERT_BIAS:
            dw += sum_splits(partial_bias, t * C + c, chosen, BIAS_SPLITS, T.to(tl.int64) * C)
        for first in range(0, R, BLOCK_K):
            k = first + tl.arange(0, BLOCK_K)
            mask = chosen[:, :, None] & (k < R)
            a = sum_splits(partial, columns + k, mask, SPLITS, split_stride)
            value = tl.load(h + rows + k, mask=mask, other=0.0)
            sv = tl.load(tl.broadcast_to(s + scales + k, (BLOCK_T, BLOCK_C, BLOCK_K)), mask=mask, other=0.0)
            dw += tl.sum(a * sv * value, 2)
            peak, squares = add_squares(peak, squares, tl.where(k < G, value, 0.0))
        if NEEDS_WEIGHTS:
            if GROUPED:
                tl.store(dweights + t * M + c, dw, mask=inside)
            else:
                for j in range(M):
                    share = tl.sum(tl.where(of_slot(e, slot, j) == c, dw, 0.0), 1)[:, None]
                    tl.store(dweights + t * M + j, share, mask=t < T)
        dscore = (gate * (dw - tl.sum(gate * dw, 1)[:, None]))[:, :, None]
        norm = finite_norm(peak, squares)[:, :, None]

    for first in range(0, R, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        mask = chosen[:, :, None] & (k < R)
        written = inside[:, :, None] & (k < R)
        sv = tl.load(tl.broadcast_to(s + scales + k, (BLOCK_T, BLOCK_C, BLOCK_K)), mask=mask, other=0.0)
        value = tl.load(h + rows + k, mask=mask, other=0.0)
        if NEEDS_U:
            tl.store(scaled + columns + k, cast(gate[:, :, None] * sv * value, scaled.dtype.element_ty), mask=written)
        if NEEDS_H or NEEDS_S:
            wa = gate[:, :, None] * sum_splits(partial, columns + k, mask, SPLITS, split_stride)
            if NEEDS_S and GROUPED:
                tl.store(ds + columns + k, wa * value, mask=written)
            if NEEDS_S and not GROUPED:
                share = tl.sum(wa * value, 0)[None, :, :]
                tl.store(ds + (block_t * N + c)[:, :, None] * R + k, share, mask=(c < N)[:, :, None] & (k < R))
            if NEEDS_H:
                wa *= sv
                if G > 0:
                    q = tl.where((k < G) & (norm > 0), value / tl.where(norm > 0, norm, 1.0), 0.0)
                    wa += dscore * q
                tl.store(dh + columns + k, cast(wa, dh.dtype.element_ty), mask=written)


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
    PDL: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    start_next_kernel(PDL)
    wait_for_previous_kernel(PDL)
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


def outer(device: configs.Device, left: Tensor, right: Tensor, groups: Groups, out: Tensor) -> None:
    """out_i = sum over the entries of expert i of left right^T: left [T, m, r], right [T, D], out [N, r, D]."""
    (tokens, m, r), (n, _, d) = left.shape, out.shape
    config = configs.tile("outer", device, left.dtype, r, d, tokens, copies=n)
    launch(
        _outer, (cdiv(r, config["BLOCK_R"]) * cdiv(d, config["BLOCK_D"]), n),
        (left, right, groups.order, groups.start, out),
        (tokens, d, n, r, m, right.stride(0), *out.stride()),
        PRECISION=configs.precision(left.dtype, device), **config, **device.launch(),
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
    PDL: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    start_next_kernel(PDL)
    wait_for_previous_kernel(PDL)
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


def apply_backward(device, dy, x, weight, vh, s, u, expert_bias, weights, ids, h, needs, rank_of_router=0):
    """Gradients of x, weight, bias, vh, s, u, expert_bias and weights; None where `needs` says so.

    With a_i = u_i^T dy and z_i = s_i h_i: dw_i = a_i . z_i + dy . expert_bias_i, dh_i = w_i s_i a_i,
    dx = dy W + sum_i V_i dh_i; and summed over tokens, dvh_i = dh_i x^T, ds_i = w_i a_i h_i, du_i = w_i dy z_i^T,
    dexpert_bias_i = w_i dy.

    With rank_of_router, the weights are the softmax of the norms of the first rank_of_router products in h, q_i, and
    their gradient continues to x and vh: dh_i gains w_i (dw_i - sum_j w_j dw_j) q_i / ||q_i||.
    """
    (tokens, d), (n, o, r), m = x.shape, u.shape, ids.shape[1]
    needs_x, needs_weight, needs_bias, needs_vh, needs_s, needs_u, needs_expert_bias, needs_weights = needs
    dweight = dy.T @ x if needs_weight else None
    dbias = dy.sum(0) if needs_bias else None
    dx = dvh = ds = du = dexpert_bias = dweights = None
    if not (needs_x or any(needs[3:])):
        return dx, dweight, dbias, dvh, ds, du, dexpert_bias, dweights

    groups = real = None
    if configs.apply_path(device, x.dtype, tokens, d, o, n, r, m) == "grouped":
        if not rank_of_router:  # a given routing may name no expert
            weights, ids, real = grouped.none_as_first(weights, ids, n)
        groups = grouped.group(device, ids, n, x.dtype)

    def products(rows: Tensor) -> Tensor:
        """dy rows^T of the columns that the kernel takes: rows [N, r, O] -> [splits, T, m or N, r]."""
        if groups:
            return grouped.shrink(device, dy, rows, groups)
        return shrink(device, dy, rows, ids if tokens <= 64 else None)

    columns = m if groups else n
    config = configs.route_blocks(columns, m, r)
    config["BLOCK_C"] = config.pop("BLOCK_N")
    blocks = cdiv(tokens, config["BLOCK_T"])
    needs_h = needs_x or needs_vh
    routed = rank_of_router if needs_h else 0
    partial = products(u.mT) if needs_h or needs_s or needs_weights else None
    partial_bias = None
    if expert_bias is not None and (needs_weights or routed):
        partial_bias = products(expert_bias[:, None])

    def empty(needed: bool, *shape: int, dtype: torch.dtype = x.dtype) -> Any:
        return torch.empty(shape, dtype=dtype, device=x.device) if needed else None

    dh, scaled = empty(needs_h, tokens, columns, r), empty(needs_u, tokens, columns, r)
    gates = empty(needs_expert_bias, tokens, columns)
    shares = empty(needs_s, *((tokens, m, r) if groups else (blocks, n, r)), dtype=torch.float32)
    present = empty(groups is None, blocks, n, dtype=torch.int8)
    dweights = empty(needs_weights, tokens, m, dtype=torch.float32)
    splits = [0 if sums is None else len(sums) for sums in (partial, partial_bias)]
    launch(
        _scale_backward, (blocks,),
        (partial, partial_bias, h, weights, ids, s, dh, scaled, gates, shares, present, dweights),
        (tokens, *splits, columns, n, routed, r, m),
        GROUPED=groups is not None, NEEDS_H=needs_h, NEEDS_S=needs_s, NEEDS_U=needs_u,
        NEEDS_EXPERT_BIAS=needs_expert_bias, NEEDS_WEIGHTS=needs_weights, HAS_EXPERT_BIAS=partial_bias is not None,
        **config, **device.launch(),
    )  # fmt: skip

    if needs_weights and real is not None:
        dweights = torch.where(real, dweights, 0)
    if needs_x and groups:
        dx = grouped.expand(device, dh, vh[:, :r], groups)
    elif needs_x:
        dx = expand(device, dy, dh, present, config["BLOCK_T"], vh[:, :r].mT)
    if dx is not None and weight is not None:
        dx.addmm_(dy, weight)
    if needs_vh and groups:
        dvh = torch.empty_like(vh) if vh.shape[1] == r else torch.zeros_like(vh)
        outer(device, dh, x, groups, dvh[:, :r])
    elif needs_vh:
        dvh = (dh.view(tokens, n * r).T @ x).view(n, r, d)
        if vh.shape[1] > r:
            dvh = torch.nn.functional.pad(dvh, (0, 0, 0, vh.shape[1] - r))
    if needs_s and groups:
        ds = _summed_by_expert(device, shares, groups, s)
    elif needs_s:
        ds = shares.sum(0)
    if needs_u and groups:
        du = torch.empty_like(u)
        outer(device, scaled, dy, groups, du.mT)
    elif needs_u:
        du = (dy.T @ scaled.view(tokens, n * r)).view(o, n, r).transpose(0, 1).contiguous()
    if needs_expert_bias and groups:
        dexpert_bias = gates.new_empty(n, o)
        outer(device, gates[..., None], dy, groups, dexpert_bias[:, None])
    elif needs_expert_bias:
        dexpert_bias = gates.T @ dy
    return dx, dweight, dbias, dvh, ds, du, dexpert_bias, dweights


def _summed_by_expert(device, shares, groups, s):
    """Sums of shares [T, m, r] over the entries of each expert, like s [N, r]."""
    (tokens, m, r), ds = shares.shape, torch.empty_like(s)
    entries = configs.entry_blocks(r)
    launch(
        _sum, (cdiv(r, entries["BLOCK_K"]), len(s)), (shares, groups.order, groups.start, ds), (tokens, len(s), r, m),
        **entries, **device.launch(),
    )  # fmt: skip
    return ds


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
    PDL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    start_next_kernel(PDL)
    wait_for_previous_kernel(PDL)
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


def route_backward(device, dweights, x, router, weights, ids, needs):
    """Gradients of x and router; None where `needs` says so.

    With q_i = router_i x and dq_i = w_i (dw_i - sum_j w_j dw_j) q_i / ||q_i||: dx = sum_i router_i^T dq_i, and
    drouter_i = dq_i x^T summed over tokens.
    """
    (tokens, m), (n, g, _) = ids.shape, router.shape
    groups = grouped.group(device, ids, n, x.dtype)
    partial = grouped.shrink(device, x, router, groups, routes=True)
    dq = torch.empty(tokens, m, g, dtype=x.dtype, device=x.device)
    blocks = configs.route_blocks(m, m, g)
    blocks.pop("BLOCK_N")
    launch(
        _score_backward, (cdiv(tokens, blocks["BLOCK_T"]),), (partial, weights, dweights, dq),
        (tokens, len(partial), g, m),
        **blocks, **device.launch(),
    )  # fmt: skip
    dx = grouped.expand(device, dq, router, groups) if needs[0] else None
    drouter = None
    if needs[1]:
        drouter = torch.empty(router.shape, dtype=router.dtype, device=router.device)
        outer(device, dq, x, groups, drouter)
    return dx, drouter
