"""The published image classification, end to end on tiny random CLIP models, with images of a colour for each class."""

import json

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPImageProcessor, CLIPVisionModel, PreTrainedTokenizerFast
from typer.testing import CliRunner

from smile_kernels import upscale
from studies import published
from tests.integrations import tiny_models

COLOURS = {"red_one": (200, 30, 20), "blue": (20, 40, 210), "green": (10, 190, 60)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two tasks of three classes, with vision towers that were "fine-tuned" by random changes."""
    folder = tmp_path_factory.mktemp("published")
    base = tiny_models.build("CLIPModel")
    base.save_pretrained(folder / "base")
    words = ["[UNK]", "[BOS]", "[EOS]", "a", "photo", "of", "red", "one", "blue", "green"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    ends = [("[BOS]", 1), ("[EOS]", 2)]
    tokenizer.post_processor = processors.TemplateProcessing(single="[BOS] $A [EOS]", special_tokens=ends)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[EOS]", eos_token="[EOS]")
    fast.save_pretrained(folder / "base")
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


def test_the_results_are_those_of_plain_computations(folder, monkeypatch, tmp_path):
    monkeypatch.setattr(published, "EXPERT_RANKS", (2, 6))
    monkeypatch.setattr(published, "ROUTER_RANK", 2)
    ended = CliRunner().invoke(published.app, [str(folder), "--json", str(tmp_path / "a.json")])
    assert ended.exit_code == 0, ended.output
    assert "98 to 99 %" in ended.output
    found = json.loads((tmp_path / "a.json").read_text())
    assert found["tasks"] == {"colours": 6, "shades": 6}
    rows = {row["name"]: row for row in found["rows"]}
    smile = [f"SMILE (g 2, r {r}), {name}" for name in published.POLICIES for r in (2, 6)]
    assert list(rows) == ["base", "individual", *smile]
    clip, processor, tasks = published.load(folder, "cpu", lambda *at: None)
    assert torch.allclose(tasks[0].classes.norm(dim=-1), torch.ones(3))
    for task in tasks:
        with torch.no_grad():
            pixels = processor([Image.open(file) for file, _ in task.images], return_tensors="pt")["pixel_values"]
            whole = clip.get_image_features(pixel_values=pixels)
            features = getattr(whole, "pooler_output", whole)
            right = (features @ task.classes.T).argmax(-1) == torch.tensor([label for _, label in task.images])
        assert rows["base"]["scores"][task.name] == pytest.approx(100 * right.double().mean().item())
    base = CLIPVisionModel.from_pretrained(folder / "base").eval()
    fused, _ = upscale(base, [task.model for task in tasks], rank_of_expert=6, rank_of_router=2, progress=False)
    for task in tasks:
        want = published.accuracy(fused, clip, processor, task, batch=4)
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
def test_what_is_missing_is_named_before_work(tmp_path, missing, message):
    for task in ("colours", "shades"):
        for name in COLOURS:
            (tmp_path / "tasks" / task / "test" / name).mkdir(parents=True)
            (tmp_path / "tasks" / task / "test" / name / "0.png").touch()
        (tmp_path / "tasks" / task / "model").mkdir()
    (tmp_path / "base").mkdir()
    place = tmp_path / missing
    place.unlink() if place.is_file() else place.rmdir()
    ended = CliRunner().invoke(published.app, [str(tmp_path)])
    assert ended.exit_code == 1
    assert message in str(ended.exception or ended.output)
