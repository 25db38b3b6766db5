"""Seconds by phase."""

import time

import pytest
import torch

from dissect_clip.training.timer import PHASES, PhaseClock


def test_laps_add_up_by_phase():
    clock = PhaseClock(torch.device("cpu"))
    for phase in ("load", "train", "load"):
        time.sleep(0.01)
        clock.lap(phase)
    totals = clock.totals()
    assert set(totals) == set(PHASES)
    assert totals["load"] >= 0.02
    assert totals["train"] >= 0.01
    assert totals["score"] == 0


def test_start_leaves_out_what_went_before():
    clock = PhaseClock(torch.device("cpu"))
    time.sleep(0.02)
    clock.start()
    clock.lap("load")
    assert clock.totals()["load"] < 0.01


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_events_measure_the_device():
    clock = PhaseClock(torch.device("cuda"))
    torch.cuda._sleep(10_000_000)
    clock.lap("train")
    assert clock.totals()["train"] > 0
