"""Routing policies: fields and equations.

With E_i(t, l) = ||V_i,l[:, :g]^T x_t||^2 for token t, expert i and SMILE layers l = 0, 1, ... in running order:

    p_i(t, l) = E_i / sum_j E_j
    S_i(t, l) = p_i(t, l)                                        (scope "token")
              = gamma S_i(t - 1, l) + p_i(t, l)                  (scope "causal")
              = the causal sum at the last token of t's sequence (scope "sequence")
              = the sum of p_i over the tokens of t's sequence from t - w to t + w, w = window (scope "window")
    P_i = S_i / sum_j S_j
    L_i(t, l) = log P_i(t, l) - log Pbar_i(l) (where calibrated)  + L_i(t, l - 1) (where the policy accumulates)
    experts(t, l) = the m largest L_i(t, l), ties to the lower index, weighted by their softmax w; with top_p below 1
                    the fewest of them, the largest first, whose w add up to top_p, weighted by w over their sum

log Pbar_i(l) is the layer's `router_prior`, the logarithm of the mean share of expert i on inputs of no task, read by
the base model (`calibrate`). gamma is 2^(-1 / half_life), or 1 without half_life, and 0 where a token completes
`restart_at`: earlier tokens do not count. Padding tokens are ignored. A token whose scores are all 0 has no evidence.
An expert without any evidence at a layer (its router rows are 0: it did not change that layer) is assigned the mean
log-evidence of the others there if the policy accumulates, and is ranked last otherwise. The choice is a
constant to autograd: gradients reach the experts through it, not the router.

Scope "prompt" reads the prompt twice: once by the base model, all experts off, which adds up L of scope "sequence" over
the layers of all its blocks, or of the first `lock_after` and ends there; then with the experts so chosen, which serve
every layer and every token that follows.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import SmileError
from ..functional import check_top_p
from ..ops.reference import accumulate_dtype, autocasts
from ..schema import KNOWN_KEYS_ONLY, parse
from .parts import parts_of, text_part

__all__ = [
    "Routing",
    "RoutingPolicy",
    "block_numbers",
    "energy_shares",
    "log_evidence",
    "router_energies",
    "running_sums",
]

Routing = tuple[Tensor, Tensor]  # (weights [..., m], ids [..., m] int32)

SCOPES = ("token", "sequence", "causal", "prompt", "window")


@dataclass(frozen=True)
class RoutingPolicy:
    """How the SMILE layers of a model choose their experts; the equations are in docs/routing.md and in this module.

    Args:
        scope: the tokens with scores that are pooled for a token: "token" itself; "sequence" its whole sequence (in
            generation, the prompt determines the choice for all following tokens); "causal" the tokens up to it;
            "prompt" the whole prompt, in a first pass of the base model; "window" the tokens near it, before and after,
            which needs all of them in one pass, without a KV cache. With "sequence" and "window", a layer may have one
            row for a sequence, as a pooler does; with "window", the mean evidence of the tokens counts there.
        accumulate: add the evidence of previous layers; always so with scope "prompt".
        lock_after: reuse the choice of the model's first `lock_after` blocks in all later ones, which compute
            no scores. None: every layer chooses. With scope "prompt": the number of blocks of the first pass;
            None: all.
        num_experts_per_tok: m; None: the number of each layer.
        calibrated: subtract each layer's `router_prior`; `calibrate` must have set it.
        half_life: number of tokens after which a token's weight is halved. None: constant weights. Not with
            scope "token" or "window".
        restart_at: token ids; the sums restart at the last token of each occurrence of this sequence. Not with
            scope "token" or "window".
        top_p: in (0, 1]; below 1 a token takes the fewest of its m experts whose weights add up to top_p, and the
            others are not computed. Not with num_experts_per_tok 1.
        window: number of tokens to each side, 1 or more, with scope "window", and None with every other.

    The default is the published routing: softmax over the token's own scores, inside the layer's kernel.

    Raises:
        ValueError: a value out of range, or a field without effect under the others; the message names the field.
    """

    scope: str = "token"
    accumulate: bool = False
    lock_after: int | None = None
    num_experts_per_tok: int | None = None
    calibrated: bool = False
    half_life: float | None = None
    restart_at: tuple[int, ...] | None = None
    top_p: float = 1.0
    window: int | None = None

    __pydantic_config__ = KNOWN_KEYS_ONLY

    def __post_init__(self) -> None:
        if not isinstance(self.scope, str) or self.scope not in SCOPES:
            raise SmileError(f"scope: is {self.scope!r}; expected one of {', '.join(map(repr, SCOPES))}")
        for name in ("accumulate", "calibrated"):
            if not isinstance(getattr(self, name), bool):
                raise SmileError(f"{name}: is {getattr(self, name)!r}; expected True or False")
        for name in ("lock_after", "num_experts_per_tok", "window"):
            value = getattr(self, name)
            if value is not None and not _is_integer(value, 1):
                raise SmileError(f"{name}: is {value!r}; expected None or an integer, 1 or more, below 2**31")
        if self.half_life is not None:
            number = isinstance(self.half_life, (int, float)) and not isinstance(self.half_life, bool)
            if not number or not 0 < self.half_life < 1e15:
                raise SmileError(
                    f"half_life: is {self.half_life!r}; expected None or a number of tokens above 0, below 1e15"
                )
        if self.restart_at is not None:
            if isinstance(self.restart_at, (list, tuple)):  # JSON has lists only
                object.__setattr__(self, "restart_at", tuple(self.restart_at))
            ids = self.restart_at if isinstance(self.restart_at, tuple) else ()
            if not ids or not all(_is_integer(i, 0) for i in ids):
                raise SmileError(
                    f"restart_at: is {self.restart_at!r}; expected None or token ids, 0 or more, below 2**31"
                )
        check_top_p(self.top_p)
        if self.top_p < 1 and self.num_experts_per_tok == 1:
            raise SmileError(f"top_p: is {self.top_p} with num_experts_per_tok 1; expected 1, since one expert is kept")
        if self.scope == "prompt":
            object.__setattr__(self, "accumulate", True)
        alone = self.scope == "token" and not self.accumulate
        if self.lock_after is not None and alone:
            raise SmileError(
                f"lock_after: is {self.lock_after} with scope 'token' and no accumulation; expected None, since there "
                "each layer chooses alone"
            )
        for name in ("half_life", "restart_at"):
            if getattr(self, name) is not None and self.scope in ("token", "window"):
                raise SmileError(
                    f"{name}: is {getattr(self, name)!r} with scope {self.scope!r}; expected None, since no sums run "
                    "from token to token there"
                )
        if (self.window is not None) != (self.scope == "window"):
            expected = "the number of tokens to each side" if self.window is None else "None"
            raise SmileError(f"window: is {self.window!r} with scope {self.scope!r}; expected {expected}")

    @property
    def is_published(self) -> bool:
        """Whether this is the published routing, computed by each layer itself."""
        return self.is_alone and self.top_p == 1

    @property
    def is_alone(self) -> bool:
        """Whether each layer chooses from a token's own scores, by the published rule and `top_p`: L is the score."""
        return self.scope == "token" and not self.accumulate and not self.calibrated

    @property
    def alone(self) -> "RoutingPolicy":
        """The published routing to as many experts, by the same `top_p`."""
        return RoutingPolicy(num_experts_per_tok=self.num_experts_per_tok, top_p=self.top_p)

    @classmethod
    def recommended(cls, model: torch.nn.Module, restart_at: Sequence[int] | None = None) -> "RoutingPolicy":
        """The best measured policy for this kind of model (docs/routing.md).

        For a calibrated causal language model, also one that reads images or sounds: scope "prompt" with the base's
        first quarter of the blocks, and with the tokens from the last `restart_at` on. For a text encoder of
        transformers, such as BERT: scope "window" with 2 tokens to each side, accumulated. For every other model: the
        published routing.

        Args:
            model: a model with SMILE layers.
            restart_at: the token ids that begin a user's turn (`user_turn_ids`); None for prompts of one turn, and for
                every other model than a calibrated causal language model.

        Raises:
            ValueError: `model` is not a module, or `restart_at` does not list token ids, or has no effect.
        """
        if not isinstance(model, torch.nn.Module):
            raise SmileError(f"model: is {model!r}; expected a model with SMILE layers")
        ids = cls("sequence", restart_at=restart_at).restart_at  # type: ignore[arg-type]  # checked, and a tuple
        calibrated = [n for n, module in model.named_modules() if getattr(module, "router_prior", None) is not None]
        is_encoder = _is_text_encoder(model)
        text = text_part(model, calibrated) if calibrated and not is_encoder else None
        if text is not None:
            quarter = -(-(max(block_numbers(parts_of(model, calibrated)[text]).values()) + 1) // 4)
            return cls("prompt", lock_after=quarter, calibrated=True, restart_at=ids)
        policy = cls("window", accumulate=True, window=2) if is_encoder else cls()
        if ids is not None:
            raise SmileError(
                f"restart_at: is {ids}, and {type(model).__name__} is recommended scope {policy.scope!r}; "
                "expected None, or a causal language model that is calibrated"
            )
        return policy

    def to_dict(self) -> dict:
        """The fields by name, as a checkpoint's config stores them under "routing"."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> "RoutingPolicy":
        """The inverse of `to_dict`; absent fields take their defaults, unknown ones raise ValueError."""
        return parse(cls, values, "routing")


def _is_text_encoder(model: torch.nn.Module) -> bool:
    """Whether this is a model of transformers of a kind that predicts masked tokens, so that every token sees all.

    Not the kinds whose layers have other rows than the tokens: Longformer's are transposed, Funnel's are pooled.
    """
    config, can_generate = getattr(model, "config", None), getattr(model, "can_generate", None)
    if config is None or can_generate is None or can_generate():
        return False
    if getattr(config, "is_decoder", False) or getattr(config, "is_encoder_decoder", False):
        return False
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    kinds = MODEL_FOR_MASKED_LM_MAPPING_NAMES.keys() - {"longformer", "funnel"}
    return config.model_type in kinds and model.main_input_name == "input_ids"


def _is_integer(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < 1 << 31


def block_numbers(names: Iterable[str]) -> dict[str, int]:
    """The block of each layer, by the layers' names in the model's order: "model.layers.3.mlp.up_proj" is in block 3.

    The first number in a name is its block's; blocks are renumbered 0, 1, ... in their order. A layer outside of every
    block belongs to the one before it. Where no name has a number, each layer is a block.
    """
    names = list(names)
    keys: list[str] = []
    for name in names:
        parts = name.split(".")
        first = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
        keys.append(".".join(parts[: first + 1]) if first is not None else keys[-1] if keys else "")
    if not any(keys):
        return {name: number for number, name in enumerate(names)}
    first_block = next(key for key in keys if key)
    order = {key: number for number, key in enumerate(dict.fromkeys(key or first_block for key in keys))}
    return {name: order[key or first_block] for name, key in zip(names, keys)}


def router_energies(x: Tensor, router: Tensor) -> Tensor:
    """E_i = ||router_i x||^2: x [..., D], router [N, g, D] -> [..., N] float32 (float64 for float64)."""
    acc = accumulate_dtype(x)
    if autocasts(x):
        with torch.autocast(x.device.type, enabled=False):
            return router_energies(x, router)
    products = F.linear(x.to(acc), router.to(acc).reshape(-1, router.shape[-1]))
    return products.unflatten(-1, router.shape[:2]).square().sum(-1)


def energy_shares(energies: Tensor) -> Tensor:
    """p_i = E_i / sum_j E_j over the last dimension; all 0 where the energies are. NaN counts as 0."""
    energies = energies.nan_to_num(nan=0.0, posinf=_MOST).clamp_max(_MOST)
    shares = energies / energies.sum(-1, keepdim=True).clamp_min(torch.finfo(energies.dtype).tiny)
    # A share that underflows is still evidence; only an energy of 0 is not.
    return torch.where(energies > 0, shares.clamp_min(_LEAST), 0)


_LEAST, _MOST = 1e-30, 1e36


def log_evidence(sums: Tensor, accumulate: bool, prior: Tensor | None = None) -> Tensor:
    """log P - log Pbar up to a constant, [..., N]: finite, with the stand-in for experts without evidence here."""
    logs = sums.clamp_min(_LEAST).log()
    if prior is not None:
        logs = logs - prior
    if not accumulate or (sums.device.type == "cpu" and not torch.compiler.is_compiling() and _all_positive(sums)):
        return logs
    present = sums > 0
    mean = torch.where(present, logs, 0).sum(-1, keepdim=True) / present.sum(-1, keepdim=True).clamp_min(1)
    return torch.where(present, logs, mean)


def _all_positive(sums: Tensor) -> bool:
    return sums.numel() > 0 and bool(sums.min() > 0)


def running_sums(shares: Tensor, factors: Tensor | None, before: Tensor | None = None) -> Tensor:
    """S_t = factors_t S_{t-1} + shares_t along dimension 1, from S_{-1} = before.

    Args:
        shares: [B, S, N].
        factors: [B or 1, S or 1], 0 to 1: how much of the sum before each token is left; None: all of it.
        before: [B, N]; None: 0.
    """
    if factors is None:
        sums = shares.cumsum(1)
        return sums if before is None else sums + before[:, None]
    factors = factors.expand(-1, shares.shape[1])[..., None].to(shares.dtype)
    if before is not None:
        first = shares[:, :1] + factors[:, :1] * before[:, None]
        shares = first if shares.shape[1] == 1 else torch.cat([first, shares[:, 1:]], dim=1)
    step, length = 1, shares.shape[1]
    while step < length:  # each token takes in the sum of as many before it as are in its own
        shares = shares + factors * F.pad(shares[:, :-step], (0, 0, step, 0))
        factors = factors * F.pad(factors[:, :-step], (0, 0, step, 0))
        step *= 2
    return shares
