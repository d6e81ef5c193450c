"""Every row of the table: what is made of one seed's fine-tunes, and how its tokens find their experts."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from smile_kernels import RoutingPolicy, set_routing, upscale
from smile_kernels.integrations.peft import adapter_deltas, is_adapter

from .. import merge
from .evaluate import own_expert, teacher_forced

SCALES = (0.2, 0.3, 0.45, 0.6, 1.0)  # of task arithmetic
TIES_SCALES = (0.5, 1.0, 1.5)
DENSITY = 0.2  # of TIES


@dataclass
class Case:
    """One seed's ingredients: folders of the base and of each task's adapter or full fine-tune, validation examples."""

    base: Path
    finetuned: Sequence[Path]
    validation: Sequence[tuple[list[int], list[int]]]
    rank_of_expert: int = 16  # that of the adapters: nothing is lost to the rank

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
        """The fine-tunes as experts of one model, routed as published."""
        options = {"rank_of_expert": self.rank_of_expert, "rank_of_router": rank_of_router, "progress": False}
        return upscale(self.model, self.experts, **options)[0].eval()


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
    contender = Contender.of(case.smile(8))
    contender.for_task = lambda i: own_expert(contender.model, i)
    return contender


def smile(policy: RoutingPolicy, rank_of_router: int = 8, calibrated: bool = False) -> Callable[[Case], Contender]:
    """A SMILE model under a routing policy."""

    def build(case: Case) -> Contender:
        model = case.smile(rank_of_router)
        set_routing(model, policy)
        return Contender.of(model, policy=policy.to_dict())

    return build


POLICIES = {
    "token + layers": RoutingPolicy("token", accumulate=True),
    "sequence + layers": RoutingPolicy("sequence", accumulate=True),
    "causal + layers": RoutingPolicy("causal", accumulate=True),
    "causal + layers, m 2": RoutingPolicy("causal", accumulate=True, num_experts_per_tok=2),
}
METHODS = [
    Method("base", lambda case: Contender.of(case.model), turns=False, timed=True),
    Method("individual", individual, full=True, timed=True),
    Method("simple averaging", averaging, turns=False),
    Method("task arithmetic", task_arithmetic),
    Method("ties", ties, turns=False),
    Method("published", smile(RoutingPolicy()), full=True, pictured=True, timed=True),
    Method("recommended", smile(RoutingPolicy("causal", accumulate=True)), full=True, pictured=True, timed=True),
    Method("oracle", oracle, full=True),
    Method("published, g 4", smile(RoutingPolicy(), 4), essential=False, turns=False),
    Method("published, g 16", smile(RoutingPolicy(), 16), essential=False, turns=False),
    Method("published, m 2", smile(RoutingPolicy(num_experts_per_tok=2)), essential=False, turns=False),
    *(Method(name, smile(policy), essential=False) for name, policy in POLICIES.items()),
]
