"""The paper's image classification with CLIP (B/32 or L/14) on checkpoints and test images in local folders.

    python -m studies.published FOLDER [--device cuda] [--json results.json]

    FOLDER/base                      a CLIPModel with its tokenizer and image processor, as save_pretrained writes them
    FOLDER/tasks/TASK/model          a fine-tuned CLIPModel or CLIPVisionModel of the same architecture
    FOLDER/tasks/TASK/test/CLASS/    its test images, in a folder for each class
    FOLDER/tasks/TASK/prompts.txt    optional: lines with {} for the class; by default "a photo of a {}."

An underscore in the name of a class is a space. The text tower of the base, with the mean of the prompts' features,
classifies the features of every vision tower.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from PIL import Image
from torch import Tensor, nn
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel, CLIPVisionModel

from smile_kernels import RoutingPolicy, sweep, upscale
from smile_kernels.publishing import check_outputs, write_text

from . import report

EXPERT_RANKS, ROUTER_RANK = (32, 128), 16
POLICIES = {"published": RoutingPolicy(), "sequence + layers": RoutingPolicy("sequence", accumulate=True)}
# What the paper's abstract says of eight fine-tuned ViT models.
CLAIM = "The paper (arXiv 2408.10174, abstract): 98 to 99 % of eight individual models, about 50 % more parameters."
PROMPT = "a photo of a {}."
IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".ppm", ".webp")


@dataclass(frozen=True)
class Task:
    """A task's fine-tuned vision tower, its test images and their classes, and the features [C, P] of its classes."""

    name: str
    model: CLIPVisionModel
    images: list[tuple[Path, int]]
    classes: Tensor


def read_tasks(folder: Path) -> list[tuple[Path, list[str]]]:
    """The folders of the tasks with the names of their classes.

    Raises:
        ValueError: a folder of the format is missing or empty; the message names it.
    """
    for place in (folder / "base", folder / "tasks"):
        if not place.is_dir():
            raise ValueError(f"folder: {place} is not a folder; expected base/ and tasks/ in FOLDER")
    tasks = []
    for place in sorted(path for path in (folder / "tasks").iterdir() if path.is_dir()):
        classes = sorted(path.name for path in (place / "test").glob("*") if path.is_dir())
        if not (place / "model").is_dir() or len(classes) < 2:
            raise ValueError(f"folder: {place} has {len(classes)} classes in test/; expected model/, and two or more")
        for name in classes:
            if not list(_images(place / "test" / name)):
                raise ValueError(f"folder: {place / 'test' / name} has no image; expected {', '.join(IMAGES)}")
        tasks.append((place, classes))
    if not tasks:
        raise ValueError(f"folder: {folder / 'tasks'} is empty; expected a folder for each task")
    return tasks


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
    places = read_tasks(folder)
    clip = CLIPModel.from_pretrained(folder / "base").to(device).eval()
    tokenizer, processor = (kind.from_pretrained(folder / "base") for kind in (AutoTokenizer, CLIPImageProcessor))
    tasks = []
    for done, (place, classes) in enumerate(places):
        step("models", done, len(places))
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


def measure(folder: Path, device: str, step: report.Step) -> dict:
    """Accuracy of the base, of each task's own model, and of the fused vision tower in each setting."""
    clip, processor, tasks = load(folder, device, step)
    base = CLIPVisionModel.from_pretrained(folder / "base").to(device).eval()

    def score(model: nn.Module) -> dict[str, float]:
        return {task.name: accuracy(model, clip, processor, task) for task in tasks}

    step("base", 0, 1)
    rows = [{"name": "base", "parameters": 1.0, "scores": score(base)}]
    step("individual", 0, 1)
    alone = {task.name: accuracy(task.model, clip, processor, task) for task in tasks}
    rows.append({"name": "individual", "parameters": float(len(tasks)), "scores": alone})
    r, g = max(EXPERT_RANKS), ROUTER_RANK
    models = [task.model for task in tasks]
    fused, _ = upscale(base, models, rank_of_expert=r, rank_of_router=g, progress=False)
    found = sweep(fused, score, rank_of_expert=EXPERT_RANKS, rank_of_router=[g], routing=POLICIES, progress=step)
    for one in found.settings:
        name = f"SMILE (g {g}, r {one.rank_of_expert}), {one.routing}"
        rows.append({"name": name, "parameters": one.parameters, "scores": one.scores})
    return {"machine": report.machine(), "tasks": {task.name: len(task.images) for task in tasks}, "rows": rows}


def table(results: dict) -> report.TableRows:
    """Accuracy by task, average, share of the individual models' and parameters relative to one vision tower."""
    averages = {row["name"]: statistics.fmean(row["scores"].values()) for row in results["rows"]}
    rows = [
        [
            row["name"],
            *(f"{row['scores'][task]:.1f}" for task in results["tasks"]),
            f"{averages[row['name']]:.1f}",
            f"{100 * averages[row['name']] / averages['individual']:.1f}" if averages["individual"] else "–",
            f"{row['parameters']:.2f}×",
        ]
        for row in results["rows"]
    ]
    return "Accuracy, %", ["", *results["tasks"], "average", "% of individual", "parameters"], rows


app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command(help=__doc__.replace("\n\n", "\n\n\b\n"))
def main(
    folder: Annotated[Path, typer.Argument(help="Folder with base/ and tasks/.")],
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:1.")] = "cpu",
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the results there.")] = None,
) -> None:
    """Measure, print the table and write the results."""
    try:
        check_outputs([folder], json=json_path)
        with report.progress() as step:
            results = measure(folder, device, step)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    if json_path:
        write_text(json_path, json.dumps(results, indent=1) + "\n")
    report.show([table(results)])
    print(CLAIM)


if __name__ == "__main__":
    app()
