"""Calls on a folder of checkpoints, and changes of its files that make them fail."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import smile_kernels as sk
from smile_kernels.cli import app
from tests.integrations.tiny_models import build

OPTIONS: dict[str, Any] = {"rank_of_expert": 4, "rank_of_router": 2, "workers": 1}
Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj"
CONFIG, ADAPTER, ADAPTER_CONFIG = "base/config.json", "adapter/adapter_config.json", "adapter_config.json"


def fuse(folder: Path, **options: Any) -> object:
    experts = [folder / "expert", folder / "adapter"]
    return sk.upscale_checkpoints(folder / "base", experts, folder / "out", **OPTIONS | options)


def load(folder: Path) -> object:
    return AutoModelForCausalLM.from_pretrained(folder / "fused")


def load_ours(folder: Path, **options: Any) -> object:
    return sk.load_pretrained(folder / "fused", **options)


def unchanged(folder: Path) -> None:
    pass


def command(*arguments: str) -> Callable[[Path], object]:
    """A command that ends with status 1 and one line, which is raised as an error."""

    def call(folder: Path) -> None:
        result = CliRunner().invoke(app, [argument.format(folder=folder) for argument in arguments])
        assert result.exit_code == 1
        assert "Traceback" not in result.output
        raise sk.SmileError(result.output.strip().splitlines()[-1])

    return call


def upscale_with(*more: str) -> Callable[[Path], object]:
    given = {"--base": "{folder}/base", "--expert": "{folder}/expert", "--out": "{folder}/out"}
    given |= {"--rank-of-expert": "4", "--rank-of-router": "2"} | dict(zip(more[::2], more[1::2]))
    return command("upscale", *(word for pair in given.items() for word in pair))


def settings(part: str, file: str = "config.json", **changes: Any) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        path = folder / part / file
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def text(file: str, content: str) -> Callable[[Path], object]:
    return lambda folder: (folder / file).write_text(content)


def larger(file: str, mebibytes: int) -> Callable[[Path], object]:
    """A sparse file."""
    return lambda folder: [(folder / file).touch(), os.truncate(folder / file, mebibytes << 20)]


def text_in(part: str, file: str, content: str) -> Callable[[Path], object]:
    """A file in a new folder."""
    return lambda folder: [(folder / part).mkdir(), (folder / part / file).write_text(content)]


def edited(file: str, key: str, change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    def apply(folder: Path) -> None:
        content = json.loads((folder / file).read_text())
        change(content[key])
        (folder / file).write_text(json.dumps(content))

    return apply


def index(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    return edited("base/model.safetensors.index.json", "weight_map", change)


def tensors(file: str, change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
    def apply(folder: Path) -> None:
        stored = load_file(folder / file)
        changed = change(stored)
        save_file(stored if changed is None else changed, folder / file, metadata={"format": "pt"})

    return apply


def adapter(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
    return tensors("adapter/adapter_model.safetensors", change)


def fused(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    return edited("fused/config.json", "quantization_config", change)


def pipe(file: str) -> Callable[[Path], object]:
    def make(folder: Path) -> None:
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).unlink(missing_ok=True)
        os.mkfifo(folder / file)

    return make


def link(file: str, target: str) -> Callable[[Path], object]:
    def make(folder: Path) -> None:
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).unlink(missing_ok=True)
        (folder / file).symlink_to(target)

    return make


def pickled(state: object) -> Callable[[Path], object]:
    def write(folder: Path) -> None:
        (folder / "expert" / "model.safetensors").unlink()
        torch.save(state, folder / "expert" / "pytorch_model.bin")

    return write


def same_tensor_in_two_files(folder: Path) -> None:
    (folder / "base" / "model.safetensors.index.json").unlink()
    for i, file in enumerate(sorted((folder / "base").glob("model-*"))):
        file.rename(file.with_name(f"part{i}.safetensors"))
    shutil.copy(folder / "base" / "part0.safetensors", folder / "base" / "copy.safetensors")


def tensor_in_two_shards(folder: Path) -> None:
    first, second = sorted((folder / "base").glob("model-*"))[:2]
    save_file(load_file(second) | {name: t + 1 for name, t in load_file(first).items()}, second, {"format": "pt"})


def lost_shard(folder: Path) -> None:
    (folder / "base" / "model.safetensors.index.json").unlink()
    sorted((folder / "base").glob("model-*"))[1].unlink()


def magnitudes(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """An adapter's tensors as those of DoRA, which does not change row 3."""
    factors = {name: one * (torch.arange(len(one)) != 3)[:, None] for name, one in tensors.items() if "lora_B" in name}
    names = {name.replace("lora_B.weight", "lora_magnitude_vector"): one for name, one in factors.items()}
    return tensors | factors | {name: torch.ones(len(one)) for name, one in names.items()}


def row_of_zeros(folder: Path) -> None:
    """In every projection of the base's queries."""
    for file in (folder / "base").glob("*.safetensors"):
        stored = load_file(file)
        for name, tensor in stored.items():
            if name.endswith("q_proj.weight"):
                tensor[3] = 0
        save_file(stored, file, metadata={"format": "pt"})


def as_bin(folder: Path) -> None:
    torch.save(load_file(folder / "fused" / "model.safetensors"), folder / "fused" / "pytorch_model.bin")
    (folder / "fused" / "model.safetensors").unlink()


def both(*changes: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda folder: [change(folder) for change in changes]


def pooling(folder: Path, content: str = "{}") -> None:
    """A folder of the base that is copied."""
    (folder / "base" / "1_Pooling").mkdir(exist_ok=True)
    (folder / "base" / "1_Pooling" / "config.json").write_text(content)


def mixture(folder: Path, **changes: Any) -> None:
    """A Mixtral of two layers, whose config has other settings."""
    build("MixtralForCausalLM").save_pretrained(folder)
    settings(folder.name, **changes)(folder.parent)
