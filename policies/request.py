"""Requests of policy clients: where a message holds what an observation needs, and what a reply holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import WireError
from ..spec import EmbodimentSpec, FeatureSpec, Guidance, Observation

PROTOCOL = 1
"""Version of what brachium adds to openpi's messages, under the key `OURS`."""
OURS = "brachium"
FITS = ("exact", "pad")


@dataclass(frozen=True, kw_only=True)
class RequestFormat:
    """Which keys of a request mean what. A key is looked up as it is, and then as a path into nested maps.

    Attributes:
        images: Keys of the images, in the order of the embodiment's cameras; ``images/NAME`` where empty.
        state: Keys whose values, one after another, are the state.
        prompt: Key of the instruction.
        fit: What becomes of images of another size: ``exact`` refuses them, ``pad`` scales them, keeps their shape, and
            fills the rest with black, as openpi does.
        default_prompt: Instruction where a request has none.
    """

    images: tuple[str, ...] = ()
    state: tuple[str, ...] = ("state",)
    prompt: str = "prompt"
    fit: str = "exact"
    default_prompt: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "images", tuple(self.images))
        object.__setattr__(self, "state", tuple(self.state))
        if self.fit not in FITS:
            raise WireError(f"request format: expected fit to be one of {FITS}, got {self.fit!r}")

    def image_keys(self, spec: EmbodimentSpec) -> dict[str, str]:
        """Camera name -> key."""
        keys = self.images or tuple(f"images/{name}" for name in spec.camera_names)
        if len(keys) != len(spec.cameras):
            raise WireError(
                f"request format: expected a key for each camera {list(spec.camera_names)}, got {list(keys)}"
            )
        return dict(zip(spec.camera_names, keys))

    def write(self, observation: Observation, spec: EmbodimentSpec) -> dict[str, Any]:
        """The request for an observation; only where the state has a single key."""
        if len(self.state) != 1:
            raise WireError(f"cannot split a state into {list(self.state)}: give a format with one key for the state")
        message: dict[str, Any] = {self.state[0]: observation.state, self.prompt: str(observation.instruction)}
        for name, key in self.image_keys(spec).items():
            message[key] = observation.images[name]
        return message

    def read(self, message: Any, spec: EmbodimentSpec) -> Observation:
        """The observation in a request.

        Raises:
            WireError: Something is missing, of another shape or type, or not finite.
        """
        if not isinstance(message, dict):
            raise WireError(f"expected a map, got {type(message).__name__}")
        images = {
            name: _image(_find(message, key), spec.camera(name), key, self.fit)
            for name, key in self.image_keys(spec).items()
        }
        parts = [np.atleast_1d(_numbers(_find(message, key), key)).ravel() for key in self.state]
        state = np.concatenate(parts)
        if state.shape != spec.state.shape:
            raise WireError(f"expected a state of shape {spec.state.shape} {_listed(spec.state)}, got {state.shape}")
        if not np.isfinite(state).all():
            raise WireError(f"expected a finite state, got {state.tolist()}")
        prompt = message.get(self.prompt, self.default_prompt)
        if not isinstance(prompt, str):
            raise WireError(f"expected a text as {self.prompt!r}, got {type(prompt).__name__}")
        ours = _map(message.get(OURS, {}), OURS)
        stamp = ours.get("timestamp", 0.0)
        if not isinstance(stamp, (int, float)) or not np.isfinite(stamp):
            raise WireError(f"expected a finite timestamp [s], got {str(stamp)[:40]}")
        return Observation(images=images, state=state, instruction=prompt, timestamp=float(stamp))


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What brachium's own clients say beside the observation.

    Attributes:
        id: Number of the request, given back with the reply; None from clients that ask one after another.
        noise: float32 (h, n) the chunk is to be drawn from; None leaves it to the server.
        guidance: Plan to agree with.
        seed: Begin an episode: the server's draws for this client come from here on from this seed.
    """

    id: int | None = None
    noise: np.ndarray | None = None
    guidance: Guidance | None = None
    seed: int | None = None

    def write(self) -> dict[str, Any]:
        """As it goes over the wire."""
        found: dict[str, Any] = {"protocol": PROTOCOL}
        found |= {k: v for k in ("id", "noise", "seed") if (v := getattr(self, k)) is not None}
        if self.guidance is not None:
            g = self.guidance
            found["guidance"] = {
                "actions": g.actions,
                "weights": g.weights,
                "limit": float(g.limit),
                "gradient": g.gradient,
            }
        return found

    @classmethod
    def read(cls, message: Mapping[str, Any], *, horizon: int, action_dim: int, noise_dim: int) -> Wish:
        """Of a request.

        Raises:
            WireError: Of another protocol version or shape.
        """
        if OURS not in message:
            return cls()
        ours = _map(message[OURS], OURS)
        if ours.get("protocol") != PROTOCOL:
            raise WireError(f"expected protocol {PROTOCOL}, got {str(ours.get('protocol'))[:20]}: update the client")
        for key in ("id", "seed"):
            if not (ours.get(key) is None or (type(ours[key]) is int and 0 <= ours[key] < 2**63)):
                raise WireError(f"expected {key} to be a number of at least 0, got {str(ours[key])[:40]}")
        noise = ours.get("noise")
        if noise is not None:
            noise = _finite(noise, (horizon, noise_dim), "noise")
        guidance = None
        if ours.get("guidance") is not None:
            told = _map(ours["guidance"], "guidance")
            try:
                guidance = Guidance(
                    actions=_finite(told.get("actions"), (horizon, action_dim), "guidance actions"),
                    weights=np.clip(_finite(told.get("weights"), (horizon,), "guidance weights"), 0.0, 1.0),
                    limit=float(told.get("limit", 5.0)),
                    gradient=str(told.get("gradient", "vjp")),
                )
            except (TypeError, ValueError) as error:
                raise WireError(f"guidance: {error}") from error
        return cls(id=ours.get("id"), noise=noise, guidance=guidance, seed=ours.get("seed"))


def read_actions(message: Any, *, action_dim: int) -> np.ndarray:
    """Actions float32 (h, a) of a reply.

    Raises:
        WireError: None, of another shape, or not finite.
    """
    if not isinstance(message, dict):
        raise WireError(f"expected a reply with actions, got {type(message).__name__}")
    actions = _numbers(message.get("actions"), "actions")
    if actions.ndim == 1:
        actions = actions[None]
    if actions.ndim != 2 or actions.shape[1] != action_dim or not len(actions):
        raise WireError(f"expected actions of shape (h, {action_dim}), got {actions.shape}")
    if not np.isfinite(actions).all():
        raise WireError("expected finite actions, got some that are not")
    return actions


def _find(message: Mapping[str, Any], key: str) -> Any:
    """A value by its key, or by a path into nested maps."""
    if key in message:
        return message[key]
    value: Any = message
    for part in key.split("/"):
        if not isinstance(value, dict) or part not in value:
            known = sorted(str(k) for k in message if k != OURS)
            raise WireError(f"expected {key!r} in the request, got {known}")
        value = value[part]
    return value


def _map(value: Any, name: str) -> dict[Any, Any]:
    if not isinstance(value, dict):
        raise WireError(f"expected {name!r} to be a map, got {type(value).__name__}")
    return value


def _numbers(value: Any, name: str) -> np.ndarray:
    """As float32."""
    if isinstance(value, (list, tuple)) and all(isinstance(x, (int, float, np.generic)) for x in value):
        value = np.asarray(value, np.float64)
    if not isinstance(value, (np.ndarray, np.generic, int, float)) or isinstance(value, bool):
        raise WireError(f"expected {name!r} to be an array of numbers, got {type(value).__name__}")
    if isinstance(value, np.ndarray) and value.dtype == np.float32:
        return value
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray(value).astype(np.float32)


def _finite(value: Any, shape: tuple[int, ...], name: str) -> np.ndarray:
    array = _numbers(value, name)
    if array.shape != shape or not np.isfinite(array).all():
        raise WireError(f"expected {name} to be finite, of shape {shape}, got {array.shape}")
    return array


def _image(value: Any, spec: FeatureSpec, key: str, fit: str) -> np.ndarray:
    """As uint8 (height, width, 3) of the spec's size; channels first and 0..1 are understood, as openpi does."""
    if not isinstance(value, np.ndarray) or value.ndim != 3:
        raise WireError(f"expected {key!r} to be an image {spec.shape} uint8, got {_shown(value)}")
    if value.shape[0] == 3 and value.shape[2] != 3:
        value = value.transpose(1, 2, 0)
    if value.dtype.kind == "f":
        if not np.isfinite(value).all() or value.min(initial=0.0) < 0.0 or value.max(initial=0.0) > 1.0:
            raise WireError(f"expected {key!r} to be uint8, or floats from 0 to 1")
        value = (value * 255.0).astype(np.uint8)
    if value.dtype != np.uint8 or value.shape[2] != 3:
        raise WireError(f"expected {key!r} to be an image {spec.shape} uint8, got {_shown(value)}")
    if value.shape == spec.shape:
        return np.ascontiguousarray(value)
    if fit == "exact" or not value.size:
        raise WireError(f"expected {key!r} to be an image {spec.shape} uint8, got {_shown(value)}")
    return _padded(value, spec.shape[0], spec.shape[1])


def _padded(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Scaled to fit (bilinear), centred on black: openpi's resize_with_pad."""
    from PIL import Image

    ratio = max(image.shape[1] / width, image.shape[0] / height)
    wide, high = max(1, int(image.shape[1] / ratio)), max(1, int(image.shape[0] / ratio))
    small = Image.fromarray(image).resize((wide, high), Image.Resampling.BILINEAR)
    out = np.zeros((height, width, 3), np.uint8)
    top, left = max(0, (height - high) // 2), max(0, (width - wide) // 2)
    out[top : top + high, left : left + wide] = np.asarray(small)
    return out


def _listed(spec: FeatureSpec) -> Sequence[str]:
    return list(spec.names)


def _shown(value: Any) -> str:
    return f"{value.shape} {value.dtype}" if isinstance(value, np.ndarray) else type(value).__name__
