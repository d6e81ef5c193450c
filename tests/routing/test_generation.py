"""Routing policies with KV caches: prompts, decoding, beams, cropping, continuation."""

import copy
import pickle

import pytest
import torch
import transformers as tf

from smile_kernels import routing_override, upscale
from smile_kernels.errors import SmileError
from smile_kernels.nn import smile_layers
from smile_kernels.routing import RoutingPolicy, set_routing, watch_routing
from tests.routing.definition import (
    CAUSAL,
    POLICIES,
    SEQUENCE,
    SIZES,
    Calls,
    assert_follows,
    by_name,
    definition,
    llama,
    logits,
    mistral,
    smile,
    tokens,
)
from tests.test_all_or_nothing import llama as bare_llama


@by_name(CAUSAL | {"layers": POLICIES["layers"]})
@pytest.mark.parametrize("cache", ["dynamic", "without layers", "static", "windowed"])
def test_prefill_and_decode_equal_one_causal_pass(policy, cache):
    model = mistral(sliding_window=5 if cache == "windowed" else None)
    set_routing(model, policy)
    ids = tokens(2, 12)
    whole = logits(model, input_ids=ids, use_cache=False)
    kv = (
        tf.StaticCache(model.config, max_cache_len=16)
        if cache in ("static", "windowed")
        else tf.DynamicCache(config=None if cache == "without layers" else model.config)
    )
    parts = [ids[:, :5], ids[:, 5:6], ids[:, 6:9], *ids[:, 9:].split(1, 1)]  # a prompt, a continuation, single tokens
    got, places = [], set()
    for part in parts:
        got.append(logits(model, input_ids=part, past_key_values=kv))
        if cache == "static" and policy.scope == "causal":  # a CUDA graph writes where it was captured
            places.add(tuple((t.data_ptr(), t.shape) for t in kv.routing_memory.sums.values()))
    torch.testing.assert_close(torch.cat(got, dim=1), whole, rtol=1e-4, atol=1e-5)
    assert len(places) == (cache == "static" and policy.scope == "causal")


def test_latent_attention_gives_a_layer_the_cached_tokens_again():
    """The choice of a prompt serves them, too; those of single tokens are refused."""
    config = tf.DeepseekV3Config(
        **SIZES | {"pad_token_id": None}, intermediate_size=24, num_key_value_heads=2, q_lora_rank=8, kv_lora_rank=8,
        qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8, first_k_dense_replace=2, n_group=1, topk_group=1,
        eos_token_id=None,
    )  # fmt: skip
    model, chosen = smile(tf.DeepseekV3ForCausalLM(config)), set()
    for ids in tokens(8, 5).split(1):
        options = {"max_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones_like(ids)}
        set_routing(model, RoutingPolicy("prompt", lock_after=1))
        with watch_routing(model) as counts:
            answer = model.generate(ids, **options)
        (expert,) = set(torch.stack([*counts.values()]).sum(0).nonzero()[:, 0].tolist())
        set_routing(model, RoutingPolicy())
        with routing_override(model, expert):
            assert torch.equal(answer, model.generate(ids, **options))
        chosen.add(expert)
    assert len(chosen) > 1, "one expert alone shows nothing"
    set_routing(model, RoutingPolicy("causal", accumulate=True, lock_after=1))
    with pytest.raises(
        RuntimeError, match=r"has input \[1, 1, 6, 8\], where a forward pass over 1 sequences of 1 tokens"
    ):
        model.generate(ids, **options)


@pytest.mark.parametrize("policy", [RoutingPolicy("causal"), RoutingPolicy(accumulate=True), RoutingPolicy("prompt")])
def test_experts_in_the_head_need_all_tokens(policy):
    """`generate` gives the head the last token of the prompt alone, unless it is asked for all."""
    model = upscale(bare_llama(), [bare_llama()], rank_of_expert=3, rank_of_router=2, progress=False)[0].eval()
    assert "lm_head" in smile_layers(model)
    set_routing(model, policy)
    ids = tokens(2, 5) % 32
    with pytest.raises(RuntimeError, match=r"input \[2, 1, 16\].* needs logits_to_keep=0, or exclude=\['lm_head'\]"):
        model.generate(ids, max_new_tokens=2)
    answer = model.generate(ids, max_new_tokens=1, do_sample=False, logits_to_keep=0)
    assert torch.equal(answer[:, -1], logits(model, input_ids=ids)[:, -1].argmax(-1))


def test_the_choice_of_a_prompt_serves_experts_in_the_head():
    model = smile(bare_llama(), skip=())
    assert "lm_head" in smile_layers(model)
    set_routing(model, RoutingPolicy("prompt", lock_after=1))
    ids = tokens(8, 5) % 32
    answer = model.generate(ids, max_new_tokens=3, do_sample=False)
    assert torch.equal(answer, model.generate(ids, max_new_tokens=3, do_sample=False, logits_to_keep=0))
    with watch_routing(model) as counts:
        model(input_ids=ids)
    assert (counts["lm_head"] > 0).sum() > 1, "one expert alone shows nothing"


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
        kv.reset()  # after a reset, the next prompt chooses again
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
    """Rows of a cache that are repeated, selected and reordered continue as if each had been processed alone."""
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


@by_name(CAUSAL | SEQUENCE)
def test_a_cache_goes_through_a_file(policy):
    """Its memory does, too, and follows the rows of the loaded cache; another policy of the same kind refuses it."""
    model, ids = llama(), tokens(2, 9)
    set_routing(model, policy)
    kv = tf.DynamicCache(config=model.config)
    logits(model, input_ids=ids[:, :6], past_key_values=kv)
    other = pickle.loads(pickle.dumps(kv))
    rows = torch.tensor([1, 0])
    kv.reorder_cache(rows)
    want = logits(model, input_ids=ids[rows, 6:], past_key_values=kv)
    other.reorder_cache(rows)
    assert torch.equal(logits(model, input_ids=ids[rows, 6:], past_key_values=other), want)
    set_routing(model, policy)
    with pytest.raises(RuntimeError, match="has not seen under its present routing policy"):
        logits(model, input_ids=ids[rows, 6:], past_key_values=pickle.loads(pickle.dumps(other)))


@by_name(CAUSAL | SEQUENCE)
def test_a_cache_filled_in_inference_mode_goes_on_outside_of_it(policy):
    model, ids = llama(), tokens(2, 9)
    set_routing(model, policy)
    parts = [(torch.inference_mode(), ids[:, :5]), (torch.no_grad(), ids[:, 5:6]), (torch.enable_grad(), ids[:, 6:])]
    results = []
    for modes in (True, False):
        kv, got = tf.DynamicCache(config=model.config), []
        for mode, part in parts:
            with mode if modes else torch.no_grad():
                got.append(model(input_ids=part, past_key_values=kv).logits)
        results.append(got)
    assert results[0][2].requires_grad
    for got, want in zip(*results):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_a_cache_the_policy_has_not_seen_is_refused():
    model = llama()
    for policy in (POLICIES["causal"], POLICIES["sequence"]):
        for cache in (tf.DynamicCache(config=model.config), tf.StaticCache(model.config, max_cache_len=8)):
            set_routing(model, RoutingPolicy())
            logits(model, input_ids=tokens(1, 3), past_key_values=cache)
            set_routing(model, policy)
            with pytest.raises(RuntimeError, match="holds 3 tokens"):
                logits(model, input_ids=tokens(1, 1), past_key_values=cache)


def test_a_window_needs_all_tokens_in_one_pass():
    model, ids = llama(), tokens(2, 6)
    set_routing(model, POLICIES["window 2+layers"])
    with pytest.raises(NotImplementedError, match=r"scope 'window'.* called with a KV cache; expected use_cache=False"):
        model.generate(ids, max_new_tokens=2)
    answer = model.generate(ids, max_new_tokens=1, do_sample=False, use_cache=False)
    assert torch.equal(answer[:, -1], logits(model, input_ids=ids, use_cache=False)[:, -1].argmax(-1))


def test_caches_of_packed_sequences_and_paged_ones_are_refused():
    model = llama(attn_implementation="eager")
    for policy in (POLICIES["causal"], POLICIES["sequence"]):
        set_routing(model, policy)
        kv = tf.DynamicCache(config=model.config)
        packed = {"attention_mask": None, "cu_seq_lens_q": torch.tensor([0, 2, 5], dtype=torch.int32)}
        logits(model, input_ids=tokens(1, 5), past_key_values=kv, **packed)
        with pytest.raises(RuntimeError, match="holds 5 tokens"):
            logits(model, input_ids=tokens(1, 1), past_key_values=kv)
        with pytest.raises(NotImplementedError, match=r"^cache: is a object"):
            logits(model, input_ids=tokens(1, 5), cache=object(), use_cache=False)
        with pytest.raises(SmileError, match=r"^cu_seq_lens_q: is given to .* without input_ids"):
            logits(model, **packed)


@by_name({name: POLICIES[name] for name in ("sequence+layers, lock 1", "causal+layers")})
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
