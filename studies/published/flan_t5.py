"""GLUE as text with Flan-T5-base, full fine-tunes or LoRA adapters, on checkpoints and test rows in local folders.

    python -m studies.published flan-t5 FOLDER [--device cuda] [--json results.json]

    FOLDER/base                      a T5ForConditionalGeneration with its tokenizer, as save_pretrained writes them
    FOLDER/tasks/TASK/model          a fine-tuned model of the same architecture, or a PEFT adapter of the base
    FOLDER/tasks/TASK/test.jsonl     its rows, one JSON object a line, with the fields of the data set and `label`

TASK is cola, mnli, mrpc, qnli, qqp, rte, sst2 or stsb; the authors test on the validation rows (of MNLI: matched). A
generated answer is right if it is the label's word; for stsb the score is Spearman's correlation, and an answer that is
not a number counts as 0.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase, T5ForConditionalGeneration

from smile_kernels import RoutingPolicy

from .. import report
from .common import Paper, measure, smile_name, table, task_folders

# Of full fine-tunes and of adapters: the rank of the router, and those of the experts.
RANKS = {"full": (4, (16, 32)), "LoRA": (2, (4, 8))}
POLICIES = {"published": RoutingPolicy()}  # the recommended one of encoder-decoder models
TITLE = "Exact match, and Spearman's correlation of stsb, %"
MAX_INPUT, MAX_ANSWER, BATCH = 512, 10, 32  # tokens, tokens with the start token, rows

# The prompts and answers that the published models were fine-tuned on (fusion_bench, glue_prompt_templates.py).
PROMPTS = {
    "cola": (
        'Indicate if the following sentence is grammatically correct or not: "{sentence}". '
        "Answere 'acceptable' or 'unacceptable'.",
        ("unacceptable", "acceptable"),
    ),
    "mnli": (
        "Does the premise: '{premise}' logically imply, contradict, or is neutral to the hypothesis: '{hypothesis}'? "
        "Answere with 'entailment', 'contradiction', or 'neutral'.",
        ("entailment", "neutral", "contradiction"),
    ),
    "mrpc": (
        "Are the following sentences '{sentence1}' and '{sentence2}' conveying the same meaning? "
        "Answere with 'yes' or 'no'.",
        ("no", "yes"),
    ),
    "qnli": (
        "Given the context: '{sentence}', does the question '{question}' have an answer based on the information "
        "provided? Answer with 'yes' or 'no'.",
        ("yes", "no"),
    ),
    "qqp": (
        "Do the questions '{question1}' and '{question2}' have the same intent? Answere with 'yes' or 'no'.",
        ("no", "yes"),
    ),
    "rte": (
        "Does the text: '{sentence1}' entail that '{sentence2}' is true? Provide 'yes' or 'no'.",
        ("yes", "no"),
    ),
    "sst2": (
        "Given the sentence '{sentence}', determine the sentiment. Is it positive or negative?",
        ("negative", "positive"),
    ),
    "stsb": (
        "Consider the sentences '{sentence1}' and '{sentence2}'. On a scale from 1 (completely different) to 5 "
        "(completely similar), rate the similarity.",
        None,
    ),
}
SOURCE = "fusion_bench, docs/modelpool/flan-t5_generation.md and examples/smile_upscaling/{}.ipynb"
BASE = (69.1, 56.5, 76.2, 88.4, 82.1, 80.1, 91.2, 62.2)
PAPERS = {
    "full": Paper(
        SOURCE.format("flan-t5-base"),
        list(PROMPTS),
        {
            "base": BASE,
            "individual": (75.0, 83.4, 87.5, 91.5, 85.4, 85.9, 93.6, 88.7),
            smile_name(4, 16, "published"): (72.0, 84.2, 84.3, 91.3, 84.7, 84.1, 93.3, 87.0),
            smile_name(4, 32, "published"): (72.5, 84.2, 84.1, 91.4, 84.8, 83.8, 93.2, 87.1),
        },
    ),
    "LoRA": Paper(
        SOURCE.format("flan-t5-base-lora16"),
        list(PROMPTS),
        {
            "base": BASE,
            "individual": (69.1, 82.7, 85.5, 90.9, 84.0, 84.4, 92.9, 87.4),
            smile_name(2, 4, "published"): (69.3, 82.9, 83.8, 90.6, 83.9, 83.4, 93.1, 85.1),
            smile_name(2, 8, "published"): (69.4, 82.9, 83.6, 90.6, 83.9, 83.4, 93.1, 85.1),
        },
    ),
}


def missing(place: Path) -> str | None:
    """What a task's folder lacks."""
    if place.name not in PROMPTS:
        return f"{place} is not a task; expected {', '.join(PROMPTS)}"
    if not (place / "model").is_dir() or not (place / "test.jsonl").is_file():
        return f"{place} is not complete; expected model/ and test.jsonl"
    return None


def read_rows(file: Path) -> list[tuple[str, str]]:
    """(prompt, right answer) of every row; the task is the name of the file's folder.

    Raises:
        ValueError: a line is not a row of the task; the message names it.
    """
    prompt, answers = PROMPTS[file.parent.name]
    rows = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            answer = f"{row['label']:.1f}" if answers is None else dict(enumerate(answers))[row["label"]]
            rows.append((prompt.format(**row), answer))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file}, line {number}: is not a row of {file.parent.name}: {error!r}") from None
    if not rows:
        raise ValueError(f"{file}: is empty; expected a row of {file.parent.name} a line")
    return rows


@torch.no_grad()
def answers(model: nn.Module, tokenizer: PreTrainedTokenizerBase, prompts: list[str]) -> list[str]:
    """The model's greedy answers."""
    found = []
    for start in range(0, len(prompts), BATCH):
        texts = prompts[start : start + BATCH]
        inputs = tokenizer(texts, padding=True, truncation=True, max_length=MAX_INPUT, return_tensors="pt")
        inputs = {name: inputs[name].to(model.device) for name in ("input_ids", "attention_mask")}
        tokens = model.generate(**inputs, max_length=MAX_ANSWER, do_sample=False, num_beams=1)
        found += tokenizer.batch_decode(tokens, skip_special_tokens=True)
    return found


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0


def score(task: str, given: list[str], right: list[str]) -> float:
    """Exact match, or for stsb Spearman's correlation (0 if all answers are the same), in percent."""
    if task != "stsb":
        return 100 * sum(a == b for a, b in zip(given, right)) / len(right)
    ranks = [_ranks(torch.tensor([_number(text) for text in texts], dtype=torch.float64)) for texts in (given, right)]
    return 100 * torch.nan_to_num(torch.corrcoef(torch.stack(ranks))[0, 1]).item()


def _ranks(values: torch.Tensor) -> torch.Tensor:
    """Ranks; equal values have the mean of their ranks."""
    _, group, count = values.unique(return_inverse=True, return_counts=True)
    return (count.cumsum(0) - (count - 1) / 2)[group]


def load(place: Path, base: Path, device: str) -> nn.Module:
    """A task's fine-tuned model; an adapter is added to the weights of the base."""
    if not (place / "model" / "adapter_config.json").is_file():
        return T5ForConditionalGeneration.from_pretrained(place / "model").to(device).eval()
    from peft import PeftModel

    model = PeftModel.from_pretrained(T5ForConditionalGeneration.from_pretrained(base), place / "model")
    return model.merge_and_unload().to(device).eval()


def study(folder: Path, device: str, step: report.Step) -> tuple[dict, list[report.TableRows], Paper | None]:
    """Scores of the base, of each task's own model, and of the fused model in each setting: results, tables, and the
    authors' numbers for this architecture."""
    places = task_folders(folder, missing)
    rows = {place.name: read_rows(place / "test.jsonl") for place in places}
    adapters = {(place / "model" / "adapter_config.json").is_file() for place in places}
    if len(adapters) > 1:
        raise ValueError(f"folder: {folder / 'tasks'} has models and adapters; expected one of the two")
    kind = "LoRA" if adapters.pop() else "full"
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    base = T5ForConditionalGeneration.from_pretrained(folder / "base").to(device).eval()
    models = {}
    for done, place in enumerate(places):
        step("models", done, len(places))
        models[place.name] = load(place, folder / "base", device)

    def of_task(model: nn.Module, task: str) -> float:
        prompts, right = (list(column) for column in zip(*rows[task]))
        return score(task, answers(model, tokenizer, prompts), right)

    measured = measure(base, models, of_task, RANKS[kind], POLICIES, step)
    paper = PAPERS[kind] if (base.config.d_model, base.config.num_layers) == (768, 12) else None
    results = {"kind": kind, "tasks": {task: len(of) for task, of in rows.items()}, "rows": measured}
    return results, [table(measured, list(rows), paper, f"{TITLE} ({kind})")], paper
