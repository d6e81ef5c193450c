"""Shared by the kernels: products and casts that are also correct in the interpreter, overlap of launches, sizes."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


# Triton's versions also work in kernels, and take microseconds on the host for each call.
def cdiv(a: int, b: int) -> int:
    """a / b rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n and 1."""
    return 1 << (n - 1).bit_length()


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b in float32; PRECISION is how float32 operands are multiplied: "ieee", "tf32" or "tf32x3"."""
    if INTERPRETED:
        # The interpreter multiplies the raw bits of bfloat16 values.
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def cast(x, dtype: tl.constexpr):
    """float32 x rounded to the nearest value of dtype, ties to even."""
    if INTERPRETED and dtype == tl.bfloat16:
        # The interpreter truncates: round in the bits first.
        bits = x.to(tl.int32, bitcast=True)
        x = (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def start_next_kernel(PDL: tl.constexpr):
    """Let the next kernel of the stream start, up to its `wait_for_previous_kernel`."""
    if PDL:
        gdc_launch_dependents()


@triton.jit
def wait_for_previous_kernel(PDL: tl.constexpr):
    """Wait until all writes of the previous kernel of the stream can be read."""
    if PDL:
        gdc_wait()


@triton.jit
def sum_splits(partial, offsets, mask, SPLITS, split_stride):
    """The partial sums at `offsets`, added in the order of the splits."""
    total = tl.load(partial + offsets, mask=mask, other=0.0)
    for _ in range(1, SPLITS):
        partial += split_stride
        total += tl.load(partial + offsets, mask=mask, other=0.0)
    return total


INTERPRETED = tl.constexpr(not isinstance(dot, triton.JITFunction))
