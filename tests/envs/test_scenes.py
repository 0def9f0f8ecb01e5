"""Free scenes: labels against pixels and the simulation, exact seeds, and the store's schema."""

import numpy as np
import pytest

from brachium.envs.longhorizon.skills import SkillTask
from brachium.envs.scenes import MAX_ITEMS, Clutter, SceneSampler, objects_feature
from brachium.envs.tasks.drawer import Drawer
from brachium.envs.tasks.place import Place
from brachium.envs.tasks.push import Push
from brachium.envs.tasks.reach import Reach
from brachium.sim.randomize import DomainRandomization

STILL = DomainRandomization(
    camera_position=0, camera_target=0, camera_fovy=0, color=0, table_color=0, light_position=0, brightness=0
)


@pytest.fixture(scope="module")
def sampler(make_arm):
    return SceneSampler(tasks=(Reach(), Push(), Place(), Drawer()), embodiment=make_arm("arm6_ee"))


def test_one_seed_gives_the_same_scenes_whatever_was_drawn_before(sampler, make_arm):
    first = sampler.sample(5)
    sampler.sample(6)
    fresh = SceneSampler(tasks=sampler.tasks, embodiment=make_arm("arm6_ee"))
    for other in (sampler.sample(5), fresh.sample(5)):
        assert len(other) == len(first) == sampler.poses
        for a, b in zip(first, other):
            assert a.sentences == b.sentences
            np.testing.assert_array_equal(a.objects, b.objects)
            np.testing.assert_array_equal(a.state, b.state)
            for camera, image in a.images.items():
                np.testing.assert_array_equal(image, b.images[camera])


def test_labels_have_a_row_an_item_and_nan_beyond(sampler):
    spec = objects_feature(("front", "wrist"))
    for seed in range(12):
        for scene in sampler.sample(seed):
            assert scene.objects.shape == spec.shape == (MAX_ITEMS, 9)
            there = ~np.isnan(scene.objects).any(axis=1)
            count = int(there.sum())
            assert 1 <= count <= MAX_ITEMS
            assert there[:count].all()
            assert np.isnan(scene.objects[count:]).all()
            assert len(scene.sentences) == sampler.sentences
            for sentence in scene.sentences:
                assert set(sentence["roles"].values()) <= set(range(count))


def test_a_label_points_at_the_colour_it_names(make_arm):
    """Where nothing hides it, the pixel under (u, v) has the colour of the word."""
    hue = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1), "yellow": (1, 1, 0)}
    sampler = SceneSampler(tasks=(Reach(),), embodiment=make_arm("arm6_ee"), randomization=STILL, held=0.0)
    hit = looked = 0
    for seed in range(25):
        for scene in sampler.sample(seed):
            for sentence in scene.sentences:
                words = [w for w in sentence["text"].split() if w in hue]
                if not words:
                    continue
                u, v = scene.objects[sentence["roles"]["object"], 3:5]
                if not (0 <= u < 1 and 0 <= v < 1):
                    continue
                pixel = scene.images["front"][int(v * 96), int(u * 96)] / 255.0
                bright = pixel > 0.6 * pixel.max()
                looked += 1
                hit += tuple(bright.astype(int)) == hue[words[0]]
    assert looked > 60
    assert hit > 0.85 * looked  # the arm hides some


def test_scenes_are_recorded_as_single_steps_without_verdict(sampler):
    episodes = sampler.record(3)
    assert len(episodes) == sampler.poses
    for episode in episodes:
        assert episode.success is None
        assert episode.meta["seed"] == 3
        assert episode.meta["task"] == "scenes"
        assert episode.instruction == episode.meta["sentences"][0]["text"]
        (step,) = episode.steps
        assert not step.action.any()
        assert step.extras["objects"].dtype == np.float32


MOVING = {"poses": 4, "moving": 1.0, "skills": True, "split": "all"}


@pytest.fixture(scope="module")
def moving(make_arm):
    tasks = (SkillTask(skill="store"), SkillTask(skill="stack"), Place())
    return SceneSampler(tasks=tasks, embodiment=make_arm("arm6_ee"), **MOVING)


def test_scenes_in_motion_show_an_expert_at_work(moving):
    """Things are carried through the air, the hand tilts, and the table changes."""
    names = moving.embodiment.spec.state.names
    carried, tilt, changed = 0, 0.0, 0
    for seed in range(10):
        scenes = moving.sample(seed)
        for scene in scenes:
            tilt = max(tilt, abs(float(scene.state[names.index("rot6d_2")])))
            if "gripper" in scene.holders:
                carried += 1
                thing = scene.objects[scene.holders.index("gripper"), :3]
                tool = scene.state[[names.index(axis) for axis in "xyz"]]
                assert np.linalg.norm(thing - tool) < 0.04, "what is carried is at the tool"
        first, last = scenes[0].objects[:, :3], scenes[-1].objects[:, :3]
        changed += bool(np.nanmax(np.abs(first - last)) > 0.02)
    assert carried >= 5
    assert tilt > 0.01, "a hand in motion does not point straight down"
    assert changed >= 5


def test_scenes_in_motion_come_from_their_seed_alone(moving):
    fresh = SceneSampler(tasks=moving.tasks, embodiment=moving.embodiment, **MOVING)
    for a, b in zip(moving.sample(3), fresh.sample(3)):
        np.testing.assert_array_equal(a.state, b.state)
        np.testing.assert_array_equal(a.images["front"], b.images["front"])


def test_tables_without_a_task_stand_still(make_arm):
    """Clutter has no expert: the same scenes whether things may move or not."""
    still, may = (
        SceneSampler(tasks=(Clutter(),), embodiment=make_arm("arm6_ee"), poses=2, moving=share) for share in (0.0, 1.0)
    )
    for a, b in zip(still.sample(4), may.sample(4)):
        np.testing.assert_array_equal(a.objects, b.objects)
