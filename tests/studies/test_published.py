"""The published tables, end to end on tiny random models: CLIP on images of a colour, T5 and Mistral on few words."""

import copy
import json
import sys
from types import SimpleNamespace

import pytest
import scipy.stats
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPVisionModel,
    PreTrainedTokenizerFast,
    T5ForConditionalGeneration,
)
from typer.testing import CliRunner

from smile_kernels import upscale
from studies.published import clip, common, flan_t5, mistral
from studies.published.__main__ import app
from tests.integrations import tiny_models

COLOURS = {"red_one": (200, 30, 20), "blue": (20, 40, 210), "green": (10, 190, 60)}


def tokenizer(words: list[str], **special: str) -> PreTrainedTokenizerFast:
    """Words are tokens; [BOS] and [EOS] enclose a text."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    ends = [(name, words.index(name)) for name in ("[BOS]", "[EOS]")]
    tokenizer.post_processor = processors.TemplateProcessing(single="[BOS] $A [EOS]", special_tokens=ends)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="[EOS]", **special)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Two tasks of three classes, with vision towers that were "fine-tuned" by random changes."""
    folder = tmp_path_factory.mktemp("published")
    base = tiny_models.build("CLIPModel")
    base.save_pretrained(folder / "base")
    words = ["[UNK]", "[BOS]", "[EOS]", "a", "photo", "of", "red", "one", "blue", "green"]
    tokenizer(words, pad_token="[EOS]").save_pretrained(folder / "base")
    size = {"height": 32, "width": 32}
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size).save_pretrained(folder / "base")
    for seed, task in enumerate(("colours", "shades"), 1):
        place = folder / "tasks" / task
        tiny_models.fine_tuned(base, seed).save_pretrained(place / "model")
        for name, colour in COLOURS.items():
            (place / "test" / name).mkdir(parents=True)
            for i in range(2):
                Image.new("RGB", (40, 36), tuple(c + 5 * i * seed for c in colour)).save(
                    place / "test" / name / f"{i}.png"
                )
    (folder / "tasks" / "shades" / "prompts.txt").write_text("a photo of {}\na {}\n")
    return folder


def test_clip_is_what_plain_computations_give(images, monkeypatch, tmp_path):
    monkeypatch.setattr(clip, "EXPERT_RANKS", (2, 6))
    monkeypatch.setattr(clip, "ROUTER_RANK", 2)
    ended = CliRunner().invoke(app, ["clip", str(images), "--json", str(tmp_path / "a.json")])
    assert ended.exit_code == 0, ended.output
    assert "No numbers of the authors for this architecture." in ended.output
    found = json.loads((tmp_path / "a.json").read_text())
    assert found["tasks"] == {"colours": 6, "shades": 6}
    rows = {row["name"]: row for row in found["rows"]}
    smile = [f"SMILE (g 2, r {r}), {name}" for name in common.POLICIES for r in (2, 6)]
    assert list(rows) == ["base", "individual", *smile]
    tower, processor, tasks = clip.load(images, "cpu", lambda *at: None)
    assert torch.allclose(tasks[0].classes.norm(dim=-1), torch.ones(3))
    for task in tasks:
        with torch.no_grad():
            pixels = processor([Image.open(file) for file, _ in task.images], return_tensors="pt")["pixel_values"]
            whole = tower.get_image_features(pixel_values=pixels)
            features = getattr(whole, "pooler_output", whole)
            right = (features @ task.classes.T).argmax(-1) == torch.tensor([label for _, label in task.images])
        assert rows["base"]["scores"][task.name] == pytest.approx(100 * right.double().mean().item())
    base = CLIPVisionModel.from_pretrained(images / "base").eval()
    fused, _ = upscale(base, [task.model for task in tasks], rank_of_expert=6, rank_of_router=2, progress=False)
    for task in tasks:
        want = clip.accuracy(fused, tower, processor, task, batch=4)
        assert rows["SMILE (g 2, r 6), published"]["scores"][task.name] == want
    size = sum(p.numel() for p in fused.parameters()) / sum(p.numel() for p in base.parameters())
    assert rows["SMILE (g 2, r 6), published"]["parameters"] == pytest.approx(size)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("base", "base is not a folder; expected base/ and tasks/"),
        ("tasks/shades/model", "shades has 3 classes in test/; expected model/, and two or more"),
        ("tasks/shades/test/blue/0.png", "has no image; expected .png"),
    ],
)
def test_what_clip_lacks_is_named_before_work(tmp_path, missing, message):
    for task in ("colours", "shades"):
        for name in COLOURS:
            (tmp_path / "tasks" / task / "test" / name).mkdir(parents=True)
            (tmp_path / "tasks" / task / "test" / name / "0.png").touch()
        (tmp_path / "tasks" / task / "model").mkdir()
    (tmp_path / "base").mkdir()
    place = tmp_path / missing
    place.unlink() if place.is_file() else place.rmdir()
    ended = CliRunner().invoke(app, ["clip", str(tmp_path)])
    assert ended.exit_code == 1
    assert message in str(ended.exception or ended.output)


ROWS = {
    "cola": {"sentence": "the sun is red"},
    "stsb": {"sentence1": "the sun is red", "sentence2": "the sea is blue"},
}


@pytest.fixture(scope="module")
def glue(tmp_path_factory):
    """T5 with two tasks of GLUE: full fine-tunes in full/, adapters in lora/."""
    folder = tmp_path_factory.mktemp("glue")
    base = tiny_models.build("T5ForConditionalGeneration")
    words = ["[PAD]", "[BOS]", "[EOS]", "[UNK]", "acceptable", "unacceptable", "3.0", "1.0", "the", "sun", "is", "red"]
    words += [f"word{i}" for i in range(96 - len(words))]  # whatever the model says is a word
    text = tokenizer(words, pad_token="[PAD]", unk_token="[UNK]")
    for kind in ("full", "lora"):
        base.save_pretrained(folder / kind / "base")
        text.save_pretrained(folder / kind / "base")
        for seed, (task, row) in enumerate(ROWS.items(), 1):
            place = folder / kind / "tasks" / task
            if kind == "full":
                tiny_models.fine_tuned(base, seed).save_pretrained(place / "model")
            else:
                adapted = get_peft_model(copy.deepcopy(base), LoraConfig(r=2, target_modules=["q", "v"]))
                with torch.no_grad():
                    for name, p in adapted.named_parameters():
                        if "lora_B" in name:
                            p.normal_(std=0.3)
                adapted.save_pretrained(place / "model")
            rows = ({**row, "label": i % 2, "idx": i} for i in range(4))
            (place / "test.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return folder


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_glue_is_what_plain_computations_give(glue, monkeypatch, tmp_path, kind):
    monkeypatch.setattr(flan_t5, "RANKS", {"full": (2, (2, 6)), "LoRA": (2, (1, 2))})
    seen = []
    monkeypatch.setattr(flan_t5, "score", lambda task, given, right: seen.append((task, given, right)) or 50.0)
    ended = CliRunner().invoke(app, ["flan-t5", str(glue / kind), "--json", str(tmp_path / "a.json")])
    assert ended.exit_code == 0, ended.output
    found = json.loads((tmp_path / "a.json").read_text())
    assert (found["kind"].lower(), found["tasks"]) == (kind, {"cola": 4, "stsb": 4})
    smile = [f"SMILE (g 2, r {r}), published" for r in ((2, 6) if kind == "full" else (1, 2))]
    assert [row["name"] for row in found["rows"]] == ["base", "individual", *smile]
    assert [task for task, _, _ in seen] == ["cola", "stsb"] * 4
    assert seen[0][2] == ["unacceptable", "acceptable"] * 2
    assert seen[1][2] == ["0.0", "1.0"] * 2
    place = glue / kind / "tasks" / "cola"
    model = T5ForConditionalGeneration.from_pretrained(glue / kind / "base").eval()
    if kind == "full":
        model = T5ForConditionalGeneration.from_pretrained(place / "model").eval()
    else:
        model = PeftModel.from_pretrained(model, place / "model").eval()
    text = AutoTokenizer.from_pretrained(glue / kind / "base")
    prompt = 'Indicate if the following sentence is grammatically correct or not: "the sun is red". '
    ids = text(prompt + "Answere 'acceptable' or 'unacceptable'.", return_tensors="pt")["input_ids"]
    want = text.decode(model.generate(input_ids=ids, max_length=10)[0], skip_special_tokens=True)
    assert seen[2] == ("cola", [want] * 4, ["unacceptable", "acceptable"] * 2)
    assert want


def test_scores_of_glue():
    assert flan_t5.score("cola", ["acceptable", "unacceptable", " acceptable", ""], ["acceptable"] * 4) == 25
    given, right = ["1.0", "much", "3.5", "3.5", "2"], ["1.2", "0.4", "5.0", "3.0", "4.2"]
    want = scipy.stats.spearmanr([1, 0, 3.5, 3.5, 2], [1.2, 0.4, 5, 3, 4.2]).statistic
    assert flan_t5.score("stsb", given, right) == pytest.approx(100 * want)
    assert flan_t5.score("stsb", ["1.0"] * 5, right) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tasks: (tasks / "stsb").rename(tasks / "wnli"), "wnli is not a task; expected cola, mnli"),
        (
            lambda tasks: (tasks / "stsb" / "test.jsonl").unlink(),
            "stsb is not complete; expected model/ and test.jsonl",
        ),
        (lambda tasks: (tasks / "stsb" / "test.jsonl").write_text(""), "test.jsonl: is empty"),
        (
            lambda tasks: (tasks / "cola" / "test.jsonl").write_text('{"sentence": "a", "label": 2}'),
            "line 1: is not a row of cola: KeyError",
        ),
        (
            lambda tasks: (tasks / "cola" / "model" / "adapter_config.json").write_text("{}"),
            "has models and adapters; expected one of the two",
        ),
    ],
)
def test_what_glue_lacks_is_named_before_work(tmp_path, change, message):
    (tmp_path / "base").mkdir()
    for task, row in ROWS.items():
        (tmp_path / "tasks" / task / "model").mkdir(parents=True)
        (tmp_path / "tasks" / task / "test.jsonl").write_text(json.dumps({**row, "label": 1}))
    change(tmp_path / "tasks")
    ended = CliRunner().invoke(app, ["flan-t5", str(tmp_path)])
    assert ended.exit_code == 1
    assert message in str(ended.exception or ended.output)


@pytest.mark.parametrize(
    "paper", [*clip.PAPERS.values(), *flan_t5.PAPERS.values(), mistral.PAPER], ids=lambda p: p.source
)
def test_the_numbers_of_the_authors_are_complete(paper):
    assert all(len(numbers) == len(paper.tasks) for numbers in paper.rows.values())


def test_the_numbers_of_the_authors_are_below_their_row():
    rows = [
        {"name": "individual", "parameters": 2.0, "scores": {"mnli": 80.0, "other": 90.0}},
        {"name": "SMILE", "parameters": 1.5, "scores": {"mnli": 60.0, "other": 70.0}},
    ]
    paper = common.Paper("there", ("mnli", "rte"), {"SMILE": (60.0, 66.0), "individual": (80.0, 88.0)})
    _, columns, lines = common.table(rows, ["mnli", "other"], paper, "Scores")
    assert columns == ["", "mnli", "other", "average", "% of individual", "parameters"]
    assert lines == [
        ["individual", "80.0", "90.0", "85.0", "100.0", "2.00×"],
        ["  the authors' run", "80.0", "–", "84.0", "100.0", "–"],
        ["SMILE", "60.0", "70.0", "65.0", "76.5", "1.50×"],
        ["  the authors' run", "60.0", "–", "63.0", "75.0", "–"],
    ]


@pytest.fixture
def mistral_folder(tmp_path_factory):
    """Mistral with two experts, one of which has more tokens."""
    folder = tmp_path_factory.mktemp("mistral")
    base = tiny_models.build("MistralForCausalLM")
    words = ["[PAD]", "[BOS]", "[EOS]", "[UNK]", "Question:", "Answer:", "A.", "red", "blue", "is", "####"]
    words += [str(number) for number in range(96 - len(words))]
    text = tokenizer(words, pad_token="[PAD]", unk_token="[UNK]", bos_token="[BOS]")
    base.save_pretrained(folder / "base")
    text.save_pretrained(folder / "base")
    for seed, name in enumerate(("dolphin", "metamath"), 1):
        expert = tiny_models.fine_tuned(base, seed)
        if name == "dolphin":
            expert.resize_token_embeddings(98)
        expert.save_pretrained(folder / "experts" / name)
        text.save_pretrained(folder / "experts" / name)
    return folder


@pytest.fixture
def harness(monkeypatch):
    """lm_eval's interface, as the study calls it: a task's score depends on the model's logits."""

    def simple_evaluate(model, tasks, **options):
        ids = model.tokenizer("red is blue", return_tensors="pt").input_ids
        with torch.no_grad():
            value = float(model.pretrained(input_ids=ids.to(model.pretrained.device)).logits.float().std())
        return {"results": {task: {mistral.TASKS[task]: value / (1 + i)} for i, task in enumerate(tasks)}}

    modules = {
        "lm_eval": SimpleNamespace(simple_evaluate=simple_evaluate),
        "lm_eval.models.huggingface": SimpleNamespace(HFLM=SimpleNamespace),
    }
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)


def test_mistral_is_what_the_harness_gives(mistral_folder, harness, monkeypatch, tmp_path):
    for name, value in {"EXPERT_RANKS": (2, 4), "ROUTER_RANK": 2}.items():
        monkeypatch.setattr(mistral, name, value)
    ended = CliRunner().invoke(app, ["mistral", str(mistral_folder), "--json", str(tmp_path / "a.json")])
    assert ended.exit_code == 0, ended.output
    found = json.loads((tmp_path / "a.json").read_text())
    smile = [f"SMILE (g 2, r {r}), {name}" for name in ("published", "recommended") for r in (2, 4)]
    assert [row["name"] for row in found["rows"]] == ["base", "dolphin", "metamath", mistral.BEST, *smile]
    rows = {row["name"]: row["scores"] for row in found["rows"]}
    assert all(list(scores) == list(mistral.TASKS) for scores in rows.values())
    assert rows[mistral.BEST] == {task: max(rows["dolphin"][task], rows["metamath"][task]) for task in mistral.TASKS}
    assert len({tuple(rows[name].values()) for name in ("base", "dolphin", "metamath", *smile[:2])}) == 5


def test_mistral_names_the_harness_it_needs(mistral_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    ended = CliRunner().invoke(app, ["mistral", str(mistral_folder)])
    assert "expected lm-evaluation-harness, pip install" in str(ended.exception)


def test_mistral_needs_its_folders(tmp_path):
    ended = CliRunner().invoke(app, ["mistral", str(tmp_path)])
    assert "base is not a folder; expected base/ and experts/ in FOLDER" in str(ended.exception)
    (tmp_path / "base").mkdir()
    (tmp_path / "experts").mkdir()
    ended = CliRunner().invoke(app, ["mistral", str(tmp_path)])
    assert "experts is empty; expected a folder for each expert" in str(ended.exception)
