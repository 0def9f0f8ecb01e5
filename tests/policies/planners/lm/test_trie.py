"""Constrained decoding against languages written out in full, and with a real byte-pair tokenizer."""

from __future__ import annotations

import itertools
import random
import subprocess
import sys
import time
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from brachium.errors import ConfigError
from brachium.policies.planners.lm.base import Choices
from brachium.policies.planners.lm.trie import TokenConstraint

END = 999
MERGES = ("ab", "b.", ". ", "a;", "aa", ";b")
"""Tokens of two letters, some across the border of an option and what follows it."""


def encode(text: str) -> list[int]:
    """Greedy from the left, so that the tokens of two texts are not those of both together."""
    found, place = [], 0
    while place < len(text):
        pair = text[place : place + 2]
        merged = pair in MERGES
        found.append(1000 + MERGES.index(pair) if merged else ord(text[place]))
        place += 2 if merged else 1
    return found


def decode(tokens: list[int]) -> str:
    return "".join(MERGES[t - 1000] if t >= 1000 else "" if t == END else chr(t) for t in tokens)


def sentences(choices: Choices) -> set[str]:
    """The language, by its definition."""
    found = {choices.end} if choices.may_be_empty else set()
    for n in range(1, choices.repeat + 1):
        for options in itertools.product(choices.options, repeat=n):
            found.add(choices.separator.join(options) + choices.end)
    return found


def everything(constraint: TokenConstraint, limit: int = 20_000) -> dict[tuple[int, ...], bool]:
    """Every sequence of tokens that can be generated to its end."""
    found, rest = {}, [((), constraint.start())]
    while rest:
        tokens, state = rest.pop()
        if constraint.finished(state):
            assert not constraint.allowed(state)
            found[tokens] = True
            assert len(found) < limit
            continue
        allowed = constraint.allowed(state)
        assert allowed, f"stuck behind {decode(list(tokens))!r}"
        rest += [((*tokens, token), constraint.advance(state, token)) for token in allowed]
    return found


words = st.text(alphabet="ab; .", min_size=1, max_size=4)
languages = st.builds(
    Choices,
    options=st.lists(words, min_size=1, max_size=4, unique=True).map(tuple),
    separator=st.sampled_from(["", ";", "; ", "\n", "a"]),
    end=st.sampled_from(["", ".", "\n", "\n\n", "E"]),
    repeat=st.integers(1, 3),
    may_be_empty=st.booleans(),
)


@given(languages)
def test_what_can_be_generated_is_the_language(choices: Choices) -> None:
    try:
        constraint = TokenConstraint(encode, choices, END)
    except ConfigError:  # which ones, the next test tells
        assume(False)
    written = everything(constraint)
    assert {decode(list(tokens)) for tokens in written} == sentences(choices)
    assert all((tokens[-1] == END) == (choices.end == "") for tokens in written)


@given(languages)
def test_only_ends_that_can_be_mistaken_are_refused(choices: Choices) -> None:
    """With letters as tokens a language is refused exactly where a sentence is the beginning of another one."""

    def letters(text: str) -> list[int]:
        return [ord(c) for c in text]

    whole = sentences(Choices(**{**vars(choices), "repeat": 3 if choices.repeat > 1 else 1}))
    ambiguous = any(a != b and b.startswith(a) for a in whole for b in whole) and choices.end != ""
    try:
        TokenConstraint(letters, choices, END)
        refused = False
    except ConfigError:
        refused = True
    if ambiguous:
        assert refused
    if refused:  # an end within any number of options is refused too
        longer = sentences(Choices(**{**vars(choices), "repeat": 5 if choices.repeat > 1 else 1}))
        assert choices.end != ""
        assert any(a != b and b.startswith(a) for a in longer for b in longer)


def test_an_option_that_begins_another() -> None:
    choices = Choices(options=("put a", "put a in b", "put"), separator=";", end="\n", repeat=2)
    constraint = TokenConstraint(lambda text: [ord(c) for c in text], choices, None)
    state = constraint.start()
    for letter in "put":
        state = constraint.advance(state, ord(letter))
    assert constraint.allowed(state) == {ord(";"), ord("\n"), ord(" ")}
    for letter in " a;put":
        state = constraint.advance(state, ord(letter))
    assert constraint.allowed(state) == {ord("\n"), ord(" ")}, "no third option"
    assert not constraint.finished(state)
    assert constraint.finished(constraint.advance(state, ord("\n")))
    with pytest.raises(ConfigError, match=r"expected an allowed token \(10, 32\), got 59"):
        constraint.advance(state, ord(";"))


def test_states_are_values() -> None:
    constraint = TokenConstraint(encode, Choices(options=("ab", "b"), separator=";", repeat=3), END)
    begin = constraint.start()
    once = constraint.advance(begin, encode("ab;")[0])
    assert begin == constraint.start()
    assert hash(begin) == hash(constraint.start())
    assert once == constraint.advance(begin, encode("ab;")[0]) != begin


@pytest.mark.parametrize(
    ("choices", "end_id", "complaint"),
    [
        (Choices(options=(), end="."), None, "expected options to choose from"),
        (Choices(options=("",), end="."), None, "options that have tokens, got ''"),
        (Choices(options=("a",)), None, "expected an end"),
        (Choices(options=("a",), end=".", repeat=0), None, "repeat=0"),
        (Choices(options=("a", "A"), end="."), None, "the same tokens for 'a' and 'A'"),
        (Choices(options=("a", "a.b"), end="."), None, "mistaken for the end '.'"),
        (Choices(options=("a",), separator=".", end=".", repeat=2), None, "mistaken for the end '.'"),
        (Choices(options=("x", "y"), separator="", end="xy", repeat=3), None, "mistaken for the end 'xy'"),
        (Choices(options=("a", "ab")), ord("b"), "mistaken for the model's end-of-sequence token"),
    ],
)
def test_what_is_no_language_is_refused(choices: Choices, end_id: int | None, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        TokenConstraint(lambda text: [ord(c) for c in text.lower()], choices, end_id)


def skills() -> tuple[str, ...]:
    things = [f"{colour} {shape}" for colour in ("red", "green", "blue", "dark blue") for shape in ("cube", "bowl")]
    things += ["drawer", "table", "left corner", "right corner", "top", "top drawer"]
    pairs = [f"put the {a} in the {b}." for a in things for b in things if a != b]
    return (*pairs, *(f"pick up the {a}." for a in things), *(f"open the {a}" for a in things), "done")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from tiny_lm import make_tokenizer

    return make_tokenizer().backend_tokenizer


def test_random_walks_never_leave_the_language(tokenizer: Any) -> None:
    options = skills()
    assert len(options) > 200
    choices = Choices(options=options, separator="\n", end="\n\n", repeat=4, may_be_empty=True)
    constraint = TokenConstraint(lambda text: tokenizer.encode(text).ids, choices, None)
    draw, known, lengths = random.Random(0), set(options), set()
    for _ in range(10_000):
        state, tokens = constraint.start(), []
        while not constraint.finished(state):
            token = draw.choice(sorted(constraint.allowed(state)))
            state = constraint.advance(state, token)
            tokens.append(token)
        text = tokenizer.decode(tokens)
        assert text.endswith("\n\n")
        written = text[:-2].split("\n") if text != "\n\n" else []
        assert set(written) <= known
        lengths.add(len(written))
    assert lengths == {0, 1, 2, 3, 4}


def test_three_hundred_options_are_quick(tokenizer: Any) -> None:
    options = tuple(f"{text} {i}" for i, text in enumerate(itertools.islice(itertools.cycle(skills()), 300)))
    begin = time.process_time()
    constraint = TokenConstraint(
        lambda text: tokenizer.encode(text).ids, Choices(options=options, separator="\n", repeat=10), END
    )
    built = time.process_time()
    for option in options:
        state = constraint.start()
        for token in [*tokenizer.encode(option + "\n").ids, *tokenizer.encode(option).ids, END]:
            assert token in constraint.allowed(state)
            state = constraint.advance(state, token)
        assert constraint.finished(state)
    walked = time.process_time()
    assert built - begin < 1.0
    assert walked - built < 1.0


def test_an_option_and_what_follows_it_are_cut_as_one_text(tokenizer: Any) -> None:
    """Where a full stop and a line end are one token, that token is the one allowed."""
    joint = tokenizer.encode("pick up the top.\n").ids
    assert joint != tokenizer.encode("pick up the top.").ids + tokenizer.encode("\n").ids
    constraint = TokenConstraint(
        lambda text: tokenizer.encode(text).ids, Choices(options=("pick up the top.",), end="\n"), None
    )
    assert list(everything(constraint)) == [tuple(joint)]


@pytest.mark.parametrize(
    ("module", "absent"),
    [("trie", {"torch", "transformers", "httpx"}), ("openai_lm", {"torch", "transformers"}), ("replay", {"torch"})],
)
def test_what_an_import_brings_along(module: str, absent: set[str]) -> None:
    """Planning against a server needs no torch, and constraints need nothing."""
    code = f"import sys, brachium.policies.planners.lm.{module}; print(sorted({absent!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
