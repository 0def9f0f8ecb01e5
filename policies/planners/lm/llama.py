"""A Llama in numpy: the forward pass of small models without torch, with a cache of keys and values.

Root-mean-square norms, rotary positions, grouped-query attention and gated linear units, as in Touvron et al. 2023
(arXiv 2302.13971) and in transformers' ``LlamaForCausalLM``, whose files it reads.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ....errors import CheckpointError


@dataclass
class Cache:
    """Keys and values of what was read: a pair (b, heads, l, d) a layer."""

    layers: list[tuple[np.ndarray, np.ndarray]]

    @property
    def length(self) -> int:
        """Tokens that were read."""
        return int(self.layers[0][0].shape[2]) if self.layers else 0

    def repeated(self, count: int) -> Cache:
        """For `count` rows that go on from the same one."""
        return Cache([(np.repeat(k, count, axis=0), np.repeat(v, count, axis=0)) for k, v in self.layers])


class NumpyLlama:
    """A causal language model in float32.

    Args:
        config: As in transformers' ``config.json``.
        weights: Names of ``LlamaForCausalLM`` -> arrays.

    Raises:
        CheckpointError: An array is missing or of another shape.
    """

    def __init__(self, config: dict[str, object], weights: dict[str, np.ndarray]) -> None:
        def number(key: str) -> int:
            value = config.get(key)
            if not isinstance(value, int):
                raise CheckpointError(f"config.json: expected a whole number as {key}, got {value!r}")
            return value

        self.width, self.layers = number("hidden_size"), number("num_hidden_layers")
        self.heads, self.kv_heads = number("num_attention_heads"), number("num_key_value_heads")
        self.vocabulary, self.positions = number("vocab_size"), number("max_position_embeddings")
        self.head = self.width // self.heads
        self.eps = float(str(config.get("rms_norm_eps", 1e-6)))
        nested = config.get("rope_parameters")
        theta = nested.get("rope_theta", 1e4) if isinstance(nested, dict) else config.get("rope_theta", 1e4)
        self.theta = float(str(theta))
        self.weights = {name: np.ascontiguousarray(array, np.float32) for name, array in weights.items()}
        embedding = self._array("model.embed_tokens.weight", (self.vocabulary, self.width))
        if "lm_head.weight" not in self.weights:
            self.weights["lm_head.weight"] = embedding
        for k in range(self.layers):
            self._array(f"model.layers.{k}.self_attn.q_proj.weight", (self.width, self.width))
            self._array(f"model.layers.{k}.input_layernorm.weight", (self.width,))

    @classmethod
    def load(cls, folder: Path) -> NumpyLlama:
        """Read ``config.json`` and ``model.safetensors``.

        Raises:
            CheckpointError: They are missing, damaged, or of another architecture.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        try:
            config = json.loads((folder / "config.json").read_text())
            weights = load_file(folder / "model.safetensors")
        except (OSError, ValueError, SafetensorError) as error:
            raise CheckpointError(f"{folder}: expected a language model: {error}") from error
        if config.get("model_type") != "llama":
            raise CheckpointError(f"{folder}: expected a model of type llama, got {config.get('model_type')!r}")
        return cls(config, weights)

    def _array(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        array = self.weights.get(name)
        if array is None or array.shape != shape:
            found = "nothing" if array is None else array.shape
            raise CheckpointError(f"model.safetensors: expected {name} of shape {shape}, got {found}")
        return array

    def __call__(self, tokens: np.ndarray, cache: Cache | None = None) -> tuple[np.ndarray, Cache]:
        """Logits float32 (b, l, vocabulary) of tokens (b, l) after those of the cache, and the cache with them.

        Rows are not padded on the left; what is behind a row's end on the right has no influence on what is before it.
        """
        begin = 0 if cache is None else cache.length
        count = tokens.shape[1]
        if begin + count > self.positions:
            raise CheckpointError(f"expected at most {self.positions} tokens, got {begin + count}")
        x = self.weights["model.embed_tokens.weight"][tokens]
        cos, sin = self._rotation(begin, count)
        mask = np.triu(np.full((count, begin + count), -np.inf, np.float32), begin + 1)
        layers = []
        for k in range(self.layers):
            kept = None if cache is None else cache.layers[k]
            attended, pair = self._attend(k, self._norm(x, f"model.layers.{k}.input_layernorm"), cos, sin, mask, kept)
            layers.append(pair)
            x = x + attended
            x = x + self._gated(k, self._norm(x, f"model.layers.{k}.post_attention_layernorm"))
        return self._norm(x, "model.norm") @ self.weights["lm_head.weight"].T, Cache(layers)

    def _norm(self, x: np.ndarray, name: str) -> np.ndarray:
        scale: np.ndarray = 1.0 / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + self.eps)
        return x * scale * self.weights[f"{name}.weight"]

    def _rotation(self, begin: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        frequency = self.theta ** (-np.arange(0, self.head, 2, dtype=np.float32) / self.head)
        angle = np.arange(begin, begin + count, dtype=np.float32)[:, None] * np.concatenate([frequency, frequency])
        return np.cos(angle), np.sin(angle)

    def _attend(
        self,
        k: int,
        x: np.ndarray,
        cos: np.ndarray,
        sin: np.ndarray,
        mask: np.ndarray,
        kept: tuple[np.ndarray, np.ndarray] | None,
    ) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
        rows, count, _ = x.shape

        def project(name: str, heads: int) -> np.ndarray:
            made = x @ self.weights[f"model.layers.{k}.self_attn.{name}.weight"].T
            return made.reshape(rows, count, heads, self.head).transpose(0, 2, 1, 3)

        def rotate(y: np.ndarray) -> np.ndarray:
            half = self.head // 2
            return y * cos + np.concatenate([-y[..., half:], y[..., :half]], axis=-1) * sin

        query, key = rotate(project("q_proj", self.heads)), rotate(project("k_proj", self.kv_heads))
        value = project("v_proj", self.kv_heads)
        if kept is not None:
            key, value = np.concatenate([kept[0], key], axis=2), np.concatenate([kept[1], value], axis=2)
        share = self.heads // self.kv_heads
        keys, values = (np.repeat(y, share, axis=1) for y in (key, value)) if share > 1 else (key, value)
        scores = query @ keys.transpose(0, 1, 3, 2) / np.float32(np.sqrt(self.head)) + mask
        scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights = scores / scores.sum(axis=-1, keepdims=True)
        mixed = (weights @ values).transpose(0, 2, 1, 3).reshape(rows, count, self.width)
        return mixed @ self.weights[f"model.layers.{k}.self_attn.o_proj.weight"].T, (key, value)

    def _gated(self, k: int, x: np.ndarray) -> np.ndarray:
        gate = x @ self.weights[f"model.layers.{k}.mlp.gate_proj.weight"].T
        up = x @ self.weights[f"model.layers.{k}.mlp.up_proj.weight"].T
        silu = gate / (1.0 + np.exp(-gate))
        return (silu * up) @ self.weights[f"model.layers.{k}.mlp.down_proj.weight"].T


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities [nats] of logits (..., vocabulary)."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    found: np.ndarray = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return found
