"""Rollouts of a policy with an expert's labels: what is executed, what is learnt from, and who ends the episode."""

import numpy as np
import pytest

from brachium import corrections
from brachium.corrections import CorrectedRollouts
from brachium.datasets.schema import EXECUTED
from brachium.datasets.store import EpisodeStore
from brachium.envs.tabletop import TabletopEnv
from brachium.envs.tasks.reach import Reach
from brachium.errors import ConfigError


class Lost:
    """Always goes to one corner; counts, so that an episode that began with what another left would differ."""

    def __init__(self, spec, corner):
        self.embodiment, self.corner = spec, corner
        self.seeds, self.steps = [], 0

    def reset(self, lane, seed):
        self.seeds.append((lane, seed))
        self.steps = 0

    def act(self, observations, lanes):
        assert list(lanes) == [0]
        assert len(observations) == 1
        observations[0].check(self.embodiment, "a picture")
        self.steps += 1
        action = np.array([*self.corner, 1, 0, 0, 0, -1, 0, 1.0], np.float32)
        action[2] += 0.001 * self.steps
        return action[None]


@pytest.fixture
def rollouts(make_arm):
    env = TabletopEnv(task=Reach(), embodiment=make_arm("arm6_pose"))
    spec = env.embodiment.spec
    policies = [Lost(spec, (0.2, 0.3, 0.3)), Lost(spec, (0.5, -0.3, 0.3))]
    return CorrectedRollouts(env, policies, first=3, last=9)


def test_the_policy_drives_until_the_expert_ends_the_task(rollouts):
    replayed = TabletopEnv(task=Reach(), embodiment=rollouts.env.embodiment, images=False)
    executors, handovers = set(), set()
    for seed in range(8):
        (episode,) = rollouts.record(seed)
        assert episode.success
        assert episode.tags == ("reach", "corrected")
        policy = rollouts.policies[episode.meta["delay"]]
        handover = episode.meta["expert_from"]
        executors.add(episode.meta["delay"])
        handovers.add(handover)
        assert policy.seeds[-1] == (0, seed)
        replayed.reset(seed=seed)
        for t, step in enumerate(episode.steps):
            np.testing.assert_array_equal(step.action, replayed.expert_action(), err_msg="a label is not the expert's")
            np.testing.assert_array_equal(step.state, replayed.sim.state)
            done = step.extras[EXECUTED]
            if t < handover:
                np.testing.assert_allclose(done[:3], [*policy.corner[:2], 0.3 + 0.001 * (t + 1)], atol=1e-6)
                assert np.abs(done[:3] - step.action[:3]).max() > 0.02
            else:
                np.testing.assert_array_equal(done, step.action)
            if t < len(episode.steps) - 1:
                _, _, _, _, info = replayed.step(done)
        assert info["success"]
    assert executors == {0, 1}
    assert min(handovers) >= 3
    assert len(handovers) > 2


def test_the_same_seed_gives_the_same_episode_whatever_ran_before(rollouts):
    (first,) = rollouts.record(5)
    rollouts.record(6)
    (again,) = rollouts.record(5)
    assert first.meta == again.meta
    assert len(first.steps) == len(again.steps)
    for a, b in zip(first.steps, again.steps):
        np.testing.assert_array_equal(a.action, b.action)
        np.testing.assert_array_equal(a.extras[EXECUTED], b.extras[EXECUTED])
        np.testing.assert_array_equal(a.images["front"], b.images["front"])


def test_a_store_of_them_reads_back(tmp_path, rollouts, monkeypatch):
    monkeypatch.setattr(corrections, "_make", lambda *args: rollouts)
    (tmp_path / "policy").mkdir()
    (tmp_path / "policy" / "meta.json").write_text("{}")
    (tmp_path / "policy" / "model.safetensors").write_bytes(b"weights")
    rollouts.identity = corrections.drives(tmp_path / "policy", None, 0)
    done = corrections.record_from.__globals__
    monkeypatch.setitem(done, "_run_workers", _here)
    for episodes in (3, 5, 5):
        corrections.record_corrections(
            policy=str(tmp_path / "policy"), env=None, executor=None, out=str(tmp_path / "s"), episodes=episodes
        )
    store = EpisodeStore.open(tmp_path / "s")
    assert sorted(e.meta["seed"] for e in store.episodes) == list(range(500_000, 500_005))
    executed, action = store.lowdim(EXECUTED), store.lowdim("action")
    assert executed.shape == action.shape
    assert (executed != action).any(1).mean() > 0.2


def test_corrections_of_another_policy_are_not_taken_for_this_ones(tmp_path, rollouts, monkeypatch):
    rollouts.identity = "another"
    monkeypatch.setattr(corrections, "_make", lambda *args: rollouts)
    monkeypatch.setitem(corrections.record_from.__globals__, "_run_workers", _here)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "meta.json").write_text("{}")
        (tmp_path / name / "model.safetensors").write_bytes(name.encode())
    common = {"env": None, "executor": Lost, "out": str(tmp_path / "s"), "episodes": 2}
    rollouts.identity = corrections.drives(tmp_path / "one", Lost, 0)
    corrections.record_corrections(policy=str(tmp_path / "one"), **common)
    corrections.record_corrections(policy=str(tmp_path / "one"), **common)
    for other in ({"policy": str(tmp_path / "two")}, {"policy": str(tmp_path / "one"), "max_delay": 2}):
        with pytest.raises(ConfigError, match="corrections of another policy"):
            corrections.record_corrections(**(common | other))


def _here(make, out, name, seeds, workers, keep_failures):
    """What a recording process does, in this one."""
    from brachium.datasets.writer import EpisodeWriter
    from brachium.envs.record import write_episode

    source = make()
    with EpisodeWriter(EpisodeStore.open(out), source=name) as writer:
        for seed in seeds:
            for episode in source.record(seed):
                write_episode(writer, episode)
    return 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"policy": "nowhere"}, "no checkpoint"),
        ({"first": 5, "last": 4}, "first <= last"),
        ({"max_delay": -1}, "from 0"),
    ],
)
def test_mistakes_are_told_before_anything_is_made(tmp_path, options, said):
    with pytest.raises(ConfigError, match=said):
        corrections.record_corrections(
            **{"policy": "x", "env": None, "executor": None, "out": str(tmp_path / "s")} | options
        )
    assert not (tmp_path / "s").exists()
