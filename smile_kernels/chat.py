"""A conversation with a SMILE checkpoint through transformers, and the experts that serve each answer."""

import io
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checkpoint import errors_of_tokenizer, load_pretrained, load_tokenizer
from .errors import SmileError, check_integer, reason
from .nn import routed_layers
from .routing import routing_override, watch_routing
from .routing.tokens import limited_template
from .schema import check_arguments

__all__ = ["chat"]

HELP = (
    "/reset starts a new conversation; /expert NAME selects one expert, /expert returns to the policy; /exit or "
    "Ctrl-D ends the program; a backslash at the end of a line continues it"
)


@check_arguments
def chat(folder: str | Path, *, max_new_tokens: int = 512, device: str | None = None) -> None:
    """Answer each line of standard input, under the checkpoint's routing policy and generation config.

    Answers are streamed to standard output; the experts that served them are printed to standard error.

    Args:
        folder: a SMILE checkpoint of a causal language model, with a tokenizer that has a chat template.
        max_new_tokens: maximum length of an answer.
        device: where the model runs; by default the GPU if there is one.

    Raises:
        SmileError: not such a checkpoint, max_new_tokens below 1, or an unavailable device.
        FileNotFoundError: the folder does not exist.
    """
    check_integer("max_new_tokens", max_new_tokens, 1)
    try:
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError) as error:
        raise SmileError(f"device: is {device!r}; expected one that torch has here ({error})") from None
    interactive = sys.stdin.isatty()
    if isinstance(sys.stdin, io.TextIOWrapper):  # else a byte of another encoding ends the program
        sys.stdin.reconfigure(errors="surrogateescape")
    tokenizer = _tokenizer(Path(folder))
    model: Any = load_pretrained(folder, dtype="auto")
    if not model.can_generate() or model.config.is_encoder_decoder:
        raise SmileError(f"{folder}: contains a {type(model).__name__}; expected a causal language model")
    model = model.to(device).eval()
    names = next(iter(routed_layers(model).values())).expert_names or ()
    if interactive:
        print(HELP, file=sys.stderr)
        import readline  # noqa: F401  (with it, `input` edits lines and keeps a history)
    turns: list[dict[str, str]] = []
    expert: str | int | None = None
    try:
        for line in _lines(interactive):
            if line == "/exit":
                break
            command, _, name = line.partition(" ")
            if line.encode(errors="ignore").decode() != line:  # it has surrogates, for the bytes
                print(f"{line!a}: contains a byte that is not {sys.stdin.encoding}; ignored", file=sys.stderr)
            elif line == "/reset":
                turns = []
            elif command == "/expert":
                given = int(name) if name.isdecimal() and name not in names else name.strip() or None
                try:
                    with routing_override(model, given):
                        expert = given
                except SmileError as error:
                    print(error, file=sys.stderr)
            elif line.startswith("/"):
                print(f"{line}: unknown command; {HELP}", file=sys.stderr)
            elif line:
                turns.append({"role": "user", "content": line})
                prompt = _prompt(model, tokenizer, turns)
                length, longest = prompt["input_ids"].shape[1], _longest(model.config.get_text_config())
                if length >= longest:
                    turns.pop()
                    print(
                        f"{line[:20]!r}...: the conversation would have {length:,} tokens; expected fewer than the "
                        f"model's max_position_embeddings, {longest:,}; ignored (/reset starts a new conversation)",
                        file=sys.stderr,
                    )
                    continue
                with routing_override(model, expert):
                    text, counts = _answer(model, tokenizer, prompt, min(max_new_tokens, longest - length))
                turns.append({"role": "assistant", "content": text})
                print(_served(counts, names), file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        print(file=sys.stderr)


def _tokenizer(folder: Path) -> Any:
    if not folder.exists():
        raise FileNotFoundError(f"{folder}: no such folder; expected a SMILE checkpoint")
    if not (folder / "tokenizer_config.json").exists():
        raise SmileError(f"{folder}: has no tokenizer_config.json; expected the tokenizer's files in the folder")
    tokenizer = load_tokenizer(folder)
    if not tokenizer.chat_template:
        raise SmileError(f"{folder}: its tokenizer has no chat template; expected one, as chat models have")
    return tokenizer


def _lines(interactive: bool) -> Iterator[str]:
    """The lines of standard input; a backslash at the end of a line continues it in the next."""
    begun = ""
    while True:
        try:
            line = begun + input("> " if interactive else "")
        except EOFError:
            if begun.strip():
                yield begun.strip()
            return
        begun = line.removesuffix("\\") + "\n" if line.endswith("\\") else ""
        if not begun:
            yield line.strip()


def _prompt(model: Any, tokenizer: Any, turns: list[dict[str, str]]) -> Any:
    with errors_of_tokenizer(Path(tokenizer.name_or_path), "chat template fails"), limited_template():
        prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        if not prompt["input_ids"].numel():
            raise SmileError("it gives no tokens; expected those of the conversation")
    largest = int(prompt["input_ids"].max())
    if largest >= (size := model.config.get_text_config().vocab_size):
        raise SmileError(
            f"{tokenizer.name_or_path}: the tokenizer has a token {largest}; expected ids below the model's {size}"
        )
    return prompt


def _longest(config: Any) -> int:
    """The positions of a model; unlimited without max_position_embeddings, and where rotary ones are stretched."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    positions = getattr(config, "max_position_embeddings", None)
    return positions if isinstance(positions, int) and positions > 0 and not _is_stretched(rope) else sys.maxsize


def _is_stretched(rope: Any) -> bool:
    """Whether rotary embeddings, or those of one type of layer, are scaled by a factor."""
    return isinstance(rope, dict) and ("factor" in rope or any(map(_is_stretched, rope.values())))


@torch.inference_mode()
def _answer(model: Any, tokenizer: Any, prompt: Any, max_new_tokens: int) -> tuple[str, Tensor]:
    """Print the answer as it is generated; return it and the number of its tokens at each expert [N]."""
    from transformers import TextStreamer

    class Streamer(TextStreamer):
        of_prompt: Tensor | None = None  # tokens by expert, from the end of the prompt on

        def put(self, value: Tensor) -> None:
            if self.of_prompt is None and not self.next_tokens_are_prompt:
                self.of_prompt = torch.stack(list(counts.values())).sum(0)
            super().put(value)

    streamer = Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    with watch_routing(model) as counts:
        try:
            options = {"max_new_tokens": max_new_tokens, "return_dict_in_generate": False, "streamer": streamer}
            options["tokenizer"] = tokenizer  # finds stop_strings of the generation config
            tokens = model.generate(**prompt.to(model.device), **options)
        except Exception as error:
            if str(error).startswith("routing: "):  # the policy does not fit the model, as one with experts in its head
                raise SmileError(str(error)) from None
            if not isinstance(error, OSError) and _raised_by_transformers(error):
                raise SmileError(
                    f"{model.name_or_path}: transformers cannot generate with it ({reason(error)}); "
                    "expected a config.json, a generation_config.json and a tokenizer that fit the model"
                ) from error
            raise
    served = torch.stack(list(counts.values())).sum(0)
    assert streamer.of_prompt is not None
    if not torch.equal(served, streamer.of_prompt):  # else the answer is one token, computed in the prompt's pass
        served -= streamer.of_prompt
    length = prompt["input_ids"].shape[1]
    return tokenizer.decode(tokens[0, length:], skip_special_tokens=True).strip(), served


def _raised_by_transformers(error: Exception) -> bool:
    """Whether an error began in the code of transformers, or of torch called there, as on a setting of a wrong type."""
    names = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    return [name for name in names if not name.startswith("torch.")][-1].startswith("transformers.")


def _served(counts: Tensor, names: Sequence[str]) -> str:
    """[math 98%, code 2%]: the experts by their share of an answer's tokens over all layers."""
    shares = (counts / counts.sum()).tolist()
    ranked = sorted((i for i in range(len(shares)) if shares[i] >= 0.005), key=lambda i: -shares[i])
    listed = (f"{names[i] if i < len(names) else f'expert {i}'} {shares[i]:.0%}" for i in ranked)
    return f"[{', '.join(listed)}]"
