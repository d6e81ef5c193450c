"""Guards for the parts of other libraries that policies read: changes there are handled, or refused by name."""

import inspect

import pytest
import torch
import transformers as tf
from torch import nn
from torch.utils.checkpoint import checkpoint

from smile_kernels import SmileLinear
from smile_kernels.routing import RoutingPolicy, calibrate, routing_override, set_routing, watch_routing
from tests.routing.definition import (
    CAUSAL,
    POLICIES,
    SEQUENCE,
    SIZES,
    G,
    N,
    R,
    bert,
    by_name,
    llama,
    logits,
    smile,
    tokens,
)

TWO = {name: POLICIES[name] for name in ("sequence+layers", "causal+layers")}
# Public methods of transformers' Cache, 5.18 to 5.24. Those that move or repeat batch rows are handled.
CACHE_METHODS = {
    *("activate_past_recording", "batch_repeat_interleave", "batch_select_indices", "crop", "early_initialization"),
    *("get_conv_state", "get_mask_sizes", "get_max_cache_shape", "get_max_length", "get_query_offset"),
    *("get_recurrent_state", "get_seq_length", "has_previous_state", "is_recording_past", "offload", "prefetch"),
    *("reorder_cache", "reset", "update", "update_conv_state", "update_indexer", "update_recurrent_state"),
}


class Renamed(nn.Module):
    """A model whose KV cache has an unusual name."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(SmileLinear(8, 8, N, R, G) for _ in range(3))

    def forward(self, inputs_embeds, kv_store=None, window_mask=None, state=None):
        if kv_store is not None:
            kv_store.update(inputs_embeds[:, None], inputs_embeds[:, None], 0)
        h = inputs_embeds
        for layer in self.layers:
            h = torch.tanh(layer(h))
        return h


@torch.no_grad()
@by_name({"causal+layers": POLICIES["causal+layers"], "causal": POLICIES["causal"]})
@pytest.mark.parametrize("positional", [False, True])
def test_caches_are_recognised_by_what_they_are(policy, positional):
    model, x = Renamed(), torch.randn(2, 7, 8)
    set_routing(model, policy)
    cache = tf.DynamicCache(config=tf.LlamaConfig(**SIZES))
    parts = x.split([4, 1, 2], dim=1)
    got = torch.cat([model(p, cache) if positional else model(p, kv_store=cache) for p in parts], dim=1)
    torch.testing.assert_close(got, model(x), rtol=1e-4, atol=1e-5)
    with pytest.raises(NotImplementedError, match="2 KV caches"):
        model(x, kv_store=cache, window_mask=tf.DynamicCache(config=tf.LlamaConfig(**SIZES)))


@by_name(TWO)
def test_arguments_no_policy_knows_are_refused_by_name(policy):
    model, x = Renamed(), torch.randn(2, 7, 8)
    set_routing(model, policy)
    with pytest.raises(NotImplementedError, match=r"^window_mask: is a Tensor"):
        model(x, window_mask=torch.ones(2, 7))
    with watch_routing(model), pytest.raises(NotImplementedError, match=r"^window_mask"):
        model(x, window_mask=torch.ones(2, 7))
    with pytest.raises(NotImplementedError, match=r"^state: is a list"):
        model(x, state=[torch.ones(2, 8)])
    with pytest.raises(NotImplementedError, match=r"^past_key_values: is a tuple"):
        logits(llama_with(policy), input_ids=tokens(1, 3), past_key_values=((torch.ones(1, 1, 2, 8),) * 2,))


def llama_with(policy):
    model = llama()
    set_routing(model.model, policy)
    return model.model


@by_name(TWO)
def test_a_cache_whose_rows_cannot_be_followed_is_refused(policy):
    class Changed(tf.DynamicCache):
        reorder_cache = None

    model = llama()
    set_routing(model, policy)
    with pytest.raises(NotImplementedError, match=r"^cache: Changed has no method reorder_cache"):
        logits(model, input_ids=tokens(2, 4), past_key_values=Changed(config=model.config))


def test_caches_have_the_methods_that_are_known():
    """A new one may move batch rows: check it, handle it if necessary, and add it here."""
    methods = {name for name, _ in inspect.getmembers(tf.Cache, inspect.isfunction) if not name.startswith("_")}
    assert methods <= CACHE_METHODS, f"unknown: {sorted(methods - CACHE_METHODS)}"


@by_name(TWO)
def test_a_pytorch_that_does_not_number_backward_passes(policy, monkeypatch):
    """Training works; recomputation, which needs the number, is refused."""
    monkeypatch.delattr(torch._C, "_current_graph_task_id")
    model = bert()
    set_routing(model, policy)
    model(input_ids=tokens(2, 5)).last_hidden_state.sum().backward()

    class Recomputed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = SmileLinear(8, 8, N, R, G)

        def forward(self, inputs_embeds):
            return checkpoint(self.layer, inputs_embeds, use_reentrant=True)

    model = Recomputed()
    set_routing(model, policy)
    y = model(torch.randn(2, 3, 8, requires_grad=True))
    with pytest.raises(NotImplementedError, match="does not tell which backward pass"):
        y.sum().backward()


def mamba() -> torch.nn.Module:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4, "vocab_size": 50, "time_step_rank": 4}
    config = tf.MambaConfig(**sizes, pad_token_id=0, bos_token_id=1, eos_token_id=None)
    return smile(tf.MambaForCausalLM(config))


@by_name(
    {"prompt, one block": RoutingPolicy("prompt", lock_after=1), "layers": POLICIES["layers"], **CAUSAL, **SEQUENCE}
)
def test_a_cache_that_does_not_count_its_tokens(policy):
    """Mamba's: the steps of a generation give what one pass over the same tokens gives."""
    model, ids = mamba(), tokens(2, 6)
    set_routing(model, policy)
    answer = model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    cache, steps = None, []
    for part in (answer[:, :6], *answer[:, 6:].split(1, dim=1)):
        with torch.no_grad():
            out = model(part, use_cache=True, **({} if cache is None else {"cache_params": cache}))
        cache, steps = out.cache_params, [*steps, out.logits]
    assert torch.equal(torch.stack([step[:, -1].argmax(-1) for step in steps[:-1]], 1), answer[:, 6:])
    if policy.scope == "causal":
        torch.testing.assert_close(torch.cat(steps, 1), logits(model, input_ids=answer), rtol=1e-4, atol=1e-4)
    for b in range(2):
        alone = model.generate(ids[b : b + 1], max_new_tokens=4, min_new_tokens=4, do_sample=False)
        assert torch.equal(alone[0], answer[b])


def test_overrides_by_row_with_a_cache_that_does_not_count_its_tokens():
    model, ids = mamba(), tokens(2, 5)
    mask = torch.tensor([[1] * 5, [0, 0, 1, 1, 1]])
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    with routing_override(model, [1, {0: 0.5, 2: 0.5}]), watch_routing(model) as counts:
        answer = model.generate(ids, attention_mask=mask, **options)
    assert {int(count.sum()) for count in counts.values()} - {0} <= {2 * 7, 2 * 7 - 2}  # without padding, or with it
    with routing_override(model, 1):
        assert torch.equal(model.generate(ids[:1], **options), answer[:1])


def test_a_cache_that_does_not_count_its_tokens_and_was_filled_before():
    model, ids = mamba(), tokens(1, 4)
    with torch.no_grad():
        cache = model(ids, use_cache=True).cache_params
    set_routing(model, RoutingPolicy("prompt"))
    with pytest.raises(NotImplementedError, match="does not count its tokens, and was filled when MambaModel had no"):
        model(ids[:, :1], cache_params=cache)
    with torch.no_grad():
        cache = model(ids, use_cache=True).cache_params
    set_routing(model, POLICIES["causal"])
    with pytest.raises(RuntimeError, match="holds 4 tokens that MambaModel has not seen under its present routing"):
        model(ids[:, :1], cache_params=cache)
    calibrate(model, sequences=2, length=5)
    assert RoutingPolicy.recommended(model) == RoutingPolicy("prompt", lock_after=1, calibrated=True)
