"""Rollouts in the simulator: a result depends on its seed alone, and can be replayed."""

from dataclasses import replace

import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from brachium.envs.vector import ThreadVectorEnv
from brachium.errors import ConfigError
from brachium.policies.executor import RecedingHorizon
from brachium.policies.rollout import observation_of, replay, rollout
from brachium.sim.simulation import DOWN
from brachium.spec import ActionChunk

SEEDS = [11, 5, 8, 3, 21, 34, 2]


class Wanderer:
    """Goes towards a place that the state and the noise choose, and remembers nothing."""

    def __init__(self, spec):
        self.embodiment, self.action_horizon = spec, 4
        self.noise_dim = spec.action.dim

    def predict(self, observations, noise):
        high = np.asarray(self.embodiment.action.high, np.float32)
        pull = np.stack([np.resize(o.state[:3] - [0.35, 0.0, 0.1], 7) for o in observations])
        words = np.array([[len(o.instruction)] for o in observations], np.float32)
        actions = np.tanh(noise - 3 * pull[:, None].astype(np.float32) + 0.01 * words[..., None]) * high
        return ActionChunk(actions=actions.astype(np.float32), control_hz=10.0)


class Scripted:
    """The expert of each environment, lane by lane."""

    def __init__(self, env):
        self.env, self.embodiment = env, replace(env.envs[0].embodiment.spec, cameras=())

    def reset(self, lane, seed):
        pass

    def act(self, observations, lanes):
        return np.stack([self.env.envs[lane].expert_action() for lane in lanes])


def vector(make_env, count, task="reach", max_steps=None):
    envs = [make_env(task, images=False) for _ in range(count)]
    for env in envs:
        env.task.max_steps = max_steps or env.task.max_steps
    return ThreadVectorEnv([lambda env=env: env for env in envs])


def wander(make_env, count, seeds=SEEDS, **options):
    env = vector(make_env, count, max_steps=14)
    spec = replace(env.envs[0].embodiment.spec, cameras=())
    policy = RecedingHorizon(Wanderer(spec), execute_horizon=3)
    found = {r.seed: r for r in rollout(env, policy, seeds, **options)}
    env.close()
    return found


def test_a_result_depends_on_neither_the_number_of_environments_nor_the_order(make_env):
    expected = wander(make_env, 1)
    assert set(expected) == set(SEEDS)
    assert len({r.actions.tobytes() for r in expected.values()}) == len(SEEDS)
    for count, seeds in ((2, SEEDS), (3, SEEDS[::-1]), (8, SEEDS), (16, sorted(SEEDS))):
        found = wander(make_env, count, seeds)
        assert set(found) == set(SEEDS)
        for seed, one in found.items():
            other = expected[seed]
            np.testing.assert_array_equal(one.actions, other.actions)
            assert (one.instruction, one.success, one.steps) == (other.instruction, other.success, other.steps)


def test_success_and_steps_are_those_of_the_environment(make_env):
    env = vector(make_env, 3)
    single = make_env("reach", images=False)
    results = list(rollout(env, Scripted(env), range(8)))
    env.close()
    assert sorted(r.seed for r in results) == list(range(8))
    for result in results:
        single.reset(seed=result.seed)
        steps, ended = 0, False
        while not ended:
            *_, terminated, truncated, info = single.step(single.expert_action())
            steps, ended = steps + 1, terminated or truncated
        assert (result.steps, result.success) == (steps, info["success"])
        assert result.success
        assert result.actions.shape == (result.steps, 7)
        assert result.actions.dtype == np.float32
        assert result.seconds >= 0


def test_a_failure_is_no_success(make_env):
    assert not any(r.success for r in wander(make_env, 4).values() if r.steps == 14)
    env = vector(make_env, 2, max_steps=1)
    assert [(r.success, r.failure) for r in rollout(env, Scripted(env), [0, 1, 2])] == [(False, "out of time")] * 3
    env.close()


class Mistaken(Scripted):
    """Reaches for another thing than the one it was told to."""

    def act(self, observations, lanes):
        actions = []
        for lane in lanes:
            env = self.env.envs[lane]
            other = next(i.name for i in env.sim.scene.items if i.name != env.episode.roles["object"])
            target = env.sim.position(other) + np.array([0.0, 0.0, 0.035])
            actions.append(env.sim.driver.encode(target, DOWN, 1.0))
        return np.stack(actions)


def test_an_episode_that_ends_by_a_mistake_is_no_success(make_env):
    env = vector(make_env, 2)
    results = list(rollout(env, Mistaken(env), range(4)))
    assert all(result.steps < env.envs[0].task.max_steps for result in results)  # it was not cut off
    assert [(result.success, result.failure) for result in results] == [(False, "wrong object")] * 4
    env.close()


def test_reset_options_reach_every_episode(make_env):
    held_out = ("orange cube", "blue cylinder", "purple ball")
    for result in wander(make_env, 3, options={"split": "pair"}).values():
        assert any(name in result.instruction for name in held_out)
    with pytest.raises(ConfigError, match="unknown split"):
        wander(make_env, 3, options={"split": "pairs"})


def test_a_replay_is_the_episode(make_env):
    env = vector(make_env, 2, task="push", max_steps=20)
    results = list(rollout(env, Scripted(env), [3, 4, 5], options={"split": "paraphrase"}))
    env.close()
    result = next(r for r in results if r.seed == 4)
    made = []

    def factory():
        made.append(make_env("push", images=False, render_mode="rgb_array", render_size=64))
        return made[-1]

    frames, fps = replay(factory, 4, {"split": "paraphrase"}, result.actions)
    assert fps == 10.0
    assert len(frames) == result.steps + 1
    assert all(frame.shape == (64, 64, 3) for frame in frames)
    alone = make_env("push", images=False, render_size=64)
    observation, _ = alone.reset(seed=4, options={"split": "paraphrase"})
    assert observation["instruction"] == result.instruction
    np.testing.assert_array_equal(frames[0], alone.render())
    for frame, recorded in zip(frames[1:], result.actions):
        np.testing.assert_array_equal(alone.expert_action(), recorded)  # the expert would do it again: same states
        alone.step(recorded)
        np.testing.assert_array_equal(frame, alone.render())
    np.testing.assert_array_equal(made[0].sim.state, alone.sim.state)
    assert made[0].sim.time == alone.sim.time


@pytest.mark.parametrize("count", [2, 3, 9])
def test_gymnasiums_own_vector_environment_gives_the_same(make_env, count):
    """Fewer environments than episodes, and more: those without an episode have to be kept going."""
    envs = [make_env("reach", images=False) for _ in range(count)]
    for env in envs:
        env.task.max_steps = 14
    vector = SyncVectorEnv([lambda env=env: env for env in envs], autoreset_mode=AutoresetMode.DISABLED)
    spec = replace(envs[0].embodiment.spec, cameras=())
    expected = wander(make_env, 1)
    policy = RecedingHorizon(Wanderer(spec), execute_horizon=3)
    results = list(rollout(vector, policy, SEEDS))
    vector.close()
    assert sorted(r.seed for r in results) == sorted(SEEDS)
    for result in results:
        np.testing.assert_array_equal(result.actions, expected[result.seed].actions)
        assert (result.success, result.failure) == (expected[result.seed].success, expected[result.seed].failure)


def test_environments_that_reset_themselves_are_refused(make_env):
    env = SyncVectorEnv([lambda: make_env("reach", images=False)])
    spec = replace(env.envs[0].embodiment.spec, cameras=())
    with pytest.raises(ConfigError, match=r"AutoresetMode\.DISABLED"):
        next(rollout(env, RecedingHorizon(Wanderer(spec)), [0]))


def test_no_seeds_are_no_episodes(make_env):
    assert wander(make_env, 2, []) == {}


def test_observations_are_cut_out_of_the_batch(make_env):
    env = ThreadVectorEnv([lambda env=env: env for env in [make_env("push"), make_env("push")]])
    batch, _ = env.reset(seed=[1, 2])
    spec = env.envs[0].embodiment.spec
    for lane in range(2):
        observation = observation_of(batch, lane, spec)
        observation.check(spec)
        for name in spec.camera_names:
            np.testing.assert_array_equal(observation.images[name], batch[name][lane])
        assert observation.instruction == batch["instruction"][lane]
    env.close()
