"""Compile before the first request, and measure the best configurations on the current GPU."""

import itertools
import json
import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from ...publishing import write_text
from . import configs
from .backend import apply, apply_backward, linear, linear_backward


def warmup(
    weight: Tensor,
    bias: Tensor | None,
    vh: Tensor,
    s: Tensor,
    u: Tensor,
    expert_bias: Tensor | None,
    router: Tensor | None,
    num_experts_per_tok: int,
    rank_of_router: int,
    *,
    tokens: Iterable[int],
    training: bool = False,
) -> None:
    """Compile every kernel that a layer of these parameters needs for each number of `tokens`, by running it on zeros.

    With its own routing and with a given one; with `training` the backward too. Triton keeps what it compiles on disk,
    so another process only loads it.
    """
    m = num_experts_per_tok
    for t in tokens:
        x = weight.new_zeros(t, weight.shape[1])
        parameters = x, weight, bias, vh, s, u, expert_bias
        y, weights, ids, h = linear(*parameters, router, m, rank_of_router, training)
        apply(*parameters, weights, ids, training)
        if training:
            factors = x, weight, vh, s, u, expert_bias
            needs = [True] * 6 + [expert_bias is not None]
            apply_backward(y, *factors, weights, ids, h, [*needs, m > 1])
            wanted = [*needs, router is not None]
            linear_backward(y, *factors, router, weights, ids, h, rank_of_router, wanted)


def tune(
    weight: Tensor,
    bias: Tensor | None,
    vh: Tensor,
    s: Tensor,
    u: Tensor,
    expert_bias: Tensor | None,
    router: Tensor | None,
    num_experts_per_tok: int,
    rank_of_router: int,
    *,
    tokens: Iterable[int],
    report: Callable[[str, dict[str, object], float], None] = lambda *_: None,
) -> dict[str, object]:
    """Time every way to run the forward of this layer for each number of `tokens`: the best choices, key -> choice.

    Every path is timed, each with its best tiles; `report` gets each configuration and its seconds. The choices
    hold in this process from now on, and in others once `save` has written them.
    """
    table = configs.tables().setdefault(configs.device_of(weight.device).name, {})
    best: dict[str, object] = {}
    for t in tokens:
        x = torch.randn(t, weight.shape[1], device=weight.device).to(weight.dtype)
        arguments = x, weight, bias, vh, s, u, expert_bias, router, num_experts_per_tok, rank_of_router, False
        with torch.cuda.device_of(x):
            _, choices = _search(lambda arguments=arguments: linear(*arguments), table, {}, report)
        best |= choices
    table |= best
    configs.tables().changed()
    return best


def _search(run: Callable, table: dict, fixed: dict, report: Callable) -> tuple[float, dict]:
    """The least time of `run` over the free choices, and these: paths in every combination, tiles one by one."""
    table |= fixed
    open_choices = {key: choices for key, choices in _asked(run).items() if key not in fixed}
    path = next((key for key, choices in open_choices.items() if isinstance(choices[0], str)), None)
    if path is not None:
        found = [_search(run, table, {**fixed, path: choice}, report) for choice in open_choices[path]]
        table.pop(path)
        return min(found, key=lambda f: f[0])
    least, fixed = math.inf, dict(fixed)
    for key, choices in open_choices.items():
        times = []
        for choice in choices:
            table[key] = choice
            times.append(_seconds(run))
            report(key, {**fixed, key: choice}, times[-1])
        least = min(times)
        fixed[key] = table[key] = choices[times.index(least)]
    for key in open_choices:
        table.pop(key)
    return least, fixed


def _asked(run: Callable) -> dict[str, list]:
    """The choices that `run` makes: key -> what it could have chosen."""
    tables = configs.tables()
    tables.changed()
    tables.asked = {}
    try:
        run()
        return tables.asked
    finally:
        tables.asked = None


def _seconds(run: Callable, calls: int = 20, rounds: int = 11) -> float:
    """The median time of one `run` in a CUDA graph; infinite where the device lacks the resources."""
    configs.tables().changed()
    try:
        for _ in range(3):
            run()
    except OutOfResources:
        return math.inf
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            run()
    graph.replay()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(rounds + 1)]
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    torch.cuda.synchronize()
    times = sorted(a.elapsed_time(b) for a, b in itertools.pairwise(events))
    return times[rounds // 2] / calls / 1e3


def save(device: torch.device, choices: dict[str, object]) -> None:
    """Add choices for `device` to the user's table, which every later process reads."""
    path, table = configs.user_table(), configs.stored_tables(replaces=True)
    table.setdefault(configs.device_of(device).name, {}).update(choices)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(table, indent=1, sort_keys=True) + "\n")
