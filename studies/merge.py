"""Merging fine-tuned copies of a module: the methods SMILE is compared with.

All of them work on the task vectors tau_i = theta_i - theta of the parameters, theta being the base. Most return the
change of the base, {name: delta}; weight ensembling is a module of its own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smile_kernels.routing.tokens import is_cache


def task_vectors(base: nn.Module, finetuned: Sequence[nn.Module]) -> dict[str, Tensor]:
    """tau [N, ...] of every parameter in which any fine-tuned module differs from the base."""
    vectors = {}
    for name, theta in base.named_parameters():
        tau = torch.stack([module.get_parameter(name).detach() for module in finetuned]) - theta.detach()
        if tau.any():
            vectors[name] = tau
    return vectors


def add_to(base: nn.Module, change: dict[str, Tensor]) -> nn.Module:
    """A copy of `base` with theta + change[name] for every parameter named."""
    merged = copy.deepcopy(base)
    with torch.no_grad():
        for name, delta in change.items():
            merged.get_parameter(name).add_(delta)
    return merged


def task_arithmetic(vectors: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    """scale * sum_i tau_i; scale = 1/N is simple averaging. Source: arXiv 2212.04089."""
    return {name: scale * tau.sum(0) for name, tau in vectors.items()}


def ties(vectors: dict[str, Tensor], density: float, scale: float) -> dict[str, Tensor]:
    """TIES-merging: trim, elect signs, average the entries that agree. Source: arXiv 2306.01708.

    Each tau_i keeps the `density` of its entries that are largest in magnitude, counted over all its parameters
    together. An entry's sign is that of the sum over i; the change is scale times the mean of entries of that sign.
    """
    keep = max(1, round(density * sum(tau[0].numel() for tau in vectors.values())))
    thresholds = []
    for i in range(len(next(iter(vectors.values())))):
        size = torch.cat([tau[i].flatten().abs() for tau in vectors.values()])  # of one model at a time: this is large
        thresholds.append(size.kthvalue(len(size) - keep + 1).values)
    change = {}
    for name, tau in vectors.items():
        kept = tau.where(tau.abs() >= torch.stack(thresholds).view(-1, *[1] * (tau.dim() - 1)), 0.0)
        agrees = kept.sign() == kept.sum(0).sign()
        change[name] = scale * (kept * agrees).sum(0) / (agrees & (kept != 0)).sum(0).clamp(min=1)
    return change


def scaled(change: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """scale * change."""
    return {name: scale * delta for name, delta in change.items()}


def tsv(vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """TSV-Merge: the leading singular vectors of every task, made orthogonal. Source: arXiv 2412.00081.

    For a matrix [O, D] of N tasks, the k = min(O, D) // N leading singular triples of each tau_i stand side by side in
    U [O, N k], s [N k], V [D, N k]; the change is P(U) diag(s) P(V)^T, P(A) being the orthogonal matrix nearest to A.
    Parameters that are not matrices are averaged.
    """
    change = {}
    for name, tau in vectors.items():
        if tau.dim() != 3:
            change[name] = tau.mean(0)
            continue
        u, s, vh = torch.linalg.svd(tau.float(), full_matrices=False)
        k = s.shape[-1] // len(tau)
        left, right = torch.cat(list(u[..., :k]), dim=1), torch.cat(list(vh[:, :k]), dim=0)
        change[name] = (_nearest_orthogonal(left) @ (s[:, :k].reshape(-1, 1) * _nearest_orthogonal(right))).to(tau)
    return change


def _nearest_orthogonal(matrix: Tensor) -> Tensor:
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u @ vh


def isotropic(vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Iso-C: the sum of a matrix's task vectors with all singular values made equal. Source: arXiv 2502.04959.

    With U diag(s) V^T = sum_i tau_i the change is mean(s) U V^T. Parameters that are not matrices are averaged.
    """
    change = {}
    for name, tau in vectors.items():
        if tau.dim() != 3:
            change[name] = tau.mean(0)
            continue
        u, s, vh = torch.linalg.svd(tau.float().sum(0), full_matrices=False)
        change[name] = (s.mean() * (u @ vh)).to(tau)
    return change


def fisher_information(
    log_probabilities: Callable[[dict[str, Tensor], object], Tensor], theta: Mapping[str, Tensor], texts: Iterable
) -> dict[str, Tensor]:
    """F of every parameter: the mean over texts x of sum_y p(y | x) (d log p(y | x) / d theta)^2.

    Args:
        log_probabilities: (theta, x) -> log p(y | x) of each class y, [classes].
        theta: the fine-tuned model's parameters.
        texts: the x.
    """
    theta = {name: p.detach().requires_grad_(True) for name, p in theta.items()}
    total, count = {name: torch.zeros_like(p) for name, p in theta.items()}, 0
    for x in texts:
        logs, count = log_probabilities(theta, x), count + 1
        for y, log_p in enumerate(logs):
            gradients = torch.autograd.grad(log_p, list(theta.values()), retain_graph=y + 1 < len(logs))
            for name, gradient in zip(theta, gradients):
                total[name] += log_p.detach().exp() * gradient.square()
    return {name: of / count for name, of in total.items()}


def fisher(
    vectors: Mapping[str, Tensor], information: Sequence[Mapping[str, Tensor]], least: float = 1e-6
) -> dict[str, Tensor]:
    """Fisher merging: sum_i c_i (F_i + least) tau_i / sum_i c_i (F_i + least), c_i = 1 / (||F_i|| + least).

    Source: arXiv 2111.09832; the norms, over all parameters together, are fusion_bench's.
    """
    norms = [torch.stack([f[name].norm() for name in vectors]).norm() for f in information]
    change = {}
    for name, tau in vectors.items():
        weights = torch.stack([(f[name] + least) / (norm + least) for f, norm in zip(information, norms)])
        change[name] = (weights * tau).sum(0) / weights.sum(0)
    return change


@torch.no_grad()
def grams(module: nn.Module, texts: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of x x^T over the tokens x [D] that reach each nn.Linear, [D, D], by the layer's name.

    `texts` are arguments of the module's forward, without padding.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def add(name: str) -> Callable[[nn.Module, tuple], None]:
        def count(layer: nn.Module, args: tuple) -> None:
            x = args[0].flatten(0, -2)
            sums[name], counts[name] = sums.get(name, 0) + x.T @ x, counts.get(name, 0) + len(x)

        return count

    layers = [(name, layer) for name, layer in module.named_modules() if isinstance(layer, nn.Linear)]
    handles = [layer.register_forward_pre_hook(add(name)) for name, layer in layers]
    for text in texts:
        module(**text)
    for handle in handles:
        handle.remove()
    return {name: total / counts[name] for name, total in sums.items()}


def regmean(vectors: Mapping[str, Tensor], of_models: Sequence[Mapping[str, Tensor]], keep: float) -> dict[str, Tensor]:
    """RegMean: the weights with outputs nearest to those of the fine-tuned models. Source: arXiv 2212.09849.

    For the weight of a linear layer, (sum_i G_i)^-1 sum_i G_i tau_i^T, transposed, where G_i is `grams` of model i with
    its off-diagonal entries multiplied by `keep`. Parameters without a G are averaged.
    """
    change = {}
    for name, tau in vectors.items():
        layer = name.removesuffix(".weight")
        if layer == name or layer not in of_models[0]:
            change[name] = tau.mean(0)
            continue
        g = torch.stack([grams[layer].double() for grams in of_models])
        g = keep * g + (1 - keep) * torch.diag_embed(g.diagonal(dim1=1, dim2=2))
        change[name] = torch.linalg.solve(g.sum(0), (g @ tau.double().mT).sum(0)).T.to(tau)
    return change


def weighted(vectors: Mapping[str, Tensor], weights: Tensor) -> dict[str, Tensor]:
    """sum_i w_i tau_i; weights [N, 1] are those of tasks, [N, parameters] those of each parameter in its order.

    AdaMerging's merged model (arXiv 2310.02575), with weights optimised by `adapt`.
    """
    columns = weights.expand(-1, len(vectors)).unbind(1)
    return {name: torch.tensordot(w.to(tau), tau, dims=1) for w, (name, tau) in zip(columns, vectors.items())}


def adapt(parameters: Iterable[Tensor], losses: Callable[[], Iterable[Tensor]], rate: float) -> Iterator[int]:
    """Minimise the sum of `losses()` with Adam; yields the number of steps after each step."""
    optimiser, steps = torch.optim.Adam(parameters, lr=rate), 0
    while True:
        with torch.enable_grad():
            loss = torch.stack(list(losses())).sum()
            optimiser.zero_grad()
            loss.backward()
        optimiser.step()
        steps += 1
        yield steps


def entropy(logits: Tensor) -> Tensor:
    """Mean over texts of -sum_y p_y log p_y: the loss of AdaMerging and weight ensembling. logits [B, classes]."""
    logs = logits.log_softmax(-1)
    return -(logs.exp() * logs).sum(-1).mean()


class Gate(nn.Module):
    """w [B, N]: the mean over a text's tokens of fc2(relu(fc1(x))), x [B, L, D]; initially about `start`; in float32.

    A pass over later tokens of texts, the first ones being in a KV cache, uses the weights of the pass before.
    """

    def __init__(self, width: int, tasks: int, start: float):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, width), nn.Linear(width, tasks)
        for layer, bias in ((self.fc1, 0.0), (self.fc2, start)):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.constant_(layer.bias, bias)
        self.mask: Tensor | None = None  # [B, L], nonzero on text; None: everywhere
        self.continues = False  # whether the pass is over later tokens of the texts of the pass before
        self.weights: Tensor | None = None  # of the last texts

    def forward(self, x: Tensor) -> Tensor:
        if not self.continues:
            each = self.fc2(F.relu(self.fc1(x.float())))
            mask = (torch.ones_like(x[..., 0]) if self.mask is None else self.mask)[..., None]
            self.weights = (each * mask).sum(1) / mask.sum(1)
        elif self.weights is None or len(self.weights) != len(x):
            before = 0 if self.weights is None else len(self.weights)
            raise ValueError(f"x: continues {len(x)} texts; expected the {before} of the pass before")
        return self.weights


class EnsembledLinear(nn.Module):
    """y = (W + sum_i w_i tau_i) x + b + sum_i w_i beta_i, with the weights w [B, N] of each text that `gate` gives.

    The first linear layer of an MLP (`first`) evaluates the gate; the others use the same weights. Without a bias, beta
    is None.
    """

    def __init__(self, linear: nn.Linear, tau: Tensor, beta: Tensor | None, gate: Gate, first: bool):
        super().__init__()
        self.linear, self.gate, self.first = linear, gate, first
        together = tau.transpose(0, 1).flatten(1).to(linear.weight).contiguous()  # [O, N D]
        self.tau = nn.Parameter(together, requires_grad=False)
        self.beta = None if beta is None else nn.Parameter(beta.to(linear.weight), requires_grad=False)  # [N, O]

    def forward(self, x: Tensor) -> Tensor:
        w = (self.gate(x) if self.first else self.gate.weights).to(x)
        spread = (w[:, None, :, None] * x[:, :, None]).flatten(2)  # [B, L, N D]
        y = self.linear(x) + F.linear(spread, self.tau)
        return y if self.beta is None else y + (w @ self.beta)[:, None]


def weight_ensembling(
    base: nn.Module, vectors: Mapping[str, Tensor], mlps: Sequence[Sequence[str]], start: float, masked: str = ""
) -> nn.Module:
    """WEMoE: MLPs whose task vectors are added with weights of each text, the rest merged by task arithmetic.

    Args:
        base: the base.
        vectors: the task vectors.
        mlps: names of the linear layers of each MLP, first the one that is called first.
        start: scale of task arithmetic, and of the weights before they are adapted.
        masked: name of the module that is called with `attention_mask`, and with a KV cache; default: the base.

    Source: arXiv 2402.00433. Only the gates' parameters require gradients; `adapt` optimises them.
    """
    inside = {f"{name}.{p}" for mlp in mlps for name in mlp for p in ("weight", "bias")}
    change = task_arithmetic({name: tau for name, tau in vectors.items() if name not in inside}, start)
    merged = add_to(base, change).requires_grad_(False)
    for mlp in mlps:
        tasks = len(vectors[f"{mlp[0]}.weight"])
        gate = Gate(base.get_submodule(mlp[0]).in_features, tasks, start)
        for name in mlp:
            tau, beta = vectors[f"{name}.weight"], vectors.get(f"{name}.bias")
            merged.set_submodule(name, EnsembledLinear(merged.get_submodule(name), tau, beta, gate, name == mlp[0]))
    merged.get_submodule(masked).register_forward_pre_hook(_show_texts, with_kwargs=True)
    return merged


def _show_texts(model: nn.Module, args: tuple, kwargs: dict) -> None:
    cache = next((value for value in kwargs.values() if is_cache(value)), None)
    for module in model.modules():
        if isinstance(module, Gate):
            module.mask = kwargs["attention_mask"]
            module.continues = cache is not None and cache.get_seq_length() > 0


def with_own_gates(model: nn.Module) -> nn.Module:
    """A copy of a model of `weight_ensembling` that shares all parameters except the gates'."""
    for module in model.modules():
        if isinstance(module, Gate):
            module.mask = module.weights = None  # of a pass that has ended; a gradient's graph cannot be copied
    return copy.deepcopy(model, {id(p): p for p in model.parameters() if not p.requires_grad})
