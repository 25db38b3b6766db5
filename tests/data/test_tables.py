"""Csv files and synthetic data."""

import pickle
from collections import Counter
from itertools import chain

import pytest
import torch
from open_clip.transform import image_transform
from shards_util import caption_of, data_config, image_bytes, to_tensor, tokenize

from dissect_clip.data import build_retrieval, build_train
from dissect_clip.data.formats import csv
from dissect_clip.distributed.world import World
from dissect_clip.errors import SetupError


def write_table(folder, count, name="pairs.csv", separator="\t", header=("filepath", "title"), captions=None):
    """Images and a table of them whose captions name the row."""
    lines = [separator.join(header)]
    for row in range(count):
        (folder / f"{row}.png").write_bytes(image_bytes(row))
        lines.append(separator.join([f"{folder}/{row}.png", (captions or {}).get(row, caption_of(row))]))
    (folder / name).write_text("\n".join(lines) + "\n")
    return str(folder / name)


def load(config, transform=to_tensor):
    return build_train(config, World(), transform, tokenize, None)


def epoch_of(data, epoch=0):
    data.set_epoch(epoch)
    batches = []
    for batch in data.loader:
        data.consume(batch)
        batches.append(batch)
    return batches


def ids_of(batches):
    return [sample_id for batch in batches for sample_id in batch.sample_id.tolist()]


@pytest.mark.parametrize("workers", [0, 2])
def test_ids_are_rows(tmp_path, workers):
    data = load(data_config(train_data=write_table(tmp_path, 10), workers=workers, record=True))
    batches = epoch_of(data)
    assert [len(batch) for batch in batches] == [4, 4, 4]
    for batch in batches:
        assert batch.text[:, 0].tolist() == batch.sample_id.tolist()
        assert (batch.image[:, 0, 0, 0] * 255).round().int().tolist() == batch.sample_id.tolist()
        assert all(bytes(key.tolist()).rstrip(b"\0").endswith(b".png") for key in batch.key)
        assert data.locate(batch.sample_id.numpy()).tolist() == [0] * 4
    assert set(ids_of(batches)) == set(range(10))
    assert (data.num_samples, data.shard_names, data.shard_sizes.tolist()) == (10, ("pairs.csv",), [10])
    assert ids_of(batches) == ids_of(epoch_of(load(data_config(train_data=f"{tmp_path}/pairs.csv", workers=workers))))
    assert ids_of(batches) != ids_of(epoch_of(data, 1))


def test_ranks_share_the_rows(tmp_path):
    config = data_config(train_data=write_table(tmp_path, 11), batch_size=2)
    tables = [csv.build_train(config, World(rank=rank, size=3), to_tensor, tokenize) for rank in range(3)]
    epochs = [epoch_of(table) for table in tables]
    assert [len(batches) for batches in epochs] == [2, 2, 2]
    assert set(chain(*map(ids_of, epochs))) == set(range(11))


def test_other_columns_separators_and_quotes(tmp_path):
    path = write_table(
        tmp_path, 4, separator=",", header=("image", "text"), captions={1: '"a, b\nand ""c"" 1"', 2: "NA 2", 3: '"" 3'}
    )
    flags = {"csv_separator": ",", "csv_img_key": "image", "csv_caption_key": "text"}
    (batch,) = epoch_of(load(data_config(train_data=path, **flags)))
    by_id = dict(zip(batch.sample_id.tolist(), batch.text.tolist(), strict=True))
    assert by_id[1] == [1, len('a, b\nand "c" 1')]
    assert by_id[2] == [2, 4]


def test_a_tab_may_be_written_as_an_escape(tmp_path):
    assert load(data_config(train_data=write_table(tmp_path, 4, "pairs.tsv"), csv_separator="\\t")).num_samples == 4


def test_bad_rows_are_counted_and_made_up_for(tmp_path):
    path = write_table(tmp_path, 8)
    (tmp_path / "2.png").unlink()
    (tmp_path / "5.png").write_bytes(b"no image")
    with open(path, "rb") as file:
        text = file.read().replace(b"sample 6", b"\xff\xfe 6")
    with open(path, "wb") as file:
        file.write(text)
    data = load(data_config(train_data=path))
    batches = epoch_of(data)
    assert [len(batch) for batch in batches] == [4, 4]
    assert set(ids_of(batches)) == {0, 1, 3, 4, 7}
    assert {k: n for k, n in data.skip_counts().items() if n} == {"no_image": 1, "bad_image": 1, "bad_caption": 1}


def test_the_fingerprint_is_of_rows_not_folders(tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
    paths = [write_table(tmp_path / name, 5) for name in "ab"] + [write_table(tmp_path / "c", 5, captions={3: "x"})]
    prints = [load(data_config(train_data=path)).fingerprint for path in paths]
    assert prints[0] == prints[1] != prints[2]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"csv_separator": ","}, r"no column 'filepath' and no column 'title'.*its columns are \['filepath\\ttitle'\]"),
        ({"csv_img_key": "image"}, "no column 'image';.*--csv-img-key.*--csv-separator"),
        ({"csv_separator": "ab"}, "--csv-separator 'ab' should be one character"),
        ({"train_num_samples": 3}, "--train-num-samples 3 .* has 4 rows"),
        ({"dataset_resampled": True}, "--dataset-resampled"),
        ({"train_data": "absent.csv"}, "there is no file absent.csv"),
    ],
)
def test_bad_input_is_reported(tmp_path, flags, message):
    with pytest.raises(SetupError, match=message):
        load(data_config(**({"train_data": write_table(tmp_path, 4)} | flags)))


def test_a_table_without_rows_is_reported(tmp_path):
    with pytest.raises(SetupError, match="has no rows"):
        load(data_config(train_data=write_table(tmp_path, 0)))


def test_rows_of_other_widths_are_reported(tmp_path):
    (tmp_path / "a.csv").write_text("filepath\ttitle\nx\ty\tz\n")
    with pytest.raises(SetupError, match="cannot read"):
        load(data_config(train_data=f"{tmp_path}/a.csv"))


@pytest.mark.parametrize("end", ["\n", ""])
def test_a_quote_that_is_never_closed_swallows_no_rows(tmp_path, end):
    path = tmp_path / "a.csv"
    path.write_text('filepath\ttitle\nx\t"a\nb"\nx\t5" screen\nx\t"open\ny\tz' + end)
    with pytest.raises(SetupError, match=r"a\.csv: the quote before open.* is never closed"):
        load(data_config(train_data=str(path)))
    path.write_text('filepath\ttitle\nx\t"open\n' + "y\tz\n" * 600_000)
    with pytest.raises(SetupError, match="more than 1 MiB, as if a quote is not closed"):
        load(data_config(train_data=str(path)))


@pytest.mark.parametrize("last", ['"a\nb"', '"a\nb ""c"""', '"\n"', '"a\n"\n\n', '5" a', '"a\rb"', '"a\nb"\r'])
def test_line_breaks_in_the_last_caption_are_no_open_quote(tmp_path, last):
    assert load(data_config(train_data=write_table(tmp_path, 4, captions={3: last}))).num_samples == 4


def test_one_column_cannot_be_image_and_caption(tmp_path):
    with pytest.raises(SetupError, match="--csv-img-key and --csv-caption-key are both 'title'"):
        load(data_config(train_data=write_table(tmp_path, 4), csv_img_key="title"))


def test_a_header_that_is_not_utf_8_is_reported(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"filepath\ttitle\tn\xe9\nx\ty\tz\n")
    with pytest.raises(SetupError, match=r"cannot read .*can't decode byte 0xe9"):
        load(data_config(train_data=f"{tmp_path}/a.csv"))


@pytest.mark.parametrize(("world_size", "count"), [(1, 10), (3, 10), (3, 2)])
def test_validation_rows_are_read_once(tmp_path, world_size, count):
    config = data_config(val_data=write_table(tmp_path, count, captions={1: '"two\nlines 1"'}), json_caption_key="x")
    ranks = [build_retrieval(config, World(rank=r, size=world_size), to_tensor, tokenize) for r in range(world_size)]
    batches = list(chain(*(rank.loader for rank in ranks)))
    assert sorted(n for batch in batches for n in batch.order.tolist()) == list(range(count))
    assert all(batch.text[:, 0].tolist() == batch.order.tolist() for batch in batches)
    assert {n for batch in batches for n in batch.captions.tolist()} == {1}


def test_a_table_can_be_sent_to_spawned_workers(tmp_path):
    stream = load(data_config(train_data=write_table(tmp_path, 4))).stream
    assert ids_of(pickle.loads(pickle.dumps(stream))) == ids_of(stream)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("size", [16, (8, 24)])
def test_synthetic_data_has_the_model_s_size_and_ids(workers, size):
    config = data_config(dataset_type="synthetic", train_num_samples=10, workers=workers)
    data = load(config, transform=image_transform(size, is_train=True))
    batches = epoch_of(data)
    assert batches[0].image.shape[1:] == (3, *((size, size) if isinstance(size, int) else size))
    assert set(ids_of(batches)) == set(range(10))
    counts = Counter(ids_of(batches))
    assert sum(counts.values()) == 12
    assert {tuple(text) for batch in batches for text in batch.text.tolist()} == {(-1, len("Dummy caption"))}


def test_synthetic_validation():
    config = data_config(dataset_type="synthetic", train_num_samples=5, val_data="any")
    data = build_retrieval(config, World(), to_tensor, tokenize)
    assert torch.cat([batch.order for batch in data.loader]).tolist() == list(range(5))


def test_synthetic_data_needs_a_number():
    with pytest.raises(SetupError, match="--train-num-samples"):
        load(data_config(dataset_type="synthetic"))
    with pytest.raises(SetupError, match="--val-num-samples"):
        build_retrieval(data_config(dataset_type="synthetic", val_data="any"), World(), to_tensor, tokenize)
