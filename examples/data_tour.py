"""A tour of the episode store: record, choose, mix, and read batches as a trainer does.

Type: python examples/data_tour.py [FOLDER]
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from brachium.datasets.batch_reader import BatchReader
from brachium.datasets.mixture import WindowMixture
from brachium.datasets.sampler import ShuffledSampler
from brachium.datasets.schema import StoreSchema
from brachium.datasets.selection import Selection
from brachium.datasets.store import EpisodeStore
from brachium.datasets.window import WindowDataset, WindowSpec
from brachium.datasets.writer import EpisodeWriter
from brachium.spec import EmbodimentSpec, FeatureSpec

EMBODIMENT = EmbodimentSpec(
    name="toy_arm",
    robot="toy",
    control_hz=20.0,
    cameras=(
        FeatureSpec(name="front", shape=(64, 64, 3), dtype="uint8"),
        FeatureSpec(name="wrist", shape=(32, 48, 3), dtype="uint8"),  # cameras may differ in size
    ),
    state=FeatureSpec(name="state", shape=(2,), names=("x", "y"), units=("m", "m")),
    action=FeatureSpec(name="action", shape=(2,), names=("dx", "dy"), units=("m", "m"), reference="delta"),
)
SCHEMA = StoreSchema(
    embodiment=EMBODIMENT,
    maps=(FeatureSpec(name="depth", shape=(64, 64, 1), dtype="uint16", units=("mm",)),),
    optional=("wrist", "depth"),  # the wrist camera and the depth sensor are slower than the arm
)


def drive(writer: EpisodeWriter, seed: int, steps: int) -> None:
    """One episode of a dot that walks to the middle."""
    rng = np.random.default_rng(seed)
    place = rng.uniform(-1, 1, 2)
    writer.begin(f"go to the middle from the {'left' if place[0] < 0 else 'right'}", tags=("toy",), meta={"seed": seed})
    for t in range(steps):
        front = np.full((64, 64, 3), 40, np.uint8)
        row, column = ((place + 1) / 2 * 55).astype(int)
        front[row : row + 8, column : column + 8] = (220, 60, 40)
        images: dict[str, np.ndarray] = {"front": front}
        if t % 4 == 0:
            images |= {"wrist": front[::2, :48], "depth": np.full((64, 64, 1), 800 + t, np.uint16)}
        action = -0.1 * place
        writer.step(images=images, state=place, action=action)
        place = place + action
    writer.end(success=bool(np.abs(place).max() < 0.2))


def main(folder: Path) -> None:
    stores = {}
    for name, seeds in {"lab": range(8), "home": range(100, 104)}.items():
        store = EpisodeStore.create(folder / name, SCHEMA)
        with EpisodeWriter(store, profile="jpeg") as writer:
            for seed in seeds:
                drive(writer, seed, steps=20 + seed % 7)
        stores[name] = store.refresh()
        print(f"{name}: {stores[name].num_episodes} episodes, {stores[name].total_frames} steps")

    good = Selection(success="true", instruction="*left*").of(stores["lab"])
    print(f"episodes of the lab that came from the left and arrived: {list(good)}")

    # One frame of the front camera, the last picture that the wrist camera took, and eight actions.
    spec = WindowSpec(action_horizon=8, cameras=("front", "wrist"), maps=("depth",), hold=True)
    windows = {name: WindowDataset(store, spec) for name, store in stores.items()}
    sampler = ShuffledSampler(len(windows["lab"]), batch_size=16, seed=0)
    with BatchReader(windows["lab"], sampler.batch, steps=5, threads=2) as batches:
        for batch in batches:
            print({name: image.shape for name, image in batch.images.items()}, "action", batch.action.shape)

    mixture = WindowMixture(windows, {"lab": 1, "home": 3}, batch_size=64, seed=0)
    parts = mixture.batch(step=1000)  # any step, at once: nothing is kept between steps
    print("a batch of the mixture:", {name: len(part) for name, part in parts.items()})
    print(f"\nLook at them: brachium view store={folder / 'lab'}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "outputs/data_tour"))
