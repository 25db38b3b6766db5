"""When checkpoints are due, what they are called and what they replace: a table of settings and moments."""

from __future__ import annotations

from typing import Any

import pytest

from dissect_clip.checkpoint.policy import Moment, Plan, Policy, epoch_step_of
from dissect_clip.config.settings import Config

EPOCHS = 5


def policy(**settings: Any) -> Policy:
    return Policy(Config.of(**settings).checkpoint, EPOCHS)


def inside(epoch: int, step: int, **how: bool) -> Moment:
    return Moment(epoch=epoch, step=step, inside=True, **how)


def end(epoch: int, step: int, **how: bool) -> Moment:
    return Moment(epoch=epoch, step=step, inside=False, **how)


DUE: list[tuple[dict[str, Any], Moment, list[str]]] = [
    # at the end of an epoch
    ({}, end(1, 10), ["epoch_1"]),
    ({"save_frequency": 2}, end(1, 10), []),
    ({"save_frequency": 2}, end(2, 20), ["epoch_2"]),
    ({"save_frequency": 2}, end(5, 50), ["epoch_5"]),  # the last
    ({"save_frequency": 0}, end(4, 40), []),
    ({"save_frequency": 0}, end(5, 50), ["epoch_5"]),
    ({"save_most_recent": True}, end(1, 10), ["epoch_1", "epoch_latest"]),
    ({"save_frequency": 0, "save_most_recent": True}, end(1, 10), ["epoch_latest"]),
    ({"save_frequency": 0, "save_most_recent": True}, end(5, 50), ["epoch_5", "epoch_latest"]),
    # inside one
    ({}, inside(1, 12), []),
    ({"save_most_recent": True}, inside(1, 12), []),
    ({"save_every_n_steps": 4}, inside(1, 12), ["epoch_1_step_12"]),
    ({"save_every_n_steps": 4}, inside(1, 13), []),
    ({"save_every_n_steps": 4}, inside(0, 4), ["epoch_0_step_4"]),
    ({}, inside(1, 13, minutes_over=True), ["epoch_1_step_13"]),
    # where an epoch ends, a checkpoint of the whole epoch takes the place of one by steps or minutes
    ({"save_every_n_steps": 5}, end(1, 10), ["epoch_1"]),
    ({"save_frequency": 2, "save_every_n_steps": 5}, end(1, 10), ["epoch_1_step_10"]),
    ({"save_frequency": 2, "save_every_n_steps": 3}, end(1, 10), []),
    ({"save_frequency": 0}, end(1, 10, minutes_over=True), ["epoch_1_step_10"]),
    ({"save_frequency": 0, "save_most_recent": True}, end(1, 10, minutes_over=True), ["epoch_latest"]),
    # a run that stops is always saved
    ({"save_frequency": 0}, inside(1, 13, stopping=True), ["epoch_1_step_13"]),
    ({"save_frequency": 0}, end(1, 10, stopping=True), ["epoch_1"]),
    ({"save_frequency": 0, "save_most_recent": True}, end(1, 10, stopping=True), ["epoch_latest"]),
    ({"save_frequency": 1}, end(3, 30, stopping=True), ["epoch_3"]),
]


@pytest.mark.parametrize(("settings", "moment", "names"), DUE)
def test_what_is_due(settings: dict[str, Any], moment: Moment, names: list[str]) -> None:
    plan = policy(**settings).plan(moment)
    assert list(plan.names) == names
    assert bool(plan) == bool(names)


BEFORE = ["epoch_1", "epoch_1_step_15", "epoch_2", "epoch_2_step_25", "epoch_2_step_99", "epoch_3_step_31"]
REPLACED: list[tuple[dict[str, Any], list[str], tuple[int, int], list[str]]] = [
    # what is written, where it stands, and what of BEFORE it replaces
    ({}, ["epoch_3"], (3, 0), ["epoch_1_step_15", "epoch_2_step_25", "epoch_2_step_99"]),
    ({}, ["epoch_2_step_26"], (2, 26), ["epoch_1_step_15", "epoch_2_step_25", "epoch_2_step_99"]),
    ({}, ["epoch_2_step_25"], (2, 25), ["epoch_1_step_15", "epoch_2_step_99"]),
    ({}, ["epoch_latest"], (2, 0), ["epoch_1_step_15"]),
    ({"delete_previous_checkpoint": True}, ["epoch_2"], (2, 0), ["epoch_1_step_15", "epoch_1"]),
    (
        {"delete_previous_checkpoint": True},
        ["epoch_3", "epoch_latest"],
        (3, 0),
        ["epoch_1_step_15", "epoch_2_step_25", "epoch_2_step_99", "epoch_2"],
    ),
    ({"delete_previous_checkpoint": True}, ["epoch_latest"], (2, 0), ["epoch_1_step_15"]),
]


@pytest.mark.parametrize(("settings", "names", "at", "gone"), REPLACED)
def test_what_is_replaced(settings: dict[str, Any], names: list[str], at: tuple[int, int], gone: list[str]) -> None:
    present = [*BEFORE, *names, "epoch_latest", "epoch_of_somebody", "weights"]
    assert policy(**settings).replaced(Plan(tuple(names), at), present) == gone


@pytest.mark.parametrize(("minutes", "seconds", "over"), [(0, 1e9, False), (5, 299, False), (5, 300, True)])
def test_minutes(minutes: float, seconds: float, over: bool) -> None:
    assert policy(save_every_minutes=minutes).minutes_over(seconds) is over


@pytest.mark.parametrize(
    ("name", "expected"), [("epoch_7", (7, 0)), ("epoch_7_step_120", (7, 120)), ("epoch_latest", None), ("x", None)]
)
def test_names_say_where_a_run_stood(name: str, expected: tuple[int, int] | None) -> None:
    assert epoch_step_of(name) == expected
