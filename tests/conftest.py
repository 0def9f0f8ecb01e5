"""What every test may rely on: off-screen rendering, few threads, seeds, shared data when it is there."""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path

import pytest

# Before anything imports mujoco or torch. Two xdist workers on two cores must not start four threads each.
if sys.platform == "linux":
    os.environ.setdefault("MUJOCO_GL", "egl")
THREADS = "1" if os.environ.get("PYTEST_XDIST_WORKER") else "2"
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_name, THREADS)
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test never downloads

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
