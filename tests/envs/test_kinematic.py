"""Long-horizon work with pictures: the same episodes as without, and things where the facts say."""

import numpy as np
import pytest

from brachium.envs.longhorizon.families import FAMILIES
from brachium.envs.longhorizon.kinematic import KinematicTable
from brachium.envs.longhorizon.symbolic import SymbolicTable
from brachium.errors import ConfigError
from brachium.policies.planners.search import search
from brachium.sim.scene import FIXED_KINDS
from brachium.symbols import Literal


@pytest.fixture(scope="module")
def shown(arm6_ee):
    return KinematicTable(embodiment=arm6_ee, failure=0.0)


@pytest.fixture(scope="module")
def arm6_ee():
    from hydra import compose, initialize_config_module
    from hydra.utils import instantiate

    with initialize_config_module("brachium.conf", version_base=None):
        return instantiate(compose(overrides=["+embodiment=arm6_ee"]).embodiment)


def number_of(env, call):
    return np.array([env.instructions.index(call.instruction)], np.float32)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_finds_room_on_the_table(shown, family):
    shown.families = (family,)
    for seed in range(8):
        shown.reset(seed=seed)
        sim = shown.sim
        for a in sim.scene.items:
            for b in sim.scene.items:
                both = {shown.errand_kind(a.name), shown.errand_kind(b.name)}
                if a.name < b.name and "drawer" not in both:
                    assert np.hypot(a.x - b.x, a.y - b.y) > 0.8 * (a.footprint + b.footprint)


def test_episodes_are_those_of_the_symbolic_table(shown, arm6_ee):
    options = {"failure": 0.3, "disturbance": 1.0}
    plain, pictured = SymbolicTable(**options), KinematicTable(embodiment=arm6_ee, images=False, **options)
    for seed in range(6):
        plain.reset(seed=seed)
        pictured.reset(seed=seed)
        assert plain.errand == pictured.errand
        for _ in range(6):
            plan = search(plain.library, plain.scene, plain.errand.goals).calls
            call = plan[0] if plan else plain.calls[0]
            for env in (plain, pictured):
                env.step(number_of(env, call))
            assert plain.facts == pictured.facts


def test_things_are_where_the_facts_say(shown):
    shown.families = ("sort", "stack", "store_two", "swap")
    for seed in range(8):
        shown.reset(seed=seed)
        for _ in range(5):
            plan = search(shown.library, shown.scene, shown.errand.goals).calls
            if not plan:
                break
            shown.step(number_of(shown, plan[0]))
        sim = shown.sim
        for fact in shown.facts:
            if fact.pred not in ("on", "in"):
                continue
            thing, place = fact.args
            at = sim.data.body(thing).xpos
            if place == "table":
                assert at[2] == pytest.approx(shown.layout.item(thing).height, abs=1e-6)
            elif shown.errand_kind(place) == "cube":
                np.testing.assert_allclose(at[:2], sim.data.body(place).xpos[:2], atol=1e-6)
                assert at[2] > sim.data.body(place).xpos[2] + 0.03
            elif shown.errand_kind(place) in ("bowl", "zone"):
                assert np.linalg.norm(at[:2] - sim.data.body(place).xpos[:2]) < 0.03
        if any(item.kind == "drawer" for item in shown.layout.items):
            assert (sim.drawer_opening > 0.05) == (Literal("open", ("drawer",)) in shown.facts)


def test_pictures_are_of_the_robots_cameras_and_change_with_the_work(shown):
    shown.families = ("swap",)
    before, _ = shown.reset(seed=1)
    assert set(before) == {"state", "instruction", "front", "wrist"}
    assert before["front"].shape == (96, 96, 3)
    call = search(shown.library, shown.scene, shown.errand.goals).calls[0]
    after, *_ = shown.step(number_of(shown, call))
    changed = np.abs(before["front"].astype(int) - after["front"]).max(axis=2) > 40
    assert 10 < changed.sum() < 1500, "a thing has moved, the rest has not"
    again, _ = shown.reset(seed=1)
    np.testing.assert_array_equal(again["front"], before["front"])


def test_the_thing_goes_with_the_fingers(arm6_ee):
    env = KinematicTable(embodiment=arm6_ee, failure=0.0, record=True, images=False, moves=3, render_size=64)
    env.families = ("both",)
    env.reset(seed=2)
    call = search(env.library, env.scene, env.errand.goals).calls[0]
    seen, picture = [], env._picture

    def watch():
        tool = env.sim.tool_position
        seen.append(
            (float(np.linalg.norm(tool - env._tool)), float(np.linalg.norm(tool - env.sim.position(call.args[0]))))
        )
        picture()

    env._picture = watch
    env.step(number_of(env, call))
    reached, apart = np.array(seen).T
    assert np.median(reached) < 0.003, "inverse kinematics brings the tool where it is told"
    assert (apart < 0.005).sum() >= 6, "it is carried"
    assert len(env.frames) > len(seen) - 2
    assert env.frames[0].shape == (64, 64, 3)


def test_mistakes_are_told(arm6_ee):
    with pytest.raises(ConfigError, match="at least one picture"):
        KinematicTable(embodiment=arm6_ee, moves=0)
    env = KinematicTable(embodiment=arm6_ee)
    with pytest.raises(ConfigError, match="no thing 'plaid cube'"):
        env.ask("put it away", ["plaid cube"])
    colors = ("red", "green", "blue", "yellow", "purple", "orange")
    crowd = [f"{c} {k}" for c in colors for k in ("bowl", "zone", "cube")]
    with pytest.raises(ConfigError, match="no room on the table"):
        env.ask("tidy up", [*crowd, "drawer"])
    assert set(FIXED_KINDS) >= {"bowl", "zone", "drawer"}
