"""Scripted experts succeed, disturbed or not, on every robot; demonstrations carry clean labels."""

import numpy as np
import pytest

from brachium.envs.demonstrations import ExpertDemonstrations
from brachium.sim.scene import OBJECT_KINDS

TASKS = ("reach", "push", "place", "stack", "open_drawer", "close_drawer")
FAST = 2.0
"""No free object is ever faster [m/s]; one dropped into a bowl from carrying height reaches 1.3."""


def run(env, seed, noise):
    """One expert episode, every action disturbed; returns success and the greatest speed of an object."""
    env.reset(seed=seed)
    rng, top = np.random.default_rng([seed, 5]), 0.0
    scale = noise * env.embodiment.control.disturbance(env.embodiment.robot)
    movable = [i.name for i in env.sim.scene.items if i.kind in OBJECT_KINDS]
    for _ in range(env.task.max_steps):
        action = env.expert_action()
        executed = (action + rng.normal(0.0, 1.0, action.shape) * scale).astype(np.float32)
        *_, terminated, truncated, info = env.step(executed)
        top = max([top, *(env.sim.speed(name) for name in movable)])
        if terminated or truncated:
            break
    return info["success"], top


@pytest.mark.parametrize("noise", [0.0, 0.3])
@pytest.mark.parametrize("task", TASKS)
def test_the_expert_succeeds_and_nothing_flies(make_env, task, noise):
    env = make_env(task, "arm6_ee", images=False)
    ended = [run(env, seed, noise) for seed in range(50)]
    assert sum(success for success, _ in ended) >= 0.95 * len(ended)
    assert max(top for _, top in ended) < FAST


@pytest.mark.parametrize("embodiment", ["arm7_ee", "arm6_joint", "arm7_joint"])
@pytest.mark.parametrize("task", TASKS)
def test_the_same_expert_works_for_every_embodiment(make_env, task, embodiment):
    env = make_env(task, embodiment, images=False)
    ended = [run(env, seed, noise) for noise in (0.0, 0.3) for seed in range(10)]
    assert sum(success for success, _ in ended) >= len(ended) - 2
    assert max(top for _, top in ended) < FAST


# -- demonstrations ---------------------------------------------------------------------------------------------------


class Watched:
    """Records what an environment is given and what its expert would have done."""

    def __init__(self, env):
        self.executed, self.expert = [], []
        step, expert = env.step, env.expert_action

        def stepped(action):
            self.executed.append(np.array(action))
            return step(action)

        def asked():
            self.expert.append(expert())
            return self.expert[-1].copy()

        env.step, env.expert_action = stepped, asked


@pytest.mark.parametrize("embodiment", ["arm6_ee", "arm7_joint"])
def test_labels_are_clean_and_only_executed_actions_are_disturbed(make_env, embodiment):
    env = make_env("place", embodiment, images=True)
    watched = Watched(env)
    (episode,) = ExpertDemonstrations(env, noisy=1.0, drop=0.0).record(4)
    labels = np.stack([step.action for step in episode.steps])
    np.testing.assert_array_equal(labels, np.stack(watched.expert))
    executed = np.stack(watched.executed)
    noise = executed - labels[: len(executed)]
    scale = 0.3 * env.embodiment.control.disturbance(env.embodiment.robot)
    assert not np.any(noise[:, scale == 0.0])
    ratio = np.std(noise[:, scale > 0.0] / scale[scale > 0.0])
    assert 0.7 < ratio < 1.3
    assert len(labels) == len(executed) + 1  # one step after success, recorded and not executed
    # the label belongs to the state of its own step, not of the one before: replay what was executed
    other = make_env("place", embodiment, images=False)
    observation, _ = other.reset(seed=4)
    for step, action in zip(episode.steps, executed):
        np.testing.assert_array_equal(observation["state"], step.state)
        np.testing.assert_array_equal(other.expert_action(), step.action)
        observation, *_ = other.step(action)
    np.testing.assert_array_equal(observation["state"], episode.steps[-1].state)


def test_without_noise_the_label_is_what_was_done(make_env):
    env = make_env("reach")
    watched = Watched(env)
    (episode,) = ExpertDemonstrations(env, noisy=0.0, drop=0.0).record(0)
    labels = [step.action for step in episode.steps[: len(watched.executed)]]
    np.testing.assert_array_equal(np.stack(watched.executed), np.stack(labels))


def test_the_named_share_of_episodes_is_disturbed(make_env):
    disturbed = 0
    for seed in range(60):
        watched = Watched(env := make_env("reach"))
        ExpertDemonstrations(env, noisy=0.5, drop=0.0).record(seed)
        disturbed += bool(np.any(np.stack(watched.executed) != np.stack(watched.expert)[: len(watched.executed)]))
    assert 18 <= disturbed <= 42


def test_the_gripper_opens_by_itself_and_the_label_does_not(make_env):
    for seed in range(20):
        env = make_env("place", images=True)
        watched = Watched(env)
        (episode,) = ExpertDemonstrations(env, noisy=0.0, drop=1.0).record(seed)
        executed = np.stack(watched.executed)
        differs = executed[:, -1] != np.stack([s.action for s in episode.steps])[: len(executed), -1]
        if differs.any():
            assert np.all(executed[differs, -1] == 1.0)
            assert 1 <= differs.sum() <= 2
            assert np.array_equal(executed[:, :-1], np.stack([s.action for s in episode.steps])[: len(executed), :-1])
            assert episode.success  # it is picked up again
            return
    pytest.fail("nothing was ever dropped")


def test_one_seed_is_one_demonstration(make_env):
    env = make_env("push")
    recorder = ExpertDemonstrations(env)
    (first,) = recorder.record(11)
    recorder.record(12)
    (again,) = ExpertDemonstrations(make_env("push")).record(11)
    (same,) = recorder.record(11)
    for other in (again, same):
        assert (other.instruction, other.tags, other.meta, other.success) == (
            first.instruction,
            first.tags,
            first.meta,
            first.success,
        )
        assert len(other.steps) == len(first.steps)
        for a, b in zip(first.steps, other.steps):
            np.testing.assert_array_equal(a.action, b.action)
            np.testing.assert_array_equal(a.state, b.state)
            for camera, image in a.images.items():
                np.testing.assert_array_equal(image, b.images[camera])
    assert first.meta == {"seed": 11, "task": "push"}
    assert first.tags == ("push", "expert")


@pytest.mark.parametrize("embodiment", ["arm6_joint", "arm7_joint", "arm7_ee"])
def test_disturbed_demonstrations_of_every_control_mode_succeed(make_env, embodiment):
    env = make_env("place", embodiment)
    recorder = ExpertDemonstrations(env, noisy=1.0)
    assert sum(bool(recorder.record(seed)[0].success) for seed in range(8)) >= 7
