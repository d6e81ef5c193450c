"""Bad calls: a wrong value for each argument of each public call raises an error that names it, before any work."""

import copy
import functools
import itertools
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

import smile_kernels as sk
from smile_kernels import analysis, functional
from smile_kernels.inspection import describe
from smile_kernels.integrations.distributed import replicate_singular_values
from smile_kernels.integrations.fusion_bench import convert_state_dict
from smile_kernels.integrations.peft import is_adapter
from smile_kernels.integrations.quantization import split_base
from smile_kernels.svd import decompose_linear, truncated_svd
from smile_kernels.sweeping import Sweep
from smile_kernels.testing import Problem
from smile_kernels.upscaling import UpscaleReport
from tests.fuzzing import fuzzed, outcome

T, D, O, N, R, G, M = 5, 12, 10, 3, 4, 2, 2


def wrong_tensors(tensor: Tensor) -> list[Any]:
    """Values that may be passed instead of a tensor and must be refused."""
    other = torch.float64 if tensor.dtype != torch.float64 else torch.float32
    wrong = [
        "x", 3, [1.0], tensor.to("meta"), tensor.to(torch.complex64), tensor.to(torch.int64), tensor.bool(),
        tensor.to(other), tensor.to_sparse(), tensor.to(torch.float8_e4m3fn), tensor[..., :-1], tensor[..., :0],
        torch.cat([tensor, tensor], -1),
    ]  # fmt: skip
    if tensor.dim() > 1:
        wrong += [tensor[0], tensor[None], tensor.mT if tensor.shape[-1] != tensor.shape[-2] else tensor[:1]]
    return wrong


def wrong_numbers() -> list[Any]:
    return [0, -1, 10**6, 1.5, "2", None, True, torch.nan]


def linear_cases() -> list[tuple[str, Callable[[], object], str]]:
    problem = Problem.random(T, D, O, N, R, G, M, bias=True, expert_bias=True, dtype=torch.float32)
    names = ("x", "weight", "bias", "vh", "s", "u", "expert_bias")
    tensors = dict(zip(names, problem.arguments()[: len(names)]))
    numbers = {"num_experts_per_tok": M, "rank_of_router": G}
    routing = (torch.ones(T, M), torch.zeros(T, M, dtype=torch.int64))
    cases: list[tuple[str, Callable[[], object], str]] = []

    def add(function: Callable, valid: dict[str, Any], argument: str, value: Any, named: str | None = None) -> None:
        call = {**valid, argument: value}
        cases.append((f"{function.__name__}({argument}={_brief(value)})", lambda: function(**call), named or argument))

    for name, tensor in tensors.items():
        for value in wrong_tensors(tensor) + ([None] if "bias" not in name else []):
            if not (
                name == "x" and isinstance(value, Tensor) and value.shape[-1:] == (D,) and value.dtype == tensor.dtype
            ):
                add(functional.smile_linear, tensors | numbers, name, value)
        if name in ("weight", "vh", "s", "u"):
            add(functional.smile_linear, tensors | numbers | {"routing": routing}, name, tensor[..., :-1])
    for name in numbers:
        for value in wrong_numbers():
            add(functional.smile_linear, tensors | numbers, name, value)
            add(functional.route, {"x": tensors["x"], "vh": tensors["vh"]} | numbers, name, value)
    for name in ("x", "vh"):
        for value in wrong_tensors(tensors[name]):
            if not (
                name == "x" and isinstance(value, Tensor) and value.shape[-1:] == (D,) and value.dtype == torch.float32
            ):
                add(functional.route, {"x": tensors["x"], "vh": tensors["vh"]} | numbers, name, value)
    nested = torch.nested.nested_tensor([torch.ones(2)])
    for name in tensors:
        add(functional.smile_linear, tensors | numbers, name, nested)
    for name in ("x", "vh"):
        add(functional.route, {"x": tensors["x"], "vh": tensors["vh"]} | numbers, name, nested)
    for value in (nested, torch.eye(N).to_sparse(), torch.ones(T, N, dtype=torch.int64)):
        add(functional.select_experts, {"num_experts_per_tok": M}, "scores", value)
    ids = routing[1]
    for value in (
        ids.float(),
        ids.bool(),
        ids.to(torch.complex64),
        ids[:-1],
        ids[0],
        None,
        "x",
    ):
        add(functional.smile_linear, tensors | numbers, "routing", (routing[0], value))
    for value in (ids + N, ids - 2, ids + 2**32):
        add(functional.smile_linear, tensors | numbers, "routing", (routing[0], value), "ids")
    for value in (routing[0][:, :1], routing[0].to("meta"), None):
        add(functional.smile_linear, tensors | numbers, "routing", (value, ids))
    for value in (torch.ones(T, N - 1), torch.ones(N), "x"):
        add(functional.smile_linear, tensors | numbers, "routing_weights", value)
    for value in ("tritn", "", 3, ["cpu"]):
        add(functional.smile_linear, tensors | numbers, "backend", value)
        add(functional.route, {"x": tensors["x"], "vh": tensors["vh"]} | numbers, "backend", value)
    factors = {name: tensors[name] for name in ("x", "vh", "s", "u")} | {"y": torch.zeros(T, O)}
    for value in (torch.tensor(1.0), torch.ones(1), tensors["vh"][0], tensors["vh"][None]):
        add(functional.smile_delta, factors | numbers, "vh", value, "vh: has shape")
    return cases


def module_cases() -> list[tuple[str, Callable[[], object], str]]:
    base, tuned = nn.Linear(D, O), [nn.Linear(D, O) for _ in range(N)]
    model, models = nn.Sequential(base), [nn.Sequential(layer) for layer in tuned]
    ranks = {"rank_of_expert": R, "rank_of_router": G}
    cases: list[tuple[str, Callable[[], object], str]] = []

    def add(label: str, call: Callable[[], object], named: str) -> None:
        cases.append((label, call, named))

    for name in (*ranks, "num_experts_per_tok"):
        for value in (0, -2, 10**6, "2", None, True, float("nan"), 1.5, -0.5):
            options = {**ranks, name: value}
            add(
                f"from_linears({name}={value!r})", lambda o=options: sk.SmileLinear.from_linears(base, tuned, **o), name
            )
            add(f"upscale({name}={value!r})", lambda o=options: sk.upscale(model, models, progress=False, **o), name)
    for value in (0, -1, "8", None, 1.5, 2**62, 10**30):
        for name in ("in_features", "out_features", "num_local_experts"):
            sizes = {"in_features": D, "out_features": O, "num_local_experts": N, **ranks, name: value}
            add(f"SmileLinear({name}={value!r})", lambda s=sizes: sk.SmileLinear(**s), name)
        for name in (*ranks, "num_experts_per_tok"):
            sizes = {"in_features": D, "out_features": O, "num_local_experts": N, **ranks, name: value}
            add(f"SmileLinear({name}={value!r})", lambda s=sizes: sk.SmileLinear(**s), name)
    cases += layer_cases(base, tuned[0], ranks)
    other = nn.Sequential(nn.Linear(D, O + 1))
    half = copy.deepcopy(model).half()
    broken = copy.deepcopy(model)
    broken[0].weight.data[0, 0] = torch.nan
    for label, value in (
        ("empty", []),
        ("shape", [other]),
        ("dtype", [half]),
        ("nan", [broken]),
        ("string", "x"),
        ("int", [3]),
    ):
        add(f"upscale(finetuned={label})", lambda v=value: sk.upscale(model, v, progress=False, **ranks), "finetuned")
    for name, value in (
        ("include", "*"), ("include", ["nothing"]), ("include", [3]), ("exclude", "*.q"), ("exclude", ["*"]),
        ("remaining", "mean"), ("remaining", None),
    ):  # fmt: skip
        options = {name: value}
        add(
            f"upscale({name}={value!r})",
            lambda o=options: sk.upscale(model, models, progress=False, **ranks, **o),
            name,
        )
    for name, value in (
        ("scope", "tokens"), ("scope", None), ("accumulate", 1), ("lock_after", 0), ("lock_after", "3"),
        ("lock_after", 3), ("num_experts_per_tok", 0), ("num_experts_per_tok", 1.5), ("half_life", -1),
        ("half_life", "x"), ("half_life", 10**400), ("restart_at", 3), ("restart_at", "x"), ("restart_at", []),
        ("restart_at", torch.ones(2)), ("restart_at", [-1]), ("scope", torch.ones(2)),
    ):  # fmt: skip
        add(f"RoutingPolicy({name}={value!r})", lambda n=name, v=value: sk.RoutingPolicy(**{n: v}), name)
    fused, _ = sk.upscale(model, models, progress=False, **ranks)
    add(
        "set_routing(m above N)",
        lambda: sk.set_routing(fused, sk.RoutingPolicy(num_experts_per_tok=N + 1)),
        "num_experts",
    )
    add("set_routing(no layers)", lambda: sk.set_routing(model, sk.RoutingPolicy()), "model")
    for tokens in ([0], [-1], [4, 0]):
        add(f"warmup(tokens={tokens})", lambda t=tokens: sk.warmup(fused, t), "tokens")
    for value in (0, -1, "x", None, 1.5):
        add(
            f"save_pretrained(max_shard_size={value!r})",
            lambda v=value: sk.save_pretrained(fused, "no-such-folder", max_shard_size=v),
            "max_shard_size",
        )
    for label, odd in (("scripted", torch.jit.script(base)), ("lazy", nn.LazyLinear(O))):
        for name, call in (("model", (nn.Sequential(odd), models)), ("finetuned", (model, [nn.Sequential(odd)]))):
            add(f"upscale({name}={label})", lambda c=call: sk.upscale(*c, progress=False, **ranks), name)
    for value in ([[0]], {0}, object(), {0: 10**400}, {0: 1e39}, torch.ones(N, device="meta"), {0: torch.nan}):
        add(f"routing_override({_brief(value)})", lambda v=value: sk.routing_override(fused, v), "expert")
    nested = torch.nested.nested_tensor([torch.ones(N)])
    add("routing_override(nested)", lambda: sk.routing_override(fused, nested), "expert: is a nested tensor")
    add("UpscaleReport.load(null)", lambda: UpscaleReport.load("a\0b"), "null character")
    add("replicate_singular_values(5)", lambda: replicate_singular_values(5, None), "model")
    matrix, ours = torch.rand(O, D), {"a.shared_linear.weight": torch.rand(O, D), "a.gate.weight": torch.rand(3, D)}
    odd = (matrix.to_sparse(), torch.nested.nested_tensor([matrix]), matrix.to("meta"))
    for i, value in enumerate(odd):
        add(f"analyze_layer(weight={i})", lambda v=value: analysis.analyze_layer("a", v, [matrix]), "weight: is")
        add(f"analyze_layer(changes={i})", lambda v=value: analysis.analyze_layer("a", matrix, [v]), "changes[0]: is")
        add(f"truncated_svd({i})", lambda v=value: truncated_svd(v, 2), "a: is")
        state = {**ours, "a.experts.0.svh": torch.rand(2, D), "a.experts.0.u": value}
        add(f"convert_state_dict({i})", lambda s=state: convert_state_dict(s), "experts.0.u")
    for value in (None, {1: matrix}, {**ours, "a.experts.0.svh": 5, "a.experts.0.u": 5}):
        add(f"convert_state_dict({_brief(value)})", lambda v=value: convert_state_dict(v), "state_dict")
    failing = SimpleNamespace(chat_template="x", apply_chat_template=lambda *_, **__: 1 / 0)
    add("user_turn_ids(a template that raises)", lambda: sk.user_turn_ids(failing), "chat_template: fails (ZeroDiv")
    generated = random_inputs(fused)
    for value in (10**13, 10**30):
        add(f"calibrate(sequences={value})", lambda v=value: sk.calibrate(generated, sequences=v), "sequences")
    kept = {"routing": sk.RoutingPolicy(top_p=0.5), "progress": False, **ranks}
    add("upscale(top_p)", lambda: sk.upscale(model, models, **kept), "top_p: is 0.5 with")
    for value in (None, 5, object()):
        add(f"user_turn_ids({value!r})", lambda v=value: sk.user_turn_ids(v), "tokenizer")
        add(f"recommended({value!r})", lambda v=value: sk.RoutingPolicy.recommended(v), "model")
    for value in (5, "x", [], [-1], [3.5], torch.tensor(3), torch.tensor([1, 2]), {1, 2}, {"input_ids": [1]}, [[1, 2]]):
        add(f"recommended(restart_at={value!r})", lambda v=value: sk.RoutingPolicy.recommended(fused, v), "restart_at")
    large = copy.deepcopy(model).half()
    large[0].weight.data.fill_(6e4)
    norm = {"rank_of_expert": R, "router": "norm", "progress": False}
    add("upscale(router='norm', large)", lambda: sk.upscale(copy.deepcopy(model).half(), [large], **norm), "router")
    add("save_pretrained(meta)", lambda: sk.save_pretrained(copy.deepcopy(fused).to("meta"), "no"), "meta")
    adapters = ({"x": 1}, {1: 2}, {"0": models[0]})
    for value in adapters:
        add(
            f"upscale(finetuned=[{value!r}])",
            lambda v=value: sk.upscale(model, [v], progress=False, **ranks),
            "finetuned",
        )
        add(f"add_expert({value!r})", lambda v=value: sk.add_expert(fused, v), "expert")
        add(f"replace_expert({value!r})", lambda v=value: sk.replace_expert(fused, 0, v), "expert")
    for value in ("a\0b", "\udcff", ""):
        add(f"save_pretrained(base={value!r})", lambda v=value: sk.save_pretrained(fused, "no", base=v), "base")
    for value in ({"x": 1}, {1: torch.ones(T, D)}, {"input": model}, {"input": torch.ones(T, D, device="meta")}):
        add(f"verify(inputs={value})", lambda v=value: sk.verify(fused, model, models, inputs=v), "inputs")
    add("calibrate(wrong inputs)", lambda: sk.calibrate(fused, [{"input": torch.ones(T, D + 1)}]), "inputs")
    abroad = copy.deepcopy(model).to("meta")
    add("verify(base=a fused model)", lambda: sk.verify(fused, fused, models), "base: has a SMILE layer")
    add(
        "verify(finetuned=a fused model)",
        lambda: sk.verify(fused, model, [fused, *models[1:]]),
        "experts[0]: has a SMILE layer",
    )
    add("verify(base on meta)", lambda: sk.verify(fused, abroad, models), "meta")
    for value in (None, 3, "x", [model]):
        add(f"split_base({value!r})", lambda v=value: split_base(v), "model")
    for value in (-1, 2**63, 2**70, "0", 0.5):
        add(f"calibrate(seed={value!r})", lambda v=value: sk.calibrate(fused, seed=v), "seed")
        add(f"verify(seed={value!r})", lambda v=value: sk.verify(fused, model, models, seed=v), "seed")
    files = {
        "path": (UpscaleReport([]).save, UpscaleReport.load, analysis.Analysis([], 1, 1.0).save, Sweep([]).save),
        "file": (analysis.Analysis([], 1, 1.0).plot, Sweep([]).plot),
        "directory": (is_adapter,),
    }
    for name, calls in files.items():
        for call, value in itertools.product(calls, (None, 3, b"x", ["x"])):
            add(f"{call.__qualname__}({name}={value!r})", lambda c=call, v=value: c(v), name)
    for value in ("a\0", "a\ud800"):
        for call in (*files["path"], *files["file"], functools.partial(sk.save_pretrained, fused)):
            add(f"{call!r:.40}({value!r})", lambda c=call, v=value: c(v), "path")
    for value in (model, large.state_dict(), [list(range(1000))] * 1000):
        add(
            "SmileLinear(rank_of_expert=a large object)",
            lambda v=value: sk.SmileLinear(D, O, N, v, G),
            "rank_of_expert",
        )
    for name, value in (("sequences", 0), ("sequences", -1), ("length", 0)):
        add(f"calibrate({name}={value})", lambda n=name, v=value: sk.calibrate(fused, **{n: v}), name)
    return cases


def random_inputs(fused: nn.Module) -> nn.Module:
    """The model as one whose inputs can be generated."""
    model = copy.deepcopy(fused)
    model.config, model.main_input_name = SimpleNamespace(vocab_size=9), "input_ids"
    return model


def layer_cases(base: nn.Linear, tuned: nn.Linear, ranks: dict[str, int]) -> list[tuple[str, Callable, str]]:
    """Wrong options, factors and linear layers for the constructors of a layer."""
    cases: list[tuple[str, Callable[[], object], str]] = []
    flags, ones = ("bias", "expert_bias", "router", "router_prior"), torch.ones(O)
    options = {
        "dtype": ["float32", np.float32, float, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn, ones],
        "device": ["gpu", "cuda:99", -1, 5.5, ones],
        "parts": [5, iter([O]), "ab", [], {}, [O + 1], ones],
        "rank_of_parts": [[R], 5],
        **{flag: [ones, "no", None, 1] for flag in flags},
    }
    for name, values in options.items():
        for value in values:
            call = functools.partial(sk.SmileLinear, D, O, N, R, G, **{name: value})
            cases.append((f"SmileLinear({name}={_brief(value)})", call, f"{name}: "))
    factors, _ = decompose_linear(base.weight, base.bias, [tuned.weight] * N, [tuned.bias] * N, **ranks)
    given = {"weight": base.weight, "bias": base.bias, "factors": factors, "rank_of_router": G}
    own = {"router": torch.ones(N, G, D), "router_prior": torch.ones(N), "x": None, **factors}
    for name, tensor in own.items():
        wrong = [ones] if tensor is None else wrong_tensors(tensor)
        wrong = [one for one in wrong if getattr(one, "dtype", None) != torch.float64]  # which is cast
        for value in [*wrong, *([None] if name in ("vh", "s", "u") else [])]:
            call = functools.partial(sk.SmileLinear.from_factors, **{**given, "factors": {**factors, name: value}})
            named = "factors['" if name == "u" else f"factors['{name}']: "  # r is that of u
            cases.append((f"from_factors({name}={_brief(value)})", call, named))
    for name, value in (("factors", None), ("factors", {}), ("weight", None), ("weight", ones), ("bias", "x")):
        call = functools.partial(sk.SmileLinear.from_factors, **{**given, name: value})
        cases.append((f"from_factors({name}={_brief(value)})", call, name))
    nans, bias = nn.Linear(D, O), nn.Linear(D, O)
    nans.weight.data[0, 0] = bias.bias.data[0] = torch.nan
    large = nn.Linear(D, O, bias=False)
    large.weight.data.fill_(3e38)
    layers = [
        nn.Linear(D, O, device="meta"), nn.LazyLinear(O), sk.SmileLinear(D, O, N, R, G), nans, bias,
        nn.Linear(D, O).to(torch.float8_e4m3fn), nn.Linear(0, O),
    ]  # fmt: skip
    for layer in layers:
        for name, call in (("base", (layer, [tuned])), ("finetuned[1]", (base, [tuned, layer]))):
            call = functools.partial(sk.SmileLinear.from_linears, *call, **ranks)
            cases.append((f"from_linears({name}={_brief(layer)})", call, name + (".bias" if layer is bias else "")))
    for label, first, layer in (("half", base, nn.Linear(D, O).half()), ("inf", copy.deepcopy(large), large)):
        first.weight.data.mul_(-1)
        call = functools.partial(sk.SmileLinear.from_linears, first, [layer], **ranks)
        cases.append((f"from_linears(finetuned[0]={label})", call, "finetuned[0]: "))
    return cases


def _brief(value: Any) -> str:
    if isinstance(value, Tensor) and not value.is_nested:
        return f"{value.dtype} {list(value.shape)} {value.device}"
    return repr(value)[:40]


def test_every_bad_call_names_its_argument():
    cases = linear_cases() + module_cases()
    faults = []
    for label, call, named in cases:
        try:
            call()
        except (ValueError, TypeError, RuntimeError, OSError) as error:
            if len(str(error)) > 1000 or "\n" in str(error).strip():
                faults.append(f"{label}: is not one line: {str(error)[:150]}")
            subject = str(error).split(":")[0].split("[")[0]
            if named in ("weight", "vh") and subject in ("x", "bias", "vh", "u", "weight", "rank_of_router"):
                continue  # two shapes that do not match: either may be named
            if named not in str(error) and named != "backend":
                faults.append(f"{label}: names no {named}: {type(error).__name__}: {str(error)[:150]}")
            elif not isinstance(error, (ValueError, OSError)) and named not in ("backend", "ids"):
                faults.append(f"{label}: {error!r}"[:200])
        except Exception as error:
            faults.append(f"{label}: {error!r}"[:200])
        else:
            faults.append(f"{label}: was taken")
    print(f"{len(cases)} bad calls")
    assert not faults, f"{len(faults)} of {len(cases)}:\n" + "\n".join(faults)
    assert len(cases) >= 300


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_the_valid_call_is_taken(backend):
    problem = Problem.random(T, D, O, N, R, G, M, bias=True, expert_bias=True, dtype=torch.float32)
    y = functional.smile_linear(*problem.arguments()[:7], num_experts_per_tok=M, rank_of_router=G, backend=backend)
    assert y.shape == (T, O)


@pytest.mark.parametrize(
    "value", ["a" * 10**6, nn.Sequential(nn.Linear(3, 3)), "two\nlines"], ids=["long", "model", "lines"]
)
def test_a_message_is_one_line_whatever_the_value(value):
    model = nn.Sequential(sk.SmileLinear(D, O, N, R, G))
    for call in (lambda: sk.routing_override(model, value), lambda: sk.RoutingPolicy(top_p=value)):
        with pytest.raises(sk.SmileError) as raised:
            call()
        assert "\n" not in str(raised.value)
        assert len(str(raised.value)) < 4000
        assert "expected" in str(raised.value)


class Odd:
    """An object that no argument accepts."""


ODD: list[Any] = [
    None, True, -1, 0, 1.5, torch.nan, 10**6, "x", "", b"x", [], [None], (1,), {}, {"x": 1}, Odd(), print,
    torch.ones(3), torch.ones(2, 3, 4), torch.empty(0), torch.zeros((), device="meta"), nn.Linear(3, 3), nn.Identity(),
    sk.RoutingPolicy("causal"), torch.float32,
]  # fmt: skip


def entered(manager: Callable[..., Any]) -> Callable[..., object]:
    """A context manager as a function that opens and closes it."""

    def call(**arguments: Any) -> None:
        with manager(**arguments):
            pass

    return call


def write_folders(model: nn.Module, tuned: nn.Module, fused: nn.Module) -> None:
    """The checkpoints base, expert and fused in the current folder."""
    for name, one in (("base", model), ("expert", tuned)):
        Path(name).mkdir()
        save_file(one.state_dict(), f"{name}/model.safetensors")
    sk.save_pretrained(fused, "fused")


def valid_calls() -> dict[str, tuple[Callable[..., object], dict[str, Any]]]:
    """Public functions with arguments that they take; their files are in the current folder."""
    problem = Problem.random(T, D, O, N, R, G, M, bias=True, expert_bias=True, dtype=torch.float32)
    names = ("x", "weight", "bias", "vh", "s", "u", "expert_bias")
    tensors = dict(zip(names, problem.arguments()[: len(names)]))
    numbers = {"num_experts_per_tok": M, "rank_of_router": G}
    routing = (torch.ones(T, M), torch.zeros(T, M, dtype=torch.int32))
    base, tuned = nn.Linear(D, O), [nn.Linear(D, O) for _ in range(N)]
    model, models = nn.Sequential(base), [nn.Sequential(layer) for layer in tuned]
    ranks = {"rank_of_expert": R, "rank_of_router": G}
    fused, _ = sk.upscale(model, models, progress=False, **ranks)
    scores = {"scores": torch.rand(T, N), "num_experts_per_tok": M}
    sizes = {"in_features": D, "out_features": O, "num_local_experts": N, **ranks, "num_experts_per_tok": M}
    inputs = [{"input": torch.rand(T, D)}]
    of_one_part = {"vh": problem.vh[None], "s": problem.s[None], "parts": [O], "rank_of_parts": [R - 1]}
    of_parts = {**tensors, **numbers, **of_one_part}
    delta = {"y": torch.rand(T, O), **{name: t for name, t in tensors.items() if name not in ("weight", "bias")}}
    write_folders(model, models[0], fused)
    disk = {"base": "base", "experts": ["expert"], "include": ["*"], "exclude": [], "workers": 1}
    saved = {"model": fused, "folder": "saved", "base": None, "max_shard_size": "5GB", "force": True}
    names = {"embeddings_from": None, "routing": None, "experts_only": False, "max_shard_size": "5GB"}
    return {
        "smile_linear": (functional.smile_linear, tensors | numbers),
        "smile_linear, routed": (functional.smile_linear, tensors | numbers | {"routing": routing}),
        "smile_linear, of parts": (functional.smile_linear, of_parts),
        "smile_delta": (functional.smile_delta, delta | numbers),
        "smile_linear, weighted": (functional.smile_linear, tensors | numbers | {"routing_weights": torch.rand(T, N)}),
        "route": (functional.route, {"x": tensors["x"], "vh": tensors["vh"]} | numbers),
        "router_scores": (functional.router_scores, {"x": tensors["x"], "vh": tensors["vh"], "rank_of_router": G}),
        "select_experts": (functional.select_experts, scores),
        "SmileLinear": (sk.SmileLinear, sizes),
        "from_linears": (sk.SmileLinear.from_linears, {"base": base, "finetuned": tuned, **ranks}),
        "merge": (sk.SmileLinear.merge, {"layers": [sk.SmileLinear(**sizes), base]}),
        "upscale": (sk.upscale, {"model": model, "finetuned": models, "progress": False, "include": ["*"], **ranks}),
        "RoutingPolicy": (sk.RoutingPolicy, {"scope": "causal", "lock_after": None, "half_life": 2.0}),
        "set_routing": (sk.set_routing, {"model": fused, "policy": sk.RoutingPolicy()}),
        "get_routing": (sk.get_routing, {"model": fused}),
        "calibrate": (sk.calibrate, {"model": fused, "inputs": inputs, "seed": 0, "sequences": 32, "length": 40}),
        "verify": (sk.verify, {"model": fused, "finetuned": models, "inputs": inputs[0]}),
        "warmup": (sk.warmup, {"model": fused, "tokens": [1]}),
        "split_base": (split_base, {"model": fused}),
        "describe": (describe, {"folder": "fused"}),
        "save_pretrained": (sk.save_pretrained, saved),
        "load_pretrained": (sk.load_pretrained, {"folder": "fused", "model": nn.Sequential(nn.Linear(D, O))}),
        "analyze": (analysis.analyze, disk | {"rank_of_expert": R, "scale": 0.3}),
        "zone": (analysis.zone, {"weight": base.weight, "finetuned": tuned[0].weight, "name": "I+II"}),
        "analyze_layer": (analysis.analyze_layer, {"name": "a", "weight": base.weight, "changes": [tuned[0].weight]}),
        "keep_zone": (analysis.keep_zone, {"model": model, "finetuned": models[0], "name": "I", "include": ["*"]}),
        "sweep": (
            sk.sweep,
            {"model": fused, "score": lambda _: 0.0, "rank_of_expert": [1], "file": None},
        ),
        "upscale_checkpoints": (sk.upscale_checkpoints, disk | {"out": "out", "force": True} | ranks | names),
        "add_expert": (sk.add_expert, {"model": fused, "expert": models[0], "name": None}),
        "replace_expert": (sk.replace_expert, {"model": fused, "old": 0, "expert": "expert", "name": None}),
        "remove_expert": (sk.remove_expert, {"model": fused, "old": 0}),
        "routing_override": (entered(sk.routing_override), {"model": fused, "expert": {0: 0.5}}),
        "watch_routing": (entered(sk.watch_routing), {"model": fused}),
    }


@fuzzed(150, 3000)
def test_fuzzed_calls(examples, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    calls, outcomes = valid_calls(), Counter[str]()
    for name, (function, arguments) in calls.items():
        assert outcome(functools.partial(function, **arguments)) == "success", name

    @examples
    @given(st.data())
    def check(data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(calls)), "call")
        function, arguments = calls[name]
        changed = dict(arguments)
        for argument in data.draw(st.lists(st.sampled_from(sorted(arguments)), min_size=1, max_size=2), "arguments"):
            value = arguments[argument]
            odd = ODD + (wrong_tensors(value) if isinstance(value, Tensor) else [])
            if argument == "score":  # what a scoring function raises is not ours
                odd = [value for value in odd if not callable(value)]
            changed[argument] = odd[data.draw(st.integers(0, len(odd) - 1), argument)]
        result = outcome(lambda: function(**changed))
        outcomes[result] += 1
        assert not result.startswith("fault"), f"{name}: {result}"

    check()
    print(f"{sum(outcomes.values())} fuzzed calls: {dict(outcomes)}")
    assert outcomes["SmileError"] > sum(outcomes.values()) / 2


@pytest.mark.parametrize("scope", [None, "token", "causal", "sequence"])
@torch.no_grad()
def test_a_layer_in_inference_refuses_what_does_not_fit(scope):
    """The operators of inference check their arguments themselves; nothing is computed from a tensor without values."""
    layer = sk.SmileLinear(D, O, N, R, G, M, router=True)
    model = nn.Sequential(layer)
    if scope is not None:
        sk.set_routing(model, sk.RoutingPolicy(scope, accumulate=True))
    x, counted = torch.randn(2, 3, D), 0
    for wrong in (x.to("meta"), x.double(), x.int(), x[..., :-1], x.to_sparse(), torch.tensor(1.0), "x"):
        with pytest.raises(ValueError, match=r"^x: |^weight: is on|^vh: is on"):
            model(wrong)
        counted += 1
    for name, parameter in list(layer.named_parameters()):
        for wrong in (parameter.to("meta"), parameter.half(), parameter[..., :-1]):
            if scope and name == "router" and wrong.dtype == torch.float16:
                continue  # a policy computes in the router's dtype
            layer._parameters[name] = nn.Parameter(wrong)
            with pytest.raises(ValueError, match=r"^(x|weight|bias|vh|s|u|expert_bias|router): "):
                model(x)
            counted += 1
        layer._parameters[name] = parameter
    assert counted == (27 if scope else 28)
    model(x)
