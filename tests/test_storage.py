"""Tensors on disk: equal when read back, from any shards; damaged files are refused by name."""

import json
import os
import pickle
import resource
import struct

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smile_kernels import storage
from smile_kernels.errors import SmileError
from smile_kernels.storage import (
    check_sizes,
    parse_size,
    read_tensors,
    weights_fingerprint,
    write_shard,
    write_tensors,
)
from tests.upscaling.checkpoints import stored


@settings(max_examples=25, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(0, 5), max_size=3), min_size=1, max_size=6),
    dtypes=st.lists(
        st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool]),
        min_size=6,
        max_size=6,
    ),
    shard=st.integers(1, 200),
)
def test_tensors_round_trip_through_any_shards(tmp_path_factory, shapes, dtypes, shard):
    folder = tmp_path_factory.mktemp("shards")
    tensors = {f"t.{i}": torch.randn(s).mul(3).to(d) for i, (s, d) in enumerate(zip(shapes, dtypes))}
    write_tensors(folder, stored(tensors), max_shard_size=shard)
    read = {name: tensor.load() for name, tensor in read_tensors(folder).items()}
    theirs = {k: t for file in folder.glob("*.safetensors") for k, t in safetensors.torch.load_file(file).items()}
    for got in (read, theirs):
        assert set(got) == set(tensors)
        for name, tensor in tensors.items():
            torch.testing.assert_close(got[name], tensor, rtol=0, atol=0)
    for file in folder.glob("*.safetensors"):
        data = file.stat().st_size - 8 - struct.unpack("<Q", file.read_bytes()[:8])[0]
        assert data <= shard or len(safetensors.torch.load_file(file)) == 1


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_bin_files_are_read_as_weights(tmp_path, legacy):
    tensors = {"a": torch.randn(3, 4), "b": torch.randn(2).bfloat16()}
    torch.save(tensors, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
    read = read_tensors(tmp_path)
    assert read["b"].dtype == torch.bfloat16
    assert all(torch.equal(read[name].load(), tensor) for name, tensor in tensors.items())


def test_sharded_bin_files(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "pytorch_model-1.bin")
    torch.save({"b": torch.ones(3)}, tmp_path / "pytorch_model-2.bin")
    index = {"weight_map": {"a": "pytorch_model-1.bin", "b": "pytorch_model-2.bin"}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert {name: t.shape for name, t in read_tensors(tmp_path).items()} == {"a": (2,), "b": (3,)}


@pytest.mark.parametrize("keep", [4, 30, -1], ids=["nohead", "halfhead", "halfdata"])
def test_truncated_safetensors(tmp_path, keep):
    file = tmp_path / "model.safetensors"
    write_shard(file, stored({"a": torch.randn(4, 4)}))
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"model\.safetensors: is not a whole safetensors file"):
        read_tensors(tmp_path)


def test_a_pickle_that_is_not_weights_alone(tmp_path):
    class Attack:
        def __reduce__(self):
            return (open, (str(tmp_path / "owned"), "w"))

    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Attack()))
    with pytest.raises(ValueError, match=r"pytorch_model\.bin: is a pickle of other objects"):
        read_tensors(tmp_path)
    torch.save({"a": torch.ones(2), "evil": Attack()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin: is a pickle of other objects than weights"):
        read_tensors(tmp_path)
    assert not (tmp_path / "owned").exists()


def test_a_bin_that_is_cut_short_or_holds_more_than_tensors(tmp_path):
    file = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.randn(400)}, file)
    file.write_bytes(file.read_bytes()[:-600])
    with pytest.raises(ValueError, match=r"pytorch_model\.bin: is not"):
        read_tensors(tmp_path)
    torch.save({"epoch": 3, "a": torch.ones(1)}, file)
    with pytest.raises(ValueError, match=r"contains a int as 'epoch'; expected tensors by name"):
        read_tensors(tmp_path)


def test_folders_that_hold_no_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        read_tensors(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="contains no weights"):
        read_tensors(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    with pytest.raises(FileNotFoundError, match=r"gone\.safetensors: no such file"):
        read_tensors(tmp_path)
    write_shard(tmp_path / "gone.safetensors", stored({"b": torch.ones(1)}))
    with pytest.raises(ValueError, match=r"tensor 'a' is not in .*gone\.safetensors"):
        read_tensors(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=["nan", "inf"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e5m2], ids=["fp32", "bf16", "fp8"])
def test_not_finite(tmp_path, value, dtype):
    bad = torch.randn(3, 4)
    bad[1, 2] = value
    safetensors.torch.save_file({"x.weight": bad.to(dtype)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors: tensor 'x\.weight' holds 1 NaN or inf.*\[1, 2\]"):
        read_tensors(tmp_path)["x.weight"].load()


def test_sizes():
    assert [parse_size(s) for s in (7, "5GB", "1.5MB", "2GiB", "300")] == [7, 5 * 10**9, 1_500_000, 2**31, 300]
    for bad in ("", "5XB", "-1", 0, "0.1"):
        with pytest.raises(ValueError, match="max_shard_size: is"):
            parse_size(bad)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_files_that_cannot_be_opened_again(tmp_path, suffix):
    file = tmp_path / {"safetensors": "model.safetensors", "bin": "pytorch_model.bin"}[suffix]
    save = safetensors.torch.save_file if suffix == "safetensors" else torch.save
    save({"a": torch.ones(3)}, file)
    tensor = read_tensors(tmp_path)["a"]
    free = os.dup(0)
    os.close(free)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
    try:
        with pytest.raises(OSError, match="Too many open files") as caught:
            tensor.load()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert caught.value.filename == str(file)
    assert torch.equal(tensor.load(), torch.ones(3))
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(SmileError, match=r"changed while it was read .*another file.*; fetch or write it again"):
        tensor.load()


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Error closing file </x>: Input/output error (5)"),  # of PyTorch, where it unmaps a file
        OSError("Input/output error (os error 5)"),  # of safetensors
        OSError(5, "Input/output error"),
        OSError("a message alone"),
    ],
    ids=["PyTorch", "safetensors", "Python", "no number"],
)
def test_errors_of_the_system_name_the_file(tmp_path, monkeypatch, name, error):
    def fail(*args, **options):
        raise type(error)(*error.args)

    safetensors.torch.save_file({"a": torch.ones(3)}, tmp_path / "model.safetensors")
    torch.save({"a": torch.ones(3)}, tmp_path / "pytorch_model.bin")
    if name.endswith("bin"):  # both are read otherwise
        (tmp_path / "model.safetensors").unlink()
    monkeypatch.setattr(storage, "safe_open", fail)
    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(OSError, match=f"{name}: a message alone|Input/output error: .*{name}") as caught:
        read_tensors(tmp_path)
    assert not isinstance(caught.value, SmileError)
    assert "None" not in str(caught.value)


def test_the_header_of_many_tensors_is_read_once(tmp_path, monkeypatch):
    safetensors.torch.save_file({f"t{i}": torch.full((2,), i) for i in range(50)}, tmp_path / "model.safetensors")
    opened = []
    monkeypatch.setattr(storage, "safe_open", lambda *args: opened.append(args) or safetensors.safe_open(*args))
    read = {name: tensor.load() for name, tensor in read_tensors(tmp_path).items()}
    assert all(torch.equal(read[f"t{i}"], torch.full((2,), i)) for i in range(50))
    assert len(opened) == 1


def test_a_bin_of_many_tensors_is_unpickled_once(tmp_path, monkeypatch):
    """Tensors that are views of one another, too; only those that are not contiguous need the file again."""
    tensors = {f"t{i}": torch.full((2, i), i) for i in range(50)}
    first = torch.randn(6, 4)
    tensors |= {"first": first, "rows": first[2:4], "column": first[:, 1], "columns": first.T, "half": first.bfloat16()}
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    opened, load = [], torch.load
    monkeypatch.setattr(torch, "load", lambda *args, **options: opened.append(args) or load(*args, **options))
    read = {name: tensor.load() for name, tensor in read_tensors(tmp_path).items()}
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensor) and read[name].dtype == tensor.dtype for name, tensor in tensors.items())
    assert len(opened) == 1 + len({"t0", "column", "columns"})


@pytest.mark.parametrize("how", ["replaced", "rewritten", "removed"])
def test_a_file_that_another_process_writes_is_not_read_as_the_former_one(tmp_path, how):
    file = tmp_path / "model.safetensors"
    write_shard(file, stored({"a": torch.zeros(3), "b": torch.zeros(2)}))
    tensor = read_tensors(tmp_path)["a"]
    if how == "replaced":
        write_shard(file, stored({"b": torch.ones(2), "a": torch.ones(3)}))
    elif how == "rewritten":  # with the same size
        write_shard(tmp_path / "other", stored({"a": torch.ones(3), "b": torch.ones(2)}))
        file.write_bytes((tmp_path / "other").read_bytes())
    else:
        file.unlink()
    with pytest.raises((SmileError, FileNotFoundError), match=r"model\.safetensors"):
        tensor.load()


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_file_that_may_not_be_opened_is_not_called_damaged(tmp_path, monkeypatch, name):
    file = tmp_path / name
    if name.endswith(".bin"):
        torch.save({"weight": torch.ones(2)}, file)
    else:
        safetensors.torch.save_file({"weight": torch.ones(2)}, file)

    def refuse(path, *arguments, **options):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("pathlib.Path.open", refuse)  # root may open every file
    with pytest.raises(PermissionError, match=f"Permission denied.*{name}"):
        read_tensors(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.txt", "additional_chat_templates/one.jinja"])
def test_files_too_large_to_be_read_whole(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / "model.safetensors").touch()
    for file in (tmp_path / name, tmp_path / "model.safetensors"):
        file.touch()
        os.truncate(file, (1 << 28) + 1)  # a sparse file
    with pytest.raises(SmileError, match=rf"{name}: has 268,435,457 bytes; expected at most"):
        check_sizes(tmp_path)
    os.truncate(tmp_path / name, 1 << 20)
    check_sizes(tmp_path)


def test_a_change_anywhere_in_large_weights_changes_their_fingerprint(tmp_path):
    tensors = {f"{i}.weight": torch.zeros(64, 1024) for i in range(20)}
    found = set()
    for name in tensors:
        tensors[name][5, 9] = 1
        write_shard(tmp_path / "model.safetensors", stored(tensors))
        found.add(weights_fingerprint(tmp_path))
    assert len(found) == 20
