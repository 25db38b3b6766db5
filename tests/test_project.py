"""The project's own files agree with each other."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "dissect_clip"

# A module imports only from lower layers; docs/architecture.md draws the same picture.
LAYERS: list[set[str]] = [
    {"errors", "seeding", "config", "batch", "clock", "metrics", "durable", "data.skips", "data.position", "judge"}
    | {"commands"},
    {"watch", "transfer", "data.decode", "contradictions"},
    {"dist", "signals", "schedule", "remote", "epochfile", "data.urls", "data.split", "data.pixels", "data.download"}
    | {"arguments", "checkpoint.content", "checkpoint.files"},
    {"data.tar", "data.sizes", "data.stream", "model", "loss", "optim", "runfolder", "skipped"}
    | {"selection.base", "selection.store", "selection.mixture", "checkpoint.read", "checkpoint.fits"},
    {"data.shards", "data.evalstream", "data.keep", "selection.baselines", "selection.differential", "scorer", "logs"}
    | {"selection.combination", "selection.infobatch", "selection.scan", "selection.pairs", "selection.negcliploss"}
    | {"selection.decoys", "checkpoint.writer", "checkpoint.latest"},
    {"data.table", "data.webdataset", "selection.selector", "selection.divbs", "selection.learnability", "reference"}
    | {"selection.clean_posterior"}
    | {"checkpoint", "launch", "commands.results"},
    {"data.csv", "data.synthetic", "data.classification", "selection.reuse"},
    {"data", "data.benchmark", "record", "selection.chooser", "verdict"},
    {"evaluation.common", "selection"},
    {"evaluation.retrieval", "evaluation.zeroshot", "evaluation.probe"},
    {"evaluation"},
    {"train", "commands.evaluate"},
    {"saving"},
    {"cli"},
    {"study", "study.cells", "study.noise", "study.point"},
    {"study.metrics"},
    {"study.grid"},
    {"study.tables"},
    {"study.plots"},
    {"study.collect", "study.earlier"},
]
LEVEL = {module: level for level, modules in enumerate(LAYERS) for module in modules}


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path: Path) -> set[str]:
    """The package's modules that a file imports, also inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("dissect_clip."):
            base = node.module.removeprefix("dissect_clip.")
            names |= {f"{base}.{alias.name}" if f"{base}.{alias.name}" in LEVEL else base for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {a.name.removeprefix("dissect_clip.") for a in node.names if a.name.startswith("dissect_clip.")}
    return names


MODULES = sorted(path for path in PACKAGE.rglob("*.py") if module_name(path))


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_imports_go_downwards(path: Path):
    name = module_name(path)
    assert name in LEVEL, f"{name} stands in no layer: add it to LAYERS and to docs/architecture.md"
    wrong = {other for other in imported(path) if LEVEL[other] >= LEVEL[name]}
    assert not wrong, f"{name} imports {sorted(wrong)}, which are not below it"


def test_every_layer_entry_is_a_module():
    assert {module_name(path) for path in MODULES} == set(LEVEL)


def dependencies(text: str) -> list[str]:
    return re.findall(r"^\s*\"?([a-z][\w-]*[><=][^\"\s#]*)", text, re.MULTILINE)


def test_requirements_are_those_of_the_package():
    pyproject = (ROOT / "pyproject.toml").read_text()
    block = pyproject[pyproject.index("\ndependencies = [") : pyproject.index("[project.optional-dependencies]")]
    assert dependencies(block) == dependencies((ROOT / "requirements.txt").read_text())
    assert len(dependencies(block)) > 5
