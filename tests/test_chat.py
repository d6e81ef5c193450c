"""`smile-kernels chat`: answers, the experts that it prints, commands, and folders that cannot chat."""

import copy
import io
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
from contextlib import redirect_stderr
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast, ViTForImageClassification
from typer.testing import CliRunner

from smile_kernels import (
    RoutingPolicy,
    SmileError,
    load_pretrained,
    save_pretrained,
    set_routing,
    upscale,
    upscale_checkpoints,
    watch_routing,
)
from smile_kernels.chat import chat as converse
from smile_kernels.cli import app
from smile_kernels.nn import smile_layers
from tests.integrations import tiny_models
from tests.upscaling.checkpoints import finetuned, run


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_models.chat_tokenizer()


@pytest.fixture(scope="module")
def fused(tokenizer, tmp_path_factory) -> Path:
    """A calibrated checkpoint by the command, whose experts are named math and code."""
    folder = tmp_path_factory.mktemp("chat")
    torch.manual_seed(0)
    base = tiny_models.chat_model(tokenizer)
    for name, model in {"base": base, "math": finetuned(base), "code": finetuned(base)}.items():
        model.save_pretrained(folder / name)
    tokenizer.save_pretrained(folder / "base")
    experts = ["--expert", str(folder / "math"), "--expert", str(folder / "code"), "--exclude", "lm_head"]
    ranks = ["--rank-of-expert", "4", "--rank-of-router", "2"]
    run("upscale", "--base", str(folder / "base"), *experts, *ranks, "--calibrate", "--out", str(folder / "fused"))
    return folder / "fused"


def chat(folder: Path, text: str, *options: str) -> tuple[list[str], list[str]]:
    result = CliRunner().invoke(app, ["chat", str(folder), "--max-new-tokens", "6", *options], input=text)
    assert result.exit_code == 0, result.output
    said = [line for line in result.stderr.splitlines() if line and "Loading weights" not in line]  # transformers' bar
    return result.stdout.split("\n"), said


def expected(folder: Path, tokenizer: PreTrainedTokenizerFast, *turns: str) -> str:
    """The answer of the model that `load_pretrained` gives, to a conversation."""
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)]
    prompt = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)
    tokens = load_pretrained(folder).generate(**prompt, max_new_tokens=6)
    return tokenizer.decode(tokens[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def printable(answer: str) -> str:
    return "".join(answer.split())


def test_each_line_is_answered_within_its_conversation(fused, tokenizer):
    first = expected(fused, tokenizer, "Hi, you")
    second = expected(fused, tokenizer, "Hi, you", first, "and\nthen")
    assert second != expected(fused, tokenizer, "and\nthen"), "the conversation matters"
    out, served = chat(fused, "Hi, you\n\nand\\\nthen\n/reset\nand\\\nthen\n")
    answers = [first, second, expected(fused, tokenizer, "and\nthen")]
    assert printable("".join(out)) == printable("".join(answers))
    assert len(served) == 3
    assert all(re.fullmatch(r"\[(math|code) 100%\]", line) for line in served), "the prompt's choice serves it all"


def test_a_line_that_would_continue_is_answered_at_the_end_of_the_input(fused, tokenizer):
    answers, served = chat(fused, "Hi\\\nyou \\\n")
    assert printable("".join(answers)) == printable(expected(fused, tokenizer, "Hi\nyou"))
    assert len(served) == 1


def test_the_shares_are_those_of_the_answer(fused, tokenizer, tmp_path):
    """With the published routing tokens are independent, so question and answer in one pass have the same routing."""
    folder = tmp_path / "published"
    model = load_pretrained(fused)
    set_routing(model, RoutingPolicy())
    save_pretrained(model, folder)
    tokenizer.save_pretrained(folder)
    _, served = chat(folder, "Tell me\n")
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Tell me"}], return_tensors="pt", return_dict=True
    )
    tokens = model.generate(**prompt, max_new_tokens=6)
    totals = []
    for ids in (tokens[:, :-1], prompt["input_ids"]):
        with watch_routing(model) as counts, torch.no_grad():
            model(input_ids=ids)
        totals.append(torch.stack(list(counts.values())).sum(0))
    counts = totals[0] - totals[1]
    shares = {name: f"{share:.0%}" for name, share in zip(("math", "code"), (counts / counts.sum()).tolist())}
    assert len([share for share in shares.values() if share != "0%"]) == 2
    assert dict(part.rsplit(" ", 1) for part in served[0].strip("[]").split(", ")) == shares


def test_one_token_is_served_by_those_who_read_the_prompt(fused):
    _, served = chat(fused, "Hi\n", "--max-new-tokens", "1")
    assert re.fullmatch(r"\[(math|code) 100%\]", served[0])


def test_an_answer_ends_at_a_stop_string_of_the_generation_config(fused, tokenizer, tmp_path):
    whole = expected(fused, tokenizer, "Hi, you")
    shutil.copytree(fused, tmp_path / "fused")
    file = tmp_path / "fused" / "generation_config.json"
    stop = next(char for char in whole[:-1] if char.isascii() and not char.isspace())
    assert whole.index(stop) < len(whole) - 1
    file.write_text(json.dumps(json.loads(file.read_text()) | {"stop_strings": [stop]}))
    answers, served = chat(tmp_path / "fused", "Hi, you\n")
    assert printable("".join(answers)) == printable(whole[: whole.index(stop) + len(stop)]) != printable(whole)
    assert len(served) == 1


def test_commands(fused):
    out, said = chat(fused, "/help\n/exit\nHi\n")
    assert out == [""]
    assert said == [said[0]]
    assert said[0].startswith("/help: unknown command; ")
    assert "/expert" in said[0]


def test_bytes_of_another_encoding_are_reported_and_the_next_line_is_answered(fused):
    result = CliRunner().invoke(app, ["chat", str(fused), "--max-new-tokens", "2"], input=b"a\xff\nHi\n")
    assert result.exit_code == 0, result.output
    said = [line for line in result.stderr.splitlines() if line and "Loading weights" not in line]
    assert said[0].startswith(r"'a\udcff': contains a byte that is not utf-8")
    assert re.fullmatch(r"\[(math|code) 100%\]", said[1])
    assert len(said) == 2


def test_a_line_that_an_ascii_input_cannot_have_is_reported(fused, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("é\n".encode()), encoding="ascii"))
    said = io.StringIO()
    with redirect_stderr(said):
        converse(fused, max_new_tokens=2)
    assert r"'\udcc3\udca9': contains a byte that is not ascii; ignored" in said.getvalue()


def test_a_chat_template_without_text_is_named_in_one_line(fused, tmp_path):
    shutil.copytree(fused, tmp_path / "fused")
    (tmp_path / "fused" / "chat_template.jinja").write_text("{{ '' }}")
    result = CliRunner().invoke(app, ["chat", str(tmp_path / "fused")], input="Hi\n")
    assert result.exit_code == 1
    said = " ".join(result.stderr.split())
    assert "chat template fails (SmileError: it gives no tokens; expected those of the conversation); exp" in said


def test_a_conversation_beyond_the_context_is_refused_before_it_is_computed(fused, tmp_path, tokenizer):
    folder = tmp_path / "fused"
    shutil.copytree(fused, folder)
    config = json.loads((folder / "config.json").read_text())
    turn = len(
        tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], add_generation_prompt=True)["input_ids"]
    )
    longest = turn + 2
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": longest}))
    _, said = chat(folder, f"{'Hi ' * 60_000}\nHi\nHi\n/reset\nHi\n")
    refused = (
        rf"\S.+\.\.\.: the conversation would have [\d,]+ tokens; expected fewer than .+, {longest}; ignored \(/reset"
    )
    served = r"\[(math|code) \d+%"
    assert all(re.match(*pair) for pair in zip((refused, served, refused, served), said, strict=True)), said
    rope = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    (folder / "config.json").write_text(
        json.dumps(config | {"max_position_embeddings": longest, "rope_parameters": rope})
    )
    _, stretched = chat(folder, "Hi\nHi\n")
    assert [bool(re.match(served, one)) for one in stretched] == [True] * 2, stretched


def test_one_expert_can_be_asked(fused):
    _, said = chat(fused, "/expert code\nHi\n/expert 0\nHi\n/expert poetry\nHi\n/expert\nHi\n")
    assert [said[i] for i in (0, 1, 3)] == ["[code 100%]", "[math 100%]", "[math 100%]"], said
    assert said[2].startswith("expert: is 'poetry'; expected")
    assert re.fullmatch(r"\[(math|code) 100%\]", said[4])


def test_a_terminal_is_prompted_and_ctrl_c_ends_it(fused):
    main, terminal = pty.openpty()
    command = [sys.executable, "-m", "smile_kernels", "chat", str(fused), "--max-new-tokens", "2"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}

    def interruptible() -> None:  # a shell's background jobs ignore the signal
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    process = subprocess.Popen(
        command, stdin=terminal, stdout=terminal, stderr=terminal, env=environment, preexec_fn=interruptible
    )
    os.close(terminal)
    seen, start = b"", 0
    for awaited, keys in ((b"\n> ", b"Hi\n"), (b"%]", b""), (b"\n> ", b"")):
        while awaited not in seen[start:]:
            seen += os.read(main, 1024)
        start = seen.index(awaited, start) + len(awaited)
        os.write(main, keys)
    answered: list = []
    while not answered:  # Python may miss a signal just before it waits for a key
        process.send_signal(signal.SIGINT)
        answered = select.select([main], [], [], 5)[0]
    assert process.wait(timeout=60) == 0
    os.close(main)
    assert b"/reset starts a new conversation" in seen


CASES = ("no tokenizer", "no template", "bad template", "endless template", "bad tokenizer", "own code", "no folder")
ENDLESS = "{% for a in range(9999) %}" * 3 + "{% endfor %}" * 3


@pytest.mark.parametrize("case", [*CASES, "plain", "vision", "device", "empty device", "length", "a file"])
def test_folders_that_cannot_chat(case, fused, tokenizer, tmp_path):
    folder, options, message = tmp_path / "folder", [], ""
    if case == "no tokenizer":
        save_pretrained(load_pretrained(fused), folder)
        message = "has no tokenizer_config.json; expected"
    elif case == "no template":
        save_pretrained(load_pretrained(fused), folder)
        bare = copy.deepcopy(tokenizer)
        bare.chat_template = None
        bare.save_pretrained(folder)
        message = "its tokenizer has no chat template; expected"
    elif case == "own code":
        shutil.copytree(fused, folder)
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        settings |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": [None, "own.Own"]}}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Own: ...\n")
        message = "folder: the tokenizer's files cannot be loaded by transformers (ValueError: "
    elif case in ("bad template", "endless template", "bad tokenizer"):
        shutil.copytree(fused, folder)
        if case == "bad template":
            (folder / "chat_template.jinja").write_text("{{ raise_exception('no users') }}")
            message = "folder: the tokenizer's chat template fails (TemplateError: no users); expected"
        elif case == "endless template":
            (folder / "chat_template.jinja").write_text(ENDLESS)
            message = "folder: the tokenizer's chat template fails (SmileError: chat_template: runs more than 2,000,000"
        else:
            (folder / "tokenizer.json").write_text("{}")
            message = "folder: the tokenizer's files cannot be loaded by transformers ("
    elif case == "no folder":
        message = "folder"
    elif case == "a file":
        folder, message = fused / "config.json", "config.json: has no tokenizer_config.json; expected"
    elif case == "plain":
        tiny_models.chat_model(tokenizer).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        message = "is not a SMILE checkpoint"
    elif case == "vision":
        base: ViTForImageClassification = tiny_models.build("ViTForImageClassification")
        model, _ = upscale(base, [finetuned(base)], rank_of_expert=2, rank_of_router=2, progress=False)
        save_pretrained(model, folder)
        tokenizer.save_pretrained(folder)
        message = "contains a ViTForImageClassification; expected a causal language model"
    elif case in ("device", "empty device"):
        device = "" if case == "empty device" else "nowhere"
        folder, options, message = fused, ["--device", device], f"device: is {device!r}; expected"
    elif case == "length":
        folder, options, message = fused, ["--max-new-tokens", "0"], "max_new_tokens: is 0; expected 1 or more"
    result = CliRunner().invoke(app, ["chat", str(folder), *options], input="y\nHi\n")
    assert result.exit_code == 1, result.output
    assert not (tmp_path / "ran").exists()  # a tokenizer's own code is not run for a "y" in the input
    assert "error: " in result.stderr
    assert message in result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("changes", "name"),
    [({"folder": 5}, "folder"), ({"max_new_tokens": "2"}, "max_new_tokens"), ({"device": 3}, "device")],
)
def test_arguments_of_other_types_are_named(changes, name, fused):
    with pytest.raises(SmileError, match=f"^{name}: "):
        converse(**{"folder": fused, "max_new_tokens": 2} | changes)


def test_experts_in_the_head_are_refused_in_one_line(fused, tmp_path):
    """Under a policy that needs the head's evidence of every token."""
    experts = ["--expert", str(fused.parent / "math"), "--expert", str(fused.parent / "code")]
    options = ["--rank-of-expert", "4", "--rank-of-router", "2", "--routing", "causal", "--out", str(tmp_path / "out")]
    run("upscale", "--base", str(fused.parent / "base"), *experts, *options)
    result = CliRunner().invoke(app, ["chat", str(tmp_path / "out")], input="Hi\n")
    assert result.exit_code == 1
    assert "needs logits_to_keep=0, or exclude=['lm_head']" in result.stderr
    assert "this is a bug" not in result.stderr


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"do_sample": True, "temperature": "warm"}, "fused: transformers cannot generate with it ("),
        ({"prefill_chunk_size": "x"}, "fused: transformers cannot generate with it (TypeError: "),
        ({}, "fused: the tokenizer has a token 5"),
    ],
    ids=str,
)
def test_settings_that_transformers_cannot_run_are_named_in_one_line(changes, message, fused, tmp_path):
    shutil.copytree(fused, tmp_path / "fused")
    file = tmp_path / "fused" / "generation_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps(settings | changes))
    if not changes:
        words = json.loads((tmp_path / "fused" / "tokenizer.json").read_text())
        words["model"]["vocab"] = {word: 500 + i for word, i in words["model"]["vocab"].items()}
        (tmp_path / "fused" / "tokenizer.json").write_text(json.dumps(words))
    result = CliRunner().invoke(app, ["chat", str(tmp_path / "fused")], input="Hi\n")
    assert result.exit_code == 1
    assert message in result.stderr
    assert "this is a bug" not in result.stderr


def test_a_chat_template_that_fails_is_refused_before_any_layer_is_computed(fused, tmp_path):
    folder = tmp_path / "chat"
    shutil.copytree(fused.parent, folder)
    (folder / "base" / "chat_template.jinja").write_text("{{ raise_exception('no users') }}")
    with pytest.raises(SmileError, match=r"base: the tokenizer's chat template fails \(TemplateError: no users\)"):
        upscale_checkpoints(
            folder / "base", [folder / "math"], folder / "out", rank_of_expert=2, rank_of_router=1, calibrate=True
        )
    assert not [*folder.glob("*out*")]


def test_turns_that_begin_with_a_token_the_model_does_not_have_are_refused(fused, tmp_path, tokenizer):
    folder, larger = tmp_path / "chat", copy.deepcopy(tokenizer)
    shutil.copytree(fused.parent, folder)
    larger.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    larger.chat_template = "{% for m in messages %}<|turn|>{{ m['role'] }} {{ m['content'] }}{% endfor %}"
    larger.save_pretrained(folder / "base")
    with pytest.raises(
        SmileError, match=r"base: the tokenizer begins a user's turn with the token \d+; expected ids below"
    ):
        upscale_checkpoints(
            folder / "base", [folder / "math"], folder / "out", rank_of_expert=2, rank_of_router=1, calibrate=True
        )
    assert not [*folder.glob("*out*")]


def test_experts_without_names_have_numbers(fused, tmp_path, tokenizer):
    folder, model = tmp_path / "fused", load_pretrained(fused)
    for layer in smile_layers(model).values():
        layer.expert_names = None
    save_pretrained(model, folder)
    tokenizer.save_pretrained(folder)
    _, served = chat(folder, "Hi\n")
    assert re.fullmatch(r"\[expert [01] 100%\]", served[0])
