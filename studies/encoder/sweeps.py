"""Accuracy of the fused encoder over its ranks, the experts per token and the number of experts."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from torch import nn

from smile_kernels import RoutingPolicy, sweep, upscale
from smile_kernels.publishing import check_outputs, write_text
from smile_kernels.sweeping import Setting, Sweep

from .. import report
from ..data import cache_folder
from . import run
from .model import accuracy
from .run import Case, Plan

EXPERT_RANKS, ROUTER_RANKS = (4, 8, 16, 32, 64), (1, 4, 8, 16, 32)
PER_TOKEN = (1, 2, 3)
POLICIES = {"published": RoutingPolicy(), "sequence + layers": run.POLICIES["sequence + layers"]}
Grid = tuple[Sequence[int], Sequence[int], Sequence[int]]  # values of r, g and m


def accuracies(case: Case, model: nn.Module) -> dict[str, float]:
    """Test accuracy of each task, in percent."""
    return {task.task.name: accuracy(model, case.head(i), task.test) for i, task in enumerate(case.trained)}


def swept(case: Case, grid: Grid, share: float, what: str, step: report.Step) -> list[Setting]:
    """The settings of a grid under each of POLICIES.

    Args:
        case: the experts, and the texts they are tested on.
        grid: values of r, g and m.
        share: of the base's upper layers in the parameters of the whole encoder, to which `parameters` is relative.
        what: the stage, for `step`.
        step: called with the progress.
    """
    r, g, m = grid
    model, _ = upscale(case.base, case.uppers, rank_of_expert=max(r), rank_of_router=max(g), progress=False)
    found = sweep(
        model,
        lambda model: accuracies(case, model),
        rank_of_expert=r,
        rank_of_router=g,
        num_experts_per_tok=m,
        routing=POLICIES,
        progress=lambda _, done, total: step(f"{what}, seed {case.seed}", done, total),
    )
    return [replace(one, parameters=1 + (one.parameters - 1) * share) for one in found.settings]


def measure(case: Case, share: float, step: report.Step) -> dict[str, dict[str, float] | list[dict]]:
    """The three sweeps of one seed: over both ranks; at `run.SHOWN` over m, and over the first n tasks."""
    g, r = run.SHOWN
    per_token = [m for m in PER_TOKEN if m <= len(case.trained)]
    alone = [accuracies(case, upper) for upper in case.uppers]
    experts = []
    for n in range(2, len(case.trained) + 1):
        few = replace(case, trained=case.trained[:n])
        experts += [{"experts": n, **asdict(one)} for one in swept(few, ([r], [g], [1]), share, f"{n} experts", step)]
    ranks = swept(case, (EXPERT_RANKS, ROUTER_RANKS, [1]), share, "ranks", step)
    tokens = swept(case, ([r], [g], per_token), share, "experts per token", step)
    return {
        "individual": {task: alone[i][task] for i, task in enumerate(alone[0])},
        "ranks": [asdict(one) for one in ranks],
        "per_token": [asdict(one) for one in tokens],
        "experts": experts,
    }


def mean(of_seeds: Sequence[Sequence[dict]]) -> list[dict]:
    """The settings with their mean scores over the seeds."""

    def scores(rows: Sequence[dict]) -> dict[str, float]:
        return {task: statistics.fmean(row["scores"][task] for row in rows) for task in rows[0]["scores"]}

    return [rows[0] | {"scores": scores(rows)} for rows in zip(*of_seeds)]


def heat_map(results: dict) -> Sweep:
    """The sweep over ranks, mean over the seeds."""
    return Sweep([Setting(**row) for row in mean([seed["ranks"] for seed in results["runs"]])])


def tables(results: dict) -> list[report.TableRows]:
    """A table of each sweep: average accuracy over the tasks, also as a share of that of their individual models."""
    runs = results["runs"]
    individual = {t["name"]: statistics.fmean(one["individual"][t["name"]] for one in runs) for t in results["tasks"]}

    def table(title: str, part: str, columns: dict[str, str]) -> report.TableRows:
        rows = []
        for row in mean([one[part] for one in runs]):
            average = statistics.fmean(row["scores"].values())
            alone = statistics.fmean(individual[task] for task in row["scores"])
            numbers = [f"{average:.1f}", f"{100 * average / alone:.1f}", f"{row['parameters']:.2f}×"]
            rows.append([row["routing"], *(str(row[name]) for name in columns.values()), *numbers])
        return title, ["routing", *columns, "average", "% of individual", "parameters"], rows

    return [
        table("Ranks", "ranks", {"r": "rank_of_expert", "g": "rank_of_router"}),
        table("Experts per token", "per_token", {"m": "num_experts_per_tok"}),
        table("Number of experts", "experts", {"experts": "experts"}),
    ]


def study(
    quick: bool = False,
    seeds: int = 1,
    tasks: int = 6,
    cache: Path | None = None,
    json_path: Path | None = None,
    plot: Path | None = None,
) -> dict:
    """Fine-tune the encoder as `run.study` does, and test the fused model on the test splits in every setting.

    Nothing is chosen by these results. Arguments, errors and the cache are those of `run.study`; the plot has the heat
    maps over ranks.
    """
    plan, cache = Plan.of(quick, seeds, tasks), cache_folder(cache)
    check_outputs(plot=plot, json=json_path)
    with report.progress() as step:
        _, _, lower, base, trained = run.train(plan, seeds, cache, step)
        sizes = [sum(p.numel() for p in part.parameters()) for part in (base, lower)]
        runs = [measure(Case(base, trained, seed), sizes[0] / sum(sizes), step) for seed in range(seeds)]
    results = {
        "machine": report.machine(),
        "recipe": asdict(plan.recipe),
        "seeds": seeds,
        "quick": quick,
        "tasks": [run.described(t) for t in trained],
        "runs": runs,
    }
    if json_path:
        write_text(json_path, json.dumps(results, indent=1) + "\n")
    if plot:
        heat_map(results).plot(plot)
    report.show(tables(results))
    return results
