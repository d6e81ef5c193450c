"""Bytes and FLOPs of each Triton kernel, and the predicted time of a layer relative to the dense one.

    python -m bench.cost                                # the tables of predictions
    python -m bench.cost --write                        # the same, into bench/NOTES.md

`Case.work` is the minimum for every implementation; this module counts what these kernels do, a `Work` for each launch.
"""

import argparse
import itertools
import re
from dataclasses import astuple
from pathlib import Path

import torch

from smile_kernels.benchmark.problems import Case, Setting, Work, product
from smile_kernels.ops.triton import configs
from smile_kernels.ops.triton.common import cdiv
from smile_kernels.publishing import write_text

NOTES = Path(__file__).with_name("NOTES.md")

# The cases of bench/gpu.py and of the predictions.
SETTINGS = [Setting(8, 32, 16), Setting(8, 128, 16), Setting(8, 32, 16, 2), Setting(3, 512, 8), Setting(64, 64, 8)]
LAYERS = ["mistral-7b.q", "mistral-7b.up", "mistral-7b.down", "clip-b32.attn"]
TOKENS = [1, 4, 16, 32, 64, 128, 256, 512, 2048, 8192]
TRAINED = [Case("mistral-7b.q", SETTINGS[i], t, torch.bfloat16) for i in (0, 2, 4) for t in (2048, 8192)]

# Of an H200: published rates times the fractions that `configs` assumes; not measured.
DEVICE = configs.Device("H200", "sm90", 132, pdl=True, tma=True)
BANDWIDTH, RATE, RAMP = configs.BANDWIDTH, configs.RATE, configs.RAMP
OVERLAPPED = ("stream", "route", "selected", "scale", "expand", "tail", "dh", "dx tail")
OVERLAPPED_GROUPED = ("schedule", "sort", "gather", "scaled", "scatter", "a", "ds", "du", "dexpert_bias")
# Host seconds for a launch of a Triton kernel, for the rest of a call, and for F.linear: bench/host.py's measurements
# on a CPU, and about 3 microseconds per launch for the CUDA driver, assumed.
LAUNCH, OPERATOR, LINEAR = 8e-6, 25e-6, 5e-6


def _low_rank(case: Case, rows: int, splits: int, depth: int | None = None) -> Work:
    """x, or dy of another depth, and `rows` rows are read, the partial sums are written in float32."""
    d, t = depth or case.shape[0], case.tokens
    return Work(case.dtype.itemsize * (t + rows) * d + 4 * splits * t * rows, product(t, d, rows))


def _tail(case: Case, columns: int, biases: int, block: int) -> Work:
    """The scaled products, zeros for experts a token did not choose, times the factors of the experts present."""
    t, size, (n, r, _, _) = case.tokens, case.dtype.itemsize, astuple(case.setting)
    present, chosen = round(case.present(min(t, block))), round(case.present())
    read = size * (t * (present * r + n * biases) + (chosen * r + n * biases) * columns)
    return Work(read, product(t, present * r + n * biases, columns))


def _group(case: Case, entries: int) -> dict[str, Work]:
    """ids are read twice, the order is written; the rest is a few numbers per expert."""
    return {"count": Work(4 * entries, 0), "schedule": Work(0, 0), "sort": Work(8 * entries, 0)}


def _scatter(case: Case, name: str, r: int, columns: int, biases: int) -> dict[str, Work]:
    """A launch for each slot: the first writes its rows of the result, the others add to it."""
    t, m, size = case.tokens, case.setting.num_experts_per_tok, case.dtype.itemsize
    chosen = round(case.present()) / m
    return {
        f"{name} {j}": Work(
            size * (t * r + round(chosen * (r + biases) * columns) + (1 + (j > 0)) * t * columns),
            product(t, r, columns),
        )
        for j in range(m)
    }


def kernels(case: Case, linear: str, apply: str, splits: int = 1, block: int = 128) -> dict[str, Work]:
    """The launches of one forward, in order: name -> work.

    Args:
        case: the layer and the batch; the router is the first rows of each expert.
        linear: how it is routed, one of `configs.LINEAR_PATHS` (see `configs.linear_path`).
        apply: how the experts are applied, one of `configs.APPLY_PATHS` (see `configs.apply_path`).
        splits: parts into which the sum over D of the first low-rank product is cut.
        block: tokens of a block of the tail, which covers all experts present in it.
    """
    for name, value, known in (("linear", linear, configs.LINEAR_PATHS), ("apply", apply, configs.APPLY_PATHS)):
        if value not in known:
            raise ValueError(f"{name}: is {value!r}; expected {', '.join(known)}")
    (_, o, bias), t, size = case.shape, case.tokens, case.dtype.itemsize
    n, r, g, m = astuple(case.setting)
    k, chosen, base = max(r, g), round(case.present()), case.dense()
    routing = 8 * t * m
    if linear in ("decode", "decode_one_launch"):
        # The first half also adds its partial sums and scales them; the second reads u of all experts.
        handed_on = Work(size * t * n * r + 4 * t * n * bias, 0)
        shrink = _low_rank(case, n * k, splits) + Work(4 * splits * t * n * k + 4 * n * r + routing, 0) + handed_on
        stream = base + Work(size * n * o * (r + bias), product(t, n * r, o)) + handed_on
        return {"shrink": shrink, "stream": stream} if linear == "decode" else {"shrink, stream": shrink + stream}

    again = Work(size * t * o, 0)  # one kernel writes y, another reads it
    found = {}
    if linear == "route_first":
        found["gate"] = _low_rank(case, n * g, splits)
        found["route"] = Work(4 * splits * t * n * g + routing, 2 * t * n * g)
        if apply == "grouped":
            gather = Work(size * (t * m + chosen * r) * case.shape[0], product(t * m, case.shape[0], r))
            return {
                **found,
                **_group(case, t * m),
                "gather": gather + Work(4 * t * m * r, 0),
                "scaled": Work((4 + size) * t * m * r, t * m * r),
                **_scatter(case, "scatter", r, o, bias),
                "base": base + again,
            }
        found["selected shrink"] = _low_rank(case, chosen * r, splits)
        found["scale"] = Work(routing, 0)
    else:
        found["shrink"] = _low_rank(case, n * k, splits)
        found["route and scale"] = Work(4 * splits * t * n * g + routing, 2 * t * n * g)
    # The scaled products are zero for experts that a token did not choose.
    last = list(found)[-1]
    found[last] += Work(4 * splits * t * m * r + size * t * n * (r + bias), t * m * r)
    tail = _tail(case, o, bias, block)
    # "one_product" computes every product, so nothing is grouped.
    if apply in ("delta", "grouped"):
        return {**found, "tail": tail + again, "base": base + again}
    return {**found, "expand": base + tail}


def backward(case: Case, apply: str, block: int = 128) -> dict[str, Work]:
    """The launches of the backward for every gradient, in order: name -> work.

    Args:
        case: the layer and the batch; the router is the first rows of each expert, and no more than the expert has.
        apply: as for the forward; "grouped" groups the tokens here too, otherwise each expert processes all tokens.
        block: tokens of a block of the tail, which covers all experts present in it.
    """
    (d, o, bias), t, size = case.shape, case.tokens, case.dtype.itemsize
    n, r, g, m = astuple(case.setting)
    if g > r:
        raise ValueError(f"case: has a router of rank {g}; expected at most {r}, that of its experts")
    grouped = apply == "grouped"
    chosen, entries, product_of = round(case.present()), t * m, case.dense()
    columns, taken = (m, entries) if grouped else (n, t * n)

    def outer(rank: int, columns: int) -> Work:
        reads = entries * (rank + columns) if grouped else t * (n * rank + columns)
        return Work(size * (reads + n * rank * columns), product(taken, rank, columns))

    def products(rank: int) -> Work:
        if grouped:
            return Work(size * (entries + chosen * rank) * o + 4 * entries * rank, product(entries, o, rank))
        return _low_rank(case, n * rank, 1, o)

    found = {"dweight": product_of}
    if bias:
        found["dbias"] = Work(size * (t + 1) * o, t * o)
    if grouped:
        found |= _group(case, entries)
    found["a"] = products(r)
    if bias and m > 1:
        found["a of the biases"] = products(1)
    # The router's gradient reads a and h once more; dh, the scaled products and parts of ds are written.
    shares = 4 * (entries if grouped else t / configs.route_blocks(n, m, r)["BLOCK_T"] * n) * r
    found["dh"] = Work(round(4 * 2 * entries * r + 2 * size * t * columns * r + shares), 6 * entries * r)
    if grouped:
        found |= _scatter(case, "dx tail", r, d, 0)
    else:
        found["dx tail"] = _tail(case, d, 0, block) + Work(size * t * d, 0)
    found |= {"dx": product_of + Work(size * t * d, 0), "dvh": outer(r, d)}
    found["ds"] = Work(round(shares + 4 * n * r), entries * r)
    found["du"] = outer(r, o)
    if not grouped:
        found["du transposed"] = Work(2 * size * n * r * o, 0)
    if bias:
        found["dexpert_bias"] = outer(1, o)
    return found


def chosen_paths(case: Case, device: configs.Device, save: bool = False) -> tuple[str, str]:
    """(linear, apply): the paths that the heuristics select for a case."""
    (d, o, _), t = case.shape, case.tokens
    n, r, g, m = astuple(case.setting)
    linear = configs.linear_path(device, case.dtype, t, d, o, n, max(r, g), g, r, m, save)
    return linear, configs.apply_path(device, case.dtype, t, d, o, n, r, m)


def _first_product(case: Case, linear: str, device: configs.Device) -> tuple[int, configs.Tile, int]:
    """The first low-rank product: its rows, its tile, and the parts into which the launchers cut its sum over D."""
    (d, o, _), t = case.shape, case.tokens
    n, r, g, _ = astuple(case.setting)
    rows = n * (g if linear == "route_first" else max(r, g))
    if linear in ("decode", "decode_one_launch"):
        tile = configs.tile("decode", device, case.dtype, t, o, d)
        programs = cdiv(rows, tile["BLOCK_O"])
    else:
        tile = configs.tile("shrink", device, case.dtype, t, rows, d)
        programs = cdiv(t, tile["BLOCK_T"]) * cdiv(rows, tile["BLOCK_R"])
    return rows, tile, configs.split_depth(d, tile["BLOCK_D"], programs, device)[0]


def splits(case: Case, linear: str, device: configs.Device) -> int:
    """Parts into which the launchers cut the sum over D of the first low-rank product."""
    return _first_product(case, linear, device)[2]


def in_tiles(case: Case, linear: str, device: configs.Device = DEVICE) -> dict[str, float]:
    """Launch -> the minimum seconds of its product in the selected tiles, which read operands from the cache."""
    (d, o, _), t, size = case.shape, case.tokens, case.dtype.itemsize
    rows, tile, parts = _first_product(case, linear, device)
    names = configs.BLOCKS["decode" if linear.startswith("decode") else "shrink"]
    first = configs.product_seconds(device, t, d, rows, size, tile[names[0]], tile[names[1]], parts)
    wide = tile if linear.startswith("decode") else configs.tile("expand", device, case.dtype, t, o, d)
    base = configs.product_seconds(device, t, d, o, size, wide["BLOCK_T"], wide["BLOCK_O"])
    if linear.startswith("decode"):  # the second half uses the other multiprocessors
        ours = {"stream": base, "shrink, stream": base}
    else:
        ours = {"shrink": first, "gate": first, "expand": base}
    library = configs.library_seconds(device, t, d, o, size)
    return ours | dict.fromkeys(("base", "dense", "y", "dx", "dweight"), library)


def seconds(works: dict[str, Work], least: dict[str, float]) -> float:
    """The time of consecutive launches in a CUDA graph: the floor of each, plus start-up times that do not overlap.

    least: launch -> seconds, for launches whose tiles take longer than the floor.
    """
    overlapped = OVERLAPPED + OVERLAPPED_GROUPED if "sort" in works else OVERLAPPED
    return sum(
        max(work.floor(BANDWIDTH, RATE), least.get(name, 0)) + RAMP * (not name.startswith(overlapped))
        for name, work in works.items()
    )


def predicted(case: Case, graph: bool = True) -> float:
    """The time of the paths that the heuristics select, relative to F.linear: in CUDA graphs, or eager."""
    linear, apply = chosen_paths(case, DEVICE)
    works, least = kernels(case, linear, apply, splits(case, linear, DEVICE)), in_tiles(case, linear)
    ours, dense = seconds(works, least), seconds({"dense": case.dense()}, least)
    if graph:
        return ours / dense
    return max(ours, OPERATOR + LAUNCH * len(works)) / max(dense, LINEAR)


def floor_ratio(case: Case, training: bool = False) -> float:
    """The minimum time of the layer relative to the minimum time of the dense one."""
    return case.work(backward=training).floor(BANDWIDTH, RATE) / case.dense(training).floor(BANDWIDTH, RATE)


def _table(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows])


def tables() -> dict[str, str]:
    """Name -> table of predictions in Markdown."""
    letters = {
        "decode": "d",
        "one_product fused": "f",
        "one_product delta": "c",
        "route_first fused": "s",
        "route_first delta": "t",
        "route_first grouped": "g",
    }
    found = {}
    for mode, graph, columns in (("graph", True, TOKENS), ("eager", False, [1, 4, 16, 64])):
        rows = []
        for layer, setting in itertools.product(LAYERS, SETTINGS):
            cells = []
            for t in columns:
                case = Case(layer, setting, t, torch.bfloat16)
                linear, apply = chosen_paths(case, DEVICE)
                path = letters[linear if linear == "decode" else f"{linear} {apply}"]
                cells.append(f"{floor_ratio(case):.2f} → {predicted(case, graph):.2f} {path}")
            rows.append([layer, str(setting), *cells])
        found[mode] = _table(["layer", "setting", *(f"T {t}" for t in columns)], rows)
    rows = []
    for case in TRAINED:
        linear, apply = chosen_paths(case, DEVICE, save=True)
        forward = kernels(case, linear, apply, splits(case, linear, DEVICE))
        least = in_tiles(case, linear)
        ours = seconds(forward, least) + seconds(backward(case, apply), least)
        dense = seconds(dict.fromkeys(("y", "dx", "dweight"), case.dense()), least)
        ratio = floor_ratio(case, training=True)
        rows.append([case.layer, str(case.setting), str(case.tokens), f"{ratio:.2f}", f"{ours / dense:.2f}"])
    header = ["layer", "setting", "T", "floor", "predicted"]
    found["training"] = _table(header, rows)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="into bench/NOTES.md")
    if not parser.parse_args().write:
        print(*itertools.chain.from_iterable(tables().items()), sep="\n\n")
        return
    text = NOTES.read_text()
    for name, table in tables().items():
        block = rf"(<!-- predicted:{name} -->\n).*?(<!-- /predicted -->)"
        text = re.sub(block, lambda match, table=table: f"{match[1]}{table}\n{match[2]}", text, flags=re.DOTALL)
    write_text(NOTES, text)


if __name__ == "__main__":
    main()
