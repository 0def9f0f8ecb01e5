"""Long-horizon work with physics: experts do what skills promise, and facts are what geometry says."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from brachium.envs.longhorizon.families import told
from brachium.envs.longhorizon.layout import Layout
from brachium.envs.longhorizon.measure import CLOSED_AT, OPEN_AT, drawer_open, measured, places
from brachium.envs.longhorizon.physical import PhysicalTable
from brachium.envs.longhorizon.skills import SkillTask
from brachium.envs.scenes import SceneSampler
from brachium.envs.tabletop import TabletopEnv
from brachium.errors import ConfigError
from brachium.policies.planners.search import OfLength, search
from brachium.symbols import Literal

SKILLS = ("put_down", "place_in", "place_on", "stack", "store", "open", "close")


@pytest.fixture(scope="module")
def arm6_ee(make_arm):
    return make_arm("arm6_ee")


@pytest.fixture(scope="module")
def table(arm6_ee):
    return PhysicalTable(embodiment=arm6_ee, images=False)


def put(sim, name, position):
    joint = sim.data.joint(name)
    joint.qpos[:3], joint.qvel[:] = position, 0.0
    sim.settle()


@pytest.mark.parametrize("skill", SKILLS)
def test_experts_do_the_skills(arm6_ee, skill):
    env, done = TabletopEnv(task=SkillTask(skill=skill), embodiment=arm6_ee, images=False), 0
    for seed in range(5):
        env.reset(seed=seed)
        over = False
        while not over:
            _, _, terminated, truncated, info = env.step(env.expert_action())
            over = terminated or truncated
        done += info["success"]
    assert done >= 4


@pytest.mark.parametrize(
    ("skill", "family", "most"), [("place_in", "leave", 4), ("stack", "stack", 2), ("store", "store_two", 2)]
)
def test_tables_of_skills_are_as_half_done_work_leaves_them(table, skill, family, most):
    """On the way to what is asked bowls fill and towers grow; where things stand is drawn anew each time."""
    task, sim, found, turns = SkillTask(skill=skill, families=(family,), way=1.0), table.sim, set(), set()
    for seed in range(25):
        episode = task.sample(np.random.default_rng(seed), "train")
        sim.load(episode.scene, np.array(episode.tool_start))
        items = {item.name: item for item in episode.scene.items}
        lifted = [i for i in items.values() if i.kind in ("cube", "cylinder") and i.lift > 0.004]
        found.add(1 + len(lifted))
        depth = [
            -c.dist
            for c in sim.data.contact
            if {sim.model.body(sim.model.geom_bodyid[g]).name for g in c.geom} & set(items)
        ]
        assert max(depth, default=0.0) < 0.008, "things are in one another"
        if skill == "place_in" and lifted:
            bowl = items[episode.roles["goal"]]
            turns.add(round(float(np.arctan2(lifted[0].y - bowl.y, lifted[0].x - bowl.x)), 1))
    assert found >= set(range(1, most + 1))
    assert skill != "place_in" or len(turns) > 5


def test_success_of_a_skill_is_what_its_literals_say(arm6_ee):
    """Where the expert ends, the library's own success literals hold among the measured facts."""
    for skill in ("place_in", "stack", "close"):
        task = SkillTask(skill=skill)
        env = TabletopEnv(task=task, embodiment=arm6_ee, images=False)
        env.reset(seed=1)
        call = task.call(env.episode)
        assert not SkillTask.done(env.sim, call)
        for _ in range(task.max_steps):
            _, _, terminated, _, info = env.step(env.expert_action())
            if terminated:
                break
        facts = measured(env.sim, was_open=True)
        assert info["success"]
        assert all((Literal(s.pred, s.args) in facts) == s.value for s in call.success)


def test_impossible_skills_are_drawn_on_request_and_experts_fail_at_them(arm6_ee):
    task = SkillTask(skill="store", possible=0.0)
    for seed in range(10):
        episode = task.sample(np.random.default_rng(seed), "train")
        assert episode.drawer_start == 0.0 or any(i.lift > 0.03 for i in episode.scene.items)


def test_facts_are_what_geometry_says(table):
    table.begin(told("nothing", ["red cube", "blue cube", "green cylinder", "blue bowl", "red zone", "drawer"]), 3)
    sim, item = table.sim, table.layout.item
    assert places(sim) == dict.fromkeys(("red cube", "blue cube", "green cylinder"), "table")
    bowl, zone = item("blue bowl"), item("red zone")
    put(sim, "green cylinder", [bowl.x, bowl.y, 0.03])
    put(sim, "blue cube", [zone.x + 0.01, zone.y, 0.0205])
    assert places(sim) == {"red cube": "table", "blue cube": "red zone", "green cylinder": "blue bowl"}
    put(sim, "red cube", [zone.x + 0.012, zone.y, 0.0605])
    assert places(sim)["red cube"] == "blue cube"
    put(sim, "red cube", [zone.x + 0.012, zone.y, 0.08])  # in the air above it
    assert "red cube" not in places(sim)
    put(sim, "red cube", [zone.x, zone.y - 0.1, 0.0205])
    assert places(sim)["red cube"] == "table"
    facts = measured(sim, was_open=False)
    assert {Literal("in", ("green cylinder", "blue bowl")), Literal("inside", ("green cylinder",))} <= facts
    assert Literal("clear", ("red zone",)) not in facts


def test_a_drawer_half_way_is_what_it_was(table):
    table.begin(told("nothing", ["red cube", "drawer"]), 0)
    joint = table.sim.data.joint("drawer")
    joint.qpos[0] = 0.5 * (CLOSED_AT + OPEN_AT)
    table.sim.settle()
    assert drawer_open(table.sim, True)
    assert not drawer_open(table.sim, False)
    joint.qpos[0] = OPEN_AT + 0.01
    assert drawer_open(table.sim, False)
    joint.qpos[0] = CLOSED_AT - 0.01
    assert not drawer_open(table.sim, True)


def test_what_is_in_the_drawer_goes_in_with_it(table):
    table.begin(told("nothing", ["red cube", "drawer"], drawer_open=True), 0)
    spot = table.layout.position("red cube", {"red cube": "drawer"}, 0.1)
    put(table.sim, "red cube", spot)
    still = table.expert_action(table.library.call("open", "drawer"))  # it is open: straight up
    for _ in range(8):
        table.step(still)
    assert places(table.sim)["red cube"] == "drawer"
    close = table.library.call("close", "drawer")
    for _ in range(40):
        table.step(table.expert_action(close))
    assert Literal("hidden", ("red cube",)) in table.facts


def test_the_same_seed_gives_the_same_episode_whatever_was_run_before(arm6_ee):
    first, second = (PhysicalTable(embodiment=arm6_ee, images=False, disturbance=1.0) for _ in range(2))
    second.reset(seed=7)
    for env in (first, second):
        env.reset(seed=4)
        assert env.errand.scene.facts == env.facts
    action = np.zeros(7, np.float32)
    for _ in range(150):
        a, b = first.step(action), second.step(action)
    assert np.array_equal(a[0]["state"], b[0]["state"])
    assert first.facts == second.facts
    assert np.array_equal(first.sim.data.qpos, second.sim.data.qpos)


def test_somebody_interferes_once(arm6_ee):
    env = PhysicalTable(embodiment=arm6_ee, images=False, disturbance=1.0, families=("store",), max_steps=120)
    env.reset(seed=0)
    before = env.facts
    for _ in range(60):
        env.step(np.zeros(7, np.float32))
    assert env.disturbed
    assert env.facts != before


def test_only_work_of_so_many_skills_is_drawn(arm6_ee):
    only = OfLength(least=3, most=3)
    env = PhysicalTable(embodiment=arm6_ee, images=False, only=only)
    for seed in range(6):
        env.reset(seed=seed)
        assert len(search(env.library, env.scene, env.errand.goals).calls) == 3
    with pytest.raises(ConfigError, match="none of 200"):
        PhysicalTable(embodiment=arm6_ee, images=False, only=OfLength(least=30)).reset(seed=0)


def work(table, family, seed):
    """Whether experts bring a piece of work to its goal, and how many things are in its fullest bowl then."""
    table.families = (family,)
    table.reset(seed=seed)
    for _ in range(8):
        plan = search(table.library, table.scene, table.errand.goals).calls
        if not plan:
            break
        for _ in range(50):
            _, _, over, _, info = table.step(table.expert_action(plan[0]))
            if over or (not table.scene.unmet(plan[0].success) and table.sim.tool_position[2] > 0.14):
                break
    table.families = ()
    held = Counter(place for place in places(table.sim).values() if place.endswith("bowl"))
    return info["success"], max(held.values(), default=0)


def test_experts_do_a_piece_of_work_skill_by_skill(table):
    assert work(table, "store", 2)[0]


def test_a_bowl_holds_four(table):
    """The goals of long-horizon work can be reached: things find room beside one another, none is thrown out."""
    found = [work(table, "leave", seed) for seed in range(8)]
    assert sum(success for success, _ in found) >= 7
    assert max(held for success, held in found if success) == 4


def test_layouts_keep_the_handles_way_free(arm6_ee):
    names = ["red cube", "blue cube", "green bowl", "drawer"]
    for seed in range(30):
        layout = Layout.draw(np.random.default_rng(seed), told("", names).scene.things, gap=0.03, least=0.02, lane=True)
        drawer = layout.item("drawer")
        for item in layout.items:
            outward = np.array([np.sin(drawer.yaw), -np.cos(drawer.yaw)])
            way = np.array([item.x - drawer.x, item.y - drawer.y])
            if item.kind != "drawer" and way @ outward < 0.25:
                assert np.linalg.norm(way - (way @ outward) * outward) > 0.035 + 0.9 * item.footprint
    crowd = told("", [f"{c} bowl" for c in ("red", "green", "blue", "yellow", "purple", "orange")]).scene.things
    with pytest.raises(ConfigError, match="no room"):
        Layout.draw(np.random.default_rng(0), crowd, least=0.09, gap=0.1)


def test_bad_input(arm6_ee, table):
    never = SkillTask(skill="place_in", kinds=("ball",), families=("stack",))
    with pytest.raises(ConfigError, match=r"of \['stack'\] with \['ball'\] alone allows place_in"):
        never.sample(np.random.default_rng(0), "train")
    with pytest.raises(ConfigError, match="no skill 'fly'"):
        SkillTask(skill="fly")
    with pytest.raises(ConfigError, match="no family"):
        PhysicalTable(embodiment=arm6_ee, families=("cook",))
    with pytest.raises(ConfigError, match="disturbance"):
        PhysicalTable(embodiment=arm6_ee, disturbance=2.0)
    with pytest.raises(ConfigError, match="before reset"):
        PhysicalTable(embodiment=arm6_ee).step(np.zeros(7))


def test_scenes_tell_what_things_are_in_or_on(arm6_ee):
    """Answers about holders are what was measured of the very scene."""
    tasks = tuple(SkillTask(skill=skill) for skill in ("put_down", "stack", "store"))
    sampler = SceneSampler(tasks=tasks, embodiment=arm6_ee, poses=2, questions=16, split="all", skills=True)
    kinds = set()
    for seed in range(12):
        for scene in sampler.sample(seed):
            found = {q.question: q for q in scene.questions if q.kind in ("holder", "within", "present")}
            kinds |= {q.kind for q in found.values()}
            names = [name for name in scene.names if name]
            for q in found.values():
                if q.kind == "present":
                    asked = next(w for w in ("drawer", *_goals()) if w in q.question)
                    assert (q.answer == "yes") == (asked in names)
                elif q.kind == "holder":
                    assert q.answer in ("table", "gripper", *names)
    assert kinds == {"holder", "within", "present"}


def _goals():
    return [f"{c} {k}" for c in ("red", "green", "blue", "yellow", "purple", "orange") for k in ("bowl", "zone")]


def test_pictures_in_detail_show_the_same_view(arm6_ee):
    world = PhysicalTable(embodiment=arm6_ee, details={"front": 192, "wrist": 0})
    seen, _ = world.reset(seed=3)
    assert world.observation_space.contains(seen)
    assert set(seen) == {"state", "instruction", "front", "wrist", "front_detail"}
    small = seen["front_detail"].reshape(96, 2, 96, 2, 3).mean((1, 3))
    assert np.abs(small - seen["front"]).mean() < 4.0
    assert PhysicalTable(embodiment=replace(arm6_ee, cameras=("front",)), details={"front": 96, "wrist": 0}).details
    for details, message in (
        ({"side": 96}, "no camera 'side'"),
        ({"front": -1}, "got -1"),
        ({"front": "big"}, "got 'big'"),
    ):
        with pytest.raises(ConfigError, match=message):
            PhysicalTable(embodiment=arm6_ee, details=details)
