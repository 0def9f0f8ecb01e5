"""A pretrained vision-language model in a folder: weights in Hugging Face's layout, and what it points with.

What `AutoModelForImageTextToText` and `AutoTokenizer` load is ``config.json``, ``model.safetensors`` and the tokenizer.
``pointing.safetensors`` holds the learned readout tokens and the point readout, ``brachium.json`` how they fit.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import CheckpointError, ConfigError, NotFoundError, SpecMismatchError
from .backbones.source import quiet
from .card import model_card
from .checkpoint import replace_folder, unshared
from .encoder import Encoder, build_encoder
from .questions import QuestionEncoder, location_tokens
from .recipe import Recipe
from .tokenizer import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT = 1
FILES = ("brachium.json", "config.json", "model.safetensors", "pointing.safetensors")
LONGEST = 32
"""Tokens of an answer at most."""


SHIPPED = Path(__file__).parent / "assets"
"""Models that come with the package, each in a folder of its name."""


def find_pretrained(name: str | Path) -> Path:
    """The folder of a pretrained model: one that is given, or one that comes with the package."""
    if (SHIPPED / name).is_dir() and not (Path(name) / "brachium.json").exists():
        return SHIPPED / name
    if Path(name).is_dir():
        return Path(name)
    shipped = sorted(path.name for path in SHIPPED.glob("*/"))
    raise NotFoundError(f"no pretrained model at {name}. Expected a folder that brachium pretrain made, or {shipped}")


def is_pretrained(name: str | Path) -> bool:
    """Whether `name` is a pretrained model, not a policy's checkpoint."""
    try:
        return (find_pretrained(name) / "brachium.json").exists()
    except NotFoundError:
        return False


def identity_of(name: str | Path) -> str:
    """Digest of a model's weights: changes when they do."""
    digest = hashlib.sha256()
    path = find_pretrained(name)
    for file in sorted(path.glob("*.safetensors")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


@dataclass(frozen=True, kw_only=True)
class Located:
    """A place in an image: 0..1 from the left and the top edge, and how likely the thing is inside the image."""

    u: float
    v: float
    visible: float


@dataclass(frozen=True, kw_only=True)
class Pretrained:
    """A pretrained encoder with its tokenizer.

    Attributes:
        encoder: Backbone and point readout.
        tokenizer: With location tokens.
        recipe: Its backbone node builds the same architecture.
        cameras: Names of the cameras it was trained with; fewer may be asked about.
        notes: Data, compute, scores.
    """

    encoder: Encoder
    tokenizer: PreTrainedTokenizerBase
    recipe: Recipe
    cameras: tuple[str, ...]
    notes: Mapping[str, Any] = field(default_factory=dict)

    def save(self, path: str | Path) -> Path:
        """Write the folder; it appears whole or not at all, and replaces an older one."""
        path = Path(path)
        temporary = path.with_name(path.name + ".partial")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        backbone: Any = self.encoder.backbone
        with quiet():
            backbone.vlm.save_pretrained(str(temporary))
        self.tokenizer.save_pretrained(str(temporary))
        rest = {k: v for k, v in self.encoder.state_dict().items() if not k.startswith("backbone.vlm.")}
        save_file(unshared(rest), temporary / "pointing.safetensors")
        meta = {
            "format": FORMAT,
            "recipe": self.recipe.to_dict(),
            "body": self.encoder.body,
            "cameras": self.cameras,
            "notes": dict(self.notes),
        }
        (temporary / "brachium.json").write_text(json.dumps(meta, indent=1, default=str) + "\n")
        if "metrics" in self.notes:
            (temporary / "README.md").write_text(model_card(self.notes))
        replace_folder(path, temporary)
        return path

    @classmethod
    def load(cls, path: str | Path) -> Pretrained:
        """Load a folder that `save` wrote.

        Raises:
            NotFoundError: No such folder.
            CheckpointError: Incomplete, damaged, or of another format.
        """
        path = find_pretrained(path)
        missing = [name for name in FILES if not (path / name).exists()]
        if missing:
            raise CheckpointError(f"{path} is no pretrained model: expected {list(FILES)}, missing {missing}")
        try:
            meta = json.loads((path / "brachium.json").read_text())
            if meta["format"] != FORMAT:
                raise CheckpointError(f"{path}: expected format {FORMAT}, got {meta['format']}")
            recipe = Recipe.from_dict(meta["recipe"])
            body, cameras = tuple(int(k) for k in meta["body"]), tuple(str(name) for name in meta["cameras"])
            notes = dict(meta["notes"])
            rest = load_file(path / "pointing.safetensors")
        except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
            raise CheckpointError(f"{path} is damaged: {type(error).__name__}: {error}") from error
        tokenizer = load_tokenizer(str(path))
        lacking = [name for name in ("pad", "bos", "eos") if getattr(tokenizer, f"{name}_token_id") is None]
        if lacking or not location_tokens(tokenizer):
            raise CheckpointError(
                f"{path}: expected a tokenizer with padding, begin, end and location tokens, got one without "
                f"{lacking or '<loc00>'}"
            )
        node = {k: v for k, v in recipe.backbone.items() if k != "config"}
        loaded = replace(recipe, backbone={**node, "path": str(path)})
        encoder = build_encoder(
            loaded, vocab_size=len(tokenizer), pad_id=int(tokenizer.pad_token_id), cameras=len(cameras), body=body
        )
        backbone: Any = encoder.backbone
        try:
            backbone.pixel_mean = rest["backbone.pixel_mean"].clone()
            lacking, extra = encoder.load_state_dict(rest, strict=False)
        except (KeyError, RuntimeError) as error:  # weights of other sizes: of another version
            raise CheckpointError(f"{path}: pointing.safetensors does not fit: {error}") from error
        lacking = [name for name in lacking if not name.startswith("backbone.vlm.")]
        if lacking or extra:
            raise CheckpointError(f"{path}: pointing.safetensors does not fit: lacks {lacking[:3]}, has {extra[:3]}")
        return cls(encoder=encoder.eval(), tokenizer=tokenizer, recipe=recipe, cameras=cameras, notes=notes)

    @torch.no_grad()
    def patches(self, images: UInt8[Tensor, "b n height width 3"]) -> Float[Tensor, "b n p v"]:
        """What the vision tower sees, before words: p patches a camera, row by row."""
        backbone: Any = self.encoder.backbone
        seen = backbone.family.look(backbone.normalise(images).flatten(0, 1))
        return seen.patches.reshape(*images.shape[:2], -1, backbone.vision_width).float()

    @torch.no_grad()
    def answer(self, images: np.ndarray | Sequence[np.ndarray], question: str) -> str:
        """Answer a question about one image, or one image a camera.

        Args:
            images: uint8 (height, width, 3), one or several of one size.
            question: In the words of `envs.questions`.

        Returns:
            The likeliest answer, token by token.
        """
        pixels = self._pixels(images)
        encode = QuestionEncoder(self.tokenizer, LONGEST)
        if not question.strip():
            raise ConfigError("expected a question, got none")
        tokens = encode.prompt(question)
        said: list[int] = []
        backbone: Any = self.encoder.backbone
        for _ in range(LONGEST):
            row = torch.tensor([[tokens + said]])
            features = backbone(pixels, row, torch.ones_like(row, dtype=torch.bool))
            token = int(backbone.next_words(features.text[0, 0, -1]).argmax())
            if token == encode.end:
                break
            said.append(token)
        return str(self.tokenizer.decode(said)).strip()

    @torch.no_grad()
    def locate(self, image: np.ndarray, phrase: str, view: int = 0) -> Located:
        """Where a thing is in an image.

        Args:
            image: uint8 (height, width, 3).
            phrase: What to find, for example ``the red cube``.
            view: Number of the camera that took it, in the order of training.
        """
        if not phrase.strip():
            raise ConfigError("expected what to find, got nothing")
        if not 0 <= view < len(self.cameras):
            raise SpecMismatchError(f"expected a view from 0 to {len(self.cameras) - 1}, got {view}")
        readout = self.encoder.point_readout
        if readout is None:
            raise ConfigError("this model does not point")
        ids = self.tokenizer(phrase.strip(), add_special_tokens=False)["input_ids"]
        features = self.encoder.read(self._pixels(image), torch.tensor([[ids]]))
        found = readout.look_up(features, slice(view, view + 1))
        u, v = found.uv[0, 0, 0, 0].clamp(0.0, 1.0).tolist()
        return Located(u=u, v=v, visible=float(found.visible[0, 0, 0, 0].sigmoid()))

    def _pixels(self, images: np.ndarray | Sequence[np.ndarray]) -> torch.Tensor:
        views = [images] if isinstance(images, np.ndarray) and images.ndim == 3 else list(images)
        for view in views:
            if not isinstance(view, np.ndarray) or view.dtype != np.uint8 or view.ndim != 3 or view.shape[-1] != 3:
                what = f"{view.dtype} {view.shape}" if isinstance(view, np.ndarray) else type(view).__name__
                raise SpecMismatchError(f"expected images as uint8 (height, width, 3), got {what}")
        if not 1 <= len(views) <= len(self.cameras) or len({view.shape for view in views}) > 1:
            shapes = [view.shape for view in views]
            raise SpecMismatchError(f"expected 1 to {len(self.cameras)} images of one size, got {shapes}")
        return torch.from_numpy(np.stack(views))[None]
