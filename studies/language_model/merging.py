"""The methods that merge the fine-tunes into one model of the base's size, without SMILE layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.func import functional_call
from transformers import PreTrainedModel

from .. import merge
from .case import Case, Contender
from .evaluate import continued, teacher_forced
from .model import Example, answer_loss

SCALES = (0.3, 0.45, 0.6)  # of task arithmetic
TIES_SCALES = (0.7, 1.0)
DENSITY = 0.2  # of TIES
SINGULAR_SCALES = (0.5, 1.0, 1.5)  # of TSV-Merge and Iso-C
KEPT = (0.1, 0.5, 0.9)  # of off-diagonal elements in RegMean
STEPS = (10, 20)  # of AdaMerging and WEMoE
ADAPTED = {"texts": 2, "start": 0.3, "rate": 0.02, "gate_rate": 1e-3}  # the same; texts of each task per step
UNLABELLED = "test, unlabelled; validation"  # their data


def _best(case: Case, options: Iterable[tuple[dict, dict[str, Tensor]]], data: str = "validation") -> Contender:
    """The best of `options` (settings, change of the base) by teacher-forced exact match on validation rows."""
    models = ((settings, merge.add_to(case.model, change)) for settings, change in options)
    return _best_model(case, models, data, teacher_forced)


def _best_model(
    case: Case,
    options: Iterable[tuple[dict, PreTrainedModel]],
    data: str,
    score_of: Callable[[PreTrainedModel, Sequence[Example]], float],
) -> Contender:
    """The best of `options` (settings, model) by its score on validation rows."""
    best, score = None, -1.0
    for settings, model in options:
        found = score_of(model, case.validation)
        if found > score:
            best, score = Contender.of(model, **settings, validation=found, data=data), found
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


def _own(case: Case, task: int) -> PreTrainedModel:
    """A task's fine-tuned model, merged, in float32."""
    return merge.add_to(case.model, {name: tau[task] for name, tau in case.vectors.items()}).float()


def fisher(case: Case) -> Contender:
    """Fisher merging, from squared gradients of the log-likelihood of training answers."""
    information = []
    for i, texts in enumerate(case.training):
        model = _own(case, i)
        theta = [model.get_parameter(name) for name in case.vectors]
        found = {name: torch.zeros_like(p) for name, p in zip(case.vectors, theta)}
        for example in texts:
            gradients = torch.autograd.grad(len(example[1]) * answer_loss(model, [example]), theta)
            for total, gradient in zip(found.values(), gradients):
                total += gradient.square() / len(texts)
        information.append(found)
    return Contender.of(merge.add_to(case.model, merge.fisher(case.vectors, information)), data="training")


def regmean(case: Case) -> Contender:
    """RegMean, from the inputs of linear layers on training texts; the factor of off-diagonal elements is the best."""
    of_models = []
    for i, texts in enumerate(case.training):
        arguments = ({"input_ids": torch.tensor([prompt + answer]), "use_cache": False} for prompt, answer in texts)
        of_models.append(merge.grams(_own(case, i), arguments))
    options = (({"kept": k}, merge.regmean(case.vectors, of_models, k)) for k in KEPT)
    return _best(case, options, "training, validation")


def _entropies(case: Case, logits: Callable[..., Tensor], generator: torch.Generator) -> Iterator[Tensor]:
    """The entropy of the answer's first token for some test prompts of each task, drawn again each time."""
    for prompts in case.prompts:
        for row in torch.randint(len(prompts), (ADAPTED["texts"],), generator=generator).tolist():
            arguments = {"input_ids": torch.tensor([prompts[row]]), "use_cache": False, "logits_to_keep": 1}
            yield merge.entropy(logits(arguments)[:, -1].float())


def adamerging(by_layer: bool) -> Callable[[Case], Contender]:
    """AdaMerging with weights by task, or by task and parameter, at the best number of steps.

    The entropy is that of the first token of the answers to test prompts.
    """

    def changes(case: Case) -> Iterator[tuple[dict, dict[str, Tensor]]]:
        base = case.model
        fixed = {name: p.detach() for name, p in base.named_parameters()}
        weights = torch.full((len(case.finetuned), len(case.vectors) if by_layer else 1), ADAPTED["start"])
        generator = torch.Generator().manual_seed(0)

        def losses() -> Iterator[Tensor]:
            change = merge.weighted(case.vectors, weights)
            theta = fixed | {name: fixed[name] + delta for name, delta in change.items()}
            return _entropies(case, lambda arguments: functional_call(base, theta, (), arguments).logits, generator)

        for step in merge.adapt([weights.requires_grad_(True)], losses, ADAPTED["rate"]):
            if step in STEPS:
                yield {"steps": step}, merge.weighted(case.vectors, weights.detach())
            if step >= max(STEPS):
                return

    return lambda case: _best(case, changes(case), UNLABELLED)


def wemoe(case: Case) -> Contender:
    """WEMoE of the MLPs, at the best number of steps; the entropy is AdaMerging's, without the answers."""
    return _best_model(case, _gated(case), UNLABELLED, continued)


def _gated(case: Case) -> Iterator[tuple[dict, PreTrainedModel]]:
    """Weight ensembling of the MLPs; options by the steps of its adaptation."""
    layers = range(case.model.config.num_hidden_layers)
    mlps = [[f"model.layers.{n}.mlp.{of}_proj" for of in ("gate", "up", "down")] for n in layers]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = merge.weight_ensembling(case.model, case.vectors, mlps, ADAPTED["start"], masked="model")
    generator = torch.Generator().manual_seed(0)

    def losses() -> Iterator[Tensor]:
        return _entropies(case, lambda arguments: model(**arguments).logits, generator)

    for step in merge.adapt([p for p in model.parameters() if p.requires_grad], losses, ADAPTED["gate_rate"]):
        if step in STEPS:
            yield {"steps": step}, merge.with_own_gates(model)
        if step >= max(STEPS):
            return
