"""y = x W^T + b + the chosen experts: the base product and a tail over the experts present, in one accumulator."""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .common import cast, cdiv, dot, next_power_of_2, wait_for_previous_kernel
from .launch import Launch, Plan


@triton.jit(do_not_specialize=["T"])
def _expand(
    x,  # [T, D], a descriptor if TMA
    weight,  # [O, D], likewise
    bias,  # [O]
    scaled,  # [T, N, R]
    gates,  # [T, N]
    present,  # [T / SEEN_T, N] int8
    u,  # [N, O, R] by its strides
    expert_bias,  # [N, O]
    y,  # [T, O]
    # dimensions
    T,
    D,
    O,
    N: tl.constexpr,
    R: tl.constexpr,
    SEEN_T: tl.constexpr,
    # strides
    x_stride_t,
    u_stride_n,
    U_STRIDE_O: tl.constexpr,
    u_stride_r,
    expert_bias_stride_n,
    y_stride_t,
    # where the parts but the last end
    end_0,
    end_1,
    end_2,
    PARTS: tl.constexpr,  # of a layer; N are the experts of all of them, u and expert_bias hold N / PARTS
    # meta-parameters
    BASE: tl.constexpr,
    ADD: tl.constexpr,
    TMA: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_EXPERT_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    # GROUP token blocks share each column block of the weight while it is in the cache.
    token_blocks = tl.cdiv(T, BLOCK_T)
    pid = tl.program_id(0)
    group = pid // (GROUP * tl.cdiv(O, BLOCK_O))
    group_size = tl.minimum(token_blocks - group * GROUP, GROUP)
    within = pid % (GROUP * tl.cdiv(O, BLOCK_O))
    block_t = group * GROUP + within % group_size
    block_o = within // group_size
    t = block_t.to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    o = block_o.to(tl.int64) * BLOCK_O + tl.arange(0, BLOCK_O)
    t_inside = t[:, None] < T
    o_inside = o[None, :] < O

    acc = tl.zeros((BLOCK_T, BLOCK_O), tl.float32)
    if TMA:
        for start in range(0, D, BLOCK_D):
            a = x.load([block_t * BLOCK_T, start])
            b = weight.load([block_o * BLOCK_O, start])
            acc = dot(a, b.T, acc, PRECISION)
    elif BASE:
        d = tl.arange(0, BLOCK_D)
        x_ptrs = x + t[:, None] * x_stride_t + d[None, :]
        weight_ptrs = weight + o[None, :] * D + d[:, None]
        for start in range(0, D, BLOCK_D):
            inside = d < D - start
            a = tl.load(x_ptrs, mask=t_inside & inside[None, :], other=0.0)
            b = tl.load(weight_ptrs, mask=o_inside & inside[:, None], other=0.0)
            acc = dot(a, b, acc, PRECISION)
            x_ptrs += BLOCK_D
            weight_ptrs += BLOCK_D

    wait_for_previous_kernel(PDL)
    # Exact sums of many experts have an accumulator of their own: in that of the base product each would be rounded
    # as that large number is.
    OWN: tl.constexpr = PRECISION == "ieee" and y.dtype.element_ty == tl.float32
    base = acc
    if OWN:
        acc = tl.zeros((BLOCK_T, BLOCK_O), tl.float32)
    n = tl.arange(0, BLOCK_N)
    here = tl.zeros((BLOCK_N,), tl.int32)
    for first in range(0, BLOCK_T // SEEN_T, BLOCK_S):
        seen = block_t.to(tl.int64) * (BLOCK_T // SEEN_T) + first + tl.arange(0, BLOCK_S)
        seen_inside = (seen[:, None] < tl.cdiv(T, SEEN_T)) & (n[None, :] < N)
        some = tl.load(present + seen[:, None] * N + n[None, :], mask=seen_inside, other=0).to(tl.int32)
        here = tl.maximum(here, tl.max(some, 0))
    # The experts of a part have outputs only in its own columns; a border may be inside a tile.
    PART: tl.constexpr = N // PARTS
    if PARTS > 1:
        part_of = (o >= end_0).to(tl.int32) + (o >= end_1).to(tl.int32) + (o >= end_2).to(tl.int32)
        here = tl.where((n // PART >= tl.min(part_of)) & (n // PART <= tl.max(tl.where(o < O, part_of, 0))), here, 0)
    k = tl.arange(0, BLOCK_R)
    expert = -1
    chunks: tl.constexpr = (R + BLOCK_R - 1) // BLOCK_R
    for i in range(tl.sum(here) * chunks):
        if i % chunks == 0:
            expert = tl.min(tl.where((here > 0) & (n > expert), n, BLOCK_N))
        rank = (i % chunks) * BLOCK_R + k
        a_ptrs = scaled + t[:, None] * (N * R) + expert * R + rank[None, :]
        a = tl.load(a_ptrs, mask=t_inside & (rank[None, :] < R), other=0.0)
        own, of_part = o_inside, expert
        if PARTS > 1:
            own, of_part = o_inside & (part_of == expert // PART)[None, :], expert % PART
        u_ptrs = u + tl.cast(of_part, tl.int64) * u_stride_n + o[None, :] * U_STRIDE_O + rank[:, None] * u_stride_r
        b = tl.load(u_ptrs, mask=own & (rank[:, None] < R), other=0.0)
        acc = dot(a, b, acc, PRECISION)
    if HAS_EXPERT_BIAS:
        for first in range(0, N, BLOCK_E):
            e = first + tl.arange(0, BLOCK_E)
            a = tl.load(gates + t[:, None] * N + e[None, :], mask=t_inside & (e[None, :] < N), other=0.0)
            own = o_inside & (e[:, None] < N)
            if PARTS > 1:
                own = own & (part_of[None, :] == (e // PART)[:, None])
                e = e % PART
            bias_ptrs = expert_bias + e[:, None] * (expert_bias_stride_n if ADD else O) + o[None, :]
            b = tl.load(bias_ptrs, mask=own, other=0.0)
            acc = dot(a, b, acc, PRECISION)
    if OWN:
        acc += base
    if HAS_BIAS:
        acc += tl.load(bias + o, mask=o < O, other=0.0).to(tl.float32)[None, :]
    y_ptrs = y + t[:, None] * (y_stride_t if ADD else O) + o[None, :]
    if ADD:
        acc += tl.load(y_ptrs, mask=t_inside & o_inside, other=0.0).to(tl.float32)
    tl.store(y_ptrs, cast(acc, y.dtype.element_ty), mask=t_inside & o_inside)


def describable(t: Tensor) -> bool:
    """Whether the tensor memory accelerator can read the rows of t."""
    if t.stride(0) < t.shape[1]:
        return False
    return t.data_ptr() % 16 == 0 and t.stride(0) * t.itemsize % 16 == 0


def expand(
    device: configs.Device, x: Tensor, scaled: Tensor, present: Tensor, tokens_per_block: int, u: Tensor
) -> Tensor:
    """y [T, O] = sum over i of scaled_i u_i^T: scaled [T, N, r], u [N, O, r] of any strides; x [T, D] is not read.

    present [T / tokens_per_block, N] int8: whether any token of a block has the expert.
    """
    (tokens, d), (n, o, r) = x.shape, u.shape
    y = torch.empty(tokens, o, dtype=x.dtype, device=x.device)
    choices, strides = expand_choices(device, x.dtype, tokens, o, n * r, r), (x.stride(0), *u.stride(), 0, o)
    _plan(x.dtype, device, *choices, tokens, d, o, n, r, tokens_per_block, strides).run(x, scaled, present, u, y)
    return y


@functools.lru_cache(maxsize=1024)
def _plan(_dtype, *arguments) -> Plan:
    return Plan([expand_launch(*arguments, base=False, add=False)], ["x", "scaled", "present", "u", "y"])


def expand_choices(device, dtype, tokens, columns, depth, r) -> tuple[configs.Tile, int, str]:
    """The tile for that many columns and a sum of that depth, the ranks of one product, how float32 is multiplied."""
    config = configs.tile("expand", device, dtype, tokens, columns, depth)
    return config, configs.rank_block(r, dtype), configs.precision(dtype, device)


def expand_launch(
    device, config, block_r, precision, tokens, d, o, n, r, seen, strides,
    *, base: bool, add: bool, ends=(), tma: bool = False, bias: bool = False, expert_bias: bool = False,
) -> Launch:  # fmt: skip
    """The launch on x, weight, bias, scaled, gates, present, u, expert_bias and y, for n experts of each part.

    `base`: x W^T is added in the same accumulator. `add`: y is added to. `ends`: where each part of up to four ends in
    O. `tma`: x and weight are read by the tensor memory accelerator. `seen`: tokens of a block of `present`.
    """
    parts = max(1, len(ends))
    n *= parts
    block_n, block_t, block_o, block_d = next_power_of_2(n), *(config[name] for name in configs.BLOCKS["expand"])
    return Launch(
        _expand, (cdiv(tokens, block_t) * cdiv(o, block_o),),
        (tokens, d, o, n, r, seen, *strides, *(*ends[:-1], o, o, o)[:3], parts),
        (), {"x": [block_t, block_d], "weight": [block_o, block_d]} if tma else None,
        BASE=base, ADD=add, TMA=tma, HAS_BIAS=bias, HAS_EXPERT_BIAS=expert_bias, PRECISION=precision, GROUP=8,
        BLOCK_N=block_n, BLOCK_S=min(block_t // seen, max(1, 4096 // block_n)),
        BLOCK_E=max(16, min(block_d, 64, block_n)), BLOCK_R=min(block_d, block_r),
        **config, **device.launch(),
    )  # fmt: skip
