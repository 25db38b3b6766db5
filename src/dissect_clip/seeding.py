"""Random numbers as a function of where we are: every choice comes from (seed, epoch, step, rank, ...).

Nothing random is carried from one step to the next, so that a resumed run draws what the uninterrupted one
would have drawn, and no random state has to be saved.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum

import numpy as np
import torch

_MASK = (1 << 64) - 1


class Stream(IntEnum):
    """What a random number is for; keeps the seeds of different uses apart."""

    MODEL = 1
    SHARDS = 2
    SHUFFLE = 3
    AUGMENT = 4
    SELECT = 5
    RESAMPLE = 6
    PATCHES = 7
    PROBE = 8
    DECOYS = 9


def derive_seed(*parts: int) -> int:
    """A seed in [0, 2**63) that depends on every part and on their order (splitmix64 finaliser, chained).

    Equal parts give equal seeds on every machine and Python version.
    """
    state = 0x9E3779B97F4A7C15
    for part in parts:
        state = (state + (part & _MASK) + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state >> 1


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and torch's global generators (all devices), as model code and transforms use them."""
    torch.manual_seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)  # noqa: NPY002 - transforms of third parties draw from the global state
    random.seed(seed)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Run a block with the CPU generators seeded, then put their state back."""
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        np.random.seed(seed & 0xFFFFFFFF)  # noqa: NPY002
        random.seed(seed)
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)  # noqa: NPY002
