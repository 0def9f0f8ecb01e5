"""Worlds: things rest where the scene says, held things stay held, time is exact; randomisation."""

from dataclasses import replace

import mujoco
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from brachium.errors import BrachiumError, ConfigError, NotFoundError, SpecMismatchError
from brachium.sim.randomize import DomainRandomization
from brachium.sim.robot import RobotModel
from brachium.sim.scene import COLORS, Item, Scene
from brachium.sim.simulation import DOWN, Simulation
from brachium.sim.world import DRAWER_TRAVEL

SIZES = {"cube": 0.020, "cylinder": 0.019, "ball": 0.021, "bowl": 0.058, "zone": 0.052}
STILL = DomainRandomization(
    camera_position=0, camera_target=0, camera_fovy=0, color=0, table_color=0, light_position=0, brightness=0
)


def item(name, x, y, yaw=0.0):
    color, kind = name.split(" ")
    return Item(name=name, kind=kind, rgb=COLORS[color], x=x, y=y, size=SIZES[kind], yaw=yaw)


ITEMS = (
    item("red cube", 0.30, -0.15, 0.4),
    item("green cylinder", 0.30, -0.05),
    item("blue ball", 0.30, 0.05),
    item("yellow bowl", 0.40, 0.12),
    item("purple zone", 0.42, -0.10),
)
DRAWER = Item(name="drawer", kind="drawer", rgb=(0.5, 0.3, 0.2), x=0.36, y=0.22, size=1.0)


@pytest.fixture(scope="module")
def sims(make_arm):
    return {name: Simulation(make_arm(name)) for name in ("arm6_ee", "arm7_ee")}


@pytest.fixture(params=["arm6_ee", "arm7_ee"])
def sim(request, sims):
    return sims[request.param]


def hold_still(sim):
    """The action that keeps the tool where it was commanded to be."""
    return sim.driver.encode(sim.driver.position, sim.driver.quat, sim.gripper_opening)


def test_things_rest_where_the_scene_puts_them(sim):
    sim.load(Scene(items=ITEMS))
    for _ in range(10):
        sim.step(hold_still(sim))
    for one in ITEMS:
        x, y, z = sim.position(one.name)
        assert np.hypot(x - one.x, y - one.y) < 1.5e-3, one.name
        assert z == pytest.approx(one.height, abs=1e-3), one.name
        if one.kind in ("cube", "cylinder", "ball"):
            assert sim.speed(one.name) < 0.01, one.name
            assert sim.upright(one.name), one.name


def test_what_falls_into_a_bowl_gains_no_speed_there(sims):
    """Dropped from 5 cm at any tilt, a cylinder is never faster than its fall (cylinders proper reached 7 m/s)."""
    sim, fastest = sims["arm6_ee"], 0.0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        sim.load(Scene(items=(item("red bowl", 0.35, 0.0), item("blue cylinder", 0.30, 0.15))))
        tilt, away, angle = rng.normal(size=4), rng.uniform(0.0, 0.03), rng.uniform(0.0, 2 * np.pi)
        joint = sim.data.joint("blue cylinder")
        joint.qpos[:3] = 0.35 + away * np.cos(angle), away * np.sin(angle), 0.05
        joint.qpos[3:], joint.qvel[:] = tilt / np.linalg.norm(tilt), 0.0
        for _ in range(500):
            mujoco.mj_step(sim.model, sim.data)
            fastest = max(fastest, float(np.linalg.norm(joint.qvel[:3])))
    assert 0.5 < fastest < 0.9


def test_the_lowest_point_of_each_thing_is_the_table(sim):
    """`Item.height` against the geometry that MuJoCo built."""
    sim.load(Scene(items=ITEMS))
    for one in ITEMS[:3]:
        geom = sim.model.geom(one.name)
        half = {"cube": geom.size[2], "cylinder": geom.size[1], "ball": geom.size[0]}[one.kind]
        assert half == pytest.approx(one.height)
        if one.kind == "cylinder":  # what it touches with is as high and as wide as what is seen
            corners = sim.model.mesh_vert[np.isclose(np.abs(sim.model.mesh_vert[:, 2]), one.height, atol=1e-6)]
            assert len(corners) >= 16
            np.testing.assert_allclose(np.hypot(corners[:, 0], corners[:, 1]), one.size, atol=1e-6)
        assert 0.0 < sim.position(one.name)[2] - half < 1e-3


@pytest.mark.parametrize("kind", ["cube", "cylinder"])
def test_a_gripped_object_held_in_the_air_does_not_slip(sim, kind):
    name = f"red {kind}"
    sim.load(Scene(items=(item(name, 0.34, 0.05),)), np.array([0.34, 0.05, 0.10]))
    down, up = np.array([0.34, 0.05, 0.02]), np.array([0.34, 0.05, 0.12])
    for target, gripper, steps in ((down, 1.0, 8), (down, 0.0, 6), (up, 0.0, 8)):
        for _ in range(steps):
            sim.step(sim.driver.encode(target, DOWN, gripper))
    before = sim.position(name) - sim.tool_position
    assert sim.position(name)[2] > 0.10
    for _ in range(20):  # two seconds
        sim.step(sim.driver.encode(up, DOWN, 0.0))
        assert sim.position(name)[2] > 0.10
    # MuJoCo's friction is a little soft: about a millimetre a second is creep, more is slip.
    assert np.linalg.norm(sim.position(name) - sim.tool_position - before) < 3e-3
    for _ in range(6):
        sim.step(sim.driver.encode(up, DOWN, 1.0))
    assert sim.position(name)[2] < 0.03  # and it was held by the fingers


def test_the_tool_starts_where_it_is_put_and_points_down(sim):
    for target in ([0.24, -0.12, 0.16], [0.38, 0.12, 0.26], [0.45, 0.18, 0.05]):
        sim.load(Scene(), np.array(target))
        np.testing.assert_allclose(sim.tool_position, target, atol=1e-3)
        assert sim.state[3:6] @ [1, 0, 0] > 0.999  # the hand's x axis points forward,
        assert sim.state[6:9] @ [0, -1, 0] > 0.999  # and so its z axis down
        assert sim.gripper_opening == pytest.approx(1.0)


def test_the_state_has_the_meaning_the_spec_gives(sim):
    sim.load(Scene(), np.array([0.3, 0.1, 0.2]))
    for _ in range(3):
        sim.step(sim.driver.encode(np.array([0.4, -0.1, 0.1]), DOWN, 0.5))
    spec, state = sim.embodiment.spec.state, sim.state
    spec.check(state)
    values = dict(zip(spec.names, state))
    assert [values[a] for a in "xyz"] == pytest.approx(list(sim.tool_position))
    assert values["gripper"] == pytest.approx(sim.gripper_opening)
    for joint in sim.embodiment.robot.joints:
        assert values[joint] == pytest.approx(float(sim.data.joint(joint).qpos[0]))
    first, second = state[3:6], state[6:9]
    assert np.linalg.norm(first) == pytest.approx(1.0, abs=1e-5)
    assert first @ second == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize("hz", [5.0, 7.0, 10.0, 30.0, 50.0])
def test_an_action_takes_exactly_one_control_period(make_arm, hz):
    sim = Simulation(replace(make_arm("arm6_ee"), control_hz=hz))
    for _ in range(6):
        sim.step(hold_still(sim))
    assert sim.time == pytest.approx(6 / hz, abs=1e-9)
    assert sim.model.opt.timestep == pytest.approx(0.004, rel=0.25)


def test_the_drawer_opens_as_far_as_it_says_and_stays_put_alone(sim):
    sim.load(Scene(items=(DRAWER,)))
    sim.data.joint("drawer").qpos[0] = 0.05
    sim.settle()
    handle = sim.position("drawer")
    for _ in range(10):
        sim.step(hold_still(sim))
    assert sim.drawer_opening == pytest.approx(0.05, abs=2e-3)
    assert handle[1] == pytest.approx(0.22 - 0.108 - 0.05, abs=1e-6)
    assert tuple(sim.model.joint("drawer").range) == (0.0, DRAWER_TRAVEL)


def test_an_unknown_item_is_named_with_those_there_are(sim):
    sim.load(Scene(items=ITEMS))
    with pytest.raises(SpecMismatchError, match=r"no item 'red ball'.*'blue ball'"):
        sim.position("red ball")


def test_a_robot_whose_parts_do_not_fit_is_a_clear_error():
    with pytest.raises(NotFoundError, match=r"no MJCF file at .*nowhere\.xml"):
        RobotModel(name="x", file="nowhere.xml", joints=("a",), home=(0.0,), gripper_stroke=0.1).spec()
    with pytest.raises(ConfigError, match="one home angle for each of 2 joints, got 1"):
        RobotModel(name="x", file="arm6.xml", joints=("a", "b"), home=(0.0,), gripper_stroke=0.1)
    assert issubclass(NotFoundError, BrachiumError)


def test_projected_rows_hold_positions_then_each_camera(sim):
    sim.load(Scene(items=ITEMS))
    names = tuple(one.name for one in ITEMS)
    rows = sim.project(names)
    assert rows.shape == (len(names), 3 + 3 * len(sim.embodiment.cameras))
    assert rows.dtype == np.float32
    for row, name in zip(rows, names):
        np.testing.assert_allclose(row[:3], sim.position(name), atol=1e-6)
    assert sim.project(()).shape == (0, rows.shape[1])


# -- randomisation ----------------------------------------------------------------------------------------------------

SCENE = Scene(items=ITEMS)


def test_zero_ranges_change_nothing():
    assert STILL.apply(SCENE, np.random.default_rng(0)) == SCENE


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**63 - 1))
def test_randomisation_is_exact_and_stays_in_its_ranges(seed):
    ranges = DomainRandomization()
    drawn = ranges.apply(SCENE, np.random.default_rng(seed))
    assert drawn == ranges.apply(SCENE, np.random.default_rng(seed))
    assert drawn != ranges.apply(SCENE, np.random.default_rng(seed + 1))
    view = SCENE.view
    assert np.abs(np.subtract(drawn.view.position, view.position)).max() <= ranges.camera_position + 1e-12
    assert np.abs(np.subtract(drawn.view.target, view.target)).max() <= ranges.camera_target + 1e-12
    assert abs(drawn.view.fovy - view.fovy) <= ranges.camera_fovy + 1e-12
    assert np.abs(np.subtract(drawn.light, SCENE.light)).max() <= ranges.light_position + 1e-12
    assert 0.2 <= drawn.brightness <= 1.0
    for rgb in (drawn.table_rgb, drawn.floor_rgb, *(one.rgb for one in drawn.items)):
        assert 0.0 <= min(rgb) <= max(rgb) <= 1.0
    for before, after in zip(SCENE.items, drawn.items):  # looks change, places and names never
        assert replace(after, rgb=before.rgb) == before


@pytest.mark.parametrize("field", list(DomainRandomization.__dataclass_fields__))
def test_each_range_changes_what_it_names_alone(field):
    only = replace(STILL, **{field: 0.05})
    drawn = only.apply(SCENE, np.random.default_rng(3))
    changed = {
        "camera_position": drawn.view.position != SCENE.view.position,
        "camera_target": drawn.view.target != SCENE.view.target,
        "camera_fovy": drawn.view.fovy != SCENE.view.fovy,
        "color": any(a.rgb != b.rgb for a, b in zip(drawn.items, SCENE.items)),
        "table_color": drawn.table_rgb != SCENE.table_rgb and drawn.floor_rgb != SCENE.floor_rgb,
        "light_position": drawn.light != SCENE.light,
        "brightness": drawn.brightness != SCENE.brightness,
    }
    assert {name for name, is_changed in changed.items() if is_changed} == {field}


def test_loading_makes_what_the_scene_says(sims):
    """Camera, light and colours of a randomised scene arrive in the model."""
    drawn = DomainRandomization().apply(SCENE, np.random.default_rng(5))
    sim = sims["arm6_ee"]
    sim.load(drawn)
    camera = sim.model.camera("front")
    np.testing.assert_allclose(camera.pos, drawn.view.position)
    assert camera.fovy[0] == pytest.approx(drawn.view.fovy)
    axis = -sim.data.cam("front").xmat.reshape(3, 3)[:, 2]
    towards = np.subtract(drawn.view.target, drawn.view.position)
    np.testing.assert_allclose(axis, towards / np.linalg.norm(towards), atol=1e-6)
    np.testing.assert_allclose(sim.model.light("lamp").diffuse, drawn.brightness, atol=1e-6)
    for one in drawn.items[:3]:
        np.testing.assert_allclose(sim.model.geom(one.name).rgba[:3], one.rgb, atol=1e-6)
    assert isinstance(sim.model, mujoco.MjModel)
