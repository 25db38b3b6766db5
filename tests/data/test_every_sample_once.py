"""Within an epoch every sample is seen once, up to the documented rounding, however ranks, workers and shards are."""

from collections import Counter
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loading import ids_of, load, take, within
from processes import run_on_ranks
from runs import arguments, selection
from shards_util import data_config, make_shards, write_json

from dissect_clip.cli import training_run
from dissect_clip.config.parser import parse_args
from dissect_clip.data.sampling.workers import count_batches
from dissect_clip.distributed.world import World
from dissect_clip.selection import STRATEGIES
from dissect_clip.selection.strategy import kept
from dissect_clip.training.epoch import train_epoch
from dissect_clip.training.step import TrainState

SHARDS = {
    "one": [23],
    "fewer": [19, 22, 7],
    "equal": [5] * 8,
    "more": [3] * 19,
    "uneven": [0, 1, 17, 2, 9, 0, 1, 6],
}


@pytest.fixture(autouse=True)
def _bounded(request):
    """No test hangs; those with several processes are bounded by what runs them."""
    with within(0 if request.node.get_closest_marker("dist") else 120):
        yield


@pytest.fixture(scope="module")
def pattern(tmp_path_factory):
    """Shards by the name of their kind."""
    return {kind: make_shards(tmp_path_factory.mktemp(kind), sizes) for kind, sizes in SHARDS.items()}


def ranks_of(pattern, sizes, world_size, **flags):
    config = data_config(train_data=pattern, record=True, **flags)
    return [load(config, World(rank=rank, size=world_size), sizes) for rank in range(world_size)]


def check_belonging(batches):
    """Keys and captions were made from the ids that the samples should have."""
    for batch in batches:
        keys = [int(bytes(key.tolist()).rstrip(b"\0")) for key in batch.key]
        assert batch.sample_id.tolist() == keys == batch.text[:, 0].tolist()


def check_epoch(ranks, epochs, num_samples):
    """The batches of all ranks [rank][batch] in one epoch."""
    config, world_size = ranks[0].stream.config, len(ranks)
    assert {len(batches) for batches in epochs} == {ranks[0].num_batches}
    assert {len(batch) for batches in epochs for batch in batches} <= {config.training.batch_size}
    counts = Counter(ids_of(list(chain(*epochs))))
    step = config.training.batch_size * config.training.accum_freq * world_size
    assert set(counts) == set(range(num_samples))
    assert sum(counts.values()) == -(-num_samples // step) * step
    assert max(counts.values()) <= -(-sum(counts.values()) // num_samples)
    for batches in epochs:
        check_belonging(batches)


@pytest.mark.parametrize("kind", SHARDS)
@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_sample_once(pattern, world_size, workers, kind):
    sizes = SHARDS[kind]
    ranks = ranks_of(pattern[kind], sizes, world_size, workers=workers, batch_size=3)
    orders = set()
    for epoch in range(3):
        epochs = [take(data, epoch, real=True) for data in ranks]
        check_epoch(ranks, epochs, sum(sizes))
        assert all(sum(data.skip_counts().values()) == 0 for data in ranks)
        orders.add(tuple(ids_of(list(chain(*epochs)))))
    assert len(orders) == 3


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(sorted(SHARDS)),
    world_size=st.integers(1, 6),
    workers=st.integers(0, 4),
    batch_size=st.integers(1, 9),
    accum_freq=st.integers(1, 3),
    seed=st.integers(0, 3),
    epoch=st.integers(0, 2),
)
def test_every_sample_once_in_any_layout(pattern, kind, world_size, workers, batch_size, accum_freq, seed, epoch):
    flags = {"workers": workers, "batch_size": batch_size, "accum_freq": accum_freq, "seed": seed}
    ranks = ranks_of(pattern[kind], SHARDS[kind], world_size, **flags)
    check_epoch(ranks, [take(data, epoch) for data in ranks], sum(SHARDS[kind]))


@pytest.mark.parametrize(("world_size", "workers"), [(1, 2), (4, 2), (3, 0)])
def test_bad_samples_are_counted_once(tmp_path, world_size, workers):
    """Also those that come a second time to fill the epoch up, and where workers run short."""
    bad = {number: {"png": b"no"} if number % 2 else {"txt": None} for number in (0, 3, 4, 11, 18, 21)}
    ranks = ranks_of(make_shards(tmp_path, [9, 1, 13], bad), [9, 1, 13], world_size, workers=workers, batch_size=4)
    for epoch in range(2):
        batches = list(chain(*(take(data, epoch) for data in ranks)))
        counts = sum((Counter(data.skip_counts()) for data in ranks), Counter())
        assert {kind: count for kind, count in counts.items() if count} == {"no_caption": 3, "bad_image": 3}
        assert set(ids_of(batches)) == set(range(23)) - set(bad)
        check_belonging(batches)


# ---- whole runs


RUNS: dict[str, dict[str, Any]] = {
    "one-shard": {"shards": [23], "batch_size": 3},
    "uneven": {"shards": [0, 1, 17, 2, 9, 0, 1, 6], "batch_size": 3, "accum_freq": 2, "workers": 1},
    "batches-of-one": {"shards": [5, 9], "batch_size": 1},
    "one-kept": {"shards": [19, 22, 7], "batch_size": 8, "select_rate": 0.01},
}


def _runs(world: World, folder: str, names: list[str]) -> dict[str, list[tuple[int, int]]]:
    """Train with a strategy that remembers; after each epoch the ranks compare their stores. Seen and trained samples.

    With --batch-size 1 or a small --select-rate a single pair of each batch is kept.
    """
    counts: dict[str, list[tuple[int, int]]] = {}
    name = ""

    def compare(state: TrainState, *rest: Any) -> str | None:
        signal = train_epoch(state, *rest)
        assert state.selection is not None
        stores = world.all_gather(state.selection.store.scores[None])
        assert all(torch.equal(stores[0], store) for store in stores), f"{name}: the stores differ, or lack a sample"
        counts[name].append((state.counters.seen, state.counters.trained))
        return signal

    training_run.train_epoch = compare  # type: ignore[attr-defined]
    for name in names:
        counts[name] = []
        flags = {flag: value for flag, value in RUNS[name].items() if flag != "shards"}
        data = f"{folder}/{name}/train-{{000..{len(RUNS[name]['shards']) - 1:03d}}}.tar"
        words = arguments(Path(folder), data, name, epochs=2, **selection("historical_base_sampling") | flags)
        training_run.run(parse_args(words, STRATEGIES), world)
    return counts


@pytest.mark.dist
@pytest.mark.parametrize(("world_size", "names"), [(2, ["uneven"]), (4, list(RUNS))])
def test_the_stores_of_all_ranks_stay_equal(tmp_path, world_size, names):
    for name in names:
        sizes = RUNS[name]["shards"]
        make_shards(tmp_path / name, sizes)
        write_json(tmp_path / name / "sizes.json", {f"train-{place:03d}.tar": n for place, n in enumerate(sizes)})
    answers = run_on_ranks(world_size, _runs, str(tmp_path), names)
    for name in names:
        run = RUNS[name]
        batches = (
            count_batches(sum(run["shards"]), run["batch_size"], world_size, run.get("accum_freq", 1)) * world_size
        )
        chosen = kept(run.get("select_rate", 0.3), run["batch_size"])
        expected = [(epochs * batches * run["batch_size"], epochs * batches * chosen) for epochs in (1, 2)]
        assert [answer[name] for answer in answers] == [expected] * world_size
