"""Saving, loading and describing models; bad input is refused by name."""

import copy
import json
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from smile_kernels import SmileError, SmileLinear, upscale, upscale_checkpoints
from smile_kernels.checkpoint import load_pretrained, save_pretrained
from smile_kernels.inspection import describe
from smile_kernels.storage import StoredTensor, read_tensors, write_shard
from tests.integrations import tiny_models
from tests.upscaling.checkpoints import save, stored


class Block(nn.Module):
    """Tied weights, a separate parameter, SMILE layers with and without biases, and one of another dtype."""

    def __init__(self, smile: bool):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.scale = nn.Parameter(torch.randn(8))
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8, bias=False)
        if smile:
            self.up = SmileLinear(8, 12, 3, 4, 5, 2)
            self.down = SmileLinear(12, 8, 3, 5, 2, 2, bias=False, router=True)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.down(self.up(self.embed(ids) * self.scale).relu()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shard", ["5GB", 500], ids=["one", "shards"])
def test_any_module_round_trip(tmp_path, shard, dtype):
    model = Block(smile=True).to(dtype)
    save_pretrained(model, tmp_path / "out", max_shard_size=shard)
    assert (tmp_path / "out" / "model.safetensors.index.json").exists() == (shard == 500)
    assert "head.weight" not in read_tensors(tmp_path / "out")  # tied: stored once
    loaded = load_pretrained(tmp_path / "out", Block(smile=False).to(dtype))
    assert loaded.head.weight is loaded.embed.weight
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
        assert loaded.state_dict()[name].dtype == tensor.dtype
    ids = torch.randint(11, (2, 5))
    assert torch.equal(loaded(ids), model(ids))


def test_experts_only_round_trip(tmp_path):
    model, plain = Block(smile=True), Block(smile=False)
    for name, p in plain.named_parameters():
        p.data = model.get_parameter(name).data.clone()
    save(tmp_path / "base", plain, max_shard_size=500)
    save_pretrained(model, tmp_path / "experts", base=tmp_path / "base")
    names = set(read_tensors(tmp_path / "experts"))
    assert {"up.vh", "up.s", "up.u", "up.expert_bias", "down.router"} <= names
    assert not {"up.weight", "scale", "embed.weight"} & names
    loaded = load_pretrained(tmp_path / "experts", plain)
    assert loaded.up.bias is not None
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


def other_norm(model: nn.Module) -> nn.Module:
    model.model.norm.weight.data[3] += 1
    return model


def grown(model: nn.Module) -> nn.Module:
    model.resize_token_embeddings(100)
    return model


def weight_of(layer: str) -> Callable[[nn.Module], nn.Module]:
    def change(model: nn.Module) -> nn.Module:
        model.get_parameter(f"{layer}.weight").data[0, 0] += 1
        return model

    return change


BASES = {
    "another architecture": (
        "Qwen2ForCausalLM",
        lambda model: model,
        "base is a qwen2 and the model a llama; expected the checkpoint",
    ),
    "a fine-tuned version": ("LlamaForCausalLM", weight_of("model.layers.1.mlp.up_proj"), r"up_proj\.weight' differs"),
    "another norm": (
        "LlamaForCausalLM",
        other_norm,
        r"tensor 'model\.norm\.weight' differs from the model's; expected the checkpoint",
    ),
    "more tokens": (
        "LlamaForCausalLM",
        grown,
        r"embed_tokens\.weight' has shape \[100, 32\], and \[96, 32\] in the model",
    ),
    "no blocks": (
        "LlamaForCausalLM",
        lambda model: model.get_input_embeddings(),
        "base has no tensor 'model.*model has",
    ),
    "another Conv1D": ("GPT2LMHeadModel", weight_of("transformer.h.1.attn.c_proj"), r"c_proj\.weight' differs"),
}


@pytest.mark.parametrize("case", BASES)
def test_experts_alone_are_saved_only_with_their_base(case, tmp_path):
    """A base in another dtype, whose embedding is tied or whose layers are stored transposed, is that of the model."""
    architecture, change, message = BASES[case]
    plain = tiny_models.build("GPT2LMHeadModel" if architecture.startswith("GPT2") else "LlamaForCausalLM").bfloat16()
    model, _ = upscale(plain, [tiny_models.fine_tuned(plain, 1)], rank_of_expert=4, rank_of_router=2, progress=False)
    base = tiny_models.build(architecture).bfloat16()
    change(base)
    if hasattr(base, "save_pretrained") and case != "no blocks":
        base.save_pretrained(tmp_path / "base")
    else:
        save(tmp_path / "base", base.get_input_embeddings())
    with pytest.raises(SmileError, match=message):
        save_pretrained(model.float(), tmp_path / "out", base=tmp_path / "base")
    plain.save_pretrained(tmp_path / "own", max_shard_size="20KB")
    save_pretrained(model, tmp_path / "out", base=tmp_path / "own")
    loaded = load_pretrained(tmp_path / "out", dtype=torch.float32).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())


def test_experts_alone_are_loaded_only_on_a_base_with_their_settings(tmp_path):
    """Settings on which no pass depends may change."""
    model = tiny_models.build("LlamaForCausalLM")
    model.config.pad_token_id = 1
    model.save_pretrained(tmp_path / "base")
    fused, _ = upscale(model, [tiny_models.fine_tuned(model, 1)], rank_of_expert=4, rank_of_router=2, progress=False)
    fused.config.problem_type = "regression"  # as a first pass with labels does
    fused.config.ctc_loss_reduction = "mean"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_pretrained(fused, tmp_path / "out", base=tmp_path / "base")
    file = tmp_path / "base" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"eos_token_id": 9, "use_cache": False, "pad_token_id": None}))
    load_pretrained(tmp_path / "out")
    file.write_text(json.dumps(config | {"pad_token_id": 5}))  # from which some models count positions
    with pytest.raises(SmileError, match="its config has pad_token_id 5, and that of the experts 1; expected the same"):
        load_pretrained(tmp_path / "out")
    rope = config["rope_parameters"] | {"rope_theta": 3.0}
    file.write_text(json.dumps(config | {"rope_parameters": rope}))
    message = r"its config has rope_parameters\.rope_theta 3\.0, and that of the experts 10000\.0; expected the same"
    with pytest.raises(SmileError, match=f"^base_model_name_or_path: .*base: {message}"):
        load_pretrained(tmp_path / "out")
    with pytest.raises(SmileError, match=f"^base: .*base: {message}"):
        save_pretrained(fused, tmp_path / "new", base=tmp_path / "base")
    assert not (tmp_path / "new").exists()


def test_experts_alone_of_a_model_that_transformers_stores_under_other_names(tmp_path):
    """As disk stores them; versions of transformers rename the layers of a ViT."""
    base = tiny_models.build("ViTForImageClassification")
    expert = tiny_models.fine_tuned(base, 1)
    for name, model in (("base", base), ("expert", expert)):
        model.save_pretrained(tmp_path / name)
    options = {"rank_of_expert": 2, "rank_of_router": 2, "workers": 1}
    for only in (False, True):
        folder = tmp_path / f"out{only}"
        upscale_checkpoints(tmp_path / "base", [tmp_path / "expert"], folder, **options, experts_only=only)
    whole, alone = (load_pretrained(tmp_path / f"out{only}").state_dict() for only in (False, True))
    assert whole.keys() == alone.keys()
    assert all(torch.equal(whole[name], alone[name]) for name in whole)


def test_experts_alone_of_a_model_of_parts_that_was_loaded_whole(tmp_path):
    base = tiny_models.build("CLIPModel")
    for name, model in (("base", base), ("expert", tiny_models.fine_tuned(base, 1))):
        model.save_pretrained(tmp_path / name)
    options = {"rank_of_expert": 2, "rank_of_router": 2, "workers": 1}
    upscale_checkpoints(tmp_path / "base", [tmp_path / "expert"], tmp_path / "whole", **options)
    model = load_pretrained(tmp_path / "whole")
    save_pretrained(model, tmp_path / "out", base=tmp_path / "base")
    want = model.state_dict()
    assert all(torch.equal(t, want[name]) for name, t in load_pretrained(tmp_path / "out").state_dict().items())


def test_a_generation_config_that_transformers_does_not_save(tmp_path):
    model = llama()
    model.generation_config.temperature = 0.3
    with pytest.raises(
        SmileError, match=r"^model: transformers cannot save it \(ValueError: .*temperature.*\); expected"
    ):
        save_pretrained(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_experts_alone_are_not_saved_with_what_is_not_a_base(tmp_path):
    model = llama()
    save_pretrained(model, tmp_path / "fused")
    for folder, error, message in (
        ("fused", SmileError, "is stored as 'smile'; expected a checkpoint of plain weights"),
        ("none", FileNotFoundError, "none: no such folder; expected the base checkpoint"),
    ):
        with pytest.raises(error, match=f"^base: .*{message}"):
            save_pretrained(model, tmp_path / "out", base=tmp_path / folder)
    assert [file.name for file in tmp_path.iterdir()] == ["fused"]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_transformers_models_round_trip(tmp_path, tied):
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        tie_word_embeddings=tied,
    )
    model = LlamaForCausalLM(config).eval()
    model.set_submodule("model.layers.0.mlp.up_proj", SmileLinear(32, 48, 3, 4, 5, 2, bias=False, expert_bias=False))
    model.set_submodule("model.layers.0.mlp.down_proj", SmileLinear(48, 32, 3, 5, 2, 2, bias=False, router=True))
    save_pretrained(model, tmp_path / "a")
    assert getattr(model.config, "quantization_config", None) is None
    assert "smile_kernels" in (tmp_path / "a" / "README.md").read_text()
    loaded = load_pretrained(tmp_path / "a", dtype="auto")
    save_pretrained(loaded, tmp_path / "b", max_shard_size=5000)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    ids = torch.randint(64, (2, 6))
    for other in (loaded, again):
        assert all(torch.equal(other.state_dict()[name], t) for name, t in model.state_dict().items())
        assert torch.equal(other(ids).logits, model(ids).logits)
        assert (other.lm_head.weight is other.model.embed_tokens.weight) == tied


def test_save_refuses_a_transformers_model_that_could_not_be_loaded_again(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=64))
    model.set_submodule("model.layers.0.mlp.up_proj", SmileLinear(32, 48, 3, 4, 5, 2, bias=False))
    diverged = copy.deepcopy(model)
    diverged.model.layers[0].mlp.up_proj.u.data[1, 2] = torch.inf
    partly = copy.deepcopy(model)
    partly.lm_head.to("meta")  # as concurrent calls of from_pretrained leave it
    for refused, message in (
        (diverged, r"model\.layers\.0\.mlp\.up_proj\.u contains NaN or inf"),
        (partly, r"lm_head\.weight is on the meta device"),
        (model.to("meta"), "is on the meta device"),
    ):
        with pytest.raises(SmileError, match=message):
            save_pretrained(refused, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=64))
    model.set_submodule("model.layers.0.mlp.up_proj", SmileLinear(32, 48, 3, 4, 5, 2, bias=False))
    return model


def with_adapter(model: nn.Module, wrapped: bool) -> nn.Module:
    peft = pytest.importorskip("peft")
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"]))
    return tuned if wrapped else tuned.base_model.model


def with_compiled_part(model: nn.Module) -> nn.Module:
    model.model.layers[0] = torch.compile(model.model.layers[0], backend="eager")
    return model


def pruned(model: nn.Module) -> nn.Module:
    prune.l1_unstructured(model.model.layers[0].mlp.up_proj, "weight", amount=0.5)
    return model


class Keeps(Block):
    """A state that is not a tensor, as layers of TransformerEngine have."""

    def get_extra_state(self):
        return {"scale": 5}


def test_states_that_are_not_tensors_are_named_and_conjugated_ones_are_saved(tmp_path):
    with pytest.raises(SmileError, match=r"^_extra_state: is a dict; expected a tensor"):
        save_pretrained(Keeps(smile=True), tmp_path / "out")
    assert not list(tmp_path.iterdir())
    model = Block(smile=True)
    model.register_buffer("phase", torch.randn(3, dtype=torch.complex64).conj())
    save_pretrained(model, tmp_path / "out")
    assert torch.equal(read_tensors(tmp_path / "out")["phase"].load(), model.phase)


class WritesNoExperts(Block):
    def save_pretrained(self, folder, max_shard_size):
        write_shard(folder / "model.safetensors", [StoredTensor.of("scale", self.scale)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: with_adapter(model, wrapped=True), r"model: it is a PeftModel of PEFT.*merge_and_unload"),
        (lambda model: with_adapter(model, wrapped=False), r"model: model\.layers.* of PEFT.*merge_and_unload"),
        (with_compiled_part, r"model: model\.layers\.0 is compiled; expected"),
        (pruned, r"model: model\.layers\.0\.mlp\.up_proj\.weight.* state dict; expected the tensors of a SmileLinear"),
        (lambda model: WritesNoExperts(smile=True), "model: the save_pretrained of WritesNoExperts writes no experts"),
    ],
    ids=["adapter", "inside the adapter", "compiled part", "pruned", "own save_pretrained"],
)
def test_save_refuses_what_could_not_be_loaded_and_replaces_nothing(tmp_path, change, message):
    save_pretrained(llama(), tmp_path / "out")
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    model = change(llama())
    for options in ({}, {"base": tmp_path / "base"}):
        if options and isinstance(model, WritesNoExperts):
            continue
        with pytest.raises(SmileError, match=message):
            save_pretrained(model, tmp_path / "out", force=True, **options)
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_a_compiled_model_is_saved_under_its_own_names(tmp_path):
    model = llama()
    save_pretrained(torch.compile(model, backend="eager"), tmp_path / "out")
    loaded = load_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())
    block = Block(smile=True)
    save_pretrained(torch.compile(block, backend="eager"), tmp_path / "block")
    loaded = load_pretrained(tmp_path / "block", Block(smile=False)).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in block.state_dict().items())


def test_save_refuses_to_overwrite(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is not empty"):
        save_pretrained(Block(smile=True), tmp_path)
    assert [f.name for f in tmp_path.iterdir()] == ["notes.txt"]
    with pytest.raises(FileExistsError, match="is a file"):
        save_pretrained(Block(smile=True), tmp_path / "notes.txt", force=True)
    with pytest.raises(FileExistsError, match=r"contains notes\.txt, which smile-kernels did not write"):
        save_pretrained(Block(smile=True), tmp_path, force=True)
    save_pretrained(Block(smile=True), tmp_path / "model")
    with pytest.raises(FileExistsError, match="is not empty"):
        save_pretrained(Block(smile=True), tmp_path / "model")
    save_pretrained(Block(smile=True), tmp_path / "model", force=True)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["model", "notes.txt"]
    with pytest.raises(ValueError, match="has no SmileLinear"):
        save_pretrained(Block(smile=False), tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_load_errors_name_what_is_wrong(tmp_path):
    save_pretrained(Block(smile=True), tmp_path / "a")
    with pytest.raises(ValueError, match="names no architecture"):
        load_pretrained(tmp_path / "a")
    with pytest.raises(ValueError, match="model: Sequential has no layer 'up'"):
        load_pretrained(tmp_path / "a", nn.Sequential())
    tensors = {name: t.load() for name, t in read_tensors(tmp_path / "a").items()}
    for change, message in (
        ({"up.u": None}, r"tensor 'up\.u' is missing"),
        ({"scale": None}, "tensor 'scale' is missing"),
        ({"more": torch.ones(1)}, "tensor 'more' is unexpected"),
        ({"up.u": torch.ones(3, 12, 9)}, r"tensor 'up\.u' has shape \[3, 12, 9\]; expected \[3, 12, 4\]"),
    ):
        changed = {name: t for name, t in (tensors | change).items() if t is not None}
        write_shard(tmp_path / "a" / "model.safetensors", stored(changed))
        with pytest.raises(ValueError, match=message):
            load_pretrained(tmp_path / "a", Block(smile=False))
    (tmp_path / "a" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="is not a SMILE checkpoint"):
        load_pretrained(tmp_path / "a", Block(smile=False))
    (tmp_path / "a" / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: is not JSON"):
        load_pretrained(tmp_path / "a", Block(smile=False))


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Shared(nn.Module):
    """One layer in two places."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.again = nn.Sequential(nn.ReLU(), self.layer)

    def forward(self, x):
        return self.again(self.layer(x))


def test_experts_go_into_plain_linear_layers_wherever_a_model_holds_them(tmp_path):
    base = Shared()
    model, _ = upscale(base, [Shared(), Shared()], rank_of_expert=3, rank_of_router=2, progress=False)
    save_pretrained(model, tmp_path / "a")
    into, x = copy.deepcopy(base), torch.randn(5, 8)
    seen = []
    into.layer.register_forward_hook(lambda *_: seen.append(1))
    loaded = load_pretrained(tmp_path / "a", into)
    assert loaded.again[1] is loaded.layer
    assert torch.equal(loaded(x), model(x))
    assert len(seen) == 2
    other = copy.deepcopy(base)
    other.layer = Doubled(8, 8)
    with pytest.raises(ValueError, match=r"'layer' cannot have .* forward of Doubled is not that of nn\.Linear"):
        load_pretrained(tmp_path / "a", other)
    other.layer = nn.Bilinear(8, 8, 8)
    with pytest.raises(ValueError, match=r"'layer' cannot have the experts .* a Bilinear is not a linear layer"):
        load_pretrained(tmp_path / "a", other)


def test_describe(tmp_path):
    model = Block(smile=True)
    save_pretrained(model, tmp_path / "a")
    description = describe(tmp_path / "a")
    total = sum(t.nbytes for t in read_tensors(tmp_path / "a").values())
    assert sum(description["bytes"].values()) == total
    up = description["layers"][0]
    assert (up["name"], up["in_features"], up["out_features"]) == ("up", 8, 12)
    assert (up["rank_of_expert"], up["rank_of_router"], up["energy"]) == (4, 5, [])
    assert up["norm"] == pytest.approx(model.up.s.detach().double().norm(dim=1).tolist())


@pytest.mark.parametrize(
    "buffer", [torch.ones(2, dtype=torch.complex128), torch.ones(2).to_sparse()], ids=["complex", "sparse"]
)
def test_a_tensor_that_safetensors_cannot_hold_is_named(buffer, tmp_path):
    model = nn.Sequential(SmileLinear(8, 8, 2, 2, 2))
    model.register_buffer("extra", buffer)
    with pytest.raises(ValueError, match=rf"^extra: is a {buffer.dtype} tensor of layout {buffer.layout}; expected"):
        save_pretrained(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())
