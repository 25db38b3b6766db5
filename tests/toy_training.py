"""A toy training run: its state, its data in memory, and what it reports."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from toy import make_config, random_pairs

from dissect_clip.cli.training_run import build_state
from dissect_clip.config.settings import Config
from dissect_clip.data.batch import Batch
from dissect_clip.data.skips import Skip, SkipRow, pack_rows
from dissect_clip.distributed.world import World
from dissect_clip.models.build import build_model
from dissect_clip.training.epoch import train_epoch
from dissect_clip.training.step import TrainState

N, SAMPLES, STEPS = 8, 24, 3


class MemoryData:
    """Stands for TrainData: three batches that are the same in every epoch."""

    def __init__(self, world: World, image_size: int = 16) -> None:
        self.world = world
        self.image_size = image_size
        self.num_batches = self.remaining_batches = STEPS
        self.epochs: list[int] = []
        self.count = 2  # of samples skipped

    @property
    def loader(self) -> Iterator[Batch]:
        for step in range(STEPS):
            ids = torch.arange(N) + N * ((step + self.world.rank) % STEPS)
            image, text = random_pairs(SAMPLES, self.image_size)
            yield self.change(Batch(image[ids], text[ids], ids), step)

    recounts_skips = False

    def change(self, batch: Batch, step: int) -> Batch:
        return batch

    def consume(self, batch: Batch) -> None: ...

    def set_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)

    def skip_counts(self) -> dict[str, int]:
        return {"bad_image": self.count, "no_caption": 0}

    def drain_skips(self) -> Tensor:
        return pack_rows([SkipRow(int(Skip.BAD_IMAGE), "shard.tar", "key", "reason", self.count)])


class Reports:
    def __init__(self) -> None:
        self.lines: list[dict[str, float]] = []

    def train(self, step: int, metrics: Mapping[str, float]) -> None:
        self.lines.append({"step": step, **metrics})

    def evaluation(self, epoch: int, step: int, metrics: Mapping[str, float]) -> None:
        raise AssertionError

    def close(self) -> None: ...


def make_state(folder: Path, world: World | None = None, **changes: Any) -> TrainState:
    world = world or World()
    config: Config = make_config(
        folder,
        **(
            {"epochs": 2, "log_every_n_steps": 1, "warmup_select_rate": 0.5, "max_skip_fraction": 0.1, "scan_warmup": 0}
            | changes
        ),
    )
    data: Any = SimpleNamespace(num_samples=SAMPLES, subset_size=SAMPLES, subset_ids=lambda numbers: numbers)
    return build_state(config, world, build_model(config, world), data, None, STEPS)


def train(
    state: TrainState, epochs: int = 2, image_size: int = 16, kind: type[MemoryData] = MemoryData
) -> list[dict[str, float]]:
    reports = Reports()
    for _ in range(epochs):
        train_epoch(state, kind(state.world, image_size), reports)  # type: ignore[arg-type]
    return reports.lines


def weights(state: TrainState) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in state.module.state_dict().items()}


def same(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
