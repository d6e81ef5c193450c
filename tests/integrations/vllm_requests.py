"""vLLM: requests for experts, prompts that vote, experts that are replaced while serving: `make test-vllm`."""

import asyncio
import os
import pickle
import shutil
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm import SamplingParams

from smile_kernels import RoutingPolicy, remove_expert, replace_expert, routing_override
from smile_kernels.nn import smile_layers
from tests.integrations.tiny_models import build, fine_tuned

from .vllm_served import (
    BLOCK,
    CHUNKS,
    ENVIRONMENT,
    LONG,
    PER_REQUEST,
    SMALL,
    TOKENS,
    TURN,
    VOTING,
    assert_preempted,
    greedy,
    in_a_process,
    in_vllm,
    served,
    voted,
    with_routing,
)


def reloaded(folder: Path, changed: Path, broken: list[Path], options: dict) -> tuple[list, list[str]]:
    """Greedy tokens before, after each wrong folder, after `changed`, and after `folder` again."""
    os.environ.update(ENVIRONMENT)
    from vllm import LLM

    extension = "smile_kernels.integrations.vllm.worker.SmileWorker"
    options = {"dtype": "float32", "max_model_len": 256, "worker_extension_cls": extension, **options}
    engine = LLM(str(folder), skip_tokenizer_init=True, **options)
    sampling = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, detokenize=False)

    def tokens() -> list[list[int]]:
        engine.reset_prefix_cache()
        outputs = engine.generate([{"prompt_token_ids": prompt} for prompt in LONG], sampling)
        return [list(output.outputs[0].token_ids) for output in outputs]

    answers, errors = [tokens()], []
    for one in broken:
        with pytest.raises(Exception, match="expected") as error:
            engine.collective_rpc("reload_experts", args=(str(one),))
        errors.append(str(error.value))
        answers.append(tokens())
    engine.collective_rpc("reload_experts", args=(str(changed),))
    answers.append(tokens())
    engine.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})  # vLLM's own
    answers.append(tokens())
    return answers, errors


@pytest.mark.engine
@pytest.mark.parametrize(
    ("architecture", "policy", "options"),
    [
        ("LlamaForCausalLM", RoutingPolicy(), {}),
        ("Qwen2ForCausalLM", RoutingPolicy("causal", accumulate=True), {"enforce_eager": True, **CHUNKS}),
    ],
    ids=["compiled", "parts-causal"],
)
def test_experts_are_replaced_while_serving(architecture, policy, options, tmp_path):
    case = served(architecture)
    model = with_routing(case.folder, tmp_path / "a", policy)
    changed, less, cut = tmp_path / "changed", tmp_path / "less", tmp_path / "cut"
    want = [greedy(model, prompt) for prompt in LONG]
    if "Qwen2" in architecture:  # a separate router, which no new expert has
        other = type(model).from_pretrained(tmp_path / "a")
        for layer in smile_layers(other).values():
            for name in ("vh", "u", "router"):
                if getattr(layer, name) is not None:
                    getattr(layer, name).data = getattr(layer, name).data.flip(0)
            layer.s.data *= 2
    else:
        other = type(model).from_pretrained(tmp_path / "a")
        replace_expert(other, "m2", fine_tuned(build(architecture), 9))
    other.save_pretrained(changed)
    after = [greedy(other, prompt) for prompt in LONG]
    assert after != want
    remove_expert(other, "m1")
    other.save_pretrained(less)
    shutil.copytree(changed, cut)
    tensors = load_file(cut / "model.safetensors")
    gone = next(name for name in tensors if name.endswith("up_proj.u"))
    save_file({name: t for name, t in tensors.items() if name != gone}, cut / "model.safetensors", {"format": "pt"})
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        job = pool.submit(reloaded, tmp_path / "a", changed, [less, cut], options)
        answers, errors = job.result()
    assert answers == [want, want, want, after, want]
    assert "less: num_local_experts is 2; expected 3" in errors[0]
    assert f"cut: tensor {gone} is missing" in errors[1]


def by_request(folder: Path, asked: list, prompts: list, options: dict) -> tuple[list, list, str]:
    """Greedy tokens of one batch whose requests select experts, twice; cached tokens of the second run; an error."""
    os.environ.update(ENVIRONMENT)
    from vllm import LLM

    options = {"dtype": "float32", "max_model_len": 256, **options}
    engine = LLM(str(folder), skip_tokenizer_init=True, **options)

    def sampling(expert):
        extra = None if expert is None else {"expert": expert}
        return SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, detokenize=False, extra_args=extra)

    given = [{"prompt_token_ids": prompt} for prompt in prompts]
    answers, cached = [], []
    for _ in range(2):
        outputs = engine.generate(given, [sampling(expert) for expert in asked])
        answers.append([list(output.outputs[0].token_ids) for output in outputs])
        cached.append([output.num_cached_tokens for output in outputs])
    assert_preempted(engine, options)
    with pytest.raises(ValueError, match="expert: is") as error:
        engine.generate(given[:1], sampling("maths"))
    (after,) = engine.generate(given[:1], sampling(asked[0]))  # the engine continues
    assert list(after.outputs[0].token_ids) == answers[0][0]
    return answers, cached, str(error.value)


@pytest.mark.engine
@pytest.mark.parametrize(
    ("architecture", "policy", "options"),
    [
        ("LlamaForCausalLM", RoutingPolicy(), {"enforce_eager": True, **PER_REQUEST}),
        ("LlamaForCausalLM", RoutingPolicy(), PER_REQUEST),
        ("Qwen2ForCausalLM", RoutingPolicy("causal", accumulate=True), {"enforce_eager": True, **PER_REQUEST}),
    ],
    ids=["eager", "compiled", "causal"],
)
def test_each_request_its_expert(architecture, policy, options, tmp_path):
    """One long prompt with different experts, and others, in one batch; they do not share caches."""
    case = served(architecture)
    model = with_routing(case.folder, tmp_path, policy)
    asked = ["m1", None, "m3", 1, [0.5, 0.0, 0.75], {}, {"m1": 0.5, "m2": 0.5}]
    prompts = [LONG[3], LONG[3], LONG[3], LONG[0], LONG[3], LONG[2], LONG[3]]
    python = [dict(enumerate(expert)) if isinstance(expert, list) else expert for expert in asked]
    want = []
    for expert, prompt in zip(python, prompts):
        with routing_override(model, expert):
            want.append(greedy(model, prompt))
    assert len({tuple(tokens) for tokens, prompt in zip(want, prompts) if prompt is LONG[3]}) > 2
    answers, cached, error = in_a_process(by_request, tmp_path, asked, prompts, options)
    assert answers == [want, want]
    assert cached[0] == [0] * len(asked)
    assert [count >= BLOCK for count in cached[1]] == [prompt is LONG[3] for prompt in prompts]
    assert "expert: is 'maths'; expected one of 'm1', 'm2', 'm3', or an index from 0 to 2" in error


@pytest.mark.engine
@pytest.mark.parametrize(
    ("architecture", "policy", "options"),
    [
        # One pass for all votes, in which prompts begin on blocks that the pass fills.
        ("LlamaForCausalLM", RoutingPolicy("prompt", lock_after=1, calibrated=True), {"enforce_eager": True}),
        ("LlamaForCausalLM", RoutingPolicy("prompt", lock_after=1, restart_at=TURN), {}),
        (
            "LlamaForCausalLM",
            RoutingPolicy("prompt", half_life=20, restart_at=TURN),
            {"enforce_eager": True, **SMALL},
        ),
        (
            "Qwen2ForCausalLM",
            RoutingPolicy("prompt", lock_after=1, restart_at=TURN),
            {"enforce_eager": True, "tensor_parallel_size": 2, **CHUNKS},
        ),
        (
            "MistralForCausalLM",
            RoutingPolicy("prompt", calibrated=True),
            {"enforce_eager": True, "model_impl": "transformers"},
        ),
    ],
    ids=["one-pass", "compiled", "preempted", "parts-tp2", "two-experts"],
)
def test_prompts_that_vote(architecture, policy, options, tmp_path):
    """Including two turns, one of which begins as the other ends, and a request that selects its expert."""
    case = served(architecture)
    model = with_routing(case.folder, tmp_path, policy)
    asked = [None] * len(VOTING) + ["m2"]
    prompts = [*VOTING, VOTING[0]]
    winners, want = map(list, zip(*(voted(model, prompt) for prompt in VOTING)))
    assert len(set(winners)) > 1
    with routing_override(model, "m2"):
        want.append(greedy(model, VOTING[0]))
    answers, cached, error = in_a_process(by_request, tmp_path, asked, prompts, {"block_size": 32, **options})
    assert answers == [want, want]
    assert any(cached[1])
    assert "expert: is 'maths'; expected one of 'm1', 'm2', 'm3', or an index from 0 to 2" in error


@pytest.mark.engine
def test_prompts_vote_in_half_precision(tmp_path):
    """Votes and evidence are float32 there too: each answer is that of the expert that float32 chooses."""
    model = with_routing(served("LlamaForCausalLM").folder, tmp_path, RoutingPolicy("prompt", lock_after=1))
    (answers,) = in_vllm(tmp_path, prompts=VOTING, dtype="bfloat16", max_model_len=256)
    for prompt, answer in zip(VOTING, answers):
        gaps = []
        for expert in range(3):
            with routing_override(model, expert), torch.no_grad():
                logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
            gaps.append(float((logits.amax(-1) - logits.gather(1, torch.tensor(answer)[:, None])[:, 0]).max()))
        assert min(gaps) == gaps[voted(model, prompt)[0]]


def asynchronously(folder: str, prompts: list[list[int]]) -> tuple[list[list[int]], list[list[int]]]:
    """Greedy tokens of requests of AsyncLLM, streamed, while others are aborted; two choices of the first one."""
    os.environ.update({**ENVIRONMENT, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"})
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.async_llm import AsyncLLM

    options = {"enforce_eager": True, "dtype": "float32", "max_model_len": 256, "max_num_batched_tokens": 32}
    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(folder, skip_tokenizer_init=True, max_num_seqs=3, **options))

    async def ask(name: str, prompt: list[int], **more) -> list[list[int]]:
        sampling = SamplingParams(
            top_k=1,
            max_tokens=TOKENS,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
            **more,
        )
        choices = [[] for _ in range(sampling.n)]
        async for output in engine.generate({"prompt_token_ids": prompt}, sampling, name):
            for each in output.outputs:
                choices[each.index] += each.token_ids
        return choices

    async def work() -> tuple:
        tasks = [asyncio.create_task(ask(f"left{i}", prompt)) for i, prompt in enumerate(prompts)]
        wanted = [asyncio.create_task(ask(f"{i}", prompt)) for i, prompt in enumerate(prompts)]
        await asyncio.sleep(0.01)
        for task in tasks:
            task.cancel()
        answers = [choices for (choices,) in await asyncio.gather(*wanted)]
        await asyncio.gather(*tasks, return_exceptions=True)
        return answers, await ask("two", prompts[0], n=2)

    try:
        return asyncio.run(work())
    finally:
        engine.shutdown()


@pytest.mark.engine
def test_prompts_vote_under_asyncllm(tmp_path):
    model = with_routing(served("LlamaForCausalLM").folder, tmp_path, RoutingPolicy("prompt", lock_after=1))
    winners, want = map(list, zip(*(voted(model, prompt) for prompt in VOTING)))
    assert len(set(winners)) > 1
    assert in_a_process(asynchronously, str(tmp_path), VOTING) == (want, [want[0]] * 2)


def admitted(folder: str, options: dict) -> tuple:
    """The front end's handling of requests, without an engine: selections and salts, and two errors."""
    os.environ.update(ENVIRONMENT)
    from vllm import EngineArgs
    from vllm.v1.engine.input_processor import InputProcessor

    config = EngineArgs(folder, skip_tokenizer_init=True, dtype="float32", **options).create_engine_config()
    front = InputProcessor(pickle.loads(pickle.dumps(config)))  # as in another process

    def ask(**extra):
        prompt = {"type": "token", "prompt_token_ids": [3, 4, 5]}
        params = SamplingParams(extra_args=extra or None)
        return front.process_inputs("0", prompt, params, supported_tasks=("generate",))

    found, errors = [], []
    for expert in ("m2", 0, [0.5, 0.0, 2.0], {"m3": 1.0, 0: -1.0}, {}):
        try:
            request = ask(expert=expert)
            found.append((request.sampling_params.extra_args["expert"], request.cache_salt))
        except ValueError as error:
            errors.append(str(error))
    for expert in ("maths", [1.0]):
        with pytest.raises(ValueError, match="expert: ") as error:
            ask(expert=expert)
        errors.append(str(error.value))
    plain = ask(), ask(other=1)
    assert [request.cache_salt for request in plain] == [None, None]
    return found, errors


@pytest.mark.engine
def test_the_front_end_checks_what_requests_ask_for():
    """With a configuration of vLLM that was sent to another process."""
    folder = str(served("LlamaForCausalLM").folder)
    found, errors = in_a_process(admitted, folder, PER_REQUEST)
    none, refused = in_a_process(admitted, folder, {})
    asked = [[(1, 1.0)], [(0, 1.0)], [(2, 2.0), (0, 0.5)], [(2, 1.0), (0, -1.0)], [(0, 0.0)]]
    assert [expert for expert, _ in found] == asked
    assert [salt for _, salt in found] == [f"|expert={each}" for each in [*asked[:4], []]]
    assert "expert: is 'maths'; expected one of 'm1', 'm2', 'm3', or an index from 0 to 2" in errors[0]
    assert "expert: has 1 weights; expected 3, one for each expert" in errors[1]
    assert none == []
    assert (
        "expert: is 'm2'; expected none, since this engine's layers do not look for it (with --additional-config"
        in refused[0]
    )
