"""Image classification with CLIP (B/32 or L/14) on checkpoints and test images in local folders.

    python -m studies.published clip FOLDER [--device cuda] [--json results.json]

    FOLDER/base                      a CLIPModel with its tokenizer and image processor, as save_pretrained writes them
    FOLDER/tasks/TASK/model          a fine-tuned CLIPModel or CLIPVisionModel of the same architecture
    FOLDER/tasks/TASK/test/CLASS/    its test images, in a folder for each class
    FOLDER/tasks/TASK/prompts.txt    optional: lines with {} for the class; by default "a photo of a {}."

An underscore in the name of a class is a space. The text tower of the base, with the mean of the prompts' features,
classifies the features of every vision tower.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel, CLIPVisionModel

from .. import report
from .common import POLICIES, Paper, measure, smile_name, table, task_folders

EXPERT_RANKS, ROUTER_RANK = (32, 128), 16
TITLE = "Accuracy, %"
TASKS = ("sun397", "stanford_cars", "resisc45", "eurosat", "svhn", "gtsrb", "mnist", "dtd")
SOURCE = "fusion_bench, docs/modelpool/clip_vit.md and examples/smile_upscaling/clip-vit-{}.ipynb"
PAPERS = {  # by the width of the vision tower
    768: Paper(
        SOURCE.format("base-patch32"),
        TASKS,
        {
            "base": (63.2, 59.8, 60.7, 46.0, 31.6, 32.5, 48.2, 43.9),
            "individual": (75.0, 78.3, 95.2, 99.0, 97.3, 98.9, 99.6, 79.7),
            smile_name(16, 32, "published"): (71.6, 74.8, 90.7, 98.3, 96.6, 97.1, 99.5, 76.8),
            smile_name(16, 128, "published"): (73.6, 77.8, 92.0, 98.3, 96.8, 98.1, 99.6, 78.1),
        },
    ),
    1024: Paper(
        SOURCE.format("large-patch14"),
        TASKS,
        {
            "base": (68.3, 77.8, 71.0, 58.9, 58.4, 50.6, 76.4, 55.5),
            "individual": (82.8, 92.9, 97.4, 99.2, 97.9, 99.2, 99.8, 85.5),
            smile_name(16, 32, "published"): (79.9, 91.0, 94.3, 99.0, 97.9, 98.6, 99.7, 82.2),
            smile_name(16, 128, "published"): (81.9, 92.3, 95.5, 99.1, 98.0, 98.9, 99.7, 83.6),
        },
    ),
}
PROMPT = "a photo of a {}."
IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".ppm", ".webp")


@dataclass(frozen=True)
class Task:
    """A task's fine-tuned vision tower, its test images and their classes, and the features [C, P] of its classes."""

    name: str
    model: CLIPVisionModel
    images: list[tuple[Path, int]]
    classes: Tensor


def _classes(place: Path) -> list[str]:
    return sorted(path.name for path in (place / "test").glob("*") if path.is_dir())


def missing(place: Path) -> str | None:
    """What a task's folder lacks."""
    classes = _classes(place)
    if not (place / "model").is_dir() or len(classes) < 2:
        return f"{place} has {len(classes)} classes in test/; expected model/, and two or more"
    empty = [name for name in classes if not list(_images(place / "test" / name))]
    return f"{place / 'test' / empty[0]} has no image; expected {', '.join(IMAGES)}" if empty else None


def _images(folder: Path) -> Iterator[Path]:
    return (file for file in sorted(folder.iterdir()) if file.suffix.lower() in IMAGES)


@torch.no_grad()
def class_features(clip: CLIPModel, tokenizer: Callable, place: Path, classes: list[str]) -> Tensor:
    """Unit features [C, P] of the classes of a task: the mean over its prompts of the text tower's unit features."""
    file = place / "prompts.txt"
    prompts = [line for line in file.read_text(encoding="utf-8").splitlines() if line] if file.exists() else [PROMPT]
    features = []
    for prompt in prompts:
        texts = [prompt.replace("{}", name.replace("_", " ")) for name in classes]
        inputs = tokenizer(texts, padding=True, return_tensors="pt").to(clip.device)
        pooled = clip.text_model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).pooler_output
        features.append(F.normalize(clip.text_projection(pooled), dim=-1))
    return F.normalize(sum(features), dim=-1)


def load(folder: Path, device: str, step: report.Step) -> tuple[CLIPModel, Callable, list[Task]]:
    """The base, its image processor and the tasks; the models are on `device`."""
    places = task_folders(folder, missing)
    clip = CLIPModel.from_pretrained(folder / "base").to(device).eval()
    tokenizer, processor = (kind.from_pretrained(folder / "base") for kind in (AutoTokenizer, CLIPImageProcessor))
    tasks = []
    for done, place in enumerate(places):
        step("models", done, len(places))
        classes = _classes(place)
        model = CLIPVisionModel.from_pretrained(place / "model").to(device).eval()
        images = [(file, i) for i, name in enumerate(classes) for file in _images(place / "test" / name)]
        tasks.append(Task(place.name, model, images, class_features(clip, tokenizer, place, classes)))
    return clip, processor, tasks


@torch.no_grad()
def accuracy(model: nn.Module, clip: CLIPModel, processor: Callable, task: Task, batch: int = 64) -> float:
    """Share of a task's test images, in percent, that a vision tower classifies correctly."""
    right = 0
    for start in range(0, len(task.images), batch):
        files, labels = zip(*task.images[start : start + batch])
        pictures = []
        for file in files:
            with Image.open(file) as image:
                pictures.append(image.convert("RGB"))
        pixels = processor(pictures, return_tensors="pt")["pixel_values"].to(clip.device)
        features = clip.visual_projection(model(pixel_values=pixels).pooler_output)
        right += (features @ task.classes.T).argmax(-1).cpu().eq(torch.tensor(labels)).sum().item()
    return 100 * right / len(task.images)


def study(folder: Path, device: str, step: report.Step) -> tuple[dict, list[report.TableRows], Paper | None]:
    """Accuracy of the base, of each task's own model, and of the fused vision tower in each setting: results, tables,
    and the authors' numbers for this architecture."""
    clip, processor, tasks = load(folder, device, step)
    base = CLIPVisionModel.from_pretrained(folder / "base").to(device).eval()
    by_name = {task.name: task for task in tasks}
    rows = measure(
        base,
        {task.name: task.model for task in tasks},
        lambda model, task: accuracy(model, clip, processor, by_name[task]),
        (ROUTER_RANK, EXPERT_RANKS),
        POLICIES,
        step,
    )
    paper = PAPERS.get(base.config.hidden_size)
    results = {"tasks": {task.name: len(task.images) for task in tasks}, "rows": rows}
    return results, [table(rows, list(by_name), paper, TITLE)], paper
