"""CLIP_benchmark's layout: where a data set is, what it is called, and what its files may hold."""

import os

import pytest
from benchmark_sets import labelled_set, retrieval_set

from dissect_clip.data.evaluation.benchmark import BenchmarkFolder, DatasetKind, find_split, locate_dataset
from dissect_clip.errors import SetupError

PAGE = "https://huggingface.co/datasets/clip-benchmark/wds_vtab-cifar10/tree/main"
FILES = "https://huggingface.co/datasets/clip-benchmark/wds_vtab-cifar10/resolve/main"


@pytest.mark.parametrize(
    ("entry", "root", "name", "location"),
    [
        ("/data/pets", None, "pets", "/data/pets"),
        ("/data/pets/", None, "pets", "/data/pets"),
        ("pets", None, "pets", f"{os.getcwd()}/pets"),
        ("http://host/sets/pets/", None, "pets", "http://host/sets/pets"),
        ("http://host/tree/pets", None, "pets", "http://host/tree/pets"),
        (PAGE, None, "wds_vtab-cifar10", FILES),
        ("wds/vtab/cifar10", PAGE.replace("vtab-cifar10", "{dataset_cleaned}"), "wds/vtab/cifar10", FILES),
        ("wds/vtab/cifar10", "/data/{dataset}/", "wds/vtab/cifar10", "/data/vtab/cifar10"),
        ("pets", "/data/{dataset}", "pets", "/data/pets"),
    ],
)
def test_name_and_place(entry, root, name, location):
    assert locate_dataset(entry, root, 1) == (name, BenchmarkFolder(location, 1))


@pytest.mark.parametrize(("entry", "root"), [("pipe:touch x://", None), ("pipe:touch x", "{dataset}")])
def test_a_line_of_a_list_is_no_command(entry, root):
    with pytest.raises(SetupError, match="not a command"):
        locate_dataset(entry, root, 1)


def test_a_set_without_a_type_is_one_of_classes(tmp_path):
    found = find_split("pets", BenchmarkFolder(str(labelled_set(tmp_path)), 1), "test", templates=True)
    assert found.kind is DatasetKind.CLASSIFICATION
    assert found.templates == ["a photo of a {c}.", "the {c}!"]
    assert found.classnames[0] == "red ant"


def test_a_retrieval_set_needs_no_classes(tmp_path):
    found = find_split("pairs", BenchmarkFolder(str(retrieval_set(tmp_path)), 1), "test", templates=True)
    assert (found.kind, found.classnames, found.templates) == (DatasetKind.RETRIEVAL, [], [])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("test/nshards.txt", b"two", r"test/nshards\.txt should hold the number"),
        ("test/nshards.txt", b"3", "1 of 3 shards are missing"),
        ("dataset_type.txt", b"video", "says 'video'; known are retrieval, classification, multilabel"),
        ("classnames.txt", b"\n \n", r"classnames\.txt is missing or empty"),
        ("classnames.txt", b"caf\xe9", r"classnames\.txt cannot be read"),
        ("zeroshot_classification_templates.txt", b"a photo.", "'a photo.' without {c}"),
        ("zeroshot_classification_templates.txt", None, "is missing or empty"),
    ],
)
def test_files_that_are_wrong_are_named(tmp_path, name, content, message):
    labelled_set(tmp_path)
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(SetupError, match=message):
        find_split("pets", BenchmarkFolder(str(tmp_path), 1), "test", templates=True)


def test_a_split_that_is_not_there_is_named(tmp_path):
    with pytest.raises(SetupError, match=r"it has no train/nshards\.txt"):
        find_split("pets", BenchmarkFolder(str(labelled_set(tmp_path)), 1), "train", templates=False)
