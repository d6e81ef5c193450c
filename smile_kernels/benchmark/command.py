"""`smile-kernels bench`: measure, show, and keep."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from ..errors import SmileError
from ..publishing import check_outputs, marked, write_plot, write_text
from .measure import Record, limits, machine, measure, summary
from .peers import BASELINE, PEERS
from .problems import Case, Setting, layer_shape

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def bench(
    layers: Sequence[str],
    tokens: Sequence[int],
    setting: Setting,
    *,
    dtype: str | None = None,
    device: str | None = None,
    peers: Sequence[str] = tuple(PEERS),
    backward: bool = False,
    graph: bool = False,
    seconds: float = 1.0,
    json_file: Path | None = None,
    plot_file: Path | None = None,
    console: Console | None = None,
) -> Record:
    """Time SMILE layers and their peers on this machine and print a table for every layer and number of tokens.

    Args:
        layers: names in `problems.LAYERS`, or "<in_features>x<out_features>".
        tokens: numbers of tokens.
        setting: N, r, g, m.
        dtype: "float32", "bfloat16" or "float16"; by default bfloat16 on a GPU, float32 on a CPU.
        device: "cpu" or "cuda"; by default the GPU where there is one.
        peers: names in `peers.PEERS`.
        backward: forward + backward instead of the forward alone.
        graph: replay CUDA graphs instead of launching eagerly.
        seconds: about how long to measure each table.
        json_file: where to write every sample.
        plot_file: where to draw time over F.linear against tokens; needs matplotlib.
        console: where to print.

    Returns:
        What `json_file` holds: "machine", "limits" and "records" (see `measure`).

    Raises:
        ValueError: an argument out of range; the message names it.
    """
    console = console or Console()
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype is None:
        dtype = "bfloat16" if device == "cuda" else "float32"
    _check(layers, tokens, setting, dtype, device, peers, graph)
    if not 0 < seconds < float("inf"):
        raise SmileError(f"seconds: is {seconds}; expected a number above 0")
    check_outputs(keys=("machine", "limits", "records"), plot=plot_file, json=json_file)
    cases = [Case(layer, setting, t, DTYPES[dtype]) for layer in layers for t in tokens]
    result: Record = {"machine": machine(device), "limits": [], "records": []}
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    shown = console if console.is_terminal else Console(stderr=True)
    with Progress(*columns, console=shown, transient=True, redirect_stdout=False) as progress:
        task = progress.add_task("the machine's limits", total=len(cases) + 1)
        result["limits"].append(limits(device, [DTYPES[dtype]], seconds))
        for case in cases:
            progress.update(task, advance=1, description=f"{case.layer}, {case.tokens} tokens")
            record = measure(case, peers, device=device, backward=backward, graph=graph, seconds=seconds)
            result["records"].append(record)
            show(record, result["limits"][0], console)
    console.print(footnote(result), highlight=False, soft_wrap=True)
    if json_file is not None:
        write_json(json_file, result)
    if plot_file is not None:
        plot(result, plot_file)
    return result


def _check(
    layers: Sequence[str],
    tokens: Sequence[int],
    setting: Setting,
    dtype: str,
    device: str,
    peers: Sequence[str],
    graph: bool,
) -> None:
    for layer in layers:
        in_features, out_features, _ = layer_shape(layer)
        most = {
            "num_local_experts": None,
            "rank_of_expert": min(in_features, out_features),
            "rank_of_router": in_features,
            "num_experts_per_tok": setting.num_local_experts,
        }
        for name, limit in most.items():
            value = getattr(setting, name)
            if value < 1 or (limit is not None and value > limit):
                raise SmileError(f"{name}: is {value}; expected 1 {'or more' if limit is None else f'to {limit}'}")
    for t in tokens:
        if t < 1:
            raise SmileError(f"tokens: is {t}; expected 1 or more")
    for name, value, known in (("dtype", dtype, DTYPES), ("device", device, ("cpu", "cuda"))):
        if value not in known:
            raise SmileError(f"{name}: is {value!r}; expected one of {', '.join(known)}")
    for peer in peers:
        if peer not in PEERS:
            raise SmileError(f"peers: {peer!r} is unknown; expected some of {', '.join(PEERS)}")
    if device == "cuda" and not torch.cuda.is_available():
        raise SmileError(f"device: is 'cuda'; torch {torch.__version__} sees no GPU here")
    if graph and device != "cuda":
        raise SmileError("graph: CUDA graphs need device 'cuda'")


def describe(record: Record) -> str:
    """One line on what a record is about."""
    in_features, out_features, _ = layer_shape(record["layer"])
    setting = Setting(*(record[name] for name in Setting.__dataclass_fields__))
    return (
        f"{record['layer']} ({in_features} to {out_features}), {setting}, {record['tokens']} tokens, "
        f"{record['dtype']}, {record['pass']}, {record['mode']}, {record['threads']} threads"
    )


def show(record: Record, limits: Record, console: Console) -> None:
    """Print one record: a table with one row per peer, and why other peers have none."""
    shown = Table(box=None, pad_edge=False)
    shown.add_column("peer", no_wrap=True)
    for column in ("µs", "spread", "/linear", "/floor", "TFLOP/s", "GB/s", "MiB"):
        shown.add_column(column, justify="right", no_wrap=True)
    for name, row in summary(record, limits).items():
        shown.add_row(
            name,
            f"{row['us']:.1f}" if row["us"] < 1e4 else f"{row['us']:.0f}",
            f"±{row['spread']:.0%}",
            f"{row['over_linear']:.2f}",
            f"{row['over_floor']:.2f}",
            f"{row['tflops']:.3f}",
            f"{row['gbps']:.1f}",
            f"{row['memory'] / 2**20:.2f}",
        )
    console.print(describe(record), markup=False, highlight=False, soft_wrap=True)
    console.print(shown)
    for name, peer in record["peers"].items():
        for kind in ("refused", "cannot_run"):
            if kind in peer:
                reason = f"{name}: {kind.replace('_', ' ')}: {peer[kind]}"
                console.print(reason, markup=False, highlight=False, soft_wrap=True)
    console.print()


def footnote(result: Record) -> str:
    """The machine, its limits, and the meaning of the columns."""
    m, measured = result["machine"], result["limits"][0]
    rates = ", ".join(f"{dtype} {rate / 1e12:.2f} TFLOP/s" for dtype, rate in measured["matmul"].items())
    smallest, largest = measured["bandwidth"][0], measured["bandwidth"][-1]
    waiting = max((p["waiting"] for r in result["records"] for p in summary(r, measured).values()), default=0.0)
    busy = f"\nOther work ran on the machine: up to {waiting:.0%} of the time was spent waiting for a core." * (
        waiting > 0.1
    )
    return (
        f"{m['device']}, torch {m['versions']['torch']}, commit {m['commit']}; measured limits: {rates}, "
        f"{largest[1] / 1e9:.0f} GB/s from memory ({smallest[1] / 1e9:.0f} GB/s for {smallest[0] / 2**20:.0f} MiB).\n"
        f"µs: median of interleaved rounds; spread: half the interquartile range; /linear: relative to {BASELINE}, "
        "median of the ratios of each round; /floor: relative to the time of the minimum bytes and FLOPs at the "
        f"measured limits; MiB: allocated by the call, including the output.{busy}"
    )


def write_json(file: Path, result: Record) -> None:
    """Write atomically, one record per line."""
    lines = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in marked(result).items() if name != "records"]
    records = ",\n".join(json.dumps(record) for record in result["records"])
    write_text(file, "{" + ",\n".join([*lines, f'"records": [\n{records}\n]']) + "}\n")


def plot(result: Record, file: Path) -> None:
    """Time relative to F.linear against tokens, a panel per layer, a line per peer."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    layers = list(dict.fromkeys(record["layer"] for record in result["records"]))
    figure, axes = pyplot.subplots(1, len(layers), figsize=(5.5 * len(layers), 4), squeeze=False, layout="constrained")
    for axis, layer in zip(axes[0], layers):
        lines: dict[str, list[tuple[int, float]]] = {}
        for record in result["records"]:
            if record["layer"] == layer:
                for name, row in summary(record, result["limits"][0]).items():
                    lines.setdefault(name, []).append((record["tokens"], row["over_linear"]))
        for name, points in lines.items():
            axis.plot(*zip(*sorted(points)), label=name, marker="o", color="black" if name == BASELINE else None)
        axis.set(xscale="log", yscale="log", title=layer, xlabel="tokens", ylabel="time / F.linear")
        axis.legend(fontsize="small")
    write_plot(file, figure)
    pyplot.close(figure)
