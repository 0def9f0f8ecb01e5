"""Pretrained editors of images and video models of `diffusers` in place of those trained here (extra ``diffusers``).

Any pipeline that takes an image and gives images (`StableDiffusionInstructPix2PixPipeline`, `FluxKontextPipeline`,
`QwenImageEditPlusPipeline`) or frames (`StableVideoDiffusionPipeline`, `CogVideoXImageToVideoPipeline`,
`WanImageToVideoPipeline`, `LTXImageToVideoPipeline`), from a local folder or by its hub name. A pretrained editor knows
what things are; what a subgoal so many steps ahead looks like it learns by finetuning on robot data, as SuSIE's did.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from ...errors import ConfigError, NotFoundError
from ...vla.generative.system import SubgoalSystem
from .imagine import Futures


def load_pipeline(path: str, device: str, dtype: str) -> Any:
    """A pipeline from a local folder or the hub.

    Raises:
        ConfigError: diffusers is not installed, or a dtype that torch does not have.
        NotFoundError: No pipeline there.
    """
    try:
        from diffusers import DiffusionPipeline
    except ImportError as error:
        raise ConfigError(
            "this planner needs diffusers, which is not installed. Type: pip install 'brachium[diffusers]'"
        ) from error
    kind = getattr(torch, dtype, None)
    if not isinstance(kind, torch.dtype):
        raise ConfigError(f"expected dtype to be float32, bfloat16 or float16, got {dtype!r}")
    try:
        pipeline = DiffusionPipeline.from_pretrained(path, torch_dtype=kind)
    except (OSError, ValueError) as error:
        raise NotFoundError(
            f"no diffusers pipeline at {path}. Expected a folder with model_index.json, or a hub name such as "
            f"timbrooks/instruct-pix2pix\n{error}"
        ) from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


class DiffusersImaginer:
    """What editors and video models have in common.

    Args:
        system: Says which cameras are generated.
        path: Folder or hub name of a pipeline.
        ahead: Steps of control from the present to its last picture.
        frames: Pictures to take of what it gives, evenly spaced, the last one included.
        size: Side of the images it is given [pixels]; a multiple of what it works on.
        options: What its call is given beside image, prompt and generator, such as ``guidance_scale``.
        device, dtype: Where it runs.
    """

    def __init__(
        self,
        *,
        system: SubgoalSystem,
        path: str,
        ahead: int,
        frames: int,
        size: int,
        options: Mapping[str, Any] | None,
        device: str,
        dtype: str,
    ) -> None:
        if ahead < 1 or frames < 1 or ahead % frames:
            raise ConfigError(f"expected ahead to be a multiple of frames, both from 1, got {ahead} and {frames}")
        self.cameras, self.path, self.steps, self.frames = system.cameras, path, ahead // frames, frames
        self.size, self.device, self.options = size, device, dict(options or {})
        self.pipeline = load_pipeline(path, device, dtype)
        self._takes = set(inspect.signature(self.pipeline.__call__).parameters)
        unknown = sorted(set(self.options) - self._takes)
        if "image" not in self._takes or unknown:
            what = f"takes no {unknown}" if unknown else "takes no image"
            raise ConfigError(f"{type(self.pipeline).__name__} of {path} {what}")

    def imagine(self, images: Mapping[str, np.ndarray], text: str, count: int, seed: Sequence[int]) -> Futures:
        """See `Imaginer`; each camera is imagined for itself."""
        found: dict[str, np.ndarray] = {}
        for k, name in enumerate(self.cameras):
            picture = Image.fromarray(images[name]).resize((self.size, self.size), Image.Resampling.BICUBIC)
            futures = []
            for draw in range(count):  # one at a time: memory, and each draw has a seed of its own
                number = int(np.random.SeedSequence([*seed, k, draw]).generate_state(1)[0])
                futures.append(self._draw(picture, text, torch.Generator(self.device).manual_seed(number)))
            found[name] = np.stack(futures)
        return Futures(frames=found, steps=self.steps)

    def _draw(self, picture: Image.Image, text: str, generator: torch.Generator) -> np.ndarray:
        """One future, uint8 (f, height, width, 3)."""
        told = {"prompt": text} if "prompt" in self._takes else {}
        with torch.no_grad():
            result = self.pipeline(image=picture, generator=generator, **told, **self.options)
        pictures = result.images if hasattr(result, "images") else result.frames[0]
        if len(pictures) < self.frames:
            raise ConfigError(f"{self.path} gave {len(pictures)} pictures, expected at least frames={self.frames}")
        chosen = np.linspace(0, len(pictures) - 1, self.frames + 1)[1:].round().astype(int)
        chosen = chosen if self.frames > 1 else np.array([len(pictures) - 1])
        return np.stack([np.asarray(pictures[k].convert("RGB"), np.uint8) for k in chosen.tolist()])


class DiffusersEditor(DiffusersImaginer):
    """An editor of images: InstructPix2Pix and its like.

    Args:
        system, path, size, options, device, dtype: See `DiffusersImaginer`.
        ahead: Steps of control that its edits lie ahead.
    """

    def __init__(
        self,
        *,
        system: SubgoalSystem,
        path: str,
        ahead: int = 8,
        size: int = 256,
        options: Mapping[str, Any] | None = None,
        device: str = "cpu",
        dtype: str = "float32",
    ) -> None:
        super().__init__(
            system=system, path=path, ahead=ahead, frames=1, size=size, options=options, device=device, dtype=dtype
        )


class DiffusersVideo(DiffusersImaginer):
    """A model that goes on from an image: Stable Video Diffusion, CogVideoX and their like.

    Args:
        system, path, size, options, device, dtype: See `DiffusersImaginer`.
        ahead: Steps of control that its last frame lies ahead.
        frames: Frames to follow; its own are thinned out evenly.
    """

    def __init__(
        self,
        *,
        system: SubgoalSystem,
        path: str,
        ahead: int = 12,
        frames: int = 6,
        size: int = 256,
        options: Mapping[str, Any] | None = None,
        device: str = "cpu",
        dtype: str = "float32",
    ) -> None:
        super().__init__(
            system=system, path=path, ahead=ahead, frames=frames, size=size, options=options, device=device, dtype=dtype
        )
