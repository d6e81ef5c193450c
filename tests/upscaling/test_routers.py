"""Routers of upscale(): arrow and norm compared with a plain loop over their definitions, in memory and stored."""

import math

import pytest
import torch
import yaml
from torch import nn
from typer.testing import CliRunner

import smile_kernels as sk
from smile_kernels.cli import app
from smile_kernels.config import read_smile_config
from smile_kernels.nn import smile_layers
from tests.integrations import tiny_models
from tests.upscaling.checkpoints import N, Net, contents, run

R = 3


def score(router: str, delta: torch.Tensor, x: torch.Tensor) -> float:
    """One expert's score of one token by the definition, from the SVD of its change."""
    _, s, vh = torch.linalg.svd(delta, full_matrices=False)
    if router == "arrow":
        return abs(float(vh[0] @ x))
    return math.sqrt(sum(float(s[j] * (vh[j] @ x)) ** 2 for j in range(R)))


def defined(router: str, base: nn.Linear, experts: list[nn.Linear], x: torch.Tensor, m: int) -> torch.Tensor:
    """y of one layer, token by token."""
    weight = base.weight.double()
    out = []
    for token in x.double():
        scores = [score(router, expert.weight.double() - weight, token) for expert in experts]
        best = sorted(range(len(experts)), key=lambda i: -scores[i])[:m]
        total = sum(math.exp(scores[i]) for i in best)
        y = nn.functional.linear(token, weight, None if base.bias is None else base.bias.double())
        for i in best:
            u, s, vh = torch.linalg.svd(experts[i].weight.double() - weight, full_matrices=False)
            change = (u[:, :R] * s[:R]) @ (vh[:R] @ token)
            if base.bias is not None:
                change = change + experts[i].bias.double() - base.bias.double()
            y = y + math.exp(scores[i]) / total * change
        out.append(y)
    return torch.stack(out)


@torch.no_grad()
@pytest.mark.parametrize("m", [1, 2, N])
@pytest.mark.parametrize("router", ["arrow", "norm"])
def test_a_layer_is_routed_by_the_definition(router, m, models):
    base, *experts = models
    model, report = sk.upscale(base, experts, rank_of_expert=R, router=router, num_experts_per_tok=m, progress=False)
    assert report.router == router
    assert f"; router: {router}" in str(report)
    for name, layer in smile_layers(model).items():
        assert layer.rank_of_router == (1 if router == "arrow" else R)
        x = torch.randn(20, layer.in_features)
        plain, tuned = (nn.Module.get_submodule(one, name) for one in (base, experts[0]))
        assert not torch.equal(plain.weight, tuned.weight)
        want = defined(router, plain, [expert.get_submodule(name) for expert in experts], x, m)
        torch.testing.assert_close(layer(x).double(), want, rtol=1e-4, atol=1e-5)
    if m == 1:  # the three presets differ
        smile, _ = sk.upscale(base, experts, rank_of_expert=R, rank_of_router=2, progress=False)
        x = torch.randn(200, 16)
        assert not torch.equal(smile.up(x), model.up(x))


@pytest.mark.parametrize("rank", [R, 0.8, -1], ids=["r3", "energy", "full"])
@pytest.mark.parametrize("router", ["arrow", "norm"])
def test_disk_and_memory_give_the_same_model(router, rank, tmp_path, models, folders):
    options = {"rank_of_expert": rank, "router": router, "num_experts_per_tok": 2}
    report = sk.upscale_checkpoints(folders[0], folders[1:], tmp_path / "out", **options)
    model, _ = sk.upscale(models[0], models[1:], **options, progress=False)
    assert report.router == router
    loaded = sk.load_pretrained(tmp_path / "out", Net())
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(loaded.state_dict()[name], t) for name, t in model.state_dict().items())
    config = read_smile_config(tmp_path / "out")
    for name, layer in smile_layers(loaded).items():
        ranks = layer.rank_of_router, layer.router is not None
        assert ranks == ((1, False) if router == "arrow" else (layer.rank_of_expert, True))
        assert (config.modules[name].rank_of_router, config.modules[name].router) == ranks
    ids = torch.randint(13, (2, 7))
    assert torch.equal(loaded(ids), model(ids))
    sk.save_pretrained(loaded, tmp_path / "again")
    assert torch.equal(sk.load_pretrained(tmp_path / "again", Net())(ids), model(ids))


@pytest.mark.parametrize("router", ["arrow", "norm"])
def test_options_yaml_and_transformers(router, tmp_path):
    base = tiny_models.chat_model(tiny_models.chat_tokenizer())
    models = {"base": base, "a": tiny_models.fine_tuned(base, 1), "b": tiny_models.fine_tuned(base, 2)}
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
    folders = {name: str(tmp_path / name) for name in models}
    experts = ["--expert", folders["a"], "--expert", folders["b"], "--exclude", "lm_head"]
    options = ["--base", folders["base"], *experts, "--rank-of-expert", "3", "--router", router]
    assert f"; router: {router}" in run("upscale", *options, "--out", str(tmp_path / "out"))
    recipe = {
        "base_model": folders["base"],
        "models": [{"model": folders["a"]}, {"model": folders["b"]}],
        "parameters": {"rank_of_expert": 3, "router": router, "exclude": "lm_head"},
    }
    (tmp_path / "fused.yml").write_text(yaml.safe_dump(recipe))
    run("upscale", str(tmp_path / "fused.yml"), "--out", str(tmp_path / "yaml"))
    assert contents(tmp_path / "out") == contents(tmp_path / "yaml")

    loaded = type(base).from_pretrained(tmp_path / "out")
    want, _ = sk.upscale(
        base, [models["a"], models["b"]], rank_of_expert=3, router=router, exclude=["lm_head"], progress=False
    )
    ids = torch.randint(5, 50, (2, 9))
    torch.testing.assert_close(loaded(ids).logits, want.eval()(ids).logits)
    loaded.save_pretrained(tmp_path / "saved")
    again = type(base).from_pretrained(tmp_path / "saved")
    assert torch.equal(again(ids).logits, loaded(ids).logits)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"router": "best", "rank_of_router": 2}, "router: is 'best'; expected one of 'smile', 'arrow', 'norm'"),
        ({"router": "arrow", "rank_of_router": 2}, "rank_of_router: is 2 with router 'arrow', which has one row"),
        ({"router": "norm", "rank_of_router": 3}, "rank_of_router: is 3 with router 'norm', which has as many rows"),
        ({}, "rank_of_router: is not given; expected g"),
    ],
    ids=["unknown", "arrow", "norm", "smile"],
)
def test_a_rank_and_a_router_that_do_not_go_together(options, message, tmp_path, models, folders):
    with pytest.raises(sk.SmileError, match=message):
        sk.upscale(models[0], models[1:], rank_of_expert=R, progress=False, **options)
    with pytest.raises(sk.SmileError, match=message):
        sk.upscale_checkpoints(folders[0], folders[1:], tmp_path / "out", rank_of_expert=R, **options)
    assert not (tmp_path / "out").exists()


def test_the_command_line_asks_for_a_rank_where_the_router_needs_one(tmp_path, folders):
    command = ["upscale", "--base", str(folders[0]), "--expert", str(folders[1]), "--rank-of-expert", "3"]
    result = CliRunner().invoke(app, [*command, "--out", str(tmp_path / "out")])
    assert "rank_of_router: is not given; expected --rank-of-router" in result.output
    result = CliRunner().invoke(app, [*command, "--router", "best", "--out", str(tmp_path / "out")])
    assert "router: is 'best'; expected one of" in result.output


def test_an_expert_that_left_a_layer_alone_takes_no_tokens(models):
    base, first, second = models[:3]
    second.up.load_state_dict(base.up.state_dict())
    model, _ = sk.upscale(base, [first, second], rank_of_expert=R, router="norm", progress=False)
    x = torch.randn(50, 16)
    with sk.watch_routing(nn.Sequential(model.up)) as counts:
        model.up(x)
    assert counts["0"].tolist() == [50, 0]
