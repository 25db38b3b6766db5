"""The demo: its data set is what it says, and its table and lines follow from the numbers."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT
from PIL import Image
from shards_util import read_shard

sys.path.insert(0, str(ROOT / "scripts"))  # the scripts import each other, as they do when they are run

import demo
import make_scenes
from demo import Plan, Point, Result
from make_scenes import Scene, Thing

from dissect_clip.config.parser import parse_args
from dissect_clip.selection import STRATEGIES

RATE = 0.4


def read(folder: Path, split: str) -> dict[str, dict[str, bytes]]:
    """A split's samples: key -> extension -> bytes."""
    return dict(sample for shard in sorted(folder.glob(f"{split}-*.tar")) for sample in read_shard(shard))


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    make_scenes.make_dataset(folder, train=120, val=40, mismatched=RATE, image_size=32, per_shard=50, seed=3)
    return folder


# ---- the data set


def test_the_same_settings_give_the_same_bytes(scenes: Path, tmp_path: Path) -> None:
    make_scenes.make_dataset(tmp_path, train=120, val=40, mismatched=RATE, image_size=32, per_shard=50, seed=3)
    names = sorted(path.name for path in scenes.iterdir())
    assert names == ["sizes.json", *(f"train-00000{i}.tar" for i in range(3)), "val-000000.tar"]
    assert [name for name in names if (tmp_path / name).read_bytes() != (scenes / name).read_bytes()] == []


def test_shards_of_another_set_are_not_left_among_those_of_this(tmp_path: Path) -> None:
    settings = {"val": 40, "mismatched": RATE, "image_size": 32, "per_shard": 50, "seed": 3}
    make_scenes.make_dataset(tmp_path, train=120, **settings)
    make_scenes.make_dataset(tmp_path, train=101, **settings)
    with pytest.raises(SystemExit, match=r"holds shards of another data set, as train-000002\.tar"):
        make_scenes.make_dataset(tmp_path, train=100, **settings)


def test_another_seed_gives_another_set(scenes: Path, tmp_path: Path) -> None:
    make_scenes.make_dataset(tmp_path, train=120, val=40, mismatched=RATE, image_size=32, per_shard=50, seed=4)
    assert (tmp_path / "val-000000.tar").read_bytes() != (scenes / "val-000000.tar").read_bytes()


def test_sizes_are_those_of_the_shards(scenes: Path) -> None:
    sizes = json.loads((scenes / "sizes.json").read_text())
    assert sizes == {"train-000000.tar": 50, "train-000001.tar": 50, "train-000002.tar": 20, "val-000000.tar": 40}
    for name, size in sizes.items():
        with tarfile.open(scenes / name) as members:
            assert len(members.getnames()) == 3 * size


@pytest.mark.parametrize(("split", "count", "wrong"), [("train", 120, 48), ("val", 40, 0)])
def test_the_json_tells_which_captions_are_wrong(scenes: Path, split: str, count: int, wrong: int) -> None:
    samples = read(scenes, split)
    truth = {key: json.loads(files["json"]) for key, files in samples.items()}
    assert len(samples) == count
    for key, files in samples.items():
        assert truth[key]["clean"] == (files["txt"].decode() == truth[key]["caption_true"])
    assert sum(not entry["clean"] for entry in truth.values()) == wrong


def test_wrong_captions_are_those_of_other_scenes_of_the_training_set(scenes: Path) -> None:
    samples = read(scenes, "train")
    given = sorted(files["txt"].decode() for files in samples.values())
    true = sorted(json.loads(files["json"])["caption_true"] for files in samples.values())
    assert given == true


def test_no_scene_or_caption_occurs_twice(scenes: Path) -> None:
    truth = [json.loads(files["json"]) for split in ("train", "val") for files in read(scenes, split).values()]
    assert len({json.dumps(entry["scene"]) for entry in truth}) == len(truth) == 160
    assert len({entry["caption_true"] for entry in truth}) == 160


def test_a_key_says_nothing_about_the_caption(scenes: Path) -> None:
    assert list(read(scenes, "train")) == [f"train{place:07d}" for place in range(120)]


def test_images_are_of_the_asked_size(scenes: Path) -> None:
    for files in read(scenes, "val").values():
        with Image.open(io.BytesIO(files["jpg"])) as image:
            assert (image.size, image.mode) == ((32, 32), "RGB")


THINGS = (Thing("circle", "red", "small", "plain"), Thing("square", "blue", "large", "striped"))


@pytest.mark.parametrize(
    ("things", "layout", "expected"),
    [
        (THINGS[:1], "top left corner", {"a small red circle in the top left corner on navy"}),
        (
            THINGS,
            "row",
            {
                "a small red circle left of a large striped blue square on navy",
                "a large striped blue square right of a small red circle on navy",
            },
        ),
        (
            THINGS,
            "column",
            {
                "a small red circle above a large striped blue square on navy",
                "a large striped blue square below a small red circle on navy",
            },
        ),
    ],
)
def test_a_caption_says_what_is_in_the_scene(things: tuple[Thing, ...], layout: str, expected: set[str]) -> None:
    said = {
        make_scenes.describe(Scene(things, layout, "navy"), np.random.default_rng(seed))
        .replace("little", "small")
        .replace("big", "large")
        .replace("a navy background", "navy")
        for seed in range(40)
    }
    assert said == expected


def brightest(image: Image.Image, channel: int) -> tuple[float, float]:
    """Centre (x, y) of where a colour channel stands out, as shares of the image."""
    pixels = np.asarray(image, np.float64)
    weight = np.clip(pixels[..., channel] - pixels.mean(2) - 40, 0, None)
    y, x = np.mgrid[: weight.shape[0], : weight.shape[1]] / weight.shape[0]
    return float((weight * x).sum() / weight.sum()), float((weight * y).sum() / weight.sum())


@pytest.mark.parametrize(("layout", "axis"), [("row", 0), ("column", 1)])
def test_objects_are_drawn_in_their_order(layout: str, axis: int) -> None:
    image = make_scenes.render(Scene(THINGS, layout, "black"), 64, noise_seed=1)
    red, blue = brightest(image, 0), brightest(image, 2)
    assert red[axis] < blue[axis] - 0.3
    assert abs(red[1 - axis] - blue[1 - axis]) < 0.1


@pytest.mark.parametrize("shape", make_scenes.SHAPES)
def test_every_shape_covers_a_part_of_its_square(shape: str) -> None:
    share = np.asarray(make_scenes.outline(shape, 60)).mean() / 255
    assert 0.2 < share < 0.9 if shape != "square" else share == 1


@pytest.mark.parametrize("texture", make_scenes.TEXTURES)
def test_every_texture_but_plain_darkens_a_part(texture: str) -> None:
    share = make_scenes.darkened(texture, 120, 6.0).mean()
    assert share == 0 if texture == "plain" else 0.2 < share < 0.6


@pytest.mark.parametrize("name", ["blob", ""])
def test_an_unknown_shape_or_texture_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="known are circle"):
        make_scenes.outline(name, 20)
    with pytest.raises(ValueError, match="known are plain"):
        make_scenes.darkened(name, 20, 3.0)


def test_no_captions_move_at_rate_0_and_all_at_1() -> None:
    rng = np.random.default_rng(0)
    pairs = make_scenes.make_pairs(30, rng)
    assert all(pair.clean for pair in make_scenes.mismatch(pairs, 0.0, rng))
    assert not any(pair.clean for pair in make_scenes.mismatch(pairs, 1.0, rng))


def test_one_caption_cannot_be_moved_alone() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="--mismatched"):
        make_scenes.mismatch(make_scenes.make_pairs(10, rng), 0.1, rng)


@pytest.mark.parametrize(("flag", "value"), [("--mismatched", "1.5"), ("--train", "0"), ("--image-size", "8")])
def test_the_command_refuses_what_is_out_of_range(
    flag: str, value: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        make_scenes.parse_args(["--out", str(tmp_path), flag, value])
    assert stop.value.code == 2
    assert f"{flag} {value} is out of range" in capsys.readouterr().err


def test_more_scenes_than_there_are_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scenes = 6 * (5 * 256 + 2 * 256**2)  # backgrounds; places of one thing, or arrangements of two
    rest = ["--out", str(tmp_path), "--val", "12"]
    assert make_scenes.parse_args([*rest, "--train", str(scenes - 12)]).train == scenes - 12
    with pytest.raises(SystemExit):
        make_scenes.parse_args([*rest, "--train", str(scenes - 11)])
    assert "there are 794,112 scenes" in capsys.readouterr().err


def test_the_command_makes_a_set(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "make_scenes.py"), "--out", str(tmp_path / "new")]
    subprocess.run([*command, "--train", "5", "--val", "3", "--image-size", "16"], check=True, capture_output=True)
    assert len(read(tmp_path / "new", "train")) == 5
    assert len(read(tmp_path / "new", "val")) == 3


# ---- the runs


def test_every_run_is_a_command_line_of_the_trainer(tmp_path: Path) -> None:
    plan = Plan()
    configs = {
        name: parse_args([*plan.common_flags(tmp_path, tmp_path), *own], STRATEGIES)
        for name, own in plan.runs().items()
    }
    assert [config.selection.select for config in configs.values()] == [False, True, True, True, True]
    shared = {(c.model.model, c.training, c.evaluation.val_frequency) for c in configs.values()}
    assert len(shared) == 1


def test_random_trains_on_as_many_pairs_as_dissect() -> None:
    plan = Plan(epochs=20, warmup_point=5, select_rate=0.4)
    assert plan.random_rate * 20 == pytest.approx(5 * 1.0 + 15 * 0.4)


def test_a_failed_run_ends_the_demo_with_its_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"(?s)--select-strateg.*the run `random` ended with status 2"):
        demo.train("random", ["--select-strategyy", "x"], tmp_path)
    assert "random" in capsys.readouterr().out


def test_a_folder_with_other_things_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(SystemExit, match="not of an earlier demo"):
        demo.prepare(tmp_path, Plan())
    assert (tmp_path / "thesis.txt").exists()


def test_a_folder_of_an_earlier_demo_is_emptied(tmp_path: Path) -> None:
    demo.prepare(tmp_path / "demo", Plan())
    (tmp_path / "demo" / "old").touch()
    demo.prepare(tmp_path / "demo", Plan(epochs=30))
    assert [path.name for path in (tmp_path / "demo").iterdir()] == ["plan.json"]
    assert json.loads((tmp_path / "demo" / "plan.json").read_text())["epochs"] == 30


def test_the_truth_is_read_from_the_shards(scenes: Path) -> None:
    truth = demo.read_truth(scenes)
    assert len(truth) == 120
    assert sum(truth.values()) == 72


def write_run(run: Path, epochs: dict[int, dict[str, bool]]) -> None:
    """A run folder with one evaluation and a record: by epoch, each key and whether it was selected."""
    (run / "record").mkdir(parents=True)
    (run / "checkpoints").mkdir()
    for epoch, choices in epochs.items():
        columns = {"key": list(choices), "selected": list(choices.values())}
        pq.write_table(pa.table(columns), run / "record" / f"epoch_{epoch:05d}.parquet")
    row: dict[str, Any] = dict.fromkeys(demo.RECALLS, 0.25) | {f"{phase}_seconds": 2.0 for phase in demo.PHASES}
    row |= {"rsum": 150.0, "seen": 8, "trained": 5, "epoch": 2, "clip_val_loss": 1.0}
    (run / "checkpoints" / "results.jsonl").write_text(json.dumps(row) + "\n")


def test_the_clean_share_joins_the_record_with_the_truth(tmp_path: Path) -> None:
    truth = {"a": True, "b": True, "c": False, "d": False}
    write_run(tmp_path, {0: dict.fromkeys("abcd", True), 1: {"a": True, "b": False, "c": False, "d": False}})
    result = demo.collect("DISSect", tmp_path, truth, Plan(epochs=2, warmup_point=1))
    assert result.clean_share == {0: 0.5, 1: 1.0}
    assert result.clean_after == 1.0
    assert result.end.total_seconds == 8.0
    assert (result.end.rsum, result.end.trained) == (150.0, 5)


def test_a_run_without_a_record_has_trained_on_everything(tmp_path: Path) -> None:
    write_run(tmp_path, {})
    result = demo.collect("all data", tmp_path, {"a": True, "b": False}, Plan(epochs=2, warmup_point=1))
    assert result.clean_share == {0: 0.5, 1: 0.5}
    assert result.clean_after == 0.5


# ---- what is said about the results


def make_result(name: str, rsums: list[float], per_epoch: int, seconds: float, score: float, clean: float) -> Result:
    """A run with an evaluation after each epoch, whose epochs all cost the same."""
    points = [
        Point(
            epoch=epoch,
            rsum=rsum,
            recalls=(rsum / 600,) * 6,
            seen=100 * epoch,
            trained=per_epoch * epoch,
            seconds={"load": 0.0, "score": score * epoch, "train": (seconds - score) * epoch, "optimizer": 0.0},
        )
        for epoch, rsum in enumerate(rsums, start=1)
    ]
    return Result(name, points, dict.fromkeys(range(len(rsums)), clean), clean)


PLAN = Plan(val=10000)
EVERYTHING = make_result("all data", [100, 200, 300, 280], 100, 10.0, 0.0, 0.6)
RANDOM = make_result("random", [50, 150, 200, 220], 50, 5.0, 0.0, 0.6)
DISSECT = make_result("DISSect", [60, 180, 250, 290], 50, 7.5, 2.5, 0.9)
FAST = make_result("DISSect fast", [60, 180, 240, 280], 50, 5.0, 0.0, 0.85)
POSTERIOR = make_result("clean posterior", [60, 180, 260, 300], 50, 4.5, 0.0, 0.8)


def test_a_run_is_read_up_to_an_amount() -> None:
    assert [point.epoch for point in demo.recent(EVERYTHING, 250, "trained")] == [1, 2]
    assert [point.epoch for point in demo.recent(EVERYTHING, 30.0, "total_seconds")] == [1, 2, 3]
    assert [point.epoch for point in demo.recent(EVERYTHING, 1, "trained")] == [1]


def test_only_the_last_evaluations_count() -> None:
    result = make_result("long", [0, 0, 100, 200, 300, 400], 10, 1.0, 0.0, 0.6)
    assert demo.level(demo.recent(result, 1e9, "trained")) == 250


def test_the_table_has_every_run_with_its_numbers() -> None:
    lines = demo.table([EVERYTHING, RANDOM, DISSECT]).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert " ".join(lines[3].split()) == "all data 220.0 300.0 (3) 400 400 40.0 0.0 0.0 40.0 60.0 %"
    assert lines[4].split()[0] == "random"
    assert " ".join(lines[5].split()) == "DISSect 195.0 290.0 (4) 400 200 30.0 0.0 10.0 20.0 90.0 %"


def test_the_lines_compare_at_equal_pairs_and_equal_seconds() -> None:
    selection, pairs, clock, fast, posterior = demo.verdicts(EVERYTHING, RANDOM, DISSECT, FAST, POSTERIOR, PLAN)
    assert "90.0 % of what DISSect trained on was clean" in selection
    assert "it found clean pairs" in selection
    # DISSect's level is 195; in 200 pairs random came to 155, and all data, after two epochs, to 150.
    assert "R@Sum of 195.0 is 40.0 more than random (155.0" in pairs
    assert "45.0 more than all data (150.0" in pairs
    assert "all data ended at 220.0 after 400 pairs" in pairs
    # In 30 s all data did three epochs, of level 200.
    assert "after 30 s, of which 33 % went into scoring" in clock
    assert "it is 40.0 more than random (155.0" in clock
    assert "5.0 less than all data (200.0" in clock
    assert "random was done after 20 s, all data after 40 s" in clock
    assert "85.0 % of what was trained on after the warm-up was clean" in fast
    assert "done after 20 s against DISSect's 30 s, and its R@Sum of 190.0 is 5.0 less than DISSect (195.0" in fast
    assert "80.0 % of what was trained on after the warm-up was clean" in posterior
    assert "done after 18 s against DISSect's 30 s, and its R@Sum of 200.0 is 5.0 more than DISSect" in posterior


@pytest.mark.parametrize(
    ("clean", "said"),
    [
        (0.9, "it found clean pairs"),
        (0.605, "it did not tell clean pairs from mismatched ones"),
        (0.5, "it preferred mismatched pairs"),
    ],
)
def test_an_unfavourable_selection_is_said(clean: float, said: str) -> None:
    dissect = replace(DISSECT, clean_after=clean)
    assert said in demo.verdicts(EVERYTHING, RANDOM, dissect, FAST, POSTERIOR, PLAN)[0]


def steady(name: str, rsum: float) -> Result:
    return make_result(name, [rsum] * 4, 50, 5.0, 1.0, 0.6)


def test_an_unfavourable_result_is_said() -> None:
    _, pairs, clock, *_ = demo.verdicts(
        steady("all data", 300), steady("random", 250), steady("DISSect", 90), FAST, POSTERIOR, PLAN
    )
    expected = "160.0 less than random (250.0) and 210.0 less than all data (300.0)"
    assert expected in pairs
    assert expected in clock


def test_a_small_difference_is_called_too_little_to_tell() -> None:
    _, pairs, *_ = demo.verdicts(
        steady("all data", 100), steady("random", 295), steady("DISSect", 300), FAST, POSTERIOR, replace(PLAN, val=1000)
    )
    assert "5.0 more than random (295.0, too little to tell: 19 may be chance)" in pairs
    assert "200.0 more than all data (100.0)" in pairs


def test_doubt_shrinks_with_the_number_of_queries() -> None:
    points = steady("", 150).points
    assert demo.doubt(points, points, 400) == pytest.approx(2 * demo.doubt(points, points, 1600))
    # Six equal recalls p: each direction's three add up, the two directions are independent, and so are two runs.
    p = points[0].recalls[0]
    assert demo.doubt(points, points, 100) == pytest.approx(1.96 * 2 * 3 * 100 * (p * (1 - p) / 100) ** 0.5)


def test_doubt_grows_with_the_scatter_of_the_evaluations() -> None:
    points, scattered = steady("", 150).points, make_result("", [100, 200, 100, 200], 50, 5.0, 1.0, 0.6).points
    assert demo.doubt(points, points, 10**9) == pytest.approx(0, abs=0.1)
    deviation = 100 / 3**0.5  # of a sample: four evaluations, 50 from their mean each
    assert demo.doubt(points, scattered, 10**9) == pytest.approx(1.96 * deviation / 2, abs=0.1)
    assert demo.doubt(points, scattered[:1], 10**9) == pytest.approx(0, abs=0.1), "one alone has no scatter"


def test_the_curves_are_drawn(tmp_path: Path) -> None:
    demo.draw([EVERYTHING, RANDOM, DISSECT], PLAN, tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as image:
        assert image.width > 1000
