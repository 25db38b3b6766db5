"""Whether a run can go on from a checkpoint, and what it would do otherwise."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

from dissect_clip.checkpoint.format import Checkpoint, RunState, Shards, without_prefix
from dissect_clip.errors import SetupError


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _model_misfits(checkpoint: Checkpoint, model_name: str, model: Mapping[str, Tensor]) -> Iterator[str]:
    saved = checkpoint.state_dict
    differing = [
        f"{name} ({list(saved[name].shape)} instead of {list(value.shape)})"
        for name, value in model.items()
        if name in saved and saved[name].shape != value.shape
    ]
    kinds = {
        "lacks": [name for name in model if name not in saved],
        "has besides": [name for name in saved if name not in model],
        "has in another shape": differing,
    }
    found = [f"{kind} {_few(names)}" for kind, names in kinds.items() if names]
    if found:
        made_by = "" if checkpoint.state is None else f" It was saved from --model {checkpoint.state.model}."
        yield f"it is not of --model {model_name}: it {'; it '.join(found)}.{made_by}"


def _sizes(shards: Shards) -> dict[str, int | None]:
    """Samples by name of the shard; None where they are not known."""
    sizes: list[int | None] = [None] * len(shards.names) if shards.sizes is None else shards.sizes.tolist()
    return dict(zip(shards.names, sizes, strict=True))


def _shard_differences(then: Shards, now: Shards) -> Iterator[str]:
    before, after = _sizes(then), _sizes(now)
    resized = [
        f"{name} ({size} samples instead of {before[name]})"
        for name, size in after.items()
        if name in before and None not in (size, before[name]) and size != before[name]
    ]
    kinds = {
        "missing": [name for name in before if name not in after],
        "new": [name for name in after if name not in before],
        "of another size": resized,
    }
    yield from (f"{kind}: {_few(names)}" for kind, names in kinds.items() if names)
    if not any(kinds.values()) and then.names != now.names:
        yield "the shards are the same in another order, which gives samples other ids"


def _list_misfit(then: str, now: str) -> str:
    """Of the digests of lists that are not the same; empty without one."""
    if not now:
        return "it was trained on a list of samples, this run has no --train-keep"
    if not then:
        return "it was trained on all samples of its data, this run has --train-keep"
    return f"it was trained on another list of samples than --train-keep: {then[:12]} is not {now[:12]}"


def _data_misfits(checkpoint: Checkpoint, num_samples: int, fingerprint: str, shards: Shards | None) -> Iterator[str]:
    state = checkpoint.state
    if state is None:
        return
    then, _, then_list = state.fingerprint.partition("+")
    now, _, now_list = fingerprint.partition("+")
    if then_list != now_list:
        yield _list_misfit(then_list, now_list)
    if (state.num_samples, then) == (num_samples, now):
        return
    if state.num_samples != num_samples:
        misfit = f"it was trained on {state.num_samples} samples, --train-data has {num_samples}"
    else:
        misfit = f"it was trained on other data than --train-data: {then[:12]} is not {now[:12]}"
    if shards is not None and checkpoint.shards is not None:
        misfit = "; ".join([misfit, *_shard_differences(checkpoint.shards, shards)])
    yield misfit


def _selection_misfits(
    checkpoint: Checkpoint, strategy: str | None, columns: tuple[str, ...], depends_on: str
) -> Iterator[str]:
    state = checkpoint.state
    if state is None or (strategy is not None and state.strategy is None):
        if strategy is not None:
            yield f"it was trained without --select and has no scores for --select-strategy {strategy}"
    elif state.strategy != strategy:
        now = "this run has no --select" if strategy is None else f"this run has {strategy}"
        yield f"it was trained with --select-strategy {state.strategy}, {now}"
    elif state.columns != columns:
        wanted = f"--select-strategy {strategy} with this --score-refresh needs {', '.join(columns)}"
        yield f"its scores are {', '.join(state.columns)}; {wanted}"
    elif columns and checkpoint.scores is None:
        yield f"it has no scores for --select-strategy {strategy}"
    elif state.depends_on not in (None, depends_on):
        yield f"its scores were taken with {state.depends_on}, this run has {depends_on}"


def goes_on_with_reference(checkpoint: Checkpoint, after: int | None) -> bool:
    """Whether the run's own reference model, which it has after so many epochs, is in use at this place."""
    step = 0 if checkpoint.state is None else checkpoint.state.epoch_step
    return after is not None and (checkpoint.epoch, step) > (after, 0)


def _reference_misfits(checkpoint: Checkpoint, model: Mapping[str, Tensor], after: int | None) -> Iterator[str]:
    if not goes_on_with_reference(checkpoint, after):
        return
    if checkpoint.reference is None or checkpoint.reference.weights is None:
        yield (
            f"it has no reference model, which the run has after --warmup-point {after} epochs without "
            "--select-reference"
        )
        return
    saved = {name: value.shape for name, value in checkpoint.reference.weights.items()}
    if saved != {name: value.shape for name, value in model.items()}:
        yield "its reference model is of another --model"


def _loader_misfits(checkpoint: Checkpoint) -> Iterator[str]:
    state = checkpoint.state
    if state is not None and state.epoch_step > 0 and checkpoint.loader is None:
        yield f"it was saved after {state.epoch_step} steps of an epoch, and does not say where the loaders stood"


def check_fits(
    checkpoint: Checkpoint,
    *,
    model_name: str,
    model_state_dict: Mapping[str, Tensor],
    num_samples: int | None,
    fingerprint: str | None,
    strategy: str | None,
    columns: tuple[str, ...],
    depends_on: str = "",
    shards: Shards | None = None,
    reference_after: int | None = None,
) -> None:
    """See that a run can go on from a checkpoint.

    Args:
        num_samples, fingerprint: of the training data; None in a run that only evaluates, to which only the model
            matters.
        strategy: None without ``--select``.
        columns: what the strategy remembers.
        depends_on: flags of the strategy without which that means something else.
        shards: of the training data, so that the message can say which differ.
        reference_after: complete epochs after which the run's own model is its reference; None where it never is.

    Raises:
        SetupError: naming everything that does not fit.
    """
    misfits = list(_model_misfits(checkpoint, model_name, without_prefix(model_state_dict)))
    if num_samples is not None and fingerprint is not None:
        misfits += _data_misfits(checkpoint, num_samples, fingerprint, shards)
        misfits += _selection_misfits(checkpoint, strategy, columns, depends_on)
        misfits += _loader_misfits(checkpoint)
        misfits += _reference_misfits(checkpoint, without_prefix(model_state_dict), reference_after)
    if misfits:
        lines = "".join(f"\n  - {misfit}" for misfit in misfits)
        if num_samples is None:
            raise SetupError(
                f"cannot evaluate {checkpoint.path}:{lines}\nGive the model, and flags that shape it such as --siglip, "
                "as in the training of these weights"
            )
        raise SetupError(
            f"cannot resume from {checkpoint.path}:{lines}\nResume with the settings it was saved with, or start anew "
            f"from its weights with --pretrained {checkpoint.path}"
        )


def changed_settings(then: RunState, now: RunState) -> list[str]:
    """What differs from the run that saved the checkpoint and so makes it go on otherwise than it would have."""
    names = (
        "seed",
        "select_rate",
        "world_size",
        "batch_size",
        "accum_freq",
        "workers",
        "score_refresh",
        "select_before_load",
    )
    return [
        f"{name} is {getattr(now, name)}, was {getattr(then, name)}"
        for name in names
        if getattr(now, name) != getattr(then, name) and getattr(then, name) is not None
    ]
