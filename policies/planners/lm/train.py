"""The verb ``brachium train-lm``: the tiny language model that plans without a network."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np

from ....console import human_time, log, progress
from ....errors import ConfigError
from .corpus import Lesson, lessons
from .words import ANSWER, END, NEXT, PARSE, WordTokenizer

LONGEST = 192
"""Tokens of a lesson; longer ones are left out."""


def train_lm(
    *,
    env: Callable[[], gymnasium.Env[Any, Any]],
    out: str = "outputs/lm",
    width: int = 128,
    layers: int = 4,
    heads: int = 4,
    parses: int = 60_000,
    episodes: int = 4000,
    steps: int = 4500,
    batch: int = 64,
    lr: float = 2e-3,
    parse_share: float = 0.6,
    seed: int = 0,
    threads: int | None = None,
) -> int:
    """Train a small Llama to say what instructions mean and which step comes next.

    The folder it writes is one that transformers reads too. Typed again after an interruption, it goes on from the last
    checkpoint.

    Args:
        env: Makes the symbolic environment whose work is to be learned.
        out: Folder for the model.
        width: Of the model.
        layers: Of the model.
        heads: Of attention.
        parses: Instructions with meanings to learn from.
        episodes: Pieces of work, done step by step, to learn from.
        steps: Updates.
        batch: Lessons an update.
        lr: Highest learning rate; warmed up over the first twentieth, then a cosine to a twentieth of it.
        parse_share: Share of lessons about meanings.
        seed: Of data, weights and order.
        threads: CPU threads; null leaves it to torch.
    """
    import torch

    if not 0.0 <= parse_share <= 1.0 or steps < 1 or batch < 1:
        raise ConfigError(f"expected parse_share from 0 to 1, steps and batch of at least 1, got {parse_share}")
    if threads is not None:
        torch.set_num_threads(threads)
    folder, begin = Path(out), time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    data = list(lessons(env, parses=parses, episodes=episodes, seed=seed))
    tokenizer = WordTokenizer.of([*(f"{d.prompt} {d.answer}" for d in data), ANSWER, END, PARSE, NEXT])
    tokenizer.save(folder)
    rows = _rows(data, tokenizer)
    log(f"{len(data)} lessons, {len(tokenizer)} words, {human_time(time.monotonic() - begin)}")
    torch.manual_seed(seed)
    model = _new_model(tokenizer, width, layers, heads)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    asked = [width, layers, heads, parses, episodes, steps, batch, lr, parse_share, seed, list(tokenizer.vocabulary)]
    key = hashlib.sha256(json.dumps(asked).encode()).hexdigest()
    first = _resume(folder, key, model, optimizer)
    losses = {"parse": math.nan, "next": math.nan}
    with progress("training", total=steps, unit="steps") as bar:
        bar.update(first)
        for step in range(first, steps):
            rng = np.random.default_rng([seed, step])
            kind = "parse" if rng.random() < parse_share else "next"
            tokens, labels = _batch(rows[kind], rng, batch, tokenizer.pad)
            for group in optimizer.param_groups:
                group["lr"] = lr * _schedule(step / steps)
            loss = model(input_ids=torch.from_numpy(tokens), labels=torch.from_numpy(labels)).loss
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            old = losses[kind]
            losses[kind] = loss.item() if math.isnan(old) else 0.95 * old + 0.05 * loss.item()
            bar.update(1, **{f"{name}_loss": round(value, 4) for name, value in losses.items()})
            if (step + 1) % 250 == 0:
                _save_state(folder, key, step + 1, model, optimizer)
    _finish(folder, model, {"losses": losses, "lessons": len(data), "seconds": round(time.monotonic() - begin, 1)})
    return 0


def _new_model(tokenizer: WordTokenizer, width: int, layers: int, heads: int) -> Any:
    """A Llama with weights drawn anew."""
    from transformers import LlamaConfig, LlamaForCausalLM

    make_config: Any = LlamaConfig  # its keywords are made at run time
    config = make_config(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=8 * width // 3 // 8 * 8,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        rms_norm_eps=1e-6,
        pad_token_id=tokenizer.pad,
        bos_token_id=tokenizer.begin,
        eos_token_id=tokenizer.end,
    )
    return LlamaForCausalLM(config)


def _rows(data: Sequence[Lesson], tokenizer: WordTokenizer) -> dict[str, list[tuple[list[int], int]]]:
    """Kind -> (tokens, where the answer begins)."""
    found: dict[str, list[tuple[list[int], int]]] = {"parse": [], "next": []}
    for lesson in data:
        asked = [tokenizer.begin, *tokenizer.encode(lesson.prompt)]
        whole = [*asked, *tokenizer.encode(lesson.answer), tokenizer.end]
        if len(whole) <= LONGEST:
            found[lesson.kind].append((whole, len(asked)))
    for kind, rows in found.items():
        rows.sort(key=lambda row: len(row[0]))  # a batch is a run of about equal lengths
        if not rows:
            raise ConfigError(f"expected lessons of the kind {kind!r}, got none: raise parses and episodes")
    return found


def _batch(
    rows: Sequence[tuple[list[int], int]], rng: np.random.Generator, size: int, pad: int
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and labels int64 (b, l); only answers are learned, -100 elsewhere."""
    start = int(rng.integers(max(1, len(rows) - 8 * size + 1)))
    window = rows[start : start + 8 * size]
    chosen = [window[int(k)] for k in rng.choice(len(window), size=min(size, len(window)), replace=False)]
    longest = max(len(tokens) for tokens, _ in chosen)
    tokens = np.full((len(chosen), longest), pad, np.int64)
    labels = np.full((len(chosen), longest), -100, np.int64)
    for k, (row, answer) in enumerate(chosen):
        tokens[k, : len(row)] = row
        labels[k, answer : len(row)] = row[answer:]
    return tokens, labels


def _schedule(share: float) -> float:
    if share < 0.05:
        return (share + 1e-3) / 0.051
    return 0.05 + 0.95 * 0.5 * (1.0 + math.cos(math.pi * (share - 0.05) / 0.95))


def _resume(folder: Path, key: str, model: Any, optimizer: Any) -> int:
    import torch

    path = folder / "training.pt"
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    if state["key"] != key:
        log(f"{path} is of another training; beginning anew")
        return 0
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    log(f"{path}: going on after {state['step']} steps")
    return int(state["step"])


def _save_state(folder: Path, key: str, step: int, model: Any, optimizer: Any) -> None:
    import torch

    temporary = folder / ".training.pt"
    state = {"key": key, "step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(state, temporary)
    temporary.replace(folder / "training.pt")


def _finish(folder: Path, model: Any, about: dict[str, Any]) -> None:
    """Write the model as transformers does, in float32, without what only training needs."""
    model.save_pretrained(folder)
    (folder / "training.pt").unlink(missing_ok=True)
    (folder / "card.json").write_text(json.dumps(about, indent=1) + "\n")
    size = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
    log(f"{folder}: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {size:.1f} MB")
