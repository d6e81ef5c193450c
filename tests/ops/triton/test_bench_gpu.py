"""`python -m bench.gpu` in rehearsal: every stage under the interpreter, with paths that raise, are wrong, or hang."""

import json
import statistics
import time

import pytest
import torch

from bench import RESULTS, cost, gpu, gpu_rows, gpu_tables, report
from smile_kernels.benchmark.peers import PEERS
from smile_kernels.benchmark.problems import Case, Setting
from smile_kernels.ops import reference
from smile_kernels.ops.triton import backend, configs
from smile_kernels.selftest import triton_paths
from smile_kernels.testing import taking

BROKEN = {("decode", "fused"): "hung", ("one_product", "tma"): "raised", ("route_first", "grouped"): "wrong"}


def faulty(job):
    """The work of `bench.gpu` on a machine where three paths are broken if requested by name."""
    linear = backend.linear

    def broken(*args):
        asked = configs.linear_path.__module__ == taking.__module__
        fault = BROKEN.get((configs.linear_path(), configs.apply_path())) if asked else None
        if fault == "hung":
            time.sleep(1000)
        if fault == "raised":
            raise RuntimeError("planted")
        y, *others = linear(*args)
        return (y * 1.5 if fault == "wrong" else y, *others)

    backend.linear = broken
    try:
        return gpu_rows.perform_job(job)
    finally:
        backend.linear = linear


def test_broken_paths_are_named_and_the_rest_is_measured(tmp_path, monkeypatch, capsys, device):
    if device != "cpu":
        pytest.skip("the rehearsal is for machines without a GPU")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    before = sorted(RESULTS.rglob("*"))
    start = time.monotonic()
    gpu.main(["--rehearse", "--out", str(tmp_path)], work=faulty)
    assert time.monotonic() - start < 530
    printed = capsys.readouterr().out
    part = json.loads((tmp_path / "triton.json").read_text())

    found = {(check["linear"], check["apply"]): check["failure"] for check in part["checks"]}
    assert {path: failure.split()[0].rstrip(":") for path, failure in found.items() if failure} == BROKEN
    assert {
        ("decode_one_launch", "fused"),
        ("one_product", "fused"),
        ("one_product", "delta"),
        ("route_first", "fused"),
    } < found.keys()

    rows = {record["name"]: record for record in part["records"]}
    assert not any("failure" in record for record in rows.values()), rows
    graph = rows["32x32 N3 r4 g2 top-1 T3 graph"]
    others = {"one_product fused", "one_product delta", "route_first fused", "route_first delta"}
    assert graph["us"].keys() == {"F.linear", "chosen", *others}
    failed = {" ".join(path) for path in BROKEN}
    assert graph["cannot_run"].keys() == {*failed, "smile:cuda"}
    assert graph["wrong"] == {}
    assert "expert loop" in rows["32x32 N3 r4 g2 top-1 T3 eager"]["us"]
    assert rows["32x32 N3 r4 g2 top-1 T5 training"]["us"].keys() == {"F.linear", "chosen"}
    assert "decode_one_launch fused" in rows["32x32 N3 r4 g2 top-1 T3 graph decode_one_launch fused"]["us"]
    assert rows["soak"]["agreed"] > 0
    assert part["tests"]["passed"] > 0
    assert part["tests"]["failed"] == []
    assert [name for name, reason in part["stages"].items() if reason] == ["cuda"]

    text = printed[printed.index("A REHEARSAL") :]
    assert len(text.encode()) < 10_000
    assert "8 of 11 checks of paths agree" in text
    for path in failed:
        assert f"- triton {path} bfloat16 inference, T5 48 to 32 N3 r4 g2 top-1: {found[tuple(path.split())]}" in text
    assert "Nothing was timed." in text

    # It is not mistaken for a measurement.
    assert sorted(RESULTS.rglob("*")) == before
    assert len(list(tmp_path.iterdir())) <= 6
    (tmp_path / "gpu").mkdir()
    (tmp_path / "triton.json").rename(tmp_path / "gpu" / "triton.json")
    with pytest.raises(ValueError, match="is a rehearsal"):
        report.load(tmp_path)


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for arguments, said in (([], "no GPU is visible"), (["--rehearse"], "expected TRITON_INTERPRET=1")):
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        with pytest.raises(SystemExit):
            gpu.main(arguments)
        assert said in capsys.readouterr().err
    monkeypatch.setattr(gpu.shutil, "which", lambda _: None)
    with pytest.raises(SystemExit, match="compute-sanitizer: not found"):
        gpu.sanitize()


def test_the_plan_of_a_gpu_is_whole(monkeypatch):
    monkeypatch.setattr(gpu.selftest, "checks", lambda device: [])
    monkeypatch.setattr(gpu, "build_for_this_gpu", lambda: [])
    plan = gpu.on_gpu()
    files = [file for file in plan.tests if file.endswith(".py")]
    names = [gpu.Path(file).name for file in files]
    assert names[0] == "test_gpu.py"
    assert {"test_evidence.py", "test_kernels.py"} <= {*names}
    assert all(gpu.Path(file).exists() for file in files)
    rows = [*plan.headline, *plan.settings, *plan.single]
    assert len({row.name for row in rows}) == len(rows)
    assert not any(row.only is None and row.mode == "kernels" for row in rows)
    for row in rows:
        in_features, out_features, _ = row.case.shape
        assert row.setting.rank_of_expert <= min(in_features, out_features)
    graph = {(row.layer, row.tokens) for row in plan.headline if row.mode == "graph"}
    assert graph == set(gpu.product(gpu.HEADLINE_LAYERS, (1, 4, 16, 32, 64, 128, 256, 512, 2048, 8192)))
    assert {row.tokens for row in plan.headline if row.mode == "eager"} >= {1, 16}
    assert sum(row.mode == "training" for row in plan.headline) == 2
    # Stages are consecutive, and the last ends before the call.
    assert sorted(gpu.ENDS.values()) == [*gpu.ENDS.values()]
    assert max(gpu.ENDS.values()) < 1


def test_a_failing_stage_does_not_end_the_call(tmp_path, monkeypatch, capsys):
    def fail(self):
        raise OSError("no space left")

    for name in gpu.ENDS:
        monkeypatch.setattr(gpu.Call, f"_{name}", fail)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    gpu.main(["--rehearse", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert printed.count("raised OSError: no space left") == len(gpu.ENDS)
    monkeypatch.setattr(gpu_tables, "failures", fail)
    gpu.main(["--rehearse", "--out", str(tmp_path)])
    assert "no summary: OSError: no space left" in capsys.readouterr().out


def test_tests_that_hang_end_with_their_outcomes(tmp_path, monkeypatch):
    (tmp_path / "test_planted.py").write_text(
        "import signal, time\n"
        "def test_passes(): pass\n"
        "def test_fails(): assert 1 == 2\n"
        "def test_hangs():\n    signal.signal(signal.SIGINT, signal.SIG_IGN)\n    time.sleep(1000)\n"
    )
    plan = gpu.replace(gpu.on_cpu(), tests=[str(tmp_path / "test_planted.py")])
    call = gpu.Call(plan, 14, tmp_path, True, gpu_rows.perform_job)
    monkeypatch.setitem(gpu.ENDS, "tests", 1.0)
    with call.stage("tests"):
        call._tests()
    assert time.monotonic() - call.start < 50
    assert call.part["tests"]["passed"] == 1
    assert [test["message"].split()[-1] for test in call.part["tests"]["failed"]] == ["AssertionError"]
    assert call.part["stages"]["tests"] == "the time limit was reached before the last test"


@pytest.mark.parametrize("tokens", [1, 16, 17, 64, 65, 2048])
@pytest.mark.parametrize("setting", cost.SETTINGS, ids=str)
def test_the_rows_hold_what_the_heuristics_choose(setting, tokens, device):
    n, r, g, _ = (getattr(setting, name) for name in Setting.__dataclass_fields__)
    for layer in cost.LAYERS:
        linear, apply = cost.chosen_paths(Case(layer, setting, tokens, torch.bfloat16), cost.DEVICE)
        path = (linear, "fused") if linear == "decode" else (linear, apply)
        assert path in triton_paths(device, torch.bfloat16, tokens, n, max(r, g))


def test_soak_passes_and_names_what_fails(device, monkeypatch):
    job = gpu_rows.Soak(device, 1.0, largest=6)
    assert gpu_rows.soak(job)["agreed"] > 0
    linear = backend.linear
    monkeypatch.setattr(backend, "linear", lambda *args: (linear(*args)[0] + 9, *linear(*args)[1:]))
    with pytest.raises(AssertionError, match=r"torch\.\w+, \(.*\), seed \d+: y: off by"):
        gpu_rows.soak(job)


def test_paths_are_taken_only_for_a_while():
    before = configs.linear_path, configs.apply_path
    with taking("route_first", "delta"):
        assert configs.linear_path() == "route_first"
        assert configs.apply_path() == "delta"
    assert before == (configs.linear_path, configs.apply_path)


@pytest.mark.parametrize("m", [1, 2])
def test_the_loop_over_experts_gives_what_fusion_bench_gives(m):
    pytest.importorskip("fusion_bench")
    p = Case("96x64", Setting(5, 8, 4, m), 33, torch.float32).problem("cpu")
    routing = reference.route(p.x, p.rows(), m)
    ours, theirs = (PEERS[name].build(p, *routing)[0](p.x) for name in gpu_tables.LOOPS[::-1])
    assert torch.equal(ours, theirs)


def part_of(*records):
    limits = [{"threads": 1, "bandwidth": [[1, 4e12]], "matmul": {"bfloat16": 7e14}}]
    return {"machine": {}, "limits": limits, "checks": [], "stages": {}, "records": list(records)} | {
        "tests": {"passed": 2, "skipped": 1, "failed": [{"test": "t.py::x", "outcome": "failed", "message": "E  no"}]}
    }


def row(tokens, mode, **us):
    setting = vars(Setting(8, 32, 16))
    us = {name.replace("_", " "): [10 * v, 20 * v] for name, v in us.items()}
    us["F.linear"] = [10.0, 20.0]
    return {
        "name": f"q T{tokens} {mode}",
        "layer": "mistral-7b.q",
        "setting": setting,
        "tokens": tokens,
        "mode": mode,
    } | {"us": us}


def test_tables_and_aims_of_made_up_records():
    part = part_of(
        row(1, "graph", chosen=1.1, decode_fused=1.05),
        row(1, "eager", chosen=2.0, expert_loop=50.0),
        row(2048, "graph", chosen=1.3),
        row(2048, "training", chosen=1.17),
        {"name": "q T4 graph", "mode": "graph", "failure": "hung: no answer within 30 s"},
    )
    ratio = gpu_tables.floor_ratio(part["records"][0], part["limits"])
    assert ratio == pytest.approx(Case("mistral-7b.q", Setting(8, 32, 16), 1, torch.bfloat16).work(1).bytes / 33570816)
    aims = gpu_tables.aims(part)
    assert [line.split(":")[0] for line in aims] == ["met", "met", "MISSED", "met"]
    assert "25.0 times as fast as expert loop, at least 20" in aims[1]
    table = gpu_tables.headline(part)
    assert table.splitlines()[0] == "| N8 r32 g16 top-1, bfloat16 | T 1 | T 2048 |"
    assert "| mistral-7b.q, forward, CUDA graph | 1.10 (1.04) | 1.30 (1.04) |" in table
    assert "| mistral-7b.q, N8 r32 g16 top-1 | 1 | 15.0 | 1.04 | 1.10 | 1.05 |" in gpu_tables.forward(part, "graph")
    assert gpu_tables.faster_paths(part) == "q T1 graph: chosen 1.10, decode fused 1.05"
    assert gpu_tables.failures(part) == "- row q T4 graph: hung: no answer within 30 s\n- test t.py::x: E no"
    assert "0 of 0 checks of paths agree" in gpu_tables.summary(part)
    # Without the machine's limits there is no floor and no aim, but times are shown.
    unlimited = {**part, "limits": []}
    assert "| 1.10 (–) | 1.30 (–) |" in gpu_tables.headline(unlimited)
    assert [line for line in gpu_tables.aims(unlimited) if "expert loop" not in line] == []
    assert gpu_tables.headline({**part, "machine": {"rehearsal": True}}) == ""
    # A path from a separate row is shown with the others.
    alone = part_of(row(1, "graph", chosen=1.1), row(1, "graph", single_fused=1.0))
    assert gpu_tables.forward(alone, "graph").splitlines()[2].endswith("| 1.04 | 1.10 | 1.00 |")
    assert gpu_tables.faster_paths(alone) == "q T1 graph: chosen 1.10, single fused 1.00"
    assert statistics.median(part["records"][0]["us"]["chosen"]) == 16.5
