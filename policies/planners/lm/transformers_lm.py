"""Any language or image-text model of `transformers`, on this machine."""

from __future__ import annotations

import copy
import importlib.util
import inspect
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ....errors import ConfigError
from .base import Choices, Completion, Scored, Usage, check_images, require
from .transformers_load import Cutter, guide_tokenizer, json_matcher, load
from .trie import TokenConstraint


@dataclass(frozen=True, kw_only=True)
class _Prompt:
    """A prompt as tokens; `text` is what a continuation is put behind, `before` the tokens before that text."""

    text: str
    ids: list[int]
    before: list[int]
    pictures: dict[str, Tensor] = field(default_factory=dict)


class TransformersLM:
    """A causal language model, or an image-text one where the model's configuration says so.

    A continuation's score is log p(prompt + continuation) - log p(prompt), each cut into tokens as one text. What their
    tokens begin with in common is read once, and its keys and values serve every continuation. Where a continuation
    leaves the prompt's tokens alone, that is the sum over its own tokens; where one merges with the prompt's last
    letters, the prompt's likelihood for those is taken off again, so that the two kinds can be compared (a score may
    then exceed 0).

    Args:
        model: Local directory or hub name.
        device: ``auto`` (a GPU where there is one), ``cpu``, ``cuda``, ...
        dtype: ``auto`` (float32 on the CPU, else the checkpoint's), ``float32``, ``bfloat16``, ``float16``.
        batch_size: Continuations in one pass.
        chat: Whether a prompt is put as a user's message into the model's chat template; None: where it has one.
            Without it a prompt with images may say itself where they are, by the processor's `image_token`.
        thinking: Whether templates that can ask the model to think aloud first do so.

    Raises:
        NotFoundError: No such model.
        ConfigError: Options that do not fit the model.
    """

    def __init__(
        self,
        model: str,
        *,
        device: str = "auto",
        dtype: str = "auto",
        batch_size: int = 32,
        chat: bool | None = None,
        thinking: bool = False,
    ) -> None:
        if batch_size < 1:
            raise ConfigError(f"expected a batch_size of at least 1, got {batch_size}")
        self.name, self.batch_size, self.thinking = model, batch_size, thinking
        self.model, self.tokenizer, self.processor = load(model, device, dtype)
        template = getattr(self.processor, "chat_template", None) or getattr(self.tokenizer, "chat_template", None)
        if chat and not template:
            raise ConfigError(f"{model} has no chat template. Type chat=false, or take an instruction-tuned model")
        self.chat = bool(template) if chat is None else chat
        self._cutter = Cutter(self.tokenizer)
        self._template = template
        self._ends = _end_ids(self.model, self.tokenizer)
        self._limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        self._keeps = "logits_to_keep" in inspect.signature(self.model.forward).parameters
        # Qwen's image-text models remember how far the last images shifted positions, even for prompts without images.
        self._shifts = [part for part in self.model.modules() if hasattr(part, "rope_deltas")]
        self._cache_is_sound: dict[bool, bool] = {}
        self._last: tuple[Choices, TokenConstraint] | None = None
        self._guide: Any = None
        has = {"score", "generate", "choice"} | ({"chat"} if self.chat else set())
        has |= {"images"} if self.processor is not None else set()
        has |= {"json_schema"} if importlib.util.find_spec("llguidance") else set()
        self.capabilities, self.usage = frozenset(has), Usage()

    def score(self, prompt: str, continuations: Sequence[str], *, images: Sequence[np.ndarray] = ()) -> list[Scored]:
        """How likely each continuation is after the prompt; see the class for what that means.

        Raises:
            ConfigError: Images that the model cannot see, a text that is longer than it can read.
        """
        begin = time.monotonic()
        read = self._read(prompt, images)
        joint = [self._joint(read, continuation, images) for continuation in continuations]
        common = [_common(read.ids, ids) for ids in joint]
        found: dict[int, Scored] = {}
        tokens = 0
        for shares in (True, False):  # texts that share not even the first token need one that stands before both
            which = [i for i, n in enumerate(common) if (n > 0) == shares]
            start = min((common[i] for i in which), default=0)
            prefix = read.ids[:start] or self._start()
            rows = [*(joint[i][start:] for i in which), read.ids[start:]]
            self._check_length(len(prefix) + max(map(len, rows)))
            with torch.inference_mode():
                sums = self._sums(prefix, rows, read.pictures) if which else []
            for i, s, row in zip(which, sums, rows):
                found[i] = Scored(logprob=s - sums[-1], tokens=len(row))
            tokens += len(prefix) + sum(map(len, rows)) if which else 0
        scored = [found[i] for i in range(len(joint))]
        answer = {text: s.logprob for text, s in zip(continuations, scored)}
        self.usage.note("score", prompt, answer, tokens, time.monotonic() - begin)
        return scored

    def generate(
        self,
        prompt: str,
        *,
        choices: Choices | None = None,
        json_schema: dict[str, object] | None = None,
        max_tokens: int = 256,
        temperature: float = 0.0,
        seed: int = 0,
        images: Sequence[np.ndarray] = (),
    ) -> Completion:
        """Go on from the prompt; the same seed gives the same text on the same machine.

        The completion's `logprob` is the model's own, of all tokens up to the end, without constraint or temperature.

        Raises:
            ConfigError: Something the model cannot do, or a text that is longer than it can read.
        """
        begin = time.monotonic()
        if choices is not None and json_schema is not None:
            raise ConfigError("expected choices or json_schema, got both")
        allowed, over = self._rules(choices, json_schema)
        read = self._read(prompt, images)
        self._check_length(len(read.ids) + 1)
        draw = torch.Generator().manual_seed(seed)
        written: list[int] = []
        total, complete = 0.0, False
        room = max_tokens if self._limit is None else min(max_tokens, self._limit - len(read.ids))
        with torch.inference_mode():
            go_on = self._steps(read)
            for _ in range(room):
                logits = go_on(written)
                token = _pick(logits, allowed(), temperature, draw)
                total += float(logits[token] - logits.logsumexp(-1))
                written.append(token)
                if over(token):
                    complete = True
                    break
        text = self._cutter.text(written)
        if choices is not None and complete:
            text = text.removesuffix(choices.end)
        self.usage.note("generate", prompt, text, len(read.ids) + len(written), time.monotonic() - begin)
        return Completion(text=text, logprob=total, tokens=len(written), complete=complete)

    def _read(self, prompt: str, images: Sequence[np.ndarray]) -> _Prompt:
        if images:
            return self._read_with(prompt, images)
        text = self._in_template(prompt) if self.chat else prompt
        before = [] if self.chat else self._cutter.lead
        if not (before or text):
            before = self._start()
        return _Prompt(text=text, ids=[*before, *self._cutter.ids(text)], before=before)

    def _start(self) -> list[int]:
        """What stands before a text that begins with nothing: its first token has no likelihood otherwise."""
        bos = self.tokenizer.bos_token_id
        start = self._ends[:1] if bos is None else [bos]
        if not start:
            raise ConfigError(f"{self.name} has no token that begins or ends a text: give a prompt")
        return start

    def _in_template(self, content: Any) -> str:
        whose = self.tokenizer if isinstance(content, str) else self.processor
        said: str = whose.apply_chat_template(
            [{"role": "user", "content": content}],
            chat_template=self._template,
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=self.thinking,
        )
        return said

    def _read_with(self, prompt: str, images: Sequence[np.ndarray]) -> _Prompt:
        require(self, "images", "Take an image-text model")
        check_images(images)
        token = getattr(self.processor, "image_token", None)
        if token is None:
            raise ConfigError(f"{self.name}: its processor names no image_token, so its prompts cannot be put together")
        if self.chat:
            text = self._in_template([*({"type": "image"} for _ in images), {"type": "text", "text": prompt}])
        else:
            text = prompt if token in prompt else token * len(images) + prompt
        ids, pictures = self._processed(text, images)
        # Special tokens cut texts apart, so what follows the last image can be encoded by itself, without its pixels.
        tail = text.rpartition(token)[2]
        behind = self._cutter.ids(tail)
        if behind and ids[-len(behind) :] == behind:
            return _Prompt(text=tail, ids=ids, before=ids[: -len(behind)], pictures=pictures)
        return _Prompt(text=text, ids=ids, before=[], pictures=pictures)

    def _processed(self, text: str, images: Sequence[np.ndarray]) -> tuple[list[int], dict[str, Tensor]]:
        from PIL import Image

        made = self.processor(
            text=[text],
            images=[Image.fromarray(image) for image in images],
            add_special_tokens=not self.chat,
            return_tensors="pt",
        )
        extra = {k: v for k, v in made.items() if k not in ("input_ids", "attention_mask")}
        return made["input_ids"][0].tolist(), extra

    def _joint(self, read: _Prompt, continuation: str, images: Sequence[np.ndarray]) -> list[int]:
        """Tokens of prompt and continuation as one text."""
        if read.pictures and not read.before:
            return self._processed(read.text + continuation, images)[0]
        return [*read.before, *self._cutter.ids(read.text + continuation)]

    def _check_length(self, tokens: int) -> None:
        if self._limit is not None and tokens > self._limit:
            raise ConfigError(f"{self.name} reads at most {self._limit} tokens, got {tokens}: shorten the prompt")

    def _forward(self, rows: Tensor, pictures: dict[str, Tensor], cache: Any = None, keep: int = 0) -> Any:
        """One pass over rows (n, tokens); at least the last `keep` logits, 0 for all.

        There is no attention mask: rows are filled up behind, where causal attention never looks, and image-text models
        count positions from masks in ways that go wrong behind cached images.
        """
        where, options = self.model.device, {"logits_to_keep": keep} if keep and self._keeps else {}
        given = {} if cache is None else {"past_key_values": cache}
        for name, value in pictures.items():
            if value.ndim == 2 and value.shape[0] == 1 and name.endswith("token_type_ids"):  # one a token: of text
                value = torch.nn.functional.pad(value, (0, rows.shape[1] - value.shape[1]))
            given[name] = value.to(where, self.model.dtype) if value.is_floating_point() else value.to(where)
        if cache is None and not pictures:
            for part in self._shifts:
                part.rope_deltas = None
        goes_on = keep == 1 or cache is not None
        return self.model(input_ids=rows.to(where), use_cache=goes_on, **given, **options)

    def _sums(self, prefix: list[int], rows: list[list[int]], pictures: dict[str, Tensor]) -> list[float]:
        """Log-likelihood of each row of tokens behind `prefix`, the empty row's being 0."""
        order = sorted((i for i, row in enumerate(rows) if row), key=lambda i: len(rows[i]))
        sums, parts = [0.0] * len(rows), [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]
        if not parts:
            return sums
        if not self._trusts_cache(prefix, pictures):
            size = 1 if pictures else self.batch_size  # processors lay batches out in as many ways as there are of them
            for part in (order[i : i + size] for i in range(0, len(order), size)):
                for i, value in zip(part, self._sums_whole(prefix, [rows[i] for i in part], pictures)):
                    sums[i] = value
            return sums
        first, cache = self._begin(prefix, pictures)
        for part in parts:
            for i, value in zip(part, self._sums_cached(first, cache, [rows[i] for i in part])):
                sums[i] = value
        return sums

    def _begin(self, prefix: list[int], pictures: dict[str, Tensor]) -> tuple[Tensor, Any]:
        """Logits behind the prefix (vocabulary), and its keys and values."""
        out = self._forward(torch.tensor([prefix]), pictures, keep=1)
        return out.logits[0, -1].float(), getattr(out, "past_key_values", None)  # models with states have none

    def _sums_cached(self, first: Tensor, cache: Any, rows: list[list[int]]) -> list[float]:
        sums = torch.log_softmax(first, -1)[[row[0] for row in rows]].double()
        if max(map(len, rows)) > 1:
            spread = copy.deepcopy(cache)  # a pass adds to the keys and values it is given
            spread.batch_repeat_interleave(len(rows))
            logits = self._forward(_padded([row[:-1] for row in rows])[0], {}, spread).logits
            sums = sums + _picked(logits, *_padded([row[1:] for row in rows]))
        return [float(s) for s in sums]

    def _sums_whole(self, prefix: list[int], rows: list[list[int]], pictures: dict[str, Tensor]) -> list[float]:
        ids, _ = _padded([[*prefix, *row] for row in rows])
        longest = ids.shape[1] - len(prefix)
        logits = self._forward(ids, pictures, keep=longest + 1).logits[:, -longest - 1 : -1]
        return [float(s) for s in _picked(logits, *_padded(rows))]

    def _trusts_cache(self, prefix: list[int], pictures: dict[str, Tensor]) -> bool:
        """Whether going on from keys and values gives what a whole pass gives: tried once, with and without images.

        Families differ in their caches and in where positions behind images are kept; a wrong one gives likelihoods
        that look like any others.
        """
        if bool(pictures) not in self._cache_is_sound:
            rows = [[prefix[-1]] * 3, [prefix[-1]] * 2]
            size = 1 if pictures else 2
            whole = [s for i in range(0, 2, size) for s in self._sums_whole(prefix, rows[i : i + size], pictures)]
            try:
                cached = self._sums_cached(*self._begin(prefix, pictures), rows)
            except (AttributeError, NotImplementedError, TypeError, RuntimeError, ValueError):
                cached = [float("nan")] * 2  # a cache of another make
            slack = 1e-3 if self.model.dtype == torch.float32 else 0.3  # half precision rounds a token by some 0.05
            sound = all(abs(a - b) < slack for a, b in zip(whole, cached))
            self._cache_is_sound[bool(pictures)] = sound
        return self._cache_is_sound[bool(pictures)]

    def _steps(self, read: _Prompt) -> Callable[[list[int]], Tensor]:
        """A function from what is written so far, one token more each time, to the logits of what comes next."""
        if not self._trusts_cache(read.ids, read.pictures):
            return lambda written: self._begin([*read.ids, *written], read.pictures)[0]
        cache: Any = None

        def go_on(written: list[int]) -> Tensor:
            nonlocal cache
            if not written:
                logits, cache = self._begin(read.ids, read.pictures)
                return logits
            out = self._forward(torch.tensor([written[-1:]]), {}, cache, keep=1)
            cache = out.past_key_values
            return out.logits[0, -1].float()

        return go_on

    def _rules(
        self, choices: Choices | None, schema: dict[str, object] | None
    ) -> tuple[Callable[[], list[int] | None], Callable[[int], bool]]:
        """Which tokens may come next (None: any), and what notes one and tells whether it was the last."""
        if choices is not None:
            if self._last is None or self._last[0] != choices:
                end = self._ends[0] if self._ends else None
                self._last = (choices, TokenConstraint(self._cutter.middle, choices, end))
            constraint = self._last[1]
            state = constraint.start()

            def advance(token: int) -> bool:
                nonlocal state
                state = constraint.advance(state, token)
                return constraint.finished(state)

            return lambda: sorted(constraint.allowed(state)), advance
        if schema is not None:
            require(self, "json_schema", "Type: pip install llguidance")
            self._guide = self._guide or guide_tokenizer(
                self.tokenizer, self.model.get_input_embeddings().num_embeddings
            )
            matcher = json_matcher(self._guide, schema)

            def consume(token: int) -> bool:
                matcher.consume_token(token)
                return bool(matcher.is_stopped())

            return lambda: _set_bits(matcher.compute_bitmask()), consume
        return lambda: None, lambda token: token in self._ends


def _end_ids(model: Any, tokenizer: Any) -> list[int]:
    """Tokens that end a text, the tokenizer's own first."""
    told = getattr(model.generation_config, "eos_token_id", None)
    found = [tokenizer.eos_token_id, *(told if isinstance(told, list) else [told])]
    return list(dict.fromkeys(int(i) for i in found if i is not None))


def _common(a: list[int], b: list[int]) -> int:
    """How many tokens two texts begin with in common."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def _padded(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Rows as (n, longest), filled up with their last token, and where they are tokens (1) or not (0)."""
    longest = max(map(len, rows))
    ids = torch.tensor([row + row[-1:] * (longest - len(row)) if row else [0] * longest for row in rows])
    return ids, torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])


def _picked(logits: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """Sum of the log-probabilities of the tokens (n, length) under logits (n, length, vocabulary)."""
    ids, mask = ids.to(logits.device), mask.to(logits.device)
    logits = logits.float()
    chosen = logits.gather(-1, ids[..., None])[..., 0] - logits.logsumexp(-1)
    return torch.where(mask > 0, chosen, 0.0).double().sum(-1)


def _pick(logits: Tensor, allowed: list[int] | None, temperature: float, draw: torch.Generator) -> int:
    """The likeliest of the allowed tokens, or one drawn from them."""
    among = logits if allowed is None else logits[allowed]
    if temperature > 0.0:
        shares = torch.softmax(among.double().cpu() / temperature, -1)
        place = int(torch.multinomial(shares, 1, generator=draw))
    else:
        place = int(among.argmax())
    return place if allowed is None else allowed[place]


def _set_bits(mask: bytes) -> list[int]:
    bits = np.unpackbits(np.frombuffer(mask, dtype=np.uint8), bitorder="little")
    return [int(i) for i in np.flatnonzero(bits)]
