"""fusion_bench's modules and their conversions: equal outputs, both key layouts, without fusion_bench installed."""

import copy
import importlib.util
import itertools
import json
import subprocess
import sys

import pytest
import torch
from fusion_bench.models.smile_moe import linear_from_hf_config as headed
from fusion_bench.models.smile_moe import linear_from_module as generic
from safetensors.torch import save_model
from torch import nn

from smile_kernels import SmileError, SmileLinear, load_pretrained, save_pretrained
from smile_kernels.integrations.fusion_bench import convert_state_dict, from_fusion_bench, holds_fusion_bench_layers
from smile_kernels.nn import smile_layers
from smile_kernels.upscaling import verify
from tests.integrations.tiny_models import GROUPED, SPECIAL, build, fine_tuned, linear_layers

D, O, N = 20, 28, 3


def linears(bias: bool) -> tuple[nn.Linear, list[nn.Linear]]:
    base = nn.Linear(D, O, bias=bias)
    finetuned = [nn.Linear(D, O, bias=bias) for _ in range(N)]
    for layer in finetuned:
        for name, p in layer.named_parameters():
            p.data = base.get_parameter(name).data + 0.1 * p.data
    return base, finetuned


def theirs(layout: str, rank: int, gate: int, m: int, bias: bool = True) -> nn.Module:
    base, finetuned = linears(bias)
    if layout == "generic":
        return generic.SmileMoELinear(base, finetuned, gate_k=gate, k=rank, top_k=m)
    config = headed.SmileMoEConfig()
    config.num_local_experts, config.num_experts_per_tok = N, m
    config.rank_of_expert, config.rank_of_router = rank, gate
    target = headed.SmileLinear(config, D, O, bias=bias)
    return headed.upscale_to_smile_linear(base, finetuned, target)


def clear_tokens(module: nn.Module, m: int, dtype: torch.dtype) -> torch.Tensor:
    """Inputs whose m-th and next score differ by more than rounding, so that no choice depends on it."""
    x = torch.randn(400, D).to(dtype)
    gate = module.gate.weight if hasattr(module.gate, "weight") else module.gate.weights
    scores = (x.double() @ gate.double().T).view(len(x), N, -1).norm(dim=-1).sort(dim=-1, descending=True).values
    gap = scores[:, m - 1] - scores[:, m] if m < N else torch.ones(len(x))
    x = x[gap > 8 * torch.finfo(dtype).eps * scores[:, 0]]
    assert len(x) > 100
    return x


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
@pytest.mark.parametrize("m", [1, 2, 3], ids=lambda m: f"m{m}")
@pytest.mark.parametrize(("rank", "gate"), [(8, 4), (4, 8), (20, 1), (-1, 4)], ids=lambda r: f"{r}")
@pytest.mark.parametrize("layout", ["generic", "headed"])
def test_same_outputs(layout, rank, gate, m, bias):
    module = theirs(layout, rank, gate, m, bias=bias)
    x = clear_tokens(module, m, torch.float32)
    want = module.double()(x.double())
    layer = from_fusion_bench(module.float())
    assert isinstance(layer, SmileLinear)
    assert layer.rank_of_expert == (min(D, O) if rank < 0 else rank)
    torch.testing.assert_close(layer(x).double(), want, rtol=0, atol=16 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("layout", ["generic", "headed"])
def test_low_precision_is_as_near_to_exact_as_theirs(layout, dtype):
    module = theirs(layout, 8, 4, 1).to(dtype)
    x = clear_tokens(module, 1, dtype)
    low = module(x)
    want = module.double()(x.double())
    ours = from_fusion_bench(module.to(dtype))(x)
    assert ours.dtype == dtype
    assert (ours.double() - want).norm() <= 2 * (low.double() - want).norm()  # as in every low-precision test


def test_tied_gate_needs_no_router_and_a_foreign_gate_keeps_one():
    assert from_fusion_bench(theirs("generic", 8, 4, 1)).router is None
    module = theirs("generic", 8, 4, 1)
    module.gate.weights.data = torch.randn_like(module.gate.weights)
    x = clear_tokens(module, 1, torch.float32)
    want = module(x)
    layer = from_fusion_bench(module)
    assert layer.router is not None
    torch.testing.assert_close(layer(x), want, rtol=1e-5, atol=1e-5)


def test_an_expert_equal_to_the_base():
    base, finetuned = linears(True)
    finetuned[1].load_state_dict(base.state_dict())
    module = generic.SmileMoELinear(base, finetuned, gate_k=4, k=8)
    x = clear_tokens(module, 1, torch.float32)
    want = module(x)
    torch.testing.assert_close(from_fusion_bench(module)(x), want, rtol=1e-5, atol=1e-5)


def test_swaps_in_place_throughout_a_model():
    model = nn.Sequential(theirs("generic", 8, 4, 1), nn.ReLU(), nn.ModuleDict({"deep": nn.Linear(2, 2)})).eval()
    deep = model[2]["deep"]
    assert from_fusion_bench(model) is model
    assert isinstance(model[0], SmileLinear)
    assert not model[0].training
    assert model[2]["deep"] is deep
    with pytest.raises(ValueError, match="model: Sequential has no SMILE layer of fusion_bench"):
        from_fusion_bench(model)


@pytest.mark.parametrize("rank", [8, -1], ids=["lowrank", "dense"])
@pytest.mark.parametrize("layout", ["generic", "headed"])
def test_state_dict_of_either_layout(layout, rank):
    module = theirs(layout, rank, 4, 2)
    x = clear_tokens(module, 2, torch.float32)
    want = module(x)
    checkpoint = {f"block.proj.{key}": tensor for key, tensor in module.state_dict().items()}
    checkpoint["norm.weight"] = torch.ones(D)
    assert holds_fusion_bench_layers(checkpoint)
    converted, config = convert_state_dict(checkpoint, num_experts_per_tok=2)
    assert set(converted) >= {"norm.weight", "block.proj.weight", "block.proj.vh", "block.proj.s", "block.proj.u"}
    module_config = config.modules["block.proj"]
    layer = module_config.build(D, O, config.num_local_experts, config.num_experts_per_tok, bias=True)
    layer.load_state_dict({k.removeprefix("block.proj."): t for k, t in converted.items() if k.startswith("block.")})
    torch.testing.assert_close(layer(x), want, rtol=1e-5, atol=1e-5)


def language_model(name: str, base: nn.Module) -> tuple[nn.Module, dict]:
    """fusion_bench's model without its experts, and its config.

    Its Llama and Qwen2 classes run on transformers 5 before 5.24, which removed a module that they import. Otherwise
    its layers are inserted in transformers' own class, which has the same keys.
    """
    ranks = {"num_local_experts": N, "rank_of_expert": 4, "rank_of_router": 2, "num_experts_per_tok": 1}
    theirs = {"model_type": f"smile_{name.lower()}", "architectures": [f"Smile{name}ForCausalLM"]}
    if name in ("Llama", "Qwen2") and importlib.util.find_spec("transformers.modeling_attn_mask_utils"):
        package = importlib.import_module(f"fusion_bench.models.modeling_smile_{name.lower()}")
        config = getattr(package, f"Smile{name}Config")(**GROUPED, **SPECIAL, **ranks)
        model = getattr(package, f"Smile{name}ForCausalLM")(config)
    else:
        model, config, smile = copy.deepcopy(base), base.config, headed.SmileMoEConfig()
        vars(smile).update(ranks)
        for key, layer in linear_layers(base).items():
            o, d = layer.weight.shape
            model.set_submodule(key, headed.SmileLinear(smile, d, o, layer.bias is not None))
    return model.eval(), config.to_dict() | ranks | theirs


@pytest.mark.parametrize("name", ["Mistral", "Llama", "Qwen2", "Gemma2"])
def test_language_models(name, tmp_path):
    """In place, from the folder they are saved in, and saved again."""
    base = build(f"{name}ForCausalLM")
    model, config = language_model(name, base)
    model.load_state_dict(base.state_dict(), strict=False)
    experts = [fine_tuned(base, seed) for seed in range(N)]
    for key, layer in linear_layers(base).items():
        pool = [expert.get_submodule(key) for expert in experts]
        headed.upscale_to_smile_linear(layer, pool, model.get_submodule(key))
    ids = torch.randint(3, 96, (2, 7))
    with torch.no_grad():
        want = model(ids, use_cache=False).logits
        assert (base(ids).logits - want).abs().max() > 0.1
    save_model(model, tmp_path / "model.safetensors")  # tied weights are stored once
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert from_fusion_bench(model) is model
    loaded = load_pretrained(tmp_path)
    assert type(loaded) is type(base)
    for ours in (model, loaded):
        assert not any(isinstance(module, headed.SmileLinear) for module in ours.modules())
        layers = smile_layers(ours).values()
        assert len(layers) == 14
        assert all(layer.router is None for layer in layers)
        torch.testing.assert_close(ours(ids, use_cache=False).logits, want, rtol=1e-4, atol=1e-4)
    biased = [key for key, layer in smile_layers(loaded).items() if layer.bias is not None]
    for key in biased:  # fusion_bench adds an expert's bias to that of the base, which verify detects
        torch.testing.assert_close(loaded.get_submodule(key).expert_bias[0], experts[0].get_submodule(key).bias)
    for verdict in verify(loaded, base, experts):
        assert (verdict.verdict, verdict.module) == (("off", biased[0]) if biased else ("exact", ""))
    save_pretrained(loaded, tmp_path / "ours")
    assert torch.equal(load_pretrained(tmp_path / "ours")(ids).logits, loaded(ids).logits)


def test_missing_tensors_are_named():
    state = theirs("generic", 8, 4, 1).state_dict()
    del state["experts.1.svh"]
    with pytest.raises(ValueError, match=r"experts\.1\.svh or experts\.1\.weight is missing"):
        convert_state_dict(state)
    with pytest.raises(ValueError, match="contains no SMILE layer of fusion_bench"):
        convert_state_dict({"weight": torch.ones(2, 2)})


@pytest.mark.parametrize("rank", [8, -1])
@pytest.mark.parametrize("layout", ["generic", "headed"])
def test_misshapen_tensors_are_named(layout, rank):
    state = theirs(layout, rank, 4, 1).state_dict()
    changes = {
        "integers": lambda t: t.int(),
        "scalar": lambda t: t.sum(),
        "flat": lambda t: t.reshape(-1, 1),
        "row less": lambda t: t[:-1],
        "empty": lambda t: t[:0],
        "half": lambda t: t[..., ::2],
        "batch": lambda t: t[None],
    }
    for name, change in itertools.product(state, changes):
        try:
            convert_state_dict({**state, name: changes[change](state[name])})
        except SmileError as error:
            assert "state_dict: " in str(error), f"{name}, {change}: {error}"  # noqa: PT017
        else:
            raise AssertionError(f"{name}, {change}: was taken")


def test_a_config_that_fits_no_model_is_named(tmp_path):
    torch.save(nn.Sequential(theirs("generic", 8, 4, 1)).state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"], "num_attention_heads": 0}')
    with pytest.raises(SmileError, match=r"config\.json: transformers cannot build a LlamaForCausalLM from it \(Zero"):
        load_pretrained(tmp_path)


def test_fusion_bench_is_not_imported():
    code = "import smile_kernels.integrations.fusion_bench, sys; assert 'fusion_bench' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_checkpoints_load_into_a_model(tmp_path):
    base = nn.Linear(8, 12)
    model = nn.Sequential(
        generic.SmileMoELinear(base, [nn.Linear(8, 12) for _ in range(3)], gate_k=2, k=4), nn.LayerNorm(12)
    )
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    loaded = load_pretrained(tmp_path, nn.Sequential(nn.Linear(8, 12), nn.LayerNorm(12)))
    x = torch.randn(20, 8)
    torch.testing.assert_close(loaded(x), model(x), rtol=1e-5, atol=1e-5)
