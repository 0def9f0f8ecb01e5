"""The wheel: holds every package, YAML and asset, no tests, and runs from any folder in a clean environment."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest

NOT_SHIPPED = {"tests", "benchmarks", "examples", "docs", "outputs", "scripts", "build", "dist", "integrations"}
IGNORE = shutil.ignore_patterns(".*", *NOT_SHIPPED, "__pycache__", "*.egg-info")


def code_folders(root: Path) -> set[str]:
    """Every folder that holds Python code, as a package name."""
    found = set()
    for top in root.iterdir():  # the checkout holds a whole environment in .venv: do not walk it
        if top.is_dir() and not top.name.startswith(".") and top.name not in NOT_SHIPPED:
            found |= {".".join(["brachium", *path.relative_to(root).parts[:-1]]) for path in top.rglob("*.py")}
    return found | {"brachium"}


def settings(root: Path) -> dict[str, list[str]]:
    loaded: dict[str, list[str]] = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]
    return loaded


def test_every_folder_with_code_is_on_the_list_of_packages(root: Path) -> None:
    listed = settings(root)["packages"]
    assert len(listed) == len(set(listed))
    missing, stale = code_folders(root) - set(listed), set(listed) - code_folders(root)
    assert not missing, f"add to packages in pyproject.toml: {sorted(missing)}"
    assert not stale, f"remove from packages in pyproject.toml: {sorted(stale)}"


def test_pins_cover_the_requirements_and_hold_no_address(root: Path) -> None:
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    pins = (root / "constraints.txt").read_text()
    pinned = {line.partition("==")[0].strip().lower() for line in pins.splitlines()}
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    names = {line.partition(">")[0].partition("[")[0].strip().lower() for line in wanted}
    assert names <= pinned, f"pin in constraints.txt: {sorted(names - pinned)}"
    assert "://" not in pins
    assert not (root / "uv.lock").exists() or "uv.lock" in (root / ".gitignore").read_text()


@pytest.fixture(scope="module")
def wheel(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy, so that the checkout gets no build folder."""
    copy, out = tmp_path_factory.mktemp("source") / "brachium", tmp_path_factory.mktemp("wheel")
    shutil.copytree(root, copy, ignore=IGNORE)
    words = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(copy)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return next(out.glob("*.whl"))


@pytest.mark.slow
def test_the_wheel_holds_what_the_checkout_holds(root: Path, wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = set()
    for package in settings(root)["packages"]:
        folder = root.joinpath(*package.split(".")[1:])
        files = folder.glob("*") if package == "brachium" else folder.rglob("*")
        for path in files:
            shipped = path.suffix == ".py" or package != "brachium"
            if path.is_file() and shipped and "__pycache__" not in path.parts and not path.name.startswith("."):
                expected.add("brachium/" + path.relative_to(root).as_posix())
    missing = expected - names
    assert not missing, f"not in the wheel; add to package-data in pyproject.toml: {sorted(missing)}"
    assert any(name.startswith("brachium/conf/") and name.endswith(".yaml") for name in names)
    assert not [name for name in names if NOT_SHIPPED & set(name.split("/")[1:2])]
    assert not [name for name in names if "/tests/" in name or ".venv" in name]


@pytest.fixture(scope="module")
def clean_venv(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel alone; third-party packages are lent by this one to save minutes."""
    folder = tmp_path_factory.mktemp("clean") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "--quiet", "--no-deps", "--no-index", str(wheel)], check=True)
    purelib = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    # A path added by a .pth file has its own .pth files ignored, so the editable install of the checkout stays out.
    (Path(purelib) / "lent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder


def run_there(venv: Path, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    variables = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    return subprocess.run(
        [venv / "bin" / words[0], *words[1:]], cwd=folder, env=variables, capture_output=True, text=True
    )


@pytest.mark.slow
def test_the_installed_wheel_runs_from_another_folder(clean_venv: Path, tmp_path: Path) -> None:
    where = run_there(clean_venv, tmp_path, "python", "-c", "import brachium; print(brachium.__file__)")
    assert Path(where.stdout.strip()).is_relative_to(clean_venv), where.stdout + where.stderr
    version = run_there(clean_venv, tmp_path, "brachium", "--version")
    assert (version.returncode, version.stderr) == (0, "")
    parts = run_there(clean_venv, tmp_path, "brachium", "list")
    assert (parts.returncode, "Traceback" in parts.stderr) == (0, False), parts.stderr
    checked = run_there(clean_venv, tmp_path, "brachium", "doctor", "json=true")
    report = json.loads(checked.stdout)
    place = next(check["found"] for check in report["checks"] if check["name"] == "brachium")
    assert str(clean_venv) in place
    failed = [check["name"] for check in report["checks"] if check["status"] == "FAIL"]
    assert checked.returncode == int(bool(failed))
    assert not [check for check in report["checks"] if check["area"] == "packages" and check["status"] == "FAIL"]
