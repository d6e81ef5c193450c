import copy
import json
import zipfile
from collections import Counter
from dataclasses import asdict

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import BertConfig, BertModel

from bench import routing as trials
from smile_kernels import RoutingPolicy, routing_override, set_routing, upscale, watch_routing
from smile_kernels.nn import smile_layers
from studies import data, merge, pages, vote
from studies import report as shared
from studies.encoder import model as encoder
from studies.encoder import report, routing, run, subtasks, sweeps, sweeps_report


def words(count: int, labels: str = "ab") -> data.Rows:
    return [(f"word number {i}", labels[i % len(labels)]) for i in range(count)]


SIZES = {"train": 10**6, "validation": 10**6, "test": 10**6}


class TestSplits:
    def test_depend_on_the_text_alone(self):
        splits = data.split_rows(words(2000), None, SIZES)
        shuffled = data.split_rows(words(2000)[::-1] + words(500), None, SIZES)
        assert splits == shuffled
        fewer = data.split_rows(words(1000), None, SIZES)
        for name in SIZES:
            assert set(fewer[name]) <= set(splits[name])

    def test_are_disjoint_and_of_the_promised_shares(self):
        splits = data.split_rows(words(4000), None, SIZES)
        assert sum(map(len, splits.values())) == 4000
        assert len({text for rows in splits.values() for text, _ in rows}) == 4000
        assert len(splits["validation"]) == pytest.approx(4000 * 25 / 256, rel=0.15)
        assert len(splits["test"]) == pytest.approx(4000 * 50 / 256, rel=0.15)

    def test_a_cut_keeps_the_front(self):
        whole = data.split_rows(words(900), None, SIZES)
        cut = data.split_rows(words(900), None, {"train": 50, "validation": 20, "test": 30})
        assert {name: len(rows) for name, rows in cut.items()} == {"train": 50, "validation": 20, "test": 30}
        assert all(whole[name][: len(rows)] == rows for name, rows in cut.items())

    def test_an_official_test_file_is_the_test_split_and_leaves_training(self):
        official = words(1000)[300:400]
        splits = data.split_rows(words(1000), official, SIZES)
        assert set(splits["test"]) == set(official)
        assert not {text for text, _ in official} & {text for text, _ in splits["train"] + splits["validation"]}
        assert len(splits["train"]) + len(splits["validation"]) == 900

    def test_ambiguous_texts_are_dropped_and_repeated_ones_kept_once(self):
        assert data.distinct([("x", "a"), ("x", "b"), ("y", "a"), ("y", "a")]) == [("y", "a")]

    def test_balancing_keeps_the_frequent_labels_equally_and_favours_no_split(self):
        rows = data.distinct(words(3000, "aaabbc"))
        kept = data.balanced(rows, 2)
        assert Counter(label for _, label in kept) == {"a": 1000, "b": 1000}
        test = data.split_rows(kept, None, SIZES)["test"]
        assert len(test) == pytest.approx(2000 * 50 / 256, rel=0.2)


def test_a_package_that_is_not_the_expected_one_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "p-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("a.txt", "text")
    package = data.Package("p", "1", "p-1-py3-none-any.whl", "0" * 64, "MIT")
    with pytest.raises(RuntimeError, match=r"p-1-py3-none-any\.whl: SHA-256 is .*, expected 0{64}"):
        package.fetch(tmp_path)


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    folder = tmp_path / "new" / "folder"

    def write(text: str, fail: bool) -> None:
        with data.new_folder(folder) as whole:
            whole.mkdir()
            (whole / "file.txt").write_text(text)
            if fail:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write("half", fail=True)
    assert list(folder.parent.iterdir()) == []
    for text in ("whole", "again"):
        write(text, fail=False)
        assert [file.name for file in folder.parent.iterdir()] == ["folder"]
        assert (folder / "file.txt").read_text() == text


@pytest.fixture
def bert() -> BertModel:
    """A random encoder of two layers."""
    config = BertConfig(
        vocab_size=50,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=40,
        max_position_embeddings=24,
    )
    return BertModel(config, add_pooling_layer=False).eval().requires_grad_(False)


@pytest.fixture
def case(bert) -> run.Case:
    """Three tasks of random texts on the encoder, its upper layer "fine-tuned" by random changes."""
    lower, base = encoder.Lower(bert, 1), encoder.Upper(bert, 1)

    def split(rows: int) -> encoder.Split:
        tokens = [torch.randint(50, (int(length),)) for length in torch.randint(3, 15, (rows,))]
        states = [lower(t[None], attention_mask=torch.ones(1, len(t), dtype=torch.bool))[0] for t in tokens]
        return encoder.Split(tokens, states, torch.randint(2, (rows,)))

    def trained(task: data.Task) -> encoder.Trained:
        changes = {n: 0.2 * torch.randn_like(p) for n, p in base.named_parameters() if "LayerNorm" not in n}
        head, rows = nn.Linear(24, 2), {"test": [(f"w{i} w{i + 1}", "ab"[i % 2]) for i in range(30)]}
        pair = (merge.add_to(base, changes), head)
        return encoder.Trained(task, rows, ["a", "b"], split(12), split(20), split(30), head, [pair])

    return run.Case(base, [trained(task) for task in data.TASKS[2:5]], 0, (0.3, 1.0), (0.5,), (1, 3))


class TestEncoder:
    def test_padding_does_not_change_features(self, case):
        split = case.trained[0].test
        together = encoder.features(case.base, split)
        alone = torch.cat([encoder.features(case.base, encoder.Split([], [s], torch.zeros(1))) for s in split.states])
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)

    def test_a_probe_separates_what_is_separable(self):
        labels = torch.arange(60) % 3
        points = nn.functional.normalize(torch.eye(3)[labels] @ torch.randn(3, 8) + 0.05 * torch.randn(60, 8), dim=-1)
        head = encoder.linear_probe(points, labels, 3, 1e-5)
        assert (head(points).argmax(-1) == labels).double().mean() > 0.95

    def test_fine_tuning_trains_linear_layers_and_the_head_only(self, case):
        train, base = case.trained[0].validation, case.base
        before = {name: p.clone() for name, p in base.named_parameters()}
        recipe = encoder.Recipe(batch=8, learning_rate=1e-2, epochs=40)
        steps = []
        upper, head = encoder.fine_tune(base, nn.Linear(24, 2), train, recipe, 0, lambda *at: steps.append(at))
        assert steps == [(i, 120) for i in range(120)]
        for name, p in base.named_parameters():
            torch.testing.assert_close(p, before[name], rtol=0, atol=0)
            assert torch.equal(upper.get_parameter(name), p) == ("LayerNorm" in name)
        assert encoder.accuracy(upper, head, train) > 85
        again, _ = encoder.fine_tune(base, nn.Linear(24, 2), train, recipe, 1, lambda *at: None)
        assert not torch.equal(next(again.parameters()), next(upper.parameters()))

    def test_adapters_change_weights_by_their_rank_only(self, case):
        train, base = case.trained[0].validation, case.base
        recipe = encoder.Recipe(batch=8, learning_rate=2e-2, epochs=40, adapter_rank=2)
        upper, head = encoder.fine_tune(base, nn.Linear(24, 2), train, recipe, 0, lambda *at: None)
        assert encoder.accuracy(upper, head, train) > 85
        assert sorted(upper.state_dict()) == sorted(base.state_dict())
        for name, p in base.named_parameters():
            change = upper.get_parameter(name) - p
            assert not upper.get_parameter(name).requires_grad
            if p.dim() == 2:
                assert torch.linalg.matrix_rank(change.double(), rtol=1e-4) == 2
            else:
                assert not change.any()


class TestTrials:
    """The rules of bench/routing.py, set so that they must choose as a policy does, choose as it does."""

    @pytest.mark.parametrize(
        ("rule", "policy"),
        [
            (trials.unless_unsure(0.0, "own"), "sequence + layers"),
            (trials.unless_unsure(0.0, "m 2"), "sequence + layers"),
            (trials.unless_unsure(1.1, "own"), "token (published)"),
            (trials.unless_unsure(1.1, "m 2"), "sequence + layers, m 2"),
            (trials.prior(99, "token"), "sequence + layers"),
            (trials.forgetting_layers(1.0), "sequence + layers"),
            (trials.forgetting_layers(0.0), "sequence"),
            (trials.forgetting_tokens(1e9), "causal + layers"),
            (trials.forgetting_tokens(1e-9), "token + layers"),
            (trials.turning(4, 1.1), "causal + layers"),
            (trials.window(99), "sequence + layers"),
            (trials.window(0), "token + layers"),
            (trials.window(2), "window of 2 + layers"),
            (trials.near(1e-9), "token + layers"),
            (trials.near(1e9), "sequence + layers"),
            (trials.told_apart, "sequence + layers"),
        ],
    )
    def test_meet_the_policies(self, case, rule, policy):
        model, _ = upscale(case.base, case.uppers, rank_of_expert=8, rank_of_router=4, progress=False)
        shipped, heads = copy.deepcopy(model), [task.probe for task in case.trained]
        set_routing(shipped, (trials.WINDOWS | trials.SHIPPED)[policy])
        routing.follow(model, rule)
        texts = [routing.Text(s, [(i, 0, len(s), 0)]) for i, t in enumerate(case.trained) for s in t.test.states]
        assert routing.answer(model, heads, texts) == routing.answer(shipped, heads, texts)


class TestRouting:
    def tokenizer(self) -> Tokenizer:
        vocabulary = {"[UNK]": 0, "[CLS]": 1} | {f"w{i}": i + 2 for i in range(40)}
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", 1)])
        return tokenizer

    def test_sets_of_texts(self, case, bert):
        lower = encoder.Lower(bert, 1)
        sizes = routing.Sizes(prompted=10, words=8, misled=6, mixed=4)
        sets = routing.text_sets(case.trained, lower, self.tokenizer(), "test", sizes)
        assert {name: len(texts) for name, texts in sets.items()} == {
            "prompted": 30,
            "words": 16,  # of the two tasks that are in WORDS
            "misled": 18,
            "mixed": 12,
        }
        assert all(len(text.states) == 3 for text in sets["words"])  # [CLS] and two words
        misled = len(case.trained[1].task.prompt.split()) + 3
        assert all(len(text.states) == misled for text in sets["misled"][:6])
        for k, text in enumerate(sets["mixed"][:4]):
            (i, start, cut, label), (j, middle, end, other) = text.parts
            first, second = case.trained[0].test, case.trained[1].test
            assert (i, start, middle, j, end) == (0, 0, cut, 1, len(text.states))
            assert (cut, end - cut + 1) == (len(first.tokens[k]), len(second.tokens[9 - k]))
            assert (label, other) == (first.labels[k], second.labels[9 - k])

    def test_every_contender_answers(self, case, bert):
        texts = [routing.Text(s, [(i, 0, len(s), 0)]) for i, t in enumerate(case.trained) for s in t.test.states[:8]]
        noise = routing.random_pieces(encoder.Lower(bert, 1), self.tokenizer(), 4, 10)
        sets = {"prompted": texts, "one task": texts[:8]}
        answered = run.route_all(case, sets, noise, lambda *_: None, (4, 8))
        assert len(answered["prompted"]) == len(routing.POLICIES) + 6
        assert answered["prompted"]["oracle"]["own"] == [100.0] * 3
        assert len({str(row) for row in answered["prompted"].values()}) > len(routing.POLICIES) / 2
        tasks = [task.task.name for task in case.trained]
        found = run.by_seed(tasks, [answered, answered])
        for name, row in found["prompted"].items():
            assert list(row["right"]) == tasks
            assert all(right == [right[0]] * 2 and len(right[0]) == 8 for right in row["right"].values())
            assert list(found["one task"][name]["right"]) == tasks[:1]

    def test_results_are_kept_until_what_decides_them_changes(self, tmp_path):
        assert run.kept(tmp_path, [1], lambda: {"a": (1, 2)}) == {"a": [1, 2]}
        assert run.kept(tmp_path, [1], lambda: pytest.fail("made again")) == {"a": [1, 2]}
        assert run.kept(tmp_path, [2], lambda: {"b": 1}) == {"b": 1}

    def test_the_recommended_policy_of_an_encoder_is_in_the_tables(self):
        model = BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8))
        policy = RoutingPolicy.recommended(model)
        assert policy == run.POLICIES["window + layers"] == routing.POLICIES["window of 2 + layers"]

    def test_the_tempered_rule(self):
        """On one token the shares are the window's; at the second layer the logarithm is the mean of both layers'."""
        at, shares = routing.Pass(torch.ones(1, 1, 1), torch.zeros(1, 1)), torch.tensor([[[0.5, 0.3, 0.15, 0.05]]])
        for at.layer in range(2):
            weights, ids = routing.tempered(at, shares)
            assert ids.tolist() == [[[0, 1, 2]]]
            best = shares[0, 0, :3] ** 3
            torch.testing.assert_close(weights[0, 0], best / best.sum())

    def test_rows_without_those_of_merging(self, case, monkeypatch):
        monkeypatch.setattr(run, "SETTINGS", ((4, 8),))
        names = [variant.name for variant in run.variants(case, merging=False)]
        assert names == ["base + probe", "individual", "SMILE (g 4, r 8)"]

    def test_results_that_keep_the_rows_of_merging_are_of_the_same_study(self, tmp_path):
        plan, file = run.Plan.of(quick=False, seeds=1, tasks=6), tmp_path / "results.json"
        with pytest.raises(ValueError, match=r"^keep_merged: is on, and json is None; expected results"):
            run.study(keep_merged=True)
        found = {"recipe": asdict(plan.recipe), "tasks": [{"name": task.name} for task in plan.tasks], "seeds": 1}
        for change in ({"seeds": 2}, {"tasks": []}, {"recipe": {"depth": 9}}):
            file.write_text(json.dumps(found | change))
            with pytest.raises(ValueError, match=r"^json: .* is of another recipe, tasks or seeds"):
                run.earlier_results(file, plan, 1)
        file.write_text(json.dumps(found))
        assert run.earlier_results(file, plan, 1) == found

    def test_one_layer_votes(self, case):
        """Residuals and weights against the definition, text by text, in float64."""
        model, _ = upscale(case.base, case.uppers, rank_of_expert=3, rank_of_router=2, progress=False)
        split = case.trained[0].test
        states, mask = split.gather(torch.arange(6))
        seen: dict[str, torch.Tensor] = {}
        names = list(smile_layers(model))
        for name in names:
            case.base.get_submodule(name).register_forward_pre_hook(
                lambda _, args, name=name: seen.update({name: args[0].double()})
            )
        case.base(states, attention_mask=mask)
        found = vote.residuals(model, mask, states)
        for name in names:
            vh = model.get_submodule(name).vh.double()
            for row, length in enumerate(mask.sum(1)):
                x = seen[name][row, :length]
                want = [(x - x @ v.T @ v).square().sum(-1).mean().sqrt() for v in vh]
                torch.testing.assert_close(found[name][row].double(), torch.stack(want), rtol=1e-4, atol=1e-5)
        layer = names[-1]
        w = (-found[layer]).softmax(-1)
        kept = w * ((w > 0.33) | (w == w.amax(-1, keepdim=True)))
        torch.testing.assert_close(torch.stack(vote.weights(found[layer], 0.33)), kept / kept.sum(-1, keepdim=True))
        with routing_override(model, vote.weights(found[layer])):
            want = model(states, attention_mask=mask)
        torch.testing.assert_close(routing.LayerVote(model, layer)(states, attention_mask=mask), want)
        assert routing.LayerVote.by_validation(model, case.trained).layer in names

    def test_the_parts_of_a_text_are_read_out_and_routed_on_their_own(self, case):
        model, _ = upscale(case.base, case.uppers, rank_of_expert=-1, rank_of_router=4, progress=False)
        routing.follow(model, routing.oracle)
        heads = [task.finetuned[0][1] for task in case.trained]
        states = case.trained[0].test.states
        cuts = [len(s) // 2 for s in states]
        texts = [routing.Text(s, [(0, 0, c, 0), (1, c, len(s), 1)]) for s, c in zip(states, cuts)]
        result = routing.answer(model, heads, texts)
        assert result["own"] == [100.0, 100.0, None]
        assert result["right"][2] == ""
        alone = [routing.Text(s, [(0, 0, len(s), label)]) for s, label in zip(states, case.trained[0].test.labels)]
        accuracy = encoder.accuracy(case.uppers[0], heads[0], case.trained[0].test)
        right = routing.answer(model, heads, alone)["right"][0]
        assert 100 * right.count("1") / len(right) == pytest.approx(accuracy)
        together = routing.individual(case.uppers, heads, alone)["right"][0]
        assert 100 * together.count("1") / len(together) == pytest.approx(accuracy)


class TestEvaluation:
    def test_oracle_routing_at_full_rank_is_the_fine_tuned_model(self, case):
        model, _ = upscale(case.base, case.uppers, rank_of_expert=-1, rank_of_router=4, progress=False)
        for i, task in enumerate(case.trained):
            own = run.with_own_expert(model, i)
            torch.testing.assert_close(
                encoder.features(own, task.test), encoder.features(case.uppers[i], task.test), rtol=1e-3, atol=1e-4
            )
            with watch_routing(own) as counts:
                encoder.features(own, task.test)
            tokens = sum(map(len, task.test.tokens))
            assert list(counts) == list(smile_layers(model))
            assert all(count[i] == count.sum() == tokens for count in counts.values())

    def test_every_variant_is_evaluated(self, case, monkeypatch):
        monkeypatch.setattr(run, "SETTINGS", ((4, 8), (8, -1)))
        monkeypatch.setattr(run, "SHOWN", (4, 8))
        rows = {variant.name: run.evaluate(variant, case) for variant in run.variants(case)}
        assert list(rows) == [
            "base + probe",
            "individual",
            "simple averaging",
            "task arithmetic",
            "TIES",
            "TSV-Merge",
            "Iso-C",
            "Fisher merging",
            "RegMean",
            "AdaMerging, by task",
            "AdaMerging, by layer",
            "WEMoE",
            "SMILE (g 4, r 8)",
            "SMILE (g 4, r 8), oracle routing",
            "SMILE (g 4, r 8), sequence + layers",
            "SMILE (g 4, r 8), causal + layers",
            "SMILE (g 4, r 8), window + layers",
            "SMILE (g 4, r 8), one layer votes",
            "SMILE (g 8, full rank)",
        ]
        one = sum(p.numel() for p in case.base.parameters())
        assert rows["individual"]["upper_parameters"] == 3 * one
        assert rows["TIES"]["upper_parameters"] == one < rows["SMILE (g 4, r 8)"]["upper_parameters"]
        assert rows["TIES"]["scale"] in case.scales
        assert all(rows[name]["steps"] in (1, 3) for name in ("AdaMerging, by task", "AdaMerging, by layer", "WEMoE"))
        assert rows["WEMoE"]["upper_parameters"] > 2 * one
        assert [name for name, row in rows.items() if row["passes"] == 2] == ["SMILE (g 4, r 8), one layer votes"]
        assert set(rows["SMILE (g 4, r 8), oracle routing"]["own_expert"].values()) == {100.0}
        layers = {tuple(row["own_expert"]) for name, row in rows.items() if name.startswith("SMILE")}
        assert layers == {tuple(rows["SMILE (g 8, full rank)"]["own_expert"])}
        assert rows["SMILE (g 8, full rank)"]["energy_least"] == pytest.approx(100, abs=1e-3)
        verified = [rows[name].get("verified") for name in ("SMILE (g 8, full rank)", "SMILE (g 4, r 8)", "TIES")]
        assert verified == ["exact", "truncated", None]
        for row in rows.values():
            assert len(row["accuracy"]) == 3

    def test_a_fused_model_that_is_not_what_was_fused_ends_the_study(self, case, monkeypatch):
        monkeypatch.setattr(run, "upscale", lambda base, uppers, **options: upscale(base, uppers[::-1], **options))
        with pytest.raises(RuntimeError, match="the fused model is not what was fused: expert 0: off, first at layers"):
            list(run.fused(case, 4, 8))

    def test_timings_say_what_is_missing(self, case, monkeypatch):
        def missing(*args):
            raise ImportError("No module named 'fusion_bench'")

        monkeypatch.setattr(run, "fusion_bench_layers", missing)
        config = BertConfig(
            vocab_size=50, hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=40
        )
        lower = encoder.Lower(BertModel(config).eval(), 1)
        plain, peer = run.time_per_batch(lower, {"plain encoder": case.base}, case, texts=4)
        assert plain["ratio"] == 1
        assert plain["milliseconds"] > 0
        assert peer["missing"] == "No module named 'fusion_bench'"

    def test_fusion_bench_layers_give_what_ours_give(self, case):
        ours, _ = upscale(case.base, case.uppers, rank_of_expert=8, rank_of_router=4, progress=False)
        theirs = run.fusion_bench_layers(case.base, case.uppers, 4, 8)
        split = case.trained[0].test
        torch.testing.assert_close(encoder.features(ours, split), encoder.features(theirs, split), rtol=1e-3, atol=1e-3)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"seeds": 0}, "seeds: is 0; expected 1 or more"),
            ({"tasks": 7}, "tasks: is 7; expected 6 or 8"),
            ({"tasks": 8, "quick": True}, "quick: is on with tasks 8"),
        ],
    )
    def test_bad_arguments(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            run.study(**arguments)


class TestSubtasks:
    def test_rounds_have_every_pair_once(self):
        found = list(subtasks.rounds(list("abcdef")))
        assert len(found) == 5
        assert all(sorted(name for pair in pairs for name in pair) == list("abcdef") for pairs in found)
        assert len({frozenset(pair) for pairs in found for pair in pairs}) == 15

    def test_a_pair_has_as_many_texts_of_each_class(self):
        rows = [(f"text {i}", "aabc"[i % 4]) for i in range(400)]
        task = data.Task("letters", "which letter? ", data.VADER, lambda archive: rows)
        pair = subtasks.pair_of(task, ("a", "c"))
        assert (pair.name, pair.prompt) == ("letters: a or c", "which letter: a or c? ")
        assert Counter(label for _, label in pair.read(None)) == {"a": 100, "c": 100}
        assert pair.read_test is None

    def test_disjoint_pairs_of_all_sources_come_first(self, monkeypatch, tmp_path):
        def task(name: str, letters: str) -> data.Task:
            return data.Task(name, f"which {name}? ", data.VADER, lambda archive: words(80, letters))

        monkeypatch.setattr(data.Package, "fetch", lambda *arguments: tmp_path)
        monkeypatch.setattr(subtasks, "TASKS", [task("one", "abcd"), task("two", "vwxyz!")])
        monkeypatch.setattr(subtasks, "SOURCES", ("one", "two"))
        names = [one.name.split(":")[0] for one in subtasks.subtasks(tmp_path, 8)]
        assert names == ["one", "two", "one", "two", "two", "one", "two", "one"]
        assert len({one.prompt for one in subtasks.subtasks(tmp_path, 100)}) == 6 + 15


@pytest.fixture
def swept(case, bert, monkeypatch, tmp_path):
    """`sweeps.study` with small grids on the random encoder, its arguments, and its results."""
    monkeypatch.setattr(run, "SHOWN", (4, 8))
    for name, values in {"EXPERT_RANKS": (2, 8), "ROUTER_RANKS": (1, 4), "EQUAL_RANKS": (2, 4)}.items():
        monkeypatch.setattr(sweeps, name, values)
    monkeypatch.setattr(sweeps, "SUBTASK_NUMBERS", (2, 3))
    monkeypatch.setattr(sweeps, "SUBTASK_RECIPE", encoder.Recipe(depth=1, adapter_rank=8))
    halves = encoder.Lower(bert, 1), encoder.Upper(bert, 1)
    plans, made = [], []
    monkeypatch.setattr(run, "train", lambda plan, *rest: plans.append(plan) or (bert, None, *halves, case.trained))
    monkeypatch.setattr(sweeps, "subtasks", lambda folder, count: made.append(count) or data.TASKS[:count])
    of_tasks = dict(zip((task.name for task in data.TASKS), case.trained))
    monkeypatch.setattr(sweeps, "train_task", lambda task, *rest: of_tasks[task.name])
    for task in case.trained:
        task.rows["train"] = []
        task.finetuned.append(task.finetuned[0])
    files = {"json_path": tmp_path / "a.json", "plot": tmp_path / "a.svg"}
    found = sweeps.study(seeds=2, tasks=8, cache=tmp_path, **files)
    assert json.loads(files["json_path"].read_text()) == json.loads(json.dumps(found))
    assert files["plot"].read_text().count("<svg") == 1
    assert [(plan.recipe, len(plan.tasks)) for plan in plans] == [(sweeps.RECIPE, 8), (sweeps.ADAPTER, 8)]
    assert made == [3]
    return found


def test_the_sweeps_of_a_study(swept, case, bert):
    assert len(swept["runs"]) == 2
    first = swept["runs"][0]
    names = ("routing", "rank_of_router", "rank_of_expert")
    ranks = [tuple(row[name] for name in names) for row in first["ranks"]]
    assert ranks == [(name, g, r) for name in sweeps.POLICIES for g in (1, 4) for r in (2, 8)]
    assert [(row["routing"], row["num_experts_per_tok"]) for row in first["per_token"]] == [
        (name, m) for name in sweeps.POLICIES for m in (1, 2, 3)
    ]
    assert len(sweeps.EVERY) == 7
    rows = ["individual", "simple averaging", *sweeps.EVERY, "oracle"]
    for part in ("experts", "subtasks"):
        assert [(row["experts"], row["routing"], len(row["scores"])) for row in first[part]] == [
            (n, name, n) for n in (2, 3) for name in rows
        ]
    found = {(row["experts"], row["routing"]): row for row in first["experts"]}
    alone = [
        encoder.accuracy(upper, case.head(i), t.test) for i, (t, upper) in enumerate(zip(case.trained, case.uppers))
    ]
    assert list(found[3, "individual"]["scores"].values()) == alone
    fused, _ = upscale(case.base, case.uppers[:2], rank_of_expert=8, rank_of_router=4, progress=False)
    names = [task.task.name for task in case.trained]
    for i in range(2):
        own = encoder.accuracy(run.with_own_expert(fused, i), case.head(i), case.trained[i].test)
        assert found[2, "oracle"]["scores"][names[i]] == own
    set_routing(fused, sweeps.EVERY["causal + layers"])
    got = encoder.accuracy(fused, case.head(0), case.trained[0].test)
    assert found[2, "causal + layers"]["scores"][names[0]] == got
    assert [(row["kind"], row["r"], row["routing"]) for row in first["kinds"]] == [
        (kind, r, name)
        for kind in ("full fine-tune", "LoRA, rank 16")
        for r, names in ((None, ["individual"]), *((r, [*sweeps.POLICIES, "oracle"]) for r in (2, 4)))
        for name in names
    ]
    lower, base = encoder.Lower(bert, 1), encoder.Upper(bert, 1)
    size = [sum(p.numel() for p in part.parameters()) for part in (lower, base, fused)]
    found = {name: row["parameters"] for (number, name), row in found.items() if number == 2}
    assert found["oracle"] == found["published"] == pytest.approx((size[0] + size[2]) / (size[0] + size[1]))
    assert found["individual"] == pytest.approx((size[0] + 2 * size[1]) / (size[0] + size[1]))
    assert found["simple averaging"] == 1


def test_tables_of_sweeps_are_shares_of_the_individual_models(swept):
    tables = {title: (columns, rows) for title, columns, rows in sweeps_report.tables(swept)}
    assert all(len(row) == len(columns) for columns, rows in tables.values() for row in rows)
    columns, rows = tables["Experts of different tasks: % of the individual models"]
    assert columns == ["experts", "2", "3"]
    scores = [
        sum(row["scores"].values()) / 3
        for row in swept["runs"][0]["experts"]
        if row["experts"] == 3 and "scores" in row
    ]
    assert rows[0] == ["individual, accuracy", rows[0][1], f"{scores[0]:.1f}"]
    assert [float(row[2]) for row in rows[2:]] == [float(f"{100 * score / scores[0]:.1f}") for score in scores[1:]]
    columns, rows = tables["Ranks: % of the individual models (parameters)"]
    assert columns == ["routing", "r", "g 1", "g 4"]
    one = swept["runs"][0]["ranks"][3]
    assert one["rank_of_router"] == 4
    share = 100 * sum(one["scores"].values()) / 3 / scores[0]
    assert rows[1] == ["published", "8", rows[1][2], f"{share:.1f} ({one['parameters']:.2f}×)"]
    assert "**Experts of sub-tasks: % of the individual models**" in sweeps_report.markdown(swept)


def results() -> dict:
    """Two tasks, two seeds, four rows of made-up numbers in the form that the study writes."""

    def row(name: str, parameters: float, *runs: dict) -> dict:
        return {"name": name, "parameters": parameters, "runs": list(runs)}

    def run(scores: tuple[float, float], own: dict | None = None, **more) -> dict:
        costs = {"seconds": 2.0, "data": "none", "passes": 1}
        return {"accuracy": list(scores), "own_expert": own or {}, **costs, **more}

    own = {"layers.0.query": 40.0, "layers.0.key": 60.0}
    return {
        "machine": {"processor": "a processor", "threads": 2, "torch": "2", "transformers": "5", "backend": "torch"},
        "seeds": 2,
        "tasks": [
            {
                "name": name,
                "prompt": "what is it? ",
                "package": "p 1",
                "licence": "MIT",
                "classes": 2,
                "train": 30,
                "validation": 10,
                "test": 20,
            }
            for name in ("first", "second")
        ],
        "rows": [
            row("base + probe", 1.0, run((50, 60)), run((50, 60))),
            row("individual", 2.0, run((80, 90)), run((82, 92))),
            row(
                "TIES",
                1.0,
                run((60, 70), scale=0.5, density=0.1, validation=66.0),
                run((62, 70), scale=1, validation=65.0),
            ),
            row(
                "SMILE (g 4, r 16)",
                1.25,
                run((79, 89), own, energy_mean=51.0, energy_least=30.0),
                run((81, 91), own, energy_mean=53.0, energy_least=30.0),
            ),
        ],
        "routing": {
            "prompted": {
                "published": {"right": {"first": ["1100", "0100"], "second": ["11"]}, "own": []},
                "oracle": {"right": {"first": ["1110", "1110"], "second": ["11"]}, "own": []},
            }
        },
        "time": [
            {"name": "plain encoder", "milliseconds": 10.0, "ratio": 1.0},
            {"name": "SMILE (g 4, r 16)", "milliseconds": 12.0, "ratio": 1.2},
            {"name": "fusion_bench", "milliseconds": None, "ratio": None, "missing": "No module named 'fusion_bench'"},
        ],
        "fidelity": [
            {"rank": 0, "cosine": 0.9, "parameters": 1.0},
            {"rank": -1, "cosine": 0.99, "parameters": 2.0, "energy_mean": 100.0},
        ],
    }


def table(title: str) -> list[list[str]]:
    (rows,) = (rows for name, _, rows in report.tables(results()) if name == title)
    return rows


class TestReport:
    def test_accuracy_table(self):
        title, columns, rows = report.tables(results())[1]
        assert title == "Accuracy on held-out texts, %"
        assert columns[1:4] == ["first", "second", "average"]
        assert rows[1] == ["individual", "81.0", "91.0", "86.0 ± 1.4", "100.0", "2.00×", "–", "–"]
        assert rows[3] == ["SMILE (g 4, r 16)", "80.0", "90.0", "85.0 ± 1.4", "98.8", "1.25×", "50", "52"]

    def test_what_each_method_needs(self):
        assert table("What each method needs") == [
            ["individual", "2.00×", "none", "1", "2.0", "–"],
            ["TIES", "1.00×", "none", "1", "2.0", "as plain"],
            ["SMILE (g 4, r 16)", "1.25×", "none", "1", "2.0", "1.20×"],
        ]

    def test_routings_are_compared_text_by_text(self):
        # Differences 0.5, 0, 1, 0 of the first task have variance 11/48 over 4 texts; those of the second are 0.
        rows = table("Accuracy by routing on four sets of texts, % (points above the published routing)")
        error = 100 * (11 / 48 / 4) ** 0.5 / 2
        assert rows == [["published", "68.8"], ["oracle", f"87.5 (+18.8 ± {error:.1f})"]]

    def test_margins_are_paired_by_seed(self):
        title, columns, rows = report.tables(results())[2]
        assert title == "Points above the merged models, on average"
        assert columns == ["", "TIES"]
        assert rows == [["SMILE (g 4, r 16)", "19.5 ± 0.7"]]

    def test_every_row_has_its_columns(self):
        for _, columns, rows in report.tables(results()):
            assert rows
            assert all(len(row) == len(columns) for row in rows)

    def test_a_peer_that_is_not_installed_says_so(self):
        timing = table("CPU time to encode one batch of 32 texts on one thread")
        assert timing[2] == ["fusion_bench", "No module named 'fusion_bench'", "–"]

    def test_page_sections_are_made_anew(self, tmp_path):
        page = tmp_path / "page.md"
        page.write_text("before\n<!-- easy -->\nold\n<!-- /easy -->\nafter\n")
        text = shared.fill(page, {"easy": report.markdown(results())})
        assert text.startswith("before\n<!-- easy -->\n2 seeds")
        assert text.endswith("<!-- /easy -->\nafter\n")
        assert "old" not in text
        page.write_text("nothing here")
        with pytest.raises(ValueError, match="no section between <!-- easy -->"):
            shared.fill(page, {"easy": "text"})

    @pytest.mark.parametrize("page", list(pages.sections()), ids=lambda page: page.name)
    def test_the_documentation_shows_the_committed_results(self, page):
        """To bring the pages up to date: python -m studies.pages."""
        assert shared.fill(page, pages.sections()[page]) == page.read_text(encoding="utf-8")

    def test_plot(self, tmp_path):
        shared.write(results(), tmp_path / "new" / "results.json", tmp_path / "plot.png", report.draw)
        assert json.loads((tmp_path / "new" / "results.json").read_text()) == json.loads(json.dumps(results()))
        assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
        assert (tmp_path / "plot.png").stat().st_size > 10_000
