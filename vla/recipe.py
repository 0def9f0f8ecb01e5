"""How a model is made, as plain data that travels with its weights."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, ConfigError, did_you_mean
from ..spec import EmbodimentSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .model import VLAModel

STATES = ("vector", "prefix", "prompt")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Which backbone, which head, and their sizes.

    `backbone` and `head` are mappings with ``_target_`` and constructor arguments; what depends on the data
    (vocabulary, dimensions, embodiments) is added when the model is built.

    Attributes:
        backbone: Backbone class and its arguments.
        head: Action head class and its arguments.
        points: Whether the encoder points at what words name (and is grounded before the head is trained).
        action_horizon: Steps a chunk predicts.
        max_tokens: Length of the prompt in tokens.
        width: Width of the per-embodiment state encoding.
        prompt: What the backbone reads: ``{instruction}``, and with ``state=prompt`` ``{state}``, between other words.
        special_tokens: Whether the tokenizer adds its own (a begin token, for most) to the prompt.
        clean: Strip instructions, and read ``_`` and line breaks in them as spaces (pi0.5 does).
        state: Where the state goes: ``vector`` (to the head), ``prefix`` (a token after the prompt, as in SmolVLA) or
            ``prompt`` (in words, 256 bins a dimension, as in pi0.5).
        state_pad, action_pad: Dimensions that every state and action is padded to, as in models that pretrained one
            layer for all robots; 0 for none.
        soft_prompts: Learned tokens of each embodiment that the backbone reads after the prompt (X-VLA's).
        speech: A head of the language model that says the actions beside the head proper, or null: class and arguments.
        speech_weight: Weight of its loss.
        insulate: Keep the head's gradient out of the backbone; what it learns it learns by `speech` (Driess et al.
            2025).
        words_dim, words_noise: The summary of the instruction reaches the head through this many values in -1..1, with
            noise of this standard deviation in training. The points say where things are; of the words the head needs
            what to do, and a wider channel lets it learn single sentences by heart.
        points_noise: Standard deviation of the noise on pointed-at positions in training [m]; image coordinates get
            the same in units of twice the image size. Frozen features of few frames are learnt by heart without it.
        surround: Through how many values what the cameras see around the points reaches the head; 0 for not at all. The
            points say where things are, this what is beside them: room in a drawer, a neighbour, a thing that leans.
        surround_noise: Standard deviation of the noise on these values, -1..1, in training.
        relative: Elements of absolute actions that are learnt relative to the state's of the same name when the chunk
            begins (openpi's delta actions); what comes out is absolute.
        action_normalization, state_normalization: Modes of `datasets.normalize.Normalizer`.
    """

    backbone: Mapping[str, Any]
    head: Mapping[str, Any]
    points: bool = True
    action_horizon: int = 8
    max_tokens: int = 20
    width: int = 128
    prompt: str = "{instruction}"
    special_tokens: bool = False
    clean: bool = False
    state: str = "vector"
    state_pad: int = 0
    action_pad: int = 0
    soft_prompts: int = 0
    speech: Mapping[str, Any] | None = None
    speech_weight: float = 1.0
    insulate: bool = False
    words_dim: int = 8
    words_noise: float = 0.5
    points_noise: float = 0.003
    surround: int = 0
    surround_noise: float = 0.3
    relative: Sequence[str] = ()
    action_normalization: str = "min_max"
    state_normalization: str = "mean_std"
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("backbone", "head"):
            if "_target_" not in getattr(self, name):
                raise ConfigError(f"model.{name}: expected a mapping with _target_, got {dict(getattr(self, name))}")
        object.__setattr__(self, "relative", tuple(self.relative))
        if self.action_horizon < 1:
            raise ConfigError(f"expected action_horizon of at least 1, got {self.action_horizon}")
        if self.state not in STATES:
            raise ConfigError(f"unknown model.state {self.state!r}. {did_you_mean(self.state, STATES)}")
        if "{instruction}" not in self.prompt or ("{state}" in self.prompt) != (self.state == "prompt"):
            raise ConfigError(
                "model.prompt: expected {instruction} in it, and {state} with model.state=prompt alone, got "
                f"{self.prompt!r} with state={self.state}"
            )
        if self.points and (self.state != "vector" or self.soft_prompts or self.speech or self.insulate):
            raise ConfigError(
                "a model that points sees the backbone through its points alone: state=prefix or prompt, soft_prompts, "
                "speech and insulate need model.points=false"
            )
        if self.insulate and self.speech is None:
            raise ConfigError("model.insulate: nothing would train the backbone; give model.speech, a head that speaks")
        if min(self.state_pad, self.action_pad, self.soft_prompts, self.surround) < 0:
            raise ConfigError(
                "model: expected state_pad, action_pad, soft_prompts and surround from 0, got "
                f"{self.state_pad}, {self.action_pad}, {self.soft_prompts} and {self.surround}"
            )
        if self.surround and not self.points:
            raise ConfigError("model.surround: what is seen around points needs a model that points (points=true)")

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready data; `from_dict` is the inverse."""
        return asdict(self)

    @property
    def packages(self) -> set[str]:
        """Packages that its classes come from."""
        return {target.partition(".")[0] for target in _targets(self.to_dict())}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Recipe:
        """Build from `to_dict` output, which may be somebody else's file: it names trusted classes only (`trust`)."""
        known = set(inspect.signature(cls).parameters)
        unknown = set(data) - known
        if unknown:
            raise CheckpointError(f"recipe has unknown keys {sorted(unknown)}: written by another version?")
        missing = {"backbone", "head"} - set(data)
        if missing:
            raise CheckpointError(f"recipe has no {sorted(missing)}: damaged, or written by another version?")
        require_trusted(data)
        return cls(**data)

    def build(
        self, embodiments: Mapping[str, EmbodimentSpec], tokenizer: PreTrainedTokenizerBase, *, seed: int = 0
    ) -> VLAModel:
        """Make the model with random weights (and pretrained ones where the backbone names a path)."""
        import torch

        from .model import VLAModel

        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return VLAModel(recipe=self, embodiments=dict(embodiments), tokenizer=tokenizer)


_TRUSTED = {"brachium"}


def trust(*packages: str) -> None:
    """Let checkpoints name classes of these packages; what they name is imported and run.

    On the command line ``hydra.searchpath=[pkg://theirs.conf]`` and the environment variable ``BRACHIUM_TRUST=theirs``
    do the same.
    """
    _TRUSTED.update(packages)


def require_trusted(node: Any) -> None:
    """Raise a CheckpointError if something in `node` would be imported from a package that is not trusted."""
    from hydra.utils import get_class

    trusted = _TRUSTED | {name.strip() for name in os.environ.get("BRACHIUM_TRUST", "").split(",")}

    def check(target: str, module: str) -> None:
        package = module.partition(".")[0]
        if package not in trusted:
            raise CheckpointError(
                f"refusing to import {target!r}: only {sorted(trusted - {''})} are trusted. If you trust where it "
                f"comes from, type BRACHIUM_TRUST={package} before the command, or call "
                f"brachium.vla.recipe.trust({package!r})"
            )

    for target in _targets(node):
        check(target, target)
        try:
            made = get_class(target)
        except (ImportError, ValueError) as error:
            raise CheckpointError(f"there is no class {target!r}: {error}") from error
        check(target, made.__module__)  # a trusted module may have imported others


def instantiate(node: Mapping[str, Any], **arguments: Any) -> Any:
    """Make the object that `node` describes.

    Raises:
        ConfigError: No such class, or arguments it does not take.
    """
    from hydra.utils import get_class

    target = str(node["_target_"])
    try:
        made = get_class(target)
    except (ImportError, ValueError) as error:
        raise ConfigError(f"there is no class {target!r}: {error}") from error
    options = {k: v for k, v in node.items() if not k.startswith("_")}
    parameters = inspect.signature(made).parameters
    unknown = [k for k in options if k not in parameters]
    if unknown and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        raise ConfigError(f"{target} takes no {unknown[0]!r}. {did_you_mean(unknown[0], parameters)}")
    return made(**options, **arguments)


def _targets(node: Any) -> Iterator[str]:
    if isinstance(node, Mapping):
        if "_target_" in node:
            yield str(node["_target_"])
        for value in node.values():
            yield from _targets(value)
    elif isinstance(node, (list, tuple)):
        for value in node:
            yield from _targets(value)
