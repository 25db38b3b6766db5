"""Decoys: which they are, what caption they get, and that all ranks come to know it."""

import dataclasses

import pytest
import torch
from processes import run_on_ranks

from dissect_clip.data.batch import Batch
from dissect_clip.distributed.world import World
from dissect_clip.selection.strategies.clean_posterior.decoys import MOST, Decoys, decoy_ids

LENGTH = 3


def make_batch(ids: list[int], first: int = 0) -> Batch:
    """Pairs whose captions are their ids, plus ``first``, three times."""
    sample_id = torch.tensor(ids)
    text = (sample_id + first)[:, None].expand(-1, LENGTH)
    return Batch(image=torch.zeros(len(ids), 3, 2, 2), text=text, sample_id=sample_id)


def swap(decoys: Decoys, batch: Batch) -> Batch:
    return dataclasses.replace(batch, text=decoys.swap_captions(batch.sample_id, batch.text))


def captions(batch: Batch) -> list[int]:
    assert (batch.text == batch.text[:, :1]).all()
    return batch.text[:, 0].tolist()


def make_decoys(*ids: int, world: World | None = None) -> Decoys:
    return Decoys(torch.tensor(ids), world or World())


def test_ids_are_the_same_everywhere_and_others_with_another_seed():
    ids = decoy_ids(1000, 0.1, seed=3)
    assert len(ids) == 100 == len(ids.unique())
    assert ids.equal(ids.sort().values)
    assert 0 <= ids.min() <= ids.max() < 1000
    assert ids.equal(decoy_ids(1000, 0.1, seed=3))
    assert not ids.equal(decoy_ids(1000, 0.1, seed=4))


@pytest.mark.parametrize(("samples", "share", "count"), [(400_000_000, 0.02, MOST), (10, 0.02, 0), (4, 0.5, 2)])
def test_how_many_there_are(samples: int, share: float, count: int):
    assert len(decoy_ids(samples, share, seed=0)) == count


def test_a_decoy_gets_the_caption_of_the_one_before_it_and_keeps_it():
    decoys = make_decoys(4, 7, 8)
    assert decoys.captions is None
    assert captions(swap(decoys, make_batch([1, 4, 2, 3]))) == [1, 1, 2, 3]  # the first one its neighbour's
    assert captions(swap(decoys, make_batch([5, 7, 9, 4, 8]))) == [5, 4, 9, 1, 4]  # own captions are handed on
    assert captions(swap(decoys, make_batch([4, 8, 7, 6]))) == [1, 4, 4, 6]


def test_captions_go_round_among_decoys():
    ids = list(range(0, 40, 2))
    decoys = make_decoys(*ids)
    first = [captions(swap(decoys, make_batch(list(range(start, start + 10))))) for start in range(0, 40, 10)]
    wrong = [caption for batch in first for caption in batch[::2]]
    assert wrong == [9, *ids[:-1]]
    assert [caption for batch in first for caption in batch[1::2]] == list(range(1, 40, 2))


def test_the_batch_is_left_as_it_was_and_a_decoy_that_comes_twice_gets_one_caption():
    decoys = make_decoys(4)
    batch = make_batch([4, 1, 4, 2])
    once = captions(swap(decoys, batch))
    assert captions(batch) == [4, 1, 4, 2]
    assert once[1::2] == [1, 2]
    assert {once[0], once[2]} <= {1, 2}, "and not its own"
    again = captions(swap(decoys, make_batch([3, 4, 4])))
    assert again[1] == again[2]


def test_a_batch_without_decoys_stays_what_it_is():
    decoys = make_decoys(100)
    assert captions(swap(decoys, make_batch([5, 6]))) == [5, 6]
    assert captions(swap(decoys, make_batch([200, 300]))) == [200, 300]


def test_the_host_never_waits_for_the_device():
    # On this device reading a number back, as waiting does, is an error.
    meta = torch.device("meta")
    decoys = Decoys(torch.tensor([4, 7]), World(device=meta))
    for _ in range(2):
        assert swap(decoys, make_batch([1, 4, 2, 7]).to(meta)).text.device == meta
        assert decoys.among(torch.zeros(4, dtype=torch.int64, device=meta)).device == meta


def test_captions_are_taken_over():
    first, again = make_decoys(4, 7, 9), make_decoys(4, 7, 9)
    swap(first, make_batch([1, 4, 2, 7]))
    first.agree()
    assert first.captions is not None
    assert first.captions.dtype == torch.int32
    assert first.captions[:, 0].tolist() == [1, 4, -1, 7]  # the last row: the own caption to hand on
    assert again.load(first.captions, ranks=1)
    later = make_batch([4, 8, 9, 7])
    assert captions(swap(again, later)) == captions(swap(first, later)) == [1, 8, 4, 4]
    assert not make_decoys(4).load(first.captions, ranks=1)


def on_ranks(world: World) -> tuple[list[int], list[int]]:
    """Each rank meets one decoy, both a third, none the last; then the captions before and after they agree."""
    decoys = make_decoys(10, 11, 12, 13, world=world)
    decoys.agree()
    swap(decoys, make_batch([10 + world.rank, 12, 20 + world.rank], first=100 * world.rank))
    decoys.agree()
    after = decoys.captions
    assert after is not None
    assert (after == after[:, :1]).all()
    again = make_decoys(10, 11, 12, 13, world=world)
    assert again.load(after, ranks=2)
    return after[:, 0].tolist(), captions(swap(again, make_batch([1, 13])))


def saving(world: World) -> list[list[int]]:
    """What a rank makes of a decoy that both ranks meet: before, and after the run was saved in between."""
    decoys = make_decoys(10, 11, world=world)
    batch = make_batch([10 + world.rank, 11], first=100 * world.rank)
    first = captions(swap(decoys, batch))
    decoys.agree(adopt=False)
    saved = decoys.captions
    assert saved is not None
    return [first, captions(swap(decoys, batch)), saved[:, 0].tolist()]


@pytest.mark.dist
def test_saving_inside_an_epoch_changes_nothing():
    first, second = run_on_ranks(2, saving)
    assert first[0] == first[1]
    assert second[0] == second[1]
    assert first[2] == second[2] == [first[0][0], second[0][1], 11, 111]


@pytest.mark.dist
def test_ranks_agree():
    first, second = run_on_ranks(2, on_ranks)
    # Of 10, 11, 12 (rank 1 counts) and 13; then what each rank hands on.
    assert first[0] == second[0] == [20, 121, 111, -1, 12, 112]
    assert (first[1], second[1]) == ([1, 12], [1, 112])
