"""Three fine-tuned models fused into one, saved, loaded by transformers, and used.

    python examples/transformers_model.py [--model FOLDER --experts FOLDER FOLDER ...]

Without arguments the models are made on the spot: a tiny Mistral with random weights and three changed copies of it.
"""

import argparse
import copy
import tempfile

import torch
from transformers import AutoModelForCausalLM, MistralConfig, MistralForCausalLM

import smile_kernels as sk


def make_models() -> tuple[torch.nn.Module, list[torch.nn.Module]]:
    """A base and three fine-tuned versions of it, each changed by updates of rank 4."""
    config = MistralConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=200,
        eos_token_id=None,  # random weights may emit it anywhere
    )
    base = MistralForCausalLM(config).eval()
    finetuned = [copy.deepcopy(base) for _ in range(3)]
    with torch.no_grad():
        for model in finetuned:
            for layer in model.model.modules():
                if isinstance(layer, torch.nn.Linear):
                    o, d = layer.weight.shape
                    layer.weight += 0.05 * torch.randn(o, 4) @ torch.randn(4, d)
    return base, finetuned


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of the pre-trained model")
    parser.add_argument("--experts", nargs="+", help="folders of its fine-tuned versions")
    args = parser.parse_args()
    if args.model:
        base = AutoModelForCausalLM.from_pretrained(args.model)
        finetuned = [AutoModelForCausalLM.from_pretrained(folder) for folder in args.experts]
    else:
        base, finetuned = make_models()

    model, report = sk.upscale(base, finetuned, rank_of_expert=4, rank_of_router=2, exclude=["lm_head"])
    print(report)

    with tempfile.TemporaryDirectory() as folder:
        sk.save_pretrained(model, f"{folder}/fused")
        # `import smile_kernels` above is all that from_pretrained needs for these layers.
        loaded = AutoModelForCausalLM.from_pretrained(f"{folder}/fused", dtype=torch.bfloat16)
    ids = torch.randint(0, base.config.vocab_size, (1, 8))
    tokens = loaded.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
    print("layers:", sum(isinstance(module, sk.SmileLinear) for module in loaded.modules()))
    print("tokens:", tokens[0, 8:].tolist())


if __name__ == "__main__":
    main()
