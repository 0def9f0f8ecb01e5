"""How an encoder is trained with a head: not at all, by low-rank adapters, or whole; insulated from the head or not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ConfigError, did_you_mean
from .build import owned_by
from .model import VLAModel
from .optim import HIDDEN
from .questions import IGNORE, location_tokens

TUNES = ("frozen", "lora", "full", "embodiment")


def check_tuning(tune: str, rank: int, *, insulate: bool, init: bool = False) -> None:
    """Raise ConfigError unless an encoder can be tuned so."""
    if tune not in TUNES:
        raise ConfigError(f"unknown tune {tune!r}. {did_you_mean(tune, TUNES)}")
    if rank < 1:
        raise ConfigError(f"expected lora_rank of at least 1, got {rank}")
    if tune == "embodiment" and not init:
        raise ConfigError("tune=embodiment adds embodiments to a checkpoint: expected init=CHECKPOINT")
    if insulate and tune in ("frozen", "embodiment"):
        raise ConfigError("insulate=true keeps gradients out of an encoder that is trained: expected tune=lora or full")


class Tuning:
    """Prepares a model for training, and puts it back in order afterwards.

    Args:
        model: The parameters of its encoder are frozen or set free; with ``lora`` its backbone gets adapters (Hu et al.
            2022) beside every linear layer of its transformers. With ``embodiment`` all is frozen but the parts of some
            embodiments.
        tune: One of `TUNES`.
        rank: Rank of the adapters.
        seed: Of their first weights.
        embodiments: Those that ``embodiment`` trains.
        freeze: Parts of the backbone (`Backbone.parts`) that stay as they are with ``full`` and ``lora``.
    """

    def __init__(
        self,
        model: VLAModel,
        tune: str,
        rank: int = 8,
        seed: int = 0,
        embodiments: Sequence[str] = (),
        freeze: Sequence[str] = (),
    ) -> None:
        encoder = model.encoder
        backbone: Any = encoder.backbone
        unknown = [part for part in freeze if part not in backbone.parts]
        if unknown:
            raise ConfigError(
                f"freeze: the backbone has no part {unknown[0]!r}. {did_you_mean(unknown[0], backbone.parts)}"
            )
        self.encoder, self._adapted = encoder, None
        encoder.requires_grad_(tune == "full")
        backbone.requires_grad_(tune == "full")  # which may keep something back
        for part in freeze:
            backbone.parts[part].requires_grad_(False)
        if tune == "embodiment":
            own = owned_by(model, embodiments)
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(name in own)
        if tune == "lora":
            from peft import LoraConfig
            from peft.tuners.lora import LoraModel

            if not hasattr(backbone, "vlm"):
                raise ConfigError("tune=lora adapts models of transformers; train this backbone with tune=full")
            vlm, still = backbone.vlm, {id(m) for part in freeze for m in backbone.parts[part].modules()}
            linear = [n for n, m in vlm.named_modules() if isinstance(m, nn.Linear) and id(m) not in still]
            layers = [name for name in linear if HIDDEN.search(f".{name}.")]
            options = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=layers)
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                self._adapted = LoraModel(vlm, options, "default")  # in place

        if not any(p.requires_grad for p in model.parameters()):
            raise ConfigError(
                f"tune={tune} leaves nothing to train: this head has no weights of its own"
                + (", and new embodiments no parts. " if tune == "embodiment" else ". ")
                + "Type tune=full or tune=lora"
            )

    def finish(self) -> None:
        """Add the adapters to the weights that they adapt, so that what is saved is a plain model."""
        if self._adapted is not None:
            self._adapted.merge_and_unload()
            self._adapted = None


class ActionWriter:
    """Action chunks as text of location tokens, for an encoder to learn while no gradient of the head reaches it.

    Knowledge insulation (Driess et al. 2025): the vision-language model learns to say the actions, token by token; the
    head learns from features that it cannot change.

    Args:
        model: Its tokenizer must have location tokens.
        embodiment: Whose actions.
    """

    def __init__(self, model: VLAModel, embodiment: str) -> None:
        places = {place: token for token, place in location_tokens(model.tokenizer).items()}
        begin = model.tokenizer.bos_token_id
        if not places or begin is None or not hasattr(model.encoder.backbone, "next_words"):
            raise ConfigError(
                "insulate: expected a tokenizer with a begin token and location tokens, in which the backbone writes "
                "actions; got one without. Type encoder=nano, or insulate=false"
            )
        self.model, self.embodiment, self.begin = model, embodiment, int(begin)
        self.codes = torch.tensor([places[k] for k in sorted(places)])

    def loss(
        self,
        states: Float[Tensor, "b l d"],
        targets: Int[Tensor, "b l"],
    ) -> Float[Tensor, ""]:
        """Cross-entropy of the action tokens, from the language model's states at the written text."""
        backbone: Any = self.model.encoder.backbone
        keep = targets != IGNORE
        return F.cross_entropy(backbone.next_words(states[keep]).float(), targets[keep])

    def write(
        self, tokens: Int[Tensor, "b l"], action: Float[Tensor, "b h a"], pad: Bool[Tensor, "b h"]
    ) -> tuple[Int[Tensor, "b w"], Int[Tensor, "b w"]]:
        """The instruction followed by its actions, and at each token the one that should follow.

        Actions are normalised as for the head, cut off at -1 and 1, and rounded to as many steps as there are location
        tokens; padded steps and constant dimensions are no targets.
        """
        offset = self.model.get_buffer(f"action_offset_{self.embodiment}")
        scale = self.model.get_buffer(f"action_scale_{self.embodiment}")
        active = self.model.get_buffer(f"action_active_{self.embodiment}")
        share = ((action - offset) / scale).clamp(-1.0, 1.0) * 0.5 + 0.5
        codes = self.codes.to(action.device)
        said = codes[(share * (len(codes) - 1)).round().long()].flatten(1)
        real = ((~pad)[..., None] & active).flatten(1)
        begin = torch.full((len(tokens), 1), self.begin, device=tokens.device)
        text = torch.cat([tokens, begin, said[:, :-1]], dim=1)
        ignored = torch.full_like(tokens, IGNORE)
        return text, torch.cat([ignored, said.masked_fill(~real, IGNORE)], dim=1)
