"""A hook of MkDocs: pages of the repository that stand outside ``docs/``, and the links between them and the others.

Every link in a Markdown file is relative to that file, so that it works where the repository is browsed. On the site
``docs/`` is the root. The files below, which stand elsewhere, are added to it under their path in the repository, and
links between the two are rewritten here.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"

ADDED = (
    "README.md",  # the home page
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "LICENSE",
    "benchmarks/README.md",
    "experiments/**/*.md",
    "experiments/**/*.png",
)

LINK = re.compile(r"(\]\()([^)#\s:]+)(?=[)#])")
"""A relative link of Markdown: what stands before its target, and the target without an anchor."""


def site_path(path: Path) -> str:
    """Where a file of the repository is on the site."""
    return path.relative_to(DOCS if path.is_relative_to(DOCS) else ROOT).as_posix()


def on_files(files: Any, config: Any) -> Any:
    """Add the files outside ``docs/``."""
    for pattern in ADDED:
        for path in sorted(ROOT.glob(pattern)):
            files.append(File.generated(config, site_path(path), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Rewrite links between ``docs/`` and the rest of the repository."""
    folder = Path(page.file.abs_src_path).parent
    if page.is_homepage:
        page.meta["hide"] = ["navigation"]  # it would list this page alone

    def rewritten(match: re.Match[str]) -> str:
        target = (folder / match[2]).resolve()
        if not target.is_relative_to(ROOT):  # wrong: left for MkDocs to report
            return match[0]
        return match[1] + posixpath.relpath(site_path(target), posixpath.dirname(page.file.src_uri) or ".")

    return LINK.sub(rewritten, markdown)


ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):(?=<code>)")
"""A role of reStructuredText before a name in a docstring."""


def on_page_content(html: str, **_: Any) -> str:
    """Show docstrings, which are written for readers of the source, without marks of reStructuredText."""
    return ROLE.sub("", html).replace("::</p>", ":</p>")
