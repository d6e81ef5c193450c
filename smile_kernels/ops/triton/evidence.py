"""One step of a routing policy: shares of the routers' energies, their sums over tokens, the evidence and the choice.

The equations are those of `smile_kernels.routing`; one launch after the router's product, for prompts and for decode.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .common import cdiv, start_next_kernel, sum_splits, wait_for_previous_kernel
from .launch import Launch, Plan
from .route import select
from .shrink import shrink

TOKEN, CAUSAL, SEQUENCE = range(3)  # the scopes, as the operator numbers them


@triton.jit
def _then(factor, total, next_factor, next_total):
    """Two consecutive runs of tokens: the decay of a sum before both, and their own sum."""
    return factor * next_factor, total * next_factor + next_total


@triton.jit
def _shares(energy, counts):
    """p_i = E_i / sum_j E_j along dimension 1; 0 where `counts` is not set. NaN counts as 0."""
    energy = tl.where(counts & (energy == energy), tl.minimum(energy, 1e36), 0.0)
    total = tl.maximum(tl.sum(energy, 1)[:, None], 1.1754943508222875e-38)
    # A share that vanishes in rounding is still evidence; only an energy of 0 is none.
    return tl.where(energy > 0, tl.maximum(tl.div_rn(energy, tl.broadcast_to(total, energy.shape)), 1e-30), 0.0)


@triton.jit
def _choose(
    total, row, inside, prior, below, weights, ids, logs, sums, n, slot,
    N: tl.constexpr, M: tl.constexpr, ACCUMULATES: tl.constexpr, HAS_PRIOR: tl.constexpr, HAS_BELOW: tl.constexpr,
):  # fmt: skip
    """Write sums, L and the choice of rows [rows, 1] from their sums [rows, BLOCK_N]."""
    tl.store(sums + row * N + n, total, mask=inside)
    log = tl.log(tl.maximum(total, 1e-30))
    if HAS_PRIOR:
        log -= tl.load(prior + n, mask=n < N, other=0.0)
    if ACCUMULATES:
        present = inside & (total > 0)
        count = tl.sum(present.to(tl.float32), 1)[:, None]
        mean = tl.sum(tl.where(present, log, 0.0), 1)[:, None] / tl.maximum(count, 1.0)
        log = tl.where(present, log, mean)
        if HAS_BELOW:
            log += tl.load(below + row * N + n, mask=inside, other=0.0)
            log -= tl.max(tl.where(n < N, log, float("-inf")), 1)[:, None]
    tl.store(logs + row * N + n, log, mask=inside)
    w, e = select(log, n, slot, N, M)
    tl.store(weights + row * M + slot, w, mask=(slot < M) & (tl.max(inside.to(tl.int32), 1) > 0)[:, None])
    tl.store(ids + row * M + slot, e, mask=(slot < M) & (tl.max(inside.to(tl.int32), 1) > 0)[:, None])


@triton.jit(do_not_specialize=["T", "LENGTH", "SPLITS", "factors_stride_b", "factors_stride_t"])
def _evidence(
    partial,  # [SPLITS, T, N, G] float32
    prior,  # [N] float32
    real,  # [T] bool: the tokens that count
    factors,  # [sequences, LENGTH] by its strides, float32
    before,  # [sequences, N] float32
    below,  # as logs
    weights,  # [rows, M] float32: a row for each token, or for each sequence where the scope is SEQUENCE
    ids,  # [rows, M] int32
    logs,  # [rows, N] float32
    sums,  # [rows, N] float32
    # dimensions
    T,
    LENGTH,
    SPLITS,
    N: tl.constexpr,
    G: tl.constexpr,
    M: tl.constexpr,
    # strides
    factors_stride_b,
    factors_stride_t,
    # meta-parameters
    SCOPE: tl.constexpr,
    ACCUMULATES: tl.constexpr,
    HAS_PRIOR: tl.constexpr,
    HAS_REAL: tl.constexpr,
    HAS_FACTORS: tl.constexpr,
    HAS_BEFORE: tl.constexpr,
    HAS_BELOW: tl.constexpr,
    PDL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    start_next_kernel(PDL)
    sequence = tl.program_id(0).to(tl.int64)  # with scope TOKEN a block of tokens
    length = BLOCK_T if SCOPE == 0 else LENGTH
    first = sequence * length
    end = tl.minimum(first + length, T)
    n = tl.arange(0, BLOCK_N)[None, :]
    slot = tl.arange(0, BLOCK_M)[None, :]
    at = tl.arange(0, BLOCK_T)[:, None]
    split_stride = T.to(tl.int64) * (N * G)
    total = tl.zeros((1, BLOCK_N), tl.float64)  # long sums, in which each token's share must count
    wait_for_previous_kernel(PDL)
    if HAS_BEFORE:
        total += tl.load(before + sequence * N + n, mask=n < N, other=0.0)
    for start in range(0, length, BLOCK_T):
        t = first + start + at
        inside = (t < end) & (n < N)
        energy = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
        for first_k in range(0, G, BLOCK_K):
            k = first_k + tl.arange(0, BLOCK_K)
            offsets = (t * (N * G) + n * G)[:, :, None] + k
            q = sum_splits(partial, offsets, inside[:, :, None] & (k < G), SPLITS, split_stride)
            energy += tl.sum(q * q, 2)
        counts = inside
        if HAS_REAL:
            counts = counts & (tl.load(real + t, mask=t < end, other=0) != 0)
        share = _shares(energy, counts)
        factor = tl.full((BLOCK_T, 1), 1.0, tl.float32)
        if HAS_FACTORS:
            of_token = factors + sequence * factors_stride_b + (start + at).to(tl.int64) * factors_stride_t
            factor = tl.load(of_token, mask=t < end, other=1.0)
        if SCOPE == 1:
            run = share.to(tl.float64) + tl.where(at == 0, factor * total, 0.0)
            if BLOCK_T > 1:
                _, run = tl.associative_scan((tl.broadcast_to(factor.to(tl.float64), run.shape), run), 0, _then)
            total = tl.sum(tl.where(at == BLOCK_T - 1, run, 0.0), 0)[None, :]
            share = run.to(tl.float32)
        elif SCOPE == 2:
            total += tl.sum((factor * share).to(tl.float64), 0)[None, :]
        if SCOPE != 2:
            _choose(
                share, t, inside, prior, below, weights, ids, logs, sums, n, slot,
                N, M, ACCUMULATES, HAS_PRIOR, HAS_BELOW,
            )  # fmt: skip
    if SCOPE == 2:
        row = tl.zeros((1, 1), tl.int64) + sequence
        _choose(
            total.to(tl.float32), row, n < N, prior, below, weights, ids, logs, sums, n, slot,
            N, M, ACCUMULATES, HAS_PRIOR, HAS_BELOW,
        )  # fmt: skip


def evidence(
    device: configs.Device,
    x: Tensor,
    router: Tensor,
    prior: Tensor | None,
    real: Tensor | None,
    factors: Tensor | None,
    before: Tensor | None,
    below: Tensor | None,
    num_experts_per_tok: int,
    sequences: int,
    scope: int,
    accumulates: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weights, ids [B, R, m], evidence and sums [B, R, N] of x [T, D] in B sequences, with router [N, g, D].

    The other tensors are those of `ops.library.evidence`, float32 and bool; R = 1 with scope SEQUENCE, else T / B.
    """
    (tokens, _), n, m = x.shape, router.shape[0], num_experts_per_tok
    length = tokens // sequences
    rows = 1 if scope == SEQUENCE else length
    logs, sums = (torch.empty(sequences, rows, n, dtype=torch.float32, device=x.device) for _ in range(2))
    weights = torch.empty(sequences, rows, m, dtype=torch.float32, device=x.device)
    ids = torch.empty(sequences, rows, m, dtype=torch.int32, device=x.device)
    partial = shrink(device, x, router)
    prior, real, before, below = (None if t is None else t.contiguous() for t in (prior, real, before, below))
    factors = None if factors is None or scope == TOKEN else factors.expand(sequences, length)
    strides = (0, 0) if factors is None else factors.stride()
    given = tuple(t is not None for t in (prior, real, factors, before, below))
    splits, _, _, g = partial.shape
    plan = _plan(device, tokens, length, splits, n, g, m, strides, scope, accumulates, given)
    plan.run(partial, prior, real, factors, before, below, weights, ids, logs, sums)
    return weights, ids, logs, sums


@functools.lru_cache(maxsize=1024)
def _plan(device, tokens, length, splits, n, g, m, strides, scope, accumulates, given) -> Plan:
    config = configs.evidence_blocks(length, n, m, g)
    programs = cdiv(tokens, config["BLOCK_T"]) if scope == TOKEN else tokens // length
    names = "HAS_PRIOR", "HAS_REAL", "HAS_FACTORS", "HAS_BEFORE", "HAS_BELOW"
    launch = Launch(
        _evidence, (programs,), (tokens, length, splits, n, g, m, *strides),
        SCOPE=scope, ACCUMULATES=accumulates, **dict(zip(names, given)), **config, **device.launch(),
    )  # fmt: skip
    return Plan([launch], launch.pointers)
