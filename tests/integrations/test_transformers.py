"""SMILE checkpoints through `from_pretrained` and `save_pretrained`, on real architectures."""

import copy
import json
import socket
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.distributed import DistributedConfig

import smile_kernels as sk
from smile_kernels.nn import smile_layers
from smile_kernels.upscaling import upscale_checkpoints
from tests.integrations.tiny_models import CONFIGS, build, fine_tuned, fuse, inputs, linear_layers, output

LAYERS = {
    "MistralForCausalLM": 14,
    "LlamaForCausalLM": 14,
    "Qwen2ForCausalLM": 14,
    "Gemma2ForCausalLM": 14,
    "Phi3ForCausalLM": 8,
    "MixtralForCausalLM": 8,
    "GPT2LMHeadModel": 8,
    "T5ForConditionalGeneration": 32,
    "BertForSequenceClassification": 14,
    "ViTForImageClassification": 13,
    "CLIPModel": 26,
}


@pytest.fixture(scope="module")
def fused():
    """architecture -> (base, fused model), each made once."""
    made = {}

    def make(architecture: str):
        if architecture not in made:
            base = build(architecture)
            made[architecture] = base, fuse(base, [fine_tuned(base, seed) for seed in (1, 2, 3)])
        return made[architecture]

    return make


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("architecture", CONFIGS)
def test_round_trip(architecture, dtype, fused, tmp_path):
    base, model = fused(architecture)
    model.save_pretrained(tmp_path / "first")
    loaded = type(model).from_pretrained(tmp_path / "first", dtype=dtype)
    loaded.save_pretrained(tmp_path / "second", max_shard_size="20KB")
    again = type(model).from_pretrained(tmp_path / "second", dtype=dtype)
    assert len(list((tmp_path / "second").glob("*.safetensors"))) > 1
    expected = copy.deepcopy(model)
    for name, p in expected.named_parameters():
        p.data = p if name.endswith(".s") else p.to(dtype)
    want = output(expected)
    # The same tensors and operators; T5 keeps some layers in float32 for every dtype.
    for got in (loaded, again):
        assert len(smile_layers(got)) == LAYERS[architecture]
        assert {layer.s.dtype for layer in smile_layers(got).values()} == {torch.float32}
        torch.testing.assert_close(output(got), want, rtol=1e-5, atol=1e-5 if dtype == torch.float32 else 0)
    assert (output(base) - output(model)).abs().max() > 0.1


@pytest.mark.parametrize("architecture", CONFIGS)
def test_made_by_upscale_from_folders(architecture, tmp_path):
    """`smile-kernels upscale` writes the model that `upscale` returns in memory, bit for bit."""
    base = build(architecture)
    experts = [fine_tuned(base, seed) for seed in (1, 2)]
    for i, model in enumerate((base, *experts)):
        model.save_pretrained(tmp_path / f"m{i}")
    heads = ("lm_head", "classifier")
    options = {"rank_of_expert": 4, "rank_of_router": 2, "exclude": heads}
    on_disk = upscale_checkpoints(tmp_path / "m0", [tmp_path / "m1", tmp_path / "m2"], tmp_path / "out", **options)
    want, in_memory = sk.upscale(base, experts, **options, progress=False)
    got = type(base).from_pretrained(tmp_path / "out")
    assert set(smile_layers(got)) == set(linear_layers(base)) - {*heads}
    assert torch.equal(output(got), output(want))
    for report in (on_disk, in_memory):
        fused = [layer.name for layer in report.layers if layer.skipped == "fused experts of a mixture, skipped"]
        mixture = [f"model.layers.{i}.mlp.experts.{name}" for i in (0, 1) for name in ("gate_up_proj", "down_proj")]
        assert fused == (mixture if architecture == "MixtralForCausalLM" else [])
    lost = {lost.name.rpartition(".")[0] for lost in on_disk.lost}  # a classifier, which is excluded
    for verdict in sk.verify(tmp_path / "out"):
        assert verdict.verdict == ("off" if lost else "exact"), verdict
        assert verdict.module in (lost or {""})


def test_with_and_without_the_import(fused, tmp_path):
    """This package first, without importing transformers; or transformers alone, which finds no file to load.

    A folder saved by transformers names no missing file: there the base model is loaded, with a warning.
    """
    base, model = fused("LlamaForCausalLM")
    sk.save_pretrained(model, tmp_path / "saved")
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved").save_pretrained(tmp_path / "by_transformers")
    base.save_pretrained(tmp_path / "base")
    sk.save_pretrained(model, tmp_path / "experts", base=tmp_path / "base")
    fine_tuned(base, 1).save_pretrained(tmp_path / "expert")
    options = {"rank_of_expert": 4, "rank_of_router": 2}
    upscale_checkpoints(tmp_path / "base", [tmp_path / "expert"], tmp_path / "upscaled", **options)
    load = f"""
def load(name):
    return transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path)!r} + "/" + name)
"""
    check = """
for name in ("saved", "upscaled"):
    assert type(load(name).model.layers[0].mlp.up_proj).__name__ == "SmileLinear"
"""
    ours = f"""
import sys, smile_kernels
assert not {{"transformers", "peft"}} & {{*sys.modules}}
import transformers
{load}{check}"""
    theirs = f"""
import sys, transformers
{load}
for name in ("saved", "upscaled", "experts"):
    try:
        load(name)
    except OSError as error:
        print(error)
assert type(load("by_transformers").model.layers[0].mlp.up_proj).__name__ == "Linear"
assert "smile_kernels" not in sys.modules
import smile_kernels
{check}"""
    for program, warned in ((ours, False), (theirs, True)):
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert ("Unknown quantization type, got smile" in done.stderr) == warned
        assert ("UNEXPECTED" in done.stderr) == warned
        assert done.stdout.count("needs_smile_kernels.safetensors") == 2 * warned
        assert ("no file named model.safetensors" in done.stdout) == warned


@pytest.mark.parametrize("lost", ["u", "vh", "expert_bias", "weight"])
def test_missing_tensors_are_an_error(lost, fused, tmp_path):
    _, model = fused("GPT2LMHeadModel")
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[f"transformer.h.1.mlp.c_fc.{lost}"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"1 tensors .*missing.*: transformer.h.1.mlp.c_fc.{lost}"):
        type(model).from_pretrained(tmp_path)


def test_a_missing_tensor_of_another_module_is_an_error_for_the_class_of_the_checkpoint(fused, tmp_path):
    _, model = fused("GPT2LMHeadModel")  # whose head is tied
    model.save_pretrained(tmp_path)
    on_disk = {"device_map": {"": "disk"}, "offload_folder": tmp_path / "offload"}
    torch.testing.assert_close(output(type(model).from_pretrained(tmp_path, **on_disk)), output(model))
    tensors = load_file(tmp_path / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if name != "transformer.ln_f.bias"}
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    for options in ({}, on_disk):
        with pytest.raises(ValueError, match=r"no tensor 'transformer\.ln_f\.bias' of the GPT2LMHeadModel"):
            type(model).from_pretrained(tmp_path, **options)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)  # its head is new


def test_a_layer_that_is_not_linear_is_refused(fused, tmp_path):
    _, model = fused("LlamaForCausalLM")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    modules = config["quantization_config"]["modules"]
    modules["model.norm"] = modules.pop("model.layers.0.self_attn.q_proj")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"modules\['model.norm'\]: .*a LlamaRMSNorm is not a linear layer"):
        type(model).from_pretrained(tmp_path)


def test_tensor_parallelism_of_transformers_is_refused(fused, tmp_path, monkeypatch):
    """In its `from_pretrained`, which requires the variables of torchrun."""
    _, model = fused("LlamaForCausalLM")
    model.save_pretrained(tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for name, value in rank.items():
        monkeypatch.setenv(name, value)
    try:
        with pytest.raises(ValueError, match="distributed_config: transformers' own tensor parallelism"):
            type(model).from_pretrained(tmp_path, distributed_config=DistributedConfig(tp_plan="auto"))
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def test_save_pretrained_writes_the_layers_as_they_are(fused, tmp_path):
    """Calibrated, or replaced, since they were made."""
    _, model = fused("LlamaForCausalLM")
    model.save_pretrained(tmp_path / "before")
    model = type(model).from_pretrained(tmp_path / "before")
    sk.calibrate(model, sequences=2, length=4)
    first, layer = next(iter(smile_layers(model).items()))
    with torch.no_grad():
        plain = torch.nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
        plain.weight.copy_(layer.weight)
    model.set_submodule(first, plain)
    sk.set_routing(model, sk.RoutingPolicy(calibrated=True))
    model.save_pretrained(tmp_path / "after")
    loaded = type(model).from_pretrained(tmp_path / "after")
    assert smile_layers(loaded).keys() == smile_layers(model).keys()
    assert torch.equal(output(loaded), output(model))


def test_conv1d_checkpoint_keeps_its_orientation_on_disk(fused, tmp_path):
    """As written from disk to disk: the base checkpoint's tensors, [in_features, out_features], unchanged."""
    _, model = fused("GPT2LMHeadModel")
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    for name, entry in config["quantization_config"]["modules"].items():
        entry["fan_in_fan_out"] = True
        tensors[f"{name}.weight"] = tensors[f"{name}.weight"].T.contiguous()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = type(model).from_pretrained(tmp_path)
    torch.testing.assert_close(output(loaded), output(model), rtol=1e-5, atol=1e-5)
    loaded.save_pretrained(tmp_path / "again")
    torch.testing.assert_close(
        output(type(model).from_pretrained(tmp_path / "again")), output(model), rtol=1e-5, atol=1e-5
    )


def test_a_part_of_a_checkpoint(fused, tmp_path):
    """A model without its head, and one tower of two."""
    _, mistral = fused("MistralForCausalLM")
    mistral.save_pretrained(tmp_path / "mistral")
    body = transformers.AutoModel.from_pretrained(tmp_path / "mistral")
    assert len(smile_layers(body)) == 14
    torch.testing.assert_close(output(body), output(mistral.model), rtol=1e-5, atol=1e-5)
    body.save_pretrained(tmp_path / "body")
    assert len(smile_layers(transformers.AutoModel.from_pretrained(tmp_path / "body"))) == 14

    _, clip = fused("CLIPModel")
    sk.save_pretrained(clip, tmp_path / "clip")
    with pytest.raises(FileNotFoundError, match=r"needs_smile_kernels\.safetensors"):
        transformers.CLIPVisionModel.from_pretrained(tmp_path / "clip")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "clip")
    tower = transformers.CLIPVisionModel.from_pretrained(
        tmp_path / "clip", quantization_config=config.quantization_config
    )
    assert len(smile_layers(tower)) == 12
    pixels = inputs(clip)["pixel_values"]
    torch.testing.assert_close(
        tower(pixel_values=pixels).last_hidden_state,
        clip.vision_model(pixel_values=pixels).last_hidden_state,
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.parametrize("architecture", ["MistralForCausalLM", "T5ForConditionalGeneration"])
def test_generate(architecture, fused, tmp_path):
    _, model = fused(architecture)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, device_map="auto")
    ids = inputs(model)["input_ids"]
    options = {"min_new_tokens": 6, "max_new_tokens": 6, "do_sample": False}
    assert torch.equal(loaded.generate(ids, **options), model.generate(ids, **options))


def test_continuous_batching(fused):
    """A paged cache; it cannot store a policy's sums, and each request raises."""
    _, model = fused("LlamaForCausalLM")
    model = copy.deepcopy(model)
    prompts = [[5, 6, 7, 8], [9, 10, 11]]
    config = transformers.GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=-1, pad_token_id=0)
    want = [model.generate(torch.tensor([p]), generation_config=config)[0, len(p) :].tolist() for p in prompts]
    small = transformers.ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=32)
    options = {"generation_config": config, "continuous_batching_config": small}
    answers = model.generate_batch(prompts, **options)
    assert [answers[f"req_{i}"].generated_tokens for i in (0, 1)] == want
    sk.set_routing(model, sk.RoutingPolicy("sequence"))
    answers = model.generate_batch(prompts, **options)
    for answer in answers.values():
        assert "is a PagedAttentionCache, which routing policies do not follow" in answer.error


def test_disk_offload(fused, tmp_path):
    _, model = fused("LlamaForCausalLM")
    model.save_pretrained(tmp_path / "model")
    device_map = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    device_map |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    loaded = type(model).from_pretrained(tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload")
    torch.testing.assert_close(output(loaded), output(model), rtol=1e-5, atol=1e-5)


def test_compile_without_graph_breaks(fused, tmp_path):
    _, model = fused("LlamaForCausalLM")
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    compiled = torch.compile(loaded, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        got = compiled(**inputs(loaded), return_dict=False, use_cache=False)[0]
    torch.testing.assert_close(got, output(model), rtol=1e-4, atol=1e-4)


def test_trainer_fine_tunes_the_experts(fused, tmp_path):
    """Only the experts change; the loss decreases; half() and float() work as on any model."""
    _, model = fused("LlamaForCausalLM")
    model.save_pretrained(tmp_path / "model")
    loaded = type(model).from_pretrained(tmp_path / "model")
    experts = ("vh", "s", "u", "expert_bias")
    for name, p in loaded.named_parameters():
        p.requires_grad_(name.rpartition(".")[2] in experts)
    ids = torch.randint(3, 96, (8, 12))
    data = [{"input_ids": row, "labels": row} for row in ids]
    arguments = transformers.TrainingArguments(
        tmp_path / "out", max_steps=8, learning_rate=2e-2, per_device_train_batch_size=8, report_to=[], use_cpu=True
    )
    before = {name: p.detach().clone() for name, p in loaded.named_parameters()}
    losses = [loaded(input_ids=ids, labels=ids).loss.item()]
    transformers.Trainer(loaded, arguments, train_dataset=data).train()
    losses.append(loaded(input_ids=ids, labels=ids).loss.item())
    assert losses[1] < losses[0] - 0.1
    for name, p in loaded.named_parameters():
        # Rows of an expert that no token chose do not change; some expert of every layer does.
        assert torch.equal(p, before[name]) == (name.rpartition(".")[2] not in experts), name
    assert loaded.half().lm_head.weight.dtype == torch.float16
