"""Sets for zero-shot classification: image folders, and webdatasets in CLIP_benchmark's layout.

Either may have ``classnames.txt`` (a name on each line) and ``zeroshot_classification_templates.txt`` (a prompt on each
line, with ``{c}`` for the class's name).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from open_clip import IMAGENET_CLASSNAMES, OPENAI_IMAGENET_TEMPLATES
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

from dissect_clip.config.settings import Config
from dissect_clip.data.evaluation.shards import benchmark_shards, evaluation_shards
from dissect_clip.data.evaluation.stream import ClassificationData, EvaluationSource, classification_data
from dissect_clip.data.formats.decode import IMAGE_SUFFIXES, RawSample, read_file
from dissect_clip.data.loaders import Transform
from dissect_clip.data.sampling.workers import WorkerInfo
from dissect_clip.data.skips import BadSampleError, SkipCounter
from dissect_clip.distributed.world import World
from dissect_clip.errors import SetupError

Templates = Sequence[Callable[[str], str]]

_CLASSNAMES = "classnames.txt"
_TEMPLATES = "zeroshot_classification_templates.txt"


@dataclass(frozen=True)
class FolderSource:
    """Labelled image files, which all workers read once, together."""

    root: str
    files: tuple[tuple[str, int], ...]  # path and class

    def samples(self, worker: WorkerInfo, skips: SkipCounter) -> Iterator[RawSample]:
        """See :class:`dissect_clip.data.evaluation.stream.EvaluationSource`."""
        for number in range(worker.global_id, len(self.files), worker.total_workers):
            path, label = self.files[number]
            try:
                image = read_file(path)
            except BadSampleError as bad:
                skips.add(bad.kind, self.root, path, str(bad))
            else:
                yield RawSample(number, self.root, path, {"jpg": image, "cls": str(label).encode()})


@dataclass(frozen=True)
class ClassificationFolder:
    """A labelled set on disk and the files of its folder."""

    flag: str
    path: str
    source: EvaluationSource
    folders: list[str] | None  # class folders, in the order of the labels; None in shards

    def lines(self, name: str) -> list[str] | None:
        """The lines of a text file in the set's folder, or None if there is none."""
        file = Path(self.path) / name
        if not file.is_file():
            return None
        try:
            lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise SetupError(f"{self.flag}: {file} cannot be read: {error}") from error
        if not any(lines):
            raise SetupError(f"{self.flag}: {file} is empty")
        return lines

    def templates(self) -> Templates | None:
        """The set's own prompts, or None if it has none.

        Raises:
            SetupError: a line has no place for the class's name.
        """
        lines = self.lines(_TEMPLATES)
        if lines is None:
            return None
        for line in lines:
            if "{c}" not in line:
                raise SetupError(f"{self.flag}: {self.path}/{_TEMPLATES} has the line {line!r} without {{c}}")
        return [partial(fill_template, line) for line in lines]


def fill_template(template: str, classname: str) -> str:
    """A prompt of a template, whose ``{c}`` stands for the class's name."""
    return template.replace("{c}", classname)


def _sorted_folders(path: str) -> list[str]:
    """Class folders in the order of their labels: by number where all names are numbers, else by name.

    Hidden ones are of other programs, as .ipynb_checkpoints.
    """
    names = [entry.name for entry in os.scandir(path) if entry.is_dir() and not entry.name.startswith(".")]
    return sorted(names, key=int) if all(map(str.isdecimal, names)) else sorted(names)


def _find(path: str, flag: str, timeout: float) -> ClassificationFolder:
    if not os.path.isdir(path):
        raise SetupError(f"{flag} {path}: there is no such folder")
    shards = benchmark_shards(path, flag)
    if shards is not None:
        kind = Path(path) / "dataset_type.txt"
        if kind.is_file() and kind.read_text().strip().lower() not in ("", "classification"):
            raise SetupError(f"{flag} {path}: a set of type {kind.read_text().strip()!r} has no single class an image")
        source = evaluation_shards(shards, frozenset((*IMAGE_SUFFIXES, "cls")), flag, timeout)
        return ClassificationFolder(flag, path, source, None)
    folders = _sorted_folders(path)
    labels = {name: label for label, name in enumerate(folders)}
    files = make_dataset(path, labels, extensions=IMG_EXTENSIONS, allow_empty=True) if folders else []
    if not files:
        raise SetupError(
            f"{flag} {path}: neither a folder with a folder of images for each class, nor a CLIP_benchmark webdataset "
            "with test/nshards.txt"
        )
    return ClassificationFolder(flag, path, FolderSource(path, tuple(files)), folders)


def _check_count(labelled: ClassificationFolder, classnames: list[str]) -> list[str]:
    if labelled.folders is not None and len(labelled.folders) != len(classnames):
        raise SetupError(
            f"{labelled.flag} {labelled.path}: {len(labelled.folders)} class folders, but "
            f"{len(classnames)} class names; there must be one folder for each class, in the same order"
        )
    return classnames


def _imagenet(
    name: str, labelled: ClassificationFolder, config: Config, world: World, transform: Transform
) -> ClassificationData:
    own = labelled.lines(_CLASSNAMES) if labelled.folders is None else None
    classnames = _check_count(labelled, own or list(IMAGENET_CLASSNAMES))
    templates = labelled.templates() or OPENAI_IMAGENET_TEMPLATES
    return classification_data(name, labelled.source, classnames, templates, config, world, transform)


def _any_set(labelled: ClassificationFolder, config: Config, world: World, transform: Transform) -> ClassificationData:
    classnames = labelled.lines(_CLASSNAMES)
    if classnames is None and labelled.folders is None:
        raise SetupError(
            f"{labelled.flag} {labelled.path}: shards need a {_CLASSNAMES} in this folder, with a name on each line"
        )
    if classnames is None:
        classnames = [name.replace("_", " ") for name in labelled.folders or ()]
    templates = labelled.templates() or [partial(fill_template, "a photo of a {c}.")]
    name = os.path.basename(os.path.normpath(labelled.path))
    classnames = _check_count(labelled, classnames)
    return classification_data(name, labelled.source, classnames, templates, config, world, transform)


def build_classification(config: Config, world: World, transform: Transform) -> list[ClassificationData]:
    """The sets of --imagenet-val, --imagenet-v2 and --zeroshot-data, in this order. Not collective.

    Raises:
        SetupError: a folder is missing, has no images, or not as many classes as names, or two have one name.
    """
    sets = []
    for name, flag, path in (
        ("imagenet", "--imagenet-val", config.evaluation.imagenet_val),
        ("imagenetv2", "--imagenet-v2", config.evaluation.imagenet_v2),
    ):
        if path is not None:
            sets.append(_imagenet(name, _find(path, flag, config.data.data_timeout), config, world, transform))
    for path in (config.evaluation.zeroshot_data or "").split("::"):
        if path:
            labelled = _find(path, "--zeroshot-data", config.data.data_timeout)
            sets.append(_any_set(labelled, config, world, transform))
    _check_names(sets)
    return sets


def _check_names(sets: list[ClassificationData]) -> None:
    """Metrics go by the sets' names, so two of one name would overwrite each other."""
    names = [data.name for data in sets]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise SetupError(f"--zeroshot-data: several sets are called {', '.join(sorted(twice))}; rename their folders")
