"""Language models behind OpenAI's HTTP interface: vLLM, llama.cpp, Ollama, and services.

They differ in what they allow and in what they only seem to, so a server is asked at the start for what it can do, and
its answers are looked at: a constraint that is ignored, or log-probabilities of one generated token in place of the
prompt's (llama.cpp issue 27174, which makes every option equally likely), is found before a planner believes it.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from ....errors import ConfigError, ServerError, did_you_mean
from .base import Choices, Completion, Scored, Usage, check_images, require
from .dialects import Dialect, allows, from_json, order, png
from .endpoint import Endpoint, Refused, Unanswered, dig
from .estimators import MAX_LETTERS, difference, from_letters, from_votes, letter_questions

_PROBE = Choices(options=("zebra-7 of 9", "zebra-9 of 9"))


class OpenAICompatLM:
    """A language model of a server.

    How scores come about, the first that the server allows; each `Scored` names its estimator:

    - ``exact``: log p(prompt + continuation) - log p(prompt) from the log-probabilities of the prompt's tokens
      (`echo`), the prompt as plain text. One request a continuation.
    - ``letters``: the continuations as a multiple-choice question, and each letter's log-probability as its answer.
      Every letter stands once for every continuation, and the mean is taken of the logarithms, so that a liking for a
      letter cancels. As many requests as continuations, at most 20.
    - ``votes``: how often each is written among `samples` constrained answers at temperature 1, with one vote added
      to each (Laplace).

    The last two are normalised: the given continuations' probabilities add up to 1.

    Args:
        address: ``HOST:PORT`` or a URL, with or without ``/v1``.
        model: Its name at the server; None where there is only one.
        key_env: Environment variable with the key, if one is needed.
        timeout_s: How long an answer may take [s].
        retries: How often a question is put again to a server that is late, busy or gone.
        backoff_s: Wait before the first of them [s], doubled each time.
        cache: File of answers, added to and read from; None for none.
        max_calls: Requests in all.
        chat: Whether prompts are sent as a user's messages; None: where the server takes them.
        images: Whether the model sees images; they need `chat`.
        samples: Votes, for the estimator of that name.
        parallel: Requests at a time while scoring.
        extra: Fields for every question, such as ``{"chat_template_kwargs": {"enable_thinking": False}}``.

    Raises:
        ServerError: No server, one that fails, or one that answers nonsense.
        ConfigError: A model that it does not have.
    """

    def __init__(
        self,
        address: str = "127.0.0.1:8000",
        *,
        model: str | None = None,
        key_env: str = "OPENAI_API_KEY",
        timeout_s: float = 60.0,
        retries: int = 3,
        backoff_s: float = 0.5,
        cache: str | Path | None = None,
        max_calls: int = 100_000,
        chat: bool | None = None,
        images: bool = False,
        samples: int = 20,
        parallel: int = 4,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        self.endpoint = Endpoint(
            address,
            key_env=key_env,
            timeout_s=timeout_s,
            retries=retries,
            backoff_s=backoff_s,
            max_calls=max_calls,
            cache=cache,
        )
        self.samples, self.parallel, self.extra = samples, max(1, parallel), dict(extra or {})
        self.usage = Usage()
        self.model, owner = self._find_model(model)
        self.name = f"{self.model} at {self.endpoint.address}"
        self._native = self._answers_at("/api/version")  # Ollama
        self.chat = self._takes_chat() if chat is None else chat
        if images and not self.chat:
            raise ConfigError("images need chat: type chat=true, or images=false")
        self.dialect: Dialect | None = None
        self.dialect = self._find_dialect(owner)
        self._echoes, self._letters = self._tells_prompts(), self._tells_letters()
        votes = self.dialect is not None and samples > 0
        has = {"generate"} | ({"chat"} if self.chat else set()) | ({"images"} if images else set())
        has |= {"choice", "json_schema"} if self.dialect else set()
        has |= {"score"} if self._echoes or self._letters or votes else set()
        self.capabilities = frozenset(has)

    @property
    def estimator(self) -> str:
        """How scores of texts come about: ``exact``, ``letters``, ``votes`` or ``none``."""
        if self._echoes:
            return "exact"
        return "letters" if self._letters else "votes" if "score" in self.capabilities else "none"

    def score(self, prompt: str, continuations: Sequence[str], *, images: Sequence[np.ndarray] = ()) -> list[Scored]:
        """How likely each continuation is after the prompt; see the class for how that is found.

        Raises:
            ConfigError: The server offers no way, or more than 20 continuations are asked for and letters are the only.
            ServerError: It fails, or its answers are none.
        """
        begin = time.monotonic()
        require(self, "score", "Its server tells no log-probabilities and keeps to no constraint")
        self._check_images(images)
        texts = list(dict.fromkeys(continuations))
        if not texts:
            return []
        spent: list[int] = []
        if self._echoes and not images:  # plain text has no place for images
            found = self._score_exactly(prompt, texts, spent)
        elif self._letters and len(texts) <= MAX_LETTERS:
            found = self._score_by_letters(prompt, texts, images, spent)
        elif self.dialect is not None and self.samples > 0:
            found = self._score_by_votes(prompt, texts, images, spent)
        else:
            raise ConfigError(f"{self.name}: expected at most {MAX_LETTERS} continuations, got {len(texts)}")
        answer = {text: scored.logprob for text, scored in zip(texts, found)}
        self.usage.note("score", prompt, answer, sum(spent), time.monotonic() - begin)
        return [found[texts.index(text)] for text in continuations]

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
        """Go on from the prompt. `choices.end` is not asked for: servers end a text that may not go on.

        Raises:
            ConfigError: Something the server cannot do.
            ServerError: It fails, or does not keep to what is allowed.
        """
        begin = time.monotonic()
        if choices is not None and json_schema is not None:
            raise ConfigError("expected choices or json_schema, got both")
        self._check_images(images)
        fields: dict[str, Any] = {}
        if choices is not None or json_schema is not None:
            require(self, "choice" if choices is not None else "json_schema", "Its server keeps to no constraint")
            assert self.dialect is not None
            fields = self.dialect.schema(json_schema) if json_schema is not None else {}
            fields = self.dialect.choices(choices) if choices is not None else fields
        text, tokens, complete, spent = self._write(
            prompt, fields, max_tokens=max_tokens, temperature=temperature, seed=seed, images=images
        )
        if choices is not None:
            text = self._kept_to(choices, text, complete)
        self.usage.note("generate", prompt, text, spent, time.monotonic() - begin)
        return Completion(text=text, tokens=tokens, complete=complete)

    def close(self) -> None:
        """End the connections."""
        self.endpoint.close()

    def _find_model(self, model: str | None) -> tuple[str, str]:
        where = f"{self.endpoint.address}/v1/models"
        listed = dig(where, self.endpoint.get("/v1/models"), list, "data")
        owners = {dig(where, entry, str, "id"): str(entry.get("owned_by") or "") for entry in listed}
        if model is None and len(owners) == 1:
            return next(iter(owners.items()))
        if model is None or model not in owners:
            said = "no model" if model is None else repr(model)
            hint = did_you_mean(model or "", owners) if owners else "It has none."
            raise ConfigError(f"expected a model of {self.endpoint.address}, got {said}. {hint} Type model=NAME")
        return model, owners[model]

    def _answers_at(self, path: str) -> bool:
        try:
            return "version" in self.endpoint.get(path)
        except Unanswered:
            raise
        except ServerError:
            return False

    def _takes_chat(self) -> bool:
        body = {"model": self.model, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}
        try:
            self.endpoint.post("/v1/chat/completions", {**body, **self.extra}, remember=False)
        except Refused:
            return False
        return True

    def _find_dialect(self, owner: str) -> Dialect | None:
        """The first way to constrain that the server keeps to; what it writes by itself is something else."""
        for dialect in order(owner, self._native):
            self.dialect = dialect
            try:
                text, _, complete, _ = self._write(
                    "What is the capital of France?", dialect.choices(_PROBE), max_tokens=64, remember=False
                )
                self._kept_to(_PROBE, text, complete)
            except Unanswered:
                raise
            except ServerError:
                continue
            if complete:
                return dialect
        return None

    def _tells_prompts(self) -> bool:
        """Whether `echo` gives the prompt's log-probabilities: one for each token, and such as make sense."""
        try:
            whole = self._echo("the sky is blue today", remember=False)[0]
            if len(whole) < 5:
                return False
            blue, other = (
                difference(self._echo(f"the sky is{word}", remember=False)[0], [])[0]
                for word in (" blue", " carburetor")
            )
        except Unanswered:
            raise
        except ServerError:
            return False
        return blue > other

    def _tells_letters(self) -> bool:
        try:
            top, _ = self._top_tokens(
                "Which is a colour?\nA) blue\nB) carburetor\nAnswer with one letter.\nAnswer:", ()
            )
        except Unanswered:
            raise
        except ServerError:
            return False
        return len(top) >= 2

    def _score_exactly(self, prompt: str, texts: list[str], spent: list[int]) -> list[Scored]:
        wholes = [prompt] * bool(prompt) + [prompt + text for text in texts]
        with ThreadPoolExecutor(self.parallel) as pool:
            echoed = list(pool.map(self._echo, wholes))
        spent += [tokens for _, tokens in echoed]
        before = echoed[0][0] if prompt else []
        found = (difference(whole, before) for whole, _ in echoed[len(wholes) - len(texts) :])
        return [Scored(logprob=logprob, tokens=tokens) for logprob, tokens in found]

    def _echo(self, text: str, remember: bool = True) -> tuple[list[tuple[str, float]], int]:
        """The tokens of a text with their log-probabilities, 0 for the first, and how many were paid for.

        Raises:
            ServerError: There is not one for each of the prompt's tokens.
        """
        path = "/v1/completions"
        body = {"model": self.model, "prompt": text, "echo": True, "logprobs": 1, "max_tokens": 1, "temperature": 0.0}
        reply = self.endpoint.post(path, body, remember=remember)
        where = f"{self.endpoint.address}{path}"
        count = dig(where, reply, int, "usage", "prompt_tokens")
        tokens = dig(where, reply, list, "choices", 0, "logprobs", "tokens")
        logprobs = dig(where, reply, list, "choices", 0, "logprobs", "token_logprobs")
        told = [p for p in logprobs[1:count] if isinstance(p, (int, float)) and math.isfinite(p)]
        if count < 1 or len(tokens) < count or len(told) != count - 1:
            raise ServerError(f"{where}: expected {count} log-probabilities of a prompt, got {len(logprobs)}")
        first = logprobs[0] if isinstance(logprobs[0], (int, float)) else 0.0
        return list(zip(map(str, tokens[:count]), [float(first), *map(float, told)])), count + 1

    def _score_by_letters(
        self, prompt: str, texts: list[str], images: Sequence[np.ndarray], spent: list[int]
    ) -> list[Scored]:
        questions = letter_questions(prompt, texts)
        with ThreadPoolExecutor(self.parallel) as pool:
            answers = list(pool.map(lambda question: self._top_tokens(question, images), questions))
        spent += [tokens for _, tokens in answers]
        try:
            return from_letters([top for top, _ in answers])
        except ServerError as error:
            raise ServerError(f"{self.name}: {error}") from error

    def _top_tokens(
        self, prompt: str, images: Sequence[np.ndarray], remember: bool = True
    ) -> tuple[list[tuple[str, float]], int]:
        """The likeliest first tokens of an answer with their log-probabilities, and how many tokens were paid for."""
        path, body = self._question(prompt, images)
        body |= {"max_tokens": 1, "temperature": 0.0}
        body |= {"logprobs": True, "top_logprobs": MAX_LETTERS} if self.chat else {"logprobs": MAX_LETTERS}
        reply = self.endpoint.post(path, {**body, **self.extra}, remember=remember)
        where = f"{self.endpoint.address}{path}"
        told = dig(where, reply, dict, "choices", 0, "logprobs")
        if isinstance(told.get("content"), list):
            listed = dig(where, told, list, "content", 0, "top_logprobs")
            pairs = [(dig(where, e, str, "token"), dig(where, e, (int, float), "logprob")) for e in listed]
        else:
            pairs = list(dig(where, told, dict, "top_logprobs", 0).items())
        found = [(str(token), float(p)) for token, p in pairs if isinstance(p, (int, float))]
        if not found:
            raise ServerError(f"{where}: expected log-probabilities of the likeliest tokens, got none")
        return found, _paid(reply)

    def _score_by_votes(
        self, prompt: str, texts: list[str], images: Sequence[np.ndarray], spent: list[int]
    ) -> list[Scored]:
        choices = Choices(options=tuple(texts))
        assert self.dialect is not None
        fields = self.dialect.choices(choices)

        def vote(seed: int) -> str:
            said, _, complete, paid = self._write(prompt, fields, temperature=1.0, seed=seed, images=images)
            spent.append(paid)
            if not complete:
                raise ServerError(f"{self.name}: expected one of the continuations, got {said[:80]!r}, cut off")
            return self._kept_to(choices, said, complete)

        with ThreadPoolExecutor(self.parallel) as pool:
            votes = Counter(pool.map(vote, range(self.samples)))
        return from_votes(votes, texts)

    def _question(self, prompt: str, images: Sequence[np.ndarray]) -> tuple[str, dict[str, Any]]:
        """Where a prompt is sent to, and how."""
        if not self.chat:
            return "/v1/completions", {"model": self.model, "prompt": prompt}
        content: Any = prompt
        if images:
            seen = ({"type": "image_url", "image_url": {"url": f"data:image/png;base64,{png(i)}"}} for i in images)
            content = [*seen, {"type": "text", "text": prompt}]
        return "/v1/chat/completions", {"model": self.model, "messages": [{"role": "user", "content": content}]}

    def _write(
        self,
        prompt: str,
        fields: dict[str, Any],
        *,
        max_tokens: int = 256,
        temperature: float = 0.0,
        seed: int = 0,
        images: Sequence[np.ndarray] = (),
        remember: bool = True,
    ) -> tuple[str, int, bool, int]:
        """What is written, its tokens, whether it ended by itself, and how many tokens were paid for."""
        if self.dialect is not None and self.dialect.native and fields:
            told = {"temperature": temperature, "seed": seed, "num_predict": max_tokens}
            body: dict[str, Any] = {"model": self.model, "prompt": prompt, "stream": False, "options": told, **fields}
            body |= {} if self.chat else {"raw": True}
            body |= {"images": [png(image) for image in images]} if images else {}
            path = "/api/generate"
            reply, where = (
                self.endpoint.post(path, {**body, **self.extra}, remember=remember),
                self.endpoint.address + path,
            )
            count = reply.get("eval_count")
            tokens = count if isinstance(count, int) else 0
            asked = reply.get("prompt_eval_count")
            paid = tokens + (asked if isinstance(asked, int) else 0)
            return dig(where, reply, str, "response"), tokens, reply.get("done_reason") != "length", paid
        path, body = self._question(prompt, images)
        body |= {"max_tokens": max_tokens, "temperature": temperature, "seed": seed, **fields, **self.extra}
        reply, where = self.endpoint.post(path, body, remember=remember), f"{self.endpoint.address}{path}"
        inside: tuple[str | int, ...] = ("message", "content") if self.chat else ("text",)
        text = dig(where, reply, str, "choices", 0, *inside)
        usage = reply.get("usage")
        count = usage.get("completion_tokens") if isinstance(usage, dict) else None
        complete = reply["choices"][0].get("finish_reason") != "length"
        return text, count if isinstance(count, int) else 0, complete, _paid(reply)

    def _kept_to(self, choices: Choices, text: str, complete: bool) -> str:
        """The text that `choices` allow; where the limit cut it off, as far as it came.

        Raises:
            ServerError: It is none of those.
        """
        if self.dialect is not None and self.dialect.json:
            said = from_json(text, choices)
            text, complete = (text, complete) if said is None else (said, True)
        if complete and not allows(choices, text):
            raise ServerError(f"{self.name}: expected one of the given options, got {text[:80]!r}")
        return text

    def _check_images(self, images: Sequence[np.ndarray]) -> None:
        if images:
            require(self, "images", "Type images=true where its model sees them")
            check_images(images)


def _paid(reply: dict[str, Any]) -> int:
    usage = reply.get("usage")
    total = usage.get("total_tokens") if isinstance(usage, dict) else None
    return total if isinstance(total, int) else 0
