#!/usr/bin/env python3
"""Run a grid of experiments: the same as ``python -m experiments`` in the root of the checkout."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from experiments.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
