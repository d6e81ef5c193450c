"""SMILE experts with a quantised shared weight."""

import copy
import re

import pytest
import torch
from torch import nn

import smile_kernels as sk
from smile_kernels import RoutingPolicy, SmileLinear, calibrate, set_routing
from smile_kernels.analysis import analyze
from smile_kernels.config import read_smile_config
from smile_kernels.integrations.peft import adapter_deltas
from smile_kernels.integrations.quantization import SmileBesideLinear, split_base
from smile_kernels.nn import replace_modules, routed_layers, smile_layers
from smile_kernels.upscaling import verify
from tests.integrations.tiny_models import build, fine_tuned, fuse, output, transformers
from tests.upscaling.test_quantized import AWQ, INT8, INT8_WEIGHTS, RANKS, adapter, quantised


@pytest.mark.parametrize("num_experts_per_tok", [1, 2, 5])
@pytest.mark.parametrize("router", [False, True], ids=["tied", "separate"])
def test_the_same_layer_in_two_parts(router, num_experts_per_tok):
    layer = SmileLinear(23, 17, 5, 4, 6, num_experts_per_tok, router=router, dtype=torch.float64)
    split = split_base(layer)
    x = torch.randn(2, 7, 23, dtype=torch.float64, requires_grad=True)
    results = []
    for module in (layer, split):
        y = module(x)
        results.append((y, *torch.autograd.grad(y.square().sum(), (x, layer.u, layer.s, layer.vh, layer.weight))))
    for got, want in zip(results[1], results[0]):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    assert torch.equal(split(input=x), results[1][0])  # by nn.Linear's name


def test_bfloat16_keeps_the_singular_values():
    base = build("LlamaForCausalLM")
    experts = [fine_tuned(base, seed) for seed in (1, 2)]
    model = fuse(base, experts)
    assert {verdict.verdict for verdict in verify(model, base, experts)} == {"exact"}
    model = model.to(torch.bfloat16)
    want = output(model)
    layers = len(smile_layers(model))
    split = split_base(model)
    assert sum(isinstance(m, SmileBesideLinear) for m in split.modules()) == layers
    assert {m.s.dtype for m in split.modules() if isinstance(m, SmileBesideLinear)} == {torch.float32}
    assert (output(split) - want).abs().mean() < 0.02 * want.abs().mean()


def test_a_dense_model_is_refused():
    with pytest.raises(ValueError, match="model: Linear has no SmileLinear"):
        split_base(nn.Linear(3, 3))


@pytest.mark.parametrize("layers", ["all", "one"])
def test_what_needs_the_weights_of_the_base_is_refused_without_them(layers, tmp_path):
    base = build("LlamaForCausalLM")
    experts = [fine_tuned(base, seed) for seed in (1, 2)]
    model, _ = sk.upscale(base, experts, rank_of_expert=4, rank_of_router=2, progress=False)
    whole = copy.deepcopy(model)
    name = next(iter(smile_layers(model)))
    if layers == "all":
        split_base(model)
    else:
        replace_modules(model, [(smile_layers(model)[name], SmileBesideLinear(smile_layers(model)[name]))])
    message = rf"^model: {re.escape(name)} holds the experts only, over a base that .*; expected SMILE layers with the"
    for refused in (
        lambda: sk.add_expert(model, experts[0]),
        lambda: sk.replace_expert(model, 0, experts[0]),
        lambda: sk.remove_expert(model, 0),
        lambda: sk.sweep(model, lambda model: 0.0),
        lambda: sk.save_pretrained(model, tmp_path / "out"),
        lambda: model.save_pretrained(tmp_path / "out"),
        lambda: verify(model, base, experts),
        *([lambda: split_base(model)] if layers == "all" else []),
    ):
        with pytest.raises(sk.SmileError, match=message):
            refused()
    assert not [file for file in tmp_path.rglob("*") if file.is_file()]
    with pytest.raises(sk.SmileError, match=rf"^base: has a SMILE layer, {re.escape(name)}"):
        verify(whole, model, experts)


@pytest.mark.parametrize("bits", [8, 4])
def test_torchao(bits):
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    config = quantization.Int8WeightOnlyConfig() if bits == 8 else quantization.IntxWeightOnlyConfig(torch.int4)
    layer = SmileLinear(64, 48, 4, 4, 2, dtype=torch.bfloat16)
    dense = nn.Linear(64, 48, dtype=torch.bfloat16)
    dense.load_state_dict({"weight": layer.weight, "bias": layer.bias})
    x = torch.randn(9, 64, dtype=torch.bfloat16)
    delta = layer(x).double() - dense(x).double()
    split = nn.Sequential(split_base(layer))
    for model, ending in ((split, ".base"), (nn.Sequential(dense), "0")):
        quantization.quantize_(model, config, filter_fn=lambda module, name, ending=ending: name.endswith(ending))
        linear = model[0].base if model is split else model[0]
        assert type(linear.weight.data) is not torch.Tensor
    assert (split[0].vh.dtype, split[0].u.dtype, split[0].s.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    got, want = split(x).double(), nn.Sequential(dense)(x).double() + delta
    # Two roundings to bfloat16 on each side.
    torch.testing.assert_close(got, want, rtol=0, atol=4 * torch.finfo(torch.bfloat16).eps * want.abs().max().item())


POLICIES = [
    RoutingPolicy("sequence"),
    RoutingPolicy("causal", accumulate=True, lock_after=1),
    RoutingPolicy("token", calibrated=True, num_experts_per_tok=2),
    RoutingPolicy("prompt", accumulate=True, calibrated=True),
]


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_a_routing_policy_holds(policy):
    base = build("LlamaForCausalLM")
    model = fuse(base, [fine_tuned(base, seed) for seed in (1, 2, 3)])
    published = output(model)
    if policy.calibrated:
        calibrate(model)
    set_routing(model, policy)
    want = output(model)
    assert not torch.equal(want, published), "this policy chooses as the published routing does: no test"
    split = split_base(model)
    assert not smile_layers(split)
    torch.testing.assert_close(output(split), want)
    torch.testing.assert_close(output(copy.deepcopy(split)), want)
    set_routing(split, RoutingPolicy())
    torch.testing.assert_close(output(split), published)
    set_routing(split, policy)
    torch.testing.assert_close(output(split), want)


def test_the_singular_values_stay_float32_when_a_split_layer_is_cast():
    layer = SmileLinear(24, 16, 3, 4, 2, router_prior=True)
    split = split_base(layer).to(torch.bfloat16)
    assert (split.s.dtype, split.router_prior.dtype, split.vh.dtype) == (torch.float32, torch.float32, torch.bfloat16)
    assert split(torch.randn(3, 24, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_a_hook_of_the_base_sees_its_output_alone():
    split, seen = split_base(SmileLinear(24, 16, 3, 4, 2)), []
    x = torch.randn(5, 24)
    split.base.register_forward_hook(lambda module, args, y: seen.append(y))
    with torch.no_grad():
        y = split(x)
        assert torch.equal(seen[0], split.base(x))
    assert not torch.equal(y, seen[0])


load = transformers.AutoModelForCausalLM.from_pretrained


def torchao_base(plain, to):
    """A checkpoint of transformers' own, in several files."""
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    config = transformers.TorchAoConfig(quantization.IntxWeightOnlyConfig(torch.int4))
    load(plain, quantization_config=config).save_pretrained(to, max_shard_size="20KB")
    return to


def compressed(config):
    def base(plain, to):
        pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
        return quantised(plain, to, config)

    return base


@pytest.fixture
def plain(tmp_path):
    build("LlamaForCausalLM").save_pretrained(tmp_path / "plain")
    return tmp_path / "plain"


BASES = {"int8": compressed(INT8), "int8 weights": compressed(INT8_WEIGHTS), "torchao int4": torchao_base}


@pytest.mark.parametrize("kind", BASES)
def test_a_checkpoint_whose_base_is_quantised(kind, plain, tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    base = BASES[kind](plain, tmp_path / "base")
    adapters = [adapter(tmp_path / "a", plain, 2, ["q_proj", "up_proj"]), adapter(tmp_path / "b", plain, 3, ["q_proj"])]
    sk.upscale_checkpoints(base, adapters, tmp_path / "out", max_shard_size=30000, **RANKS)
    model, reference = sk.load_pretrained(tmp_path / "out"), load(base)
    assert len(routed_layers(model)) == 4
    assert model.config.quantization_config.base["quant_method"] == reference.config.quantization_config.quant_method
    with sk.routing_override(model, {}):
        assert torch.equal(output(model), output(reference))
    if kind == "int8":  # rounds activations, where the last bit may cross a border
        return
    reference = peft.PeftModel.from_pretrained(reference, adapters[0], adapter_name="a").eval()
    reference.load_adapter(adapters[1], adapter_name="b")
    for name in "ab":
        reference.set_adapter(name)
        with sk.routing_override(model, name):
            torch.testing.assert_close(output(model), output(reference), rtol=1e-5, atol=1e-5)


def test_routing_of_a_checkpoint_whose_base_is_quantised(plain, tmp_path):
    base = torchao_base(plain, tmp_path / "base")
    adapters = [adapter(tmp_path / name, plain, 2, ["q_proj", "up_proj"]) for name in "ab"]
    sk.upscale_checkpoints(base, adapters, tmp_path / "out", **RANKS)
    policy = RoutingPolicy("causal", accumulate=True, calibrated=True)
    sk.calibrate_checkpoint(tmp_path / "out", routing=policy)
    model = load(tmp_path / "out")
    assert sk.get_routing(model) == policy == read_smile_config(tmp_path / "out").routing
    assert {tuple(layer.router_prior.shape) for layer in routed_layers(model).values()} == {(2,)}
    with sk.watch_routing(model) as counts:
        want = output(model)
    assert {int(count.sum()) for count in counts.values()} == {want.shape[:2].numel()}
    set_routing(model, RoutingPolicy(num_experts_per_tok=2))
    assert not torch.equal(output(model), want)


def test_what_a_quantised_base_does_not_support(plain, tmp_path):
    one = adapter(tmp_path / "a", plain, 2, ["q_proj"])
    sk.upscale_checkpoints(quantised(plain, tmp_path / "awq", AWQ), [one], tmp_path / "out", **RANKS)
    for loaded in (sk.load_pretrained, load):
        with pytest.raises(
            sk.SmileError, match="its base is stored as 'awq'; expected one that transformers loads here"
        ):
            loaded(tmp_path / "out")
    with pytest.raises(
        sk.SmileError, match="is stored as 'awq', which no given model can hold; expected None as `model`"
    ):
        sk.load_pretrained(tmp_path / "out", build("LlamaForCausalLM"))
    sk.upscale_checkpoints(torchao_base(plain, tmp_path / "base"), [one], tmp_path / "int4", **RANKS)
    model = load(tmp_path / "int4")
    with pytest.raises(sk.SmileError, match="its base is stored quantised, and is not saved again"):
        model.save_pretrained(tmp_path / "again")
    only = r"model: model\.layers\.0\.\S+ holds the experts only, over a base that is quantised or apart"
    for refused in (
        lambda: sk.save_pretrained(model, tmp_path / "again"),
        lambda: sk.add_expert(model, one, name="more"),
    ):
        with pytest.raises(sk.SmileError, match=only):
            refused()
    with pytest.raises(
        sk.SmileError, match=r"base: \S+ is stored as 'torchao'; expected a checkpoint of plain weights"
    ):
        analyze(tmp_path / "base", [one])


@pytest.mark.parametrize(
    ("kind", "found"),
    [
        ("int8", "its weight is quantised, torch.int8"),
        ("int8 weights", "it has no weight, but weight_scale, weight_packed, weight_shape, as a quantised layer"),
        ("torchao int4", "its weight is quantised, IntxUnpackedToInt8Tensor"),
    ],
)
def test_quantised_models_in_memory(kind, found, plain, tmp_path):
    layer = "model.layers.0.self_attn.q_proj"
    base, quantised_model = load(plain), load(BASES[kind](plain, tmp_path / "base"))
    expert = fine_tuned(base, 1)
    fused = fuse(base, [expert])
    sk.save_pretrained(fused, tmp_path / "fused")
    changes = adapter_deltas(adapter(tmp_path / "a", plain, 2, ["q_proj"]), base)
    linear, smile = quantised_model.get_submodule(layer), fused.get_submodule(layer)
    ranks = {"rank_of_expert": 2, "rank_of_router": 2}
    expected = "; expected plain weights \\(upscale_checkpoints takes LoRA adapters and a base that is stored quantised"
    for call, message in {
        lambda: sk.upscale(quantised_model, [changes], **ranks): f"model: {layer}: {found}{expected}",
        lambda: sk.upscale(base, [quantised_model], **ranks): rf"finetuned\[0\]: {layer}: {found}{expected}",
        lambda: sk.verify(fused, quantised_model, [changes]): f"base: {layer}: {found}{expected}",
        lambda: sk.verify(fused, base, [quantised_model]): rf"experts\[0\]: {layer}: {found}{expected}",
        lambda: sk.add_expert(fused, quantised_model): f"expert: {layer}: {found}{expected}",
        lambda: sk.load_pretrained(tmp_path / "fused", quantised_model): f"'{layer}' cannot have .*, since {found}",
        lambda: SmileLinear.from_linears(linear, [linear], **ranks): f"base: is a Linear, and {found}; expected",
        lambda: SmileLinear.merge([smile, linear]): f"layers: number 1 cannot be merged, since {found}; expected",
    }.items():
        with pytest.raises(sk.SmileError, match=message):
            call()
    if kind == "int8 weights":  # the others have a weight of that name
        with pytest.raises(sk.SmileError, match=f"base: {layer}: {found}; expected a base of plain weights"):
            adapter_deltas(tmp_path / "a", quantised_model)
