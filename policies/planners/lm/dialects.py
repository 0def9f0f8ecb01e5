"""How servers of language models are told what may be written: each in its own words.

vLLM took ``guided_*`` fields until 0.12, and takes ``structured_outputs`` since; llama.cpp takes a grammar (GBNF) or a
JSON schema; Ollama a JSON schema as ``format``, at addresses of its own; OpenAI a ``response_format``. A server that
does not know a field often ignores it, so what a server says about itself only sets the order of trying.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ....errors import ConfigError
from .base import Choices

Fields = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Dialect:
    """A way to constrain.

    Attributes:
        name: For reports.
        choices: Fields of a request that allow nothing but `Choices`, without their end.
        schema: Fields that allow nothing but JSON of a schema.
        json: Whether what is written for `choices` is JSON (`from_json` reads it).
        native: Whether requests go to Ollama's own addresses.
    """

    name: str
    choices: Callable[[Choices], Fields]
    schema: Callable[[Fields], Fields]
    json: bool = False
    native: bool = False


def pattern(choices: Choices) -> str:
    """A regular expression for what `choices` allow, without their end."""
    options = sorted(choices.options, key=len, reverse=True)  # for engines that take the first that fits
    one = "(" + "|".join(map(_escaped, options)) + ")"
    more = f"({_escaped(choices.separator)}{one}){{0,{choices.repeat - 1}}}" if choices.repeat > 1 else ""
    return f"({one}{more})?" if choices.may_be_empty else f"{one}{more}"


def grammar(choices: Choices) -> str:
    """A grammar in llama.cpp's notation (GBNF) for what `choices` allow, without their end."""
    options = " | ".join(_quoted(option) for option in choices.options)
    more = f" ({_quoted(choices.separator)} option){{0,{choices.repeat - 1}}}" if choices.repeat > 1 else ""
    root = f"(option{more})?" if choices.may_be_empty else f"option{more}"
    return f"root ::= {root}\noption ::= {options}\n"


def schema_of(choices: Choices) -> Fields:
    """A JSON schema for what `choices` allow: an object with the list of the options that are taken."""
    least = 0 if choices.may_be_empty else 1
    items = {"type": "string", "enum": list(choices.options)}
    listed = {"type": "array", "items": items, "minItems": least, "maxItems": choices.repeat}
    return {"type": "object", "properties": {"answer": listed}, "required": ["answer"], "additionalProperties": False}


def from_json(text: str, choices: Choices) -> str | None:
    """The text that stands in JSON of `schema_of`; None where it is none."""
    try:
        answer = json.loads(text)["answer"]
    except (ValueError, KeyError, TypeError):
        return None
    known = isinstance(answer, list) and all(isinstance(option, str) for option in answer)
    return choices.separator.join(answer) if known else None


def allows(choices: Choices, text: str) -> bool:
    """Whether a text, without its end, is one that `choices` allow."""
    return re.fullmatch(pattern(choices), text) is not None


def _vllm(name: str, style: Callable[[str, Any], Fields]) -> Dialect:
    def fields(choices: Choices) -> Fields:
        if choices.repeat == 1 and not choices.may_be_empty:
            return style("choice", list(choices.options))
        return style("regex", pattern(choices))

    return Dialect(name=name, choices=fields, schema=lambda schema: style("json", schema))


def _response_format(schema: Fields) -> Fields:
    told = {"name": "answer", "schema": schema, "strict": True}
    return {"response_format": {"type": "json_schema", "json_schema": told}}


VLLM = _vllm("vllm", lambda kind, value: {"structured_outputs": {kind: value}})
VLLM_BEFORE_12 = _vllm("vllm before 0.12", lambda kind, value: {f"guided_{kind}": value})
LLAMA_CPP = Dialect(
    name="llama.cpp",
    choices=lambda choices: {"grammar": grammar(choices)},
    schema=lambda schema: {"json_schema": schema},
)
OLLAMA = Dialect(
    name="ollama",
    choices=lambda choices: {"format": schema_of(choices)},
    schema=lambda schema: {"format": schema},
    json=True,
    native=True,
)
OPENAI = Dialect(
    name="openai", choices=lambda choices: _response_format(schema_of(choices)), schema=_response_format, json=True
)


def order(owner: str, is_ollama: bool) -> list[Dialect]:
    """Dialects to try, the likeliest first."""
    if is_ollama:
        return [OLLAMA, OPENAI]
    likely = [LLAMA_CPP] if "llama" in owner.lower() else []
    return [*likely, *(d for d in (VLLM, VLLM_BEFORE_12, LLAMA_CPP, OPENAI) if d not in likely)]


def png(image: np.ndarray) -> str:
    """An image (height, width, 3), uint8, as base64 of a PNG."""
    import cv2

    done, data = cv2.imencode(".png", image[..., ::-1])
    if not done:
        raise ConfigError(f"expected an image that can be written as PNG, got shape {image.shape}")
    return base64.b64encode(data.tobytes()).decode()


def _escaped(text: str) -> str:
    """A text in a regular expression; signs without a meaning stay, for not every engine knows an escaped space."""
    return re.sub(r"([\\.*+?^${}()|\[\]])", r"\\\1", text)


def _quoted(text: str) -> str:
    """A text as GBNF writes it."""
    signs = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\r": "\\r", "\t": "\\t"}
    return '"' + "".join(signs.get(c, c) for c in text) + '"'
