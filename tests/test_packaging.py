"""What is installed: one package with all three folders in it, found by its entry points, pinned as it was tested."""

from __future__ import annotations

import ast
import configparser
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import memopt

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
LEFT_OUT = shutil.ignore_patterns(".*", "*.egg-info", "build", "dist", "__pycache__", "tests", "benchmarks")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(wheel, sdist) of a copy of the sources, so that nothing is left in the checkout; without the network."""
    source = tmp_path_factory.mktemp("built") / "source"
    shutil.copytree(ROOT, source, symlinks=True, ignore=LEFT_OUT)
    code = "from setuptools import build_meta as b; b.build_sdist('out'); b.build_wheel('out')"
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True)
    return next((source / "out").glob("*.whl")), next((source / "out").glob("*.tar.gz"))


def modules() -> set[str]:
    """Every Python file of the checkout that has to be installed, by its path in the wheel."""
    inside = {f"memopt/{p.relative_to(ROOT / 'memopt').as_posix()}" for p in (ROOT / "memopt").rglob("*.py")}
    for folder in ("passes", "solvers", "kernels"):
        inside |= {f"memopt/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / folder).rglob("*.py")}
    return inside


def test_the_wheel_holds_every_module_once_and_nothing_else_at_the_top(built: tuple[Path, Path]) -> None:
    names = zipfile.ZipFile(built[0]).namelist()
    assert {name for name in names if name.endswith(".py")} == modules()
    assert len(names) == len(set(names))
    assert "memopt/py.typed" in names
    assert {name.split("/")[0] for name in names} == {"memopt", f"memopt-{memopt.__version__}.dist-info"}


def test_the_sdist_carries_what_a_build_needs(built: tuple[Path, Path]) -> None:
    with tarfile.open(built[1]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert modules() | {"pyproject.toml", "README.md", "LICENSE"} <= names


def test_the_wheel_works_from_elsewhere(built: tuple[Path, Path], tmp_path: Path) -> None:
    zipfile.ZipFile(built[0]).extractall(tmp_path / "site")
    code = (
        "import memopt.solvers, memopt.passes, memopt.devices; print(memopt.devices.__file__, memopt.solvers.__file__)"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    found = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert all(Path(path).is_relative_to(tmp_path / "site") for path in found.stdout.split())


def test_every_entry_point_leads_to_a_function(built: tuple[Path, Path]) -> None:
    wheel = zipfile.ZipFile(built[0])
    parser = configparser.ConfigParser()
    parser.read_string(wheel.read(f"memopt-{memopt.__version__}.dist-info/entry_points.txt").decode())
    points = {(group, name): target for group in parser.sections() for name, target in parser[group].items()}
    assert points == {
        ("console_scripts", "memopt"): "memopt.cli:main",
        ("torch_dynamo_backends", "memopt"): "memopt.backend:memopt_backend",
    }
    for target in points.values():
        module, _, name = target.partition(":")
        tree = ast.parse(wheel.read(module.replace(".", "/") + ".py"))
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, target


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return {canonicalize_name(line.split("==")[0]): line.split("==")[1] for line in lines if line and line[0] != "#"}


def test_every_dependency_is_pinned_to_a_version_it_allows() -> None:
    asked = [*PROJECT["dependencies"], *(line for extra in PROJECT["optional-dependencies"].values() for line in extra)]
    for requirement in map(Requirement, asked):
        if requirement.name not in ("memopt", "triton"):  # a build of torch for CUDA brings its own triton
            assert requirement.specifier.contains(pins()[canonicalize_name(requirement.name)]), requirement


def test_nothing_of_cuda_and_no_address_is_pinned() -> None:
    assert not [name for name in pins() if re.match(r"nvidia|cuda|triton", name)]
    assert not re.search(r"://|@|--", "\n".join(f"{name}=={version}" for name, version in pins().items()))


def test_the_version_is_said_once() -> None:
    assert PROJECT["dynamic"] == ["version"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", memopt.__version__)
    assert f"## {memopt.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_make_help_lists_every_target() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.search(r"\.PHONY: (.*)", makefile)
    assert targets is not None
    found = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    listed = [line.split()[0] for line in found.splitlines() if not line.startswith("make[")]
    assert sorted(listed) == sorted(targets[1].split())
    assert {"demo", "test", "check", "gpu", "bench", "plan", "sizes", "clean"} <= set(listed)


def test_the_check_in_a_new_environment_can_be_run() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0
