"""Run by test_distributed.py: sharded layers and models, compared with unsharded ones in one process.

    python -m tests.integrations.distributed_worker PROCESSES...

The processes are forks of one that has imported everything, since imports take longer than the tests.
"""

import copy
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import parallelize_module

from smile_kernels import SmileLinear
from smile_kernels.integrations.distributed import (
    ColwiseSmile,
    RowwiseSmile,
    replicate_singular_values,
    tensor_parallel_plan,
)
from smile_kernels.nn import smile_layers
from smile_kernels.upscaling import verify
from tests.integrations.tiny_models import build, fine_tuned, fuse, inputs


def full(t: torch.Tensor) -> torch.Tensor:
    return t.full_tensor() if isinstance(t, DTensor) else t


def layer(dtype=torch.float64, **options) -> SmileLinear:
    torch.manual_seed(0)
    made = SmileLinear(26, 21, 5, 4, 3, dtype=dtype, **options)
    with torch.no_grad():
        for p in made.parameters():
            p.mul_(3)
    return made


def compare_gradients(want: torch.nn.Module, got: torch.nn.Module, tolerance: float) -> None:
    for (name, p), q in zip(want.named_parameters(), got.parameters()):
        a, b = p.grad, None if q.grad is None else full(q.grad)
        if a is None:
            a = torch.zeros_like(p)
        torch.testing.assert_close(torch.zeros_like(p) if b is None else b, a, rtol=tolerance, atol=tolerance, msg=name)


def check_layers(mesh) -> None:
    """Odd widths, so that shards are uneven; outputs and gradients to float64 rounding."""
    for m in (1, 2):
        for router in (False, True):
            for style in (ColwiseSmile, RowwiseSmile):
                want = layer(num_experts_per_tok=m, router=router)
                got = copy.deepcopy(want)
                if style is ColwiseSmile:
                    plan = ColwiseSmile(output_layouts=Replicate())
                else:
                    plan = RowwiseSmile(input_layouts=Replicate())
                parallelize_module(got, mesh, plan)
                x = torch.randn(2, 9, 26, dtype=torch.float64)
                x1, x2 = x.clone().requires_grad_(), x.clone().requires_grad_()
                y1, y2 = want(x1), got(x2)
                torch.testing.assert_close(y2, y1, rtol=1e-10, atol=1e-10)
                dy = torch.randn_like(y1)
                y1.backward(dy)
                y2.backward(dy)
                torch.testing.assert_close(x2.grad, x1.grad, rtol=1e-10, atol=1e-10)
                compare_gradients(want, got, 1e-10)


def check_pair(mesh) -> None:
    """A column layer before a row layer, with the hidden width split unevenly and never gathered."""
    torch.manual_seed(1)
    want = torch.nn.Sequential(
        SmileLinear(12, 22, 3, 4, 2, 2, dtype=torch.float64),
        torch.nn.GELU(),
        SmileLinear(22, 10, 3, 4, 2, 2, dtype=torch.float64),
    )
    got = parallelize_module(copy.deepcopy(want), mesh, {"0": ColwiseSmile(), "2": RowwiseSmile()})
    x = torch.randn(7, 12, dtype=torch.float64)
    y1, y2 = want(x), got(x)
    torch.testing.assert_close(y2, y1, rtol=1e-10, atol=1e-10)
    y1.square().sum().backward()
    y2.square().sum().backward()
    compare_gradients(want, got, 1e-10)
    torch.testing.assert_close(torch.compile(got, backend="aot_eager")(x), y1, rtol=1e-10, atol=1e-10)


def check_model(mesh, architecture: str) -> None:
    """A transformers model with its own plan: logits, gradients and greedy tokens."""
    base = build(architecture)
    experts = [fine_tuned(base, seed) for seed in (1, 2, 3)]
    want = fuse(base, experts, num_experts_per_tok=2)
    assert {verdict.verdict for verdict in verify(want, base, experts)} == {"exact"}
    want = want.double()
    got = copy.deepcopy(want)
    plan = tensor_parallel_plan(got)
    assert set(smile_layers(got)) < set(plan)
    parallelize_module(got, mesh, plan)
    ids = inputs(want)["input_ids"]
    for model in (want, got):
        model(input_ids=ids, labels=ids).loss.backward()
    torch.testing.assert_close(got(ids).logits, want(ids).logits, rtol=1e-8, atol=1e-8)
    compare_gradients(want, got, 1e-8)
    options = {"min_new_tokens": 4, "max_new_tokens": 4, "do_sample": False}
    assert torch.equal(got.generate(ids, **options), want.generate(ids, **options))


def check_fully_sharded(mesh, policy: MixedPrecisionPolicy | None) -> None:
    """FSDP2 with a unit per decoder layer: two optimizer steps, one batch row per rank, and all rows in one process.

    All experts are used, so that rounding cannot change the choice.
    """
    base = build("LlamaForCausalLM")
    want = fuse(base, [fine_tuned(base, seed) for seed in (1, 2, 3)], num_experts_per_tok=3)
    want = want.double() if policy is None else want
    got = copy.deepcopy(want)
    options = {"mesh": mesh}
    if policy is not None:
        options |= {"mp_policy": policy, "ignored_params": replicate_singular_values(got, mesh)}
    for block in got.model.layers:
        fully_shard(block, **options)
    fully_shard(got, **options)
    torch.manual_seed(2)
    ids = torch.randint(3, 96, (mesh.size(), 8))
    plain = copy.deepcopy(want)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (want, got)]
    for _ in range(2):
        for model, batch, optimizer in zip((want, got), (ids, ids[mesh.get_local_rank()][None]), optimizers):
            optimizer.zero_grad()
            model(input_ids=batch, labels=batch).loss.backward()
            optimizer.step()
        low = copy.deepcopy(plain).float().to(torch.bfloat16)
        low(input_ids=ids, labels=ids).loss.backward()
        with torch.no_grad():
            for p, q in zip(plain.parameters(), low.parameters()):
                p -= 0.1 * q.grad
    for (name, p), q, r in zip(want.named_parameters(), got.parameters(), plain.parameters()):
        if policy is None:
            torch.testing.assert_close(full(q), p, rtol=1e-9, atol=1e-9, msg=name)
        else:
            # bfloat16 arithmetic: at most twice the error of the same steps in one process.
            error, allowed = (full(q) - p).norm(), 2 * (r - p).norm() + 1e-5
            assert error <= allowed, f"{name}: off by {error:.2e}, allowed {allowed:.2e}"
        if name.endswith(".s"):
            assert q.dtype == p.dtype
            everyone = [torch.empty_like(full(q)) for _ in range(mesh.size())]
            dist.all_gather(everyone, full(q).detach())
            assert all(torch.equal(other, everyone[0]) for other in everyone)


def check_two_dimensions() -> None:
    """Tensor parallel inside, FSDP2 outside."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    torch.manual_seed(3)
    want = torch.nn.Sequential(
        SmileLinear(12, 22, 3, 4, 2, 2, dtype=torch.float64), SmileLinear(22, 10, 3, 4, 2, 2, dtype=torch.float64)
    )
    got = parallelize_module(copy.deepcopy(want), mesh["tp"], {"0": ColwiseSmile(), "1": RowwiseSmile()})
    fully_shard(got, mesh=mesh["dp"])
    x = torch.randn(6, 12, dtype=torch.float64)
    want(x).square().mean().backward()
    half = x.chunk(2)[mesh["dp"].get_local_rank()]
    got(half).square().mean().backward()
    compare_gradients(want, got, 1e-10)


def check_operators(mesh) -> None:
    """The operators on DTensors: tokens split, outputs split, and autograd through both."""
    want = layer(num_experts_per_tok=2)
    x = torch.randn(2 * mesh.size() + 1, 26, dtype=torch.float64)
    dy = torch.randn(x.shape[0], 21, dtype=torch.float64)
    want(x).backward(dy)
    for tokens, outputs in ((Shard(0), Replicate()), (Replicate(), Shard(0)), (Replicate(), Replicate())):
        got = copy.deepcopy(want)
        got.zero_grad()
        for name, p in got.named_parameters():
            columns = Shard(1) if name in ("u", "expert_bias") else outputs
            split = outputs.is_shard() and name in ("weight", "bias", "u", "expert_bias")
            placement = columns if split else Replicate()
            got.register_parameter(name, torch.nn.Parameter(distribute_tensor(p.detach(), mesh, [placement])))
        y = got(distribute_tensor(x, mesh, [tokens]))
        assert y.placements == ((Shard(1),) if outputs.is_shard() else (tokens,))
        torch.testing.assert_close(full(y), want(x), rtol=1e-10, atol=1e-10)
        y.backward(distribute_tensor(dy, mesh, y.placements))
        compare_gradients(want, got, 1e-10)
        with torch.no_grad():
            torch.testing.assert_close(full(got(distribute_tensor(x, mesh, [tokens]))), want(x), rtol=1e-10, atol=1e-10)
        frozen = [p.requires_grad_(name == "s") for name, p in got.named_parameters()]
        got.zero_grad()
        got(distribute_tensor(x, mesh, [tokens])).backward(distribute_tensor(dy, mesh, y.placements))
        torch.testing.assert_close(full(got.s.grad), want.s.grad, rtol=1e-10, atol=1e-10)
        assert all(p.grad is None for p in frozen if p is not got.s)


def main(rank: int, processes: int, store: Path) -> None:
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=processes)
    torch.set_num_threads(1)
    mesh = init_device_mesh("cpu", (processes,))
    check_operators(mesh)
    check_layers(mesh)
    check_pair(mesh)
    check_fully_sharded(mesh, None)
    check_fully_sharded(mesh, MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
    if processes == 2:
        check_model(mesh, "MistralForCausalLM")
        check_model(mesh, "Qwen2ForCausalLM")
    else:
        check_two_dimensions()
    dist.destroy_process_group()


if __name__ == "__main__":
    model = build("LlamaForCausalLM")
    ids = inputs(model)["input_ids"]
    model(ids, labels=ids).loss.backward()  # imports modules that are imported at first use
    torch.compile(model.lm_head, backend="aot_eager")(torch.randn(2, model.config.hidden_size))
    for processes in map(int, sys.argv[1:]):
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.start_processes(
                main, (processes, Path(folder) / "store"), nprocs=processes, start_method="fork"
            )
