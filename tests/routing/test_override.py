"""Experts selected by the caller instead of the policy: for a model, and for each row of a batch."""

import copy
import itertools
import threading

import pytest
import torch
import transformers as tf
from torch import nn

from smile_kernels import SmileLinear, calibrate, routing_override
from smile_kernels.functional import keep_top_p, route
from smile_kernels.integrations.quantization import split_base
from smile_kernels.nn import smile_layers
from smile_kernels.routing import RoutingPolicy, get_routing, set_routing, watch_routing
from smile_kernels.routing.state import RootRouting
from tests.routing.definition import (
    POLICIES,
    Calls,
    N,
    albert,
    bert,
    by_name,
    llama,
    logits,
    mistral,
    smile,
    t5,
    tokens,
)

NAMES = ("math", "code", "chat", "law")
EVERY = {"published": RoutingPolicy(), "prompt": RoutingPolicy("prompt"), **POLICIES}
# Possible selections, and their weights.
ASKED = [("code", {1: 1.0}), (3, {3: 1.0}), ({"law": 0.25, 0: -0.5}, {3: 0.25, 0: -0.5}), ({}, {})]


def named(model: nn.Module) -> nn.Module:
    for layer in smile_layers(model).values():
        layer.expert_names = NAMES
    return model


def dense(model: nn.Module, weights: dict[int, float]) -> nn.Module:
    """The model with plain linear layers W + sum of w_i U_i diag(s_i) V_i^T."""
    set_routing(model := copy.deepcopy(model), RoutingPolicy())
    for name, layer in smile_layers(model).items():
        linear, r = nn.Linear(layer.in_features, layer.out_features), layer.rank_of_expert
        linear.weight.data, bias = layer.weight.data.clone(), layer.bias
        linear.bias.data = torch.zeros(layer.out_features) if bias is None else bias.data.clone()
        for i, w in weights.items():
            linear.weight.data += w * (layer.u[i] * layer.s[i]) @ layer.vh[i, :r]
            linear.bias.data += w * layer.expert_bias[i]
        model.set_submodule(name, linear)
    return model


def close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-5)


@by_name(EVERY)
def test_one_expert_for_all_tokens(policy):
    model, ids, mask = named(llama()), tokens(2, 6), torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])
    set_routing(model, policy)
    before = logits(model, input_ids=ids, attention_mask=mask)
    for asked, weights in [*ASKED, (torch.tensor([0.0, 0.5, 0.25, 0.0]), {1: 0.5, 2: 0.25})]:
        with routing_override(model, asked):
            close(
                logits(model, input_ids=ids, attention_mask=mask),
                want := logits(dense(model, weights), input_ids=ids, attention_mask=mask),
            )
        assert not torch.allclose(before, want, atol=1e-3)
    assert torch.equal(logits(model, input_ids=ids, attention_mask=mask), before)
    assert get_routing(model) == policy
    assert all((layer.router_policy is None) == policy.is_published for layer in smile_layers(model).values())


@by_name({name: policy for name, policy in EVERY.items() if policy.scope != "window"})  # which takes no KV cache
def test_each_row_its_own_and_generation(policy):
    """Rows in one batch, padded on the left, have the same results as alone; None has the policy's."""
    model, ids = named(mistral()), tokens(5, 5)
    set_routing(model, policy)
    asked = ["math", None, {"code": 0.75, 2: 0.5, "law": 0.25}, {}, None]
    mask = torch.tensor([[1] * 5, [0, 0, 1, 1, 1], [1] * 5, [0, 1, 1, 1, 1], [1] * 5])
    options = {"max_new_tokens": 5, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with routing_override(model, asked):
        got = model.generate(ids, attention_mask=mask, **options)
    for row, expert in enumerate(asked):
        real = mask[row].bool()
        with routing_override(model, expert):
            alone = model.generate(ids[row][real][None], attention_mask=mask[row][real][None], **options)
        assert torch.equal(alone.sequences[0, -5:], got.sequences[row, -5:])
        for step in range(5):
            close(got.logits[step][row], alone.logits[step][0])
        weights = {0: {0: 1.0}, 2: {1: 0.75, 2: 0.5, 3: 0.25}, 3: {}}.get(row)
        if weights is not None:
            whole = got.sequences[row][torch.cat([real, torch.ones(5, dtype=torch.bool)])][None]
            want = logits(dense(model, weights), input_ids=whole)[0, -6:-1]
            close(torch.stack([step[row] for step in got.logits]), want)


@pytest.mark.parametrize(
    "policy", [RoutingPolicy(), RoutingPolicy("sequence", accumulate=True)], ids=["published", "sequence"]
)
def test_encoders_and_two_roots(policy):
    for model, inputs in (
        (bert(), {"input_ids": tokens(2, 4)}),
        (albert(), {"input_ids": tokens(2, 4)}),
        (t5(), {"input_ids": tokens(2, 5), "decoder_input_ids": tokens(2, 3)}),
    ):
        set_routing(named(model), policy)
        own = logits(model, **inputs)
        with routing_override(model, ["chat", None]):
            got = logits(model, **inputs)
        close(got[0], logits(dense(model, {2: 1.0}), **inputs)[0])
        close(got[1], own[1])


def test_more_experts_per_token_than_asked_for():
    """The rows' choices have different widths."""
    model, ids = named(llama()), tokens(3, 4)
    for layer in smile_layers(model).values():
        layer.num_experts_per_tok = 3
    own = logits(model, input_ids=ids)
    with routing_override(model, [None, "code", {}]):
        got = logits(model, input_ids=ids)
    close(got[0], own[0])
    close(got[1], logits(dense(model, {1: 1.0}), input_ids=ids)[1])
    close(got[2], logits(dense(model, {}), input_ids=ids)[2])


def test_overrides_close_in_any_order():
    """As those of two coroutines in one thread."""
    model, ids = named(llama()), tokens(2, 6)
    own = logits(model, input_ids=ids)
    first, second = routing_override(model, "code"), routing_override(model, "law")
    first.__enter__()
    code = logits(model, input_ids=ids)
    second.__enter__()
    law = logits(model, input_ids=ids)
    assert not torch.equal(code, law)
    first.__exit__(None, None, None)
    assert torch.equal(logits(model, input_ids=ids), law)
    second.__exit__(None, None, None)
    assert torch.equal(logits(model, input_ids=ids), own)


def test_an_override_may_be_opened_again():
    model, ids = named(llama()), tokens(2, 4)
    own, one = logits(model, input_ids=ids), logits(dense(model, {1: 1.0}), input_ids=ids)
    code, chat = routing_override(model, "code"), routing_override(model, "chat")
    decorated = code(logits)
    for _ in range(2):
        with code, chat, code:
            close(logits(model, input_ids=ids), one)
        close(decorated(model, input_ids=ids), one)
        close(logits(model, input_ids=ids), own)


def test_the_innermost_counts_and_an_error_leaves_nothing():
    model, ids = named(llama()), tokens(2, 4)
    own, one, two = (logits(m, input_ids=ids) for m in (model, dense(model, {1: 1.0}), dense(model, {2: 1.0})))
    with routing_override(model, "code"):
        with routing_override(model, "chat"):
            close(logits(model, input_ids=ids), two)
            with routing_override(model, None):
                close(logits(model, input_ids=ids), own)
        with pytest.raises(IndexError), routing_override(model, "law"):
            logits(model, input_ids=ids + 50)
        close(logits(model, input_ids=ids), one)
    assert all(layer.router_policy is None for layer in smile_layers(model).values())
    assert torch.equal(logits(model, input_ids=ids), own)


def test_a_pass_that_begins_when_an_override_ends_leaves_no_layer_behind(monkeypatch):
    model, idle = named(llama()), itertools.chain([True], itertools.repeat(False))
    monkeypatch.setattr(RootRouting, "is_idle", property(lambda root: next(idle)))
    with routing_override(model, "code"):
        pass
    assert all(layer.router_policy is None for layer in smile_layers(model).values())


def test_threads_and_copies_have_their_own():
    model, ids = named(llama()), tokens(2, 4)
    own, want = logits(model, input_ids=ids), [logits(dense(model, {i: 1.0}), input_ids=ids) for i in range(N)]
    barrier, failed = threading.Barrier(N + 1), []

    def work(expert):
        try:
            for _ in range(5):
                barrier.wait(30)
                if expert is None:
                    close(logits(model, input_ids=ids), own)
                else:
                    with routing_override(model, expert):
                        close(logits(model, input_ids=ids), want[expert])
        except BaseException as error:
            failed.append(error)
            barrier.abort()

    threads = [threading.Thread(target=work, args=(expert,)) for expert in (None, *range(N))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    with routing_override(model, "law"):
        copied = copy.deepcopy(model)
        close(logits(copied, input_ids=ids), own)
        with routing_override(copied, "math"):
            close(logits(copied, input_ids=ids), want[0])
        close(logits(model, input_ids=ids), want[3])


@by_name({"published": RoutingPolicy(), "causal+layers": POLICIES["causal+layers"]})
@pytest.mark.parametrize("asked", ["code", ["code", None]], ids=["all", "rows"])
def test_a_recomputation_sees_the_override_of_its_forward_pass(policy, asked):
    model = named(llama()).double()
    set_routing(model, policy)
    ids = tokens(2, 6)

    def gradients(checkpointing: bool) -> list[torch.Tensor]:
        model.train()
        model.zero_grad()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            model.gradient_checkpointing_disable()
        with routing_override(model, asked):
            first = model(input_ids=ids, labels=ids, use_cache=False).loss
        with routing_override(model, None):  # a pass without one, with both graphs pending
            second = model(input_ids=ids, labels=ids, use_cache=False).loss
        (first + 2 * second).backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    plain = gradients(False)
    for got, want in zip(gradients(True), plain, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


def test_compiled_models_follow_it():
    model, ids = named(llama()), tokens(2, 4)
    for policy in (RoutingPolicy(), POLICIES["sequence+layers"]):
        set_routing(model, policy)
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        for asked in (None, "code", "chat", ["law", None], None, "code"):
            with routing_override(model, asked):
                want = logits(model, input_ids=ids, use_cache=False)
                close(logits(compiled, input_ids=ids, use_cache=False), want)


@by_name({"published": RoutingPolicy(), "sequence+layers": POLICIES["sequence+layers"]})
def test_experts_beside_a_base_of_another_make(policy):
    model, ids = named(llama()), tokens(2, 4)
    set_routing(model, policy)
    own, want = logits(model, input_ids=ids), logits(dense(model, {1: 1.0}), input_ids=ids)
    split_base(model)
    with routing_override(model, "code"):
        close(logits(model, input_ids=ids), want)
    with routing_override(model, [1, None]):
        got = logits(model, input_ids=ids)
    close(got[0], want[0])
    close(got[1], own[1])
    close(logits(model, input_ids=ids), own)


def test_offloaded_layers():
    """They are on meta when it opens, and on another device when they run."""
    model, ids = named(llama()), tokens(3, 4)
    want = logits(dense(model, {1: 1.0}), input_ids=ids)
    layers = list(smile_layers(model).values())
    held = [layer.vh for layer in layers]
    for layer in layers:
        layer.vh = torch.nn.Parameter(layer.vh.detach().to("meta"))
    with routing_override(model, "code"):
        for layer, vh in zip(layers, held):
            layer.vh = vh
        close(logits(model, input_ids=ids), want)


def test_tangents_of_a_policys_own_choice():
    """It is a constant in forward mode, as in reverse mode."""
    model = named(bert(attn_implementation="eager"))
    for layer in smile_layers(model).values():
        layer.set_num_experts_per_tok(2)
    x = torch.randn(2, 4, 16)
    v = torch.randn_like(x)

    def call(x):
        with routing_override(model, ["code", None]):
            return model(inputs_embeds=x).last_hidden_state

    tangent = torch.func.jvp(call, (x,), (v,))[1]
    dy = torch.randn_like(tangent)
    x.requires_grad_()
    (product,) = torch.autograd.grad(call(x), x, dy)
    torch.testing.assert_close((tangent * dy).sum(), (product * v).sum(), rtol=1e-3, atol=1e-4)


def test_watched_counts():
    model, ids = named(llama()), tokens(3, 4)
    with watch_routing(model) as counts, routing_override(model, ["code", {}, {0: 0.1, 2: 0.9}]):
        model(input_ids=ids)
    assert all(count.tolist() == [0, 4, 4, 0] for count in counts.values())


def test_the_policy_may_change_while_it_is_open():
    model, ids = named(llama()), tokens(2, 4)
    want = logits(dense(model, {1: 1.0}), input_ids=ids)
    with routing_override(model, "code"):
        set_routing(model, POLICIES["causal"])
        close(logits(model, input_ids=ids), want)
        set_routing(model, RoutingPolicy())
        close(logits(model, input_ids=ids), want)
        with pytest.raises(ValueError, match="a routing_override is open on LlamaModel; expected this call outside"):
            calibrate(model)
        with pytest.raises(ValueError, match="a routing_override is open on LlamaModel"):
            set_routing(model.model.layers[0], POLICIES["causal"])
        close(logits(model, input_ids=ids), want)
    assert all(layer.router_policy is None for layer in smile_layers(model).values())


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("maths", "expert: is 'maths'; expected one of 'math', 'code', 'chat', 'law', or an index from 0 to 3"),
        (4, "expert: is 4; expected one of"),
        (-1, "expert: is -1; expected one of"),
        (True, "expert: is True; expected one of"),
        (1.0, "expert: is 1.0; expected one of"),
        ([], r"expert: is \[\]; expected one entry for each row"),
        (["math", "maths"], r"expert\[1\]: is 'maths'"),
        ({"maths": 1.0}, "expert: is 'maths'"),
        ({"math": "1"}, "expert: the weight of 'math' is '1'; expected a finite number"),
        ({"math": float("nan")}, "expert: the weight of 'math' is nan"),
        ({"math": 1.0, 0: 1.0}, "expert: 0 is given by its name and its index"),
        (torch.ones(3), r"expert: has shape \[3\]; expected weights \[4\]"),
    ],
    ids=str,
)
def test_bad_experts_are_named(asked, message):
    model = named(llama())
    with pytest.raises(ValueError, match=message):
        routing_override(model, asked)
    assert all(layer.router_policy is None for layer in smile_layers(model).values())


def test_models_and_batches_that_do_not_fit_are_named():
    model = llama()
    with pytest.raises(
        ValueError, match="expert: is 'math', and the experts have no names; expected an index from 0 to 3"
    ):
        routing_override(model, "math")
    with pytest.raises(ValueError, match="model: is 'llama'; expected a model with SMILE layers"):
        routing_override("llama", 0)
    with pytest.raises(ValueError, match="model: Linear has no SmileLinear"):
        routing_override(nn.Linear(2, 2), 0)
    with (
        routing_override(model, [0, 1, 2]),
        pytest.raises(ValueError, match="expert: has 3 entries; expected 2, one for"),
    ):
        model(input_ids=tokens(2, 4))
    with (
        routing_override(model, [1, None]),
        pytest.raises(RuntimeError, match=r"outside of a forward pass .* whose override needs"),
    ):
        model.model.layers[0].mlp(torch.randn(2, 16))
    set_routing(model, POLICIES["causal"])
    with (
        pytest.raises(ValueError, match=r"follows a routing policy of LlamaModel; expected the model that set_routing"),
        routing_override(model.model.layers[0], 1),
    ):
        pass
    model.model.layers[0].mlp.up_proj = SmileLinear(16, 24, 3, 3, 2)
    with pytest.raises(ValueError, match="model: its layers have different experts"):
        routing_override(model, 1)


def test_functions_that_run_after_the_call_are_not_decorated():
    model = llama()

    def generates():
        yield 1

    async def waits():
        pass

    for function in (generates, waits):
        with pytest.raises(ValueError, match=f"^routing_override: decorates {function.__name__}, whose body runs"):
            routing_override(model, 1)(function)
    assert routing_override(model, 1)(lambda: model.model.layers[0].mlp.up_proj.router_policy is not None)()


def test_layers_outside_the_parts_of_a_model():
    """The head of T5, the projections of CLIP: one expert for all rows needs no tokens."""
    tower = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = tf.CLIPConfig(
        text_config={**tower, "vocab_size": 50, "projection_dim": 8},
        vision_config={**tower, "image_size": 8, "patch_size": 4, "projection_dim": 8},
        projection_dim=8,
    )
    clip, encoder_decoder = smile(tf.CLIPModel(config), skip=()), t5()
    encoder_decoder.lm_head = smile(nn.Sequential(nn.Linear(16, 50)))[0]
    inputs = {"input_ids": tokens(2, 5)}
    cases = (
        (clip, {**inputs, "pixel_values": torch.randn(2, 3, 8, 8)}, "logits_per_image"),
        (encoder_decoder, {**inputs, "decoder_input_ids": tokens(2, 4)}, "logits"),
    )
    for model, arguments, output in cases:
        names = [name for name in smile_layers(model) if name.endswith(("projection", "lm_head"))]
        assert names
        with torch.no_grad(), routing_override(model, 2):
            close(model(**arguments)[output], dense(model, {2: 1.0})(**arguments)[output])
        with pytest.raises(ValueError, match=r"^model: \S+ belongs to none of its parts"):
            routing_override(model, [2, None]).__enter__()
        assert all(layer.router_policy is None for layer in smile_layers(model).values())
        set_routing(model, RoutingPolicy(num_experts_per_tok=3, top_p=0.5))
        with watch_routing(model), Calls(model) as calls, torch.no_grad():
            model(**arguments)
        for layer, x, y in calls:
            rows = route(x, layer.vh, num_experts_per_tok=3, rank_of_router=layer.rank_of_router)
            close(y, layer(x, routing=keep_top_p(*rows, 0.5)))
    with torch.no_grad(), routing_override(clip, 1):  # a projection that is called without the model
        text = clip.get_text_features(**inputs)
        text = text if isinstance(text, torch.Tensor) else text.pooler_output
        want = dense(clip, {1: 1.0}).get_text_features(**inputs)
        close(text, want if isinstance(want, torch.Tensor) else want.pooler_output)
