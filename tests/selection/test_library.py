"""dissect_clip.Selection in a plain training loop: the trainer's choices, reloads, and calls that are missing."""

import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import run_on_ranks
from selection.test_selector import encode, encode_otherwise, make_batch
from torch import Tensor

import dissect_clip
from dissect_clip.config.settings import Config
from dissect_clip.distributed.world import World
from dissect_clip.selection import STRATEGIES, Choice, Needs, Selection, build_selection
from dissect_clip.selection.options import library_settings
from dissect_clip.training.step import score_and_choose

SAMPLES, N, EPOCHS, RATE = 40, 10, 3, 0.3
NAMES = [*STRATEGIES, "small_loss:1+clipscore:2"]
OPTIONS: dict[str, dict[str, Any]] = {
    "warmup_base_sampling": {"warmup_point": 1},
    "learnability": {"warmup_point": 1},
    "jest": {"warmup_point": 1},
    "clean_posterior": {"warmup_point": 1, "clean_decoys": 0.1},
    "scan": {"scan_warmup": 0, "scan_period": 1},
}


def make(name: str, **options: Any) -> Selection:
    options = {"rate": RATE, "num_samples": SAMPLES, "epochs": EPOCHS, **OPTIONS.get(name, {}), **options}
    return dissect_clip.Selection(name, **options)


def batches(epoch: int, rank: int = 0, ranks: int = 1) -> list[Tensor]:
    """The ids of this rank's batches of an epoch."""
    order = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(epoch))
    return list(order.reshape(-1, ranks, N)[:, rank])


def features(sample_id: Tensor) -> dict[str, Tensor]:
    return {name: part for name, part in encode(make_batch(sample_id)).parts().items() if part is not None}


def reference_features(sample_id: Tensor) -> dict[str, Tensor]:
    parts = encode_otherwise(make_batch(sample_id)).parts()
    return {f"reference_{name}": part for name, part in parts.items() if part is not None}


def plain_step(selection: Selection, sample_id: Tensor) -> Choice:
    """A step as a user would write it, for any strategy."""
    selection.swap_captions(sample_id, sample_id[:, None])
    choice = selection.choose(sample_id, **features(sample_id), **reference_features(sample_id))
    kept = sample_id[choice.index]
    selection.learn(kept, **features(kept))
    return choice


def train_plainly(selection: Selection, epochs: range, rank: int = 0, ranks: int = 1) -> list[list[int]]:
    chosen = []
    for epoch in epochs:
        selection.start_epoch(epoch)
        chosen += [plain_step(selection, ids).index.tolist() for ids in batches(epoch, rank, ranks)]
    return chosen


def train_as_the_trainer(selection: Selection, world: World) -> list[list[int]]:
    """The same by the trainer's own functions, which count batches and score only what is asked for."""
    chosen, step = [], 0
    for epoch in range(EPOCHS):
        selection.start_epoch(epoch)
        for ids in batches(epoch, world.rank, world.size):
            selection.swap_captions(ids, ids[:, None])
            choice, _ = score_and_choose(selection, make_batch(ids), encode, encode_otherwise, step)
            part = encode(make_batch(ids[choice.index]))
            loss = selection.pair_losses(part.image_features, part.text_features, part.logit_scale)
            selection.learn(
                ids[choice.index], loss, image_features=part.image_features, text_features=part.text_features
            )
            chosen.append(choice.index.tolist())
            step += 1
    return chosen


def trainers(name: str, world: World, **options: Any) -> Selection:
    settings = library_settings(name, RATE, SAMPLES, EPOCHS, 0, 1, {**OPTIONS.get(name, {}), **options})
    selection = build_selection(settings, SAMPLES, world)
    assert selection is not None
    selection.draw_decoys(SAMPLES)
    return selection


def same_table(first: Selection, second: Selection) -> bool:
    return torch.equal(first.store.scores.nan_to_num(-9), second.store.scores.nan_to_num(-9))


@pytest.mark.parametrize("name", NAMES)
def test_a_plain_loop_chooses_as_the_trainer_does(name: str):
    selection, other = make(name), trainers(name, World())
    assert train_plainly(selection, range(EPOCHS)) == train_as_the_trainer(other, World())
    assert same_table(selection, other)


@pytest.mark.parametrize("name", ["clipscore", "small_loss", "historical_base_sampling"])
def test_a_plain_loop_ranks_by_earlier_scores_as_the_trainer_does(name: str):
    selection, other = make(name, score_refresh=0.4), trainers(name, World(), score_refresh=0.4)
    assert train_plainly(selection, range(EPOCHS)) == train_as_the_trainer(other, World())
    assert same_table(selection, other)


def on_two_ranks(world: World) -> list[Any]:
    found = []
    for name in NAMES:
        selection, other = make(name), trainers(name, world)
        plain = train_plainly(selection, range(EPOCHS), world.rank, world.size)
        assert plain == train_as_the_trainer(other, world), name
        assert same_table(selection, other), name
        found.append(selection.store.scores.nan_to_num(-9).tolist())
    return found


@pytest.mark.dist
def test_two_ranks_choose_as_the_trainers_do_and_keep_one_table():
    first, second = run_on_ranks(2, on_two_ranks)
    assert first == second


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("stop", ["between epochs", "inside an epoch"])
def test_a_reloaded_run_chooses_as_the_uninterrupted_one(name: str, stop: str):
    whole, first, second = (make(name) for _ in range(3))
    chosen = train_plainly(whole, range(EPOCHS))
    again = train_plainly(first, range(2))
    rest = batches(2)
    if stop == "inside an epoch":
        first.start_epoch(2)
        again += [plain_step(first, ids).index.tolist() for ids in rest[:2]]
        rest = rest[2:]
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    second.start_epoch(2)
    again += [plain_step(second, ids).index.tolist() for ids in rest]
    assert again == chosen
    assert same_table(whole, second)


# ---- what a strategy takes


@pytest.mark.parametrize(("name", "best"), [("small_loss", [7, 8, 9]), ("big_loss", [0, 1, 2])])
def test_a_loss_is_enough_for_strategies_by_loss(name: str, best: list[int]):
    selection = make(name)
    selection.start_epoch(0)
    assert selection.choose(torch.arange(N), loss=torch.arange(9.0, -1, -1)).index.tolist() == best


def test_a_similarity_is_enough_for_strategies_by_score():
    selection = make("clipscore")
    selection.start_epoch(0)
    choice = selection.choose(torch.arange(N), similarity=torch.linspace(0.1, 0.9, N))
    assert choice.index.tolist() == [7, 8, 9]
    assert choice.weight is None


def test_infobatch_needs_ids_and_the_losses_of_training_alone():
    selection = make("infobatch", rate=0.5, select_full_last=0.0)
    for epoch in range(2):
        selection.start_epoch(epoch)
        choice = selection.choose(torch.arange(N))
        selection.learn(choice.index, torch.arange(10.0)[choice.index])
    assert choice.weight is not None
    assert choice.weight.mean().item() == pytest.approx(1.0)


def test_features_with_gradients_are_taken_and_no_graph_is_kept():
    selection = make("small_loss")
    selection.start_epoch(0)
    parts = {name: part.clone().requires_grad_() for name, part in features(torch.arange(N)).items()}
    choice = selection.choose(torch.arange(N), **parts)
    assert choice.candidates is not None
    assert choice.candidates.loss is not None
    assert not choice.candidates.loss.requires_grad


def test_scores_of_the_rows_that_were_asked_for_are_enough():
    one, other = make("clipscore", score_refresh=0.4), make("clipscore", score_refresh=0.4)
    for selection in (one, other):
        train_plainly(selection, range(1))
        selection.start_epoch(1)
    ids = torch.arange(N)
    rows = one.rows_to_score(ids)
    assert len(rows) == 4
    first, second = one.choose(ids, **features(ids[rows])), other.choose(ids, **features(ids))
    assert torch.equal(first.index, second.index)
    assert first.scored == 4


# ---- calls that are missing


def test_a_missing_start_epoch_is_named():
    with pytest.raises(RuntimeError, match=r"start_epoch"):
        make("random").choose(torch.arange(N))


def test_a_missing_start_epoch_after_a_reload_is_named():
    selection = make("random")
    selection.load_state_dict(make("random").state_dict())
    with pytest.raises(RuntimeError, match=r"start_epoch"):
        selection.choose(torch.arange(N))


@pytest.mark.parametrize("call", ["choose", "start_epoch", "state_dict"])
def test_a_missing_learn_is_named(call: str):
    selection = make("infobatch")
    selection.start_epoch(0)
    selection.choose(torch.arange(N))
    calls = {
        "choose": lambda: selection.choose(torch.arange(N)),
        "start_epoch": lambda: selection.start_epoch(1),
        "state_dict": lambda: selection.state_dict(),
    }
    with pytest.raises(RuntimeError, match=r"learn was not called .* infobatch"):
        calls[call]()


def test_learn_may_be_left_out_when_no_epoch_reads_it():
    selection = make("scan", scan_warmup=1)
    selection.start_epoch(0)
    selection.choose(torch.arange(N))
    selection.choose(torch.arange(N))


def test_with_accumulation_several_choices_wait():
    selection = make("infobatch", accumulate=2)
    selection.start_epoch(0)
    choices = [selection.choose(torch.arange(N) + N * part) for part in range(2)]
    with pytest.raises(RuntimeError, match="learn was not called"):
        selection.choose(torch.arange(N))
    for part, choice in enumerate(choices):
        selection.learn(choice.index + N * part, torch.full((len(choice.index),), float(part)))
    known = selection.store.scores[: 2 * N, 0]
    assert known[choices[0].index].eq(0).all()
    assert known[choices[1].index + N].eq(1).all()


def test_learn_without_a_choice_is_refused():
    selection = make("infobatch")
    selection.start_epoch(0)
    with pytest.raises(RuntimeError, match="choose"):
        selection.learn(torch.arange(3), torch.zeros(3))


def test_learn_about_other_rows_is_refused():
    selection = make("infobatch")
    selection.start_epoch(0)
    choice = selection.choose(torch.arange(N))
    with pytest.raises(ValueError, match=r"sample_id\[choice.index\]"):
        selection.learn(torch.arange(N)[choice.index] + 1, torch.zeros(len(choice.index)))


def test_decoys_without_their_captions_are_refused():
    selection = make("clean_posterior")
    selection.start_epoch(0)
    with pytest.raises(RuntimeError, match=r"swap_captions.* clean_decoys=0"):
        selection.choose(torch.arange(N))


def test_decoys_get_captions_of_others():
    selection = make("clean_posterior")
    selection.start_epoch(0)
    text = torch.arange(SAMPLES)[:, None]
    swapped = selection.swap_captions(torch.arange(SAMPLES), text)
    assert (swapped != text).sum() == 4  # 0.1 of 40


@pytest.mark.parametrize(
    ("name", "given", "missing"),
    [
        ("clipscore", {}, "clipscore needs image_features and text_features, or similarity"),
        ("small_loss", {}, "small_loss needs loss"),
        ("negcliploss", {"similarity"}, "negcliploss needs image_features and text_features"),
        ("small_loss", {"image_features", "text_features"}, "small_loss needs logit_scale"),
    ],
)
def test_a_missing_part_is_named(name: str, given: set[str], missing: str):
    selection = make(name)
    selection.start_epoch(0)
    parts = features(torch.arange(N)) | {"similarity": torch.zeros(N)}
    with pytest.raises(ValueError, match=missing):
        selection.choose(torch.arange(N), **{part: parts[part] for part in given})


def test_a_missing_reference_is_named():
    selection = make("learnability")
    selection.start_epoch(1)
    with pytest.raises(ValueError, match=r"learnability needs reference_loss, or reference_image_features"):
        selection.choose(torch.arange(N), **features(torch.arange(N)))


def test_missing_features_of_training_are_named():
    selection = make("clipscore", score_refresh=0.0)
    selection.start_epoch(0)
    choice = selection.choose(torch.arange(N), **features(torch.arange(N)))
    with pytest.raises(ValueError, match="clipscore needs image_features and text_features of the training pass"):
        selection.learn(choice.index, torch.zeros(len(choice.index)))


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.arange(N) + SAMPLES - N + 1, r"0\.\.39, and has 40"),
        (torch.arange(N) - 1, r"0\.\.39, and has -1"),
        (torch.arange(N).int(), "int64"),
        (torch.arange(N)[None], r"\[N\]"),
    ],
)
def test_ids_that_are_none_of_the_dataset_are_refused(ids: Tensor, message: str):
    selection = make("random")
    selection.start_epoch(0)
    with pytest.raises(ValueError, match=message):
        selection.choose(ids)


def test_features_that_are_not_normalised_are_refused():
    selection = make("clipscore")
    selection.start_epoch(0)
    parts = features(torch.arange(N))
    with pytest.raises(ValueError, match="image_features must have unit norm"):
        selection.choose(torch.arange(N), 3 * parts["image_features"], parts["text_features"])


@pytest.mark.parametrize("part", ["loss", "similarity"])
def test_scores_of_another_number_of_rows_are_refused(part: str):
    selection = make("small_loss" if part == "loss" else "clipscore")
    selection.start_epoch(0)
    with pytest.raises(ValueError, match=rf"{part} is \[9\]"):
        selection.choose(torch.arange(N), **{part: torch.zeros(N - 1)})


# ---- settings and state


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("no_such", {}, "no_such.* small_loss"),
        ("random", {"no_such": 1}, "no option 'no_such'"),
        ("random", {"rate": 1.5}, "rate is 1.5"),
        ("random", {"epochs": -1}, "epochs is -1"),
        ("random", {"select_rate_schedule": "steep"}, "steep.* linear"),
        ("warmup_base_sampling", {"warmup_point": 9}, "warmup-point 9"),
        ("clipscore", {"jest_chunks": 3}, "--jest-chunks"),
        ("divbs", {"score_refresh": 0.1}, "--score-refresh 0.1"),
    ],
)
def test_wrong_settings_are_refused(name: str, options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        make(name, **options)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (("big_loss", {}), "big_loss"),
        (("clipscore", {"num_samples": 50}), "50 samples"),
        (("clipscore", {"score_refresh": 0.5}), "last_score"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(other: tuple[str, dict[str, Any]], message: str):
    name, options = other
    selection, state = make("clipscore"), make(name, **options).state_dict()
    assert any(message in misfit for misfit in selection.misfits(state))
    with pytest.raises(ValueError, match=message):
        selection.load_state_dict(state)


def test_decoys_of_another_seed_do_not_fit():
    state = make("clean_posterior", seed=1).state_dict()
    with pytest.raises(ValueError, match=r"--seed 1, this run has .*--seed 0"):
        make("clean_posterior").load_state_dict(state)


@pytest.mark.parametrize("name", [name for name in NAMES if ":" not in name])
def test_a_state_fits_its_own_kind(name: str):
    selection = make(name)
    train_plainly(selection, range(2))
    assert make(name).misfits(selection.state_dict()) == []


@pytest.mark.parametrize(
    "name",
    [name for name in STRATEGIES if STRATEGIES.class_of(name).needs is Needs.SCORE and not STRATEGIES[name].reuses],
)
def test_the_table_moves_to_the_device_of_the_first_batch(name: str):
    selection, meta = make(name, **({"clean_decoys": 0.0} if name == "clean_posterior" else {})), torch.device("meta")
    selection._move_to(meta)
    assert selection.store.scores.device == selection.not_finite.device == meta
    given = make(name, device="cpu")
    given._move_to(meta)
    assert given.store.scores.device.type == "cpu"


def test_importing_the_package_does_not_import_torch():
    code = "import sys, dissect_clip; assert 'torch' not in sys.modules; print(dissect_clip.Selection.__name__)"
    environment = os.environ | {"PYTHONPATH": str(Path(dissect_clip.__file__).parent.parent)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == "Selection"


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no_such"):
        _ = dissect_clip.no_such


def test_options_are_those_of_the_command_line():
    config = library_settings("random", 0.5, 10, 3, 0, 1, {"record": True})
    assert isinstance(config, Config)
    assert config.selection.record
