"""How long-horizon work is asked for: wordings of training, and wordings that are held out of it.

``(a|b)`` is either of them, drawn at random; ``{name}`` is filled in. A held-out wording recombines phrases and words
that training knows; it differs from every training wording of every family in at least two words.
"""

from __future__ import annotations

import re

import numpy as np

WORDINGS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "sort": (
        (
            "i want (every|each) {kind} in the bowl of its color",
            "by color , (put|place) the {kind}s (in|into) the bowls",
            "(sort|put) (every|each) {kind} into (its bowl|the bowl of its color)",
            "(see|make sure) that the {kind}s are in the bowls of their color",
            "(put|place|move|drop) (every|each) {kind} (in|into|inside) the bowl of its color",
            "(put|place|move) (all|all of) the {kind}s (in|into) the bowls of their color",
            "sort the {kind}s by color",
            "sort (all the|all|the) {kind}s into the (bowls|matching bowls)",
            "(every|each) {kind} (belongs|goes) (in|into) the bowl of (its|the same) color",
            "match the {kind}s with the bowls by color",
            "(every|each) {kind} should be in the bowl of its color",
        ),
        (
            "make sure that each {kind} is in the bowl of its color",
            "the {kind}s belong in the bowls of the same color",
            "by color , sort every {kind} into its bowl",
        ),
    ),
    "stack": (
        (
            "first (put|place|stack) the {a} on the {b} , then the {c} on the {a}",
            "i want the {a} on the {b} and the {c} on the {a}",
            "(put|place) the {c} on the {a} after the {a} is on the {b}",
            "make sure that the {a} is on the {b} and the {c} on the {a}",
            "the {a} belongs on the {b} , the {c} belongs on the {a}",
            "(build|make) a tower : the {b} , then the {a} , then the {c}",
            "the {c} belongs on top of the {a} and the {a} on top of the {b}",
            "stack the {a} on the {b} and the {c} on (top of the|the) {a}",
            "(put|place) the {a} on (top of the|the) {b} , then the {c} on (top of the|the) {a}",
            "(build|make) a tower with the {b} at the bottom , the {a} in the middle and the {c} on top",
            "(build|make) a tower of the {b} , the {a} and the {c} , from bottom to top",
            "on the {b} (put|stack|place) the {a} , and on the {a} the {c}",
            "stack the {c} on the {a} and the {a} on the {b}",
            "i want a tower of the {b} , the {a} and the {c} , from bottom to top",
        ),
        (
            "make a tower : first the {b} , then the {a} , and the {c} on top",
            "the {a} goes on the {b} and the {c} goes on the {a}",
            "i want the {a} on top of the {b} and the {c} on top of the {a}",
        ),
    ),
    "gather": (
        (
            "the {kind}s (belong|go) (in|into) the {a}",
            "i want (every|each) {kind} (in|inside) the {a}",
            "(all the|the) {kind}s should be (in|inside) the {a}",
            "the {a} is where (every|each) {kind} (belongs|goes)",
            "(collect|take) (every|each) {kind} and (put|place) it (in|into) the {a}",
            "(put|place|move|drop) (all the {kind}s|every {kind}|each {kind}|all {kind}s) (in|into|inside) the {a}",
            "(gather|collect) (all the|the|all) {kind}s (in|into) the {a}",
            "(every|each) {kind} (belongs|goes) (in|into) the {a}",
            "(bring|get) (all the|all) {kind}s (into|to) the {a}",
            "fill the {a} with (all the|the) {kind}s",
            "the {a} is for (all the|the) {kind}s",
            "(see|make sure) that (all the|all) {kind}s are in the {a}",
        ),
        (
            "i want all the {kind}s in the {a}",
            "the {a} is where all the {kind}s belong",
            "every {kind} should be inside the {a}",
        ),
    ),
    "store": (
        (
            "(open|pull open) the drawer , (put|place) the {a} (in|into) it , then (close|shut) it",
            "make sure that the {a} is in the drawer and the drawer is (closed|shut)",
            "first (put|place) the {a} (in|into) the drawer , then (close|shut) it",
            "after the {a} is in the drawer , (close|shut) it",
            "the {a} goes in the drawer , and the drawer should be (closed|shut)",
            "(put|place|store|drop) the {a} (in|into|inside) the drawer and (close|shut) it",
            "(put|place|store) the {a} (in|into) the drawer , then (close|shut) the drawer",
            "(open the drawer|open it) , (put|place) the {a} (in|into) the drawer and (close|shut) it again",
            "(store|put away) the {a} in the drawer and (close|shut) it",
            "the {a} (belongs|goes) (in|into) the closed drawer",
            "i want the {a} (in|inside) the drawer and the drawer (closed|shut)",
        ),
        (
            "the {a} should be inside the drawer and the drawer closed",
            "close the drawer after the {a} is in it",
            "put away the {a} in the drawer , then shut it again",
        ),
    ),
    "store_two": (
        (
            "i want the {a} and the {b} (in|into) the closed drawer",
            "make sure that the {a} and the {b} are in the drawer and the drawer is (closed|shut)",
            "first (put|place) the {a} and the {b} (in|into) the drawer , then (close|shut) it",
            "(store|put away) the {a} and the {b} in the drawer and (close|shut) it",
            "the {a} and the {b} should be in the closed drawer",
            "(put|place|store|drop) the {a} and the {b} (in|into|inside) the drawer and (close|shut) it",
            "(put|place|store) (both the|the) {a} and the {b} (in|into) the drawer , then (close|shut) the drawer",
            "(open the drawer|open it) , (put|place) the {a} and the {b} (in|into) it and (close|shut) it again",
            "the {a} and the {b} (belong|go) (in|into) the closed drawer",
            "(close|shut) the drawer after the {a} and the {b} are (in|inside) it",
        ),
        (
            "i want the {a} and the {b} inside the drawer and the drawer closed",
            "the {a} and the {b} should be in the drawer , and the drawer shut",
        ),
    ),
    "swap": (
        (
            "i want the {a} where the {b} is , and the {b} where the {a} is",
            "(make|let) the {a} and the {b} swap places",
            "make sure that the {a} and the {b} (swap|exchange) places",
            "first (take|get) the {a} , then the {b} , and (swap|exchange) them",
            "the {a} goes where the {b} is , and the {b} where the {a} is",
            "swap the {a} and the {b}",
            "(swap|exchange) the {a} with the {b}",
            "exchange the {a} and the {b}",
            "exchange the places of the {a} and the {b}",
            "(put|move) the {a} where the {b} is , and the {b} where the {a} is",
            "let the {a} and the {b} (swap|exchange) places",
            "the {a} should be where the {b} is , and the {b} where the {a} is",
        ),
        (
            "the {a} and the {b} should swap places",
            "let the {a} exchange places with the {b}",
            "the {a} and the {b} : let them exchange places",
        ),
    ),
    "replace": (
        (
            "first (free|clear) the {c} , then (put|move) the {a} (on it|there)",
            "i want the {a} on the {c} , so (clear|free) it",
            "after you clear the {c} , (put|place|move) the {a} (on it|there)",
            "make sure that the {c} is (clear|free) , then (put|place) the {a} on it",
            "the {a} belongs on the {c} : (clear|free) it first",
            "the {a} should be on the {c} , but clear it first",
            "(clear|free) the {c} first : the {a} goes there",
            "clear the {c} and (put|place|move) the {a} on it",
            "(take|move) (everything|whatever is) off the {c} , then (put|place) the {a} on it",
            "(put|place|move) the {a} on the {c} , but clear it first",
            "free the {c} and (put|place) the {a} (on it|there)",
            "clear the {c} , then (move|put) the {a} there",
        ),
        (
            "the {a} belongs on the {c} after you clear it",
            "i want the {a} on the {c} : clear it first",
            "the {a} should be on the {c} : free it first",
        ),
    ),
    "leave": (
        (
            "make sure that (only|just) {n} {kind}s are left on the table , the (others|rest) (belong|go) in the {a}",
            "(keep|leave) {n} {kind}s on the table : the (others|rest) should be in the {a}",
            "(put|place) the {kind}s (in|into) the {a} , but (keep|leave) {n} on the table",
            "leave {n} {kind}s on the table and (put|place|move) the (others|rest) (in|into) the {a}",
            "(put|place|move|drop) {kind}s (in|into) the {a} until {n} are left on the table",
            "(put|place|move) all but {n} {kind}s (in|into) the {a}",
            "(keep|leave) only {n} {kind}s on the table , the (others|rest) (belong|go) (in|into) the {a}",
            "all {kind}s but {n} (belong|go) (in|into) the {a}",
            "i want (only|just) {n} {kind}s on the table and the (others|rest) in the {a}",
        ),
        (
            "i want {n} {kind}s left on the table and the rest in the {a}",
            "the others go into the {a} , but keep {n} {kind}s on the table",
            "until only {n} are left on the table , put {kind}s into the {a}",
        ),
    ),
    "condition": (
        (
            "if the drawer is open , the {a} and the {b} (belong|go) (in|into) it , (else|otherwise) in the {c}",
            "if the drawer is open i want the {a} and the {b} in it , (else|otherwise) in the {c}",
            "the {a} and the {b} (belong|go) in the drawer if it is open , (else|otherwise) in the {c}",
            "if the drawer is open (put|place) the {a} and the {b} there , (else|otherwise) put them (in|into) the {c}",
            "if the drawer is open , (put|place) the {a} and the {b} (in|into) it , (else|otherwise) in the {c}",
            "(put|place) the {a} and the {b} (in|into) the drawer if it is open , (else|otherwise) (in|into) the {c}",
            "(is|in case) the drawer open ? then (put|place) the {a} and the {b} in it , (else|otherwise) in the {c}",
            "in case the drawer is open (put|place) the {a} and the {b} there , (else|otherwise) (in|into) the {c}",
        ),
        (
            "in case the drawer is open , the {a} and the {b} belong in it , otherwise in the {c}",
            "the {a} and the {b} should be in the drawer in case it is open , else in the {c}",
        ),
    ),
    "undo": (
        (
            "the last {n} things that you moved belong where they were",
            "i want the last {n} moves undone",
            "make sure that the last {n} (moves|steps) are undone",
            "after your last {n} (moves|steps) , put the things back where they were",
            "undo the last {n} moves",
            "undo your last {n} (moves|steps)",
            "(put|bring) the last {n} things back (where they were|to their places)",
            "take back (the|your) last {n} (moves|steps)",
            "undo the {n} moves (before|that you made)",
            "(revert|undo) the last {n} steps",
            "the last {n} steps : (undo|revert) them",
            "bring the {n} things that you moved last back",
        ),
        (
            "bring the last {n} things that you moved back to where they were",
            "the last {n} moves : take them back",
            "please revert your last {n} moves",
        ),
    ),
    "pair": (
        (
            "the {a} should be {to_b} and the {c} {to_d}",
            "make sure that the {a} is {to_b} and the {c} {to_d}",
            "(put|place) the {c} {to_d} after the {a} is {to_b}",
            "i want the {a} {to_b} , and then the {c} {to_d}",
            "(take|get) the {a} and put it {to_b} , then (take|get) the {c} and put it {to_d}",
            "the {a} goes {to_b} , the {c} goes {to_d}",
            "(put|place|move|drop) the {a} {to_b} (and|, then|and then) (put|place|move) the {c} {to_d}",
            "(put|place|move) the {a} {to_b} and the {c} {to_d}",
            "first (put|place|move) the {a} {to_b} , then (put|place|move) the {c} {to_d}",
            "(put|place|move) the {a} {to_b} , and the {c} {to_d}",
            "the {a} (belongs|goes) {to_b} and the {c} {to_d}",
            "after the {a} is {to_b} , (put|place) the {c} {to_d}",
        ),
        (
            "i want to see the {a} {to_b} and the {c} {to_d}",
            "the {c} goes {to_d} after the {a} is {to_b}",
        ),
    ),
    "both": (
        (
            "(put|place|move|drop) the {a} and the {b} {to}",
            "(put|place|move) both the {a} and the {b} {to}",
            "the {a} and the {b} (belong|go) {to}",
            "i want the {a} and the {b} {to}",
            "first (put|place) the {a} , then the {b} {to}",
            "see that the {a} and the {b} are {to}",
            "(take|get) the {a} and the {b} and (put|place) them {to}",
            "{to} (put|place) the {a} and the {b}",
        ),
        (
            "the {a} and the {b} should be {to}",
            "make sure that the {a} and the {b} are {to}",
            "both things belong {to} : the {a} and the {b}",
        ),
    ),
    "single": (
        (
            "the {a} should be {to}",
            "see that the {a} is {to}",
            "please , the {a} {to}",
            "(put|place|move|drop|bring) the {a} {to}",
            "pick up the {a} and (put|place|drop) it {to}",
            "(take|get) the {a} and (put|place) it {to}",
            "i want the {a} {to}",
            "the {a} (belongs|goes) {to}",
        ),
        ("make sure that the {a} is {to}",),
    ),
    "drawer": (
        (
            "see that the drawer is {state}",
            "the drawer (belongs|should be) {state}",
            "make it {state} : the drawer",
            "{act} the drawer",
            "i want the drawer {state}",
            "the drawer should be {state}",
            "{act} it : the drawer",
        ),
        ("make sure that the drawer is {state}",),
    ),
}
"""Family -> (wordings of training, held-out wordings)."""
POLITE = ("", "", "", "please ", "could you ", "robot , ", "now ")
NUMBERS = ("zero", "one", "two", "three", "four", "five")


def word(family: str, roles: dict[str, str], rng: np.random.Generator, held_out: bool = False) -> str:
    """An instruction of a family with its names filled in."""
    templates = WORDINGS[family][1 if held_out else 0]
    text = templates[int(rng.integers(len(templates)))]
    text = re.sub(r"\(([^()]*\|[^()]*)\)", lambda m: _draw(m.group(1).split("|"), rng), text)
    text = text.format(**roles)
    if rng.random() < 0.25:
        text = text.replace("cube", "block")
    return _draw(POLITE, rng) + text


def _draw(options: list[str] | tuple[str, ...], rng: np.random.Generator) -> str:
    return options[int(rng.integers(len(options)))]
