"""Training on a list of samples: what a list may be, that each of its samples comes once an epoch, and nothing else."""

import pickle
from collections import Counter
from contextlib import suppress
from itertools import chain

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from loading import ids_of, load, passing, reload, same, states, take, within, worlds
from processes import run_on_ranks
from runs import arguments, selection
from shards_util import data_config, image_bytes, jittered, make_shard, make_shards, sample, tokenize, write_json

from dissect_clip.cli import train as cli
from dissect_clip.data import build_train, train_shards
from dissect_clip.data.formats import csv, pixels
from dissect_clip.data.formats.tar import ShardReader
from dissect_clip.data.sampling import bitmap, shuffle
from dissect_clip.data.sampling.bitmap import (
    UnsetPositions,
    count_set,
    empty_bitmap,
    inverted,
    nth_unset,
    set_bits,
    unset_positions,
)
from dissect_clip.data.sampling.plan import Coverage, ShardSubset, SubsetPlan
from dissect_clip.data.sampling.subset import SampleNames, as_recorded, list_digest, read_list
from dissect_clip.data.sampling.workers import WorkerInfo, count_batches
from dissect_clip.distributed.world import World
from dissect_clip.errors import SetupError
from dissect_clip.selection import build_selection

SIZES = [9, 5, 1, 8, 7]
SAMPLES = sum(SIZES)
LIST = [0, 3, 4, 9, 10, 12, 13, 15, 16, 22]  # none of the last shard
CLEAN = {"select": True, "select_strategy": "clean_posterior", "warmup_point": 5, "clean_decoys": 0.5}
BAD = {3: {"png": b"no"}, 7: {"txt": None}, 12: {"png": None}, 22: {"txt": b"\xff"}}


@pytest.fixture(autouse=True)
def _bounded(monkeypatch):
    """A shuffle buffer that small sets fill and leave; and no test that hangs."""
    monkeypatch.setattr(shuffle, "BUFFER_SIZE", 7)
    monkeypatch.setattr(shuffle, "_INITIAL", 3)
    with within(120):
        yield


def bits_of(ids, num_samples=SAMPLES):
    bits = empty_bitmap(num_samples)
    set_bits(bits, np.array(sorted(ids), np.int64))
    return bits


def ids_in(bits, num_samples=SAMPLES):
    return np.flatnonzero(np.unpackbits(bits, bitorder="little")[:num_samples]).tolist()


# ---- lists


NAMES = SampleNames(
    ("a.tar", "b.tar", "c.tar"),
    np.array([3, 2, 2]),
    lambda place: iter([["x", "y", "k\udcffé"], ["x", "y"], ["twin", "twin"]][place]),
)
BY_ID = [5, 0, 2]
BY_NAME = [("c.tar", "twin"), ("a.tar", "x"), ("a.tar", "k�é")]


def parquet(folder, columns, name="list.parquet"):
    pq.write_table(pa.table(columns), folder / name)
    return str(folder / name)


def text(folder, content, name):
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(folder / name)


@pytest.mark.parametrize(
    "write",
    [
        lambda f: parquet(f, {"sample_id": pa.array([4, 0, 2], pa.int64())}),
        lambda f: parquet(f, {"value": [0.5, 1, 2], "sample_id": pa.array([4, 0, 2], pa.uint16())}),
        lambda f: parquet(f, {"sample_id": [4, 0, 2], "shard": ["b.tar", "a.tar", "a.tar"], "key": ["-"] * 3}),
        lambda f: parquet(f, {"shard": pa.array(["b.tar", "a.tar", "a.tar"]).dictionary_encode(),
                              "key": pa.array(["y", "x", "k�é"], pa.large_string())}),
        lambda f: text(f, "value,sample_id\n1,4\n2,0\n3,2\n", "list.csv"),
        lambda f: text(f, "sample_id\n4\n0\n2\n", "list.CSV"),
        lambda f: text(f, "shard\tkey\nb.tar\ty\na.tar\tx\na.tar\tk�é\n", "list.tsv"),
        lambda f: text(f, "\n4\n 0\n\n2", "list.txt"),
        lambda f: text(f, "4\r\n0\r\n2\r\n", "list.txt"),
        lambda f: text(f, "b.tar y\n\na.tar\tx\na.tar  k�é \n", "list.txt"),
    ],
)  # fmt: skip
def test_a_list_says_the_same_in_every_form(tmp_path, write):
    assert ids_in(read_list(write(tmp_path), NAMES, "--train-keep"), 7) == [0, 2, 4]


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda f: parquet(f, {"sample_id": [7, 1, -1]}), "of its 3 rows 2 sample_ids are not of .* 0 to 6, as 7"),
        (lambda f: parquet(f, {"sample_id": [5, 1, 5, 5]}), "of its 4 rows 2 samples are listed more than once, as 5"),
        (lambda f: text(f, "7\n8\n1\n1\n", "l.txt"), "2 sample_ids are not .*; 1 samples are listed more than once"),
        (lambda f: parquet(f, {"sample_id": pa.array([], pa.int64())}), "lists no sample"),
        (lambda f: text(f, "sample_id\n", "l.csv"), "lists no sample"),
        (lambda f: text(f, "\n \n", "l.txt"), "lists no sample"),
        (lambda f: text(f, "", "l.txt"), "is empty"),
        (lambda f: text(f, "", "l.csv"), "is empty"),
        (lambda f: parquet(f, {"id": [1]}), "needs a column sample_id, or shard and key; its columns are id"),
        (lambda f: text(f, "shard,name\na.tar,x\n", "l.csv"), "needs a column .* are shard, name"),
        (lambda f: parquet(f, {"sample_id": [1.0, 2.0]}), "sample_id holds double, not whole numbers"),
        (lambda f: parquet(f, {"sample_id": ["1"]}), "sample_id holds string"),
        (lambda f: parquet(f, {"shard": [1], "key": ["x"]}), "shard holds int64, not text"),
        (lambda f: parquet(f, {"sample_id": [1, None]}), "sample_id has 1 or more rows without a value"),
        (lambda f: parquet(f, {"sample_id": pa.array([2**63], pa.uint64())}), "cannot be read"),
        (lambda f: text(f, "sample_id\n1\nx\n", "l.csv"), "cannot be read: .*'x'"),
        (lambda f: text(f, "1\n2\nx\n", "l.txt"), "first line is a sample_id, and this line is not: 'x'"),
        (lambda f: text(f, "1\n-1\n", "l.txt"), "this line is not: '-1'"),
        (lambda f: text(f, "a.tar x\n5\n", "l.txt"), "first line is a shard and a key, and this line is not: '5'"),
        (lambda f: text(f, b"\xff\xfe\n", "l.txt"), "cannot be read"),
        (lambda f: text(f, b"PAR1 not really", "l.parquet"), "cannot be read"),
        (lambda f: text(f, pickle.dumps([1]), "l.pkl"), r"may be .parquet, .csv, .tsv \(with a header\) and .txt"),
        (lambda f: text(f, pickle.dumps([1]), "l.parquet"), "cannot be read"),
        (lambda f: str(f / "absent.csv"), "there is no such file"),
        (lambda f: str(f), "may be .parquet"),
        (lambda f: text(f, "d.tar x\na.tar q\nb.tar x\n", "l.txt"),
         "of its 3 rows 1 are of shards that the dataset does not have, as d.tar x; 1 are not in .*, as a.tar q"),
        (lambda f: text(f, "c.tar twin\n", "l.txt"), r"1 stand for several samples .* \(list these by sample_id\)"),
        (lambda f: text(f, "a.tar x\na.tar x\n", "l.txt"), "1 samples are listed more than once, as 0"),
        (lambda f: parquet(f, {"sample_id": [0, 4], "shard": ["a.tar", "a.tar"]}),
         "1 samples have other numbers in this dataset .*, as 4, which is not of 'a.tar' but of 'b.tar'"),
    ],
)  # fmt: skip
def test_a_bad_list_is_refused_with_a_count_and_an_example(tmp_path, write, message):
    with pytest.raises(SetupError, match=message) as refused:
        read_list(write(tmp_path), NAMES, "--train-keep")
    assert str(refused.value).startswith("--train-keep ")


def test_shards_that_are_given_twice_are_known_by_number_only(tmp_path):
    names = SampleNames(("/a.tar", "/a.tar"), np.array([1, 1]), lambda place: iter(["x"]))
    both = parquet(tmp_path, {"sample_id": [0, 1], "shard": ["/a.tar"] * 2})
    assert ids_in(read_list(both, names, "--keep"), 2) == [0, 1]
    with pytest.raises(SetupError, match=r"whose name the dataset has more than once, as /a\.tar x"):
        read_list(text(tmp_path, "/a.tar x\n", "l.txt"), names, "--keep")


def test_problems_are_found_across_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr("dissect_clip.data.sampling.sample_list._ROWS", 2)
    with pytest.raises(SetupError, match="2 samples are listed more than once, as 1"):
        read_list(parquet(tmp_path, {"sample_id": [0, 1, 2, 1, 3, 2]}), NAMES, "--train-keep")


def test_keys_are_those_of_the_record(tmp_path):
    """Of shards and of tables, also where names are not UTF-8."""
    make_shard(tmp_path / "odd.tar", {"a": sample(0), "caf\udce9": sample(1), "dir/b": sample(2)})
    listed = text(tmp_path, "odd.tar caf�\nodd.tar dir/b\n", "l.txt")
    data = build(data_config(train_data=str(tmp_path / "odd.tar"), train_keep=listed, batch_size=1))
    assert sorted(ids_of(take(data, 0))) == [1, 2]
    assert as_recorded("caf\udce9") == "caf�"
    path = table(tmp_path, 4)
    listed = text(tmp_path, f"pairs.csv {tmp_path}/3.png\npairs.csv {tmp_path}/0.png\n", "rows.txt")
    assert sorted(ids_of(take(load(data_config(train_data=path, train_keep=listed, batch_size=1)), 0))) == [0, 3]


# ---- every sample of the list once


def build(config):
    return build_train(config, World(), lambda image: pixels.torch.zeros(3, 8, 8), tokens, None)


def tokens(texts):
    return pixels.torch.zeros(len(texts), 1, dtype=pixels.torch.int64)


def table(folder, rows, bad=()):
    lines = ["filepath\ttitle"]
    for row in range(rows):
        (folder / f"{row}.png").write_bytes(b"no" if row in bad else image_bytes(row))
        lines.append(f"{folder}/{row}.png\tsample {row}")
    (folder / "pairs.csv").write_text("\n".join(lines) + "\n")
    return str(folder / "pairs.csv")


def check_once(epochs, kept, step):
    """The batches of all ranks [rank][batch] hold each sample of a list once, but for those that fill up the step."""
    assert len({len(batches) for batches in epochs}) == 1
    counts = Counter(ids_of(list(chain(*epochs))))
    assert set(counts) == set(kept)
    assert sum(counts.values()) == -(-len(kept) // step) * step
    assert max(counts.values()) <= -(-sum(counts.values()) // len(kept))


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("shards"), SIZES)


@settings(max_examples=80, deadline=None)
@given(
    kept=st.sets(st.integers(0, SAMPLES - 1), min_size=1),
    world_size=st.integers(1, 5),
    workers=st.integers(0, 3),
    batch_size=st.integers(1, 7),
    accum_freq=st.integers(1, 2),
    seed=st.integers(0, 3),
    epoch=st.integers(0, 2),
)
def test_every_sample_of_the_list_once_in_any_layout(
    shards, kept, world_size, workers, batch_size, accum_freq, seed, epoch
):
    flags = {"workers": workers, "batch_size": batch_size, "accum_freq": accum_freq, "seed": seed}
    config = data_config(train_data=shards, **flags)
    ranks = [load(config, World(rank=rank, size=world_size), SIZES, bits_of(kept)) for rank in range(world_size)]
    check_once([take(data, epoch) for data in ranks], kept, batch_size * accum_freq * world_size)
    assert {(data.num_samples, data.subset_size) for data in ranks} == {(SAMPLES, len(kept))}
    assert all(sum(data.skip_counts().values()) == 0 for data in ranks)
    assert ranks[0].num_batches == count_batches(len(kept), batch_size, world_size, accum_freq)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(0, 12), min_size=1, max_size=8).filter(any),
    st.data(),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(1, 4),
)
def test_a_plan_lays_each_sample_of_the_list_out_once(sizes, data, world_size, workers, batch_size):
    num_samples = sum(sizes)
    kept = data.draw(st.sets(st.integers(0, num_samples - 1), min_size=1))
    left_out = inverted(bits_of(kept, num_samples), num_samples)
    num_batches = count_batches(len(kept), batch_size, world_size)
    plan = SubsetPlan(ShardSubset.of(np.array(sizes), left_out), num_batches, batch_size, 0)
    offsets = np.cumsum(sizes) - sizes
    places = [WorkerInfo(rank, world_size, worker, workers) for rank in range(world_size) for worker in range(workers)]
    parts = list(chain(*(plan.slices(place, 3, 0) for place in places)))
    once = [int(offsets[part.shard]) + ordinal for part in parts if not part.is_repeat for ordinal in part.ordinals]
    assert sorted(once) == sorted(kept)
    assert sum(len(part.ordinals) for part in parts) == num_batches * batch_size * world_size
    again = [sorted((p.shard, tuple(p.ordinals), p.is_repeat) for p in plan.slices(places[0], 3, n)) for n in (0, 1)]
    assert again[0] == again[1]


@pytest.mark.parametrize(("world_size", "workers"), [(1, 0), (3, 2)])
def test_rows_of_a_table_once(tmp_path, world_size, workers):
    flags = {"train_data": table(tmp_path, 22, bad=(9,)), "batch_size": 2, "workers": workers}
    listed = text(tmp_path, "".join(f"{row}\n" for row in (0, 3, 4, 9, 10, 12, 21)), "rows.txt")
    config = data_config(train_keep=listed, **flags)
    ranks = [load(config, World(rank=rank, size=world_size)) for rank in range(world_size)]
    for epoch in range(2):
        epochs = [take(data, epoch) for data in ranks]
        assert set(ids_of(list(chain(*epochs)))) == {0, 3, 4, 10, 12, 21}
        assert sum(data.skip_counts()["bad_image"] for data in ranks) == 1
    assert (ranks[0].num_samples, ranks[0].subset_size) == (22, 7)
    assert ranks[0].fingerprint != load(data_config(**flags)).fingerprint


def test_synthetic_rows(tmp_path):
    listed = text(tmp_path, "synthetic 5\nsynthetic 0\n", "rows.txt")
    config = data_config(dataset_type="synthetic", train_num_samples=9, batch_size=1, train_keep=listed)
    assert sorted(ids_of(take(load(config), 0))) == [0, 5]


def test_several_sources_and_torchs_workers(tmp_path):
    for name, first in (("a", 0), ("b", 5)):
        make_shard(tmp_path / f"{name}.tar", {f"{first + i:06d}": sample(first + i) for i in range(5)})
    listed = text(tmp_path, "a.tar 000003\nb.tar 000005\nb.tar 000009\n", "l.txt")
    pattern = f"{tmp_path}/a.tar::{tmp_path}/b.tar"
    data = build(data_config(train_data=pattern, train_keep=listed, batch_size=1, workers=2))
    batches = take(data, 0, real=True)
    assert sorted(ids_of(batches)) == [3, 5, 9]
    assert data.locate(np.array([3, 5])).tolist() == [0, 1]


def test_remote_shards_are_counted_for_a_list(tmp_path):
    make_shards(tmp_path, SIZES)
    pattern = f"pipe:cat {tmp_path}/train-{{000..004}}.tar"
    listed = parquet(tmp_path, {"sample_id": LIST})
    data = build(data_config(train_data=pattern, train_keep=listed, train_num_samples=SAMPLES, batch_size=2))
    assert sorted(ids_of(take(data, 0))) == LIST


def test_bad_samples_of_the_list_are_made_up_for_by_others_of_it(tmp_path):
    make_shards(tmp_path, SIZES, BAD)
    ranks = [
        load(data_config(train_data=str(tmp_path / "train-{000..004}.tar"), batch_size=2), world, SIZES, bits_of(LIST))
        for world in worlds(2)
    ]
    epochs = [take(data, 0) for data in ranks]
    assert set(ids_of(list(chain(*epochs)))) == set(LIST) - set(BAD)
    counts = sum((Counter(data.skip_counts()) for data in ranks), Counter())
    assert {kind: n for kind, n in counts.items() if n} == {"bad_image": 1, "no_image": 1, "bad_caption": 1}


def test_what_is_not_on_the_list_is_neither_decoded_nor_read(tmp_path, monkeypatch):
    """10 % of each shard: as many images are decoded and as many bytes of files read; other shards stay closed."""
    pattern = make_shards(tmp_path, [20, 20, 20])
    kept = [3, 17, 45, 50]
    decoded, read, opened = [], [], []
    decode, init, read_bytes = pixels.decode_image, ShardReader.__init__, ShardReader._read
    monkeypatch.setattr(pixels, "decode_image", lambda files: (decoded.append(None), decode(files))[1])
    monkeypatch.setattr(ShardReader, "__init__", lambda self, url, *a: (opened.append(url), init(self, url, *a))[1])
    monkeypatch.setattr(ShardReader, "_read", lambda self, size: (read.append(size), read_bytes(self, size))[1])
    data = load(data_config(train_data=pattern, batch_size=2), sizes=[20, 20, 20], keep=bits_of(kept, 60))
    batches = take(data, 0)
    assert sorted(ids_of(batches)) == kept
    assert len(decoded) == len(kept)
    assert sum(read) == sum(len(file) for number in kept for file in sample(number).values())
    assert {url[-7:] for url in opened} == {"000.tar", "002.tar"}


def test_a_choice_before_loading_is_among_the_samples_of_the_list(tmp_path):
    data = load(data_config(train_data=make_shards(tmp_path, SIZES), batch_size=5), sizes=SIZES, keep=bits_of(LIST))

    class Largest:
        count = 2

        def __call__(self, ids, first, epoch, seed):
            self.order = ids.argsort(descending=True)
            asked.extend(ids.tolist())
            return self

    asked = []
    data.stream.preselector = Largest()
    batches = take(data, 0)
    assert sorted(asked) == LIST
    assert [len(batch) for batch in batches] == [2, 2]


def test_shards_drawn_with_replacement_give_samples_of_the_list(tmp_path):
    """A shard with none of them is never drawn; without --train-num-samples an epoch is as long as the list."""
    config = data_config(train_data=make_shards(tmp_path, SIZES), dataset_resampled=True, batch_size=2)
    data = load(config, sizes=SIZES, keep=bits_of([*LIST, 29]))
    counts = Counter(chain(*(ids_of(take(data, epoch)) for epoch in range(100))))
    assert data.stream.whole.source.coverage is Coverage.DRAWS
    assert data.num_batches == 6
    assert set(counts) == {*LIST, 29}
    assert max(counts.values()) < 2 * min(counts.values())


# ---- stops


def pattern_of(folder, bad=None):
    if not (folder / "train-000.tar").exists():
        make_shards(folder, SIZES, bad)
    return str(folder / "train-{000..004}.tar")


KINDS = ["shards", "draws", "table"]


def kept_ranks(kind, folder, world_size=1, **flags):
    """All ranks of a run on a list."""
    if kind == "table":
        path = str(folder / "pairs.csv") if (folder / "pairs.csv").exists() else table(folder, SAMPLES, bad=(3, 12))
        listed = parquet(folder, {"sample_id": LIST})
        config = data_config(train_data=path, train_keep=listed, **{"batch_size": 1, **flags})
        return [load(config, world) for world in worlds(world_size)]
    draws = {"dataset_resampled": True} if kind == "draws" else {}
    config = data_config(train_data=pattern_of(folder, BAD), **{"batch_size": 1, **draws, **flags})
    return [load(config, world, SIZES, bits_of(LIST)) for world in worlds(world_size)]


@pytest.mark.parametrize(("world_size", "workers"), [(1, 0), (2, 2)])
@pytest.mark.parametrize("kind", KINDS)
def test_after_every_batch_the_rest_comes_as_it_would_have(tmp_path, kind, world_size, workers):
    whole = kept_ranks(kind, tmp_path, world_size, workers=workers)
    expected = [take(data, 1) for data in whole]
    end = states(whole)[0]
    for done in range(len(expected[0]) + 1):
        stopped, again = (kept_ranks(kind, tmp_path, world_size, workers=workers) for _ in range(2))
        before = [take(data, 1, done) for data in stopped]
        state = states(stopped)[0]
        assert [data.resume(state, 1) for data in again] == [None] * world_size
        for rank, data in enumerate(again):
            assert same([*before[rank], *take(data, 1)], expected[rank])
            assert data.skip_counts() == whole[rank].skip_counts()
        assert same(states(again)[0], end)


@settings(max_examples=25, deadline=None)
@given(
    kept=st.sets(st.integers(0, SAMPLES - 1), min_size=2),
    done=st.integers(0, 3),
    world_size=st.integers(1, 3),
    workers=st.integers(0, 2),
    batch_size=st.integers(1, 3),
)
def test_another_layout_gives_what_is_left_of_the_list(shards, kept, done, world_size, workers, batch_size):
    def ranks(world_size, **flags):
        config = data_config(train_data=shards, **flags)
        return [load(config, world, SIZES, bits_of(kept)) for world in worlds(world_size)]

    stopped = ranks(2, batch_size=1, workers=1)
    before = set(chain(*(ids_of(take(data, 0, done)) for data in stopped)))
    state = states(stopped)[0]
    again = ranks(world_size, batch_size=batch_size, workers=workers, seed=5)
    told = [data.resume(state, 0) for data in again]
    assert all(f"the {len(kept - before)} samples not yet seen" in note for note in told)
    left = kept - before
    after = [take(data, 0) for data in again]
    if left:
        check_once(after, left, batch_size * world_size)
    assert {count_set(data._visits) for data in again} <= set(range(SAMPLES + 1))
    check_once([take(data, 1) for data in again], kept, batch_size * world_size)


def test_what_is_left_out_counts_as_visited(tmp_path):
    (data,) = kept_ranks("shards", tmp_path)
    for number, batch in enumerate(passing(data, 0), 1):
        good = len(set(LIST) - set(BAD))
        assert count_set(data._visits) == SAMPLES - len(LIST) + min(number, good)
        assert int(batch.sample_id[0]) in LIST
    assert not np.any(
        unset_positions(reload(data.state_dict())["visited"].numpy(), 23, SAMPLES)
    )  # all of the last shard


# ---- whole runs


def run_data(folder, sizes):
    data = make_shards(folder / "data", sizes)
    write_json(folder / "data" / "sizes.json", {f"train-{place:03d}.tar": n for place, n in enumerate(sizes)})
    return data


def test_a_run_on_a_list_goes_on_with_the_same_list_only(tmp_path, capsys):
    data = run_data(tmp_path, [12, 10, 10])
    kept = [0, 1, 5, 7, 13, 14, 20, 21]
    listed, same_list = parquet(tmp_path, {"sample_id": kept}), text(tmp_path, "".join(f"{i}\n" for i in kept), "l.txt")
    other = text(tmp_path, "1\n2\n3\n", "other.txt")
    flags = selection("historical_base_sampling") | {"batch_size": 4, "record": True}
    assert cli.main(arguments(tmp_path, data, epochs=1, train_keep=listed, **flags)) == 0
    run = tmp_path / "logs" / "run"
    rows = pq.read_table(run / "record" / "epoch_00000.parquet").to_pylist()
    assert sorted(row["sample_id"] for row in rows) == kept
    assert "8 of 32 samples in 3 shards; 2 steps an epoch of 4 samples" in (run / "out.log").read_text()
    for changes, message in (
        ({"train_keep": other}, "it was trained on another list of samples than --train-keep: "),
        ({}, "it was trained on a list of samples, this run has no --train-keep"),
    ):
        capsys.readouterr()
        assert cli.main(arguments(tmp_path, data, epochs=2, resume="latest", **changes, **flags)) == 2
        assert message in capsys.readouterr().err
    assert cli.main(arguments(tmp_path, data, epochs=2, resume="latest", train_keep=same_list, **flags)) == 0
    assert cli.main(arguments(tmp_path, data, "all", epochs=1, **flags)) == 0
    capsys.readouterr()
    assert cli.main(arguments(tmp_path, data, "all", epochs=2, resume="latest", train_keep=listed, **flags)) == 2
    assert "it was trained on all samples of its data, this run has --train-keep" in capsys.readouterr().err


def test_a_bad_list_stops_the_run_before_training(tmp_path, capsys):
    listed = text(tmp_path, "5\n99\n", "l.txt")
    assert cli.main(arguments(tmp_path, run_data(tmp_path, [12]), train_keep=listed)) == 2
    assert "of its 2 rows 1 sample_ids are not of the dataset, whose ids are 0 to 11, as 99" in capsys.readouterr().err


def _on_ranks(world, pattern, listed, bad):
    """What two real ranks read of a list, and what each says of a bad one."""
    config = data_config(train_data=pattern, train_keep=listed, batch_size=2, workers=1)
    data = train_shards.build_train(config, world, jittered, tokenize, None)
    ids = ids_of(take(data, 0, real=True))
    with pytest.raises(SetupError) as refused:
        train_shards.build_train(data_config(train_data=pattern, train_keep=bad), world, jittered, tokenize, None)
    return ids, data.fingerprint, str(refused.value)


@pytest.mark.dist
def test_rank_0_reads_the_list_for_all(tmp_path):
    listed, bad = parquet(tmp_path, {"sample_id": LIST}), text(tmp_path, "99\n", "bad.txt")
    answers = run_on_ranks(2, _on_ranks, make_shards(tmp_path, SIZES), listed, bad)
    ids, prints, messages = zip(*answers, strict=True)
    assert set(chain(*ids)) == set(LIST)
    assert [len(own) for own in ids] == [6, 6]
    assert len(set(prints)) == 1
    assert all("1 sample_ids are not of the dataset" in message for message in messages)


# ---- parts


@given(st.sets(st.integers(0, 76)), st.integers(0, 77), st.integers(0, 77), st.integers(0, 77), st.integers(0, 77))
def test_unmarked_samples_are_a_sequence(ids, first, last, begin, end):
    bits = bits_of(ids, 77)
    assert ids_in(inverted(bits, 77), 77) == [i for i in range(77) if i not in ids]
    assert count_set(inverted(bits, 77)) == 77 - len(ids)
    first, last = min(first, last), max(first, last)
    expected = [i - first for i in range(first, last) if i not in ids]
    begin, end = min(begin, end, len(expected)), min(max(begin, end), len(expected))
    found = UnsetPositions(bits, first, last, begin, end)
    expected = expected[begin:end]
    assert (len(found), list(found), found[1:]) == (len(expected), expected, expected[1:])
    if expected:
        assert (found[0], found[-1]) == (expected[0], expected[-1])


@given(st.sets(st.integers(0, 76)), st.data())
def test_unmarked_samples_have_numbers(ids, data):
    others = [i for i in range(77) if i not in ids]
    numbers = sorted(data.draw(st.sets(st.sampled_from(range(len(others)))))) if others else []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bitmap, "_CHUNK", 3)
        found = nth_unset(bits_of(ids, 77), np.array(numbers, np.int64))
    assert found.tolist() == [others[number] for number in numbers]


def test_decoys_are_drawn_among_the_samples_on_the_list(tmp_path, caplog):
    listed = parquet(tmp_path, {"sample_id": LIST})
    config = data_config(train_data=make_shards(tmp_path, SIZES), train_keep=listed, batch_size=2, **CLEAN)
    data = train_shards.build_train(config, World(), jittered, tokenize, None)
    selector = build_selection(config, data.num_samples, World())
    assert selector is not None
    selector.draw_decoys(data.subset_size, data.subset_ids)
    decoys = selector.decoys
    assert decoys is not None
    assert len(decoys.ids) == len(LIST) // 2
    assert set(decoys.ids.tolist()) < set(LIST)
    verdict = selector.strategy.sample_report(torch.zeros(SAMPLES, 5), torch.arange(SAMPLES), SAMPLES, 6)
    assert verdict["is_decoy"].nonzero()[:, 0].equal(decoys.ids)


def test_a_digest_is_of_the_samples_alone():
    digests = {list_digest(bits_of(ids)) for ids in ([1, 2], [2, 1], [1, 3], [1])}
    assert len(digests) == 3


def test_files_of_rows_that_are_not_on_the_list_are_not_read(tmp_path, monkeypatch):
    read = []
    real = csv.read_file
    monkeypatch.setattr(csv, "read_file", lambda path: (read.append(path), real(path))[1])
    (data,) = kept_ranks("table", tmp_path)
    take(data, 0)
    assert {int(path.rpartition(b"/")[2].partition(b".")[0]) for path in read} == set(LIST)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from([".csv", ".tsv", ".txt", ".parquet"]),
    st.sampled_from([b"", b"sample_id\n", b"sample_id,shard\n", b"shard\tkey\n", b"1\n", b"a.tar x\n", b"PAR1"]),
    st.binary(max_size=40) | st.text('0123456789,\t\n" ax.tr-', max_size=40).map(str.encode),
)
def test_whatever_a_list_holds_it_is_read_or_refused(tmp_path, suffix, head, rest):
    path = text(tmp_path, head + rest, f"list{suffix}")
    with suppress(SetupError):
        assert 0 < count_set(read_list(path, NAMES, "--train-keep")) <= 7


def test_a_damaged_parquet_file_is_refused(tmp_path):
    path = parquet(tmp_path, {"sample_id": list(range(7)), "shard": ["a.tar"] * 3 + ["b.tar"] * 2 + ["c.tar"] * 2})
    whole = (tmp_path / "list.parquet").read_bytes()
    for place in range(0, len(whole), 3):
        (tmp_path / "list.parquet").write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        with suppress(SetupError):
            read_list(path, NAMES, "--train-keep")
