#!/usr/bin/env python
"""The same as ``dissect-clip clean-report``, for a checkout that is not installed."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

from dissect_clip.cli import main

if __name__ == "__main__":
    sys.exit(main(["clean-report", *sys.argv[1:]]))
