"""`smile-kernels doctor --verify`: failures, excluded paths, how they are enabled again, stored results."""

import errno
import json
import os
import time
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from smile_kernels import SmileError, SmileLinear, cli, publishing, selftest
from smile_kernels.ops import composed, excluded, library
from smile_kernels.worker import Outcome, Worker

BF16, FP32 = torch.bfloat16, torch.float32
FAULTS = {"wrong": "wrong", "die": "died", "raise": "raised"}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A separate cache folder and separate choices for each test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("SMILE_KERNELS_BACKEND", raising=False)

    def clear():
        excluded.paths.cache_clear()
        library._choose.cache_clear()
        library._has_steps.cache_clear()

    clear()
    yield tmp_path / "smile_kernels"
    clear()


def check(linear="", apply="", *, backend="triton", dtype=BF16, training=False, seed=0):
    return selftest.Check(backend, "cpu", dtype, training, (7, 33, 29, 3, 5, 7, 2), linear, apply, seed)


def faulty(job):
    """The work on a machine whose composition has the error selected by the check's seed."""
    fault = [*FAULTS, None][job.seed]
    linear = composed.linear

    def broken(*args):
        if fault == "die":
            os._exit(5)
        if fault == "raise":
            raise RuntimeError("planted")
        y, *others = linear(*args)
        y[3, 5] += 0.5
        return (y, *others)

    composed.linear = broken if fault else linear
    try:
        return selftest.perform(job)
    finally:
        composed.linear = linear


def test_what_is_broken_is_named_and_the_rest_is_checked():
    dtypes = (BF16, torch.float16, FP32)
    todo = [check(backend="torch", dtype=dtype, seed=seed) for seed, dtype in enumerate(dtypes)]
    todo.append(check(backend="torch", training=True, seed=3))
    seen = []
    with Worker(faulty) as worker:
        outcomes = selftest.verify(todo, [worker], report=lambda one, _: seen.append(one))
    assert seen == todo
    found = [outcomes[one.name].failure for one in todo]
    assert [failure and failure.split()[0].rstrip(":") for failure in found] == [*FAULTS.values(), None]
    assert found[0].startswith("wrong: y: off by 0.")
    assert found[1] == "died: exit status 5"
    records = [selftest.as_record(one, outcomes[one.name]) for one in todo]
    assert json.loads(json.dumps(records)) == records


def test_every_kind_of_wrong_result_is_seen(monkeypatch):
    """Inserts an error in y, ids, weights or a gradient, or leaves a number unwritten."""
    one = check(backend="torch", dtype=FP32)
    selftest.perform(one)
    linear, backward = composed.linear, composed.linear_backward

    def spoil(index, change):
        def wrong(*args):
            out = [t.clone() for t in linear(*args)]
            change(out[index])
            return tuple(out)

        return wrong

    changes = {
        "y: off": spoil(0, lambda y: y[2, 3].add_(1e-3)),
        "ids: an expert": spoil(2, lambda ids: ids[4].add_(1).remainder_(3)),
        "ids: are": spoil(2, lambda ids: ids[4, 0].fill_(3)),
        "weights: are off": spoil(1, lambda w: w[1].mul_(1.01)),
        "y: off by nan": spoil(0, lambda y: y.copy_(torch.empty_like(y))),
    }
    for message, planted in changes.items():
        monkeypatch.setattr(composed, "linear", planted)
        with pytest.raises(AssertionError, match=message):
            selftest.perform(one)
    monkeypatch.setattr(composed, "linear", linear)

    def wrong_gradient(*args):
        gradients = list(backward(*args))
        gradients[5] = gradients[5] * 1.01
        return tuple(gradients)

    monkeypatch.setattr(composed, "linear_backward", wrong_gradient)
    with pytest.raises(AssertionError, match="du: off"):
        selftest.perform(replace(one, training=True))
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize(
    ("kind", "operator", "result", "message"),
    [
        ("given", "apply", 0, "y: off"),
        ("parts", "apply", 0, "y of part 0, given its routing: off"),
        ("parts", "linear", 0, "y of part 0: off"),
        ("evidence", "evidence", 0, "weights: off"),
        ("evidence", "evidence", 1, "ids: are not those of the largest evidence"),
        ("evidence", "evidence", 2, "evidence: off"),
        ("evidence", "evidence", 3, "sums: off"),
        ("evidence", "evidence_linear", 0, "y: off"),
        ("evidence", "evidence_linear", 2, "ids: differ between a step and a step with its layer"),
    ],
)
def test_wrong_results_of_every_operator_are_seen(kind, operator, result, message, monkeypatch):
    if library.why_not("cpu", "cpu") is not None:
        pytest.skip("the compiled extension is not built")
    ext = torch.ops.smile_kernels_ext
    one = replace(check(backend="cpu", dtype=FP32), operator=kind)
    selftest.perform(one)
    right = getattr(ext, operator).default

    def wrong(*args):
        results = right(*args)
        flat = results[result].view(-1)
        flat[:1] = 1 - flat[:1] if flat.dtype == torch.int32 else flat[:1] + 0.01
        return results

    monkeypatch.setattr(ext, operator, SimpleNamespace(default=wrong))
    with pytest.raises(AssertionError, match=message):
        selftest.perform(one)


def test_a_failed_step_of_a_policy_is_left_to_pytorch(cache):
    if library.why_not("cpu", "cpu") is not None:
        pytest.skip("the compiled extension is not built")
    todo = [replace(check(backend="cpu", dtype=FP32), operator=operator) for operator in ("evidence", "given")]
    outcomes = {todo[0].name: Outcome(None, "wrong: sums: off by 3"), todo[1].name: Outcome(1.0)}
    blamed = selftest.blamed(todo, outcomes)
    assert blamed == {"cpu evidence float32 inference": "wrong: sums: off by 3"}
    layer, x = SmileLinear(8, 8, 3, 2, 2), torch.randn(2, 8)
    step = None, None, None, None, 0, None, 1, 2, 1, 1, False
    assert library.serve_step(x, layer._tensors(), *step) is not None
    excluded.record(excluded.device_name("cpu"), blamed)
    library._has_steps.cache_clear()
    with pytest.warns(UserWarning, match="excludes paths"):
        assert library.serve_step(x, layer._tensors(), *step) is None
    assert library.evidence(x, layer.vh.detach(), *[None] * 5, 1, 2, 1, 1, False) is None
    assert library.choose_backend(None, "cpu", FP32, 3, False) == "cpu"


def test_every_backend_and_dtype_of_this_machine_is_checked():
    found = {(one.backend, one.dtype, one.training) for one in selftest.checks("cpu")}
    for dtype in (BF16, torch.float16, FP32):
        assert {("torch", dtype, False), ("torch", dtype, True)} <= found
        if library.why_not("cpu", "cpu") is None:
            assert ("cpu", dtype, False) in found
    if library.why_not("triton", "cpu") is None:
        paths = {(one.linear, one.apply) for one in selftest.checks("cpu") if one.backend == "triton"}
        assert {("decode", "fused"), ("one_product", "tma"), ("route_first", "grouped")} < paths
        assert selftest.checks("cpu")[-1].waits
    assert len({one.name for one in selftest.checks("cpu")}) == len(selftest.checks("cpu"))


@pytest.mark.parametrize(
    ("failing", "parts"),
    [
        ([("decode", "fused")], {"decode"}),
        ([("one_product", "tma")], {"tma"}),
        ([("route_first", "grouped")], {"grouped"}),
        ([("one_product", "fused"), ("one_product", "tma"), ("one_product", "delta")], {"one_product", "tma"}),
        ([("one_product", "fused"), ("route_first", "fused")], {"fused"}),
        ([("one_product", "fused")], {"fused"}),  # each part passed with another
        ([("route_first", "fused"), ("route_first", "delta"), ("route_first", "grouped")], {""}),
    ],
)
def test_blame_falls_on_what_never_passed(failing, parts):
    paths = [("decode", "fused"), ("one_product", "fused"), ("one_product", "tma"), ("one_product", "delta")]
    paths += [("route_first", "fused"), ("route_first", "delta"), ("route_first", "grouped")]
    todo = [check(*path) for path in paths]
    outcomes = {
        c.name: Outcome(None, "wrong: y\nmore") if (c.linear, c.apply) in failing else Outcome(1.0) for c in todo
    }
    blamed = selftest.blamed(todo, outcomes)
    assert blamed == {excluded.name_of("triton", part, BF16, False): "wrong: y" for part in parts}


def test_a_failed_backend_is_not_chosen_again_until_it_is_forgotten(cache):
    if library.why_not("cpu", "cpu") is not None:
        pytest.skip("the compiled extension is not built")

    def chosen(backend=None, dtype=FP32, training=False):
        return library.choose_backend(backend, "cpu", dtype, 4, training)

    assert chosen() == "cpu"
    cpu = excluded.device_name("cpu")
    excluded.record(cpu, {"cpu float32 inference": "wrong: y: off by 3"})
    library._choose.cache_clear()
    with pytest.warns(UserWarning, match=r"excludes paths that failed.*cpu float32 inference: wrong: y: off by 3 \(20"):
        assert chosen() == "torch"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert chosen() == "torch"  # said once
        assert chosen(dtype=BF16) == "cpu"  # another dtype is not concerned
    with pytest.warns(UserWarning, match="backend: 'cpu' is used as requested, but failed"):
        assert chosen("cpu") == "cpu"
    excluded.record(cpu, {})
    library._choose.cache_clear()
    assert chosen() == "cpu"


def test_the_record_holds_for_one_machine_and_is_kept_whole(cache):
    excluded.record("one", {"cpu float32 inference": "wrong: y"})
    assert excluded.paths("another") == {}
    excluded.record("another", {"torch float32 inference": "died"})
    assert len(json.loads(excluded.file().read_text())) == 2
    assert [file.name for file in cache.iterdir()] == ["excluded.json"]
    excluded.file().write_text(excluded.file().read_text().replace("torch 2", "torch 1"))
    excluded.paths.cache_clear()
    assert excluded.paths("one") == {}  # of another version
    for content in ("[1]", "[" * 100_000):
        excluded.file().write_text(content)
        excluded.paths.cache_clear()
        with pytest.raises(ValueError, match=r"excluded.json: is not a record of excluded paths"):
            excluded.paths("one")
    excluded.file().unlink()
    os.mkfifo(excluded.file())  # nothing is read from a pipe, which would block
    excluded.paths.cache_clear()
    with pytest.warns(
        UserWarning, match=r"excluded\.json: is not used, since it cannot be read \(expected a regular file\)"
    ):
        assert excluded.paths("one") == {}


def test_a_user_without_a_home_or_a_record_that_it_may_read(cache, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)
    assert excluded.paths("one") == {}
    with pytest.raises(SmileError, match="XDG_CACHE_HOME: is not set, and the user has no home folder"):
        excluded.record("one", {})
    monkeypatch.setenv("XDG_CACHE_HOME", "x" * 300)
    excluded.paths.cache_clear()
    with pytest.warns(UserWarning, match=r"excluded\.json: is not used, since it cannot be read"):
        assert excluded.paths("one") == {}


@pytest.mark.parametrize("name", ["excluded.json", "triton.json"])
def test_a_table_that_cannot_be_read_is_not_replaced(name, cache, monkeypatch):
    tuning = pytest.importorskip("smile_kernels.ops.triton.tuning")
    device = tuning.configs.Device("one", "sm90", 1, pdl=True, tma=True)
    monkeypatch.setattr(tuning.configs, "device_of", lambda _: device)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(cache.parent))
    file = publishing.user_file(*(excluded._FILE if name == "excluded.json" else tuning.configs._TABLE))
    assert file.name == name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text('{"other": {"a": "b"}}')

    def fails(*_, **__):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", fails)
        with pytest.raises(
            SmileError, match=rf"{name}: cannot be read \(Permission denied\); expected a file that can"
        ):
            (excluded.record if name == "excluded.json" else tuning.save)("one", {"x": "y"})
    assert json.loads(file.read_text()) == {"other": {"a": "b"}}


def test_the_composition_runs_whatever_was_said_of_it(cache):
    cpu = excluded.device_name("cpu")
    excluded.record(cpu, {f"{name} float32 inference": "wrong" for name in ("cpu", "torch")})
    with pytest.warns(UserWarning, match="excludes paths"):
        assert library.choose_backend(None, "cpu", FP32, 4, False) == "torch"


@pytest.mark.filterwarnings("ignore:smile_kernels excludes")
def test_a_failed_path_of_triton_gives_way_to_the_next():
    configs = pytest.importorskip("smile_kernels.ops.triton.configs")
    device = configs.Device("a GPU", "sm90", 132, pdl=True, tma=True)

    def chosen(tokens, dtype=BF16, n=8, r=32):
        linear = configs.linear_path(device, dtype, tokens, 4096, 4096, n, r, 16, r, 1, False)
        return linear, configs.apply_path(device, dtype, tokens, 4096, 4096, n, r, 1)

    def exclude(*parts):
        excluded.record("a GPU", {excluded.name_of("triton", part, BF16, False): "wrong" for part in parts})

    assert [chosen(1)[0], chosen(2048)[1], chosen(2048, n=64, r=64)[1]] == ["decode", "delta", "grouped"]
    exclude("decode")
    assert chosen(1) == ("one_product", "fused")
    assert configs.linear_paths(device, BF16, 1, 8, 32, False)[0] == "decode"  # can be verified again
    exclude("decode", "one_product", "fused")
    assert chosen(1) == ("route_first", "tma")
    exclude("delta", "grouped")
    assert [chosen(2048)[1], chosen(2048, n=64, r=64)[1]] == ["fused", "fused"]
    assert chosen(2048, torch.float32)[1] == "delta"
    exclude()
    assert chosen(1)[0] == "decode"


def test_doctor_verifies_writes_and_forgets(cache, tmp_path, monkeypatch):
    def run(*arguments, status=0):
        result = CliRunner().invoke(cli.app, ["doctor", *arguments])
        assert result.exit_code == status, result.output
        return result.output

    def verify(todo, workers, report):
        outcomes = {one.name: Outcome(0.1) for one in todo}
        first = next(one.name for one in todo if one.name.startswith("torch float32 inference"))
        outcomes[first] = Outcome(None, "wrong: y: off by 3")
        return outcomes

    monkeypatch.setattr(selftest, "verify", verify)
    total = len(selftest.checks("cpu"))
    output = run("--verify", "--report", str(tmp_path / "found.json"), status=1)
    assert f"cpu: {total - 1} of {total} checks agree with the reference" in output
    assert "  torch float32 inference, T16 96 to 80 N4 r8 g4 top-1: wrong: y: off by 3" in output
    assert "found.json: attach it to a bug report" in output
    assert "left out: torch float32 inference: wrong: y: off by 3" in output
    found = json.loads((tmp_path / "found.json").read_text())["cpu"]
    assert found["machine"]["versions"]["torch"] == torch.__version__
    assert len(found["checks"]) == total
    assert "left out: torch float32 inference" in run()
    assert "left out" not in run("--forget")
    assert "left out" not in run()
    monkeypatch.setattr(selftest, "verify", lambda todo, workers, report: {one.name: Outcome(0.1) for one in todo})
    assert f"{total} of {total} checks agree" in run("--verify", "--report", str(tmp_path / "found.json"))
    assert f"{total} of {total} checks agree" in run("--verify")
    assert (cache / "verify.json").exists()
    assert "expected a file in a folder that exists" in run(
        "--verify", "--report", str(tmp_path / "no" / "x"), status=1
    )


def test_verify_ends_at_its_deadline():
    with Worker(selftest.perform) as worker:
        assert selftest.verify([check(backend="torch")], [worker], deadline=time.monotonic() - 1) == {}
