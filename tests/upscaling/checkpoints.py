"""Checkpoints on disk to fuse, and the command that fuses them."""

import copy
from pathlib import Path

import safetensors.torch
import torch
from torch import nn
from typer.testing import CliRunner

from smile_kernels.cli import app
from smile_kernels.publishing import MANIFEST
from smile_kernels.storage import StoredTensor, write_tensors

RANKS = {"rank_of_expert": 4, "rank_of_router": 2}
N = 3


class Net(nn.Module):
    """Two linear layers, one without a bias, an embedding, a norm, and a head tied to the embedding."""

    def __init__(self, width: int = 24):
        super().__init__()
        self.embed = nn.Embedding(13, 16)
        self.up, self.down = nn.Linear(16, width), nn.Linear(width, 16, bias=False)
        self.norm = nn.LayerNorm(16)

    def forward(self, ids):
        return self.norm(self.down(self.up(self.embed(ids)).relu())) @ self.embed.weight.T


def stored(tensors: dict[str, torch.Tensor]) -> list[StoredTensor]:
    return [StoredTensor.of(name, tensor) for name, tensor in tensors.items()]


def save(folder: Path, model: nn.Module, **options) -> Path:
    folder.mkdir()
    if not options:
        safetensors.torch.save_file(model.state_dict(), folder / "model.safetensors")
        return folder
    write_tensors(folder, stored(model.state_dict()), **options)
    return folder


def finetuned(base: nn.Module, scale: float = 0.1) -> nn.Module:
    model = copy.deepcopy(base)
    for p in model.parameters():
        p.data += scale * p.data.std() * torch.randn_like(p)
    return model


def contents(folder: Path) -> dict[str, bytes]:
    """The contents that are equal in every run, bit for bit: without the report, which contains times, and its hash."""
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name not in ("smile_report.json", MANIFEST)
    }


def command(folders: list[Path], out: Path, *more: str) -> list[str]:
    experts = [option for folder in folders[1:] for option in ("--expert", str(folder))]
    ranks = ["--rank-of-expert", "4", "--rank-of-router", "2"]
    return ["upscale", "--base", str(folders[0]), *experts, *ranks, "--out", str(out), *more]


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    return result.output
