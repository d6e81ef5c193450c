"""Tables and plots from bench/results: python -m bench.report writes them into the documents.

A block is the text between <!-- bench:NAME --> and <!-- /bench -->, which is entirely generated.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from statistics import median

from smile_kernels.benchmark.command import describe
from smile_kernels.benchmark.measure import Record, geometric_mean, summary
from smile_kernels.benchmark.peers import BASELINE
from smile_kernels.publishing import new_file, write_text

from . import RESULTS, gpu_tables
from .gpu_tables import markdown
from .models import tokens_per_second
from .routing import mean

ROOT = Path(__file__).parent.parent
DOCUMENTS = (ROOT / "README.md", ROOT / "bench" / "README.md", ROOT / "docs" / "log.md")
NOT_MEASURED = "Not measured yet."
SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def load(results: Path = RESULTS) -> dict[str, dict[str, Record]]:
    """Device folder -> part -> the results of `bench.run`."""
    found: dict[str, dict[str, Record]] = {}
    for file in sorted(results.glob("*/*.json")):
        content = json.loads(file.read_text())
        if isinstance(content, dict) and {"machine", "limits", "records"} <= content.keys():
            if content["machine"].get("rehearsal"):
                raise ValueError(f"{file}: is a rehearsal of bench.gpu; expected measurements")
            found.setdefault(file.parent.name, {})[file.stem] = content
    return found


def summaries(part: Record) -> list[tuple[Record, dict[str, dict[str, float]]]]:
    """Every record of layers with its summary, with the limits for its number of threads."""
    limits = {rates["threads"]: rates for rates in part["limits"]}
    return [(record, summary(record, limits[record["threads"]])) for record in part["records"]]


def over_linear(part: Record, passes: str) -> str:
    """Time relative to F.linear of every peer; a row per layer, tokens and threads, a column per peer and dtype.

    Geometric means over the settings; a cell is empty if a setting was refused or could not run.
    """
    cells: dict[tuple[str, int, int], dict[tuple[str, str], list[float]]] = {}
    settings: dict[tuple[str, int, int], set[str]] = {}
    names: dict[str, None] = {}
    for record, peers in summaries(part):
        if record["pass"] != passes or record["name"].endswith("all peers"):
            continue
        key = (record["layer"], record["tokens"], record["threads"])
        settings.setdefault(key, set()).add(_setting(record))
        cell = cells.setdefault(key, {})
        for name, row in peers.items():
            if name != BASELINE:
                names[name] = None
                cell.setdefault((name, record["dtype"]), []).append(row["over_linear"])
        if passes == "forward":
            cell.setdefault(("floor", record["dtype"]), []).append(1 / peers[BASELINE]["over_floor"])
    if not cells:
        return NOT_MEASURED
    columns = [*names, *(["floor"] if passes == "forward" else [])]
    dtypes = list(dict.fromkeys(dtype for cell in cells.values() for _, dtype in cell))

    def shown(key: tuple[str, int, int], name: str) -> str:
        values = [cells[key].get((name, dtype), []) for dtype in dtypes]
        whole = [f"{geometric_mean(v):.2f}" if len(v) == len(settings[key]) else "–" for v in values]
        return " / ".join(whole)

    header = ["layer", "tokens", "threads", *(f"{n} {' / '.join(SHORT[d] for d in dtypes)}" for n in columns)]
    return markdown(header, [[key[0], str(key[1]), str(key[2]), *(shown(key, n) for n in columns)] for key in cells])


def peers_table(part: Record) -> str:
    """Every column of every peer, on the cases for all peers."""
    blocks = []
    for record, peers in summaries(part):
        if not record["name"].endswith("all peers"):
            continue
        rows = [
            [
                name,
                f"{row['us']:.1f}",
                f"±{row['spread']:.0%}",
                f"{row['over_linear']:.2f}",
                f"{row['over_floor']:.2f}",
                f"{row['tflops']:.3f}",
                f"{row['gbps']:.1f}",
                f"{row['memory'] / 2**20:.2f}",
            ]
            for name, row in peers.items()
        ]
        header = ["peer", "µs", "spread", "/ F.linear", "/ floor", "TFLOP/s", "GB/s", "MiB allocated"]
        blocks.append(f"{describe(record)}:\n\n{markdown(header, rows)}")
        reasons = _reasons(record["peers"])
        if reasons:
            blocks.append("\n".join(f"- {reason}" for reason in reasons))
    return "\n\n".join(blocks) or NOT_MEASURED


def slower(part: Record) -> str:
    """Cases in which another SMILE implementation is faster than every backend here by more than both spreads."""
    lines = []
    for record, peers in summaries(part):
        ours = {name: row for name, row in peers.items() if name.startswith("smile:")}
        others = {name: row for name, row in peers.items() if name not in ours and name != BASELINE}
        if not ours or not others:
            continue
        name, row = min(ours.items(), key=lambda item: item[1]["us"])
        for other, beside in others.items():
            if row["us"] > beside["us"] * (1 + row["spread"] + beside["spread"]):
                lines.append([describe(record), name, f"{row['us']:.1f}", other, f"{beside['us']:.1f}"])
    if not lines:
        return "Nowhere in these results."
    return markdown(["case", "our best", "µs", "faster", "µs"], lines)


def refused(part: Record) -> str:
    """Peers that were refused or could not run, with the reason and the number of records."""
    counts: dict[str, int] = {}
    for record in part["records"]:
        for reason in _reasons(record.get("peers") or record["variants"]):
            counts[reason] = counts.get(reason, 0) + 1
    return "\n".join(f"- {reason} ({n} of {len(part['records'])} cases)" for reason, n in counts.items()) or "Nothing."


def models_table(part: Record) -> str:
    """Whole models: tokens (images) per second and memory, a row per variant."""
    rows, notes = [], []
    for record in part["records"]:
        task = f"{record['requests']} requests"
        task += f" of {record['prompt']} + {record['decoded']} tokens" if record["decoded"] else ", one image each"
        for name, variant in record["variants"].items():
            if "prefill" not in variant:
                continue
            speeds = [
                f"{tokens_per_second(record, variant, phase):.1f}" if phase in variant else ""
                for phase in ("prefill", "decode")
            ]
            memory = [f"{variant[kind] / 2**20:.0f}" for kind in ("parameters", "memory")]
            rows.append([f"{record['model']}, {record['setting']}, {record['dtype']}, {task}", name, *speeds, *memory])
        notes += [f"- {record['model']}: {reason}" for reason in _reasons(record["variants"])]
    header = [
        "model",
        "variant",
        "prefill tokens (images) / s",
        "decode tokens / s",
        "parameters MiB",
        "peak beyond MiB",
    ]
    return "\n\n".join([markdown(header, rows), *(["\n".join(notes)] if notes else [])])


def construction_table(part: Record) -> str:
    """Seconds from weights to SMILE layers."""
    rows, notes = [], []
    for record in part["records"]:
        seconds = {name: median(p["wall_us"]) / 1e6 for name, p in record["peers"].items() if "wall_us" in p}
        ratio = f"{seconds['fusion_bench'] / seconds['smile']:.1f}" if "smile" in seconds else ""
        times = [f"{seconds[name]:.2f}" if name in seconds else "" for name in ("smile", "fusion_bench")]
        rows.append([f"{record['name']}, {record['setting']}", *times, ratio])
        notes += [f"- {record['name']}: {reason}" for reason in _reasons(record["peers"])]
    table = markdown(["from weights to SMILE layers", "smile_kernels s", "fusion_bench s", "times faster"], rows)
    return "\n\n".join([table, *(["\n".join(notes)] if notes else [])])


def svd_table(part: Record) -> str:
    """Process time of a truncated SVD, the peers' relative to ours, and the accuracy of ours and the closest peer."""
    rows = []
    for record in part["records"]:
        seconds = {name: median(peer["process_s"]) for name, peer in record["peers"].items()}
        ours, randomized = (record["peers"][name] for name in ("smile", "torch.svd_lowrank"))
        others = [f"{seconds[name] / seconds['smile']:.1f}" for name in seconds if name != "smile"]
        worth = [f"{max(ours[key], 0):.0e} / {max(randomized[key], 0):.0e}" for key in ("excess", "sine")]
        rows.append([f"{record['spectrum']}, {record['size']}", f"{seconds['smile']:.3f}", *others, *worth])
    others = [f"{name} / ours" for name in part["records"][0]["peers"] if name != "smile"]
    return markdown(["difference", "ours s", *others, "excess error, ours / lowrank", "router's sine"], rows)


def streaming_table(part: Record) -> str:
    """Peak memory of fusing checkpoints on disk."""
    rows = []
    for record in part["records"]:
        above = record["peak_bytes"] - record["idle_bytes"]
        sizes = [f"{record[name] / 1e6:.0f}" for name in ("base_bytes", "input_bytes")]
        layers = f"{above / record['largest_layer_bytes']:.0f}"
        rows.append([*sizes, str(record["workers"]), f"{above / 1e6:.0f}", layers, f"{record['seconds']:.0f}"])
    header = ["base MB", "read MB", "layers at a time", "peak above idle MB", "in largest layers", "seconds"]
    return markdown(header, rows)


def vllm_table(part: Record) -> str:
    """Milliseconds of CPU time of vLLM's engines, and the median ratios over the base."""
    rows = []
    for record in part["records"]:
        for name, peer in record["peers"].items():
            ratios = [f"{peer[f'over_first_{kind}']:.2f}" for kind in ("process_ms", "wall_ms")]
            rows.append([record["name"], name, f"{median(peer['process_ms']):.1f}", *ratios])
    return markdown(["case", "engine", "CPU ms", "over base, CPU time", "over base, wall time"], rows)


def routing_table(part: Record, tasks: int) -> str:
    """Accuracy of every rule for choosing experts on each set of texts, the mean over the seeds."""
    records = [record for record in part["records"] if len(record["tasks"]) == tasks]
    rows = []
    for way in dict.fromkeys(way for record in records for way in record["sets"]["prompted"]):
        of_sets = [[r["sets"][name][way] for r in records if way in r["sets"][name]] for name in records[0]["sets"]]
        rows.append([way, *(mean(*measured) for measured in of_sets)])
    return markdown([f"{tasks} tasks", *records[0]["sets"]], rows)


def routing_costs_table(part: Record, what: str) -> str:
    """Times relative to the first call, of models ("batch") or of a layer ("layer")."""
    rows, names = [], []
    for record in part["records"]:
        if what not in record:
            continue
        name = f"{record['batch']} × {record['length']} tokens" if what == "batch" else record["name"]
        names = list(record["peers"])[1:]
        rows.append([name, *(f"{record['peers'][peer]['over_first']:.2f}" for peer in names)])
    return markdown(["", *names], rows)


def _machine(part: Record) -> list[str]:
    """The machine, versions and commit of a part, and its limits: one line each."""
    machine = part["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    lines = [
        f"{machine['device']}, {machine['cores']} cores, {machine['clock_mhz']} MHz, load {machine['load']} at the "
        f"start; {versions}; commit {machine['commit']}; {machine['measured']}.\n"
    ]
    for rates in part["limits"]:
        matmul = ", ".join(f"{SHORT[dtype]} {rate / 1e12:.3f} TFLOP/s" for dtype, rate in rates["matmul"].items())
        read = ", ".join(f"{rate / 1e9:.0f} GB/s for {size / 2**20:.0f} MiB" for size, rate in rates["bandwidth"])
        lines.append(f"- {rates['threads']} threads: {matmul}; reading {read}")
    return lines


def machine_line(part: Record) -> str:
    """The machine, versions, commit and limits of layers measured on a CPU."""
    lines = _machine(part)
    waiting = [row["waiting"] for record, peers in summaries(part) for row in peers.values() if record["threads"] == 1]
    if waiting:
        usual, worst = median(waiting), max(waiting)
        lines.append(f"- one thread waited for a core {usual:.1%} of the time in the median row, at worst {worst:.0%}")
    return "\n".join(lines)


def gpu_machine_line(part: Record) -> str:
    """The GPU, versions, commit and limits of bench.gpu's results; empty if they were not measured."""
    return "\n".join(_machine(part)) if "device" in part["machine"] else ""


def plot(part: Record, file: Path) -> None:
    """Time relative to F.linear in the forward against tokens: a panel per layer and dtype, a line per peer."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "bench"
    from matplotlib import pyplot

    plotted = [
        (record, peers)
        for record, peers in summaries(part)
        if record["pass"] == "forward" and not record["name"].endswith("all peers")
    ]
    threads = max((record["threads"] for record, _ in plotted), default=None)
    lines: dict[tuple[str, str], dict[str, dict[int, list[float]]]] = {}
    for record, peers in plotted:
        if record["threads"] == threads:
            panel = lines.setdefault((record["layer"], record["dtype"]), {})
            for name, row in peers.items():
                if name != BASELINE:
                    panel.setdefault(name, {}).setdefault(record["tokens"], []).append(row["over_linear"])
    panels = {key: panel for key, panel in lines.items() if len({t for line in panel.values() for t in line}) > 1}
    columns = max(1, min(len(panels), 4))
    count = max(1, -(-len(panels) // columns))
    figure, axes = pyplot.subplots(
        count, columns, figsize=(4 * columns, 3.5 * count), squeeze=False, layout="constrained"
    )
    for axis, ((layer, dtype), panel) in zip(axes.flat, panels.items()):
        for name, line in panel.items():
            points = sorted((t, geometric_mean(values)) for t, values in line.items())
            axis.plot(*zip(*points), marker="o", label=name)
        axis.axhline(1, color="black", linewidth=1)
        axis.set(
            xscale="log", yscale="log", title=f"{layer}, {SHORT[dtype]}", xlabel="tokens", ylabel="time / F.linear"
        )
        ticks = (1, 1.5, 2, 3, 5, 10, 20)
        axis.set_yticks(ticks, [str(tick) for tick in ticks], minor=False)
        axis.minorticks_off()
        axis.legend(fontsize="x-small")
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    with new_file(file) as f:
        figure.savefig(f, format="svg", metadata={"Date": None})
    pyplot.close(figure)


# Device -> block -> its part of the results, and the function that writes it.
BLOCKS: dict[str, dict[str, tuple[str, Callable[[Record], str]]]] = {
    "cpu": {
        "forward": ("layers", lambda part: over_linear(part, "forward")),
        "backward": ("layers", lambda part: over_linear(part, "forward+backward")),
        "peers": ("layers", peers_table),
        "slower": ("layers", slower),
        "refused": ("layers", refused),
        "plot": ("layers", lambda _: "![Time over F.linear against tokens](/bench/results/cpu/forward.svg)"),
        "models": ("models", models_table),
        "construction": ("construction", construction_table),
        "svd": ("svd", svd_table),
        "streaming": ("streaming", streaming_table),
        "routing-6": ("routing", lambda part: routing_table(part, 6)),
        "routing-8": ("routing", lambda part: routing_table(part, 8)),
        "windows-6": ("windows", lambda part: routing_table(part, 6)),
        "windows-8": ("windows", lambda part: routing_table(part, 8)),
        "routing-models": ("routing_costs", lambda part: routing_costs_table(part, "batch")),
        "routing-layers": ("routing_costs", lambda part: routing_costs_table(part, "layer")),
        "vllm": ("vllm", vllm_table),
        "vllm-eager": ("vllm_eager", vllm_table),
        "vllm-bfloat16": ("vllm_bfloat16", vllm_table),
        "vllm-tiles": ("vllm_tiles", vllm_table),
        "machine": ("layers", machine_line),
    },
    "gpu": {
        "machine": ("triton", gpu_machine_line),
        "headline": ("triton", gpu_tables.headline),
        "checked": ("triton", lambda part: f"{gpu_tables.summary(part)}\n\n{gpu_tables.failures(part)}"),
        "graph": ("triton", lambda part: gpu_tables.forward(part, "graph")),
        "eager": ("triton", lambda part: gpu_tables.forward(part, "eager")),
        "training": ("triton", lambda part: gpu_tables.forward(part, "training")),
        "kernels": ("triton", gpu_tables.kernels),
        "aims": ("triton", lambda part: "\n".join(f"- {line}" for line in gpu_tables.aims(part))),
        "models": ("models", models_table),
        "construction": ("construction", construction_table),
    },
}


def block(name: str, results: dict[str, dict[str, Record]]) -> str:
    """The text of a block "<device>-<what>", where device is "cpu" or "gpu" (every folder that is not the CPU's).

    Raises:
        ValueError: no such block.
    """
    device, _, what = name.partition("-")
    if what not in BLOCKS.get(device, {}):
        known = ", ".join(f"{device}-{what}" for device, blocks in BLOCKS.items() for what in blocks)
        raise ValueError(f"bench:{name}: is unknown; expected one of {known}")
    part_name, render = BLOCKS[device][what]
    texts = []
    for folder, parts in results.items():
        if (folder == "cpu") != (device == "cpu") or part_name not in parts:
            continue
        if text := render(parts[part_name]):
            texts.append((f"{folder}:\n\n" if device == "gpu" else "") + text)
    return "\n\n".join(texts) or NOT_MEASURED


def fill(text: str, results: dict[str, dict[str, Record]]) -> str:
    """A document with its blocks generated."""

    def filled(match: re.Match[str]) -> str:
        return f"{match[1]}\n{block(match[2], results)}\n{match[3]}"

    return re.sub(r"(<!-- bench:([\w-]+) -->).*?(<!-- /bench -->)", filled, text, flags=re.DOTALL)


def main() -> None:
    results = load()
    plot(results["cpu"]["layers"], RESULTS / "cpu" / "forward.svg")
    for document in DOCUMENTS:
        text = document.read_text()
        write_text(document, fill(text, results))
        print(f"{document.relative_to(ROOT)}: {len(re.findall('<!-- bench:', text))} blocks")


def _setting(record: Record) -> str:
    names = ("num_local_experts", "rank_of_expert", "rank_of_router", "num_experts_per_tok")
    return " ".join(str(record[name]) for name in names)


def _reasons(peers: Record) -> list[str]:
    return [
        f"{name} {kind.replace('_', ' ')}: {peer[kind]}"
        for name, peer in peers.items()
        for kind in ("refused", "cannot_run")
        if kind in peer
    ]


if __name__ == "__main__":
    main()
