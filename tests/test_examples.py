"""The examples run as they say."""

import os
import subprocess
import sys
from pathlib import Path

from brachium.datasets.store import EpisodeStore

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"


def run(*words: str, path: str = "") -> str:
    environment = {**os.environ, "MUJOCO_GL": "egl", "PYTHONPATH": path}
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def test_own_data_becomes_a_store(tmp_path):
    said = run(str(EXAMPLES / "own_data.py"), str(tmp_path / "own"))
    assert "8 episodes, 240 frames" in said
    store = EpisodeStore.open(tmp_path / "own")
    assert {e.instruction for e in store.episodes} == {"go to the red square"}
    assert store.embodiment.action.reference == "delta"


def test_own_task_is_recorded_from_another_package(tmp_path):
    words = ("env=tabletop/hover", "episodes=6", "workers=1", f"out={tmp_path / 'hover'}")
    search = "hydra.searchpath=[pkg://own_task.conf]"
    run("-m", "brachium", "record", *words, search, path=str(EXAMPLES / "own_task"))
    store = EpisodeStore.open(tmp_path / "hover")
    assert store.num_episodes >= 5
    assert all(e.success for e in store.episodes)


def test_the_tour_of_the_store(tmp_path):
    said = run(str(EXAMPLES / "data_tour.py"), str(tmp_path))
    assert "lab: 8 episodes, 181 steps" in said
    assert "came from the left and arrived: [2, 3]" in said
    assert "'depth': (16, 1, 64, 64, 1)" in said
    assert "a batch of the mixture: {'lab': 15, 'home': 49}" in said
