"""Learning rates, step by step as in OpenCLIP."""

import pytest
import torch
from open_clip_train.scheduler import const_lr, const_lr_cooldown, cosine_lr

from dissect_clip.config import Config
from dissect_clip.schedule import learning_rate

BASE, WARMUP, STEPS, EPOCHS, COOLDOWN = 0.3, 5, 6, 4, 2


@pytest.mark.parametrize("name", ["cosine", "const", "const-cooldown"])
def test_equals_openclip_at_every_step(name: str):
    config = Config(
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
    rates = [learning_rate(Config(warmup=100, epochs=1), 1.0, 4)(step) for step in range(4)]
    assert rates == pytest.approx([0.01, 0.02, 0.03, 0.04])
