"""Faulty files, folders and calls that were once fused silently, hung, or had an unclear message."""

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import smile_kernels as sk
from tests.faults.changes import (
    ADAPTER,
    ADAPTER_CONFIG,
    CONFIG,
    OPTIONS,
    Q_PROJ,
    adapter,
    as_bin,
    both,
    command,
    fuse,
    fused,
    index,
    larger,
    link,
    load,
    load_ours,
    lost_shard,
    magnitudes,
    mixture,
    pickled,
    pipe,
    row_of_zeros,
    same_tensor_in_two_files,
    settings,
    tensor_in_two_shards,
    tensors,
    text,
    text_in,
    unchanged,
    upscale_with,
)
from tests.test_malformed import listing

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
    "a mixture of fewer layers than stored": (
        lambda folder: mixture(folder / "mixture", num_hidden_layers=1),
        lambda folder: sk.upscale_checkpoints(folder / "mixture", [folder / "mixture"], folder / "out", **OPTIONS),
        "belongs to no block of the Mixtral",
    ),
    "a bias of no layer, in weights without a config": (
        both(
            lambda folder: (folder / "expert" / "config.json").unlink(),
            tensors("expert/model.safetensors", lambda t: t | {"model.layers.0.self_attn.o_proj.bias": torch.ones(16)}),
        ),
        fuse,
        r"o_proj\.bias', and that layer of LlamaForCausalLM has no bias; .* that the base's config describes",
    ),
    "weights without a norm, of an unknown architecture": (
        both(
            settings("expert", architectures=["FooForCausalLM"]),
            tensors("expert/model.safetensors", lambda t: {name: t[name] for name in t if name != "model.norm.weight"}),
        ),
        fuse,
        r"expert: tensor 'model\.norm\.weight' is missing; expected all of LlamaForCausalLM",
    ),
    "a base that transformers would split": (
        settings("base", distributed_config={"enable_expert_parallel": True}),
        fuse,
        "base: config.json has distributed_config, by which transformers would split",
    ),
    "a fused folder without a file of its manifest": (
        lambda folder: [fuse(folder), (folder / "out" / "README.md").unlink()],
        command("calibrate", "{folder}/out"),
        "out/README.md: no such file; expected it, since the folder's manifest lists it",
    ),
    "factors of eight bits": (
        tensors("fused/model.safetensors", lambda t: t | {"lm_head.u": t["lm_head.u"].to(torch.float8_e4m3fn)}),
        load_ours,
        r"tensor 'lm_head\.u' is torch\.float8_e4m3fn; expected floating point of 16 bits or more",
    ),
    "a trillion tokens": (settings("base", vocab_size=10**12), fuse, r"embed_tokens\.weight' has shape .*config\.json"),
    "negative sizes": (settings("base", hidden_size=-5), fuse, "config.json: transformers cannot build"),
    "a type of model that is an object": (
        settings("base", model_type={}),
        fuse,
        "base/config.json: model_type is {}; expected a",
    ),
    "an expert's type of model that is a list": (
        settings("expert", model_type=["llama"]),
        fuse,
        "expert/config.json: model_type is",
    ),
    "tied embeddings that are a string": (
        settings("base", tie_word_embeddings="no"),
        fuse,
        "is 'no'; expected true or false",
    ),
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
    "an adapter of a bias that it should not have": (
        adapter(lambda t: t | {f"{Q_PROJ}.bias": torch.ones(16)}),
        fuse,
        r"q_proj: has a bias other than the base's, and adapter_config\.json says bias 'none'",
    ),
    "an adapter of targets that are not a pattern": (
        settings("adapter", ADAPTER_CONFIG, target_modules="*q_proj"),
        fuse,
        r"target_modules: '\*q_proj' is not a regular expression",
    ),
    "an adapter of exclusions that take for ever": (
        settings("adapter", ADAPTER_CONFIG, exclude_modules=r"(?:.|..|...)+(?<=\d)"),
        fuse,
        r"exclude_modules: .* takes more than a second",
    ),
    "an adapter of one token twice": (
        both(
            settings("adapter", ADAPTER_CONFIG, trainable_token_indices=[3, 3, 5]),
            adapter(lambda t: t | {"model.embed_tokens.token_adapter.trainable_tokens_delta": torch.ones(2, 16)}),
        ),
        fuse,
        "trainable_token_indices: does not fit",
    ),
    "a bias that an expert's layers do not have": (
        tensors("expert/model.safetensors", lambda t: t | {"model.layers.0.self_attn.o_proj.bias": torch.ones(16)}),
        fuse,
        r"expert/model\.safetensors: has a tensor 'model\.layers\.0\.self_attn\.o_proj\.bias', and that layer of ",
    ),
    "a top_p without effect": (
        fused(lambda c: c.update(routing={"top_p": 0.5})),
        load_ours,
        r"top_p: is 0\.5 with num_experts_per_tok 1; expected 1, since one expert is kept",
    ),
    "integers for u, in a given model": (
        tensors("fused/model.safetensors", lambda t: t | {"lm_head.u": t["lm_head.u"].int()}),
        lambda folder: sk.load_pretrained(folder / "fused", AutoModelForCausalLM.from_pretrained(folder / "base")),
        r"tensor 'lm_head\.u' is torch\.int32; expected floating point",
    ),
    "a config without experts for a fused model": (
        unchanged,
        lambda folder: load_ours(folder, config=folder / "base"),
        r"config: has no quantization_config, which describes the experts in \S+fused; expected its own",
    ),
    "a base that is not there": (
        unchanged,
        upscale_with("--base", "{folder}/basse"),
        r"base: \S+basse: no such folder; expected one, or the id of a Hub repository",
    ),
    "a base that is a file": (
        unchanged,
        upscale_with("--base", "{folder}/base/config.json"),
        r"base: \S+config\.json: is a file; expected the folder of a checkpoint",
    ),
    "a base of a name that is too long": (
        unchanged,
        upscale_with("--base", "x" * 300),
        r"base: x+: no such folder; expected one, or the id of a Hub repository",
    ),
    "an output of a name that is too long": (
        unchanged,
        upscale_with("--out", "{folder}/" + "x" * 300),
        r"out: has a name of 300 bytes, x+; expected at most 235",
    ),
    "an output in a folder of a name that is too long": (
        unchanged,
        upscale_with("--out", "{folder}/" + "x" * 300 + "/out"),
        r"out: has a name of 300 bytes, x+; expected at most 255",
    ),
    "a report of a name that is too long": (
        unchanged,
        command("inspect", "{folder}/fused", "--json", "x" * 300),
        r"json: is 'x+'; expected a name of at most 241 bytes",
    ),
    "a base of experts that is a file": (
        unchanged,
        lambda folder: sk.save_pretrained(load(folder), folder / "out", base=folder / "base" / "config.json"),
        r"base: \S+config\.json is not a folder; expected the base checkpoint",
    ),
    "an expert without its norm": (
        tensors("expert/model.safetensors", lambda t: {name: t[name] for name in t if name != "model.norm.weight"}),
        fuse,
        r"experts\[\d\]: \S+expert: tensor 'model\.norm\.weight' is missing",
    ),
    "an expert of another vocabulary": (
        settings("expert", vocab_size=77),
        fuse,
        r"expert/model\.safetensors: tensor \S+ has shape .*; expected \[77, ",
    ),
    "a checkpoint with a tensor of experts": (
        tensors("expert/model.safetensors", lambda t: t | {"model.layers.0.self_attn.q_proj.s": torch.ones(2, 4)}),
        fuse,
        r"experts\[0\]: \S+ contains 'model\.layers\.0\.self_attn\.q_proj\.s', as a SMILE model does",
    ),
    "a base with an adapter in its folder": (
        lambda folder: shutil.copy(folder / "adapter" / ADAPTER_CONFIG, folder / "base"),
        fuse,
        r"base: \S+ has adapter_config\.json, an adapter that transformers would add",
    ),
    "an adapter of DoRA on a row of zeros": (
        both(
            settings("adapter", ADAPTER_CONFIG, use_dora=True),
            adapter(magnitudes),
            row_of_zeros,
        ),
        fuse,
        r"adapter: \S+q_proj: row 3 of its weight is 0, which DoRA divides by",
    ),
    "an adapter of lora_bias without biases": (
        settings("adapter", ADAPTER_CONFIG, lora_bias=True),
        fuse,
        r"q_proj: has no lora_B\.bias, and adapter_config\.json says lora_bias True",
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
    "an adapter of two alphas": (
        adapter(lambda t: t | {f"{Q_PROJ}.alpha": torch.tensor(0.5)}),
        fuse,
        r"q_proj: its alpha is 0\.5, and adapter_config\.json says \d+; expected one alpha",
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
        both(settings("adapter", ADAPTER_CONFIG, bias="all"), adapter(lambda t: t | {f"{Q_PROJ}.bias": torch.ones(3)})),
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
    "a fused model as the expert to compare with": (
        unchanged,
        command("verify", "{folder}/fused", "--base", "{folder}/base", "--expert", "{folder}/fused"),
        r"expert\[0\]: \S*fused is stored as 'smile'; expected a checkpoint of plain weights",
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
    "an empty expert": (str, upscale_with("--expert", ""), r"expert\[0\]: is ''; expected a folder, or the id"),
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
        r"out: \S+out\.partial is of \S+out, and expert\[0\] is there; expected an input apart",
    ),
    "an output in a base": (str, upscale_with("--out", "{folder}/base/out"), "is inside base"),
    "a config of 65 MiB": (larger(CONFIG, 65), fuse, r"base/config\.json: has 68,157,440 bytes; expected at most 67,"),
    "a generation config of 65 MiB": (
        larger("base/generation_config.json", 65),
        fuse,
        r"base/generation_config\.json: has 68,157,440 bytes; expected at most 67,108,864",
    ),
    "a chat template of 65 MiB": (
        larger("fused/chat_template.jinja", 65),
        load_ours,
        r"chat_template\.jinja: has 68,157,440 bytes; expected at most 67,108,864",
    ),
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
