"""Texts about a still scene: captions, questions with short answers, and places as location tokens.

Everything is computed from the simulator's truth, so it is as right as the scene. Answers are balanced: the answer is
drawn first, or the question is asked only as often as the rarer answer allows, so that text alone says little.
Location tokens are written as in PaliGemma (Beyer et al. 2024): ``<locK>``, y before x, here with one token a ninety-
sixth of the image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import Formatter

import numpy as np

from ..sim.scene import COLORS, OBJECT_KINDS, Item
from .language import HELD_OUT_PAIRS, may_name
from .wordings import ASKS, HOLDING

LOCATIONS = 96
"""Location tokens along an image edge."""
SEEN = 8
"""Pixels of a thing that must be visible before it is asked about."""
MOST = 4
"""Things at most that are counted or listed with their places."""
OFTEN = {"count": 5.0, "color": 1.5, "holder": 5.0, "within": 3.0}
"""Kinds of questions that are drawn more often: they are learnt more slowly, or can rarely be asked."""
APART = 0.06
"""Difference in image coordinates from which on one thing counts as left of another."""
RARER = {0: 0.85, 1: 0.7, 2: 0.7, 3: 0.2}
"""Share of questions with this count that are not asked: every scene lacks something, few have four of a kind."""
ON_TABLE = -1
"""What a thing is on that stands on the table itself."""
PLAIN = 0.5
"""Share of things on the table itself that are not asked about: most things are there."""
FARTHER = 0.03
"""Difference in distance from the robot, along the table, from which on one thing counts as nearer than another [m]."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What is true of a scene.

    Attributes:
        items: The things.
        points: Camera -> (k, 3): u, v of each thing's centre (0..1) and depth [m].
        pixels: Camera -> (k,): number of pixels that show each thing.
        boxes: Camera -> (k, 4): u0, v0, u1, v1 of those pixels, 0..1.
        positions: (k, 3) in the base frame [m].
        tool: Tool position (3,) [m].
        held: Index of the thing between the fingers, or None.
        drawer: How far the drawer is out [m], or None.
        holders: Index of what each thing is in or on, `ON_TABLE`, or None where it is on nothing or cannot be; None
            where nobody has looked.
    """

    items: tuple[Item, ...]
    points: dict[str, np.ndarray]
    pixels: dict[str, np.ndarray]
    boxes: dict[str, np.ndarray]
    positions: np.ndarray
    tool: np.ndarray
    held: int | None
    drawer: float | None
    holders: tuple[int | None, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Mention:
    """Characters ``start`` to ``end`` of a text stand for ``things`` (indices) in the view of camera ``view``."""

    start: int
    end: int
    things: tuple[int, ...]
    view: int


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question and its answer; ``kind`` is a key of `ASKS`.

    Attributes:
        kind: Kind of question.
        question: Text.
        answer: Text.
        asked: What the words of the question stand for.
        meant: What the words of the answer are about.
    """

    kind: str
    question: str
    answer: str
    asked: tuple[Mention, ...] = ()
    meant: tuple[Mention, ...] = ()


@dataclass(frozen=True)
class Words:
    """Some words, the things they are about, and the camera whose view they speak of."""

    text: str
    things: tuple[int, ...] = ()
    view: int = 0


Made = tuple[dict[str, Words], list[Words]] | None
"""What fills the template of a question, and the parts of the answer; None where it cannot be asked of the scene."""


def join(parts: Sequence[Words]) -> tuple[str, tuple[Mention, ...]]:
    """Parts of a text as one, with where they stand."""
    text, found = "", []
    for part in parts:
        if part.things:
            found.append(Mention(start=len(text), end=len(text) + len(part.text), things=part.things, view=part.view))
        text += part.text
    return text, tuple(found)


def fill(template: str, words: Mapping[str, Words]) -> list[Words]:
    """The parts of a template with its fields filled in."""
    parts = []
    for plain, name, _, _ in Formatter().parse(template):
        parts += [Words(plain), *([words[name]] if name else [])]
    return parts


def location(u: float, v: float) -> str:
    """Two location tokens, y before x, of image coordinates in 0..1."""
    return "".join(f"<loc{int(np.clip(x * LOCATIONS, 0, LOCATIONS - 1)):02d}>" for x in (v, u))


NOTHING = 255
"""Index of no thing, in a cover."""


def cover(mask: np.ndarray, cell: int) -> np.ndarray:
    """Index of the thing that covers most of each cell of `cell` x `cell` pixels, row by row: uint8 (cells,).

    `NOTHING` where no thing covers a quarter of the cell.
    """
    height, width = mask.shape
    cells = mask.reshape(height // cell, cell, width // cell, cell).swapaxes(1, 2).reshape(-1, cell * cell)
    count = int(mask.max()) + 1
    if count <= 0:
        return np.full(len(cells), NOTHING, np.uint8)
    shares = (cells[:, :, None] == np.arange(count)).sum(1)
    best = shares.argmax(1)
    return np.where(shares.max(1) * 4 >= cell * cell, best, NOTHING).astype(np.uint8)


def visible_boxes(mask: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixels (k,) and box (k, 4) as u0, v0, u1, v1 in 0..1 of each of `count` things in an index image."""
    height, width = mask.shape
    pixels, boxes = np.zeros(count, np.int64), np.zeros((count, 4), np.float32)
    for k in range(count):
        rows, columns = np.nonzero(mask == k)
        pixels[k] = len(rows)
        if len(rows):
            corners = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            boxes[k] = np.array(corners) / np.array([width, height, width, height])
    return pixels, boxes


class Asker:
    """Draws questions about one scene.

    Args:
        facts: The scene.
        split: ``train`` never names a held-out pair; ``paraphrase`` uses held-out wordings; ``pair`` asks only about
            held-out pairs, where the kind of question names or answers a thing.
        rng: Draws.
    """

    def __init__(self, facts: Facts, split: str, rng: np.random.Generator) -> None:
        self.facts, self.split, self.rng = facts, split, rng
        self.asks = ASKS if facts.holders is None else ASKS | HOLDING
        self.cameras = tuple(facts.pixels)
        self.front = self.cameras[0]
        clear = [k for k in range(len(facts.items)) if facts.pixels[self.front][k] >= SEEN]
        self.seen = clear
        self.named = [k for k in clear if self._may_name(k)]

    def _may_name(self, k: int) -> bool:
        return may_name(self.facts.items[k].name, self.split)

    def draw(self, count: int) -> list[Question]:
        """Up to `count` different questions, of kinds drawn as often as `OFTEN` says among those that can be asked."""
        found: dict[str, Question] = {}
        often = np.array([OFTEN.get(kind, 1.0) for kind in self.asks])
        for _ in range(6 * count):
            kind = str(self.rng.choice(list(self.asks), p=often / often.sum()))
            made = getattr(self, f"_{kind}")()
            if made is not None:
                wordings = self.asks[kind][self.split == "paraphrase"]
                text, asked = join(fill(wordings[int(self.rng.integers(len(wordings)))], made[0]))
                answer, meant = join(made[1])
                question = Question(kind=kind, question=text, answer=answer, asked=asked, meant=meant)
                found.setdefault(text, question)
            if len(found) == count:
                break
        return list(found.values())

    def _pick(self, options: Sequence[int]) -> int | None:
        return int(options[int(self.rng.integers(len(options)))]) if len(options) else None

    def _name(self, k: int, view: int = 0) -> Words:
        return Words(self.facts.items[k].name, (k,), view)

    def _about(self, word: int) -> Made:
        """Ask for a word of a nameable thing (0 colour, 1 kind) whose other word no other thing has.

        Answers are drawn evenly.
        """
        names = [item.name.split(" ") for item in self.facts.items]
        other = 1 - word
        asked = [name[other] for name in names if len(name) == 2]
        options = [k for k in self.named if len(names[k]) == 2 and asked.count(names[k][other]) == 1]
        answer = self._one_of(sorted({names[k][word] for k in options}))
        k = self._pick([k for k in options if names[k][word] == answer])
        return None if k is None else ({"a": Words(names[k][other], (k,))}, [Words(names[k][word], (k,))])

    def _one_of(self, options: Sequence[str]) -> str | None:
        return options[int(self.rng.integers(len(options)))] if options else None

    def _color(self) -> Made:
        return self._about(0)

    def _shape(self) -> Made:
        return self._about(1)

    def _place_in(self, k: int, view: int) -> Words:
        u, v = self.facts.points[self.cameras[view]][k, :2]
        return Words(location(u, v), (k,), view)

    def _at(self) -> int | None:
        return self._pick([k for k in self.named if self._shown(k, 0) and self.facts.items[k].kind != "drawer"])

    def _color_at(self) -> Made:
        k = self._at()
        if k is None:
            return None
        return {"at": self._place_in(k, 0)}, [Words(self.facts.items[k].name.split(" ")[0], (k,))]

    def _name_at(self) -> Made:
        k = self._at()
        return None if k is None else ({"at": self._place_in(k, 0)}, [self._name(k)])

    def _exists(self) -> Made:
        """Things that are not there differ from one that is by colour or by kind, where the split has such a name."""
        k = self._pick([k for k in self.named if self.facts.items[k].kind in OBJECT_KINDS])
        if k is None:
            return None
        there = {item.name for item in self.facts.items}
        if self.rng.random() < 0.5:
            return {"a": self._name(k)}, [Words("yes", (k,))]
        color, kind = self.facts.items[k].name.split(" ")
        near = [f"{color} {other}" for other in OBJECT_KINDS] + [f"{other} {kind}" for other in COLORS]
        if self.split == "pair":  # they have no colour or kind in common
            near = sorted(" ".join(pair) for pair in HELD_OUT_PAIRS)
        absent = self._one_of([name for name in near if may_name(name, self.split) and name not in there])
        return None if absent is None else ({"a": Words(absent)}, [Words("no")])

    def _present(self) -> Made:
        """As `_exists`, of bowls, zones and the drawer."""
        kind = self._one_of(("bowl", "zone", "drawer"))
        there = {item.name: k for k, item in enumerate(self.facts.items) if item.kind == kind}
        if kind == "drawer":
            things = tuple(there.values())
            return {"a": Words("drawer", things)}, [Words("yes" if there else "no", things)]
        if self.rng.random() < 0.5:
            k = self._pick([k for k in there.values() if k in self.named])
            return None if k is None else ({"a": self._name(k)}, [Words("yes", (k,))])
        if not there and self.rng.random() < 0.7:
            return None
        absent = self._one_of([f"{color} {kind}" for color in COLORS if f"{color} {kind}" not in there])
        return None if absent is None else ({"a": Words(absent)}, [Words("no")])

    def _holder(self) -> Made:
        """What a thing is in or on."""
        k = self._resting()
        if k is None:
            return None
        if k == self.facts.held:
            return {"a": self._name(k)}, [Words("gripper", (k,))]
        assert self.facts.holders is not None
        place = self.facts.holders[k]
        assert place is not None
        return {"a": self._name(k)}, [Words("table", (k,)) if place == ON_TABLE else self._name(place)]

    def _within(self) -> Made:
        """Whether a thing is in or on another; where not, what is asked about is of the kinds that could be."""
        k = self._resting()
        if k is None or k == self.facts.held:
            return None
        assert self.facts.holders is not None
        place, cube = self.facts.holders[k], self.facts.items[k].kind == "cube"
        kinds = ("bowl", "zone", "drawer", *(("cube",) if cube else ()))
        others = [j for j in self.named if self.facts.items[j].kind in kinds and j not in (k, place)]
        wanted = place is not None and place != ON_TABLE and self.rng.random() < 0.6
        b = place if wanted else self._pick(others)
        if b is None:
            return None
        return {"a": self._name(k), "b": self._name(b)}, [Words("yes" if wanted else "no", (k, b))]

    def _resting(self) -> int | None:
        """A thing that can be moved and is seen, with what holds it."""
        holders = self.facts.holders
        assert holders is not None
        options = [k for k in self.named if self.facts.items[k].kind in OBJECT_KINDS]
        options = [k for k in options if k == self.facts.held or holders[k] is not None]
        k = self._pick(options)
        plain = k is not None and holders[k] == ON_TABLE and k != self.facts.held
        return None if plain and self.rng.random() < PLAIN else k

    def _count(self) -> Made:
        if self.split == "pair" or any(self.facts.pixels[self.front] < SEEN):
            return None  # what cannot be seen cannot be counted
        kinds = [item.kind for item in self.facts.items]
        counts = {kind: kinds.count(kind) for kind in (*OBJECT_KINDS, "bowl", "zone")}
        found = sorted({n for n in counts.values() if n <= MOST})
        wanted = found[int(self.rng.integers(len(found)))]
        if self.rng.random() < RARER.get(wanted, 0.0):
            return None
        asked = [kind for kind, n in counts.items() if n == wanted]
        kind = asked[int(self.rng.integers(len(asked)))]
        things = tuple(k for k, other in enumerate(kinds) if other == kind)
        return {"a": Words(kind, things)}, [Words(str(counts[kind]), things)]

    def _relation(self, along: np.ndarray, apart: float) -> Made:
        """Is one thing before another along some coordinate? One of them at least is nameable in this split."""
        others = [k for k in self.seen if self.split == "pair" or k in self.named]
        found = [(a, b) for a in self.named for b in others if a != b and abs(along[a] - along[b]) > apart]
        if not found:
            return None
        a, b = found[int(self.rng.integers(len(found)))]
        a, b = (a, b) if self.rng.random() < 0.5 else (b, a)
        return {"a": self._name(a), "b": self._name(b)}, [Words("yes" if along[a] < along[b] else "no", (a, b))]

    def _left(self) -> Made:
        return self._relation(self.facts.points[self.front][:, 0], APART)

    def _right(self) -> Made:
        return self._relation(-self.facts.points[self.front][:, 0], APART)

    def _nearer(self) -> Made:
        return self._relation(self.facts.positions[:, 0], FARTHER)

    def _outermost(self, sign: float) -> Made:
        if not self.named or len(self.seen) != len(self.facts.items):
            return None  # what is hidden might lie farther out
        along = sign * self.facts.points[self.front][:, 0]
        first, *others = (int(k) for k in np.argsort(along))
        if first not in self.named or (others and along[others[0]] - along[first] < APART / 2):
            return None
        return {}, [self._name(first)]

    def _leftmost(self) -> Made:
        return self._outermost(1.0)

    def _rightmost(self) -> Made:
        return self._outermost(-1.0)

    def _holding(self) -> Made:
        held = self.facts.held
        if held is None and self.rng.random() < 2 / 3:  # a quarter of the scenes hold something
            return None
        return {}, [Words("no") if held is None else Words("yes", (held,))]

    def _held(self) -> Made:
        held = self.facts.held
        if held is None:
            return ({}, [Words("nothing")]) if self.split != "pair" and self.rng.random() < 0.1 else None
        return ({}, [self._name(held)]) if self._may_name(held) else None

    def _drawer(self) -> Made:
        opening = self.facts.drawer
        if opening is None or 0.025 < opening < 0.05:  # neither open nor closed
            return None
        if opening >= 0.05 and self.rng.random() < 0.5:  # twice as many are open
            return None
        things = tuple(k for k, item in enumerate(self.facts.items) if item.kind == "drawer")
        return {}, [Words("yes" if opening >= 0.05 else "no", things)]

    def _shown(self, k: int, view: int) -> bool:
        camera = self.cameras[view]
        u, v, depth = self.facts.points[camera][k]
        return bool(0 < u < 1 and 0 < v < 1 and depth > 0 and self.facts.pixels[camera][k] >= SEEN)

    def _view(self) -> int:
        return int(self.rng.integers(len(self.cameras)))

    def _point(self) -> Made:
        view = self._view()
        k = self._pick([k for k in self.named if self._shown(k, view)])
        if k is None:
            return None
        return {"a": self._name(k, view), "view": Words(self.cameras[view])}, [self._place_in(k, view)]

    def _box(self) -> Made:
        view = self._view()
        camera = self.cameras[view]
        k = self._pick([k for k in self.named if self.facts.pixels[camera][k] >= SEEN])
        if k is None:
            return None
        u0, v0, u1, v1 = self.facts.boxes[camera][k]
        corners = Words(location(u0, v0) + location(u1, v1), (k,), view)
        return {"a": self._name(k, view), "view": Words(camera)}, [corners]

    def _detect(self) -> Made:
        """All things of a kind, from left to right, each with its place and colour."""
        view = self._view()
        clear = [k for k in self.named if self._shown(k, view) and self.facts.items[k].kind != "drawer"]
        kind = self._one_of(sorted({self.facts.items[k].kind for k in clear}))
        pixels = self.facts.pixels[self.cameras[view]]
        alike = [k for k, item in enumerate(self.facts.items) if item.kind == kind and pixels[k] > 0]
        if kind is None or len(alike) > MOST or any(k not in clear for k in alike):
            return None
        alike.sort(key=lambda k: float(self.facts.points[self.cameras[view]][k, 0]))
        found: list[Words] = []
        for k in alike:
            color = self.facts.items[k].name.split(" ")[0]
            found += [Words(", ")] if found else []
            found.append(Words(f"{self._place_in(k, view).text} {color}", (k,), view))
        return {"a": Words(kind, tuple(alike), view), "view": Words(self.cameras[view])}, found

    def _match(self) -> Made:
        if len(self.cameras) < 2:
            return None
        k = self._pick([k for k in self.named if self._shown(k, 0) and self._shown(k, 1)])
        return None if k is None else ({"at": self._place_in(k, 0)}, [self._place_in(k, 1)])

    def _place(self) -> Made:
        k = self._pick(self.named)
        return None if k is None else ({"a": self._name(k)}, [Words(place_words(self.facts.positions[k]), (k,))])

    def _gripper(self) -> Made:
        height = "low" if self.facts.tool[2] < 0.08 else "high" if self.facts.tool[2] > 0.16 else "middle"
        return {}, [Words(f"{height}, {place_words(self.facts.tool)}")]

    def _caption(self) -> Made:
        if self.split == "pair" or len(self.named) != len(self.facts.items):
            return None
        order = sorted(self.named, key=lambda k: float(self.facts.points[self.front][k, 0]))
        parts = [part for k in order for part in (Words(", "), self._name(k))]
        return {}, parts[1:]


def place_words(position: np.ndarray) -> str:
    """Which ninth of the table, seen from the front camera: near, middle or far from the robot; left, centre, right."""
    x, y = float(position[0]), float(position[1])
    depth = "near" if x < 0.31 else "far" if x > 0.38 else "middle"
    side = "left" if y < -0.06 else "right" if y > 0.06 else "centre"
    return f"{depth} {side}"
