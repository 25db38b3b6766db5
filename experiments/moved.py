"""Grids and results had other paths up to version 0.1; those still work."""

from __future__ import annotations

import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent


def moved(path: Path) -> Path:
    """The path where a grid or a folder of results is now: ``configs/small/rates.yaml`` is ``small/rates/rates.yaml``.

    A path that exists, or that was never one of this project, stays what it is.
    """
    if path.exists():
        return path
    parts = path.parts
    if len(parts) >= 3 and parts[-3] == "configs" and path.suffix == ".yaml":
        now = FOLDER / parts[-2] / path.stem / path.name
    elif len(parts) >= 3 and parts[-3:-1] == ("docs", "results"):
        now = FOLDER / parts[-1]
    else:
        return path
    if not now.exists():
        return path
    print(f"# {path} is now {now}", file=sys.stderr)
    return now
