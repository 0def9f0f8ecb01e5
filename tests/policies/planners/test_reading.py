"""From readings to scenes: what counts as there, what is corrected later, and what is kept in mind."""

from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch

from brachium.errors import ConfigError
from brachium.policies.planners.asking import Kinds
from brachium.policies.planners.reading import LOOKS, ReadScenes
from brachium.spec import Observation
from brachium.symbols import Literal, Thing
from brachium.vla.scene_reader import Reading, Universe

NAMES = ("red cube", "red cylinder", "blue cube", "green zone", "red bowl", "drawer")
KINDS = Kinds(things=tuple(Thing(name=n, kind=n.split()[-1]) for n in (*NAMES, "table")))
TABLE, GRIPPER = len(NAMES), len(NAMES) + 1


class Told:
    """A reader that says what it is told: logits by hand, in place of a network's."""

    universe = Universe(names=NAMES)
    model = SimpleNamespace(cameras=("front",))
    details: ClassVar[dict[str, int]] = {}

    def __init__(self):
        self.present, self.place, self.open = {}, {}, -5.0

    def read(self, images, state, details=None):
        present = torch.tensor([[self.present.get(name, -5.0) for name in NAMES]])
        place = torch.zeros(1, len(NAMES), len(NAMES) + 2)
        place[:, :, :-2] = -torch.inf
        place[:, :, :-2][:, torch.from_numpy(self.universe.may_hold())] = 0.0
        for name, holder in self.place.items():
            place[0, NAMES.index(name), holder] = 8.0
        return Reading(present=present, place=place, open=torch.tensor([self.open]))


@pytest.fixture
def told():
    return Told()


def look(eyes, text="work", lane=0):
    image = np.zeros((4, 4, 3), np.uint8)
    return eyes.estimate(Observation(images={"front": image}, state=np.zeros(3, np.float32), instruction=text), lane)


def names(scene):
    return {thing.name for thing in scene.things}


def test_scenes_are_what_is_read(told):
    told.present = dict.fromkeys(("red cube", "blue cube", "green zone", "red bowl"), 5.0)
    told.place = {"red cube": NAMES.index("red bowl"), "blue cube": TABLE}
    scene = look(ReadScenes(reader=told, kinds=KINDS))
    assert names(scene) == {"red cube", "blue cube", "green zone", "red bowl", "table"}
    assert {Literal("in", ("red cube", "red bowl")), Literal("on", ("blue cube", "table"))} <= scene.facts
    assert scene.confidence[Literal("in", ("red cube", "red bowl"))] > 0.9


def test_what_is_not_there_holds_nothing(told):
    told.present = {"red cube": 5.0, "red bowl": -5.0}
    told.place = {"red cube": NAMES.index("red bowl")}
    assert Literal("on", ("red cube", "red bowl")) not in look(ReadScenes(reader=told, kinds=KINDS)).facts


def test_what_the_instruction_names_is_there_rather_than_not(told):
    told.present = {"red cube": -1.0, "blue cube": -3.0}
    told.place = {"red cube": TABLE, "blue cube": TABLE}
    assert "red cube" not in names(look(ReadScenes(reader=told, kinds=KINDS)))
    named = look(ReadScenes(reader=told, kinds=KINDS), "put the red block on the blue block")
    assert "red cube" in names(named)
    assert "blue cube" not in names(named)  # a thing that is surely not there is not


def test_a_zone_holds_one_thing(told):
    told.present = {"red cube": 1.0, "red cylinder": 3.0, "green zone": 5.0}
    told.place = dict.fromkeys(("red cube", "red cylinder"), NAMES.index("green zone"))
    scene = look(ReadScenes(reader=told, kinds=KINDS))
    assert "red cylinder" in names(scene)
    assert "red cube" not in names(scene)


def test_later_looks_correct_the_first_when_they_are_sure(told):
    told.present = {"red cube": 0.5, "red bowl": 5.0}
    told.place = {"red cube": TABLE}
    eyes = ReadScenes(reader=told, kinds=KINDS)
    assert "red cube" in names(look(eyes))
    told.present |= {"red cube": -6.0, "blue cube": 6.0}
    told.place["blue cube"] = TABLE
    for _ in range(LOOKS):
        scene = look(eyes)
    assert "red cube" not in names(scene)
    assert "blue cube" in names(scene)
    assert "blue cube" in names(look(eyes, lane=0))
    told.present = {"red bowl": 5.0}
    assert names(look(eyes, lane=1)) == {"red bowl", "table"}  # lanes are apart
    eyes.reset(0)
    assert names(look(eyes)) == {"red bowl", "table"}


def test_what_went_into_the_drawer_is_there_though_unseen(told):
    told.present = {"red cube": 6.0, "drawer": 9.0}
    told.place, told.open = {"red cube": NAMES.index("drawer")}, 5.0
    eyes = ReadScenes(reader=told, kinds=KINDS)
    look(eyes)
    told.present["red cube"], told.place, told.open = -9.0, {"red cube": TABLE}, -5.0
    for _ in range(6):
        scene = look(eyes)
    assert {Literal("in", ("red cube", "drawer")), Literal("hidden", ("red cube",))} <= scene.facts


def test_a_camera_is_missing(told):
    eyes = ReadScenes(reader=told, kinds=KINDS)
    with pytest.raises(ConfigError, match="lacks"):
        eyes.estimate(Observation(state=np.zeros(3, np.float32)), 0)


def test_one_look_that_errs_is_outvoted_and_a_change_is_seen_in_two(told):
    told.present = {"red cube": 5.0, "red bowl": 5.0}
    eyes, within = ReadScenes(reader=told, kinds=KINDS), Literal("in", ("red cube", "red bowl"))
    seen = []
    for there in (True, True, False, True, False, False):
        told.place = {"red cube": NAMES.index("red bowl") if there else TABLE}
        seen.append(within in look(eyes).facts)
    assert seen == [True, True, True, True, False, False]
    assert within not in look(ReadScenes(reader=told, kinds=KINDS, memory=1)).facts
    with pytest.raises(ConfigError, match="memory"):
        ReadScenes(reader=told, kinds=KINDS, memory=0)


def test_detail_that_is_missing_or_of_another_size_is_named(told):
    told.details = {"front": 8}
    eyes = ReadScenes(reader=told, kinds=KINDS)
    with pytest.raises(ConfigError, match=r"got none. Type: env.details.front=8"):
        look(eyes)
    image = np.zeros((4, 4, 3), np.uint8)
    small = Observation(images={"front": image, "front_detail": image}, state=np.zeros(3, np.float32))
    with pytest.raises(ConfigError, match=r"expected a picture of 8 x 8 px, got one of \(4, 4, 3\)"):
        eyes.estimate(small, 0)


def test_what_a_hand_hides_for_some_looks_is_still_there(told):
    """Seen twice, then hidden for four looks in which it is surely not seen: a thing does not go away."""
    told.present = dict.fromkeys(("red cube", "red bowl"), 6.0)
    told.place = {"red cube": TABLE}
    eyes = ReadScenes(reader=told, kinds=KINDS)
    look(eyes), look(eyes)
    told.present["red cube"] = -30.0
    for _ in range(4):
        assert "red cube" in names(look(eyes))
