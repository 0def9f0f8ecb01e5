"""Where episodes are run has no say in how they go, and a worker that dies loses none."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from brachium.__main__ import main
from brachium.cli.compose import load
from brachium.datasets.store import EpisodeStore
from brachium.errors import BrachiumError
from brachium.policies import workers
from brachium.policies.rollout import observation_of
from brachium.policies.workers import Job, ProcessWorkers, Setting
from brachium.spec import Observation
from brachium.vla.checkpoint import make_golden, save_checkpoint
from brachium.vla.recipe import Recipe
from brachium.vla.tokenizer import word_tokenizer

from .support.processes import descendants
from .vla.conftest import make_statistics

EPISODES = 200
LINUX = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="finds processes in /proc")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A policy of few weights, all random, for the arm of the demo."""
    env = load("env/tabletop/reach")()
    spec = env.spec_embodiment
    seen, _ = env.reset(seed=0)
    env.close()
    backbone = {
        "_target_": "brachium.vla.backbones.octo.OctoBackbone",
        "width": 16,
        "depth": 1,
        "heads": 2,
        "image_size": 32,
    }
    head = {"_target_": "brachium.vla.heads.flow.FlowHead", "width": 16, "depth": 1, "steps": 2}
    recipe = Recipe(backbone=backbone, head=head, points=False, action_horizon=4, width=8)
    model = recipe.build({spec.name: spec}, word_tokenizer([str(seen["instruction"])]))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(
                0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
            )
    model.set_statistics(spec.name, make_statistics(spec))
    one = observation_of({k: [v] for k, v in seen.items()}, 0, spec)
    golden = make_golden(model, spec.name, Observation.stack([one] * 2))
    return save_checkpoint(tmp_path_factory.mktemp("policy") / "checkpoint", model, [golden], {})


def words(checkpoint, out, *more):
    typed = ["eval", f"checkpoint={checkpoint}", "env=tabletop/reach", "env.task.max_steps=5", f"out={out}", *more]
    return [*typed, f"episodes={EPISODES}", "num_envs=4", "videos=0", "report=false"]


def rows(out):
    """Episodes by kind of instruction and seed, all that is told of them but the time they took."""
    lines = [json.loads(line) for line in (out / "episodes.jsonl").read_text().splitlines()]
    found = {(row["split"], row["seed"]): {k: v for k, v in row.items() if k != "seconds"} for row in lines}
    assert len(found) == len(lines)
    return found


@pytest.fixture(scope="module")
def local(checkpoint, tmp_path_factory):
    out = tmp_path_factory.mktemp("local") / "out"
    assert main(words(checkpoint, out)) == 0
    found = rows(out)
    assert len(found) == EPISODES
    assert len({json.dumps(row["actions"]) for row in found.values()}) == EPISODES  # each is an episode of its own
    return found, json.loads((out / "summary.json").read_text())


def killing(word, out):
    """Kill one of this process's workers as soon as some episodes are there; which is in the list that is returned."""
    killed = []

    def watch():
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            file = out / "episodes.jsonl"
            if file.exists() and file.read_bytes().count(b"\n") >= 10:
                found = descendants(os.getpid(), word)
                if found:
                    os.kill(found[-1], signal.SIGKILL)
                    killed.append(found[-1])
                    return
            time.sleep(0.01)

    thread = threading.Thread(target=watch)
    thread.start()
    return killed, thread


@LINUX
@pytest.mark.slow
def test_two_processes_one_of_which_is_killed(checkpoint, local, tmp_path, capsys):
    killed, thread = killing("spawn_main", tmp_path / "out")
    assert main(words(checkpoint, tmp_path / "out", "rollout=processes", "rollout.workers=2")) == 0
    thread.join()
    assert killed
    assert rows(tmp_path / "out") == local[0]
    assert "a worker process died" in capsys.readouterr().err
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    for key in ("total", "tasks", "splits", "env_steps"):
        assert summary[key] == local[1][key]


@LINUX
@pytest.mark.slow
def test_ray_one_of_whose_workers_is_killed(checkpoint, local, tmp_path):
    ray = pytest.importorskip("ray")
    killed, thread = killing("ray::_work_with", tmp_path / "out")
    try:
        assert main(words(checkpoint, tmp_path / "out", "rollout=ray")) == 0
    finally:
        ray.shutdown()
    thread.join()
    assert killed
    assert rows(tmp_path / "out") == local[0]


def recorded(path):
    """Seed -> all that an episode of a store says."""
    store, found = EpisodeStore.open(path), {}
    for k, episode in enumerate(store.episodes):
        fields = [store.lowdim(name, [k]).tobytes() for name in ("state", "action")]
        assert episode.meta["seed"] not in found
        found[episode.meta["seed"]] = (episode.instruction, *fields)
    return found


@LINUX
@pytest.mark.slow
def test_ray_records_what_processes_do_when_one_of_its_workers_is_killed(tmp_path):
    ray = pytest.importorskip("ray")
    typed = ["record", "env=tabletop/reach", "episodes=48", "keep_failures=true"]
    assert main([*typed, f"out={tmp_path / 'local'}", "workers=1"]) == 0
    wanted = recorded(tmp_path / "local")
    out, killed = tmp_path / "ray", []

    def watch():
        deadline = time.monotonic() + 120
        while not killed and time.monotonic() < deadline:
            found = descendants(os.getpid(), "ray::_piece")
            if found and len(list(out.glob("_log/*.json"))) > 2:
                os.kill(found[-1], signal.SIGKILL)
                killed.append(found[-1])
            time.sleep(0.01)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        assert main([*typed, f"out={out}", "rollout=ray"]) == 0
    finally:
        ray.shutdown()
    thread.join()
    assert killed
    assert recorded(out) == wanted
    assert set(wanted) == set(range(48))


class Deadly:
    """An environment that ends its process."""

    def __call__(self):
        os.kill(os.getpid(), signal.SIGKILL)


def test_an_episode_that_kills_its_workers_is_given_up(monkeypatch):
    monkeypatch.setattr(workers, "DEATHS", 2)
    deadly = Deadly()
    setting = Setting(policy=deadly, envs={"a": deadly}, vector=_vector, num_envs=1, threads=1, key="1")
    with pytest.raises(BrachiumError, match="2 worker processes died one after the other without an episode"):
        list(ProcessWorkers(workers=1).run(setting, [Job(task="a", split="train", seeds=(1,))]))


def _vector(made):
    return [make() for make in made]


def test_ray_that_is_not_there_says_what_to_type(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    assert main(words(checkpoint, tmp_path / "out", "rollout=ray")) == 2
    assert "rollout=ray needs Ray. Type: pip install 'brachium[ray]'" in capsys.readouterr().err


def test_blind_policies_are_blind_in_workers_too(checkpoint, tmp_path):
    more = ("control=blind", "episodes=8")
    for name in ("local", "processes"):
        typed = [w for w in words(checkpoint, tmp_path / name, f"rollout={name}", *more) if w != f"episodes={EPISODES}"]
        assert main(typed) == 0
    found, other = rows(tmp_path / "local"), rows(tmp_path / "processes")
    assert found == other
    assert np.isfinite([row["steps"] for row in found.values()]).all()
