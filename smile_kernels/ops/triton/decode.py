"""A SMILE layer for few tokens, memory bound: the weight is streamed once, everything else overlaps with it.

Two launches, the second of which starts before the first has ended, or one launch whose programs wait for each other.
The first half forms h = x V^T in slices; the last of its programs to arrive adds them up, routes, and scales h. In the
second each program streams its rows of the weight, then adds the chosen experts and the biases in the same accumulator.
"""

import functools
import itertools

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from . import configs
from .common import cast, cdiv, dot, next_power_of_2, start_next_kernel, wait_for_previous_kernel
from .launch import Launch, Plan
from .route import add_squares, by_expert, finite_norm, select


@triton.jit(do_not_specialize=["T", "CHUNKS"])
def _decode(
    x,  # [T, D]
    weight,  # [O, D]
    bias,  # [O]
    vh,  # [N, K, D]
    s,  # [N, R] float32
    u,  # [N, O, R]
    expert_bias,  # [N, O]
    partial,  # [SPLITS, T, N, K] float32
    arrivals,  # [2] int32, zero before and after, at 16 bytes
    scaled,  # [T, N, R]: w_i s_i h_i, zero where a token did not choose the expert
    gates,  # [T, N]: w_i likewise
    y,  # [T, O]
    weights,  # [T, M] float32
    ids,  # [T, M] int32
    # dimensions
    T,
    D,
    O,
    CHUNKS,
    SPLITS: tl.constexpr,
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
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    pid = tl.program_id(0)
    programs = tl.num_programs(0)
    t = tl.arange(0, BLOCK_T)[:, None]
    n = tl.arange(0, BLOCK_N)[None, :]
    x_rows = x + t.to(tl.int64) * x_stride_t
    row_blocks: tl.constexpr = (N * K + BLOCK_O - 1) // BLOCK_O
    slices = row_blocks * SPLITS
    if SHRINK:
        # The second half reads x before it waits: it may start when all that came before is there to be read.
        wait_for_previous_kernel(PDL)
        start_next_kernel(PDL)
        k = tl.arange(0, BLOCK_K)
        # Read by every program, so that the last to arrive need not wait for it.
        sv = tl.load(s + n[:, :, None] * R + k, mask=(n < N)[:, :, None] & (k < R), other=0.0)
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
        # Every thread's stores come before the one arrival of this program.
        tl.debug_barrier()
        owners = tl.minimum(slices, programs)
        arrived = tl.atomic_add(arrivals, 1, mask=pid < slices, sem="acq_rel")
        if (pid < slices) & (arrived == owners - 1):
            slot = tl.arange(0, BLOCK_M)[None, :]
            inside = (t < T)[:, :, None] & (n < N)[:, :, None]
            offsets = t[:, :, None] * (N * K) + n[:, :, None] * K + k
            h = tl.load(partial + offsets, mask=inside & (k < K), other=0.0)
            for i in tl.static_range(1, SPLITS):
                h += tl.load(partial + i * T * (N * K) + offsets, mask=inside & (k < K), other=0.0)
            zero = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
            peak, squares = add_squares(zero, zero, tl.where(k < G, h, 0.0))
            w, e = select(finite_norm(peak, squares), n, slot, N, M)
            tl.store(weights + t * M + slot, w, mask=(t < T) & (slot < M))
            tl.store(ids + t * M + slot, e, mask=(t < T) & (slot < M))
            chosen, gate = by_expert(w, e, n, slot, M)
            if HAS_EXPERT_BIAS:
                tl.store(gates + t * N + n, cast(gate, gates.dtype.element_ty), mask=(t < T) & (n < N))
            z = tl.where(chosen[:, :, None], gate[:, :, None] * sv * h, 0.0)
            at = scaled + (t * N + n)[:, :, None] * R + k
            tl.store(at, cast(z, scaled.dtype.element_ty), mask=inside & (k < R))
            if EXPAND:
                tl.debug_barrier()
                tl.atomic_add(arrivals, 1, sem="release")
            else:
                tl.store(arrivals, 0)

    if EXPAND:
        nr = tl.arange(0, BLOCK_N * BLOCK_R)
        expert, rank = nr // BLOCK_R, nr % BLOCK_R
        real = (expert < N) & (rank < R)
        for tile in range(pid, tl.cdiv(O, BLOCK_O), programs):
            o = tile * BLOCK_O + tl.arange(0, BLOCK_O)[None, :].to(tl.int64)
            # All experts' factors are read before the choice is known: that is less than to wait for them afterwards.
            u_ptrs = u + expert[:, None].to(tl.int64) * O * R + o * R + rank[:, None]
            factors = tl.load(u_ptrs, mask=real[:, None] & (o < O), other=0.0)
            constant = tl.zeros((1, BLOCK_O), tl.float32)
            if HAS_BIAS:
                constant += tl.load(bias + o, mask=o < O, other=0.0).to(tl.float32)
            if HAS_EXPERT_BIAS:
                e = tl.arange(0, BLOCK_E)
                delta = tl.load(expert_bias + e[:, None] * O + o, mask=(e[:, None] < N) & (o < O), other=0.0)

            acc = tl.zeros((BLOCK_T, BLOCK_O), tl.float32)
            d = tl.arange(0, BLOCK_D)
            for start in range(0, D, BLOCK_D):
                inside = d < D - start
                a = tl.load(x_rows + d[None, :] + start, mask=(t < T) & inside[None, :], other=0.0)
                b = tl.load(weight + o * D + d[:, None] + start, mask=(o < O) & inside[:, None], other=0.0)
                acc = dot(a, b, acc, PRECISION)

            if SHRINK:
                while tl.atomic_add(arrivals, 0, sem="acquire") <= tl.minimum(slices, programs):
                    pass
            else:
                wait_for_previous_kernel(PDL)
            z = tl.load(scaled + (t * N + expert) * R + rank, mask=(t < T) & real, other=0.0)
            acc = dot(z, factors, acc, PRECISION) + constant
            if HAS_EXPERT_BIAS:
                gate = tl.load(gates + t * N + e[None, :], mask=(t < T) & (e[None, :] < N), other=0.0)
                acc = dot(gate, delta, acc, PRECISION)
            tl.store(y + t.to(tl.int64) * O + o, cast(acc, y.dtype.element_ty), mask=(t < T) & (o < O))

        if SHRINK:
            # The last program to leave resets the counters for the next launch that uses them.
            last = tl.atomic_add(arrivals + 1, 1, sem="acq_rel") == programs - 1
            tl.store(arrivals, 0, mask=last)
            tl.store(arrivals + 1, 0, mask=last)


_EAGER = 4096


class _Counters:
    """Counters of one GPU's launches of `decode`, two for each call in flight, which leaves them at zero again.

    They are made once, outside any CUDA graph: a graph's private memory does not outlive it, and other streams need
    them at zero.
    """

    def __init__(self, device: torch.device):
        if _capturing(device):
            raise RuntimeError(
                f"decode: its counters on {device} are first needed while a CUDA graph is captured; expected a call of "
                "the layer, or smile_kernels.warmup, before that"
            )
        # Rows of 16 bytes: Triton compiles a kernel again for pointers that are not aligned to that.
        with _disable_current_modes():  # a backend may be chosen while fake tensors are traced
            self.rows = torch.zeros(1 << 16, 4, dtype=torch.int32, device=device)
            self.eager = itertools.cycle(self.rows[:_EAGER].unbind())
        self.captured = 0
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def take(self, capturing: bool) -> Tensor:
        """Two counters at zero, in [4] int32, that no other launch uses at the same time.

        Eager launches cycle through the first ones, more than streams queue. A launch captured in a CUDA graph
        keeps its own for good, as the graph may be replayed at any time.
        """
        if not capturing:
            return next(self.eager)
        if self.captured == len(self.rows) - _EAGER:
            return torch.zeros(4, dtype=torch.int32, device=self.rows.device)
        self.captured += 1
        return self.rows[-self.captured]


_counters = functools.cache(_Counters)


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def prepare(device: torch.device) -> None:
    """Allocate the counters of `decode` on a device, unless a CUDA graph is being captured."""
    if not _capturing(device):
        _counters(device)


def arrivals(device: torch.device) -> Tensor:
    """Two counters at zero for one launch on `device`."""
    return _counters(device).take(_capturing(device))


NAMES = ["x", "weight", "bias", "vh", "s", "u", "expert_bias", "arrivals", "y", "weights", "ids"]


def plan(
    device: configs.Device,
    dtype: torch.dtype,
    tokens: int,
    d: int,
    o: int,
    n: int,
    k: int,
    g: int,
    r: int,
    m: int,
    x_stride_t: int,
    bias: bool,
    expert_bias: bool,
    one_launch: bool,
) -> Plan:
    """The launches, in one or two, on the tensors called `NAMES` of a layer routed by the first g of vh's k rows.

    They write y [T, O], weights and ids [T, m]; `arrivals` are two counters at zero. T is at most the largest BLOCK_T
    of the kernel's tiles.
    """
    config = configs.tile("decode", device, dtype, tokens, o, d)
    precision, route_precision = (configs.precision(dtype, device, routes=routes) for routes in (False, True))
    row_blocks, tiles = cdiv(n * k, config["BLOCK_O"]), cdiv(o, config["BLOCK_O"])
    splits, chunks = configs.split_depth(d, config["BLOCK_D"], row_blocks, device)
    block_n, slices = next_power_of_2(n), row_blocks * splits
    constants = {
        "HAS_BIAS": bias, "HAS_EXPERT_BIAS": expert_bias, "PRECISION": precision, "ROUTE_PRECISION": route_precision,
        "BLOCK_N": block_n, "BLOCK_E": max(16, block_n), "BLOCK_M": next_power_of_2(m), "BLOCK_K": next_power_of_2(k),
        "BLOCK_R": next_power_of_2(max(r, 16)), **config, **device.launch(overlaps=not one_launch),
    }  # fmt: skip
    halves = [(slices, True, False), (tiles, False, True)]
    if one_launch:
        programs = 1 if device.family == "interpreter" else min(device.multiprocessors, max(tiles, slices))
        halves = [(programs, True, True)]
        constants |= {"PDL": False, "launch_cooperative_grid": True}
    numbers = tokens, d, o, chunks, splits, n, k, g, r, m, x_stride_t
    launches = [
        Launch(_decode, (programs,), numbers, SHRINK=shrink, EXPAND=expand, **constants)
        for programs, shrink, expand in halves
    ]
    workspace = {"partial": ((splits, tokens, n, k), torch.float32), "scaled": ((tokens, n, r), dtype)}
    if expert_bias:
        workspace["gates"] = (tokens, n), dtype
    return Plan(launches, NAMES, workspace)
