"""Choose experts and weigh them: norms, top-m and softmax of the low-rank products; and scale those for `expand`."""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .common import cast, cdiv, start_next_kernel, sum_splits, wait_for_previous_kernel
from .launch import Launch, run
from .shrink import shrink


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
                row = t * (N * K) + of_slot(e, slot, j) * K
                for first in range(0, R, BLOCK_K):
                    k = first + tl.arange(0, BLOCK_K)[None, :]
                    mask = real & (k < R)
                    value = sum_splits(partial, row + k, mask, SPLITS, split_stride)
                    tl.store(h + (t * M + j) * R + k, value, mask=mask)


class Tail(NamedTuple):
    """What `expand` adds to the base product, for T tokens and N experts."""

    scaled: Tensor  # [T, N, r]: w_i s_i h_i, zero where a token did not choose the expert
    gates: Tensor | None  # [T, N]: w_i likewise, for the experts' biases
    present: Tensor  # [T / tokens_per_block, N] int8: whether any token of a block chose the expert
    tokens_per_block: int


def _launch(device, partial, weights, ids, s, g, tail, h, *, routes: bool) -> None:
    splits, tokens, n, k = partial.shape
    parts, m = ids.shape[1:] if ids.dim() == 3 else (1, ids.shape[1])
    n, r = n // parts, 0 if s is None else s.shape[-1]
    scaled, gates, present, _ = tail or (None, None, None, None)
    outputs = tail is not None, gates is not None, h is not None
    launches = _plan(device, tokens, splits, n, k, g, r, m, parts, routes, *outputs)
    run(launches, partial, weights, ids, s, scaled, gates, present, h)


@functools.lru_cache(maxsize=1024)
def _plan(device, tokens, splits, n, k, g, r, m, parts, routes, scales, gates, save) -> tuple[Launch, ...]:
    config = configs.route_blocks(n, m, max(g, r))
    return (
        Launch(
            _route, (cdiv(tokens, config["BLOCK_T"]), parts), (tokens, splits, n, k, g, r, m, parts),
            ROUTE=routes, SCALE=scales, GATES=gates, SAVE=save, **config, **device.launch(),
        ),
    )  # fmt: skip


def empty_routing(x: Tensor, *of_token: int) -> tuple[Tensor, Tensor]:
    """Room for weights [T, m] float32 and ids [T, m] int32, or [T, P, m]."""
    shape, device = (x.shape[0], *of_token), x.device
    return torch.empty(shape, dtype=torch.float32, device=device), torch.empty(shape, dtype=torch.int32, device=device)


def route(device: configs.Device, x: Tensor, router: Tensor, num_experts_per_tok: int) -> tuple[Tensor, Tensor]:
    """The m experts with the largest ||router_i x||_2 and the softmax of their scores.

    x [T, D], router [N, g, D] -> weights [T, m] float32, ids [T, m] int32; router [P, N, g, D] of P parts: [T, P, m].
    """
    weights, ids = empty_routing(x, *router.shape[:-3], num_experts_per_tok)
    _launch(
        device, shrink(device, x, router.flatten(0, -3)), weights, ids, None, router.shape[-2], None, None, routes=True
    )
    return weights, ids


def scale(
    device: configs.Device,
    partial: Tensor,
    s: Tensor,
    weights: Tensor,
    ids: Tensor,
    dtype: torch.dtype,
    *,
    rank_of_router: int | None = None,
    gates: bool,
    save: bool,
) -> tuple[Tail, Tensor]:
    """The scaled products w_i s_i h_i of all tokens, and h [T, m, r] of the chosen experts if `save`.

    partial [splits, T, N, k] is what `shrink` gives; s [N, r], weights and ids [T, m]; or for P parts
    [splits, T, P N, k], [P, N, r] and [T, P, m], and h [T, P, m, r]. With rank_of_router, weights and
    ids are outputs: the choice made from the first rank_of_router products of each expert.
    """
    (_, tokens, n, _), r, m = partial.shape, s.shape[-1], ids.shape[-1]
    g = rank_of_router or 0
    block = configs.route_blocks(s.shape[-2], m, max(g, r))["BLOCK_T"]
    tail = Tail(
        scaled=torch.empty(tokens, n, r, dtype=dtype, device=s.device),
        gates=torch.empty(tokens, n, dtype=dtype, device=s.device) if gates else None,
        present=torch.empty(cdiv(tokens, block), n, dtype=torch.int8, device=s.device),
        tokens_per_block=block,
    )
    h = torch.empty((*ids.shape, r) if save else 0, dtype=torch.float32, device=s.device)
    _launch(device, partial, weights, ids, s, g, tail, h if save else None, routes=rank_of_router is not None)
    return tail, h
