"""Greedy generation in batches, exact match, and the experts that tokens are routed to."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from smile_kernels import SmileLinear, watch_routing
from smile_kernels.routing.cache import cache_in

from .model import Example, chat

BATCH = 150
SLACK = 4  # tokens that an answer may have beyond the longest right one of its batch


@dataclass(frozen=True)
class Question:
    """A conversation that the model continues, the task its last turn belongs to, and the right answer."""

    turns: tuple[str, ...]
    task: int
    answer: str


@torch.no_grad()
def generate(model: PreTrainedModel, tokenizer: Tokenizer, questions: Sequence[Question]) -> list[str]:
    """The model's greedy answers, in batches padded on the left."""
    prompts = [chat(tokenizer, question.turns) for question in questions]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers = [""] * len(prompts)
    for start in range(0, len(order), BATCH):
        rows = order[start : start + BATCH]
        longest = max(len(prompts[i]) for i in rows)
        padding = tokenizer.pad_token_id
        input_ids = torch.tensor([[padding] * (longest - len(prompts[i])) + prompts[i] for i in rows])
        mask = torch.tensor([[0] * (longest - len(prompts[i])) + [1] * len(prompts[i]) for i in rows])
        room = max(len(tokenizer.encode(questions[i].answer, add_special_tokens=False)) for i in rows) + 1 + SLACK
        tokens = model.generate(
            input_ids=input_ids,
            attention_mask=mask,
            max_new_tokens=room,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=padding,
        )
        for i, row in zip(rows, tokens[:, longest:]):
            answers[i] = tokenizer.decode(row, skip_special_tokens=True)
    return answers


def correct(question: Question, answer: str) -> bool:
    """Exact match, without spaces at both ends."""
    return answer.strip() == question.answer


@contextmanager
def own_expert(model: PreTrainedModel, expert: int) -> Iterator[PreTrainedModel]:
    """While it is open, every token of every SMILE layer of `model` goes to `expert`: oracle routing."""

    def choose(layer: SmileLinear, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        ids = torch.full((*args[0].shape[:-1], 1), expert, dtype=torch.int32)
        return args, {**kwargs, "routing": (torch.ones(ids.shape), ids)}

    layers = [module for module in model.modules() if isinstance(module, SmileLinear)]
    handles = [layer.register_forward_pre_hook(choose, with_kwargs=True) for layer in layers]
    try:
        yield model
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def own_expert_by_block(
    model: PreTrainedModel, tokenizer: Tokenizer, questions: Sequence[Question]
) -> list[list[float]]:
    """Share of answer tokens, in percent, at their own task's expert: one row a block of the model, one column a task.

    The right answers are read, not generated: each question is run with its answer and without it, and the counts of
    the prompt are taken away. So the model must route a token without looking at those that follow.
    """
    experts = len({q.task for q in questions})
    blocks = model.config.num_hidden_layers
    counts = torch.zeros(blocks, experts, 2, dtype=torch.float64)  # own, all

    def add(ids: list[int], task: int, sign: int) -> None:
        with watch_routing(model) as seen:
            model(input_ids=torch.tensor([ids]), use_cache=False)
        for name, count in seen.items():
            block = int(name.split(".layers.")[1].split(".")[0])
            counts[block, task] += sign * torch.stack([count[task], count.sum()])

    for question in questions:
        prompt = chat(tokenizer, question.turns)
        add(prompt + tokenizer.encode(question.answer, add_special_tokens=False), question.task, 1)
        add(prompt, question.task, -1)
    return (100 * counts[..., 0] / counts[..., 1]).tolist()


@torch.no_grad()
def time_per_token(
    models: Mapping[str, PreTrainedModel], prompt: Sequence[int], new_tokens: int = 24, rounds: int = 2
) -> list[dict]:
    """CPU milliseconds (medians) of one thread to process `prompt` and to generate a token, batch 1, interleaved.

    CPU time rather than time on the clock, so that what else runs on the machine counts little. Ratios are over the
    first of `models`.
    """
    input_ids = torch.tensor([list(prompt)])
    spent: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def seconds(model: PreTrainedModel, tokens: int) -> float:
        start = time.process_time()
        model.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0,
        )
        return time.process_time() - start

    try:
        for turn in range(rounds + 1):
            for name, model in models.items():
                first, all_tokens = seconds(model, 1), seconds(model, new_tokens + 1)
                if turn:  # the first round warms up
                    spent[name].append((1e3 * first, 1e3 * (all_tokens - first) / new_tokens))
    finally:
        torch.set_num_threads(threads)
    medians = {name: tuple(map(statistics.median, zip(*values))) for name, values in spent.items()}
    plain = next(iter(medians.values()))
    return [
        {
            "name": name,
            "prompt_ms": prompt_ms,
            "token_ms": token_ms,
            "prompt_ratio": prompt_ms / plain[0],
            "token_ratio": token_ms / plain[1],
        }
        for name, (prompt_ms, token_ms) in medians.items()
    ]


@torch.no_grad()
def teacher_forced(model: PreTrainedModel, examples: Sequence[Example]) -> float:
    """Share of examples (prompt ids, answer ids) in percent whose every answer token is the model's first choice."""
    right = 0
    for start in range(0, len(examples), BATCH):
        batch = examples[start : start + BATCH]
        rows = [torch.tensor(prompt + answer) for prompt, answer in batch]
        input_ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        mask = torch.arange(input_ids.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]
        states = model.model(input_ids=input_ids, attention_mask=mask.long()).last_hidden_state
        for row, (prompt, answer) in zip(states, batch):
            logits = model.lm_head(row[len(prompt) - 1 : len(prompt) + len(answer) - 1])
            right += bool((logits.argmax(-1) == torch.tensor(answer)).all())
    return 100 * right / len(examples)


@torch.no_grad()
def continued(model: PreTrainedModel, examples: Sequence[Example]) -> float:
    """`teacher_forced` with the prompt and the answer in two passes, for models that depend on what a pass contains."""
    right = 0
    for prompt, answer in examples:
        first = model(input_ids=torch.tensor([prompt]), use_cache=True)
        cache = {name: value for name, value in first.items() if value is cache_in(first)}
        rest = model(input_ids=torch.tensor([answer]), **cache)
        logits = torch.cat([first.logits[0, -1:], rest.logits[0, :-1]])
        right += logits.argmax(-1).tolist() == list(answer)
    return 100 * right / len(examples)
