"""PEFT's Arrow models on SMILE layers, compared with PEFT."""

import copy

import peft
import pytest
import torch
import transformers
from peft.tuners.lora import create_arrow_model
from peft.tuners.lora.config import ArrowConfig
from torch import nn

import smile_kernels as sk
from smile_kernels.nn import smile_layers

TARGETS = ["q_proj", "v_proj", "down_proj"]


def base(kind: str = "llama") -> nn.Module:
    torch.manual_seed(0)
    if kind == "gpt2":
        config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=96, bos_token_id=1, eos_token_id=2)
        return transformers.GPT2LMHeadModel(config).eval()
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(**size, vocab_size=96, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    return transformers.LlamaForCausalLM(config).eval()


def adapters(folder, count: int, kind: str = "llama", targets=TARGETS) -> list[str]:
    """Saved adapters of rank 4 with large changes."""
    for i in range(count):
        config = peft.LoraConfig(r=4, lora_alpha=6 + i, target_modules=targets, fan_in_fan_out=kind == "gpt2")
        model = peft.get_peft_model(base(kind), config)
        torch.manual_seed(i + 1)  # otherwise the adapters are equal, and scores are tied
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora_" in name:
                    p.normal_(std=0.5)
        model.save_pretrained(folder / f"a{i}")
    return [str(folder / f"a{i}") for i in range(count)]


def logits(model: nn.Module) -> torch.Tensor:
    ids = torch.randint(3, 96, (2, 7), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.mark.parametrize(("top_k", "temperature"), [(1, 1.0), (3, 0.7), (4, 2.0)])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "general"])
def test_outputs_are_those_of_peft(kind, top_k, temperature, tmp_path):
    kind, general = ("llama", True) if kind == "general" else (kind, False)
    paths = adapters(tmp_path, 6, kind, ["c_attn"] if kind == "gpt2" else TARGETS)
    config = ArrowConfig(top_k=top_k, router_temperature=temperature, use_gks=general, rng_seed=5)
    tasks, others = (paths[:4], paths[4:]) if general else (paths[:4], None)
    model = create_arrow_model(base(kind), tasks, config, others).eval()
    plain = logits(base(kind))
    want = logits(copy.deepcopy(model))
    ours = sk.from_peft_arrow(model)
    assert not any(hasattr(module, "lora_A") for module in ours.modules())
    assert {layer.expert_names for layer in smile_layers(ours).values()} == {("task_0", "task_1", "task_2", "task_3")}
    assert (want - plain).abs().max() > 0.1
    torch.testing.assert_close(logits(ours), want, rtol=1e-5, atol=1e-5)
    sk.save_pretrained(ours, tmp_path / "saved")
    torch.testing.assert_close(logits(sk.load_pretrained(tmp_path / "saved")), want, rtol=1e-5, atol=1e-5)


def arrow_of(ranks: list[int], targets: list[list[str]], pad: int | None = None) -> nn.Module:
    """An Arrow model of two adapters; with `pad`, all have that rank and all targets, padded with zeros."""
    every, model = sorted({target for some in targets for target in some}), None
    for i, (rank, some) in enumerate(zip(ranks, targets)):
        config = peft.LoraConfig(r=pad or rank, lora_alpha=2 * (pad or rank), target_modules=every if pad else some)
        if model is None:
            model = peft.get_peft_model(base(), config, adapter_name="task_0")
        else:
            model.add_adapter(f"task_{i}", config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, module in sorted(model.base_model.model.named_modules()):
            for i, (rank, some) in enumerate(zip(ranks, targets)):
                if hasattr(module, "lora_A") and any(name.endswith(target) for target in every):
                    a = torch.randn(rank, module.in_features, generator=generator)
                    b = torch.randn(module.out_features, rank, generator=generator) * 0.3
                    if f"task_{i}" in module.lora_A:
                        used = float(any(name.endswith(target) for target in some))
                        for factor in (module.lora_A, module.lora_B):
                            factor[f"task_{i}"].weight.zero_()
                        module.lora_A[f"task_{i}"].weight[:rank] = a * used
                        module.lora_B[f"task_{i}"].weight[:, :rank] = b * used
    config = ArrowConfig(top_k=1, router_temperature=1.0, rng_seed=5)
    config.task_adapter_names, config.gks_adapter_names = ["task_0", "task_1"], []
    model.add_adapter("arrow_router", peft.LoraConfig(r=2, target_modules=every, arrow_config=config))
    model.set_adapter("arrow_router")
    return model.eval()


def test_adapters_of_other_ranks_and_targets():
    """PEFT supports neither; the expected outputs are those for the same adapters padded with zeros."""
    ranks, targets = [4, 2], [["q_proj", "down_proj"], ["q_proj", "v_proj"]]
    want = logits(arrow_of(ranks, targets, pad=4))
    ours = sk.from_peft_arrow(arrow_of(ranks, targets))
    torch.testing.assert_close(logits(ours), want, rtol=1e-5, atol=1e-5)
    assert len(smile_layers(ours)) == 6
    finetuned = []
    for i in range(2):
        one = arrow_of(ranks, targets)
        one.set_adapter(f"task_{i}")
        finetuned.append(one.merge_and_unload())
    assert [verdict.verdict for verdict in sk.verify(ours, base(), finetuned)] == ["exact"] * 2


def test_what_is_not_arrow_is_refused_and_stays(tmp_path):
    paths = adapters(tmp_path, 2)
    model = create_arrow_model(base(), paths, ArrowConfig(top_k=1)).eval()
    want = logits(model)
    model.set_adapter("task_0")
    with pytest.raises(ValueError, match=r"its active adapters are \['task_0'\]; expected only the Arrow router"):
        sk.from_peft_arrow(model)
    model.set_adapter("arrow_router")
    assert torch.equal(logits(model), want)
    with pytest.raises(ValueError, match="LlamaForCausalLM has no layer that Arrow routes"):
        sk.from_peft_arrow(base())
    with pytest.raises(ValueError, match="model: is 3"):
        sk.from_peft_arrow(3)
