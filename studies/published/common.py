"""What the published tables share: their folders, the rows that are measured, and the tables."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from smile_kernels import RoutingPolicy, sweep, upscale

from .. import report

POLICIES = {"published": RoutingPolicy(), "sequence + layers": RoutingPolicy("sequence", accumulate=True)}
Scores = dict[str, float]  # by task, in percent


@dataclass(frozen=True)
class Paper:
    """Results of the paper's authors, by the name of a row: a number for each of `tasks`, in percent."""

    source: str
    tasks: Sequence[str]
    rows: Mapping[str, Sequence[float]]


def task_folders(folder: Path, complete: Callable[[Path], str | None]) -> list[Path]:
    """The folders of the tasks, in order.

    Args:
        folder: has base/ and tasks/.
        complete: called with each task's folder; what is missing in it, or None.

    Raises:
        ValueError: a folder of the format is missing or empty; the message names it.
    """
    for place in (folder / "base", folder / "tasks"):
        if not place.is_dir():
            raise ValueError(f"folder: {place} is not a folder; expected base/ and tasks/ in FOLDER")
    places = sorted(path for path in (folder / "tasks").iterdir() if path.is_dir())
    if not places:
        raise ValueError(f"folder: {folder / 'tasks'} is empty; expected a folder for each task")
    for place in places:
        if missing := complete(place):
            raise ValueError(f"folder: {missing}")
    return places


def smile_name(g: int, r: int, routing: str) -> str:
    """The name of a fused model's row."""
    return f"SMILE (g {g}, r {r}), {routing}"


def measure(
    base: nn.Module,
    models: Mapping[str, nn.Module],
    score: Callable[[nn.Module, str], float],
    ranks: tuple[int, Sequence[int]],
    policies: Mapping[str, RoutingPolicy],
    step: report.Step,
) -> list[dict]:
    """Scores of the base, of each task's own model, and of the fused model in each setting.

    Args:
        base: the pre-trained model.
        models: task -> its fine-tuned model.
        score: called with a model and a task; percent.
        ranks: g, and values of r.
        policies: the routing policies of the fused model.
        step: called with the progress.
    """

    def scores(model: nn.Module) -> Scores:
        return {task: score(model, task) for task in models}

    step("base", 0, 1)
    rows = [{"name": "base", "parameters": 1.0, "scores": scores(base)}]
    step("individual", 0, 1)
    alone = {task: score(model, task) for task, model in models.items()}
    rows.append({"name": "individual", "parameters": float(len(models)), "scores": alone})
    g, r = ranks
    fused, _ = upscale(base, list(models.values()), rank_of_expert=max(r), rank_of_router=g, progress=False)
    found = sweep(fused, scores, rank_of_expert=r, rank_of_router=[g], routing=policies, progress=step)
    for one in found.settings:
        name = smile_name(g, one.rank_of_expert, one.routing)
        rows.append({"name": name, "parameters": one.parameters, "scores": one.scores})
    return rows


def table(
    rows: Sequence[dict], tasks: Sequence[str], paper: Paper | None, title: str, reference: str = "individual"
) -> report.TableRows:
    """Scores by task, average, its share of the row `reference`, relative parameters; the authors' numbers below.

    Their average is that of their own tasks.
    """

    def share(average: float, of: float | None) -> str:
        return f"{100 * average / of:.1f}" if of else "–"

    averages = {row["name"]: statistics.fmean(row["scores"].values()) for row in rows}
    theirs = {name: statistics.fmean(numbers) for name, numbers in paper.rows.items()} if paper else {}
    lines = []
    for row in rows:
        name = row["name"]
        own = [f"{row['scores'][task]:.1f}" for task in tasks]
        size = f"{row['parameters']:.2f}×"
        lines.append([name, *own, f"{averages[name]:.1f}", share(averages[name], averages[reference]), size])
        if paper and name in theirs:
            numbers = dict(zip(paper.tasks, paper.rows[name]))
            own = [f"{numbers[task]:.1f}" if task in numbers else "–" for task in tasks]
            average = theirs[name]
            lines.append(["  the authors' run", *own, f"{average:.1f}", share(average, theirs.get(reference)), "–"])
    return title, ["", *tasks, "average", f"% of {reference}", "parameters"], lines
