"""``dissect-clip reproduce`` hands over to the grid runner of a checkout."""

from __future__ import annotations

from pathlib import Path

import pytest

from dissect_clip.cli import main, reproduce


def test_a_grid_is_found_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    assert main(["reproduce", "--help"]) == 0
    assert "--collect" in capfd.readouterr().out
    assert main(["reproduce", "absent.yaml", "--list"]) == 2
    assert "absent.yaml" in capfd.readouterr().err


def test_outside_a_checkout_it_says_where_the_grids_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(reproduce, "find_checkout", lambda: None)
    assert main(["reproduce", "rates.yaml"]) == 2
    assert "clone it" in capsys.readouterr().err
