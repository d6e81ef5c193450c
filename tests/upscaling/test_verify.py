"""A fused model is compared with its source models: exact, truncated, or off, and in which layers."""

import copy
import gc
import warnings
import weakref
from dataclasses import replace

import pytest
import torch
import transformers
from safetensors.torch import save_file
from typer.testing import CliRunner

import smile_kernels as sk
from smile_kernels.cli import app
from smile_kernels.nn import smile_layers

SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96}
RANKS = {"rank_of_router": 2, "progress": False}


def build() -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SHAPE, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    return transformers.LlamaForCausalLM(config).eval()


def tuned(base: torch.nn.Module, seed: int, part: str = "proj") -> torch.nn.Module:
    torch.manual_seed(seed)
    expert = copy.deepcopy(base)
    for name, p in expert.named_parameters():
        if part in name:
            p.data += 0.5 * p.std() * torch.randn_like(p) if p.dim() > 1 else 0.1 * torch.randn_like(p)
    return expert


def test_exact_truncated_or_off_and_where():
    base = build()
    experts = [tuned(base, 1), tuned(base, 2)]
    exact, _ = sk.upscale(base, experts, rank_of_expert=-1, **RANKS)
    assert [verdict.verdict for verdict in sk.verify(exact, base, experts)] == ["exact"] * 2
    truncated, _ = sk.upscale(base, experts, rank_of_expert=4, **RANKS)
    assert [verdict.verdict for verdict in sk.verify(truncated, base, experts)] == ["truncated"] * 2
    swapped = sk.verify(exact, base, experts[::-1])
    assert [verdict.verdict for verdict in swapped] == ["off"] * 2
    assert swapped[0].module == "model.layers.0.self_attn.q_proj"
    with torch.no_grad():
        exact.model.layers[1].mlp.up_proj.u[1] *= 1.01
    assert [verdict.module for verdict in sk.verify(exact, base, experts)] == ["", "model.layers.1.mlp.up_proj"]


def test_another_base_is_named(tmp_path):
    base = build()
    experts = [tuned(base, 1), tuned(base, 2)]
    fused, _ = sk.upscale(base, experts, rank_of_expert=-1, **RANKS)
    with pytest.warns(UserWarning, match=r"^base: its model\.layers\.0\.self_attn\.q_proj\.weight is not the fused"):
        assert [verdict.verdict for verdict in sk.verify(fused, experts[0], experts)] == ["exact"] * 2
    base.save_pretrained(tmp_path / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for dtype in (torch.float32, torch.bfloat16):
            sk.save_pretrained(fused.to(dtype), tmp_path / f"{dtype}")
            sk.verify(tmp_path / f"{dtype}", tmp_path / "base", experts)


@pytest.mark.filterwarnings("ignore:changes by fine-tuning")
def test_an_expert_whose_config_has_other_heads_of_the_same_weights_is_off(tmp_path):
    base = build()
    config = copy.deepcopy(base.config)
    config.num_attention_heads = config.num_key_value_heads = 2
    config.head_dim = 16
    expert = transformers.LlamaForCausalLM(config).eval()
    expert.load_state_dict(tuned(base, 1).state_dict())
    base.save_pretrained(tmp_path / "base")
    expert.save_pretrained(tmp_path / "expert")
    with pytest.warns(UserWarning, match="head_dim"):
        sk.upscale_checkpoints(
            tmp_path / "base", [tmp_path / "expert"], tmp_path / "fused", rank_of_expert=-1, rank_of_router=2
        )
    (verdict,) = sk.verify(tmp_path / "fused", tmp_path / "base", [tmp_path / "expert"])
    assert verdict.verdict == "off"
    assert verdict.module


@pytest.mark.parametrize("part", ["model.norm", "embed_tokens", "layers.0.input_layernorm"])
def test_what_is_lost_is_found(part):
    base = build()
    expert = tuned(tuned(base, 1), 2, part)
    with pytest.warns(UserWarning, match=rf"left out of the result: \S*{part}"):
        model, report = sk.upscale(base, [expert], rank_of_expert=-1, **RANKS)
    (verdict,) = sk.verify(model, base, [expert])
    assert verdict.verdict == "off"
    assert f"{verdict.module}.weight" == report.lost[0].name


@pytest.mark.parametrize("scope", ["causal", "sequence", "prompt"])
def test_a_routing_policy_stays_and_changes_no_verdict(scope):
    base = build()
    experts = [tuned(base, 1), tuned(base, 2)]
    model, _ = sk.upscale(base, experts, rank_of_expert=-1, **RANKS)
    sk.set_routing(model, policy := sk.RoutingPolicy(scope, accumulate=True))
    assert [verdict.verdict for verdict in sk.verify(model, base, experts)] == ["exact"] * 2
    assert sk.get_routing(model) == policy


def test_from_the_command_line(tmp_path):
    base = build()
    models = [base, tuned(base, 1), tuned(base, 2)]
    for i, model in enumerate(models):
        model.save_pretrained(tmp_path / f"m{i}")
    experts = [tmp_path / "m1", tmp_path / "m2"]
    sk.upscale_checkpoints(tmp_path / "m0", experts, tmp_path / "out", rank_of_expert=-1, rank_of_router=2)
    right = CliRunner().invoke(app, ["verify", str(tmp_path / "out")])
    assert right.exit_code == 0, right.output
    assert all(line in right.output for line in ("expert 0 (m1): exact;", "expert 1 (m2): exact;"))
    wrong = ["verify", str(tmp_path / "out"), "--base", str(tmp_path / "m0")]
    wrong += ["--expert", str(tmp_path / "m2"), "--expert", str(tmp_path / "m1")]
    result = CliRunner().invoke(app, wrong)
    assert result.exit_code == 1
    assert "expert 0 (m1): off, first at model.layers.0.self_attn.q_proj" in result.output


def test_a_truncation_is_held_against_its_certificate():
    """Other factors of the same rank are off, such as the next singular vectors of the change, or smaller ones."""
    base = build()
    experts = [tuned(base, 1), tuned(base, 2)]
    model, report = sk.upscale(base, experts, rank_of_expert=4, **RANKS)
    name = "model.layers.1.mlp.up_proj"
    layer = model.get_submodule(name)
    change = experts[0].get_submodule(name).weight - base.get_submodule(name).weight
    u, s, vh = torch.linalg.svd(change.detach(), full_matrices=False)
    for given in (report, None):
        verdicts = sk.verify(model, base, experts, report=given)
        assert [one.verdict for one in verdicts] == ["truncated"] * 2
        assert all(0 < one.error < one.base_error for one in verdicts)
        with torch.no_grad():
            before = layer.u[0].clone(), layer.s[0].clone(), layer.vh[0, :4].clone()
            for parts in ((u[:, 4:8], s[4:8], vh[4:8]), (u[:, :4], s[:4] * torch.tensor([1, 1, 1, 0.9]), vh[:4])):
                for factor, part in zip((layer.u, layer.s, layer.vh), parts):
                    factor[0, : len(part)] = part
                assert [one.module for one in sk.verify(model, base, experts, report=given)] == [name, ""]
            for factor, part in zip((layer.u, layer.s, layer.vh), before):
                factor[0, : len(part)] = part
    less = replace(report, layers=[replace(one, error=one.error[:1]) for one in report.layers])
    with pytest.raises(sk.SmileError, match=r"report: has 1 errors of model\.\S+; expected 2, one for each expert"):
        sk.verify(model, base, experts, report=less)


class Odd(torch.nn.Module):
    """A separate parameter, a computed weight, an attention that is never called, and changes in place."""

    def __init__(self):
        super().__init__()
        self.token = torch.nn.Parameter(torch.randn(8))
        self.first, self.last = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
        self.normed = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(8, 8))
        self.attention = torch.nn.MultiheadAttention(8, 2, batch_first=True)
        self.act = torch.nn.ReLU(inplace=True)

    def forward(self, x):
        y = self.first(x + self.token)
        y += self.act(y)
        y = self.normed(y)
        return self.last(y + self.attention(y, y, y)[0])


ODD = {
    "token": (lambda m: m.token, "first (its input)"),
    "weight norm": (lambda m: m.normed.parametrizations.weight.original0, "normed"),
    "its bias": (lambda m: m.normed.bias, "normed"),
    "in_proj": (lambda m: m.attention.in_proj_weight, "attention"),
    "nothing": (None, ""),
}


@pytest.mark.filterwarnings("ignore:changes by fine-tuning are left out")
@pytest.mark.parametrize("changed", ODD)
def test_what_no_linear_layer_holds_is_found(changed):
    torch.manual_seed(0)
    base = Odd().eval()
    expert = copy.deepcopy(base)
    expert.first.weight.data += torch.randn(8, 8)
    parameter, module = ODD[changed]
    if parameter is not None:
        parameter(expert).data += torch.randn_like(parameter(expert))
    model, report = sk.upscale(base, [expert], rank_of_expert=-1, **RANKS)
    (verdict,) = sk.verify(model, base, [expert], inputs={"x": torch.randn(2, 3, 8)})
    assert verdict.module == module
    assert (verdict.verdict == "exact") == (parameter is None) == (not report.lost)


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "GPT2LMHeadModel"])
@pytest.mark.parametrize("stored", [False, True], ids=["memory", "disk"])
def test_adapters(architecture, stored, tmp_path):
    """Also of square Conv1D layers, whose shape does not show their orientation."""
    import peft

    from smile_kernels.integrations.peft import adapter_deltas
    from tests.integrations.tiny_models import build as tiny

    base = tiny(architecture)
    targets = ["q_proj", "down_proj"] if architecture.startswith("Llama") else ["c_attn", "c_proj"]
    base.save_pretrained(tmp_path / "base")
    for i in range(2):
        torch.manual_seed(i)
        config = peft.LoraConfig(r=6, target_modules=targets, init_lora_weights=False)
        peft.get_peft_model(copy.deepcopy(base), config).save_pretrained(tmp_path / f"a{i}")
    folders = [tmp_path / "a0", tmp_path / "a1"]
    for rank, verdict in ((6, "exact"), (2, "truncated")):
        options = {"rank_of_expert": rank, "rank_of_router": 2}
        if stored:
            sk.upscale_checkpoints(tmp_path / "base", folders, tmp_path / f"out{rank}", **options)
            found = sk.verify(tmp_path / f"out{rank}")
        else:
            deltas = [adapter_deltas(folder, base) for folder in folders]
            model, report = sk.upscale(base, deltas, progress=False, **options)
            found = sk.verify(model, base, deltas, report=report)
            assert [v.verdict for v in sk.verify(model, base, deltas[::-1])] == ["off"] * 2
        assert [v.verdict for v in found] == [verdict] * 2


@pytest.mark.parametrize(("kind", "given", "kept"), [("adapters", "bfloat16", None), ("whole", "float32", "bfloat16")])
def test_what_is_stored_in_low_precision(kind, given, kept, tmp_path):
    """Rounding is not a difference, also for changes as small as that of the weights; truncation is."""
    import peft

    from tests.integrations.tiny_models import build as tiny

    dtype = getattr(torch, given)
    base = tiny("MistralForCausalLM").to(dtype)
    base.save_pretrained(tmp_path / "base")
    for i in range(2):
        torch.manual_seed(i)
        expert = copy.deepcopy(base)
        if kind == "adapters":
            config = peft.LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False)
            expert = peft.get_peft_model(expert, config)
        with torch.no_grad():
            for name, p in expert.named_parameters():
                if kind == "whole" and "proj" in name:
                    p += (0.02 * torch.randn(len(p), 3) @ torch.randn(3, p.shape[1])).to(dtype)
                elif p.requires_grad and kind == "adapters":
                    p *= 0.3
        expert.save_pretrained(tmp_path / f"e{i}")
    folders = [tmp_path / "e0", tmp_path / "e1"]
    for rank, verdict in ((-1, "exact"), (1, "truncated")):
        out, options = tmp_path / f"out{rank}", {"rank_of_expert": rank, "rank_of_router": 1}
        sk.upscale_checkpoints(tmp_path / "base", folders, out, dtype=kept and getattr(torch, kept), **options)
        assert [v.verdict for v in sk.verify(out)] == [verdict] * 2
    swapped = sk.verify(sk.load_pretrained(out), tmp_path / "base", folders[::-1])
    assert [(v.verdict, v.module) for v in swapped] == [("off", "model.layers.0.self_attn.q_proj")] * 2


MIXED = {  # dtypes by the names of tensors, and options of upscale_checkpoints
    "norms in float32": ({"norm": torch.float32, "": torch.bfloat16}, {}),
    "some layers in float32": ({"self_attn": torch.float32, "": torch.bfloat16}, {}),
    "norms in bfloat16": ({"norm": torch.bfloat16, "": torch.float32}, {}),
    "three dtypes to one": (
        {"norm": torch.float32, "mlp": torch.float16, "": torch.bfloat16},
        {"dtype": torch.float16},
    ),
    "experts alone, coarser than their base": ({"": torch.float32}, {"dtype": torch.bfloat16, "experts_only": True}),
}


@pytest.mark.parametrize("case", MIXED)
def test_each_tensor_is_compared_in_its_own_dtype(case, tmp_path):
    dtypes, options = MIXED[case]
    base = build()
    torch.manual_seed(3)
    for p in base.parameters():
        p.data += 0.1 * torch.randn_like(p) * (p.dim() == 1)
    experts = [tuned(base, 1), tuned(base, 2)]
    for name, model in zip(("base", "e0", "e1"), (base, *experts)):
        state = {
            key: value.to(next(dtype for part, dtype in dtypes.items() if part in key))
            for key, value in model.state_dict().items()
        }
        model.save_pretrained(tmp_path / name)
        save_file(state, tmp_path / name / "model.safetensors", {"format": "pt"})
    folders = [tmp_path / "e0", tmp_path / "e1"]
    for rank, verdict in ((-1, "exact"), (4, "truncated")):
        ranks = {"rank_of_expert": rank, "rank_of_router": 2}
        sk.upscale_checkpoints(tmp_path / "base", folders, tmp_path / f"out{rank}", **ranks, **options)
        found, wrong = (sk.verify(tmp_path / f"out{rank}", tmp_path / "base", e) for e in (folders, folders[::-1]))
        assert [one.verdict for one in found] == [verdict] * 2
        assert [one.verdict for one in wrong] == ["off"] * 2


@pytest.mark.parametrize("kept", [None, torch.bfloat16])
@pytest.mark.parametrize(("of_base", "of_expert"), [(1, 0), (0, 1), (0, 0), (1, 1e-6)])
def test_layers_of_zeros_and_those_that_fine_tuning_made_small(of_base, of_expert, kept, tmp_path):
    base = build()
    experts = [tuned(base, 1), tuned(base, 2)]
    name = "model.layers.0.mlp.up_proj"
    with torch.no_grad():
        experts[0].get_submodule(name).weight *= of_expert
        base.get_submodule(name).weight *= of_base
    for folder, model in zip(("base", "e0", "e1"), (base, *experts)):
        model.save_pretrained(tmp_path / folder)
    folders = [tmp_path / "e0", tmp_path / "e1"]
    options = {"rank_of_expert": -1, "rank_of_router": 2, "dtype": kept}
    sk.upscale_checkpoints(tmp_path / "base", folders, tmp_path / "out", **options)
    found = sk.verify(tmp_path / "out")
    assert [one.verdict for one in found] == ["exact"] * 2
    assert found[0].errors[name] < (1e-5 if kept is None else 0.02)
    model = sk.load_pretrained(tmp_path / "out")
    with torch.no_grad():
        model.get_submodule(name).s[0] *= 1.1
    first, _ = sk.verify(model, tmp_path / "base", folders)
    assert first.module == (name if of_base or of_expert else "")


def test_one_model_at_a_time_from_folders(tmp_path, monkeypatch):
    base = build()
    models = [base, tuned(base, 1), tuned(base, 2)]
    for i, model in enumerate(models):
        model.save_pretrained(tmp_path / f"m{i}")
    sk.upscale_checkpoints(
        tmp_path / "m0", [tmp_path / "m1", tmp_path / "m2"], tmp_path / "out", rank_of_expert=4, rank_of_router=2
    )
    alive, most = weakref.WeakSet(), []
    made = transformers.LlamaForCausalLM.from_pretrained

    def watched(*args, **kwargs):
        loaded = made(*args, **kwargs)
        alive.add(loaded[0])  # and the names of its tensors
        gc.collect()
        most.append(len(alive))
        return loaded

    monkeypatch.setattr(transformers.LlamaForCausalLM, "from_pretrained", watched)
    assert [verdict.verdict for verdict in sk.verify(tmp_path / "out")] == ["truncated"] * 2
    assert most == [1] * 4
    for changed, message in (
        ({"finetuned": [tmp_path / "m1"]}, "finetuned: has 1 models; expected 2"),
        ({"base": tmp_path / "none"}, "base: .*none: no such folder"),
    ):
        with pytest.raises((ValueError, OSError), match=message):
            sk.verify(tmp_path / "out", **changed)


def test_own_inputs_from_the_command_line(tmp_path):
    base = build()
    expert = tuned(base, 1)
    base.save_pretrained(tmp_path / "m0")
    expert.save_pretrained(tmp_path / "m1")
    sk.upscale_checkpoints(tmp_path / "m0", [tmp_path / "m1"], tmp_path / "out", rank_of_expert=-1, rank_of_router=2)
    save_file({"input_ids": torch.arange(5, 9)[None]}, tmp_path / "inputs.safetensors")
    arguments = ["verify", str(tmp_path / "out"), "--inputs", str(tmp_path / "inputs.safetensors")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "exact" in result.output
    save_file({"pixels": torch.zeros(1)}, tmp_path / "inputs.safetensors")
    assert CliRunner().invoke(app, arguments).exit_code == 1


def test_names_of_experts_are_kept(tmp_path):
    """In memory, and through both ways of saving a transformers model."""
    base = build()
    experts, options = [tuned(base, 1), tuned(base, 2)], {"rank_of_expert": 2, **RANKS}
    with pytest.raises(ValueError, match="expert_names: has 1 names; expected 2"):
        sk.upscale(base, experts, expert_names=["math"], **options)
    model, report = sk.upscale(base, experts, expert_names=["math", "code"], **options)
    assert report.expert_names == ("math", "code")
    assert [verdict.name for verdict in sk.verify(model, base, experts)] == ["math", "code"]
    sk.save_pretrained(model, tmp_path / "ours")
    model.save_pretrained(tmp_path / "its own")
    base.save_pretrained(tmp_path / "base")
    sk.save_pretrained(model, tmp_path / "experts", base=tmp_path / "base")
    for folder in ("ours", "its own"):
        loaded = sk.load_pretrained(tmp_path / folder)
        assert {layer.expert_names for layer in smile_layers(loaded).values()} == {("math", "code")}
    loaded = sk.load_pretrained(tmp_path / "experts", build())
    assert {layer.expert_names for layer in smile_layers(loaded).values()} == {("math", "code")}


def test_a_module_that_counts_the_tokens_of_a_kv_cache():
    """Later layers fill the cache that it was given."""
    sizes = {"vocab_size": 96, "hidden_size": 16, "num_encoder_layers": 1, "num_decoder_layers": 1}
    heads = {"num_encoder_attention_heads": 2, "num_decoder_attention_heads": 2, "max_position_embeddings": 32}
    feed = {"encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "decoder_start_token_id": 1}
    base = transformers.ProphetNetForConditionalGeneration(transformers.ProphetNetConfig(**sizes, **heads, **feed))
    expert = tuned(base, 1)
    model, _ = sk.upscale(base, [expert], rank_of_expert=-1, rank_of_router=2, progress=False)
    verdict = sk.verify(model, base, [expert])[0]
    assert verdict.errors["prophetnet.decoder.position_embeddings"] == 0


def test_layers_that_the_inputs_do_not_reach_are_named():
    """A model of images runs on text alone by default: its tower is not compared."""
    text = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 50,
    }
    vision = {key: size for key, size in text.items() if key != "vocab_size"} | {"image_size": 8, "patch_size": 4}
    parts = {"text_config": transformers.LlamaConfig(**text), "vision_config": transformers.CLIPVisionConfig(**vision)}
    base = transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(**parts, image_token_index=49))
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for name, p in tuned.named_parameters():
            p += 0.1 * torch.randn_like(p) * ("proj" in name)
    options = {"rank_of_expert": -1, "rank_of_router": 1, "progress": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, _ = sk.upscale(base, [tuned], **options)
    (verdict,) = sk.verify(model, base, [tuned])
    assert verdict.not_run
    assert all(("vision" in name or "projector" in name) for name in verdict.not_run)
    count = len(verdict.not_run)
    assert f"not compared, since the inputs do not reach them: {count} layers such as model.vision" in str(verdict)
    ids = torch.tensor([[1, 49, 49, 49, 49, 7, 8]])
    (verdict,) = sk.verify(model, base, [tuned], inputs={"input_ids": ids, "pixel_values": torch.randn(1, 3, 8, 8)})
    assert not verdict.not_run
    assert "not compared" not in str(verdict)


def test_a_folder_that_another_process_replaces_in_between(tmp_path):
    base = build()
    experts = [tuned(base, 1), tuned(base, 2)]
    for kept, folder in ((experts, "out"), (experts[:1], "other")):
        sk.save_pretrained(sk.upscale(base, kept, rank_of_expert=4, **RANKS)[0], tmp_path / folder)

    def replace_it(done: int, total: int) -> None:
        if done == 1:
            (tmp_path / "out").rename(tmp_path / "old")
            (tmp_path / "other").rename(tmp_path / "out")

    with pytest.raises(sk.SmileError, match=r"^.*out: was changed while it was read; expected files that do not"):
        sk.verify(tmp_path / "out", base, experts, progress=replace_it)
