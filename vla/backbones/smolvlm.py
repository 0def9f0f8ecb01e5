"""SmolVLM / Idefics3 backbones: SigLIP vision tower, pixel-shuffle connector, Llama-like language model.

The nano model and its large published relatives are loaded by this one code path, through `transformers`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, UInt8
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText

from ...errors import CheckpointError, ConfigError
from .base import BackboneFeatures


class SmolVLMBackbone(nn.Module):
    """A SmolVLM-family model with readout tokens.

    The sequence is ``[image tokens of every camera][text][readouts]``. Image tokens come first and attention is
    causal, so k texts about the same images share one image prefix.

    Args:
        source: Local directory or hub name of a pretrained model; None builds `config` with random weights.
        config: Configuration of the model (``model_type`` and what differs from its defaults).
        vocab_size: Size of the tokenizer; used with `config`.
        readouts: Number of learned tokens appended to each text (1 + number of roles).
        attention: Attention kernel of `transformers`: ``sdpa``, ``eager``, or ``auto``: `eager` in training on a CPU,
            where the backward pass of PyTorch's fused kernel is several times slower for short sequences, else `sdpa`.
    """

    def __init__(
        self,
        *,
        source: str | None = None,
        config: Mapping[str, Any] | None = None,
        vocab_size: int | None = None,
        readouts: int = 3,
        attention: str = "auto",
    ) -> None:
        super().__init__()
        self.attention = attention
        kernel = "sdpa" if attention == "auto" else attention
        if (source is None) == (config is None):
            raise ConfigError("a backbone needs either source (a directory or hub name) or config, and not both")
        if source is not None:
            self.vlm = _load_pretrained(source, kernel)
        else:
            self.vlm = AutoModelForImageTextToText.from_config(
                _build_config(dict(config or {}), vocab_size), attn_implementation=kernel
            )
        core = self.vlm.model
        missing = [part for part in ("vision_model", "connector", "text_model") if not hasattr(core, part)]
        if missing:
            raise ConfigError(f"{type(self.vlm).__name__} is no SmolVLM-family model: it has no {missing}")
        vision = self.vlm.config.vision_config
        self.image_size = int(vision.image_size)
        side = self.image_size // int(vision.patch_size)
        self.grid = (side, side)
        self.width = int(self.vlm.config.text_config.hidden_size)
        self.vision_width = int(vision.hidden_size)
        self.readouts = nn.Parameter(torch.randn(readouts, self.width) * 0.02)
        self.register_buffer("pixel_mean", torch.full((1, 3, 1, 1), 0.5))
        self.register_buffer("pixel_std", torch.tensor(0.5))

    def train(self, mode: bool = True) -> SmolVLMBackbone:
        """Switch between training and evaluation, and with `attention` ``auto`` between the kernels fast at each."""
        super().train(mode)
        if self.attention == "auto":
            slow_backward = mode and self.readouts.device.type == "cpu"
            self.vlm.set_attn_implementation("eager" if slow_backward else "sdpa")
        return self

    def resolved_config(self) -> dict[str, Any]:
        """The whole configuration, enough to build the same model without `source`."""
        return dict(self.vlm.config.to_dict())

    @torch.no_grad()
    def fit_pixels(self, images: UInt8[Tensor, "b n height width 3"]) -> None:
        """Set the pixel normalisation: each camera's mean image, and one standard deviation for all."""
        pixels = self._resize(images).float() / 255.0
        self.pixel_mean = pixels.mean(0)
        self.pixel_std = (pixels - self.pixel_mean).std().clamp(min=1e-3)

    def next_words(self, states: Float[Tensor, "*rest d"]) -> Float[Tensor, "*rest w"]:
        """Logits of the next token after each language-model state."""
        return self.vlm.lm_head(states)

    def look(self, pixels: Float[Tensor, "i 3 side side"]) -> Float[Tensor, "i p v"]:
        """Vision-tower features of normalised images of the tower's own size."""
        return self.vlm.model.vision_model(pixel_values=pixels).last_hidden_state

    def normalise(self, images: UInt8[Tensor, "b n height width 3"]) -> Float[Tensor, "b n 3 side side"]:
        """Images as the vision tower sees them."""
        return (self._resize(images).float() / 255.0 - self.pixel_mean) / self.pixel_std

    def _resize(self, images: UInt8[Tensor, "b n height width 3"]) -> Tensor:
        """(b, n, 3, S, S), still 0..255."""
        b, n = images.shape[:2]
        pixels = images.permute(0, 1, 4, 2, 3)
        size = self.image_size
        if pixels.shape[-2:] != (size, size):
            flat = nn.functional.interpolate(
                pixels.flatten(0, 1).float(), size=(size, size), mode="bilinear", antialias=True, align_corners=False
            )
            pixels = flat.reshape(b, n, 3, size, size)
        return pixels

    def forward(
        self,
        images: UInt8[Tensor, "b n height width 3"],
        tokens: Int[Tensor, "b k l"],
        token_mask: Bool[Tensor, "b k l"],
    ) -> BackboneFeatures:
        """Encode images and k texts about them."""
        b, n = images.shape[:2]
        k, length = tokens.shape[1:]
        core, count = self.vlm.model, self.readouts.shape[0]
        vision = self.look(self.normalise(images).flatten(0, 1))
        prefix = core.connector(vision).reshape(b, -1, self.width)
        words = core.text_model.get_input_embeddings()(tokens)
        asks = self.readouts.to(words.dtype).expand(b, k, count, self.width)
        suffix = torch.cat([words, asks], dim=2)
        mask, positions = shared_prefix_mask(prefix.shape[1], token_mask, count)
        states = core.text_model(
            inputs_embeds=torch.cat([prefix, suffix.reshape(b, -1, self.width)], dim=1),
            position_ids=positions,
            attention_mask=torch.zeros_like(mask, dtype=prefix.dtype).masked_fill(~mask, torch.finfo(prefix.dtype).min),
            use_cache=False,
        ).last_hidden_state
        m = prefix.shape[1]
        after = states[:, m:].reshape(b, k, length + count, self.width)
        return BackboneFeatures(
            vision=vision.reshape(b, n, -1, self.vision_width),
            grid=self.grid,
            image=states[:, :m],
            text=after[:, :, :length],
            text_mask=token_mask,
            readout=after[:, :, length:],
        )


def shared_prefix_mask(
    prefix: int, token_mask: Bool[Tensor, "b k l"], readouts: int
) -> tuple[Bool[Tensor, "b 1 q q"], Int[Tensor, "b q"]]:
    """Attention mask and positions of ``[prefix][text 1][readouts]...[text k][readouts]``.

    The prefix is causal; a text sees the prefix and, causally, itself. Padding is seen by nobody but itself (a row
    without any key has no softmax).
    """
    b, k, length = token_mask.shape
    each, device = length + readouts, token_mask.device
    real = torch.cat([token_mask, torch.ones(b, k, readouts, dtype=torch.bool, device=device)], dim=2)
    total = prefix + k * each
    mask = torch.zeros(b, total, total, dtype=torch.bool, device=device)
    mask[:, :prefix, :prefix] = torch.ones(prefix, prefix, dtype=torch.bool, device=device).tril()
    mask[:, prefix:, :prefix] = True
    causal = torch.ones(each, each, dtype=torch.bool, device=device).tril()
    block = torch.kron(torch.eye(k, device=device), causal.float()).bool()
    mask[:, prefix:, prefix:] = block & real.reshape(b, 1, -1)
    mask |= torch.eye(total, dtype=torch.bool, device=device)
    steps = prefix + (real.cumsum(dim=2) - 1).clamp(min=0)
    before = torch.arange(prefix, device=device).expand(b, prefix)
    return mask[:, None], torch.cat([before, steps.reshape(b, -1)], dim=1)


def _load_pretrained(source: str, attention: str) -> Any:
    """The model at `source`, whole, with float32 weights (published ones are bf16, and training needs the digits)."""
    try:
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            source, attn_implementation=attention, dtype=torch.float32, output_loading_info=True
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(
            f"cannot load a backbone from {source!r}: {error}\n"
            "Expected a directory with config.json and safetensors weights, or a hub name that can be reached."
        ) from error
    vlm, info = loaded
    missing = sorted(key for key in info["missing_keys"] if not key.startswith("lm_head."))
    if missing:  # transformers would go on with random numbers in their place
        raise CheckpointError(
            f"cannot load a backbone from {source!r}: {len(missing)} weights are missing, for example {missing[:3]}"
        )
    return vlm


def _build_config(config: dict[str, Any], vocab_size: int | None) -> Any:
    model_type = config.pop("model_type", None)
    if model_type is None:
        raise ConfigError("a backbone config needs model_type, for example smolvlm or idefics3")
    if vocab_size is not None and not config.get("_resolved"):
        text = {**config.get("text_config", {}), "vocab_size": vocab_size, "pad_token_id": 0}
        config |= {"text_config": text, "pad_token_id": 0, "image_token_id": 1}
    config.pop("_resolved", None)
    try:
        return AutoConfig.for_model(model_type, **config)
    except (KeyError, ValueError) as error:
        raise ConfigError(f"transformers knows no model type {model_type!r}: {error}") from error
