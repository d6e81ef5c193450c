"""LoRA adapters and a full fine-tune as experts of one model: different ranks, different target modules.

    python examples/lora_experts.py

The adapters are PEFT's own files. Their factors become experts by QR, exactly, with no dense SVD.
"""

import copy
import tempfile

import peft
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

import smile_kernels as sk
from smile_kernels.integrations.peft import adapter_deltas


def main() -> None:
    torch.manual_seed(0)
    config = Qwen2Config(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=200,
    )
    base = Qwen2ForCausalLM(config).eval()
    targets = {"math": (4, ["q_proj", "v_proj"]), "code": (8, ["gate_proj", "up_proj", "down_proj"])}
    with tempfile.TemporaryDirectory() as folder:
        for name, (rank, modules) in targets.items():
            lora = peft.LoraConfig(r=rank, lora_alpha=16, target_modules=modules, init_lora_weights=False)
            peft.get_peft_model(copy.deepcopy(base), lora).save_pretrained(f"{folder}/{name}")
        adapters = [adapter_deltas(f"{folder}/{name}", base.state_dict()) for name in targets]

    full = copy.deepcopy(base)
    with torch.no_grad():
        full.model.layers[0].self_attn.o_proj.weight += 0.05 * torch.randn(64, 2) @ torch.randn(2, 64)

    model, report = sk.upscale(base, [*adapters, full], rank_of_expert=8, rank_of_router=2, exclude=["lm_head"])
    print(report)
    ids = torch.randint(0, 200, (1, 8))
    print("logits:", tuple(model(ids).logits.shape))


if __name__ == "__main__":
    main()
