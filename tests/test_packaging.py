"""The checkout root is the package: these are the guards that this layout needs."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import vcompress

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES = PROJECT["tool"]["setuptools"]["packages"]
NOT_SOURCE = {"tests", "build", "dist", "benchmarks"}


def normalized(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


def test_every_package_folder_is_listed() -> None:
    found = {"vcompress"}
    for init in ROOT.rglob("__init__.py"):
        parts = init.parent.relative_to(ROOT).parts
        if parts and not parts[0].startswith(".") and parts[0] not in NOT_SOURCE:
            found.add(".".join(("vcompress", *parts)))
    assert found == set(PACKAGES)
    assert sorted(PACKAGES) == PACKAGES


def test_the_package_is_loaded_once() -> None:
    assert Path(vcompress.__path__[0]).resolve() == ROOT
    by_file: dict[Path, set[int]] = {}
    for module in list(sys.modules.values()):
        file = getattr(module, "__file__", None)
        if isinstance(file, str) and Path(file).resolve().is_relative_to(ROOT):
            path = Path(file).resolve().relative_to(ROOT)
            if not path.parts[0].startswith("."):  # an environment in the checkout
                by_file.setdefault(path, set()).add(id(module))
    twice = {str(file) for file, modules in by_file.items() if len(modules) > 1}
    assert not twice
    assert sys.modules[ROOT.name] is vcompress


def test_a_wheel_holds_the_package_and_nothing_else(tmp_path: Path) -> None:
    # A copy without build/: setuptools would take stale files from there.
    copy = tmp_path / "source"
    skipped = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, copy, ignore=skipped)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path)]
    done = subprocess.run([*build, str(copy)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name == f"vcompress_ai-{vcompress.__version__}-py3-none-any.whl"

    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
        licences = [name for name in archive.namelist() if "/licenses/" in name]
    assert {name.split("/")[0] for name in names} == {"vcompress"}
    assert not [name for name in names if name.startswith("vcompress/tests/")]
    expected = {f"vcompress/{file}" for file in ("__init__.py", "py.typed")}
    for package in PACKAGES[1:]:
        folder = copy.joinpath(*package.split(".")[1:])
        files = [*folder.glob("*.py"), *folder.glob("assets/*"), *folder.glob("templates/*")]
        files += folder.glob("schemas/*")
        expected |= {f"vcompress/{file.relative_to(copy).as_posix()}" for file in files}
    assert expected <= set(names)
    assert {name.rsplit("/", 1)[1] for name in licences} == {"LICENSE", "NOTICE"}


def test_the_version_stands_in_one_place_and_needs_no_torch() -> None:
    code = "import sys, vcompress; print(vcompress.__version__, 'torch' in sys.modules)"
    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent
    ).stdout.split()
    assert printed == [vcompress.__version__, "False"]
    assert PROJECT["project"]["dynamic"] == ["version"]


def test_constraints_pin_every_direct_dependency_exactly() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[A-Za-z0-9_.]+", pin) for pin in pins), pins
    pinned = {normalized(pin.split("==")[0]) for pin in pins}
    project = PROJECT["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["cpu"], *extras["hf"], *extras["dev"]]
    for requirement in wanted:
        name = re.split(r"[\[<>=;\s]", requirement)[0]
        assert normalized(name) in pinned, requirement


def test_the_readme_has_the_two_commands_that_ci_reads() -> None:
    readme = (ROOT / "README.md").read_text().splitlines()
    commands = [line for line in readme if line.startswith("python3 -m venv")]
    assert len(commands) == 2
    assert commands[0].endswith("vcompress demo")
    assert commands[1].endswith("-m pytest")
    assert all("-c constraints.txt" in command for command in commands)


def test_every_imported_library_is_declared() -> None:
    """Optional ones in an extra: nothing is there only because something else brought it."""
    distribution_of = {
        "PIL": "pillow", "cuda": "cuda-bindings", "modelopt": "nvidia-modelopt",
        "skimage": "scikit-image", "tensorrt_rtx": "tensorrt-rtx-cu13",
    }  # fmt: skip
    project = PROJECT["project"]
    extras = project["optional-dependencies"]
    requirements = [
        *project["dependencies"],
        *(each for extra in extras.values() for each in extra),
    ]
    declared = {normalized(re.split(r"[\[<>=;\s]", each)[0]) for each in requirements}
    undeclared: dict[str, str] = {}
    for package in PACKAGES:
        for file in ROOT.joinpath(*package.split(".")[1:]).glob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                names: list[str] = []
                if isinstance(node, ast.Import):
                    names = [alias.name for alias in node.names]
                elif isinstance(node, ast.ImportFrom) and node.module:
                    names = [node.module]
                for name in (each.split(".")[0] for each in names):
                    known = name in sys.stdlib_module_names or name == "vcompress"
                    if not known and normalized(distribution_of.get(name, name)) not in declared:
                        undeclared[name] = str(file.relative_to(ROOT))
    assert not undeclared
