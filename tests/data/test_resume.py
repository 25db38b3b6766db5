"""Going on inside an epoch: the batches that would have come, or in another layout each sample that was not seen."""

import os
import subprocess
import sys
from collections import Counter
from itertools import chain

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from loading import ids_of, load, passing, reload, same, states, take, within, worlds
from processes import run_on_ranks
from shards_util import data_config, image_bytes, make_shards

from dissect_clip.data.formats import pixels
from dissect_clip.data.formats.tar import ShardReader
from dissect_clip.data.sampling import shuffle
from dissect_clip.data.sampling.bitmap import count_set, empty_bitmap, set_bits, unset_positions
from dissect_clip.data.sampling.plan import RemainderPlan, SpanPlan
from dissect_clip.data.sampling.progress import WorkerProgress, pack_all, unpack_all
from dissect_clip.data.sampling.workers import WorkerInfo, count_batches
from dissect_clip.data.skips import unpack_rows

BAD = {3: {"png": b"no"}, 7: {"txt": None}, 12: {"png": None}, 13: {"png": b"no"}, 20: {"txt": b"\xff"}}
SIZES = [9, 5, 1, 8, 7]


@pytest.fixture(autouse=True)
def _bounded(monkeypatch, request):
    """A shuffle buffer that small sets fill and leave; and no test that hangs."""
    monkeypatch.setattr(shuffle, "BUFFER_SIZE", 7)
    monkeypatch.setattr(shuffle, "_INITIAL", 3)
    with within(0 if request.node.get_closest_marker("dist") else 120):
        yield


def cut_off(folder, place, samples):
    """Damage a shard in the image of the sample after so many."""
    path = folder / f"train-{place:03d}.tar"
    path.write_bytes(path.read_bytes()[: 2048 * samples + 600])


def table(folder, bad):
    lines = ["filepath\ttitle"]
    for row in range(22):
        (folder / f"{row}.png").write_bytes(b"no" if row in bad else image_bytes(row))
        lines.append(f"{folder}/{row}.png\tsample {row}")
    for row in list(bad)[:1]:
        (folder / f"{row}.png").unlink()
    (folder / "pairs.csv").write_text("\n".join(lines) + "\n")
    return str(folder / "pairs.csv")


def plan(name, folder):
    """Settings of every kind of epoch, and recorded sizes of its shards."""
    common = {"batch_size": 2, "record": True}
    if name == "spans":
        return {"train_data": make_shards(folder, SIZES), **common}, SIZES
    if name == "spans with bad samples":
        return {"train_data": make_shards(folder, SIZES, BAD), **common}, SIZES
    if name == "spans with damaged shards":
        pattern = make_shards(folder, SIZES, BAD)
        cut_off(folder, 0, 6)
        (folder / "train-002.tar").unlink()
        return {"train_data": pattern, **common}, [9, 7, 1, 6, 7]  # one has fewer samples, one has more
    if name == "unknown sizes":
        pattern = make_shards(folder, SIZES, BAD)
        cut_off(folder, 3, 4)
        return {"train_data": pattern, "train_num_samples": 40, **common}, []
    if name == "draws":
        flags = {"dataset_resampled": True, "train_num_samples": 40, **common}
        return {"train_data": make_shards(folder, SIZES, BAD), **flags}, SIZES
    if name == "draws of unknown sizes":
        pattern = make_shards(folder, SIZES, BAD)
        cut_off(folder, 3, 4)
        return {"train_data": pattern, "dataset_resampled": True, "train_num_samples": 40, **common}, []
    if name == "table":
        return {"train_data": table(folder, (2, 9, 10)), **common}, None
    assert name == "synthetic"
    return {"dataset_type": "synthetic", "train_num_samples": 22, **common}, None


PLANS = [
    "spans", "spans with bad samples", "spans with damaged shards", "unknown sizes", "draws", "draws of unknown sizes",
    "table", "synthetic",
]  # fmt: skip


@pytest.mark.parametrize(("world_size", "workers"), [(1, 0), (2, 2)])
@pytest.mark.parametrize("name", PLANS)
def test_after_every_batch_the_rest_comes_as_it_would_have(tmp_path, name, world_size, workers):
    flags, sizes = plan(name, tmp_path)
    config = data_config(**flags, workers=workers)

    def ranks():
        return [load(config, world, sizes) for world in worlds(world_size)]

    whole = ranks()
    notes = [[(data.skip_counts(), data.drain_skips()) for _ in passing(data, 1)] for data in whole]
    end = states(whole)[0]
    for done in range(whole[0].num_batches + 1):
        stopped = ranks()
        before = [take(data, 1, done) for data in stopped]
        state, again = states(stopped)[0], ranks()
        assert [data.resume(state, 1) for data in again] == [None] * world_size
        assert [data.remaining_batches for data in again] == [data.num_batches - done for data in again]
        for rank, data in enumerate(again):
            assert data.skip_counts() == (notes[rank][done - 1][0] if done else dict.fromkeys(data.skip_counts(), 0))
            after = take(data, 1)
            assert same([*before[rank], *after], take(whole[rank], 1))
            assert data.skip_counts() == notes[rank][-1][0]
            told = [row for _, packed in notes[rank][done:] for row in unpack_rows(packed)]
            assert unpack_rows(data.drain_skips()) == told
        assert same(states(again)[0], end)


def test_bad_samples_and_damage_are_in_the_plans(tmp_path):
    """What the test above is meant to meet: every kind of loss, and workers that run short."""
    flags, sizes = plan("spans with damaged shards", tmp_path)
    data = load(data_config(**flags), sizes=sizes)
    take(data, 1)
    met = {kind for kind, count in data.skip_counts().items() if count}
    assert met >= {"damaged_shard", "unreadable_shard", "below_recorded_size", "beyond_recorded_size", "bad_image"}
    assert unpack_all(data.state_dict()["workers"])[0].attempt > 0


def test_a_second_stop_in_the_same_epoch(tmp_path):
    flags, sizes = plan("spans with bad samples", tmp_path)
    config = data_config(**flags, workers=2)
    expected = take(load(config, sizes=sizes), 0)
    state, got = load(config, sizes=sizes).state_dict(), []
    while len(got) < len(expected):
        data = load(config, sizes=sizes)
        assert data.resume(reload(state), 0) is None
        got += take(data, 0, 3)
        state = data.state_dict()
    assert same(got, expected)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_torchs_loader_goes_on_with_the_worker_whose_turn_it_is(tmp_path, workers):
    flags, sizes = plan("spans with bad samples", tmp_path)
    config = data_config(**flags, workers=workers)
    whole = load(config, sizes=sizes)
    expected, following = take(whole, 0, real=True), take(whole, 1, real=True)
    for done in (1, 4) if workers else (3,):
        stopped = load(config, sizes=sizes)
        before = take(stopped, 0, done, real=True)
        data = load(config, sizes=sizes)
        data.resume(stopped.state_dict(), 0)
        assert same([*before, *take(data, 0, real=True)], expected)
        assert same(take(data, 1, real=True), following)
        assert data.remaining_batches == data.num_batches
        assert same(take(data, 0, 1), [expected[done]])


def test_loading_in_the_training_process_goes_on_in_one_worker(tmp_path):
    flags, sizes = plan("spans", tmp_path)
    stopped, data = (load(data_config(**flags, workers=workers), sizes=sizes) for workers in (0, 1))
    before = take(stopped, 0, 4)
    assert data.resume(stopped.state_dict(), 0) is None
    assert same([*before, *take(data, 0)], take(load(data_config(**flags), sizes=sizes), 0))


@pytest.mark.parametrize("name", ["spans", "unknown sizes", "draws"])
def test_what_is_skipped_is_neither_decoded_nor_read(tmp_path, name, monkeypatch):
    flags, sizes = plan(name, tmp_path)
    decoded, read = [], []
    decode, reader_read = pixels.decode_image, ShardReader.read

    def count(files):
        decoded.append(None)
        return decode(files)

    def note(self, keep):
        for sample in reader_read(self, keep):
            read.append(sample.key)
            yield sample

    monkeypatch.setattr(pixels, "decode_image", count)
    monkeypatch.setattr(ShardReader, "read", note)
    config = data_config(**flags)
    stopped = load(config, sizes=sizes)
    take(stopped, 0, 15)
    before = len(decoded)
    take(load(config, sizes=sizes), 0)
    rest = len(decoded) - 2 * before
    decoded.clear(), read.clear()
    data = load(config, sizes=sizes)
    data.resume(stopped.state_dict(), 0)
    batches = take(data, 0)
    assert len(decoded) == rest
    keys = Counter(bytes(key.tolist()).rstrip(b"\0").decode() for batch in batches for key in batch.key)
    assert not keys - Counter(read)
    assert len(read) <= rest + 2 + 7  # those without a caption, and what waits in the buffer at the end


def test_a_replay_warns_of_nothing(tmp_path, caplog):
    flags, sizes = plan("spans with damaged shards", tmp_path)
    config = data_config(**flags)
    stopped = load(config, sizes=sizes)
    take(stopped, 0, stopped.num_batches - 1)
    caplog.clear()
    data = load(config, sizes=sizes)
    data.resume(stopped.state_dict(), 0)
    take(data, 0)
    assert caplog.text == ""
    assert data.skip_counts() == stopped.skip_counts()


def test_samples_that_are_gone_since_are_counted(tmp_path):
    """Also those that waited in the buffer, and are read a second time."""
    config = data_config(train_data=make_shards(tmp_path, [12, 12]), batch_size=2)
    stopped = load(config, sizes=[12, 12])
    seen = set(ids_of(take(stopped, 0, 3)))
    data = load(config, sizes=[12, 12])
    data.resume(stopped.state_dict(), 0)
    for path in tmp_path.glob("*.tar"):
        path.write_bytes(path.read_bytes()[: 2048 * 9])
    batches = take(data, 0)
    gone = {9, 10, 11, 21, 22, 23}
    assert len(batches) == 9
    assert seen | set(ids_of(batches)) == set(range(24)) - (gone - seen)
    assert data.skip_counts() == dict.fromkeys(data.skip_counts(), 0) | {"below_recorded_size": len(gone - seen)}


def test_workers_without_a_batch_yet_begin_at_their_beginning(tmp_path):
    flags, sizes = plan("draws", tmp_path)
    config = data_config(**flags, workers=4)
    stopped = load(config, sizes=sizes)
    take(stopped, 0, 2)
    assert [row.batches for row in unpack_all(stopped.state_dict()["workers"])] == [1, 1, 0, 0]


LIVE_AT_EXIT = """
from loading import load
from shards_util import data_config
data = load(data_config(train_data={pattern!r}, workers=1, batch_size=2), sizes=[9])
batches = iter(data.loader)
next(batches)
raise SystemExit(5)
"""


def test_workers_end_with_a_process_that_stops_inside_an_epoch(tmp_path):
    script = LIVE_AT_EXIT.format(pattern=make_shards(tmp_path, [9]))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    assert subprocess.run([sys.executable, "-c", script], env=environment, timeout=100, check=False).returncode == 5


# ---- another layout


LAYOUTS = st.fixed_dictionaries(
    {
        "world_size": st.sampled_from([1, 2, 3]),
        "workers": st.sampled_from([0, 2, 3]),
        "batch_size": st.sampled_from([1, 2, 5]),
        "accum_freq": st.sampled_from([1, 2]),
    }
)


def ranks_of(layout, pattern, sizes, **extra):
    flags = {name: value for name, value in layout.items() if name != "world_size"}
    config = data_config(train_data=pattern, **flags, **extra)
    return [load(config, world, sizes) for world in worlds(layout["world_size"])]


def pairs_per_step(layout):
    return layout["world_size"] * layout["batch_size"] * layout["accum_freq"]


def check_rest(seen, rest, num_samples, layout):
    """What was left comes once, but for what fills up the last step."""
    left = num_samples - len(seen)
    assert set(rest) == set(range(num_samples)) - seen
    assert len(rest) == -(-left // pairs_per_step(layout)) * pairs_per_step(layout)
    assert max(Counter(rest).values(), default=0) <= -(-len(rest) // max(1, left))


SHARDS = [0, 9, 5, 1, 8, 7]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("shards"), SHARDS)


# Each example makes its own loaders; the fixtures hold nothing that it changes.
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(before=LAYOUTS, after=LAYOUTS, last=LAYOUTS, taken=st.floats(0, 1), more=st.floats(0, 1), seed=st.integers(0, 9))
def test_in_another_layout_no_sample_comes_twice_and_none_is_left_out(shards, before, after, last, taken, more, seed):
    """Stopped twice, the second time inside the rest, and gone on from there as it was and in a third layout."""
    first = ranks_of(before, shards, SHARDS, seed=seed)
    steps = int(taken * first[0].num_batches / before["accum_freq"]) * before["accum_freq"]
    seen = set(ids_of(list(chain(*(take(data, 2, steps) for data in first)))))
    state = states(first)[0]
    assert count_set(state["visited"].numpy()) == len(seen)

    def second():
        ranks = ranks_of(after, shards, SHARDS, seed=seed)
        told = {data.resume(state, 2) for data in ranks}
        assert len(told) == 1
        return ranks, told.pop()

    ranks, told = second()
    assert len({data.remaining_batches for data in ranks}) == 1
    if told is None:
        return  # the same layout
    num_samples = sum(SHARDS)
    assert f"the {num_samples - len(seen)} samples not yet seen" in told
    whole = [take(data, 2) for data in ranks]
    check_rest(seen, ids_of(list(chain(*whole))), num_samples, after)

    ranks, _ = second()
    steps = int(more * ranks[0].remaining_batches / after["accum_freq"]) * after["accum_freq"]
    seen |= set(ids_of(list(chain(*(take(data, 2, steps) for data in ranks)))))
    state = states(ranks)[0]
    again = ranks_of(after, shards, SHARDS, seed=seed)
    assert [data.resume(state, 2) for data in again] == [None] * len(again)
    assert all(same(take(data, 2), batches[steps:]) for data, batches in zip(again, whole, strict=True))

    third = ranks_of(last, shards, SHARDS, seed=seed)
    if third[0].resume(state, 2) is not None:
        for data in third[1:]:
            data.resume(state, 2)
        check_rest(seen, ids_of(list(chain(*(take(data, 2) for data in third)))), num_samples, last)


BEFORE = {"world_size": 2, "workers": 2, "batch_size": 2, "accum_freq": 1}
AFTER = {"world_size": 1, "workers": 3, "batch_size": 3, "accum_freq": 2}


def resumed(tmp_path, name, taken, before=BEFORE, after=AFTER):
    """Ranks stopped in one layout, and resumed in another, with the sentence; and what was seen."""
    flags, sizes = plan(name, tmp_path)
    pattern = flags.pop("train_data", None)
    del flags["batch_size"]
    stopped = ranks_of(before, pattern, sizes, **flags)
    seen = ids_of(list(chain(*(take(data, 0, taken) for data in stopped))))
    state, ranks = states(stopped)[0], ranks_of(after, pattern, sizes, **flags)
    (told,) = {data.resume(state, 0) for data in ranks}
    return ranks, told, seen


@pytest.mark.parametrize("name", ["spans with bad samples", "spans with damaged shards", "table"])
@pytest.mark.parametrize("taken", [0, 1, 2, 3, 4])
def test_bad_samples_are_met_and_counted_again(tmp_path, name, taken):
    (data,), told, seen = resumed(tmp_path, name, taken)
    batches = take(data, 0)
    whole = load(data.stream.config, sizes=plan(name, tmp_path)[1])
    good = set(ids_of(take(whole, 0)))
    assert len(batches) == data.remaining_batches
    assert set(seen) | set(ids_of(batches)) == good
    assert "bad samples met before are met and counted again" in told
    # Where the last samples of a shard were seen, what is behind them is not met again.
    assert data.skip_counts() | {"beyond_recorded_size": 0} == whole.skip_counts() | {"beyond_recorded_size": 0}


@pytest.mark.parametrize("name", ["spans with bad samples", "table"])
def test_bad_samples_alone_are_no_end_of_the_run(tmp_path, name):
    """Where only they are left, the last step is filled up with samples of the whole epoch."""
    flags, sizes = plan(name, tmp_path)
    config = data_config(**flags)
    stopped = load(config, sizes=sizes)
    take(stopped, 0, stopped.num_batches - 1)
    state = stopped.state_dict()
    good = set(ids_of(take(load(config, sizes=sizes), 0)))
    set_bits(state["visited"].numpy(), np.array(sorted(good)))
    data = load(data_config(**{**flags, "batch_size": 3}), sizes=sizes)
    data.resume(reload(state), 0)
    batches = take(data, 0)
    assert len(batches) == data.remaining_batches == -(-(stopped.num_samples - len(good)) // 3)
    assert set(ids_of(batches)) <= good


@pytest.mark.parametrize("real", [False, True])
def test_nothing_is_left_of_an_epoch_whose_samples_were_all_seen(tmp_path, real):
    (data,), _, seen = resumed(tmp_path, "spans", 8, after=BEFORE | {"world_size": 1, "batch_size": 5})
    assert set(seen) == set(range(30))
    assert data.remaining_batches == 0
    assert take(data, 0, real=real) == []
    assert len(take(data, 1, real=real)) == data.num_batches == 6


def test_augmentation_is_drawn_anew_in_another_layout(tmp_path):
    """The seeds are of batches that no worker has made."""
    (data,), _, _ = resumed(tmp_path, "spans", 3)
    assert data.state_dict()["first"] == 3
    assert data.stream.epoch_pass(0).first_batch == 3
    assert data.stream.epoch_pass(1).first_batch == 0


def test_draws_go_on_with_other_draws(tmp_path):
    ranks, told, _ = resumed(tmp_path, "draws", 4, after=BEFORE | {"batch_size": 3})
    assert "its last 24 samples are other draws" in told
    assert "--batch-size is 3, was 2" in told
    assert [len(take(data, 0)) for data in ranks] == [4, 4]
    rows = unpack_all(states(ranks)[0]["workers"])
    begun = {data.stream.epoch_pass(0).start[0].attempt for data in ranks}
    assert len(begun) == 1
    assert min(row.attempt for row in rows) >= begun.pop() > 0


def test_counts_of_bad_samples_go_on_with_other_draws(tmp_path):
    flags, sizes = plan("draws", tmp_path)
    stopped, ranks = ([load(data_config(**flags), world, sizes) for world in worlds(count)] for count in (3, 2))
    for data in stopped:
        take(data, 0, 5)
    before = Counter()
    for data in stopped:
        before.update(data.skip_counts())
    state = states(stopped)[0]
    for data in ranks:
        data.resume(state, 0)
        assert not data.recounts_skips
    assert before.total() > 0
    assert Counter(ranks[0].skip_counts()) == before
    assert not any(ranks[1].skip_counts().values())
    take(ranks[0], 0)
    new = Counter(row.kind for row in unpack_rows(ranks[0].drain_skips()))
    assert sum(ranks[0].skip_counts().values()) == before.total() + new.total()


def test_an_epoch_of_unknown_sizes_begins_again(tmp_path):
    (data,), told, seen = resumed(tmp_path, "unknown sizes", 4)
    assert f"restarts and repeats {len(seen)} samples" in told
    assert "world size is 1, was 2" in told
    assert data.remaining_batches == data.num_batches == len(take(data, 0))
    assert data.recounts_skips  # else skipped.parquet would name those twice that were met before
    take(whole := load(data.stream.config, sizes=[]), 0)
    assert data.skip_counts() == whole.skip_counts()


def test_samples_that_were_drawn_are_not_told_apart_later(tmp_path):
    flags, sizes = plan("draws", tmp_path)
    stopped = load(data_config(**flags), sizes=sizes)
    take(stopped, 0, 3)
    data = load(data_config(train_data=flags["train_data"], batch_size=2), sizes=sizes)
    told = data.resume(stopped.state_dict(), 0)
    assert "an epoch is every sample once, was shards drawn with replacement" in told
    assert "restarts" in told
    assert set(ids_of(take(data, 0))) >= set(range(30)) - set(BAD)


def _stop_and_go_on(world, pattern):
    """Two ranks stop; their states agree, and each goes on."""
    config = data_config(train_data=pattern, batch_size=2)
    data = load(config, world, [11, 10])
    before = take(data, 0, 3)
    state = reload(data.state_dict())
    again = load(config, world, [11, 10])
    assert again.resume(state, 0) is None
    after = take(again, 0)
    assert same([*before, *after], take(load(config, world, [11, 10]), 0))
    assert same(again.state_dict()["left_out"], None)
    return ids_of(before), state["visited"].tolist(), state["workers"].tolist(), ids_of(after)


@pytest.mark.dist
def test_real_ranks_bring_together_what_they_have_seen(tmp_path):
    results = run_on_ranks(2, _stop_and_go_on, make_shards(tmp_path, [11, 10]))
    before, visited, workers, after = zip(*results, strict=True)
    assert visited[0] == visited[1]
    assert workers[0] == workers[1]
    seen = set(chain(*before))
    assert set(unset_positions(np.array(visited[0], np.uint8), 0, 21).tolist()) == set(range(21)) - seen
    assert seen | set(chain(*after)) == set(range(21))


# ---- parts


@given(st.lists(st.integers(0, 99), max_size=40), st.integers(0, 100), st.integers(0, 100))
def test_bits_are_a_set(ids, first, last):
    bits = empty_bitmap(100)
    set_bits(bits, np.array(ids, np.int64))
    assert count_set(bits) == len(set(ids))
    first, last = min(first, last), max(first, last)
    assert (first + unset_positions(bits, first, last)).tolist() == [i for i in range(first, last) if i not in ids]


def test_progress_is_numbers():
    rows = [WorkerProgress(0), WorkerProgress(1, 2, 30, 4, (5, 0), (60, 1, 7, 3, 2)), WorkerProgress(2, counts=(1,))]
    assert unpack_all(pack_all(rows)) == rows
    assert pack_all(rows).dtype.itemsize == 8


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 12), min_size=1, max_size=6).filter(any),
    st.sets(st.integers(0, 71)),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 4),
)
def test_a_rest_is_laid_out_once(sizes, visited, world_size, workers, batch_size):
    sizes = np.array(sizes)
    ids = np.array(sorted(i for i in visited if i < sizes.sum()), np.int64)
    left = int(sizes.sum()) - len(ids)
    if left == 0:
        return
    bits = empty_bitmap(int(sizes.sum()))
    set_bits(bits, ids)
    num_batches = count_batches(left, batch_size, world_size)
    whole = SpanPlan(sizes, count_batches(int(sizes.sum()), batch_size, world_size), batch_size, 0)
    rest = RemainderPlan(whole, bits, num_batches)
    offsets = np.cumsum(sizes) - sizes
    places = [WorkerInfo(rank, world_size, worker, workers) for rank in range(world_size) for worker in range(workers)]
    parts = chain(*(rest.slices(place, 3, 0) for place in places))
    read = Counter(int(offsets[part.shard]) + ordinal for part in parts for ordinal in part.ordinals)
    assert set(read) == set(range(sizes.sum())) - set(ids.tolist())
    assert sum(read.values()) == num_batches * batch_size * world_size
    assert max(read.values()) - min(read.values()) <= 1
    assert rest.slices(places[0], 3, 1) == whole.slices(places[0], 3, 1)
