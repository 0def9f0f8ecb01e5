"""Suites of others behind our spec: seeds, cameras, success, experts, and what a user sees who asks for what is not."""

import importlib.util
from functools import partial

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from brachium.envs.demonstrations import Disturbances, ExpertDemonstrations
from brachium.envs.external import base
from brachium.envs.external.aloha import AlohaEnv
from brachium.envs.external.any_gymnasium import GymnasiumEnv
from brachium.envs.external.fetch import FetchEnv
from brachium.envs.external.libero import LiberoEnv
from brachium.envs.external.metaworld import MetaWorldEnv, descriptions, difficulty_groups, suite, task_names
from brachium.envs.external.pusht import PushTEnv
from brachium.envs.processes import ProcessVectorEnv
from brachium.envs.record import RecordingOptions
from brachium.envs.vector import ThreadVectorEnv
from brachium.errors import ConfigError, NotFoundError

for package in ("metaworld", "gym_aloha", "gym_pusht", "gymnasium_robotics", "libero"):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed (pip install 'brachium[suites]')", allow_module_level=True)

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # of the suites
]
EYES = {"corner2": 32, "gripperPOV": 32}
MAKES = {
    "metaworld reach": partial(MetaWorldEnv, task="reach", cameras=EYES),
    "metaworld door-open": partial(MetaWorldEnv, task="door-open", cameras=EYES, zoom={"corner2": 2.0}),
    "metaworld peg": partial(MetaWorldEnv, task="peg-insert-side-v3", cameras=EYES),
    "fetch reach": partial(FetchEnv, task="reach", cameras={"front": 32}),
    "fetch push": partial(FetchEnv, task="push", cameras={"side": 32}, observe="all"),
    "fetch pick": partial(FetchEnv, task="pick_and_place", cameras={"front": 32, "side": 32}),
    "aloha cube": partial(AlohaEnv, task="transfer_cube", cameras={"top": [24, 32]}),
    "aloha peg": partial(AlohaEnv, task="insertion", cameras={"top": 32, "angle": 32}),
    "pusht": partial(PushTEnv, cameras={"image": 32}),
    "gymnasium pendulum": partial(
        GymnasiumEnv,
        id="Pendulum-v1",
        instruction="Swing it up",
        control_hz=20.0,
        max_steps=200,
        cameras={"render": 32},
        success="",
        reward_above=-0.01,
    ),
    "gymnasium fetch": partial(
        GymnasiumEnv,
        id="FetchReach-v4",
        instruction="Reach",
        control_hz=25.0,
        max_steps=50,
        cameras={"render": 32},
        state=["observation", "desired_goal"],
        imports=["gymnasium_robotics"],
    ),
}


@pytest.fixture(scope="module")
def libero_assets(tmp_path_factory):
    from libero_assets import make_assets

    return str(make_assets(tmp_path_factory.mktemp("libero")))


@pytest.fixture(scope="module")
def makes(libero_assets):
    more = {
        f"libero {k}": partial(
            LiberoEnv, suite="libero_object", task=k, cameras={"agentview": 32}, assets=libero_assets
        )
        for k in (0, 4, 9)
    }
    return MAKES | more


NAMES = (*MAKES, "libero 0", "libero 4", "libero 9")


def actions_of(env, count, seed=5):
    box = env.action_space
    low, high = np.maximum(box.low, -1e3), np.minimum(box.high, 1e3)
    middle, half = (low + high) / 2, (high - low) / 8  # small enough not to drive hands through tables
    return (middle + np.random.default_rng(seed).uniform(-1, 1, (count, len(low))) * half).astype(np.float32)


def episode(env, seed, actions):
    observation, _ = env.reset(seed=seed)
    found = [observation]
    for action in actions:
        observation, reward, terminated, truncated, info = env.step(action)
        found.append({**observation, "reward": np.float64(reward), "over": terminated or truncated, **info})
    return found


def assert_same(one, other):
    for mine, theirs in zip(one, other, strict=True):
        for key in mine:
            np.testing.assert_array_equal(mine[key], theirs[key], err_msg=key)


@pytest.mark.parametrize("name", NAMES)
def test_every_adapter_keeps_gymnasiums_rules_and_gives_an_episode_a_seed(makes, name):
    env = makes[name]()
    try:
        if name in ("libero 4", "libero 9"):  # seconds a reset: it builds its model anew
            first = episode(env, 7, actions_of(env, 6))
            assert first[-1]["agentview"].std() > 1.0
            return
        check_env(env, skip_render_check=True)
        actions = actions_of(env, 6)
        first = episode(env, 7, actions)
        other = episode(env, 8, actions)
        if name != "libero 0":  # seconds a reset; the next test asks it the same
            assert_same(first, episode(env, 7, actions))  # whatever was run before
        spec = env.spec_embodiment
        for camera in spec.cameras:
            assert first[0][camera.name].shape == camera.shape
            assert first[0][camera.name].std() > 1.0, "an empty picture"
        if not name.startswith("pusht"):
            assert np.isfinite(first[-1]["state"]).all()
        states = not np.array_equal(first[0]["state"], other[0]["state"])
        seen = any(not np.array_equal(first[0][c.name], other[0][c.name]) for c in spec.cameras)
        assert states or seen, "two seeds give one episode"
        assert env.render().dtype == np.uint8
        assert max(env.render().shape) == 256
    finally:
        env.close()


@pytest.mark.parametrize(
    ("name", "count"), [("metaworld reach", 8), ("fetch pick", 8), ("aloha cube", 8), ("pusht", 8), ("libero 0", 3)]
)
def test_an_episode_is_the_same_alone_and_among_many(makes, name, count):
    single = makes[name]()
    actions = actions_of(single, 3)
    many = ThreadVectorEnv([makes[name]] * count)
    try:
        batch, _ = many.reset(seed=[20 + k for k in range(count)])
        seen = [batch]
        for action in actions:
            batch, reward, *_ = many.step(np.stack([action] * count))
            seen.append({**batch, "reward": reward})
        for lane in {0, count // 2, count - 1}:
            for mine, theirs in zip(episode(single, 20 + lane, actions), seen):
                for key in theirs:
                    np.testing.assert_array_equal(mine[key], theirs[key][lane], err_msg=key)
    finally:
        many.close()
        single.close()


@pytest.mark.slow
def test_processes_give_what_one_environment_gives(makes):
    make = makes["metaworld door-open"]
    single = make()
    actions = actions_of(single, 4)
    many = ProcessVectorEnv([make] * 8, processes=2)
    try:
        batch, _ = many.reset(seed=[20 + k for k in range(8)])
        assert batch["instruction"] == ("Open a door with a revolving joint",) * 8
        seen = [batch]
        for action in actions:
            batch, reward, *_ = many.step(np.stack([action] * 8))
            seen.append({**batch, "reward": reward})
        for lane in (0, 5):
            for mine, theirs in zip(episode(single, 20 + lane, actions), seen):
                for key in theirs:
                    np.testing.assert_array_equal(mine[key], theirs[key][lane], err_msg=key)
        again, _ = many.reset(seed=[99] * 8, options={"reset_mask": np.arange(8) == 2})
        for key in ("state", "corner2"):
            np.testing.assert_array_equal(again[key][3], seen[-1][key][3])  # those that are not reset stay
            np.testing.assert_array_equal(again[key][2], single.reset(seed=99)[0][key])
    finally:
        many.close()


def demonstrate(env, seeds, noise=0.0, steps=None):
    wins = 0
    for seed in seeds:
        disturbed = Disturbances(env.disturbable, np.random.default_rng(seed), noise, 1.0, 0.0, 0.0)
        env.reset(seed=seed)
        for t in range(steps or env.task.max_steps):
            _, _, terminated, truncated, info = env.step(disturbed.executed(t, env.expert_action()))
            if terminated or truncated:
                break
        wins += info["success"]
    return wins


@pytest.mark.parametrize(
    ("make", "noise"),
    [
        (partial(MetaWorldEnv, task="drawer-open", cameras=EYES, images=False), 0.4),
        (partial(MetaWorldEnv, task="pick-place", cameras=EYES, images=False), 0.0),
        (partial(FetchEnv, task="reach", cameras={"front": 32}, images=False), 0.4),
        (partial(FetchEnv, task="pick_and_place", cameras={"front": 32}, images=False), 0.2),
        (partial(AlohaEnv, task="transfer_cube", cameras={"top": 32}, images=False), 0.3),
    ],
)
def test_experts_succeed_also_when_disturbed(make, noise):
    env = make()
    assert demonstrate(env, range(4), noise) == 4


def test_an_experts_episode_is_recorded_with_clean_labels():
    env = FetchEnv(task="pick_and_place", cameras={"front": 32})
    (first,) = ExpertDemonstrations(env, noise=0.4, noisy=1.0, drop=0.0, stumble=0.0).record(3)
    (again,) = ExpertDemonstrations(env, noise=0.4, noisy=1.0, drop=0.0, stumble=0.0).record(3)
    assert first.success
    assert first.instruction == "Pick up the cube and bring it to the red goal"
    assert len(first.steps) == 50  # success is judged at the end: the policy should stay there
    for one, other in zip(first.steps, again.steps, strict=True):
        np.testing.assert_array_equal(one.action, other.action)
        np.testing.assert_array_equal(one.images["front"], other.images["front"])
    labels = np.stack([step.action for step in first.steps])
    assert np.abs(labels).max() <= 1.0


def test_alohas_expert_holds_its_forearms_one_way_up():
    """With half a turn more of forearm and wrist, hands point as before: demonstrations of both teach neither."""
    env = AlohaEnv(task="transfer_cube", cameras={"top": 32})
    asked = []
    for seed in range(3):
        (found,) = ExpertDemonstrations(env, noise=0.4, noisy=1.0, drop=0.0, stumble=0.0).record(seed)
        asked += [step.action for step in found.steps]
    turned = np.abs(np.stack(asked))[:, [3, 10]]  # the forearms' rolls
    assert turned.max() < 1.0, turned.max(0)


def test_success_at_the_end_is_not_success_on_the_way():
    env = FetchEnv(task="reach", cameras={"front": 32}, images=False)
    env.reset(seed=2)
    reached = []
    for t in range(50):
        action = env.expert_action() if t < 25 else np.array([1.0, 0.0, 1.0, 0.0], np.float32)
        _, reward, terminated, truncated, info = env.step(action)
        reached.append(reward == 0.0)
        assert not terminated
    assert any(reached)  # it was there
    assert truncated
    assert not info["success"]
    assert info["failure"] == "out of time"


def test_meta_worlds_sets_of_tasks():
    assert len(task_names("mt10")) == 10
    assert len(task_names("mt50")) == len(set(task_names("mt50"))) == 50
    assert len(task_names("ml10_test")) == 5
    assert set(task_names("ml45_train")).isdisjoint(task_names("ml45_test"))
    assert task_names("reach, push-v3") == ("reach", "push")
    assert {f"{name}-v3" for name in task_names("mt50")} <= set(descriptions())
    made = suite(tasks="window-open", cameras={"corner": 24}, images=False)["window-open"]()
    assert made.reset(seed=0)[0]["instruction"] == "Push and open a window"


def test_another_instruction_is_of_another_task():
    env = MetaWorldEnv(task="reach", cameras=EYES, images=False)
    told = env.reset(seed=1)[0]["instruction"]
    shuffled = env.reset(seed=1, options={"misname": True})[0]["instruction"]
    assert shuffled != told
    assert shuffled in descriptions().values()
    with pytest.raises(ConfigError, match="one instruction only"):
        AlohaEnv(task="insertion", cameras={"top": 16}, images=False).reset(seed=0, options={"misname": True})


def test_a_demonstration_that_is_judged_at_the_last_step_ends_when_it_has_settled():
    env = FetchEnv(task="reach", cameras={"front": 32})
    long, short = (ExpertDemonstrations(env, noise=0.0, settle=n).record(3)[0] for n in (0, 4))
    assert long.success
    assert len(long.steps) == env.task.max_steps
    assert short.success
    assert len(short.steps) < 30
    assert_same([{"a": s.action} for s in short.steps], [{"a": s.action} for s in long.steps[: len(short.steps)]])
    env.reset(seed=3)
    held = [env.step(step.action)[-1]["holds"] for step in short.steps[:-1]]
    assert held[-4:] == [True] * 4
    assert not all(held[-5:])
    with pytest.raises(ConfigError, match="settle from 0, got -1"):
        RecordingOptions(settle=-1)


def test_a_camera_moves_along_with_the_hand():
    env = FetchEnv(task="pick_and_place", cameras={"front": 64, "hand_front": 64})
    before, _ = env.reset(seed=1)
    for _ in range(6):
        after, *_ = env.step(np.array([0.0, 1.0, 0.0, 0.0], np.float32))
    assert after["state"][1] - before["state"][1] > 0.1
    # Rows of the hand alone: it stands still where the camera goes along, and leaves its place where the camera stands.
    moved = {
        c: np.abs(after[c][:30, 28:36].astype(int) - before[c][:30, 28:36]).mean() for c in ("front", "hand_front")
    }
    assert moved["hand_front"] < 0.5 * moved["front"], moved


def test_a_zoom_shows_the_middle_and_stands_in_the_spec():
    wide = MetaWorldEnv(task="push", cameras={"corner2": 128})
    near = MetaWorldEnv(task="push", cameras={"corner2": 64}, zoom={"corner2": 2.0})
    assert near.spec_embodiment.differences(wide.spec_embodiment)
    whole, part = (env.reset(seed=4)[0]["corner2"].astype(float) for env in (wide, near))
    middle = whole[32:96, 32:96]
    assert np.abs(middle - part).mean() < 4.0
    assert np.abs(middle[::-1] - part).mean() > 12.0


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (partial(MetaWorldEnv, task="pick-plac", cameras=EYES), "Did you mean 'pick-place'"),
        (partial(MetaWorldEnv, task="reach", cameras={"corner9": 32}), "no camera 'corner9'. Did you mean 'corner"),
        (partial(MetaWorldEnv, task="reach", cameras={"corner2": 3}), "from 8 to 2048 px"),
        (partial(MetaWorldEnv, task="reach", cameras={}), "at least one of"),
        (partial(MetaWorldEnv, task="reach", cameras=EYES, zoom={"corner": 2.0}), "among the cameras"),
        (partial(MetaWorldEnv, task="reach", cameras=EYES, zoom={"corner2": 0.0}), "0.1 to 10"),
        (partial(task_names, "mt11"), "Did you mean 'mt10'"),
        (partial(FetchEnv, task="pick", cameras={"front": 32}), "Choices: pick_and_place"),
        (partial(FetchEnv, task="push", cameras={"front": 32}, observe="al"), "Did you mean 'all'"),
        (partial(AlohaEnv, task="transfer", cameras={"top": 32}), "Did you mean 'transfer_cube'"),
        (partial(LiberoEnv, suite="libero_objects", task=0, cameras={"agentview": 32}), "Did you mean 'libero_object'"),
        (partial(MAKES["gymnasium pendulum"], id="Pendulun-v1"), "Pendulum"),
        (partial(MAKES["gymnasium pendulum"], id="CartPole-v1"), "expected continuous actions"),
        (partial(MAKES["gymnasium pendulum"], options={"depth": 3}), "depth"),
        (partial(MAKES["gymnasium pendulum"], imports=["no_such_module"]), "no module 'no_such_module'"),
        (partial(MAKES["gymnasium pendulum"], state=["observatio"]), "Did you mean 'observation'"),
    ],
)
def test_what_is_not_there_is_one_clear_line(make, words):
    with pytest.raises(ConfigError, match=words.replace("(", r"\(")):
        make()


def test_fifty_tasks_fall_into_four_groups_and_two_share_their_words():
    groups = difficulty_groups()
    assert [len(tasks) for tasks in groups.values()] == [28, 11, 6, 5]
    assert sorted(task for tasks in groups.values() for task in tasks) == sorted(task_names("mt50"))
    told = {task: descriptions()[f"{task}-v3"] for task in task_names("mt50")}
    alike = {task for task in told if list(told.values()).count(told[task]) > 1}
    assert alike == {"push", "push-back"}  # as the protocol says


def test_liberos_tasks_and_files_are_asked_for(libero_assets, tmp_path, monkeypatch):
    make = partial(LiberoEnv, suite="libero_object", cameras={"agentview": 32})
    with pytest.raises(ConfigError, match="a task from 0 to 9, got 10"):
        make(task=10, assets=libero_assets)
    with pytest.raises(ConfigError, match="Did you mean 'pick_up_the_milk"):
        make(task="pick_up_the_milk", assets=libero_assets)
    monkeypatch.delenv("LIBERO_ASSETS", raising=False)
    with pytest.raises(NotFoundError, match=r"not in the wheel.*env.assets=FOLDER"):
        make(task=0, assets=str(tmp_path))


def test_a_goal_of_libero_is_judged_by_libero(libero_assets):
    """The soup in the basket is success; above the floor it is none."""
    env = LiberoEnv(suite="libero_object", task=0, cameras={"agentview": 32}, assets=libero_assets, images=False)
    env.reset(seed=0)
    sim = env.env.sim
    assert not env.step(np.zeros(7, np.float32))[-1]["success"]
    place = sim.data.body_xpos[sim.model.body_name2id("basket_1_main")].copy()
    qpos = sim.data.get_joint_qpos("alphabet_soup_1_joint0").copy()
    above = [place[0], place[1], place[2] + 0.02]
    sim.data.set_joint_qpos("alphabet_soup_1_joint0", np.array([*above, *qpos[3:]]))
    sim.forward()
    _, _, terminated, _, info = env.step(np.zeros(7, np.float32))
    assert info["success"]
    assert terminated
    env.close()


def test_a_suite_that_is_not_installed_names_the_extra(monkeypatch):
    monkeypatch.setattr(base.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"metaworld is not installed.*brachium\[suites\]"):
        MetaWorldEnv(task="reach", cameras=EYES)


def test_a_mujoco_that_the_suites_refuse_is_named(monkeypatch):
    monkeypatch.setattr(base, "version", lambda name: "4.0.0")
    with pytest.raises(ConfigError, match=r"does not run with MuJoCo 4.0.0: expected 3.8"):
        FetchEnv(task="reach", cameras={"front": 32})


def test_an_environment_that_ends_by_itself_is_over_where_it_ends():
    """Hopper ends when it falls: success is judged there, and nothing goes on after it."""
    told = {"instruction": "Hop", "control_hz": 125.0, "max_steps": 500, "cameras": {"render": 16}}
    make = partial(GymnasiumEnv, id="Hopper-v5", **told)
    env = make(success="", reward_above=-1e9, judged="last", images=False)
    env.reset(seed=0)
    for _ in range(400):
        _, _, terminated, truncated, info = env.step(np.ones(3, np.float32))
        if terminated or truncated:
            break
        assert not info["success"]
    assert terminated
    assert info["success"]
    lost = make(success="", reward_above=1e9, images=False)
    lost.reset(seed=0)
    while not terminated or info["success"]:
        _, _, terminated, _, info = lost.step(np.ones(3, np.float32))
    assert info["failure"] == "ended by the environment"


def test_what_was_executed_is_within_the_limits():
    source = ExpertDemonstrations(FetchEnv(task="reach", cameras={"front": 16}), noise=2.0, noisy=1.0, stumble=1.0)
    (episode_,) = source.record(1)
    executed = np.stack([step.extras["executed"] for step in episode_.steps])
    assert np.abs(executed).max() == 1.0
    labels = np.stack([step.action for step in episode_.steps])
    assert np.abs(executed - labels)[:, :3].mean() > 0.3


def test_what_a_policy_must_not_do_is_refused():
    env = PushTEnv(cameras={"image": 32})
    with pytest.raises(ConfigError, match="before reset"):
        env.step(np.zeros(2, np.float32))
    env.reset(seed=0)
    with pytest.raises(ConfigError, match="finite action"):
        env.step(np.array([np.nan, 0.0], np.float32))
    with pytest.raises(ConfigError, match="no kind of instruction 'pair'"):
        env.reset(seed=0, options={"split": "pair"})
    with pytest.raises(ConfigError, match="no scripted expert"):
        env.expert_action()


@pytest.mark.parametrize(("how", "words"), [("dies", "exit code 3"), ("raises", "by nothing"), ("config", "another")])
def test_a_process_that_fails_says_why(how, words):
    from external_helpers import explodes

    env = ProcessVectorEnv([partial(explodes, how)], processes=1)
    env.reset(seed=[0])
    with pytest.raises(Exception, match=words):
        env.step(np.zeros((1, 1), np.float32))
    env.close()
    env.close()  # twice does no harm
