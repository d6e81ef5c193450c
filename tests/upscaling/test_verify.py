"""A fused model is held against the models it was made of: exact, truncated, or off and where."""

import copy

import pytest
import torch
import transformers
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
    assert [verdict.verdict for verdict in sk.verify(exact, experts)] == ["exact"] * 2
    truncated, _ = sk.upscale(base, experts, rank_of_expert=4, **RANKS)
    assert [verdict.verdict for verdict in sk.verify(truncated, experts)] == ["truncated"] * 2
    swapped = sk.verify(exact, experts[::-1])
    assert [verdict.verdict for verdict in swapped] == ["off"] * 2
    assert swapped[0].module == "model.layers.0.self_attn.q_proj"
    with torch.no_grad():
        exact.model.layers[1].mlp.up_proj.u[1] *= 1.01
    assert [verdict.module for verdict in sk.verify(exact, experts)] == ["", "model.layers.1.mlp.up_proj"]


@pytest.mark.parametrize("part", ["model.norm", "embed_tokens", "layers.0.input_layernorm"])
def test_what_is_lost_is_found(part):
    base = build()
    expert = tuned(tuned(base, 1), 2, part)
    with pytest.warns(UserWarning, match=rf"left out of the result: \S*{part}"):
        model, report = sk.upscale(base, [expert], rank_of_expert=-1, **RANKS)
    (verdict,) = sk.verify(model, [expert])
    assert verdict.verdict == "off"
    assert f"{verdict.module}.weight" == report.lost[0].name


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


def test_names_of_experts_are_kept(tmp_path):
    """In memory, and through both ways of saving a transformers model."""
    base = build()
    experts, options = [tuned(base, 1), tuned(base, 2)], {"rank_of_expert": 2, **RANKS}
    with pytest.raises(ValueError, match="expert_names: has 1 names; expected 2"):
        sk.upscale(base, experts, expert_names=["math"], **options)
    model, report = sk.upscale(base, experts, expert_names=["math", "code"], **options)
    assert report.expert_names == ("math", "code")
    assert [verdict.name for verdict in sk.verify(model, experts)] == ["math", "code"]
    sk.save_pretrained(model, tmp_path / "ours")
    model.save_pretrained(tmp_path / "its own")
    (tmp_path / "base").mkdir()
    sk.save_pretrained(model, tmp_path / "experts", base=tmp_path / "base")
    for folder in ("ours", "its own"):
        loaded = sk.load_pretrained(tmp_path / folder)
        assert {layer.expert_names for layer in smile_layers(loaded).values()} == {("math", "code")}
    loaded = sk.load_pretrained(tmp_path / "experts", build())
    assert {layer.expert_names for layer in smile_layers(loaded).values()} == {("math", "code")}
