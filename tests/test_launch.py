"""Sweeps by Hydra's own launchers: processes of submitit here, which are Slurm's jobs elsewhere."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from brachium.__main__ import main
from brachium.cli.launch import is_for_hydra


def typed(*words, cwd):
    """A command in a process of its own: Hydra's launchers set up logging anew, and close what the tests log to."""
    told = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-m", "brachium", *words], cwd=cwd, env=told, capture_output=True, text=True)


WORDS = ["profile", "--multirun", "model=octo", "passes=[chunk]", "repeats=1", "device=cpu"]
SMALL = ["model.backbone.width=24", "model.backbone.depth=2", "model.backbone.heads=2"]


@pytest.mark.slow
def test_jobs_of_a_sweep_run_in_submitits_processes(tmp_path):
    words = [*WORDS, *SMALL, "batch_size=1,2,0", "out=outputs/p${batch_size}", "hydra/launcher=submitit_local"]
    done = typed(*words, "hydra.launcher.timeout_min=5", "hydra.sweep.dir=swept", cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    said = done.stdout.splitlines()
    assert "3 runs; what they said is in swept" in said[0]
    assert [line.split()[-1] for line in said[2:]] == ["ok", "ok", "2"]
    for number in (1, 2):
        found = json.loads((tmp_path / "outputs" / f"p{number}" / "profile.json").read_text())
        assert found["passes"]["chunk"]["count"] == number
    told = "".join(path.read_text() for path in (tmp_path / "swept").rglob("*_log.err"))
    assert "expected batch_size and repeats of at least 1, got 0 and 1" in told


def test_slurm_that_is_not_there_is_said(tmp_path):
    done = typed(*WORDS, "hydra/launcher=submitit_slurm", "hydra.launcher.partition=gpu", cwd=tmp_path)
    assert done.returncode == 2
    assert "srun" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([*WORDS, "hydra/launcher=slurm"], "Could not find 'hydra/launcher/slurm'"),
        (["profile", "model=octo", "hydra/launcher=submitit_slurm"], "how a sweep is run. Add --multirun"),
        ([*WORDS, "modle=octo", "hydra/launcher=submitit_local"], "Did you mean"),  # before any job is sent
    ],
)
def test_what_cannot_be_launched_is_said(words, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    assert says in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.err"))


def test_a_plugin_that_is_not_there_is_named_with_what_brings_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "submitit" else find(name, *more)
    )
    assert main([*WORDS, "hydra/launcher=submitit_slum"]) == 2
    assert "uv pip install 'brachium[slurm]'" in capsys.readouterr().err


def test_whose_options_are_hydras():
    assert is_for_hydra("hydra/launcher")
    assert is_for_hydra("hydra.launcher.partition")
    assert not is_for_hydra("hydra.searchpath")
    assert not is_for_hydra("hydraulics")
