"""A SMILE layer for few tokens, bound by memory: the weight streams once, and all else hides behind it.

Two launches, the second of which starts before the first has ended, or one launch whose programs wait for each other.
The first half forms h = x V^T in slices. In the second each program streams its rows of the weight, then routes (each
for itself: that is N * k numbers a token), and adds the chosen experts and the biases in the same accumulator.
"""

import torch
import triton
import triton.language as tl

from . import configs
from .common import cast, cdiv, dot, next_power_of_2, start_next_kernel, sum_splits, wait_for_previous_kernel
from .route import add_squares, by_expert, empty_routing, finite_norm, select


@triton.jit(do_not_specialize=["T", "SPLITS", "CHUNKS"])
def _decode(
    x,  # [T, D]
    weight,  # [O, D]
    bias,  # [O]
    vh,  # [N, K, D]
    s,  # [N, R] float32
    u,  # [N, O, R]
    expert_bias,  # [N, O]
    partial,  # [SPLITS, T, N, K] float32
    arrivals,  # [2] int32, zero before and after
    y,  # [T, O]
    weights,  # [T, M] float32
    ids,  # [T, M] int32
    # dimensions
    T,
    D,
    O,
    SPLITS,
    CHUNKS,
    N: tl.constexpr,
    K: tl.constexpr,
    G: tl.constexpr,
    R: tl.constexpr,
    M: tl.constexpr,
    # strides
    x_stride_t,
    # meta-parameters
    SHRINK: tl.constexpr,
    EXPAND: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_EXPERT_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    ROUTE_PRECISION: tl.constexpr,
    PDL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    pid = tl.program_id(0)
    programs = tl.num_programs(0)
    t = tl.arange(0, BLOCK_T)[:, None]
    x_rows = x + t.to(tl.int64) * x_stride_t
    row_blocks: tl.constexpr = (N * K + BLOCK_O - 1) // BLOCK_O
    slices = row_blocks * SPLITS
    if SHRINK:
        start_next_kernel(PDL)
        for piece in range(pid, slices, programs):
            row = piece % row_blocks * BLOCK_O + tl.arange(0, BLOCK_O)[None, :]
            first = piece // row_blocks * CHUNKS * BLOCK_D
            d = first + tl.arange(0, BLOCK_D)
            h = tl.zeros((BLOCK_T, BLOCK_O), tl.float32)
            for i in range(tl.minimum(CHUNKS, tl.cdiv(D - first, BLOCK_D))):
                inside = d < D - i * BLOCK_D
                a = tl.load(x_rows + d[None, :] + i * BLOCK_D, mask=(t < T) & inside[None, :], other=0.0)
                b = tl.load(vh + row * D + d[:, None] + i * BLOCK_D, mask=(row < N * K) & inside[:, None], other=0.0)
                h = dot(a, b, h, ROUTE_PRECISION)
            at = partial + ((piece // row_blocks) * T + t) * (N * K) + row
            tl.store(at, h, mask=(t < T) & (row < N * K))
        if EXPAND:
            # Every thread's stores come before the one arrival of this program.
            tl.debug_barrier()
            tl.atomic_add(arrivals, 1, mask=pid < slices, sem="release")

    if EXPAND:
        n = tl.arange(0, BLOCK_N)[None, :]
        k = tl.arange(0, BLOCK_K)
        slot = tl.arange(0, BLOCK_M)[None, :]
        nk = tl.arange(0, BLOCK_N * BLOCK_K)[:, None]
        for tile in range(pid, tl.cdiv(O, BLOCK_O), programs):
            o = tile * BLOCK_O + tl.arange(0, BLOCK_O)[None, :].to(tl.int64)
            # All experts' factors are read before the choice is known: that is less than to wait for them afterwards.
            u_mask = (nk // BLOCK_K < N) & (nk % BLOCK_K < R) & (o < O)
            factors = tl.load(u + (nk // BLOCK_K).to(tl.int64) * O * R + o * R + nk % BLOCK_K, mask=u_mask, other=0.0)
            constant = tl.zeros((1, BLOCK_O), tl.float32)
            if HAS_BIAS:
                constant += tl.load(bias + o, mask=o < O, other=0.0).to(tl.float32)
            if HAS_EXPERT_BIAS:
                expert = tl.arange(0, BLOCK_N)[:, None]
                delta = tl.load(expert_bias + expert * O + o, mask=(expert < N) & (o < O), other=0.0).to(tl.float32)

            acc = tl.zeros((BLOCK_T, BLOCK_O), tl.float32)
            d = tl.arange(0, BLOCK_D)
            for start in range(0, D, BLOCK_D):
                inside = d < D - start
                a = tl.load(x_rows + d[None, :] + start, mask=(t < T) & inside[None, :], other=0.0)
                b_mask = (o < O) & inside[:, None]
                b = tl.load(weight + o * D + d[:, None] + start, mask=b_mask, other=0.0, eviction_policy="evict_first")
                acc = dot(a, b, acc, PRECISION)

            if SHRINK:
                while tl.atomic_add(arrivals, 0, sem="acquire") < tl.minimum(slices, programs):
                    pass
            else:
                wait_for_previous_kernel(PDL)
            offsets = t[:, :, None] * (N * K) + n[:, :, None] * K + k
            inside = (t < T)[:, :, None] & (n < N)[:, :, None] & (k < K)
            # Read beside h, not ahead of the loop, which has no registers to spare.
            sv = tl.load(s + n[:, :, None] * R + k, mask=(n < N)[:, :, None] & (k < R), other=0.0)
            h = sum_splits(partial, offsets, inside, SPLITS, T * (N * K))
            zero = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
            peak, squares = add_squares(zero, zero, tl.where(k < G, h, 0.0))
            w, e = select(finite_norm(peak, squares), n, slot, N, M)
            chosen, gate = by_expert(w, e, n, slot, M)
            z = tl.where(chosen[:, :, None], gate[:, :, None] * sv * h, 0.0)
            z = cast(tl.reshape(z, (BLOCK_T, BLOCK_N * BLOCK_K)), factors.dtype)
            acc = dot(z, factors, acc, PRECISION) + constant
            if HAS_EXPERT_BIAS:
                # Without the `where` Triton would make this sum of products a TF32 one.
                acc += tl.sum(tl.where(chosen[:, :, None], gate[:, :, None] * delta[None, :, :], 0.0), 1)
            tl.store(y + t.to(tl.int64) * O + o, cast(acc, y.dtype.element_ty), mask=(t < T) & (o < O))
            if tile == 0:
                tl.store(weights + t * M + slot, w, mask=(t < T) & (slot < M))
                tl.store(ids + t * M + slot, e, mask=(t < T) & (slot < M))

        if SHRINK:
            # The last program to leave resets the counters for the next launch that uses them.
            last = tl.atomic_add(arrivals + 1, 1, sem="acq_rel") == programs - 1
            tl.store(arrivals, 0, mask=last)
            tl.store(arrivals + 1, 0, mask=last)


def decode(x, weight, bias, vh, s, u, expert_bias, num_experts_per_tok: int, rank_of_router: int, single: bool):
    """y [T, O], weights [T, m] and ids [T, m] of a layer routed by the first rows of vh, for x [T, D] of few tokens.

    T is at most the largest BLOCK_T of the kernel's tiles. `single`: in one launch rather than two.
    """
    (tokens, d), (n, o, r), k, m = x.shape, u.shape, vh.shape[1], num_experts_per_tok
    device = configs.device(x.device)
    config = configs.tile("decode", device, x.dtype, tokens, o, d)
    row_blocks, tiles = cdiv(n * k, config["BLOCK_O"]), cdiv(o, config["BLOCK_O"])
    splits, chunks = configs.split(d, config["BLOCK_D"], row_blocks, device)
    y = torch.empty(tokens, o, dtype=x.dtype, device=x.device)
    weights, ids = empty_routing(x, m)
    partial = torch.empty(splits, tokens, n, k, dtype=torch.float32, device=x.device)

    numbers = tokens, d, o, splits, chunks, n, k, rank_of_router, r, m, x.stride(0)
    constants = {
        "HAS_BIAS": bias is not None, "HAS_EXPERT_BIAS": expert_bias is not None,
        "PRECISION": configs.precision(x.dtype, device),
        "ROUTE_PRECISION": configs.precision(x.dtype, device, routes=True),
        "BLOCK_N": next_power_of_2(n), "BLOCK_M": next_power_of_2(m), "BLOCK_K": next_power_of_2(max(k, 16)), **config,
    }  # fmt: skip

    def launch(programs, arrivals, shrink, expand, **options):
        _decode[(programs,)](
            x, weight, bias, vh, s, u, expert_bias, partial, arrivals, y, weights, ids, *numbers,
            SHRINK=shrink, EXPAND=expand, **constants, **options,
        )  # fmt: skip

    if single:
        programs = 1 if device.family == "interpreter" else min(device.multiprocessors, max(tiles, row_blocks * splits))
        launch(programs, configs.arrivals(x.device), True, True, PDL=False, launch_cooperative_grid=True)
    else:
        launch(row_blocks * splits, None, True, False, PDL=device.pdl)
        launch(tiles, None, False, True, **device.dependent_launch())
    return y, weights, ids
