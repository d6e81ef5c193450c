"""The results of `sweeps.study` (its JSON) as tables, as Markdown, and as a plot."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .. import report


def mean(results: dict, part: str) -> list[dict]:
    """The rows of a part with their mean over tasks and seeds, "average", and "share", in percent of the individual
    models' with as many experts of the same kind; in a part without individual models, of those of all tasks."""
    rows = []
    for of_seeds in zip(*(one[part] for one in results["runs"])):
        rows.append({**of_seeds[0], "average": statistics.fmean(s for row in of_seeds for s in row["scores"].values())})
    compared = rows if any(row["routing"] == "individual" for row in rows) else mean(results, "experts")
    alone = {
        (row.get("experts"), row.get("kind")): row["average"] for row in compared if row["routing"] == "individual"
    }
    last = list(alone.values())[-1]
    return [
        row | {"share": 100 * row["average"] / alone.get((row.get("experts"), row.get("kind")), last)} for row in rows
    ]


def _values(rows: Sequence[dict], name: str) -> list[str]:
    """The different values of a column, in order."""
    return [str(value) for value in dict.fromkeys(row[name] for row in rows)]


def _pivot(rows: Sequence[dict], titles: Sequence[str], cell: Callable[[dict], str]) -> list[list[str]]:
    """A line for each value of the columns `titles`, with the cells of its rows."""
    lines: dict[tuple[str, ...], list[str]] = {}
    for row in rows:
        lines.setdefault(tuple(str(row[title]) for title in titles), []).append(cell(row))
    return [[*line, *cells] for line, cells in lines.items()]


def _share(row: dict) -> str:
    return f"{row['share']:.1f}"


def _numbers(results: dict, part: str, what: str) -> report.TableRows:
    rows = mean(results, part)
    alone = [f"{row['average']:.1f}" for row in rows if row["routing"] == "individual"]
    size = [f"{row['parameters']:.2f}×" for row in rows if row["routing"] == "oracle"]
    lines = _pivot([row for row in rows if row["routing"] != "individual"], ["routing"], _share)
    columns = ["experts", *_values(rows, "experts")]
    return (
        f"{what}: % of the individual models",
        columns,
        [["individual, accuracy", *alone], ["parameters", *size], *lines],
    )


def _kinds(results: dict) -> report.TableRows:
    rows = mean(results, "kinds")
    alone = {row["kind"]: f"{row['average']:.1f}" for row in rows if row["r"] is None}
    equal = [row | {"energy": f"{row['energy_mean']:.0f}"} for row in rows if row["r"] is not None]
    lines = [[kind, alone[kind], *rest] for kind, *rest in _pivot(equal, ["kind", "r", "energy"], _share)]
    columns = ["experts", "individual, accuracy", "r", "energy, %", *_values(equal, "routing")]
    return "Full fine-tunes and LoRA adapters: % of the individual models of the same kind", columns, lines


def tables(results: dict) -> list[report.TableRows]:
    """A table of each sweep: accuracy as a share of the individual models', mean over tasks and seeds."""
    ranks, tokens = (mean(results, part) for part in ("ranks", "per_token"))
    g, m = (_values(rows, name) for rows, name in ((ranks, "rank_of_router"), (tokens, "num_experts_per_tok")))
    return [
        (
            "Ranks: % of the individual models (parameters)",
            ["routing", "r", *(f"g {value}" for value in g)],
            _pivot(
                sorted(ranks, key=lambda row: (row["routing"], row["rank_of_expert"])),
                ["routing", "rank_of_expert"],
                lambda row: f"{_share(row)} ({row['parameters']:.2f}×)",
            ),
        ),
        (
            "Experts per token: % of the individual models",
            ["routing", *(f"m {value}" for value in m)],
            _pivot(tokens, ["routing"], _share),
        ),
        _numbers(results, "experts", "Experts of different tasks"),
        _numbers(results, "subtasks", "Experts of sub-tasks"),
        _kinds(results),
    ]


def _heat_map(axis: Axes, rows: Sequence[dict], low: float, high: float) -> None:
    """Share of the individual models' accuracy over r and g, with the parameters in each cell."""
    r, g = (sorted({row[name] for row in rows}) for name in ("rank_of_expert", "rank_of_router"))
    cells = {(row["rank_of_expert"], row["rank_of_router"]): row for row in rows}
    axis.imshow([[cells[y, x]["share"] for x in g] for y in r], vmin=low, vmax=high, aspect="auto")
    for (y, x), row in cells.items():
        colour = "white" if row["share"] < (low + high) / 2 else "black"
        text = f"{row['share']:.1f}\n{row['parameters']:.2f}×"
        axis.text(g.index(x), r.index(y), text, ha="center", va="center", fontsize=8, color=colour)
    axis.set_xticks(range(len(g)), map(str, g))
    axis.set_yticks(range(len(r)), map(str, r))
    axis.set(xlabel="rank of the router, g", ylabel="rank of an expert, r", title=f"{rows[0]['routing']}")


def _lines(axis: Axes, rows: Sequence[dict], label: Callable[[dict], str], across: str) -> None:
    """A line for each label over the values of `across`, the k-th value at k."""
    values = list(dict.fromkeys(row[across] for row in rows))
    for name in dict.fromkeys(map(label, rows)):
        own = [row for row in rows if label(row) == name]
        style = {"simple averaging": ":", "oracle": "--"}.get(own[0]["routing"], "-")
        shares = [row["share"] for row in own]
        axis.plot([values.index(row[across]) for row in own], shares, style, marker="o", markersize=4, label=name)
    axis.set_xticks(range(len(values)), map(str, values))
    axis.axhline(100, color="#202124", linewidth=0.8, linestyle=":")
    axis.set_ylabel("accuracy, % of the individual models")
    axis.spines[["top", "right"]].set_visible(False)
    low, high = axis.get_ylim()
    axis.set_ylim(low - 0.4 * (high - low), high)  # the legend is below the lines
    axis.legend(frameon=False, fontsize=8, loc="lower left", ncols=2)


def draw(results: dict) -> Figure:
    """Heat maps over the ranks, one for each policy; lines over the experts per token, their number and their kind."""
    figure = Figure(figsize=(20, 10), layout="constrained")
    above, below = figure.subfigures(2, 1)
    ranks = mean(results, "ranks")
    shares, policies = [row["share"] for row in ranks], dict.fromkeys(row["routing"] for row in ranks)
    for axis, policy in zip(above.subplots(1, len(policies)), policies):
        _heat_map(axis, [row for row in ranks if row["routing"] == policy], min(shares), max(shares))
    per_token, tasks, subtasks, kinds = below.subplots(1, 4)
    _lines(per_token, mean(results, "per_token"), lambda row: row["routing"], "num_experts_per_tok")
    per_token.set(xlabel="experts per token, m", title="Experts per token")
    for axis, part, title in ((tasks, "experts", "Different tasks"), (subtasks, "subtasks", "Sub-tasks, LoRA")):
        rows = [row for row in mean(results, part) if row["routing"] != "individual"]
        _lines(axis, rows, lambda row: row["routing"], "experts")
        axis.set(xlabel="number of experts", title=title)
    equal = [row for row in mean(results, "kinds") if row["r"] is not None]
    _lines(kinds, equal, lambda row: f"{row['kind']}: {row['routing']}", "r")
    kinds.set(xlabel="rank of an expert, r", title="Full fine-tunes and LoRA adapters")
    return figure


def markdown(results: dict) -> str:
    """The tables as Markdown."""
    return report.markdown(results, results["seeds"], tables(results))
