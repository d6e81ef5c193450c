"""`inspect`: the contents of a SMILE checkpoint, as a dict, a table and a plot."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from .checkpoint import REPORT
from .config import FACTORS, read_smile_config
from .errors import SmileError
from .publishing import write_plot
from .schema import check_arguments, parse
from .storage import read_json, read_tensors
from .upscaling.report import kind_of

__all__ = ["KEYS", "describe"]

KEYS = ("folder", "config", "bytes", "layers")  # of what `describe` returns


@dataclass(frozen=True)
class _LayerEnergies:
    name: str
    energy: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class _Energies:
    """The part of a report that `describe` returns."""

    layers: list[_LayerEnergies] = field(default_factory=list)


@check_arguments
def describe(folder: str | Path) -> dict[str, Any]:
    """Contents of a SMILE checkpoint, as `smile-kernels inspect` shows them; can be stored as JSON.

    Returns:
        A dict with `folder`; `config`, as in `SmileConfig`; `bytes` of the upscaled layers' base, of their experts and
        of other tensors; and `layers`: name, in_features, out_features, ranks and bytes of the experts; norm, ||s_i||
        of each expert; energy, the share each captures (empty without smile_report.json); s, the mean over experts.

    Raises:
        ValueError, FileNotFoundError: not a SMILE checkpoint, or a tensor is missing.
    """
    stored, config = read_tensors(folder), read_smile_config(folder)
    report = Path(folder) / REPORT
    records = parse(_Energies, read_json(report), str(report)).layers if report.exists() else []
    energies = {record.name: record.energy for record in records}
    layers, sizes = [], {"base": 0, "experts": 0, "other": 0}
    for name, entry in config.modules.items():
        n, r = config.num_local_experts, entry.rank_of_expert
        for factor, expected in {"vh": (n, "k", "D"), "s": (n, r), "u": (n, "O", r)}.items():
            if f"{name}.{factor}" not in stored:
                raise SmileError(f"{folder}: tensor {name}.{factor} is missing; config.json says it is there")
            shape = stored[f"{name}.{factor}"].shape
            fit = [a == b or (isinstance(b, str) and a > 0) for a, b in zip(shape, expected)]
            if len(shape) != len(expected) or not all(fit):
                wanted = ", ".join(map(str, expected))
                raise SmileError(f"{folder}: tensor {name}.{factor} is {list(shape)}; expected [{wanted}]")
        s = stored[f"{name}.s"].load().double()
        experts = sum(stored[key].nbytes for factor in FACTORS if (key := f"{name}.{factor}") in stored)
        sizes["experts"] += experts
        layers.append(
            {
                "name": name,
                "in_features": stored[f"{name}.vh"].shape[2],
                "out_features": stored[f"{name}.u"].shape[1],
                "rank_of_expert": entry.rank_of_expert,
                "rank_of_router": entry.rank_of_router,
                "bytes": experts,
                "norm": s.norm(dim=1).tolist(),
                "energy": energies.get(name, []),
                "s": s.mean(dim=0).tolist(),
            }
        )
    for key, tensor in stored.items():  # a quantised weight is stored as several tensors
        layer, _, part = key.rpartition(".")
        sizes["base"] += tensor.nbytes if layer in config.modules and part not in FACTORS else 0
    sizes["other"] = sum(tensor.nbytes for tensor in stored.values()) - sizes["base"] - sizes["experts"]
    return {"folder": str(folder), "config": config.to_dict(), "bytes": sizes, "layers": layers}


def show(description: dict[str, Any], console: Console, every: bool) -> None:
    """Print sizes, experts, and a table of kinds of layers or of every layer."""
    smile = description["config"]
    console.print(
        f"{description['folder']}: {len(description['layers'])} SMILE layers, {smile['num_local_experts']} experts, "
        f"{smile['num_experts_per_tok']} per token",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    for name in ("base", "experts", "other"):
        console.print(f"  {name:8}{_bytes(description['bytes'][name]):>10}", highlight=False)
    if names := smile.get("expert_names"):
        listed = ", ".join(f"{i} {name}" for i, name in enumerate(names))
        console.print(f"  experts: {listed}", markup=False, highlight=False, soft_wrap=True)
    if base := smile.get("base_model_name_or_path"):
        console.print(f"  experts only; base: {base}", markup=False, highlight=False, soft_wrap=True)
    kinds: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for layer in description["layers"]:
        name = layer["name"] if every else kind_of(layer["name"])
        shape = f"{layer['out_features']}x{layer['in_features']}" if layer["out_features"] else "?"
        kinds.setdefault((name, shape), []).append(layer)
    columns = [Column(name, no_wrap=True) for name in ("shape", "r", "g", "experts", "change", "energy")]
    table = Table(Column("layer", overflow="fold"), *columns, box=None, pad_edge=False)
    if not every:
        table.add_column("layers", justify="right")
    for (name, shape), layers in kinds.items():
        energies = [energy for layer in layers for energy in layer["energy"]]
        row = (
            name,
            shape,
            _span([layer["rank_of_expert"] for layer in layers], "{}"),
            _span([layer["rank_of_router"] for layer in layers], "{}"),
            _bytes(sum(layer["bytes"] for layer in layers)),
            _span([norm for layer in layers for norm in layer["norm"]], "{:.3g}"),
            _span(energies, "{:.1%}") if energies else "-",
        )
        table.add_row(*row, *([] if every else [str(len(layers))]))
    console.print(table)


def _span(values: Sequence[float], form: str) -> str:
    low, high = form.format(min(values)), form.format(max(values))
    return low if low == high else f"{low}-{high}"


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


def plot_layers(description: dict[str, Any], file: Path) -> None:
    """Draw the singular values of each layer and the energy that its experts capture."""
    import matplotlib
    from matplotlib.figure import Figure

    layers = description["layers"]
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    shades = matplotlib.colormaps["viridis"]([i / max(1, len(layers) - 1) for i in range(len(layers))])
    for layer, shade in zip(layers, shades):
        left.plot(range(1, len(layer["s"]) + 1), layer["s"], color=shade, linewidth=0.8)
    left.set(xlabel="singular value", ylabel="size, mean over experts", yscale="log", title="Singular values, by layer")
    known = [(i, energy) for i, layer in enumerate(layers) for energy in layer["energy"]]
    if known:
        right.plot(*zip(*known), ".", markersize=4)
    right.set(xlabel="layer", ylabel="captured energy", title="Captured energy, by layer and expert")
    write_plot(file, figure)
