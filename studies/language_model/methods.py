"""Every row of the table: what is made of one seed's fine-tunes, and how its tokens find their experts."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from smile_kernels import RoutingPolicy, calibrate, get_routing, set_routing, upscale, user_turn_ids
from smile_kernels.integrations.peft import adapter_deltas, is_adapter

from .. import merge
from .evaluate import own_expert, teacher_forced

ROUTER_RANK = 8  # g, where a row says nothing else
SCALES = (0.3, 0.45, 0.6)  # of task arithmetic
TIES_SCALES = (0.7, 1.0)
DENSITY = 0.2  # of TIES


@dataclass
class Case:
    """One seed's ingredients: folders of the base and of each task's adapter or full fine-tune, validation examples."""

    base: Path
    finetuned: Sequence[Path]
    validation: Sequence[tuple[list[int], list[int]]]
    rank_of_expert: int = 16  # that of the adapters: nothing is lost to the rank
    made: dict[int, PreTrainedModel] = field(default_factory=dict)  # SMILE models by g

    @cached_property
    def model(self) -> PreTrainedModel:
        return load(self.base)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return AutoTokenizer.from_pretrained(self.base)

    @cached_property
    def experts(self) -> list[Mapping | nn.Module]:
        weights = self.model.state_dict()
        return [adapter_deltas(f, weights) if is_adapter(f) else load(f) for f in self.finetuned]

    @cached_property
    def vectors(self) -> dict[str, Tensor]:
        """The adapters' changes scale * B A [tasks, O, D] of every layer, bfloat16."""
        factors = {name: [deltas[name].weight for deltas in self.experts] for name in self.experts[0]}
        return {
            f"{name}.weight": torch.stack([(of.scale * (of.b.float() @ of.a.float())).bfloat16() for of in deltas])
            for name, deltas in factors.items()
        }

    def smile(self, rank_of_router: int) -> PreTrainedModel:
        """The fine-tunes as experts of one model, calibrated on text that it writes itself, routed as published."""
        if rank_of_router not in self.made:
            options = {"rank_of_expert": self.rank_of_expert, "rank_of_router": rank_of_router, "progress": False}
            self.made[rank_of_router] = upscale(self.model, self.experts, **options)[0].eval()
            calibrate(self.made[rank_of_router])
        return copy.deepcopy(self.made[rank_of_router])


def load(folder: Path) -> PreTrainedModel:
    """A checkpoint in bfloat16, for inference."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()


@dataclass
class Contender:
    """What answers: `for_task(i)` gives the model that answers task i; settings and size are on record."""

    model: PreTrainedModel
    for_task: Callable[[int], AbstractContextManager[PreTrainedModel]]
    details: dict = field(default_factory=dict)

    @classmethod
    def of(cls, model: PreTrainedModel, **details: object) -> Contender:
        """One model for all tasks."""
        details = {"parameters": sum(p.numel() for p in model.parameters()), **details}
        return cls(model, lambda i: nullcontext(model), details)


@dataclass(frozen=True)
class Method:
    """One row of the table. Those that are not essential are tested on fewer rows, with the first seed alone."""

    name: str
    build: Callable[[Case], Contender]
    essential: bool = True
    turns: bool = True  # also answers the second turn of conversations
    full: bool = False  # also runs on full fine-tunes
    pictured: bool = False  # its tokens at their own expert are drawn, block by block
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


def _best(case: Case, options: Iterator[tuple[dict, dict[str, Tensor]]]) -> Contender:
    """The best of `options` (settings, change of the base) by teacher-forced exact match on validation rows."""
    best, score = None, -1.0
    for settings, change in options:
        model = merge.add_to(case.model, change)
        found = teacher_forced(model, case.validation)
        if found > score:
            best, score = Contender.of(model, **settings, validation=found), found
    return best


def averaging(case: Case) -> Contender:
    return Contender.of(merge.add_to(case.model, merge.task_arithmetic(case.vectors, 1 / len(case.finetuned))))


def task_arithmetic(case: Case) -> Contender:
    return _best(case, (({"scale": s}, merge.task_arithmetic(case.vectors, s)) for s in SCALES))


def ties(case: Case) -> Contender:
    settings = [{"density": DENSITY, "scale": s} for s in TIES_SCALES]
    return _best(case, ((s, merge.ties(case.vectors, **s)) for s in settings))


def oracle(case: Case) -> Contender:
    """Every token at its own task's expert."""
    contender = Contender.of(case.smile(ROUTER_RANK))
    contender.for_task = lambda i: own_expert(contender.model, i)
    return contender


def smile(policy: RoutingPolicy, rank_of_router: int = ROUTER_RANK) -> Callable[[Case], Contender]:
    """A SMILE model under a routing policy."""
    return lambda case: _routed(case.smile(rank_of_router), policy)


def _routed(model: PreTrainedModel, policy: RoutingPolicy) -> Contender:
    set_routing(model, policy)
    return Contender.of(model, policy=policy.to_dict())


def recommended(case: Case) -> Contender:
    """The recommended policy: it starts anew where a user turn begins."""
    model = case.smile(ROUTER_RANK)
    return _routed(model, RoutingPolicy.recommended(model, user_turn_ids(case.tokenizer)))


def restarting(build: Callable[[Case], Contender]) -> Callable[[Case], Contender]:
    """The same policy, but its sums start anew where a user turn begins."""

    def built(case: Case) -> Contender:
        model = build(case).model
        return _routed(model, replace(get_routing(model), restart_at=user_turn_ids(case.tokenizer)))

    return built


LOCKED = "causal + layers, calibrated, lock after 8 blocks"
locked = RoutingPolicy("causal", accumulate=True, calibrated=True, lock_after=8)
two_passes = smile(RoutingPolicy("prompt", calibrated=True))
POLICIES = {
    "token + layers": RoutingPolicy("token", accumulate=True),
    "sequence + layers": RoutingPolicy("sequence", accumulate=True),
    "causal + layers": RoutingPolicy("causal", accumulate=True),
}
CAUSAL = RoutingPolicy("causal", accumulate=True, calibrated=True)
VARIANTS: dict[str, tuple[RoutingPolicy, int]] = {  # (policy, g)
    "published, g 4": (RoutingPolicy(), 4),
    "published, g 16": (RoutingPolicy(), 16),
    "published, m 2": (RoutingPolicy(num_experts_per_tok=2), ROUTER_RANK),
    "published, calibrated": (RoutingPolicy(calibrated=True), ROUTER_RANK),
    **{name: (policy, ROUTER_RANK) for name, policy in POLICIES.items()},
    **{f"{name}, calibrated": (replace(policy, calibrated=True), ROUTER_RANK) for name, policy in POLICIES.items()},
    "two passes, not calibrated": (RoutingPolicy("prompt"), ROUTER_RANK),
    "causal + layers, calibrated, g 4": (CAUSAL, 4),
    "causal + layers, calibrated, g 16": (CAUSAL, 16),
    "causal + layers, calibrated, m 2": (replace(CAUSAL, num_experts_per_tok=2), ROUTER_RANK),
    "causal + layers, calibrated, half-life 16": (replace(CAUSAL, half_life=16), ROUTER_RANK),
    "causal + layers, calibrated, lock after 1 block": (replace(CAUSAL, lock_after=1), ROUTER_RANK),
}
PICTURED = ("causal + layers", "causal + layers, calibrated")
METHODS = [
    Method("base", lambda case: Contender.of(case.model), essential=False, turns=False, timed=True),
    Method("individual", individual, full=True, timed=True),
    Method("simple averaging", averaging, essential=False, turns=False),
    Method("task arithmetic", task_arithmetic, essential=False, turns=False),
    Method("ties", ties, essential=False, turns=False),
    Method("published", smile(RoutingPolicy()), full=True, pictured=True, timed=True),
    Method("recommended", recommended, full=True),
    Method(LOCKED, smile(locked), pictured=True, timed=True),
    Method(f"{LOCKED}, restarts at user turns", restarting(smile(locked))),
    Method("two passes", two_passes, essential=False, timed=True),
    Method("oracle", oracle, essential=False, full=True, turns=False),
    *(
        Method(name, smile(*of), essential=False, turns=False, pictured=name in PICTURED)
        for name, of in VARIANTS.items()
    ),
]
