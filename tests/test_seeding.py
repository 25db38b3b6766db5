"""Seeds follow from where we are, and drawing with them leaves the rest alone."""

import random

import numpy as np
import torch

from dissect_clip.seeding import Stream, derive_seed, seed_everything, seeded


def test_every_part_and_its_place_matters():
    seeds = {derive_seed(*parts) for parts in [(0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (Stream.MODEL, 0)]}
    assert len(seeds) == 6  # (1, 0) and (Stream.MODEL, 0) are the same numbers


def test_seeds_never_change_between_versions():
    assert derive_seed(0, Stream.SELECT, 17, 3) == 8916854330036101187


def test_neighbouring_steps_are_unrelated():
    values = [derive_seed(0, step) / 2**63 for step in range(4000)]
    assert abs(np.mean(values) - 0.5) < 0.02
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.05


def draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), torch.rand(1).item()  # noqa: NPY002


def test_seeded_block_repeats_and_puts_the_generators_back():
    seed_everything(5)
    expected = draw()
    seed_everything(5)
    with seeded(1):
        first = draw()
    with seeded(1):
        assert draw() == first
    assert draw() == expected
