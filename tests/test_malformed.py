"""Malformed inputs: success or a user error, within limits of time and memory, and inputs are unchanged."""

import copy
import functools
import json
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from smile_kernels import RoutingPolicy, SmileError, load_pretrained, save_pretrained, upscale, upscale_checkpoints
from smile_kernels.config import SmileConfig
from smile_kernels.inspection import describe
from smile_kernels.recipe import settings_of_yaml
from smile_kernels.schema import parse
from smile_kernels.upscaling import UpscaleReport
from tests.fuzzing import fuzzed, limited, outcome

TINY = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "pad_token_id": 0, "tie_word_embeddings": True,
}  # fmt: skip
ODD_VALUES: list[Any] = [
    None, True, -1, 0, 1.5, 10**9, 10**400, "", "x", "nan", [], {}, [[]], ["x"], {"x": None}, "(a+)+$",
]  # fmt: skip


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """A tiny language model as shards, a fine-tuned version, an adapter of it, and the fused checkpoint."""
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def write_inputs(folder: Path) -> Path:
    config = LlamaConfig(**TINY)
    torch.manual_seed(0)
    base = LlamaForCausalLM(config)
    base.save_pretrained(folder / "base", max_shard_size="8KB")
    finetuned = LlamaForCausalLM(config)
    finetuned.save_pretrained(folder / "expert")
    adapter = folder / "adapter"
    adapter.mkdir()
    name = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"
    factors = {
        name.format(i, part): torch.randn(shape) for i in range(2) for part, shape in zip("AB", [(4, 16), (16, 4)])
    }
    save_file(factors, adapter / "adapter_model.safetensors")
    settings = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj"],
        "alpha_pattern": {"k_proj": 4},
    }
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    model, _ = upscale(base, [finetuned], rank_of_expert=4, rank_of_router=2, progress=False)
    save_pretrained(model, folder / "fused")
    return folder


def mutate(folder: Path, rng: random.Random) -> str:
    """Add one random fault to one file of a folder; return its description."""
    file = rng.choice(sorted(f for f in folder.iterdir() if f.is_file() and f.suffix in (".json", ".safetensors")))
    kinds = ["truncated", "flipped", "deleted", "emptied", "folder", "fifo", "loop", "dangling"]
    if file.suffix == ".json":
        kinds += ["value"] * 8 + ["key"] * 3 + ["deep", "list", "bytes"]
    else:
        kinds += ["tensor"] * 6 + ["copy", "shard"]
    kind = rng.choice(kinds)
    data = file.read_bytes()
    if kind == "truncated":
        file.write_bytes(data[: rng.randrange(len(data))])
    elif kind == "flipped":
        at = rng.randrange(min(len(data), 4000))
        file.write_bytes(data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :])
    elif kind == "emptied":
        file.write_bytes(b"")
    elif kind == "value" or kind == "key":
        file.write_text(json.dumps(changed_json(json.loads(data), rng, kind, rng.choice(ODD_VALUES))))
    elif kind == "deep":
        file.write_text("[" * 100_000)
    elif kind == "list":
        file.write_text("[1]")
    elif kind == "bytes":
        file.write_bytes(b"\xff\xfe{}")
    elif kind == "tensor":
        save_file(changed_tensors(load_file(file), rng), file)
    elif kind == "copy":
        shutil.copy(file, folder / f"copy-{file.name}")
    elif kind == "shard":
        file.rename(folder / "model-00002-of-00003.safetensors")
    else:
        file.unlink()
        if kind == "folder":
            file.mkdir()
        elif kind == "fifo":
            os.mkfifo(file)
        elif kind != "deleted":
            file.symlink_to(file.name if kind == "loop" else "no-such-file")
    return f"{folder.name}/{file.name} {kind}"


def changed_json(value: Any, rng: random.Random, kind: str, other: Any) -> Any:
    if isinstance(value, dict) and value and (rng.random() < 0.7 or kind == "key"):
        key = rng.choice(sorted(value))
        if kind == "key":
            value["odd" + key if rng.random() < 0.5 else "x"] = value.pop(key)
        else:
            value[key] = changed_json(value[key], rng, kind, other)
        return value
    if isinstance(value, list) and value and rng.random() < 0.7:
        at = rng.randrange(len(value))
        return [*value[:at], changed_json(value[at], rng, kind, other), *value[at + 1 :]]
    return other


def changed_tensors(tensors: dict[str, torch.Tensor], rng: random.Random) -> dict[str, torch.Tensor]:
    name = rng.choice(sorted(tensors))
    tensor = tensors[name]
    change = rng.randrange(7)
    if change == 0:
        del tensors[name]
    elif change == 1:
        tensors["odd." + name] = tensors.pop(name)
    elif change == 2:
        tensor.view(-1)[rng.randrange(tensor.numel())] = rng.choice([torch.nan, torch.inf])
    elif change == 3:
        tensors[name] = tensor[:0]
    elif change == 4:
        tensors[name] = tensor.unsqueeze(0)
    elif change == 5:
        tensors[name] = tensor.to(rng.choice([torch.int8, torch.float64, torch.complex64, torch.float8_e4m3fn]))
    else:
        tensors["more." + name] = tensor.clone()
    return tensors


def listing(folder: Path) -> dict[str, bytes | None]:
    return {
        str(f.relative_to(folder)): f.read_bytes() if f.is_file() and not f.is_fifo() else None
        for f in sorted(folder.rglob("*"))
    }


@fuzzed(30, 300)
def test_malformed_folders(inputs, tmp_path, examples):
    outcomes = Counter[str]()

    @examples
    @given(st.randoms(use_true_random=False))
    def check(rng: random.Random) -> None:
        folder = tmp_path / "case"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(inputs, folder)
        parts = rng.sample(["base", "expert", "adapter", "fused"], k=rng.choice([1, 1, 2]))
        what = [mutate(folder / part, rng) for part in parts]
        before = listing(folder)
        jobs: dict[str, Callable[[], object]] = {}
        if {"base", "expert", "adapter"} & set(parts):
            experts = [folder / "expert", folder / "adapter"]
            options = {"rank_of_expert": 4, "rank_of_router": 2, "workers": 1}
            jobs["fuse"] = functools.partial(upscale_checkpoints, folder / "base", experts, folder / "out", **options)
        if "fused" in parts:
            jobs |= {
                "describe": functools.partial(describe, folder / "fused"),
                "load": functools.partial(load_pretrained, folder / "fused"),
                "load into a model": functools.partial(load_into, folder / "fused"),
            }
        for name, job in jobs.items():
            result = outcome(job)
            outcomes[result] += 1
            assert not result.startswith("fault"), f"{name}: {', '.join(what)}: {result}"
        if (folder / "out").exists():
            assert any(name.endswith(".vh") for name in load_file(folder / "out" / "model.safetensors"))
            shutil.rmtree(folder / "out")
        after = {name: data for name, data in listing(folder).items() if not name.startswith("out.partial")}
        assert after == before, what

    check()
    print(f"{sum(outcomes.values())} runs on malformed folders: {dict(outcomes)}")
    assert outcomes["SmileError"] > sum(outcomes.values()) / 4
    assert outcomes["success"] > sum(outcomes.values()) / 10


def load_into(folder: Path) -> None:
    """A model that does not match the checkpoint is unchanged."""
    torch.manual_seed(1)
    model = LlamaForCausalLM(LlamaConfig(**TINY))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    try:
        load_pretrained(folder, model)
    except (SmileError, OSError):
        after = model.state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
        raise


JSON = st.recursive(
    st.sampled_from(ODD_VALUES) | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
SETTINGS: dict[str, tuple[Callable[[Any], object], dict[str, Any]]] = {
    "config": (
        SmileConfig.from_dict,
        {
            "quant_method": "smile", "num_local_experts": 2, "num_experts_per_tok": 1, "rank_of_expert": 4,
            "rank_of_router": 2, "modules": {"a": {"rank_of_expert": 4, "rank_of_router": 2, "router": False}},
            "expert_names": ["x", "y"], "base_model_name_or_path": "b", "routing": {"scope": "causal"},
        },
    ),
    "policy": (
        RoutingPolicy.from_dict,
        {"scope": "causal", "accumulate": True, "lock_after": 2, "half_life": 3, "restart_at": [1, 2]},
    ),
    "report": (
        functools.partial(parse, UpscaleReport, where="smile_report.json"),
        {
            "layers": [{"name": "a", "rank": 4, "energy": [0.5], "error": [0.1], "seconds": 0.1, "skipped": None}],
            "lost": [{"name": "b", "sizes": [0.1], "reason": "c"}], "base": "b", "experts": ["x"],
            "calibration": {"source": "given", "layers": [{"name": "a", "prior": [0], "bias": 0.1, "tokens": 3}]},
        },
    ),
}  # fmt: skip


@fuzzed(300, 3000)
@pytest.mark.parametrize("kind", [*SETTINGS, "recipe"])
def test_malformed_settings(tmp_path, examples, kind):
    outcomes = Counter[str]()
    file = tmp_path / "fused.yml"

    def recipe(values: Any) -> None:
        file.write_text(yaml.safe_dump(values))
        settings_of_yaml(file)

    models = [{"model": "math", "name": "m"}, {"model": "code"}]
    parameters = {"rank_of_expert": 4, "rank_of_router": 2, "include": ["*"], "exclude": "x", "routing": {}}
    valid = {"base_model": "base", "models": models, "dtype": "float32", "parameters": parameters}
    read, valid = SETTINGS.get(kind, (recipe, valid))
    read(valid)

    @examples
    @given(st.randoms(use_true_random=False), JSON)
    def check(rng: random.Random, value: Any) -> None:
        changed = changed_json(copy.deepcopy(valid), rng, rng.choice(["value", "value", "key"]), value)
        try:
            with limited():
                read(changed)
        except SmileError:
            outcomes["SmileError"] += 1
        else:
            outcomes["success"] += 1

    check()
    print(f"{sum(outcomes.values())} malformed settings ({kind}): {dict(outcomes)}")
    assert outcomes["SmileError"] > sum(outcomes.values()) / 4


def test_the_untouched_inputs_are_fused_and_load(inputs, tmp_path):
    experts = [inputs / "expert", inputs / "adapter"]
    upscale_checkpoints(inputs / "base", experts, tmp_path / "out", rank_of_expert=4, rank_of_router=2)
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
