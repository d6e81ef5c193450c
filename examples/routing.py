"""Watch the routing of a SMILE model, and choose a policy: share of tokens per expert by layer, as a table and a plot.

    python examples/routing.py [--plot routing.png]

The model is made on the spot: a small BERT, and four copies of it whose weights changed along directions in which the
tokens of "their" text differ from the others', as fine-tuning does. Every text should go to its own expert. With a
checkpoint of your own, `model = AutoModel.from_pretrained(folder)` and a batch of its texts take their place.
"""

import argparse
import copy

import torch
from transformers import BertConfig, BertModel

import smile_kernels as sk
from smile_kernels.routing import RoutingPolicy, set_routing, watch_routing

POLICIES = {
    "token (published)": RoutingPolicy(),
    "sequence": RoutingPolicy("sequence"),
    "sequence + layers": RoutingPolicy("sequence", accumulate=True),
    "sequence + layers, lock 1 block": RoutingPolicy("sequence", accumulate=True, lock_after=1),
    "causal + layers": RoutingPolicy("causal", accumulate=True),
}
EXPERTS = 4


def make_model() -> tuple[torch.nn.Module, list[torch.Tensor]]:
    """A SMILE model of four experts, and token ids [8, 24] of a text for each; half of the words are common to all."""
    config = BertConfig(
        vocab_size=500, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=128
    )
    base = BertModel(config, add_pooling_layer=False).eval()
    words = torch.randint(100, 500, (EXPERTS, 20))
    texts = []
    for own in words:
        ids = torch.randint(0, 100, (8, 24))
        ids[:, ::2] = own[torch.randint(0, 20, (8, 12))]
        texts.append(ids)
    finetuned = [copy.deepcopy(base) for _ in range(EXPERTS)]
    for i, model in enumerate(finetuned):
        for name, layer in model.named_modules():
            if isinstance(layer, torch.nn.Linear):
                x = inputs_of(base, name, texts)
                own = x[i] - torch.cat(x[:i] + x[i + 1 :]).mean(0)
                directions = torch.linalg.svd(own, full_matrices=False).Vh[:4]
                change = torch.randn(layer.out_features, 4) @ directions
                layer.weight.data += 0.2 * layer.weight.norm() * change / change.norm()
    model, _ = sk.upscale(base, finetuned, rank_of_expert=4, rank_of_router=4, progress=False)
    return model, texts


@torch.no_grad()
def inputs_of(model: torch.nn.Module, name: str, texts: list[torch.Tensor]) -> list[torch.Tensor]:
    """The inputs [tokens, D] that each text gives to one layer."""
    seen = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1)))
    for ids in texts:
        model(input_ids=ids)
    hook.remove()
    return seen


@torch.no_grad()
def shares(model: torch.nn.Module, texts: list[torch.Tensor]) -> torch.Tensor:
    """Share of each text's tokens that each expert gets, [layers, texts, experts]."""
    rows = []
    for ids in texts:
        with watch_routing(model) as counts:
            model(input_ids=ids, attention_mask=torch.ones_like(ids))
        rows.append(torch.stack([count / count.sum() for count in counts.values()]))
    return torch.stack(rows, dim=1)


def draw(by_policy: dict[str, torch.Tensor], path: str) -> None:
    """One panel a policy: the share of tokens at their own expert, by layer and text."""
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, len(by_policy), figsize=(3 * len(by_policy), 3), sharey=True, layout="constrained")
    for panel, (name, share) in zip(panels, by_policy.items()):
        for i in range(EXPERTS):
            panel.plot(100 * share[:, i, i], label=f"text {i}")
        panel.set(title=name, xlabel="SMILE layer", ylim=(-3, 103))
    panels[0].set_ylabel("tokens at their own expert, %")
    panels[0].legend(fontsize="small")
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plot", help="draw the shares there (.png, .svg or .pdf)")
    plot = parser.parse_args().plot
    torch.manual_seed(0)
    model, texts = make_model()
    by_policy = {}
    for name, policy in POLICIES.items():
        set_routing(model, policy)
        by_policy[name] = shares(model, texts)
        own = 100 * by_policy[name].diagonal(dim1=1, dim2=2)  # [layers, texts]
        third = max(1, len(own) // 3)
        parts = ", ".join(f"{part.mean():5.1f}" for part in (own[:third], own[third : 2 * third], own[2 * third :]))
        print(f"{name:26} tokens at their own expert: {own.mean():5.1f} %   (lower, middle, upper layers: {parts})")
    if plot:
        draw(by_policy, plot)


if __name__ == "__main__":
    main()
