"""Choosing before loading: what is decoded, what stands in for a broken sample; and nothing is lost over a stop."""

from collections import Counter
from dataclasses import dataclass, field

import pytest
from loading import ids_of, load, passing, reload, same, states, take, within, worlds
from shards_util import data_config, image_bytes, make_shards
from torch import Tensor

from dissect_clip.data.formats import csv, pixels
from dissect_clip.data.sampling import shuffle
from dissect_clip.data.sampling.bitmap import count_set

SIZES = [9, 5, 1, 8, 7]
SAMPLES = sum(SIZES)
BAD = {3: {"png": b"no"}, 7: {"txt": None}, 12: {"png": None}, 13: {"png": b"no"}, 20: {"txt": b"\xff"}}
N, M = 5, 2


@dataclass(frozen=True)
class Decision:
    order: Tensor
    count: int


@dataclass
class Best:
    """Wants the M with the highest ids; remembers what it was asked."""

    count: int = M
    asked: list[tuple[list[int], list[bool], int, int]] = field(default_factory=list)

    def __call__(self, ids: Tensor, once: Tensor, epoch: int, seed: int) -> Decision:
        self.asked.append((ids.tolist(), once.tolist(), epoch, seed))
        return Decision(ids.argsort(descending=True), min(self.count, len(ids)))


@pytest.fixture(autouse=True)
def _bounded(monkeypatch):
    """A shuffle buffer that small sets fill and leave; and no test that hangs."""
    monkeypatch.setattr(shuffle, "BUFFER_SIZE", 7)
    monkeypatch.setattr(shuffle, "_INITIAL", 3)
    with within(120):
        yield


def choosing(folder, bad=None, world=None, count=M, **flags):
    data = load(data_config(train_data=pattern(folder, bad), batch_size=N, record=True, **flags), world, SIZES)
    data.stream.preselector = Best(count)
    return data


def pattern(folder, bad):
    if not (folder / "train-000.tar").exists():
        make_shards(folder, SIZES, bad)
    return str(folder / "train-{000..004}.tar")


def test_a_batch_holds_what_is_wanted_and_names_the_others(tmp_path):
    data = choosing(tmp_path)
    batches = take(data, 0)
    asked = data.stream.preselector.asked
    assert len(batches) == SAMPLES // N
    for batch, (ids, once, epoch, _) in zip(batches, asked, strict=True):
        assert batch.sample_id.tolist() == sorted(ids, reverse=True)[:M]
        assert sorted([*batch.sample_id.tolist(), *batch.undecoded_ids.tolist()]) == sorted(ids)
        assert (len(batch), batch.num_candidates) == (M, N)
        assert batch.text[:, 0].tolist() == batch.sample_id.tolist()
        assert len(batch.image) == len(batch.key) == M
        assert (all(once), epoch) == (True, 0)
    assert sorted(sample for ids, *_ in asked for sample in ids) == list(range(SAMPLES))
    assert len({seed for *_, seed in asked}) == len(asked)


def test_only_what_is_wanted_is_decoded(tmp_path, monkeypatch):
    decoded = []
    real = pixels.ImageReader.__call__

    def count(self, files):
        decoded.append(None)
        return real(self, files)

    monkeypatch.setattr(pixels.ImageReader, "__call__", count)
    take(choosing(tmp_path), 0)
    assert len(decoded) == SAMPLES // N * M


def test_the_next_best_stands_in_for_a_broken_sample(tmp_path):
    data = choosing(tmp_path, BAD)
    batches = take(data, 0)
    assert [len(batch) for batch in batches] == [M] * len(batches)
    found = set()
    for batch, (ids, *_) in zip(batches, data.stream.preselector.asked, strict=True):
        good = [sample for sample in sorted(ids, reverse=True) if sample not in BAD]
        assert batch.sample_id.tolist() == good[:M]
        found |= {sample for sample in ids if sample in BAD and sample > good[M - 1]}
    assert found
    assert sum(data.skip_counts().values()) == len(found)  # of the others nothing is known


def test_broken_samples_beyond_a_whole_batch_are_made_up_for(tmp_path):
    bad = {number: {"png": b"no"} for number in range(9, SAMPLES)}
    data = choosing(tmp_path, bad, count=4)
    batches = take(data, 0)
    assert [len(batch) for batch in batches] == [4] * len(batches)
    assert set(ids_of(batches)) <= set(range(9))
    assert data.skip_counts()["bad_image"] == len(bad)


def test_where_all_are_broken_the_run_ends(tmp_path):
    data = choosing(tmp_path, {number: {"png": b"no"} for number in range(SAMPLES)})
    with pytest.raises(Exception, match="no usable image-caption pair"):
        take(data, 0)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("bad", [None, BAD], ids=["whole", "broken"])
def test_after_every_batch_the_rest_comes_as_it_would_have(tmp_path, workers, world_size, bad):
    def ranks():
        return [choosing(tmp_path, bad, world, workers=workers) for world in worlds(world_size)]

    whole = ranks()
    expected = [take(data, 1) for data in whole]
    for done in range(len(expected[0]) + 1):
        stopped, again = ranks(), ranks()
        before = [take(data, 1, done) for data in stopped]
        state = states(stopped)[0]
        for rank, data in enumerate(again):
            assert data.resume(state, 1) is None
            assert same([*before[rank], *take(data, 1)], expected[rank])
            assert data.skip_counts() == whole[rank].skip_counts()


def test_what_was_passed_over_counts_as_seen(tmp_path):
    data = choosing(tmp_path)
    for number, _ in enumerate(passing(data, 0), 1):
        assert count_set(data._visits) == N * number
    stopped = choosing(tmp_path)
    take(stopped, 0, 4)
    other = choosing(tmp_path, workers=2)
    told = other.resume(reload(stopped.state_dict()), 0)
    assert f"the {SAMPLES - 4 * N} samples not yet seen" in told
    take(other, 0)
    seen = [sample for ids, *_ in stopped.stream.preselector.asked for sample in ids]
    rest = [sample for ids, *_ in other.stream.preselector.asked for sample in ids]
    assert sorted({*seen, *rest}) == list(range(SAMPLES))
    assert not set(seen) & set(rest)


@pytest.mark.parametrize("table", [False, True])
@pytest.mark.parametrize(("world_size", "workers", "batch_size"), [(1, 0, 8), (2, 2, 7), (2, 1, 40)])
def test_what_fills_up_the_epoch_is_named_as_coming_twice(tmp_path, world_size, workers, batch_size, table):
    """Both times, since ranks and shuffle buffers may turn their order round."""
    flags = {"batch_size": batch_size, "workers": workers}
    data = (
        {"dataset_type": "synthetic", "train_num_samples": SAMPLES}
        if table
        else {"train_data": pattern(tmp_path, None)}
    )
    times, onces = Counter(), Counter()
    for world in worlds(world_size):
        rank = load(data_config(**data, **flags), world, None if table else SIZES)
        rank.stream.preselector = Best()
        take(rank, 0)
        for ids, once, *_ in rank.stream.preselector.asked:
            times.update(ids)
            onces.update(sample for sample, alone in zip(ids, once, strict=True) if alone)
    assert set(times) == set(range(SAMPLES))
    assert dict(onces) == {sample: 1 for sample, count in times.items() if count == 1}


@pytest.mark.parametrize("workers", [1, 2])
def test_real_workers_choose_the_same(tmp_path, workers):
    data, real = choosing(tmp_path, workers=workers), choosing(tmp_path, workers=workers)
    assert same(take(real, 2, real=True), take(data, 2))


def test_files_of_a_table_are_read_only_where_they_are_wanted(tmp_path, monkeypatch):
    lines = ["filepath\ttitle"]
    for row in range(2 * N):
        (tmp_path / f"{row}.png").write_bytes(image_bytes(row))
        lines.append(f"{tmp_path}/{row}.png\tsample {row}")
    (tmp_path / "pairs.csv").write_text("\n".join(lines) + "\n")
    read = []
    real = csv.read_file
    monkeypatch.setattr(csv, "read_file", lambda path: (read.append(path), real(path))[1])
    data = load(data_config(train_data=str(tmp_path / "pairs.csv"), batch_size=N))
    data.stream.preselector = Best()
    batches = take(data, 0)
    assert len(read) == len(ids_of(batches)) == 2 * M
    assert [batch.text[:, 0].tolist() for batch in batches] == [batch.sample_id.tolist() for batch in batches]
