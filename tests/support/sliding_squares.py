"""Moving squares: episodes whose future anybody can compute."""

import numpy as np
import torch

from brachium.datasets.schema import StoreSchema
from brachium.datasets.store import EpisodeStore
from brachium.datasets.writer import EpisodeWriter
from brachium.spec import EmbodimentSpec, FeatureSpec
from brachium.vla.generative.reading import Reading

torch.set_num_threads(1)

CAMERAS = ("front", "wrist")
SPEED = {"go right": 1.0, "go left": -1.0}
FLOW = {"_target_": "brachium.vla.heads.flow.FlowHead", "width": 32, "depth": 1, "steps": 2}
REGRESSION = {"_target_": "brachium.vla.heads.regression.RegressionHead", "width": 64}


def make_spec(size=32):
    return EmbodimentSpec(
        name="slider",
        robot="slider",
        control_hz=10.0,
        cameras=tuple(FeatureSpec(name=name, shape=(size, size, 3), dtype="uint8") for name in CAMERAS),
        state=FeatureSpec(name="state", shape=(10,), names=tuple("xyzabcdefg")),
        action=FeatureSpec(
            name="action", shape=(2,), names=("dx", "dy"), low=(-1.0, -1.0), high=(1.0, 1.0), reference="delta"
        ),
    )


def picture(x, size=32):
    """A bright square whose left edge is at `x` [pixels] on grey."""
    image = np.full((size, size, 3), 60, np.uint8)
    image[12:20, round(x) : round(x) + 6] = (250, 40, 40)
    return image


def record(path, episodes=6, length=9, size=32):
    """Squares that go where they are told, two pixels a unit of action; actions and speeds are the same number."""
    spec = make_spec(size)
    store = EpisodeStore.create(path, StoreSchema(embodiment=spec))
    with EpisodeWriter(store, fsync=False, profile="raw", episodes_per_segment=4) as writer:
        for seed in range(episodes):
            rng = np.random.default_rng(seed)
            text = list(SPEED)[seed % 2]
            x = rng.uniform(2, 6) if SPEED[text] > 0 else rng.uniform(18, 22)
            writer.begin(text, meta={"seed": seed, "task": "slide"})
            for _ in range(length):
                state = np.zeros(10, np.float32)
                state[0] = x
                action = np.array([SPEED[text], 0.0], np.float32)
                writer.step(images={name: picture(x, size) for name in CAMERAS}, state=state, action=action)
                x += 1.5 * SPEED[text]
            writer.end(True)
    return store.refresh()


def make_reading(count, seed=0, words=96):
    draws = torch.Generator().manual_seed(seed)
    return Reading(
        words=torch.randn(count, words, generator=draws),
        uv=torch.rand(count, 2, len(CAMERAS), 2, generator=draws),
        visible=torch.rand(count, 2, len(CAMERAS), generator=draws),
    )
