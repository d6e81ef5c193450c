"""top_p of a policy: the smallest number of the m best experts, for every scope, stored and overridden."""

import math

import pytest
import torch
from torch import nn

import smile_kernels as sk
from smile_kernels.config import SmileConfig
from smile_kernels.nn import smile_layers
from tests.routing.definition import Calls, G, N, assert_follows, bert, fewest, llama, logits, smile, tokens

PUBLISHED = sk.RoutingPolicy(num_experts_per_tok=3, top_p=0.55)


def published(layer: sk.SmileLinear, x: torch.Tensor, m: int, top_p: float) -> torch.Tensor:
    """y of a layer for tokens x [T, D], each by the definition."""
    out = []
    for token in x.double():
        scores = [float((layer.vh[i, :G].double() @ token).norm()) for i in range(N)]
        order = sorted(range(N), key=lambda i: -scores[i])[:m]
        p = [math.exp(scores[i]) for i in order]
        weights, ids = fewest([w / sum(p) for w in p], order, top_p)
        y = layer.weight.double() @ token + layer.bias.double()
        for w, i in zip(weights, ids):
            if i >= 0:
                change = layer.u[i].double() @ (
                    layer.s[i].double() * (layer.vh[i, : layer.rank_of_expert].double() @ token)
                )
                y = y + w * (change + layer.expert_bias[i].double())
        out.append(y)
    return torch.stack(out)


@torch.no_grad()
@pytest.mark.parametrize("top_p", [0.3, 0.55, 0.9, 1.0])
def test_the_published_routing_keeps_the_fewest_experts(top_p):
    model = smile(nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 8)))
    sk.set_routing(model, sk.RoutingPolicy(num_experts_per_tok=3, top_p=top_p))
    x = torch.randn(30, 16)
    with Calls(model) as calls:
        model(x)
    used = set()
    for layer, given, y in calls:
        torch.testing.assert_close(y.double(), published(layer, given, 3, top_p), rtol=1e-4, atol=1e-5)
        if layer.router_policy is not None:
            used |= {int(count) for count in (layer.router_policy(layer, given)[1] >= 0).sum(-1).unique()}
    assert used == (set() if top_p == 1 else used)
    assert len(used) > 1 or top_p in (0.3, 1)
    torch.testing.assert_close(model[0](x), calls[0][2])  # also a single layer
    sk.set_routing(model, sk.RoutingPolicy())
    assert all(layer.router_policy is None for layer in smile_layers(model).values())


@pytest.mark.parametrize("scope", ["token", "sequence"])
def test_calibrated_and_pooled_policies_do_so_too(scope):
    model = bert()
    for layer in smile_layers(model).values():
        layer.router_prior = -torch.rand(N)
    policy = sk.RoutingPolicy(scope, accumulate=True, calibrated=True, num_experts_per_tok=3, top_p=0.7)
    sk.set_routing(model, policy)
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    with Calls(model) as calls:
        logits(model, input_ids=tokens(2, 7), attention_mask=mask)
    assert_follows(calls, mask.bool().tolist(), policy)


def test_scope_prompt_serves_its_few_experts():
    model, ids = llama(), tokens(2, 6)
    for layer in smile_layers(model).values():
        layer.router_prior = torch.zeros(N)
    sk.set_routing(model, sk.RoutingPolicy("prompt", calibrated=True, num_experts_per_tok=N, top_p=1e-6))
    few = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    sk.set_routing(model, sk.RoutingPolicy("prompt", calibrated=True, num_experts_per_tok=1))
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0), few)


def test_rows_that_ask_for_no_expert_keep_what_the_policy_takes():
    model, ids = bert(), tokens(3, 5)
    sk.set_routing(model, PUBLISHED)
    alone = logits(model, input_ids=ids)
    with sk.routing_override(model, [None, 2, None]):
        mixed = logits(model, input_ids=ids)
    with sk.routing_override(model, 2):
        asked = logits(model, input_ids=ids)
    torch.testing.assert_close(mixed[[0, 2]], alone[[0, 2]])
    torch.testing.assert_close(mixed[1], asked[1])
    assert not torch.allclose(mixed[1], alone[1])
    torch.testing.assert_close(logits(model, input_ids=ids), alone)


def test_checkpoints_keep_it(tmp_path):
    model, ids = llama(), tokens(2, 6)
    sk.set_routing(model, PUBLISHED)
    want = logits(model, input_ids=ids)
    sk.save_pretrained(model, tmp_path / "a")
    loaded = type(model).from_pretrained(tmp_path / "a")
    assert sk.get_routing(loaded).top_p == 0.55
    torch.testing.assert_close(logits(loaded, input_ids=ids), want)
    loaded.save_pretrained(tmp_path / "b")
    again = sk.load_pretrained(tmp_path / "b")
    torch.testing.assert_close(logits(again, input_ids=ids), want)
    config = again.config.quantization_config.to_dict()
    config["routing"]["top_p"] = 1.5
    with pytest.raises(sk.SmileError, match=r"top_p: is 1\.5; expected a number above 0, at most 1"):
        SmileConfig.from_dict(config)
    assert sk.RoutingPolicy.from_dict({"top_p": 1}) == sk.RoutingPolicy()


def test_gradients_reach_the_router_and_a_recomputation_finds_the_same_experts():
    model, ids = llama(), tokens(2, 6)
    sk.set_routing(model, PUBLISHED)
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.train().zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("top_p", [0, 1.5, -0.1, float("nan"), True, "0.5", None])
def test_values_out_of_range_are_named(top_p):
    with pytest.raises(ValueError, match=r"top_p: is .*; expected a number above 0, at most 1"):
        sk.RoutingPolicy(top_p=top_p)


def test_one_expert_leaves_nothing_to_choose():
    with pytest.raises(ValueError, match=r"top_p: is 0\.5 with num_experts_per_tok 1"):
        sk.RoutingPolicy(num_experts_per_tok=1, top_p=0.5)
