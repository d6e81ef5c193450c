"""Files of the experts, such as tokenizers, that are not in the result, are listed; they are compared by value."""

import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from unittest.mock import DEFAULT, Mock

import pytest
import torch
from safetensors.torch import save_file

import smile_kernels as sk
from smile_kernels.upscaling import disk
from smile_kernels.upscaling.report import LostFile, UpscaleReport
from tests.integrations import tiny_models
from tests.upscaling.checkpoints import command, finetuned, run

RANKS = {"rank_of_expert": 4, "rank_of_router": 2, "workers": 1}


DATA = (
    *("voices.npz", "speaker_embeddings/a.npy", "adapter.fra.safetensors", "text-tokenizer/vocab.json"),
    *("spk_dict.pt", "text-tokenizer/tokenizer_config.json", "modeling_own.py", "labels.txt"),
)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A base, an expert and an adapter, each with the files of a chat model and of a sentence encoder."""
    folder = tmp_path_factory.mktemp("files")
    torch.manual_seed(0)
    tokenizer = tiny_models.chat_tokenizer()
    base = tiny_models.chat_model(tokenizer)
    expert = finetuned(base)
    with torch.no_grad():
        for name in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"):
            expert.get_parameter(name).copy_(base.get_parameter(name))
    for name, model in {"base": base, "expert": expert}.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        (folder / name / "2_Dense").mkdir()
        save_file({"linear.weight": torch.ones(4, 4)}, folder / name / "2_Dense" / "model.safetensors")
        (folder / name / "preprocessor_config.json").write_text(
            '{"image_processor_type": "ViTImageProcessor", "image_mean": [0.5, 0.5, 0.5]}'
        )
        for data in (*DATA, "LICENSE", "eval_results.json", "special_tokens_map.json", "text-tokenizer/merges.txt"):
            text(data, "{}")(folder / name)
    return folder


def text(name: str, content: str) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content)

    return change


def settings(name: str, **values: object) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | values))


def exchanged(folder: Path) -> None:
    """Two tokens have each other's ids."""
    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    a, b = list(vocabulary)[40:42]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    (folder / "tokenizer.json").write_text(json.dumps(content))


def template_in_config(folder: Path) -> None:
    """As versions of transformers before 4.50 store it."""
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    settings("tokenizer_config.json", chat_template=template)(folder)


def saved_by_another_version(folder: Path) -> None:
    template_in_config(folder)
    settings("tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast", added_tokens_decoder={}, legacy=None)(
        folder
    )
    cut = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    filled = {"direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0, "pad_token": "<|end|>"}
    settings("tokenizer.json", truncation=cut, padding=filled | {"strategy": "BatchLongest"})(folder)
    settings("generation_config.json", transformers_version="4.1", do_sample=False)(folder)
    settings("preprocessor_config.json", image_processor_type="ViTImageProcessorFast", data_format=None)(folder)
    (folder / "vocab.json").write_text("{}")
    for name in ("README.md", "LICENSE", "eval_results.json", "notes", "train.log"):
        (folder / name).write_text("Fine-tuned")
    (folder / "special_tokens_map.json").write_text('{"eos_token": {"content": "<|end|>"}}')


def no_files(folder: Path) -> None:
    for file in folder.iterdir():
        if file.is_dir():
            shutil.rmtree(file)
        elif "tok" in file.name or "template" in file.name or "preproc" in file.name:
            file.unlink()


CHANGES: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "nothing": (lambda folder: None, []),
    "ids exchanged": (exchanged, ["tokenizer.json"]),
    "another template": (text("chat_template.jinja", "{{ messages }}"), ["chat_template.jinja"]),
    "another template by name": (
        text("additional_chat_templates/tool.jinja", "{{ messages }}"),
        ["additional_chat_templates/tool.jinja"],
    ),
    "another template in the config": (
        lambda folder: [template_in_config(folder), settings("tokenizer_config.json", chat_template="x")(folder)],
        ["chat_template.jinja"],
    ),
    "another beginning": (settings("tokenizer_config.json", eos_token="<|user|>"), ["tokenizer_config.json"]),
    "other images": (settings("preprocessor_config.json", image_mean=[0.1] * 3), ["preprocessor_config.json"]),
    "another pooling": (text("1_Pooling/config.json", '{"pooling_mode": "cls"}'), ["1_Pooling/config.json"]),
    "another dense layer": (
        lambda folder: save_file({"linear.weight": torch.zeros(4, 4)}, folder / "2_Dense" / "model.safetensors"),
        ["2_Dense/model.safetensors"],
    ),
    "another temperature": (settings("generation_config.json", temperature=0.1), ["generation_config.json"]),
    "a damaged tokenizer": (text("tokenizer.json", "[" * 200_000), ["tokenizer.json"]),
    "another version": (saved_by_another_version, []),
    "no files": (no_files, []),
    **{f"another {name}": (text(name, "[1]"), [name]) for name in DATA},
    **{
        f"a new {name}": (text(name, "[1]"), [name])
        for name in ("speaker_embeddings/b.npy", "adapter.deu.safetensors", "text-tokenizer/added_tokens.json")
    },
}


@pytest.mark.parametrize("case", CHANGES)
def test_files_that_an_expert_has_otherwise_are_listed(case, models, tmp_path):
    change, listed = CHANGES[case]
    shutil.copytree(models / "expert", tmp_path / "expert")
    change(tmp_path / "expert")
    experts = [models / "expert", tmp_path / "expert"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = sk.upscale_checkpoints(models / "base", experts, tmp_path / "out", expert_names=["a", "b"], **RANKS)
    assert report.files == [LostFile(name, [1]) for name in listed]
    said = [str(one.message) for one in caught if "files of the experts are not in the result" in str(one.message)]
    assert bool(said) == bool(set(listed) - {"generation_config.json"})
    for name in listed:
        assert f"file that is not in the result: {name} of b" in str(report)
        assert name in report.table()
    assert UpscaleReport.load(tmp_path / "out" / "smile_report.json").files == report.files


def test_files_of_the_base_that_are_no_weights_are_copied_and_others_named(models, tmp_path):
    """A tokenizer in a folder of its own, the voices of a speech model, other weights, an unfinished training."""
    base = tmp_path / "base"
    shutil.copytree(models / "base", base)
    copied = [
        "spk_dict.pt",
        "voice.bin",
        "adapter.fra.safetensors",
        "qformer_tokenizer/tokenizer.json",
        "speaker_embeddings/a.npy",
    ]
    known = ["training_args.bin", "optimizer.pt", "pytorch_model.bin", "tf_model.h5", "original/consolidated.00.pth"]
    known += ["checkpoint-5/tokenizer.json", "checkpoint-5/rng_state.pth", ".cache/tokenizer.json"]
    passing = ["train.log", "nohup.out", ".x.swp", "events.out.tfevents.1.a", "speaker_embeddings/.DS_Store"]
    named = ["other.safetensors", "assets/", "huge.bin", "link/", "text_encoder/"]
    for name in [
        *copied,
        *known,
        *passing,
        "assets/a.wav",
        "text_encoder/tokenizer.json",
        "text_encoder/model.safetensors",
    ]:
        text(name, "{}")(base)
    save_file({"a": torch.ones(1)}, base / "other.safetensors")
    with open(base / "huge.bin", "wb") as file:
        file.truncate((1 << 28) + 1)
    (base / "link").symlink_to(models / "base")
    shutil.copytree(models / "expert", tmp_path / "expert")
    text("qformer_tokenizer/tokenizer.json", "[1]")(tmp_path / "expert")
    with pytest.warns(UserWarning, match=r"base: \S+: not copied to the result: ") as caught:
        report = sk.upscale_checkpoints(base, [tmp_path / "expert"], tmp_path / "out", **RANKS)
    assert report.files == [LostFile("qformer_tokenizer/tokenizer.json", [0])]
    assert all((tmp_path / "out" / name).read_text() == "{}" for name in copied)
    assert not any((tmp_path / "out" / name).exists() for name in [*known, *named, *passing])
    [said] = [str(one.message) for one in caught if "not copied" in str(one.message)]
    assert f"result: {', '.join(sorted(named))}. If the model needs them" in said


def test_documents_notes_and_logs_of_the_base_may_grow(models, tmp_path):
    base, out = tmp_path / "base", tmp_path / "out"
    shutil.copytree(models / "base", base)
    growing = ["log.txt", "notes.txt", "train_log.csv", "trainer_log.jsonl", "LICENSE", "train.log.1"]
    for name in growing:
        text(name, "a")(base)

    def grow(*_: object) -> None:
        for name in growing:
            with (base / name).open("a") as file:
                file.write("b")

    sk.upscale_checkpoints(base, [models / "expert"], out, **RANKS, progress=grow)
    grow()
    assert all((out / name).read_text().startswith("ab") for name in growing[:-1])
    assert not (out / growing[-1]).exists()
    with pytest.warns(UserWarning, match="already complete"):
        sk.upscale_checkpoints(base, [models / "expert"], out, **RANKS)
    text("labels.txt", "other")(base)
    with pytest.raises(FileExistsError, match="is not empty"):
        sk.upscale_checkpoints(base, [models / "expert"], out, **RANKS)


@pytest.mark.parametrize("options", [{}, {"force": True}], ids=["same", "force"])
def test_documents_that_are_deleted_before_a_restart_are_not_in_the_result(options, models, tmp_path, monkeypatch):
    base, out = tmp_path / "base", tmp_path / "out"
    shutil.copytree(models / "base", base)
    for name in ("notes.txt", "LICENSE", "2_Notes/notes.md"):
        text(name, "a")(base)
    monkeypatch.setattr(disk, "write_config", Mock(side_effect=[KeyboardInterrupt, DEFAULT], wraps=disk.write_config))
    with pytest.raises(KeyboardInterrupt):
        sk.upscale_checkpoints(base, [models / "expert"], out, **RANKS)
    assert (tmp_path / "out.partial" / "output" / "notes.txt").exists()
    (base / "notes.txt").rename(base / "old_notes.txt")
    shutil.rmtree(base / "2_Notes")
    sk.upscale_checkpoints(base, [models / "expert"], out, **RANKS, **options)
    mine = {"notes.txt", "2_Notes", "LICENSE", "old_notes.txt"}
    assert mine.intersection(path.name for path in out.iterdir()) == {"LICENSE", "old_notes.txt"}
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("replace", [lambda file: None, os.mkfifo], ids=["deleted", "a pipe"])
def test_documents_that_are_deleted_meanwhile_are_not_copied(replace, models, tmp_path):
    base, names = tmp_path / "base", ("notes.txt", "1_Pooling/notes.md")
    shutil.copytree(models / "base", base)
    for name in (*names, "labels.txt"):
        text(name, "a")(base)

    def delete(name: str) -> None:
        (base / name).unlink(missing_ok=True)
        replace(base / name)

    with pytest.warns(UserWarning, match=r"^base: \S+notes\.txt is not copied: it is not a regular file any more"):
        sk.upscale_checkpoints(
            base, [models / "expert"], tmp_path / "out", **RANKS, progress=lambda *_: [*map(delete, names)]
        )
    assert (tmp_path / "out" / "labels.txt").exists()
    assert not (tmp_path / "out" / "notes.txt").exists()
    for name in names:
        (base / name).unlink(missing_ok=True)
    with (
        pytest.raises(sk.SmileError, match=r"base: labels\.txt was changed while"),
        pytest.warns(UserWarning, match=r"labels\.txt is not copied"),
    ):
        sk.upscale_checkpoints(
            base, [models / "expert"], tmp_path / "other", **RANKS, progress=lambda *_: delete("labels.txt")
        )


def test_the_command_shows_them_and_reports_of_before_are_read(models, tmp_path):
    shutil.copytree(models / "expert", tmp_path / "expert")
    exchanged(tmp_path / "expert")
    shown = run(*command([models / "base", tmp_path / "expert"], tmp_path / "out"))
    assert "file that is not in the result: tokenizer.json of expert" in shown
    stored = json.loads((tmp_path / "out" / "smile_report.json").read_text())
    del stored["files"]
    (tmp_path / "old.json").write_text(json.dumps(stored))
    assert UpscaleReport.load(tmp_path / "old.json").files == []


def test_the_tokenizer_of_an_expert_with_added_tokens_is_the_results(models, tmp_path):
    """Experts with the base's tokenizer have nothing otherwise; an expert without a tokenizer has no added tokens."""
    tokenizer = tiny_models.chat_tokenizer()
    tokenizer.add_tokens(["<more>"])
    model = tiny_models.chat_model(tokenizer)
    model.save_pretrained(tmp_path / "more")
    for file in ("more.txt", "tokenizer_config.json", "tokenizer.json"):  # of which the last two have no tokens
        (tmp_path / "more" / file).write_text("{}" if "config" in file else "")
        with pytest.raises(sk.SmileError, match=r"^embeddings_from: .*more has no tokenizer with its tokens"):
            sk.upscale_checkpoints(models / "base", [tmp_path / "more"], tmp_path / "out", embeddings_from=0, **RANKS)
        assert not list(tmp_path.glob("out*"))
    (tmp_path / "more" / "more.txt").unlink()
    tokenizer.save_pretrained(tmp_path / "more")
    experts = [tmp_path / "more", models / "expert"]
    report = sk.upscale_checkpoints(models / "base", experts, tmp_path / "out", embeddings_from=0, **RANKS)
    assert report.files == []
