"""Loaders: image-caption pairs to train on, and sets to evaluate on."""

from __future__ import annotations

import os
from pathlib import Path

from dissect_clip.config.settings import Config
from dissect_clip.data import train_shards
from dissect_clip.data.evaluation import shards
from dissect_clip.data.evaluation.classification import build_classification
from dissect_clip.data.evaluation.shards import benchmark_shards
from dissect_clip.data.evaluation.stream import ClassificationData, RetrievalData, count_skips, describe_skips
from dissect_clip.data.formats import csv, synthetic
from dissect_clip.data.formats.urls import expand, is_local, is_shard, local_path
from dissect_clip.data.loaders import Tokenizer, Transform
from dissect_clip.data.train_data import TrainData
from dissect_clip.distributed.world import World
from dissect_clip.errors import SetupError

__all__ = [
    "ClassificationData",
    "RetrievalData",
    "TrainData",
    "build_classification",
    "build_retrieval",
    "build_train",
    "dataset_type",
    "count_skips",
    "describe_skips",
]


def dataset_type(configured: str, pattern: str | None, flag: str) -> str:
    """The type of the data: as configured or, for ``auto``, by the name of its first file.

    Raises:
        SetupError: the name is of no known type.
    """
    if configured != "auto":
        return configured
    assert pattern is not None
    if os.path.isdir(pattern) and benchmark_shards(pattern, flag) is not None:
        return "webdataset"
    first = expand(pattern, flag)[0][0]
    if is_shard(first):
        return "webdataset"
    if first.endswith((".csv", ".tsv")):
        return "csv"
    if is_local(first) and not os.path.exists(local_path(first)):
        raise SetupError(f"{flag} {pattern}: there is no such file or folder (searched from {os.getcwd()})")
    raise SetupError(
        f"{flag} {pattern}: its name is of no known type (known are .tar, .tar.gz, .tgz, .csv, .tsv); "
        "give --dataset-type webdataset, csv or synthetic"
    )


def build_train(
    config: Config, world: World, transform: Transform, tokenizer: Tokenizer, run_folder: Path | None
) -> TrainData:
    """The training data; collective. ``run_folder`` keeps the sizes of shards whose own folder is read-only.

    Raises:
        SetupError: the data is missing, broken or of another size than the flags say.
    """
    kind = world.on_main(lambda: dataset_type(config.data.dataset_type, config.data.train_data, "--train-data"))
    if kind == "webdataset":
        return train_shards.build_train(config, world, transform, tokenizer, run_folder)
    if kind == "csv":
        return csv.build_train(config, world, transform, tokenizer)
    return synthetic.build_train(config, world, transform, tokenizer)


def build_retrieval(config: Config, world: World, transform: Transform, tokenizer: Tokenizer) -> RetrievalData | None:
    """The validation data of --val-data, or None if there is none; not collective.

    Raises:
        SetupError: the data is missing or broken.
    """
    if config.evaluation.val_data is None:
        return None
    kind = dataset_type(config.data.dataset_type, config.evaluation.val_data, "--val-data")
    if kind == "webdataset":
        return shards.build_retrieval(config, world, transform, tokenizer)
    if kind == "csv":
        return csv.build_retrieval(config, world, transform, tokenizer)
    return synthetic.build_retrieval(config, world, transform, tokenizer)
