"""Every launch configuration: tiles per device family, the choice among them, and the tables that measurements fill.

A choice depends on the device, the dtype and the bucket of the shape alone, never on the data, and nothing is timed at run time.
The first of these that knows the bucket decides:

1. the user's table, which `tune` writes for the GPU at hand (`user_table`),
2. the shipped table of measured choices, `measured.json` beside this file,
3. the heuristics of `tile`, `apply_path` and `linear_path`.
"""

import functools
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .common import gdc_wait


@dataclass(frozen=True)
class Device:
    """What the choice of a configuration depends on."""

    name: str
    family: str  # a key of TILES
    multiprocessors: int
    pdl: bool  # programmatic dependent launch: a kernel may start before the one it depends on has ended

    def dependent_launch(self) -> dict[str, bool]:
        """Launch options of a kernel that calls `wait_for_previous_kernel`."""
        return {"PDL": True, "launch_pdl": True} if self.pdl else {"PDL": False}


# Compute capability -> family. All others (8.x, 12.x) multiply by warps; the tiles of sm80 fit the 99 KB a block that they have.
_FAMILIES = {(9, 0): "sm90", (10, 0): "sm100", (10, 3): "sm100"}


@functools.lru_cache
def device(device: torch.device) -> Device:
    """The device a tensor lies on; tensors on a CPU are served by the interpreter alone."""
    if device.type == "cpu":
        return Device("interpreter", "interpreter", 4, False)
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return Device(properties.name, "gfx942", properties.multi_processor_count, False)
    capability = properties.major, properties.minor
    pdl = capability >= (9, 0) and gdc_wait is not None
    return Device(properties.name, _FAMILIES.get(capability, "sm80"), properties.multi_processor_count, pdl)


def precision(dtype: torch.dtype, device: Device, *, routes: bool = False) -> str:
    """How float32 operands are multiplied: exactly, unless torch allows TF32.

    Products that choose experts keep float32's accuracy even then, as three TF32 products.
    """
    matmul = torch.backends.cuda.matmul
    # Since torch 2.9 reading `allow_tf32` raises where the newer attribute was set; the newer one knows of both.
    allowed = matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32
    if dtype != torch.float32 or not allowed or device.family in ("interpreter", "gfx942"):
        return "ieee"
    return "tf32x3" if routes else "tf32"


# The block sizes of a kernel's tile: tokens, columns of the result, and the dimension summed over.
_BLOCKS = {
    "shrink": ("BLOCK_T", "BLOCK_R", "BLOCK_D"),
    "expand": ("BLOCK_T", "BLOCK_O", "BLOCK_D"),
    "decode": ("BLOCK_T", "BLOCK_O", "BLOCK_D"),
    "gather": ("BLOCK_T", "BLOCK_R", "BLOCK_D"),
    "scatter": ("BLOCK_T", "BLOCK_O", "BLOCK_R"),
    "outer": ("BLOCK_R", "BLOCK_D", "BLOCK_T"),
}
# Kernels that split their sum to fill the device can do with few tiles.
_SPLITTING = {"shrink", "gather"}
# Kernels over blocks of entries take exactly the block that `group_block` chose.
_GROUPED = {"gather", "scatter"}

# Family -> operand class -> kernel -> tiles, largest first: the three block sizes, num_warps, num_stages.
# "half": bfloat16 and float16; "tf32": float32 on tensor cores; "ieee": float32 on scalar units.
_IEEE = {
    "shrink": [(64, 64, 32, 8, 2), (32, 32, 32, 4, 3), (16, 32, 64, 4, 3), (16, 16, 64, 4, 3)],
    "expand": [(64, 64, 32, 8, 2), (32, 64, 32, 4, 3), (16, 32, 64, 4, 3), (16, 16, 64, 4, 3)],
    "decode": [(16, 16, 64, 4, 3)],
    "gather": [(64, 32, 32, 4, 2), (16, 32, 32, 4, 2)],
    "scatter": [(64, 64, 16, 4, 2), (16, 64, 16, 4, 2)],
    "outer": [(32, 64, 16, 4, 2), (16, 64, 16, 4, 2)],
}
_TF32 = {
    "shrink": [(64, 64, 32, 4, 3), (32, 32, 32, 4, 3), (16, 32, 64, 4, 3)],
    "expand": [(128, 128, 32, 8, 3), (64, 64, 32, 4, 3), (32, 32, 64, 4, 3), (16, 32, 64, 4, 3), (16, 16, 128, 4, 3)],
    "decode": [(16, 16, 64, 4, 3)],
    "gather": [(64, 64, 32, 8, 3), (16, 32, 64, 4, 3)],
    "scatter": [(64, 64, 32, 4, 2), (16, 64, 32, 4, 2)],
    "outer": [(64, 64, 32, 4, 3), (16, 64, 32, 4, 3)],
}
_SM80_HALF = {
    "shrink": [(128, 128, 32, 8, 3), (64, 64, 64, 4, 3), (32, 32, 128, 4, 4), (16, 32, 128, 4, 4), (16, 16, 128, 4, 4)],
    "expand": [(128, 128, 32, 8, 4), (64, 64, 64, 4, 4), (32, 32, 128, 4, 4), (16, 32, 128, 4, 4), (16, 16, 256, 4, 4)],
    "decode": [(16, 32, 128, 4, 4), (16, 16, 128, 4, 4)],
    "gather": [(128, 64, 64, 8, 3), (64, 64, 64, 4, 3), (16, 32, 128, 4, 4)],
    "scatter": [(128, 128, 32, 8, 2), (64, 128, 32, 4, 2), (16, 64, 32, 4, 2)],
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
        (64, 32, 128, 4, 4),
        (32, 32, 128, 4, 4),
        (16, 32, 256, 4, 4),
        (16, 16, 256, 4, 4),
    ],
    "decode": [(16, 32, 256, 4, 4), (16, 16, 256, 4, 4)],
    "gather": [(128, 64, 64, 4, 3), (64, 64, 64, 8, 4), (16, 32, 128, 4, 4)],
    "scatter": [(128, 128, 32, 8, 2), (64, 128, 32, 4, 2), (16, 64, 32, 4, 2)],
    "outer": [(64, 128, 64, 8, 3), (32, 128, 64, 4, 3), (16, 64, 64, 4, 3)],
}
_GFX942_HALF = {
    "shrink": [(128, 128, 64, 8, 2), (64, 64, 64, 4, 2), (32, 32, 128, 4, 2), (16, 32, 128, 4, 2)],
    "expand": [(128, 128, 64, 8, 2), (64, 64, 64, 4, 2), (32, 32, 128, 4, 2), (16, 32, 128, 4, 2), (16, 16, 256, 4, 2)],
    "decode": [(16, 16, 128, 4, 2)],
    "gather": [(64, 64, 64, 4, 2), (16, 32, 128, 4, 2)],
    "scatter": [(64, 128, 32, 4, 2), (16, 64, 32, 4, 2)],
    "outer": [(64, 64, 64, 4, 2), (16, 64, 64, 4, 2)],
}
_INTERPRETER = {kernel: [(32, 32, 32, 4, 1), (16, 16, 32, 4, 1)] for kernel in _BLOCKS}
_INTERPRETER |= {kernel: [(16, 16, 32, 4, 1)] for kernel in _GROUPED}
TILES = {
    "sm80": {"half": _SM80_HALF, "tf32": _TF32, "ieee": _IEEE},
    "sm90": {"half": _SM90_HALF, "tf32": _TF32, "ieee": _IEEE},
    "sm100": {"half": _SM90_HALF, "tf32": _TF32, "ieee": _IEEE},
    "gfx942": {"half": _GFX942_HALF, "ieee": _IEEE},
    "interpreter": {"half": _INTERPRETER, "ieee": _INTERPRETER},
}


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def _tiles(kernel: str, device: Device, dtype: torch.dtype) -> list[tuple[int, ...]]:
    operands = "half" if dtype.itemsize == 2 else "tf32" if precision(dtype, device) == "tf32" else "ieee"
    return TILES[device.family][operands][kernel]


def candidates(kernel: str, device: Device, dtype: torch.dtype, rows: int, columns: int) -> list[dict[str, int]]:
    """The tiles of the device's family that are no larger than a result [rows, columns] needs, largest first."""
    tiles = _tiles(kernel, device, dtype)
    most = max(16, next_power_of_2(columns))
    if kernel in _GROUPED:
        tiles = [t for t in tiles if t[0] == rows]
    else:
        tiles = [t for t in tiles if t[0] <= max(16, next_power_of_2(rows))]
    tiles = [t for t in tiles if t[1] <= most] or tiles[-1:]
    return [dict(zip((*_BLOCKS[kernel], "num_warps", "num_stages"), t)) for t in tiles]


def tile(
    kernel: str, device: Device, dtype: torch.dtype, rows: int, columns: int, depth: int, copies: int = 1
) -> dict[str, int]:
    """Block sizes, num_warps and num_stages of `kernel` for `copies` products [rows, depth] x [depth, columns].

    Unless a table knows better: the largest tile that fits and gives nine multiprocessors in ten work, else the smallest.
    """
    if measured := _measured(device, kernel, dtype, rows, columns, depth):
        return measured
    for config in candidates(kernel, device, dtype, rows, columns):
        block_rows, block_columns, _ = (config[name] for name in _BLOCKS[kernel])
        tiles = math.ceil(rows / block_rows) * math.ceil(columns / block_columns) * copies
        if kernel in _SPLITTING or tiles >= 0.9 * device.multiprocessors:
            break
    return config


def group_block(tokens: int, n: int, device: Device, dtype: torch.dtype) -> int:
    """Entries of one block of the grouped kernels: the most that an expert's share of the tokens fills, at an even split."""
    blocks = sorted({t[0] for t in _tiles("gather", device, dtype)})
    return max((b for b in blocks if b * n <= tokens), default=blocks[0])


def entries(r: int) -> dict[str, int]:
    """Block sizes of the kernels that take each entry's r values by themselves: 16 a thread."""
    block_k = min(128, next_power_of_2(r))
    return {"BLOCK_E": 2048 // block_k, "BLOCK_K": block_k}


def split(depth: int, block: int, programs: int, device: Device) -> tuple[int, int]:
    """Into how many splits to cut a sum over `depth` so that `programs` times the splits fill the device; blocks of each."""
    blocks = math.ceil(depth / block)
    chunks = math.ceil(blocks / max(1, device.multiprocessors // programs))
    return math.ceil(blocks / chunks), chunks


def route(n: int, m: int, width: int) -> dict[str, int]:
    """Block sizes of the route kernel for n experts, m a token, `width` products an expert: 32 values of h a thread."""
    block_n, block_m = next_power_of_2(n), next_power_of_2(m)
    block_t = min(16, max(1, 256 // max(block_n, block_m)))
    block_k = min(next_power_of_2(width), max(1, 4096 // (block_t * block_n)))
    return {"BLOCK_N": block_n, "BLOCK_M": block_m, "BLOCK_T": block_t, "BLOCK_K": block_k}


def rank_block(r: int) -> int:
    """How much of an expert's rank one product of a tail takes."""
    return min(64, max(16, next_power_of_2(r)))


def apply_path(device: Device, dtype: torch.dtype, tokens: int, d: int, o: int, n: int, r: int, m: int) -> str:
    """How given experts are applied.

    "fused": base product and the tail of all experts present in one accumulator; "delta": the tail, then cuBLAS on top;
    "grouped": tokens grouped by expert, then cuBLAS on top.
    """
    if measured := _measured(device, "apply", dtype, tokens, d, o, n, r, m):
        return measured
    # The tail costs n * r of d; grouping costs six small launches and m passes over y.
    if tokens > 64 and n * r * 8 > d and n >= 4 * m:
        return "grouped"
    return "fused" if tokens <= 64 else "delta"


def linear_path(
    device: Device, dtype: torch.dtype, tokens: int, d: int, o: int, n: int, k: int, g: int, r: int, m: int
) -> str:
    """How a layer is routed whose router is the first g of each expert's k rows.

    "decode": all in two launches; "single": all in one; "together": one product of all rows, routed, then applied as `apply_path`
    says; "first": route by the router's rows alone, then apply.
    """
    if measured := _measured(device, "linear", dtype, tokens, d, o, n, k, g, r, m):
        return measured
    if tokens <= 16 and next_power_of_2(n) * next_power_of_2(k) <= 256:
        return "decode"
    if tokens > 64:
        return "first" if apply_path(device, dtype, tokens, d, o, n, r, m) == "grouped" else "together"
    # Two launches more cost what 8 MB of reading does.
    saved = n * k - n * g - min(n, tokens * m) * r
    return "first" if saved * d * dtype.itemsize > 8e6 else "together"


# Keys: what is chosen, the operand class, and each dimension's bucket; values: a tile, or the name of a path.
@functools.cache
def _tables() -> dict[str, dict]:
    tables: dict[str, dict] = {}
    for path in (Path(__file__).with_name("measured.json"), user_table()):
        if path.exists():
            for name, entries in json.loads(path.read_text()).items():
                tables.setdefault(name, {}).update(entries)
    return tables


def user_table() -> Path:
    """The user's own table: $XDG_CONFIG_HOME/smile_kernels/triton.json, by default under ~/.config."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "smile_kernels" / "triton.json"


def key(kind: str, dtype: torch.dtype, device: Device, *dimensions: int) -> str:
    """The entry of a table that covers these dimensions: each is rounded to a power of two."""
    numbers = "half" if dtype.itemsize == 2 else precision(dtype, device)
    return " ".join([kind, numbers, *(str(1 << round(math.log2(max(1, n)))) for n in dimensions)])


def _measured(device: Device, kind: str, dtype: torch.dtype, *dimensions: int):
    entries = _tables().get(device.name)
    return entries.get(key(kind, dtype, device, *dimensions)) if entries else None


# Counters of `decode`'s single launch, two for each launch in flight; every launch leaves its own at zero again.
_COUNTERS = 1 << 16
_counters: dict[torch.device, tuple[Tensor, dict[str, int]]] = {}


def arrivals(device: torch.device) -> Tensor:
    """Two counters at zero, [2] int32, that no other launch uses at the same time.

    Eager launches take turns over half of them, far more than streams queue. A launch captured in a CUDA graph keeps its own
    for good, as the graph may be replayed at any time.
    """
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    if device not in _counters and not capturing:
        _counters[device] = torch.zeros(_COUNTERS, 2, dtype=torch.int32, device=device), {"eager": 0, "captured": 0}
    counters, used = _counters.get(device, (None, {"captured": _COUNTERS // 2}))
    if not capturing:
        used["eager"] = (used["eager"] + 1) % (_COUNTERS // 2)
        return counters[used["eager"]]
    if used["captured"] == _COUNTERS // 2:
        return torch.zeros(2, dtype=torch.int32, device=device)
    used["captured"] += 1
    return counters[-used["captured"]]
