"""Score every sample of a dataset with a model, without training, and write the scores as a record.

The loader, the scoring pass and the record are those of training; images are transformed as in evaluation.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import Tensor
from torchvision.transforms import CenterCrop, Compose

from dissect_clip.checkpoint import load_checkpoint, restore
from dissect_clip.config.settings import Config
from dissect_clip.data import TrainData, build_train
from dissect_clip.data.batch import Batch
from dissect_clip.data.evaluation.stream import middle
from dissect_clip.distributed.world import World, init_world, shutdown_world
from dissect_clip.errors import SetupError
from dissect_clip.models.build import build_model
from dissect_clip.models.loss import SampleLoss
from dissect_clip.models.precision import autocast_for
from dissect_clip.models.weights import ModelWeights
from dissect_clip.selection import Candidates, Choice
from dissect_clip.training.record import Recorder
from dissect_clip.training.scoring import Scorer, build_scorer

COLUMN = "clip_score"
"""What DISSect's strategies remember of a sample."""


@dataclasses.dataclass(frozen=True)
class Remembered:
    """What the run of a checkpoint remembered."""

    scores: Tensor  # [num_samples, 1] float32; NaN = never seen
    fingerprint: str  # of its data, without that of a list


def score_dataset(folder: Path, flags: Sequence[str], config: Config, passes: int, remembered: bool) -> bool:
    """Score what ``--train-data`` names with the model of ``--resume`` or ``--pretrained``; whether this is rank 0.

    Each of the ``passes`` is an epoch of the record, in another order; losses are against the batch of all ranks. With
    ``remembered`` the scores that the checkpoint's run remembered are written beside the new ones. Collective.

    ``config`` holds the settings of the ``flags``, as :func:`parse_training_flags` reads them.

    Raises:
        SetupError, TrainingError: as in training, or if ``folder`` is not empty.
    """
    world = init_world(
        config.distributed.device,
        config.distributed.dist_backend,
        config.distributed.dist_url,
        not config.distributed.no_set_device_rank,
        config.distributed.rank_timeout,
    )
    try:
        world.on_main(lambda: _prepare(folder))
        facts = _score(world, folder, config, passes, remembered)
        if world.is_main:
            text = json.dumps({"flags": list(flags), **facts}, indent=2)
            (folder / "_scored_with.json").write_text(text + "\n", encoding="utf-8")
            print(f"scored {facts['samples']} samples into {folder}; could not use: {facts['skipped'] or 'none'}")
    except Exception as error:
        if world.size > 1:
            world.watchdog.abort(str(error), 1)  # else the others would wait for this one
        raise
    finally:
        shutdown_world()
        world.watchdog.close()
    return world.is_main


def _prepare(folder: Path) -> None:
    if folder.exists() and any(folder.iterdir()):
        raise SetupError(f"{folder} is not empty: to use what is scored there, leave out the flags behind --")
    folder.mkdir(parents=True, exist_ok=True)


def _score(world: World, folder: Path, config: Config, passes: int, remembered: bool) -> dict[str, Any]:
    """Write the record; gives what is to be known of it. Collective."""
    model = build_model(config, world)
    before = _load_weights(model.module, config, remembered)
    data = build_train(config, world, _whole_images(model.preprocess_eval), model.tokenizer, None)
    if before is not None and (len(before.scores), before.fingerprint) != (data.num_samples, _without_list(data)):
        raise SetupError(
            f"--resume {config.checkpoint.resume} was trained on other data, so its scores are of other samples"
        )
    scorer = build_scorer(config, model.module, autocast_for(config.training.precision, world.device), model.tokenizer)
    columns = () if before is None else (COLUMN,)
    recorder = Recorder(folder, world, data.shard_names, data.locate, columns)
    sample_loss = SampleLoss(world, config.model.siglip)
    none = torch.empty(0, dtype=torch.int64, device=world.device)
    for number in range(passes):
        data.set_epoch(number)
        recorder.begin(number)
        for step, batch in enumerate(data.loader):
            world.watchdog.begin_phase("score", number * data.num_batches + step)
            data.consume(batch)
            memory = torch.empty(len(batch), 0) if before is None else before.scores[batch.sample_id]
            batch = batch.to(world.device, open_clip.get_input_dtype(config.training.precision))
            candidates = _scores(batch, scorer, sample_loss, memory.to(world.device), number)
            recorder.append(batch, Choice(none, candidates=candidates))
        recorder.end()
    totals = {kind: int(world.sum(torch.tensor(n, device=world.device))) for kind, n in data.skip_counts().items()}
    skipped = {kind: count for kind, count in totals.items() if count}
    return {"samples": data.subset_size, "passes": passes, "fingerprint": data.fingerprint, "skipped": skipped}


@torch.no_grad()
def _scores(batch: Batch, scorer: Scorer, sample_loss: SampleLoss, memory: Tensor, epoch: int) -> Candidates:
    """What the record takes of a batch. Collective: one all_gather of the features."""
    encoded = scorer(batch)
    image, text = encoded.image_features, encoded.text_features
    return Candidates(
        epoch=epoch,
        generator=torch.Generator(),
        memory=memory,
        similarity=(image * text).sum(dim=1),
        loss=sample_loss(image, text, encoded.logit_scale, encoded.logit_bias),
    )


def _without_list(data: TrainData) -> str:
    return data.fingerprint.partition("+")[0]


def _load_weights(module: Any, config: Config, remembered: bool) -> Remembered | None:
    """Load a checkpoint's weights where there is one; gives what its run remembered where that is asked for."""
    if config.checkpoint.resume is None:
        if remembered:
            raise SetupError("--method differential needs a checkpoint that remembers scores: give --resume")
        return None
    checkpoint = load_checkpoint(config.checkpoint.resume)
    restore(checkpoint, {"state_dict": ModelWeights(module, config.model.model)}, evaluating=True)
    if not remembered:
        return None
    selection, data = checkpoint.parts.get("selection", {}), checkpoint.parts.get("data", {})
    if "scores" not in selection or tuple(selection["columns"]) != (COLUMN,):
        raise SetupError(
            f"--method differential: --resume {config.checkpoint.resume} does not remember CLIPScores, as "
            "checkpoints of "
            "warmup_base_sampling and historical_base_sampling do without --score-refresh"
        )
    return Remembered(selection["scores"], data["fingerprint"].partition("+")[0])


def _whole_images(transform: Any) -> Any:
    """An evaluation transform that takes images of extreme shapes, as evaluation does."""
    steps = transform.transforms if isinstance(transform, Compose) else []
    return Compose([middle, *steps]) if any(isinstance(step, CenterCrop) for step in steps) else transform
