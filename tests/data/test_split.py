"""Who reads what: properties over many sizes."""

import random
from collections import Counter
from itertools import chain, pairwise

import numpy as np
import pytest

from dissect_clip.data.sampling.plan import (
    CyclePlan,
    ResamplingPlan,
    SpanPlan,
    cut_shards,
    draw_shards,
    share_shards,
    span_rows,
)
from dissect_clip.data.sampling.workers import WorkerInfo, count_batches, worker_batches, worker_span

GRIDS = [(1, 1), (1, 2), (2, 1), (3, 2), (4, 5)]


def places(world_size, workers):
    return [WorkerInfo(rank, world_size, worker, workers) for rank in range(world_size) for worker in range(workers)]


def cases():
    draw = random.Random(0)
    for world_size, workers in GRIDS:
        for num_shards in (1, 2, 7, 30):
            sizes = np.array([draw.choice([0, 1, 5, 40]) for _ in range(num_shards)])
            sizes[draw.randrange(num_shards)] += 3
            yield sizes, draw.choice([1, 3, 16]), world_size, workers


@pytest.mark.parametrize("num_batches", [1, 2, 5, 16])
@pytest.mark.parametrize("workers", [1, 2, 3, 7])
def test_workers_make_the_batches_that_the_loader_takes_in_turn(num_batches, workers):
    taken = Counter(number % workers for number in range(num_batches))
    assert [worker_batches(num_batches, worker, workers) for worker in range(workers)] == [
        taken[worker] for worker in range(workers)
    ]


@pytest.mark.parametrize(("world_size", "workers"), GRIDS)
@pytest.mark.parametrize("num_batches", [1, 3, 8])
def test_spans_follow_each_other(world_size, workers, num_batches):
    spans = [worker_span(num_batches, 4, place) for place in places(world_size, workers)]
    assert spans[0][0] == 0
    assert spans[-1][1] == num_batches * 4 * world_size
    assert all(before[1] == after[0] for before, after in pairwise(spans))


def samples_of(parts):
    return [(part.shard, ordinal) for part in parts for ordinal in part.ordinals]


def test_cut_shards_is_a_slice_of_the_cycle():
    draw = random.Random(1)
    for _ in range(50):
        sizes = np.array([draw.choice([0, 1, 2, 9]) for _ in range(draw.randrange(1, 6))] + [2])
        order = np.array(draw.sample(range(len(sizes)), len(sizes)))
        row = [(int(shard), ordinal) for shard in order for ordinal in range(sizes[shard])]
        first = draw.randrange(30)
        last = first + draw.randrange(30)
        assert samples_of(cut_shards(order, sizes, first, last)) == [row[i % len(row)] for i in range(first, last)]


@pytest.mark.parametrize("case", list(cases()), ids=str)
@pytest.mark.parametrize("epoch", [0, 1])
def test_an_epoch_reads_every_sample_once_and_few_twice(case, epoch):
    sizes, batch_size, world_size, workers = case
    num_samples = int(sizes.sum())
    num_batches = count_batches(num_samples, batch_size, world_size)
    plan = SpanPlan(sizes, num_batches, batch_size, seed=3)
    parts = [plan.slices(place, epoch, 0) for place in places(world_size, workers)]
    total = num_batches * batch_size * world_size
    counts = Counter(samples_of(chain(*parts)))
    assert len(counts) == num_samples
    assert sorted(samples_of(part for part in chain(*parts) if not part.is_repeat)) == sorted(counts)
    assert sum(counts.values()) == total
    assert total - num_samples < batch_size * world_size
    assert max(counts.values()) == -(-total // num_samples)


def test_epochs_and_seeds_differ_and_repeat():
    sizes = np.full(20, 10)

    def parts(seed, epoch):
        return SpanPlan(sizes, 25, 8, seed).slices(WorkerInfo(0, 1, 0, 1), epoch, 0)

    assert parts(0, 0) == parts(0, 0)
    assert parts(0, 0) != parts(0, 1)
    assert parts(0, 0) != parts(1, 0)


def test_a_later_attempt_reads_the_same_samples():
    plan, place = SpanPlan(np.array([5, 9, 4, 7]), 4, 3, seed=0), WorkerInfo(1, 2, 0, 1)
    assert sorted(samples_of(plan.slices(place, 0, 1))) == sorted(samples_of(plan.slices(place, 0, 0)))


@pytest.mark.parametrize(("world_size", "workers"), GRIDS)
def test_shards_of_unknown_size_have_one_owner_each(world_size, workers):
    plan = CyclePlan(23, seed=0)
    owned = [part.shard for place in places(world_size, workers) for part in plan.slices(place, 4, 0)]
    assert sorted(owned) == list(range(23))
    assert all(plan.slices(place, 4, 0) for place in places(world_size, workers))


def test_draws_follow_the_factors_of_the_sources():
    weights = [1.0] * 10 + [2.0] * 10  # 1::2
    drawn = Counter(draw_shards(weights, 10_000, seed=0))
    first, second = sum(drawn[i] for i in range(10)), sum(drawn[i] for i in range(10, 20))
    assert 0.8 * 2 < second / first < 1.2 * 2
    assert set(drawn) == set(range(20))


def test_a_shard_without_samples_is_never_drawn():
    plan = ResamplingPlan([1.0, 1.0, 1.0], np.array([3, 0, 2]), seed=0)
    place = WorkerInfo(0, 1, 0, 1)
    drawn = {(part.shard, len(part.ordinals)) for epoch in range(30) for part in plan.slices(place, epoch, 0)}
    assert drawn == {(0, 3), (2, 2)}  # else an attempt of nothing but such shards would end the run


def test_draws_differ_by_place_epoch_and_attempt():
    plan = ResamplingPlan([1.0] * 50, None, seed=0)
    drawn = [
        tuple(part.shard for part in plan.slices(WorkerInfo(rank, 2, worker, 2), epoch, attempt))
        for rank in (0, 1)
        for worker in (0, 1)
        for epoch in (0, 1)
        for attempt in (0, 1)
    ]
    assert len(set(drawn)) == 16
    assert plan.slices(WorkerInfo(1, 2, 1, 2), 1, 1) == plan.slices(WorkerInfo(1, 2, 1, 2), 1, 1)


@pytest.mark.parametrize("num_rows", [1, 5, 64, 100])
@pytest.mark.parametrize(("world_size", "workers"), GRIDS)
def test_rows_are_read_once_and_few_twice(num_rows, world_size, workers):
    num_batches = count_batches(num_rows, 4, world_size)
    rows = np.concatenate(
        [span_rows(num_rows, num_batches, 4, 0, 2, place)[0] for place in places(world_size, workers)]
    )
    counts = np.bincount(rows, minlength=num_rows)
    assert counts.min() >= 1
    assert counts.sum() == num_batches * 4 * world_size
    assert counts.max() - counts.min() <= 1


@pytest.mark.parametrize("num_shards", [1, 2, 3, 5, 6, 7, 13, 40])
@pytest.mark.parametrize(("world_size", "workers"), GRIDS)
def test_a_shared_set_is_read_once(num_shards, world_size, workers):
    shares = [share_shards(num_shards, place) for place in places(world_size, workers)]
    read = Counter((share.shard, o) for own in shares for share in own for o in range(30) if o in share.ordinals)
    assert read == Counter({(shard, ordinal): 1 for shard in range(num_shards) for ordinal in range(30)})
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
