"""``python -m dissect_clip`` is ``dissect-clip``."""

from dissect_clip.cli import main

raise SystemExit(main())
