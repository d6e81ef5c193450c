"""Scores of one fused model under a grid of ranks, experts per token and routing policies.

The fine-tuned models are decomposed once, by `upscale` at the largest ranks. Singular vectors are ordered, so a model
of smaller ranks has the leading ones of each layer: vh[:, :max(r, g)], s[:, :r] and u[:, :, :r].
"""

import importlib
import importlib.util
import math
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .config import FACTORS
from .errors import SmileError, check_integer, reason
from .nn import SmileLinear, whole_layers
from .publishing import check_outputs, write_plot, write_report
from .routing import RoutingPolicy, calibrate, check_calibration, check_routing, get_routing, set_routing
from .routing.control import refuse_override
from .schema import check_arguments

__all__ = ["Setting", "Sweep", "sweep"]

Score = Callable[[nn.Module], float | Mapping[str, float]]


@dataclass(frozen=True)
class Setting:
    """The result of one setting.

    Attributes:
        rank_of_expert, rank_of_router, num_experts_per_tok: r, g and m.
        routing: name of the routing policy.
        parameters: of the whole model, relative to the base's.
        scores: task -> score; the task of a single number is "score".
        seconds: time of the scoring function.
    """

    rank_of_expert: int
    rank_of_router: int
    num_experts_per_tok: int
    routing: str
    parameters: float
    scores: dict[str, float]
    seconds: float

    @property
    def score(self) -> float:
        """The mean over tasks."""
        return statistics.fmean(self.scores.values())


@dataclass(frozen=True)
class Sweep:
    """Results of all settings. `print` shows a table, `save` writes JSON, `plot` draws heat maps.

    Attributes:
        settings: one entry per setting.
    """

    settings: list[Setting]

    @check_arguments
    def save(self, path: str | Path) -> None:
        """Write all results as JSON, as `Analysis.save` does; a score that is not finite is null."""
        rows: list[dict[str, Any]] = [asdict(one) | {"score": one.score} for one in self.settings]
        for row in rows:
            row["scores"] = {task: _finite(value) for task, value in row["scores"].items()}
            row["score"] = _finite(row["score"])
        write_report(path, {"settings": rows})

    def __str__(self) -> str:
        from rich.console import Console
        from rich.table import Table

        tasks = list(self.settings[0].scores) if self.settings else []
        shown = tasks if len(tasks) > 1 else []
        columns = ("r", "g", "m", "routing", "parameters", "score", *shown, "seconds")
        table = Table(*columns, box=None, pad_edge=False)
        for one in self.settings:
            numbers = map(str, (one.rank_of_expert, one.rank_of_router, one.num_experts_per_tok))
            scores = (f"{value:.4g}" for value in (one.score, *(one.scores[task] for task in shown)))
            table.add_row(*numbers, one.routing, f"{one.parameters:.2f}x", *scores, f"{one.seconds:.1f}")
        console = Console(width=max(100, 60 + 14 * len(shown)), color_system=None)
        with console.capture() as text:
            console.print(table)
        return text.get().rstrip("\n")

    @check_arguments
    def plot(self, file: str | Path) -> None:
        """Draw the score over r and g, a heat map for each routing policy and m, as .png, .svg or .pdf.

        Each cell has its score and the parameters relative to the base.
        """
        from matplotlib.figure import Figure

        file = Path(file)
        check_outputs(plot=file)
        experts, routers, per_token, policies = (
            list(dict.fromkeys(getattr(one, name) for one in self.settings))
            for name in ("rank_of_expert", "rank_of_router", "num_experts_per_tok", "routing")
        )
        cells = {(s.routing, s.num_experts_per_tok, s.rank_of_expert, s.rank_of_router): s for s in self.settings}
        finite = [one.score for one in self.settings if math.isfinite(one.score)] or [0.0]
        low, high = min(finite), max(finite)
        size = (1.5 + len(per_token) * (0.7 + 0.8 * len(routers)), len(policies) * (0.9 + 0.5 * len(experts)))
        figure = Figure(figsize=size, layout="constrained")
        axes: Any = figure.subplots(len(policies), len(per_token), squeeze=False)
        image: Any = None
        for axis, (policy, m) in zip(axes.flat, product(policies, per_token)):
            grid = [[cells[policy, m, r, g] for g in routers] for r in experts]
            image = axis.imshow([[one.score for one in row] for row in grid], vmin=low, vmax=high, aspect="auto")
            for y, row in enumerate(grid):
                for x, one in enumerate(row):
                    dark = one.score < (low + high) / 2
                    text = f"{one.score:.4g}\n{one.parameters:.2f}×"
                    place = {"ha": "center", "va": "center", "fontsize": 8}
                    axis.text(x, y, text, color="white" if dark else "black", **place)
            axis.set_xticks(range(len(routers)), map(str, routers))
            axis.set_yticks(range(len(experts)), map(str, experts))
            axis.set(xlabel="rank of the router, g", ylabel="rank of an expert, r")
            axis.set_title(f"{policy}, m {m}", fontsize=9)
        figure.colorbar(image, ax=axes, label="score")
        write_plot(file, figure, dpi=150)


@check_arguments
def sweep(
    model: nn.Module,
    score: Score,
    *,
    rank_of_expert: Sequence[int] | None = None,
    rank_of_router: Sequence[int] | None = None,
    num_experts_per_tok: Sequence[int] | None = None,
    routing: Mapping[str, RoutingPolicy] | None = None,
    file: str | Path | None = None,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> Sweep:
    """Score a fused model at every combination of ranks, experts per token and routing policies.

        fused, _ = upscale(base, finetuned, rank_of_expert=64, rank_of_router=16)
        print(sweep(fused, accuracy, rank_of_expert=[16, 32, 64], rank_of_router=[4, 16]))

    The model at smaller ranks equals `upscale` at those ranks, to the accuracy of its decomposition (`certificate`),
    since the leading singular vectors do not depend on how many are kept. Directions at the rounding level of the
    checkpoints, which `upscale` sets to zero depending on g, are those of the given model. A layer of a smaller rank
    than asked for keeps its own.

    Args:
        model: a model with SMILE layers, fused at the largest ranks. It is changed while `score` runs and restored at
            the end, also after an error.
        score: called with the model in each setting; returns a number, or a number for each task. It may move the model
            to another device, and must not change it otherwise.
        rank_of_expert: values of r; by default the model's, its half and its quarter.
        rank_of_router: values of g; by default the model's, its half and its quarter.
        num_experts_per_tok: values of m; by default the model's.
        routing: name -> routing policy, without m; by default the published routing. If one is calibrated, `calibrate`
            runs at each g.
        file: JSON file that is rewritten after each setting, so that an interruption leaves what is done.
        progress: called with the stage, the number of finished settings and the number of settings.

    Returns:
        The results, in the order of `routing`, m, g and r, the last one varying fastest.

    Raises:
        ValueError: no SMILE layers, a router with rows of its own, a value out of range, a policy that sets m or does
            not fit the model, or a file that cannot be written, before `score` is called; or a `score` that returns
            something else than numbers, or other tasks than before.
    """
    layers = whole_layers(model)
    for name, layer in layers.items():
        if layer.router is not None:
            raise SmileError(
                f"model: the router of {name} has rows of its own, as of router 'norm' or training; expected the "
                "leading singular vectors, as of router 'smile'"
            )
    if file is not None:
        check_outputs(keys=Sweep.__dataclass_fields__, file=Path(file))
    fused = "the rank that the model was fused with"
    r = _values("rank_of_expert", rank_of_expert, max(one.rank_of_expert for one in layers.values()), fused)
    g = _values("rank_of_router", rank_of_router, max(one.rank_of_router for one in layers.values()), fused)
    n = min(one.num_local_experts for one in layers.values())
    own = [max(one.num_experts_per_tok for one in layers.values())]
    given = own if num_experts_per_tok is None else num_experts_per_tok
    m = _values("num_experts_per_tok", given, n, "the number of experts")
    policies = _policies(model, routing, m)

    found: dict[tuple[str, int, int, int], Setting] = {}
    order = list(product(dict.fromkeys(name for name, _ in policies), m, g, r))
    done = Sweep([])
    progress("settings", 0, len(order))
    with _restored(model, layers) as whole:
        for rank_g, rank_r in product(g, r):
            _truncate(layers, whole, rank_r, rank_g)
            if rank_r == r[0] and any(policy.calibrated for policy in policies.values()):
                calibrate(model)
            for (name, experts), policy in policies.items():
                set_routing(model, policy)
                tasks = next(iter(found.values())).scores if found else None
                start = time.perf_counter()
                scores = _scores(score(model), tasks)
                seconds = time.perf_counter() - start
                found[name, experts, rank_g, rank_r] = Setting(
                    rank_r, rank_g, experts, name, _relative_size(model, layers), scores, seconds
                )
                done = Sweep([found[key] for key in order if key in found])
                if file is not None:
                    done.save(file)
                progress("settings", len(found), len(order))
    return done


PUBLISHED = "published"


def _values(name: str, given: Sequence[int] | None, most: int, meaning: str) -> list[int]:
    """The sorted values of an axis; `most`, its half and its quarter if none are given."""
    if given is None:
        given = [value for value in (most // 4, most // 2, most) if value]
    if not given:
        raise SmileError(f"{name}: is empty; expected one value or more")
    return sorted({check_integer(f"{name}[{i}]", value, 1, most, meaning) for i, value in enumerate(given)})


def _policies(
    model: nn.Module, routing: Mapping[str, RoutingPolicy] | None, m: Sequence[int]
) -> dict[tuple[str, int], RoutingPolicy]:
    """The policy of each name and m, checked."""
    refuse_override(model)
    get_routing(model)
    if routing is not None and not routing:
        raise SmileError("routing: is empty; expected one policy or more")
    policies = {}
    for name, policy in (routing or {PUBLISHED: RoutingPolicy()}).items():
        if not isinstance(name, str) or not isinstance(policy, RoutingPolicy):
            raise SmileError(f"routing[{name!r}]: is {policy!r}; expected a name and a RoutingPolicy")
        if policy.num_experts_per_tok is not None:
            raise SmileError(
                f"routing[{name!r}]: sets num_experts_per_tok {policy.num_experts_per_tok}; expected None, and values "
                "of num_experts_per_tok in the sweep"
            )
        for experts in m:
            policies[name, experts] = replace(policy, num_experts_per_tok=experts)
            check_routing(model, policies[name, experts], calibrating=True)
    if any(policy.calibrated for policy in policies.values()):
        check_calibration(model)
    return policies


@contextmanager
def _restored(model: nn.Module, layers: Mapping[str, SmileLinear]) -> Iterator[dict[str, dict[str, Tensor]]]:
    """The layers' factors, which are restored at the end with the ranks, the priors and the routing policy."""
    policy = get_routing(model)
    ranks = {name: (layer.rank_of_expert, layer.rank_of_router) for name, layer in layers.items()}
    priors = {name: layer.router_prior for name, layer in layers.items()}
    whole = {name: {part: getattr(layer, part).data for part in ("vh", "s", "u")} for name, layer in layers.items()}
    try:
        yield whole
    finally:
        for name, layer in layers.items():
            _set(layer, whole[name], *ranks[name])
            layer.router_prior = priors[name]
        set_routing(model, policy)


def _truncate(layers: Mapping[str, SmileLinear], whole: Mapping[str, Mapping[str, Tensor]], r: int, g: int) -> None:
    """Give every layer the leading r directions of its experts and g of its router."""
    for name, layer in layers.items():
        full = whole[name]
        _set(layer, {"vh": full["vh"][:, : max(r, g)], "s": full["s"][:, :r], "u": full["u"][:, :, :r]}, r, g)


def _set(layer: SmileLinear, factors: Mapping[str, Tensor], r: int, g: int) -> None:
    for part, tensor in factors.items():
        getattr(layer, part).data = tensor.to(layer.weight.device).contiguous()
    layer.rank_of_expert, layer.rank_of_router = min(r, layer.s.shape[1]), min(g, layer.vh.shape[1])


def _relative_size(model: nn.Module, layers: Mapping[str, SmileLinear]) -> float:
    """The number of parameters, relative to those that the base has."""
    held = (getattr(layer, name) for layer in layers.values() for name in FACTORS if name != "router_prior")
    experts = sum(tensor.numel() for tensor in held if tensor is not None)
    total = sum(p.numel() for p in model.parameters())
    return total / (total - experts)


def _scores(returned: object, tasks: Mapping[str, float] | None) -> dict[str, float]:
    """What the scoring function returned, as numbers by task."""
    scores: Mapping[Any, Any] = returned if isinstance(returned, Mapping) else {"score": returned}
    found = {}
    for task, value in scores.items():
        number = _number(value)
        if not isinstance(task, str) or number is None:
            raise SmileError(f"score: returned {returned!r}; expected a number, or a dict of numbers by task")
        found[task] = number
    if not found or (tasks is not None and found.keys() != tasks.keys()):
        expected = "one task or more" if tasks is None else f"those of the first setting, {list(tasks)}"
        raise SmileError(f"score: returned the tasks {list(found)}; expected {expected}")
    return found


def _number(value: Any) -> float | None:
    """A number of Python, NumPy or a tensor as a float; None for anything else."""
    try:
        value = value.item() if hasattr(value, "item") else value
        return float(value) if hasattr(value, "__float__") else None
    except Exception:  # several numbers, one without data, or beyond a float
        return None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def scoring_function(text: str) -> Callable[[Any], Any]:
    """The function of --score; what it raises is shown with its traceback."""
    place, _, name = text.rpartition(":")
    if not place or not name.isidentifier():
        raise SmileError(f"score: is {text!r}; expected MODULE:FUNCTION or FILE.py:FUNCTION")
    file = Path(place) if place.endswith(".py") else None
    if file and not file.is_file():
        raise FileNotFoundError(f"score: {place}: no such file; expected a Python file")
    try:
        if file:  # by its path, since it may have the name of an installed module
            spec: Any = importlib.util.spec_from_file_location(file.stem, file)
            module = importlib.util.module_from_spec(spec)
            sys.modules.setdefault(file.stem, module)
            sys.path.append(str(file.absolute().parent))
            spec.loader.exec_module(module)
        else:
            sys.path.append(os.getcwd())  # last, since its files may have the names of installed modules
            module = importlib.import_module(place)
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        raise SmileError(f"score: {place} cannot be imported ({reason(error)}); expected Python code") from None
    function = getattr(module, name, None)
    if not callable(function):
        raise SmileError(f"score: {place} has no function {name!r}; expected one that takes the model")

    def scored(model: Any) -> Any:
        try:
            return function(model)
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            raise SmileError(f"score: {text} raised {reason(error)}; expected a score") from None

    return scored
