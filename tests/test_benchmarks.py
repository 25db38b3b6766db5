"""The benchmarks at tiny sizes: they run, print JSON lines, and compute what they say."""

import csv
import importlib
import io
import json
import tarfile
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from dissect_clip.config.settings import Config
from dissect_clip.training.timer import PHASES

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"
TINY = ["--model", "toy-vit", "--batch-size", "10", "--turns", "2", "--device", "cpu", "--precision", "fp32"]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Imports a benchmark by name, and knows the toy models."""
    import open_clip
    from toy import write_configs

    monkeypatch.syspath_prepend(str(FOLDER))
    open_clip.add_model_config(Path(write_configs(tmp_path)))
    return importlib.import_module


def printed(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    """The JSON lines on standard output; every other line is a comment."""
    lines = capsys.readouterr().out.splitlines()
    found = [json.loads(line) for line in lines if not line.startswith("#")]
    assert all({"benchmark", "machine", "versions", "commit"} <= set(line) for line in found)
    return found


def test_turns_are_taken_by_all(bench: Any):
    common, order = bench("common"), []
    works = {name: lambda name=name: float(order.append(name) or len(order)) for name in "ab"}
    found = common.in_turns(works, turns=3, warm=1)
    assert order == list("abbaabba")
    assert found == {"a": [4, 5, 8], "b": [3, 6, 7]}
    assert common.quartiles([3.0, 1.0, 2.0]) == {"median": 2, "low": 1.5, "high": 2.5}
    assert common.quartiles([5.0])["high"] == 5


def test_choice_cost(bench: Any, capsys: pytest.CaptureFixture[str]):
    choice_cost = bench("choice_cost")
    choice_cost.main(["--sizes", "6", "9", "--features", "4", "--turns", "1"])
    lines = printed(capsys)
    assert [line["candidates"] for line in lines] == [6, 9]
    assert all(set(line["milliseconds"]) == set(choice_cost.MODES) for line in lines)


def test_step_cost(bench: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    step_cost, plot = bench("step_cost"), bench("plot")
    step_cost.main([*TINY, "--rates", "0.3", "1.0", "--cheap-flags", "--score-context-length 4"])
    lines = printed(capsys)
    assert [line["rate"] for line in lines] == [0.3, 1.0]
    assert set(lines[0]["cost"]) == set(step_cost.MODES) - {"full"}
    assert set(lines[0]["overhead"]) == set(step_cost.MODES) - {"full", "given"}
    assert [picture.name for picture in plot.draw(lines, tmp_path)] == ["step_cost.png"]


def test_costs_are_taken_turn_by_turn(bench: Any):
    found = bench("step_cost").compare({"full": [1.0, 10.0], "given": [0.4, 4.0], "exact": [0.6, 6.0]})
    assert found["cost"]["exact"] == {"median": 0.6, "low": 0.6, "high": 0.6}
    assert found["overhead"] == {"exact": {"median": 0.2, "low": 0.2, "high": 0.2}}


def test_epoch_cost(bench: Any, capsys: pytest.CaptureFixture[str]):
    flags = ["--loading", "--steps", "2", "--workers", "0", "--image-side", "24", "--rates", "0.3"]
    bench("step_cost").main([*TINY, *flags, "--modes", "before load"])
    (line,) = printed(capsys)
    assert line["benchmark"] == "epoch_cost"
    assert set(line["seconds"]) == {"full", "given", "before load"}
    assert all(line["seconds"]["full"][phase] >= 0 for phase in PHASES)


def test_a_batch_chosen_before_loading_holds_what_is_kept(bench: Any):
    step_cost = bench("step_cost")
    options = step_cost.parse(TINY)
    state = step_cost.make_state(options, "before load", 0.3, 10)
    batch = step_cost.make_batch(state, 10)
    assert len(step_cost.as_loaded(state, batch)) == 10  # in the first epoch nothing is known yet
    state.counters.epoch = 1
    loaded = step_cost.as_loaded(state, batch)
    assert (len(loaded), loaded.num_candidates) == (3, 10)


@pytest.mark.dist
def test_store(bench: Any, capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PYTHONPATH", "")
    sizes = ["--samples", "20000", "30000", "--batch-size", "16", "--step-batch-size", "4", "--turns", "2"]
    bench("store").main([*sizes, "--model", "RN-tiny", "--rates", "0.5", "--processes", "1"])
    bench("store").main([*sizes, "--parts", "store", "--ranks", "--processes", "2"])
    lines = printed(capfd)
    kinds = [(line["ranks"], line["exchange"]) for line in lines if line["benchmark"] == "store"]
    assert kinds == [(1, "none")] * 2 + [(8, "simulated")] * 2 + [(2, "gloo")] * 2
    assert {line["bytes_per_sample"] for line in lines if line["benchmark"] == "store"} == {4}
    (step,) = (line for line in lines if line["benchmark"] == "step_size")
    assert set(step["seconds"]) == {"20000", "30000"}
    assert [picture.name for picture in bench("plot").draw(lines, tmp_path)] == ["store.png"]


@pytest.mark.slow
def test_trainer(bench: Any, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("open_clip_train.main")
    small = ["--batch-size", "4", "--steps", "4", "--skip", "1", "--turns", "1", "--workers", "0"]
    bench("trainer").main([*small, "--device", "cpu", "--precision", "fp32"])
    (line,) = printed(capsys)
    assert line["steps"] == 2
    assert line["ratio"]["median"] == pytest.approx(
        line["ours_per_second"]["median"] / line["openclip_per_second"]["median"], rel=0.01
    )


# ---- GPU


def test_gpu_benchmark_without_a_gpu(bench: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    bench("gpu").main([])
    assert capsys.readouterr().out == "# gpu.py: there is no CUDA device here, nothing was measured\n"


def test_gpu_benchmark_counts_operations(bench: Any, capsys: pytest.CaptureFixture[str]):
    flags = ["--batch-size", "20", "--steps", "1", "--turns", "1", "--warm", "1", "--matmul", "16"]
    modes = ["--modes", "full", "exact", "refresh 0.1", "before load"]
    bench("gpu").main(["--device", "cpu", "--models", "ViT-tiny", "--precision", "fp32", *flags, *modes])
    full, exact, refresh, before = printed(capsys)
    # A backward pass is two forward passes: r + 1/3, r + 0.1/3 and r of a full step, but for the loss's small part.
    for line, share in ((exact, 0.3 + 1 / 3), (refresh, 0.3 + 0.1 / 3), (before, 0.3)):
        assert line["flops_per_step"] / full["flops_per_step"] == pytest.approx(share, abs=0.02)


@pytest.mark.parametrize("memory", [0, 63, 64, 200, 700, 1000, 5000])
def test_the_largest_batch_is_found(memory: int, bench: Any):
    tried: list[int] = []

    def fits(size: int) -> bool:
        tried.append(size)
        return size <= memory

    assert bench("gpu").largest(fits, start=256, limit=1024, step=64) == min(memory // 64 * 64, 1024)
    assert len(tried) == len(set(tried)) <= 8


def test_warnings_of_waits_are_counted(bench: Any):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.warn("called a synchronizing CUDA operation (Triggered internally)", stacklevel=1)
        warnings.warn("something else", stacklevel=1)
    assert bench("gpu").count_sync_warnings(caught) == 1


# ---- time to quality


def write_pairs(path: Path, captions: dict[str, str]) -> None:
    """A shard of one-colour images."""
    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (16, 16)).save(file, "png")
    with tarfile.open(path, "w") as tar:
        for key, caption in captions.items():
            for suffix, content in (("png", file.getvalue()), ("txt", caption.encode())):
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def captions_of(path: Path) -> dict[str, str]:
    with tarfile.open(path) as tar:
        return {m.name[:-4]: tar.extractfile(m).read().decode() for m in tar if m.name.endswith(".txt")}


def test_captions_are_swapped_as_listed(bench: Any, tmp_path: Path):
    write_pairs(tmp_path / "a.tar", {"k1": "one", "k2": "two"})
    write_pairs(tmp_path / "b.tar", {"k3": "three"})
    listed = tmp_path / "noise.csv"
    with listed.open("w", newline="") as file:
        csv.writer(file).writerows([("key", "donor"), ("k1", "k3"), ("k3", "k1")])
    study = bench("time_to_quality")
    pattern = study.noisy(f"{tmp_path}/?.tar", listed, tmp_path)
    assert pattern == f"{tmp_path}/shards/{{00000..00001}}.tar"
    assert captions_of(tmp_path / "shards" / "00000.tar") == {"k1": "three", "k2": "two"}
    assert captions_of(tmp_path / "shards" / "00001.tar") == {"k3": "one"}
    listed.write_text("key,donor\nk1,k9\n")
    with pytest.raises(SystemExit, match=r"shards was made of .* another list of wrong captions"):
        study.noisy(f"{tmp_path}/?.tar", listed, tmp_path)
    (tmp_path / "other").mkdir()
    with pytest.raises(SystemExit, match="k9"):
        study.noisy(f"{tmp_path}/?.tar", listed, tmp_path / "other")


def a_run(study: Any, mode: str, seed: int, rsum: list[float], seconds: list[float]) -> Any:
    count = len(rsum)
    phases = dict.fromkeys(PHASES, seconds[-1] / len(PHASES))
    return study.Run(mode, seed, list(range(1, count + 1)), rsum, seconds, [100] * count, [0] * count, phases, 99.0)


def test_times_to_the_target(bench: Any):
    study = bench("time_to_quality")
    runs = [
        a_run(study, "full", 0, [10, 30, 41], [1, 2, 3]),
        a_run(study, "full", 1, [10, 40, 39], [1, 2, 3]),
        a_run(study, "fast", 0, [10, 40, 50], [0.5, 1, 1.5]),
        a_run(study, "fast", 1, [10, 20, 45], [0.5, 1, 1.5]),
        a_run(study, "slow", 0, [1, 2, 3], [4, 5, 6]),
    ]
    assert study.targets_of(runs) == {0: 41, 1: 39}
    full = study.summarise(runs, "full", [])
    assert (full["speedup"], full["speedup_to_first"]) == (1.2, 1)  # seed 1 was there after two of its three seconds
    fast = study.summarise(runs, "fast", [2])
    assert fast["seconds_to_target"] == 1.5
    assert fast["speedup"] == 2
    assert fast["speedup_to_first"] == round(1 / ((1.5 / 3 + 1.5 / 2) / 2), 2)
    assert fast["rsum"] == {"mean": 47.5, "deviation": 3.5355}
    slow = study.summarise(runs, "slow", [])
    assert (slow["reached"], slow["seconds_to_target"], slow["speedup"]) == (0, None, None)
    text = study.table([fast, slow, study.summarise(runs, "none", [0])], study.targets_of(runs))
    assert "R@Sum 41.0 with seed 0, 39.0 with seed 1" in text
    assert "| fast | 2, 1 failed | 47.5 ± 3.5 |" in text
    three = [a_run(study, "full", seed, [rsum], [1]) for seed, rsum in enumerate((76.6, 54.9, 65.3))]
    assert "65.6 ± 10.9 |" in study.table([study.summarise(three, "full", [])], {}), "10.853 is rounded once"
    assert "| none | 0, 1 failed | - |" in text


def test_a_run_that_never_gets_there_is_the_slowest(bench: Any):
    median = bench("time_to_quality").median_of_times
    assert median([3.0, None, 1.0]) == 3
    assert median([3.0, None, None]) is None
    assert median([3.0, None]) is None
    assert median([]) is None


def test_flags_of_all_modes_are_known(bench: Any, tmp_path: Path):
    from dissect_clip.config.parser import parse_args
    from dissect_clip.selection import STRATEGIES

    study = bench("time_to_quality")
    data = ["--train-data", "a.tar", "--val-data", "b.tar", "--out", str(tmp_path)]
    assert study.parse(data).modes == list(study.DEFAULT_MODES)
    made = study.make_study(
        study.parse([*data, "--modes", *study.MODES, "mine", "--define", "mine=--lr 0.5", "--common-flags", "--wd 0.1"])
    )
    configs = {mode: parse_args(made.command(mode, 7), STRATEGIES) for mode in made.modes}
    assert all(config.training.seed == 7 and config.training.wd == 0.1 for config in configs.values())
    assert configs["mine"].training.lr == 0.5
    assert not configs["full"].selection.select
    assert configs["random, equal pairs"].selection.select_rate == pytest.approx((8 + 32 * 0.3) / 40)
    assert configs["full, fewer epochs"].training.epochs == 18
    assert isinstance(configs["fast"], Config)
    assert configs["fast"].selection.select_before_load


@pytest.mark.slow
def test_a_study_runs_once(bench: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    write_pairs(tmp_path / "a.tar", {f"k{n}": f"caption {n}" for n in range(12)})
    study, out = bench("time_to_quality"), tmp_path / "out"
    flags = ["--train-data", f"{tmp_path}/a.tar", "--val-data", f"{tmp_path}/a.tar", "--out", str(out)]
    flags += ["--epochs", "1", "--warmup-point", "0", "--batch-size", "4", "--workers", "0", "--seeds", "0"]
    flags += ["--modes", "full", "broken", "--define", "broken=--no-such-flag"]
    assert study.main(flags) == 1
    captured = capsys.readouterr()
    assert "broken, seed 0 failed with status 2" in captured.err
    lines = [json.loads(line) for line in captured.out.splitlines() if line.startswith("{")]
    assert [(line["mode"], line["seeds"], line["failed_seeds"]) for line in lines] == [
        ("full", [0], []), ("broken", [], [0]),
    ]  # fmt: skip
    note = out / "runs" / "full-seed0.json"
    written = note.stat().st_mtime_ns
    assert study.main([*flags, "--modes", "full"]) == 0
    assert note.stat().st_mtime_ns == written
    assert (out / "curves.png").stat().st_size > 1000
    assert json.loads((out / "runs.jsonl").read_text())["trained"][-1] == 12
    with pytest.raises(SystemExit, match="another command"):
        study.main([*flags, "--modes", "full", "--lr", "0.1"])


def test_all_of_them_are_there(bench: Any):
    everything = bench("all")
    assert all((FOLDER / words[0]).exists() for words in everything.COMMANDS.values())


def test_the_readme_lists_every_benchmark():
    listed = (FOLDER / "README.md").read_text()
    assert [path.name for path in FOLDER.glob("*.py") if f"`{path.name}" not in listed] == []
