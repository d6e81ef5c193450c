"""Output folders: complete or absent after an interruption at any file operation; other files are never deleted."""

import errno
import importlib
import json
import os
import shutil
import stat
import sys
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import pytest
import torch
from matplotlib.figure import Figure

from smile_kernels import SmileLinear, __version__, publishing, save_pretrained
from smile_kernels.analysis import Analysis
from smile_kernels.publishing import (
    MANIFEST,
    check_folder,
    check_outputs,
    marked,
    new_file,
    output_folder,
    restore,
    work_folder,
    write_plot,
    write_text,
)
from smile_kernels.storage import write_shard
from smile_kernels.sweeping import Sweep
from smile_kernels.upscaling.report import UpscaleReport
from tests.test_malformed import write_inputs
from tests.upscaling.checkpoints import Net, finetuned, run, save, stored
from tests.upscaling.checkpoints import contents as bits

SETTINGS = {"rank": 8, "files": [["a", 1]]}
FILE_OPERATIONS = {"ctypes.dlsym", "open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "fcntl.flock"}
KILLED = 9
NO_FILES: Mapping[str, bytes] = MappingProxyType({})


def write_output(folder: Path, settings: dict, *, force: bool = False, more: Mapping[str, bytes] = NO_FILES) -> bool:
    """A job of two resumable parts and an output of three files and `more`; returns whether there was work to do."""
    with output_folder(check_folder(folder), settings, force=force, writes=["layers/*.json", "output/*"]) as output:
        if output.complete:
            return False
        layers = output.work / "layers"
        layers.mkdir(exist_ok=True)
        for part in range(2):
            if not (layers / f"{part}.json").exists():
                write_text(layers / f"{part}.json", f"{settings} {part}")
        write_text(output.output / "config.json", f"{settings}")
        (output.output / "pooling").mkdir(exist_ok=True)
        write_text(output.output / "pooling" / "config.json", "pooling")
        write_text(output.output / "weights", "".join(f.read_text() for f in sorted(layers.iterdir())))
        for name, content in more.items():
            (output.work / name).write_bytes(content)
        output.publish()
        return True


def contents(folder: Path) -> dict[str, str]:
    return {str(f.relative_to(folder)): f.read_text() for f in sorted(folder.rglob("*")) if f.is_file()}


def killed_at(operation: int, job, within: Path | None = None) -> bool:
    """Runs `job` in a process that ends, as by kill -9, before its file operation of this number.

    With `within`, operations in this folder count, but not files opened for reading.
    """
    child = os.fork()
    if child == 0:
        count = 0

        def hook(event: str, args: tuple) -> None:
            nonlocal count
            if event not in FILE_OPERATIONS or (within and not str(args[0]).startswith(str(within))):
                return
            if within and event == "open" and not args[2] & (os.O_WRONLY | os.O_RDWR):
                return
            count += 1
            if count > operation:
                os._exit(KILLED)

        sys.addaudithook(hook)
        try:
            job()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == KILLED


@pytest.fixture
def _no_flush(monkeypatch):
    """A kill loses nothing that the kernel has, and flushing takes most of the time."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.mark.usefixtures("_no_flush")
@pytest.mark.parametrize("how", ["new", "force", pytest.param("force in three steps", marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("then", ["same", pytest.param("other", marks=pytest.mark.exhaustive), "other-force"])
def test_a_kill_at_every_file_operation(tmp_path, how, then, record_property, monkeypatch):
    replacing = how != "new"
    if how == "force in three steps":
        monkeypatch.setattr("ctypes.CDLL", lambda name: None)  # as where names cannot be exchanged
    write_output(tmp_path / "expected", SETTINGS)
    expected = contents(tmp_path / "expected")
    other = {**SETTINGS, "rank": 16}
    operation, killed = 0, True
    while killed:
        folder = tmp_path / str(operation)
        folder.mkdir()
        (folder / "notes.txt").write_text("the user's")
        out, before = folder / "out", None
        if replacing:
            write_output(out, {**SETTINGS, "rank": 4})
            before = contents(out)
        killed = killed_at(operation, lambda out=out: write_output(out, SETTINGS, force=replacing))
        assert not out.exists() or contents(out) in (before, expected)
        whole = out.exists() and contents(out) == expected
        if then == "same":
            assert write_output(out, SETTINGS, force=replacing) == (not whole)
            assert contents(out) == expected
        elif then == "other-force":
            write_output(out, other, force=True)
            assert f"{other} 0" in (out / "weights").read_text()
        else:
            state = contents(out) if out.exists() else before
            try:
                write_output(out, other)
                assert state is None
            except FileExistsError:
                assert contents(out) == state if state else work_folder(out).exists()
                write_output(out, SETTINGS, force=replacing)
                assert contents(out) == expected
        assert sorted(f.name for f in folder.iterdir()) == ["notes.txt", "out"], f"left after operation {operation}"
        operation += 1
    record_property("kill_points", operation)
    print(f"{operation} kill points")
    assert operation > 20


@pytest.mark.usefixtures("_no_flush")
@pytest.mark.parametrize("before", [None, "earlier"])
def test_a_report_killed_at_every_file_operation_leaves_nothing_after_the_next(tmp_path, before):
    file, operation, killed = tmp_path / "report.json", 0, True
    while killed:
        file.unlink(missing_ok=True)
        if before:
            file.write_text(before)
        killed = killed_at(operation, lambda: write_text(file, "complete"))
        assert (file.read_text() if file.exists() else None) in (before, "complete")
        write_text(file, "next")
        assert {f.name: f.read_text() for f in tmp_path.iterdir()} == {"report.json": "next"}, operation
        operation += 1
    assert operation > 1


def test_two_writers_of_one_file_do_not_disturb_each_other(tmp_path):
    file = tmp_path / "report.json"
    with new_file(file) as first, new_file(file) as second:
        first.write(b"first")
        second.write(b"second")
        assert len(list(tmp_path.iterdir())) == 2
    assert {f.name: f.read_text() for f in tmp_path.iterdir()} == {"report.json": "first"}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> Path:
    """A base, two fine-tuned models, and a fused language model."""
    folder = tmp_path_factory.mktemp("checkpoints")
    write_inputs(folder / "llama")
    base = Net()
    for name, model in {"base": base, "math": finetuned(base), "code": finetuned(base)}.items():
        save(folder / name, model)
    return folder


@pytest.mark.exhaustive
@pytest.mark.usefixtures("_no_flush")
@pytest.mark.parametrize(
    "command", ["upscale", "upscale --force", "upscale --experts-only", "upscale --calibrate", "calibrate"]
)
def test_a_command_killed_at_every_file_operation_and_started_again(tmp_path, checkpoints, command, record_property):
    """The output is absent, or whole; the command started again ends with the bits of a run without interruption."""

    def start(out: Path, router: int = 2) -> None:
        if command == "calibrate":
            run("calibrate", str(out))
            return
        if command == "upscale --calibrate":  # in one file, to which calibration adds tensors
            folders = ["--base", str(checkpoints / "llama" / "base"), "--expert", str(checkpoints / "llama" / "expert")]
            ranks = ["--rank-of-expert", "4", "--rank-of-router", "2", "--workers", "1"]
            run(*command.split(), *folders, *ranks, "--out", str(out))
            return
        experts = [word for name in ("math", "code") for word in ("--expert", str(checkpoints / name))]
        options = [
            "--rank-of-expert",
            "4",
            "--rank-of-router",
            str(router),
            "--out-shard-size",
            "2KB",
            "--workers",
            "1",
        ]
        run(*command.split(), "--base", str(checkpoints / "base"), *experts, *options, "--out", str(out))

    def prepare(out: Path) -> dict[str, bytes] | None:
        out.parent.mkdir()
        if command == "calibrate":
            shutil.copytree(checkpoints / "llama" / "fused", out)
        elif command == "upscale --force":
            start(out, router=3)
        return bits(out) if out.exists() else None

    prepare(tmp_path / "whole" / "out")
    start(tmp_path / "whole" / "out")
    expected, inputs = bits(tmp_path / "whole" / "out"), bits(checkpoints)
    operation, killed = 0, True
    while killed:
        out = tmp_path / str(operation) / "out"
        before = prepare(out)
        killed = killed_at(operation, lambda out=out: start(out), within=out.parent)
        assert not out.exists() or bits(out) in (before, expected)
        start(out)
        assert bits(out) == expected
        assert [f.name for f in out.parent.iterdir()] == ["out"], f"left after operation {operation}"
        shutil.rmtree(out.parent)
        operation += 1
    assert bits(checkpoints) == inputs
    record_property("kill_points", operation)
    print(f"{command}: {operation} kill points")
    assert operation > 30


def test_a_parent_that_cannot_be_read_is_not_flushed(tmp_path, monkeypatch):
    opened = os.open

    def refuses(path, *arguments, **options):
        if path == tmp_path:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opened(path, *arguments, **options)

    monkeypatch.setattr(os, "open", refuses)
    write_output(tmp_path / "out", SETTINGS)
    monkeypatch.undo()
    write_output(tmp_path / "expected", SETTINGS)
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["expected", "out"]


@pytest.mark.exhaustive
@pytest.mark.usefixtures("_no_flush")
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EIO], ids=errno.errorcode.get)
@pytest.mark.parametrize("replacing", [False, True], ids=["new", "force"])
def test_an_error_at_every_file_operation(tmp_path, code, replacing):
    """One operation of each run fails, also those that read folders; the next run ends with the same files."""
    write_output(tmp_path / "expected", SETTINGS)
    expected, operation, failed = contents(tmp_path / "expected"), 0, True
    while failed:
        folder = tmp_path / str(operation)
        folder.mkdir()
        out, before = folder / "out", None
        if replacing:
            write_output(out, {**SETTINGS, "rank": 4})
            before = contents(out)
        failed = fails_at(operation, code, lambda out=out: write_output(out, SETTINGS, force=replacing))
        assert not out.exists() or contents(out) in (before, expected)
        write_output(out, SETTINGS, force=replacing)
        assert contents(out) == expected
        assert all(f.name == "out" or f.name.startswith("out.old-") for f in folder.iterdir())  # kept with a warning
        operation += 1
    print(f"{operation} errors")
    assert operation > 50


def fails_at(operation: int, code: int, job) -> bool:
    """Runs `job` in a process where the file operation of this number fails; whether there was one."""
    child = os.fork()
    if child == 0:
        count = 0

        def hook(event: str, args: tuple) -> None:
            nonlocal count
            if event in FILE_OPERATIONS | {"os.listdir", "os.scandir"}:
                count += 1
                if count == operation + 1:
                    raise OSError(code, os.strerror(code), str(args[0]))

        sys.addaudithook(hook)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                job()
            except OSError:
                pass
            except BaseException:
                os._exit(1)
        os._exit(KILLED if count > operation else 0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, KILLED)
    return status == KILLED


def test_a_folder_that_lost_its_name_gets_it_back(tmp_path):
    """As after a kill between the renames of a replacement, where names cannot be exchanged."""
    out = tmp_path / "out"
    write_output(out, SETTINGS)
    before = contents(out)
    out.rename(tmp_path / ".out.old-0123456789ab-1")
    restore(out)
    assert contents(out) == before
    restore(tmp_path / "elsewhere" / "out")
    assert [f.name for f in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_came_to_be_during_the_work_is_kept(tmp_path):
    out = tmp_path / "out"
    with output_folder(out, SETTINGS, force=False) as output:
        write_text(output.output / "weights", "1")
        out.mkdir()
        (out / "notes.txt").write_text("the user's")
        with pytest.raises(FileExistsError, match="finished output is kept"):
            output.publish()
    assert contents(out) == {"notes.txt": "the user's"}
    assert (output.output / "weights").read_text() == "1"


LARGE = 3 << 20


@pytest.mark.parametrize("change", ["new file", "edited file", "large file", "new folder", "link"])
def test_force_replaces_only_what_it_wrote(tmp_path, change):
    out = tmp_path / "out"
    write_output(out, SETTINGS, more={"output/large": bytes(LARGE)})
    if change == "new file":
        (out / "pooling" / "notes.txt").write_text("the user's")
    elif change == "edited file":
        (out / "config.json").write_text("edited")
    elif change == "large file":  # of the same size, as weights after further training
        (out / "large").write_bytes(bytes(LARGE // 2) + b"\x01" * (LARGE // 2))
        with pytest.raises(FileExistsError, match="is not empty"):  # it is not taken for the complete output
            write_output(out, SETTINGS)
    elif change == "new folder":
        (out / "mine").mkdir()
    else:
        (out / "link").symlink_to(tmp_path)
    with pytest.raises(FileExistsError, match="which smile-kernels did not write"):
        write_output(out, {**SETTINGS, "rank": 16}, force=True)
    assert (out / MANIFEST).exists()


def test_a_replaced_folder_s_mode_is_kept(tmp_path):
    """Also while the new one is written, next to it."""
    for text in ("old", "new"):
        with output_folder(tmp_path / "out", {}, force=True) as output:
            modes = {stat.S_IMODE(folder.stat().st_mode) for folder in (output.work, output.output)}
            (output.output / "a").write_text(text)
            output.publish()
        if text == "old":
            (tmp_path / "out").chmod(0o2710)
    assert modes == {0o2710}
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o2710
    assert (tmp_path / "out" / "a").read_text() == "new"


def test_force_refuses_a_folder_without_a_manifest(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "model.safetensors").write_text("the user's")
    with pytest.raises(FileExistsError, match=r"contains model\.safetensors, which smile-kernels did not write"):
        write_output(out, SETTINGS, force=True)


def test_a_user_s_folders_of_our_names_are_kept(tmp_path):
    out = tmp_path / "out"
    for name in (".out.old", ".out.old-1", "out.partial"):
        (tmp_path / name / "layers").mkdir(parents=True)
        (tmp_path / name / "layers" / "notes.txt").write_text("the user's")
    with pytest.raises(FileExistsError, match=r"out\.partial: contains layers, which was not created by smile-kernels"):
        write_output(out, SETTINGS, force=True)
    (tmp_path / "out.partial").rename(tmp_path / "elsewhere")
    write_output(out, SETTINGS)
    write_output(out, {**SETTINGS, "rank": 16}, force=True)
    kept = contents(tmp_path)
    for name in (".out.old", ".out.old-1", "elsewhere"):
        assert kept[f"{name}/layers/notes.txt"] == "the user's"


def test_a_user_s_copy_of_an_output_is_kept(tmp_path):
    out, copy, empty = (tmp_path / name for name in ("out", ".out.old-before", ".out.old-2024"))
    write_output(out, SETTINGS)
    shutil.copytree(out, copy)
    empty.mkdir()
    write_output(out, {**SETTINGS, "rank": 16}, force=True)
    assert contents(copy)["weights"] == f"{SETTINGS} 0{SETTINGS} 1"
    shutil.rmtree(out)
    restore(out)
    assert empty.exists()
    assert not out.exists()


@pytest.mark.parametrize("target", ["an output", "empty", "missing"])
def test_a_link_of_the_name_of_a_replaced_folder_is_not_followed(tmp_path, target):
    out, other, link = tmp_path / "out", tmp_path / "other", tmp_path / ".out.old-0123456789ab"
    if target == "an output":
        write_output(other, SETTINGS)
    elif target == "empty":
        other.mkdir()
    before = contents(other)
    link.symlink_to(other)
    restore(out)
    assert not out.exists()
    for rank in (8, 16):
        write_output(out, {**SETTINGS, "rank": rank}, force=True)
    assert contents(other) == before
    assert link.is_symlink()
    assert other.is_dir() == (target != "missing")


@pytest.mark.parametrize("empty", [True, False])
def test_an_output_that_became_a_link_during_the_work_is_not_followed(tmp_path, empty):
    out, other = tmp_path / "out", tmp_path / "other"
    write_output(out, SETTINGS)
    with output_folder(out, {**SETTINGS, "rank": 16}, force=True) as output:
        write_text(output.output / "weights", "1")
        out.rename(other)
        if empty:
            shutil.rmtree(other)
            other.mkdir()
        out.symlink_to(other)
        before = contents(other)
        with pytest.raises(FileExistsError, match="out: contains out, which smile-kernels did not write"):
            output.publish()
    assert contents(other) == before
    assert (output.output / "weights").read_text() == "1"


def test_two_processes_cannot_write_one_folder(tmp_path):
    out = tmp_path / "out"
    with output_folder(out, SETTINGS, force=False), pytest.raises(FileExistsError, match="another process"):
        write_output(out, SETTINGS, force=True)
    assert write_output(out, SETTINGS)


def test_a_job_without_settings_keeps_the_unfinished_work_of_one_that_has(tmp_path):
    """As calibrate next to an interrupted `upscale --force`; the rest of a finished run is cleaned up."""
    out = tmp_path / "out"
    write_output(out, SETTINGS)
    with output_folder(out, {**SETTINGS, "rank": 16}, force=True) as output:
        write_text(output.output / "weights", "hours of work")
    with pytest.raises(FileExistsError, match=r"out\.partial: is an unfinished run of upscale; expected it finished"):
        write_output(out, {}, force=True)
    assert (output.output / "weights").read_text() == "hours of work"
    write_output(out, {**SETTINGS, "rank": 16}, force=True)
    output.output.mkdir(parents=True)
    write_text(output.work / "settings.json", json.dumps({**SETTINGS, "rank": 16, "writes": ["output/*"]}))
    write_output(out, {}, force=True)
    assert not output.work.exists()


def test_damaged_settings_are_refused_and_force_starts_anew(tmp_path):
    out = tmp_path / "out"
    with output_folder(out, SETTINGS, force=False) as output:
        (output.work / "settings.json").write_text("{")
    with pytest.raises(FileExistsError, match=r"settings\.json: is damaged"):
        write_output(out, SETTINGS)
    assert write_output(out, SETTINGS, force=True)


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("", "expected the path of a folder"),
        ("a\0b", "expected the path of a folder"),
        ("base", "is base"),
        (".", "contains base"),
        ("base/fused", "is inside base"),
        ("link", "is base"),
        ("a" * 240, "has a name of 240 bytes"),
        ("a/" * 1900 + "b", "has a path of "),
    ],
)
def test_inputs_are_never_the_output(tmp_path, monkeypatch, out, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    (tmp_path / "link").symlink_to("base")
    with pytest.raises(ValueError, match=message):
        check_folder(out, inputs={"base": tmp_path / "base"})


@pytest.mark.parametrize("place", ["out.partial", "out.partial/output", ".out.old-0123456789ab", "link"])
def test_inputs_are_never_among_the_intermediate_files(tmp_path, place):
    (tmp_path / "link").symlink_to("out.partial/layers")
    with pytest.raises(ValueError, match=r"out: \S+ is of \S+/out, and base is there; expected an input apart from it"):
        check_folder(tmp_path / "out", inputs={"base": tmp_path / place})


def test_a_folder_below_many_that_do_not_exist(tmp_path):
    out = tmp_path / ("a/" * 1500 + "out")
    assert write_output(out, SETTINGS)
    shutil.rmtree(out)
    os.removedirs(out.parent)  # which pytest cannot


@pytest.mark.parametrize("kind", ["a pipe", "a folder", "a link to a pipe", "a link to itself"])
def test_a_file_does_not_replace_what_is_no_file(tmp_path, kind):
    file, pipe = tmp_path / "file.json", tmp_path / "pipe"
    os.mkfifo(pipe)
    if kind == "a pipe":
        file = pipe
    elif kind == "a folder":
        file.mkdir()
    else:
        file.symlink_to("pipe" if kind == "a link to a pipe" else "file.json")
    before = sorted((one.name, one.lstat().st_mode) for one in tmp_path.iterdir())
    with pytest.raises(ValueError, match="is not a regular file; expected a new file, or one to replace"):
        write_text(file, "text")
    if kind != "a folder":
        with pytest.raises(ValueError, match=r"^json: \S+: is not a regular file"):
            check_outputs(json=file)
    assert sorted((one.name, one.lstat().st_mode) for one in tmp_path.iterdir()) == before


def test_a_stream_of_a_process_is_not_replaced(tmp_path):
    with open(tmp_path / "log", "w") as log:
        for name in (f"/dev/fd/{log.fileno()}", f"/proc/self/fd/{log.fileno()}"):
            with pytest.raises(ValueError, match="is not a regular file"):
                write_text(Path(name), "text")
        log.write("mine")
    assert (tmp_path / "log").read_text() == "mine"


def test_a_file_is_written_where_a_link_leads(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link.json").symlink_to("disk/file.json")
    write_text(tmp_path / "link.json", "text")
    assert (tmp_path / "link.json").is_symlink()
    assert (tmp_path / "disk" / "file.json").read_text() == "text"


@pytest.mark.parametrize("file", ["base/config.json", "base/new.json", "link/config.json", "link.json"])
def test_a_result_is_never_among_the_inputs(tmp_path, file):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("mine")
    (tmp_path / "link").symlink_to("base")
    (tmp_path / "link.json").symlink_to("base/config.json")
    with pytest.raises(ValueError, match=r"json: is '\S+', inside the input \S+/base; expected a file outside of it"):
        check_outputs([tmp_path / "base"], json=tmp_path / file)
    check_outputs([tmp_path / "base"], json=tmp_path / "base.json")


def test_results_are_refused_before_any_work(tmp_path, monkeypatch):
    (tmp_path / "score.py").write_text("mine")
    (tmp_path / "link.json").symlink_to("score.py")
    for file in (tmp_path / "score.py", tmp_path / "link.json"):
        with pytest.raises(ValueError, match=r"json: is '\S+', an input; expected a file outside of it"):
            check_outputs([tmp_path / "score.py"], json=file)
    with pytest.raises(ValueError, match=r"json: is 'a+'; expected a name of at most 241 bytes"):
        check_outputs(json=Path("a" * 242))
    plot = tmp_path / "a.png"
    with pytest.raises(ValueError, match=r"json: is '\S+a\.png', as plot is; expected another file"):
        check_outputs(plot=plot, json=tmp_path / ".." / tmp_path.name / "a.png")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"plot: is '\S+a\.png', and matplotlib is not installed"):
        check_outputs(plot=plot)


@pytest.mark.parametrize(
    "report", [Analysis([], 1, 0.3), Sweep([]), UpscaleReport([])], ids=lambda one: type(one).__name__
)
def test_reports_replace_only_their_like(report, tmp_path):
    file = tmp_path / "a.json"
    file.write_text('{"_name_or_path": "base"}')
    with pytest.raises(
        ValueError,
        match=r"^path: is '\S+a\.json', which is not a report by smile-kernels with \w+.*; expected a new file",
    ):
        report.save(file)
    assert file.read_text() == '{"_name_or_path": "base"}'
    file.unlink()
    for _ in range(2):
        report.save(file)
    written = json.loads(file.read_text())
    assert written.pop("smile_kernels") == __version__
    file.write_text(json.dumps(written))  # a user's, with the keys of a report
    with pytest.raises(ValueError, match="which is not a report"):
        report.save(file)
    file.write_text("")
    report.save(file)
    for other in [one for one in (Sweep([]), UpscaleReport([])) if type(one) is not type(report)]:
        with pytest.raises(ValueError, match="which is not a report"):
            other.save(file)


def test_only_its_like_is_replaced(tmp_path):
    report, plot, keys = tmp_path / "a.json", tmp_path / "a.png", ("machine", "records")
    other = ["text", "[]", "{}", "7", '{"records": []', '{"machine": 1, "records": []}', "[" * 10**5]
    other += ['{"smile_kernels": "0.1.0", "machine": 1, "x": 1}']
    other += ["\xff", '{"a": "é"}']
    for content in other:
        report.write_text(content, encoding="latin-1")
        with pytest.raises(
            ValueError,
            match=r"^json: is '\S+a\.json', which is not a report by smile-kernels with machine, records; exp",
        ):
            check_outputs(keys=keys, json=report)
        plot.write_text(content, encoding="latin-1")
        with pytest.raises(
            ValueError, match=r"^plot: is '\S+a\.png', which is not a plot by smile-kernels; expected a new"
        ):
            check_outputs(plot=plot)
    with open(report, "r+b") as file:
        file.write(b'{"smile_kernels": "0.1.0"}')
        file.truncate(1 << 40)  # is not read
    with pytest.raises(ValueError, match="which is not a report"):
        check_outputs(keys=keys, json=report)
    for content in ("", json.dumps(marked({"machine": {}, "records": []})), json.dumps(marked({"machine": 1}))):
        report.write_text(content)
        check_outputs(keys=keys, json=report)
    for kind in ("png", "svg", "pdf"):
        plot = tmp_path / f"a.{kind}"
        Figure().savefig(plot)  # a user's
        with pytest.raises(ValueError, match="which is not a plot by smile-kernels"):
            check_outputs(plot=plot)
        plot.write_text("")
        for _ in range(2):
            check_outputs(plot=plot)
            write_plot(plot, Figure())


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_a_plot_that_the_disk_has_no_space_for_is_named(tmp_path, suffix, full_disk):
    figure = Figure()
    figure.subplots()
    with pytest.raises(OSError, match=r"disk is full .*plot"):
        write_plot(tmp_path / f"plot.{suffix}", figure)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EIO])
def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch, code):
    def flock(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("fcntl.flock", flock)
    descriptors = os.listdir("/proc/self/fd")
    with pytest.raises(OSError, match=rf"cannot be the lock of \S+out \({os.strerror(code)}\): '\S+out.lock'"):
        write_output(tmp_path / "out", SETTINGS)
    assert os.listdir("/proc/self/fd") == descriptors


@pytest.mark.parametrize("operation", ["fcntl.flock", "os.ftruncate"])
def test_an_operation_that_fails_once_leaves_no_temporary_file(tmp_path, monkeypatch, operation):
    module, name = operation.split(".")
    whole, failed = getattr(importlib.import_module(module), name), []

    def fails_once(*arguments: object) -> object:
        if not failed:
            failed.append(arguments)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return whole(*arguments)

    monkeypatch.setattr(operation, fails_once)
    write_text(tmp_path / "report.json", "{}")
    assert failed
    assert [file.name for file in tmp_path.iterdir()] == ["report.json"]


def test_a_replaced_folder_that_may_not_be_deleted_is_kept_by_name(tmp_path, monkeypatch):
    write_output(tmp_path / "out", SETTINGS)
    unlink = Path.unlink

    def refused(path: Path, **options: bool) -> None:
        if ".old-" in str(path):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        unlink(path, **options)

    monkeypatch.setattr(Path, "unlink", refused)
    for count in (1, 2):
        with pytest.warns(UserWarning, match=r"out\.old-\w+: the replaced folder is kept: \w+ may not be deleted"):
            write_output(tmp_path / "out", SETTINGS | {"changed": count}, force=True)
        assert sorted(file.name[:8] for file in tmp_path.iterdir()) == ["out", *["out.old-"] * count]


def test_a_link_is_followed_to_its_folder(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to("disk/out")
    write_output(tmp_path / "out", SETTINGS)
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "disk" / "out" / "weights").exists()


def test_a_mount_point_is_refused():
    with pytest.raises(ValueError, match="mount point"):
        check_folder("/proc")


class FullDisk:
    """A file that takes `room` bytes and then reports a full disk, as the kernel does."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def write(self, data):
        self.room -= len(data)
        if self.room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.file.write(data)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.file.close()

    def __getattr__(self, name):
        return getattr(self.file, name)


@pytest.fixture
def full_disk(monkeypatch):
    monkeypatch.setattr(
        "smile_kernels.publishing.open",
        lambda *a, **k: FullDisk(open(*a, **k), 900),  # noqa: SIM115
        raising=False,
    )


def test_a_full_disk_leaves_nothing_half_written(tmp_path, full_disk):
    with pytest.raises(OSError, match="disk is full"):
        write_shard(tmp_path / "model.safetensors", stored({"a": torch.randn(30, 30)}))
    assert not list(tmp_path.iterdir())
    with pytest.raises(OSError, match="disk is full"):
        save_pretrained(torch.nn.Sequential(SmileLinear(8, 12, 3, 4, 5)), tmp_path / "model")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kept", ["size", "size and time"])
def test_a_change_anywhere_in_a_large_file_is_seen(tmp_path, kept, monkeypatch):
    monkeypatch.setattr(publishing, "_SETTLED", 0)  # as if the file was written long ago: it is read once
    write_output(tmp_path / "out", SETTINGS, more={"output/large": b"\0" * (5 << 20)})
    file = tmp_path / "out" / "large"
    before = file.stat()
    assert not write_output(tmp_path / "out", SETTINGS)  # complete
    time.sleep(0.05)  # a clock's tick
    with open(file, "r+b") as f:
        f.seek(3_030_001)
        f.write(b"1")
    if kept == "size and time":
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    for settings, force in ((SETTINGS, False), (SETTINGS, True), ({**SETTINGS, "rank": 16}, True)):
        with pytest.raises(FileExistsError, match=r"is not empty|contains large, which smile-kernels did"):
            write_output(tmp_path / "out", settings, force=force)
    assert file.read_bytes()[3_030_001] == ord("1")
