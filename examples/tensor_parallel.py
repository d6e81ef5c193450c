"""One SMILE model sharded over several processes by torch.distributed.

    torchrun --nproc-per-node 2 examples/tensor_parallel.py [--model FOLDER] [--device cuda]

Every rank loads the model, keeps its shard of each layer, and generates the same tokens. Without --model a tiny one is
made on the spot.
"""

import argparse

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module
from transformers import AutoModelForCausalLM
from transformers_model import make_models

import smile_kernels as sk
from smile_kernels.integrations.distributed import tensor_parallel_plan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a SMILE checkpoint")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    args = parser.parse_args()
    dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
    if args.device == "cuda":
        torch.cuda.set_device(dist.get_rank() % torch.cuda.device_count())
    torch.manual_seed(0)
    if args.model:
        model = AutoModelForCausalLM.from_pretrained(args.model)
    else:
        base, finetuned = make_models()
        model, _ = sk.upscale(base, finetuned, rank_of_expert=4, rank_of_router=2, progress=False)

    ids = torch.randint(0, model.config.vocab_size, (1, 8))
    mesh = init_device_mesh(args.device, (dist.get_world_size(),))
    # Shards are cut on the host: the device holds only this rank's part of the layers that are split.
    parallelize_module(model, mesh, tensor_parallel_plan(model))
    model.to(args.device)
    tokens = model.generate(ids.to(args.device), max_new_tokens=8, do_sample=False, pad_token_id=0)

    here = sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in model.parameters())
    whole = sum(p.numel() for p in model.parameters())
    print(f"rank {dist.get_rank()}: {here} of {whole} parameters, tokens {tokens[0, 8:].tolist()}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
