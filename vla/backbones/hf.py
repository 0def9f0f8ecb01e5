"""Any vision-language model of `transformers` as a backbone: readout tokens, several texts on one image prefix.

The nano model and its large published relatives are loaded by this one code path. What differs from family to family
(SmolVLM, PaliGemma, Qwen-VL) is in a file each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, UInt8
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForImageTextToText
from transformers.utils import logging as hf_logging

from ...errors import CheckpointError, ConfigError, did_you_mean
from .base import BackboneFeatures, VLMFamily
from .packed import KERNEL, Packing
from .paligemma import PaliGemma
from .qwen_vl import QwenVL
from .smolvlm import SmolVLM
from .source import cannot_load, require_model_folder

FAMILIES: tuple[type[VLMFamily], ...] = (SmolVLM, PaliGemma, QwenVL)


class HFBackbone(nn.Module):
    """A vision-language model with readout tokens.

    The sequence is ``[images of every camera][text][readouts]``. The images come first and never look at texts, so k
    texts about the same images share one image prefix. Texts are causal, and so are the images where the family's are;
    PaliGemma's images see each other, its prompts are causal here, not two-way as in its own training.

    Args:
        path: Local directory or hub name of a pretrained model; None builds `config` with random weights.
        config: Configuration of the model (``model_type`` and what differs from its defaults).
        vocab_size: Size of the tokenizer; used with `config`.
        readouts: Number of learned tokens appended to each text (1 + number of roles).
        image_size: Edge at which images enter the vision tower [px]; None for the model's own.
        attention: Attention kernel of `transformers`: ``sdpa``, ``eager``, ``packed`` (`packed_attention`), or
            ``auto``: `packed` in training, else `sdpa`.
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(
        self,
        *,
        path: str | None = None,
        config: Mapping[str, Any] | None = None,
        vocab_size: int | None = None,
        readouts: int = 3,
        image_size: int | None = None,
        attention: str = "auto",
    ) -> None:
        super().__init__()
        self.attention = attention
        kernel = "sdpa" if attention == "auto" else attention
        if (path is None) == (config is None):
            raise ConfigError("a backbone needs either path (a directory or hub name) or config, and not both")
        if path is not None:
            self.vlm = _load_pretrained(path, kernel)
            _require_room(self.vlm, vocab_size, path)
        else:
            self.vlm = _build(dict(config or {}), vocab_size, kernel)
        self.family = _family_of(self.vlm, image_size)
        self.image_size, self.grid = self.family.image_size, self.family.grid
        self.token_grid = self.family.token_grid
        self.width = int(self.vlm.config.text_config.hidden_size)
        self.vision_width = self.family.vision_width
        self.readouts = nn.Parameter(torch.randn(readouts, self.width) * 0.02)
        mean, std = self.family.pixels
        self.register_buffer("pixel_mean", torch.tensor(mean).reshape(1, 3, 1, 1))
        self.register_buffer("pixel_std", torch.tensor(std).reshape(1, 3, 1, 1))

    def train(self, mode: bool = True) -> HFBackbone:
        """Switch between training and evaluation, and with `attention` ``auto`` between the kernels fast at each."""
        super().train(mode)
        if self.attention == "auto":
            capped = getattr(self.vlm.config.text_config, "attn_logit_softcapping", None)  # of Gemma 2; sdpa ignores it
            self.vlm.set_attn_implementation(KERNEL if mode or capped else "sdpa")
        return self

    @property
    def _packs(self) -> bool:
        return str(self.vlm.config.text_config._attn_implementation) == KERNEL

    def resolved_config(self) -> dict[str, Any]:
        """The whole configuration, enough to build the same model without `path`."""
        return dict(self.vlm.config.to_dict())

    @torch.no_grad()
    def fit_pixels(self, images: UInt8[Tensor, "b n height width 3"]) -> None:
        """Set the pixel normalisation: each camera's mean image, and one standard deviation for all."""
        pixels = self._resize(images).float() / 255.0
        self.pixel_mean = pixels.mean(0)
        self.pixel_std = (pixels - self.pixel_mean).std().clamp(min=1e-3).expand_as(self.pixel_std).clone()

    def next_words(self, states: Float[Tensor, "*rest d"]) -> Float[Tensor, "*rest w"]:
        """Logits of the next token after each language-model state."""
        return self.vlm.get_output_embeddings()(states)

    def look(self, pixels: Float[Tensor, "i 3 side side"]) -> Float[Tensor, "i p v"]:
        """Vision-tower features of normalised images of the tower's own size, row by row."""
        return self.family.look(pixels).patches

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
        watch: tuple[int, ...] = (),
    ) -> BackboneFeatures:
        """Encode images and k texts about them; `watch` names layers whose attention is wanted (kernel `packed`)."""
        b, n = images.shape[:2]
        k, length = tokens.shape[1:]
        count = self.readouts.shape[0]
        seen = self.family.look(self.normalise(images).flatten(0, 1))
        prefix, visual = self.family.prefix(seen.tokens.unflatten(0, (b, n)))
        words = self.vlm.get_input_embeddings()(tokens)
        asks = self.readouts.to(words.dtype).expand(b, k, count, self.width)
        suffix = torch.cat([words, asks], dim=2)
        m = prefix.shape[1]
        steps, packing = pack(m, token_mask, count, two_way=self.family.two_way)
        mask = None if self._packs else unpacked(packing, prefix.dtype)
        before, start = self.family.positions(n)
        before = before.to(steps.device)
        if watch and not self._packs:
            raise ConfigError(f"to watch attention the model must run with attention=packed, got {self.attention}")
        with _watched(self.family.language_model.layers, watch) as watched:
            states = self.family.read(
                torch.cat([prefix, suffix.reshape(b, -1, self.width)], dim=1),
                mask,
                torch.cat([before[:, None].expand(-1, b, -1), (start + steps).expand(len(before), -1, -1)], dim=2),
                visual,
                seen.deep,
                packing if self._packs else None,
            )
        shares = [weights[:, 0][..., visual] for weights in watched]
        after = states[:, m:].reshape(b, k, length + count, self.width)
        return BackboneFeatures(
            vision=seen.patches.reshape(b, n, -1, self.vision_width),
            grid=self.grid,
            image=states[:, :m],
            text=after[:, :, :length],
            text_mask=token_mask,
            readout=after[:, :, length:],
            tokens=seen.tokens.unflatten(0, (b, n)),
            attention=tuple(share.unflatten(1, (k, length + count))[:, :, :length] for share in shares),
        )


@contextmanager
def _watched(layers: Any, numbers: tuple[int, ...]) -> Iterator[list[Tensor]]:
    """Collect, of some layers, the attention of text tokens to the prefix, (b, heads, t, m) each, as the block runs."""
    found: dict[int, Tensor] = {}
    result: list[Tensor] = []

    def keep(number: int) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            found[number] = output[1]

        return hook

    if any(not 0 <= number < len(layers) for number in numbers):
        raise ConfigError(f"expected layers to watch from 0 to {len(layers) - 1}, got {numbers}")
    handles = [layers[number].self_attn.register_forward_hook(keep(number)) for number in numbers]
    try:
        yield result
    finally:
        for handle in handles:
            handle.remove()
    result += [found[number] for number in numbers]


def pack(
    prefix: int, token_mask: Bool[Tensor, "b k l"], readouts: int, *, two_way: bool = False
) -> tuple[Int[Tensor, "b t"], Packing]:
    """Steps after the prefix of ``[prefix][text 1][readouts]...[text k][readouts]``, and who sees whom.

    The prefix is causal, or `two_way`; a text sees the prefix and, causally, itself. Padding is seen by nobody but
    itself (a row without any key has no softmax).
    """
    b, k, length = token_mask.shape
    each, device = length + readouts, token_mask.device
    real = torch.cat([token_mask, torch.ones(b, k, readouts, dtype=torch.bool, device=device)], dim=2)
    causal = torch.ones(each, each, dtype=torch.bool, device=device).tril()
    own = causal & real[:, :, None] | torch.eye(each, dtype=torch.bool, device=device)
    images = torch.ones(prefix, prefix, dtype=torch.bool, device=device)
    steps = (real.cumsum(dim=2) - 1).clamp(min=0).reshape(b, -1)
    return steps, Packing(prefix=images if two_way else images.tril(), own=own)


def unpacked(packing: Packing, dtype: torch.dtype) -> Float[Tensor, "b 1 q q"]:
    """The same as one additive mask, for kernels that know no packing."""
    b, k, each, _ = packing.own.shape
    prefix = len(packing.prefix)
    total = prefix + k * each
    seen = torch.zeros(b, total, total, dtype=torch.bool, device=packing.own.device)
    seen[:, :prefix, :prefix] = packing.prefix
    seen[:, prefix:, :prefix] = True
    for text in range(k):
        place = slice(prefix + text * each, prefix + (text + 1) * each)
        seen[:, place, place] = packing.own[:, text]
    return torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)[:, None]


@contextmanager
def quiet() -> Iterator[None]:
    """Let `transformers` draw no progress bars meanwhile: a model this small is there before one could be read."""
    shown = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            hf_logging.enable_progress_bar()


def _family_of(vlm: Any, image_size: int | None) -> VLMFamily:
    model_type = str(vlm.config.model_type)
    for family in FAMILIES:
        if model_type in family.model_types:
            return family(vlm, image_size)
    known = sorted(name for family in FAMILIES for name in family.model_types)
    raise ConfigError(f"{type(vlm).__name__} ({model_type}) is of no family known here: expected one of {known}")


def _require_room(vlm: Any, vocab_size: int | None, path: str) -> None:
    rows = vlm.get_input_embeddings().weight.shape[0]
    if vocab_size is not None and vocab_size > rows:
        raise CheckpointError(
            f"{path}: its tokenizer has {vocab_size} tokens, but the model embeds {rows}: they do not belong together"
        )


def _load_pretrained(path: str, attention: str) -> Any:
    """The model at `path`, whole, with float32 weights (published ones are bf16, and training needs the digits)."""
    require_model_folder(path)
    try:
        with quiet():
            loaded: Any = AutoModelForImageTextToText.from_pretrained(
                path, attn_implementation=attention, dtype=torch.float32, output_loading_info=True
            )
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(cannot_load("a backbone", path, error)) from error
    vlm, info = loaded
    missing = sorted(info["missing_keys"])
    if missing:  # transformers would go on with random numbers in their place
        raise CheckpointError(
            f"cannot load a backbone from {path!r}: {len(missing)} weights are missing, for example {missing[:3]}"
        )
    return vlm


def _build(config: dict[str, Any], vocab_size: int | None, attention: str) -> Any:
    """A model with random weights."""
    model_type = config.pop("model_type", None)
    if model_type is None:
        raise ConfigError("a backbone config needs model_type, for example smolvlm or idefics3")
    if vocab_size is not None and not config.get("_resolved"):
        text = {**config.get("text_config", {}), "vocab_size": vocab_size, "pad_token_id": 0}
        config |= {"text_config": text, "pad_token_id": 0, "image_token_id": 1}
    config.pop("_resolved", None)
    if model_type not in CONFIG_MAPPING:
        raise ConfigError(
            f"transformers knows no model type {model_type!r}. {did_you_mean(model_type, CONFIG_MAPPING)}"
        )
    try:
        made = AutoConfig.for_model(model_type, **config)
        return AutoModelForImageTextToText.from_config(made, attn_implementation=attention)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"model.backbone.config describes no {model_type} that can be built: {error}") from error
