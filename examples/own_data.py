"""Your own teleoperation data, step by step into an episode store that `brachium train` reads.

Type: .venv/bin/python examples/own_data.py outputs/own
Then: brachium inspect store=outputs/own
      brachium train store=outputs/own model.points=false tune=full out=outputs/own-policy
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from brachium import EmbodimentSpec, EpisodeStore, FeatureSpec
from brachium.datasets.schema import StoreSchema
from brachium.datasets.writer import EpisodeWriter

AXES, RATE = ("x", "y", "z"), 10.0
ROBOT = EmbodimentSpec(
    name="my_robot",
    robot="my_robot",
    control_hz=RATE,
    cameras=(FeatureSpec(name="front", shape=(96, 96, 3), dtype="uint8"),),
    state=FeatureSpec(
        name="state",
        shape=(4,),
        names=(*AXES, "gripper"),
        units=("m", "m", "m", "1"),
        frame="base",
        gripper="open_is_1",
    ),
    action=FeatureSpec(
        name="action",
        shape=(4,),
        names=(*(f"d{axis}" for axis in AXES), "gripper"),
        units=("m", "m", "m", "1"),
        low=(-0.05, -0.05, -0.05, 0.0),
        high=(0.05, 0.05, 0.05, 1.0),
        frame="base",
        reference="delta",
        gripper="open_is_1",
    ),
)


def teleoperate(seed: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Stands for your robot: yields image (96, 96, 3), state (4,) and action (4,) of each step until the target."""
    rng = np.random.default_rng(seed)
    position, target = rng.uniform(-0.2, 0.2, (2, 3))
    for _ in range(30):
        step = np.clip(0.5 * (target - position), -0.05, 0.05)
        image = np.full((96, 96, 3), 200, np.uint8)
        row, column = ((target[:2] + 0.25) * 190).astype(int)
        image[row : row + 6, column : column + 6] = (220, 30, 30)
        yield image, np.append(position, 1.0).astype(np.float32), np.append(step, 1.0).astype(np.float32)
        position = position + step


def main() -> None:
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "outputs/own")
    store = EpisodeStore.create(out, StoreSchema(embodiment=ROBOT))
    with EpisodeWriter(store, source="examples/own_data.py") as writer:
        for seed in range(8):
            writer.begin("go to the red square", tags=("example",), meta={"seed": seed})
            for image, state, action in teleoperate(seed):
                writer.step({"front": image}, state, action)  # a wrong shape or name is refused here, with words
            writer.end(success=True)  # committed: from now on a crash cannot undo it
    store = store.refresh()
    print(f"{out}: {store.num_episodes} episodes, {store.total_frames} frames")


if __name__ == "__main__":
    main()
