"""Train CLIP models with OpenCLIP's command line and online sample selection."""

from __future__ import annotations

import typing

if typing.TYPE_CHECKING:
    from dissect_clip.selection import Choice, Selection

__version__ = "0.2.0"
__all__ = ["Choice", "Selection", "__version__"]


def __getattr__(name: str) -> typing.Any:
    """The library's classes, imported on first use: they need torch, which takes seconds (PEP 562)."""
    if name in ("Choice", "Selection"):
        from dissect_clip import selection

        return getattr(selection, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
