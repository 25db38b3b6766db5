"""The step and the epoch, on toy models and batches in memory."""

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import run_on_ranks
from torch import Tensor
from toy import make_config, random_pairs
from toy_training import SAMPLES, STEPS, MemoryData, N, Reports, make_state, same, train, weights

from dissect_clip.checkpoint import Saver
from dissect_clip.data.batch import Batch
from dissect_clip.distributed.world import World
from dissect_clip.errors import SetupError, Stopped, TrainingError
from dissect_clip.run.remote_sync import NoSync
from dissect_clip.selection import STRATEGIES
from dissect_clip.training.epoch import train_epoch
from dissect_clip.training.state import OptimizerState
from dissect_clip.training.step import TrainState, train_step
from dissect_clip.training.timer import PhaseClock


@pytest.mark.parametrize("siglip", [False, True])
@pytest.mark.parametrize("name", STRATEGIES)
def test_counts_what_was_seen_and_what_was_trained(tmp_path: Path, name: str, siglip: bool):
    state = make_state(tmp_path, select=True, select_strategy=name, select_rate=0.25, warmup_point=1, siglip=siglip)
    lines = train(state)
    first = {"warmup_base_sampling": 4, "learnability": 4, "jest": 4, "clean_posterior": 4, "scan": 8}
    second = {"scan": 6}  # a quarter of the cycle's way from 8 to 2 of 8, rounded: 8 - 0.25 * 6
    assert state.counters.seen == 2 * STEPS * N
    assert state.counters.trained == STEPS * (first.get(name, 2) + second.get(name, 2))
    assert lines[-1]["seen"] == state.counters.seen
    assert all(torch.isfinite(torch.tensor(line["loss"])) for line in lines)


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_rate_one_is_training_without_selection_bit_for_bit(tmp_path: Path, name: str, mode: str):
    plain = make_state(tmp_path, force_patch_dropout=0.5)
    everything = make_state(
        tmp_path, force_patch_dropout=0.5, select=True, select_strategy=name, select_rate=1.0, warmup_select_rate=1.0,
        select_score_mode=mode, select_negatives="all",
    )  # fmt: skip
    losses = [[line["loss"] for line in train(state)] for state in (plain, everything)]
    assert losses[0] == losses[1]
    assert same(weights(plain), weights(everything))


def test_scoring_all_the_same_changes_no_loss(tmp_path: Path):
    settings = {"force_patch_dropout": 0.5, "select": True, "select_strategy": "clipscore", "select_rate": 1.0}
    states = [make_state(tmp_path, **settings, record=record, select_score_mode="train") for record in (False, True)]
    first, second = ([line["loss"] for line in train(state)] for state in states)
    assert first == second


def test_the_same_seed_gives_the_same_run(tmp_path: Path):
    settings = {"select": True, "select_strategy": "random", "select_rate": 0.5, "force_patch_dropout": 0.5}
    first, second, other = (make_state(tmp_path, **settings, seed=seed) for seed in (1, 1, 2))
    losses = [[line["loss"] for line in train(state)] for state in (first, second, other)]
    assert losses[0] == losses[1] != losses[2]


VARIANTS: list[dict[str, Any]] = [
    {"siglip": True},
    {"model": "toy-coca"},
    {"model": "toy-rn"},
    {"model": "toy-timm", "lock_image": True},
    {"accum_freq": 3},
    {"accum_freq": 3, "siglip": True},
    {"accum_freq": 3, "model": "toy-coca"},
    {"precision": "amp"},
    {"precision": "amp_bf16"},
    {"precision": "bf16"},
    {"precision": "pure_bf16"},
    {"precision": "fp16"},
    {"grad_checkpointing": True},
    {"grad_clip_norm": 0.1},
    {"opt": "timm/lamb", "beta1": None, "beta2": None},
    {"skip_scheduler": True},
    {"model": "toy-rn", "channels_last": True},
    {"select_score_mode": "train"},
    {"select_negatives": "all"},
    {"select_negatives": "all", "precision": "pure_bf16"},
    {"select_negatives": "all", "model": "toy-rn", "select_score_mode": "train", "precision": "amp"},
    pytest.param({"torchcompile": True}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("name", ["small_loss", "warmup_base_sampling"])
def test_selection_works_with_every_way_to_train(tmp_path: Path, variant: dict[str, Any], name: str):
    state = make_state(tmp_path, select=True, select_strategy=name, select_rate=0.5, warmup_point=1, **variant)
    before = weights(state)
    lines = train(state, image_size=32 if state.config.model.model in ("toy-rn", "toy-timm") else 16)
    assert all(torch.isfinite(torch.tensor(line["loss"])) for line in lines)
    assert not same(before, weights(state))
    assert state.counters.trained == state.counters.seen / 2


@pytest.mark.parametrize("variant", [{}, {"siglip": True}, {"accum_freq": 3}, {"precision": "amp"}], ids=str)
def test_weights_reach_the_loss(tmp_path: Path, variant: dict[str, Any]):
    """When losses are known, those of training are other ones without the weights; before, all weights are 1."""
    settings = {"select": True, "select_strategy": "infobatch", "select_rate": 0.5, **variant}
    states = [make_state(tmp_path, **settings, select_rescale=rescale) for rescale in ("on", "off")]
    first, second = ([line["loss"] for line in train(state)] for state in states)
    begin = len(first) // 2
    assert first[:begin] == pytest.approx(second[:begin], rel=1e-5)
    assert first[begin:] != pytest.approx(second[begin:], rel=1e-4)
    assert all(map(math.isfinite, first))


def test_the_losses_that_are_learned_are_those_of_training(tmp_path: Path):
    """Their mean is the loss of the step, also where several batches make it."""
    state = make_state(tmp_path, select=True, select_strategy="infobatch", select_rate=0.5, accum_freq=3)
    (line,) = train(state, epochs=1)
    assert state.selection is not None
    known = state.selection.store.scores[:, 0]
    assert known.isfinite().sum() == 12
    assert known.nanmean().item() == pytest.approx(line["loss"], rel=1e-5)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_an_epoch_at_rate_one_is_training_without_selection(tmp_path: Path, schedule: str):
    settings = {"select": True, "select_strategy": "clipscore", "select_rate": 0.5, "select_rate_schedule": schedule}
    plain, annealed = make_state(tmp_path), make_state(tmp_path, **settings)
    losses = [[line["loss"] for line in train(state)] for state in (plain, annealed)]
    assert losses[0][:STEPS] == losses[1][:STEPS]
    assert losses[0][STEPS] != losses[1][STEPS]
    assert annealed.counters.scored == STEPS * N
    assert annealed.counters.trained == STEPS * (N + N // 2)


def test_full_epochs_at_the_end_score_nothing(tmp_path: Path):
    """Not even where a strategy remembers: nothing will be read any more."""
    settings = {"select": True, "select_strategy": "historical_base_sampling", "select_rate": 0.5}
    state = make_state(tmp_path, **settings, select_full_last=0.5)
    train(state)
    assert state.counters.scored == STEPS * N
    assert state.counters.trained == STEPS * (N // 2 + N)


def test_distillation_learns_from_the_selected(tmp_path: Path):
    torch.save(make_state(tmp_path, seed=5).module.state_dict(), tmp_path / "teacher.pt")
    state = make_state(
        tmp_path, distill_model="toy-vit", distill_pretrained=str(tmp_path / "teacher.pt"), select=True,
        select_strategy="clipscore", select_rate=0.5,
    )  # fmt: skip
    lines = train(state, epochs=1)
    assert lines[0]["loss"] == pytest.approx(lines[0]["contrastive_loss"] + lines[0]["distill_loss"], rel=1e-5)


@pytest.mark.parametrize(("source", "more"), [("toy-coca", {}), ("toy-vit", {"init_logit_bias": -10})])
def test_a_teacher_with_another_loss_teaches_by_its_features(tmp_path: Path, source: str, more: dict[str, Any]):
    make_config(tmp_path)
    config = json.loads((tmp_path / f"{source}.json").read_text()) | more
    (tmp_path / "toy-teacher.json").write_text(json.dumps(config))
    torch.save(make_state(tmp_path, model="toy-teacher").module.state_dict(), tmp_path / "teacher.pt")
    flags = {"distill_model": "toy-teacher", "distill_pretrained": str(tmp_path / "teacher.pt")}
    assert train(make_state(tmp_path, **flags), epochs=1)[0]["distill_loss"] > 0
    if more:
        with pytest.raises(SetupError, match="--model toy-teacher has the bias of SigLIP's"):
            make_state(tmp_path, **flags, model="toy-teacher")


def test_accumulation_gives_the_gradient_of_the_whole_batch(tmp_path: Path):
    """Three batches accumulated against one batch three times as large, without an update in between."""
    image, text = random_pairs(SAMPLES)
    ids = torch.arange(SAMPLES)
    parts = [Batch(image[place], text[place], ids[place]) for place in ids.split(N)]
    grads = []
    for batches in ([Batch(image, text, ids)], parts):
        state = make_state(tmp_path, accum_freq=len(batches), lr=0.0, wd=0.0)
        state.schedule = lambda step: 0.0
        train_step(state, batches, PhaseClock(torch.device("cpu")))
        grads.append({name: p.grad for name, p in state.module.named_parameters() if name != "logit_scale"})
    for name, whole in grads[0].items():
        assert torch.allclose(whole, grads[1][name], atol=1e-6, rtol=1e-4), name


def test_accumulated_parts_are_the_selected_ones(tmp_path: Path):
    state = make_state(tmp_path, accum_freq=3, select=True, select_strategy="random", select_rate=0.25)
    train(state, epochs=1)
    assert (state.counters.step, state.counters.batch) == (1, 3)
    assert (state.counters.seen, state.counters.trained) == (SAMPLES, 6)


def test_logit_scale_stays_below_100(tmp_path: Path):
    state = make_state(tmp_path)
    with torch.no_grad():
        state.module.logit_scale.fill_(9.0)
    train(state, epochs=1)
    assert state.module.logit_scale.exp().item() <= 100.01


class BrokenData(MemoryData):
    """The images of the second batch hold what is not a number."""

    def change(self, batch: Batch, step: int) -> Batch:
        return replace(batch, image=torch.full_like(batch.image, torch.nan)) if step == 1 else batch


@pytest.mark.parametrize("model", ["toy-vit", "toy-rn"])
@pytest.mark.parametrize("strategy", [None, "random", "clipscore"])
def test_a_step_that_is_not_finite_changes_nothing(
    tmp_path: Path, model: str, strategy: str | None, caplog: pytest.LogCaptureFixture
):
    chosen = {} if strategy is None else {"select": True, "select_strategy": strategy, "select_rate": 0.5}
    size = 32 if model == "toy-rn" else 16
    state = make_state(tmp_path, model=model, wd=0.0, **chosen)
    lines = train(state, epochs=1, image_size=size, kind=BrokenData)
    assert [line["nonfinite_steps"] for line in lines] == [0, 1, 0]
    assert lines[1]["nonfinite_samples"] > 0
    assert all(math.isfinite(line["loss"]) for line in (lines[0], lines[2]))
    assert all(value.isfinite().all() for value in weights(state).values())
    assert "changed no weights" in caplog.text

    other = make_state(tmp_path, model=model, wd=0.0, **chosen)
    if other.selection is not None:
        other.selection.start_epoch(0)
    _, second, third = MemoryData(other.world, size).loader
    first = next(MemoryData(other.world, size).loader)
    clock = PhaseClock(torch.device("cpu"))
    other.model.train()
    train_step(other, [first], clock)
    before = weights(other)
    train_step(other, [BrokenData(other.world).change(second, 1)], clock)
    assert same({k: v for k, v in before.items() if "num_batches" not in k}, {
        k: v for k, v in weights(other).items() if "num_batches" not in k
    })  # fmt: skip
    train_step(other, [third], clock)
    assert not same(before, weights(other))


@pytest.mark.parametrize("with_folder", [True, False])
def test_too_many_steps_in_a_row_stop_with_what_to_look_at(tmp_path: Path, with_folder: bool):
    state = make_state(tmp_path, max_nonfinite_steps=2)
    state.folder = tmp_path if with_folder else None
    with torch.no_grad():
        state.module.text_projection.fill_(torch.nan)
    message = r"2 steps in a row, 0 to 1, on rank 0 .*--lr.*--precision"
    with pytest.raises(TrainingError, match=message):
        train(state, epochs=1)
    if with_folder:
        (kept,) = (tmp_path / "nonfinite").iterdir()
        content = torch.load(kept, weights_only=True)
        assert content["step"] == 1
        assert content["batches"][0]["sample_id"].tolist() == list(range(N, 2 * N))
        assert content["batches"][0]["image"].shape == (N, 3, 16, 16)


def test_too_many_samples_that_cannot_be_used_stop(tmp_path: Path):
    class Rotten(MemoryData):
        def __init__(self, world: World, image_size: int) -> None:
            super().__init__(world, image_size)
            self.count = 13  # of the epoch's 24

    train(make_state(tmp_path, max_skip_fraction=0.6), epochs=1, kind=Rotten)
    with pytest.raises(TrainingError, match=r"13 bad_image.*shard\.tar"):
        train(make_state(tmp_path, max_skip_fraction=0.5), epochs=1, kind=Rotten)


class Noted(Saver):
    """Takes note of when it is asked to save."""

    def __init__(self, state: TrainState) -> None:
        super().__init__({}, state.counters, state.config, state.world, None, NoSync())
        self.saved: list[tuple[int, int]] = []

    def save(self) -> None:
        self.saved.append((self.counters.epoch, self.counters.epoch_step))


def test_saves_inside_the_epoch_and_not_at_its_end(tmp_path: Path):
    state = make_state(tmp_path, save_every_n_steps=1)
    data: Any = MemoryData(state.world)
    saver = Noted(state)
    for _ in range(2):
        train_epoch(state, data, Reports(), saver)
    assert saver.saved == [(0, 1), (0, 2), (1, 1), (1, 2)]


@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_signal_saves_and_stops(tmp_path: Path, step: int):
    state = make_state(tmp_path)
    data: Any = MemoryData(state.world)
    saver = Noted(state)

    class Interrupting(Reports):
        def train(self, step_now: int, metrics: Mapping[str, float]) -> None:
            if step_now == step:
                state.world.watchdog.request_stop("SIGTERM")

    if step == STEPS:  # the epoch's own checkpoint follows
        assert train_epoch(state, data, Interrupting(), saver) == "SIGTERM"
        assert saver.saved == []
    else:
        with pytest.raises(Stopped, match="SIGTERM"):
            train_epoch(state, data, Interrupting(), saver)
        assert saver.saved == [(0, step)]


JOINT = {"divbs", "learnability", "jest", "negcliploss"}


@pytest.mark.parametrize(
    "name",
    ["warmup_base_sampling", "infobatch", "scan", "clipscore:1+small_loss:2", *sorted(JOINT)],
)
def test_no_tensor_is_read_back_within_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    """On a GPU every one of these would wait for the device."""
    negatives = "selected" if name in ("infobatch", "scan") else "all"
    state = make_state(
        tmp_path, select=True, select_strategy=name, select_rate=0.5, warmup_point=1, select_negatives=negatives
    )
    state.counters.epoch = 1 if name == "scan" or state.reference is not None else 0
    if state.reference is not None:
        state.reference.begin(1, state.module)
    (batch, *_) = MemoryData(state.world).loader
    assert state.selection is not None
    state.selection.start_epoch(state.counters.epoch)
    train_step(state, [batch], PhaseClock(torch.device("cpu")))  # the optimizer makes its state in the first step
    state.optimizer = torch.optim.SGD(state.module.parameters(), lr=0.1)

    def refuse(*arguments: object) -> None:
        raise AssertionError("a tensor was read back")

    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "nonzero"):
        monkeypatch.setattr(Tensor, name, refuse)
    train_step(state, [batch], PhaseClock(torch.device("cpu")))


def test_metrics_have_openclips_names_and_the_phases(tmp_path: Path):
    (line, *_) = train(make_state(tmp_path), epochs=1)
    assert {
        "data_time",
        "batch_time",
        "samples_per_second",
        "samples_per_second_per_gpu",
        "scale",
        "lr",
        "loss",
    } <= set(line)
    assert {"contrastive_loss", "score_time", "train_time", "optimizer_time", "load_seconds", "seen", "trained"} <= set(
        line
    )


def test_skipped_samples_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    train(make_state(tmp_path), epochs=1)
    assert "2 bad_image" in caplog.text
    assert "no_caption" not in caplog.text


RANK_VARIANTS: list[dict[str, Any]] = [
    {"select_strategy": "small_loss", "local_loss": True, "gather_with_grad": True},
    {"select_strategy": "small_loss", "siglip": True},
    {"select_strategy": "historical_base_sampling", "accum_freq": 3},
    {"select_strategy": "historical_base_sampling", "model": "toy-coca"},
    {"select_strategy": "warmup_base_sampling", "warmup_point": 1, "precision": "amp"},
    {"select_strategy": "random", "ddp_static_graph": True},
    {"select_strategy": "random", "ddp_static_graph": True, "accum_freq": 3},
    {"select_strategy": "clipscore", "model": "toy-rn"},
    {"select_strategy": "jest", "warmup_point": 1, "siglip": True},
    {"select_strategy": "divbs", "siglip": True},
    {"select": False, "accum_freq": 3},
    {"select_strategy": "infobatch"},
    {"select_strategy": "infobatch", "infobatch_prune_ratio": 0.9, "accum_freq": 3, "local_loss": True},
    {"select_strategy": "infobatch", "siglip": True},
    {"select_strategy": "scan", "model": "toy-coca"},
    {"select_strategy": "warmup_base_sampling:1+small_loss:1", "warmup_point": 1},
]


def _train_on_rank(world: World, folder: str) -> list[tuple[float, list[float]]]:
    results = []
    for variant in RANK_VARIANTS:
        state = make_state(Path(folder), world, **({"select": True, "select_rate": 0.5} | variant))
        train(state, image_size=32 if state.config.model.model == "toy-rn" else 16)
        total = sum(value.double().sum().item() for value in state.module.state_dict().values())
        scores = [] if state.selection is None else state.selection.store.scores.nan_to_num(-1).flatten().tolist()
        results.append((total, scores))
    return results


@pytest.mark.dist
def test_two_ranks_stay_equal(tmp_path: Path):
    """Weights and scores are the same on both ranks, with the ways to train that have collectives of their own."""
    for variant, first, second in zip(RANK_VARIANTS, *run_on_ranks(2, _train_on_rank, str(tmp_path)), strict=True):
        assert first == second, variant


@pytest.mark.parametrize("accum_freq", [1, 3])
@pytest.mark.parametrize("tower", ["image", "text"])
def test_features_of_a_locked_tower_are_computed_once(tmp_path: Path, tower: str, accum_freq: int):
    flags = {"select": True, "select_strategy": "small_loss", f"lock_{tower}": True, "accum_freq": accum_freq}
    again, once = (make_state(tmp_path, **flags, score_keep_locked=keep) for keep in (False, True))
    asked: dict[str, int] = {"image": 0, "text": 0}
    for name in asked:
        encode = getattr(once.module, f"encode_{name}")

        def count(*args: Any, name: str = name, encode: Any = encode, **options: Any) -> Tensor:
            asked[name] += 1
            return encode(*args, **options)

        setattr(once.module, f"encode_{name}", count)
    expected, got = train(again), train(once)
    assert [line["loss"] for line in got] == pytest.approx([line["loss"] for line in expected], rel=1e-4)
    passes = {tower: 2 * STEPS}  # the scoring pass alone
    for name, times in asked.items():
        assert times == passes.get(name, 2 * STEPS * (2 if accum_freq == 1 else 3))


def test_a_tower_that_is_not_locked_as_a_whole_cannot_be_kept(tmp_path: Path):
    flags = {"select": True, "lock_image": True, "lock_image_unlocked_groups": 1, "score_keep_locked": True}
    with pytest.raises(SetupError, match="--score-keep-locked: no tower of --model toy-vit is locked as a whole"):
        make_state(tmp_path, **flags)


@pytest.mark.parametrize("saved", [None, False])
def test_an_optimizer_that_was_not_fused_goes_on_fused(tmp_path: Path, saved: bool | None):
    """As OpenCLIP's checkpoints have it: torch takes every option of a group from the file."""
    state = make_state(tmp_path, select=False)
    train(state)
    content = state.optimizer.state_dict()
    for group in content["param_groups"]:
        group["fused"] = saved
    again = make_state(tmp_path, select=False)
    OptimizerState(again.optimizer).load_state_dict(content)
    assert all(group["fused"] for group in again.optimizer.param_groups)
    train(again)
