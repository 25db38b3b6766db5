"""The results of a finished run: qualities, seconds and pairs at every evaluation."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dissect_clip.training.timer import PHASES
from experiments.cells import CellKey

RECALLS = {
    f"{short}_r{k}": f"{way}_R@{k}"
    for short, way in (("i2t", "image_to_text"), ("t2i", "text_to_image"))
    for k in (1, 5, 10)
}
"""Short names of the recalls, and the trainer's."""

OF_FOUR = ("i2t_r1", "i2t_r10", "t2i_r1", "t2i_r10")


@dataclass(frozen=True)
class Run:
    """A finished cell. Lists have an item for each evaluation during training; recalls are in percent."""

    key: CellKey
    epochs: list[int]
    rsum4: list[float]
    trained: list[int]  # pairs trained on until then
    scored: list[int]  # pairs that had a scoring pass until then
    seconds: list[float]
    score_seconds: list[float]  # of these, scoring
    final: dict[str, dict[str, float]]  # of the trained model: benchmark -> short name of a recall -> percent
    clean_share: float | None = None  # percent of what was trained on after the warm-up; None where it is not known
    flags: str = ""  # what it was trained with, without data and folders

    def to_json(self) -> dict[str, Any]:
        """As one flat object."""
        content = dataclasses.asdict(self)
        return {**content.pop("key"), **content}

    def spent(self, place: int, scoring: bool) -> float:
        """Seconds until an evaluation."""
        return self.seconds[place] - (0 if scoring else self.score_seconds[place])

    def first_at(self, target: float) -> int | None:
        """The first evaluation at or above a target."""
        return next((place for place, value in enumerate(self.rsum4) if value >= target), None)

    def best(self) -> int:
        """The evaluation with the highest R@Sum, the first of several."""
        return self.rsum4.index(max(self.rsum4))


def make_run(
    key: CellKey,
    rows: Sequence[Mapping[str, Any]],
    others: Mapping[str, Mapping[str, Any]],
    benchmark: str,
    clean_share: float | None,
    flags: str = "",
) -> Run:
    """A run, from the lines of its results.jsonl and those of the evaluations on other sets."""
    recalls = [_recalls(row) for row in rows]
    return Run(
        key=key,
        epochs=[row["epoch"] for row in rows],
        rsum4=[round(sum(found[name] for name in OF_FOUR), 3) for found in recalls],
        trained=[row["trained"] for row in rows],
        scored=[row["scored"] for row in rows],
        seconds=[round(sum(row[f"{phase}_seconds"] for phase in PHASES), 2) for row in rows],
        score_seconds=[round(row["score_seconds"], 2) for row in rows],
        final={benchmark: recalls[-1], **{name: _recalls(row) for name, row in others.items()}},
        clean_share=clean_share,
        flags=flags,
    )


def _recalls(row: Mapping[str, Any]) -> dict[str, float]:
    return {short: round(100 * row[name], 3) for short, name in RECALLS.items()}
