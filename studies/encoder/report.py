"""The results of `run.study` (its JSON) as tables, as Markdown, and as a plot."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import matplotlib
import torch
from matplotlib.figure import Figure

from .. import report as shared
from ..report import TableRows
from .routing import PUBLISHED

MERGED = ("simple averaging", "task arithmetic", "TIES", "TSV-Merge", "Iso-C", "Fisher merging", "RegMean")
MERGED += ("AdaMerging, by task", "AdaMerging, by layer")
SETTINGS, BY_LAYER = "Settings chosen on the validation splits", "Tokens at their own expert, %, by layer"
CHOSEN = ("scale", "density", "kept", "steps")  # the settings


def averages(row: dict) -> list[float]:
    """Average accuracy over the tasks, in percent, of each seed of a row."""
    return [statistics.fmean(run["accuracy"]) for run in row["runs"]]


def _spread(values: Sequence[float], digits: int = 1) -> str:
    """Mean over seeds, with the standard deviation where there is more than one seed."""
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def tables(results: dict) -> list[TableRows]:
    """Every table of the study: tasks, accuracy, routing by layer, time, fidelity to a published fine-tune."""
    rows = results["rows"]
    individual = statistics.fmean(averages(next(row for row in rows if row["name"] == "individual")))
    smile = [row for row in rows if row["runs"][0]["own_expert"] and "oracle" not in row["name"]]

    def mean(row: dict, key: str) -> float:
        return statistics.fmean(run[key] for run in row["runs"])

    def share(row: dict, layers: Sequence[str]) -> str:
        return f"{statistics.fmean(run['own_expert'][name] for run in row['runs'] for name in layers):.0f}"

    accuracy = []
    for row in rows:
        by_task = [f"{statistics.fmean(scores):.1f}" for scores in zip(*(run["accuracy"] for run in row["runs"]))]
        kept = f"{100 * statistics.fmean(averages(row)) / individual:.1f}"
        own = share(row, list(row["runs"][0]["own_expert"])) if row["runs"][0]["own_expert"] else "–"
        captured = f"{mean(row, 'energy_mean'):.0f}" if "energy_mean" in row["runs"][0] else "–"
        accuracy.append(
            [row["name"], *by_task, _spread(averages(row)), kept, f"{row['parameters']:.2f}×", own, captured]
        )
    merged = [row for row in rows if row["name"] in MERGED]
    margins = [
        [row["name"], *(_spread([a - b for a, b in zip(averages(row), averages(other))]) for other in merged)]
        for row in rows
        if row["runs"][0]["own_expert"]
    ]
    chosen = [
        [
            row["name"],
            str(seed),
            ", ".join(f"{key} {run[key]:g}" for key in CHOSEN if key in run),
            f"{run['validation']:.1f}",
        ]
        for row in rows
        for seed, run in enumerate(row["runs"])
        if "validation" in run
    ]
    layers = list(smile[0]["runs"][0]["own_expert"])
    routing = [[name, *(share(row, [name]) for row in smile)] for name in layers]
    timing = [
        [t["name"], f"{t['milliseconds']:.1f}", f"{t['ratio']:.2f}×"]
        if t["milliseconds"]
        else [t["name"], t["missing"], "–"]
        for t in results["time"]
    ]
    return [
        _task_table(results),
        (
            "Accuracy on held-out texts, %",
            [
                "",
                *(t["name"] for t in results["tasks"]),
                "average",
                "% of individual",
                "parameters",
                "own expert, %",
                "energy, %",
            ],
            accuracy,
        ),
        ("Points above the merged models, on average", ["", *(row["name"] for row in merged)], margins),
        _routing_table(results["routing"]),
        _cost_table(results),
        (SETTINGS, ["", "seed", "settings", "validation, %"], chosen),
        (BY_LAYER, ["layer", *(row["name"] for row in smile)], routing),
        ("CPU time to encode one batch of 32 texts on one thread", ["", "ms", "over the plain encoder"], timing),
        _fidelity_table(results),
    ]


def _cost_table(results: dict) -> TableRows:
    """The requirements of each method; a merged model has the layers, and so the time, of the plain encoder."""
    ratios = {t["name"]: f"{t['ratio']:.2f}×" for t in results["time"] if t["ratio"]}
    rows = [
        [
            row["name"],
            f"{row['parameters']:.2f}×",
            row["runs"][0]["data"],
            str(row["runs"][0]["passes"]),
            f"{statistics.fmean(run['seconds'] for run in row['runs']):.1f}",
            ratios.get(row["name"], "as plain" if row["name"] in MERGED else "–"),
        ]
        for row in results["rows"]
        if not row["name"].startswith("base")
    ]
    columns = [
        "",
        "parameters",
        "data in addition to the fine-tuned models",
        "passes",
        "CPU seconds to build",
        "time per batch",
    ]
    return "What each method needs", columns, rows


def _routing_table(sets: dict) -> TableRows:
    """Accuracy on each set of texts, and in brackets the paired difference to the published routing."""

    def cell(rows: dict, name: str) -> str:
        right = rows[name]["right"]
        mean = f"{shared.stratified([shared.row_scores(of) for of in right.values()])[0]:.1f}"
        if name == PUBLISHED:
            return mean
        points, error = shared.difference(right, rows[PUBLISHED]["right"])
        return f"{mean} ({points:+.1f} ± {error:.1f})"

    rows = [[name, *(cell(of, name) for of in sets.values())] for name in next(iter(sets.values()))]
    return "Accuracy by routing on four sets of texts, % (points above the published routing)", ["", *sets], rows


def _task_table(results: dict) -> TableRows:
    numbers = ("classes", "train", "validation", "test")
    rows = [
        [t["name"], f"“{t['prompt'].strip()}”", t["package"], *(str(t[k]) for k in numbers)] for t in results["tasks"]
    ]
    return "Tasks", ["task", "prompt", "package", *numbers], rows


def _fidelity_table(results: dict) -> TableRows:
    rows = [
        [
            {0: "base", -1: "full"}.get(f["rank"], str(f["rank"])),
            f"{f['cosine']:.4f}",
            f"{f['parameters']:.2f}×",
            f"{f['energy_mean']:.0f}" if "energy_mean" in f else "–",
        ]
        for f in results["fidelity"]
    ]
    columns = ["rank", "mean cosine", "parameters", "energy, %"]
    return "Embeddings of a published fine-tune (sre-embedding-model)", columns, rows


def markdown(results: dict, details: bool = False) -> str:
    """The tables as Markdown; with `details`, the chosen settings and routing by layer, otherwise all other tables."""
    chosen = [table for table in tables(results) if (table[0] in (SETTINGS, BY_LAYER)) == details]
    return shared.markdown(results, results["seeds"], chosen)


def draw(results: dict) -> Figure:
    """A picture in three panels: accuracy by method, what it costs in parameters, and where the tokens are routed."""
    rows = results["rows"]
    smile = [row for row in rows if row["name"].startswith("SMILE")]
    plain = [row["name"] for row in rows if row not in smile and row["name"] not in ("base + probe", "individual")]
    colours = {"base + probe": "#9aa0a6", "individual": "#202124"}
    for names, colormap in ((plain, "YlOrBr"), ([row["name"] for row in smile], "winter")):
        shades = matplotlib.colormaps[colormap](torch.linspace(0.3, 1, len(names)).tolist())
        colours |= dict(zip(names, map(tuple, shades)))

    individual = statistics.fmean(averages(next(row for row in rows if row["name"] == "individual")))
    figure = Figure(figsize=(16, 1.5 + 0.33 * len(rows)), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=(1.5, 1, 1.1))
    for y, row in enumerate(rows[::-1]):
        by_task = [statistics.fmean(scores) for scores in zip(*(run["accuracy"] for run in row["runs"]))]
        mean = statistics.fmean(averages(row))
        left.plot([min(by_task), max(by_task)], [y, y], color="#dadce0", linewidth=1, zorder=1)
        left.scatter(by_task, [y] * len(by_task), s=22, color="white", edgecolor=colours[row["name"]], zorder=2)
        left.scatter(mean, y, s=90, color=colours[row["name"]], zorder=3)
        place = {"textcoords": "offset points", "va": "center", "fontsize": 9, "weight": "bold"}
        left.annotate(f"{mean:.1f}", (max(by_task), y), (8, 0), **place)
    left.axvline(individual, color="#202124", linewidth=0.8, linestyle=":", zorder=0)
    left.set_yticks(range(len(rows)), [row["name"] for row in rows[::-1]])
    left.set_ylim(-0.6, len(rows) - 0.3)
    left.set_xlabel("accuracy on held-out texts, % (large: average; small: tasks)")
    left.set_title(f"One encoder, {len(results['tasks'])} tasks")

    for row in rows:
        if row["name"] != "base + probe" and "oracle" not in row["name"]:
            mean = statistics.fmean(averages(row))
            middle.scatter(row["parameters"], mean, s=90, color=colours[row["name"]], zorder=2)
    middle.axhline(individual, color="#202124", linewidth=0.8, linestyle=":")
    middle.set_xscale("log", base=2)
    middle.xaxis.set_major_formatter(lambda value, _: f"{value:g}×")
    middle.set_xlabel("parameters, relative to one encoder")
    middle.set_ylabel("average accuracy, %")
    middle.set_title("What accuracy costs (colours as on the left)")

    for row in smile:
        if "oracle" not in row["name"]:
            names = list(row["runs"][0]["own_expert"])
            shares = [statistics.fmean(run["own_expert"][name] for run in row["runs"]) for name in names]
            right.plot(
                range(len(names)), shares, marker="o", markersize=4, color=colours[row["name"]], label=row["name"]
            )
    chance = 100 / len(results["tasks"])
    right.axhline(chance, color="#9aa0a6", linewidth=0.8, linestyle=":")
    right.text(0, chance + 1, "chance", color="#9aa0a6", fontsize=8)
    short = [name.removeprefix("layers.").removesuffix(".dense").replace("attention.self.", "") for name in names]
    right.set_xticks(range(len(names)), short, rotation=90, fontsize=7)
    right.set_ylim(0, 100)
    right.set_ylabel("tokens at their own expert, %")
    right.set_title("Routing, layer by layer")
    right.legend(frameon=False, fontsize=8, loc="lower right")
    for axis in (left, middle, right):
        axis.spines[["top", "right"]].set_visible(False)
    return figure
