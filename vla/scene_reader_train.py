"""The verb ``brachium train-reader``: a scene reader on labelled scenes, over a frozen pretrained model's vision."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..console import log, progress
from ..datasets.store import EpisodeStore
from ..errors import ConfigError, StoreError
from ..spec import DETAIL
from .grounding import LEAST_SPREAD
from .loop import TrainLoop
from .model import stack_images
from .optim import Optimization
from .pretrained import Pretrained, identity_of
from .scene_reader import GRIPPER, TABLE, ReaderNet, Reading, SceneReader, Spotter, Universe, reading_loss, spot_loss

AT_ONCE = 32
"""Scenes whose patches are computed at once."""
HALF = (0.03, 0.06)
"""The drawer is closed below the first and open above the second [m]; between, nothing is learnt."""


@dataclass(frozen=True, kw_only=True)
class Some:
    """Some labelled scenes, as `Scenes` holds them, with pictures in detail by camera."""

    patches: Tensor
    body: Tensor
    details: dict[str, Tensor]
    present: Tensor
    place: Tensor
    open: Tensor
    hidden: Tensor
    uv: dict[str, Tensor]

    def read(self, net: ReaderNet) -> Reading:
        """What a net says of them."""
        return net(self.patches, self.body, self.details)


@dataclass(frozen=True, kw_only=True)
class Scenes:
    """Labelled scenes: patches (n, p, v) in half precision, poses (n, s), and labels as `reading_loss` takes them.

    Pictures in detail, which are large, stay in the stores.

    Attributes:
        hidden: What is there and cannot be seen (n, k).
        uv: By camera that is seen in detail, where things are in its picture (n, k, 2); NaN where they are not seen.
        stores: In the order of the scenes.
        details: Cameras seen in detail, and the size of these pictures [px].
    """

    patches: Tensor
    body: Tensor
    present: Tensor
    place: Tensor
    open: Tensor
    hidden: Tensor
    uv: Mapping[str, Tensor] = field(default_factory=dict)
    stores: Sequence[EpisodeStore] = ()
    details: Mapping[str, int] = field(default_factory=dict)

    def rows(self, index: Tensor) -> Some:
        """Some scenes."""
        return Some(
            patches=self.patches[index].float(),
            body=self.body[index],
            details=self._closer(index),
            present=self.present[index],
            place=self.place[index],
            open=self.open[index],
            hidden=self.hidden[index],
            uv={name: uv[index] for name, uv in self.uv.items()},
        )

    def _closer(self, index: Tensor) -> dict[str, Tensor]:
        found = {name: torch.empty(len(index), size, size, 3, dtype=torch.uint8) for name, size in self.details.items()}
        first = 0
        for store in self.stores if found else ():
            mine = (index >= first) & (index < first + store.num_episodes)
            if bool(mine.any()):
                rows = (index[mine] - first).numpy()
                for name, pictures in found.items():
                    pictures[mine] = torch.from_numpy(store.read_images(name + DETAIL, rows))
            first += store.num_episodes
        return found


def _details(wanted: Mapping[str, int] | None, stores: Sequence[EpisodeStore]) -> dict[str, int]:
    """What is seen in detail, checked before anything is computed.

    Raises:
        ConfigError: Not in all stores, or of a size that things cannot be looked for in.
    """
    common = details_of(stores)
    found = dict(common if wanted is None else wanted)
    for name, size in found.items():
        if common.get(name) != size:
            raise ConfigError(
                f"details: not every store has {size} px of camera {name!r}; all have {common or 'nothing'}. "
                f"Type: brachium record env=scenes_moving env.details.{name}={size}"
            )
        if any(name not in store.embodiment.camera_names for store in stores):
            raise ConfigError(f"details: expected cameras that every store has, got {name!r}")
        Spotter(size, 1)
    each = [[m.name for m in store.schema.maps if m.name.endswith(DETAIL)] for store in stores]
    if wanted is None and len({tuple(names) for names in each}) > 1:
        had = ", ".join(f"{store.path.name}: {names or 'nothing'}" for store, names in zip(stores, each))
        log(f"details are used that all stores have alike ({had})")
    log(f"seen in detail: {found or 'nothing'}")
    return found


def details_of(stores: Sequence[EpisodeStore]) -> dict[str, int]:
    """Cameras that all stores have in detail, at one size [px]."""
    each = [{m.name: m.shape[0] for m in store.schema.maps if m.name.endswith(DETAIL)} for store in stores]
    return {n.removesuffix(DETAIL): size for n, size in each[0].items() if all(e.get(n) == size for e in each)}


def universe_of(stores: Sequence[EpisodeStore]) -> Universe:
    """Every thing that is named in some scenes."""
    names = {name for store in stores for e in store.episodes for name in e.meta.get("names", ()) if name}
    return Universe(names=tuple(sorted(names)))


def scenes_of(
    stores: Sequence[EpisodeStore], model: Pretrained, universe: Universe, details: Mapping[str, int] | None = None
) -> Scenes:
    """Read labelled scenes once; cameras of `details` in detail, batch by batch.

    Raises:
        StoreError: Scenes that do not say what holds what (``brachium record env=scenes_skills`` makes some that do).
    """
    number = {name: k for k, name in enumerate(universe.names)}
    may = universe.may_hold()
    more = {TABLE: len(number), GRIPPER: len(number) + 1}
    patches, bodies, present, place, opened, hidden = [], [], [], [], [], []
    uv: dict[str, list[np.ndarray]] = {name: [] for name in details or {}}
    for store in stores:
        spec = store.embodiment
        state = torch.from_numpy(store.lowdim("state").astype(np.float32))
        with progress(f"vision of {store.path.name}", total=store.num_episodes, unit="scenes") as bar:
            for k in range(0, store.num_episodes, AT_ONCE):
                rows = np.arange(k, min(k + AT_ONCE, store.num_episodes))
                pictures = {name: store.read_images(name, rows) for name in spec.camera_names}
                images = stack_images(pictures, spec, torch.device("cpu"))
                assert isinstance(images, Tensor)
                patches.append(model.patches(images).flatten(1, 2).half())
                bar.update(len(rows))
        bodies.append(state[:, model.encoder.body])
        views = _views(store, details or {})
        for row, episode in enumerate(store.episodes):
            names, holders = episode.meta.get("names", ()), episode.meta.get("holders")
            if holders is None or episode.length != 1:
                raise StoreError(
                    f"{store.path}: expected scenes that say what holds what. Type: brachium record env=scenes_skills"
                )
            there, held = np.zeros(len(number), bool), np.full(len(number), -1, np.int64)
            for name, holder in zip(names, holders):
                if name is None:  # of a held-out pair: it has no name in these words
                    continue
                there[number[name]] = True
                if holder in more:
                    held[number[name]] = more[holder]
                elif holder is not None and may[number[name], number[holder]]:  # else it leans on what holds nothing
                    held[number[name]] = number[holder]
            drawer = episode.meta.get("drawer")
            unseen = np.zeros(len(number), bool)
            if drawer is not None and drawer < HALF[1]:
                unseen[[number[n] for n, holder in zip(names, holders) if n and holder == "drawer"]] = True
            hidden.append(unseen)
            for name, seen in views.items():
                where = np.full((len(number), 2), np.nan, np.float32)
                for k, thing in enumerate(names):
                    if thing and seen[row, k, 2] > 0 and not unseen[number[thing]]:
                        where[number[thing]] = seen[row, k, :2]
                uv[name].append(where)
            sure = drawer is not None and not HALF[0] < drawer < HALF[1]
            present.append(there)
            place.append(held)
            opened.append(float(drawer > HALF[1]) if sure and drawer is not None else float("nan"))
    return Scenes(
        patches=torch.cat(patches),
        body=torch.cat(bodies),
        present=torch.from_numpy(np.stack(present)),
        place=torch.from_numpy(np.stack(place)),
        open=torch.tensor(opened),
        hidden=torch.from_numpy(np.stack(hidden)),
        uv={name: torch.from_numpy(np.stack(found)) for name, found in uv.items()},
        stores=tuple(stores),
        details=dict(details or {}),
    )


def _views(store: EpisodeStore, cameras: Iterable[str]) -> dict[str, np.ndarray]:
    """Where the items of every scene are in some cameras: (n, items, 3), u, v and the depth [m]."""
    objects = store.lowdim("objects").astype(np.float32).reshape(-1, *store.schema.field("objects").shape)
    at = {name: 3 + 3 * k for k, name in enumerate(store.embodiment.camera_names)}
    return {name: objects[:, :, at[name] : at[name] + 3] for name in cameras}


@torch.no_grad()
def score(net: ReaderNet, scenes: Scenes, index: Tensor) -> dict[str, float]:
    """Shares of right answers: things one by one, whole sets of things, places of present things, drawers, scenes."""
    right: dict[str, list[Tensor]] = {key: [] for key in ("thing", "things", "place", "drawer", "scene")}
    for start in range(0, len(index), 256):
        some = scenes.rows(index[start : start + 256])
        found, present, place, is_open = some.read(net), some.present, some.place, some.open
        there = ((found.present > 0) == present) | some.hidden
        candidates = torch.cat([present, torch.ones_like(present[:, :2])], dim=1)
        best = found.place.masked_fill(~candidates[:, None], -torch.inf).argmax(2)
        known = place >= 0
        good = (best == place) | ~known
        drawer = ((found.open > 0) == (is_open > 0.5)) | ~is_open.isfinite()
        right["thing"].append(there.flatten())
        right["things"].append(there.all(1))
        right["place"].append((best == place)[known])
        right["drawer"].append(drawer[is_open.isfinite()])
        right["scene"].append(there.all(1) & good.all(1) & drawer)
    return {key: round(float(torch.cat(values).float().mean()), 4) for key, values in right.items()}


def train_reader(
    *,
    stores: Sequence[str],
    optimization: Optimization,
    vlm: str = "nano",
    init: str | None = None,
    details: Mapping[str, int] | None = None,
    heldout: int = 600,
    width: int = 96,
    depth: int = 3,
    out: str = "outputs/reader",
) -> int:
    """Train a scene reader for planners: what is there, what holds what, and whether the drawer is open.

    The pretrained model is frozen; its vision of every scene is computed once. Cameras that all stores have in detail
    (``record env=scenes_moving env.details.front=192``) say what is there, by where each thing is seen. An interrupted
    training goes on when the command is typed again. The result, ``OUT/reader``, is for ``eyes=reader``.

    Args:
        stores: Stores of labelled scenes (``brachium record env=scenes_skills``).
        optimization: How to train; a batch is of scenes.
        vlm: Pretrained model, ``nano`` or a folder.
        init: Reader to go on from, of the same vision; its things and sizes stay, and what it does not see in detail
            yet is added.
        details: Cameras to see in detail, and the size of these pictures [px], for example ``{front: 192}``; ``{}`` for
            none, and what all stores have when null.
        heldout: Scenes at the end kept for the scores.
        width, depth: Of the reader's layers.
        out: Folder.
    """
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    opened, model = [EpisodeStore.open(path) for path in stores], Pretrained.load(vlm)
    begun = None if init is None else _begun(init, vlm, universe_of(opened))
    universe = universe_of(opened) if begun is None else begun.universe
    seen = _details(details, opened)
    scenes = scenes_of(opened, model, universe, seen)
    count = len(scenes.body)
    if not 1 <= heldout < count:
        raise ConfigError(f"expected heldout from 1 to {count - 1}, the number of scenes less one, got {heldout}")
    with torch.random.fork_rng():
        torch.manual_seed(optimization.seed)
        net = ReaderNet(
            universe,
            vision=scenes.patches.shape[2],
            patches=dict.fromkeys(model.cameras, scenes.patches.shape[1] // len(model.cameras)),
            body=scenes.body.shape[1],
            details=seen,
            width=begun.net.at.shape[1] if begun is not None else width,
            depth=len(begun.net.layers) if begun is not None else depth,
        )
    net.body_mean, net.body_std = scenes.body.mean(0), scenes.body.std(0).clamp(min=LEAST_SPREAD)
    if begun is not None:
        _go_on(net, begun.net)
    net.train()

    def batch(step: int) -> Some:
        rng = np.random.default_rng([optimization.seed, step])
        return scenes.rows(torch.from_numpy(rng.integers(count - heldout, size=optimization.batch_size)))

    def loss(some: Some, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        reading = some.read(net)
        total, parts = reading_loss(reading, some.present, some.place, some.open, some.hidden)
        if reading.spots:
            seen_at = torch.stack([spot_loss(spot, some.uv[name]) for name, spot in reading.spots.items()]).mean()
            total, parts = total + 0.3 * seen_at, {**parts, "spots": seen_at.detach()}
        return total, parts

    loop = TrainLoop(
        name="reader",
        module=net,
        make_batch=batch,
        loss=loss,
        options=optimization,
        folder=folder,
        resume=True,
        identity={
            "data": [s.fingerprint for s in opened],
            "vlm": identity_of(vlm),
            "sizes": [width, depth, heldout, seen],
            "init": None if begun is None else [w.double().sum().item() for w in begun.net.state_dict().values()],
        },
    )
    loop.run()
    loop.use_average()
    scores = score(net.eval(), scenes, torch.arange(count - heldout, count))
    log("held-out scenes, share right: " + ", ".join(f"{key} {100 * value:.1f} %" for key, value in scores.items()))
    notes: dict[str, Any] = {"scores": scores, "scenes": count - heldout, "optimization": optimization.noted()}
    reader = SceneReader(net=net, universe=universe, model=model, notes=notes)
    path = reader.save(folder / "reader")
    SceneReader.load(path)  # what cannot be loaded is no result
    (folder / "scores.json").write_text(json.dumps(scores, indent=1) + "\n")
    log(f"{path}: saved and loaded again")
    return 0


def _begun(init: str, vlm: str, named: Universe) -> SceneReader:
    """The reader to go on from.

    Raises:
        ConfigError: The scenes name things that it does not know, or it reads another vision.
    """
    begun = SceneReader.load(init)
    unknown = sorted(set(named.names) - set(begun.universe.names))
    if unknown:
        raise ConfigError(f"init={init} does not know {', '.join(unknown)}: leave init out")
    ours, theirs = (model.encoder.backbone.state_dict() for model in (Pretrained.load(vlm), begun.model))
    if not all(torch.equal(ours[name], theirs[name]) for name in ours if "vision" in name):
        raise ConfigError(f"init={init} reads the vision of another model than vlm={vlm}: leave init out")
    return begun


def _go_on(net: ReaderNet, begun: ReaderNet) -> None:
    """Give a net what another knows, all but detail that they do not see alike.

    Raises:
        ConfigError: They are of other sizes.
    """
    known, own = begun.state_dict(), net.state_dict()
    strange = [name for name, size in begun.details.items() if net.details.get(name) != size]
    strange = [f"{part}.{name}." for name in strange for part in ("spotters", "spotted_near")]
    known = {key: value for key, value in known.items() if not key.startswith(tuple(strange))}
    common = {name: value for name, value in known.items() if name in own and own[name].shape == value.shape}
    if any(name not in common and not name.startswith("spotte") for name in own):
        raise ConfigError("init: the reader to go on from is of other sizes: leave init out")
    net.load_state_dict(own | common)
