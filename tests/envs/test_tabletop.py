"""The environments as Gymnasium sees them: contract, exact seeds, options, errors."""

import hashlib
import os
import subprocess
import sys
import warnings

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from brachium.envs.tabletop import CHARSET, MAX_INSTRUCTION
from brachium.errors import BrachiumError, ConfigError, SpecMismatchError

TASKS = ("reach", "push", "place", "stack", "open_drawer", "close_drawer")
EMBODIMENTS = ("arm6_ee", "arm7_ee", "arm6_joint", "arm7_joint")


def digest(observation):
    """A hash of every byte of an observation."""
    found = hashlib.sha256()
    for key in sorted(observation):
        value = observation[key]
        found.update(key.encode() + (value.encode() if isinstance(value, str) else np.ascontiguousarray(value).data))
    return found.hexdigest()


def play(env, seed, steps=4, **options):
    """Digests of an episode's observations under the expert."""
    observation, _ = env.reset(seed=seed, options=options)
    found = [digest(observation)]
    for _ in range(steps):
        observation, *_ = env.step(env.expert_action())
        found.append(digest(observation))
    return found


@pytest.mark.parametrize("embodiment", EMBODIMENTS)
@pytest.mark.parametrize("task", TASKS)
def test_gymnasium_finds_nothing_to_say(make_env, task, embodiment):
    env = make_env(task, embodiment, render_mode="rgb_array", render_size=32)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        check_env(env, skip_render_check=False)
    # Proprioception has no useful bounds; actions are in SI units; no environment here is in Gymnasium's registry.
    known = ("infinity", "symmetric and normalized", "not having a spec")
    said = [str(one.message) for one in said]
    assert not [text for text in said if not any(word in text for word in known)]


@pytest.mark.parametrize("task", TASKS)
def test_observations_are_what_the_spec_says(make_env, task):
    env = make_env(task, "arm6_ee")
    observation, info = env.reset(seed=1)
    spec = env.embodiment.spec
    assert set(observation) == {"state", "instruction", *spec.camera_names}
    for camera in spec.cameras:
        camera.check(observation[camera.name])
    spec.state.check(observation["state"])
    assert observation in env.observation_space
    assert info["split"] == "train"
    assert info["success"] is False
    assert 0 < len(observation["instruction"]) <= MAX_INSTRUCTION
    assert set(observation["instruction"]) <= set(CHARSET)
    assert env.render().shape == (256, 256, 3)


@pytest.mark.parametrize("task", TASKS)
def test_one_seed_is_one_episode_whatever_ran_before(make_env, task):
    env = make_env(task)
    first = play(env, 7)
    play(env, 8, steps=9)
    env.reset(seed=9, options={"split": "paraphrase"})
    assert play(env, 7) == first
    assert play(make_env(task), 7) == first
    assert play(env, 8) != first


def test_one_seed_is_one_episode_in_another_process(make_env):
    code = (
        "from hydra import compose, initialize_config_module\n"
        "from hydra.utils import instantiate\n"
        "import hashlib, numpy as np\n"
        "with initialize_config_module('brachium.conf', version_base='1.3'):\n"
        "    make = instantiate(compose('record', ['env=tabletop/place']).env)\n"
        "env = make(); observation, _ = env.reset(seed=7); found = []\n"
        "for _ in range(5):\n"
        "    h = hashlib.sha256()\n"
        "    for key in sorted(observation):\n"
        "        value = observation[key]\n"
        "        value = value.encode() if isinstance(value, str) else np.ascontiguousarray(value).data\n"
        "        h.update(key.encode() + value)\n"
        "    found.append(h.hexdigest())\n"
        "    observation, *_ = env.step(env.expert_action())\n"
        "print(' '.join(found))\n"
    )
    # the threads of linear algebra and the hash seed must not matter
    changed = {**os.environ, "PYTHONHASHSEED": "123", "OMP_NUM_THREADS": "3", "MKL_NUM_THREADS": "3"}
    done = subprocess.run([sys.executable, "-c", code], env=changed, capture_output=True, text=True, check=True)
    assert done.stdout.split() == play(make_env("place"), 7)


def test_images_may_be_left_out_and_change_nothing_else(make_env):
    with_images, without = make_env("push"), make_env("push", images=False)
    for step in range(6):
        if step == 0:
            (a, _), (b, _) = with_images.reset(seed=3), without.reset(seed=3)
        else:
            a, b = with_images.step(with_images.expert_action())[0], without.step(without.expert_action())[0]
        assert set(b) == {"state", "instruction"}
        assert b in without.observation_space
        np.testing.assert_array_equal(a["state"], b["state"])


def test_resets_without_a_seed_go_on_with_the_same_generator(make_env):
    def instructions(seed):
        env = make_env("push", images=False)
        env.reset(seed=seed)
        return [env.reset()[0]["instruction"] for _ in range(6)]

    assert instructions(5) == instructions(5)
    assert len(set(instructions(5))) > 1


@pytest.mark.parametrize("task", TASKS)
def test_an_episode_ends_by_success_or_is_cut_off_never_both(make_env, task):
    env = make_env(task, images=False)
    env.reset(seed=0)
    for _ in range(env.task.max_steps):
        _, reward, terminated, truncated, info = env.step(env.expert_action())
        assert reward == float(info["success"])
        assert not (terminated and truncated)
        if terminated or truncated:
            break
    assert info["success"]
    assert terminated

    env.reset(seed=0)
    idle = env.sim.driver.encode(env.sim.driver.position, env.sim.driver.quat, 1.0)
    for step in range(1, env.task.max_steps + 1):
        _, reward, terminated, truncated, info = env.step(idle)
        assert (reward, terminated, info["success"]) == (0.0, False, False)
        assert truncated == (step == env.task.max_steps)


def test_an_unknown_split_is_named_with_the_splits(make_env):
    with pytest.raises(ConfigError, match="Did you mean 'paraphrase'"):
        make_env("reach", images=False, split="parafrase")
    env = make_env("reach", images=False)
    for split in ("test", None, 3):
        with pytest.raises(ConfigError, match=r"unknown split .* Choices: pair, paraphrase, train"):
            env.reset(seed=0, options={"split": split})


def test_a_reset_option_with_a_typing_error_is_refused(make_env):
    env = make_env("reach", images=False)
    with pytest.raises(ConfigError, match=r"unknown reset option 'splt'\. Did you mean 'split'"):
        env.reset(seed=0, options={"splt": "pair"})


def test_acting_before_a_reset_is_refused(make_env):
    env = make_env("reach", images=False)
    with pytest.raises(ConfigError, match=r"step\(\) before reset\(\)"):
        env.step(np.zeros(7, np.float32))
    with pytest.raises(ConfigError, match=r"expert_action\(\) before reset\(\)"):
        env.expert_action()


@pytest.mark.parametrize("action", [np.full(7, np.nan), np.zeros(6), np.zeros((1, 7)), np.zeros(0)])
def test_a_bad_action_is_refused_and_the_episode_goes_on_as_if_it_never_came(make_env, action):
    env, other = make_env("reach", images=False), make_env("reach", images=False)
    env.reset(seed=2)
    other.reset(seed=2)
    with pytest.raises(SpecMismatchError):
        env.step(action)
    np.testing.assert_array_equal(
        env.step(env.expert_action())[0]["state"], other.step(other.expert_action())[0]["state"]
    )
    assert issubclass(SpecMismatchError, BrachiumError)


def test_the_sign_of_success_is_in_the_last_info_only(make_env):
    """After success the environment may be stepped on (demonstrations do), and the drawer stays open."""
    env = make_env("open_drawer", images=False)
    env.reset(seed=4)
    for _ in range(env.task.max_steps):
        *_, terminated, _, info = env.step(env.expert_action())
        if terminated:
            break
    assert info["success"]
    *_, info = env.step(env.expert_action())
    assert info["success"]
