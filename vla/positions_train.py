"""The verb ``brachium train-positions``: where things are, from where cameras see them, for a pretrained model.

Pointing in images is learnt from pictures; the way from points in all images and the hand's pose to a position in the
base frame is a small network of its own. Still scenes, where most things lie on the table below a hand that points
straight down, teach it little about heights and tilts. What a frozen model points at in scenes of an arm at work
teaches it in minutes, also for cameras that stand elsewhere.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..console import log, progress
from ..datasets.store import EpisodeStore
from ..errors import ConfigError, StoreError
from .ground import LABEL, Grounding, SceneData
from .grounding import METRES, Glimpse, PointReadout
from .loop import TrainLoop
from .optim import Optimization
from .pretrain_data import same_body
from .pretrained import Pretrained, identity_of
from .tokenizer import InstructionEncoder

AT_ONCE = 50
"""Scenes that are looked at together."""


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What a model points at in n scenes with k texts, and where it is.

    Attributes:
        found: Points and what is seen there; seen and role in half precision, logits left out.
        body: Poses of the tool.
        position: True positions [m].
    """

    found: Glimpse
    body: Float[Tensor, "n s"]
    position: Float[Tensor, "n k r 3"]

    def __len__(self) -> int:
        return len(self.body)

    def rows(self, index: Tensor | slice) -> Seen:
        """Some scenes, in full precision."""
        found = Glimpse(**{name: value[index].float() for name, value in vars(self.found).items()})
        return Seen(found=found, body=self.body[index], position=self.position[index])


def joined(parts: Sequence[Seen]) -> Seen:
    """The scenes of several."""
    found = {name: torch.cat([getattr(part.found, name) for part in parts]) for name in vars(parts[0].found)}
    body, position = (torch.cat([getattr(part, name) for part in parts]) for name in ("body", "position"))
    return Seen(found=Glimpse(**found), body=body, position=position)


@torch.no_grad()
def seen_of(store: EpisodeStore, model: Pretrained, sentences: int) -> Seen:
    """Point at what the sentences of every scene name."""
    encoder, readout = model.encoder, model.encoder.point_readout
    if readout is None:
        raise ConfigError("this model does not point")
    encode = InstructionEncoder(model.tokenizer, model.recipe.max_tokens)
    options = Grounding(store=str(store.path), sentences=sentences, heldout=0)
    data = SceneData(store, encode, options, torch.device("cpu"), evaluation=True)
    parts = []
    with progress(f"pointing in {store.path.name}", total=len(data.heldout), unit="scenes") as bar:
        for start in range(0, len(data.heldout), AT_ONCE):
            batch = data.batch(data.heldout[start : start + AT_ONCE], None)
            found = readout.look_up(encoder.read(batch.images, batch.tokens), slice(None))
            found = replace(found, logits=found.logits[..., :0], seen=found.seen.half(), role=found.role.half())
            parts.append(Seen(found=found, body=batch.state[:, encoder.body], position=batch.objects[..., :3]))
            bar.update(len(batch.state))
    return joined(parts)


def scattered(seen: Seen, noise: float, generator: torch.Generator) -> Seen:
    """The same with points moved by about `noise`, a share of the image: in new scenes they are less exact."""
    uv = seen.found.uv
    return replace(seen, found=replace(seen.found, uv=uv + noise * torch.randn(uv.shape, generator=generator)))


@torch.no_grad()
def errors_of(readout: PointReadout, seen: Seen) -> dict[str, float]:
    """Distance between positions and truth [mm]: median and 90th percentile of all, and of what is not on the table."""
    error = (readout.locate(seen.found, seen.body) - seen.position).norm(dim=-1).flatten() * 1000
    lifted = seen.position[..., 2].flatten() > LIFTED
    levels = torch.tensor([0.5, 0.9])
    result = dict(zip(("position_mm", "position_mm_p90"), error.quantile(levels).tolist()))
    if lifted.any():
        result |= dict(zip(("lifted_mm", "lifted_mm_p90"), error[lifted].quantile(levels).tolist()))
    return {key: round(value, 2) for key, value in result.items()}


LIFTED = 0.03
"""What has its middle above this height stands on something, or is in the hand [m]."""


def train_positions(
    *,
    stores: Sequence[str],
    optimization: Optimization,
    vlm: str = "nano",
    sentences: int = 3,
    noise: float = 0.003,
    heldout: int = 1000,
    out: str = "outputs/positions",
    resume: bool = False,
) -> int:
    """Learn where things are from where a pretrained model points, on scenes of an arm at work.

    The model's vision and language stay as they are; only the small network from points, what is seen there and the
    hand's pose to positions is trained. The result is the whole model, ``OUT/model``, for ``encoder=``, ``vlm=`` and
    ``brachium ask``.

    Args:
        stores: Stores of labelled scenes (``brachium record env=scenes_moving``), of one or several robots.
        optimization: How to train; a batch is of scenes.
        vlm: Pretrained model, ``nano`` or a folder.
        sentences: Sentences of each scene that are pointed at.
        noise: Points are moved by about so much in training [share of the image].
        heldout: Scenes at the end of each store kept for the scores.
        out: Folder.
        resume: Go on from what is saved in `out`.
    """
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    opened, model = [EpisodeStore.open(path) for path in stores], Pretrained.load(vlm)
    cameras, body = same_body(opened)
    readout = model.encoder.point_readout
    if readout is None or (len(model.cameras), tuple(model.encoder.body)) != (cameras, body):
        raise ConfigError(
            f"vlm={vlm} has {len(model.cameras)} cameras and the tool pose at {model.encoder.body} of the state, these "
            f"scenes {cameras} and {list(body)}"
        )
    kept, held, ends = [], [], []
    for store in opened:
        if LABEL not in store.schema.fields:
            raise StoreError(
                f"{store.path} does not say where things are. Type: brachium record env=scenes_moving out=SCENES"
            )
        if not 1 <= heldout < store.num_episodes:
            raise ConfigError(f"{store.path}: expected heldout from 1 to {store.num_episodes - 1}, got {heldout}")
        seen = seen_of(store, model, sentences)
        held.append(seen.rows(slice(len(seen) - heldout, None)))
        kept.append(seen)
        ends.append(len(seen) - heldout)
    before = [errors_of(readout, some) for some in held]
    data = joined(kept)
    starts = np.cumsum([0, *(len(some) for some in kept[:-1])])
    train = torch.from_numpy(np.concatenate([np.arange(start, start + end) for start, end in zip(starts, ends)]))
    readout.fit(data.body[train], data.position[train].flatten(0, -2).mean(0))
    model.encoder.requires_grad_(False)
    trained = nn.ModuleDict({"appearance": readout.appearance, "position": readout.position}).requires_grad_(True)

    def batch(step: int) -> Seen:
        rng = np.random.default_rng([optimization.seed, step, 0x905])
        return data.rows(train[torch.from_numpy(rng.integers(len(train), size=optimization.batch_size))])

    def loss(some: Seen, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        some = scattered(some, noise, generator)
        return (readout.locate(some.found, some.body) - some.position).abs().mean() / METRES, {}

    def scores() -> dict[str, float]:
        return {
            f"{s.path.name}/{key}": v for s, some in zip(opened, held) for key, v in errors_of(readout, some).items()
        }

    loop = TrainLoop(
        name="positions",
        module=trained,
        make_batch=batch,
        loss=loss,
        options=optimization,
        folder=folder,
        resume=resume,
        evaluate=scores,
        identity={
            "data": [store.fingerprint for store in opened],
            "vlm": identity_of(vlm),
            "options": [sentences, noise, heldout],
        },
    )
    metrics = loop.run()
    loop.use_average()
    for store, some, old in zip(opened, held, before):
        new = errors_of(readout, some)
        told = ", ".join(f"{key} {old[key]:.1f} -> {new[key]:.1f}" for key in old)
        log(f"held-out scenes of {store.path}: {told}")
    notes = {**model.notes, "positions": {"metrics": metrics, "of": identity_of(vlm), "scenes": len(train)}}
    path = replace(model, notes=notes).save(folder / "model")
    Pretrained.load(path)  # what cannot be loaded is no result
    (folder / "scores.json").write_text(json.dumps(metrics, indent=1) + "\n")
    log(f"{path}: saved and loaded again")
    return 0
