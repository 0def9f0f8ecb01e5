"""Who may import whom, checked on the syntax trees: imports inside functions count too."""

from __future__ import annotations

import ast
import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

from brachium.errors import did_you_mean

# Each part may import the parts named here, and itself. vla and policies know neither sim nor envs.
FLOOR = {"spec", "symbols", "errors", "console", "identity", "hardware"}
LAYERS: dict[str, set[str]] = {
    "spec": FLOOR,
    "symbols": FLOOR,
    "errors": FLOOR,
    "console": FLOOR,
    "identity": FLOOR,
    "hardware": FLOOR,
    "conf": set(),
    "datasets": FLOOR,
    "sim": FLOOR | {"datasets"},
    "vla": FLOOR | {"datasets"},
    "envs": FLOOR | {"datasets", "sim"},
    "policies": FLOOR | {"datasets", "vla"},
    "real_robot": FLOOR | {"datasets", "sim", "vla", "envs", "policies"},
}
TOP = {
    "__main__",
    "cli",
    "demo",
    "benchmark",
    "stages",
    "corrections",
    "executions",
    "train_judge",
    "doctor",
    "catalog",
    "verify",
}
LAYERS |= {part: set(LAYERS) | TOP for part in TOP}
# The package's own __init__ resolves public names lazily and by string; what it imports under TYPE_CHECKING is free.
IGNORED = {"tests", "benchmarks", "examples", "docs", "outputs", "build", "dist", "scripts", "integrations"}
LAZY_ONLY = {"lerobot"}  # its import costs seconds, so only inside functions of adapter files


def sources(root: Path) -> list[Path]:
    """Every Python file of the package below `root`."""
    found = [path for path in root.glob("*.py") if path.name != "__init__.py"]
    for top in root.iterdir():  # the checkout holds a whole environment in .venv: do not walk it
        if top.is_dir() and not top.name.startswith(".") and top.name not in IGNORED:
            found += top.rglob("*.py")
    return sorted(found)


def part_of(path: Path, root: Path) -> str:
    return path.relative_to(root).parts[0].removesuffix(".py")


def imported(node: ast.AST, path: Path, root: Path) -> list[str]:
    """Dotted names below `brachium` that an import statement brings in; third-party names start with a dot-free '!'."""
    if isinstance(node, ast.Import):
        return [f"!{alias.name}" for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    if not node.level:
        return [f"!{node.module}"]
    package = list(path.relative_to(root).parts[:-1])
    if node.level - 1 > len(package):
        return ["!<above the package>"]
    base = package[: len(package) - (node.level - 1)]
    if node.module:
        return [".".join([*base, node.module])]
    return [".".join([*base, alias.name]) for alias in node.names]


def type_checking_lines(tree: ast.Module) -> set[int]:
    """Lines below `if TYPE_CHECKING:`; such imports never run, but they must still point downwards."""
    lines: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            lines |= {child.lineno for child in ast.walk(node) if hasattr(child, "lineno")}
    return lines


def violations(root: Path) -> list[str]:
    """One line for each import that points the wrong way."""
    found = []
    for path in sources(root):
        part, tree = part_of(path, root), ast.parse(path.read_text(encoding="utf-8"))
        if part not in LAYERS:
            found.append(f"{path.relative_to(root)}: {part} is in no layer. {did_you_mean(part, LAYERS)}")
            continue
        in_functions = {
            id(inner)
            for outer in ast.walk(tree)
            if isinstance(outer, (ast.FunctionDef, ast.AsyncFunctionDef))
            for inner in ast.walk(outer)
        }
        unrun = type_checking_lines(tree)
        for node in ast.walk(tree):
            for name in imported(node, path, root):
                where = f"{path.relative_to(root)}:{node.lineno}"
                if name.startswith("!"):
                    top = name[1:].partition(".")[0]
                    if top == "brachium":
                        found.append(f"{where}: {name[1:]} is imported absolutely; imports in the package are relative")
                    if top in LAZY_ONLY and id(node) not in in_functions and node.lineno not in unrun:
                        found.append(f"{where}: {top} may be imported inside functions only")
                    if name == "!<above the package>":
                        found.append(f"{where}: the import leaves the package")
                    continue
                target = name.partition(".")[0]
                if target and target != part and target not in LAYERS[part] and target != "__version__":
                    found.append(f"{where}: {part} imports {target}")
    return found


def stdlib_clashes(root: Path) -> list[str]:
    names = {path.name.removesuffix(".py") for path in root.iterdir() if path.suffix == ".py" or path.is_dir()}
    return sorted(names & sys.stdlib_module_names - {"__main__"})


def test_imports_point_one_way(root: Path) -> None:
    assert violations(root) == []


def test_no_root_module_is_named_like_a_standard_one(root: Path) -> None:
    assert stdlib_clashes(root) == []


def test_datasets_is_a_namespace_part(root: Path) -> None:
    assert not (root / "datasets" / "__init__.py").exists(), "it would shadow Hugging Face datasets in the root"


def test_hugging_face_datasets_is_found_from_the_root(root: Path) -> None:
    try:
        importlib.metadata.version("datasets")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("Hugging Face datasets is not installed (lerobot's dataset extra brings it)")
    code = "import importlib.util; print(importlib.util.find_spec('datasets').origin)"
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert "site-packages" in done.stdout


def test_a_regular_datasets_package_wins_over_the_folder(root: Path, tmp_path: Path) -> None:
    """What `import datasets` finds in the root when another package of that name is installed."""
    (tmp_path / "datasets").mkdir()
    (tmp_path / "datasets" / "__init__.py").write_text("WHO = 'installed'")
    code = f"import sys; sys.path.insert(1, {str(tmp_path)!r}); import datasets; print(datasets.WHO)"
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "installed"


@pytest.mark.parametrize(
    ("file", "text", "complaint"),
    [
        ("vla/bad.py", "from ..envs.task import Env", "vla imports envs"),
        ("envs/bad.py", "def f():\n    from ..vla import model", "envs imports vla"),
        ("policies/bad.py", "from ..sim.world import World", "policies imports sim"),
        ("datasets/formats/bad.py", "from ...sim import world", "datasets imports sim"),
        ("spec.py", "from .datasets.store import EpisodeStore", "spec imports datasets"),
        ("sim/bad.py", "from .. import cli", "sim imports cli"),
        ("sim/bad.py", "import brachium.spec", "imports in the package are relative"),
        ("sim/bad.py", "from brachium import spec", "imports in the package are relative"),
        ("datasets/bad.py", "import lerobot.datasets", "inside functions only"),
        ("sim/bad.py", "from .... import spec", "leaves the package"),
        ("extra/new.py", "import os", "in no layer"),
    ],
)
def test_a_bad_tree_is_caught(tmp_path: Path, file: str, text: str, complaint: str) -> None:
    path = tmp_path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    assert complaint in "\n".join(violations(tmp_path))


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("policies/good.py", "from ..vla.model import VLA\nfrom ..spec import Observation"),
        ("datasets/formats/good.py", "def read():\n    import lerobot\n\nfrom ..store import EpisodeStore"),
        ("cli/good.py", "from ..envs import tasks\nfrom . import run"),
    ],
)
def test_a_good_tree_passes(tmp_path: Path, file: str, text: str) -> None:
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert violations(tmp_path) == []


def test_a_clash_with_the_standard_library_is_caught(tmp_path: Path) -> None:
    (tmp_path / "types.py").touch()
    assert stdlib_clashes(tmp_path) == ["types"]
