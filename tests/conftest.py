"""What every test may rely on: off-screen rendering, few threads, seeds, shared data when it is there."""

from __future__ import annotations

import functools
import os
import random
import re
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

# Before anything imports mujoco or torch. Workers side by side must not start two threads each: those that wait, spin.
# MKL_NUM_THREADS wins over OMP_NUM_THREADS in torch, so that all of them say the same.
if sys.platform == "linux":
    os.environ.setdefault("MUJOCO_GL", "egl")
THREADS = os.environ.get("OMP_NUM_THREADS", "1")
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_name, THREADS)
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test never downloads

# The same examples every time; HYPOTHESIS_PROFILE=explore looks for new ones.
settings.register_profile("same", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("explore", deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))

LONG = ("test_demo.py", "test_parallel.py", "test_heads.py")
"""Files that take minutes in few tests: a worker that gets one last leaves the other without work."""
REALTIME = "real_robot"
"""Folder of tests that keep time, and mostly wait: last, so that nothing that computes runs beside them."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the long files, end with those that keep time."""
    items.sort(key=lambda item: (item.path.parent.name == REALTIME, item.path.name not in LONG))


TENSOR = re.compile(r"\b(Float|Int|UInt8|Bool|Num|Shaped|Integer|Inexact|Key)\w*\[")


def check_tensors(function: Callable[..., Any]) -> Callable[..., Any]:
    """Check the shapes and dtypes that a function's jaxtyping annotations state; other annotations are left alone.

    Checking those too would reject what works, for example a list from YAML where the signature says tuple.
    """
    from beartype import beartype

    notes = dict(getattr(function, "__annotations__", {}))
    kept = {name: note for name, note in notes.items() if TENSOR.search(str(note))}
    if not kept:
        return function
    function.__annotations__ = kept
    try:
        return beartype(function)
    finally:
        function.__annotations__ = notes


def _check_tensors_of(package: str) -> None:
    """Have jaxtyping check every tensor function of `package`; must come before the package is imported."""
    from jaxtyping import install_import_hook

    module = types.ModuleType("brachium_tensor_checks")  # conftest itself cannot be imported by name
    vars(module)["check"] = check_tensors
    sys.modules[module.__name__] = module
    install_import_hook(package, f"{module.__name__}.check")


if os.environ.get("BRACHIUM_CHECK_TENSORS", "1") == "1":
    _check_tensors_of("brachium.vla")

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _seeds() -> None:
    """Same draws in every run, whichever tests ran before."""
    random.seed(0)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(0)
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository root, which is the package `brachium`."""
    return ROOT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real data beside the checkout; tests that need it are skipped where it is absent."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no shared data beside the checkout (expected ../shared/data)")
    return folder


@functools.cache
def _config(task: str, embodiment: str) -> Any:
    from hydra import compose, initialize_config_module

    with initialize_config_module("brachium.conf", version_base="1.3"):
        return compose("record", [f"env=tabletop/{task}", f"embodiment@env.embodiment={embodiment}"]).env


@pytest.fixture(scope="session")
def make_env() -> Callable[..., Any]:
    """Makes a table-top environment from the configs: ``make_env("reach", "arm7_ee", images=False)``."""
    from hydra.utils import instantiate

    def make(task: str = "reach", embodiment: str = "arm6_ee", **options: Any) -> Any:
        return instantiate(_config(task, embodiment))(**options)  # nothing is shared by two environments

    return make


@pytest.fixture(scope="session")
def make_arm() -> Callable[[str], Any]:
    """Makes a simulated embodiment from its config: ``make_arm("arm7_joint")``."""
    from hydra.utils import instantiate

    return lambda name: instantiate(_config("reach", name).embodiment)
