"""Launch configurations: tiles per device family, the choice among them, and tables from measurements.

A choice depends only on the device, the dtype and the bucket of the shape, never on the data, and nothing is timed at
run time. The first of these with an entry for the bucket decides:

1. the user's table, written by `tuning.tune` for the current GPU (`user_table`),
2. the heuristics of `tile`, `apply_path` and `linear_path`.

Paths that failed `smile-kernels doctor --verify` on the current GPU are not among the choices (`excluded`).
"""

import functools
import itertools
import json
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch

from ...errors import SmileError
from ...publishing import read_user_file, user_file
from .. import excluded
from .common import cdiv, next_power_of_2

# How a layer is routed (`linear_path`), and how given experts are applied (`apply_path`).
LinearPath = Literal["decode", "decode_one_launch", "one_product", "route_first"]
ApplyPath = Literal["fused", "tma", "delta", "grouped"]
LINEAR_PATHS: tuple[LinearPath, ...] = get_args(LinearPath)
APPLY_PATHS: tuple[ApplyPath, ...] = get_args(ApplyPath)


class Device(NamedTuple):
    """The device properties that determine a configuration."""

    name: str
    family: str  # a key of TILES
    multiprocessors: int
    pdl: bool  # programmatic dependent launch: a kernel may start before the one it depends on has ended
    tma: bool  # tensor memory accelerator

    @functools.lru_cache  # noqa: B019 (there are as many devices as kinds of GPU)
    def launch(self, *, overlaps: bool = True) -> dict[str, bool | int]:
        """Launch options of a kernel that starts before the one ahead of it has ended, and waits for it; or after it.

        The first launch of a chain must not overlap: a later one reads the inputs before its own wait, and what made
        them may start its successor early too.
        """
        # Without an explicit limit ptxas spills a few values so that more warps fit.
        options: dict[str, bool | int] = {} if self.family == "gfx942" else {"maxnreg": 255}
        return options | ({"PDL": True, "launch_pdl": overlaps} if self.pdl else {"PDL": False})


# Compute capability -> family. The others (8.x, 12.x) multiply by single warps and have 99 KB of shared memory a block.
_FAMILIES = {(9, 0): "sm90", (10, 0): "sm100", (10, 3): "sm100"}


@functools.lru_cache
def device_of(device: torch.device) -> Device:
    """The device of a tensor; tensors on a CPU run only in the interpreter."""
    if device.type == "cpu":
        return Device("interpreter", "interpreter", 4, pdl=False, tma=True)
    properties = torch.cuda.get_device_properties(device)
    name, multiprocessors = properties.name, properties.multi_processor_count
    if torch.version.hip:
        return Device(name, "gfx942", multiprocessors, pdl=False, tma=False)
    capability = properties.major, properties.minor
    hopper = capability >= (9, 0)
    family = _FAMILIES.get(capability, "sm80")
    # On 12.x the descriptors alone make every tile spill.
    return Device(name, family, multiprocessors, pdl=hopper, tma=family != "sm80")


def precision(dtype: torch.dtype, device: Device, *, routes: bool = False) -> str:
    """How float32 operands are multiplied: exactly, unless torch allows TF32.

    Products that choose experts keep float32's accuracy even then, as three TF32 products.
    """
    if dtype != torch.float32 or device.family in ("interpreter", "gfx942"):
        return "ieee"
    matmul = torch.backends.cuda.matmul
    # Since torch 2.9 reading `allow_tf32` raises if the newer attribute was set; the newer one reflects both.
    allowed = matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32
    if not allowed:
        return "ieee"
    return "tf32x3" if routes else "tf32"


# The block sizes of a kernel's tile: rows and columns of the result, and the dimension summed over.
BLOCKS = {
    "shrink": ("BLOCK_T", "BLOCK_R", "BLOCK_D"),
    "expand": ("BLOCK_T", "BLOCK_O", "BLOCK_D"),
    "decode": ("BLOCK_T", "BLOCK_O", "BLOCK_D"),
    "gather": ("BLOCK_T", "BLOCK_R", "BLOCK_D"),
    "scatter": ("BLOCK_T", "BLOCK_O", "BLOCK_R"),
    "outer": ("BLOCK_R", "BLOCK_D", "BLOCK_T"),
}
# Kernels that split their sum to fill the device can do with fewer tiles. What comes next adds the splits one after
# another, and waits for memory at each: they are few.
_SPLITTING = {"shrink", "gather"}
_MOST_SPLITS = 4
# Kernels over blocks of entries take exactly the block that `group_block` chose.
_GROUPED = {"gather", "scatter"}

# Family -> operand class -> kernel -> tiles, largest first: the three block sizes, num_warps, num_stages.
# "half": bfloat16 and float16; "tf32": float32 on tensor cores; "ieee": float32 on scalar units.
_IEEE = {
    "shrink": [(64, 64, 32, 8, 3), (32, 32, 32, 4, 3), (16, 32, 64, 4, 3), (16, 16, 64, 4, 3)],
    "expand": [(64, 64, 16, 8, 3), (32, 64, 32, 8, 3), (16, 32, 64, 4, 3), (16, 16, 64, 4, 3)],
    "gather": [(64, 32, 32, 8, 2), (16, 32, 32, 4, 2)],
    "scatter": [(64, 64, 16, 8, 2), (16, 64, 16, 4, 2)],
    "outer": [(32, 64, 16, 4, 2), (16, 64, 16, 4, 2)],
}
_TF32 = {
    "shrink": [(64, 64, 32, 8, 3), (32, 32, 32, 4, 3), (16, 32, 64, 4, 3)],
    "expand": [(128, 128, 32, 8, 3), (64, 64, 32, 4, 3), (32, 32, 64, 4, 3), (16, 32, 64, 4, 3), (16, 16, 128, 4, 3)],
    "gather": [(64, 64, 32, 8, 3), (16, 32, 64, 4, 3)],
    "scatter": [(64, 64, 32, 4, 2), (16, 64, 32, 4, 2)],
    "outer": [(64, 64, 32, 4, 3), (16, 64, 32, 4, 3)],
}
_SM80_HALF = {
    "shrink": [(128, 128, 32, 8, 3), (64, 64, 64, 4, 3), (32, 32, 128, 4, 4), (16, 32, 128, 4, 4), (16, 16, 128, 4, 4)],
    "expand": [(128, 128, 32, 8, 4), (64, 64, 64, 4, 4), (32, 32, 128, 4, 4), (16, 32, 128, 4, 4), (16, 16, 256, 4, 4)],
    "decode": [(16, 32, 128, 4, 4), (16, 16, 128, 4, 4)],
    "gather": [(128, 64, 32, 8, 4), (64, 64, 64, 4, 3), (32, 64, 64, 4, 4), (16, 32, 128, 4, 4)],
    "scatter": [(128, 128, 32, 8, 2), (64, 128, 32, 8, 2), (32, 128, 32, 4, 2), (16, 64, 32, 4, 2)],
    "outer": [(64, 128, 64, 4, 3), (32, 128, 64, 4, 3), (16, 64, 64, 4, 3)],
}
_SM90_HALF = {
    "shrink": [
        (128, 256, 64, 8, 3),
        (128, 128, 64, 8, 3),
        (64, 64, 128, 4, 3),
        (32, 32, 128, 4, 4),
        (16, 32, 128, 4, 4),
    ],
    "expand": [
        (128, 256, 64, 8, 4),
        (128, 128, 64, 8, 4),
        (64, 128, 64, 4, 4),
        (64, 32, 128, 4, 6),
        (32, 32, 128, 4, 8),
        (16, 32, 256, 4, 5),
        (16, 16, 256, 4, 4),
    ],
    "decode": [(16, 32, 256, 4, 5), (16, 32, 128, 8, 6), (16, 16, 256, 4, 4)],
    "gather": [
        (128, 64, 64, 8, 3),
        (128, 32, 64, 4, 3),
        (64, 64, 64, 8, 4),
        (64, 32, 64, 4, 4),
        (32, 64, 128, 4, 3),
        (16, 32, 128, 4, 4),
    ],
    "scatter": [(128, 128, 32, 8, 2), (64, 128, 32, 4, 2), (32, 128, 32, 4, 2), (16, 64, 32, 4, 2)],
    "outer": [(64, 128, 64, 8, 3), (32, 128, 64, 4, 3), (16, 64, 64, 4, 3)],
}
_SM100_HALF = {
    **_SM90_HALF,
    "decode": [(16, 32, 256, 8, 5), (16, 32, 128, 8, 4), (16, 16, 256, 4, 4)],
    "gather": [(128, 64, 64, 4, 3), *_SM90_HALF["gather"][1:]],
}
# With 64 rows the products of TF32 spill there.
_SM100_TF32 = {**_TF32, "gather": [(16, 32, 64, 4, 3)], "scatter": [(16, 64, 32, 4, 2)]}
_GFX942_HALF = {
    "shrink": [(128, 128, 64, 8, 2), (64, 64, 64, 4, 2), (32, 32, 128, 4, 2), (16, 32, 128, 4, 2)],
    "expand": [(128, 128, 64, 8, 2), (64, 64, 64, 4, 2), (32, 32, 128, 4, 2), (16, 32, 128, 4, 2), (16, 16, 256, 4, 2)],
    "decode": [(16, 16, 128, 4, 2)],
    "gather": [(64, 64, 64, 4, 2), (16, 32, 128, 4, 2)],
    "scatter": [(64, 128, 32, 4, 2), (16, 64, 32, 4, 2)],
    "outer": [(64, 64, 64, 4, 2), (16, 64, 64, 4, 2)],
}
_INTERPRETER = {kernel: [(32, 32, 32, 4, 1), (16, 16, 32, 4, 1)] for kernel in BLOCKS}
_INTERPRETER |= {kernel: [(16, 32, 32, 4, 1)] for kernel in ("gather", "scatter", "outer")}
TILES = {
    "sm80": {"half": _SM80_HALF, "tf32": _TF32, "ieee": _IEEE},
    "sm90": {"half": _SM90_HALF, "tf32": _TF32, "ieee": _IEEE},
    "sm100": {"half": _SM100_HALF, "tf32": _SM100_TF32, "ieee": _IEEE},
    "gfx942": {"half": _GFX942_HALF, "ieee": _IEEE},
    "interpreter": {"half": _INTERPRETER, "ieee": _INTERPRETER},
}


def _operands(device: Device, dtype: torch.dtype) -> str:
    return "half" if dtype.itemsize == 2 else "tf32" if precision(dtype, device) == "tf32" else "ieee"


class Tile(dict[str, int]):
    """Block sizes, num_warps and num_stages by name; there is one object for each tile, which is its hash."""

    def __hash__(self) -> int:  # type: ignore[override]
        return id(self)


@functools.cache
def _tiles(kernel: str, family: str, operands: str) -> tuple[Tile, ...]:
    names = *BLOCKS[kernel], "num_warps", "num_stages"
    return tuple(Tile(zip(names, tile)) for tile in TILES[family][operands].get(kernel, ()))


@functools.lru_cache(maxsize=4096)
def _fitting(kernel: str, family: str, operands: str, rows: int, columns: int) -> tuple[Tile, ...]:
    tiles = _tiles(kernel, family, operands)
    first, second, _ = BLOCKS[kernel]
    if kernel in _GROUPED:
        tiles = tuple(t for t in tiles if t[first] == rows)
    else:
        tiles = tuple(t for t in tiles if t[first] <= max(16, next_power_of_2(rows)))
    return tuple(t for t in tiles if t[second] <= max(16, next_power_of_2(columns))) or tiles[-1:]


def candidates(kernel: str, device: Device, dtype: torch.dtype, rows: int, columns: int) -> tuple[Tile, ...]:
    """The tiles of the device's family that are not larger than a result [rows, columns], largest first."""
    return _fitting(kernel, device.family, _operands(device, dtype), rows, columns)


def tile(kernel: str, device: Device, dtype: torch.dtype, rows: int, columns: int, depth: int, copies: int = 1) -> Tile:
    """Block sizes, num_warps and num_stages of `kernel` for `copies` products [rows, depth] x [depth, columns].

    Unless a table has an entry: the largest tile that fits and occupies 90% of the multiprocessors, after its sum is
    split where the kernel does that, else the smallest.
    """
    if _is_set(device):
        fitting = candidates(kernel, device, dtype, rows, columns)
        if measured := _measured(device, dtype, kernel, (rows, columns, depth), fitting):
            return measured
    return _filling(kernel, device, _operands(device, dtype), rows, columns, copies)


@functools.lru_cache(maxsize=4096)
def _filling(kernel: str, device: Device, operands: str, rows: int, columns: int, copies: int) -> Tile:
    fitting = _fitting(kernel, device.family, operands, rows, columns)
    if kernel in _SPLITTING:
        copies *= _MOST_SPLITS
    first, second, _ = BLOCKS[kernel]
    fills = (
        config
        for config in fitting
        if cdiv(rows, config[first]) * cdiv(columns, config[second]) * copies >= 0.9 * device.multiprocessors
    )
    return next(fills, fitting[-1])


def split_depth(depth: int, block: int, programs: int, device: Device) -> tuple[int, int]:
    """Into how many splits to cut a sum over `depth` so that `programs` times them fill the device; blocks of each."""
    blocks = cdiv(depth, block)
    chunks = cdiv(blocks, min(_MOST_SPLITS, max(1, device.multiprocessors // programs)))
    return cdiv(blocks, chunks), chunks


def group_block(tokens: int, n: int, device: Device, dtype: torch.dtype) -> int:
    """Entries of one block of the grouped kernels: the largest size that an equal share of the tokens fills."""
    blocks = sorted({t["BLOCK_T"] for t in _tiles("gather", device.family, _operands(device, dtype))})
    return max((b for b in blocks if b * n <= tokens), default=blocks[0])


def entry_blocks(r: int) -> dict[str, int]:
    """Block sizes of kernels over the r values of each entry: 4 per thread."""
    block_k = min(64, next_power_of_2(r))
    return {"BLOCK_E": 512 // block_k, "BLOCK_K": block_k}


def route_blocks(n: int, m: int, width: int) -> dict[str, int]:
    """Block sizes of the route kernels for n experts, m per token, `width` products per expert.

    Few tokens per program and up to 8 products per thread, so that many programs wait for their partial sums at once.
    """
    block_n, block_m = next_power_of_2(n), next_power_of_2(m)
    block_t = min(16, max(1, 32 // max(block_n, block_m)))
    block_k = min(next_power_of_2(width), max(1, 1024 // (block_t * block_n)))
    return {"BLOCK_N": block_n, "BLOCK_M": block_m, "BLOCK_T": block_t, "BLOCK_K": block_k}


def evidence_blocks(length: int, n: int, m: int, g: int) -> dict[str, int]:
    """Block sizes of a routing step over sequences of `length` tokens: up to 1024 shares, 32 products per thread."""
    block_n = next_power_of_2(n)
    block_t = min(64, next_power_of_2(max(length, 1)), max(1, 1024 // block_n))
    block_k = min(next_power_of_2(g), max(1, 4096 // (block_t * block_n)))
    return {"BLOCK_N": block_n, "BLOCK_M": next_power_of_2(m), "BLOCK_T": block_t, "BLOCK_K": block_k}


def rank_block(r: int, dtype: torch.dtype) -> int:
    """The part of an expert's rank in one product of a tail: up to 128 bytes."""
    return min(128 // dtype.itemsize, max(16, next_power_of_2(r)))


# Assumed for an H200, not measured: bytes a second of its memory and of its second-level cache, FLOPs a second, and the
# seconds that a kernel takes in addition to its work if it cannot overlap the previous one.
BANDWIDTH, CACHE_BANDWIDTH, RATE, RAMP = 4.3e12, 6e12, 780e12, 1.5e-6


def product_seconds(
    device: Device, rows: int, depth: int, columns: int, size: int, block_rows: int, block_columns: int, splits: int = 1
) -> float:
    """Estimated seconds of [rows, depth] x [depth, columns] in tiles: the longest of memory, cache and products.

    From the cache each column of tiles reads all rows, and each row of tiles all columns.
    """
    row_blocks, column_blocks = cdiv(rows, block_rows), cdiv(columns, block_columns)
    read = size * depth * (rows * column_blocks + columns * row_blocks)
    busy = min(1.0, row_blocks * column_blocks * splits / device.multiprocessors)
    moved = size * (rows * depth + columns * depth + rows * columns) + 8 * (splits - 1) * rows * columns
    products = 2 * max(rows, block_rows) * depth * columns
    return max(moved / BANDWIDTH, read / (CACHE_BANDWIDTH * busy), products / (RATE * busy))


def library_seconds(device: Device, rows: int, depth: int, columns: int, size: int) -> float:
    """The same for cuBLAS, which takes the best of its tiles and splits."""
    tiles = (128, 256), (128, 128), (64, 128), (64, 64), (64, 32)
    return min(
        product_seconds(device, rows, depth, columns, size, *tile, splits)
        for tile, splits in itertools.product(tiles, (1, 2, 4))
    )


def apply_paths(device: Device, dtype: torch.dtype) -> tuple[ApplyPath, ...]:
    """The possible paths to apply given experts; see `apply_path`."""
    return APPLY_PATHS if device.tma and dtype.itemsize == 2 else ("fused", "delta", "grouped")


def apply_path(device: Device, dtype: torch.dtype, tokens: int, d: int, o: int, n: int, r: int, m: int) -> ApplyPath:
    """The path for applying given experts.

    "fused": base product and a tail over the experts present in one accumulator; "tma": the same, its 16-bit numbers
    read by the tensor memory accelerator; "delta": the tail, then cuBLAS on top; "grouped": tokens grouped by expert,
    then cuBLAS on top.
    """
    path = _estimated_apply_path(device, dtype, tokens, d, o, n, r, m)
    if _is_set(device):
        paths = _allowed(device, dtype, apply_paths(device, dtype))
        measured = _measured(device, dtype, "apply", (tokens, d, o, n, r, m), paths)
        return measured or (path if path in paths else paths[0])
    return path


@functools.lru_cache(maxsize=4096)
def _estimated_apply_path(
    device: Device, dtype: torch.dtype, tokens: int, d: int, o: int, n: int, r: int, m: int
) -> ApplyPath:
    # Estimates for an H200, not measured: grouping saves the products of n - m experts, reads x and y once more, which
    # is what a few hundred ranks cost, and takes six launches more, which is what 8e9 FLOPs do.
    unchosen = (n - m) * r
    if tokens > 64 and unchosen > 512 and 2 * tokens * unchosen * (d + o) > 8e9:
        return "grouped"
    if tokens <= 16 or (dtype.itemsize != 2 and tokens <= 64):
        return "fused"
    # From as many FLOPs on cuBLAS gains more on tensor cores than a launch and a pass over y cost.
    if dtype.itemsize != 2 or 2 * tokens * d * o > 8e9:
        return "delta"
    size = dtype.itemsize
    rows, columns, _ = BLOCKS["expand"]
    config = tile("expand", device, dtype, tokens, o, d)
    fused = product_seconds(device, tokens, d, o, size, config[rows], config[columns])
    cublas = library_seconds(device, tokens, d, o, size)
    return "fused" if fused <= cublas + RAMP + 2 * tokens * o * size / BANDWIDTH else "delta"


@functools.lru_cache(maxsize=4096)
def linear_paths(device: Device, dtype: torch.dtype, tokens: int, n: int, k: int, save: bool) -> tuple[LinearPath, ...]:
    """The possible paths to route a layer of n experts of k rows; see `linear_path`."""
    # Numbers of the products of 16 tokens in one program of `decode`: 32 per thread.
    held = next_power_of_2(n) * max(16, next_power_of_2(k))
    few = (
        tokens <= 16
        and n <= 16
        and held <= 256
        and not save
        and "decode" in TILES[device.family][_operands(device, dtype)]
    )
    return LINEAR_PATHS if few else ("one_product", "route_first")


def linear_path(
    device: Device, dtype: torch.dtype, tokens: int, d: int, o: int, n: int, k: int, g: int, r: int, m: int, save: bool
) -> LinearPath:
    """The routing path of a layer whose router is the first g of each expert's k rows.

    "decode": all in two launches; "decode_one_launch": all in one; "one_product": one product of all rows, routed, then
    applied as `apply_path` says; "route_first": routed by the router's rows alone, then applied. Only the last two can
    `save`, and serve every number of tokens and float32, which has no tiles for the others.
    """
    paths: Sequence[LinearPath] = linear_paths(device, dtype, tokens, n, k, save)
    if _is_set(device):
        paths = _allowed(device, dtype, paths)
        if measured := _measured(device, dtype, "linear", (tokens, d, o, n, k, g, r, m), paths):
            return measured
    if "decode" in paths:
        return "decode"
    if "one_product" not in paths:
        return "route_first"
    if tokens > 64:
        return "route_first" if apply_path(device, dtype, tokens, d, o, n, r, m) == "grouped" else "one_product"
    # Two launches more cost what 8 MB of reading does.
    saved = n * k - n * g - min(n, tokens * m) * r
    return "route_first" if saved * d * dtype.itemsize > 8e6 else "one_product"


def _allowed(device: Device, dtype: torch.dtype, paths: Sequence) -> Sequence:
    """The paths that are not excluded on this GPU; all of them if none is left (the backend is excluded then)."""
    left_out = excluded.paths(device.name)
    return [path for path in paths if excluded.name_of("triton", path, dtype, False) not in left_out] or paths


_TABLE = "XDG_CONFIG_HOME", ".config", "triton.json"


def user_table() -> Path:
    """The user's own table: $XDG_CONFIG_HOME/smile_kernels/triton.json, by default under ~/.config."""
    return user_file(*_TABLE)


class Tables(dict[str, dict[str, Any]]):
    """Device name -> key -> choice: a tile, or the name of a path.

    While `asked` is a dictionary, as in tuning, it takes every key looked up -> its possible choices.
    """

    asked: dict[str, list] | None = None

    def __init__(self, *choices: dict):
        super().__init__(*choices)
        self.changed()

    def changed(self) -> None:
        """To be called after a change, before the next launch."""
        self.version = next(_VERSIONS)


_VERSIONS = itertools.count()


@functools.cache
def tables() -> Tables:
    """The user's table, read once in a process; tuning adds to it."""
    return stored_tables()


def stored_tables(replaces: bool = False) -> Tables:
    """The user's table as it is stored now; `replaces` as in `read_user_file`."""
    text = read_user_file(*_TABLE, replaces=replaces)
    try:
        return Tables({name: dict(choices) for name, choices in ({} if text is None else json.loads(text)).items()})
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        file = user_table()
        raise SmileError(f"{file}: is not valid JSON ({error}); delete it, or write it again by tuning") from None


@functools.lru_cache(maxsize=4096)
def _key(kind: str, numbers: str, dimensions: tuple[int, ...]) -> str:
    return " ".join([kind, numbers, *(str(next_power_of_2(n)) for n in dimensions)])


def settings(device: Device, dtype: torch.dtype) -> Hashable:
    """What the choices for a device and a dtype depend on besides the problem: equal only where none has changed."""
    table = tables()
    version = table.version if table.asked is None else object()
    # Tests and benchmarks replace the two functions.
    return version, *excluded.paths(device.name), precision(dtype, device), linear_path, apply_path


def _is_set(device: Device) -> bool:
    """Whether anything but the heuristics decides on this device: a table, an exclusion, or tuning."""
    table = tables()
    return table.asked is not None or device.name in table or bool(excluded.paths(device.name))


def _measured(device: Device, dtype: torch.dtype, kind: str, dimensions: tuple[int, ...], choices: Sequence) -> Any:
    """The table's choice for these dimensions, each rounded up to a power of two; None if it has none of `choices`."""
    table = tables()
    key = _key(kind, "half" if dtype.itemsize == 2 else precision(dtype, device), dimensions)
    if table.asked is not None:
        table.asked[key] = list(choices)
    choice = table.get(device.name, {}).get(key)
    return choices[choices.index(choice)] if choice in choices else None
