"""One mapping of names for base, experts and adapters, in memory and from disk."""

import copy
import json
import warnings

import huggingface_hub
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

import smile_kernels as sk
from smile_kernels.integrations.peft import adapter_deltas
from smile_kernels.upscaling.sources import read_plain

TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96}
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
RANKS = {"rank_of_expert": -1, "rank_of_router": 2}
IDS = torch.arange(3, 17).view(2, 7)


def build(architecture: str, **options) -> nn.Module:
    torch.manual_seed(0)
    cls = getattr(transformers, architecture)
    model = cls(cls.config_class(**{**TEXT, **options})).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.normal_(std=p.shape[1] ** -0.5)
    return model


def tuned(base: nn.Module, seed: int = 1) -> nn.Module:
    """Every linear layer that is not tied to an embedding changed, biases included."""
    torch.manual_seed(seed)
    model = copy.deepcopy(base)
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, (nn.Linear, Conv1D)):
                if id(layer.weight) not in embeddings:
                    layer.weight += 0.3 * layer.weight.std() * torch.randn_like(layer.weight)
                if layer.bias is not None:
                    layer.bias += 0.1 * torch.randn_like(layer.bias)
    return model


@torch.no_grad()
def output(model: nn.Module) -> torch.Tensor:
    return model(input_ids=IDS).to_tuple()[0]


def fuse(tmp_path, base, experts, **options):
    """From disk to disk, and loaded."""
    if isinstance(base, nn.Module):
        base.save_pretrained(tmp_path / "base")
    report = sk.upscale_checkpoints(tmp_path / "base", experts, tmp_path / "out", **RANKS, **options)
    return report, transformers.AutoConfig.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize(
    "architecture",
    ["NomicBertModel", "JinaEmbeddingsV3Model", "BertForMaskedLM", "RobertaForMaskedLM", "MPNetForMaskedLM"],
)
def test_split_tensors_and_tied_biases(architecture, tmp_path):
    """One tensor on disk for three layers of the model, biases with another name: disk and memory are equal."""
    base = build(architecture, pad_token_id=0)
    expert = tuned(base)
    in_memory, report = sk.upscale(base, [expert], progress=False, **RANKS)
    expert.save_pretrained(tmp_path / "expert")
    on_disk, _ = fuse(tmp_path, base, [tmp_path / "expert"])
    assert not report.lost
    assert not on_disk.lost
    assert {layer.name for layer in on_disk.layers if not layer.skipped} == {
        layer.name for layer in report.layers if not layer.skipped
    }
    in_memory.save_pretrained(tmp_path / "own")
    for folder in ("out", "own"):
        torch.testing.assert_close(
            output(type(base).from_pretrained(tmp_path / folder)), output(expert), rtol=1e-4, atol=1e-5
        )


def adapter(base: nn.Module, folder, **options) -> torch.Tensor:
    """Save a random adapter; return PEFT's merged model."""
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(
            copy.deepcopy(base), peft.LoraConfig(r=3, init_lora_weights=False, **options)
        ).eval()
        want = output(model)
        model.save_pretrained(folder)
    return want


@pytest.mark.parametrize(
    ("body", "head", "targets"),
    [
        ("GPT2Model", "GPT2LMHeadModel", ["c_attn", "c_fc"]),
        ("BertModel", "BertForSequenceClassification", ["query", "dense"]),
        ("LlamaModel", "LlamaForCausalLM", ["q_proj", "up_proj"]),
    ],
)
def test_an_adapter_of_the_body_on_the_model_with_a_head(body, head, targets, tmp_path):
    whole = build(head)
    base = build(body)
    base.load_state_dict(whole.base_model.state_dict())
    want = adapter(base, tmp_path / "adapter", target_modules=targets, fan_in_fan_out=body.startswith("GPT2"))
    whole.save_pretrained(tmp_path / "base")
    sk.upscale_checkpoints(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out", **RANKS)
    loaded = type(whole).from_pretrained(tmp_path / "out")
    torch.testing.assert_close(output(loaded.base_model), want, rtol=1e-4, atol=1e-4)
    deltas = adapter_deltas(tmp_path / "adapter", whole.state_dict())
    in_memory, _ = sk.upscale(whole, [deltas], progress=False, **RANKS)
    torch.testing.assert_close(output(in_memory.base_model), want, rtol=1e-4, atol=1e-4)


SPELLINGS = {
    "the adapter's name": lambda key: key.replace(".weight", ".default.weight"),
    "no .weight": lambda key: key.removesuffix(".weight"),
    "down and up": lambda key: key.replace("lora_A", "lora_down").replace("lora_B", "lora_up"),
    "a compiled model": lambda key: key.replace("base_model.model.", "base_model.model._orig_mod."),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spellings_of_an_adapter(spelling, tmp_path):
    base = build("LlamaForCausalLM", **SPECIAL)
    want = adapter(base, tmp_path / "adapter", target_modules=["q_proj", "v_proj"])
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({SPELLINGS[spelling](key): tensor for key, tensor in load_file(file).items()}, file)
    report, _ = fuse(tmp_path, base, [tmp_path / "adapter"])
    assert sum(not layer.skipped for layer in report.layers) == 4
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(output(loaded), want, rtol=1e-4, atol=1e-4)


def test_dora_over_layers_of_both_kinds(tmp_path):
    """Whether a weight is transposed is decided for each layer, also where its shape does not tell."""

    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.linear = Conv1D(8, 8), nn.Linear(8, 8)
            self.config = {"model_type": "custom"}

        def forward(self, x):
            return self.linear(torch.tanh(self.conv(x)))

    torch.manual_seed(0)
    base = Mixed()
    nn.init.normal_(base.conv.weight)
    model = peft.get_peft_model(
        copy.deepcopy(base),
        peft.LoraConfig(r=2, target_modules=["conv", "linear"], use_dora=True, init_lora_weights=False),
    ).eval()
    model.save_pretrained(tmp_path)
    fused, _ = sk.upscale(base, [adapter_deltas(tmp_path, base.state_dict())], progress=False, **RANKS)
    x = torch.randn(5, 8)
    torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-5)


def test_vocabularies_and_labels_that_grew(tmp_path):
    """The layers that are used must match; lost changes of the others are in the report, on both paths."""
    base = build("LlamaForCausalLM", **SPECIAL)
    expert = tuned(base)
    expert.resize_token_embeddings(100)
    with pytest.raises(ValueError, match=r"lm_head.weight' has shape \[100, 32\]; expected the base's, \[96, 32\]"):
        sk.upscale(base, [expert], progress=False, **RANKS)
    expert.save_pretrained(tmp_path / "expert")
    with pytest.warns(UserWarning, match="left out of the result"):
        _, report = sk.upscale(base, [expert], exclude=["lm_head"], progress=False, **RANKS)
    with pytest.warns(UserWarning, match="left out of the result"):
        on_disk, _ = fuse(tmp_path, base, [tmp_path / "expert"], exclude=["lm_head"])
    for one in (report, on_disk):
        assert {lost.name for lost in one.lost} == {"lm_head.weight", "model.embed_tokens.weight"}
        assert "of shape [100, 32]" in one.lost[0].reason
    stored = json.loads((tmp_path / "out" / "smile_report.json").read_text())
    assert [lost["name"] for lost in stored["lost"]] == [lost.name for lost in on_disk.lost]


@pytest.mark.parametrize("tied", ["base", "expert"])
def test_one_side_ties_its_head(tied, tmp_path):
    base = build("LlamaForCausalLM", **SPECIAL, tie_word_embeddings=tied == "base")
    expert = build("LlamaForCausalLM", **SPECIAL, tie_word_embeddings=tied == "expert")
    expert.model.load_state_dict(tuned(base).model.state_dict())
    expert.save_pretrained(tmp_path / "expert")
    in_memory, _ = sk.upscale(base, [expert], progress=False, **RANKS)
    torch.testing.assert_close(output(in_memory), output(expert), rtol=1e-4, atol=1e-4)
    fuse(tmp_path, base, [tmp_path / "expert"])
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(output(loaded), output(expert), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("targets", [["q_proj", "up_proj"], "all-linear"])
def test_peft_on_top(targets, tmp_path):
    """PEFT finds SMILE layers, trains adapters for them, saves and loads them."""
    base = build("LlamaForCausalLM", **SPECIAL)
    model, _ = sk.upscale(base, [tuned(base, 1), tuned(base, 2)], progress=False, **RANKS)
    before = output(model)
    on_top = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=2, target_modules=targets))
    torch.testing.assert_close(output(on_top), before)
    optimizer = torch.optim.AdamW([p for p in on_top.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(5):
        losses.append(on_top(input_ids=IDS, labels=IDS).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    on_top.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path)
    torch.testing.assert_close(output(again.eval()), output(on_top.eval()))
    torch.testing.assert_close(output(again.merge_and_unload()), output(on_top), rtol=1e-4, atol=1e-4)


def test_files_beside_the_weights_are_carried_over(tmp_path):
    base = build("LlamaForCausalLM", **SPECIAL)
    base.save_pretrained(tmp_path / "base")
    beside = ["modeling.py", "source.spm", "bpe.codes", "tokenizer.model.v3", "vocab.json"]
    for name in beside:
        (tmp_path / "base" / name).write_text("{}")
    for name in ("old.safetensors.index.json", "pytorch_model-00001-of-00002.bin"):
        (tmp_path / "base" / name).write_text("{}")
    tuned(base).save_pretrained(tmp_path / "expert")
    sk.upscale_checkpoints(tmp_path / "base", [tmp_path / "expert"], tmp_path / "out", **RANKS)
    written = {file.name for file in (tmp_path / "out").iterdir()}
    assert written >= set(beside)
    assert not {name for name in written if name.endswith((".bin", ".index.json"))}


def test_ids_of_the_hub(tmp_path, monkeypatch):
    """Cached models are found without a network, by revision; others are refused by name."""
    base = build("LlamaForCausalLM", **SPECIAL)
    for name, model in (("base", base), ("math", tuned(base))):
        repository = tmp_path / f"models--lab--{name}"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "v1").write_text("0" * 40)
        model.save_pretrained(repository / "snapshots" / ("0" * 40))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    sk.upscale_checkpoints("lab/base@v1", ["lab/math@v1"], tmp_path / "out", **RANKS)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(output(loaded), output(tuned(base)), rtol=1e-4, atol=1e-4)
    with pytest.raises(FileNotFoundError, match=r"experts\[0\]: lab/code@v2: no such folder, and not found on the Hub"):
        sk.upscale_checkpoints("lab/base@v1", ["lab/code@v2"], tmp_path / "other", **RANKS)


@pytest.mark.parametrize("network", [True, False])
def test_a_cached_snapshot_without_a_tokenizer(network, tmp_path, monkeypatch):
    """from_pretrained caches a config and weights: the other files are fetched, or a warning says that they lack."""
    base = build("LlamaForCausalLM", **SPECIAL)
    snapshot = tmp_path / "snapshots" / ("0" * 40)
    base.save_pretrained(snapshot)
    tuned(base).save_pretrained(tmp_path / "expert")

    def download(repository, *, revision, ignore_patterns, local_files_only=False):
        if not local_files_only and not network:
            raise ConnectionError("no network")
        if not local_files_only:
            assert (repository, revision) == ("lab/base", snapshot.name)
            files = ["model-00001-of-00002.safetensors", "2_Dense/model.safetensors", "tokenizer_config.json"]
            fetched = huggingface_hub.utils.filter_repo_objects(files, ignore_patterns=ignore_patterns)
            assert list(fetched) == files[1:]
            (snapshot / "tokenizer_config.json").write_text("{}")
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sk.upscale_checkpoints("lab/base", [tmp_path / "expert"], tmp_path / "out", **RANKS)
    assert (tmp_path / "out" / "tokenizer_config.json").exists() == network
    said = [str(one.message) for one in caught if "has no tokenizer and no preprocessor" in str(one.message)]
    assert len(said) == (not network)


def test_a_router_of_a_mixture_with_an_expert_bias_of_its_own_is_no_smile_layer(tmp_path):
    tensors = {"gate.weight": torch.randn(4, 8), "gate.expert_bias": torch.randn(4)}
    save_file(tensors, tmp_path / "model.safetensors")
    assert read_plain("base", tmp_path).keys() == tensors.keys()
    save_file(tensors | {"gate.u": torch.randn(2, 4, 3)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"base: .* contains 'gate\.expert_bias', as a SMILE model does"):
        read_plain("base", tmp_path)
