"""Start a training run: ``torchrun --nproc_per_node=8 src/main.py FLAGS``, or ``python src/main.py FLAGS``."""

from dissect_clip.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
