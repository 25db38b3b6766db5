"""The script that runs grids: what is run once, gone on with, run again and refused; the trainer is a stand-in."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from grids import FAKE, command, make_grid, run, write_grid

import experiments.__main__ as reproduce
import experiments.progress as progress_of
from dissect_clip.config.parser import parse_args
from dissect_clip.selection import STRATEGIES
from experiments.cells import Runs
from experiments.jobs import Job

ONE = "set-DISSect-0.3-seed1"


def texts(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def wait_until(condition, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def start(folder: Path, **environment: str) -> subprocess.Popen[bytes]:
    """The script in a process of its own."""
    code = (
        f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'src')!r}]; import experiments.__main__ as reproduce; "
        f"sys.exit(reproduce.main({command(folder)!r}, program={FAKE!r}))"
    )
    return subprocess.Popen([sys.executable, "-c", code], env={**os.environ, **environment}, stdout=subprocess.DEVNULL)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A grid that was run without a break."""
    folder = tmp_path_factory.mktemp("whole")
    assert run(folder) == 0
    return folder


def test_every_cell_is_run_and_collected(whole: Path, capsys: pytest.CaptureFixture[str]):
    rows = [json.loads(line) for line in (whole / "runs" / "results" / "grid.jsonl").read_text().splitlines()]
    assert len(rows) == 12
    assert {(row["method"], row["rate"]) for row in rows} == {
        ("All data", None), ("Random", 0.3), ("Small loss", 0.3), ("DISSect", 0.3),
    }  # fmt: skip
    assert set(rows[0]["final"]) == {"one", "two"}
    assert run(whole, "--list") == 0
    assert capsys.readouterr().out.splitlines()[-1] == "12 cells: 12 done"


def test_what_is_finished_is_not_run_again(whole: Path):
    before = texts(whole / "runs" / "results")
    notes = {file: file.stat().st_mtime_ns for file in (whole / "runs").glob("*.json")}
    assert run(whole) == 0
    assert {file: file.stat().st_mtime_ns for file in (whole / "runs").glob("*.json")} == notes
    assert texts(whole / "runs" / "results") == before


def test_a_grid_killed_in_the_middle_ends_with_the_same_tables(whole: Path, tmp_path: Path):
    first = start(tmp_path, FAKE_SLOW=ONE)
    run_folder = tmp_path / "runs" / ONE
    try:
        wait_until(lambda: (run_folder / "checkpoints" / "epoch_2.pt").exists())
    finally:
        first.kill()
        first.wait()
    os.kill(int((run_folder / "pid").read_text()), signal.SIGKILL)
    assert len(list((tmp_path / "runs").glob("*.json"))) < 12
    assert run(tmp_path) == 0
    assert "begins after epoch 2" in (tmp_path / "runs" / f"{ONE}.log").read_text()
    assert texts(tmp_path / "runs" / "results") == texts(whole / "runs" / "results")


def test_a_signal_saves_stops_and_leaves_the_rest(tmp_path: Path):
    first = start(tmp_path, FAKE_SLOW=ONE)
    run_folder = tmp_path / "runs" / ONE
    wait_until(lambda: (run_folder / "checkpoints" / "epoch_1.pt").exists())
    first.terminate()
    assert first.wait(60) == reproduce.EXIT_STOPPED
    note = json.loads((tmp_path / "runs" / f"{ONE}.json").read_text())
    assert (note["status"], note["stopped"]) == (75, True)
    grid = make_grid(tmp_path)
    states = [Runs(tmp_path / "runs", FAKE).state(grid.cell(p, tmp_path / "runs")) for p in grid.cell_keys()]
    assert (states.count("cut off"), states.count("failed")) == (1, 0)


def test_a_cell_that_another_process_has_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """Also where that process is an orphan: the one that had started it is dead."""
    monkeypatch.setenv("FAKE_SLOW", ONE)
    file = write_grid(tmp_path, rows=["DISSect"], seeds=[1], flags="--epochs 20")
    grid = make_grid(tmp_path, rows=["DISSect"], seeds=[1], flags="--epochs 20")
    (cell,) = [grid.cell(key, tmp_path / "runs") for key in grid.cell_keys()]
    (tmp_path / "runs").mkdir()
    runs = Runs(tmp_path / "runs", FAKE)
    with runs.log(cell).open("a") as log:
        import fcntl

        fcntl.flock(log, fcntl.LOCK_EX)
        orphan = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], stdout=log)
    try:
        assert runs.state(cell) == "running"
        assert run(tmp_path, "--cell", ONE, file=file) == 1
        assert "another process runs it" not in capsys.readouterr().out  # not even tried
    finally:
        orphan.kill()
        orphan.wait()
    assert runs.state(cell) == "waiting"


def test_failures_are_shown_and_run_again_on_request(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    file = write_grid(tmp_path, rows=["Random", "DISSect"], seeds=[1])
    monkeypatch.setenv("FAKE_FAIL", ONE)
    assert run(tmp_path, file=file) == 1
    out = capsys.readouterr().out
    assert "failed with status 1" in out
    assert "    it went wrong" in out
    assert "2 cells: 1 done, 1 failed" in out
    assert "| DISSect | missing |" in (tmp_path / "runs" / "results" / "grid.md").read_text()
    monkeypatch.delenv("FAKE_FAIL")
    assert run(tmp_path, file=file) == 1
    assert "failed before" in capsys.readouterr().out
    assert run(tmp_path, "--retry-failed", file=file) == 0


def test_a_finished_cell_with_another_command_is_an_error_that_says_what_changed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert run(tmp_path, file=write_grid(tmp_path, rows=["Random"], seeds=[0])) == 0
    changed = write_grid(tmp_path, rows=["Random"], seeds=[0], flags="--epochs 5 --batch-size 8")
    assert run(tmp_path, file=changed) == 2
    assert "was `--epochs 4`, now `--epochs 5`" in capsys.readouterr().err


def test_a_new_evaluation_is_made_up_for_without_training(tmp_path: Path):
    data = {"set": {"train": "t.tar", "val": {"one": "v1.tar"}, "flags": ""}}
    small = {"rows": ["Random"], "seeds": [0], "data_sets": data}
    words = ["--runs", str(tmp_path / "runs")]
    assert reproduce.main([str(write_grid(tmp_path, **small)), *words], program=FAKE) == 0
    before = (tmp_path / "runs" / "set-Random-0.3-seed0.log").read_text()
    data["set"]["val"]["three"] = "v3.tar"
    assert reproduce.main([str(write_grid(tmp_path, **small)), *words], program=FAKE) == 0
    assert (tmp_path / "runs" / "set-Random-0.3-seed0.log").read_text() == before
    row = json.loads((tmp_path / "runs" / "results" / "grid.jsonl").read_text())
    assert set(row["final"]) == {"one", "three"}


def test_figures_of_other_flags_are_not_collected(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert run(tmp_path, file=write_grid(tmp_path, rows=["Random"], seeds=[0])) == 0
    changed = write_grid(tmp_path, rows=["Random"], seeds=[0], flags="--epochs 5 --batch-size 8")
    capsys.readouterr()
    assert run(tmp_path, "--collect", file=changed) == 2
    assert "was `--epochs 4`, now `--epochs 5`" in capsys.readouterr().err


def test_a_row_that_cannot_be_run_does_not_keep_others_from_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    methods = {"Random": {"strategy": "random"}, "Mine": {"strategy": "not_there"}}
    file = write_grid(tmp_path, methods=methods, rows=None, seeds=[0])
    assert run(tmp_path, file=file) == 2
    assert "--rows runs other rows without this one" in capsys.readouterr().err
    assert run(tmp_path, "--rows", "Random", file=file) == 0


def test_rows_and_cells_can_be_chosen(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert run(tmp_path, "--list", "--rows", "Random", "DISSect") == 0
    assert "6 cells" in capsys.readouterr().out
    assert run(tmp_path, "--cell", "set-Random-0.3-seed0") == 0
    assert not (tmp_path / "runs" / "results").exists()
    assert run(tmp_path, "--list") == 0
    assert "12 cells: 1 done, 11 waiting" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rows", "Rondom"], "--rows Rondom: no grid has this row; there are All data, Random"),
        (["--cell", "nothing"], "--cell nothing: no grid has this cell"),
        (["--data", "OTHER=1"], "--data OTHER: no grid has ${OTHER}; there are FOLDER"),
    ],
)
def test_unknown_names_are_errors(words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert run(tmp_path, *words) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_data_that_was_not_given_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert reproduce.main([str(write_grid(tmp_path)), "--runs", str(tmp_path / "runs")], program=FAKE) == 2
    assert "data set set needs --data FOLDER=..." in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--collect", "--out"], ["--slurm"], ["--runs"]])
def test_a_place_that_cannot_be_written_is_an_error(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "file").touch()
    assert run(tmp_path, *words, str(tmp_path / "file" / "inside")) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert str(tmp_path / "file") in told


def test_a_launcher_that_is_not_there_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert run(tmp_path, file=write_grid(tmp_path, launcher="no-such-launcher --now")) == 2
    assert "no-such-launcher is not on the PATH" in capsys.readouterr().err


def test_a_launcher_stands_before_the_program(tmp_path: Path):
    launcher = f"env SOMETHING=1 {sys.executable}"
    assert run(tmp_path, file=write_grid(tmp_path, rows=["Random"], seeds=[0], launcher=launcher)) == 0
    note = json.loads((tmp_path / "runs" / "set-Random-0.3-seed0.json").read_text())
    assert note["command"][:3] == launcher.split()


def test_the_job_array_runs_each_cell_and_is_queued_again_when_stopped(tmp_path: Path):
    script = tmp_path / "array.sbatch"
    grid = write_grid(tmp_path, slurm="--time=1:00:00 --gpus-per-node=8")
    assert run(tmp_path, "--slurm", str(script), file=grid) == 0
    text = script.read_text()
    assert "#SBATCH --array=0-11\n" in text
    assert "#SBATCH --time=1:00:00\n#SBATCH --gpus-per-node=8\n" in text
    subprocess.run(["bash", "-n", script], check=True)
    # Stand-ins for the script that it starts, and for Slurm.
    (tmp_path / "fake.py").write_text("import sys; print(sys.argv[1:]); sys.exit(75)\n")
    (tmp_path / "scontrol").write_text(f"#!/bin/sh\necho $* > {tmp_path}/requeued\n")
    (tmp_path / "scontrol").chmod(0o755)
    script.write_text(text.replace("-m experiments", str(tmp_path / "fake.py")))
    environment = {
        **os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_JOB_ID": "7",
    }  # fmt: skip
    done = subprocess.run(
        ["bash", script, "--retry-failed"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "'--cell', 'set-DISSect-0.3-seed0', '--retry-failed'" in done.stdout
    assert (tmp_path / "requeued").read_text() == "requeue 7_3\n"


def test_a_job_array_holds_what_is_left(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert run(whole, "--slurm", str(tmp_path / "array.sbatch")) == 0
    assert "0 tasks" in capsys.readouterr().out


def test_a_job_array_knows_what_was_run_elsewhere(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    script, out = tmp_path / "array.sbatch", tmp_path / "tables"
    results = whole / "runs" / "results"
    kept = (results / "grid.jsonl").read_text().splitlines()[1:]
    recorded = tmp_path / "recorded"
    recorded.mkdir()
    (recorded / "grid.jsonl").write_text("\n".join(kept) + "\n")
    grid = whole / "grid.yaml"
    words = ["--data", f"FOLDER={whole}", "--runs", str(tmp_path / "runs"), "--from", str(recorded), "--out", str(out)]
    assert reproduce.main([str(grid), *words, "--slurm", str(script)], program=FAKE) == 0
    assert "1 tasks" in capsys.readouterr().out
    lines = script.read_text().splitlines()
    collect = next(line for line in lines if "--collect" in line)
    assert f"--from {recorded} --collect --out {out}" in collect
    assert f"--from {recorded} " in next(line for line in lines if "--cell" in line)


def test_grids_share_their_cells(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    one, two = write_grid(tmp_path, "one", seeds=[0]), write_grid(tmp_path, "two", rates=[0.3, 0.5], seeds=[0])
    words = ["--data", f"FOLDER={tmp_path}", "--runs", str(tmp_path / "runs"), "--list"]
    assert reproduce.main([str(one), str(two), *words], program=FAKE) == 0
    assert "7 cells" in capsys.readouterr().out  # 1 + 3 x 2
    other = write_grid(tmp_path, "other", seeds=[0], flags="--epochs 9")
    assert reproduce.main([str(one), str(other), *words], program=FAKE) == 2
    assert "different cells set-All-data-seed0" in capsys.readouterr().err


def test_progress_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setenv("FAKE_SLOW", ONE)
    monkeypatch.setattr(progress_of, "_QUIET", 0.0)
    assert run(tmp_path, file=write_grid(tmp_path, rows=["DISSect"], seeds=[1, 2])) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("[")]
    assert lines
    assert lines[-1].startswith("[0 done of 2] DISSect at 30 % on set, seed 1: epoch ")
    assert "; all done in " in lines[-1]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_on_a_terminal_one_line_changes(tmp_path: Path):
    grid = make_grid(tmp_path, rows=["DISSect"], seeds=[0, 1, 2])
    jobs = [Job(grid, key, grid.cell(key, tmp_path), 4) for key in grid.cell_keys()]
    states = dict(zip([job.cell.name for job in jobs], ["done", "waiting", "waiting"], strict=True))
    progress = progress_of.Progress(Runs(tmp_path, FAKE), jobs, Terminal())
    (tmp_path / f"{jobs[0].cell.name}.json").write_text(json.dumps({"command": [], "status": 0, "seconds": 600.0}))
    (tmp_path / jobs[1].cell.name).mkdir()
    progress.begin(jobs[1], states)
    (tmp_path / jobs[1].cell.name / "train.jsonl").write_text('{"step": 1, "epoch": 1.5}\n{"step": 2, "epo')
    progress.began -= 60  # 1.5 of 4 epochs in a minute: 100 s are left, and 10 minutes for the cell after that
    progress._shown -= 60
    progress.show(jobs[1], states)
    last = progress.stream.getvalue().split("\r")[-1]
    assert last.startswith("\x1b[K[1 done of 3] DISSect at 30 % on set, seed 1: epoch 1.5 of 4; all done in 1")
    assert "\n" not in last
    left = progress.left(jobs[1], states, 1.5)
    assert left == pytest.approx(700, abs=2)


@pytest.mark.parametrize(("seconds", "text"), [(7, "7 s"), (310, "5 min 10 s"), (3900, "1 h 05 min")])
def test_times_are_told_shortly(seconds: float, text: str):
    assert progress_of.short_time(seconds) == text


def test_what_a_cell_types_is_a_command_line_of_the_trainer(tmp_path: Path):
    grid = make_grid(tmp_path)
    key = next(key for key in grid.cell_keys() if key.method == "DISSect")
    cell = grid.cell(key, tmp_path / "runs")
    config = parse_args(cell.words, STRATEGIES)
    assert (config.run.name, config.checkpoint.resume, config.training.seed) == (cell.name, "latest", 0)
    assert (config.data.train_data, config.evaluation.val_data) == (f"{tmp_path}/train.tar", "v1.tar")
    assert (config.selection.select_strategy, config.selection.select_rate, config.get("warmup_point")) == (
        "warmup_base_sampling",
        0.3,
        2,
    )
    assert config.selection.record
    (evaluation,) = cell.evaluations
    config = parse_args(evaluation.words, STRATEGIES)
    assert (config.data.trains, config.evaluation.val_data) == (False, f"{tmp_path}/v2.tar")
    assert config.checkpoint.resume == f"{tmp_path}/runs/{cell.name}/checkpoints/epoch_4.pt"


def test_runs_from_elsewhere_are_not_run_again_and_give_the_same_tables(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    collected = whole / "runs" / "results"
    some = tmp_path / "some"
    some.mkdir()
    lines = (collected / "grid.jsonl").read_text().splitlines()
    (some / "grid.jsonl").write_text("\n".join(lines[:7]) + "\n")
    assert run(tmp_path, "--from", str(some), "--list") == 0
    assert capsys.readouterr().out.splitlines()[-1] == "12 cells: 7 done, 5 waiting"
    assert run(tmp_path, "--from", str(some)) == 0
    assert len(list((tmp_path / "runs").glob("*-seed*.json"))) == 5
    for again in (tmp_path / "runs" / "results", collected):
        out = tmp_path / "again"
        assert (
            run(tmp_path, "--collect", "--from", str(again), "--out", str(out), "--runs", str(tmp_path / "none")) == 0
        )
        for file in again.glob("*.jsonl"):
            assert sorted(file.read_text().splitlines()) == sorted((out / file.name).read_text().splitlines())
        for file in (*again.glob("*.csv"), *again.glob("*.md")):
            assert file.read_bytes() == (out / file.name).read_bytes()


def test_runs_from_elsewhere_with_other_flags_or_damage_are_errors(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    collected = whole / "runs" / "results"
    file = write_grid(tmp_path, flags="--epochs 5 --batch-size 8")
    assert run(tmp_path, "--from", str(collected), file=file) == 2
    assert "other flags than the grid has now (- 4 + 5; - was, + is)" in capsys.readouterr().err
    broken = tmp_path / "broken"
    broken.mkdir()
    assert run(tmp_path, "--from", str(broken)) == 2
    assert "there is no .jsonl in it" in capsys.readouterr().err
    (broken / "grid.jsonl").write_text((collected / "grid.jsonl").read_text() + '{"data": "set"}\n')
    assert run(tmp_path, "--from", str(broken)) == 2
    assert "line 13 is not a run that --collect has written" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("rsum4", lambda value: value[1:], "lists are not of one length"),
        ("seconds", str, "lists are not of one length"),
        ("trained", lambda value: list(map(str, value)), "not all of its figures are numbers"),
        ("clean_share", lambda value: "most", "not all of its figures are numbers"),
        ("final", lambda value: {"first": {"i2t_r1": 3.0}}, "the recalls on first are not"),
    ],
)
def test_a_line_from_elsewhere_that_was_tampered_with_is_an_error(
    whole: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    change: Callable[[Any], Any],
    message: str,
):
    line = json.loads((whole / "runs" / "results" / "grid.jsonl").read_text().splitlines()[0])
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / "grid.jsonl").write_text(json.dumps(line | {name: change(line[name])}) + "\n")
    assert run(tmp_path, "--from", str(tmp_path / "some")) == 2
    error = capsys.readouterr().err
    assert "line 1 is not a run that --collect has written" in error
    assert message in error


def test_a_cell_from_elsewhere_with_other_figures_or_with_less_is_an_error(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    line = json.loads((whole / "runs" / "results" / "grid.jsonl").read_text().splitlines()[0])
    (tmp_path / "some").mkdir()
    for name, changes in (("a", {}), ("b", {}), ("c", {"rsum4": [value + 1 for value in line["rsum4"]]})):
        (tmp_path / "some" / f"{name}.jsonl").write_text(json.dumps(line | changes) + "\n")
    assert run(tmp_path, "--from", str(tmp_path / "some")) == 2
    assert re.search(r"a\.jsonl, line 1 and, with other figures, in \S*c\.jsonl, line 1", capsys.readouterr().err)
    (tmp_path / "some" / "c.jsonl").unlink()
    assert run(tmp_path, "--from", str(tmp_path / "some"), "--list") == 0
    capsys.readouterr()
    benchmark = next(iter(line["final"]))
    less = line | {"final": {f"not-{name}": recalls for name, recalls in line["final"].items()}}
    for name in "ab":
        (tmp_path / "some" / f"{name}.jsonl").write_text(json.dumps(less) + "\n")
    assert run(tmp_path, "--from", str(tmp_path / "some"), "--list") == 2
    assert f"without {benchmark}" in capsys.readouterr().err


def test_collected_runs_carry_the_flags_they_were_run_with(tmp_path: Path):
    assert run(tmp_path) == 0
    lines = (tmp_path / "runs" / "results" / "grid.jsonl").read_text().splitlines()
    assert all(json.loads(line)["flags"].startswith("--epochs 4 ") for line in lines)
