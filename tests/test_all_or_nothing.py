"""Functions that change a model in place: after an exception at any point the model is unchanged."""

import copy
import functools
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import smile_kernels as sk
from smile_kernels.integrations.quantization import split_base
from smile_kernels.nn import smile_layers
from tests.integrations.test_fusion_bench import theirs

TINY = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "pad_token_id": 0, "bos_token_id": 1,
}  # fmt: skip
RANKS = {"rank_of_expert": 3, "rank_of_router": 2, "progress": False}
POINTS = 30
PACKAGE = str(Path(sk.__file__).parent)


def llama() -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(**TINY))


def fused() -> nn.Module:
    return sk.upscale(llama(), [llama(), llama()], **RANKS)[0]


def state(model: nn.Module) -> tuple[Any, ...]:
    """The state that a call may change."""
    modules = {name: (id(module), type(module), module.training) for name, module in model.named_modules()}
    hooks = [(len(module._forward_pre_hooks), len(module._forward_hooks)) for module in model.modules()]
    layers = smile_layers(model)
    counts = [(layer.num_experts_per_tok, layer.router_policy) for layer in layers.values()]
    config = copy.deepcopy(model.config.to_dict()) if hasattr(model, "config") else None
    tensors = {name: (id(t), t.detach().clone()) for name, t in model.state_dict(keep_vars=True).items()}
    return tensors, modules, hooks, counts, sk.get_routing(model) if layers else None, config


def same(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    tensors, others = one[0], other[0]
    alike = tensors.keys() == others.keys() and all(
        tensors[name][0] == others[name][0] and torch.equal(tensors[name][1], others[name][1]) for name in tensors
    )
    return alike and one[1:] == other[1:]


class Interrupted(BaseException):
    pass


def calls_made(call: Callable[[], object], failing: int | None = None) -> tuple[int, bool]:
    """The number of package functions in a call, and whether it fails; function number `failing` raises instead."""
    count = 0

    def trace(frame: Any, event: str, argument: object) -> None:
        nonlocal count
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            count += 1
            if count == failing:
                raise Interrupted

    sys.settrace(trace)
    try:
        call()
    except Interrupted:
        return count, True
    finally:
        sys.settrace(None)
    return count, False


def upscaled(model: nn.Module, experts: int, **options: Any) -> None:
    torch.manual_seed(2)
    sk.upscale(model, [llama() for _ in range(experts)], inplace=True, **options, **RANKS)


def loaded(model: nn.Module, folder: Path) -> None:
    if not folder.exists():
        source = fused()
        sk.set_routing(source, sk.RoutingPolicy("causal"))
        sk.save_pretrained(source, folder)
    sk.load_pretrained(folder, model)


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module, Path], object]]] = {
    "upscale": (llama, lambda model, _: upscaled(model, 2, routing=sk.RoutingPolicy("sequence"))),
    "upscale, average, calibrated": (llama, lambda model, _: upscaled(model, 2, remaining="average", calibrate=True)),
    "upscale, one expert": (llama, lambda model, _: upscaled(model, 1)),
    "load_pretrained": (llama, loaded),
    "from_fusion_bench": (
        lambda: nn.Sequential(theirs("generic", 4, 2, 1), theirs("headed", 4, 2, 1)),
        lambda model, _: sk.from_fusion_bench(model),
    ),
    "split_base": (fused, lambda model, _: split_base(model)),
}


@pytest.mark.parametrize("name", CASES)
def test_a_failure_anywhere_leaves_the_model_as_it_was(tmp_path, name):
    make, call = CASES[name]
    model, folder, points = make(), tmp_path / "fused", 0
    call(copy.deepcopy(model), folder)
    total, _ = calls_made(lambda: call(copy.deepcopy(model), folder))
    before = state(model)
    for number in range(1, total, max(1, total // POINTS)):
        _, failed = calls_made(functools.partial(call, model, folder), number)
        if not failed:  # a discarded generator hides its exceptions
            model = make()
            before = state(model)
        elif number < 0.97 * total:  # a failure after the end of the work need not undo it
            assert same(state(model), before), f"changed by a failure at call {number} of {total}"
            points += 1
    print(f"{name}: {points} failures among {total} calls")
    assert points >= min(20, total // 2)


def test_a_model_reduced_to_a_zone_stays_as_it_was_if_a_copy_fails(monkeypatch):
    model, finetuned = llama(), llama()
    before, copies, copy_ = state(finetuned), itertools.count(), torch.Tensor.copy_

    def copied(self: torch.Tensor, *arguments: Any) -> torch.Tensor:
        if next(copies) == 5:
            raise Interrupted
        return copy_(self, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(torch.Tensor, "copy_", copied)
        with pytest.raises(Interrupted):
            sk.analysis.keep_zone(model, finetuned, "I")
    assert same(state(finetuned), before)


@pytest.mark.parametrize("block", range(2))
def test_a_model_that_fails_while_it_is_calibrated_stays_as_it_was(block):
    model = fused()
    sk.set_routing(model, sk.RoutingPolicy("sequence", num_experts_per_tok=2))
    before = {name: layer.router_prior for name, layer in smile_layers(model).items()}

    def fail(*_: object) -> None:
        raise Interrupted

    handle = model.model.layers[block].mlp.register_forward_pre_hook(fail)
    with pytest.raises(Interrupted):
        sk.calibrate(model)
    handle.remove()
    layers = smile_layers(model)
    assert {name: layer.router_prior for name, layer in layers.items()} == before
    assert sk.get_routing(model) == sk.RoutingPolicy("sequence", num_experts_per_tok=2)
    assert {layer.num_experts_per_tok for layer in layers.values()} == {2}
    assert model(input_ids=torch.tensor([[1, 2, 3]])).logits.isfinite().all()


@pytest.mark.parametrize(
    "policy", [sk.RoutingPolicy(num_experts_per_tok=3), sk.RoutingPolicy("prompt", calibrated=True)]
)
def test_a_policy_that_does_not_fit_changes_nothing(policy):
    model = fused()
    sk.set_routing(model, sk.RoutingPolicy("causal", num_experts_per_tok=2))
    before = state(model)
    with pytest.raises(sk.SmileError):
        sk.set_routing(model, policy)
    assert same(state(model), before)
