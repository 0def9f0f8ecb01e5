"""Small stores of random episodes, made through the public API."""

import numpy as np
import pytest

from brachium.datasets.schema import StoreSchema
from brachium.datasets.store import EpisodeStore
from brachium.datasets.writer import EpisodeWriter
from brachium.spec import EmbodimentSpec, FeatureSpec


def make_embodiment(cameras=("front", "wrist"), size=(24, 32)):
    return EmbodimentSpec(
        name="tiny_arm",
        robot="tiny",
        control_hz=10.0,
        cameras=tuple(FeatureSpec(name=c, shape=(*size, 3), dtype="uint8") for c in cameras),
        state=FeatureSpec(
            name="state", shape=(3,), names=("x", "y", "grip"), units=("m", "m", "1"), low=(-1, -1, 0), high=(1, 1, 1)
        ),
        action=FeatureSpec(name="action", shape=(2,), names=("dx", "grip"), units=("m", "1"), gripper="open_is_1"),
    )


def make_schema(extras=(), **options):
    return StoreSchema(embodiment=make_embodiment(**options), extras=extras)


def random_step(schema, rng):
    step = {
        "images": {c.name: rng.integers(0, 256, c.shape, dtype=np.uint8) for c in schema.embodiment.cameras},
        "state": rng.standard_normal(3).astype(np.float32),
        "action": rng.standard_normal(2).astype(np.float32),
    }
    if schema.extras:
        step["extras"] = {e.name: rng.standard_normal(e.shape).astype(e.dtype) for e in schema.extras}
    return step


def fill(store, lengths, *, seed=0, successes=None, **options):
    """Record random episodes; return the steps that were given, by episode."""
    rng = np.random.default_rng(seed)
    given = []
    with EpisodeWriter(store, fsync=False, **options) as writer:
        for i, length in enumerate(lengths):
            writer.begin(f"task {i % 2}", tags=("even",) if i % 2 == 0 else ("odd",), meta={"seed": i})
            steps = [random_step(store.schema, rng) for _ in range(length)]
            for step in steps:
                writer.step(**step)
            writer.end(successes[i] if successes else True)
            given.append(steps)
    return given


@pytest.fixture
def schema():
    return make_schema(extras=(FeatureSpec(name="objects", shape=(2, 3)),))


@pytest.fixture
def filled(tmp_path, schema):
    """A store of episodes with 4, 1 and 6 steps in raw frames, and what was recorded."""
    store = EpisodeStore.create(tmp_path / "store", schema)
    given = fill(store, (4, 1, 6), successes=[True, False, None], profile="raw", episodes_per_segment=2)
    return store.refresh(), given
