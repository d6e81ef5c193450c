"""The compared methods: how each builds a model from one seed's fine-tunes, and how it routes tokens."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from smile_kernels import RoutingPolicy, routing_override, set_routing, user_turn_ids
from smile_kernels.integrations.peft import is_adapter

from .. import merge, vote
from . import merging
from .case import Case, Contender
from .evaluate import own_expert

ROUTER_RANK = 8  # g, where a row says nothing else


@dataclass(frozen=True)
class Method:
    """One row of the table. Those that are not essential are tested on fewer rows, variants with the first seed alone.

    Attributes:
        name: the row's.
        build: builds the model.
        essential: whether it is tested on every row.
        variant: whether it is tested with the first seed alone.
        routed: whether it has SMILE layers, so that answers depend on smile_kernels.
        turns: whether it also answers the second turn of conversations.
        full: whether it also runs on full fine-tunes.
        pictured: whether its tokens at their own expert are drawn, block by block.
        timed: whether its time per token is measured.
    """

    name: str
    build: Callable[[Case], Contender]
    essential: bool = True
    variant: bool = False
    routed: bool = True
    turns: bool = True
    full: bool = False
    pictured: bool = False
    timed: bool = False


def individual(case: Case) -> Contender:
    """Each task on its own fine-tune; adapters as PEFT runs them."""
    adapters = {i: folder for i, folder in enumerate(case.finetuned) if is_adapter(folder)}
    model = None
    for i, folder in adapters.items():
        if model is None:
            model = PeftModel.from_pretrained(copy.deepcopy(case.model), folder, str(i), autocast_adapter_dtype=False)
        else:
            model.load_adapter(folder, str(i), autocast_adapter_dtype=False)
    model.eval()

    @contextmanager
    def for_task(i: int) -> Iterator[PreTrainedModel]:
        if i in adapters:
            model.set_adapter(str(i))
        yield model if i in adapters else case.experts[i]

    of_full = sum(p.numel() for e in case.experts if isinstance(e, nn.Module) for p in e.parameters())
    return Contender(model, for_task, {"parameters": sum(p.numel() for p in model.parameters()) + of_full})


def oracle(case: Case) -> Contender:
    """Every token is routed to its own task's expert."""
    contender = Contender.of(case.smile(ROUTER_RANK))
    contender.for_task = lambda i: own_expert(contender.model, i)
    return contender


def smile(
    rank_of_router: int | str = ROUTER_RANK, restarts: bool = False, **fields: object
) -> Callable[[Case], Contender]:
    """A SMILE model under the routing policy of `fields`; with `restarts`, it restarts at each user turn."""

    def build(case: Case) -> Contender:
        turn = {"restart_at": user_turn_ids(case.tokenizer)} if restarts else {}
        return _routed(case.smile(rank_of_router), RoutingPolicy(**fields, **turn))

    return build


def _routed(model: PreTrainedModel, policy: RoutingPolicy) -> Contender:
    set_routing(model, policy)
    return Contender.of(model, policy=policy.to_dict())


def recommended(case: Case) -> Contender:
    """The recommended policy, which restarts at each user turn."""
    model = case.smile(ROUTER_RANK)
    return _routed(model, RoutingPolicy.recommended(model, user_turn_ids(case.tokenizer)))


class LayerVote:
    """A SMILE model under the rule of `vote`, by one layer, for generation."""

    def __init__(self, model: PreTrainedModel, layer: str):
        self.model, self.layer = model, layer

    def generate(self, input_ids: Tensor, attention_mask: Tensor, **options: object) -> Tensor:
        batch = {"input_ids": input_ids, "attention_mask": attention_mask}
        weights = vote.weights(vote.residuals(self.model, **batch, use_cache=False)[self.layer])
        with routing_override(self.model, weights):
            return self.model.generate(**batch, **options)


def one_layer_votes(case: Case) -> Contender:
    """The layer that selects the own expert of most validation prompts."""
    model, tasks = case.smile(ROUTER_RANK), len(case.finetuned)
    each = len(case.validation) // tasks
    prompts = [torch.tensor([prompt]) for prompt, _ in case.validation]

    def found() -> Iterator[tuple[int, dict[str, Tensor]]]:
        for number, ids in enumerate(prompts):
            yield number // each, vote.residuals(model, torch.ones_like(ids), input_ids=ids, use_cache=False)

    voter = LayerVote(model, vote.best_layer(found()))
    details = {"parameters": sum(p.numel() for p in model.parameters()), "layer": voter.layer}
    return Contender(model, lambda i: nullcontext(voter), details)


TOKEN, SEQUENCE, CAUSAL = ({"scope": scope, "accumulate": True} for scope in ("token", "sequence", "causal"))
TWO_PASSES = {"scope": "prompt", "calibrated": True}
LOCK = {"calibrated": True, "lock_after": 8}
# Other rules of routing than this package's policies, also in conversations.
RULES: dict[str, Callable[[Case], Contender]] = {
    "published, m 3, top_p 0.9": smile(num_experts_per_tok=3, top_p=0.9),
    "router arrow": smile("arrow"),
    "router norm": smile("norm"),
    "one layer votes, two passes (MASS)": one_layer_votes,
}
VARIANTS: dict[str, Callable[[Case], Contender]] = {
    "published, g 4": smile(4),
    "published, g 16": smile(16),
    "published, m 2": smile(num_experts_per_tok=2),
    "published, calibrated": smile(calibrated=True),
    "token + layers": smile(**TOKEN),
    "token + layers, calibrated": smile(**TOKEN, calibrated=True),
    "sequence + layers": smile(**SEQUENCE),
    "sequence + layers, calibrated": smile(**SEQUENCE, calibrated=True),
    "causal + layers": smile(**CAUSAL),
    "causal + layers, calibrated": smile(**CAUSAL, calibrated=True),
    "causal + layers, calibrated, g 4": smile(4, **CAUSAL, calibrated=True),
    "causal + layers, calibrated, g 16": smile(16, **CAUSAL, calibrated=True),
    "causal + layers, calibrated, m 2": smile(**CAUSAL, calibrated=True, num_experts_per_tok=2),
    "causal + layers, calibrated, half-life 16": smile(**CAUSAL, calibrated=True, half_life=16),
    "causal + layers, calibrated, lock after 1 block": smile(**CAUSAL, calibrated=True, lock_after=1),
    "causal + layers, calibrated, lock after 8 blocks": smile(**CAUSAL, **LOCK),
    "two passes": smile(**TWO_PASSES),
    "two passes, not calibrated": smile(scope="prompt"),
}
WITH_DATA = {
    "fisher": merging.fisher,
    "regmean": merging.regmean,
    "adamerging, by task": merging.adamerging(by_layer=False),
    "adamerging, by layer": merging.adamerging(by_layer=True),
    "wemoe": merging.wemoe,
}
PICTURED = ("causal + layers", "causal + layers, calibrated")
METHODS = [
    Method("base", lambda case: Contender.of(case.model), routed=False, turns=False, timed=True),
    Method("individual", individual, routed=False, full=True, timed=True),
    Method("simple averaging", merging.averaging, routed=False, turns=False),
    Method("task arithmetic", merging.task_arithmetic, routed=False, turns=False),
    Method("ties", merging.ties, routed=False, turns=False),
    Method("tsv-merge", merging.singular(merge.tsv), routed=False, turns=False),
    Method("iso-c", merging.singular(merge.isotropic), routed=False, turns=False),
    *(Method(name, build, essential=False, routed=False, turns=False) for name, build in WITH_DATA.items()),
    Method("published", smile(), full=True, pictured=True, timed=True),
    Method("recommended", recommended, full=True, timed=True),
    Method(
        "causal + layers, calibrated, lock after 8 blocks, restarts", smile(restarts=True, **CAUSAL, **LOCK), timed=True
    ),
    Method("sequence + layers, calibrated, restarts", smile(restarts=True, **SEQUENCE, calibrated=True), timed=True),
    Method("two passes, restarts", smile(restarts=True, **TWO_PASSES), timed=True),
    Method("oracle", oracle, full=True, turns=False),
    *(Method(name, build, essential=False, variant=True) for name, build in RULES.items()),
    *(
        Method(name, build, essential=False, variant=True, turns=False, pictured=name in PICTURED)
        for name, build in VARIANTS.items()
    ),
]
