"""The score store: what is written is read, on every rank, whatever the ids."""

import pytest
import torch
from processes import run_on_ranks

from dissect_clip.distributed.world import World
from dissect_clip.selection import ScoreStore
from dissect_clip.selection.store import last_occurrence


def test_new_samples_are_nan_and_not_zero():
    assert ScoreStore(3, ("a", "b"), World()).read(torch.tensor([0, 2])).isnan().all()


def test_reads_what_was_written():
    store = ScoreStore(5, ("a", "b"), World())
    store.write(torch.tensor([4, 1]), torch.tensor([[1.0, 2.0], [3.0, torch.nan]]))
    assert store.read(torch.tensor([1, 4])).nan_to_num(-1).tolist() == [[3.0, -1.0], [1.0, 2.0]]


def test_the_last_of_duplicate_ids_wins():
    store = ScoreStore(3, ("a",), World())
    store.write(torch.tensor([1, 0, 1, 1]), torch.tensor([[1.0], [2.0], [3.0], [4.0]]))
    assert store.scores[:2, 0].tolist() == [2.0, 4.0]


def test_last_occurrence_against_a_dictionary():
    ids = torch.randint(20, (200,), generator=torch.Generator().manual_seed(0))
    last = {identifier: place for place, identifier in enumerate(ids.tolist())}
    assert last_occurrence(ids).tolist() == [last[identifier] for identifier in ids.tolist()]


def test_state_goes_around():
    store, other = ScoreStore(4, ("a",), World()), ScoreStore(4, ("a",), World())
    store.write(torch.tensor([2]), torch.tensor([[7.0]]))
    other.load_state_dict(store.state_dict())
    assert torch.equal(store.scores.nan_to_num(-1), other.scores.nan_to_num(-1))


@pytest.mark.parametrize("columns", [("b",), ("a", "b")])
def test_state_of_another_kind_is_refused(columns):
    with pytest.raises(ValueError, match="do not fit"):
        ScoreStore(4, ("a",), World()).load_state_dict(ScoreStore(4, columns, World()).state_dict())


def _write_on_rank(world: World) -> list[float]:
    store = ScoreStore(6, ("a",), world)
    store.write(torch.tensor([world.rank, 5]), torch.full((2, 1), float(world.rank)))
    return store.scores[:, 0].nan_to_num(-1).tolist()


@pytest.mark.dist
def test_ranks_end_with_the_same_table_and_the_last_rank_wins():
    assert run_on_ranks(2, _write_on_rank) == [[0.0, 1.0, -1.0, -1.0, -1.0, 1.0]] * 2
