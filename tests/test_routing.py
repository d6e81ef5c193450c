"""Routing policies against a plain nested loop over their definition, on tiny models of the transformers library."""

import copy
import io
import itertools
import json
import math
import pickle
import runpy
import threading
from pathlib import Path

import pytest
import torch
import transformers as tf
from torch import nn
from torch.utils.checkpoint import checkpoint
from typer.testing import CliRunner

import smile_kernels as sk
from smile_kernels import SmileLinear, functional
from smile_kernels.cli import app
from smile_kernels.integrations import distributed
from smile_kernels.ops import composed
from smile_kernels.routing import RoutingPolicy, get_routing, set_routing, watch_routing
from smile_kernels.testing import Problem, assert_close, expectations

N, R, G = 4, 3, 2
POLICIES = {
    "layers": RoutingPolicy("token", accumulate=True),
    "sequence": RoutingPolicy("sequence"),
    "sequence+layers": RoutingPolicy("sequence", accumulate=True),
    "sequence+layers, lock 3": RoutingPolicy("sequence", accumulate=True, lock_after=3),
    "sequence+layers, m 2": RoutingPolicy("sequence", accumulate=True, num_experts_per_tok=2),
    "causal": RoutingPolicy("causal"),
    "causal+layers": RoutingPolicy("causal", accumulate=True),
    "causal+layers, lock 3, m 2": RoutingPolicy("causal", accumulate=True, lock_after=3, num_experts_per_tok=2),
}
SEQUENCE = {name: policy for name, policy in POLICIES.items() if policy.scope == "sequence"}
CAUSAL = {name: policy for name, policy in POLICIES.items() if policy.scope == "causal"}


def by_name(policies):
    return pytest.mark.parametrize("policy", policies.values(), ids=policies.keys())


def smile(model: nn.Module, skip: tuple[str, ...] = ("lm_head", "classifier", "pooler")) -> nn.Module:
    """Every linear layer as a SMILE layer with random experts, large enough to matter."""
    for name, module in list(model.named_modules()):
        for child, linear in list(module.named_children()):
            if isinstance(linear, nn.Linear) and not f"{name}.{child}".endswith(skip):
                o, d = linear.weight.shape
                factors = {
                    "vh": nn.functional.normalize(torch.randn(N, max(R, G), d), dim=-1),
                    "s": torch.rand(N, R) + 0.5,
                    "u": torch.randn(N, o, R) * o**-0.5,
                    "expert_bias": torch.randn(N, o) * 0.1,
                }
                layer = SmileLinear.from_factors(linear.weight, linear.bias, factors, rank_of_router=G)
                setattr(module, child, layer)
    return model.eval()


SIZES = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "pad_token_id": 0}


def bert(**changes) -> nn.Module:
    config = tf.BertConfig(**SIZES | changes, intermediate_size=24, max_position_embeddings=64)
    return smile(tf.BertModel(config, add_pooling_layer=False))


def albert() -> nn.Module:
    """Its two layers are one, run twice."""
    config = tf.AlbertConfig(**SIZES, embedding_size=16, intermediate_size=24, max_position_embeddings=64)
    return smile(tf.AlbertModel(config, add_pooling_layer=False))


def llama(**changes) -> nn.Module:
    config = tf.LlamaConfig(**SIZES, intermediate_size=24, num_key_value_heads=1, eos_token_id=None, bos_token_id=1)
    config.update(changes)
    return smile(tf.LlamaForCausalLM(config))


def mistral(**changes) -> nn.Module:
    config = tf.MistralConfig(**SIZES, intermediate_size=24, num_key_value_heads=1, eos_token_id=None, bos_token_id=1)
    config.update(changes)
    return smile(tf.MistralForCausalLM(config))


def t5() -> nn.Module:
    config = tf.T5Config(
        vocab_size=50,
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=2,
        num_heads=2,
        decoder_start_token_id=0,
        eos_token_id=None,
    )
    return smile(tf.T5ForConditionalGeneration(config))


def tokens(batch: int, length: int) -> torch.Tensor:
    return torch.randint(1, 50, (batch, length))


def logits(model: nn.Module, **inputs) -> torch.Tensor:
    with torch.no_grad():
        output = model(**inputs)
    return output.logits if hasattr(output, "logits") else output.last_hidden_state


class Calls:
    """Records (layer, input, output) of every SMILE layer call inside a `with`."""

    def __init__(self, model: nn.Module):
        self.model, self.calls = model, []

    def __enter__(self) -> list:
        def record(layer, args, output):
            self.calls.append((layer, args[0].detach(), output.detach()))

        layers = [m for m in self.model.modules() if isinstance(m, SmileLinear)]
        self.handles = [layer.register_forward_hook(record) for layer in layers]
        return self.calls

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()


def definition(calls, real, policy, groups=None):
    """The equations, loop by loop: for each call the weights and ids [B, S, m], over tokens real [B][S] (bool).

    groups [B][S] numbers the sequences packed in a row. Padding gets whatever its sequence gets.
    """
    out, evidence, choice = [], {}, {}
    for number, (layer, x, _) in enumerate(calls):
        batch, length = x.shape[:2]
        m = policy.num_experts_per_tok or layer.num_experts_per_tok
        if policy.lock_after is None or number < policy.lock_after:
            share = {}
            for b, t in itertools.product(range(batch), range(length)):
                if not real[b][t]:
                    continue
                energy = []
                for i in range(N):
                    q = layer.vh[i, :G].detach().double() @ x[b, t].double()
                    energy.append(float(q @ q))
                share[b, t] = [e / sum(energy) for e in energy]
            for b, t in itertools.product(range(batch), range(length)):
                scope = []
                for s in range(length):
                    near = {"token": s == t, "sequence": True, "causal": s <= t}[policy.scope]
                    if near and real[b][s] and (groups is None or groups[b][s] == groups[b][t]):
                        scope.append(s)
                if not scope:
                    continue
                pooled = [sum(share[b, s][i] for s in scope) / len(scope) for i in range(N)]
                before = evidence.get((b, t), [0.0] * N) if policy.accumulate else [0.0] * N
                evidence[b, t] = [before[i] + math.log(pooled[i]) for i in range(N)]
                order = sorted(range(N), key=lambda i: -evidence[b, t][i])[:m]
                top = [math.exp(evidence[b, t][i] - evidence[b, t][order[0]]) for i in order]
                choice[b, t] = [w / sum(top) for w in top], order
        nothing = [1 / m] * m, list(range(m))
        rows = [[choice.get((b, t), nothing) for t in range(length)] for b in range(batch)]
        out.append(
            (torch.tensor([[w for w, _ in row] for row in rows]), torch.tensor([[i for _, i in r] for r in rows]))
        )
    return out


def assert_follows(calls, real, policy, groups=None):
    """Each recorded output is the layer's under the routing of the definition, where tokens are real."""
    assert calls
    chosen = set()
    for (layer, x, y), routing in zip(calls, definition(calls, real, policy, groups)):
        want = layer(x, routing=routing)
        torch.testing.assert_close(y[torch.tensor(real)], want[torch.tensor(real)], rtol=1e-4, atol=1e-5)
        chosen |= set(routing[1].unique().tolist())
    assert len(chosen) > 1, "one expert alone shows nothing"


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


@by_name(CAUSAL | {"layers": POLICIES["layers"]})
@pytest.mark.parametrize("cache", ["dynamic", "static", "windowed"])
def test_prefill_and_decode_equal_one_causal_pass(policy, cache):
    model = mistral(sliding_window=5 if cache == "windowed" else None)
    set_routing(model, policy)
    ids = tokens(2, 12)
    whole = logits(model, input_ids=ids, use_cache=False)
    kv = tf.StaticCache(model.config, max_cache_len=16) if cache != "dynamic" else tf.DynamicCache(config=model.config)
    parts = [ids[:, :5], ids[:, 5:6], ids[:, 6:9], *ids[:, 9:].split(1, 1)]  # a prompt, a continuation, single tokens
    got, places = [], set()
    for part in parts:
        got.append(logits(model, input_ids=part, past_key_values=kv))
        if cache == "static" and policy.scope == "causal":  # a CUDA graph writes where it was captured
            places.add(tuple((t.data_ptr(), t.shape) for t in kv.routing_memory.sums.values()))
    torch.testing.assert_close(torch.cat(got, dim=1), whole, rtol=1e-4, atol=1e-5)
    assert len(places) == (cache == "static" and policy.scope == "causal")


@by_name(CAUSAL)
@pytest.mark.parametrize("cache_implementation", ["dynamic", "static"])
def test_generation_equals_recomputation(policy, cache_implementation):
    """Greedy tokens from the cache, with left padding, equal those of whole passes without a cache."""
    model = mistral()
    set_routing(model, policy)
    ids, mask = tokens(2, 5), torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    options = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    options |= {"cache_implementation": cache_implementation, "disable_compile": True}
    got = model.generate(ids, attention_mask=mask, **options)
    for step in range(6):
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        out = logits(model, input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
        torch.testing.assert_close(got.logits[step], out[:, -1], rtol=1e-4, atol=1e-5)
        ids = torch.cat([ids, out[:, -1:].argmax(-1)], dim=1)
        mask = torch.cat([mask, mask.new_ones(2, 1)], dim=1)
    assert torch.equal(got.sequences, ids)


@by_name(SEQUENCE)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_the_prompts_choice_holds_in_generation(policy, cache):
    model = llama()
    set_routing(model, policy)
    ids = tokens(6, 6)
    kv = tf.StaticCache(model.config, max_cache_len=12) if cache == "static" else tf.DynamicCache(config=model.config)
    for _ in range(2):
        with Calls(model) as calls:
            logits(model, input_ids=ids, past_key_values=kv)
        assert_follows(calls, [[True] * 6] * 6, policy)
        choices = [(w[:, :1], i[:, :1]) for w, i in definition(calls, [[True] * 6] * 6, policy)]
        for length in (1, 3):  # a token, a further part of the prompt
            with Calls(model) as calls:
                logits(model, input_ids=tokens(6, length), past_key_values=kv)
            for (layer, x, y), (w, i) in zip(calls, choices, strict=True):
                want = layer(x, routing=(w.expand(-1, length, -1), i.expand(-1, length, -1)))
                torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-5)
        kv.reset()  # an emptied cache votes anew
        ids = tokens(6, 6)


@by_name(SEQUENCE)
def test_prompts_padded_on_the_left_generate_as_alone(policy):
    model = llama()
    set_routing(model, policy)
    ids, mask = tokens(2, 6), torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])
    options = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    batch = model.generate(ids, attention_mask=mask, **options)
    for b, padding in enumerate((0, 2)):
        alone = model.generate(ids[b : b + 1, padding:], attention_mask=mask[b : b + 1, padding:], **options)
        for got, want in zip(batch.logits, alone.logits, strict=True):
            torch.testing.assert_close(got[b : b + 1], want, rtol=1e-4, atol=1e-5)


@by_name({"sequence": POLICIES["sequence+layers"], "causal": POLICIES["causal+layers"]})
def test_beams_follow_their_cache(policy):
    """Rows of a cache that are repeated, chosen and reordered go on as if each had been alone from the start."""
    model = llama()
    set_routing(model, policy)
    prompts, following, order = tokens(2, 5), tokens(4, 2), torch.tensor([3, 0, 0, 2])
    kv = tf.DynamicCache(config=model.config)
    logits(model, input_ids=prompts, past_key_values=kv)
    kv.batch_repeat_interleave(2)
    logits(model, input_ids=following[:, :1], past_key_values=kv)
    kv.reorder_cache(order)
    kv = copy.deepcopy(kv)
    kv.batch_select_indices(torch.tensor([0, 1, 3]))
    got = logits(model, input_ids=following[:3, 1:], past_key_values=kv)
    for row, source in enumerate((3, 0, 2)):
        alone = tf.DynamicCache(config=model.config)
        for part in (prompts[source // 2], following[source, :1], following[row, 1:]):
            want = logits(model, input_ids=part[None], past_key_values=alone)
        torch.testing.assert_close(got[row : row + 1], want, rtol=1e-4, atol=1e-5)


def test_beam_search_and_assisted_generation():
    model, draft = llama(), llama()
    set_routing(model, POLICIES["causal+layers"])
    ids = tokens(1, 4)
    greedy = model.generate(ids, max_new_tokens=8, do_sample=False)
    assisted = model.generate(ids, max_new_tokens=8, do_sample=False, assistant_model=draft)  # crops the cache
    assert torch.equal(assisted, greedy)
    options = {"max_new_tokens": 5, "num_beams": 3, "do_sample": False}
    assert torch.equal(model.generate(ids, **options), model.generate(ids, use_cache=False, **options))


def test_a_cropped_cache_goes_on_from_what_is_left():
    model = llama()
    set_routing(model, POLICIES["causal+layers"])
    ids = tokens(2, 8)
    kv = tf.DynamicCache(config=model.config)
    logits(model, input_ids=ids, past_key_values=kv)
    kv.crop(-3)
    other = tokens(2, 2)
    got = logits(model, input_ids=other, past_key_values=kv)
    want = logits(model, input_ids=torch.cat([ids[:, :5], other], dim=1), use_cache=False)
    torch.testing.assert_close(got, want[:, 5:], rtol=1e-4, atol=1e-5)


def test_a_cache_the_policy_has_not_seen_is_refused():
    model = llama()
    for policy in (POLICIES["causal"], POLICIES["sequence"]):
        for cache in (tf.DynamicCache(config=model.config), tf.StaticCache(model.config, max_cache_len=8)):
            set_routing(model, RoutingPolicy())
            logits(model, input_ids=tokens(1, 3), past_key_values=cache)
            set_routing(model, policy)
            with pytest.raises(RuntimeError, match=r"past_key_values: holds 3 tokens"):
                logits(model, input_ids=tokens(1, 1), past_key_values=cache)


def test_caches_of_packed_sequences_and_paged_ones_are_refused():
    model = llama(attn_implementation="eager")
    for policy in (POLICIES["causal"], POLICIES["sequence"]):
        set_routing(model, policy)
        kv = tf.DynamicCache(config=model.config)
        packed = {"attention_mask": None, "cu_seq_lens_q": torch.tensor([0, 2, 5], dtype=torch.int32)}
        logits(model, input_ids=tokens(1, 5), past_key_values=kv, **packed)
        with pytest.raises(RuntimeError, match=r"past_key_values: holds 5 tokens"):
            logits(model, input_ids=tokens(1, 1), past_key_values=kv)
        with pytest.raises(NotImplementedError, match="paged cache"):
            logits(model, input_ids=tokens(1, 5), cache=object(), use_cache=False)


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
    """T5: its stacks route their own tokens, the decoder's first pass chooses for the generation."""
    model = t5()
    set_routing(model, POLICIES["causal"])
    with pytest.raises(NotImplementedError, match="cross-attention"):
        logits(model, input_ids=tokens(2, 6), decoder_input_ids=tokens(2, 3))
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
    assert len({layer.attached_routing[0] for layer in model.modules() if isinstance(layer, SmileLinear)}) == 2


@pytest.mark.parametrize("reentrant", [False, True], ids=["saved tensors", "reentrant"])
@by_name({name: POLICIES[name] for name in ("sequence+layers, m 2", "causal+layers, lock 3, m 2")})
def test_gradient_checkpointing_sees_the_same_routing(policy, reentrant):
    model = llama().double()  # nothing but another routing moves a gradient by as much as is asked
    set_routing(model, policy)
    ids, masks = (tokens(2, 6), tokens(2, 6)), (torch.ones(2, 6), torch.ones(2, 6).tril(4))

    def gradients(checkpointing: bool) -> list[torch.Tensor]:
        model.train()
        model.zero_grad()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        else:
            model.gradient_checkpointing_disable()
        losses = [model(input_ids=i, attention_mask=m, labels=i, use_cache=False).loss for i, m in zip(ids, masks)]
        sum(losses).backward()  # two passes are under way
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    plain = gradients(False)
    for got, want in zip(gradients(True), plain, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


def test_layers_that_run_twice_are_not_recomputed_and_a_root_does_not_call_itself():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = SmileLinear(8, 8, N, R, G)

        def forward(self, inputs_embeds, again=False):
            h = self(inputs_embeds) if again else self.layer(inputs_embeds)
            return checkpoint(self.layer, h, use_reentrant=False)

    model, x = Twice(), torch.randn(2, 3, 8, requires_grad=True)
    set_routing(model, POLICIES["sequence"])
    y = model(x)
    with pytest.raises(RuntimeError, match="ran 2 times in a forward pass of Twice"):
        y.sum().backward()
    with pytest.raises(RuntimeError, match="outside of a forward pass of Twice"):
        model(x, again=True)


def test_training_reaches_the_experts():
    model = bert()
    set_routing(model, POLICIES["sequence+layers, m 2"])
    model(input_ids=tokens(2, 5)).last_hidden_state.square().sum().backward()
    layer = next(m for m in model.modules() if isinstance(m, SmileLinear))
    assert layer.u.grad.abs().sum() > 0
    assert layer.weight.grad.abs().sum() > 0


@by_name({name: POLICIES[name] for name in ("sequence+layers", "causal+layers")})
def test_autocast_scores_in_float32(policy):
    """Under autocast the policy sees the same inputs as without, where these are exact in bfloat16."""
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


@by_name({name: POLICIES[name] for name in ("sequence+layers, lock 3", "causal+layers")})
def test_compiles_without_graph_breaks(policy):
    model = bert(num_hidden_layers=1)
    set_routing(model, policy)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch, length in ((2, 5), (3, 7)):
        ids, mask = tokens(batch, length), torch.ones(batch, length).tril(2)
        got = logits(compiled, input_ids=ids, attention_mask=mask)
        torch.testing.assert_close(got, logits(model, input_ids=ids, attention_mask=mask), rtol=1e-4, atol=1e-5)


@by_name({name: POLICIES[name] for name in ("sequence+layers, lock 3", "causal+layers")})
def test_decoding_from_a_static_cache_compiles(policy):
    model = llama(num_hidden_layers=1)
    set_routing(model, policy)
    ids = tokens(2, 8)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    outputs = []
    for decode in (model, compiled):
        kv = tf.StaticCache(model.config, max_cache_len=8)
        logits(model, input_ids=ids[:, :5], past_key_values=kv)
        outputs.append([logits(decode, input_ids=ids[:, t : t + 1], past_key_values=kv) for t in range(5, 8)])
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-5)


@by_name({name: POLICIES[name] for name in ("sequence+layers", "causal+layers, lock 3, m 2")})
def test_threads_do_not_meet(policy):
    model = bert()
    set_routing(model, policy)
    inputs = [tokens(2, 4 + k) for k in range(4)]
    want = [logits(model, input_ids=ids) for ids in inputs]
    got, barrier = [None] * 4, threading.Barrier(4)

    def work(k):
        barrier.wait()
        got[k] = [logits(model, input_ids=inputs[k]) for _ in range(5)]

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for results, w in zip(got, want):
        assert all(torch.equal(r, w) for r in results)


def test_nested_models_and_resetting():
    """The latest call on a part wins there; layers given back to the token's own choice have no state and no hooks."""
    inner, ids = bert(), tokens(2, 5)
    published = logits(inner, input_ids=ids)
    set_routing(inner, POLICIES["sequence"])
    pooled = logits(inner, input_ids=ids)
    assert not torch.equal(pooled, published)

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = inner

        def forward(self, **inputs):
            return self.inner(**inputs)

    outer = Outer()
    assert torch.equal(logits(outer, input_ids=ids), pooled)
    set_routing(outer, RoutingPolicy())
    assert torch.equal(logits(outer, input_ids=ids), published)
    assert not inner._forward_hooks
    assert not inner._forward_pre_hooks
    set_routing(inner.encoder.layer[0], POLICIES["sequence"])
    with pytest.raises(ValueError, match="follow 2 routing policies"):
        get_routing(outer)


def test_a_model_in_a_model_has_its_own_evidence():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.inner, self.last = (SmileLinear(16, 16, N, R, G), bert(), SmileLinear(16, 16, N, R, G))

        def forward(self, inputs_embeds, attention_mask):
            h = self.first(inputs_embeds)
            return self.last(self.inner(inputs_embeds=h, attention_mask=attention_mask).last_hidden_state)

    model, x, mask = Outer(), torch.randn(2, 6, 16), torch.tensor([[1] * 6, [1, 1, 1, 1, 0, 0]])
    with torch.no_grad():
        model.first.vh.normal_()
        model.last.vh.normal_()

    def run() -> tuple[list, list]:
        with Calls(model) as calls, torch.no_grad():
            model(x, attention_mask=mask)
        own = [call for call in calls if call[0] in (model.first, model.last)]
        return own, [call for call in calls if call not in own]

    real = mask.bool().tolist()
    set_routing(model, POLICIES["sequence+layers"])  # one root: evidence goes in and comes out
    own, inside = run()
    assert_follows([own[0], *inside, own[1]], real, POLICIES["sequence+layers"])
    set_routing(model.inner, POLICIES["causal+layers"])  # two: the outer pass stays under way behind the inner one
    own, inside = run()
    assert_follows(inside, real, POLICIES["causal+layers"])
    for (layer, inputs, y), (_, ids) in zip(own, definition(own, real, POLICIES["sequence+layers"])):
        want = layer(inputs, routing=(torch.ones(ids.shape), ids))
        torch.testing.assert_close(y[mask.bool()], want[mask.bool()], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_route_for_themselves(how):
    model, ids = bert(), tokens(2, 5)
    set_routing(model, POLICIES["sequence+layers"])
    want = logits(model, input_ids=ids)
    other = copy.deepcopy(model) if how == "deepcopy" else pickle.load(io.BytesIO(pickle.dumps(model)))
    assert torch.equal(logits(other, input_ids=ids), want)
    set_routing(model, RoutingPolicy())
    assert torch.equal(logits(other, input_ids=ids), want)
    set_routing(other, RoutingPolicy())
    assert not other._forward_hooks


def test_an_expert_that_left_a_layer_alone_keeps_its_standing():
    """Expert 2 wins at the first layer; at the second its update is 0, and it must still win there and at the third."""
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
    """Scores near the ends of the range, zero tokens and NaN do not spoil the sums."""
    layer = SmileLinear(8, 8, N, R, G, dtype=dtype)
    set_routing(layer_root := nn.Sequential(layer), RoutingPolicy("sequence"))
    x = torch.randn(2, 5, 8).to(dtype)
    want = layer_root(x)
    attached = layer.attached_routing[0]
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


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_one_expert_for_all_tokens(dtype, monkeypatch):
    """The case that needs no grouping of tokens, forward and backward, for weights other than 1 too."""
    p = Problem.random(9, 23, 29, 5, 3, 4, dtype=dtype)
    ids, weights = torch.full((9, 1), 3, dtype=torch.int32), torch.rand(9, 1) + 0.5
    dy = torch.randn(9, 29).to(dtype)
    leaves = {name: t.requires_grad_() for name, t in p.tensors().items()}
    leaves["weights"] = weights.to(p.s.dtype).requires_grad_()
    options = {"num_experts_per_tok": 1, "rank_of_router": 4}
    y = functional.smile_linear(*p.arguments(), **options, routing=(leaves["weights"], ids), backend="torch")
    got = {"y": y, **dict(zip(leaves, torch.autograd.grad(y, leaves.values(), dy, allow_unused=True)))}
    for name, (want, plain_error) in expectations(p, ids, weights=weights, dy=dy).items():
        assert_close(name, got[name], want, plain_error)
    monkeypatch.setattr(composed, "EVERY_TOKEN", dict.fromkeys(composed.EVERY_TOKEN, 0))  # however large the problem
    monkeypatch.delattr(composed, "_present")  # what groups tokens by expert
    with torch.no_grad():
        y = functional.smile_linear(*p.arguments(), **options, routing=(leaves["weights"], ids), backend="torch")
    assert_close("y", y, *expectations(p, ids, weights=weights)["y"])


def test_locked_layers_compute_no_scores(monkeypatch):
    model = bert()
    calls = []
    scores = functional.router_scores
    monkeypatch.setattr("smile_kernels.routing.router_scores", lambda *a, **k: calls.append(1) or scores(*a, **k))
    set_routing(model, POLICIES["sequence+layers, lock 3"])
    logits(model, input_ids=tokens(2, 5))
    assert len(calls) == 3
    model = llama()
    for policy, scored in ((POLICIES["sequence+layers"], 0), (POLICIES["causal+layers, lock 3, m 2"], 3)):
        set_routing(model, policy)
        kv = tf.DynamicCache(config=model.config)
        logits(model, input_ids=tokens(2, 5), past_key_values=kv)
        calls.clear()
        logits(model, input_ids=tokens(2, 1), past_key_values=kv)
        assert len(calls) == scored


@by_name(POLICIES | {"token": RoutingPolicy()})
def test_watching_counts_the_choices_and_changes_nothing(policy):
    model = bert()
    set_routing(model, policy)
    ids, mask = tokens(2, 6), torch.tensor([[1] * 6, [1, 1, 1, 0, 0, 0]])
    want = logits(model, input_ids=ids, attention_mask=mask)
    with Calls(model) as calls, watch_routing(model) as counts:
        torch.testing.assert_close(logits(model, input_ids=ids, attention_mask=mask), want)
    real = mask.bool()
    if policy.remembers:
        choices = [ids for _, ids in definition(calls, real.tolist(), policy)]
    else:
        choices = [functional.route(x, c.vh, num_experts_per_tok=1, rank_of_router=G)[1] for c, x, _ in calls]
    names = {layer: name for name, layer in model.named_modules()}
    for (layer, _, _), chosen in zip(calls, choices, strict=True):
        assert torch.equal(counts[names[layer]], chosen[..., 0][real].bincount(minlength=N))
    model(input_ids=ids)
    assert sum(int(count.sum()) for count in counts.values()) == 9 * len(calls), "it counts only while it is open"


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("scope", {"scope": "layer"}),
        ("accumulate", {"accumulate": 1}),
        ("lock_after", {"scope": "sequence", "lock_after": 0}),
        ("lock_after", {"scope": "sequence", "lock_after": 2.0}),
        ("lock_after", {"lock_after": 2}),
        ("num_experts_per_tok", {"num_experts_per_tok": 0}),
        ("routing", {"scop": "token"}),
    ],
)
def test_bad_policies_are_named(name, values):
    with pytest.raises(ValueError, match=f"^{name}:"):
        RoutingPolicy.from_dict(values)


@by_name(POLICIES | {"token": RoutingPolicy()})
def test_policies_survive_their_dict(policy):
    assert RoutingPolicy.from_dict(policy.to_dict()) == policy
    model = bert()
    set_routing(model, policy)
    assert get_routing(model) == RoutingPolicy(
        policy.scope, policy.accumulate, policy.lock_after, policy.num_experts_per_tok
    )


@by_name({"sequence+layers, lock 3": POLICIES["sequence+layers, lock 3"], "token": RoutingPolicy()})
def test_checkpoints_carry_the_policy(policy, tmp_path):
    config = tf.BertConfig(**SIZES, intermediate_size=24)
    base, finetuned = tf.BertModel(config), [tf.BertModel(config) for _ in range(3)]
    model, _ = sk.upscale(
        base, finetuned, rank_of_expert=4, rank_of_router=2, num_experts_per_tok=2, routing=policy, progress=False
    )
    model.eval()
    ids = tokens(2, 6)
    want = logits(model, input_ids=ids)
    assert get_routing(model) == policy
    sk.save_pretrained(model, tmp_path / "whole")
    stored = json.loads((tmp_path / "whole" / "config.json").read_text())["quantization_config"]
    assert ("routing" in stored) == policy.remembers
    loaded = [sk.load_pretrained(tmp_path / "whole"), tf.AutoModel.from_pretrained(tmp_path / "whole")]
    loaded.append(sk.load_pretrained(tmp_path / "whole", tf.BertModel(config).eval()))
    other = RoutingPolicy("causal")
    for copied in loaded:
        assert get_routing(copied) == policy
        torch.testing.assert_close(logits(copied, input_ids=ids), want, rtol=1e-4, atol=1e-5)
    for how, copied in zip(("own", "transformers"), loaded):
        set_routing(copied, other)
        (sk.save_pretrained if how == "own" else tf.BertModel.save_pretrained)(copied, tmp_path / how)
        assert get_routing(tf.AutoModel.from_pretrained(tmp_path / how)) == other


def test_command_line_sets_the_policy(tmp_path):
    config = tf.BertConfig(**SIZES, intermediate_size=24)
    for name in ("base", "one", "two"):
        tf.BertModel(config).save_pretrained(tmp_path / name)
    paths = {name: str(tmp_path / name) for name in ("base", "one", "two", "out", "yaml.yml", "again")}
    arguments = ["upscale", "--base", paths["base"], "--expert", paths["one"], "--expert", paths["two"]]
    arguments += ["--rank-of-expert", "2", "--rank-of-router", "2"]
    policy = ["--routing", "sequence", "--accumulate", "--lock-after", "3"]
    result = CliRunner().invoke(app, [*arguments, *policy, "--out", paths["out"]], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert get_routing(sk.load_pretrained(paths["out"])) == RoutingPolicy("sequence", True, 3)
    (tmp_path / "yaml.yml").write_text("parameters: {routing: {scope: causal, accumulate: true}}")
    result = CliRunner().invoke(app, ["upscale", paths["yaml.yml"], *arguments[1:], "--out", paths["again"]])
    assert result.exit_code == 0, result.output
    assert get_routing(sk.load_pretrained(paths["again"])) == RoutingPolicy("causal", True)
    result = CliRunner().invoke(app, [*arguments, "--lock-after", "3", "--out", str(tmp_path / "no")])
    assert result.exit_code != 0
    assert "lock_after: is 3" in result.output
    assert not (tmp_path / "no").exists()


def test_example_runs(tmp_path, monkeypatch, capsys):
    example = Path(__file__).parents[1] / "examples" / "routing.py"
    monkeypatch.setattr("sys.argv", ["routing.py", "--plot", str(tmp_path / "routing.png")])
    runpy.run_path(str(example), run_name="__main__")
    shares = [float(line.split(":")[1].split("%")[0]) for line in capsys.readouterr().out.splitlines()]
    assert len(shares) == 5
    assert shares[0] < min(shares[1:]), "remembering must help"
    assert (tmp_path / "routing.png").stat().st_size > 10_000


@pytest.mark.parametrize("style", ["ColwiseSmile", "RowwiseSmile"])
def test_layers_split_over_ranks_refuse_a_policy(style):
    model = nn.Sequential(SmileLinear(8, 8, 2, 2, 2))
    set_routing(model, RoutingPolicy("sequence"))
    with pytest.raises(NotImplementedError, match=r"^routing: a layer split over ranks"):
        getattr(distributed, style)().forward(model[0], None, torch.randn(3, 8))


def test_models_that_cannot_follow_are_refused_unchanged():
    with pytest.raises(ValueError, match=r"^model: Linear has no SmileLinear"):
        set_routing(nn.Linear(2, 2), RoutingPolicy())
    model = nn.Sequential(SmileLinear(8, 8, 2, 2, 2), SmileLinear(8, 8, 3, 2, 2))
    with pytest.raises(ValueError, match=r"^num_experts_per_tok: is 3; expected at most 2"):
        set_routing(model, RoutingPolicy(num_experts_per_tok=3))
    with pytest.raises(ValueError, match=r"^model: .* \[2, 3\] experts"):
        set_routing(model, POLICIES["sequence"])
    stray = t5()
    stray.lm_head = SmileLinear(16, 50, N, R, G)
    with pytest.raises(ValueError, match=r"^model: lm_head belongs to none of its parts \(T5Stack, T5Stack\)"):
        set_routing(stray, POLICIES["sequence"])
    assert get_routing(model) == RoutingPolicy()
    assert [layer.num_experts_per_tok for layer in model] == [1, 1]
    set_routing(model, RoutingPolicy(num_experts_per_tok=2))
    assert [layer.num_experts_per_tok for layer in model] == [2, 2]
