"""The shared weights in 8 bits by torchao, the experts and the router unchanged.

python examples/quantized_base.py          (needs torchao)
"""

import torch
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from transformers_model import make_models

import smile_kernels as sk
from smile_kernels.integrations.quantization import split_base


def main() -> None:
    torch.manual_seed(0)
    base, finetuned = make_models()
    model, _ = sk.upscale(base, finetuned, rank_of_expert=4, rank_of_router=2, exclude=["lm_head"], progress=False)
    model = model.to(torch.bfloat16)
    ids = torch.randint(0, 200, (1, 32))
    with torch.no_grad():
        before = model(ids).logits.float()
        quantize_(split_base(model), Int8WeightOnlyConfig(), filter_fn=lambda module, name: name.endswith(".base"))
        after = model(ids).logits.float()
    layer = model.model.layers[0].mlp.up_proj
    print("shared weight:", type(layer.base.weight).__name__, "experts:", layer.u.dtype, layer.s.dtype)
    # The median token's: one of them may be routed otherwise now, where two experts score nearly the same.
    difference = (after - before).norm(dim=-1) / before.norm(dim=-1)
    print(f"logits differ by {difference.median():.2%}")


if __name__ == "__main__":
    main()
