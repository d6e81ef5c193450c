"""The definition of routing policies as a plain nested loop, and tiny transformers models to compare with it."""

import itertools
import math

import pytest
import torch
import transformers as tf
from torch import nn

from smile_kernels import SmileLinear
from smile_kernels.routing import RoutingPolicy

N, R, G = 4, 3, 2
POLICIES = {
    "layers": RoutingPolicy("token", accumulate=True),
    "sequence": RoutingPolicy("sequence"),
    "sequence+layers": RoutingPolicy("sequence", accumulate=True),
    "sequence+layers, lock 1": RoutingPolicy("sequence", accumulate=True, lock_after=1),
    "sequence+layers, m 2": RoutingPolicy("sequence", accumulate=True, num_experts_per_tok=2),
    "causal": RoutingPolicy("causal"),
    "causal+layers": RoutingPolicy("causal", accumulate=True),
    "causal+layers, half-life 3": RoutingPolicy("causal", accumulate=True, half_life=3),
    "causal+layers, lock 1, m 2": RoutingPolicy("causal", accumulate=True, lock_after=1, num_experts_per_tok=2),
    "causal+layers, m 3, top_p 0.6": RoutingPolicy("causal", accumulate=True, num_experts_per_tok=3, top_p=0.6),
    "window 1": RoutingPolicy("window", window=1),
    "window 2+layers": RoutingPolicy("window", accumulate=True, window=2),
    "window 90+layers, lock 1, m 2": RoutingPolicy("window", True, lock_after=1, num_experts_per_tok=2, window=90),
}
SEQUENCE = {name: policy for name, policy in POLICIES.items() if policy.scope == "sequence"}
CAUSAL = {name: policy for name, policy in POLICIES.items() if policy.scope == "causal"}


def by_name(policies):
    return pytest.mark.parametrize("policy", policies.values(), ids=policies.keys())


def smile(
    model: nn.Module, skip: tuple[str, ...] = ("lm_head", "classifier", "pooler"), layers_per_block: int = 1
) -> nn.Module:
    """Every linear layer as a SMILE layer with random experts, large enough to matter."""
    for name, module in list(model.named_modules()):
        for child, linear in list(module.named_children()):
            if isinstance(linear, nn.Linear) and not f"{name}.{child}".endswith(skip):
                o, d = linear.weight.shape
                factors = {
                    "vh": nn.functional.normalize(torch.randn(N, max(R, G), d), dim=-1),
                    "s": torch.rand(N, R) + 0.5,
                    "u": torch.randn(N, o, R) * o**-0.5,
                    "expert_bias": torch.randn(N, o) * 0.1,
                }
                layer = SmileLinear.from_factors(linear.weight, linear.bias, factors, rank_of_router=G)
                layer.layers_per_block = layers_per_block
                setattr(module, child, layer)
    return model.eval()


SIZES = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "pad_token_id": 0}


def bert(**changes) -> nn.Module:
    config = tf.BertConfig(**SIZES | changes, intermediate_size=24, max_position_embeddings=64)
    return smile(tf.BertModel(config, add_pooling_layer=False), layers_per_block=6)


def albert() -> nn.Module:
    """A model that runs one layer twice."""
    config = tf.AlbertConfig(**SIZES, embedding_size=16, intermediate_size=24, max_position_embeddings=64)
    return smile(tf.AlbertModel(config, add_pooling_layer=False), layers_per_block=6)


def llama(**changes) -> nn.Module:
    config = tf.LlamaConfig(**SIZES, intermediate_size=24, num_key_value_heads=1, eos_token_id=None, bos_token_id=1)
    config.update(changes)
    return smile(tf.LlamaForCausalLM(config), layers_per_block=7)


def mistral(**changes) -> nn.Module:
    config = tf.MistralConfig(**SIZES, intermediate_size=24, num_key_value_heads=1, eos_token_id=None, bos_token_id=1)
    config.update(changes)
    return smile(tf.MistralForCausalLM(config), layers_per_block=7)


def t5() -> nn.Module:
    config = tf.T5Config(
        vocab_size=50,
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=2,
        num_heads=2,
        decoder_start_token_id=0,
        eos_token_id=None,
    )
    return smile(tf.T5ForConditionalGeneration(config))


def tokens(batch: int, length: int) -> torch.Tensor:
    return torch.randint(1, 50, (batch, length))


def logits(model: nn.Module, **inputs) -> torch.Tensor:
    with torch.no_grad():
        output = model(**inputs)
    return output.logits if hasattr(output, "logits") else output.last_hidden_state


class Calls:
    """Records (layer, input, output) of every SMILE layer call inside a `with`."""

    def __init__(self, model: nn.Module):
        self.model, self.calls = model, []

    def __enter__(self) -> list:
        def record(layer, args, output):
            self.calls.append((layer, args[0].detach(), output.detach()))

        layers = [m for m in self.model.modules() if isinstance(m, SmileLinear)]
        self.handles = [layer.register_forward_hook(record) for layer in layers]
        return self.calls

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()


def restarts(ids, pattern, b, t):
    """Whether the tokens of `pattern` end at t."""
    return pattern is not None and t + 1 >= len(pattern) and ids[b, t + 1 - len(pattern) : t + 1].tolist() == [*pattern]


def fewest(weights, order, top_p):
    """The smallest number of experts, by weight, whose weights add up to top_p; -1 for the others."""
    count = (
        next((k for k in range(1, len(order)) if sum(weights[:k]) >= top_p), len(order)) if top_p < 1 else len(order)
    )
    rest = len(order) - count
    return [w / sum(weights[:count]) for w in weights[:count]] + [0.0] * rest, order[:count] + [-1] * rest


def definition(calls, real, policy, groups=None, token_ids=None):
    """The equations, loop by loop: for each call the weights and ids [B, S, m], over tokens real [B][S] (bool).

    groups [B][S] numbers the sequences packed in a row. Padding has the routing of its sequence.
    """
    out, evidence, choice = [], {}, {}
    for number, (layer, x, _) in enumerate(calls):
        batch, length = x.shape[:2]
        m = policy.num_experts_per_tok or layer.num_experts_per_tok
        block = max(number - (len(calls) == 13), 0) // getattr(layer, "layers_per_block", 1)  # ALBERT has one before
        if policy.lock_after is None or block < policy.lock_after:
            share = {}
            for b, t in itertools.product(range(batch), range(length)):
                if not real[b][t]:
                    continue
                energy = []
                for i in range(N):
                    q = layer.vh[i, :G].detach().double() @ x[b, t].double()
                    energy.append(float(q @ q))
                share[b, t] = [e / sum(energy) for e in energy]
            for b, t in itertools.product(range(batch), range(length)):
                scope = []
                for s in range(length):
                    near = {"token": s == t, "sequence": True, "causal": s <= t, "window": False}[policy.scope]
                    near = near or (policy.window is not None and abs(s - t) <= policy.window)
                    if near and real[b][s] and (groups is None or groups[b][s] == groups[b][t]):
                        scope.append(s)
                if not scope:
                    continue
                pooled = [0.0] * N
                for s in scope:
                    if restarts(token_ids, policy.restart_at, b, s):
                        pooled = [0.0] * N
                    gamma = 2 ** (-1 / policy.half_life) if policy.half_life else 1.0
                    pooled = [gamma * pooled[i] + share[b, s][i] for i in range(N)]
                pooled = [p / sum(pooled) for p in pooled]
                before = evidence.get((b, t), [0.0] * N) if policy.accumulate else [0.0] * N
                prior = layer.router_prior.tolist() if policy.calibrated else [0.0] * N
                evidence[b, t] = [before[i] + math.log(pooled[i]) - prior[i] for i in range(N)]
                order = sorted(range(N), key=lambda i: -evidence[b, t][i])[:m]
                top = [math.exp(evidence[b, t][i] - evidence[b, t][order[0]]) for i in order]
                choice[b, t] = fewest([w / sum(top) for w in top], order, policy.top_p)
        nothing = [1 / m] * m, list(range(m))
        rows = [[choice.get((b, t), nothing) for t in range(length)] for b in range(batch)]
        out.append(
            (torch.tensor([[w for w, _ in row] for row in rows]), torch.tensor([[i for _, i in r] for r in rows]))
        )
    return out


def assert_follows(calls, real, policy, groups=None, token_ids=None):
    """Compare each recorded output with the layer's under the routing of the definition, except for padding."""
    assert calls
    chosen = set()
    for (layer, x, y), routing in zip(calls, definition(calls, real, policy, groups, token_ids)):
        want = layer(x, routing=routing)
        torch.testing.assert_close(y[torch.tensor(real)], want[torch.tensor(real)], rtol=1e-4, atol=1e-5)
        chosen |= set(routing[1].unique().tolist())
    assert len(chosen) > 1, "one expert alone shows nothing"
