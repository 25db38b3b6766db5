"""The run folder: named as OpenCLIP names it, never shared by two runs, and known to be writable."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path

import pytest
from processes import run_on_ranks

import dissect_clip
from dissect_clip.config.settings import Config
from dissect_clip.distributed.world import World
from dissect_clip.errors import SetupError
from dissect_clip.run.folder import RunFolder, automatic_name, make_sync, newest_run, open_run
from dissect_clip.run.remote_sync import NoSync, RemoteSync

NOW = datetime(2025, 3, 4, 5, 6, 7)


def opened(config: Config, world: World | None = None) -> RunFolder:
    run = open_run(config, world or World())
    assert run is not None
    return run


def add_checkpoint(folder: Path, epoch: int = 1) -> None:
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    (folder / "checkpoints" / f"epoch_{epoch}.pt").write_bytes(b"")
    (folder / "out.log").write_text("")


def test_the_automatic_name_is_openclips() -> None:
    config = Config.of(model="hf-hub:org/ViT-B-32", lr=5e-4, batch_size=8, workers=2, precision="amp_bf16")
    expected = "2025_03_04-05_06_07-model_hf-hub:org-ViT-B-32-lr_0.0005-b_8-j_2-p_amp_bf16"
    assert automatic_name(config, NOW) == expected


def test_a_new_run_has_its_folder_and_description(tmp_path: Path) -> None:
    run = opened(Config.of(logs=str(tmp_path / "new" / "logs"), name="a", lr=0.1))
    assert run.path == tmp_path / "new" / "logs" / "a"
    assert run.log_file == run.path / "out.log"
    assert run.checkpoints.is_dir()
    assert json.loads((run.path / "config.json").read_text())["name"] == "a"
    lines = (run.path / "params.txt").read_text().splitlines()
    assert "lr: 0.1" in lines
    assert lines == sorted(lines, key=lambda line: line.partition(":")[0])


def test_places_in_the_folder(tmp_path: Path) -> None:
    run = opened(Config.of(logs=str(tmp_path), name="a"))
    places = (run.results, run.train_log, run.tensorboard, run.record, run.skipped)
    assert [str(path.relative_to(run.path)) for path in places] == [
        "checkpoints/results.jsonl", "train.jsonl", "tensorboard", "record", "skipped.parquet",
    ]  # fmt: skip


def test_without_name_the_folder_has_the_automatic_one(tmp_path: Path) -> None:
    run = opened(Config.of(logs=str(tmp_path)))
    assert run.name.endswith("-model_RN50-lr_None-b_64-j_4-p_amp")
    assert run.path.is_dir()


@pytest.mark.parametrize(
    "name", ["../x", "..", ".", "", "/x", "{tmp}/x", "a/../../x", "a/..", "a//b", "a/", "x\n", "\x1b[2J", "\udcff"]
)
def test_a_name_that_leads_out_of_the_logs_is_refused(tmp_path: Path, name: str) -> None:
    config = Config.of(logs=str(tmp_path / "logs"), name=name.format(tmp=tmp_path))
    with pytest.raises(SetupError, match=r"--name '.*' is not the name of a folder.*--output-dir") as error:
        open_run(config, World())
    assert str(error.value).isprintable()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["a", "a/b", "a..b", "..a", "lr=1e-3, ü", "a\\b"])
def test_a_name_within_the_logs_is_taken(tmp_path: Path, name: str) -> None:
    run = opened(Config.of(logs=str(tmp_path), name=name))
    assert run.path == tmp_path / name
    assert run.checkpoints.is_dir()


@pytest.mark.parametrize("model", ["../../x", "a/b", "..", "local-dir:/x/y", "\x1b[2J\n", "\udcff", ""])
def test_an_automatic_name_is_one_folder_whatever_the_model(tmp_path: Path, model: str) -> None:
    name = automatic_name(Config.of(model=model), NOW)
    assert name.isprintable()
    assert "/" not in name
    run = opened(Config.of(logs=str(tmp_path), model=model))
    assert run.path.parent == tmp_path


def test_settings_that_are_not_utf_8_are_described(tmp_path: Path) -> None:
    run = opened(Config.of(logs=str(tmp_path), name="a", train_data="data-\udcff.tar"))
    assert b"train_data: data-\xff.tar\n" in (run.path / "params.txt").read_bytes()
    assert json.loads((run.path / "config.json").read_text())["train_data"] == "data-\udcff.tar"


def test_no_logs_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert open_run(Config.of(logs="none", name="a"), World()) is None
    assert list(tmp_path.iterdir()) == []


def test_resume_latest_without_logs_is_refused() -> None:
    with pytest.raises(SetupError, match="--logs none"):
        open_run(Config.of(logs="none", resume="latest"), World())


def test_another_runs_folder_is_refused(tmp_path: Path) -> None:
    config = Config.of(logs=str(tmp_path), name="a")
    opened(config)
    opened(config)  # nothing was logged yet, so there is nothing to protect
    (tmp_path / "a" / "out.log").write_text("")
    with pytest.raises(SetupError, match=r"(?s)a exists already.*--name.*--resume latest"):
        open_run(config, World())


@pytest.mark.parametrize("log_file", ["out.log", "out-0.log"])
def test_another_runs_folder_is_refused_by_either_log_file(tmp_path: Path, log_file: str) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / log_file).write_text("")
    with pytest.raises(SetupError, match="exists already"):
        open_run(Config.of(logs=str(tmp_path), name="a"), World())


def test_a_run_may_be_continued_in_its_folder(tmp_path: Path) -> None:
    add_checkpoint(tmp_path / "a")
    assert opened(Config.of(logs=str(tmp_path), name="a", resume="latest")).name == "a"
    inside = str(tmp_path / "a" / "checkpoints" / "epoch_1.pt")
    assert opened(Config.of(logs=str(tmp_path), name="a", resume=inside)).name == "a"


def test_a_checkpoint_of_another_run_does_not_open_this_folder(tmp_path: Path) -> None:
    add_checkpoint(tmp_path / "a")
    add_checkpoint(tmp_path / "ab")
    outside = str(tmp_path / "ab" / "checkpoints" / "epoch_1.pt")
    with pytest.raises(SetupError, match="exists already"):
        open_run(Config.of(logs=str(tmp_path), name="a", resume=outside), World())


@pytest.mark.parametrize("logs", ["{tmp}/file", "{tmp}/file/below", "/proc/logs", "/sys/logs"])
def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path: Path, logs: str) -> None:
    (tmp_path / "file").write_text("")
    folder = logs.format(tmp=tmp_path)
    with pytest.raises(SetupError, match=r"(?s)cannot write to .*/a .*--logs .*--output-dir"):
        open_run(Config.of(logs=folder, name="a"), World())


def test_resume_latest_without_name_continues_the_newest_alike(tmp_path: Path) -> None:
    config = Config.of(logs=str(tmp_path), resume="latest", workers=1)
    other = Config.of(workers=11)
    names = [automatic_name(config, NOW.replace(day=day)) for day in (5, 9, 20)]
    add_checkpoint(tmp_path / names[0])
    add_checkpoint(tmp_path / names[1])
    (tmp_path / names[2]).mkdir()  # newer, but without a checkpoint
    add_checkpoint(tmp_path / automatic_name(other, NOW.replace(day=25)))
    add_checkpoint(tmp_path / "by-hand")
    assert opened(config).name == names[1]


def test_resume_latest_without_any_run_starts_a_new_one(tmp_path: Path) -> None:
    config = Config.of(logs=str(tmp_path / "none-yet"), resume="latest")
    assert newest_run(config) is None
    assert opened(config).path.is_dir()


def test_resume_latest_looks_for_remote_runs_when_there_are_none_here(tmp_path: Path) -> None:
    remote = f"file://{tmp_path}/there"
    config = Config.of(logs=str(tmp_path / "here"), resume="latest", remote_sync=remote, remote_sync_protocol="fsspec")
    assert newest_run(config) is None
    names = [automatic_name(config, NOW.replace(day=day)) for day in (5, 9)]
    for name in names:
        add_checkpoint(tmp_path / "there" / name)
    assert newest_run(config) == names[1]
    add_checkpoint(tmp_path / "here" / names[0])
    assert newest_run(config) == names[0]


def test_on_another_machine_a_run_goes_on_with_its_logs(tmp_path: Path) -> None:
    there = tmp_path / "there" / "a"
    there.mkdir(parents=True)
    (there / "train.jsonl").write_text("{}\n")
    config = Config.of(
        logs=str(tmp_path / "here"), name="a", remote_sync=str(tmp_path / "there"), remote_sync_protocol="fsspec"
    )
    with pytest.raises(SetupError, match=r"there/a exists already: give another --name, or --resume latest"):
        opened(config)
    for resume in ("latest", f"{tmp_path}/there/a/checkpoints/epoch_1.pt"):
        run = opened(config.replace(resume=resume))
        assert run.train_log.read_text() == "{}\n"
        run.train_log.write_text("{}\n{}\n")
        opened(config.replace(resume=resume))
        assert run.train_log.read_text() == "{}\n{}\n", "what is here counts"
        run.train_log.unlink()


def test_the_code_is_copied_where_asked_for(tmp_path: Path) -> None:
    config = Config.of(logs=str(tmp_path), name="a", copy_codebase=True)
    opened(config)
    opened(config)
    code = tmp_path / "a" / "code" / "dissect_clip"
    assert (code / "run" / "folder.py").read_bytes() == Path(open_run.__code__.co_filename).read_bytes()
    assert not list(code.rglob("__pycache__"))
    package = Path(dissect_clip.__file__).parent
    expected = {path.relative_to(package) for path in package.rglob("*") if "__pycache__" not in path.parts}
    assert {path.relative_to(code) for path in code.rglob("*")} == expected


def test_only_a_run_with_remote_sync_is_copied(tmp_path: Path) -> None:
    config = Config.of(remote_sync=str(tmp_path / "there"), remote_sync_protocol="fsspec")
    run = RunFolder(tmp_path / "a", "a", None)
    sync = make_sync(config, run, World())
    assert isinstance(sync, RemoteSync)
    assert sync.url == f"{tmp_path}/there/a"
    assert isinstance(make_sync(config, run, World(rank=1)), NoSync)
    assert isinstance(make_sync(config, None, World()), NoSync)
    assert isinstance(make_sync(Config.of(), run, World()), NoSync)


def _on_ranks(world: World, folder: str) -> dict[str, tuple[str, str | None]]:
    """Names and log files of this rank, for three ways to open a run; the message where it is refused."""
    node = World(rank=world.rank, local_rank=0, size=world.size)
    shared = opened(Config.of(logs=folder), world)
    local = opened(Config.of(logs=folder, name="a", log_local=True), node)
    answers = {
        kind: (run.name, None if run.log_file is None else run.log_file.name)
        for kind, run in (("shared", shared), ("local", local))
    }
    with pytest.raises(SetupError) as error:
        open_run(Config.of(logs=f"{folder}/a/params.txt"), world)
    return {**answers, "refused": (str(error.value), None)}


@pytest.fixture(scope="module")
def on_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, tuple[str, str | None]]]:
    return run_on_ranks(2, _on_ranks, str(tmp_path_factory.mktemp("logs")))


@pytest.mark.dist
def test_all_ranks_agree_on_the_name_and_one_logs(on_ranks: list[dict[str, tuple[str, str | None]]]) -> None:
    first, second = (answers["shared"] for answers in on_ranks)
    assert first[0] == second[0]
    assert (first[1], second[1]) == ("out.log", None)


@pytest.mark.dist
def test_log_local_gives_every_node_a_log_file(on_ranks: list[dict[str, tuple[str, str | None]]]) -> None:
    assert [answers["local"] for answers in on_ranks] == [("a", "out-0.log"), ("a", "out-1.log")]


@pytest.mark.dist
def test_a_refusal_stops_all_ranks(on_ranks: list[dict[str, tuple[str, str | None]]]) -> None:
    assert all("cannot write to the run folder" in answers["refused"][0] for answers in on_ranks)
