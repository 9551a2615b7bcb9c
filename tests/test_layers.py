"""Imports go down only (docs/notes/000-layout.md), read from the sources, lazy and type-only imports included."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {"memopt": ROOT / "memopt", "memopt.passes": ROOT / "passes", "memopt.solvers": ROOT / "solvers",
           "memopt.kernels": ROOT / "kernels"}  # fmt: skip

# A module has the level of its longest listed prefix, so that one line serves a whole folder.
LEVELS = {
    0: "graph units errors presets files calls garbage",
    1: "plans edit tokens overlap merged cost timeline devices fusion joints",
    2: "program photograph insertion places facts listing unwrapped passbase operations local forward algebra kernels "
    "solvers",
    3: "passes blame capture frames hosts optim runtime regions streamed streams lowering fences inductor relay "
    "compose seams outputs recurrent models workload factory nets text fakes prices noise applied later early trained "
    "shapes weights gathered coded emission excerpt",
    4: "pipeline planned dumps refusal smaller profiling tuning legs generation chunking planning session report table "
    "planfile html chart page formula carry sizing attach watch probe accuracy rewrites remarks reused request "
    "agreement lighter ways",
    5: "api workbench",
    6: "cli options __main__ backend integrations",
}
LEVEL = {f"memopt.{name}": level for level, names in LEVELS.items() for name in names.split()}
TORCH_FREE = tuple(f"memopt.{name}" for name in ("solvers", "report", "table", "planfile", "html", "chart", "page"))
HEAVY = {"torch", "transformers", "functorch", "triton"}


def sources() -> dict[str, ast.Module]:
    """Installed module name -> its syntax tree; the links inside memopt/ are not followed, their targets are read."""
    found = {}
    for package, folder in FOLDERS.items():
        for path in sorted(folder.rglob("*.py")):
            inside = path.relative_to(folder).with_suffix("").parts
            if package == "memopt" and inside[0] in ("passes", "solvers", "kernels"):
                continue
            name = ".".join((package, *inside)).removesuffix(".__init__")
            found[name] = ast.parse(path.read_text(encoding="utf-8"), str(path))
    return found


TREES = sources()


def level(module: str) -> int | None:
    parts = module.split(".")
    return next((LEVEL[p] for n in range(len(parts), 1, -1) if (p := ".".join(parts[:n])) in LEVEL), None)


def targets(node: ast.AST) -> list[str]:
    """Absolute names an import statement reaches; `from memopt import api` reaches memopt.api."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, f"relative import in line {node.lineno}"
        inner = [f"{node.module}.{alias.name}" for alias in node.names]
        return [name if name in TREES else str(node.module) for name in inner]
    return []


def imports(tree: ast.AST) -> list[str]:
    return [name for node in ast.walk(tree) for name in targets(node)]


def loaded(body: list[ast.stmt]) -> Iterator[str]:
    """What importing the module imports: neither what its functions do nor what only type checkers read."""
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            yield from loaded(node.orelse)
            continue
        yield from targets(node)
        yield from loaded([child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)])


def test_there_is_something_to_check() -> None:
    assert {"memopt.graph", "memopt.solvers", "memopt.passes"} <= set(TREES)


@pytest.mark.parametrize("module", [name for name in TREES if name != "memopt"])
def test_imports_go_down(module: str) -> None:
    mine = level(module)
    assert mine is not None, f"give {module} a level here and in docs/notes/000-layout.md"
    for name in imports(TREES[module]):
        if name.startswith("memopt."):
            theirs = level(name)
            assert theirs is not None, f"{module} imports {name}, which has no level"
            assert theirs <= mine, f"{module} (level {mine}) imports {name} (level {theirs})"


def test_equals_do_not_import_each_other_in_a_circle() -> None:
    edges = {name: {n for n in loaded(tree.body) if n in TREES and n != name} for name, tree in TREES.items()}
    while edges:
        leaves = {name for name, reached in edges.items() if not reached & edges.keys()}
        assert leaves, f"a circle among {sorted(edges)}"
        edges = {name: reached for name, reached in edges.items() if name not in leaves}


@pytest.mark.parametrize("module", [name for name in TREES if name != "memopt" and level(name) == 0])
def test_the_ground_floor_needs_only_the_standard_library(module: str) -> None:
    tops = {name.split(".")[0] for name in imports(TREES[module])}
    assert tops <= {*sys.stdlib_module_names, "memopt"}


@pytest.mark.parametrize("module", list(TREES))
def test_values_and_reports_never_name_torch(module: str) -> None:
    free = level(module) in (0, 1) or module.startswith(TORCH_FREE)
    assert not free or not HEAVY & {name.split(".")[0] for name in imports(TREES[module])}


@pytest.mark.parametrize("module", [name for name in TREES if name.startswith("memopt.kernels")])
def test_kernels_know_only_the_graph_and_the_errors(module: str) -> None:
    ours = [name for name in imports(TREES[module]) if name.startswith("memopt.")]
    assert all(name.startswith(("memopt.kernels", "memopt.graph", "memopt.errors")) for name in ours)


def test_nobody_uses_the_bare_names() -> None:
    bare = {"passes", "solvers", "kernels"}
    assert {module for module, tree in TREES.items() if bare & {n.split(".")[0] for n in imports(tree)}} == set()


@pytest.mark.parametrize("package", ["memopt", "memopt.solvers", "memopt.report", "memopt.devices", "memopt.models"])
def test_torch_is_not_loaded_by(package: str) -> None:
    code = f"import sys, {package}; print({HEAVY!r} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert found.stdout.strip() == "set()"


def test_kernels_is_no_regular_package() -> None:
    """transformers probes for a package called kernels, and one in the current directory would break its import."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_the_links_lead_to_the_folders() -> None:
    for name in ("passes", "solvers", "kernels"):
        link = ROOT / "memopt" / name
        assert link.is_symlink()
        assert str(link.readlink()) == f"../{name}"
        assert link.resolve() == ROOT / name
