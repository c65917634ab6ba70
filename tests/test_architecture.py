"""The rules of docs/architecture.md that a machine can check."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "mopeq"
LEVELS = [
    {"errors", "layers", "garbage"},
    {"precision"},
    {"spec"},
    {"stats", "hadamard", "native"},
    {"qtensor"},
    {"progress", "seam", "autoload", "journal", "foreign", "safetensors_files"},
    {"models", "source"},
    {"adapters", "data", "allocate", "quantizers", "kernels", "checkpoint", "memory", "ahead", "lazy"},
    {"activations", "analyze", "candidates", "runtime", "job"},
    {"integrations", "learned"},
    {"load"},
    {"evaluate", "fit", "report", "stream"},
    {"balance"},
    {"measure", "refine", "outside"},
    {"pack"},
    {"compensate", "layerwise", "trial"},
    {"align"},
    {"quantize"},
    {"quickstart", "serve", "moqe", "export"},
    {"quickstart_vlm"},
    {"cli"},
]
WITHOUT_TORCH = ("errors", "layers", "precision", "spec", "stats", "progress", "allocate", "report", "cli")


def files() -> list[Path]:
    return sorted(p for p in SOURCE.rglob("*.py"))


def room(module: str) -> str:
    """``mopeq.allocate.knapsack`` belongs to the room ``allocate``."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "mopeq"


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write the whole name"
            found.add(node.module or "")
    return {name for name in found if name == "mopeq" or name.startswith("mopeq.")}


def own_room(path: Path) -> str:
    relative = path.relative_to(SOURCE).with_suffix("")
    return relative.parts[0]


def level(name: str) -> int:
    for index, rooms in enumerate(LEVELS):
        if name in rooms:
            return index
    raise AssertionError(f"{name} has no level; add it to LEVELS and to docs/architecture.md")


@pytest.mark.parametrize(
    "path", [p for p in files() if p != SOURCE / "__init__.py"], ids=lambda p: str(p.relative_to(SOURCE))
)
def test_imports_point_down(path: Path) -> None:
    own = own_room(path)
    for name in imports(path):
        other = room(name)
        assert other != "mopeq", f"{path.name} imports the public face; import the module that defines the name"
        assert other == own or level(other) < level(own), f"{own} imports {other}, which is not below it"


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(SOURCE)))
def test_files_stay_readable(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 450


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_module_works_without_torch(module: str) -> None:
    code = f"import sys, mopeq.{module}; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
