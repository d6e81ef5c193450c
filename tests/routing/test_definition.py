"""Routing policies compared with their definition, with batches, padding, packed sequences and parts of models."""

from dataclasses import replace

import pytest
import torch
import transformers as tf
from torch import nn

from smile_kernels import SmileLinear
from smile_kernels.routing import RoutingPolicy, get_routing, set_routing, watch_routing
from tests.routing.definition import (
    CAUSAL,
    POLICIES,
    SEQUENCE,
    SIZES,
    Calls,
    G,
    N,
    R,
    albert,
    assert_follows,
    bert,
    by_name,
    definition,
    llama,
    logits,
    smile,
    t5,
    tokens,
)


@by_name(POLICIES)
@pytest.mark.parametrize("build", [bert, albert, llama])
@pytest.mark.parametrize("side", ["left", "right"])
def test_follows_the_definition(build, policy, side):
    model = build()
    set_routing(model, policy)
    ids, mask = tokens(5, 7), torch.ones(5, 7, dtype=torch.int64)
    for row, padding in enumerate((0, 2, 4, 1, 3)):
        mask[row, slice(0, padding) if side == "left" else slice(7 - padding, 7)] = 0
    with Calls(model) as calls:
        logits(model, input_ids=ids, attention_mask=mask)
    assert_follows(calls, mask.bool().tolist(), policy)


@by_name({name: policy for name, policy in POLICIES.items() if policy.scope == "window"})
def test_layers_with_one_row_a_sequence_follow_the_mean_evidence_of_its_tokens(policy):
    """A pooler: in windows of tokens, layers after it do not see its evidence."""
    config = tf.BertConfig(**SIZES | {"num_hidden_layers": 3}, intermediate_size=24, max_position_embeddings=64)
    model = smile(tf.BertForPreTraining(config), skip=("decoder", "seq_relationship"), layers_per_block=6)
    set_routing(model, policy)
    ids, mask = tokens(9, 7), torch.ones(9, 7, dtype=torch.int64)
    mask[1, 4:], mask[2, :3] = 0, 0
    for training in (False, True):
        with Calls(model) as calls, torch.set_grad_enabled(training):
            model(input_ids=ids, attention_mask=mask)
        single = [call for call in calls if call[1].dim() == 2]
        others = [call for call in calls if call[1].dim() == 3]
        assert (len(single), len(others)) == (1, 19)
        assert_follows(others, mask.bool().tolist(), policy)
        weights, order = definition(others[:18], mask.bool().tolist(), replace(policy, num_experts_per_tok=N))[-1]
        evidence = torch.zeros(9, 7, N).scatter(2, order, weights.log())
        mean = torch.stack([evidence[b, mask[b].bool()].mean(0) for b in range(9)])
        chosen = set()
        for layer, x, y in single:
            energies = torch.einsum("bd,igd->big", x, layer.vh[:, :G].detach()).square().sum(-1)
            own = (energies / energies.sum(-1, keepdim=True)).log()
            logs = mean if policy.lock_after else own + mean * policy.accumulate
            top = logs.topk(policy.num_experts_per_tok or 1)
            routing = top.values.softmax(-1), top.indices.int()
            torch.testing.assert_close(y, layer(x, routing=routing), rtol=1e-4, atol=1e-5)
            chosen |= set(routing[1].unique().tolist())
        assert len(chosen) > 1, "one expert alone shows nothing"


def test_rows_without_neighbours_are_windows_of_one_token():
    """Of a module that transformers does not know, whose input does not say how long a sequence is."""
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(3)))
    model, x, got = smile(model), torch.randn(40, 16), []
    for policy in (POLICIES["window 2+layers"], POLICIES["layers"], RoutingPolicy()):
        set_routing(model, policy)
        with torch.no_grad():
            got.append(model(x))
        torch.testing.assert_close(model(x), got[-1])
    torch.testing.assert_close(got[0], got[1])
    assert not torch.allclose(got[1], got[2])


@by_name(POLICIES)
def test_batch_of_one_equals_padded_batch(policy):
    model = bert()
    set_routing(model, policy)
    ids, lengths = tokens(3, 9), (9, 5, 2)
    mask = (torch.arange(9) < torch.tensor(lengths)[:, None]).long()
    batch = logits(model, input_ids=ids, attention_mask=mask)
    for b, length in enumerate(lengths):
        alone = logits(model, input_ids=ids[b : b + 1, :length])
        torch.testing.assert_close(batch[b : b + 1, :length], alone, rtol=1e-4, atol=1e-5)


@by_name({name: POLICIES[name] for name in ("sequence+layers", "causal+layers")})
def test_masks_of_four_dimensions_say_the_same(policy):
    model = bert(attn_implementation="eager")
    set_routing(model, policy)
    ids, mask = tokens(2, 6), torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]]).bool()
    want = logits(model, input_ids=ids, attention_mask=mask)
    allowed = mask[:, None, None, :].expand(-1, 1, 6, -1)
    added = torch.where(allowed, 0.0, torch.finfo(torch.float32).min)
    got = logits(model, input_ids=ids, attention_mask=added)
    torch.testing.assert_close(got[mask], want[mask], rtol=1e-4, atol=1e-5)


@by_name(POLICIES)
def test_permuting_a_batch_permutes_results_and_nothing_is_left_behind(policy):
    model = bert()
    set_routing(model, policy)
    ids, order = tokens(5, 6), torch.tensor([3, 0, 4, 2, 1])
    first = logits(model, input_ids=ids)
    torch.testing.assert_close(logits(model, input_ids=ids[order]), first[order], rtol=1e-4, atol=1e-5)
    logits(model, input_ids=tokens(2, 11))
    with pytest.raises(IndexError):
        logits(model, input_ids=torch.full((5, 6), 99))  # a failed pass leaves no state
    assert torch.equal(logits(model, input_ids=ids), first)


@by_name(SEQUENCE | CAUSAL)
@pytest.mark.parametrize("how", ["position_ids", "cu_seq_lens"])
def test_packed_sequences_are_told_apart(policy, how):
    model = llama(attn_implementation="eager")
    set_routing(model, policy)
    rows = [(4, 1, 6), (2, 8, 1)] if how == "position_ids" else [(4, 1, 6)]
    ids = tokens(len(rows), 11)
    positions = torch.stack([torch.cat([torch.arange(n) for n in lengths]) for lengths in rows])
    inputs = {"input_ids": ids, "position_ids": positions, "use_cache": False}
    if how == "cu_seq_lens":
        inputs |= {"attention_mask": None, "cu_seq_lens_q": torch.tensor([0, 4, 5, 11], dtype=torch.int32)}
    with Calls(model) as calls:
        packed = logits(model, **inputs)
    groups = [[g for g, n in enumerate(lengths) for _ in range(n)] for lengths in rows]
    assert_follows(calls, [[True] * 11 for _ in rows], policy, groups)
    for row, lengths in enumerate(rows):
        alone = [logits(model, input_ids=part, use_cache=False) for part in ids[row : row + 1].split(lengths, dim=1)]
        torch.testing.assert_close(packed[row : row + 1], torch.cat(alone, dim=1), rtol=1e-4, atol=1e-5)


def test_encoder_decoder():
    """T5: its stacks route their own tokens, and the decoder's first pass chooses for the generation."""
    model = t5()
    for part in (model, model.decoder):
        with pytest.raises(ValueError, match="reads the encoder's output, whose tokens have no causal order"):
            set_routing(part, POLICIES["causal"])
    policy = POLICIES["sequence+layers"]
    set_routing(model, policy)
    ids, mask = tokens(2, 6), torch.tensor([[1] * 6, [1, 1, 1, 1, 0, 0]])
    with Calls(model.encoder) as calls:
        logits(model, input_ids=ids, attention_mask=mask, decoder_input_ids=tokens(2, 1))
    assert_follows(calls, mask.bool().tolist(), policy)
    batch = model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
    for b, length in enumerate((6, 4)):
        alone = model.generate(ids[b : b + 1, :length], max_new_tokens=5, do_sample=False)
        assert torch.equal(batch[b : b + 1], alone)


def test_towers_route_their_own_tokens():
    text = {
        "vocab_size": 50,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    vision = {k: v for k, v in text.items() if k != "vocab_size"} | {"image_size": 8, "patch_size": 4}
    model = smile(tf.CLIPModel(tf.CLIPConfig(text_config=text, vision_config=vision)), skip=("projection",))
    set_routing(model, POLICIES["sequence+layers"])
    ids, images = tokens(2, 5), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        together = model(input_ids=ids, pixel_values=images)
        features = model.get_image_features(pixel_values=images[1:])
    want = features.pooler_output if hasattr(features, "pooler_output") else features
    want = want / want.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(together.image_embeds[1:], want, rtol=1e-4, atol=1e-5)
    assert len({layer.router_policy.root for layer in model.modules() if isinstance(layer, SmileLinear)}) == 2


@by_name({name: POLICIES[name] for name in ("sequence+layers", "causal+layers")})
def test_autocast_scores_in_float32(policy):
    """With autocast the policy has the same inputs as without, if these are exact in bfloat16."""
    layers = [SmileLinear(16, 16, N, R, G) for _ in range(3)]
    with torch.no_grad():
        for layer in layers:
            layer.vh.normal_()

    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(layers)

        def forward(self, inputs_embeds):
            return [layer(inputs_embeds) for layer in self.layers]

    model, x = Branches(), torch.randn(4, 6, 16).bfloat16().float()
    set_routing(model, policy)
    counts = []
    for enabled in (False, True):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=enabled), watch_routing(model) as count:
            model(x)
        counts.append(count)
    for name, count in counts[0].items():
        assert torch.equal(counts[1][name], count)


def test_an_expert_that_left_a_layer_alone_keeps_its_standing():
    """Expert 2 is chosen at layer 1; at layer 2 its update is 0, and it must be chosen there and at layer 3."""
    layers = [SmileLinear(8, 8, 3, 2, 2) for _ in range(3)]
    x = torch.randn(1, 4, 8)
    with torch.no_grad():
        for layer in layers:
            layer.vh.normal_()
        layers[0].vh[2] *= 9
        layers[1].vh[2] = 0
    model = nn.Sequential(*layers)
    set_routing(model, POLICIES["sequence+layers"])
    with Calls(model) as calls, torch.no_grad():
        model(x)
    for layer, inputs, y in calls:
        routing = torch.ones(1, 4, 1), torch.full((1, 4, 1), 2)
        torch.testing.assert_close(y, layer(inputs, routing=routing))
    set_routing(model, RoutingPolicy("sequence"))
    with Calls(model) as calls, torch.no_grad():
        model(x)
    layer, inputs, y = calls[1]
    assert not torch.allclose(y, layer(inputs, routing=routing)), "alone, an expert without evidence must not be chosen"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_extreme_values_choose_as_moderate_ones(dtype):
    """Scores near the ends of the range, zero tokens and NaN do not affect the sums."""
    layer = SmileLinear(8, 8, N, R, G, dtype=dtype)
    set_routing(layer_root := nn.Sequential(layer), RoutingPolicy("sequence"))
    x = torch.randn(2, 5, 8).to(dtype)
    want = layer_root(x)
    attached = layer.router_policy.root
    assert not hasattr(attached.current, "state") or attached.current.state is None
    for scale in (2.0**-12, 2.0**10):
        with Calls(layer_root) as calls:
            layer_root(x * scale)
        ids = definition(calls, [[True] * 5] * 2, RoutingPolicy("sequence"))[0][1]
        torch.testing.assert_close(calls[0][2], layer(x * scale, routing=(torch.ones(2, 5, 1), ids)))
    x[0, 3] = 0
    spoilt = x.clone()
    spoilt[0, 3, 0] = torch.nan
    assert torch.equal(layer_root(spoilt)[0, :3], layer_root(x)[0, :3])
    assert want.isfinite().all()


def test_inputs_of_other_tokens_are_refused():
    class Strange(nn.Module):
        def __init__(self, cut):
            super().__init__()
            self.first, self.second, self.cut = SmileLinear(8, 8, N, R, G), SmileLinear(8, 8, N, R, G), cut

        def forward(self, inputs_embeds, attention_mask=None):
            return self.second(self.cut(self.first(inputs_embeds)))

    x = torch.randn(2, 6, 8)
    for cut in (lambda h: h[:, :4], lambda h: h[:1], lambda h: h.reshape(4, 3, 8)):
        model = Strange(cut)
        set_routing(model, POLICIES["sequence+layers"])
        with pytest.raises(RuntimeError, match=r"SMILE layer of Strange has input"):
            model(x)
    flat = Strange(lambda h: h.reshape(-1, 8))
    pooled = Strange(lambda h: h[:, 0])
    for model in (flat, pooled):
        set_routing(model, POLICIES["sequence+layers"])
        with Calls(model) as calls:
            model(x)
        wanted = definition([(c[0], c[1].view(2, -1, 8), None) for c in calls], [[True] * 6] * 2, get_routing(model))
        for (layer, inputs, y), (weights, ids) in zip(calls, wanted):
            leading = inputs.shape[:-1]
            routing = weights.float().view(*leading, 1), ids.view(*leading, 1)
            torch.testing.assert_close(y, layer(inputs, routing=routing), rtol=1e-4, atol=1e-5)
    set_routing(pooled, POLICIES["causal"])
    with pytest.raises(RuntimeError, match="SMILE layer of Strange has input"):
        pooled(x)
    with pytest.raises(RuntimeError, match="outside of a forward pass of Strange"):
        pooled.first(x)
    with pytest.raises(ValueError, match=r"^attention_mask: has 5 columns"):
        pooled(x, attention_mask=torch.ones(2, 5))
