"""The nouns: what they accept, how they travel, and what they say when two of them disagree."""

import json
from dataclasses import FrozenInstanceError, fields, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from brachium.errors import BrachiumError, SpecMismatchError
from brachium.spec import GRIPPERS, REFERENCES, ROTATIONS, ActionChunk, EmbodimentSpec, FeatureSpec, Observation

ARMS = ("arm6_ee", "arm6_joint", "arm7_ee", "arm7_joint")
WORD = st.text("abcxyz_", min_size=1, max_size=6)
NUMBER = st.floats(-1e6, 1e6)


@st.composite
def vectors(draw, name=None):
    """Any feature that is a vector."""
    dim = draw(st.integers(1, 5))

    def maybe(values):
        return draw(st.one_of(st.just(()), st.lists(values, min_size=dim, max_size=dim).map(tuple)))

    return FeatureSpec(
        name=name or draw(WORD),
        shape=(dim,),
        dtype=draw(st.sampled_from(["float32", "float64", "int64"])),
        names=maybe(WORD),
        units=maybe(st.sampled_from(["m", "rad", "1"])),
        low=maybe(NUMBER),
        high=maybe(NUMBER),
        frame=draw(st.sampled_from(["", "base"])),
        reference=draw(st.sampled_from(REFERENCES)),
        rotation=draw(st.sampled_from(ROTATIONS)),
        gripper=draw(st.sampled_from(GRIPPERS)),
    )


@st.composite
def embodiments(draw):
    cameras = draw(st.lists(WORD, unique=True, max_size=3))
    return EmbodimentSpec(
        name=draw(WORD),
        robot=draw(WORD),
        control_hz=draw(st.floats(0.5, 1000.0)),
        cameras=tuple(FeatureSpec(name=c, shape=(4, 6, 3), dtype="uint8") for c in cameras),
        state=draw(vectors("state")),
        action=draw(vectors("action")),
    )


@pytest.fixture(params=ARMS)
def spec(request, make_arm):
    return make_arm(request.param).spec


@settings(max_examples=100, deadline=None)
@given(embodiments())
def test_a_spec_survives_json(spec):
    again = EmbodimentSpec.from_dict(json.loads(json.dumps(spec.to_dict())))
    assert again == spec
    assert hash(again) == hash(spec)
    assert again.digest == spec.digest
    assert spec.differences(again) == []
    spec.require_same(again, "one", "the other")


@settings(max_examples=100, deadline=None)
@given(embodiments(), embodiments())
def test_specs_mean_the_same_exactly_when_there_are_no_differences(one, other):
    same = replace(one, name=other.name, robot=other.robot) == other
    assert (one.differences(other) == []) == same
    assert (one.differences(other) == []) == (other.differences(one) == [])
    if one.digest == other.digest:
        assert one == other


CHANGES = {
    "name": "other",
    "shape": (3, 1),
    "dtype": "float64",
    "names": (),
    "units": (),
    "low": (),
    "high": (),
    "frame": "world",
    "reference": "delta",
    "rotation": "quat_wxyz",
    "gripper": "closed_is_1",
}


def test_there_is_a_change_for_every_field():
    assert set(CHANGES) == {f.name for f in fields(FeatureSpec)}


@pytest.mark.parametrize("field", sorted(set(CHANGES) - {"shape"}))
def test_a_difference_in_any_field_of_an_action_is_told(make_arm, field):
    spec = make_arm("arm6_joint").spec
    other = replace(spec, action=replace(spec.action, **{field: CHANGES[field]}))
    (line,) = spec.differences(other)
    assert line.startswith(f"action.{field}: ")
    assert spec.digest != other.digest


def test_differences_of_robots_name_each_place(make_arm):
    one, other = make_arm("arm6_ee").spec, make_arm("arm7_joint").spec
    told = {line.partition(":")[0] for line in one.differences(other)}
    assert {"state.shape", "state.names", "action.shape", "action.reference", "action.rotation"} <= told
    slow = replace(one, control_hz=5.0, cameras=one.cameras[:1])
    assert one.differences(slow) == [
        "control_hz: 10.0 against 5.0",
        "cameras: ['front', 'wrist'] against ['front']",
    ]
    swapped = replace(one, cameras=one.cameras[::-1])  # the order in which a model sees them
    assert one.differences(swapped) == ["cameras: ['front', 'wrist'] against ['wrist', 'front']"]
    small = replace(one, cameras=(replace(one.cameras[0], shape=(64, 64, 3)), one.cameras[1]))
    assert one.differences(small) == ["front.shape: [96, 96, 3] against [64, 64, 3]"]


def test_require_same_names_both_owners_and_every_difference(make_arm):
    one, other = make_arm("arm6_ee").spec, make_arm("arm7_ee").spec
    with pytest.raises(SpecMismatchError) as error:
        one.require_same(other, "checkpoint outputs/a", "environment")
    text = str(error.value)
    assert text.startswith(
        "checkpoint outputs/a (embodiment 'arm6_ee') and environment (embodiment 'arm7_ee') do not fit:"
    )
    for line in one.differences(other):
        assert f"\n  {line}" in text
    assert "same embodiment" in text.splitlines()[-1]
    assert isinstance(error.value, BrachiumError)
    assert isinstance(error.value, ValueError)
    one.require_same(replace(one, name="another_name"), "a", "b")


@pytest.mark.parametrize("field", ["names", "units", "low", "high"])
def test_a_list_of_the_wrong_length_is_refused(field):
    with pytest.raises(SpecMismatchError, match=rf"'x': expected 3 {field} for shape \(3,\), got 2"):
        FeatureSpec(name="x", shape=(3,), **{field: ("1", "2")})


@pytest.mark.parametrize("field", ["reference", "rotation", "gripper"])
def test_an_unknown_word_is_refused_with_the_words_there_are(field):
    with pytest.raises(SpecMismatchError, match=rf"expected {field} to be one of .*got 'sideways'"):
        FeatureSpec(name="x", shape=(3,), **{field: "sideways"})


def test_cameras_are_pictures_with_names_of_their_own(make_arm):
    spec = make_arm("arm6_ee").spec
    with pytest.raises(SpecMismatchError, match="camera names repeat"):
        replace(spec, cameras=(spec.cameras[0], spec.cameras[0]))
    with pytest.raises(SpecMismatchError, match=r"expects uint8 \(height, width, 3\), got float32"):
        replace(spec, cameras=(replace(spec.cameras[0], dtype="float32"),))
    with pytest.raises(SpecMismatchError, match=r"no camera 'left'; it has \('front', 'wrist'\)"):
        spec.camera("left")
    assert spec.camera("wrist") is spec.cameras[1]


def test_values_are_frozen(spec):
    with pytest.raises(FrozenInstanceError):
        spec.control_hz = 5.0
    with pytest.raises(FrozenInstanceError):
        spec.action.low = ()


def test_a_fake_observation_fits_and_any_damage_is_told(spec):
    whole = Observation.fake(spec, np.random.default_rng(0))
    whole.check(spec)
    missing = replace(whole, images={"front": whole.images["front"]})
    with pytest.raises(SpecMismatchError, match=r"here: expected cameras .*missing \['wrist'\]"):
        missing.check(spec, "here")
    for images, state in (
        ({**whole.images, "front": whole.images["front"][:-1]}, whole.state),
        ({**whole.images, "front": whole.images["front"].astype(np.float32)}, whole.state),
        (whole.images, whole.state[:-1]),
        (whole.images, whole.state.astype(np.float64)),
    ):
        with pytest.raises(SpecMismatchError, match="expects shape"):
            Observation(images=images, state=state).check(spec)


def test_observations_stack_along_a_new_axis(spec):
    rng = np.random.default_rng(1)
    single = [replace(Observation.fake(spec, rng, f"task {k}"), timestamp=float(k)) for k in range(3)]
    batch = Observation.stack(single)
    batch.check(spec)
    assert batch.instruction == ("task 0", "task 1", "task 2")
    assert batch.timestamp == 2.0
    for k, one in enumerate(single):
        np.testing.assert_array_equal(batch.state[k], one.state)
        for name in spec.camera_names:
            np.testing.assert_array_equal(batch.images[name][k], one.images[name])


def test_a_chunk_is_clipped_to_the_limits_and_only_where_there_are_some(spec):
    rng = np.random.default_rng(2)
    actions = rng.uniform(-9, 9, (2, 6, spec.action.dim)).astype(np.float32)
    chunk = ActionChunk(actions=actions, control_hz=10.0, timestamp=3.0)
    clipped = chunk.clip(spec.action)
    assert len(chunk) == len(clipped) == 6
    low, high = np.asarray(spec.action.low, np.float32), np.asarray(spec.action.high, np.float32)
    inside = (actions >= low) & (actions <= high)
    np.testing.assert_array_equal(clipped.actions[inside], actions[inside])
    assert np.all((clipped.actions >= low) & (clipped.actions <= high))
    assert (clipped.control_hz, clipped.timestamp) == (10.0, 3.0)
    assert clipped.actions.dtype == np.float32
    np.testing.assert_array_equal(chunk.actions, actions)  # the chunk itself is left alone
    assert chunk.clip(replace(spec.action, low=(), high=())) is chunk


def test_one_limit_alone_is_kept_too():
    spec = FeatureSpec(name="action", shape=(1,), high=(1.0,))
    chunk = ActionChunk(actions=np.array([[-5.0], [5.0]], np.float32), control_hz=10.0)
    np.testing.assert_array_equal(chunk.clip(spec).actions, [[-5.0], [1.0]])
