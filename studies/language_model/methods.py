"""The compared methods: how each builds a model from one seed's fine-tunes, and how it routes tokens."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from smile_kernels import RoutingPolicy, calibrate, set_routing, upscale, user_turn_ids
from smile_kernels.integrations.peft import adapter_deltas, is_adapter

from .. import merge
from .evaluate import own_expert, teacher_forced

ROUTER_RANK = 8  # g, where a row says nothing else
SCALES = (0.3, 0.45, 0.6)  # of task arithmetic
TIES_SCALES = (0.7, 1.0)
DENSITY = 0.2  # of TIES
SINGULAR_SCALES = (0.5, 1.0, 1.5)  # of TSV-Merge and Iso-C


@dataclass
class Case:
    """One seed: folders of the base and of each task's adapter or full fine-tune, validation examples."""

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
        """The adapters' changes scale * B A [tasks, O, D] of every layer, bfloat16, as PEFT computes them."""
        changes: dict[str, list[Tensor]] = {}
        for folder in self.finetuned:
            adapted = PeftModel.from_pretrained(copy.deepcopy(self.model).float(), folder).get_base_model()
            for name, module in adapted.named_modules():
                if isinstance(module, LoraLayer):
                    changes.setdefault(f"{name}.weight", []).append(module.get_delta_weight("default").bfloat16())
        return {name: torch.stack(of).detach() for name, of in changes.items()}

    def smile(self, rank_of_router: int) -> PreTrainedModel:
        """The fine-tunes as experts of one model, calibrated on text that it writes itself, routed as published."""
        if rank_of_router not in self.made:
            options = {"rank_of_expert": self.rank_of_expert, "rank_of_router": rank_of_router, "progress": False}
            options["expert_names"] = [folder.name.split("-")[0] for folder in self.finetuned]  # the tasks'
            self.made[rank_of_router] = upscale(self.model, self.experts, **options)[0].eval()
            calibrate(self.made[rank_of_router])
        return copy.deepcopy(self.made[rank_of_router])


def load(folder: Path) -> PreTrainedModel:
    """A checkpoint in bfloat16, for inference."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()


@dataclass
class Contender:
    """A built method: `for_task(i)` gives the model that answers task i; `details` are its settings and size."""

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
    """One row of the table. Those that are not essential are tested on fewer rows, with the first seed alone.

    Attributes:
        name: the row's.
        build: builds the model.
        essential: whether it is tested on every row and seed.
        routed: whether it has SMILE layers, so that answers depend on smile_kernels.
        turns: whether it also answers the second turn of conversations.
        full: whether it also runs on full fine-tunes.
        pictured: whether its tokens at their own expert are drawn, block by block.
        timed: whether its time per token is measured.
    """

    name: str
    build: Callable[[Case], Contender]
    essential: bool = True
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


def singular(
    method: Callable[[Mapping[str, Tensor]], dict[str, Tensor]],
) -> Callable[[Case], Contender]:
    """`method`, TSV-Merge or Iso-C, at the best scale."""

    def build(case: Case) -> Contender:
        change = method(case.vectors)
        return _best(case, (({"scale": s}, merge.scaled(change, s)) for s in SINGULAR_SCALES))

    return build


def oracle(case: Case) -> Contender:
    """Every token is routed to its own task's expert."""
    contender = Contender.of(case.smile(ROUTER_RANK))
    contender.for_task = lambda i: own_expert(contender.model, i)
    return contender


def smile(rank_of_router: int = ROUTER_RANK, restarts: bool = False, **fields: object) -> Callable[[Case], Contender]:
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


TOKEN, SEQUENCE, CAUSAL = ({"scope": scope, "accumulate": True} for scope in ("token", "sequence", "causal"))
TWO_PASSES = {"scope": "prompt", "calibrated": True}
LOCK = {"calibrated": True, "lock_after": 8}
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
PICTURED = ("causal + layers", "causal + layers, calibrated")
METHODS = [
    Method("base", lambda case: Contender.of(case.model), routed=False, turns=False, timed=True),
    Method("individual", individual, routed=False, full=True, timed=True),
    Method("simple averaging", averaging, routed=False, turns=False),
    Method("task arithmetic", task_arithmetic, routed=False, turns=False),
    Method("ties", ties, routed=False, turns=False),
    Method("tsv-merge", singular(merge.tsv), routed=False, turns=False),
    Method("iso-c", singular(merge.isotropic), routed=False, turns=False),
    Method("published", smile(), full=True, pictured=True, timed=True),
    Method("recommended", recommended, full=True, timed=True),
    Method(
        "causal + layers, calibrated, lock after 8 blocks, restarts", smile(restarts=True, **CAUSAL, **LOCK), timed=True
    ),
    Method("sequence + layers, calibrated, restarts", smile(restarts=True, **SEQUENCE, calibrated=True), timed=True),
    Method("two passes, restarts", smile(restarts=True, **TWO_PASSES), timed=True),
    Method("oracle", oracle, full=True, turns=False),
    *(Method(name, build, essential=False, turns=False, pictured=name in PICTURED) for name, build in VARIANTS.items()),
]
