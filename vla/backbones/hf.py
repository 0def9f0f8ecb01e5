"""Any vision-language model of `transformers` as a backbone: readout tokens, several texts on one image prefix.

The nano model and its large published relatives are loaded by this one code path. What differs from family to family
(SmolVLM, PaliGemma, Qwen-VL) is in a file each.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor, nn
from torch.compiler import is_compiling as compiling
from transformers import DynamicCache

from ...errors import ConfigError, SpecMismatchError, did_you_mean
from ..attention import LayerShape, Rotary, additive, block_mask
from ..parts import part
from .base import BackboneFeatures, Prefix, Seen, VLMFamily
from .kept import KeptLayers, Read
from .lean import make_lean
from .load import build, load_pretrained, require_room
from .packed import KERNEL
from .packing import Packing
from .paligemma import PaliGemma
from .qwen_vl import QwenVL
from .resize import FITS, Images, squares
from .smolvlm import SmolVLM

LARGE, AT_ONCE = 256, 1024
"""Patches of an image from which on a vision tower on a CPU takes images one by one: the activations of several do not
fit into its caches, and take memory. In training as many as make up `AT_ONCE` patches, which is faster."""
FAMILIES: tuple[type[VLMFamily], ...] = (SmolVLM, PaliGemma, QwenVL)


class HFBackbone(nn.Module):
    """A vision-language model with readout tokens.

    There are two ways to run it. `forward` reads ``[images of every camera][text][readouts]`` with k texts on one image
    prefix, for a model that points: images never look at texts, and texts are causal. `read` reads one prompt as the
    model was trained to (PaliGemma's images and prompt see each other), keeps every layer's keys and values for heads
    that attend to them, and `extend` goes on from there.

    Args:
        path: Local directory or hub name of a pretrained model; None builds `config` with random weights.
        config: Configuration of the model (``model_type`` and what differs from its defaults).
        vocab_size: Size of the tokenizer; used with `config`.
        readouts: Number of learned tokens appended to each text.
        image_size: Edge at which images enter the vision tower [px]; None for the model's own.
        fit: How images get that size, one of `FITS`.
        layers: Layers of the language model that are kept, from the first; None for all.
        two_way: Whether images and prompt see each other in `read`; None for the way of the family.
        scale: Multiply image and word embeddings by the root of the width, as SmolVLA does to SmolVLM's.
        rope_theta: Base of the rotary embedding in place of the model's own (SmolVLA's is 10 000).
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
        readouts: int = 0,
        image_size: int | None = None,
        fit: str = "stretch",
        layers: int | None = None,
        two_way: bool | None = None,
        scale: bool = False,
        rope_theta: float | None = None,
        attention: str = "auto",
    ) -> None:
        super().__init__()
        self.attention, self.fit, self.scale = attention, fit, scale
        if fit not in FITS:
            raise ConfigError(f"unknown fit {fit!r}. {did_you_mean(fit, FITS)}")
        kernel = "sdpa" if attention == "auto" else attention
        if (path is None) == (config is None):
            raise ConfigError("a backbone needs either path (a directory or hub name) or config, and not both")
        if path is not None:
            self.vlm = load_pretrained(path, kernel)
            require_room(self.vlm, vocab_size, path)
        else:
            self.vlm = build(dict(config or {}), vocab_size, kernel)
        self.family = _family_of(self.vlm, image_size)
        self.two_way = self.family.two_way if two_way is None else two_way
        self._cut(layers)
        if rope_theta is not None:
            self._turn_by(rope_theta)
        make_lean([*self.family.language_model.layers, *self.family.parts["vision"].modules()])
        self.family.language_model.layers[-1].stays_whole = True  # for a head that takes its keys, and not its output
        self.image_size, self.grid = self.family.image_size, self.family.grid
        self.token_grid = self.family.token_grid
        self.width = int(self.vlm.config.text_config.hidden_size)
        self.vision_width = self.family.vision_width
        text = self.vlm.config.text_config
        self.layers = LayerShape(
            count=len(self.family.language_model.layers),
            heads=int(text.num_attention_heads),
            groups=int(text.num_key_value_heads),
            head_dim=int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads),
            rotary=True,
        )
        self.vocabulary = int(self.vlm.get_input_embeddings().weight.shape[0])
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

    @property
    def rotary(self) -> Rotary:
        """How the language model turns keys to their positions."""
        own = self.family.language_model.rotary_emb
        return Rotary(frequencies=own.inv_freq, scaling=float(own.attention_scaling))

    @property
    def parts(self) -> dict[str, nn.Module]:
        """What may be frozen by name."""
        return {**self.family.parts, "embeddings": self.vlm.get_input_embeddings()}

    def _cut(self, layers: int | None) -> None:
        """Keep the first layers of the language model alone."""
        model, text = self.family.language_model, self.vlm.config.text_config
        if layers is None or layers == len(model.layers):
            return
        if not 1 <= layers <= len(model.layers):
            raise ConfigError(f"layers: expected 1 to {len(model.layers)}, got {layers}")
        model.layers = model.layers[:layers]
        for config in {id(c): c for c in (text, model.config)}.values():
            config.num_hidden_layers = layers
            if getattr(config, "layer_types", None):
                config.layer_types = config.layer_types[:layers]

    def _turn_by(self, theta: float) -> None:
        rotary = self.family.language_model.rotary_emb
        size = 2 * len(rotary.inv_freq)
        rotary.inv_freq = theta ** -(torch.arange(0, size, 2, dtype=torch.float32) / size)
        rotary.original_inv_freq = rotary.inv_freq
        text = self.vlm.config.text_config
        text.rope_parameters = {**(text.rope_parameters or {"rope_type": "default"}), "rope_theta": theta}

    def resolved_config(self) -> dict[str, Any]:
        """The whole configuration, enough to build the same model without `path`."""
        return dict(self.vlm.config.to_dict())

    @torch.no_grad()
    def fit_pixels(self, *sets: Images) -> None:
        """Set the pixel normalisation: each camera's mean image, and one standard deviation for all.

        Of several sets of cameras (several embodiments) it is one mean image for all.
        """
        pixels = [squares(images, self.image_size, self.fit) / 255.0 for images in sets]
        whole = pixels[0] if len(pixels) == 1 else torch.cat([part.flatten(0, 1) for part in pixels])[:, None]
        self.pixel_mean = whole.mean(0)
        self.pixel_std = (whole - self.pixel_mean).std().clamp(min=1e-3).expand_as(self.pixel_std).clone()

    def next_words(self, states: Float[Tensor, "*rest d"]) -> Float[Tensor, "*rest w"]:
        """Logits of the next token after each language-model state."""
        logits: Tensor = self.vlm.get_output_embeddings()(states)
        cap = getattr(self.vlm.config.text_config, "final_logit_softcapping", None)  # of Gemma 2
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def look(self, pixels: Float[Tensor, "i 3 side side"]) -> Float[Tensor, "i p v"]:
        """Vision-tower features of normalised images of the tower's own size, row by row."""
        return self.family.look(pixels).patches

    def normalise(self, images: Images) -> Float[Tensor, "b n 3 side side"]:
        """Images as the vision tower sees them."""
        pixels = squares(images, self.image_size, self.fit).div_(255.0)
        if len(self.pixel_mean) not in (1, pixels.shape[1]):
            raise SpecMismatchError(f"expected {len(self.pixel_mean)} cameras, got {pixels.shape[1]}")
        return pixels.sub_(self.pixel_mean).div_(self.pixel_std)

    def _only_extra_learns(self) -> bool:
        """Whether gradients are wanted, but none of the model's own weights, and nothing is read after `extra`."""
        learns = any(parameter.requires_grad for parameter in self.vlm.parameters())
        return torch.is_grad_enabled() and not learns and not len(self.readouts)

    def _see(self, pixels: Float[Tensor, "i 3 side side"]) -> Seen:
        """What the vision tower makes of images; large ones on a CPU without gradients a few at a time."""
        patches = self.grid[0] * self.grid[1]
        some = max(1, AT_ONCE // patches) if self.training else 1
        learns = torch.is_grad_enabled() and any(p.requires_grad for p in self.family.parts["vision"].parameters())
        if pixels.device.type != "cpu" or learns or len(pixels) <= some or patches < LARGE:
            return self.family.look(pixels)
        parts = [self.family.look(part) for part in pixels.split(some)]
        return Seen(
            patches=torch.cat([part.patches for part in parts]),
            tokens=torch.cat([part.tokens for part in parts]),
            deep=tuple(torch.cat(layer) for layer in zip(*(part.deep for part in parts))),
        )

    def embed(self, tokens: Int[Tensor, "b l"]) -> Float[Tensor, "b l d"]:
        """Word embeddings as they enter the language model."""
        words: Tensor = self.vlm.get_input_embeddings()(tokens)
        return words * self.width**0.5 if self.scale else words

    def read(
        self,
        images: Images,
        tokens: Int[Tensor, "b l"],
        token_mask: Bool[Tensor, "b l"],
        *,
        image_mask: Bool[Tensor, "b n"] | None = None,
        extra: Float[Tensor, "b e d"] | None = None,
        keep: bool = True,
        states: bool = True,
    ) -> Prefix:
        """Read ``[images][prompt][extra][readouts]``; see `Backbone`. Each part sees what stands before it."""
        if extra is not None and keep and extra.requires_grad and self._only_extra_learns():
            with torch.no_grad():  # what stands before it does not depend on it
                before = self.read(images, tokens, token_mask, image_mask=image_mask, states=states)
            real = torch.ones(extra.shape[:2], dtype=torch.bool, device=extra.device)
            place = slice(before.mask.shape[1], before.mask.shape[1] + extra.shape[1])
            found = self.extend(before, extra.to(before.keys[0].dtype), real, two_way=True)
            return replace(found, spans={**before.spans, "extra": place, "readouts": slice(place.stop, place.stop)})
        with part("images"):
            pixels = self.normalise(images)
        if image_mask is not None and not torch.is_grad_enabled() and len(self.family.positions(1)[0]) == 1:
            here = image_mask.any(0)  # a camera that no row has takes up no positions either
            if not here.all():
                pixels, image_mask = pixels[:, here], image_mask[:, here]
        b, n = pixels.shape[:2]
        with part("vision tower"):
            seen = self._see(pixels.flatten(0, 1))
        pictures, visual = self.family.prefix(seen.tokens.unflatten(0, (b, n)))
        if self.scale:
            pictures = pictures * self.width**0.5
        words = self.embed(tokens).to(pictures.dtype)
        parts = {"images": pictures, "text": words}
        if extra is not None:
            parts["extra"] = extra.to(words.dtype)
        parts["readouts"] = self.readouts.to(words.dtype).expand(b, *self.readouts.shape)
        lengths = [part.shape[1] for part in parts.values()]
        device, m = pictures.device, pictures.shape[1]
        mask = torch.ones(b, sum(lengths), dtype=torch.bool, device=device)
        if image_mask is not None:
            mask[:, :m] = image_mask.repeat_interleave(m // n, dim=1)
        mask[:, m : m + lengths[1]] = token_mask
        told = m + lengths[1]
        blocks = torch.arange(told, device=device) * (not self.two_way)
        later = [torch.full((count,), told + k, device=device) for k, count in enumerate(lengths[2:])]
        blocks = torch.cat([blocks, *later]).expand(b, -1)
        where, start = self.family.positions(n)
        if len(where) == 1:  # masked images take up no positions either
            positions = (mask.cumsum(1) - 1).clamp(min=0)[None]
        else:
            after = start + (mask[:, m:].cumsum(1) - 1).clamp(min=0)
            positions = torch.cat(
                [where.to(device)[:, None].expand(-1, b, -1), after.expand(len(where), -1, -1)], dim=2
            )
        sequence = torch.cat(list(parts.values()), dim=1)
        cache = KeptLayers(self.layers.count, stops=not states and not compiling()) if keep else None
        last = sequence[..., :0]
        with part("language model"), suppress(Read):
            last = self.family.read(
                sequence,
                additive(block_mask(blocks, blocks, mask), sequence.dtype)[:, None],
                positions,
                visual,
                seen.deep,
                None,
                cache,
            )
        edges = [0, *itertools.accumulate(lengths)]
        return Prefix(
            states=last,
            mask=mask,
            next=positions.masked_fill(~mask, -1).amax((0, 2)) + 1,
            spans={name: slice(edges[k], edges[k + 1]) for k, name in enumerate(parts)},
            keys=() if cache is None else tuple(cache.keys[k] for k in range(self.layers.count)),
            values=() if cache is None else tuple(cache.values[k] for k in range(self.layers.count)),
        )

    def extend(
        self, prefix: Prefix, embeddings: Float[Tensor, "b q d"], mask: Bool[Tensor, "b q"], *, two_way: bool = False
    ) -> Prefix:
        """Go on reading after a prefix; see `Backbone`."""
        b, q = mask.shape
        device, before = mask.device, prefix.mask.shape[1]
        cache = DynamicCache()
        for layer, (key, value) in enumerate(zip(prefix.keys, prefix.values)):
            cache.update(key, value, layer)
        real = torch.cat([prefix.mask, mask], dim=1)
        asking = (torch.arange(q, device=device) * (not two_way)).expand(b, -1)
        known = torch.cat([torch.full((b, before), -1, device=device), asking], dim=1)
        steps = prefix.next[:, None] + (mask.cumsum(1) - 1).clamp(min=0)
        axes = len(self.family.positions(1)[0])
        states = self.family.read(
            embeddings,
            additive(block_mask(asking, known, real), embeddings.dtype)[:, None],
            steps.expand(axes, -1, -1),
            torch.zeros(0, dtype=torch.bool, device=device),
            (),
            None,
            cache,
        )
        if not prefix.states.shape[-1]:  # nobody wants them
            states = states[..., :0]
        return Prefix(
            states=torch.cat([prefix.states, states], dim=1),
            mask=real,
            next=prefix.next + mask.sum(1),
            spans=prefix.spans,
            **_kept(cache),
        )

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
        seen = self._see(self.normalise(images).flatten(0, 1))
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


def _kept(cache: DynamicCache | None) -> dict[str, tuple[Tensor, ...]]:
    """Keys and values of every layer of a cache."""
    if cache is None:
        return {}
    layers: list[Any] = cache.layers
    return {"keys": tuple(layer.keys for layer in layers), "values": tuple(layer.values for layer in layers)}


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
    return additive(seen, dtype)[:, None]


def _family_of(vlm: Any, image_size: int | None) -> VLMFamily:
    model_type = str(vlm.config.model_type)
    for family in FAMILIES:
        if model_type in family.model_types:
            return family(vlm, image_size)
    known = sorted(name for family in FAMILIES for name in family.model_types)
    raise ConfigError(f"{type(vlm).__name__} ({model_type}) is of no family known here: expected one of {known}")
