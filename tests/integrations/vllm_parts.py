"""The parts of the vLLM plugin, without an engine: `make test-vllm`."""

import copy
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from vllm import SamplingParams
from vllm.config import CompilationConfig, CUDAGraphMode, VllmConfig
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine.output_processor import OutputProcessor
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.request import Request
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from smile_kernels import RoutingPolicy
from smile_kernels.config import SmileConfig, SmileModuleConfig
from smile_kernels.integrations.vllm import kv_sums, passes, reports, requests, routing, votes
from smile_kernels.integrations.vllm.linear import SmileLinearMethod, SmileQuantizationConfig
from smile_kernels.integrations.vllm.routing import RememberedRouting
from smile_kernels.integrations.vllm.votes import PromptRouting
from smile_kernels.ops import library

from .vllm_served import PER_REQUEST


@pytest.mark.parametrize("policy", [None, RoutingPolicy(accumulate=True)], ids=["published", "layers"])
@pytest.mark.parametrize("names", [("o",), ("q", "k", "v")], ids=["one", "merged"])
@torch.no_grad()
def test_a_layer_takes_what_the_requests_of_a_pass_ask_for(names, policy):
    """Three requests of 2, 1 and 3 tokens and padding at the end; the router chooses for the second one."""
    p, n, r, o, d = len(names), 3, 4, 6, 10
    routing = policy and remembered(policy, 16, p)
    asking = requests.RequestedExperts(n, ("math", "code", "chat"))
    entry = SmileModuleConfig(r, 2, expert_bias=True)
    method = SmileLinearMethod(dict.fromkeys(names, entry), n, 2, routing, asking)
    method.rows, method.first, layer = [o] * p, 0, nn.Module()
    shapes = {"weight": (p * o, d), "vh": (p, n, r, d), "s": (p, n, r), "u": (n, p * o, r), "expert_bias": (n, p * o)}
    for name, shape in shapes.items():
        layer.register_parameter(name, nn.Parameter(torch.randn(shape), requires_grad=False))
    weight, factors = (
        layer.weight.clone(),
        [layer.vh.clone(), layer.s.clone(), layer.u.clone(), layer.expert_bias.clone()],
    )
    method.process_weights_after_loading(layer)
    x, want = torch.randn(8, d), []
    own = method.compute(layer, x, None)
    asked = [asking.check(expert) for expert in ({"code": 0.5, 0: 0.25, 2: 2.0}, [0.0, 0.0, 1.0])]
    asking.begin([asked[0], None, asked[1]], np.array([2, 1, 3]), x.device)
    got = method.compute(layer, x, None)
    for weights in ({1: 0.5, 0: 0.25, 2: 2.0}, {2: 1.0}):
        y = x @ weight.T
        for i, w in weights.items():
            vh, s, u, bias = factors
            parts = [(x @ vh[j, i].T * s[j, i]) @ u[i, j * o : (j + 1) * o].T for j in range(p)]
            y = y + w * (torch.cat(parts, -1) + bias[i])
        want.append(y)
    want = torch.cat([want[0][:2], own[2:3], want[1][3:6], own[6:]])
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    asking.begin([None, None], np.array([5, 3]), x.device)
    torch.testing.assert_close(method.compute(layer, x, None), own)
    asking.begin([asked[1], None], np.array([5, 1]), x.device)
    with pytest.raises(RuntimeError, match="a SMILE layer has 5 tokens in a pass of 6; expected as many"):
        method.compute(layer, x[:5], None)


def test_engines_whose_requests_cannot_choose_say_why():
    config = SimpleNamespace(
        use_v2_model_runner=False,
        model_config=SimpleNamespace(is_multimodal_model=False, is_encoder_decoder=False),
        parallel_config=SimpleNamespace(use_ubatching=False, prefill_context_parallel_size=1),
        compilation_config=SimpleNamespace(cudagraph_mode=CUDAGraphMode.NONE),
        **PER_REQUEST,
    )
    assert requests.why_not(config) is None
    request = SimpleNamespace(sampling_params=SamplingParams(extra_args={"expert": 1}), cache_salt="mine")
    vllm_config().admit(request, config)
    assert request.cache_salt == "mine|expert=[(1, 1.0)]"
    config.compilation_config.cudagraph_mode = CUDAGraphMode.PIECEWISE
    assert "--enforce-eager" in requests.why_not(config)
    config.use_v2_model_runner = True
    assert "V2 model runner" in requests.why_not(config)


@torch.no_grad()
def test_a_compiled_layer_reads_what_the_runner_says_of_each_pass(monkeypatch):
    """The graph of one pass runs for the next, with other selections, and then for one without any."""
    asking, (n, r, o, d) = requests.RequestedExperts(2, ("math", "code")), (2, 3, 5, 7)
    method = SmileLinearMethod({"o": SmileModuleConfig(r, 2)}, n, 1, None, asking)
    method.rows, layer = [o], nn.Module()
    shapes = {"weight": (o, d), "vh": (1, n, r, d), "s": (1, n, r), "u": (n, o, r)}
    for name, shape in shapes.items():
        layer.register_parameter(name, nn.Parameter(torch.randn(shape), requires_grad=False))
    method.process_weights_after_loading(layer)
    layer.quant_method = method
    context = SimpleNamespace(no_compile_layers={"o": layer})
    monkeypatch.setattr(requests, "get_forward_context", lambda: context)
    graphs = []

    def record(graph, inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled, x = torch.compile(method.apply, fullgraph=True, backend=record), torch.randn(4, d)
    torch._dynamo.mark_dynamic(x, 0)

    def execute(self, tokens):
        assert GPUModelRunner._prepare_inputs(self, None, np.array(tokens)) == "prepared"
        return compiled(layer, x)

    monkeypatch.setattr(GPUModelRunner, "_prepare_inputs", lambda self, output, tokens: "prepared")
    monkeypatch.setattr(GPUModelRunner, "execute_model", execute)
    passes.follow_passes()
    passes.follow_passes()  # once more changes nothing
    smile = SmileQuantizationConfig(SmileConfig(2, 1, r, 2, {}))
    smile.requests = asking
    runner = SimpleNamespace(
        vllm_config=SimpleNamespace(quant_config=smile),
        input_batch=SimpleNamespace(req_ids=["b", "a"]),
        device=x.device,
    )

    def run(a, b):
        params = {name: SamplingParams(extra_args=e and {"expert": e}) for name, e in (("a", a), ("b", b))}
        runner.requests = {name: SimpleNamespace(sampling_params=each) for name, each in params.items()}
        return GPUModelRunner.execute_model(runner, [3, 1])  # "b" comes first in the batch, with 3 tokens

    own = run(None, None)
    experts = [x @ layer.weight.T + (x @ layer.vh[0, i].T * layer.s[0, i]) @ layer.u[i].T for i in range(n)]
    torch.testing.assert_close(run([[1, 1.0]], [[0, 1.0]]), torch.cat([experts[0][:3], experts[1][3:]]))
    torch.testing.assert_close(run([[0, 1.0]], None), torch.cat([own[:3], experts[0][3:]]))
    torch.testing.assert_close(run(None, None), own)
    assert asking.rows is None
    assert len(graphs) == 1


def vllm_config(**options) -> QuantizationConfig:
    modules = {"lm_head": SmileModuleConfig(4, 2)}
    return SmileQuantizationConfig.from_config(SmileConfig(3, 1, 4, 2, modules, **options).to_dict())


def test_routing_by_whole_sequences_is_refused():
    with pytest.raises(
        NotImplementedError, match=r"scope: is 'sequence'.* expected scope 'prompt', 'causal' or 'token'"
    ):
        vllm_config(routing=RoutingPolicy("sequence"))


def remembered(policy: RoutingPolicy, tokens: int, routers: int) -> RememberedRouting:
    """A policy's state without an engine, with 3 experts of which 2 are chosen, and poisoned buffers."""
    routing = RememberedRouting(policy, 3, 2)
    if policy.scope == "causal":
        routing.cache = kv_sums.SumsCache("smile_routing.1", lambda: 3 * routers, None)
    routing.cache_name, routing.names = "smile_routing.1", [f"layers.{i}.mlp" for i in range(routers)]
    routing.evidence, routing.weights = torch.full((tokens, 3), torch.nan), torch.full((tokens, 2), torch.nan)
    routing.ids = torch.full((tokens, 2), -1, dtype=torch.int32)
    return routing


@pytest.mark.parametrize(
    ("parts", "policy", "op"),
    [
        (1, None, "smile_kernels.linear"),
        (3, None, "smile_kernels.delta_"),
        (3, RoutingPolicy("causal", accumulate=True, lock_after=2, calibrated=True), "smile_kernels.delta_"),
    ],
    ids=["one", "merged", "causal"],
)
@torch.no_grad()
def test_a_layer_is_one_graph_that_calls_our_kernels(parts, policy, op, monkeypatch):
    """Traced as by vLLM, for any number of tokens: reads on the host or data-dependent shapes would raise."""
    monkeypatch.setattr(library, "choose_backend", lambda *_: "triton")  # as on a GPU
    routing = policy and remembered(policy, 16, parts)
    entry = SmileModuleConfig(4, 2, expert_bias=True)
    method = SmileLinearMethod({f"part{i}": entry for i in range(parts)}, 3, 2, routing)
    method.first, method.rows, layer, graphs = 0, [64] if parts == 1 else [40, 16, 8], nn.Module(), []
    shapes = {"weight": (64, 32), "vh": (parts, 3, 4, 32), "u": (3, 64, 4), "expert_bias": (3, 64)}
    layer.__dict__ |= {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    layer.__dict__ |= {"s": torch.zeros(parts, 3, 4), "router": None, "router_prior": torch.zeros(parts, 3)}
    method._find_router(layer)

    def record(graph, inputs):
        graphs.append(graph.graph)
        (outputs,) = graph.graph.output_node().args
        return lambda *_: [torch.empty(0)] * len(outputs)

    x = torch.empty(7, 32, dtype=torch.bfloat16)
    torch._dynamo.mark_dynamic(x, 0)
    torch._dynamo.reset()
    torch.compile(method.apply, fullgraph=True, backend=record)(layer, x)
    (graph,) = graphs
    assert not {"item", "tolist", "cpu", "nonzero"} & {node.target for node in graph.nodes}
    calls = [node for node in graph.nodes if str(node.target).startswith(("smile_kernels.", "vllm."))]
    names = [str(call.target).removesuffix(".default") for call in calls]
    assert names == (["vllm.smile_running_sums"] if policy else []) + [op]
    assert calls[-1].args[-1] == "triton"
    ((y,),) = graph.output_node().args
    y = y.meta["example_value"]
    assert isinstance(y.shape[0], torch.SymInt)
    assert y.shape[1] == 64


@pytest.mark.parametrize(("op", "given"), [("smile_running_sums", ["sums"]), ("smile_vote", ["weights", "ids"])])
def test_what_runs_between_cuda_graphs_writes_where_the_next_reads(op, given):
    """A new tensor would have another address in each pass, while a captured graph reads the address at capture."""
    schema = getattr(torch.ops.vllm, op).default._schema
    assert schema.returns == []
    assert [argument.name for argument in schema.arguments if argument.is_write] == given


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_sums_read_nothing_on_the_host(gamma, monkeypatch):
    """Operators between CUDA graphs, on tensors without values: three requests, two of them continued, and padding."""
    with FakeTensorMode():
        slots, blocks, lengths = (torch.empty(n, dtype=torch.int32) for n in (9, 6, 3))
        common = CommonAttentionMetadata(
            query_start_loc=torch.empty(4, dtype=torch.int32),
            query_start_loc_cpu=torch.empty(4, dtype=torch.int32),
            seq_lens=lengths,
            num_reqs=3,
            num_actual_tokens=8,
            max_query_len=5,
            max_seq_len=40,
            block_table_tensor=blocks.view(3, 2),
            slot_mapping=slots.long(),
        )
        spec = FullAttentionSpec(block_size=32, num_kv_heads=1, head_size=6, head_size_v=0, dtype=torch.float32)
        cache = kv_sums.SumsCache("sums", lambda: 6, (5,))
        cache.restarts = torch.empty(8, dtype=torch.bool)
        config = SimpleNamespace(compilation_config=SimpleNamespace(static_forward_context={"sums": cache}))
        metadata = kv_sums.SumsMetadataBuilder(spec, ["sums"], config, torch.device("cpu")).build(0, common)
        pages = torch.empty(5, 1, 32, 6)
        monkeypatch.setattr(kv_sums, "get_attention_context", lambda name: (metadata, None, pages, common.slot_mapping))
        kv_sums.smile_running_sums(torch.empty(9, 1, 3), torch.empty(9, 1, 3), 1, gamma, "smile_routing.1")


def test_requests_that_begin_on_blocks_of_the_same_pass():
    """Row 1 begins after two blocks that row 0 fills, row 2 after one of row 1's; rows 3 and 4 are independent."""
    table = np.array([[1, 2, 3, 0], [1, 2, 4, 5], [1, 2, 4, 6], [7, 8, 0, 0], [9, 10, 0, 0]], np.int32)
    computed, counts = np.array([0, 8, 12, 4, 6], np.int32), np.array([10, 8, 2, 3, 1], np.int32)
    assert kv_sums.longest_chain(table, 4, computed, counts) == 2
    assert kv_sums.longest_chain(table[3:], 4, computed[3:], counts[3:]) == 0


def test_tokens_that_complete_a_pattern_across_the_borders_of_passes():
    ids = np.array([[7, 8, 7, 8, 9], [8, 7, 8, 0, 0], [7, 0, 0, 0, 0]])
    computed, counts = np.array([1, 0, 0], np.int32), np.array([4, 3, 1], np.int32)
    found = kv_sums.complete((7, 8), ids, computed, counts)
    assert found.tolist() == [True, False, True, False, False, False, True, False]
    assert kv_sums.complete((8,), ids, computed, counts).tolist() == [1, 0, 1, 0, 1, 0, 1, 0]


def test_requests_wait_for_the_vote_on_their_prompt():
    """Two requests with one prompt share a vote; the choice is in their cache salts; withdrawn ones have none."""

    def request(name: str, prompt: list[int]) -> Request:
        salt = SamplingParams(max_tokens=4), None
        return Request(name, prompt, *salt, block_hasher=lambda one: [] if one.block_hashes else [one.cache_salt])

    pending, a, b, c = votes.Pending(2), request("a", [3, 4]), request("b", [3, 4]), request("c", [3, 5])
    vote, none, other = map(pending.begin, (a, b, c))
    assert none is None
    assert vote.prompt_token_ids == a.prompt_token_ids
    assert vote.block_hashes == ["|expert=vote"]
    assert (vote.max_tokens, vote.sampling_params.extra_args) == (1, {"expert": "vote"})
    assert pending.end(SimpleNamespace(request_id="a")) is None
    values = np.log(np.array([[0.25, 0.25, 0.75]]))
    values = np.append(values, [[-np.inf]], axis=1)
    logprobs = SimpleNamespace(logprob_token_ids=np.array([[2, 2, 0, 1]]), logprobs=values)
    assert pending.end(SimpleNamespace(request_id=vote.request_id, new_token_ids=[2], new_logprobs=logprobs)) == [a, b]
    for one in (a, b):
        assert one.sampling_params.extra_args["expert"] == [(0, pytest.approx(0.75)), (2, pytest.approx(0.25))]
        assert one.block_hashes == [one.cache_salt] != [None]
    assert pending.withdraw({"a"}) == ([], set())
    assert pending.withdraw({"c"}) == ([c], {other.request_id})
    assert not pending.prompts | pending.waiting


def test_outputs_carry_the_experts_of_their_requests(monkeypatch):
    """Those of requests that selected some, the largest weight first, with what a connector has put there."""
    monkeypatch.setattr(Scheduler, "update_from_output", lambda self, passed, outputs: outputs)
    reports.report_experts()
    asked = {"a": [(0, 0.25), (2, 0.75)], "b": [(0, 0.0)], "c": None, "d": votes.VOTE}
    params = {name: SimpleNamespace(extra_args=one and {"expert": one}) for name, one in asked.items()}
    outputs = [SimpleNamespace(request_id=name, kv_transfer_params=None) for name in (*asked, "gone")]
    outputs[1].kv_transfer_params = {"port": 1}
    for names, told in ((("x", "y", "z"), {"z": 0.75, "x": 0.25}), (None, {"2": 0.75, "0": 0.25})):
        config = SimpleNamespace(quant_config=vllm_config(expert_names=names), additional_config={})
        scheduler = SimpleNamespace(
            vllm_config=config,
            requests={name: SimpleNamespace(sampling_params=one) for name, one in params.items()},
        )
        passed = SimpleNamespace(num_scheduled_tokens=dict.fromkeys((*asked, "gone"), 1))
        each = copy.deepcopy(outputs)
        Scheduler.update_from_output(scheduler, passed, {0: SimpleNamespace(outputs=each)})
        assert each == outputs
        config.additional_config = {reports.FLAG: True}
        Scheduler.update_from_output(scheduler, passed, {0: SimpleNamespace(outputs=each)})
        assert list(each[0].kv_transfer_params["smile_experts"].items()) == list(told.items())
        assert each[1].kv_transfer_params == {"port": 1, "smile_experts": {}}
        assert [output.kv_transfer_params for output in each[2:]] == [None] * 3


def test_votes_take_the_place_of_logits():
    routing = PromptRouting(RoutingPolicy("prompt", num_experts_per_tok=3, top_p=0.8), 4, 3)
    routing.evidence = torch.tensor([[0.0] * 4, [0.1, 0.6, 0.1, 0.2], [0.5] * 4, [0.001, 0.002, 0.9, 0.097]]).log()
    logits = torch.randn(3, 7)
    assert routing.cast(logits) is logits
    routing.votes = torch.tensor([1, 3]), torch.tensor([0, 2])  # the first and the third request
    want = torch.full((3, 7), -torch.inf)
    want[0, [1, 3]], want[1], want[2, 2] = torch.tensor([0.75, 0.25]).log(), logits[1], 0.0
    torch.testing.assert_close(routing.cast(logits.clone()), want)


@torch.no_grad()
def test_layers_score_where_somebody_votes(monkeypatch):
    """A pass with only votes ends at the first layer after the voting blocks; the runner continues with any states."""
    routing, layers, x = PromptRouting(RoutingPolicy("prompt", lock_after=1), 3, 1), [], torch.randn(4, 6)
    routing.evidence, routing.weights = torch.full((8, 3), torch.nan), torch.ones(8, 1)
    routing.ids = torch.tensor([[2], [-1], [0], [1]] * 2, dtype=torch.int32)
    monkeypatch.setattr(votes, "get_forward_context", lambda: SimpleNamespace(attn_metadata={}))
    for i in range(3):
        method = SmileLinearMethod({f"layers.{i}.mlp": SmileModuleConfig(2, 1)}, 3, 1, routing)
        method.first, method.rows, layer = len(routing.names), [5], nn.Module()
        routing.names += method.names
        shapes = {"weight": (5, 6), "vh": (1, 3, 2, 6), "s": (1, 3, 2), "u": (3, 5, 2)}
        for name, shape in shapes.items():
            layer.register_parameter(name, nn.Parameter(torch.randn(shape), requires_grad=False))
        layers.append((method, layer))
    for method, layer in layers:
        method._find_router(layer)
    assert [method.votes for method, _ in layers] == [True, True, False]

    def run() -> None:
        for method, layer in layers:
            y = x @ layer.weight.T
            for t, i in ((0, 2), (2, 0), (3, 1)):
                y[t] += (x[t] @ layer.vh[0, i].T * layer.s[0, i]) @ layer.u[i].T
            torch.testing.assert_close(method.compute(layer, x, None), y)

    run()
    assert routing.evidence.isnan().all()
    routing.votes = torch.tensor([1]), torch.tensor([1])
    run()
    scores = (x @ layers[0][1].vh[0, :, 0].T).square()
    logs = (scores / scores.sum(-1, keepdim=True)).log()
    torch.testing.assert_close(routing.evidence[:4], logs - logs.amax(-1, keepdim=True))
    routing.only_votes = True
    with pytest.raises(votes.HasVoted):
        run()

    def forward(self, **inputs):
        raise votes.HasVoted

    monkeypatch.setattr(GPUModelRunner, "_model_forward", forward)
    monkeypatch.setattr(GPUModelRunner, "_sample", lambda self, logits, drafts: logits)
    votes.follow_votes()
    model = SimpleNamespace(get_hidden_size=lambda: 6, dtype=torch.bfloat16)
    smile = vllm_config(routing=routing.policy)
    smile.routing = routing
    runner = SimpleNamespace(model_config=model, device=x.device, vllm_config=SimpleNamespace(quant_config=smile))
    states = GPUModelRunner._model_forward(runner, positions=torch.arange(4))
    assert (states.shape, states.dtype) == ((4, 6), torch.bfloat16)
    assert not routing.only_votes


def test_what_cannot_vote_says_why():
    routing = PromptRouting(RoutingPolicy("prompt", restart_at=(5,)), 3, 1)
    config = SimpleNamespace(additional_config={})
    plain = {"resumable": False, "prompt_embeds": None}
    routing.admit(SimpleNamespace(**plain), None, config)
    routing.admit(SimpleNamespace(**{**plain, "resumable": True}), [(0, 1.0)], config)
    for given, asked, message in [
        ({"resumable": True}, None, "expert: is not given for a prompt in parts"),
        (
            {"prompt_embeds": torch.ones(2, 3)},
            None,
            r"expert: is not given for prompt_embeds, in which restart_at \[5\]",
        ),
        ({}, [(0, 0.5), (1, 0.5)], "expert: has 2 experts; expected at most 1, as many as"),
    ]:
        with pytest.raises(ValueError, match=message):
            routing.admit(SimpleNamespace(**{**plain, **given}), asked, config)
    routing.admit(SimpleNamespace(**plain), [(0, 0.5), (1, 0.5)], SimpleNamespace(**PER_REQUEST))


def test_engines_whose_prompts_cannot_vote_are_refused():
    sizes = ("pipeline_parallel_size", "decode_context_parallel_size", "prefill_context_parallel_size")
    parallel = dict.fromkeys(sizes, 1) | {"use_ubatching": False, "use_sequence_parallel_moe": False}
    model = {"runner_type": "generate", "is_multimodal_model": False, "is_encoder_decoder": False}
    parts = {
        "parallel_config": parallel,
        "model_config": model,
        "scheduler_config": {"async_scheduling": True, "get_scheduler_cls": lambda: Scheduler},
        "cache_config": {"kv_sharing_fast_prefill": False},
    }

    def refused(part: str = "model_config", **changed) -> list[str]:
        given = {
            name: SimpleNamespace(**{**values, **(changed if name == part else {})}) for name, values in parts.items()
        }
        found = PromptRouting(RoutingPolicy("prompt"), 3, 1)._refused(SimpleNamespace(kv_transfer_config=None, **given))
        return [name for name, (is_given, _) in found.items() if is_given]

    assert refused() == []
    for part, name, value, said in [
        ("model_config", "runner_type", "pooling", "runner"),
        ("model_config", "is_multimodal_model", True, "model"),
        ("scheduler_config", "get_scheduler_cls", lambda: object, "scheduler_cls"),
        ("cache_config", "kv_sharing_fast_prefill", True, "kv_sharing_fast_prefill"),
        ("parallel_config", "use_sequence_parallel_moe", True, "enable_expert_parallel"),
    ]:
        assert refused(part, **{name: value}) == [said]


@pytest.mark.parametrize(
    ("owner", "name", "patch"),
    [
        (Scheduler, "update_from_output", votes.vote_first),
        (Scheduler, "update_from_output", reports.report_experts),
        (OutputProcessor, "process_outputs", reports.count_tokens),
        (Request, "update_block_hashes", votes.vote_first),
        (GPUModelRunner, "_sample", votes.follow_votes),
        (GPUModelRunner, "_prepare_inputs", passes.follow_passes),
        (VllmConfig, "_get_v2_model_runner_unsupported_features", passes.choose_the_runner),
    ],
)
def test_another_vllm_is_named(owner, name, patch, monkeypatch):
    patch()
    monkeypatch.setattr(owner, name, None)
    with pytest.raises(
        ImportError, match=rf"vllm: is \S+; expected {owner.__name__}\.{name}, as in 0\.32\.0 to 0\.33\.0"
    ):
        patch()


def test_vllm_takes_the_runner_that_says_what_a_pass_has():
    parallel = SimpleNamespace(distributed_executor_backend=None, pipeline_parallel_size=1, use_ubatching=False)
    config = SimpleNamespace(speculative_config=None, parallel_config=parallel, additional_config={})
    for quantization, needs in [
        (None, []),
        (vllm_config(), []),
        (vllm_config(routing=RoutingPolicy("prompt")), ["routing with scope 'prompt' of SMILE models"]),
    ]:
        config.quant_config = quantization
        assert VllmConfig._get_v2_model_runner_unsupported_features(config) == needs
    config.additional_config = PER_REQUEST["additional_config"]
    assert len(VllmConfig._get_v2_model_runner_unsupported_features(config)) == 2


def test_layers_in_another_order_than_they_were_built_are_refused():
    routing = remembered(RoutingPolicy(accumulate=True), 4, 3)
    for first in (0, 1, 0, 1, 2):  # a failed pass, and a complete one
        weights, ids = routing.choose(torch.rand(4, 1, 3), first, 1)
        assert weights.shape == ids.shape == (4, 1, 2)
        assert not routing.evidence.isnan().any()
    with pytest.raises(RuntimeError, match="routing: router 1 runs where router 3 is due"):
        routing.choose(torch.rand(4, 1, 3), 1, 1)


def test_files_are_held_against_the_config_before_weights_are_read(tmp_path):
    module = SmileModuleConfig(4, 2, expert_bias=True, router=True)
    config = SmileQuantizationConfig(SmileConfig(3, 1, 4, 2, {"a.q_proj": module}))
    shapes = {"vh": (3, 4, 8), "s": (3, 4), "u": (3, 6, 4), "expert_bias": (3, 6), "router": (3, 2, 8)}
    wrong = {"vh": (3, 8, 8), "s": (4, 4), "u": (3, 6, 8), "expert_bias": (4, 6), "router": (3, 3, 8)}
    file = tmp_path / "model-00001.safetensors"

    def write(shapes):
        save_file({f"a.q_proj.{name}": torch.zeros(shape) for name, shape in shapes.items()}, file)

    write(shapes)
    config.maybe_update_config(str(tmp_path))
    config.maybe_update_config("org/of-the-hub")
    for name, shape in wrong.items():
        write({**shapes, name: shape})
        found = rf"{file}: tensor 'a.q_proj.{name}' has shape {re.escape(str(list(shape)))}; expected \[3, .*as quantiz"
        with pytest.raises(ValueError, match=found):
            config.maybe_update_config(str(tmp_path))
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(ValueError, match=f"{file}: is not a whole safetensors file"):
        config.maybe_update_config(str(tmp_path))


def test_experts_without_their_base_are_refused():
    with pytest.raises(ValueError, match=r"base_model_name_or_path: is '/base'; .* expected a whole checkpoint"):
        vllm_config(base_model_name_or_path="/base")


def test_a_base_of_torchao_is_refused():
    config = SmileConfig(2, 1, 3, 2, {"q": SmileModuleConfig(3, 2)}, base={"quant_method": "torchao"})
    with pytest.raises(ValueError, match="base: is stored as 'torchao', which the plugin does not load"):
        SmileQuantizationConfig.from_config(config.to_dict())


def test_experts_of_a_head_are_refused():
    with pytest.raises(ValueError, match=r"modules: lm_head is a Embedding in vLLM; expected a linear layer"):
        vllm_config().get_quant_method(nn.Embedding(3, 2), "lm_head")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"static_forward_context": None}, r"CompilationConfig\.static_forward_context, a dict"),
        ({"splitting_ops": {"attention": True}}, r"CompilationConfig\.splitting_ops, a list of names"),
        ({"splitting_ops": ["unified_attention"]}, r"CompilationConfig\.splitting_ops, a list of names"),
    ],
)
def test_another_compilation_config_is_named(changed, message):
    compilation = CompilationConfig()
    routing._check_compilation(compilation)
    for name, value in changed.items():
        object.__setattr__(compilation, name, value)
    with pytest.raises(ImportError, match=rf"vllm: is \S+; expected {message}.*, as in 0\.32\.0 to 0\.33\.0"):
        routing._check_compilation(compilation)
