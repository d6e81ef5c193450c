"""Mistral-7B with experts for mathematics, chat and code, on checkpoints in local folders, by lm-evaluation-harness.

    pip install 'lm_eval[hf]'
    python -m studies.published mistral FOLDER [--device cuda] [--json results.json]

    FOLDER/base                      Mistral-7B-v0.1 with its tokenizer
    FOLDER/experts/NAME              its fine-tuned versions with theirs: metamath, dolphin and speechless, for example
    FOLDER/data/OWNER/DATASET        copies of the data sets: cais/mmlu, truthfulqa/truthful_qa, openai/gsm8k and
                                     allenai/ai2_arc; without FOLDER/data the harness downloads them
    FOLDER/fused                     the fused model is written there

Scores are those of the paper's authors: accuracy on MMLU, mc2 of TruthfulQA, the last number of the answer on GSM8K,
normalised accuracy on ARC Challenge; with the harness's default numbers of examples in the prompt. Tried with version
0.4.13 of the harness, on tiny random models.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from smile_kernels import RoutingPolicy, sweep, upscale_checkpoints

from .. import report
from .common import Paper, Scores, smile_name, table

EXPERT_RANKS, ROUTER_RANK = (64, 512), 8
TASKS = {  # and the name of the score
    "mmlu": "acc,none",
    "truthfulqa_mc2": "acc,none",
    "gsm8k": "exact_match,flexible-extract",
    "arc_challenge": "acc_norm,none",
}
TITLE, BEST = "Scores of lm-evaluation-harness, %", "best expert of each task"
BATCH, DTYPE = 6, torch.bfloat16
PAPER = Paper(
    "fusion_bench, examples/smile_upscaling/mistral_gsm8k.ipynb, which has GSM8K only",
    ("gsm8k",),
    {
        "base": (38.8,),
        "metamath": (71.5,),
        smile_name(8, 64, "published"): (58.7,),
        smile_name(8, 512, "published"): (67.9,),
    },
)


def folders(folder: Path) -> dict[str, Path]:
    """name -> folder of every expert.

    Raises:
        ValueError: a folder of the format is missing or empty; the message names it.
    """
    for place in (folder / "base", folder / "experts"):
        if not place.is_dir():
            raise ValueError(f"folder: {place} is not a folder; expected base/ and experts/ in FOLDER")
    experts = {place.name: place for place in sorted((folder / "experts").iterdir()) if place.is_dir()}
    if not experts:
        raise ValueError(f"folder: {folder / 'experts'} is empty; expected a folder for each expert")
    return experts


@contextmanager
def inside(folder: Path) -> Iterator[None]:
    """With `folder` as the working directory, where OWNER/DATASET is a local copy, if it exists."""
    before = Path.cwd()
    try:
        os.chdir(folder if folder.is_dir() else before)
        yield
    finally:
        os.chdir(before)


def scores(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Scores:
    """Scores of a model on every task, in percent."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=BATCH)
    found = simple_evaluate(model=wrapped, tasks=list(TASKS), bootstrap_iters=0, log_samples=False)["results"]
    return {task: 100 * float(found[task][name]) for task, name in TASKS.items()}


def study(folder: Path, device: str, step: report.Step) -> tuple[dict, list[report.TableRows], Paper | None]:
    """Scores of the base, of each expert, and of the fused model in each setting: results, tables, and the authors'
    numbers."""
    folder = folder.resolve()  # the working directory changes
    experts = folders(folder)
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise ImportError(f"lm_eval: {error}; expected lm-evaluation-harness, pip install 'lm_eval[hf]'") from None
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")  # of the fused model

    def load(place: Path) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(place, dtype=DTYPE).to(device).eval()

    upscale_checkpoints(
        folder / "base",
        list(experts.values()),
        folder / "fused",
        rank_of_expert=max(EXPERT_RANKS),
        rank_of_router=ROUTER_RANK,
        exclude=["lm_head"],  # as the authors; experts may have more tokens
        calibrate=True,
        dtype=DTYPE,
        force=True,
        progress=step,
    )
    rows = []
    with inside(folder / "data"):
        for done, (name, place) in enumerate({"base": folder / "base", **experts}.items()):
            step("models", done, len(experts) + 1)
            own = AutoTokenizer.from_pretrained(place)
            rows.append({"name": name, "parameters": 1.0, "scores": scores(load(place), own)})
        best = {task: max(row["scores"][task] for row in rows[1:]) for task in TASKS}
        rows.append({"name": BEST, "parameters": float(len(experts)), "scores": best})
        fused = load(folder / "fused")
        policies = {"published": RoutingPolicy(), "recommended": RoutingPolicy.recommended(fused)}
        found = sweep(
            fused,
            lambda model: scores(model, tokenizer),
            rank_of_expert=EXPERT_RANKS,
            rank_of_router=[ROUTER_RANK],
            routing=policies,
            progress=step,
        )
    for one in found.settings:
        name = smile_name(ROUTER_RANK, one.rank_of_expert, one.routing)
        rows.append({"name": name, "parameters": one.parameters, "scores": one.scores})
    results = {"tasks": TASKS, "rows": rows}
    return results, [table(rows, list(TASKS), PAPER, TITLE, BEST)], PAPER
