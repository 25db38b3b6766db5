"""``dissect-clip reproduce``: a grid of experiments. The grids are in the repository, not in the wheel."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from dissect_clip.cli.exit_status import EXIT_SETUP


def find_checkout() -> Path | None:
    """The repository: the working directory, or the one that this package is in; None if it is neither."""
    package = Path(__file__).resolve()
    return next(
        (place for place in (Path.cwd(), package.parents[3]) if (place / "experiments/__main__.py").is_file()), None
    )


def main(argv: Sequence[str]) -> int:
    """The exit status of the grid runner."""
    checkout = find_checkout()
    if checkout is None:
        print(
            "error: the grids of experiments are in the repository and not in the package: clone it, and run this "
            "command in its folder",
            file=sys.stderr,
        )
        return EXIT_SETUP
    # The runner uses this very package, whichever way it was found.
    places = [str(checkout), str(Path(__file__).resolve().parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    path = os.pathsep.join(places)
    command = [sys.executable, "-m", "experiments", *argv]
    return subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, check=False).returncode
