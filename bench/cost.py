"""What a SMILE layer costs at the least, and what each Triton kernel moves and multiplies: bytes, FLOPs and the floor.

    python -m bench.cost [--bandwidth 4.3e12] [--rate 780e12]

prints the floor of each path beside that of the dense layer, for the settings that the GPU benchmark measures.
"""

import argparse
import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Work:
    """Bytes that are moved, each operand once, and FLOPs, two for a multiplication and its addition."""

    bytes: int
    flops: int

    def __add__(self, other: "Work") -> "Work":
        return Work(self.bytes + other.bytes, self.flops + other.flops)

    def floor(self, bandwidth: float, rate: float) -> float:
        """The least seconds at `bandwidth` bytes and `rate` FLOPs a second."""
        return max(self.bytes / bandwidth, self.flops / rate)


@dataclass(frozen=True)
class Shape:
    """A layer without biases whose router is the first g rows of each expert, and a batch."""

    tokens: int
    d: int
    o: int
    n: int
    r: int
    g: int
    m: int = 1
    size: int = 2  # bytes of an element

    @property
    def rows(self) -> int:
        """Rows of vh that an expert has."""
        return max(self.r, self.g)

    def present(self, tokens: int | None = None) -> float:
        """Experts that at least one of `tokens` chooses, if all are equally likely."""
        return self.n * (1 - (1 - self.m / self.n) ** (self.tokens if tokens is None else tokens))


def product(rows: int, depth: int, columns: int) -> int:
    return 2 * rows * depth * columns


def dense(shape: Shape) -> Work:
    """F.linear: x and W are read, y is written."""
    t, d, o = shape.tokens, shape.d, shape.o
    return Work(shape.size * (t * d + o * d + t * o), product(t, d, o))


def layer(shape: Shape, experts: int | None = None) -> Work:
    """What no implementation can avoid: the dense layer, the router's rows, and the rest of `experts` that are chosen.

    By default as many as chosen at random are present.
    """
    t, d, o, r = shape.tokens, shape.d, shape.o, shape.r
    experts = round(shape.present()) if experts is None else experts
    own = max(r - shape.g, 0)
    router = Work(shape.size * shape.n * shape.g * d, product(t, d, shape.n * shape.g))
    chosen = Work(shape.size * experts * (own * d + r * o) + 4 * experts * r, product(t * shape.m, own, d))
    return dense(shape) + router + chosen + Work(0, product(t * shape.m, r, o))


def _shrink(t: int, d: int, rows: int, size: int, splits: int) -> Work:
    """x and rows are read, the partial sums are written in float32."""
    return Work(size * (t + rows) * d + 4 * splits * t * rows, product(t, d, rows))


def kernels(shape: Shape, path: str, splits: int = 1, block: int = 128) -> dict[str, Work]:
    """The kernels of one path, in their order: name -> work.

    Args:
        shape: the layer and the batch.
        path: "decode" and "single" (see `decode.py`), "fused", "tma" and "delta" (see `expand.py`) or "grouped".
        splits: parts into which the sum over D of the low-rank products is cut.
        block: tokens of a block of the tail, which covers all experts present in it.
    """
    t, d, o, n, r, m, size = shape.tokens, shape.d, shape.o, shape.n, shape.r, shape.m, shape.size
    base = dense(shape)
    if path in ("decode", "single"):
        # Every program reads the partial sums of all experts; they and all of u come from the caches after the first.
        shrink = _shrink(t, d, n * shape.rows, size, splits)
        tail = Work(size * n * r * o + 4 * splits * t * n * shape.rows, product(t, n * r, o))
        return {"shrink": shrink, "stream": base + tail}
    if path == "grouped":
        chosen = round(shape.present())
        return {
            "gate": _shrink(t, d, n * shape.g, size, splits),
            "route": Work(4 * splits * t * n * shape.g + 8 * t * m, 2 * t * n * shape.g),
            "group": Work(4 * 3 * t * m, 0),
            "gather": Work(size * (t * m + chosen * r) * d + 4 * splits * t * m * r, product(t * m, d, r)),
            "scale": Work((4 * splits + size) * t * m * r, t * m * r),
            "scatter": Work(size * (t * m * r + chosen * r * o + (2 * m - 1) * t * o), product(t * m, r, o)),
            "base": base + Work(size * t * o, 0),
        }
    if path not in ("fused", "tma", "delta"):
        raise ValueError(f"path: is {path!r}; expected decode, single, fused, tma, delta or grouped")
    blocks = math.ceil(t / block)
    present = round(shape.present(min(t, block)))
    tail = Work(size * (t * n * r + round(shape.present()) * r * o), blocks * product(min(t, block), present * r, o))
    front = {
        "shrink": _shrink(t, d, n * shape.rows, size, splits),
        "route": Work(4 * splits * t * n * shape.rows + size * t * n * r + 8 * t * m, 2 * t * n * shape.g + t * m * r),
    }
    if path == "delta":
        return {**front, "delta": tail + Work(size * t * o, 0), "base": base + Work(size * t * o, 0)}
    return {**front, "expand": base + tail}


def backward(shape: Shape) -> dict[str, Work]:
    """The kernels of `apply_backward` for all gradients (without biases): name -> work."""
    t, d, o, n, r, m, size = shape.tokens, shape.d, shape.o, shape.n, shape.r, shape.m, shape.size
    chosen, entries = round(shape.present()), shape.tokens * shape.m
    return {
        "dweight": dense(shape),
        "dx": dense(shape) + Work(size * t * d, 0),
        "group": Work(4 * 3 * entries, 0),
        "a": Work(size * (entries + chosen * r) * o + 4 * entries * r, product(entries, o, r)),
        "scale": Work((4 * 3 + size) * entries * r, 4 * entries * r),
        "dx tail": Work(size * (entries * r + chosen * r * d + (2 * m - 1) * t * d), product(entries, r, d)),
        "dvh": Work(size * (entries * (r + d) + n * r * d), product(entries, r, d)),
        "ds": Work(4 * (entries + n) * r, entries * r),
        "du": Work(size * (2 * entries * r + entries * o + n * r * o) + 4 * entries * r, product(entries, r, o)),
    }


def total(works: dict[str, Work]) -> Work:
    return sum(works.values(), Work(0, 0))


# (N, r, g, m) and (D, O) of the GPU benchmark.
SETTINGS = [(8, 32, 16, 1), (8, 128, 16, 1), (8, 32, 16, 2), (3, 512, 8, 1), (64, 64, 8, 1)]
LAYERS = [(4096, 4096), (4096, 14336), (14336, 4096), (768, 768)]
TOKENS = [1, 4, 16, 64, 512, 2048, 8192]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bandwidth", type=float, default=4.3e12, help="bytes a second")
    parser.add_argument("--rate", type=float, default=780e12, help="FLOPs a second")
    limits = parser.parse_args()
    limits = limits.bandwidth, limits.rate
    print("| D → O | N r g m | T | dense µs | floor | decode | fused | delta | grouped |\n|" + "---|" * 9)
    for d, o in LAYERS:
        for setting in SETTINGS:
            for t in TOKENS:
                shape = Shape(t, d, o, *setting)
                least = dense(shape).floor(*limits)
                cells = [f"{least * 1e6:.1f}", f"{layer(shape).floor(*limits) / least:.3f}"]
                for path in ("decode", "fused", "delta", "grouped"):
                    # A path's kernels follow each other: each has a floor of its own.
                    seconds = sum(work.floor(*limits) for work in kernels(shape, path).values())
                    held = setting[0] * shape.rows
                    cells.append("" if path == "decode" and (t > 16 or held > 256) else f"{seconds / least:.3f}")
                print(f"| {d} → {o} | {' '.join(map(str, setting))} | {t} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
