"""Private names of open_clip and torch are used in the modules for them only, and do there what they are used for."""

import ast
from pathlib import Path

import open_clip
import pytest
import torch

from dissect_clip.models.openclip_compat import encode_patches, shared_tensor, uncompiled

ROOT = Path(__file__).resolve().parent.parent.parent
PACKAGE = ROOT / "src" / "dissect_clip"
COMPAT = [PACKAGE / "models" / "openclip_compat.py", PACKAGE / "distributed" / "torch_compat.py"]
FILES = sorted(path for folder in ("src", "scripts") for path in (ROOT / folder).rglob("*.py") if path not in COMPAT)
INTERNAL_MODULES = {"open_clip.factory", "open_clip.pretrained", "torch.distributed.distributed_c10d"}
PUBLIC = {"_replace", "_asdict", "_fields", "_make", "_exit"}  # of named tuples, and os._exit


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name not in PUBLIC


def private_uses(text: str) -> list[str]:
    """Private names and internal modules of other libraries that Python source refers to."""
    found = []
    nodes = list(ast.walk(ast.parse(text)))
    own = {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
    for node in nodes:
        if isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr not in own:
            if not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")):
                found.append(ast.unparse(node))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            names = [a.value for a in node.args[1:2] if isinstance(a, ast.Constant) and isinstance(a.value, str)]
            if node.func.id in ("getattr", "hasattr", "setattr") and names and is_private(names[0]):
                found.append(ast.unparse(node))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("torch", "open_clip"):
            internal = node.module in INTERNAL_MODULES or any(map(is_private, str(node.module).split(".")))
            if internal or any(is_private(alias.name) for alias in node.names):
                found.append(ast.unparse(node))
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_other_module_touches_a_private_name(path: Path):
    assert private_uses(path.read_text()) == [], f"move it to {COMPAT[0].relative_to(ROOT)}"


@pytest.mark.parametrize(
    "line",
    [
        "torch._dynamo.config.optimize_ddp = False",
        "loader._iterator",
        "getattr(model, '_orig_mod', model)",
        "from open_clip.factory import parse_model_name",
        "from torch._dynamo import config",
    ],
)
def test_a_private_use_is_found(line: str):
    assert private_uses(line)


def test_the_patches_that_are_kept_alone_decide_the_features():
    torch.manual_seed(0)
    visual = open_clip.transformer.VisionTransformer(
        image_size=32, patch_size=8, width=16, layers=1, heads=2, mlp_ratio=2, output_dim=8
    ).eval()
    image = torch.rand(2, 3, 32, 32)
    every = torch.arange(16).expand(2, -1)
    torch.testing.assert_close(encode_patches(visual, image, every), visual(image))
    changed = image.clone()
    changed[:, :, :8, :8] = 0  # patch 0
    assert torch.equal(encode_patches(visual, image, every[:, 1:]), encode_patches(visual, changed, every[:, 1:]))


def test_a_shared_tensor_has_the_shape_asked_for():
    tensor = shared_tensor((2, 3), torch.float32, 24)
    assert tensor.shape == (2, 3)
    assert tensor.is_shared()


def test_a_compiled_model_is_unwrapped():
    module = torch.nn.Linear(2, 2)
    assert uncompiled(torch.compile(module)) is module
    assert uncompiled(module) is module
