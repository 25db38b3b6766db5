"""The project's own files agree with each other."""

import ast
import re
import runpy
from pathlib import Path

import pytest

import dissect_clip

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "dissect_clip"

# A package imports only from those before it; docs/how-it-works/architecture.md draws the same picture.
PACKAGES = [
    "errors", "seeding", "config", "distributed", "run", "models", "data", "selection", "evaluation", "training",
    "checkpoint", "cli",
]  # fmt: skip


def package_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported_packages(path: Path) -> set[str]:
    """The packages of ours that a file imports from, also inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "dissect_clip":
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dissect_clip."):
            names.add(str(node.module).split(".")[1])
        elif isinstance(node, ast.Import):
            names |= {a.name.split(".")[1] for a in node.names if a.name.startswith("dissect_clip.")}
    return names


MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or package_of(path) in PACKAGES)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_upwards(path: Path):
    name = package_of(path)
    assert name in PACKAGES, f"{name} is no package of the design: see docs/how-it-works/architecture.md"
    allowed = {*PACKAGES[: PACKAGES.index(name) + 1], "__version__"}
    wrong = imported_packages(path) - allowed
    assert not wrong, f"{path.relative_to(PACKAGE)} imports from {sorted(wrong)}, which come after {name}"


LAUNCHERS = {"scripts/reproduce.py", "scripts/noise_list.py", "benchmarks/time_to_quality.py"}
"""Files outside experiments/ that run its code."""


def test_nothing_imports_the_experiments():
    files = [path for folder in ("src", "scripts", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    wrong = {
        str(path.relative_to(ROOT))
        for path in files
        for node in ast.walk(ast.parse(path.read_text()))
        if (isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] == "experiments")
        or (isinstance(node, ast.Import) and any(alias.name.split(".")[0] == "experiments" for alias in node.names))
    }
    assert wrong == LAUNCHERS


def test_every_package_is_there():
    assert {package_of(path) for path in MODULES} == set(PACKAGES)


def test_requirements_are_those_of_the_package():
    script = ROOT / "scripts" / "make_requirements.py"
    made = runpy.run_path(str(script))
    with (ROOT / "pyproject.toml").open("rb") as file:
        project = made["tomllib"].load(file)["project"]
    text = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    assert text == made["requirements"](project), "run: make requirements"
    for name in ("torch", "tensorboard", "wandb", "pytest"):
        assert re.search(rf"^{name}>=", text, re.MULTILINE)


def test_the_version_is_the_same_everywhere():
    version = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert version is not None
    assert version[1] == dissect_clip.__version__
