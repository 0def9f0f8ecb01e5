"""Threads change nothing: every environment of a vector is the environment it would be alone."""

import numpy as np
import pytest
from gymnasium.vector import AutoresetMode

from brachium.envs.vector import ThreadVectorEnv
from brachium.errors import ConfigError

KEYS = ("state", "front", "wrist")


def vector(make_env, count, images=True, **options):
    return join([make_env("place", "arm6_ee", images=images) for _ in range(count)], **options)


def join(envs, **options):
    """A vector of environments that are there already."""
    return ThreadVectorEnv([lambda env=env: env for env in envs], **options)


def actions_for(seed, steps, spec):
    rng = np.random.default_rng([seed, 9])
    return rng.uniform(spec.low, spec.high, (steps, spec.dim)).astype(np.float32)


@pytest.mark.parametrize("count", [1, 3, 8])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_vector_is_its_environments_bit_for_bit(make_env, count, threads):
    steps, seeds = 5, [40 + k for k in range(count)]
    env = vector(make_env, count, threads=threads)
    single = make_env("place", "arm6_ee")
    spec = single.embodiment.spec.action
    scripts = [actions_for(seed, steps, spec) for seed in seeds]
    observation, _ = env.reset(seed=seeds)
    seen = [observation]
    for t in range(steps):
        observation, rewards, terminated, truncated, info = env.step(np.stack([s[t] for s in scripts]))
        assert rewards.shape == terminated.shape == truncated.shape == info["success"].shape == (count,)
        seen.append(observation)
    env.close()
    for k, seed in enumerate(seeds):
        alone, _ = single.reset(seed=seed)
        for t in range(steps + 1):
            assert seen[t]["instruction"][k] == alone["instruction"]
            for key in KEYS:
                np.testing.assert_array_equal(seen[t][key][k], alone[key])  # and what was returned is not overwritten
            if t < steps:
                alone, *_ = single.step(scripts[k][t])


def test_only_masked_environments_are_reset(make_env):
    env = vector(make_env, 3, images=False)
    first, _ = env.reset(seed=[1, 2, 3])
    second, _ = env.reset(seed=[7, 8, 9], options={"reset_mask": np.array([False, True, False])})
    for k, same in enumerate((True, False, True)):
        assert np.array_equal(first["state"][k], second["state"][k]) == same
    alone, _ = make_env("place", images=False).reset(seed=8)
    np.testing.assert_array_equal(second["state"][1], alone["state"])
    assert second["instruction"][1] == alone["instruction"]
    env.close()


def test_an_ended_episode_stays_as_it_is_until_it_is_reset(make_env):
    env = vector(make_env, 2, images=False)
    assert env.metadata["autoreset_mode"] is AutoresetMode.DISABLED
    env.reset(seed=[0, 1])
    env.envs[0].task.max_steps, env.envs[1].task.max_steps = 2, 5
    idle = np.zeros((2, 7), np.float32)
    idle[:, 2] = 0.01
    for t in range(1, 5):
        observation, _, terminated, truncated, _ = env.step(idle)
        assert truncated.tolist() == [t == 2, False]
        assert not terminated.any()
        if t == 2:
            ended = observation["state"][0].copy()
    np.testing.assert_array_equal(observation["state"][0], ended)
    env.close()


def test_an_integer_seeds_them_one_after_the_other(make_env):
    env = vector(make_env, 3, images=False)
    one, _ = env.reset(seed=np.int64(20))
    other, _ = env.reset(seed=[20, 21, 22])
    np.testing.assert_array_equal(one["state"], other["state"])
    env.close()


def test_options_reach_every_environment(make_env):
    env = vector(make_env, 2, images=False)
    observation, _ = env.reset(seed=[0, 1], options={"split": "pair"})
    assert all(any(n in text for n in ("orange cube", "blue cylinder")) for text in observation["instruction"])
    with pytest.raises(ConfigError, match="unknown split 'pears'"):
        env.reset(seed=[0, 1], options={"split": "pears"})
    env.close()


def test_mistakes_are_clear_errors(make_env):
    with pytest.raises(ConfigError, match="at least one environment"):
        ThreadVectorEnv([])
    with pytest.raises(ConfigError, match="equal spaces"):
        join([make_env("place", images=False), make_env("place", "arm7_ee", images=False)])
    env = vector(make_env, 2, images=False)
    with pytest.raises(ConfigError, match=r"step\(\) before reset\(\)"):
        env.step(np.zeros((2, 7), np.float32))
    with pytest.raises(ConfigError, match="expected 2 seeds"):
        env.reset(seed=[1, 2, 3])
    with pytest.raises(ConfigError, match="reset_mask of shape"):
        env.reset(seed=[1, 2], options={"reset_mask": np.array([True])})
    env.reset(seed=0)
    with pytest.raises(ConfigError, match="one action for each of 2 environments, got 3"):
        env.step(np.zeros((3, 7), np.float32))
    env.close()
    env.close()  # twice is no harm


def test_an_error_in_one_environment_reaches_the_caller(make_env):
    env = vector(make_env, 2, images=False)
    env.reset(seed=0)
    bad = np.zeros((2, 7), np.float32)
    bad[1] = np.nan
    with pytest.raises(ValueError, match="finite action"):
        env.step(bad)
    env.reset(seed=0)
    env.step(np.zeros((2, 7), np.float32))
    env.close()
