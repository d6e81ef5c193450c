"""The state of a routing policy: recomputation, compilation, threads, models in models, copies."""

import copy
import io
import pickle
import subprocess
import sys
import threading
import time

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from smile_kernels import SmileLinear
from smile_kernels.nn import smile_layers
from smile_kernels.routing import RoutingPolicy, calibrate, get_routing, set_routing
from smile_kernels.routing.state import _stack_of
from tests.routing.definition import (
    POLICIES,
    Calls,
    G,
    N,
    R,
    assert_follows,
    bert,
    by_name,
    definition,
    llama,
    logits,
    tokens,
)


@pytest.mark.parametrize("reentrant", [False, True], ids=["saved tensors", "reentrant"])
@by_name({name: POLICIES[name] for name in ("sequence+layers, m 2", "causal+layers, lock 1, m 2")})
def test_gradient_checkpointing_sees_the_same_routing(policy, reentrant):
    model = llama().double()  # only another routing changes a gradient by that much
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
        sum(losses).backward()  # two passes are pending
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


@by_name({name: POLICIES[name] for name in ("sequence+layers, lock 1", "causal+layers")})
def test_compiles_without_graph_breaks(policy):
    model = bert(num_hidden_layers=1)
    set_routing(model, policy)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch, length in ((2, 5), (3, 7)):
        ids, mask = tokens(batch, length), torch.ones(batch, length).tril(2)
        got = logits(compiled, input_ids=ids, attention_mask=mask)
        torch.testing.assert_close(got, logits(model, input_ids=ids, attention_mask=mask), rtol=1e-4, atol=1e-5)


@by_name({name: POLICIES[name] for name in ("sequence+layers", "causal+layers, lock 1, m 2")})
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
    """The latest call for a part applies there; layers set back to the published routing have no state and no hooks."""
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
    set_routing(model.inner, POLICIES["causal+layers"])  # two: the outer pass remains pending during the inner one
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


def test_policies_switch_between_passes_never_within_one():
    """Passes of other threads use one policy from the first to the last layer, while another thread sets new ones."""
    model, ids = bert(), tokens(2, 5)
    policies = [RoutingPolicy(), POLICIES["sequence+layers"], POLICIES["causal"], POLICIES["layers"]]
    wanted = []
    for policy in policies:
        set_routing(model, policy)
        wanted.append(logits(model, input_ids=ids))
    set_routing(model, RoutingPolicy())
    stop, results, barrier = threading.Event(), [], threading.Barrier(4)

    def work():
        barrier.wait()
        while not stop.is_set():
            results.append(logits(model, input_ids=ids))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    barrier.wait()
    end, number = time.monotonic() + 60, 0
    while len(results) < 100 and time.monotonic() < end and all(thread.is_alive() for thread in threads):
        set_routing(model, policies[number % 4])
        time.sleep(0.001 * (number % 3))
        number += 1
    alive = all(thread.is_alive() for thread in threads)
    stop.set()
    for thread in threads:
        thread.join()
    strange = [y for y in results if not any(torch.equal(y, want) for want in wanted)]
    assert alive, "a pass has failed"
    assert len(results) >= 100
    assert not strange, f"{len(strange)} of {len(results)} passes follow no policy"


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (RoutingPolicy(), RoutingPolicy(num_experts_per_tok=2)),
        (RoutingPolicy(num_experts_per_tok=3), RoutingPolicy()),
        (RoutingPolicy(num_experts_per_tok=2), POLICIES["sequence"]),
        (POLICIES["sequence"], RoutingPolicy(num_experts_per_tok=2)),
        (POLICIES["sequence"], POLICIES["sequence+layers, m 2"]),
        (POLICIES["causal+layers, lock 1, m 2"], RoutingPolicy()),
    ],
)
def test_a_pass_under_way_keeps_its_policy_and_its_number_of_experts(first, second):
    model, ids = bert().double(), tokens(2, 5)
    set_routing(model, second)
    after = logits(model, input_ids=ids)
    set_routing(model, first)
    before = logits(model, input_ids=ids)
    assert not torch.allclose(before, after, rtol=1e-3)

    stopped, go, results = threading.Event(), threading.Event(), []

    def wait(*_):
        stopped.set()
        assert go.wait(60)

    handle = model.encoder.layer[1].register_forward_pre_hook(wait)
    thread = threading.Thread(target=lambda: results.append(logits(model, input_ids=ids)))
    thread.start()
    assert stopped.wait(60)
    set_routing(model, second)
    handle.remove()
    assert get_routing(model) == second
    torch.testing.assert_close(logits(model, input_ids=ids), after)  # a pass that begins while the other is pending
    set_routing(model, first)
    set_routing(model, second)
    go.set()
    thread.join()
    torch.testing.assert_close(results[0], before)
    torch.testing.assert_close(logits(model, input_ids=ids), after)
    set_routing(model, RoutingPolicy())
    assert not model._forward_pre_hooks
    assert all(layer.router_policy is None for layer in smile_layers(model).values())


def test_a_pass_under_way_keeps_its_layers_from_another_root():
    model, ids = bert(), tokens(2, 5)
    set_routing(model.encoder, POLICIES["causal"])
    seen = []

    def switch(*_):
        with pytest.raises(ValueError, match="a forward pass of BertEncoder is running"):
            set_routing(model, POLICIES["layers"])
        seen.append(get_routing(model))

    handle = model.encoder.layer[1].register_forward_pre_hook(switch)
    logits(model, input_ids=ids)
    handle.remove()
    assert seen == [POLICIES["causal"]]
    set_routing(model, POLICIES["layers"])
    assert get_routing(model) == POLICIES["layers"]


def test_calibrating_keeps_the_number_of_experts():
    model = llama()
    set_routing(model, RoutingPolicy(num_experts_per_tok=2))
    calibrate(model, sequences=2, length=3)
    assert get_routing(model) == RoutingPolicy(num_experts_per_tok=2)
    assert {layer.num_experts_per_tok for layer in smile_layers(model).values()} == {2}


def test_the_stack_of_a_thread_that_runs_generators():
    """A frame of a generator that yielded meanwhile leads to freed memory, so a stack is taken in one step."""
    stop = threading.Event()

    def inner():
        yield from range(3)

    def work():
        while not stop.is_set():
            [*inner()]

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    end, stacks = time.monotonic() + 1, 0
    try:
        while time.monotonic() < end:
            for thread in threads:
                names = [frame.f_code.co_name for frame in _stack_of(thread.ident)]
                assert names[-3:] == ["run", "_bootstrap_inner", "_bootstrap"]
                assert set(names[:-3]) <= {"inner", "work", "is_set", "<listcomp>"}
                stacks += 1
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert stacks > 20
    assert _stack_of(-1) == []


def test_stacks_are_read_while_garbage_has_thread_locals():
    """Python 3.11 would wait for a lock that it holds; the process would hang."""
    code = """
import gc, threading
from smile_kernels.routing.state import _stack_of
class Cycle: pass
gc.set_threshold(1)
for _ in range(300):
    cycle = Cycle()
    cycle.itself, cycle.local = cycle, threading.local()
    cycle.local.value = 1
    del cycle
    assert _stack_of(threading.get_ident())
assert gc.isenabled()
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
