"""Files that change during the work, interrupted jobs, full disks, and what is warned of."""

import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import smile_kernels as sk
from smile_kernels import checkpoint
from smile_kernels.upscaling import disk
from smile_kernels.upscaling.layers import _limited_modules
from tests.faults.changes import (
    ADAPTER_CONFIG,
    OPTIONS,
    adapter,
    command,
    fuse,
    load,
    pooling,
    settings,
    tensors,
    text_in,
)

CHANGES: dict[str, Callable[[Path], object]] = {
    "a file instead of another": lambda folder: shutil.copy(
        folder / "expert" / "model.safetensors", sorted((folder / "base").glob("model-*"))[0]
    ),
    "a file cut short": lambda folder: os.truncate(sorted((folder / "base").glob("model-*"))[-1], 100),
    "a tokenizer more": lambda folder: (folder / "expert" / "tokenizer.json").write_text("{}"),
    "a tokenizer of the base": lambda folder: (folder / "base" / "tokenizer.json").write_text("{}"),
    "an expert's file of the name of one that is copied": text_in("expert/1_Pooling", "config.json", "{}"),
    "weights more": lambda folder: shutil.copy(
        folder / "expert" / "model.safetensors", folder / "expert" / "more.safetensors"
    ),
    "a config": lambda folder: settings("expert", rope_theta=5)(folder),
    "a file in a folder that is copied": lambda folder: pooling(folder, "changed"),
    "a folder removed": lambda folder: shutil.rmtree(folder / "expert"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_inputs_that_change_during_the_work_are_named(change, folder):
    def changed(stage: str, done: int, total: int) -> None:
        if stage == "layers" and done == 1:
            CHANGES[change](folder)

    pooling(folder)
    with pytest.raises((sk.SmileError, OSError), match=r"base|expert"):
        fuse(folder, progress=changed)
    assert not (folder / "out").exists()


@pytest.mark.parametrize("read", ["files_beside", "layers_of_checkpoint", "open_source", "lost_files", "check_fit"])
@pytest.mark.parametrize("file", ["base/config.json", "expert/config.json", "adapter/adapter_config.json"])
def test_settings_that_change_while_they_are_read_are_named(read, file, folder, monkeypatch):
    """The result would have the old ones, and its manifest the times of the new ones."""
    plain, path = getattr(disk, read), folder / file

    def late(*args, **options):
        found = plain(*args, **options)
        path.write_text(path.read_text() + " ")
        return found

    monkeypatch.setattr(disk, read, late)
    with pytest.raises(sk.SmileError, match=rf"^(base|experts\[.\]): {path.name} was changed while"):
        fuse(folder)
    assert not (folder / "out").exists()


def test_files_without_a_part_in_the_model_may_change_during_the_work(folder):
    """Logs that grow, and what an editor, a file manager, a training or a user leaves."""
    names = [".DS_Store", ".notes.swp", "train.log", "events.out.tfevents.1.host", "README.md", "optimizer.bin"]
    for part in ("base", "expert", "adapter"):
        (folder / part / "train.log").write_text("1")

    def changed(stage: str, done: int, total: int) -> None:
        for name in names:
            for part in ("base", "expert", "adapter"):
                (folder / part / name).write_text(f"{stage} {done}")
        (folder / "expert" / "notes").write_text("mine")
        (folder / "base" / "later.txt").write_text("mine")
        (folder / "base" / "1_Pooling" / ".DS_Store").write_text(f"{stage} {done}")

    pooling(folder)
    fuse(folder, progress=changed)
    assert not {*names} & {file.name for file in (folder / "out").rglob("*")} - {"README.md"}


def test_a_copied_file_that_changed_is_copied_again(folder):
    pooling(folder)
    fuse(folder)
    pooling(folder, "[1]")
    fuse(folder, force=True)
    assert (folder / "out" / "1_Pooling" / "config.json").read_text() == "[1]"


def test_a_calibration_that_was_interrupted_between_its_files_is_done_again(folder, monkeypatch):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_config", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fuse(folder, calibrate=True)
    assert (folder / "out.partial" / "output" / "model.safetensors").exists()
    fuse(folder, calibrate=True)
    assert sk.get_routing(sk.load_pretrained(folder / "out")).calibrated


def changed_layer(change: Callable[[str, torch.Tensor], torch.Tensor | None]) -> Callable[[Path], object]:
    def apply(layers: Path) -> None:
        stored = {name: change(name, tensor) for name, tensor in load_file(layers / "0.safetensors").items()}
        save_file({name: t.contiguous() for name, t in stored.items() if t is not None}, layers / "0.safetensors")

    return apply


DAMAGES: dict[str, Callable[[Path], object]] = {
    "without a factor": changed_layer(lambda name, t: None if name.endswith(".u") else t),
    "of another rank": changed_layer(lambda name, t: t[..., :2] if name.endswith((".u", ".s")) else t[:, :2]),
    "with NaN": changed_layer(lambda name, t: t * torch.nan if name.endswith(".s") else t),
    "cut short": lambda layers: os.truncate(layers / "0.safetensors", 40),
    "lost": lambda layers: (layers / "1.safetensors").unlink(),
    "of another layer": lambda layers: shutil.copy(layers / "1.safetensors", layers / "2.safetensors"),
    "without its report": lambda layers: (layers / "0.json").unlink(),
    "with a report of another kind": lambda layers: (layers / "0.json").write_text('{"name": 5}'),
}


def test_damaged_layers_of_an_interrupted_run_are_computed_again(folder):
    def interrupted(stage: str, done: int, total: int) -> None:
        if stage == "layers" and done == 5:
            raise KeyboardInterrupt

    fuse(folder)
    whole = (folder / "out" / "model.safetensors").read_bytes()
    for damage in DAMAGES.values():
        shutil.rmtree(folder / "out")
        with pytest.raises(KeyboardInterrupt):
            fuse(folder, progress=interrupted)
        damage(folder / "out.partial" / "layers")
        fuse(folder)
        assert (folder / "out" / "model.safetensors").read_bytes() == whole
        assert not (folder / "out.partial").exists()


def test_a_damaged_output_of_an_interrupted_run_is_written_again(folder, monkeypatch):
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    fuse(folder)
    whole = (folder / "out" / "model.safetensors").read_bytes()
    shutil.rmtree(folder / "out")
    with monkeypatch.context() as patch:
        patch.setattr("smile_kernels.upscaling.disk.write_index", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fuse(folder)
    os.truncate(folder / "out.partial" / "output" / "model.safetensors", len(whole) - 8)
    (folder / "out.partial" / "output" / "smile_report.json").write_bytes(b"\0" * 100)
    fuse(folder)
    assert (folder / "out" / "model.safetensors").read_bytes() == whole


@contextmanager
def limited_file_size(size: int) -> Iterator[None]:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_file_larger_than_the_system_allows_is_named(folder):
    named = r"File too large: '\S*out\.partial/output/model\.safetensors'"
    with limited_file_size(6000), pytest.raises(OSError, match=named):
        fuse(folder)
    assert not (folder / "out").exists()
    fuse(folder)


@pytest.mark.parametrize("size", [100, 6000], ids=["settings", "weights"])
def test_a_model_that_the_disk_has_no_space_for_is_named(folder, size):
    model = sk.load_pretrained(folder / "fused")
    with limited_file_size(size), pytest.raises(OSError, match=r"File too large: '\S*out\.partial/output"):
        sk.save_pretrained(model, folder / "out")
    assert not [*folder.glob("*out*")]


@pytest.mark.parametrize("place", ["notes", "layers/notes", "layers/0/0.json.txt", "output/notes", "output/.notes"])
@pytest.mark.parametrize("options", [{}, {"rank_of_expert": 3, "force": True}], ids=["same", "force"])
def test_a_file_of_the_user_s_among_the_intermediate_files_is_kept(place, options, folder):
    def interrupted(stage: str, done: int, total: int) -> None:
        if stage == "layers" and done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fuse(folder, progress=interrupted)
    mine = folder / "out.partial" / place
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("mine")
    with pytest.raises(FileExistsError, match="not created by smile-kernels"):
        fuse(folder, **options)
    assert mine.read_text() == "mine"
    mine.unlink()
    fuse(folder, **options)
    assert not (folder / "out.partial").exists()


def test_a_file_that_comes_to_the_intermediate_files_is_not_published(folder):
    mine = folder / "out.partial" / "output" / "notes"
    with pytest.raises(FileExistsError, match="output/notes: was not created by smile-kernels"):
        fuse(folder, progress=lambda stage, *_: mine.write_text("mine") if stage == "files" else None)
    assert not (folder / "out").exists()
    mine.unlink()
    fuse(folder)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (settings("adapter", ADAPTER_CONFIG, target_modules=["q_proj", "v_proj"]), "names 'v_proj'.* 2 of its modules"),
        (
            adapter(lambda t: {name: one for name, one in t.items() if "layers.1" in name}),
            "names 'q_proj'.*layers.0.self",
        ),
        (settings("adapter", ADAPTER_CONFIG, modules_to_save=["embed_tokens"]), "names 'embed_tokens'"),
        (settings("adapter", ADAPTER_CONFIG, trainable_token_indices=[1]), "has trainable_token_indices, but"),
        (settings("adapter", ADAPTER_CONFIG, target_modules="all-linear"), "names 'up_proj'"),
    ],
    ids=["a target", "a block", "a module saved whole", "tokens", "every linear layer"],
)
def test_an_adapter_that_lacks_what_its_config_names_is_warned_of(change, named, folder):
    change(folder)
    with pytest.warns(UserWarning, match=f"adapter_config.json {named}"):
        fuse(folder)


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["up_proj"]},
        {"exclude_modules": ["q_proj"]},
        {"exclude_modules": r".*\.q_proj"},
        {"layers_to_transform": [7]},
        {"layers_to_transform": 1, "layers_pattern": "blocks"},
    ],
    ids=str,
)
def test_an_adapter_with_tensors_that_its_config_leaves_out_is_warned_of(fields, folder):
    settings("adapter", ADAPTER_CONFIG, **fields)(folder)
    with pytest.warns(UserWarning, match=r"has tensors for 2 modules such as \S*layers.0\S*q_proj, which adapter_"):
        fuse(folder)


def test_an_expert_given_twice_is_warned_of(folder):
    with pytest.warns(UserWarning, match=r"experts\[1\]: \S+ is experts\[0\], too: two experts are equal"):
        sk.upscale_checkpoints(folder / "base", [folder / "expert"] * 2, folder / "out", **OPTIONS)


def test_experts_of_a_base_that_has_changed_are_refused(folder):
    """The experts alone fit every model of the same shapes."""
    fuse(folder, experts_only=True)
    sk.load_pretrained(folder / "out")
    weights = min((folder / "base").glob("*.safetensors"))
    tensors = {name: tensor + 1 for name, tensor in load_file(weights).items()}
    save_file(tensors, weights, {"format": "pt"})
    with pytest.raises(ValueError, match="base has other weights than when the experts were written"):
        sk.load_pretrained(folder / "out")


@pytest.mark.parametrize("patterns", [{"exclude": ["lm_haed"]}, {"include": ["*_proj", "lm_haed"]}], ids=["out", "in"])
def test_a_pattern_that_matches_no_layer_is_warned_of(patterns, folder):
    with pytest.warns(UserWarning, match="clude: 'lm_haed' matches none of the 15 linear layers"):
        fuse(folder, **patterns)


def test_experts_of_a_base_of_the_hub_are_loaded_with_it(folder, monkeypatch):
    repository = folder / "hub" / "models--org--base"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    shutil.copytree(folder / "base", repository / "snapshots" / ("0" * 40))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    sk.upscale_checkpoints("org/base", [folder / "expert"], folder / "out", experts_only=True, **OPTIONS)
    model = sk.load_pretrained(folder / "out")
    assert model(torch.tensor([[1, 2]])).logits.isfinite().all()


def test_a_file_beside_the_weights_that_the_disk_has_no_space_for(folder):
    size = shutil.disk_usage(folder).free + 1
    (folder / "base" / "notes").touch()
    os.truncate(folder / "base" / "notes", size)  # a sparse file
    with pytest.raises(OSError, match="disk is too full"):
        fuse(folder)
    assert not [*folder.glob("*out*")]


def test_weights_beyond_what_holds_their_change_are_refused_before_any_layer(folder):
    def filled(size: float) -> Callable[[Path], object]:
        return tensors(
            "expert/model.safetensors", lambda t: {name: torch.full_like(one, size) for name, one in t.items()}
        )

    stages: list[str] = []
    filled(3e38)(folder)
    with pytest.raises(
        sk.SmileError, match=r"experts\[0\]: \S+: the change of \S+_proj is 4\.8e\+39; expected what torch"
    ):
        fuse(folder, progress=lambda stage, *_: stages.append(stage))
    assert set(stages) == {"checks"}
    assert not [*folder.glob("out*")]
    filled(4e4)(folder)
    fuse(folder, dtype=torch.float16)


def test_biases_beyond_what_holds_their_change_are_refused_before_any_layer(tmp_path):
    stages = []
    for name, size in (("base", 6e4), ("expert", -6e4)):
        (tmp_path / name).mkdir()
        layer = {"up.weight": torch.randn(8, 8).half(), "up.bias": torch.full((8,), size).half()}
        save_file(layer, tmp_path / name / "model.safetensors")
    with pytest.raises(sk.SmileError, match=r"the change of up\.bias is 1\.2e\+05; expected what torch\.float16"):
        sk.upscale_checkpoints(
            tmp_path / "base",
            [tmp_path / "expert"],
            tmp_path / "out",
            progress=lambda stage, *_: stages.append(stage),
            **OPTIONS,
        )
    assert set(stages) == {"checks"}


def test_integers_of_numpy_are_taken_as_integers(folder):
    numbers = {name: np.int64(value) for name, value in (OPTIONS | {"max_shard_size": 20_000}).items()}
    fuse(folder, **numbers)
    assert len([*(folder / "out").glob("model-*.safetensors")]) > 1
    load(folder)


def test_names_of_experts_are_printable_whatever_their_folders_are_called(folder):
    (folder / "expert").rename(folder / "one\nexpert")
    sk.upscale_checkpoints(folder / "base", [folder / "one\nexpert"], folder / "out", **OPTIONS)
    assert sk.load_pretrained(folder / "out").lm_head.expert_names == ("one_expert",)


def test_models_that_other_threads_build_do_not_count():
    """A config of too many layers is refused by the number of modules that its model has."""
    with _limited_modules(10), ThreadPoolExecutor(1) as pool:
        pool.submit(lambda: torch.nn.Sequential(*(torch.nn.Linear(1, 1) for _ in range(20)))).result()
        with pytest.raises(sk.SmileError, match="more than 10 modules"):
            torch.nn.Sequential(*(torch.nn.Linear(1, 1) for _ in range(20)))


def test_a_rank_beyond_the_number_of_processes_is_refused(folder, monkeypatch):
    variables = {"WORLD_SIZE": "2", "RANK": "5", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(sk.SmileError, match="RANK: is 5 with WORLD_SIZE 2; expected a smaller one"):
        fuse(folder)


@pytest.mark.parametrize("rank", [0, 1])
def test_processes_that_never_start_are_not_waited_for(rank, folder, monkeypatch):
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    variables = {"WORLD_SIZE": "2", "RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("smile_kernels.upscaling.disk._JOIN_WITHIN", timedelta(seconds=1))
    with pytest.raises(sk.SmileError, match=r"WORLD_SIZE: is '2'; expected .* that many processes within 1 s"):
        fuse(folder)
    assert not [*folder.glob("*out*")]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the backend can run")
def test_a_backend_that_cannot_run_is_no_bug(folder, monkeypatch):
    monkeypatch.setenv("SMILE_KERNELS_BACKEND", "cuda")
    with pytest.raises(sk.SmileError, match=r"error: backend: 'cuda' cannot run here: .*; expected another SMILE_"):
        command("verify", "{folder}/fused", "--base", "{folder}/base", "--expert", "{folder}/expert")(folder)


@pytest.mark.parametrize("variables", [{"WORLD_SIZE": "x"}, {"WORLD_SIZE": "2"}], ids=str)
def test_variables_of_a_launcher_that_is_not_there(variables, folder, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(sk.SmileError, match=r"WORLD_SIZE: is '.'; expected the variables that torchrun sets"):
        fuse(folder)
    assert not [*folder.glob("*out*")]


TWO = """
import sys
import smile_kernels as sk
folder, rank, case = sys.argv[1], int(sys.argv[2]), sys.argv[3]
options = {"rank_of_expert": 4, "rank_of_router": 2, "workers": 1}
if rank == 1:
    others = {"rank": {"rank_of_expert": 3}, "layers": {"exclude": ["lm_head"]}, "more": {"calibrate": True}}
    options |= others.get(case, {})
def failing(stage, done, total):
    if rank == 1 and case == "an error":
        raise sk.SmileError("notes: is 1; expected 2")
try:
    sk.upscale_checkpoints(f"{folder}/base", [f"{folder}/expert"], f"{folder}/out", progress=failing, **options)
except sk.SmileError as error:
    sys.exit(f"error: {error}")
"""


@pytest.mark.parametrize(
    ("case", "messages"),
    [
        ("rank", ["rank_of_expert: is 4 in process 0 and 3 in process 1; expected the same in all processes"] * 2),
        ("layers", ["layers: is ["] * 2),
        ("more", ["calibrate: is None in process 0 and True in process 1; expected the same"] * 2),
        (
            "an error",
            ["WORLD_SIZE: is '2', and another process ended; expected all to finish", "notes: is 1; expected 2"],
        ),
    ],
)
def test_processes_of_one_job_end_with_one_line_each(case, messages, folder):
    """With other arguments in one of them, and where one has an error of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", TWO, str(folder), str(rank), case],
            env={**os.environ, **place, "RANK": str(rank), "PYTHONPATH": os.pathsep.join(sys.path)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for one, message in zip(started, messages):
        _, said = one.communicate(timeout=120)
        assert one.returncode == 1
        assert "Traceback" not in said
        assert sum(line.startswith("error: ") for line in said.splitlines()) == 1
        assert f"error: {message}" in said
    assert not (folder / "out").exists()
