"""What README.md and docs/ name exists: links, paths and flags. And they stay short."""

import re
import runpy
from pathlib import Path

import pytest

from dissect_clip.config.flags import REMOVED, UNSUPPORTED

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
CHANGELOG = ROOT / "CHANGELOG.md"
TOP = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")]
MANUAL = [TOP[0], *(path for path in sorted(DOCS.rglob("*.md")) if not path.is_relative_to(DOCS / "results"))]
PAGES = [*TOP, *sorted(DOCS.rglob("*.md")), *sorted((ROOT / "experiments").rglob("*.md"))]
PAGES.append(ROOT / "benchmarks" / "README.md")
GENERATED = [DOCS / "reference" / name for name in ("flags.md", "strategies.md")]  # by scripts/make_reference.py
MAX_WORDS = 20_000  # of the manual: README.md and docs/ without docs/results
SOURCES = [
    path
    for folder in ("src", "tests", "scripts", "benchmarks", "experiments", "examples")
    for path in sorted((ROOT / folder).rglob("*.py"))
]

FOREIGN = {
    "torchrun": "standalone nproc_per_node nnodes rdzv-backend rdzv-endpoint shutdown-timeout",
    "slurm": "signal kill-on-bad-exit",
    "docker": "shm-size",
    "mypy": "strict",
    "the strategy in write-a-strategy.md": "stale-decay stale-floor",
}
"""Flags of other programs that the manual names."""


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", [*PAGES, CHANGELOG], ids=name_of)
def test_links_lead_to_files(path: Path):
    links = re.findall(r"\]\(([^)#\s]+)(?=[)#])", path.read_text())
    assert [link for link in links if "://" not in link and not (path.parent / link).exists()] == []


@pytest.mark.parametrize("path", [path for path in [*TOP, *MANUAL[1:]] if path not in GENERATED], ids=name_of)
def test_paths_exist(path: Path):
    folders = "src|docs|tests|scripts|benchmarks|examples|experiments|configs"
    named = re.findall(rf"(?<![\w/.$-])((?:{folders})/[\w./*-]+)", path.read_text())
    assert [name for name in named if not any(ROOT.glob(name.rstrip("./")))] == []


def test_pages_that_the_source_names_exist():
    named = {(name_of(path), page) for path in SOURCES for page in re.findall(r"docs/[\w/-]+\.md", path.read_text())}
    assert len(named) > 5
    assert {(path, page) for path, page in named if not (ROOT / page).exists()} == set()


def known_flags() -> set[str]:
    """The flags of the trainer, refused ones included, and of everything else with a command line."""
    found = {flag for path in SOURCES for flag in re.findall(r"add_argument\(\s*\"(--[a-z][\w-]*)\"", path.read_text())}
    settings = {
        name
        for path in SOURCES
        for name in re.findall(r"^    (\w+): [^=\n]+ = (?:setting|section)\(", path.read_text(), re.M)
    }
    found |= {f"--{name.replace('_', '-')}" for name in settings} | set(UNSUPPORTED) | set(REMOVED)
    found |= {
        flag
        for path in SOURCES
        for names in re.findall(r"aliases=\((.*?)\)", path.read_text())
        for flag in re.findall(r"--[\w-]+", names)
    }
    return found | {f"--{flag}" for flags in FOREIGN.values() for flag in flags.split()} | {"--help", "--help-all"}


@pytest.mark.parametrize("path", [*TOP, *MANUAL[1:]], ids=name_of)
def test_flags_exist(path: Path):
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*\w", path.read_text()))
    assert named - known_flags() == set()


def test_the_manual_is_short():
    words = {name_of(path): len(re.findall(r"\S*\w\S*", path.read_text())) for path in MANUAL}
    assert sum(words.values()) <= MAX_WORDS, words


def test_the_reference_is_what_the_settings_say():
    make_reference = runpy.run_path(str(ROOT / "scripts" / "make_reference.py"))
    for name, page in make_reference["PAGES"].items():
        assert (DOCS / "reference" / name).read_text() == page(), "run python scripts/make_reference.py"


def test_the_tour_names_what_is_there():
    rows = re.findall(
        r"^\| .*? \| (`[\w/]+\.py`.*?) \| (.*?) \|$", (DOCS / "how-it-works" / "tour.md").read_text(), re.M
    )
    assert len(rows) > 25
    for files, names in rows:
        paths = [ROOT / "src" / "dissect_clip" / file for file in re.findall(r"`([^`]+)`", files)]
        source = "".join(path.read_text() for path in paths)
        for name in re.findall(r"`([^`]+)`", names):
            assert re.search(rf"(def|class) {name}\b|^\s*{name}\b\s*[:=]", source, re.M), f"{name} is not in {files}"
