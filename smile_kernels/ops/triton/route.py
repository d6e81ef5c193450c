"""Choose experts and weigh them: norms, top-m and softmax of the low-rank products; and scale those for `expand`."""

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .common import cast, cdiv, start_next_kernel, sum_splits, wait_for_previous_kernel
from .launch import Launch, Plan
from .shrink import shrink_choices, shrink_launch


@triton.jit
def _range_factors(peak):
    """The power of two that brings numbers up to `peak` where squares neither overflow nor vanish, and its inverse."""
    large = peak > 2.0**58
    small = peak < 2.0**-56
    factor = tl.where(large, 2.0**-70, tl.where(small, 2.0**70, 1.0))
    return factor, tl.where(large, 2.0**70, tl.where(small, 2.0**-70, 1.0))


@triton.jit
def add_squares(peak, squares, q):
    """Take q [a, b, k] into a running sum of squares [a, b], which is held relative to the largest number yet seen."""
    new_peak = tl.maximum(peak, tl.max(tl.abs(q), 2))
    factor, _ = _range_factors(new_peak)
    _, inverse = _range_factors(peak)
    change = factor * inverse
    q = q * factor[:, :, None]
    return new_peak, squares * change * change + tl.sum(q * q, 2)


@triton.jit
def finite_norm(peak, squares):
    """The root of that sum. As in the reference, NaN counts as the least number and infinity as the largest."""
    _, inverse = _range_factors(peak)
    norm = tl.sqrt_rn(squares) * inverse
    largest: tl.constexpr = 3.4028234663852886e38
    return tl.where(norm == norm, tl.minimum(norm, largest), -largest)


@triton.jit
def select(score, n, slot, N: tl.constexpr, M: tl.constexpr):
    """The softmax of the M largest of score [BLOCK_T, BLOCK_N] and their ids, ties to the lower: [BLOCK_T, BLOCK_M]."""
    left = tl.where(n < N, score, float("-inf"))
    ids = tl.zeros((score.shape[0], slot.shape[1]), tl.int32)
    top = tl.full((score.shape[0], slot.shape[1]), float("-inf"), tl.float32)
    for j in range(M):
        best = tl.max(left, 1)[:, None]
        expert = tl.min(tl.where(left == best, n, N), 1)[:, None]
        ids = tl.where(slot == j, expert, ids)
        top = tl.where(slot == j, best, top)
        left = tl.where(n == expert, float("-inf"), left)
    weights = tl.exp(top - tl.max(top, 1)[:, None])
    return weights / tl.sum(weights, 1)[:, None], ids


@triton.jit
def of_slot(values, slot, j):
    """Column j of values [BLOCK_T, BLOCK_M], as [BLOCK_T, 1]."""
    return tl.sum(tl.where(slot == j, values, tl.zeros_like(values)), 1)[:, None]


@triton.jit
def by_expert(weights, ids, n, slot, M: tl.constexpr):
    """Whether a token chose an expert, and the sum of its weights there: [BLOCK_T, BLOCK_N]."""
    chosen = tl.zeros((weights.shape[0], n.shape[1]), tl.int32)
    gate = tl.zeros((weights.shape[0], n.shape[1]), tl.float32)
    for j in range(M):
        hit = of_slot(ids, slot, j) == n
        chosen += hit.to(tl.int32)
        gate += tl.where(hit, of_slot(weights, slot, j), 0.0)
    return chosen > 0, gate


@triton.jit(do_not_specialize=["T", "SPLITS"])
def _route(
    partial,  # [SPLITS, T, N, K] float32
    weights,  # [T, M] float32, written if ROUTE, else read
    ids,  # [T, M] int32, likewise
    s,  # [N, R] float32
    scaled,  # [T, N, R]
    gates,  # [T, N]
    present,  # [T / BLOCK_T, N] int8
    h,  # [T, M, R] float32
    # dimensions
    T,
    SPLITS,
    N: tl.constexpr,
    K: tl.constexpr,
    G: tl.constexpr,
    R: tl.constexpr,
    M: tl.constexpr,
    PARTS: tl.constexpr,  # of a layer; T, N and M are T PARTS, PARTS N and PARTS M in the shapes above
    # meta-parameters
    ROUTE: tl.constexpr,
    SCALE: tl.constexpr,
    GATES: tl.constexpr,
    SAVE: tl.constexpr,
    PDL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    start_next_kernel(PDL)
    block_t = tl.program_id(0).to(tl.int64)
    t = (block_t * BLOCK_T + tl.arange(0, BLOCK_T))[:, None]
    n = tl.arange(0, BLOCK_N)[None, :]
    slot = tl.arange(0, BLOCK_M)[None, :]
    split_stride = T.to(tl.int64) * (PARTS * N * K)
    real = t < T
    inside = real & (n < N)
    slot_inside = real & (slot < M)
    if PARTS > 1:  # each part of a token is a row of its own
        block_t = block_t * PARTS + tl.program_id(1)
        t = t * PARTS + tl.program_id(1)
        s += tl.program_id(1) * (N * R)
    rows = t * (N * K) + n * K

    wait_for_previous_kernel(PDL)
    if ROUTE:
        peak = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
        squares = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
        for first in range(0, G, BLOCK_K):
            k = first + tl.arange(0, BLOCK_K)
            q = sum_splits(partial, rows[:, :, None] + k, inside[:, :, None] & (k < G), SPLITS, split_stride)
            peak, squares = add_squares(peak, squares, q)
        w, e = select(finite_norm(peak, squares), n, slot, N, M)
        tl.store(weights + t * M + slot, w, mask=slot_inside)
        tl.store(ids + t * M + slot, e, mask=slot_inside)
    else:
        w = tl.load(weights + t * M + slot, mask=slot_inside, other=0.0)
        e = tl.load(ids + t * M + slot, mask=slot_inside, other=0)

    if SCALE:
        chosen, gate = by_expert(w, e, n, slot, M)
        chosen = chosen & inside
        seen = tl.max(chosen.to(tl.int32), 0)[None, :]
        tl.store(present + block_t * N + n, seen.to(tl.int8), mask=n < N)
        if GATES:
            tl.store(gates + t * N + n, cast(gate, gates.dtype.element_ty), mask=inside)
        for first in range(0, R, BLOCK_K):
            k = first + tl.arange(0, BLOCK_K)
            mask = chosen[:, :, None] & (k < R)
            z = tl.load(s + n[:, :, None] * R + k, mask=(n < N)[:, :, None] & (k < R), other=0.0)
            z *= gate[:, :, None] * sum_splits(partial, rows[:, :, None] + k, mask, SPLITS, split_stride)
            at = scaled + t[:, :, None] * (N * R) + n[:, :, None] * R + k
            tl.store(at, cast(z, scaled.dtype.element_ty), mask=inside[:, :, None] & (k < R))
        if SAVE:
            for j in range(M):
                expert = of_slot(e, slot, j)
                has_expert = real if ROUTE else real & (expert >= 0) & (expert < N)
                row = t * (N * K) + expert * K
                for first in range(0, R, BLOCK_K):
                    k = first + tl.arange(0, BLOCK_K)[None, :]
                    value = sum_splits(partial, row + k, has_expert & (k < R), SPLITS, split_stride)
                    tl.store(h + (t * M + j) * R + k, value, mask=real & (k < R))


def route_launch(
    device, tokens, splits, n, k, g, r, m, parts, *, routes: bool, scales: bool, gates: bool, save: bool
) -> Launch:
    """The launch on partial, weights, ids, s, scaled, gates, present and h, for n experts of each part.

    `routes`: it chooses experts, otherwise weights and ids are read. `scales`: it writes what `expand` adds.
    """
    config = configs.route_blocks(n, m, max(g, r))
    return Launch(
        _route, (cdiv(tokens, config["BLOCK_T"]), parts), (tokens, splits, n, k, g, r, m, parts),
        ROUTE=routes, SCALE=scales, GATES=gates, SAVE=save, **config, **device.launch(),
    )  # fmt: skip


def empty_routing(x: Tensor, *of_token: int) -> tuple[Tensor, Tensor]:
    """Room for weights [T, m] float32 and ids [T, m] int32, or [T, P, m]."""
    weights = torch.empty(x.shape[0], *of_token, dtype=torch.float32, device=x.device)
    return weights, torch.empty_like(weights, dtype=torch.int32)


def route(device: configs.Device, x: Tensor, router: Tensor, num_experts_per_tok: int) -> tuple[Tensor, Tensor]:
    """The m experts with the largest ||router_i x||_2 and the softmax of their scores.

    x [T, D], router [N, g, D] -> weights [T, m] float32, ids [T, m] int32; router [P, N, g, D] of P parts: [T, P, m].
    """
    (tokens, d), (*parts, n, g, _), m = x.shape, router.shape, num_experts_per_tok
    weights, ids = empty_routing(x, *parts, m)
    choices = shrink_choices(device, x.dtype, tokens, math.prod(parts) * n * g, d)
    strides = x.stride(0), *router.stride()[-3:]
    _plan(x.dtype, device, *choices, tokens, d, n, g, m, math.prod(parts), strides).run(x, router, weights, ids)
    return weights, ids


@functools.lru_cache(maxsize=1024)
def _plan(_dtype, device, config, precision, tokens, d, n, g, m, parts, strides) -> Plan:
    splits, first = shrink_launch(device, config, precision, tokens, d, parts * n, g, None, strides, overlaps=False)
    options = {"routes": True, "scales": False, "gates": False, "save": False}
    second = route_launch(device, tokens, splits, n, g, g, 0, m, parts, **options)
    partial = (splits, tokens, parts * n, g), torch.float32
    return Plan([first, second], ["x", "rows", "weights", "ids"], {"partial": partial})
