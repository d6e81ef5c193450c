"""Faulty files, folders and calls that were once fused silently, lost data, hung, or had an unclear message."""

import json
import os
import pickle
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import smile_kernels as sk
from smile_kernels import checkpoint
from smile_kernels.cli import app
from smile_kernels.upscaling.layers import _limited_modules
from tests.fuzzing import limited
from tests.test_malformed import listing, write_inputs

OPTIONS: dict[str, Any] = {"rank_of_expert": 4, "rank_of_router": 2, "workers": 1}
Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def folder(whole, tmp_path) -> Path:
    shutil.copytree(whole, tmp_path / "case")
    return tmp_path / "case"


@pytest.fixture(autouse=True)
def _limits() -> Iterator[None]:
    with limited(120):
        yield


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


def as_bin(folder: Path) -> None:
    torch.save(load_file(folder / "fused" / "model.safetensors"), folder / "fused" / "pytorch_model.bin")
    (folder / "fused" / "model.safetensors").unlink()


def both(*changes: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda folder: [change(folder) for change in changes]


def pooling(folder: Path, content: str = "{}") -> None:
    """A folder of the base that is copied."""
    (folder / "base" / "1_Pooling").mkdir(exist_ok=True)
    (folder / "base" / "1_Pooling" / "config.json").write_text(content)


CONFIG, ADAPTER, ADAPTER_CONFIG = "base/config.json", "adapter/adapter_config.json", "adapter_config.json"
# The change to the folders, the call, and its error message.
FAULTS: dict[str, tuple[Callable[[Path], object], Callable[[Path], object], str]] = {
    "a link loop in a folder": (link("base/1_loop/self", "."), fuse, "1_loop/self: is not a regular file"),
    "a link to the parent": (link("base/2_up", ".."), fuse, "2_up: is not a regular file"),
    "templates that are a link": (link("base/additional_chat_templates", "."), fuse, "templates: is not a regular"),
    "a link to a missing file": (link("base/tokenizer.json", "gone"), fuse, "tokenizer.json: is a link to a missing"),
    "a file of a name too long to copy": (text(f"base/{'n' * 242}", "x"), fuse, "n: has a name of more than 241 bytes"),
    "a link to missing weights": (link("expert/model.safetensors", "gone"), fuse, "contains no weights|a missing file"),
    "a pipe for a config": (pipe(CONFIG), fuse, "base/config.json: is not a regular file"),
    "a pipe for an index": (pipe("base/model.safetensors.index.json"), fuse, "index.json: is not a regular file"),
    "a pipe for weights": (pipe("expert/model.safetensors"), fuse, "expert/model.safetensors: not a regular file"),
    "a pipe for an adapter": (pipe(ADAPTER), fuse, "adapter_config.json: is not a regular file"),
    "a pipe next to the weights": (pipe("base/1_Pooling/a.json"), fuse, "1_Pooling/a.json: is not a regular file"),
    "a pipe for a report": (pipe("fused/smile_report.json"), command("inspect", "{folder}/fused"), "not a regular"),
    "a report of another kind": (
        text("fused/smile_report.json", '{"layers": 5}'),
        command("inspect", "{folder}/fused"),
        "smile_report.json: layers: is 5; expected an array",
    ),
    "a billion layers": (settings("base", num_hidden_layers=10**6), fuse, "config.json: .* too many for the tensors"),
    "fewer layers than stored": (settings("base", num_hidden_layers=1), fuse, "belongs to no block of the Llama"),
    "a trillion tokens": (settings("base", vocab_size=10**12), fuse, r"embed_tokens\.weight' has shape .*config\.json"),
    "negative sizes": (settings("base", hidden_size=-5), fuse, "config.json: transformers cannot build"),
    "an architecture that is a string": (settings("base", architectures="L"), fuse, "architectures is 'L'; expected a"),
    "an architecture of another model": (
        settings("base", architectures=["BertForMaskedLM"]),
        fuse,
        "bert.* is missing; expected all of BertForMaskedLM",
    ),
    "a quantisation that is a string": (settings("base", quantization_config="x"), fuse, "stored as 'x'"),
    "a quantisation that is a list": (settings("base", quantization_config=[1]), fuse, r"stored as \[1\]"),
    "an expert's config that fits no model": (settings("expert", num_attention_heads=0), fuse, "expert/config.json"),
    "deep JSON": (text(CONFIG, "[" * 200_000), fuse, r"base/config.json: cannot be read as JSON \(nested too deeply"),
    "a number of 5,000 digits": (text(ADAPTER, f'{{"a": {"9" * 5000}}}'), fuse, "adapter_config.json: .* many digits"),
    "a shard that is lost": (lost_shard, fuse, r"model-00002-of-00003\.safetensors: no such file"),
    "a tensor in two shards of an index": (
        tensor_in_two_shards,
        fuse,
        r"model-00002-of-00003\.safetensors: tensor '\S+' is in \S+model-00001-of-00003\.safetensors, too; expected",
    ),
    "weights that are not there": (
        settings("base", transformers_weights="x.safetensors"),
        fuse,
        r"base/x\.safetensors: no such file; expected it, since \S+base/config\.json names it",
    ),
    "no layers": (settings("base", num_hidden_layers=0), fuse, "belongs to no block of the Llama"),
    "a tensor in two files": (same_tensor_in_two_files, fuse, "is in .*, too; expected one"),
    "an index that lacks a tensor": (index(lambda m: m.pop("model.norm.weight")), fuse, r"norm\.weight' is missing"),
    "one tensor under two names": (
        tensors("expert/model.safetensors", lambda t: t | {f"_orig_mod.{name}": one + 1 for name, one in t.items()}),
        fuse,
        r"expert: tensors '_orig_mod\.(\S+)' and '\1' are both '\1'; expected one of them",
    ),
    "one tensor with and without the model's prefix": (
        tensors("expert/model.safetensors", lambda t: t | {"norm.weight": t["model.norm.weight"] + 1}),
        fuse,
        r"'model\.norm\.weight' and 'norm\.weight' are both 'model\.norm\.weight' in LlamaForCausalLM",
    ),
    "a base without its config": (
        lambda folder: (folder / CONFIG).unlink(),
        fuse,
        "base has no config.json, and experts",
    ),
    "a dtype that is a number": (
        settings("base", dtype=5),
        fuse,
        "config.json: dtype is 5, .*; expected a floating-point",
    ),
    "a dtype of integers": (settings("base", dtype="int8"), fuse, "config.json: dtype is torch.int8, .*; expected a"),
    "a config with NaN": (settings("base", rms_norm_eps=float("nan")), fuse, "config.json: rms_norm_eps is NaN"),
    "a config with NaN inside": (
        settings("base", rope_parameters={"rope_type": "default", "rope_theta": float("nan")}),
        fuse,
        r"config.json: rope_parameters\.rope_theta is NaN",
    ),
    "a config with a billion labels": (
        settings("base", num_labels=10**9),
        fuse,
        r"base/config.json: num_labels is 1000000000; expected at most 1,000,000",
    ),
    "an expert's config with a billion layers": (
        settings("expert", text_config={"num_hidden_layers": 10**9}),
        fuse,
        r"expert/config.json: text_config\.num_hidden_layers is 1000000000; expected at most 1,000,000",
    ),
    "weights of another folder": (
        settings("base", transformers_weights="../expert/model.safetensors"),
        fuse,
        r"transformers_weights is '\.\./expert/model\.safetensors'; expected a weight file of the same folder",
    ),
    "weights without data": (pickled({"a": torch.ones(2, device="meta")}), fuse, "tensor 'a' is on the meta device"),
    "a nested tensor": (
        pickled({"a": torch.nested.nested_tensor([torch.ones(2)])}),
        fuse,
        "tensor 'a' is torch.strided .*; expected a dense tensor",
    ),
    "weights that are text": (
        both(pickled({}), text("expert/pytorch_model.bin", "root:x:0:0:root:/root:/bin/bash\n")),
        fuse,
        "pytorch_model.bin: is ",
    ),
    "an index of numbers": (index(lambda m: m.update(x=5)), fuse, r"weight_map\['x'\] is 5; expected a weight file"),
    "an index out of its folder": (
        index(lambda m: m.update({name: "../expert/model.safetensors" for name in m})),
        fuse,
        r"weight_map\[.*\] is '\.\./expert/model\.safetensors'; expected a weight file of the same folder",
    ),
    "an adapter that is a list": (text(ADAPTER, "[]"), fuse, "adapter_config.json: contains a list"),
    "an adapter without alpha": (
        text(ADAPTER, '{"peft_type": "LORA"}'),
        fuse,
        "adapter_config.json: lora_alpha is mis",
    ),
    "an adapter of half its factors": (
        adapter(lambda t: {name: one for name, one in t.items() if "lora_A" in name}),
        fuse,
        "q_proj has no lora_B",
    ),
    "an adapter of rank 0": (
        adapter(lambda t: {name: (one[:0] if "_A" in name else one[:, :0]).clone() for name, one in t.items()}),
        fuse,
        r"\[0, 16\]; expected floating-point numbers",
    ),
    "an adapter of eight bits": (
        adapter(lambda t: {name: one.to(torch.float8_e4m3fn) for name, one in t.items()}),
        fuse,
        "is torch.float8_e4m3fn .*; expected floating-point numbers, of 16 bits or more",
    ),
    "an adapter of another rank": (
        settings("adapter", ADAPTER_CONFIG, r=8),
        fuse,
        "q_proj: its factors have rank 4, and",
    ),
    "an adapter of a pattern of another rank": (
        settings("adapter", ADAPTER_CONFIG, rank_pattern={"layers.1.*q_proj": 2}),
        fuse,
        r"layers\.1\.\S+: its factors have rank 4, and adapter_config\.json says 2",
    ),
    "an adapter of DoRA without magnitudes": (
        settings("adapter", ADAPTER_CONFIG, use_dora=True),
        fuse,
        "q_proj: has no lora_magnitude_vector, and adapter_config.json says use_dora True",
    ),
    "an adapter with biases of an unknown kind": (
        settings("adapter", ADAPTER_CONFIG, bias="some"),
        fuse,
        "bias: is 'some'; expected 'none', 'all' or 'lora_only'",
    ),
    "an adapter with one factor twice": (
        adapter(lambda t: t | {name.replace("lora_A.", "lora_A.default."): one + 1 for name, one in t.items()}),
        fuse,
        r"has lora_[AB] of '\S+' twice",
    ),
    "an adapter of alpha 0": (
        adapter(lambda t: t | {f"{Q_PROJ}.alpha": torch.tensor(0.0)}),
        fuse,
        "q_proj: alpha is 0; expected a number above 0",
    ),
    "an adapter of no modules": (adapter(lambda t: {"x": torch.ones(2)}), fuse, "has a tensor 'x'; expected <module>"),
    "an adapter of another model": (
        adapter(
            lambda t: {f"{name}.{part}.weight": torch.ones(4, 4) for name in ("a.b",) for part in ("lora_A", "lora_B")}
        ),
        fuse,
        "changes 'a.b', which the base lacks",
    ),
    "an adapter beyond float64": (
        adapter(lambda t: {name: 1e200 * one.double() for name, one in t.items()}),
        fuse,
        r"experts\[1\]: the change of .* is inf; expected what float32 holds",
    ),
    "an adapter with a bias of another length": (
        adapter(lambda t: t | {f"{Q_PROJ}.bias": torch.ones(3)}),
        fuse,
        r"experts\[1\]: the change of .*q_proj\.bias has shape \[3\]; expected the base's, \[16\]",
    ),
    "an adapter with another weight": (
        adapter(lambda t: t | {f"{Q_PROJ}.base_layer.weight": torch.ones(16, 16)}),
        fuse,
        "adapter: has factors and another weight of .*q_proj; expected one of them",
    ),
    "a NaN in a tensor of an expert that has no place in the result": (
        tensors("expert/model.safetensors", lambda t: t | {"model.norm.weight": torch.full((16,), torch.nan)}),
        fuse,
        "expert/model.safetensors: tensor 'model.norm.weight' holds 16 NaN",
    ),
    "a config without return_dict": (
        settings("base", return_dict=False),
        lambda folder: fuse(folder, calibrate=True),
        "return_dict: is False in the model's config; expected True",
    ),
    "an adapter beyond float32": (
        adapter(lambda t: {name: 1e30 * one for name, one in t.items()}),
        fuse,
        r"experts\[1\]: the change of \S*q_proj is \S+; expected what float32 holds",
    ),
    "a pattern that takes forever": (
        settings("adapter", "adapter_config.json", alpha_pattern={r"(?:.|..|...)+(?<=\d)": 3}),
        fuse,
        "alpha_pattern: .* takes more than a second",
    ),
    "a pattern of a group that is not closed": (
        settings("adapter", "adapter_config.json", alpha_pattern={r"((.*)*)*\2z": 3}),
        fuse,
        "adapter_config.json: alpha_pattern: .* is not a regular expression",
    ),
    "a sparse tensor": (
        pickled({"a": torch.eye(3).to_sparse()}),
        fuse,
        "pytorch_model.bin: tensor 'a' is torch.sparse",
    ),
    "a pickle of more": (pickled({"a": pickle.Pickler}), fuse, r"pytorch_model.bin: is a pickle of other .*Pickler"),
    "NaN in s": (
        tensors("fused/model.safetensors", lambda t: t | {"lm_head.s": t["lm_head.s"] * torch.nan}),
        load,
        r"lm_head\.s contains NaN or inf",
    ),
    "integers for s": (
        tensors("fused/model.safetensors", lambda t: t | {"lm_head.s": t["lm_head.s"].int()}),
        load,
        r"fused/model\.safetensors: tensor 'lm_head\.s' is torch\.int32; expected floating point",
    ),
    "inf in vh": (
        tensors("fused/model.safetensors", lambda t: t | {"lm_head.vh": t["lm_head.vh"] + torch.inf}),
        load,
        r"lm_head\.vh contains NaN or inf",
    ),
    "experts of a layer that is not there": (
        fused(lambda c: c["modules"].update({"model.layers.9.mlp.up_proj": c["modules"]["lm_head"]})),
        load,
        r"layers\.9\.mlp\.up_proj'\]: LlamaForCausalLM has no such layer",
    ),
    "experts of a layer that is not there, by our function": (
        fused(lambda c: c["modules"].update({"model.layers.9.mlp.up_proj": c["modules"]["lm_head"]})),
        load_ours,
        r"fused: modules\['model\.layers\.9\.mlp\.up_proj'\]: LlamaForCausalLM has no such layer",
    ),
    "a fused model of more layers than stored": (
        settings("fused", num_hidden_layers=3),
        load_ours,
        r"fused: has no tensor 'model\.layers\.\S+' of the LlamaForCausalLM in its config\.json \(\d+ are missing\)",
    ),
    "a fused model without a tensor": (
        tensors("fused/model.safetensors", lambda t: {name: t[name] for name in t if name != "model.norm.weight"}),
        load_ours,
        r"fused: has no tensor 'model\.norm\.weight'",
    ),
    "a weight that is not stored transposed": (
        fused(lambda c: c["modules"]["lm_head"].update(fan_in_fan_out=True)),
        load_ours,
        r"modules\['lm_head'\]: fan_in_fan_out is true for a Linear; expected false",
    ),
    "a weight that is not stored transposed, in a given model": (
        fused(lambda c: c["modules"]["lm_head"].update(fan_in_fan_out=True)),
        lambda folder: sk.load_pretrained(folder / "fused", AutoModelForCausalLM.from_pretrained(folder / "base")),
        r"modules\['lm_head'\]: fan_in_fan_out is true for a Linear; expected false",
    ),
    "experts whose base is an adapter": (
        lambda folder: fused(lambda c: c.update(base_model_name_or_path=f"{folder}/adapter"))(folder),
        load_ours,
        r"base_model_name_or_path: \S+/adapter has no config\.json",
    ),
    "top_p with one expert per token": (
        unchanged,
        upscale_with("--routing", "token", "--top-p", "0.5"),
        r"top_p: is 0\.5 with num_experts_per_tok 1; expected 1",
    ),
    "top_p with one expert per token, to calibrate": (
        unchanged,
        command("calibrate", "{folder}/fused", "--top-p", "0.5"),
        r"top_p: is 0\.5 with num_experts_per_tok 1; expected 1",
    ),
    "a config that is not here": (unchanged, lambda folder: load_ours(folder, config="x"), "config: is 'x'; expected"),
    "integers for u": (
        tensors("fused/model.safetensors", lambda t: t | {"lm_head.u": t["lm_head.u"].int()}),
        lambda folder: sk.verify(folder / "fused", folder / "base", [folder / "expert"]),
        r"fused: tensor 'lm_head\.u' is torch\.int32; expected floating point",
    ),
    "no fine-tuned models to compare": (
        unchanged,
        lambda folder: sk.verify(folder / "fused", finetuned=[]),
        "finetuned: has 0 models; expected 1, one for each expert",
    ),
    **{
        f"a folder that is not there, for {name}": (unchanged, command(name, "{folder}/fusd"), "fusd: no such folder")
        for name in ("inspect", "verify", "chat", "calibrate")
    },
    "experts that the config leaves out": (
        fused(lambda c: c["modules"].pop("lm_head")),
        load,
        r"model\.safetensors: contains experts of 'lm_head', which quantization_config\.modules lacks",
    ),
    "experts in a pickle that the config leaves out": (
        both(as_bin, fused(lambda c: c["modules"].pop("lm_head"))),
        load,
        r"pytorch_model\.bin: contains experts of 'lm_head'",
    ),
    "more experts than stored": (
        fused(lambda c: c.update(num_local_experts=2)),
        load,
        r"tensor '\S+' has shape \[1, .*\]; expected \[2, .*\], as quantization_config describes it",
    ),
    "a router that the config lacks": (
        tensors("fused/model.safetensors", lambda t: t | {"lm_head.router": torch.ones(1, 2, 16)}),
        load,
        r"'lm_head\.router' has shape \[1, 2, 16\]; expected none",
    ),
    "a fused model of an architecture without a name": (
        settings("fused", architectures=[None]),
        lambda folder: sk.load_pretrained(folder / "fused"),
        r"architectures is \[None\]; expected a list of names",
    ),
    "a fused model of an architecture that is not a model": (
        settings("fused", architectures=["LlamaConfig"]),
        lambda folder: sk.load_pretrained(folder / "fused"),
        "transformers has no architecture LlamaConfig",
    ),
    "a device map of no device": (
        str,
        command("calibrate", "{folder}/fused", "--device-map", "foo"),
        r"error: \S+/fused: transformers cannot load it as LlamaForCausalLM .*found foo",
    ),
    "a generation config of wrong values": (
        text("base/generation_config.json", '{"max_new_tokens": "x"}'),
        fuse,
        r"base/generation_config\.json: transformers cannot read it \(TypeError: ",
    ),
    "a text that begins with no token of the model": (
        settings("base", bos_token_id=99),
        lambda folder: fuse(folder, calibrate=True),
        "bos_token_id: is 99 in the model's config; expected one of its 32 tokens",
    ),
    "a model to calibrate that transformers lacks": (
        settings("base", architectures=["MyLlama"]),
        lambda folder: fuse(folder, calibrate=True),
        "transformers has no architecture MyLlama",
    ),
    "a seed of 70 bits": (str, command("calibrate", "{folder}/fused", "--seed", str(2**70)), "seed: is 1180591620717"),
    "a plot of an unknown kind": (
        str,
        command("inspect", "{folder}/fused", "--plot", "{folder}/plot.foo"),
        "plot: is '.*foo'; expected a name that ends with .png, .svg or .pdf",
    ),
    "a result in no folder": (
        str,
        command("inspect", "{folder}/fused", "--json", "{folder}/no/one.json"),
        "json: is '.*one.json'; expected a file in a folder that exists",
    ),
    "a result instead of an input": (
        str,
        command("inspect", "{folder}/fused", "--json", "{folder}/fused/config.json"),
        "json: is '.*config.json', inside the input .*fused; expected a file outside of it",
    ),
    "a result instead of a folder": (
        str,
        command("analyze", "--base", "{folder}/base", "--expert", "{folder}/expert", "--json", "{folder}"),
        "json: is '.*', a folder; expected a file",
    ),
    "a layer larger than memory": (str, command("bench", "--shape", "9999999x9999999"), "out of memory: .*allocate"),
    "a file size of 400 digits": (
        str,
        lambda folder: fuse(folder, max_shard_size="9" * 400),
        "max_shard_size: is '999",
    ),
    "the root as output": (str, upscale_with("--out", "/"), "out: / is a mount point"),
    "no device of that name": (str, upscale_with("--device", "foo"), "device: is 'foo', which cannot compute here"),
    "a device without data": (str, upscale_with("--device", "meta"), "device: is 'meta', which cannot compute here"),
    "no workers": (str, upscale_with("--workers", "-1"), "workers: is -1; expected 1 or more"),
    "an empty base": (str, upscale_with("--base", ""), "base: is ''; expected a folder, or the id"),
    "an empty expert": (str, upscale_with("--expert", ""), r"experts\[0\]: is ''; expected a folder, or the id"),
    "an empty output": (str, upscale_with("--out", ""), "out: is ''; expected the path"),
    "a base whose name is not UTF-8": (
        lambda folder: (folder / "base").rename(folder / os.fsdecode(b"\xff")),
        lambda folder: sk.upscale_checkpoints(
            folder / os.fsdecode(b"\xff"), [folder / "expert"], folder / "out", **OPTIONS
        ),
        "base: is '.*'; expected a path in UTF-8",
    ),
    "an expert among the intermediate files": (
        lambda folder: shutil.copytree(folder / "expert", folder / "out.partial" / "output"),
        upscale_with("--expert", "{folder}/out.partial/output", "--force"),
        r"out: \S+out\.partial is of \S+out, and experts\[0\] is there; expected an input apart",
    ),
    "an output in a base": (str, upscale_with("--out", "{folder}/base/out"), "is inside base"),
    "an output in a file": (
        text("notes", "mine"),
        upscale_with("--out", "{folder}/notes/out"),
        "notes: is not a folder",
    ),
    "an output that is a link to itself": (link("out", "out"), fuse, "out is a link to itself"),
    "an output of another encoding": (str, lambda folder: fuse(folder / os.fsdecode(b"\xff")), "^$|in UTF-8|no such"),
    "a wrong manifest": (
        both(
            lambda folder: (folder / "out").mkdir(),
            text("out/notes", "mine"),
            text("out/smile_manifest.json", '{"settings": "x", "files": {"notes": 1, "../base/config.json": 3}}'),
        ),
        lambda folder: fuse(folder, force=True),
        "contains notes, which smile-kernels did not write",
    ),
    "a manifest that is a pipe": (pipe("out/smile_manifest.json"), fuse, "is not empty"),
    "a manifest of another kind": (
        both(lambda folder: (folder / "out").mkdir(), text("out/smile_manifest.json", "[" * 100_000)),
        lambda folder: fuse(folder, force=True),
        "contains smile_manifest.json, which smile-kernels did not write",
    ),
    "a link among the intermediate files": (
        both(text_in("out.partial", "settings.json", "{}"), link("out.partial/output", "../expert")),
        lambda folder: fuse(folder, force=True),
        "out.partial/output: was not created by smile-kernels",
    ),
    "settings that are a pipe": (pipe("out.partial/settings.json"), fuse, "settings.json: is damaged"),
    "a lock of the user's": (text(".out.lock", "mine"), fuse, r"\.out\.lock: was not created by smile-kernels"),
    "a lock that is a folder": (lambda folder: (folder / ".out.lock").mkdir(), fuse, "cannot be the lock of"),
    "a lock that is a link": (link(".out.lock", "notes"), fuse, "cannot be the lock of"),
    "a lock that is a pipe": (pipe(".out.lock"), fuse, "was not created by smile-kernels"),
    "a base of another kind": (
        both(
            lambda folder: shutil.copytree(folder / "base", folder / "other"), settings("other", model_type="mistral")
        ),
        command("verify", "{folder}/fused", "--base", "{folder}/other", "--expert", "{folder}/expert"),
        "base: is a mistral; expected a llama as the model",
    ),
    "inputs of another model": (
        lambda folder: save_file({"nonsense": torch.ones(3)}, folder / "inputs"),
        command(
            "verify",
            "{folder}/fused",
            "--base",
            "{folder}/base",
            "--expert",
            "{folder}/expert",
            "--inputs",
            "{folder}/inputs",
        ),
        r"inputs: nonsense torch\.float32 \[3\]: the model fails on them",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_refused_in_one_line_before_any_work(fault, folder):
    make, call, message = FAULTS[fault]
    make(folder)
    before = listing(folder)
    with pytest.raises((sk.SmileError, OSError), match=message):
        call(folder)
    assert listing(folder) == before


CHANGES: dict[str, Callable[[Path], object]] = {
    "a file instead of another": lambda folder: shutil.copy(
        folder / "expert" / "model.safetensors", sorted((folder / "base").glob("model-*"))[0]
    ),
    "a file cut short": lambda folder: os.truncate(sorted((folder / "base").glob("model-*"))[-1], 100),
    "a file more": lambda folder: (folder / "expert" / "notes").write_text("mine"),
    "a file in a folder that is copied": lambda folder: pooling(folder, "changed"),
    "a folder removed": lambda folder: shutil.rmtree(folder / "expert"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_inputs_that_change_during_the_work_are_named(change, folder):
    def changed(stage: str, done: int, total: int) -> None:
        if stage == "layers" and done == 1:
            CHANGES[change](folder)

    pooling(folder)
    with pytest.raises((sk.SmileError, OSError), match=r"base|expert"):
        fuse(folder, progress=changed)
    assert not (folder / "out").exists()


def test_a_copied_file_that_changed_is_copied_again(folder):
    pooling(folder)
    fuse(folder)
    pooling(folder, "[1]")
    fuse(folder, force=True)
    assert (folder / "out" / "1_Pooling" / "config.json").read_text() == "[1]"


def test_a_calibration_that_was_interrupted_between_its_files_is_done_again(folder, monkeypatch):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_config", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fuse(folder, calibrate=True)
    assert (folder / "out.partial" / "output" / "model.safetensors").exists()
    fuse(folder, calibrate=True)
    assert sk.get_routing(sk.load_pretrained(folder / "out")).calibrated


def changed_layer(change: Callable[[str, torch.Tensor], torch.Tensor | None]) -> Callable[[Path], object]:
    def apply(layers: Path) -> None:
        stored = {name: change(name, tensor) for name, tensor in load_file(layers / "0.safetensors").items()}
        save_file({name: t.contiguous() for name, t in stored.items() if t is not None}, layers / "0.safetensors")

    return apply


DAMAGES: dict[str, Callable[[Path], object]] = {
    "without a factor": changed_layer(lambda name, t: None if name.endswith(".u") else t),
    "of another rank": changed_layer(lambda name, t: t[..., :2] if name.endswith((".u", ".s")) else t[:, :2]),
    "with NaN": changed_layer(lambda name, t: t * torch.nan if name.endswith(".s") else t),
    "cut short": lambda layers: os.truncate(layers / "0.safetensors", 40),
    "lost": lambda layers: (layers / "1.safetensors").unlink(),
    "of another layer": lambda layers: shutil.copy(layers / "1.safetensors", layers / "2.safetensors"),
    "without its report": lambda layers: (layers / "0.json").unlink(),
    "with a report of another kind": lambda layers: (layers / "0.json").write_text('{"name": 5}'),
}


def test_damaged_layers_of_an_interrupted_run_are_computed_again(folder):
    def interrupted(stage: str, done: int, total: int) -> None:
        if stage == "layers" and done == 5:
            raise KeyboardInterrupt

    fuse(folder)
    whole = (folder / "out" / "model.safetensors").read_bytes()
    for damage in DAMAGES.values():
        shutil.rmtree(folder / "out")
        with pytest.raises(KeyboardInterrupt):
            fuse(folder, progress=interrupted)
        damage(folder / "out.partial" / "layers")
        fuse(folder)
        assert (folder / "out" / "model.safetensors").read_bytes() == whole
        assert not (folder / "out.partial").exists()


def test_a_damaged_output_of_an_interrupted_run_is_written_again(folder, monkeypatch):
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    fuse(folder)
    whole = (folder / "out" / "model.safetensors").read_bytes()
    shutil.rmtree(folder / "out")
    with monkeypatch.context() as patch:
        patch.setattr("smile_kernels.upscaling.disk.write_index", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fuse(folder)
    os.truncate(folder / "out.partial" / "output" / "model.safetensors", len(whole) - 8)
    fuse(folder)
    assert (folder / "out" / "model.safetensors").read_bytes() == whole


@contextmanager
def limited_file_size(size: int) -> Iterator[None]:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_file_larger_than_the_system_allows_is_named(folder):
    named = r"File too large: '\S*out\.partial/output/model\.safetensors'"
    with limited_file_size(6000), pytest.raises(OSError, match=named):
        fuse(folder)
    assert not (folder / "out").exists()
    fuse(folder)


@pytest.mark.parametrize("size", [100, 6000], ids=["settings", "weights"])
def test_a_model_that_the_disk_has_no_space_for_is_named(folder, size):
    model = sk.load_pretrained(folder / "fused")
    with limited_file_size(size), pytest.raises(OSError, match=r"File too large: '\S*out\.partial/output"):
        sk.save_pretrained(model, folder / "out")
    assert not [*folder.glob("*out*")]


@pytest.mark.parametrize("place", ["notes", "layers/notes", "layers/0/0.json.txt", "output/notes", "output/.notes"])
@pytest.mark.parametrize("options", [{}, {"rank_of_expert": 3, "force": True}], ids=["same", "force"])
def test_a_file_of_the_user_s_among_the_intermediate_files_is_kept(place, options, folder):
    def interrupted(stage: str, done: int, total: int) -> None:
        if stage == "layers" and done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fuse(folder, progress=interrupted)
    mine = folder / "out.partial" / place
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("mine")
    with pytest.raises(FileExistsError, match="not created by smile-kernels"):
        fuse(folder, **options)
    assert mine.read_text() == "mine"
    mine.unlink()
    fuse(folder, **options)
    assert not (folder / "out.partial").exists()


def test_a_file_that_comes_to_the_intermediate_files_is_not_published(folder):
    mine = folder / "out.partial" / "output" / "notes"
    with pytest.raises(FileExistsError, match="output/notes: was not created by smile-kernels"):
        fuse(folder, progress=lambda stage, *_: mine.write_text("mine") if stage == "files" else None)
    assert not (folder / "out").exists()
    mine.unlink()
    fuse(folder)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (settings("adapter", ADAPTER_CONFIG, target_modules=["q_proj", "v_proj"]), "names 'v_proj'.* 2 of its modules"),
        (
            adapter(lambda t: {name: one for name, one in t.items() if "layers.1" in name}),
            "names 'q_proj'.*layers.0.self",
        ),
        (settings("adapter", ADAPTER_CONFIG, modules_to_save=["embed_tokens"]), "names 'embed_tokens'"),
        (settings("adapter", ADAPTER_CONFIG, trainable_token_indices=[1]), "has trainable_token_indices, but"),
    ],
    ids=["a target", "a block", "a module saved whole", "tokens"],
)
def test_an_adapter_that_lacks_what_its_config_names_is_warned_of(change, named, folder):
    change(folder)
    with pytest.warns(UserWarning, match=f"adapter_config.json {named}"):
        fuse(folder)


@pytest.mark.parametrize(
    "fields", [{"target_modules": ["up_proj"]}, {"exclude_modules": ["q_proj"]}, {"exclude_modules": r".*\.q_proj"}]
)
def test_an_adapter_with_tensors_that_its_config_leaves_out_is_warned_of(fields, folder):
    settings("adapter", ADAPTER_CONFIG, **fields)(folder)
    with pytest.warns(UserWarning, match=r"has tensors for 2 modules such as \S*layers.0\S*q_proj, which adapter_"):
        fuse(folder)


def test_experts_of_a_base_that_has_changed_are_refused(folder):
    """The experts alone fit every model of the same shapes."""
    fuse(folder, experts_only=True)
    sk.load_pretrained(folder / "out")
    weights = min((folder / "base").glob("*.safetensors"))
    tensors = {name: tensor + 1 for name, tensor in load_file(weights).items()}
    save_file(tensors, weights, {"format": "pt"})
    with pytest.raises(ValueError, match="base has other weights than when the experts were written"):
        sk.load_pretrained(folder / "out")


@pytest.mark.parametrize("patterns", [{"exclude": ["lm_haed"]}, {"include": ["*_proj", "lm_haed"]}], ids=["out", "in"])
def test_a_pattern_that_matches_no_layer_is_warned_of(patterns, folder):
    with pytest.warns(UserWarning, match="clude: 'lm_haed' matches none of the 15 linear layers"):
        fuse(folder, **patterns)


def test_experts_of_a_base_of_the_hub_are_loaded_with_it(folder, monkeypatch):
    repository = folder / "hub" / "models--org--base"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    shutil.copytree(folder / "base", repository / "snapshots" / ("0" * 40))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    sk.upscale_checkpoints("org/base", [folder / "expert"], folder / "out", experts_only=True, **OPTIONS)
    model = sk.load_pretrained(folder / "out")
    assert model(torch.tensor([[1, 2]])).logits.isfinite().all()


def test_a_file_beside_the_weights_that_the_disk_has_no_space_for(folder):
    size = shutil.disk_usage(folder).free + 1
    (folder / "base" / "notes").touch()
    os.truncate(folder / "base" / "notes", size)  # a sparse file
    with pytest.raises(OSError, match="disk is too full"):
        fuse(folder)
    assert not [*folder.glob("*out*")]


def test_weights_beyond_what_holds_their_change_are_refused_before_any_layer(folder):
    def filled(size: float) -> Callable[[Path], object]:
        return tensors(
            "expert/model.safetensors", lambda t: {name: torch.full_like(one, size) for name, one in t.items()}
        )

    stages: list[str] = []
    filled(3e38)(folder)
    with pytest.raises(
        sk.SmileError, match=r"experts\[0\]: \S+: the change of \S+_proj is 4\.8e\+39; expected what torch"
    ):
        fuse(folder, progress=lambda stage, *_: stages.append(stage))
    assert set(stages) == {"checks"}
    assert not [*folder.glob("out*")]
    filled(4e4)(folder)
    fuse(folder, dtype=torch.float16)


def test_biases_beyond_what_holds_their_change_are_refused_before_any_layer(tmp_path):
    stages = []
    for name, size in (("base", 6e4), ("expert", -6e4)):
        (tmp_path / name).mkdir()
        layer = {"up.weight": torch.randn(8, 8).half(), "up.bias": torch.full((8,), size).half()}
        save_file(layer, tmp_path / name / "model.safetensors")
    with pytest.raises(sk.SmileError, match=r"the change of up\.bias is 1\.2e\+05; expected what torch\.float16"):
        sk.upscale_checkpoints(
            tmp_path / "base",
            [tmp_path / "expert"],
            tmp_path / "out",
            progress=lambda stage, *_: stages.append(stage),
            **OPTIONS,
        )
    assert set(stages) == {"checks"}


def test_integers_of_numpy_are_taken_as_integers(folder):
    numbers = {name: np.int64(value) for name, value in (OPTIONS | {"max_shard_size": 20_000}).items()}
    fuse(folder, **numbers)
    assert len([*(folder / "out").glob("model-*.safetensors")]) > 1
    load(folder)


def test_names_of_experts_are_printable_whatever_their_folders_are_called(folder):
    (folder / "expert").rename(folder / "one\nexpert")
    sk.upscale_checkpoints(folder / "base", [folder / "one\nexpert"], folder / "out", **OPTIONS)
    assert sk.load_pretrained(folder / "out").lm_head.expert_names == ("one_expert",)


def test_models_that_other_threads_build_do_not_count():
    """A config of too many layers is refused by the number of modules that its model has."""
    with _limited_modules(10), ThreadPoolExecutor(1) as pool:
        pool.submit(lambda: torch.nn.Sequential(*(torch.nn.Linear(1, 1) for _ in range(20)))).result()
        with pytest.raises(sk.SmileError, match="more than 10 modules"):
            torch.nn.Sequential(*(torch.nn.Linear(1, 1) for _ in range(20)))


def test_a_rank_beyond_the_number_of_processes_is_refused(folder, monkeypatch):
    variables = {"WORLD_SIZE": "2", "RANK": "5", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(sk.SmileError, match="RANK: is 5 with WORLD_SIZE 2; expected a smaller one"):
        fuse(folder)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the backend can run")
def test_a_backend_that_cannot_run_is_no_bug(folder, monkeypatch):
    monkeypatch.setenv("SMILE_KERNELS_BACKEND", "cuda")
    with pytest.raises(sk.SmileError, match=r"error: backend: 'cuda' cannot run here: .*; expected another SMILE_"):
        command("verify", "{folder}/fused", "--base", "{folder}/base", "--expert", "{folder}/expert")(folder)


@pytest.mark.parametrize("variables", [{"WORLD_SIZE": "x"}, {"WORLD_SIZE": "2"}], ids=str)
def test_variables_of_a_launcher_that_is_not_there(variables, folder, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(sk.SmileError, match=r"WORLD_SIZE: is '.'; expected the variables that torchrun sets"):
        fuse(folder)
    assert not [*folder.glob("*out*")]
