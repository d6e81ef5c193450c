"""The inputs of a method, which are one seed's fine-tunes, and its result, a built model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from smile_kernels import calibrate, upscale
from smile_kernels.integrations.peft import adapter_deltas, is_adapter

from .model import DTYPE, Example


@dataclass
class Case:
    """One seed: the fine-tunes, and the texts that some methods of merging need.

    Attributes:
        base: folder of the base.
        finetuned: folder of each task's adapter or full fine-tune.
        validation: examples (prompt ids, answer ids) of all tasks.
        training: some training examples of each task.
        prompts: some test prompts of each task, without answers.
        rank_of_expert: that of the adapters: nothing is lost to the rank.
        made: SMILE models by g, or by the name of another router.
    """

    base: Path
    finetuned: Sequence[Path]
    validation: Sequence[Example]
    training: Sequence[Sequence[Example]]
    prompts: Sequence[Sequence[list[int]]]
    rank_of_expert: int = 16
    made: dict[int | str, PreTrainedModel] = field(default_factory=dict)

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
        """The adapters' changes scale * B A [tasks, O, D] of every layer, in bfloat16 for less memory."""
        changes: dict[str, list[Tensor]] = {}
        for folder in self.finetuned:
            adapted = PeftModel.from_pretrained(copy.deepcopy(self.model).float(), folder).get_base_model()
            for name, module in adapted.named_modules():
                if isinstance(module, LoraLayer):
                    changes.setdefault(f"{name}.weight", []).append(module.get_delta_weight("default").bfloat16())
        return {name: torch.stack(of).detach() for name, of in changes.items()}

    def smile(self, rank_of_router: int | str) -> PreTrainedModel:
        """The fine-tunes as experts of one model, routed as published: by g rows, calibrated on text that it writes
        itself; or by another router, "arrow" or "norm"."""
        if rank_of_router not in self.made:
            named = isinstance(rank_of_router, str)
            router = {"router": rank_of_router} if named else {"rank_of_router": rank_of_router}
            options = {"rank_of_expert": self.rank_of_expert, "progress": False, **router}
            options["expert_names"] = [folder.name.split("-")[0] for folder in self.finetuned]  # the tasks'
            self.made[rank_of_router] = upscale(self.model, self.experts, **options)[0].eval()
            if not named:
                calibrate(self.made[rank_of_router])
        return copy.deepcopy(self.made[rank_of_router])


def load(folder: Path) -> PreTrainedModel:
    """A checkpoint, for inference."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPE).eval()


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
