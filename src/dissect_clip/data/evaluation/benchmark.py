"""Datasets in CLIP_benchmark's webdataset layout, in a folder or behind a URL.

    nshards.txt is in test/ and train/, beside 0.tar, 1.tar, ...
    dataset_type.txt                         retrieval, classification or multilabel; if it is missing, classification
    classnames.txt                           a class on each line, in the order of the labels
    zeroshot_classification_templates.txt    a prompt on each line, with {c} for the class's name

Captions are the lines of KEY.txt; a class is the number in KEY.cls; of a multi-label image, KEY.npy holds a 0 or 1 for
each class. Files behind URLs are read as shards are, with the commands that webdataset has for their schemes.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from enum import Enum
from functools import partial
from pathlib import Path

from dissect_clip.config.settings import Config
from dissect_clip.data.evaluation.classification import fill_template
from dissect_clip.data.evaluation.shards import EvaluationShards, evaluation_shards, numbered_shards
from dissect_clip.data.evaluation.stream import ClassificationData, RetrievalData, classification_data, retrieval_data
from dissect_clip.data.formats.decode import IMAGE_SUFFIXES, MAX_TEXT_SIZE, caption_suffixes
from dissect_clip.data.formats.download import open_stream
from dissect_clip.data.formats.urls import is_local, local_path
from dissect_clip.data.loaders import Tokenizer, Transform
from dissect_clip.distributed.world import World
from dissect_clip.errors import SetupError

FLAG = "--dataset"

_CLASSNAMES = "classnames.txt"
_TEMPLATES = "zeroshot_classification_templates.txt"
_TYPE = "dataset_type.txt"


class DatasetKind(Enum):
    """What belongs to an image, as dataset_type.txt says it."""

    RETRIEVAL = "retrieval"
    CLASSIFICATION = "classification"
    MULTILABEL = "multilabel"


@dataclass(frozen=True)
class BenchmarkFolder:
    """The folder or URL of a dataset. Nothing is read before it is asked for."""

    location: str  # folder or URL, without a slash at its end
    timeout: float  # seconds to wait for a server that sends nothing

    def kind(self) -> DatasetKind:
        """What belongs to an image. Call :meth:`shards` first: it finds out whether the set exists.

        Raises:
            SetupError: dataset_type.txt holds something else.
        """
        text = (self._text(_TYPE) or "").strip().lower()
        try:
            return DatasetKind(text or "classification")
        except ValueError:
            known = ", ".join(kind.value for kind in DatasetKind)
            raise SetupError(f"{FLAG} {self.location}: {_TYPE} says {text[:40]!r}; known are {known}") from None

    def shards(self, split: str) -> list[str]:
        """The shards of a split.

        Raises:
            SetupError: there is no such split.
        """
        count = self._text(f"{split}/nshards.txt")
        if count is None:
            raise SetupError(
                f"{FLAG} {self.location}: it has no {split}/nshards.txt, so it is no CLIP_benchmark webdataset, or "
                f"has no split {split}"
            )
        return numbered_shards(count, f"{self.location}/{split}", FLAG)

    def lines(self, name: str) -> list[str]:
        """The lines of a text file, at least one.

        Raises:
            SetupError: it is missing or empty.
        """
        lines = [line.strip() for line in (self._text(name) or "").splitlines()]
        if not any(lines):
            raise SetupError(f"{FLAG} {self.location}: {name} is missing or empty; classification needs it")
        return lines

    def classnames(self) -> list[str]:
        """The names of the classes, in the order of the labels."""
        return self.lines(_CLASSNAMES)

    def templates(self) -> list[str]:
        """The prompts, each with a place for the class's name.

        Raises:
            SetupError: there are none, or one has no such place.
        """
        lines = self.lines(_TEMPLATES)
        for line in lines:
            if "{c}" not in line:
                raise SetupError(f"{FLAG} {self.location}: {_TEMPLATES} has the line {line!r} without {{c}}")
        return lines

    def _text(self, name: str) -> str | None:
        """A text file of the set, or None if it is missing."""
        url = f"{self.location}/{name}"
        try:
            data = self._local(url) if is_local(url) else self._remote(url)
            return None if data is None else data.decode("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise SetupError(f"{FLAG}: {url} cannot be read: {error}") from error

    def _local(self, url: str) -> bytes | None:
        path = Path(local_path(url))
        return path.read_bytes() if path.is_file() else None

    def _remote(self, url: str) -> bytes | None:
        with open_stream(url, self.timeout) as stream:
            try:
                data = stream.read(MAX_TEXT_SIZE)
            except TimeoutError:
                raise
            except OSError:  # of a command that failed; which statuses say that a file is missing differs by scheme
                return None
        return data


_PAGE = re.compile(r"(https://huggingface\.co/datasets/.*)/(?:tree|resolve)/([^/]+)")
"""A dataset's page on Hugging Face, or where its files are: repository and revision."""


def _layout(place: str, timeout: float) -> BenchmarkFolder:
    """The dataset at a folder or URL; of a page on Hugging Face, where its files are.

    Raises:
        SetupError: it is a command, which a list of datasets may not run.
    """
    if place.startswith("pipe:"):
        raise SetupError(f"{FLAG} {place}: a dataset must be a folder or URL, not a command")
    page = _PAGE.fullmatch(place)
    return BenchmarkFolder(place if page is None else f"{page[1]}/resolve/{page[2]}", timeout)


def locate_dataset(entry: str, root: str | None, timeout: float) -> tuple[str, BenchmarkFolder]:
    """The name and location of a dataset, from CLIP_benchmark's --dataset and --dataset_root.

    Without a root an entry is a folder or URL, and its last part the name. ``wds/`` before a name is no part of its
    place.

    Raises:
        SetupError: the root has a field in braces that is not known, or the place is a command.
    """
    if root is None:
        path = entry.rstrip("/") if "://" in entry else os.path.abspath(entry)
        page = _PAGE.fullmatch(path)
        return (path if page is None else page[1]).rpartition("/")[2], _layout(path, timeout)
    bare = entry.removeprefix("wds/")
    try:
        place = root.format(dataset=bare, dataset_cleaned=bare.replace("/", "-"))
    except (KeyError, IndexError, ValueError) as error:
        raise SetupError(f"--dataset-root {root}: {error}; known are {{dataset}} and {{dataset_cleaned}}") from error
    return entry, _layout(place.rstrip("/"), timeout)


@dataclass(frozen=True)
class BenchmarkSplit:
    """A split of a dataset, with what is needed to read it. Picklable: found by one rank for all."""

    name: str
    kind: DatasetKind
    source: EvaluationShards
    classnames: list[str]  # none for retrieval
    templates: list[str]  # none where they are not needed

    def retrieval(self, config: Config, world: World, transform: Transform, tokenizer: Tokenizer) -> RetrievalData:
        """This rank's share of images with captions."""
        return retrieval_data(self.source, config, world, transform, tokenizer, self.name)

    def classification(self, config: Config, world: World, transform: Transform) -> ClassificationData:
        """This rank's share of images with labels."""
        templates = [partial(fill_template, template) for template in self.templates]
        multilabel = self.kind is DatasetKind.MULTILABEL
        return classification_data(
            self.name, self.source, self.classnames, templates, config, world, transform, multilabel
        )


_LABELS = {DatasetKind.CLASSIFICATION: "cls", DatasetKind.MULTILABEL: "npy"}


def find_split(name: str, layout: BenchmarkFolder, split: str, *, templates: bool) -> BenchmarkSplit:
    """A split of a dataset, with its prompts if they are asked for. Not collective.

    Raises:
        SetupError: something is missing or broken.
    """
    shards = layout.shards(split)
    kind = layout.kind()
    if kind is DatasetKind.RETRIEVAL:
        return BenchmarkSplit(
            name, kind, evaluation_shards(shards, caption_suffixes(None), FLAG, layout.timeout), [], []
        )
    suffixes = frozenset((*IMAGE_SUFFIXES, _LABELS[kind]))
    return BenchmarkSplit(
        name=name,
        kind=kind,
        source=evaluation_shards(shards, suffixes, FLAG, layout.timeout),
        classnames=layout.classnames(),
        templates=layout.templates() if templates else [],
    )
