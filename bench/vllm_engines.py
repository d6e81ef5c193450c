"""vLLM's engines on one small model, interleaved: python -m bench.vllm_engines, in the environment of make test-vllm.

Base, SMILE as published and under the recommended policy, and vLLM's own LoRA with as many adapters. The model has the
shape of SmolLM2-135M and random weights, the adapters random factors: no time depends on the numbers.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from safetensors.torch import save_file

from smile_kernels.benchmark.command import write_json
from smile_kernels.benchmark.measure import machine

from . import folder_of

EXPERTS, RANK, ROUTER = 6, 16, 8
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CONFIG = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
}
# name -> prompts, tokens a prompt, new tokens: the time is that of a token after the first, or of the only one.
CASES = {"decode, batch 8": (8, 32, 33), "prefill, 512 tokens": (1, 512, 1), "single stream": (1, 32, 33)}


def build(folder: Path) -> dict[str, Path]:
    """The base, N adapters, and the fused model under both policies."""
    from transformers import LlamaConfig, LlamaForCausalLM

    import smile_kernels as sk

    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**CONFIG)).to(torch.bfloat16)
    base.save_pretrained(folder / "base")
    adapters = []
    for i in range(EXPERTS):
        adapters.append(folder / f"adapter{i}")
        adapters[-1].mkdir()
        tensors = {}
        for name, layer in base.named_modules():
            if name.endswith(TARGETS):
                tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(RANK, layer.in_features) / 50
                tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(layer.out_features, RANK) / 50
        save_file({name: t.bfloat16() for name, t in tensors.items()}, adapters[-1] / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": list(TARGETS), "bias": "none"}
        (adapters[-1] / "adapter_config.json").write_text(json.dumps(config))
    ranks = {"rank_of_expert": RANK, "rank_of_router": ROUTER, "exclude": ["lm_head"]}
    sk.upscale_checkpoints(folder / "base", adapters, folder / "recommended", calibrate=True, **ranks)
    sk.upscale_checkpoints(folder / "base", adapters, folder / "published", **ranks)
    return {"base": folder / "base", "published": folder / "published", "recommended": folder / "recommended"}


def serve(folder: Path, adapters: list[Path], eager: bool, pipe: Connection) -> None:
    """An engine in a process of its own: for each (prompts, tokens, new tokens, seed), its process and wall seconds."""
    os.environ.update(ENVIRONMENT)
    torch.set_num_threads(1)
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    options = {"max_loras": EXPERTS, "max_lora_rank": RANK, "enable_lora": True} if adapters else {}
    engine = LLM(
        str(folder), skip_tokenizer_init=True, max_model_len=1024, max_num_seqs=8, enforce_eager=eager, **options
    )
    pipe.send("ready")
    while (job := pipe.recv()) is not None:
        prompts, length, new, seed = job
        draw = torch.Generator().manual_seed(seed)  # new prompts each time: none is in the prefix cache
        rows = torch.randint(3, CONFIG["vocab_size"], (prompts, length), generator=draw).tolist()
        requests = [LoRARequest(f"a{i}", i + 1, str(adapters[i])) for i in range(EXPERTS)] if adapters else []
        loras = [requests[i % EXPERTS] for i in range(prompts)] if adapters else None
        sampling = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
        start = time.process_time(), time.perf_counter()
        engine.generate([{"prompt_token_ids": row} for row in rows], sampling, lora_request=loras, use_tqdm=False)
        pipe.send((time.process_time() - start[0], time.perf_counter() - start[1]))


def measure(engines: dict[str, Connection], rounds: int) -> list[dict]:
    """A record for each case: every sample in milliseconds, and median ratios over the first engine within rounds."""

    def ask(pipe: Connection, *job: int) -> tuple[float, float]:
        pipe.send(job)
        return pipe.recv()

    records = []
    for case, (prompts, length, new) in CASES.items():
        peers: dict[str, dict] = {name: {"process_ms": [], "wall_ms": []} for name in engines}
        for turn in range(rounds + 1):
            for name, pipe in engines.items():
                whole = ask(pipe, prompts, length, new, 2 * turn)
                first = ask(pipe, prompts, length, 1, 2 * turn + 1) if new > 1 else (0.0, 0.0)
                if turn:  # the first one warms up
                    for kind, a, b in zip(("process_ms", "wall_ms"), whole, first):
                        peers[name][kind].append(1e3 * (a - b) / max(1, new - 1))
        base = next(iter(peers.values()))
        for name, peer in peers.items():
            for kind in ("process_ms", "wall_ms"):
                ratios = [a / b for a, b in zip(peer[kind], base[kind])]
                peer[f"over_first_{kind}"] = statistics.median(ratios)
            print(f"{case:24}{name:14}{statistics.median(peer['process_ms']):9.2f} ms", end="")
            print(f"{peer['over_first_process_ms']:8.2f}{peer['over_first_wall_ms']:8.2f}", flush=True)
        records.append({"name": case, "prompts": prompts, "length": length, "new_tokens": new, "peers": peers})
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    options = parser.parse_args()
    context, engines = get_context("spawn"), {}
    with tempfile.TemporaryDirectory() as work:
        folders = build(Path(work))
        adapters = [Path(work) / f"adapter{i}" for i in range(EXPERTS)]
        processes = []
        plan: dict[str, tuple[Path, list[Path]]] = {name: (folder, []) for name, folder in folders.items()}
        plan["vLLM's LoRA"] = folders["base"], adapters
        for name, (folder, own) in plan.items():
            here, there = context.Pipe()
            processes.append(context.Process(target=serve, args=(folder, own, options.eager, there)))
            processes[-1].start()
            print(f"{name}: {here.recv()}", flush=True)
            engines[name] = here
        records = measure(engines, options.rounds)
        for pipe, process in zip(engines.values(), processes):
            pipe.send(None)
            process.join()
    result = {"machine": machine("cpu"), "eager": options.eager, "limits": [], "records": records}
    write_json(folder_of("cpu") / ("vllm_eager.json" if options.eager else "vllm.json"), result)


if __name__ == "__main__":
    main()
