"""`smile-kernels upscale`, `inspect`, `doctor` and `tune`: options, output and errors."""

import errno
import io
import json
import os
import re
import shlex
import shutil
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from typer.main import get_command
from typer.testing import CliRunner

from smile_kernels import recipe
from smile_kernels.analysis import analyze
from smile_kernels.benchmark import command as bench_command
from smile_kernels.cli import app
from smile_kernels.config import read_smile_config
from smile_kernels.console import OPTIONS
from smile_kernels.storage import read_tensors
from smile_kernels.upscaling import disk, upscale_checkpoints
from tests.integrations import tiny_models
from tests.upscaling.checkpoints import RANKS, command, contents, run


def test_options_and_yaml_give_the_same(tmp_path, folders):
    run(*command(folders, tmp_path / "a", "--exclude", "down", "--dtype", "bfloat16", "--num-experts-per-tok", "2"))
    content = {
        "base_model": str(folders[0]),
        "models": [{"model": str(folder)} for folder in folders[1:]],
        "dtype": "bfloat16",
        "parameters": {**RANKS, "num_experts_per_tok": 2, "exclude": "down"},
    }
    (tmp_path / "fused.yml").write_text(yaml.safe_dump(content))
    run("upscale", str(tmp_path / "fused.yml"), "--out", str(tmp_path / "b"))
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    tensors = read_tensors(tmp_path / "a")
    assert "up.vh" in tensors
    assert "down.vh" not in tensors
    assert tensors["norm.weight"].dtype == tensors["up.u"].dtype == torch.bfloat16
    assert tensors["up.s"].dtype == torch.float32


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"base": "x"}, "unknown key 'base'; expected base_model, models"),
        ({"models": [{"path": "x"}]}, r"unknown key 'models\.0\.path'"),
        ({"models": "x"}, "models: is 'x'; expected an array"),
        (
            {"base_model": "x", "models": [{"model": "y", "name": 5}], "parameters": RANKS},
            r"models\.0\.name: is 5; expected a string",
        ),
        ({"parameters": {"rank": 3}}, "unknown key 'parameters\.rank'"),
        ({"dtype": "int8"}, "base: is not given"),
        ("a: [", "is not YAML"),
        ("a: &a [x]\nb: [*a, *a]", r"contains an alias, \*a"),
        ("[" * 60_000, "has more than 16 nested lists and mappings"),
        ("- " * 30_000, "has more than 16 nested lists and mappings"),
        (f"parameters:\n  rank_of_expert: {'9' * 5000}", "is not YAML: Exceeds the limit"),
        ("base_model: a\nbase_model: b", "sets base_model twice; expected one value"),
        ("models:\n- model: a\n  model: b", "sets model twice"),
        ("1: 2", "unknown key '1'; expected base_model"),
        ("#" * 100_000, "has 100,000 bytes; expected at most 65,536"),
        ("base_model: 5", "base_model: is 5; expected a string"),
        ({"parameters": RANKS | {"calibrate": "no"}}, "parameters.calibrate: is 'no'; expected a boolean"),
        ({"parameters": RANKS | {"routing": "causal"}}, "parameters.routing: is 'causal'; expected an object"),
        ({"base_model": "x", "models": [], "parameters": RANKS}, "expert: is empty"),
        ({"base_model": "x", "models": [{"model": "y"}], "dtype": "int8", "parameters": RANKS}, "dtype: is 'int8'"),
    ],
    ids=lambda v: "",
)
def test_yaml_errors(tmp_path, content, message):
    file = tmp_path / "bad.yml"
    file.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    result = CliRunner().invoke(app, ["upscale", str(file), "--out", str(tmp_path / "out")])
    assert result.exit_code == 1
    assert re.search(message, result.output.replace("\n", " ")), result.output
    assert [f.name for f in tmp_path.iterdir()] == ["bad.yml"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--out-shard-size", "5XB"], "error: out_shard_size: is '5XB'; expected bytes"),
        (["--expert", "/none"], "error: expert[3]: /none: no such folder"),
        (["--expert", "a=b", "--expert", "a=c"], "error: expert: 'a' is given twice; expected different names"),
        (["--router", "arrow"], "error: rank_of_router: is 2 with router 'arrow', which has one row; expected it not"),
        (["--routing", "window"], "error: routing: window: is not given with scope 'window'; expected the number"),
        (["--half-life", "-1"], "error: routing: half_life: is -1.0; expected a number of tokens above 0"),
        (["--include", "none"], "error: include, exclude: ['none'] without [] leaves none of the"),
    ],
)
def test_errors_name_options(folders, tmp_path, more, message):
    result = CliRunner().invoke(app, command(folders, tmp_path / "out", *more))
    assert result.exit_code == 1
    assert message in result.output
    assert "None" not in result.output


def test_every_option_has_its_name_in_errors():
    options = {parameter.name for one in get_command(app).commands.values() for parameter in one.params}
    assert not OPTIONS.keys() & options
    assert set(OPTIONS.values()) <= options


def test_streams_that_the_caller_closed(tmp_path, folders, monkeypatch):
    for stream in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, stream, None)
    with pytest.raises(SystemExit) as end:
        app(command(folders, tmp_path / "out"))
    assert end.value.code == 0
    assert read_smile_config(tmp_path / "out").expert_names == ("m1", "m2", "m3")


def test_standard_output_that_cannot_be_written(tmp_path, folders, monkeypatch, capfd):
    run(*command(folders, tmp_path / "out"))
    for buffering, arguments in ((-1, ["inspect", str(tmp_path / "out")]), (1, ["--version"]), (1, ["-h"])):
        with open("/dev/full", "w", buffering) as full, monkeypatch.context() as patched:
            patched.setattr(sys, "stdout", full)
            with pytest.raises(SystemExit) as end:
                app(arguments)
        assert end.value.code == 1
        said = "error: standard output: cannot be written (No space left on device); expected a file or pipe with space"
        assert capfd.readouterr().err.splitlines()[-1] == said


def test_names_that_the_encoding_of_standard_output_lacks(tmp_path, folders, monkeypatch):
    run("upscale", *command(folders, tmp_path / "漢")[1:])
    printed = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed, "ascii"))
    with pytest.raises(SystemExit) as end:
        app(["inspect", str(tmp_path / "漢")])
    assert end.value.code == 0
    assert rb"\u6f22: 2 SMILE layers" in printed.getvalue()


def test_standard_error_that_cannot_be_written(tmp_path, folders, monkeypatch):
    with open("/dev/full", "w") as full, open(os.devnull, "w") as null:
        monkeypatch.setattr(sys, "stderr", full)
        for code, arguments in enumerate((command(folders, tmp_path / "out"), ["inspect", str(tmp_path)])):
            with pytest.raises(SystemExit) as end:
                app(arguments)
            assert end.value.code == code
        os.dup2(null.fileno(), full.fileno())  # what is left to write
    assert read_smile_config(tmp_path / "out").expert_names == ("m1", "m2", "m3")


def test_experts_have_names(tmp_path, folders):
    """By their folders, by NAME=FOLDER, by YAML; an old checkpoint has none."""
    run(*command(folders, tmp_path / "plain"))
    assert "experts: 0 m1, 1 m2, 2 m3" in run("inspect", str(tmp_path / "plain"))
    (tmp_path / "a=b").mkdir()
    for file in folders[3].iterdir():
        (tmp_path / "a=b" / file.name).write_bytes(file.read_bytes())
    given = [f"maths={folders[1]}", str(folders[2]), str(tmp_path / "a=b")]
    run(*command([folders[0], *given], tmp_path / "named"))
    assert read_smile_config(tmp_path / "named").expert_names == ("maths", "m2", "a=b")
    models = [{"model": str(folders[1]), "name": "maths"}, *({"model": entry} for entry in given[1:])]
    content = {"base_model": str(folders[0]), "models": models, "parameters": RANKS}
    (tmp_path / "fused.yml").write_text(yaml.safe_dump(content))
    run("upscale", str(tmp_path / "fused.yml"), "--out", str(tmp_path / "yaml"))
    assert contents(tmp_path / "yaml") == contents(tmp_path / "named")
    assert "- expert maths: `m1`" in (tmp_path / "named" / "README.md").read_text()
    twice = [f"x={folder}" for folder in folders[1:]]
    result = CliRunner().invoke(app, command([folders[0], *twice], tmp_path / "twice"))
    assert "expert: 'x' is given twice" in result.output
    result = CliRunner().invoke(app, command([folders[0], "=y"], tmp_path / "twice"))
    assert "expert: is '=y'; expected FOLDER or NAME=FOLDER" in result.output
    assert not (tmp_path / "twice").exists()

    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    del config["quantization_config"]["expert_names"]
    (tmp_path / "plain" / "config.json").write_text(json.dumps(config))
    assert "experts: " not in run("inspect", str(tmp_path / "plain"))


def test_inspect(tmp_path, folders):
    run(*command(folders, tmp_path / "out"))
    for _ in range(2):  # and replaces its own
        output = run(
            "inspect", str(tmp_path / "out"), "--json", str(tmp_path / "i.json"), "--plot", str(tmp_path / "i.png")
        )
    assert "2 SMILE layers, 3 experts, 1 per token" in output
    assert "24x16" in output
    description = json.loads((tmp_path / "i.json").read_text())
    assert [layer["name"] for layer in description["layers"]] == ["down", "up"]
    assert all(0 < energy < 1 for layer in description["layers"] for energy in layer["energy"])
    assert (tmp_path / "i.png").read_bytes().startswith(b"\x89PNG")
    result = CliRunner().invoke(app, ["inspect", str(folders[0])])
    assert result.exit_code == 1
    assert "is not a SMILE checkpoint" in result.output
    result = CliRunner().invoke(app, ["inspect", str(tmp_path / "out"), "--plot", "a.txt"])
    assert result.stderr == "error: plot: is 'a.txt'; expected a name that ends with .png, .svg or .pdf\n"
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    others = {"s": tensors["down.s"][None], "s ": tensors["down.s"][:0], "u": tensors["down.u"][:, :0]}
    for name, other in others.items():
        save_file(tensors | {f"down.{name.strip()}": other.clone()}, file)
        result = CliRunner().invoke(app, ["inspect", str(tmp_path / "out")])
        expected = "[3, 4]" if "s" in name else "[3, O, 4]"
        said = f"tensor down.{name.strip()} is {list(other.shape)}; expected {expected}"
        assert said in " ".join(result.stderr.split())


@pytest.mark.parametrize("reporting", ["inspect", "analyze", "sweep", "bench", "doctor"])
def test_reports_replace_nothing_else(tmp_path, folders, reporting):
    run(*command(folders, tmp_path / "out"))
    (tmp_path / "a.py").write_text("def score(model):\n    raise RuntimeError\n")
    arguments = {
        "inspect": [str(tmp_path / "out")],
        "analyze": ["--base", str(folders[0]), "--expert", str(folders[1])],
        "sweep": [str(tmp_path / "out"), "--score", f"{tmp_path}/a.py:score"],
        "bench": ["--shape", "64x64"],
        "doctor": ["--verify"],
    }[reporting]
    name = "report" if reporting == "doctor" else "json"
    for file in ("config.json", "model.safetensors", "smile_manifest.json", "smile_report.json"):
        shutil.copy(tmp_path / "out" / file, tmp_path / file)
        result = CliRunner().invoke(app, [reporting, *arguments, f"--{name}", str(tmp_path / file)])
        assert result.exit_code == 1
        message = rf"error: {name}: is '\S+', which is not a report by smile-kernels with [\w, ]+; expected .*\n"
        assert re.fullmatch(message, result.stderr), result.output
        assert (tmp_path / file).read_bytes() == (tmp_path / "out" / file).read_bytes()


def test_no_color_gives_plain_text_on_a_terminal(tmp_path, folders, monkeypatch):
    run(*command(folders, tmp_path / "out"))
    arguments = ["inspect", str(tmp_path / "out")]
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "\x1b[1m" in run(*arguments)
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in run(*arguments)


@pytest.mark.filterwarnings("ignore:changes by fine-tuning")
def test_reports_are_plain_text(folders, tmp_path, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    report = upscale_checkpoints(folders[0], folders[1:], tmp_path / "out", **RANKS)
    found = analyze(folders[0], folders[1:])
    assert "\x1b" not in report.table() + str(report) + found.table() + str(found)


def test_doctor_says_what_would_run_and_why_not(monkeypatch):
    monkeypatch.delenv("SMILE_KERNELS_BACKEND", raising=False)
    output = run("doctor")
    assert torch.__version__ in output
    assert "would run" in output
    assert "it supports cuda tensors, not cpu tensors" in output


def test_help_lists_the_dtypes_that_are_accepted(tmp_path, folders):
    known = {"upscale": recipe.DTYPES, "tune": ("bfloat16", "float16", "float32"), "bench": bench_command.DTYPES}
    for name, dtypes in known.items():
        (option,) = (one for one in get_command(app).commands[name].params if one.name == "dtype")
        assert set(re.findall(r"b?float\d+", option.help.partition("[")[0])) == set(dtypes)
    assert {getattr(torch, name) for name in recipe.DTYPES} == set(disk.DTYPES)
    run(*command(folders, tmp_path / "out", "--dtype", "float64"))
    assert read_tensors(tmp_path / "out")["up.u"].dtype == torch.float64
    for arguments in (command(folders, tmp_path / "no"), ["tune", "--shape", "64x48"], ["bench", "--shape", "64x48"]):
        for wrong in ("", "half", "int8", *(["float64"] if arguments[0] != "upscale" else [])):
            result = CliRunner().invoke(app, [*arguments, "--dtype", wrong])
            assert re.match(rf"error: dtype: is '{wrong}'; expected .*float32", result.stderr), result.output


def test_doctor_refuses_a_report_of_nothing(tmp_path):
    result = CliRunner().invoke(app, ["doctor", "--report", str(tmp_path / "a.json")])
    assert result.exit_code == 1
    assert re.fullmatch(r"error: report: is '\S+' without verify; expected .*--verify.*\n", result.stderr)
    assert list(tmp_path.iterdir()) == []


def test_tune_times_each_layer_and_keeps_the_choices(monkeypatch):
    from smile_kernels.ops.triton import tuning
    from smile_kernels.testing import Problem

    arguments = ["tune", "--shape", "64x48", "--shape", "clip-b32.attn", "--tokens", "3", "--rank-of-expert", "8"]
    if not torch.cuda.is_available():
        result = CliRunner().invoke(app, arguments)
        assert (result.exit_code, "torch sees no GPU here" in result.output) == (1, True)
    tuned, saved, random = [], [], Problem.random

    def tune(weight, bias, vh, s, u, expert_bias, router, m, g, *, tokens, report):
        report("key", {"key": "tile"}, 1e-6)
        tuned.append((list(weight.shape), bias is not None, list(u.shape), m, g, tokens))
        return {"key": "tile"}

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(Problem, "random", lambda *a, **options: random(*a, **(options | {"device": "cpu"})))
    monkeypatch.setattr(tuning, "tune", tune)
    monkeypatch.setattr(tuning, "save", lambda device, choices: saved.append((device.type, choices)))
    assert "64x48: key: tile" in run(*arguments)
    assert tuned == [([48, 64], True, [8, 48, 8], 1, 16, [3]), ([768, 768], True, [8, 768, 8], 1, 16, [3])]
    assert saved == [("cuda", {"key": "tile"})] * 2


def examples(command: str) -> list[str]:
    """The examples that a command's help shows, each in one line."""
    text = run(command, "--help").replace("\\\n", " ")
    return [line.strip() for line in text.splitlines() if re.match(r"\s+(?:echo .* \| )?smile-kernels ", line)]


@pytest.fixture
def mistral(tmp_path, monkeypatch):
    """The folder in which the examples run: a model of six blocks, and two that were fine-tuned from it."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    tokenizer = tiny_models.chat_tokenizer()
    fine_tuned = tiny_models.fine_tuned
    base = tiny_models.chat_model(tokenizer, hidden_size=64, num_hidden_layers=6)
    for name, model in {"mistral": base, "math": fine_tuned(base, 1), "code": fine_tuned(base, 2)}.items():
        model.save_pretrained(name)
    tokenizer.save_pretrained("mistral")
    Path("my_package").mkdir()
    for file in ("evaluate.py", "my_package/evaluation.py"):
        Path(file).write_text("def accuracy(model):\n    return 1.0\n")
    options, from_yaml = examples("upscale")
    run(*shlex.split(options)[1:])
    return from_yaml


def test_the_examples_of_upscale_give_the_same(mistral, tmp_path):
    text = run("upscale", "--help")
    Path("fused.yml").write_text(textwrap.dedent(text.partition("fused.yml:\n")[2].partition("\nArguments")[0]))
    Path("fused").rename("first")
    run(*shlex.split(mistral)[1:])
    first, second = ({name for name in read_tensors(f) if "lm_head" not in name} for f in ("first", "fused"))
    assert first == second
    assert "model.layers.0.mlp.up_proj.vh" in first


@pytest.mark.parametrize("command", ["analyze", "calibrate", "verify", "chat", "inspect", "sweep"])
def test_the_examples_for_a_checkpoint_run(command, mistral):
    shown = examples(command)
    assert shown
    for example in shown:
        piped, _, rest = example.rpartition("|")
        arguments = shlex.split(rest)[1:] + (["--max-new-tokens", "3"] if command == "chat" else [])
        text = shlex.split(piped)[1] if piped else ""
        result = CliRunner().invoke(app, arguments, input=text + "\n", env={"COLUMNS": "200"})
        assert result.exit_code == 0, result.output
        assert len(result.output.splitlines()) < 30, "a summary"
    if command == "inspect":
        assert "model.layers.*.self_attn.q_proj" in result.output
        every = run("inspect", "fused", "--table")
        assert "model.layers.5.self_attn.q_proj" in every
        assert len(every.splitlines()) > 42
        assert Path("energy.png").exists()


def test_every_command_has_an_example():
    assert [
        command.callback.__name__ for command in app.registered_commands if not examples(command.callback.__name__)
    ] == []


def test_the_examples_of_doctor_run(monkeypatch, tmp_path):
    """Those that verify nothing; tests/test_selftest.py runs --verify."""
    (shown, verify) = examples("doctor")
    assert "would run" in run(*shlex.split(shown)[1:])
    assert shlex.split(verify)[1:] == ["doctor", "--verify", "--report", "verify.json"]


@pytest.mark.parametrize("command", ["bench", "tune"])
def test_the_examples_for_a_machine_run(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (example,) = examples(command)
    if command == "tune" and not torch.cuda.is_available():
        result = CliRunner().invoke(app, shlex.split(example)[1:])
        assert (result.exit_code, "torch sees no GPU here" in result.output) == (1, True)
        return
    run(*shlex.split(example)[1:], *(["--seconds", "0.01"] if command == "bench" else []))
    assert command == "tune" or (tmp_path / "bench.json").exists()


def test_progress_is_lines_where_there_is_no_terminal(tmp_path, folders):
    result = CliRunner().invoke(app, command(folders, tmp_path / "out"))
    assert result.exit_code == 0
    assert {"layers: 1 of 2", "layers: 2 of 2"} <= set(result.stderr.splitlines())
    assert "\x1b" not in result.output
    assert f"{tmp_path / 'out'}: is created when complete" in result.stderr.splitlines()[0]


def test_help_lists_the_commands():
    text = run("--help")
    assert all(name in text for name in ("upscale", "verify", "chat", "doctor"))


@pytest.mark.parametrize(
    ("status", "arguments"),
    [(0, ["--version"]), (1, ["inspect", "nowhere"]), (2, ["no-such-command"]), (2, ["bench", "--seconds", "long"])],
    ids=["version", "user error", "unknown command", "wrong type"],
)
def test_the_exit_status_is_the_documented_one(status, arguments):
    assert CliRunner().invoke(app, arguments).exit_code == status


def test_ctrl_c_ends_a_command_with_status_130(monkeypatch):
    def interrupted(folder):
        raise KeyboardInterrupt

    monkeypatch.setattr("smile_kernels.inspection.describe", interrupted)
    assert CliRunner().invoke(app, ["inspect", "fused"]).exit_code == 130


def test_an_input_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    """As of a failing disk, whose errors have no file's name."""
    (tmp_path / "config.json").write_text("{}")

    def read(file, *args, **kwargs):
        if file.name == "config.json":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read_text(file, *args, **kwargs)

    read_text = Path.read_text
    monkeypatch.setattr(Path, "read_text", read)
    result = CliRunner().invoke(app, ["inspect", str(tmp_path)])
    assert result.exit_code == 1
    assert f"error: [Errno 5] Input/output error: '{tmp_path / 'config.json'}'" in result.output
