"""``dissect-clip coreset``: what each method measures and keeps, on records by hand and of real runs."""

import json
import math
from collections import defaultdict
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from runs import arguments, record, selection, train
from shards_util import make_shards, write_json

from dissect_clip.checkpoint import load_checkpoint
from dissect_clip.cli import coreset as coreset_command
from dissect_clip.config.parser import parse_args
from dissect_clip.data import build_train
from dissect_clip.distributed.world import World
from dissect_clip.models.build import build_model
from dissect_clip.selection import STRATEGIES, coreset


@pytest.fixture
def make():
    return lambda *argv: coreset_command.main([str(arg) for arg in argv])


# ---- records by hand

FLOATS = ("score", "loss", "remembered_clip_score")


def write_epoch(folder, epoch, rows, groups=2):
    """Rows (sample, step, {column: value}) as the file of an epoch; a value that is not there is null."""
    folder.mkdir(parents=True, exist_ok=True)
    columns = {
        "sample_id": pa.array([row[0] for row in rows], pa.int64()),
        "shard": pa.array([f"{row[0] // 4}.tar" for row in rows], pa.string()).dictionary_encode(),
        "key": pa.array([f"k{row[0]}" for row in rows], pa.string()),
        **{name: pa.array([row[2].get(name) for row in rows], pa.float32()) for name in FLOATS},
        "selected": pa.array([True] * len(rows)),
        "step": pa.array([row[1] for row in rows], pa.int32()),
        "rank": pa.array([0] * len(rows), pa.int16()),
    }
    table = pa.table(columns)
    with pq.ParquetWriter(folder / f"epoch_{epoch:05d}.parquet", table.schema) as writer:
        steps = sorted(set(columns["step"].to_pylist()))
        cuts = [0, *(steps[len(steps) * n // groups] for n in range(1, groups)), 1 << 30]
        for low, high in pairwise(cuts):
            writer.write_table(table.filter((pa.compute.field("step") >= low) & (pa.compute.field("step") < high)))


def of_column(name, *epochs):
    """Epochs as {sample: value} of one column, two samples a step."""
    return [
        [(sample, place // 2, {name: value}) for place, (sample, value) in enumerate(epoch.items())] for epoch in epochs
    ]


def kept_in(path):
    return {row["sample_id"]: row["value"] for row in pq.read_table(path).to_pylist()}


def made(make, folder, epochs, *flags, groups=2):
    for number, rows in enumerate(epochs):
        write_epoch(folder / "record", number, rows, groups)
    output = folder / "list.parquet"
    assert make(folder / "record", "--output", output, *flags) == 0
    return kept_in(output)


def test_a_list_says_where_it_is_from(make, tmp_path, capsys):
    epochs = of_column("score", {0: 30.0, 1: 10.0, 5: 20.0, 6: 40.0})
    assert made(make, tmp_path, epochs, "--method", "clipscore", "--rate", 0.5) == {0: 30.0, 6: 40.0}
    table = pq.read_table(tmp_path / "list.parquet")
    assert table.select(["shard", "key"]).to_pylist() == [
        {"shard": "0.tar", "key": "k0"},
        {"shard": "1.tar", "key": "k6"},
    ]
    facts = json.loads(table.schema.metadata[b"dissect_clip.coreset"])
    assert facts == {
        "method": "clipscore", "record": str(tmp_path / "record"), "epochs": [0], "rate": 0.5, "threshold": None,
        "seed": 0, "samples": 4, "kept": 2,
    }  # fmt: skip
    assert "kept 2 of 4 samples (50.0%) by clipscore" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("--method", "clipscore", "--threshold", 20), {1: 20.0, 2: 30.0}),
        (("--method", "clipscore", "--rate", 0.3), {2: 30.0}),
        (("--method", "clipscore", "--rate", 0.01), {2: 30.0}),
        (("--method", "clipscore", "--rate", 0.3, "--epochs", "0"), {0: 50.0}),
        (("--method", "clipscore", "--rate", 0.3, "--epochs", "0:1"), {0: 30.0}),
        (("--method", "cliploss", "--rate", 0.6), {1: 1.0, 2: 0.5}),
        (("--method", "cliploss", "--threshold", 0.5), {2: 0.5}),
        (("--method", "differential", "--rate", 0.6), {0: 5.0, 1: -1.0}),
        (("--method", "differential", "--threshold", 0, "--reference-epoch", 0), {0: 40.0}),
    ],
)
def test_what_is_kept(make, tmp_path, flags, expected):
    """Scores the larger the better, losses the smaller; of the newest epoch, or as asked."""
    first = [(0, 0, {"score": 50.0}), (1, 0, {"score": 2.0}), (2, 1, {"score": 4.0})]
    newest = [
        (0, 0, {"score": 10.0, "loss": 3.0, "remembered_clip_score": 15.0}),
        (1, 0, {"score": 20.0, "loss": 1.0, "remembered_clip_score": 19.0}),
        (2, 1, {"score": 30.0, "loss": 0.5, "remembered_clip_score": 20.0}),
    ]
    assert made(make, tmp_path, [first, newest], *flags) == expected


def test_the_first_visit_of_an_epoch_counts_and_what_has_no_value_is_not_kept(make, tmp_path):
    rows = [
        (3, 2, {"score": 90.0}),
        (3, 0, {"score": 10.0}),
        (1, 1, {}),
        (1, 3, {"score": 80.0}),
        (2, 1, {"score": 5.0}),
    ]
    assert made(make, tmp_path, [rows], "--method", "clipscore", "--rate", 1) == {3: 10.0, 2: 5.0}


def test_equal_values_at_the_edge_are_drawn(make, tmp_path):
    epochs = of_column("score", {sample: float(sample >= 90) for sample in range(100)})
    draws = []
    for seed in (0, 0, 1):
        (tmp_path / "list.parquet").unlink(missing_ok=True)
        draws.append(made(make, tmp_path, epochs, "--method", "clipscore", "--rate", 0.3, "--seed", seed))
        assert len(draws[-1]) == 30
        assert set(range(90, 100)) < set(draws[-1])
    assert draws[0] == draws[1] != draws[2]


def test_random_is_uniform_over_all_samples_of_the_record(make, tmp_path):
    epochs = of_column("score", dict.fromkeys(range(0, 400, 2), 1.0), dict.fromkeys(range(400, 600, 2), 1.0))
    chosen = made(make, tmp_path, epochs, "--method", "random", "--rate", 0.5)
    assert len(chosen) == 150
    assert all(sample % 2 == 0 for sample in chosen)
    assert 30 < sum(sample >= 400 for sample in chosen) < 70


# ---- forgetting


def events_by_hand(epochs, learned):
    """{sample: events} by following each sample through its visits; inf where it never was learned."""
    history = defaultdict(list)
    for rows in epochs:
        first = {}
        for sample, step, value in sorted(rows, key=lambda row: row[1]):
            first.setdefault(sample, (step, value))
        for sample, (step, value) in first.items():
            status = learned(value, [v for _, s, v in rows if s == step])
            if status is not None:
                history[sample].append(status)
    return {
        sample: float(sum(a and not b for a, b in pairwise(visits))) if any(visits) else math.inf
        for sample, visits in history.items()
    }


VALUES = st.sampled_from([None, 0.1, 0.6931, 0.7, 2.0, 5.0])
EPOCHS = st.lists(
    st.lists(st.tuples(st.integers(0, 6), st.integers(0, 3), VALUES), min_size=1, max_size=14), min_size=1, max_size=5
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(epochs=EPOCHS, groups=st.integers(1, 3))
@pytest.mark.parametrize("by", ["loss", "score"])
def test_forgetting_counts_falls_from_learned_to_not(tmp_path, by, epochs, groups):
    epochs = [list({(sample, step): (sample, step, value) for sample, step, value in rows}.values()) for rows in epochs]

    def learned(value, of_step):
        if value is None:
            return None
        if by == "loss":
            return value <= math.log(2)
        return value >= np.median(np.array([v for v in of_step if v is not None], np.float32)) - 1e-6

    expected = events_by_hand(epochs, learned)
    for number, rows in enumerate(epochs):
        write_epoch(tmp_path, number, [(sample, step, {by: value}) for sample, step, value in rows], groups)
    files = [tmp_path / f"epoch_{number:05d}.parquet" for number in range(len(epochs))]
    at = {"loss": math.log(2), "score": 0.5}[by]
    value, told = coreset.forgetting_events(files, 7, by, at, "most")
    assert {sample: value[sample] for sample in range(7) if not math.isnan(value[sample])} == expected
    assert told["never_learned"] == sum(events == math.inf for events in expected.values())
    assert told["never_forgotten"] == sum(events == 0 for events in expected.values())
    last, _ = coreset.forgetting_events(files, 7, by, at, "least")
    assert [n for n in range(7) if last[n] == -1] == [n for n in range(7) if value[n] == math.inf]


def test_the_most_forgotten_are_kept(make, tmp_path, capsys):
    losses = {"never": [5, 5, 5, 5], "twice": [0, 5, 0, 5], "once": [5, 0, 0, 5], "stays": [0, 0, 0, 0]}
    epochs = of_column("loss", *({n: float(row[e]) for n, row in enumerate(losses.values())} for e in range(4)))
    flags = ("--method", "forgetting", "--rate", 0.5)
    assert made(make, tmp_path, epochs, *flags) == {0: math.inf, 1: 2.0}
    said = capsys.readouterr().out
    assert "never learned: 1" in said
    assert "never forgotten: 1" in said
    (tmp_path / "list.parquet").unlink()
    assert made(make, tmp_path, epochs, *flags, "--never-learned", "least") == {1: 2.0, 2: 1.0}
    (tmp_path / "list.parquet").unlink()
    assert made(make, tmp_path, epochs, "--method", "forgetting", "--threshold", 2) == {0: math.inf, 1: 2.0}


# ---- what is refused


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--method", "cliploss", "--rate", 0.5), "nothing that it looks at was recorded in epoch 1"),
        (("--method", "forgetting", "--rate", 0.5), "nothing that it looks at was recorded"),
        (("--method", "clipscore", "--rate", 0.5, "--epochs", "0:2"), "--epochs 0:2: the record has 0, 1"),
        (("--method", "clipscore", "--rate", 0.5, "--epochs", "x"), "--epochs x: give one, as 7"),
        (("--method", "clipscore", "--threshold", 99), "--threshold 99 keeps no sample: values are 1.0 to 2.0"),
    ],
)
def test_what_a_record_does_not_hold_is_said(make, tmp_path, capsys, flags, message):
    for number, rows in enumerate(of_column("score", {0: 1.0, 1: 2.0}, {0: 1.0, 1: 2.0})):
        write_epoch(tmp_path / "record", number, rows)
    assert make(tmp_path / "record", "--output", tmp_path / "l.parquet", *flags) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("*l.parquet*"))


def test_folders_and_outputs_are_checked(make, tmp_path, capsys):
    flags = ("--method", "random", "--rate", 0.5)
    assert make(tmp_path, "--output", tmp_path / "l.parquet", *flags) == 2
    assert "holds no complete epoch of a record" in capsys.readouterr().err
    pq.write_table(pa.table({"sample_id": [1]}), tmp_path / "epoch_00000.parquet")
    assert make(tmp_path, "--output", tmp_path / "l.parquet", *flags) == 2
    assert "is no file of a record: it has the columns sample_id" in capsys.readouterr().err
    (tmp_path / "l.parquet").touch()
    assert make(tmp_path, "--output", tmp_path / "l.parquet", *flags) == 2
    assert "is there already, and is not overwritten" in capsys.readouterr().err


@pytest.mark.parametrize("settings", [{"siglip": True}, {"select": True, "score_refresh": 0.0}])
def test_ln_2_nats_mean_nothing_for_other_losses(make, tmp_path, capsys, settings):
    write_epoch(tmp_path / "record", 0, *of_column("loss", {0: 1.0, 1: 2.0}))
    write_json(tmp_path / "config.json", settings)
    flags = ("--method", "forgetting", "--rate", 0.5, "--output", tmp_path / "l.parquet")
    assert make(tmp_path / "record", *flags) == 2
    assert "ln 2 nats mean nothing here" in capsys.readouterr().err
    assert make(tmp_path / "record", *flags, "--learned-at", 1.5) == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--rate", 0.5, "--threshold", 1), "give --rate or --threshold"),
        ((), "give --rate or --threshold"),
        (("--rate", 0), "--rate: 0 is not above 0"),
        (("--rate", "nan"), "--rate: nan is not above 0"),
        (("--threshold", "nan"), "--threshold: give a number"),
        (("--method", "random", "--threshold", 1), "give --rate"),
        (("--rate", 1, "--reference-epoch", 1), "for --method differential"),
        (("--rate", 1, "--learned-by", "score", "--learned-at", 2), "no quantile"),
        (("--rate", 1, "--passes", 0), "--passes is at least 1"),
        (("--rate", 1, "--output", "x.csv"), "x.csv should end in .parquet"),
    ],
)
def test_bad_flags(make, tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit):
        make(tmp_path, "--method", "clipscore", "--output", "l.parquet", *flags)
    assert message in capsys.readouterr().err


# ---- real runs

SIZES = [12, 10, 10]


def run_data(folder):
    data = make_shards(folder / "data", SIZES)
    write_json(folder / "data" / "sizes.json", {f"train-{place:03d}.tar": n for place, n in enumerate(SIZES)})
    return data


def test_from_a_run_to_a_run_on_its_list(make, tmp_path):
    data = run_data(tmp_path)
    flags = selection("small_loss", select_rate=1.0) | {"batch_size": 8, "record": True, "epochs": 2}
    run = train(tmp_path, data, "whole", **flags)
    output = tmp_path / "list.parquet"
    assert make(run / "record", "--method", "cliploss", "--rate", 0.25, "--output", output) == 0
    losses = {row["sample_id"]: row["loss"] for row in record(run, 1)}
    assert kept_in(output) == dict(sorted(losses.items(), key=lambda item: item[1])[:8])
    assert make(run / "record", "--method", "forgetting", "--rate", 0.5, "--output", tmp_path / "f.parquet") == 0
    again = train(tmp_path, data, "part", train_keep=output, **flags)
    assert sorted({row["sample_id"] for row in record(again, 1)}) == sorted(kept_in(output))


def scored(make, folder, words, *flags):
    """Score with these words of src/main.py; the rows that were written."""
    assert make(folder, *flags, "--", *words) == 0
    return pq.read_table(folder / "epoch_00000.parquet").to_pylist()


def test_a_data_set_is_scored_by_a_checkpoint(make, tmp_path, capsys):
    """Scores are those of its weights on images as in evaluation; differentials are against what it remembers."""
    data = run_data(tmp_path)
    flags = selection("historical_base_sampling") | {"batch_size": 8, "epochs": 1}
    run = train(tmp_path, data, "run", **flags)
    checkpoint = run / "checkpoints" / "epoch_1.pt"
    words = arguments(tmp_path, data, resume=checkpoint, batch_size=8)
    output = tmp_path / "list.parquet"
    rows = scored(make, tmp_path / "scores", words, "--method", "differential", "--threshold", 0, "--output", output)
    assert sorted(row["sample_id"] for row in rows) == list(range(32))
    assert "scored 32 samples" in capsys.readouterr().out

    config = parse_args(words, STRATEGIES)
    model = build_model(config, World())
    model.module.load_state_dict(torch.load(checkpoint, weights_only=True)["state_dict"])
    model.module.eval()
    remembered = load_checkpoint(checkpoint).parts["selection"]["scores"][:, 0]
    score = {}
    with torch.no_grad():
        for batch in build_train(config, World(), model.preprocess_eval, model.tokenizer, None).loader:
            batch = batch.to(torch.device("cpu"))
            image = model.module.encode_image(batch.image, normalize=True)
            text = model.module.encode_text(batch.text, normalize=True)
            cosine = (image * text).sum(1).tolist()
            score |= dict(zip(batch.sample_id.tolist(), cosine, strict=True))
    for row in rows:
        number = row["sample_id"]
        assert row["score"] == pytest.approx(max(100 * score[number], 0), abs=1e-3)
        assert row["remembered_clip_score"] == remembered[number]
        assert row["key"] == f"{number:06d}"
    fall = {row["sample_id"]: row["remembered_clip_score"] - row["score"] for row in rows}
    assert set(kept_in(output)) == {number for number, value in fall.items() if value >= 0}
    facts = json.loads(pq.read_schema(output).metadata[b"dissect_clip.coreset"])
    assert facts["scored_with"]["flags"] == words

    other = tmp_path / "other.parquet"
    assert make(tmp_path / "scores", "--method", "cliploss", "--rate", 0.5, "--output", other) == 0
    assert len(kept_in(other)) == 16


def test_several_passes_are_epochs_of_the_record(make, tmp_path):
    data = run_data(tmp_path)
    run = train(tmp_path, data, "run", batch_size=8, epochs=1)
    words = arguments(tmp_path, data, resume=run / "checkpoints" / "epoch_1.pt", batch_size=8)
    flags = ("--method", "cliploss", "--rate", 1, "--passes", 2, "--epochs", "0:1", "--output", tmp_path / "l.parquet")
    scored(make, tmp_path / "scores", words, *flags)
    losses = [{row["sample_id"]: row["loss"] for row in record_of(tmp_path / "scores", epoch)} for epoch in (0, 1)]
    assert losses[0] != losses[1]  # other batches
    expected = {number: (losses[0][number] + losses[1][number]) / 2 for number in range(32)}
    assert kept_in(tmp_path / "l.parquet") == pytest.approx(expected)


def record_of(folder, epoch):
    return pq.read_table(folder / f"epoch_{epoch:05d}.parquet").to_pylist()


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        ("clipscore", {}, "either --resume CHECKPOINT or --pretrained WEIGHTS"),
        ("clipscore", {"resume": "latest"}, "either --resume CHECKPOINT"),
        ("clipscore", {"resume": "absent.pt"}, "absent.pt"),
        ("clipscore", {"dataset_resampled": True, "resume": "x.pt"}, "leave out --dataset-resampled"),
        ("forgetting", {"resume": "x.pt"}, "it needs its record"),
    ],
)
def test_flags_for_scoring_are_checked(make, tmp_path, capsys, method, changes, message):
    words = arguments(tmp_path, run_data(tmp_path), **changes)
    flags = ("--method", method, "--rate", 0.5, "--output", tmp_path / "l.parquet")
    assert make(tmp_path / "scores", *flags, "--", *words) == 2
    assert message in capsys.readouterr().err


def test_a_checkpoint_that_remembers_nothing_or_other_data_has_no_differentials(make, tmp_path, capsys):
    data = run_data(tmp_path)
    plain = train(tmp_path, data, "plain", batch_size=8, epochs=1)
    flags = ("--method", "differential", "--rate", 0.5, "--output", tmp_path / "l.parquet")
    words = arguments(tmp_path, data, resume=plain / "checkpoints" / "epoch_1.pt", batch_size=8)
    assert make(tmp_path / "scores", *flags, "--", *words) == 2
    assert "does not remember CLIPScores" in capsys.readouterr().err
    (tmp_path / "scores" / "mine").touch()
    assert make(tmp_path / "scores", *flags, "--", *words) == 2
    assert "is not empty" in capsys.readouterr().err
    remembering = train(tmp_path, data, "run", **selection("historical_base_sampling"), batch_size=8, epochs=1)
    words = arguments(
        tmp_path, make_shards(tmp_path / "other", [30]), resume=remembering / "checkpoints" / "epoch_1.pt"
    )
    assert make(tmp_path / "more", *flags, "--", *words) == 2
    assert "was trained on other data" in capsys.readouterr().err


@given(st.lists(st.booleans(), min_size=1, max_size=60), st.data())
def test_marks_are_thinned_out_across_pieces(marks, data):
    marked = np.array(marks)
    count = data.draw(st.integers(0, sum(marks)))
    before = marked.copy()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coreset, "_PIECE", 7)
        coreset.keep_some(marked, count, np.random.default_rng(0))
    assert marked.sum() == count
    assert not (marked & ~before).any()


def test_every_mark_is_as_likely(monkeypatch):
    monkeypatch.setattr(coreset, "_PIECE", 3)
    generator, times = np.random.default_rng(0), np.zeros(8)
    for _ in range(2000):
        marked = np.ones(8, bool)
        coreset.keep_some(marked, 3, generator)
        times += marked
    assert np.abs(times / 2000 - 3 / 8).max() < 0.05


def test_the_command_line_names_every_method():
    assert set(coreset_command.METHODS) == set(coreset.METHODS)
