"""The choice of experts: routing policies, and rules defined here, on four sets of texts.

"prompted": as in the study. "words": single words without their prompt. "misled": preceded by the prompt of another
task. "mixed": two texts of different tasks in one sequence, each classified from its own tokens.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

from smile_kernels import (
    RoutingPolicy,
    SmileLinear,
    calibrate,
    functional,
    routing_override,
    set_routing,
    upscale,
    watch_routing,
)
from smile_kernels.nn import smile_layers

from .. import vote
from .model import Lower, Split, Trained, Upper, by_length, encode_split, pad

WORDS = ("part of speech", "first name", "town")
PUBLISHED = "published"
_SUMS = {
    "token + layers": RoutingPolicy("token", accumulate=True),
    "sequence + layers": RoutingPolicy("sequence", accumulate=True),
    "causal + layers": RoutingPolicy("causal", accumulate=True),
    "causal + layers, half-life 8": RoutingPolicy("causal", accumulate=True, half_life=8),
    "window of 1 + layers": RoutingPolicy("window", accumulate=True, window=1),
    "window of 2 + layers": RoutingPolicy("window", accumulate=True, window=2),
}
POLICIES = {
    PUBLISHED: RoutingPolicy(),
    "published, m 2": RoutingPolicy(num_experts_per_tok=2),
    "published, m 3, top_p 0.9": RoutingPolicy(num_experts_per_tok=3, top_p=0.9),
    "published, calibrated": RoutingPolicy(calibrated=True),
    **{
        f"{name}{', calibrated' * calibrated}": dataclasses.replace(policy, calibrated=calibrated)
        for name, policy in _SUMS.items()
        for calibrated in (False, True)
    },
}


@dataclass(frozen=True)
class Sizes:
    """The number of texts in each set: prompted, words and misled of each task, mixed of each pair of tasks."""

    prompted: int = 200
    words: int = 200
    misled: int = 100
    mixed: int = 50


@dataclass
class Text:
    """A sequence's states [L, D] before the upper layers, and (task, first token, end, class) of each part."""

    states: Tensor
    parts: list[tuple[int, int, int, int]]


@torch.no_grad()
def text_sets(
    trained: Sequence[Trained], lower: Lower, tokenizer: Tokenizer, split: str, sizes: Sizes
) -> dict[str, list[Text]]:
    """The four sets of texts, of one held-out split."""

    def whole(i: int, of: Split, count: int) -> list[Text]:
        return [Text(s, [(i, 0, len(s), label)]) for s, label in zip(of.states[:count], of.labels.tolist())]

    def behind(i: int, prompt: str, count: int) -> list[Text]:
        task = dataclasses.replace(trained[i].task, prompt=prompt)
        rows = trained[i].rows[split][:count]
        return whole(i, encode_split(lower, tokenizer, task, rows, trained[i].classes), count)

    sets: dict[str, list[Text]] = {"prompted": [], "words": [], "misled": [], "mixed": []}
    for i, one in enumerate(trained):
        j = (i + 1) % len(trained)
        own, other = getattr(one, split), getattr(trained[j], split)
        sets["prompted"] += whole(i, own, sizes.prompted)
        if one.task.name in WORDS:
            sets["words"] += behind(i, "", sizes.words)
        sets["misled"] += behind(i, trained[j].task.prompt, sizes.misled)
        last = min(sizes.prompted, len(other.tokens)) - 1
        for k in range(min(sizes.mixed, last + 1, len(own.tokens))):
            first, second = own.tokens[k], other.tokens[last - k][1:]  # only one [CLS]
            ids = torch.cat([first, second])[None]
            states, cut = lower(ids, attention_mask=torch.ones(ids.shape, dtype=torch.bool))[0], len(first)
            parts = [(i, 0, cut, own.labels[k].item()), (j, cut, len(states), other.labels[last - k].item())]
            sets["mixed"].append(Text(states, parts))
    return sets


@dataclass
class Pass:
    """One forward pass under a rule: its tokens, the number of the SMILE layer that runs, evidence by name."""

    real: Tensor  # [B, S, 1], 1 on text, 0 on padding
    owner: Tensor  # [B, S], the task of each token, -1 on padding
    layer: int = -1
    evidence: dict[str, Tensor] = field(default_factory=dict)


# Shares p [B, S, N] of a layer -> weights and ids [B, S or 1, m].
Rule = Callable[[Pass, Tensor], tuple[Tensor, Tensor]]


def oracle(at: Pass, p: Tensor) -> tuple[Tensor, Tensor]:
    """Send every token to its own task's expert."""
    ids = at.owner.clamp_min(0)[..., None]
    return torch.ones(ids.shape), ids


def tempered(at: Pass, p: Tensor) -> tuple[Tensor, Tensor]:
    """Windows of 2 + layers, but the three best experts, weighted by softmax(3 L / layers): flat where L is unsure."""
    near = F.pad(p * at.real, (0, 0, 2, 2)).unfold(1, 5, 1).sum(-1)
    logs = (near / near.sum(-1, keepdim=True).clamp_min(1e-30)).clamp_min(1e-30).log()
    at.evidence["sum"] = at.evidence.get("sum", 0) + logs
    return functional.select_experts(3 * at.evidence["sum"] / (at.layer + 1), 3)


def follow(model: Upper, rule: Rule) -> Upper:
    """Make every SMILE layer of `model` choose by `rule`, in passes of `answer`."""

    def choose(layer: SmileLinear, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        (x,), at = args, model.under_way
        at.layer += 1
        energy = functional.router_scores(x, layer.vh, rank_of_router=layer.rank_of_router).square()
        weights, ids = rule(at, energy / energy.sum(-1, keepdim=True).clamp_min(1e-30))
        return args, {"routing": tuple(t.expand(*x.shape[:-1], -1).contiguous() for t in (weights, ids.int()))}

    for layer in smile_layers(model).values():
        layer.register_forward_pre_hook(choose, with_kwargs=True)
    return model


class LayerVote(nn.Module):
    """The rule of `vote`, by one layer."""

    def __init__(self, model: Upper, layer: str):
        super().__init__()
        self.model, self.layer = model, layer

    @property
    def layers(self) -> nn.ModuleList:
        return self.model.layers

    def forward(self, states: Tensor, attention_mask: Tensor) -> Tensor:
        weights = vote.weights(vote.residuals(self.model, attention_mask, states)[self.layer])
        with routing_override(self.model, weights):
            return self.model(states, attention_mask=attention_mask)

    @classmethod
    def by_validation(cls, model: Upper, trained: Sequence[Trained], count: int = 100) -> LayerVote:
        """With the layer that selects the own expert of most validation texts."""
        texts = [task.validation.gather(torch.arange(min(count, len(task.validation.labels)))) for task in trained]
        return cls(model, vote.best_layer((i, vote.residuals(model, m, states)) for i, (states, m) in enumerate(texts)))


@torch.no_grad()
def answer(model: Upper | LayerVote, heads: Sequence[nn.Module], texts: Sequence[Text]) -> dict:
    """By task: "right", a character for each part, 1 in the right class and 0 in another, in the order of the texts'
    lengths; "own", the share of the parts' tokens at their own expert over all SMILE layers, %, None without parts."""
    right, tokens = ["" for _ in heads], torch.zeros(len(heads), 2)
    seen: dict[str, Tensor] = {}
    hooks = [model.layers[-1].register_forward_hook(lambda _, args, output: seen.update(last=output))]

    def count(layer: SmileLinear, args: tuple, kwargs: dict, output: Tensor) -> None:
        first = kwargs["routing"][1][..., 0]
        for task in range(len(heads)):
            of = (model.under_way.owner == task) & (first >= 0)  # -1: the base alone
            tokens[task] += torch.tensor([(first[of] == task).sum(), of.sum()])

    hooks += [layer.register_forward_hook(count, with_kwargs=True) for layer in smile_layers(model).values()]
    with watch_routing(model):  # it passes the routing to every layer, where `count` reads it
        for batch in by_length([text.states for text in texts], 64):
            chosen = [texts[i] for i in batch.tolist()]
            states, mask = pad([text.states for text in chosen])
            owner = torch.full(mask.shape, -1)
            for row, text in enumerate(chosen):
                for task, start, end, _ in text.parts:
                    owner[row, start:end] = task
            model.under_way = Pass(mask[..., None].float(), owner)
            model(states, attention_mask=mask)
            for row, text in enumerate(chosen):
                for task, start, end, label in text.parts:
                    features = F.normalize(seen["last"][row, start:end].sum(0), dim=0)
                    right[task] += str(int(heads[task](features).argmax().item() == label))
    for hook in hooks:
        hook.remove()
    return {"right": right, "own": [100 * (own / all_).item() if all_ else None for own, all_ in tokens]}


def individual(uppers: Sequence[Upper], heads: Sequence[nn.Module], texts: Sequence[Text]) -> dict:
    """`answer` of each task's own fine-tuned model, for the parts of that task."""
    right = []
    for i, upper in enumerate(uppers):
        own = [Text(t.states, parts) for t in texts if (parts := [part for part in t.parts if part[0] == i])]
        right.append(answer(upper, heads, own)["right"][i] if own else "")
    return {"right": right}


def contenders(
    base: Upper, trained: Sequence[Trained], seed: int, noise: dict[str, Tensor], ranks: tuple[int, int]
) -> Iterator[tuple[str, Upper | LayerVote]]:
    """(name, model) of every row: policies, other router rows, MASS's rule, oracle.

    Args:
        base: the base's upper layers.
        trained: the tasks.
        seed: whose fine-tuned models are the experts.
        noise: an input of random word pieces for calibration.
        ranks: rank_of_router and rank_of_expert.
    """
    uppers = [task.finetuned[seed][0] for task in trained]
    g, r = ranks
    model, _ = upscale(base, uppers, rank_of_expert=r, rank_of_router=g, progress=False)
    calibrate(model, [noise])
    for name, policy in POLICIES.items():
        routed = copy.deepcopy(model)
        set_routing(routed, policy)
        yield name, routed
    for router in ("arrow", "norm"):
        yield f"router {router}", upscale(base, uppers, rank_of_expert=r, router=router, progress=False)[0]
    yield "one layer votes, two passes (MASS)", LayerVote.by_validation(model, trained)
    yield "window of 2 + layers, m 3, mean over layers × 3 (rule)", follow(copy.deepcopy(model), tempered)
    yield "oracle", follow(copy.deepcopy(model), oracle)


def random_pieces(lower: Lower, tokenizer: Tokenizer, sequences: int = 32, length: int = 40) -> dict[str, Tensor]:
    """States of random word pieces before the upper layers, drawn as by `calibrate` for an encoder."""
    ids = torch.randint(tokenizer.get_vocab_size(), (sequences, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(ids.shape, dtype=torch.bool)
    with torch.no_grad():
        return {"states": lower(ids, attention_mask=mask), "attention_mask": mask}
