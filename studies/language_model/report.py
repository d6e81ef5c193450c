"""The results of `run.study` (its JSON): errors, tables, README's table, and a picture."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from .. import report as shared
from ..report import Right, TableRows, markdown_table, row_scores, stratified
from .methods import WITH_DATA


def outcome(right: Right, reference: Right | None) -> dict:
    """Percent right by task, their mean and its standard error; and the same for the paired difference to `reference`.

    Rows are paired with those of the reference by number, over the common seeds and rows.
    """
    mean, error = stratified([row_scores(of) for of in right.values()])
    found = {
        "tasks": {task: round(100 * statistics.fmean(row_scores(of)), 2) for task, of in right.items()},
        "mean": round(mean, 2),
        "se": round(error, 2),
        "rows": {task: len(of[0]) for task, of in right.items()},
        "seeds": len(next(iter(right.values()))),
    }
    if reference is not None:
        differences, theirs = [], []
        for task, of in right.items():
            seeds, rows = min(len(of), len(reference[task])), min(len(of[0]), len(reference[task][0]))
            own, other = (row_scores([s[:rows] for s in strings[:seeds]]) for strings in (of, reference[task]))
            differences.append([a - b for a, b in zip(own, other)])
            theirs.append(other)
        less, error = stratified(differences)
        individual, _ = stratified(theirs)
        found["less_individual"] = {"mean": round(less, 2), "se": round(error, 2)}
        found["of_individual"] = round(100 * (1 + less / individual), 2) if individual else None
    return found | {"right": dict(right)}


def summarise(found: Mapping[str, dict], full: dict | None, plain: int) -> dict:
    """The results of `run.measure` as the "methods" and "full" of the JSON; `plain` counts the base's parameters."""

    def entries(methods: Mapping[str, dict]) -> dict[str, dict]:
        own = methods["individual"]
        summary = {}
        for name, entry in methods.items():
            entry_summary = outcome(entry["right"], own["right"])
            if entry.get("turns"):
                entry_summary["two_turns"] = outcome(entry["turns"], own["turns"])
            details = [dict(of) for of in entry["details"]]
            entry_summary["parameters"] = round(details[0].pop("parameters") / plain, 3)
            entry_summary["details"] = [{k: v for k, v in of.items() if k != "parameters"} for of in details]
            summary[name] = entry_summary
        return summary

    return {"methods": entries(found), "full": full and {**full, "methods": entries(full["methods"])}}


def _signed(value: dict) -> str:
    return f"{value['mean']:+.1f} ± {value['se']:.1f}"


def _share(entry: dict) -> str:
    return "–" if entry["of_individual"] is None else f"{entry['of_individual']:.1f}"


def tables(results: dict) -> list[TableRows]:
    """Every table: tasks, right answers, conversations, full fine-tunes, time, tokens at their own expert."""
    methods = results["methods"]
    names = [task["name"] for task in results["tasks"]]
    tasks = [
        [t["name"], t["instruction"], t["example"][0], t["example"][1], t["source"], str(t["train"])]
        for t in results["tasks"]
    ]

    def line(name: str, entry: dict, columns: Sequence[str]) -> list[str]:
        rows = sum(entry["rows"].values())
        return [
            name,
            *(f"{entry['tasks'][task]:.1f}" for task in columns),
            f"{entry['mean']:.1f} ± {entry['se']:.1f}",
            _share(entry),
            _signed(entry["less_individual"]),
            f"{entry['seeds']} × {rows}",
        ]

    header = ["mean", "% of individual", "less individual", "seeds × rows"]
    one_turn = [[*line(name, of, names), f"{of['parameters']:.2f}×"] for name, of in methods.items()]
    two_turns = [line(name, of["two_turns"], names) for name, of in methods.items() if "two_turns" in of]
    timing = [
        [
            t["name"],
            *(f"{t[k]:.1f}" for k in ("prompt_ms", "token_ms")),
            *(f"{t[k]:.2f}×" for k in ("prompt_ratio", "token_ratio")),
        ]
        for t in results["time"]
    ]
    found = [
        ("Tasks", ["task", "instruction", "question", "answer", "source", "training rows"], tasks),
        ("Right answers (exact match), %", ["", *names, *header, "parameters"], one_turn),
        ("Right answers in the second turn of a conversation, %", ["", *names, *header], two_turns),
    ]
    if results["full"]:
        full = results["full"]["methods"]
        columns = list(full["individual"]["tasks"])
        title = f"Experts that are full fine-tunes (rank {results['full']['rank_of_expert']}) with the other adapters"
        found.append((title, ["", *columns, *header], [line(name, of, columns) for name, of in full.items()]))
    columns = ["", "prompt, ms", "a token, ms", "prompt, ratio", "a token, ratio"]
    found.append(("CPU time on one thread, batch 1", columns, timing))
    shares = {name: [statistics.fmean(block) for block in blocks] for name, blocks in results["own_expert"].items()}
    depth = len(next(iter(shares.values())))
    shown = sorted({0, 1, 3, depth // 4, depth // 2, depth - 1})
    found.append(
        (
            "Answer tokens at their own expert, %, by block",
            ["", *(str(block) for block in shown if block < depth), "all"],
            [
                [name, *(f"{of[block]:.0f}" for block in shown if block < depth), f"{statistics.fmean(of):.0f}"]
                for name, of in shares.items()
            ],
        )
    )
    return found


def markdown(results: dict, *titles: str) -> str:
    """The tables as Markdown, or those of these titles."""
    shown = [table for table in tables(results) if not titles or table[0] in titles]
    return shared.markdown(results, results["size"]["seeds"], shown)


def headline(results: dict) -> str:
    """The table of the README: the main comparison."""
    names = {
        "base": "base model",
        "individual": "individual adapters",
        "simple averaging": "simple averaging",
        "task arithmetic": "task arithmetic",
        "ties": "TIES",
        "published": "SMILE, published routing",
        "recommended": "SMILE, recommended routing",
    }
    rows = []
    for name, shown in names.items():
        entry = results["methods"][name]
        turns = entry.get("two_turns")
        rows.append(
            [
                shown,
                f"{entry['mean']:.1f} ± {entry['se']:.1f}",
                _share(entry),
                f"{turns['mean']:.1f} ± {turns['se']:.1f}" if turns else "–",
                f"{entry['parameters']:.2f}×",
                str(sum(entry["rows"].values())),
            ]
        )
    columns = ["", "right answers, %", "% of individual", "second turn, %", "parameters", "questions"]
    seeds = results["size"]["seeds"]
    return (
        f"{markdown_table(columns, rows)}\n\n{seeds} seed{'s' * (seeds > 1)}; ± standard error of the mean; "
        "% of individual on the same questions.\n"
    )


def draw(results: dict) -> Figure:
    """A picture in two panels: right answers by method, and answer tokens at their own expert by block."""
    methods = {name: of for name, of in results["methods"].items() if of["seeds"] == results["size"]["seeds"]}
    figure = Figure(figsize=(13, 5), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.3, 1))
    grey, black, blue, orange = "#9aa0a6", "#202124", "#2171b5", "#d9713c"
    merged = ("simple averaging", "task arithmetic", "ties", "tsv-merge", "iso-c", *WITH_DATA)
    for y, (name, of) in enumerate(reversed(methods.items())):
        colour = black if name == "individual" else orange if name in merged else grey if name == "base" else blue
        scores = list(of["tasks"].values())
        left.plot([min(scores), max(scores)], [y, y], color="#dadce0", linewidth=1, zorder=1)
        left.scatter(scores, [y] * len(scores), s=22, color="white", edgecolor=colour, zorder=2)
        left.errorbar(of["mean"], y, xerr=of["se"], fmt="o", markersize=10, color=colour, zorder=3)
        place = {"textcoords": "offset points", "ha": "center", "fontsize": 9, "weight": "bold"}
        left.annotate(f"{of['mean']:.1f}", (of["mean"], y), (0, 9), **place)
    left.axvline(methods["individual"]["mean"], color=black, linewidth=0.8, linestyle=":", zorder=0)
    left.set_yticks(range(len(methods)), list(reversed(methods)))
    left.set_ylim(-0.6, len(methods) - 0.3)
    left.set_xlabel("right answers, % (large: mean ± standard error; small: tasks)")
    left.set_title(f"One language model, {len(results['tasks'])} adapters")
    for name, blocks in results["own_expert"].items():
        right.plot([statistics.fmean(block) for block in blocks], marker="o", markersize=3, label=name)
    right.axhline(100 / len(results["tasks"]), color=grey, linewidth=0.8, linestyle=":")
    right.set_ylim(0, 102)
    right.set_xlabel("block")
    right.set_ylabel("answer tokens at their own expert, %")
    right.set_title("Routing, block by block")
    right.legend(frameon=False, fontsize=8, loc="lower right")
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    return figure
