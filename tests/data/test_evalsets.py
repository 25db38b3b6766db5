"""Sets to evaluate on: every image once, over any number of ranks and workers."""

import io

import numpy as np
import open_clip
import pytest
from shards_util import (
    caption_of,
    data_config,
    image_bytes,
    make_shard,
    make_shards,
    sample,
    to_tensor,
    tokenize,
    write_tar,
)

from dissect_clip.data import build_classification, build_retrieval
from dissect_clip.data.formats.decode import decode_label_vector
from dissect_clip.data.skips import BadSampleError, Skip
from dissect_clip.distributed.world import World
from dissect_clip.errors import SetupError

GRID = [(1, 0), (1, 2), (2, 1), (3, 2)]


def retrieval_ranks(config, world_size=1):
    return [build_retrieval(config, World(rank=r, size=world_size), to_tensor, tokenize) for r in range(world_size)]


def nonzero(skipped):
    return {kind: count for kind, count in skipped.items() if count}


def captions_by_image(batches):
    """order -> the numbers its captions end with."""
    found = {}
    for batch in batches:
        texts = iter(batch.text[:, 0].tolist())
        for order, count in zip(batch.order.tolist(), batch.captions.tolist(), strict=True):
            found[order] = [next(texts) for _ in range(count)]
        assert next(texts, None) is None
    return found


@pytest.mark.parametrize(("world_size", "workers"), GRID)
@pytest.mark.parametrize("sizes", [[7], [5, 2, 9], [3] * 8], ids=str)
def test_every_image_is_read_once_with_its_place(tmp_path, world_size, workers, sizes):
    config = data_config(val_data=make_shards(tmp_path, sizes), workers=workers, batch_size=2)
    orders, numbers = [], []
    for rank in retrieval_ranks(config, world_size):
        for batch in rank.loader:
            orders += batch.order.tolist()
            numbers += batch.text[:, 0].tolist()
            assert (batch.image[:, 0, 0, 0] * 255).round().int().tolist() == batch.text[:, 0].tolist()
    assert sorted(numbers) == list(range(sum(sizes)))
    assert [n for _, n in sorted(zip(orders, numbers, strict=True))] == list(range(sum(sizes)))
    assert not (tmp_path / "sizes.json").exists()


def test_five_captions_an_image_by_line(tmp_path):
    texts = ["\n".join(f"a caption {10 * i + j}" for j in range(5)) + "\n\n" for i in range(3)]
    make_shard(tmp_path / "0.tar", {f"{i}": sample(i, txt=text.encode()) for i, text in enumerate(texts)})
    (data,) = retrieval_ranks(data_config(val_data=f"{tmp_path}/0.tar"))
    assert captions_by_image(data.loader) == {i: [10 * i + j for j in range(5)] for i in range(3)}


def test_a_whole_file_as_one_caption(tmp_path):
    make_shard(tmp_path / "0.tar", {"a": sample(0, txt=b"one 1\r\ntwo 2")})
    (whole,) = retrieval_ranks(data_config(val_data=f"{tmp_path}/0.tar", val_captions="whole"))
    assert captions_by_image(whole.loader) == {0: [2]}
    (lines,) = retrieval_ranks(data_config(val_data=f"{tmp_path}/0.tar"))
    assert captions_by_image(lines.loader) == {0: [1, 2]}


def test_captions_from_json_lists(tmp_path):
    make_shard(
        tmp_path / "0.tar",
        {"a": sample(0, json=b'{"raw": ["x 1", "y\\nz 2"]}'), "b": sample(1, json=b'{"raw": "w 3"}')},
    )
    (data,) = retrieval_ranks(data_config(val_data=f"{tmp_path}/0.tar", json_caption_key="raw"))
    assert captions_by_image(data.loader) == {0: [1, 2], 1: [3]}


def test_what_is_left_out_is_counted_for_each_pass(tmp_path):
    bad = {1: {"png": b"no"}, 3: {"txt": b"\n \n"}, 4: {"txt": None}}
    (data,) = retrieval_ranks(data_config(val_data=make_shards(tmp_path, [6], bad)))
    for _ in range(2):
        assert sorted(captions_by_image(data.loader)) == [0, 2, 5]
        assert nonzero(data.skip_counts()) == {"bad_image": 1, "empty_caption": 1, "no_caption": 1}


def benchmark_folder(folder, labels=None, split="test"):
    """A CLIP_benchmark webdataset of two shards; with labels a classification set."""
    for shard in range(2):
        samples = {}
        for i in range(3):
            number = 3 * shard + i
            label = None if labels is None else str(labels[number]).encode()
            samples[f"s{number:07d}"] = {
                "webp": image_bytes(number, "webp"),
                **({"txt": f"{caption_of(number)}\nother {number}".encode()} if label is None else {"cls": label}),
            }
        make_shard(folder / split / f"{shard}.tar", samples)
    (folder / split / "nshards.txt").write_text("2\n")
    return folder


@pytest.mark.parametrize("inside", ["", "/test"])
def test_a_benchmark_folder_of_captions(tmp_path, inside):
    benchmark_folder(tmp_path)
    (data,) = retrieval_ranks(data_config(val_data=f"{tmp_path}{inside}"))
    assert list(captions_by_image(data.loader).values()) == [[i, i] for i in range(6)]


def test_missing_and_empty_validation_shards_are_reported(tmp_path):
    with pytest.raises(SetupError, match="--val-data: 1 of 1 shards are missing"):
        retrieval_ranks(data_config(val_data=f"{tmp_path}/0.tar"))
    write_tar(tmp_path / "0.tar", [])
    with pytest.raises(SetupError, match="--val-data: 1 of 1 shards are empty"):
        retrieval_ranks(data_config(val_data=f"{tmp_path}/0.tar"))
    (tmp_path / "nshards.txt").write_text("three")
    with pytest.raises(SetupError, match=r"nshards\.txt should hold the number"):
        retrieval_ranks(data_config(val_data=str(tmp_path)))


def test_no_validation_data_is_none():
    assert build_retrieval(data_config(), World(), to_tensor, tokenize) is None


# ---- classification


def classify(**flags):
    return build_classification(data_config(**flags), World(), to_tensor)


def labels_of(data):
    """color of the image -> label."""
    return {
        round(float(image[0, 0, 0]) * 255): label
        for batch in data.loader
        for image, label in zip(batch.image, batch.label.tolist(), strict=True)
    }


def image_folder(folder, names, per_class=2):
    """Images whose color is class place * 10 + number, in the order of ``names``."""
    for place, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for number in range(per_class):
            (folder / name / f"{number}.png").write_bytes(image_bytes(place * 10 + number))
    return str(folder)


def test_nothing_to_classify():
    assert classify() == []


def test_a_benchmark_folder_of_classes(tmp_path):
    labels = [2, 0, 1, 1, 0, 2]
    benchmark_folder(tmp_path / "pets", labels)
    (tmp_path / "pets" / "classnames.txt").write_text("cat\ndog\nold fox\n")
    (tmp_path / "pets" / "zeroshot_classification_templates.txt").write_text("a photo of a {c}.\na {c}, {{blurred}}.\n")
    (data,) = classify(zeroshot_data=str(tmp_path / "pets"))
    assert (data.name, data.classnames) == ("pets", ["cat", "dog", "old fox"])
    assert [template("dog") for template in data.templates] == ["a photo of a dog.", "a dog, {{blurred}}."]
    assert labels_of(data) == dict(enumerate(labels))


@pytest.mark.parametrize(("world_size", "workers"), GRID)
def test_every_labelled_image_is_read_once(tmp_path, world_size, workers):
    path = image_folder(tmp_path / "set", ["b_ear", "a_nt", "c"], per_class=3)
    (tmp_path / "set" / ".ipynb_checkpoints").mkdir()
    config = data_config(zeroshot_data=path, workers=workers, batch_size=2)
    found = []
    for rank in range(world_size):
        (data,) = build_classification(config, World(rank=rank, size=world_size), to_tensor)
        found += [n for batch in data.loader for n in (batch.image[:, 0, 0, 0] * 255).round().int().tolist()]
    assert sorted(found) == [0, 1, 2, 10, 11, 12, 20, 21, 22]
    assert data.classnames == ["a nt", "b ear", "c"]
    assert [template("x") for template in data.templates] == ["a photo of a x."]


def test_folder_names_that_are_numbers_are_in_their_order(tmp_path):
    path = image_folder(tmp_path / "v2", [str(n) for n in range(12)], per_class=1)
    (tmp_path / "v2" / "classnames.txt").write_text("\n".join(f"class {n}" for n in range(12)))
    (data,) = classify(zeroshot_data=path)
    assert labels_of(data) == {10 * n: n for n in range(12)}
    assert data.classnames[11] == "class 11"


def test_imagenet_has_open_clip_s_names_and_prompts(tmp_path):
    path = image_folder(tmp_path / "val", [f"n{n:08d}" for n in range(1000)], per_class=0)
    (tmp_path / "val" / "n00000007" / "a.JPEG").write_bytes(image_bytes(7, "jpeg"))
    imagenet, v2 = classify(imagenet_val=path, imagenet_v2=path)
    assert (imagenet.name, v2.name) == ("imagenet", "imagenetv2")
    assert imagenet.classnames == list(open_clip.IMAGENET_CLASSNAMES)
    assert list(imagenet.templates) == list(open_clip.OPENAI_IMAGENET_TEMPLATES)
    assert [batch.label.tolist() for batch in imagenet.loader] == [[7]]


def test_several_sets(tmp_path):
    paths = [image_folder(tmp_path / name, ["x", "y"]) for name in ("first", "second")]
    assert [data.name for data in classify(zeroshot_data="::".join(paths))] == ["first", "second"]


def test_two_sets_of_one_name_are_refused(tmp_path):
    paths = [image_folder(tmp_path / place / "pets", ["x", "y"]) for place in ("here", "there")]
    with pytest.raises(SetupError, match="several sets are called pets"):
        classify(zeroshot_data="::".join(paths))


def test_bad_labels_are_counted(tmp_path):
    benchmark_folder(tmp_path, [0, "cat", 1, "", 1, 0])
    (tmp_path / "classnames.txt").write_text("a\nb")
    (data,) = classify(zeroshot_data=str(tmp_path))
    assert labels_of(data) == {0: 0, 2: 1, 4: 1, 5: 0}
    assert nonzero(data.skip_counts()) == {"bad_label": 2}


def test_labels_of_no_class_are_counted(tmp_path):
    benchmark_folder(tmp_path, [0, 2, -1, 10**30, 1, 0])
    (tmp_path / "classnames.txt").write_text("a\nb")
    (data,) = classify(zeroshot_data=str(tmp_path))
    assert labels_of(data) == {0: 0, 4: 1, 5: 0}
    assert nonzero(data.skip_counts()) == {"bad_label": 3}


def test_files_that_cannot_be_read_are_counted(tmp_path):
    path = image_folder(tmp_path / "set", ["x", "y"])
    (data,) = classify(zeroshot_data=path)
    (tmp_path / "set" / "x" / "0.png").unlink()
    assert labels_of(data) == {1: 0, 10: 1, 11: 1}
    assert nonzero(data.skip_counts()) == {"no_image": 1}


def test_bad_sets_are_reported(tmp_path):
    with pytest.raises(SetupError, match=r"--imagenet-val .*there is no such folder"):
        classify(imagenet_val=str(tmp_path / "absent"))
    with pytest.raises(SetupError, match=r"neither a folder .* nor a CLIP_benchmark webdataset"):
        classify(zeroshot_data=str(tmp_path))
    path = image_folder(tmp_path / "few", ["x", "y"])
    with pytest.raises(SetupError, match=r"--imagenet-val .*: 2 class folders, but 1000 class names"):
        classify(imagenet_val=path)
    (tmp_path / "few" / "zeroshot_classification_templates.txt").write_text("a photo of a {}.")
    with pytest.raises(SetupError, match=r"without \{c\}"):
        classify(zeroshot_data=path)
    (tmp_path / "few" / "classnames.txt").write_text("\n")
    with pytest.raises(SetupError, match=r"classnames\.txt is empty"):
        classify(zeroshot_data=path)
    (tmp_path / "few" / "classnames.txt").write_bytes("caf\xe9\nbee\n".encode("latin-1"))
    with pytest.raises(SetupError, match=r"--zeroshot-data: .*classnames\.txt cannot be read: 'utf-8'"):
        classify(zeroshot_data=path)
    with pytest.raises(SetupError, match=r"shards need a classnames\.txt"):
        classify(zeroshot_data=str(benchmark_folder(tmp_path / "wds", [0] * 6)))
    (tmp_path / "wds" / "dataset_type.txt").write_text("multilabel")
    with pytest.raises(SetupError, match="multilabel"):
        classify(zeroshot_data=str(tmp_path / "wds"))


# ---- several classes an image


def npy(values, dtype="int64"):
    file = io.BytesIO()
    np.save(file, np.array(values, dtype))
    return file.getvalue()


@pytest.mark.parametrize("dtype", ["int64", "uint8", "bool", "float32"])
def test_a_vector_of_labels(dtype):
    assert decode_label_vector({"npy": npy([1, 0, 1], dtype)}, 3) == [1, 0, 1]


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (None, Skip.NO_LABEL),
        (b"", Skip.BAD_LABEL),
        (b"no array", Skip.BAD_LABEL),
        (npy([1, 0]), Skip.BAD_LABEL),
        (npy([1, 0, 2]), Skip.BAD_LABEL),
        (npy([[1, 0, 1]]), Skip.BAD_LABEL),
        (npy([1, 0, 1])[:-8], Skip.BAD_LABEL),
        (npy([1, 0, 1], "object"), Skip.BAD_LABEL),  # a pickle, which is not looked at
        (npy([1, 0, 1]).replace(b"(3,)", b"(9999999999999,)"), Skip.BAD_LABEL),
    ],
)
def test_a_file_that_holds_no_vector_of_labels(data, kind):
    with pytest.raises(BadSampleError) as caught:
        decode_label_vector({} if data is None else {"npy": data}, 3)
    assert caught.value.kind is kind
