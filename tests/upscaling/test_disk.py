"""upscale_checkpoints(): equal to `upscale` in memory; interrupted and shared runs; misuse."""

import copy
import errno
import json
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from typer.testing import CliRunner

from smile_kernels import SmileLinear
from smile_kernels.checkpoint import load_pretrained
from smile_kernels.cli import app
from smile_kernels.storage import StoredTensor, read_tensors, write_tensors
from smile_kernels.upscaling import upscale, upscale_checkpoints
from tests.test_publishing import killed_at
from tests.upscaling.checkpoints import RANKS, N, Net, command, contents, finetuned, run, save


def same_as_in_memory(model: nn.Module, loaded: nn.Module) -> None:
    assert set(model.state_dict()) == set(loaded.state_dict())
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
        assert loaded.state_dict()[name].dtype == tensor.dtype, name


@pytest.mark.parametrize("rank", [4, 0.8, -1], ids=["r4", "energy", "full"])
@pytest.mark.parametrize("remaining", ["base", "average"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_reproduces_upscale_in_memory(tmp_path, dtype, remaining, rank):
    base = Net().to(dtype)
    experts = [finetuned(base) for _ in range(N)]
    shared = save(tmp_path / "base", base, max_shard_size=700)
    folders = [save(tmp_path / f"e{i}", expert) for i, expert in enumerate(experts)]
    options = {"rank_of_expert": rank, "rank_of_router": 2, "num_experts_per_tok": 2, "remaining": remaining}
    report = upscale_checkpoints(shared, folders, tmp_path / "out", max_shard_size=1000, **options)
    model, in_memory = upscale(base, experts, **options, progress=False)
    loaded = load_pretrained(tmp_path / "out", Net().to(dtype))
    same_as_in_memory(model, loaded)
    assert isinstance(loaded.up, SmileLinear)
    energies = ({layer.name: layer.energy for layer in r.layers} for r in (report, in_memory))
    assert next(energies) == next(energies)
    ids = torch.randint(13, (2, 7))
    assert torch.equal(loaded(ids), model(ids))


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_reproduces_upscale_whatever_the_shapes_and_options(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("any")
    shapes = data.draw(st.lists(st.tuples(st.integers(2, 9), st.integers(2, 9)), min_size=1, max_size=3))
    n = data.draw(st.integers(1, 3))

    def model() -> nn.Module:
        return nn.ModuleDict(
            {f"l{i}": nn.Linear(*shape, bias=data.draw(st.booleans())) for i, shape in enumerate(shapes)}
        )

    smallest = min(min(shape) for shape in shapes)
    options = {
        "rank_of_expert": data.draw(st.one_of(st.integers(1, smallest), st.just(-1), st.floats(0.1, 0.99))),
        "rank_of_router": data.draw(st.integers(1, smallest)),
        "num_experts_per_tok": data.draw(st.integers(1, n)),
        "exclude": data.draw(st.sampled_from([None, ["l1"], ["l[12]"]])),
    }
    storage = {"max_shard_size": data.draw(st.integers(1, 2000)), "workers": data.draw(st.integers(1, 3))}
    base, *experts = models = [model() for _ in range(n + 1)]
    folders = [save(folder / f"m{i}", m) for i, m in enumerate(models)]
    upscale_checkpoints(folders[0], folders[1:], folder / "out", **options, **storage)
    same_as_in_memory(upscale(base, experts, **options, progress=False)[0], load_pretrained(folder / "out", base))


def test_transformers_models(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    shape = {"vocab_size": 64, "bos_token_id": 0, "eos_token_id": 1}
    llama = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    for cls, config in (
        (LlamaForCausalLM, LlamaConfig(**llama, **shape, num_hidden_layers=2, tie_word_embeddings=True)),
        (GPT2LMHeadModel, GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=16, **shape)),
    ):
        base = cls(config).eval()
        experts = [finetuned(base).eval() for _ in range(2)]
        folder = tmp_path / cls.__name__
        for i, model in enumerate((base, *experts)):
            model.save_pretrained(folder / f"m{i}", max_shard_size="60KB")
        beside = ("tokenizer.json", "1_Pooling/config.json", "additional_chat_templates/tool.jinja")
        for name in beside:
            (folder / "m0" / name).parent.mkdir(exist_ok=True)
            (folder / "m0" / name).write_text("{}")
        upscale_checkpoints(folder / "m0", [folder / "m1", folder / "m2"], folder / "out", **RANKS)
        want, _ = upscale(base, experts, **RANKS, progress=False)
        got = load_pretrained(folder / "out")
        same_as_in_memory(want, got)
        assert sum(isinstance(m, SmileLinear) for m in got.modules()) == (15 if cls is LlamaForCausalLM else 9)
        assert got.get_output_embeddings().weight is got.get_input_embeddings().weight
        assert [(folder / "out" / name).read_text() for name in beside] == ["{}"] * len(beside)
        ids = torch.randint(64, (2, 6))
        assert torch.equal(got(ids).logits, want(ids).logits)

        # The base's path instead of its tensors.
        upscale_checkpoints(
            folder / "m0", [folder / "m1", folder / "m2"], folder / "experts", experts_only=True, **RANKS
        )
        assert not any(name.endswith((".weight", ".bias")) for name in read_tensors(folder / "experts"))
        same_as_in_memory(want, load_pretrained(folder / "experts"))


def test_adapters_are_experts(tmp_path):
    from peft import LoraConfig, get_peft_model

    base = Net()
    folders = [save(tmp_path / "base", base)]
    for i, targets in enumerate((["up"], ["up", "down"])):
        model = get_peft_model(copy.deepcopy(base), LoraConfig(r=2, lora_alpha=3, target_modules=targets))
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.data = torch.randn_like(p)
        model.save_pretrained(tmp_path / f"lora{i}")
        folders.append(tmp_path / f"lora{i}")
        merged = model.merge_and_unload()
    folders.append(save(tmp_path / "full", finetuned(base)))
    run(*command(folders, tmp_path / "out"))
    loaded = load_pretrained(tmp_path / "out", Net())
    up = loaded.up
    delta = (up.u[1] * up.s[1]) @ up.vh[1, :4]
    torch.testing.assert_close(up.weight + delta, merged.up.weight, rtol=1e-5, atol=1e-6)
    assert not loaded.down.s[0].any()  # the first adapter does not change this layer
    assert loaded.down.s[1].any()


def test_a_few_layers_of_an_adapter_are_in_memory_at_a_time(tmp_path, monkeypatch):
    folder, factors, layers = tmp_path / "lora", {}, 40
    base = save(tmp_path / "base", nn.Sequential(*(nn.Linear(8, 8) for _ in range(layers))))
    folder.mkdir()
    for i in range(layers):
        factors[f"base_model.model.{i}.lora_A.weight"] = torch.randn(2, 8)
        factors[f"base_model.model.{i}.lora_B.weight"] = torch.randn(8, 2)
    safetensors.torch.save_file(factors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))
    load, held, most = StoredTensor.load, weakref.WeakSet(), 0

    def counted(self: StoredTensor) -> torch.Tensor:
        nonlocal most
        tensor = load(self)
        if Path(self.file).parent == folder:
            held.add(tensor)
            most = max(most, len(held))
        return tensor

    monkeypatch.setattr(StoredTensor, "load", counted)
    upscale_checkpoints(base, [folder], tmp_path / "out", workers=1, **RANKS)
    assert 2 < most < layers / 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank_of_expert": 0}, "rank_of_expert: is 0"),
        ({"rank_of_expert": 17}, "rank_of_expert|rank: is 17"),
        ({"rank_of_router": 0}, "rank_of_router: is 0"),
        ({"rank_of_router": 17}, "rank_of_router: is 17"),
        ({"num_experts_per_tok": 4}, "num_experts_per_tok: is 4; expected 1 to 3"),
        ({"remaining": "mean"}, "remaining: is 'mean'; expected 'base' or 'average'"),
        ({"max_shard_size": "big"}, "max_shard_size: is 'big'"),
        ({"include": ["nothing*"]}, "include"),
        ({"experts": []}, "experts: is empty"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_bad_arguments_are_refused_before_anything_is_written(tmp_path, folders, options, message):
    before = sorted(tmp_path.iterdir())
    arguments = {"base": folders[0], "experts": folders[1:], "out": tmp_path / "out", **RANKS} | options
    with pytest.raises(ValueError, match=message):
        upscale_checkpoints(**arguments)
    assert sorted(tmp_path.iterdir()) == before


def test_checkpoints_that_do_not_fit(tmp_path, models, folders):
    before = sorted(tmp_path.iterdir())

    def refused(error: type[Exception], message: str, expert: Path, **options) -> None:
        with pytest.raises(error, match=message):
            upscale_checkpoints(folders[0], [folders[1], expert], tmp_path / "out", **RANKS, **options)
        assert sorted(tmp_path.iterdir()) == before

    refused(FileNotFoundError, "nowhere: no such folder", tmp_path / "nowhere")
    wide = save(tmp_path / "wide", Net(width=32))
    half = save(tmp_path / "half", copy.deepcopy(models[1]).half())
    lacking = save(tmp_path / "lacking", nn.ModuleDict({"up": models[1].up}))
    before = sorted(tmp_path.iterdir())
    refused(
        ValueError, r"experts\[1\]: .*wide.*: tensor 'down\.weight' has shape \[16, 32\]; expected.*\[16, 24\]", wide
    )
    refused(
        ValueError, r"experts\[1\]: .*half.*: tensor 'down\.weight' is torch\.float16; expected.*torch\.float32", half
    )
    refused(ValueError, r"experts\[1\]: .*lacking: has no tensor 'down\.weight'", lacking)
    upscale_checkpoints(folders[0], [folders[1], half], tmp_path / "mixed", **RANKS, dtype=torch.float32)
    upscale_checkpoints(folders[0], [folders[1], lacking], tmp_path / "part", **RANKS, include=["up"])


def test_factors_of_a_wider_dtype_are_not_rounded_to_that_of_the_inputs(tmp_path, models):
    inputs = [save(tmp_path / f"half{i}", copy.deepcopy(model).half()) for i, model in enumerate(models[:2])]
    upscale_checkpoints(
        inputs[0], inputs[1:], tmp_path / "out", rank_of_expert=-1, rank_of_router=2, dtype=torch.float32
    )
    stored = {name: tensor.load() for name, tensor in read_tensors(tmp_path / "out").items()}
    delta = models[1].half().up.weight.double() - models[0].half().up.weight.double()
    vh, s, u = (stored[f"up.{part}"][0].double() for part in ("vh", "s", "u"))
    assert (u @ (s[:, None] * vh) - delta).norm() < 1e-5 * delta.norm()


@pytest.mark.parametrize(("option", "value"), [("remaining", "average"), ("embeddings_from", 0)])
def test_experts_alone_are_not_asked_for_other_tensors_of_the_base(tmp_path, folders, option, value):
    with pytest.raises(ValueError, match=f"^{option}: is {value!r}, and experts_only stores no tensor of the base"):
        upscale_checkpoints(folders[0], folders[1:], tmp_path / "out", **RANKS, experts_only=True, **{option: value})
    assert not list(tmp_path.glob("out*"))


def test_a_folder_of_the_base_that_cannot_be_read_is_not_left_out(tmp_path, folders, monkeypatch):
    (folders[0] / "1_Pooling").mkdir()
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("1_Pooling"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError, match="1_Pooling"):
        upscale_checkpoints(folders[0], folders[1:], tmp_path / "out", **RANKS)
    assert not list(tmp_path.glob("out*"))


def test_the_model_card_names_the_folders_that_were_given_as_the_current_one(tmp_path, folders, monkeypatch):
    monkeypatch.chdir(folders[1])
    upscale_checkpoints(folders[0], ["."], tmp_path / "out", **RANKS)
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"- base: `{folders[0].name}`" in card
    assert f": `{folders[1].name}`" in card


def test_a_language_model_without_a_kv_cache_is_not_calibrated(tmp_path):
    """Known before the work, without the model's weights."""
    from transformers import OpenAIGPTConfig, OpenAIGPTLMHeadModel

    base = OpenAIGPTLMHeadModel(OpenAIGPTConfig(vocab_size=32, n_positions=16, n_embd=16, n_layer=1, n_head=2))
    for name, model in (("base", base), ("expert", finetuned(base))):
        model.save_pretrained(tmp_path / name)
    with pytest.raises(ValueError, match="inputs: OpenAIGPTLMHeadModel returns no KV cache"):
        upscale_checkpoints(tmp_path / "base", [tmp_path / "expert"], tmp_path / "out", **RANKS, calibrate=True)
    assert not list(tmp_path.glob("out*"))


def test_checkpoints_of_another_kind(tmp_path, folders):
    for folder, config in zip(folders, ({"model_type": "llama"}, {"model_type": "mistral"}, {}, {})):
        (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"experts\[0\]: .*m1 is a mistral; expected a llama as the base"):
        upscale_checkpoints(folders[0], folders[1:], tmp_path / "out", **RANKS)
    (folders[0] / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "quip"}}))
    with pytest.raises(ValueError, match=r"base: .*m0 is stored as 'quip'; expected a checkpoint of plain weights"):
        upscale_checkpoints(folders[0], folders[1:], tmp_path / "out", **RANKS)
    (folders[0] / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(ValueError, match="is a gpt2, which stores layers transposed"):
        upscale_checkpoints(folders[0], folders[2:], tmp_path / "out", **RANKS)
    assert not list(tmp_path.glob("out*"))


def test_layers_that_are_never_called_are_refused(tmp_path):
    from transformers import SiglipVisionConfig, SiglipVisionModel

    shape = {"num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}
    base = SiglipVisionModel(SiglipVisionConfig(hidden_size=16, intermediate_size=24, **shape))
    for name, model in (("base", base), ("expert", finetuned(base))):
        model.save_pretrained(tmp_path / name)
    with pytest.raises(ValueError, match=r"head\.attention\.out_proj cannot have experts.*expected it in exclude"):
        upscale_checkpoints(tmp_path / "base", [tmp_path / "expert"], tmp_path / "out", strict=True, **RANKS)
    upscale_checkpoints(
        tmp_path / "base", [tmp_path / "expert"], tmp_path / "out", strict=True, exclude=["*.out_proj"], **RANKS
    )


def test_a_folder_in_the_way_of_the_work(tmp_path, folders):
    mine = tmp_path / "out.partial" / "notes.txt"
    mine.parent.mkdir()
    mine.write_text("mine")
    with pytest.raises(FileExistsError, match=r"out\.partial: contains notes\.txt"):
        upscale_checkpoints(folders[0], folders[1:], tmp_path / "out", **RANKS, force=True)
    assert mine.read_text() == "mine"


def test_nan_names_the_file_and_the_tensor(tmp_path, models, folders):
    models[1].down.weight.data[3, 5] = float("nan")
    bad = save(tmp_path / "bad", models[1])
    with pytest.raises(ValueError, match=r"bad/model\.safetensors: tensor 'down\.weight' holds 1 NaN.*\[3, 5\]"):
        upscale_checkpoints(folders[0], [folders[1], bad], tmp_path / "out", **RANKS)
    assert not (tmp_path / "out").exists()


def test_the_base_is_checked_too(tmp_path, models, folders):
    models[0].norm.weight.data[0] = float("inf")
    bad = save(tmp_path / "bad", models[0])
    with pytest.raises(ValueError, match=r"bad/model\.safetensors: tensor 'norm\.weight' holds 1 NaN or inf"):
        upscale_checkpoints(bad, folders[1:], tmp_path / "out", **RANKS)
    assert not (tmp_path / "out").exists()


def test_output_folder_that_is_not_empty(tmp_path, folders):
    (tmp_path / "out").mkdir()
    run(*command(folders, tmp_path / "out"))  # an empty folder is accepted
    first = contents(tmp_path / "out")
    with pytest.warns(UserWarning, match="already complete"):
        run(*command(folders, tmp_path / "out"))
    assert contents(tmp_path / "out") == first
    result = CliRunner().invoke(app, command(folders, tmp_path / "out", "--exclude", "down"))
    assert result.exit_code == 1
    assert "is not empty" in result.output
    assert contents(tmp_path / "out") == first
    run(*command(folders, tmp_path / "out", "--force", "--exclude", "down"))
    assert "down.vh" not in read_tensors(tmp_path / "out")
    assert not [f for f in tmp_path.iterdir() if "out" in f.name and f.name != "out"]


def test_inputs_and_foreign_files_are_never_replaced(tmp_path, folders):
    before = [contents(folder) for folder in folders]
    for out, message in (
        (folders[0], "is base"),
        (folders[2], r"is experts\[1\]"),
        (folders[0].parent, "contains base"),
        (folders[1] / "fused", r"is inside experts\[0\]"),
        ("", "expected the path of a folder"),
    ):
        with pytest.raises(ValueError, match=message):
            upscale_checkpoints(folders[0], folders[1:], out, **RANKS, experts_only=True, force=True)

    def late(stage: str, done: int, total: int) -> None:
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / "notes.txt").write_text("mine")

    for force in (False, True):
        with pytest.raises(FileExistsError, match=r"cannot be written|contains notes"):
            upscale_checkpoints(folders[0], folders[1:], tmp_path / "out", **RANKS, force=force, progress=late)
        assert [f.name for f in (tmp_path / "out").iterdir()] == ["notes.txt"]
    assert [contents(folder) for folder in folders] == before


def test_one_sided_biases(tmp_path):
    base, other = nn.ModuleDict({"a": nn.Linear(8, 8, bias=False)}), nn.ModuleDict({"a": nn.Linear(8, 8)})
    for i, (first, second) in enumerate(((base, other), (other, base))):
        folders = [save(tmp_path / f"{i}{j}", model) for j, model in enumerate((first, second))]
        upscale_checkpoints(folders[0], folders[1:], tmp_path / f"out{i}", **RANKS)
        layer = load_pretrained(tmp_path / f"out{i}", copy.deepcopy(first))["a"]
        want = other["a"].bias if first is base else -other["a"].bias
        torch.testing.assert_close(layer.expert_bias[0], want)


def test_layers_that_were_not_trained_are_left_alone(tmp_path, models):
    for model in models[1:]:
        model.down.load_state_dict(models[0].down.state_dict())
    folders = [save(tmp_path / f"n{i}", model) for i, model in enumerate(models)]
    report = upscale_checkpoints(folders[0], folders[1:], tmp_path / "out", **RANKS)
    assert {layer.name: bool(layer.skipped) for layer in report.layers} == {"up": False, "down": True}
    loaded = load_pretrained(tmp_path / "out", Net())
    assert isinstance(loaded.down, nn.Linear)
    same_as_in_memory(upscale(models[0], models[1:], **RANKS, progress=False)[0], loaded)


def test_a_full_disk(tmp_path, folders, monkeypatch):
    upscale_checkpoints(folders[0], folders[1:], tmp_path / "whole", **RANKS)
    usage = type("Usage", (), {"free": 1000})
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda path: usage)
        with pytest.raises(OSError, match=r"disk is too full: .* bytes are needed and 1,000 are free"):
            upscale_checkpoints(folders[0], folders[1:], tmp_path / "out", **RANKS)
        assert not [f for f in tmp_path.iterdir() if f.name.startswith("out")]

    written = 0

    class Full:
        """A file on a disk that is full after 4,000 bytes, in the middle of the output."""

        def __init__(self, *arguments, **options):
            self.file = open(*arguments, **options)  # noqa: SIM115

        def write(self, data):
            nonlocal written
            written += len(data)
            if written > 9000:
                raise OSError(28, "No space left on device")
            return self.file.write(data)

        __enter__ = lambda self: self  # noqa: E731
        __exit__ = lambda self, *exception: self.file.close()  # noqa: E731
        __getattr__ = lambda self, name: getattr(self.file, name)  # noqa: E731

    with monkeypatch.context() as patch:
        patch.setattr("smile_kernels.publishing.open", Full, raising=False)
        with pytest.raises(OSError, match="disk is full"):
            upscale_checkpoints(folders[0], folders[1:], tmp_path / "out", **RANKS)
    assert not (tmp_path / "out").exists()
    assert not [f for f in (tmp_path / "out.partial").rglob(".*")]
    upscale_checkpoints(folders[0], folders[1:], tmp_path / "out", **RANKS)  # continues
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_goes_on_only_with_the_same_inputs_and_settings(tmp_path, models, folders):
    def interrupted(stage: str, done: int, total: int) -> None:
        if stage == "layers":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        upscale_checkpoints(folders[0], folders[1:], tmp_path / "out", **RANKS, workers=1, progress=interrupted)
    assert list((tmp_path / "out.partial" / "layers").glob("*.json"))
    with pytest.raises(FileExistsError, match=r"out\.partial: was started with another rank_of_expert"):
        upscale_checkpoints(folders[0], folders[1:], tmp_path / "out", rank_of_expert=5, rank_of_router=2)
    write_tensors(folders[1], [StoredTensor.of(n, t) for n, t in models[2].state_dict().items()])
    with pytest.raises(FileExistsError, match="was started with another files"):
        upscale_checkpoints(folders[0], folders[1:], tmp_path / "out", **RANKS)
    upscale_checkpoints(folders[0], folders[1:], tmp_path / "out", **RANKS, force=True)
    upscale_checkpoints(folders[0], folders[1:], tmp_path / "again", **RANKS)
    assert contents(tmp_path / "out") == contents(tmp_path / "again")


@pytest.mark.parametrize("factor", ["up.u", "norm.weight"])
def test_nan_in_a_finished_file_of_an_interrupted_run_is_written_again(tmp_path, folders, factor):
    def interrupted(stage: str, done: int, total: int) -> None:
        if stage == "files":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        upscale_checkpoints(folders[0], folders[1:], tmp_path / "out", **RANKS, progress=interrupted)
    file = tmp_path / "out.partial" / "output" / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    tensors[factor].view(-1)[3] = torch.nan
    safetensors.torch.save_file(tensors, file, {"format": "pt"})
    upscale_checkpoints(folders[0], folders[1:], tmp_path / "out", **RANKS)
    upscale_checkpoints(folders[0], folders[1:], tmp_path / "again", **RANKS)
    assert contents(tmp_path / "out") == contents(tmp_path / "again")


class Deep(nn.Module):
    """Layers large enough for more than one thread, by every method of decomposition."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(*shape) for shape in ((320, 640), (640, 320), (320, 320), (64, 48)))


def processes(threads: int, *arguments: str, **options) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    return subprocess.Popen([sys.executable, *arguments], env=environment, **options)


@pytest.fixture(scope="module")
def deep(tmp_path_factory) -> tuple[list[Path], dict[str, bytes]]:
    """Folders of larger models, and the result of one uninterrupted process with two threads."""
    folder = tmp_path_factory.mktemp("deep")
    torch.manual_seed(0)
    base = Deep()
    folders = [save(folder / f"m{i}", model) for i, model in enumerate((base, finetuned(base), finetuned(base)))]
    assert processes(2, "-m", "smile_kernels", *command(folders, folder / "whole")).wait() == 0
    return folders, contents(folder / "whole")


def test_in_memory_gives_the_same_bits_whatever_the_threads(deep, tmp_path):
    folders, whole = deep
    models = [Deep() for _ in folders]
    for folder, model in zip(folders, models):
        model.load_state_dict(safetensors.torch.load_file(folder / "model.safetensors"))
    (tmp_path / "whole").mkdir()
    for name, content in whole.items():
        (tmp_path / "whole" / name).write_bytes(content)
    threads = torch.get_num_threads()
    for count in (1, 3):
        torch.set_num_threads(count)
        model, _ = upscale(models[0], models[1:], **RANKS, progress=False)
        assert torch.get_num_threads() == count
        same_as_in_memory(model, load_pretrained(tmp_path / "whole", Deep()))
    torch.set_num_threads(threads)


# Prints the layer it has finished, and stops at the requested one.
WATCHED = """
import sys, time
from smile_kernels.upscaling import disk
from smile_kernels.cli import app
stop, write = sys.argv.pop(1), disk.write_text
def watched(file, text):
    write(file, text)
    if file.parent.name == "layers":
        print(file.stem, flush=True)
        time.sleep(600 if file.stem == stop else 0)
disk.write_text = watched
app(sys.argv[1:])
"""


def test_killed_and_started_again(tmp_path, deep):
    folders, whole = deep
    arguments = command(folders, tmp_path / "out", "--workers", "1")
    process = processes(1, "-c", WATCHED, "1", *arguments, stdout=subprocess.PIPE, text=True)
    assert [process.stdout.readline() for _ in range(2)] == ["0\n", "1\n"]
    process.kill()
    process.wait()
    assert not (tmp_path / "out").exists()
    work = tmp_path / "out.partial"
    for left in (work / "layers" / ".2.safetensors.0123456789ab", work / "output" / ".model.safetensors.0123456789ab"):
        left.write_bytes(b"half")  # an incomplete write

    process = processes(1, "-c", WATCHED, "none", *arguments, stdout=subprocess.PIPE, text=True)
    assert process.communicate()[0].splitlines()[:2] == ["2", "3"]
    assert process.returncode == 0
    assert contents(tmp_path / "out") == whole
    assert not work.exists()


def test_processes_share_the_work_and_give_the_same_bits(tmp_path, deep):
    folders, whole = deep
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "smile_kernels"]
    assert processes(1, *launch, *command(folders, tmp_path / "out")).wait() == 0
    assert contents(tmp_path / "out") == whole


def test_nan_anywhere_is_found_before_the_first_layer(tmp_path, folders):
    for folder, name in ((folders[0], "norm.weight"), (folders[1], "up.weight")):
        file = folder / "model.safetensors"
        whole = safetensors.torch.load_file(file)
        safetensors.torch.save_file({**whole, name: torch.full_like(whole[name], torch.nan)}, file)
        stages: set[str] = set()

        def seen(stage: str, done: int, total: int, stages: set[str] = stages) -> None:
            stages.add(stage)

        with pytest.raises(ValueError, match=rf"model\.safetensors: tensor '{name}' holds"):
            upscale_checkpoints(folders[0], folders[1:], tmp_path / "out", **RANKS, progress=seen)
        assert "layers" not in stages
        safetensors.torch.save_file(whole, file)


def test_an_incomplete_base_is_refused(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    base = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=2, num_key_value_heads=2))
    for name in ("base", "expert"):
        base.save_pretrained(tmp_path / name)
    file, config = tmp_path / "base" / "model.safetensors", tmp_path / "base" / "config.json"
    whole, text = safetensors.torch.load_file(file), config.read_text()

    def refused(message: str) -> None:
        with pytest.raises(ValueError, match=message):
            upscale_checkpoints(tmp_path / "base", [tmp_path / "expert"], tmp_path / "out", **RANKS)
        assert not (tmp_path / "out").exists()

    for name in ("model.norm.weight", "model.layers.1.mlp.up_proj.weight"):
        safetensors.torch.save_file({k: t for k, t in whole.items() if k != name}, file)
        refused(f"base: tensor '{name}' is missing; expected all of LlamaForCausalLM")
    safetensors.torch.save_file(whole, file)
    config.write_text(text.replace('"num_hidden_layers": 2', '"num_hidden_layers": 1'))
    refused(r"tensor 'model\.layers\.1\.\S+' belongs to no block of the LlamaForCausalLM")
    config.write_text(text.replace('"num_hidden_layers": 2', '"num_hidden_layers": 3'))
    refused(r"tensor 'model\.layers\.2\.\S+' is missing")


@pytest.mark.exhaustive
def test_an_upscaling_killed_at_every_file_operation_is_finished_to_the_same_bits(tmp_path, folders):
    torch.set_num_threads(1)
    upscale_checkpoints(folders[0], folders[1:], tmp_path / "expected", **RANKS, workers=1)
    expected, inputs = contents(tmp_path / "expected"), [contents(folder) for folder in folders]
    operation, killed = 0, True
    while killed:
        out = tmp_path / str(operation) / "out"
        out.parent.mkdir()

        def job(out: Path = out) -> None:
            upscale_checkpoints(folders[0], folders[1:], out, **RANKS, workers=1)

        killed = killed_at(operation, job)
        assert not out.exists() or contents(out) == expected
        job()
        assert contents(out) == expected, f"operation {operation}"
        assert [f.name for f in out.parent.iterdir()] == ["out"], f"left after operation {operation}"
        operation += 1
    print(f"{operation} kill points")
    assert [contents(folder) for folder in folders] == inputs
    assert operation > 50


def test_experts_that_change_nothing_leave_nothing(tmp_path, folders, models):
    same = save(tmp_path / "same", models[0])
    with pytest.raises(ValueError, match="experts: change no layer that can have experts"):
        upscale_checkpoints(folders[0], [same], tmp_path / "out", **RANKS)
    assert [path.name for path in tmp_path.glob("*out*")] == []
    upscale_checkpoints(folders[0], [folders[1]], tmp_path / "out", **RANKS)
