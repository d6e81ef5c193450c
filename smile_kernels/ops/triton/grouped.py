"""Experts applied to tokens grouped by expert: no product is formed for an expert that a token did not choose.

An entry is one (token, slot) pair. The entries of each slot are sorted by expert on the device, and a schedule of
blocks of one expert each is padded to a length that depends on shapes alone, so that nothing waits for the host. A
token has one entry in each slot: slots take turns in adding to y, and no two programs ever add to the same row.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .common import cast, cdiv, dot, next_power_of_2, start_next_kernel, sum_splits, wait_for_previous_kernel
from .launch import launch


@triton.jit(do_not_specialize=["T"])
def _count(
    ids,  # [T, M] int32
    counts,  # [M, blocks, N] int32
    T,
    N: tl.constexpr,
    M: tl.constexpr,
    PDL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    start_next_kernel(PDL)
    wait_for_previous_kernel(PDL)
    block, j = tl.program_id(0), tl.program_id(1)
    t = block.to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    n = tl.arange(0, BLOCK_N)
    chosen = tl.load(ids + t * M + j, mask=t < T, other=-1)[:, None] == n
    tl.store(counts + (j.to(tl.int64) * tl.num_programs(0) + block) * N + n, tl.sum(chosen.to(tl.int32), 0), mask=n < N)


@triton.jit(do_not_specialize=["T", "BLOCKS", "SCHEDULE"])
def _schedule(
    counts,  # [M, BLOCKS, N] int32
    offsets,  # [M, BLOCKS, N] int32: where the entries of a block of tokens begin
    start,  # [M, N + 1] int32: where the entries of an expert begin
    experts,  # [M, SCHEDULE] int32: a block's expert, N if it has none
    firsts,  # [M, SCHEDULE] int32: its first entry
    T,
    BLOCKS,
    SCHEDULE,
    N: tl.constexpr,
    PDL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    start_next_kernel(PDL)
    wait_for_previous_kernel(PDL)
    j = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_N,), tl.int32)
    for first in range(0, BLOCKS, BLOCK_B):
        b = (first + tl.arange(0, BLOCK_B))[:, None]
        total += tl.sum(tl.load(counts + (j * BLOCKS + b) * N + n, mask=(b < BLOCKS) & (n < N), other=0), 0)
    begin = tl.cumsum(total, 0) - total
    tl.store(start + j * (N + 1) + n, begin, mask=n < N)
    tl.store(start + j * (N + 1) + N, T)

    running = begin
    for first in range(0, BLOCKS, BLOCK_B):
        b = (first + tl.arange(0, BLOCK_B))[:, None]
        inside = (b < BLOCKS) & (n < N)
        count = tl.load(counts + (j * BLOCKS + b) * N + n, mask=inside, other=0)
        before = tl.cumsum(count, 0) - count
        tl.store(offsets + (j * BLOCKS + b) * N + n, running[None, :] + before, mask=inside)
        running += tl.sum(count, 0)

    end = tl.cumsum((total + BLOCK_T - 1) // BLOCK_T, 0)
    shift = begin - (end - (total + BLOCK_T - 1) // BLOCK_T) * BLOCK_T
    for first in range(0, SCHEDULE, BLOCK_B):
        b = first + tl.arange(0, BLOCK_B)
        expert = tl.sum(((b[:, None] >= end) & (n < N)).to(tl.int32), 1)
        entry = b * BLOCK_T + tl.sum(tl.where(n == expert[:, None], shift, 0), 1)
        tl.store(experts + j * SCHEDULE + b, expert, mask=b < SCHEDULE)
        tl.store(firsts + j * SCHEDULE + b, entry, mask=b < SCHEDULE)


@triton.jit(do_not_specialize=["T"])
def _sort(
    ids,  # [T, M] int32
    offsets,  # [M, blocks, N] int32
    order,  # [M, T] int32: tokens by expert, in their own order within each
    T,
    N: tl.constexpr,
    M: tl.constexpr,
    PDL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    start_next_kernel(PDL)
    wait_for_previous_kernel(PDL)
    block, j = tl.program_id(0), tl.program_id(1)
    t = block.to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    n = tl.arange(0, BLOCK_N)
    chosen = (tl.load(ids + t * M + j, mask=t < T, other=-1)[:, None] == n).to(tl.int32)
    rank = tl.cumsum(chosen, 0) - 1
    offset = tl.load(offsets + (j.to(tl.int64) * tl.num_programs(0) + block) * N + n, mask=n < N, other=0)
    place = tl.sum(chosen * (rank + offset), 1)
    tl.store(order + j.to(tl.int64) * T + place, t.to(tl.int32), mask=t < T)


class Groups(NamedTuple):
    """The entries of T tokens and m slots, grouped by expert."""

    order: Tensor  # [m, T] int32
    start: Tensor  # [m, N + 1] int32
    experts: Tensor  # [m, schedule] int32
    firsts: Tensor  # [m, schedule] int32
    block: int  # entries of one block of the schedule


def none_as_first(weights: Tensor, ids: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Weights and ids [T, m], with an id outside [0, n) (no expert) as 0 of weight 0; and which are real."""
    real = (ids >= 0) & (ids < n)
    return torch.where(real, weights, 0), torch.where(real, ids, 0), real


def group(device: configs.Device, ids: Tensor, n: int, dtype: torch.dtype) -> Groups:
    """Sort the entries of ids [T, m] int32 by expert, and cut those of each of the n experts into blocks.

    The blocks are of the size that the grouped kernels take for operands of `dtype`.
    """
    tokens, m = ids.shape
    block_n, block = next_power_of_2(n), configs.group_block(tokens, n, device, dtype)
    block_c = max(16, 4096 // block_n)
    blocks, schedule = cdiv(tokens, block_c), cdiv(tokens, block) + min(n, tokens) - 1

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=ids.device)

    counts, offsets = empty(m, blocks, n), empty(m, blocks, n)
    groups = Groups(empty(m, tokens), empty(m, n + 1), empty(m, schedule), empty(m, schedule), block)
    shape = {"N": n, "BLOCK_N": block_n, **device.launch()}
    launch(_count, (blocks, m), (ids, counts), (tokens,), M=m, BLOCK_C=block_c, **shape)
    launch(
        _schedule, (m,), (counts, offsets, groups.start, groups.experts, groups.firsts), (tokens, blocks, schedule),
        BLOCK_B=max(1, 4096 // block_n), BLOCK_T=block, **shape,
    )  # fmt: skip
    launch(_sort, (blocks, m), (ids, offsets, groups.order), (tokens,), M=m, BLOCK_C=block_c, **shape)
    return groups


@triton.jit
def _block_of_entries(order, start, experts, firsts, j, block, T, SCHEDULE, N: tl.constexpr, BLOCK_T: tl.constexpr):
    """A block of the schedule: its expert (N if it has none), its tokens [BLOCK_T] int64 and which of them are real."""
    expert = tl.load(experts + j * SCHEDULE + block).to(tl.int64)
    entry = tl.load(firsts + j * SCHEDULE + block) + tl.arange(0, BLOCK_T)
    real = entry < tl.load(start + j * (N + 1) + tl.minimum(expert + 1, N))
    return expert, tl.load(order + j.to(tl.int64) * T + entry, mask=real, other=0).to(tl.int64), real


@triton.jit(do_not_specialize=["T", "SCHEDULE", "CHUNKS"])
def _shrink(
    x,  # [T, D]
    factors,  # [N, R, D] by its strides
    order,
    start,
    experts,
    firsts,
    partial,  # [splits, T, M, R] float32
    # dimensions
    T,
    D,
    SCHEDULE,
    CHUNKS,
    N: tl.constexpr,
    R: tl.constexpr,
    M: tl.constexpr,
    # strides
    x_stride_t,
    factors_stride_n,
    factors_stride_r,
    factors_stride_d,
    # meta-parameters
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    start_next_kernel(PDL)
    wait_for_previous_kernel(PDL)
    rank_blocks: tl.constexpr = (R + BLOCK_R - 1) // BLOCK_R
    block, j, split = tl.program_id(0) // rank_blocks, tl.program_id(1), tl.program_id(2)
    expert, t, real = _block_of_entries(order, start, experts, firsts, j, block, T, SCHEDULE, N, BLOCK_T)
    if expert < N:
        k = tl.program_id(0) % rank_blocks * BLOCK_R + tl.arange(0, BLOCK_R)
        first_d = split * CHUNKS * BLOCK_D
        d = first_d + tl.arange(0, BLOCK_D)
        x_ptrs = x + t[:, None] * x_stride_t + d[None, :]
        factor_ptrs = factors + expert * factors_stride_n
        factor_ptrs += k[None, :] * factors_stride_r + d[:, None].to(tl.int64) * factors_stride_d
        acc = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
        for i in range(tl.minimum(CHUNKS, tl.cdiv(D - first_d, BLOCK_D))):
            inside = d < D - i * BLOCK_D
            a = tl.load(x_ptrs, mask=real[:, None] & inside[None, :], other=0.0)
            b = tl.load(factor_ptrs, mask=(k < R)[None, :] & inside[:, None], other=0.0)
            acc = dot(a, b, acc, PRECISION)
            x_ptrs += BLOCK_D
            factor_ptrs += BLOCK_D * factors_stride_d
        at = partial + ((split.to(tl.int64) * T + t[:, None]) * M + j) * R + k
        tl.store(at, acc, mask=real[:, None] & (k < R)[None, :])


def shrink(device: configs.Device, x: Tensor, factors: Tensor, groups: Groups, *, routes: bool = False) -> Tensor:
    """Partial sums over D of factors_i x for the experts i of each token: x [T, D], factors [N, r, D] of any strides
    -> [splits, T, m, r] float32."""
    (tokens, d), (n, r, _), (m, schedule) = x.shape, factors.shape, groups.experts.shape
    config = configs.tile("gather", device, x.dtype, groups.block, r, d, copies=schedule * m)
    programs = schedule * cdiv(r, config["BLOCK_R"])
    splits, chunks = configs.split_depth(d, config["BLOCK_D"], programs * m, device)
    partial = torch.empty(splits, tokens, m, r, dtype=torch.float32, device=x.device)
    launch(
        _shrink, (programs, m, splits), (x, factors, *groups[:4], partial),
        (tokens, d, schedule, chunks, n, r, m, x.stride(0), *factors.stride()),
        PRECISION=configs.precision(x.dtype, device, routes=routes), **config, **device.launch(),
    )  # fmt: skip
    return partial


@triton.jit(do_not_specialize=["T", "SPLITS"])
def _scale(
    partial,  # [SPLITS, T, M, R] float32
    weights,  # [T, M] float32
    ids,  # [T, M] int32
    s,  # [N, R] float32
    scaled,  # [T, M, R]
    h,  # [T, M, R] float32
    # dimensions
    T,
    SPLITS,
    R: tl.constexpr,
    M: tl.constexpr,
    # meta-parameters
    SAVE: tl.constexpr,
    PDL: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    start_next_kernel(PDL)
    wait_for_previous_kernel(PDL)
    entry = (tl.program_id(0).to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E))[:, None]
    entries = T.to(tl.int64) * M
    w = tl.load(weights + entry, mask=entry < entries, other=0.0)
    expert = tl.load(ids + entry, mask=entry < entries, other=0)
    for first in range(0, R, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)[None, :]
        mask = (entry < entries) & (k < R)
        value = sum_splits(partial, entry * R + k, mask, SPLITS, entries * R)
        if SAVE:
            tl.store(h + entry * R + k, value, mask=mask)
        value *= w * tl.load(s + expert * R + k, mask=mask, other=0.0)
        tl.store(scaled + entry * R + k, cast(value, scaled.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["T", "SCHEDULE", "j"])
def _expand(
    scaled,  # [T, M, R]
    factors,  # [N, R, O] by its strides
    weights,  # [T, M] float32
    expert_bias,  # [N, O]
    bias,  # [O]
    order,
    start,
    experts,
    firsts,
    y,  # [T, O]
    # dimensions
    j,
    T,
    O,
    SCHEDULE,
    N: tl.constexpr,
    R: tl.constexpr,
    M: tl.constexpr,
    # strides
    factors_stride_n,
    factors_stride_r,
    factors_stride_o,
    expert_bias_stride_n,
    y_stride_t,
    # meta-parameters
    ADD: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_EXPERT_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    start_next_kernel(PDL)
    wait_for_previous_kernel(PDL)
    column_blocks = tl.cdiv(O, BLOCK_O)
    block = tl.program_id(0) // column_blocks
    expert, t, real = _block_of_entries(order, start, experts, firsts, j, block, T, SCHEDULE, N, BLOCK_T)
    if expert < N:
        o = (tl.program_id(0) % column_blocks).to(tl.int64) * BLOCK_O + tl.arange(0, BLOCK_O)
        mask = real[:, None] & (o < O)[None, :]
        acc = tl.zeros((BLOCK_T, BLOCK_O), tl.float32)
        for first in range(0, R, BLOCK_R):
            k = first + tl.arange(0, BLOCK_R)
            a = tl.load(
                scaled + (t[:, None] * M + j) * R + k[None, :], mask=real[:, None] & (k < R)[None, :], other=0.0
            )
            factor_ptrs = factors + expert * factors_stride_n
            factor_ptrs += k[:, None] * factors_stride_r + o[None, :] * factors_stride_o
            b = tl.load(factor_ptrs, mask=(k < R)[:, None] & (o < O)[None, :], other=0.0)
            acc = dot(a, b, acc, PRECISION)
        if HAS_EXPERT_BIAS:
            w = tl.load(weights + t * M + j, mask=real, other=0.0)
            acc += (
                w[:, None]
                * tl.load(expert_bias + expert * expert_bias_stride_n + o, mask=o < O, other=0.0).to(tl.float32)[
                    None, :
                ]
            )
        if HAS_BIAS:
            acc += tl.load(bias + o, mask=o < O, other=0.0).to(tl.float32)[None, :]
        y_ptrs = y + t[:, None] * y_stride_t + o[None, :]
        if ADD:
            acc += tl.load(y_ptrs, mask=mask, other=0.0).to(tl.float32)
        tl.store(y_ptrs, cast(acc, y.dtype.element_ty), mask=mask)


def expand(
    device: configs.Device,
    scaled: Tensor,
    factors: Tensor,
    groups: Groups,
    weights: Tensor | None = None,
    expert_bias: Tensor | None = None,
    bias: Tensor | None = None,
    onto: Tensor | None = None,
) -> Tensor:
    """y [T, O] = bias + sum over slots of (scaled_j factors_i + weights_j expert_bias_i), i the expert of slot j.

    scaled [T, m, r], factors [N, r, O] of any strides, weights [T, m], expert_bias [N, O] of any rows, bias
    [O]. `onto` [T, O] of any rows is added to in place, instead of the bias.
    """
    (tokens, m, r), (n, _, o) = scaled.shape, factors.shape
    y = torch.empty(tokens, o, dtype=scaled.dtype, device=scaled.device) if onto is None else onto
    bias_stride = 0 if expert_bias is None else expert_bias.stride(0)
    config = configs.tile("scatter", device, scaled.dtype, groups.block, o, r)
    schedule = groups.experts.shape[1]
    for j in range(m):
        launch(
            _expand, (schedule * cdiv(o, config["BLOCK_O"]),),
            (scaled, factors, weights, expert_bias, bias, *groups[:4], y),
            (j, tokens, o, schedule, n, r, m, *factors.stride(), bias_stride, y.stride(0)),
            ADD=j > 0 or onto is not None, HAS_BIAS=bias is not None and j == 0,
            HAS_EXPERT_BIAS=expert_bias is not None,
            PRECISION=configs.precision(scaled.dtype, device), **config, **device.launch(),
        )  # fmt: skip
    return y


def scale(
    device: configs.Device,
    partial: Tensor,
    s: Tensor,
    weights: Tensor,
    ids: Tensor,
    dtype: torch.dtype,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """The scaled products w_i s_i h_i [T, m, r], and h [T, m, r] float32 if `save`, from partial [splits, T, m, r]."""
    splits, tokens, m, r = partial.shape
    config = configs.entry_blocks(r)
    scaled = torch.empty(tokens, m, r, dtype=dtype, device=s.device)
    h = torch.empty((tokens, m, r) if save else 0, dtype=torch.float32, device=s.device)
    launch(
        _scale, (cdiv(tokens * m, config["BLOCK_E"]),), (partial, weights, ids, s, scaled, h if save else None),
        (tokens, splits, r, m),
        SAVE=save, **config, **device.launch(),
    )  # fmt: skip
    return scaled, h


def apply(device, x, weight, bias, vh, s, u, expert_bias, weights, ids, save, onto=None):
    """As the backend's `apply`, for experts whose rows together are too many to form every product.

    `onto` [T, O] of any rows is added to in place, instead of x W^T + b.
    """
    groups = group(device, ids, s.shape[0], x.dtype)
    scaled, h = scale(device, shrink(device, x, vh[:, : s.shape[1]], groups), s, weights, ids, x.dtype, save)
    y = expand(device, scaled, u.mT, groups, weights, expert_bias, bias, onto)
    return y if onto is not None else y.addmm_(x, weight.T), h
