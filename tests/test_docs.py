"""What the documentation names exists."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
TOP = [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")]
PAGES = [
    *TOP,
    *sorted(DOCS.rglob("*.md")),
    *sorted((ROOT / "experiments").rglob("*.md")),
    ROOT / "benchmarks" / "README.md",
]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_links_lead_to_files(path: Path):
    links = re.findall(r"\]\(([^)#\s]+)(?=[)#])", path.read_text())
    wrong = [link for link in links if "://" not in link and not (path.parent / link).exists()]
    assert not wrong
