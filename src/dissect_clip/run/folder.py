"""The folder of a run: how it is named, what lies where in it, and whether it may be written to.

<logs>/<name>/
    out.log  config.json  params.txt  train.jsonl       failed_start.log for out.log where a start was refused
    checkpoints/  checkpoints/results.jsonl  tensorboard/  record/  skipped.parquet/  code/

A run writes nowhere else: a name that leads out of <logs> is refused.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import torch

from dissect_clip.config.settings import Config
from dissect_clip.distributed.world import World
from dissect_clip.errors import SetupError
from dissect_clip.run.remote_sync import NoSync, RemoteSync, fetch_logs, glob_remote


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Where the files of a run are. ``log_file`` is this rank's, None on ranks that write none."""

    path: Path
    name: str
    log_file: Path | None

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def results(self) -> Path:
        """Results of every evaluation, a JSON object a line; at OpenCLIP's place."""
        return self.checkpoints / "results.jsonl"

    @property
    def train_log(self) -> Path:
        """Metrics of training, a JSON object a line."""
        return self.path / "train.jsonl"

    @property
    def tensorboard(self) -> Path:
        """The folder of TensorBoard's event files."""
        return self.path / "tensorboard"

    @property
    def record(self) -> Path:
        """The folder of the per-sample record."""
        return self.path / "record"

    @property
    def skipped(self) -> Path:
        """The folder of what training left out, which Parquet readers take for one file."""
        return self.path / "skipped.parquet"

    def set_aside(self) -> None:
        """Leave the name to another start, after one that was refused before anything was trained or evaluated."""
        begun = self.train_log.exists() or any(self.checkpoints.iterdir())
        if self.log_file is not None and not begun:
            with contextlib.suppress(OSError):
                self.log_file.rename(self.path / "failed_start.log")


def _settings_part(config: Config) -> str:
    """The part of an automatic name that is the same for runs with the same main settings."""
    model = "".join(c if c.isprintable() and c != "/" else "-" for c in config.model.model)
    return (
        f"-model_{model}-lr_{config.training.lr}-b_{config.training.batch_size}"
        f"-j_{config.data.workers}-p_{config.training.precision}"
    )


def automatic_name(config: Config, now: datetime) -> str:
    """The name of a run without ``--name``: time and main settings, as OpenCLIP makes it."""
    return now.strftime("%Y_%m_%d-%H_%M_%S") + _settings_part(config)


def newest_run(config: Config) -> str | None:
    """The automatically named run of the same main settings that is the newest with a checkpoint.

    Runs in the ``--logs`` folder come first, then those in the ``--remote-sync`` folder; None without one.
    """
    alike = re.compile(r"\d{4}_\d\d_\d\d-\d\d_\d\d_\d\d" + re.escape(_settings_part(config)))
    pattern = "*/checkpoints/epoch_*.pt"
    names = {path.parts[-3] for path in Path(config.run.logs).glob(pattern)}
    found = max(filter(alike.fullmatch, names), default=None)
    if found is None and config.run.remote_sync is not None:
        names = {path.split("/")[0] for path in glob_remote(config.run.remote_sync, pattern)}
        found = max(filter(alike.fullmatch, names), default=None)
    return found


def _name(config: Config) -> str:
    if config.run.name is not None:
        return _within_logs(config.run.name)
    found = newest_run(config) if config.checkpoint.resume == "latest" else None
    return found if found is not None else automatic_name(config, datetime.now())


def _within_logs(name: str) -> str:
    """The name, checked to be that of a folder below ``--logs``.

    Raises:
        SetupError: if it leads elsewhere, or would spoil a terminal.
    """
    if not name.isprintable() or any(part in ("", ".", "..") for part in name.split("/")):
        raise SetupError(
            f"--name {name!r} is not the name of a folder: give one without .., without / at its begin or end and "
            "without control characters (a/b is folder b in folder a); --output-dir says where run folders are"
        )
    return name


def _refuse_to_mix(config: Config, path: Path) -> None:
    """Raises SetupError if another run has logged into this folder and is not the one to continue."""
    if config.checkpoint.resume == "latest" or not path.is_dir() or not any(path.glob("out*.log")):
        return
    if config.checkpoint.resume is not None and Path(config.checkpoint.resume).resolve().is_relative_to(path.resolve()):
        return
    raise SetupError(
        f"the run folder {path} exists already: give another --name, or --resume latest to continue that run"
    )


@contextlib.contextmanager
def _writing_to(config: Config, path: Path) -> Iterator[None]:
    """Turn a failure to write into a SetupError that names the folder and the flag."""
    try:
        yield
    except OSError as error:
        raise SetupError(
            f"cannot write to the run folder {path} (--logs {config.run.logs}): {error.strerror or error}. Give a "
            "folder "
            "that can be written to with --output-dir, or write nothing with --logs none"
        ) from error


def _try_to_write(path: Path) -> None:
    """Make the folder and really write to it: permissions alone do not decide."""
    path.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path) as probe:
        probe.write(b"probe")


def _describe(config: Config, path: Path, name: str) -> None:
    """Write config.json and OpenCLIP's params.txt, and the code where asked for."""
    named = config.replace(name=name)
    (path / "config.json").write_text(named.to_json() + "\n", encoding="utf-8")
    settings = sorted(named.flat().items())
    lines = "".join(f"{setting}: {value}\n" for setting, value in settings)
    # Paths may hold bytes that are not UTF-8.
    (path / "params.txt").write_text(lines, encoding="utf-8", errors="surrogateescape")
    if config.run.copy_codebase:
        package = Path(__file__).resolve().parent.parent
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(package, path / "code" / package.name, ignore=ignore, dirs_exist_ok=True)


def _prepare(config: Config) -> tuple[Path, str]:
    name = _name(config)
    path = Path(config.run.logs) / name
    _refuse_to_mix(config, path)
    with _writing_to(config, path):
        _try_to_write(path)
        (path / "checkpoints").mkdir(exist_ok=True)
        _describe(config, path, name)
        if config.run.remote_sync is not None and not (path / "train.jsonl").exists():
            _fetch_logs(config, path, name)
    return path, name


def _remote_url(config: Config, name: str) -> str:
    assert config.run.remote_sync is not None
    return f"{config.run.remote_sync.rstrip('/')}/{name}"


def _fetch_logs(config: Config, path: Path, name: str) -> None:
    """Fetch the logs of a run that ran on another machine, to continue them; it may have been copied from there."""
    url = _remote_url(config, name)
    goes_on = config.checkpoint.resume is not None and (
        config.checkpoint.resume == "latest" or config.checkpoint.resume.startswith(f"{url}/")
    )
    logs = (
        "train.jsonl",
        "checkpoints/results.jsonl",
        "out-0.log" if config.run.log_local else "out.log",
        "sizes.json",
    )
    fetch_logs(path, url, config.run.remote_sync_protocol, logs, goes_on)


def _prepare_on_nodes(config: Config, path: Path, world: World) -> None:
    """Make the folder on every node, where the nodes share no file system; any node's failure stops all ranks."""
    problem: SetupError | None = None
    if world.local_rank == 0:
        try:
            with _writing_to(config, path):
                _try_to_write(path)
        except SetupError as error:
            problem = error
    failed = world.max(torch.tensor([int(problem is not None)], device=world.device))
    if problem is not None:
        raise problem
    if failed.item():
        raise SetupError(f"--log-local: another node cannot write to the run folder {path}, see its message")


def open_run(config: Config, world: World) -> RunFolder | None:
    """Choose the run's name, make its folder and describe the run in it. Collective.

    With ``--resume latest`` the folder is that of ``--name``, or of the newest run with the same main settings, and
    may exist. None with ``--logs none``.

    Where the folder has no logs yet, those that the run has left in the ``--remote-sync`` folder are fetched.

    Raises:
        SetupError: if the folder, here or there, belongs to another run, or cannot be written to or fetched.
    """
    if not config.run.writes_logs:
        if config.checkpoint.resume == "latest":
            raise SetupError("--resume latest looks into the run folder, and --logs none has none: name the checkpoint")
        return None
    with world.watchdog.suspend_timeout():  # of a remote copy
        path, name = world.on_main(lambda: _prepare(config))
    if config.run.log_local:
        _prepare_on_nodes(config, path, world)
        log_file = path / f"out-{world.rank}.log" if world.local_rank == 0 else None
    else:
        log_file = path / "out.log" if world.is_main else None
    return RunFolder(path, name, log_file)


def make_sync(config: Config, run: RunFolder | None, world: World) -> RemoteSync | NoSync:
    """What copies the run folder to ``--remote-sync``; a null object where nothing is to be copied. Not collective."""
    if config.run.remote_sync is None or run is None or not world.is_main:
        return NoSync()
    url = _remote_url(config, run.name)
    return RemoteSync(run.path, url, config.run.remote_sync_protocol, config.run.remote_sync_frequency)
