"""Checkpoints: files read and written whole or not at all, models saved and loaded, and bad input refused by name."""

import errno
import json
import pickle
import struct

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from smile_kernels import SmileLinear
from smile_kernels.checkpoint import (
    describe,
    load_pretrained,
    save_pretrained,
)
from smile_kernels.config import SmileConfig, SmileModuleConfig
from smile_kernels.storage import StoredTensor, parse_size, read_tensors, write_shard, write_tensors

CONFIG = SmileConfig(3, 1, 32, 16, {"a.b": SmileModuleConfig(32, 16, expert_bias=True)})


def stored(tensors: dict[str, torch.Tensor]) -> list[StoredTensor]:
    return [StoredTensor.of(name, tensor) for name, tensor in tensors.items()]


class Block(nn.Module):
    """Tied weights, a parameter of its own, SMILE layers with and without biases, and one of another dtype."""

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


def test_config_round_trip():
    assert SmileConfig.from_dict(json.loads(json.dumps(CONFIG.to_dict()))) == CONFIG


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_method": "awq"}, "quant_method: is 'awq'; expected 'smile'"),
        ({"route": {}}, "unknown key 'route'"),
        ({"routing": {"scope": "all"}}, "scope: is 'all'; expected one of 'token', 'sequence', 'causal'"),
        ({"num_experts_per_tok": 4}, "num_experts_per_tok: is 4; expected 1 to 3"),
        ({"num_local_experts": 0}, "num_local_experts: is 0"),
        ({"rank_of_expert": 1.0}, "rank_of_expert: is 1.0; expected an integer of 1 or more, -1 for full rank"),
        ({"rank_of_router": True}, "rank_of_router: is True"),
        ({"modules": []}, r"modules: is \[\]; expected a mapping"),
        ({"modules": {"a": {"rank_of_expert": 1}}}, r"modules\['a'\]: rank_of_router is missing"),
        ({"modules": {"a": {"rank_of_expert": 0, "rank_of_router": 1}}}, r"modules\['a'\]: rank_of_expert: is 0"),
        ({"modules": {"a": {"rank_of_expert": 1, "rank_of_router": 1, "r": 2}}}, r"modules\['a'\]: unknown key 'r'"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_config_errors_name_the_key(change, message):
    with pytest.raises(ValueError, match=message):
        SmileConfig.from_dict(CONFIG.to_dict() | change)


@settings(max_examples=25, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(0, 5), max_size=3), min_size=1, max_size=6),
    dtypes=st.lists(
        st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool]),
        min_size=6,
        max_size=6,
    ),
    shard=st.integers(1, 200),
)
def test_tensors_round_trip_through_any_shards(tmp_path_factory, shapes, dtypes, shard):
    folder = tmp_path_factory.mktemp("shards")
    tensors = {f"t.{i}": torch.randn(s).mul(3).to(d) for i, (s, d) in enumerate(zip(shapes, dtypes))}
    write_tensors(folder, stored(tensors), max_shard_size=shard)
    read = {name: tensor.load() for name, tensor in read_tensors(folder).items()}
    theirs = {k: t for file in folder.glob("*.safetensors") for k, t in safetensors.torch.load_file(file).items()}
    for got in (read, theirs):
        assert set(got) == set(tensors)
        for name, tensor in tensors.items():
            torch.testing.assert_close(got[name], tensor, rtol=0, atol=0)
    for file in folder.glob("*.safetensors"):
        data = file.stat().st_size - 8 - struct.unpack("<Q", file.read_bytes()[:8])[0]
        assert data <= shard or len(safetensors.torch.load_file(file)) == 1


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_bin_files_are_read_as_weights(tmp_path, legacy):
    tensors = {"a": torch.randn(3, 4), "b": torch.randn(2).bfloat16()}
    torch.save(tensors, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
    read = read_tensors(tmp_path)
    assert read["b"].dtype == torch.bfloat16
    assert all(torch.equal(read[name].load(), tensor) for name, tensor in tensors.items())


def test_sharded_bin_files(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "pytorch_model-1.bin")
    torch.save({"b": torch.ones(3)}, tmp_path / "pytorch_model-2.bin")
    index = {"weight_map": {"a": "pytorch_model-1.bin", "b": "pytorch_model-2.bin"}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert {name: t.shape for name, t in read_tensors(tmp_path).items()} == {"a": (2,), "b": (3,)}


@pytest.mark.parametrize("keep", [4, 30, -1], ids=["nohead", "halfhead", "halfdata"])
def test_truncated_safetensors(tmp_path, keep):
    file = tmp_path / "model.safetensors"
    write_shard(file, stored({"a": torch.randn(4, 4)}))
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"model\.safetensors: is not a whole safetensors file"):
        read_tensors(tmp_path)


def test_a_pickle_that_is_not_weights_alone(tmp_path):
    class Attack:
        def __reduce__(self):
            return (open, (str(tmp_path / "owned"), "w"))

    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Attack()))
    with pytest.raises(ValueError, match=r"pytorch_model\.bin: is not"):
        read_tensors(tmp_path)
    torch.save({"a": torch.ones(2), "evil": Attack()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin: is not a pickle of weights alone"):
        read_tensors(tmp_path)
    assert not (tmp_path / "owned").exists()


def test_a_bin_that_is_cut_short_or_holds_more_than_tensors(tmp_path):
    file = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.randn(400)}, file)
    file.write_bytes(file.read_bytes()[:-600])
    with pytest.raises(ValueError, match=r"pytorch_model\.bin: is not"):
        read_tensors(tmp_path)
    torch.save({"epoch": 3, "a": torch.ones(1)}, file)
    with pytest.raises(ValueError, match=r"holds a int as 'epoch'; expected tensors by name"):
        read_tensors(tmp_path)


def test_folders_that_hold_no_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        read_tensors(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="holds no weights"):
        read_tensors(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    with pytest.raises(FileNotFoundError, match=r"gone\.safetensors: no such file"):
        read_tensors(tmp_path)
    write_shard(tmp_path / "gone.safetensors", stored({"b": torch.ones(1)}))
    with pytest.raises(ValueError, match=r"tensor 'a' is not in .*gone\.safetensors"):
        read_tensors(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=["nan", "inf"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e5m2], ids=["fp32", "bf16", "fp8"])
def test_not_finite(tmp_path, value, dtype):
    bad = torch.randn(3, 4)
    bad[1, 2] = value
    safetensors.torch.save_file({"x.weight": bad.to(dtype)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors: tensor 'x\.weight' holds 1 NaN or inf.*\[1, 2\]"):
        read_tensors(tmp_path)["x.weight"].load()


def test_sizes():
    assert [parse_size(s) for s in (7, "5GB", "1.5MB", "2GiB", "300")] == [7, 5 * 10**9, 1_500_000, 2**31, 300]
    for bad in ("", "5XB", "-1", 0, "0.1"):
        with pytest.raises(ValueError, match="max_shard_size: is"):
            parse_size(bad)


class FullDisk:
    """A file that takes `room` bytes and then reports a full disk, as the kernel does."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def write(self, data):
        self.room -= len(data)
        if self.room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.file.write(data)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.file.close()

    def __getattr__(self, name):
        return getattr(self.file, name)


@pytest.fixture
def full_disk(monkeypatch):
    monkeypatch.setattr(
        "smile_kernels.publishing.open",
        lambda *a: FullDisk(open(*a), 900),  # noqa: SIM115
        raising=False,
    )


def test_a_full_disk_leaves_nothing_half_written(tmp_path, full_disk):
    with pytest.raises(OSError, match="disk is full"):
        write_shard(tmp_path / "model.safetensors", stored({"a": torch.randn(30, 30)}))
    assert not list(tmp_path.iterdir())
    with pytest.raises(OSError, match="disk is full"):
        save_pretrained(Block(smile=True), tmp_path / "model")
    assert not list(tmp_path.iterdir())


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
    save_pretrained(model, tmp_path / "experts", base=tmp_path / "base")
    names = set(read_tensors(tmp_path / "experts"))
    assert {"up.vh", "up.s", "up.u", "up.expert_bias", "down.router"} <= names
    assert not {"up.weight", "scale", "embed.weight"} & names
    loaded = load_pretrained(tmp_path / "experts", plain)
    assert loaded.up.bias is not None
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


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


def test_save_refuses_to_overwrite(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is not empty"):
        save_pretrained(Block(smile=True), tmp_path)
    assert [f.name for f in tmp_path.iterdir()] == ["notes.txt"]
    with pytest.raises(FileExistsError, match="is a file"):
        save_pretrained(Block(smile=True), tmp_path / "notes.txt", force=True)
    with pytest.raises(FileExistsError, match=r"holds notes\.txt, which smile-kernels did not write"):
        save_pretrained(Block(smile=True), tmp_path, force=True)
    save_pretrained(Block(smile=True), tmp_path / "model")
    with pytest.raises(FileExistsError, match="is not empty"):
        save_pretrained(Block(smile=True), tmp_path / "model")
    save_pretrained(Block(smile=True), tmp_path / "model", force=True)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["model", "notes.txt"]
    with pytest.raises(ValueError, match="holds no SmileLinear"):
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
        ({"up.u": torch.ones(3, 12, 9)}, r"size mismatch for up\.u"),
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


def test_fusion_bench_checkpoints_load(tmp_path):
    from fusion_bench.models.smile_moe.linear_from_module import SmileMoELinear

    base = nn.Linear(8, 12)
    model = nn.Sequential(SmileMoELinear(base, [nn.Linear(8, 12) for _ in range(3)], gate_k=2, k=4), nn.LayerNorm(12))
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    loaded = load_pretrained(tmp_path, nn.Sequential(nn.Linear(8, 12), nn.LayerNorm(12)))
    x = torch.randn(20, 8)
    torch.testing.assert_close(loaded(x), model(x), rtol=1e-5, atol=1e-5)


def test_fusion_bench_language_models_load(tmp_path):
    from fusion_bench.models.smile_moe.linear_from_hf_config import SmileLinear as TheirLinear
    from fusion_bench.models.smile_moe.linear_from_hf_config import SmileMoEConfig
    from transformers import MistralConfig, MistralForCausalLM

    shape = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    plain = MistralConfig(**shape, vocab_size=64, num_hidden_layers=2)
    model, smile = MistralForCausalLM(plain), SmileMoEConfig()
    ranks = {"num_experts_per_tok": 1, "rank_of_router": 2, "rank_of_expert": 4, "num_local_experts": 3}
    vars(smile).update(ranks)
    for name, module in list(model.model.layers.named_modules()):
        if isinstance(module, nn.Linear):
            model.model.layers.set_submodule(name, TheirLinear(smile, module.in_features, module.out_features, False))
    for p in model.parameters():
        nn.init.normal_(p, std=0.1)
    safetensors.torch.save_file(model.state_dict(), tmp_path / "model.safetensors")
    theirs = {"model_type": "smile_mistral", "architectures": ["SmileMistralForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(plain.to_dict() | ranks | theirs))
    loaded = load_pretrained(tmp_path)
    assert type(loaded).__name__ == "MistralForCausalLM"
    layer, theirs = loaded.model.layers[1].mlp.up_proj, model.model.layers[1].mlp.up_proj
    x = torch.randn(40, 32)
    torch.testing.assert_close(layer(x), theirs(x), rtol=1e-5, atol=1e-5)
    save_pretrained(loaded, tmp_path / "ours")
    ids = torch.randint(64, (2, 5))
    assert torch.equal(load_pretrained(tmp_path / "ours")(ids).logits, loaded(ids).logits)


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
