"""Benchmarks: counts, refusals, stored results and tables."""

import copy
import json
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from rich.console import Console

from bench import compare, construction, models, problems, report, routing, run, streaming, vllm_engines
from smile_kernels import SmileError, SmileLinear
from smile_kernels.benchmark import command, measure
from smile_kernels.benchmark.peers import BASELINE, PEERS, CannotRunError, Peer
from smile_kernels.benchmark.problems import LAYERS, Case, Setting, layer_shape
from smile_kernels.ops import reference
from smile_kernels.publishing import marked

HERE = [name for name in PEERS if name != "torch.compile"]


def small_case(m: int = 1, dtype: torch.dtype = torch.float32, tokens: int = 9) -> Case:
    return Case("70x41", Setting(4, 8, 5, m), tokens, dtype)


def test_a_batch_has_as_many_tokens_as_asked_and_none_routed_on_a_hair():
    for m in (1, 2, 4):
        case = Case("96x64", Setting(4, 8, 6, m), 300, torch.bfloat16)
        problem = case.problem("cpu")
        scores = reference.scores(problem.x, problem.rows()).sort(dim=-1, descending=True).values
        assert problem.x.shape == (300, 96)
        if m < 4:
            assert ((scores[:, m - 1] - scores[:, m]) / scores[:, 0]).min() > 0.01


def test_work_counts_every_operand_once_and_only_chosen_experts():
    case = Case("70x41", Setting(4, 8, 5, 2), 3, torch.bfloat16)
    p = case.problem("cpu")
    ids = torch.tensor([[0, 2], [2, 0], [0, 2]], dtype=torch.int32)
    y = torch.empty(3, 41, dtype=torch.bfloat16)
    operands = [p.x, y, p.weight, p.bias, p.vh[:, :5]]
    for i in (0, 2):
        operands += [p.vh[i, 5:], p.s[i], p.u[i], p.expert_bias[i]]
    work = case.work(len(ids.unique()))
    assert work.bytes == sum(t.numel() * t.element_size() for t in operands)
    per_token = 70 * 41 + 4 * 5 * 70 + 2 * (3 * 70 + 8 * 41)
    assert work.flops == 2 * 3 * per_token
    both = case.work(2, backward=True)
    assert both.bytes == 3 * work.bytes - y.numel() * 2
    assert both.flops == 2 * 3 * (per_token + 2 * (70 * 41 + 2 * 8 * (70 + 41)))


def test_the_floor_over_the_dense_layer_is_that_of_the_shapes():
    case = Case("mistral-7b.q", Setting(8, 32, 16), 1, torch.bfloat16)
    assert case.work(1).bytes / (2 * (4096 * 4096 + 2 * 4096)) == pytest.approx(1.043, abs=1e-3)


def test_the_floor_is_the_larger_of_both_limits():
    limits = {"bandwidth": [[100, 1e9], [1000, 1e8]], "matmul": {"float32": 1e9}}
    assert measure.floor_us({"bytes": 500, "flops": 1, "dtype": "float32"}, limits) == pytest.approx(0.5)
    assert measure.floor_us({"bytes": 5000, "flops": 1, "dtype": "float32"}, limits) == pytest.approx(50)
    assert measure.floor_us({"bytes": 50, "flops": 9000, "dtype": "float32"}, limits) == pytest.approx(9)


def test_layers_by_name_or_by_size():
    assert layer_shape("clip-b32.fc1") == (768, 3072, True)
    assert layer_shape("96x33") == (96, 33, True)
    for name in ("mistral", "96", "0x4", "4x-1", "axb"):
        with pytest.raises(ValueError, match="layer: is"):
            layer_shape(name)
    families = {name.rsplit(".", 1)[0] for name in LAYERS}
    assert {"clip-b32", "clip-l14", "flan-t5-base", "mistral-7b", "llama-3-70b-tp8", "qwen2.5-7b"} <= families


def test_interleaved_samples_are_times_of_one_call():
    counts = {"quick": 0, "slow": 0}

    def quick():
        counts["quick"] += 1

    def slow():
        counts["slow"] += 1
        time.sleep(0.003)

    samples = measure.interleave({"quick": quick, "slow": slow}, "cpu", seconds=0.02)
    rounds = {len(values) for peer in samples.values() for values in peer.values()}
    assert len(rounds) == 1
    assert rounds.pop() >= measure.MIN_ROUNDS
    assert min(samples["slow"]["wall_us"]) >= 3000
    assert min(samples["slow"]["process_us"]) < 3000
    assert min(samples["quick"]["wall_us"]) < 100
    assert counts["quick"] > 10 * counts["slow"]


def test_peak_memory_sees_what_was_freed_on_the_way():
    def call():
        a = torch.ones(1 << 18)
        b = a + 1
        del a
        return b + 1

    assert measure.peak_memory(call, "cpu") == pytest.approx(2 * 4 * 2**18, rel=0.01)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("m", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_peer_that_runs_here_passes_the_check(dtype, m, backward):
    record = measure.measure(small_case(m, dtype, 67), HERE, device="cpu", backward=backward, seconds=0)
    timed = {name for name, peer in record["peers"].items() if "wall_us" in peer}
    assert {"F.linear", "smile:torch", "fusion_bench", "plain"} <= timed
    assert ("peft" in timed) == (m == 1)
    for name, peer in record["peers"].items():
        assert "refused" not in peer, f"{name}: {peer}"
        assert "wall_us" in peer or len(peer["cannot_run"]) > 10
        if name in timed:
            assert peer["memory"] >= 67 * 41 * dtype.itemsize
    assert "need a CUDA GPU" in record["peers"]["vllm.lora"]["cannot_run"]
    json.dumps(record)


def test_the_compiled_composition_passes_the_check():
    record = measure.measure(small_case(), ["torch.compile"], device="cpu", seconds=0)
    assert "wall_us" in record["peers"]["torch.compile"], record["peers"]["torch.compile"]


def wrong_by(error: float) -> Peer:
    def build(problem, weights, ids):
        layer, parameters = PEERS["smile:torch"].build(problem, weights, ids)
        return (lambda x: layer(x) + error), parameters

    return Peer(build)


def test_wrong_results_are_refused_and_failures_listed(monkeypatch):
    def absent(problem, weights, ids):
        raise CannotRunError("its hardware is not here")

    def broken(problem, weights, ids):
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setitem(PEERS, "wrong", wrong_by(1e-3))
    monkeypatch.setitem(PEERS, "nan", wrong_by(float("nan")))
    monkeypatch.setitem(PEERS, "right", wrong_by(0.0))
    monkeypatch.setitem(PEERS, "absent", Peer(absent))
    monkeypatch.setitem(PEERS, "broken", Peer(broken))
    names = ["wrong", "nan", "right", "absent", "broken"]
    record = measure.measure(small_case(), names, device="cpu", seconds=0)
    peers = record["peers"]
    assert peers["wrong"]["refused"].startswith("y: off by 0.001")
    assert "refused" in peers["nan"]
    assert peers["absent"] == {"cannot_run": "its hardware is not here"}
    assert peers["broken"] == {"cannot_run": "RuntimeError: first line"}
    assert set(measure.summary(record, LIMITS)) == {BASELINE, "right"}


def test_settings_out_of_range_are_refused_by_their_names():
    for setting, name in ((Setting(0, 8, 4), "num_local_experts"), (Setting(3, 8, 4, 4), "num_experts_per_tok")):
        with pytest.raises(SmileError, match=f"^{name}: is "):
            command.bench(["48x40"], [1], setting, device="cpu", seconds=0.01)


def test_a_wrong_gradient_is_refused(monkeypatch):
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, dy):
            return 1.01 * dy

    def build(problem, weights, ids):
        layer, parameters = PEERS["smile:torch"].build(problem, weights, ids)
        return (lambda x: layer(Wrong.apply(x))), parameters

    monkeypatch.setitem(PEERS, "wrong", Peer(build))
    assert "wall_us" in measure.measure(small_case(), ["wrong"], device="cpu", seconds=0)["peers"]["wrong"]
    peers = measure.measure(small_case(), ["wrong"], device="cpu", backward=True, seconds=0)["peers"]
    assert peers["wrong"]["refused"].startswith("x: off by")


def test_the_machine_is_described_and_its_limits_are_positive():
    described = measure.machine("cpu")
    assert described["device"]
    assert described["versions"]["torch"] == torch.__version__
    assert described["clock_mhz"] is None or described["clock_mhz"] > 100
    limits = measure.limits("cpu", [torch.float32], seconds=0)
    sizes = [size for size, _ in limits["bandwidth"]]
    assert sizes == sorted(sizes)
    assert all(1e8 < rate < 1e13 for _, rate in limits["bandwidth"])
    assert 1e8 < limits["matmul"]["float32"] < 1e14


def test_the_command_shows_a_table_and_keeps_every_sample(tmp_path):
    for _ in range(2):  # and replaces its own
        console = Console(width=100, record=True, file=open(tmp_path / "out.txt", "w"))  # noqa: SIM115
        result = command.bench(
            ["48x40"],
            [1, 5],
            Setting(3, 8, 4),
            device="cpu",
            peers=["smile:torch", "vllm.lora"],
            seconds=0.01,
            json_file=tmp_path / "r.json",
            plot_file=tmp_path / "r.png",
            console=console,
        )
    text = console.export_text()
    assert "48x40 (48 to 40), N3 r8 g4 top-1, 5 tokens, float32, forward, eager" in text
    assert "vllm.lora: cannot run: vLLM's LoRA kernels need a CUDA GPU" in text
    assert json.loads((tmp_path / "r.json").read_text()) == marked(result)
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.txt", "r.json", "r.png"]
    row = measure.summary(result["records"][0], result["limits"][0])["smile:torch"]
    assert f"{row['us']:.1f}" in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": ["clip"]}, "layer: is 'clip'; expected"),
        ({"tokens": [0]}, "tokens: is 0; expected 1 or more"),
        ({"setting": Setting(8, 41, 4)}, "rank_of_expert: is 41; expected 1 to 40"),
        ({"setting": Setting(8, 4, 49)}, "rank_of_router: is 49; expected 1 to 48"),
        ({"setting": Setting(8, 4, 4, 9)}, "num_experts_per_tok: is 9; expected 1 to 8"),
        ({"setting": Setting(0, 4, 4, 0)}, "is 0; expected 1"),
        ({"dtype": "int8"}, "dtype: is 'int8'; expected one of float32"),
        ({"dtype": ""}, "dtype: is ''; expected one of float32"),
        ({"device": ""}, "device: is ''; expected one of cpu"),
        ({"device": "tpu"}, "device: is 'tpu'; expected one of cpu"),
        ({"seconds": float("nan")}, "seconds: is nan; expected a number above 0"),
        ({"peers": ["mine"]}, "peers: 'mine' is unknown"),
        ({"json_file": Path("no-such-folder/r.json")}, "json: is 'no-such-folder/r.json'; expected a file in a folder"),
        ({"graph": True}, "graph: CUDA graphs need device 'cuda'"),
    ],
)
def test_the_command_names_what_is_wrong_before_it_measures(changes, message, monkeypatch):
    monkeypatch.setattr(command, "measure", lambda *_, **__: pytest.fail("measured"))
    arguments = {"layers": ["48x40"], "tokens": [1], "setting": Setting(8, 4, 4), "device": "cpu"} | changes
    with pytest.raises(ValueError, match=message):
        command.bench(**arguments)


LIMITS = {"threads": 1, "bandwidth": [[1, 1e9]], "matmul": {"float32": 1e9, "bfloat16": 1e9}}


def layers_record(name: str = "a", us: float = 20.0, m: int = 1, **peers) -> dict:
    """A record in which F.linear took 10 µs each round and "smile:torch" `us`; its floor is 5 µs."""

    def timed(value: float) -> dict:
        return {"wall_us": [value] * 9, "process_us": [value / 2] * 9, "memory": 2**20}

    return {
        "name": name,
        **{"layer": "clip-b32.attn", "num_local_experts": 8, "rank_of_expert": 32, "rank_of_router": 16},
        **{"num_experts_per_tok": m, "tokens": 4, "dtype": "float32", "pass": "forward", "mode": "eager"},
        **{"device": "cpu", "threads": 1, "bytes": 5000, "flops": 1},
        "peers": {BASELINE: timed(10.0), "smile:torch": timed(us)} | {k: timed(v) for k, v in peers.items()},
    }


def layers_part(*records: dict) -> dict:
    machine = {"device": "A CPU", "cores": 2, "clock_mhz": 3000, "load": 0.1, "versions": {"torch": "2"}}
    machine |= {"commit": "abc", "measured": "now"}
    return {"machine": machine, "limits": [LIMITS], "records": list(records)}


def test_summary_is_of_the_samples():
    row = measure.summary(layers_record(us=20.0), LIMITS)["smile:torch"]
    assert row["us"] == 20
    assert row["spread"] == 0
    assert row["over_linear"] == 2
    assert row["over_floor"] == pytest.approx(4)
    assert row["gbps"] == pytest.approx(0.25)
    assert row["waiting"] == 0.5


def test_ratios_are_taken_within_a_round():
    record = layers_record()
    record["peers"][BASELINE]["wall_us"] = [10.0, 20.0, 40.0]
    record["peers"]["smile:torch"]["wall_us"] = [15.0, 30.0, 60.0]
    assert measure.summary(record, LIMITS)["smile:torch"]["over_linear"] == 1.5


def test_tables_are_generated_between_markers():
    part = layers_part(layers_record("a", 20.0), layers_record("b", 80.0, m=2))
    part["records"][1]["peers"]["plain"] = {"refused": "y: off by 3"}
    text = "before\n<!-- bench:cpu-forward -->\nold\n<!-- /bench -->\nafter <!-- bench:gpu-headline --> <!-- /bench -->"
    filled = report.fill(text, {"cpu": {"layers": part}})
    assert "| clip-b32.attn | 4 | 1 | 4.00 | 0.50 |" in filled
    assert "old" not in filled
    assert filled.startswith("before\n<!-- bench:cpu-forward -->\n|")
    assert f"<!-- bench:gpu-headline -->\n{report.NOT_MEASURED}\n<!-- /bench -->" in filled
    assert report.fill(filled, {"cpu": {"layers": part}}) == filled
    assert "plain refused: y: off by 3 (1 of 2 cases)" in report.refused(part)


def test_a_mean_over_fewer_settings_is_not_shown():
    part = layers_part(layers_record("a", 20.0, plain=30.0), layers_record("b", 80.0, m=2))
    assert "| 4.00 | – |" in report.over_linear(part, "forward")


def test_slower_lists_what_beats_the_best_of_ours():
    part = layers_part(layers_record("a", 20.0, plain=15.0), layers_record("b", 20.0, plain=25.0))
    assert report.slower(part).count("plain") == 1
    assert "Nowhere" in report.slower(layers_part(layers_record("b", 20.0, plain=25.0)))


def test_the_documents_show_the_committed_results():
    results = report.load()
    for document in report.DOCUMENTS:
        assert document.read_text(encoding="utf-8") == report.fill(document.read_text(encoding="utf-8"), results)
    with pytest.raises(ValueError, match="bench:cpu-everything: is unknown"):
        report.fill("<!-- bench:cpu-everything --><!-- /bench -->", {})


def test_the_plot_is_the_same_for_the_same_results(tmp_path):
    more = layers_record("b", 15.0) | {"tokens": 64}
    part = layers_part(layers_record("a"), more)
    for name in ("one.svg", "two.svg"):
        report.plot(part, tmp_path / name)
    one, two = (file.read_bytes() for file in sorted(tmp_path.iterdir()))
    assert one == two
    assert b"<svg" in one


def test_results_survive_an_interruption_and_change_with_the_commit(tmp_path, monkeypatch):
    file = tmp_path / "layers.json"
    calls = []

    def step(name: str):
        calls.append(name)
        if name == "b" and calls.count("b") == 1:
            raise KeyboardInterrupt
        return {"peers": {}}

    plan = {name: lambda name=name: step(name) for name in "abc"}
    with pytest.raises(KeyboardInterrupt):
        run.measure_all(plan, file, "cpu", lambda: [LIMITS])
    assert [r["name"] for r in json.loads(file.read_text())["records"]] == ["a"]
    run.measure_all(plan, file, "cpu", lambda: pytest.fail("limits measured again"))
    assert calls == ["a", "b", "b", "c"]
    assert [r["name"] for r in json.loads(file.read_text())["records"]] == ["a", "b", "c"]
    found = measure.machine("cpu") | {"commit": "another"}
    monkeypatch.setattr(run, "machine", lambda device: found)
    run.measure_all(plan, file, "cpu", lambda: [LIMITS])
    assert calls[4:] == ["a", "b", "c"]
    assert json.loads(file.read_text())["machine"]["commit"] == "another"


def noisy(record: dict, factor: float, seed: int, by: float = 0.03) -> dict:
    generator = torch.Generator().manual_seed(seed)
    record = copy.deepcopy(record)
    noise = 1 + by * torch.randn(30, generator=generator)
    record["peers"][BASELINE]["wall_us"] = [10.0] * 30
    record["peers"]["smile:torch"]["wall_us"] = (20 * factor * noise).tolist()
    return record


def test_compare_tells_changes_from_noise():
    old = layers_part(noisy(layers_record(), 1.0, 0))
    assert compare.compare(old, old) == ([], [])
    assert compare.compare(old, layers_part(noisy(layers_record(), 1.0, 1))) == ([], [])
    worse, better = compare.compare(old, layers_part(noisy(layers_record(), 1.5, 1)))
    assert len(worse) == 1
    assert "smile:torch" in worse[0]
    assert not better
    worse, better = compare.compare(old, layers_part(noisy(layers_record(), 0.5, 1)))
    assert not worse
    assert "2.00 to 0.99" in better[0]
    busy, busier = (layers_part(noisy(layers_record(), factor, 2, by=0.2)) for factor in (1.0, 1.2))
    assert compare.compare(busy, busier) == ([], [])
    lost = layers_part(layers_record())
    lost["records"][0]["peers"]["smile:torch"] = {"refused": "y: off by 3"}
    worse, _ = compare.compare(old, lost)
    assert "no longer runs: y: off by 3" in worse[0]


def test_plans_name_every_run_once_and_fit_their_layers():
    for make_plan in (run.PARTS | run.PARTS_ON_CPU).values():
        assert make_plan("cpu")
    plan = problems.cpu()
    assert len({r.name for r in plan}) == len(plan)
    for r in plan:
        in_features, out_features, _ = r.case.shape
        assert r.case.setting.rank_of_expert <= min(in_features, out_features)
        assert set(r.peers) <= set(PEERS)


@pytest.fixture
def tiny_workloads() -> list[models.Workload]:
    text = transformers.MistralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=None,
    )
    vision = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=16
    )
    return [
        models.Workload("text", text, Setting(3, 4, 3), torch.float32, 1, 6, 3),
        models.Workload("vision", vision, Setting(2, 4, 3), torch.float32, 1),
    ]


def test_whole_models_run_and_agree(tiny_workloads):
    part = layers_part(*({"name": w.name} | models.measure_model(w, "cpu", seconds=0) for w in tiny_workloads))
    for record, decodes in zip(part["records"], (True, False)):
        variants = record["variants"]
        assert {"dense", "smile:torch", "fusion_bench", "separate models"} <= {
            name for name, variant in variants.items() if "prefill" in variant
        }
        assert all(("decode" in variant) == decodes for variant in variants.values() if "prefill" in variant)
        n = 3 if decodes else 2
        assert variants["separate models"]["parameters"] == n * variants["dense"]["parameters"]
        assert variants["dense"]["parameters"] < variants["smile:torch"]["parameters"]
        assert models.tokens_per_second(record, variants["dense"], "prefill") > 0
    table = report.models_table(part)
    assert "3 requests of 6 + 3 tokens" in table
    assert "smile:cuda cannot run: it supports cuda tensors" in table


def test_a_model_with_wrong_outputs_is_refused(tiny_workloads, monkeypatch):
    def wrong(layer: SmileLinear) -> torch.nn.Module:
        return torch.nn.Linear(layer.in_features, layer.out_features)

    monkeypatch.setattr(models, "_fusion_bench_layer", wrong)
    variants = models.measure_model(tiny_workloads[1], "cpu", seconds=0)["variants"]
    assert variants["fusion_bench"]["refused"].startswith("off by")


def test_the_copy_of_a_model_shares_its_tensors():
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.LayerNorm(8))
    converted = models._with_layers(model, lambda linear: models._smile_layer(linear, Setting(2, 3, 2)))
    assert isinstance(converted[0], SmileLinear)
    assert isinstance(model[0], torch.nn.Linear)
    assert converted[0].weight.data_ptr() == model[0].weight.data_ptr()
    assert converted[1].weight is model[1].weight
    x = torch.randn(3, 8)
    assert not torch.equal(converted[0](x), F.linear(x, model[0].weight, model[0].bias))


def test_construction_is_timed_and_checked(monkeypatch):
    record = construction.measure_layer(64, 48, "cpu", seconds=0)
    assert {"smile", "fusion_bench"} == {name for name, peer in record["peers"].items() if "wall_us" in peer}
    real = construction._ours

    def wrong(base, finetuned):
        layer = real(base, finetuned)
        layer.s.data *= 1.1
        return layer

    monkeypatch.setattr(construction, "_ours", wrong)
    record = construction.measure_layer(64, 48, "cpu", seconds=0)
    assert record["peers"]["smile"]["refused"].startswith("expert 0: error")
    part = layers_part({"name": "layer"} | record)
    assert "- layer: smile refused: expert 0" in report.construction_table(part)


def test_given_routing_is_timed_and_every_sequence_has_its_own_expert(monkeypatch):
    given = []
    smile_linear = routing.functional.smile_linear
    monkeypatch.setattr(
        routing.functional, "smile_linear", lambda *a, **k: given.append(k.get("routing")) or smile_linear(*a, **k)
    )
    monkeypatch.setattr(routing, "interleave", lambda calls, device, seconds: measure.interleave(calls, device, 0))
    record = routing.measure_layer(40, 48, 24, "torch")
    assert list(record["peers"]) == [
        *("F.linear", "own router", "given, one a token", "given, one a sequence", "given, one for all")
    ]
    experts = {tuple(routing[1][:, 0].tolist()) for routing in given if routing is not None}
    assert len(experts) == 3
    assert sum(sorted(set(ids)) == list(range(8)) and ids[::3] == ids[1::3] == ids[2::3] for ids in experts) == 1
    part = layers_part({"name": "layer", **record})
    assert report.routing_costs_table(part, "layer").count("\n") == 2


def test_streaming_is_measured_above_an_idle_process(monkeypatch):
    monkeypatch.setattr(streaming, "SHAPES", {"small": (64, 48)})
    large = torch.ones(2**28)  # the memory of this process does not count
    record = streaming.measure_streaming(2, 1)
    assert record["base_bytes"] == 2 * 64 * 48 * 2
    assert record["input_bytes"] == 3 * record["base_bytes"]
    assert 50e6 < record["idle_bytes"] < large.nbytes
    assert abs(record["peak_bytes"] - record["idle_bytes"]) < 50e6
    assert "| 0 | 0 | 1 |" in report.streaming_table(layers_part(record))


class Engine:
    """In place of the pipe to an engine: a job takes `first` seconds and `each` per token after the first."""

    def __init__(self, first: float, each: float):
        self.first, self.each = first, each

    def send(self, job: tuple[int, ...]) -> None:
        self.new = job[2]

    def recv(self) -> tuple[float, float]:
        seconds = self.first + self.each * (self.new - 1)
        return seconds, 2 * seconds


def test_engines_are_compared_by_the_tokens_after_the_first(capsys):
    records = vllm_engines.measure({"base": Engine(1.0, 0.1), "fused": Engine(3.0, 0.15)}, rounds=3)
    assert [record["name"] for record in records] == list(vllm_engines.CASES)
    for record in records:
        base, peer = record["peers"]["base"], record["peers"]["fused"]
        decodes = record["new_tokens"] > 1
        assert base["process_ms"] == pytest.approx([100 if decodes else 1000] * 3)
        assert peer["wall_ms"] == pytest.approx([300 if decodes else 6000] * 3)
        assert peer["over_first_process_ms"] == pytest.approx(1.5 if decodes else 3.0)
    assert "1.50" in report.vllm_table({"records": records})
