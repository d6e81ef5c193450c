"""h = x rows^T, from in_features to rank: the products of all experts, or of those that a block of tokens chose."""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .common import cdiv, dot, next_power_of_2, start_next_kernel, wait_for_previous_kernel
from .launch import Launch, Plan


@triton.jit(do_not_specialize=["T", "CHUNKS"])
def _shrink(
    x,  # [T, D]
    rows,  # [N, K, D] by its strides
    ids,  # [T, M] int32
    partial,  # [splits, T, N, K] float32
    # dimensions
    T,
    D,
    CHUNKS,
    N: tl.constexpr,
    K: tl.constexpr,
    M: tl.constexpr,
    # strides
    x_stride_t,
    rows_stride_n,
    rows_stride_k,
    ROWS_STRIDE_D: tl.constexpr,
    # meta-parameters
    SELECTED: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    start_next_kernel(PDL)
    row_blocks: tl.constexpr = (N * K + BLOCK_R - 1) // BLOCK_R
    first_t = (tl.program_id(0) // row_blocks).to(tl.int64) * BLOCK_T
    first_row = tl.program_id(0) % row_blocks * BLOCK_R
    t = first_t + tl.arange(0, BLOCK_T)
    row = first_row + tl.arange(0, BLOCK_R)
    split = tl.program_id(1)
    first_d = split * CHUNKS * BLOCK_D
    chunks = tl.minimum(CHUNKS, tl.cdiv(D - first_d, BLOCK_D))
    if SELECTED:
        wait_for_previous_kernel(PDL)
        # Rows of experts that no token of the block chose are neither read nor written.
        slot = tl.arange(0, BLOCK_M)
        chosen = tl.load(ids + t[:, None] * M + slot, mask=(t[:, None] < T) & (slot < M), other=-1)
        here = (chosen >= first_row // K) & (chosen <= (first_row + BLOCK_R - 1) // K)
        chunks = tl.where(tl.max(tl.max(here.to(tl.int32), 1), 0) > 0, chunks, 0)

    d = first_d + tl.arange(0, BLOCK_D)
    x_ptrs = x + t[:, None] * x_stride_t + d[None, :]
    row_ptrs = rows + (row // K).to(tl.int64) * rows_stride_n + (row % K).to(tl.int64) * rows_stride_k
    row_ptrs = row_ptrs[None, :] + d[:, None].to(tl.int64) * ROWS_STRIDE_D
    acc = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
    for i in range(chunks):
        inside = d < D - i * BLOCK_D
        a = tl.load(x_ptrs, mask=(t < T)[:, None] & inside[None, :], other=0.0)
        b = tl.load(row_ptrs, mask=(row < N * K)[None, :] & inside[:, None], other=0.0)
        acc = dot(a, b, acc, PRECISION)
        x_ptrs += BLOCK_D
        row_ptrs += BLOCK_D * ROWS_STRIDE_D
    out = partial + (split.to(tl.int64) * T + t[:, None]) * (N * K) + row[None, :]
    # Triton 3.9's interpreter cannot combine a block of truth values with a single one.
    written_t = tl.where(chunks > 0, T, first_t)
    tl.store(out, acc, mask=(t < written_t)[:, None] & (row < N * K)[None, :])


def shrink(device: configs.Device, x: Tensor, rows: Tensor, ids: Tensor | None = None) -> Tensor:
    """Partial sums over D of x rows^T: x [T, D], rows [N, K, D] of any strides -> [splits, T, N, K] float32.

    With ids [T, m] int32, only products of experts that some token of the same block chose are written. The number of
    splits depends on the shapes alone, so the sums are the same on every run.
    """
    (tokens, d), (n, k, _), m = x.shape, rows.shape, None if ids is None else ids.shape[1]
    config, precision = shrink_choices(device, x.dtype, tokens, n * k, d)
    splits, plan = _plan(x.dtype, device, config, precision, tokens, d, n, k, m, (x.stride(0), *rows.stride()))
    partial = torch.empty(splits, tokens, n, k, dtype=torch.float32, device=x.device)
    plan.run(x, rows, ids, partial)
    return partial


@functools.lru_cache(maxsize=1024)
def _plan(_dtype, *arguments) -> tuple[int, Plan]:
    splits, launch = shrink_launch(*arguments, overlaps=False)
    return splits, Plan([launch], ["x", "rows", "ids", "partial"])


def shrink_choices(device, dtype, tokens, rows, d) -> tuple[configs.Tile, str]:
    """The tile for that many rows, and how float32 is multiplied."""
    return configs.tile("shrink", device, dtype, tokens, rows, d), configs.precision(dtype, device, routes=True)


def shrink_launch(device, config, precision, tokens, d, n, k, m, strides, *, overlaps: bool) -> tuple[int, Launch]:
    """The number of splits, and the launch on x, rows, ids and partial; m is None where every product is formed.

    `overlaps`: ids come from the kernel ahead, one of ours.
    """
    programs = cdiv(tokens, config["BLOCK_T"]) * cdiv(n * k, config["BLOCK_R"])
    splits, chunks = configs.split_depth(d, config["BLOCK_D"], programs, device)
    selected, m = m is not None, m or 1
    return splits, Launch(
        _shrink, (programs, splits), (tokens, d, chunks, n, k, m, *strides), () if selected else ["ids"],
        SELECTED=selected, PRECISION=precision, BLOCK_M=next_power_of_2(m),
        **config, **device.launch(overlaps=overlaps and selected),
    )  # fmt: skip
