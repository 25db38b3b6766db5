"""Whether a run can continue, from the heartbeats that its ranks send about once a second. Pure functions.

A rank that is killed sends none. One that stalls (a loader that hangs, a GPU that does not answer) still sends them,
from a separate thread, but they show no progress.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

Phase = Literal["setup", "save", "evaluate", "load", "score", "train", "optimizer"]
"""What a rank is doing, in the order in which it happens at one number of steps done."""
PHASES: tuple[Phase, ...] = get_args(Phase)

RankState = Literal["runs", "lost", "failed", "done", "gone"]
"""Lost: a collective failed, the cause is elsewhere. Done: waits for the others to be so. Gone: knows that all are."""

SILENCE = 60.0
"""Seconds without a sign of life after which a rank is dead; ``--rank-timeout`` where that is shorter."""
SILENCE_AFTER_SIGTERM = 15.0
"""The same once a rank has got SIGTERM: torchrun sends it when a rank has died, and kills after 30 seconds."""
SILENCE_AFTER_LOSS = 5.0
"""The same once a collective has failed on some rank: the run is over, and only the reason is looked for. The least."""

_LOOK_AT = {
    "setup": "Look at the file systems of the data and of the run folder, and at downloads; a longer --rank-timeout "
    "gives them more time",
    "save": "Look at the file system of the run folder",
    "evaluate": "Look at the validation data and their file system, and at the GPUs (nvidia-smi, dmesg)",
    "load": "Look at the training data and their file system, and at the loader processes (--workers)",
}
_LOOK_AT_GPU = "Look at the GPUs (nvidia-smi, dmesg) and at the network between them (NCCL_DEBUG=INFO says more)"
_LOOK_AT_KILLS = (
    "Look for out-of-memory kills (dmesg), for a scheduler's kill, and at the network; the standard error of that rank "
    "may say more"
)


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """A rank's report on itself."""

    number: int  # counts up with every beat
    phase: Phase
    step: int  # optimizer steps done
    idle: float  # seconds since its last progress
    waits: bool  # for other ranks, and so does not hold them up
    host: str
    pid: int
    state: RankState = "runs"
    message: str = ""  # why it failed
    status: int = 0  # the exit status that the failure has
    stop: str | None = None  # the signal that asked for the end of the run

    def to_json(self) -> str:
        """As one line."""
        return json.dumps(dataclasses.asdict(self))

    @staticmethod
    def from_json(line: str | bytes) -> Heartbeat:
        """Back from :meth:`to_json`."""
        return Heartbeat(**json.loads(line))

    @property
    def where(self) -> str:
        """Where the rank is, in words."""
        return f"phase {self.phase}" if self.phase == "setup" else f"phase {self.phase} at step {self.step}"

    @property
    def progress(self) -> tuple[int, int, bool]:
        """StepDecision ranks: the smallest is furthest behind."""
        return self.step, PHASES.index(self.phase), self.waits


@dataclass(frozen=True, slots=True)
class RunFailure:
    """Why a run cannot continue."""

    message: str
    status: int  # exit status of all ranks
    ranks: tuple[int, ...]  # that caused it
    kind: Literal["failed", "died", "stalled"]

    def to_json(self) -> str:
        """As one line."""
        return json.dumps(dataclasses.asdict(self))

    @staticmethod
    def from_json(line: str | bytes) -> RunFailure:
        """Back from :meth:`to_json`."""
        fields = json.loads(line)
        return RunFailure(**{**fields, "ranks": tuple(fields["ranks"])})


def name_ranks(ranks: Sequence[int], beats: Mapping[int, Heartbeat]) -> str:
    """ "rank 3 (host, pid 41)", or the numbers of several with the first few places."""
    if len(ranks) == 1:
        beat = beats[ranks[0]]
        return f"rank {ranks[0]} ({beat.host}, pid {beat.pid})"
    shown = ", ".join(f"{rank} ({beats[rank].host})" for rank in ranks[:8])
    return f"{len(ranks)} ranks: {shown}{', ...' if len(ranks) > 8 else ''}"


def find_failed(beats: Mapping[int, Heartbeat], world_size: int) -> RunFailure | None:
    """The message of the lowest rank that failed, with the ranks that failed of the same."""
    failed = [rank for rank, beat in sorted(beats.items()) if beat.state == "failed"]
    if not failed:
        return None
    first = beats[failed[0]]
    same = tuple(rank for rank in failed if beats[rank].message == first.message)
    if len(same) == world_size:
        message = first.message
    elif len(same) == 1:
        message = f"rank {same[0]} failed while it was in {first.where}: {first.message}"
    else:
        message = f"ranks {', '.join(map(str, same))} failed while rank {same[0]} was in {first.where}: {first.message}"
    return RunFailure(message, first.status, same, "failed")


def silence_limit(beats: Mapping[int, Heartbeat], timeout: float) -> float:
    """Seconds without a sign of life that a rank may take."""
    limit = SILENCE
    if any(beat.state == "lost" for beat in beats.values()):
        limit = SILENCE_AFTER_LOSS
    elif any(beat.stop == "SIGTERM" for beat in beats.values()):
        limit = SILENCE_AFTER_SIGTERM
    return min(limit, max(timeout, SILENCE_AFTER_LOSS))  # a busy machine may delay a beat by seconds


def find_dead(beats: Mapping[int, Heartbeat], silent: Mapping[int, float], timeout: float) -> RunFailure | None:
    """Ranks that have given no sign of life for too long; ``silent`` is in seconds."""
    limit = silence_limit(beats, timeout)
    dead = tuple(
        rank for rank, beat in sorted(beats.items()) if beat.state not in ("done", "gone") and silent[rank] > limit
    )
    if not dead:
        return None
    first = beats[dead[0]]
    message = (
        f"{name_ranks(dead, beats)} died or lost the network: no sign of life for {silent[dead[0]]:.0f} s, last in "
        f"{first.where}. {_LOOK_AT_KILLS}"
    )
    return RunFailure(message, 1, dead, "died")


def find_stalled(beats: Mapping[int, Heartbeat], timeout: float) -> RunFailure | None:
    """The ranks furthest behind, which hold up the others, if no rank has progressed for ``timeout`` seconds."""
    running = {rank: beat for rank, beat in sorted(beats.items()) if beat.state == "runs"}
    if not running or min(beat.idle for beat in running.values()) <= timeout:
        return None
    behind = min(beat.progress for beat in running.values())
    stalled = tuple(rank for rank, beat in running.items() if beat.progress == behind)
    first = running[stalled[0]]
    who = f"all {len(stalled)} ranks" if len(stalled) == len(running) > 1 else name_ranks(stalled, running)
    message = (
        f"{who} {'have' if len(stalled) > 1 else 'has'} not got on for {first.idle:.0f} s "
        f"(--rank-timeout {timeout:g}) in {first.where}. {_LOOK_AT.get(first.phase, _LOOK_AT_GPU)}"
    )
    return RunFailure(message, 1, stalled, "stalled")
