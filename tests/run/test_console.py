"""Log lines, tables and the progress bar: readable on a terminal, complete in files and for scripts."""

from __future__ import annotations

import io
import logging
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dissect_clip.distributed.world import World
from dissect_clip.errors import SetupError, TrainingError, printable
from dissect_clip.run.console import (
    NOT_ON_TERMINAL,
    ONLY_ON_TERMINAL,
    Progress,
    aligned,
    close_logging,
    setup_logging,
)

log = logging.getLogger("dissect_clip.training.epoch")
SECOND = World(rank=1, local_rank=1, size=2)


@pytest.fixture(autouse=True)
def _restored_logging() -> Iterator[None]:
    level = logging.root.level
    yield
    close_logging()
    logging.root.setLevel(level)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


# ---- log lines


def test_rank_0_logs_the_same_plain_line_to_console_and_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    setup_logging(tmp_path / "out.log", logging.INFO, World())
    log.info("epoch %d", 3)
    text = (tmp_path / "out.log").read_text()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d,\d\d:\d\d:\d\d \| INFO \| epoch 3\n", text)
    captured = capsys.readouterr()
    assert (captured.err, captured.out) == (text, "")


def test_other_libraries_lines_are_for_the_file_but_for_warnings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    setup_logging(tmp_path / "out.log", logging.INFO, World())
    logging.info("built a model")
    logging.warning("no weights")
    text = (tmp_path / "out.log").read_text()
    assert "built a model" in text
    assert "no weights" in text
    console = capsys.readouterr().err
    assert "built a model" not in console
    assert "no weights" in console


def test_at_debug_the_console_shows_everything(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging(None, logging.DEBUG, World())
    log.debug("ours")
    logging.debug("theirs")
    console = capsys.readouterr().err
    assert "| DEBUG | ours" in console
    assert "| DEBUG | theirs" in console


def test_other_ranks_warn_only_and_say_who_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging(None, logging.INFO, SECOND)
    log.info("hidden")
    log.warning("shown")
    console = capsys.readouterr().err
    assert "hidden" not in console
    assert re.match(r"\[rank 1\] .* \| WARNING \| shown\n", console)


def test_another_node_with_a_log_file_writes_everything_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    setup_logging(tmp_path / "out-1.log", logging.INFO, SECOND)
    log.info("in the file")
    assert "in the file" in (tmp_path / "out-1.log").read_text()
    assert capsys.readouterr().err == ""


def test_setting_up_twice_does_not_double_the_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("first.log", "second.log"):
        setup_logging(tmp_path / name, logging.INFO, World())
    log.info("once")
    assert capsys.readouterr().err.count("once") == 1
    assert (tmp_path / "first.log").read_text() == ""
    assert (tmp_path / "second.log").read_text().count("once") == 1


def test_a_log_file_is_appended_to(tmp_path: Path) -> None:
    (tmp_path / "out.log").write_text("before\n")
    setup_logging(tmp_path / "out.log", logging.INFO, World())
    log.info("after")
    assert (tmp_path / "out.log").read_text().startswith("before\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has this file, of a disk that is full")
def test_a_log_file_that_cannot_be_written_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging(Path("/dev/full"), logging.INFO, World())
    for text in ("first", "second"):
        log.info(text)
    close_logging()
    told = [line.rpartition(" | ")[2] for line in capsys.readouterr().err.splitlines()]
    assert told == [
        "first",
        "cannot write /dev/full: [Errno 28] No space left on device; lines are lost there",
        "second",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain, Zürich, 猫, 🐈\t|", "plain, Zürich, 猫, 🐈\t|"),
        ("two\nlines", "two\nlines"),
        ("\x1b[2J\x07\r\x7f", "\\x1b[2J\\x07\\r\\x7f"),
        ("\x9b31m \u202egnp.exe \u2028", "\\x9b31m \\u202egnp.exe \\u2028"),
        ("\udcff", "\\udcff"),
    ],
)
def test_what_a_terminal_would_obey_is_escaped(text: str, expected: str) -> None:
    assert printable(text) == expected
    assert str(SetupError(text)) == str(TrainingError(text)) == expected


def test_names_from_the_data_can_neither_forge_a_line_nor_move_the_cursor(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.root, "handlers", [])  # pytest's own cannot pass such a name on to its other process
    setup_logging(tmp_path / "out.log", logging.INFO, World())
    log.warning("skipping %s", "\udcff\x1b[2J\n2025-01-01,00:00:00 | INFO | all is well\r.jpg")
    try:
        raise ValueError("\x1b]0;title\x07")
    except ValueError:
        log.exception("failed")
    close_logging()
    text = (tmp_path / "out.log").read_text()
    assert capsys.readouterr().err == text
    assert all(line.startswith(("    ", "2")) for line in text.splitlines())
    assert text.splitlines()[0].endswith("| WARNING | skipping \\udcff\\x1b[2J")
    assert text.splitlines()[1] == r"    2025-01-01,00:00:00 | INFO | all is well\r.jpg"
    assert all(character.isprintable() or character == "\n" for character in text)


def test_pythons_warnings_are_lines_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    setup_logging(tmp_path / "out.log", logging.INFO, World())
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        monkeypatch.setattr(warnings, "showwarning", logging._showwarning)  # type: ignore[attr-defined]  # not pytest's
        warnings.warn("old", stacklevel=1)
    assert re.search(r" \| WARNING \| .*UserWarning: old\n    ", capsys.readouterr().err)
    assert "UserWarning: old" in (tmp_path / "out.log").read_text()


def test_long_lines_are_for_files_and_scripts_and_tables_for_a_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = {}
    for kind, stderr in (("terminal", Terminal()), ("pipe", io.StringIO())):
        monkeypatch.setattr(sys, "stderr", stderr)
        setup_logging(tmp_path / f"{kind}.log", logging.INFO, World())
        log.info("all values", extra=NOT_ON_TERMINAL)
        log.info("a table", extra=ONLY_ON_TERMINAL)
        log.info("news")
        text = stderr.getvalue()
        shown[kind] = [line.rpartition(" | ")[2] for line in text.splitlines() if line]
        kept = (tmp_path / f"{kind}.log").read_text().splitlines()
        assert [line.rpartition(" | ")[2] for line in kept] == ["all values", "news"]
    assert shown == {"terminal": ["a table", "news"], "pipe": ["all values", "news"]}


# ---- tables


def test_a_table_has_aligned_columns_of_names_and_values() -> None:
    values = {"R@1": 0.5, "mean_rank": 12.25, "num": 7}
    assert aligned(values, 20) == (
        "R@1         0.5000\n"
        "mean_rank  12.2500\n"
        "num              7"
    )  # fmt: skip
    assert aligned(values, 40) == (
        "R@1         0.5000   num              7\n"
        "mean_rank  12.2500"
    )  # fmt: skip
    assert aligned({}, 40) == ""


@given(
    values=st.dictionaries(st.text("abc_@", min_size=1, max_size=30), st.floats(-1e3, 1e3) | st.integers(0, 10**6)),
    width=st.integers(36, 200),
)
def test_a_table_is_no_wider_than_asked_for_if_one_column_fits(values: dict[str, float], width: int) -> None:
    lines = aligned(values, width).splitlines()
    one = max((len(line) for line in aligned(values, 0).splitlines()), default=0)
    assert all(len(line) <= max(width, one) for line in lines)
    assert sum(f"{name} " in " ".join(lines) for name in values) == len(values)


# ---- progress bar


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def a_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """A terminal as stderr; no fixture, since pytest sets stderr after those."""
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    return stream


def steps(progress: Progress, clock: Clock, seconds: Sequence[float]) -> None:
    for one in seconds:
        clock.now += one
        progress.advance()


def test_the_bar_shows_epoch_loss_and_best_sum_of_recalls(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = a_terminal(monkeypatch)
    clock = Clock()
    with Progress(3, 4, best=7.5, clock=clock) as progress:
        for recall in (31.26, 30.0):
            progress.show_recall(recall)
        with progress.epoch(1, 0):
            progress.show(loss=1.5)
            steps(progress, clock, [1.0] * 4)
    last = terminal.getvalue().split("\r")[-3]
    assert last.startswith("Epoch 2/3")
    assert "8/12" in last
    assert "loss 1.500" in last
    assert "best R@Sum 31.3" in last


def test_the_bar_continues_where_a_resumed_epoch_does(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = a_terminal(monkeypatch)
    with Progress(2, 4) as progress, progress.epoch(1, 3):
        pass
    assert "7/8" in terminal.getvalue()


def test_the_time_left_is_that_of_the_steps_and_evaluations_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    a_terminal(monkeypatch)
    clock = Clock()
    with Progress(4, 3, evaluated={1, 2, 4}, clock=clock) as progress:
        assert progress.seconds_left() is None
        with progress.epoch(0, 0):
            steps(progress, clock, [100.0])
            assert progress.seconds_left() == 11 * 100, "the first step is all that is known"
            steps(progress, clock, [2.0, 4.0])
            assert progress.seconds_left() == 9 * 3.0, "the first step of an epoch waits for the loader"
        with progress.evaluation():
            clock.now += 60
        with progress.epoch(1, 0):
            assert progress.seconds_left() == 9 * 3.0 + 2 * 60
        with progress.epoch(2, 0):
            assert progress.seconds_left() == 6 * 3.0 + 60


def test_an_evaluation_has_a_title_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = a_terminal(monkeypatch)
    with Progress(1, 1) as progress, progress.evaluation():
        assert "Evaluation" in terminal.getvalue()


def test_the_bar_is_not_drawn_in_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = a_terminal(monkeypatch)
    clock = Clock()
    with Progress(1, 10_000, clock=clock) as progress, progress.epoch(0, 0):
        steps(progress, clock, [0.001] * 10_000)
    assert 20 < terminal.getvalue().count("Epoch 1/1") < 60


def test_a_log_line_does_not_break_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = a_terminal(monkeypatch)
    setup_logging(None, logging.INFO, World())
    with Progress(1, 4) as progress, progress.epoch(0, 0):
        progress.advance()
        before = len(terminal.getvalue())
        log.info("a line")
        written = terminal.getvalue()[before:]
    # the bar is wiped, the line stands at the start of its own line, and the bar is drawn again below
    assert re.match(r"\r *\r[^\r\n]* \| INFO \| a line\n\rEpoch 1/1", written)


@pytest.mark.parametrize(("shown", "stream"), [(True, io.StringIO), (False, Terminal)])
def test_there_is_no_bar_elsewhere(shown: bool, stream: type[io.StringIO], monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = stream()
    monkeypatch.setattr(sys, "stderr", stderr)
    with Progress(1, 2, shown=shown) as progress:
        with progress.epoch(0, 0):
            progress.show(loss=1.0)
            progress.advance()
        with progress.evaluation():
            pass
    assert stderr.getvalue() == ""
