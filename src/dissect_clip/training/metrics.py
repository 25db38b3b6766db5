"""The steps between two logs: whether they are sound, and what is reported of them.

Shapes: W ranks.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from dissect_clip.data import TrainData
from dissect_clip.data.batch import Batch
from dissect_clip.errors import TrainingError
from dissect_clip.run.console import NOT_ON_TERMINAL
from dissect_clip.training.step import TrainState
from dissect_clip.training.timer import PHASES, PhaseClock

_RANKS_KEPT = 4
"""Of how many ranks a batch is saved when training ends in steps that are not finite."""

log = logging.getLogger(__name__)


class LogInterval:
    """The steps from one log to the next: checks them and makes metrics of them. Reads the device at its end only."""

    def __init__(self, state: TrainState, data: TrainData, steps: int, clock: PhaseClock) -> None:
        self.state = state
        self.data = data
        self.steps = steps
        self.clock = clock
        self.base = dict(state.counters.seconds)
        self._start()

    def _start(self) -> None:
        self.first_step = self.state.counters.step
        self.seconds = dict(self.state.counters.seconds)
        self.seen = self.state.counters.seen

    def _counts(self) -> Tensor:
        """[W, 5] of all ranks: steps, steps in a row and samples not finite, scores not finite, samples skipped."""
        state = self.state
        device = state.world.device
        scores = torch.zeros((), dtype=torch.int64, device=device)
        if state.selection is not None:
            scores, state.selection.not_finite = state.selection.not_finite, scores
        skipped = torch.tensor([sum(self.data.skip_counts().values())], device=device)
        return state.world.all_gather(torch.cat([state.nonfinite.read(), scores[None], skipped])[None]).cpu()

    def count_seconds(self) -> None:
        """Bring the seconds of the run up to date, for a checkpoint. Waits for the device."""
        totals = self.clock.totals()
        self.state.counters.seconds = {phase: self.base[phase] + totals[phase] for phase in PHASES}

    def close(self, outputs: dict[str, Tensor], batches: Sequence[Batch]) -> dict[str, float]:
        """Metrics of the steps since the last close, with the losses of the last step, and a line in the log.

        Collective: one all_gather. ``outputs`` and ``batches`` are those of the last step.

        Raises:
            TrainingError: after too many steps in a row that were not finite, or too many samples skipped.
        """
        counters = self.state.counters
        values = {name: value.item() for name, value in outputs.items()}
        counts = self._counts()
        self.count_seconds()
        self._check_finite(counts, values, batches)
        skipped = int(counts[:, 4].sum())
        self._check_skipped(skipped)
        spent = {phase: counters.seconds[phase] - self.seconds[phase] for phase in PHASES}
        count = max(1, counters.step - self.first_step)
        batch_time = sum(spent.values()) / count
        per_second = (counters.seen - self.seen) / max(sum(spent.values()), 1e-9)
        metrics = {
            "data_time": spent["load"] / count,
            "batch_time": batch_time,
            "samples_per_second": per_second,
            "samples_per_second_per_gpu": per_second / self.state.world.size,
            "scale": values.pop("logit_scale"),
            "lr": self.state.optimizer.param_groups[0]["lr"],
            **values,
            **{f"{phase}_time": spent[phase] / count for phase in PHASES if phase != "load"},
            **{f"{phase}_seconds": counters.seconds[phase] for phase in PHASES},
            "seen": counters.seen,
            "trained": counters.trained,
            "scored": counters.scored,
            "skipped": skipped,
            "nonfinite_steps": int(counts[:, 0].max()),
            "nonfinite_samples": int(counts[:, 2:4].sum()),
            "epoch": counters.epoch + counters.epoch_step / self.steps,
        }
        self._log(metrics, list(values))
        self._start()
        return metrics

    def _log(self, metrics: dict[str, float], losses: list[str]) -> None:
        counters = self.state.counters
        done = counters.epoch_step
        named = " ".join(f"{name.capitalize()}: {metrics[name]:#.5g}" for name in losses)
        log.info(
            f"Train Epoch: {counters.epoch} [{done}/{self.steps} ({100 * done / self.steps:.0f}%)] "
            f"Load {metrics['data_time']:.3f} Score {metrics['score_time']:.3f} Train {metrics['train_time']:.3f} "
            f"Batch (t): {metrics['batch_time']:.3f}, {metrics['samples_per_second']:#g}/s, "
            f"{metrics['samples_per_second_per_gpu']:#g}/s/gpu Seen: {counters.seen} Trained: {counters.trained} "
            f"LR: {metrics['lr']:5g} Logit Scale: {metrics['scale']:.3f} {named}",
            extra=NOT_ON_TERMINAL,
        )

    def _check_skipped(self, skipped: int) -> None:
        """An epoch has room for so many: a share of what was read so far would damn a run for one early bad shard."""
        config, world = self.state.config, self.state.world
        samples = self.steps * config.training.accum_freq * config.training.batch_size * world.size
        self.state.skip_log.add(self.data.drain_skips())
        self.state.skip_log.check(skipped, samples, config.data.max_skip_fraction)

    def _check_finite(self, counts: Tensor, values: dict[str, float], batches: Sequence[Batch]) -> None:
        state, last = self.state, self.state.counters.step - 1
        failed, in_a_row = int(counts[:, 0].max()), int(counts[:, 1].max())
        if in_a_row >= state.config.training.max_nonfinite_steps:
            broken = counts[:, 2] + counts[:, 3] > 0
            ranks = (broken if broken.any() else counts[:, 1] > 0).nonzero().flatten().tolist()
            saved = self._save_last_batches(last, batches, ranks)
            raise TrainingError(self._explain(in_a_row, last, ranks, values, saved))
        if failed and state.world.is_main:
            log.warning(
                "%d of the steps %d to %d had a loss or gradient that was not finite, and changed no weights; "
                "--max-nonfinite-steps %d in a row end the run",
                failed, self.first_step, last, state.config.training.max_nonfinite_steps,
            )  # fmt: skip
        excluded = int(counts[:, 3].sum())
        if excluded and state.world.is_main:
            log.warning(
                "%d samples of the steps %d to %d had scores that were not finite, and were left out",
                excluded, self.first_step, last,
            )  # fmt: skip

    def _save_last_batches(self, step: int, batches: Sequence[Batch], ranks: list[int]) -> str:
        """Save the last batches of the first few of these ranks; returns a sentence that says where."""
        state = self.state
        ranks = ranks[:_RANKS_KEPT]
        if state.folder is None:
            return "Nothing was saved, since the run has no folder."
        folder = state.folder / "nonfinite"
        if state.world.rank in ranks:
            tensors = [
                {"image": batch.image.cpu(), "text": batch.text.cpu(), "sample_id": batch.sample_id.cpu()}
                for batch in batches
            ]
            try:
                folder.mkdir(parents=True, exist_ok=True)
                torch.save({"step": step, "batches": tensors}, folder / f"step_{step}_rank_{state.world.rank}.pt")
            except (OSError, RuntimeError) as error:  # of a full disk; torch's is a RuntimeError
                return f"The last batch could not be saved in {folder} ({error})."
        names = ", ".join(f"step_{step}_rank_{rank}.pt" for rank in ranks)
        return f"The last batch is in {folder}: {names} (torch.load with weights_only=True)."

    def _explain(self, in_a_row: int, last: int, ranks: list[int], values: dict[str, float], saved: str) -> str:
        config = self.state.config
        return (
            f"the loss or gradient was not finite in {in_a_row} steps in a row, {last - in_a_row + 1} to {last}, "
            f"on rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))} (last loss {values['loss']:g}, logit scale "
            f"{values['logit_scale']:g}, learning rate {self.state.optimizer.param_groups[0]['lr']:g}). {saved} Look "
            f"at --lr {config.training.lr} and --warmup {config.training.warmup} (too steep a start), --precision "
            f"{config.training.precision} "
            "(try amp_bf16 or fp32), --grad-clip-norm (try 1.0), and at the data of these steps. These steps changed "
            "no weights; --resume latest continues from the last checkpoint"
        )
