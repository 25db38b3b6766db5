"""What is said of ranks that fail, die or stall."""

import dataclasses

import pytest

from dissect_clip.distributed.health import (
    PHASES,
    SILENCE,
    Heartbeat,
    RunFailure,
    find_dead,
    find_failed,
    find_stalled,
    silence_limit,
)


def beat(**changes) -> Heartbeat:
    defaults = {"number": 1, "phase": "train", "step": 7, "idle": 0.0, "waits": False, "host": "node", "pid": 42}
    return Heartbeat(**(defaults | changes))


def silent(beats: dict[int, Heartbeat], **seconds: float) -> dict[int, float]:
    return {rank: seconds.get(f"rank{rank}", 0.0) for rank in beats}


def test_a_healthy_run_goes_on():
    beats = {rank: beat(idle=500.0) for rank in range(3)} | {1: beat(idle=3.0)}
    assert find_failed(beats, 3) is None
    assert find_dead(beats, silent(beats, rank2=50), 600) is None
    assert find_stalled(beats, 600) is None


def test_beats_and_verdicts_travel_as_text():
    said = beat(state="failed", message="a “quoted”\nword", status=2)
    assert Heartbeat.from_json(said.to_json().encode()) == said
    verdict = RunFailure("why", 2, (1, 3), "failed")
    assert RunFailure.from_json(verdict.to_json()) == verdict


# ---- failure


def test_a_failure_names_rank_phase_and_cause():
    beats = {0: beat(), 1: beat(), 3: beat(phase="load", step=120, state="failed", message="no pair", status=1)}
    verdict = find_failed(beats, 4)
    assert verdict == RunFailure("rank 3 failed while it was in phase load at step 120: no pair", 1, (3,), "failed")


def test_what_all_ranks_say_is_said_once_and_plainly():
    beats = {rank: beat(phase="setup", state="failed", message="no such file", status=2) for rank in range(3)}
    assert find_failed(beats, 3) == RunFailure("no such file", 2, (0, 1, 2), "failed")


def test_the_lowest_rank_speaks_for_those_that_failed_of_the_same():
    failed = beat(phase="setup", state="failed", message="disk", status=2)
    verdict = find_failed({0: beat(), 1: failed, 2: dataclasses.replace(failed, message="other"), 3: failed}, 4)
    assert verdict == RunFailure("ranks 1, 3 failed while rank 1 was in phase setup: disk", 2, (1, 3), "failed")


# ---- death


def test_a_silent_rank_is_dead_after_a_minute_or_the_timeout():
    beats = {0: beat(), 1: beat(phase="score", step=31)}
    assert find_dead(beats, silent(beats, rank1=SILENCE), 600) is None
    verdict = find_dead(beats, silent(beats, rank1=SILENCE + 1), 600)
    assert verdict is not None
    assert verdict.ranks == (1,)
    assert "rank 1 (node, pid 42) died or lost the network: no sign of life for 61 s" in verdict.message
    assert "last in phase score at step 31" in verdict.message
    assert find_dead(beats, silent(beats, rank1=8), 7) is not None
    assert find_dead(beats, silent(beats, rank1=4), 2) is None, "a beat may be late"


def test_a_rank_that_is_done_may_be_silent():
    beats = {0: beat(), 1: beat(state="done")}
    assert find_dead(beats, silent(beats, rank1=1000), 600) is None


def test_silence_is_shorter_once_something_has_happened():
    calm = {0: beat(), 1: beat()}
    limits = [silence_limit(calm | {1: beat(**change)}, 600) for change in ({}, {"stop": "SIGTERM"}, {"state": "lost"})]
    assert limits == sorted(limits, reverse=True)
    assert len(set(limits)) == 3
    assert limits[1] < 30, "torchrun kills 30 s after SIGTERM"
    assert silence_limit(calm | {1: beat(stop="SIGUSR1")}, 600) == SILENCE


def test_many_dead_ranks_are_named_in_one_line():
    beats = {rank: beat(host=f"node{rank // 8}") for rank in range(64)}
    verdict = find_dead(beats, {rank: 100.0 if rank >= 32 else 0.0 for rank in beats}, 600)
    assert verdict is not None
    assert verdict.ranks == tuple(range(32, 64))
    assert "32 ranks: 32 (node4), 33 (node4)" in verdict.message
    assert len(verdict.message) < 500


# ---- stall


def test_the_rank_that_the_others_wait_for_is_named():
    beats = {
        0: beat(step=8, phase="train", idle=700.0),
        1: beat(step=8, phase="load", idle=705.0),
        2: beat(step=8, phase="optimizer", idle=699.0),
    }
    verdict = find_stalled(beats, 600)
    assert verdict is not None
    assert verdict.ranks == (1,)
    assert verdict.message.startswith(
        "rank 1 (node, pid 42) has not got on for 705 s (--rank-timeout 600) in phase load"
    )
    assert "data" in verdict.message


def test_a_rank_that_still_does_the_step_before_is_further_behind():
    beats = {0: beat(step=8, phase="load", idle=700.0), 1: beat(step=7, phase="optimizer", idle=700.0)}
    verdict = find_stalled(beats, 600)
    assert verdict is not None
    assert verdict.ranks == (1,)
    assert "GPU" in verdict.message


@pytest.mark.parametrize("phase", PHASES)
def test_who_waits_for_others_is_not_to_blame(phase: str):
    beats = {0: beat(phase=phase, idle=700.0), 1: beat(phase=phase, idle=700.0, waits=True)}
    verdict = find_stalled(beats, 600)
    assert verdict is not None
    assert verdict.ranks == (0,)


def test_one_rank_that_gets_on_keeps_the_run_alive():
    assert find_stalled({0: beat(idle=700.0), 1: beat(idle=599.0)}, 600) is None


def test_ranks_that_are_done_do_not_count_as_getting_on():
    verdict = find_stalled({0: beat(phase="evaluate", idle=700.0), 1: beat(state="done")}, 600)
    assert verdict is not None
    assert verdict.ranks == (0,)


def test_where_all_stand_still_at_one_place_all_are_named():
    verdict = find_stalled({rank: beat(idle=700.0) for rank in range(4)}, 600)
    assert verdict is not None
    assert verdict.message.startswith("all 4 ranks have not got on for 700 s")
    assert verdict.ranks == (0, 1, 2, 3)
