"""Accuracy of the fused encoder over its ranks, the experts per token, the number and the kind of experts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import cycle
from pathlib import Path

from tokenizers import Tokenizer
from torch import nn
from transformers import BertModel

from smile_kernels import RoutingPolicy, routing_override, set_routing, sweep, upscale
from smile_kernels.publishing import check_outputs

from .. import merge, report
from ..data import cache_folder
from . import routing, run
from .model import Lower, Recipe, Trained, Upper, accuracy, train_task
from .run import Case, Plan
from .subtasks import subtasks
from .sweeps_report import draw, tables

EXPERT_RANKS, ROUTER_RANKS = (4, 8, 16, 32, 64), (1, 4, 8, 16, 32)
PER_TOKEN = (1, 2, 3)
POLICIES = {"published": RoutingPolicy()} | {
    name: run.POLICIES[name] for name in ("sequence + layers", "window + layers")
}
# Every policy that needs no calibration, with one expert per token.
EVERY = {
    name: policy
    for name, policy in routing.POLICIES.items()
    if policy.num_experts_per_tok is None and not policy.calibrated
}
# Less than the study trains and tests on, so that the sweeps take a core about half an hour.
RECIPE, TEXTS = Recipe(max_tokens=32, batch=16, most_rows=1000), {"validation": 10, "test": 150}
ADAPTER = replace(RECIPE, adapter_rank=16, learning_rate=2e-3)
EQUAL_RANKS = (4, 8, 16)  # of experts from full fine-tunes and from adapters
# Adapters of sub-tasks: how they are trained, the texts of each, the numbers of experts, and (g, r).
SUBTASK_RECIPE = Recipe(epochs=3, batch=8, most_rows=128, adapter_rank=8, learning_rate=2e-3)
SUBTASK_TEXTS = {"validation": 10, "test": 40}
SUBTASK_NUMBERS, SUBTASK_RANKS = (8, 16, 32, 64), (8, 8)
Grid = tuple[Sequence[int], Sequence[int], Sequence[int]]  # values of r, g and m


@dataclass(frozen=True)
class Swept:
    """A case, and the share of the base's upper layers in the parameters of the whole encoder."""

    case: Case
    share: float

    @classmethod
    def of(cls, lower: Lower, base: Upper, trained: Sequence[Trained], seed: int) -> Swept:
        upper, whole = (
            sum(p.numel() for part in parts for p in part.parameters()) for parts in ([base], [base, lower])
        )
        return cls(Case(base, trained, seed), upper / whole)

    def first(self, number: int) -> Swept:
        """With the first `number` tasks."""
        return replace(self, case=replace(self.case, trained=self.case.trained[:number]))

    def scores(self, *modules: nn.Module) -> dict[str, float]:
        """Test accuracy of each task, in percent, on one module, or on one for each task."""
        pairs = enumerate(zip(self.case.trained, cycle(modules)))
        return {task.task.name: accuracy(module, self.case.head(i), task.test) for i, (task, module) in pairs}

    def parameters(self, model: nn.Module) -> float:
        """Of the whole encoder with these upper layers, relative to the plain one's."""
        own, plain = (sum(p.numel() for p in part.parameters()) for part in (model, self.case.base))
        return 1 + (own / plain - 1) * self.share

    def oracle(self, model: nn.Module) -> dict[str, float]:
        """`scores` of a fused model that uses each task's own expert for its texts."""
        found = {}
        for i, task in enumerate(self.case.trained):
            with routing_override(model, i):
                found[task.task.name] = accuracy(model, self.case.head(i), task.test)
        return found


def over_grid(swept: Swept, grid: Grid, progress: Callable[[str, int, int], None]) -> list[dict]:
    """The settings of a grid, values of r, g and m, under each of POLICIES."""
    r, g, m = grid
    case = swept.case
    model, _ = upscale(case.base, case.uppers, rank_of_expert=max(r), rank_of_router=max(g), progress=False)
    found = sweep(
        model,
        swept.scores,
        rank_of_expert=r,
        rank_of_router=g,
        num_experts_per_tok=m,
        routing=POLICIES,
        progress=progress,
    )
    return [asdict(one) | {"parameters": 1 + (one.parameters - 1) * swept.share} for one in found.settings]


def by_routing(swept: Swept, ranks: tuple[int, int], policies: dict[str, RoutingPolicy]) -> Iterator[dict]:
    """The model fused at `ranks`, (g, r), under each policy, and with each task's own expert."""
    case = swept.case
    model, found = upscale(case.base, case.uppers, rank_of_expert=ranks[1], rank_of_router=ranks[0], progress=False)
    costs = {"parameters": swept.parameters(model), **run.energy(found)}
    for name, policy in policies.items():
        set_routing(model, policy)
        yield {"routing": name, "scores": swept.scores(model), **costs}
    set_routing(model, RoutingPolicy())
    yield {"routing": "oracle", "scores": swept.oracle(model), **costs}


def by_number(swept: Swept, numbers: Sequence[int], ranks: tuple[int, int], step: Callable[[int], None]) -> list[dict]:
    """The first n experts for each n of `numbers`: under EVERY policy, alone, and averaged; `step(n)` before each."""
    rows = []
    for number in numbers:
        step(number)
        few = swept.first(number)
        case = few.case
        average = case.merged(merge.task_arithmetic(case.vectors, 1 / number))
        alone = 1 + (number - 1) * few.share
        rows += [
            {"experts": number, **row}
            for row in (
                {"routing": "individual", "scores": few.scores(*case.uppers), "parameters": alone},
                {"routing": "simple averaging", "scores": few.scores(average), "parameters": 1.0},
                *by_routing(few, ranks, EVERY),
            )
        ]
    return rows


def by_kind(full: Swept, adapters: Swept) -> list[dict]:
    """Experts of equal rank from full fine-tunes and from LoRA adapters, with the shown rank of the router."""
    rows = []
    for kind, swept in (("full fine-tune", full), (f"LoRA, rank {ADAPTER.adapter_rank}", adapters)):
        alone = {"routing": "individual", "scores": swept.scores(*swept.case.uppers)}
        rows.append({"kind": kind, "r": None, **alone, "parameters": 1 + (len(swept.case.trained) - 1) * swept.share})
        for r in EQUAL_RANKS:
            rows += [{"kind": kind, "r": r, **row} for row in by_routing(swept, (run.SHOWN[0], r), POLICIES)]
    return rows


def of_subtasks(
    bert: BertModel, tokenizer: Tokenizer, seeds: Sequence[int], cache: Path, step: report.Step
) -> list[Swept]:
    """LoRA adapters of pairs of classes, for every seed."""
    recipe = SUBTASK_RECIPE
    lower, base = Lower(bert, recipe.depth), Upper(bert, recipe.depth)
    tasks, trained = subtasks(cache / "packages", max(SUBTASK_NUMBERS)), []
    for done, task in enumerate(tasks):
        step("sub-tasks", done, len(tasks))
        models = lower, base, tokenizer, lambda *at: None
        trained.append(train_task(task, recipe, SUBTASK_TEXTS, seeds, cache, *models))
    return [Swept.of(lower, base, trained, seed) for seed in seeds]


def measure(full: Swept, adapters: Swept, small: Swept, keep: Callable, step: report.Step) -> dict[str, list[dict]]:
    """The rows of every sweep of one seed.

    Args:
        full: full fine-tunes.
        adapters: LoRA adapters of the same tasks.
        small: LoRA adapters of sub-tasks.
        keep: called with a name and a function, returns what the function returns, or did before.
        step: called with the progress.
    """
    g, r = run.SHOWN
    count = len(full.case.trained)

    def grid(name: str, of: Grid) -> list[dict]:
        return over_grid(full, of, lambda _, done, total: step(f"{name}, seed {full.case.seed}", done, total))

    def numbers(name: str, swept: Swept, of: Sequence[int], ranks: tuple[int, int]) -> list[dict]:
        return by_number(swept, of, ranks, lambda n: step(f"{name}, seed {full.case.seed}", n, max(of)))

    def kinds() -> list[dict]:
        step(f"kinds of experts, seed {full.case.seed}", 0, 1)
        return by_kind(full, adapters)

    parts = {
        "ranks": partial(grid, "ranks", (EXPERT_RANKS, ROUTER_RANKS, [1])),
        "per_token": partial(grid, "experts per token", ([r], [g], [m for m in PER_TOKEN if m <= count])),
        "experts": partial(numbers, "experts", full, range(2, count + 1), (g, r)),
        "kinds": kinds,
        "subtasks": partial(numbers, "experts of sub-tasks", small, SUBTASK_NUMBERS, SUBTASK_RANKS),
    }
    return {name: keep(name, part) for name, part in parts.items()}


def study(
    quick: bool = False,
    seeds: int = 1,
    tasks: int = 6,
    cache: Path | None = None,
    json_path: Path | None = None,
    plot: Path | None = None,
) -> dict:
    """Fine-tune the encoder by RECIPE, with and without adapters, and test fused models on the test splits.

    Nothing is chosen by these results. Arguments and errors are those of `run.study`. Fine-tuned models and the rows
    of each sweep are kept in the cache.
    """
    plan, cache = replace(Plan.of(quick, seeds, tasks), recipe=RECIPE, held_out=TEXTS), cache_folder(cache)
    check_outputs(plot=plot, json=json_path)
    with report.progress() as step:
        bert, tokenizer, lower, base, trained = run.train(plan, seeds, cache, step)
        *_, of_adapters = run.train(replace(plan, recipe=ADAPTER), seeds, cache, step)
        small = of_subtasks(bert, tokenizer, range(seeds), cache, step)
        runs = []
        for seed in range(seeds):
            decides = [
                "sweep",
                seed,
                *map(asdict, (RECIPE, ADAPTER, SUBTASK_RECIPE)),
                TEXTS,
                [t.name for t in plan.tasks],
            ]

            def keep(name: str, make: Callable[[], list[dict]], decides: list = decides) -> list[dict]:
                return run.kept(cache / "encoder", [*decides, name], make)

            full, adapters = (Swept.of(lower, base, of, seed) for of in (trained, of_adapters))
            runs.append(measure(full, adapters, small[seed], keep, step))
    results = {
        "machine": report.machine(),
        "recipes": {"full": asdict(RECIPE), "adapters": asdict(ADAPTER), "sub-tasks": asdict(SUBTASK_RECIPE)},
        "seeds": seeds,
        "quick": quick,
        "tasks": [run.described(t) for t in trained],
        "subtasks": [task.task.name for task in small[0].case.trained],
        "runs": runs,
    }
    report.write(results, json_path, plot, draw)
    report.show(tables(results))
    return results
