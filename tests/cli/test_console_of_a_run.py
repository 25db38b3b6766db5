"""What a run shows on a terminal, and what a file or a script gets of it."""

import io
import re
import sys
from pathlib import Path

import pytest
from runs import arguments, train
from shards_util import make_shards

from dissect_clip.cli import main


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def data(tmp_path: Path) -> str:
    return make_shards(tmp_path / "data", [80])


def messages(text: str) -> list[str]:
    return [line.split(" | ", 2)[2] for line in re.split(r"[\r\n]+", text) if line.count(" | ") >= 2]


def test_a_terminal_shows_a_bar_and_tables_and_the_log_file_all_values(
    tmp_path: Path, data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stderr = Terminal()
    monkeypatch.setattr(sys, "stderr", stderr)
    run = train(tmp_path, data, val_data=data, epochs=2)
    text = stderr.getvalue()
    assert "Epoch 2/2" in text
    assert "Train Epoch" not in text
    assert "Eval Epoch" not in text
    assert re.search(r"best R@Sum \d+\.\d", text)
    assert [message for message in messages(text) if message.startswith("Evaluation")] == [
        f"Evaluation after epoch {epoch}" for epoch in (1, 2)
    ]
    assert re.search(r"\n    image_to_text_R@1 +\d\.\d{4}", text)
    kept = messages((run / "out.log").read_text())
    assert sum(message.startswith("Train Epoch: ") for message in kept) == 4
    assert [message.split("\t")[0].split(" image")[0] for message in kept if message.startswith("Eval")] == [
        "Eval Epoch: 1",
        "Eval Epoch: 2",
    ]


def test_a_pipe_gets_the_lines_of_the_log_file(tmp_path: Path, data: str, capsys: pytest.CaptureFixture[str]) -> None:
    run = train(tmp_path, data, val_data=data, epochs=1)
    shown = messages(capsys.readouterr().err)
    assert "\r" not in "".join(shown)
    assert [line for line in messages((run / "out.log").read_text()) if "Epoch" in line] == [
        line for line in shown if "Epoch" in line
    ]


@pytest.mark.parametrize(
    ("flags", "doing"), [({}, "training"), ({"train_data": None, "val_data": "data", "epochs": None}, "running")]
)
def test_the_cpu_in_place_of_a_gpu_is_one_plain_line(
    tmp_path: Path, data: str, capsys: pytest.CaptureFixture[str], flags: dict[str, str | None], doing: str
) -> None:
    changes = {flag: data if value == "data" else value for flag, value in flags.items()}
    assert main(arguments(tmp_path, data, **{"device": None, "epochs": 1, **changes})) == 0
    text = capsys.readouterr().err
    assert messages(text).count(f"No CUDA device: {doing} on the CPU") == 1
    assert text.count("on the CPU") == 1
    assert ".py:" not in text
