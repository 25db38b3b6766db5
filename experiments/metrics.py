"""The metrics that a table may show: qualities, seconds and pairs of a run.

R@Sum has two meanings. ``rsum`` is the trainer's, the sum of six recalls (at 1, 5 and 10, both ways); ``rsum4`` is
that of the DISSect paper, the sum of four (at 1 and 10). Both are in percent.

Seconds are those that the training process spent loading, scoring, training and updating; evaluation, saving and
start-up are left out. ``..._without_scoring`` leaves the scoring pass, ranking and the store out, too, as the paper
does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from experiments.results import OF_FOUR, RECALLS, Run


@dataclass(frozen=True)
class Peers:
    """What a run is held against: runs on the same data with the same seed, and at the same rate."""

    all_data: Run | None
    random: Run | None


@dataclass(frozen=True)
class Metric:
    """A column of a table."""

    heading: str
    digits: int
    value: Callable[[Run, Peers, str], float | None]  # the last is the benchmark
    of_benchmark: bool = False  # other on every benchmark
    share_of: tuple[str, str] | None = None  # published: percent that the first, here, has of the second on all data


def _quality(names: Sequence[str]) -> Callable[[Run, Peers, str], float | None]:
    def value(run: Run, peers: Peers, benchmark: str) -> float | None:
        found = run.final.get(benchmark)
        return None if found is None else sum(found[name] for name in names)

    return value


def _share(of: Callable[[Run, Peers, str], float | None]) -> Callable[[Run, Peers, str], float | None]:
    """Percent of the value that all data has with the same seed."""

    def value(run: Run, peers: Peers, benchmark: str) -> float | None:
        ours = of(run, peers, benchmark)
        full = None if peers.all_data is None else of(peers.all_data, peers, benchmark)
        return None if ours is None or not full else 100 * ours / full

    return value


def _place(run: Run, peers: Peers, until: str) -> int | None:
    """The evaluation at which something is reached; None where it is not, or has no meaning."""
    if until == "end":
        return len(run.rsum4) - 1
    if until == "own_best":
        return run.best()
    other = peers.random if until == "random_best" else peers.all_data
    if other is None:
        return None
    return run.first_at(max(other.rsum4) if until == "random_best" else other.rsum4[-1])


def _time(until: str, scoring: bool, unit: float) -> Callable[[Run, Peers, str], float | None]:
    def value(run: Run, peers: Peers, benchmark: str) -> float | None:
        place = _place(run, peers, until)
        return None if place is None else run.spent(place, scoring) / unit

    return value


def _time_share(until: str, scoring: bool) -> Callable[[Run, Peers, str], float | None]:
    """Percent of the seconds of all data's whole run, counted in the same way."""
    spent, whole = _time(until, scoring, 1), _time("end", scoring, 1)

    def value(run: Run, peers: Peers, benchmark: str) -> float | None:
        ours = spent(run, peers, benchmark)
        full = None if peers.all_data is None else whole(peers.all_data, peers, benchmark)
        return None if ours is None or not full else 100 * ours / full

    return value


_UNTIL = {
    "end": "", "own_best": " to own best", "random_best": " to random's best", "all_data": " to the end of all data",
}  # fmt: skip
"""Moments of a run: its end; its highest R@Sum; its first R@Sum that reaches random's highest, or all data's last."""


def _times() -> dict[str, Metric]:
    found = {}
    for until, words in _UNTIL.items():
        for suffix, scoring in (("", True), ("_without_scoring", False)):
            label = words + ("" if scoring else ", no scoring")
            for unit, seconds, digits in (("seconds", 1, 0), ("hours", 3600, 1)):
                value = _time(until, scoring, seconds)
                found[f"{unit}_to_{until}{suffix}"] = Metric(f"{unit}{label}", digits, value)
            of = (f"hours_to_{until}{suffix}", f"hours_to_end{suffix}")
            share = Metric(f"% of all data's time{label}", 0, _time_share(until, scoring), share_of=of)
            found[f"time_share_to_{until}{suffix}"] = share
    return found


METRICS: dict[str, Metric] = {
    **{
        name: Metric(f"{'I→T' if name.startswith('i2t') else 'T→I'} R@{name[5:]}", 2, _quality([name]), True)
        for name in RECALLS
    },
    "rsum4": Metric("R@Sum (1, 10)", 2, _quality(OF_FOUR), True),
    "rsum": Metric("R@Sum (1, 5, 10)", 2, _quality(list(RECALLS)), True),
    "rsum4_share": Metric("R@Sum (1, 10), % of all data", 1, _share(_quality(OF_FOUR)), True, ("rsum4", "rsum4")),
    "clean_share": Metric("clean of what is kept, %", 1, lambda run, *_: run.clean_share),
    "trained": Metric("pairs trained on", 0, lambda run, *_: run.trained[-1]),
    "scored": Metric("pairs scored", 0, lambda run, *_: run.scored[-1]),
    **_times(),
}  # fmt: skip
"""The columns that a table may have, by name."""
