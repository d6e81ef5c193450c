"""The implementations a benchmark sets side by side, each built on the same tensors."""

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..functional import smile_linear
from ..ops import library
from ..testing import Problem

BASELINE = "F.linear"

# x [T, D] -> y [T, O], and the parameters a training step would need the gradients of.
Built = tuple[Callable[[Tensor], Tensor], list[Tensor]]


class CannotRunError(Exception):
    """Why a peer cannot run a case here."""


@dataclass(frozen=True)
class Peer:
    """One implementation.

    Attributes:
        build: (problem, weights [T, m], ids [T, m]) -> callable and parameters; raises CannotRunError with the reason.
            The routing is given for free to peers that have no router of their own.
        waits_for_host: it reads device values on the host, so a CUDA graph cannot capture it.
    """

    build: Callable[[Problem, Tensor, Tensor], Built]
    waits_for_host: bool = False


def _parameters(problem: Problem) -> list[Tensor]:
    return [t for name, t in problem.tensors().items() if name != "x"]


def _linear(problem: Problem, weights: Tensor, ids: Tensor) -> Built:
    weight, bias = problem.weight, problem.bias
    return lambda x: F.linear(x, weight, bias), [weight] if bias is None else [weight, bias]


def why_not(backend: str, device: str, *layer: Any) -> str | None:
    """Why a backend cannot be timed on a device, with `layer` as for `library.why_not`; None if it can."""
    if backend == "triton" and device == "cpu":
        return "on a CPU it runs in Triton's interpreter, whose times are meaningless"
    return library.why_not(backend, device, *layer)


def _smile(backend: str, problem: Problem, weights: Tensor, ids: Tensor) -> Built:
    x, n = problem.x, problem.s.shape[0]
    if reason := why_not(backend, x.device.type, x.dtype, n, x.requires_grad):
        raise CannotRunError(reason)
    layer = functools.partial(
        smile_linear,
        num_experts_per_tok=problem.num_experts_per_tok,
        rank_of_router=problem.rank_of_router,
        backend=backend,
    )
    return lambda x: layer(x, *problem.arguments()[1:]), _parameters(problem)


def plain(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    vh: Tensor,
    s: Tensor,
    u_rows: Tensor,
    expert_bias: Tensor | None,
    num_experts_per_tok: int,
    rank_of_router: int,
) -> Tensor:
    """A SMILE layer in the fewest torch operators: every expert in one product, those not selected weigh 0.

    x [T, D] -> y [T, O]; u_rows [N * r, O] is u with its ranks as rows, the rest as in `functional.smile_linear`.
    """
    n, r = s.shape
    h = F.linear(x, vh.flatten(0, 1)).unflatten(1, (n, -1))
    scores = torch.linalg.vector_norm(h[..., :rank_of_router].float(), dim=-1)
    p, ids = scores.softmax(-1).topk(num_experts_per_tok)
    w = torch.zeros_like(scores).scatter(1, ids, p / p.sum(-1, keepdim=True))
    z = (h[..., :r] * (w[..., None] * s)).to(x.dtype).flatten(1)
    y = torch.addmm(F.linear(x, weight, bias), z, u_rows)
    return y if expert_bias is None else torch.addmm(y, w.to(x.dtype), expert_bias)


def _plain(compiled: bool, problem: Problem, weights: Tensor, ids: Tensor) -> Built:
    u_rows = problem.u.mT.flatten(0, 1).contiguous()
    arguments = (problem.weight, problem.bias, problem.vh, problem.s, u_rows, problem.expert_bias)
    layer = plain
    if compiled:
        torch.compiler.reset()
        layer = torch.compile(plain, fullgraph=True, dynamic=False)
    m, g = problem.num_experts_per_tok, problem.rank_of_router
    return lambda x: layer(x, *arguments, m, g), [t for t in arguments if t is not None]


def expert_loop(problem: Problem, weights: Tensor, ids: Tensor) -> Built:
    """The algorithm of fusion_bench's `SmileLinear`, for machines without it: a loop over the experts.

    For every expert the host waits for the tokens that chose it; they are gathered and their products added to y.
    """
    n, m = problem.s.shape[0], problem.num_experts_per_tok
    rows = problem.rows().flatten(0, 1)
    biases = [None] * n if problem.expert_bias is None else list(problem.expert_bias)
    experts = [(_svh(problem, i), problem.u[i], biases[i]) for i in range(n)]

    def layer(x: Tensor) -> Tensor:
        base = F.linear(x, problem.weight, problem.bias)
        scores = F.linear(x, rows).unflatten(1, (n, -1)).norm(dim=2)
        best, chosen = scores.softmax(1).topk(m)
        best = best / best.sum(1, keepdim=True)
        members = F.one_hot(chosen, n).permute(2, 0, 1)
        total = torch.zeros_like(base)
        for i, (svh, u, bias) in enumerate(experts):
            tokens, slots = members[i].nonzero(as_tuple=True)
            if not len(tokens):
                continue
            delta = F.linear(F.linear(x[tokens], svh), u, bias) * best[tokens, slots, None]
            total.index_add_(0, tokens, delta)
        return base + total

    parameters = [t for expert in experts for t in expert if t is not None]
    return layer, [t for t in (problem.weight, problem.bias, rows, *parameters) if t is not None]


def _fusion_bench(problem: Problem, weights: Tensor, ids: Tensor) -> Built:
    try:
        from fusion_bench.models.smile_moe.linear_from_hf_config import SmileLinear
    except ImportError as error:
        raise CannotRunError(f"fusion_bench is not installed ({error})") from error
    n, r = problem.s.shape
    out_features, in_features = problem.weight.shape
    config: Any = SimpleNamespace(
        num_local_experts=n,
        rank_of_expert=r,
        rank_of_router=problem.rank_of_router,
        num_experts_per_tok=problem.num_experts_per_tok,
    )
    layer = SmileLinear(config, in_features, out_features, bias=problem.bias is not None, device="meta")
    tensors = {"gate.weight": problem.rows().flatten(0, 1), "shared_linear.weight": problem.weight}
    if problem.bias is not None:
        tensors["shared_linear.bias"] = problem.bias
    for i in range(n):
        tensors[f"experts.{i}.u"] = problem.u[i]
        tensors[f"experts.{i}.svh"] = _svh(problem, i)
        if problem.expert_bias is not None:
            tensors[f"experts.{i}.bias"] = problem.expert_bias[i]
    layer.load_state_dict(tensors, assign=True)
    return layer, list(layer.parameters())


def _svh(problem: Problem, i: int) -> Tensor:
    """diag(s) vh of one expert, as implementations without singular values hold it."""
    return (problem.s[i, :, None] * problem.vh[i, : problem.s.shape[1]]).to(problem.x.dtype)


def _peft(problem: Problem, weights: Tensor, ids: Tensor) -> Built:
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise CannotRunError(f"peft is not installed ({error})") from error
    if problem.num_experts_per_tok > 1:
        raise CannotRunError("one adapter per sample; this case has several experts per token")
    n, r = problem.s.shape
    out_features, in_features = problem.weight.shape
    with_bias = problem.expert_bias is not None
    model = nn.Sequential(nn.Linear(in_features, out_features, bias=problem.bias is not None, device="meta"))
    config = LoraConfig(r=r, lora_alpha=r, lora_bias=with_bias, target_modules=["0"])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        for i in range(n):
            inject_adapter_in_model(config, model, adapter_name=str(i))
    tensors = {"base_layer.weight": problem.weight}
    if problem.bias is not None:
        tensors["base_layer.bias"] = problem.bias
    for i in range(n):
        tensors[f"lora_A.{i}.weight"] = _svh(problem, i)
        tensors[f"lora_B.{i}.weight"] = problem.u[i]
        if problem.expert_bias is not None:
            tensors[f"lora_B.{i}.bias"] = problem.expert_bias[i]
    layer = model[0]
    layer.load_state_dict(tensors, assign=True)
    layer.requires_grad_(True)
    names = [str(i) for i in ids[:, 0].tolist()]
    return lambda x: layer(x, adapter_names=names), list(layer.parameters())


def _check_vllm(problem: Problem) -> None:
    """vLLM's kernels are Triton for 16-bit inference, without an expert bias."""
    if problem.x.device.type != "cuda":
        raise CannotRunError("vLLM's LoRA kernels need a CUDA GPU")
    if problem.x.dtype == torch.float32:
        raise CannotRunError("vLLM's LoRA kernels take bfloat16 and float16 only")
    if problem.expert_bias is not None:
        raise CannotRunError("vLLM's LoRA kernels have no expert bias")


def _vllm_lora(problem: Problem, weights: Tensor, ids: Tensor) -> Built:
    _check_vllm(problem)
    try:
        from vllm.lora.ops.triton_ops import LoRAKernelMeta, lora_expand, lora_shrink
    except ImportError as error:
        raise CannotRunError(f"vllm is not installed ({error})") from error
    if problem.num_experts_per_tok > 1:
        raise CannotRunError("one adapter per token; this case has several experts per token")
    n, r = problem.s.shape
    tokens = problem.x.shape[0]
    a, b = torch.stack([_svh(problem, i) for i in range(n)]), problem.u
    meta = LoRAKernelMeta.make(n, tokens, problem.x.device)
    meta.prepare_tensors(ids[:, 0].int())
    arguments = meta.meta_args(tokens, False)
    h = torch.empty(1, tokens, r, dtype=torch.float32, device=problem.x.device)

    def layer(x: Tensor) -> Tensor:
        y = F.linear(x, problem.weight, problem.bias)
        lora_shrink(x, [a], h, *arguments, 1.0)
        lora_expand(h, [b], y, *arguments, offset_start=0, add_inputs=True)
        return y

    return layer, []


def _vllm_moe_lora(problem: Problem, weights: Tensor, ids: Tensor) -> Built:
    _check_vllm(problem)
    try:
        from vllm.lora.ops.triton_ops import fused_moe_lora
        from vllm.lora.ops.triton_ops.utils import get_lora_op_configs
    except ImportError as error:
        raise CannotRunError(f"vllm is not installed ({error})") from error
    n, r = problem.s.shape
    tokens, m = ids.shape
    device, (out_features, in_features) = problem.x.device, problem.weight.shape
    a = torch.stack([_svh(problem, i) for i in range(n)])[None]
    b = problem.u[None].contiguous()
    of_token = torch.zeros(tokens, dtype=torch.int32, device=device)
    enabled, one = torch.ones(2, dtype=torch.int32, device=device), torch.ones(1, dtype=torch.int32)
    tiles: dict[str, Any] = {}
    for half in ("shrink", "expand"):
        chosen = get_lora_op_configs(
            f"fused_moe_lora_w13_{half}",
            max_loras=1,
            batch=tokens,
            hidden_size=in_features,
            rank=r,
            num_slices=1,
            moe_intermediate_size=out_features,
        )
        tiles |= {f"{half}_{name.replace('block_', 'block_size_')}": value for name, value in chosen.items()}
    pairs = ids.flatten()
    sorted_ids, experts, padded = None, pairs, None
    if 8 * pairs.numel() > n:  # where vLLM sorts
        sorted_ids, experts = _blocks_of_one_expert(pairs, n, tiles["shrink_block_size_m"])
        padded = torch.tensor([sorted_ids.shape[1]], dtype=torch.int32, device=device)

    def layer(x: Tensor) -> Tensor:
        y = F.linear(x, problem.weight, problem.bias)
        delta = y[:, None] if m == 1 else y.new_zeros(tokens, m, out_features)
        fused_moe_lora(
            output=delta,
            qcurr_hidden_states=x,
            lora_a_stacked=[a],
            lora_b_stacked=[b],
            topk_weights=weights,
            sorted_token_ids=sorted_ids,
            expert_ids=experts,
            num_tokens_post_padded=padded,
            token_lora_mapping=of_token,
            max_lora_rank=r,
            top_k_num=m,
            lora_ids=of_token[:1],
            num_active_loras=one,
            adapter_enabled=enabled,
            **tiles,
        )
        return y if m == 1 else torch.baddbmm(y[:, None], weights[:, None].to(y.dtype), delta)[:, 0]

    return layer, []


def _blocks_of_one_expert(pairs: Tensor, experts: int, size: int) -> tuple[Tensor, Tensor]:
    """Expert ids [P] -> indices into them, sorted by expert [1, B * size], filled up with P; each block's expert."""
    numbers = [torch.nonzero(pairs == i)[:, 0] for i in range(experts)]
    filled = [F.pad(of, (0, -len(of) % size), value=len(pairs)) for of in numbers]
    ids = [torch.full((len(of) // size,), i, device=pairs.device) for i, of in enumerate(filled)]
    return torch.cat(filled)[None].int(), torch.cat(ids)[None].int()


# The baseline, our backends, then everyone else.
PEERS: dict[str, Peer] = {
    BASELINE: Peer(_linear),
    **{f"smile:{backend}": Peer(functools.partial(_smile, backend)) for backend in ("triton", "cuda", "cpu", "torch")},
    "fusion_bench": Peer(_fusion_bench, waits_for_host=True),
    "expert loop": Peer(expert_loop, waits_for_host=True),
    "plain": Peer(functools.partial(_plain, False)),
    "torch.compile": Peer(functools.partial(_plain, True)),
    "peft": Peer(_peft, waits_for_host=True),
    "vllm.lora": Peer(_vllm_lora),
    "vllm.moe_lora": Peer(_vllm_moe_lora),
}
