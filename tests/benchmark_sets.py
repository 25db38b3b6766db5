"""Tiny data sets in CLIP_benchmark's webdataset layout, and a model with random weights whose features differ."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import open_clip
import torch
from PIL import Image
from shards_util import make_shard
from torch import nn
from toy import write_configs

CLASSNAMES = ["red ant", "bee", "cow", "dog", "elk", "fox"]
TEMPLATES = ["a photo of a {c}.", "the {c}!"]
WORDS = ["old", "red", "cat", "runs", "over", "blue", "hill", "and", "sees", "two", "small", "dogs"]
MODEL = "toy-vit"


def image(number: int) -> bytes:
    """A picture of coarse noise."""
    pixels = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize((20, 16)).save(file, "png")
    return file.getvalue()


def captions(number: int) -> list[str]:
    """Five captions."""
    random = np.random.default_rng(1000 + number)
    return [" ".join(random.choice(WORDS, 4)) for _ in range(5)]


def labels(count: int, num_classes: int) -> list[int]:
    """Classes of images; not all equally frequent."""
    return (np.random.default_rng(5).integers(0, num_classes + 2, count) % num_classes).tolist()


def write_split(folder: Path, split: str, files: Sequence[dict[str, bytes]], shards: int = 2) -> None:
    """The shards of a split, and nshards.txt."""
    for shard, numbers in enumerate(np.array_split(np.arange(len(files)), shards)):
        make_shard(folder / split / f"{shard}.tar", {f"s{number:07d}": files[number] for number in numbers})
    (folder / split / "nshards.txt").write_text(f"{shards}\n")


def retrieval_set(folder: Path, count: int = 17) -> Path:
    """Images with five captions each."""
    files = [{"png": image(number), "txt": "\n".join(captions(number)).encode()} for number in range(count)]
    write_split(folder, "test", files)
    (folder / "dataset_type.txt").write_text("retrieval\n")
    return folder


def write_classes(folder: Path, classnames: Sequence[str] = tuple(CLASSNAMES)) -> None:
    """classnames.txt and the templates."""
    (folder / "classnames.txt").write_text("\n".join(classnames) + "\n")
    (folder / "zeroshot_classification_templates.txt").write_text("\n".join(TEMPLATES) + "\n")


def labelled_set(folder: Path, count: int = 23, classnames: Sequence[str] = tuple(CLASSNAMES)) -> Path:
    """Images with a class; none says what type the set is, as is usual."""
    chosen = labels(count, len(classnames))
    write_split(folder, "test", [{"png": image(i), "cls": str(label).encode()} for i, label in enumerate(chosen)])
    write_classes(folder, classnames)
    return folder


def multilabel_set(folder: Path, count: int = 19) -> Path:
    """Images with any number of classes."""
    random = np.random.default_rng(6)
    files = []
    for number in range(count):
        file = io.BytesIO()
        np.save(file, random.integers(0, 2, len(CLASSNAMES)))
        files.append({"png": image(number), "npy": file.getvalue()})
    write_split(folder, "test", files)
    write_classes(folder)
    (folder / "dataset_type.txt").write_text("multilabel\n")
    return folder


def random_weights(folder: Path) -> tuple[str, str]:
    """A file of random weights, and the folder for --model-config that their model is in."""
    configs = write_configs(folder)
    open_clip.add_model_config(Path(configs))
    torch.manual_seed(2)
    model = open_clip.create_model(MODEL)
    nn.init.normal_(model.token_embedding.weight)
    nn.init.normal_(model.visual.conv1.weight)
    path = folder / "weights.pt"
    torch.save(model.state_dict(), path)
    return str(path), configs


def command(folder: Path, *datasets: Path | str, **flags: str) -> list[str]:
    """A command line that evaluates random weights on a CPU in float32; results go to ``folder/results``."""
    weights, configs = random_weights(folder) if "pretrained" not in flags else (flags.pop("pretrained"), str(folder))
    words = ["evaluate", "--dataset", *map(str, datasets), "--model", MODEL, "--model-config", configs]
    words += ["--pretrained", weights, "--device", "cpu", "--precision", "fp32", "--workers", "0", "--batch-size", "5"]
    words += ["--output", f"{folder}/results/{{dataset}}_{{task}}.json", "--summary", f"{folder}/results/table.md"]
    return words + [word for name, value in flags.items() for word in ("--" + name.replace("_", "-"), value)]
