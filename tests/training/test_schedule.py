"""Learning rates, step by step as in OpenCLIP, and select rates, epoch by epoch."""

import pytest
import torch
from open_clip_train.scheduler import const_lr, const_lr_cooldown, cosine_lr

from dissect_clip.config.run_plan import full_epochs
from dissect_clip.config.settings import Config
from dissect_clip.selection.schedule import select_rate
from dissect_clip.training.schedule import learning_rate

BASE, WARMUP, STEPS, EPOCHS, COOLDOWN = 0.3, 5, 6, 4, 2


@pytest.mark.parametrize("name", ["cosine", "const", "const-cooldown"])
def test_equals_openclip_at_every_step(name: str):
    config = Config.of(
        warmup=WARMUP,
        epochs=EPOCHS,
        lr_scheduler=name,
        epochs_cooldown=COOLDOWN,
        lr_cooldown_end=0.01,
        lr_cooldown_power=2.0,
    )
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=BASE)
    theirs = {
        "cosine": lambda: cosine_lr(optimizer, BASE, WARMUP, STEPS * EPOCHS),
        "const": lambda: const_lr(optimizer, BASE, WARMUP, STEPS * EPOCHS),
        "const-cooldown": lambda: const_lr_cooldown(
            optimizer, BASE, WARMUP, STEPS * EPOCHS, STEPS * COOLDOWN, 2.0, 0.01
        ),
    }[name]()
    ours = learning_rate(config, BASE, STEPS)
    assert [ours(step) for step in range(STEPS * EPOCHS)] == pytest.approx(
        [theirs(step) for step in range(STEPS * EPOCHS)]
    )


def test_a_run_shorter_than_its_warmup_only_rises():
    rates = [learning_rate(Config.of(warmup=100, epochs=1), 1.0, 4)(step) for step in range(4)]
    assert rates == pytest.approx([0.01, 0.02, 0.03, 0.04])


def rates(first: int = 0, full_last: float = 0.0, epochs: int = 5, **changes: object) -> list[float]:
    config = Config.of(select=True, select_rate=0.3, epochs=epochs, **changes)  # type: ignore[arg-type]
    return [select_rate(config.plan(), epoch, first, full_last) for epoch in range(epochs)]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [0.3] * 5),
        ({"select_rate_schedule": "linear"}, [1.0, 0.825, 0.65, 0.475, 0.3]),
        ({"select_rate_schedule": "linear", "select_rate_start": 0.1}, [0.1, 0.15, 0.2, 0.25, 0.3]),
        ({"select_rate_schedule": "cosine"}, [1.0, 0.65 + 0.35 * 0.5**0.5, 0.65, 0.65 - 0.35 * 0.5**0.5, 0.3]),
        ({"select_rate_schedule": "linear", "first": 2}, [1.0, 1.0, 1.0, 0.65, 0.3]),
        ({"select_rate_schedule": "linear", "full_last": 0.4}, [1.0, 0.65, 0.3, 1.0, 1.0]),
        ({"full_last": 0.2}, [0.3, 0.3, 0.3, 0.3, 1.0]),
        ({"select_rate_schedule": "cosine", "first": 3, "full_last": 0.2}, [0.3, 0.3, 0.3, 0.3, 1.0]),
    ],
    ids=str,
)
def test_select_rates_of_the_epochs(settings: dict, expected: list[float]):
    assert rates(**settings) == pytest.approx(expected)


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_a_schedule_begins_and_ends_exactly(name: str):
    """At a rate a little below 1 or above the end another number of samples might be kept."""
    found = rates(epochs=7, select_rate_schedule=name)
    assert (found[0], found[-1]) == (1.0, 0.3)


@pytest.mark.parametrize(
    ("share", "epochs", "expected"),
    [(0.125, 40, 5), (0.125, 3, 0), (0.3, 10, 3), (0.07, 100, 7), (1.0, 10**400, 10**400)],
)
def test_full_epochs_are_a_share_of_all(share: float, epochs: int, expected: int):
    assert full_epochs(share, epochs) == expected


def test_epochs_after_the_last_keep_the_last_rate():
    config = Config.of(select=True, select_rate=0.3, epochs=2, select_rate_schedule="linear")
    assert select_rate(config.plan(), 2, 0, 0.0) == 0.3
    assert select_rate(config.plan(), 9, 0, 0.5) == 1.0
