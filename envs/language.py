"""Instructions: several ways to say each task, some of them held out of training.

Text comes in splits. ``train`` sentences are what demonstrations carry. ``paraphrase`` sentences are never used in
training. ``pair`` uses train sentences, but the object is one of `HELD_OUT_PAIRS`, which no demonstration and no
training sentence names (such objects do stand on the table as distractors).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

SPLITS = ("train", "paraphrase", "pair")
EVERYTHING = "all"
"""No split: training sentences that name every thing, for models that are not to be tested on held-out pairs."""
HELD_OUT_PAIRS = frozenset({("orange", "cube"), ("blue", "cylinder"), ("purple", "ball")})
"""(colour, kind) of objects that training never names."""


def may_name(name: str, split: str) -> bool:
    """Whether texts of the split speak of a thing: of held-out pairs in ``pair``, and of all else in the others."""
    if split == EVERYTHING:
        return True
    return (tuple(name.split(" ")) in HELD_OUT_PAIRS) == (split == "pair")


@dataclass(frozen=True, kw_only=True)
class Phrasings:
    """Sentence templates of one task; ``{object}`` and ``{goal}`` are replaced by names."""

    train: tuple[str, ...]
    paraphrase: tuple[str, ...]

    def sample(self, rng: np.random.Generator, split: str, roles: dict[str, str]) -> str:
        """Draw a template of the split and fill in the names."""
        templates = self.paraphrase if split == "paraphrase" else self.train
        return templates[int(rng.integers(len(templates)))].format(**roles)


NAME = Phrasings(
    train=("the {object}", "{object}", "find the {object}", "show me the {object}"),
    paraphrase=("point to the {object}", "look for the {object}"),
)
"""No task: a thing by its name, for pointing at it."""
REACH = Phrasings(
    train=(
        "reach the {object}",
        "move to the {object}",
        "go to the {object}",
        "touch the {object}",
        "move the gripper to the {object}",
        "please reach for the {object}",
        "go over to the {object}",
    ),
    paraphrase=("please go to the {object}", "bring the gripper to the {object}", "reach over to the {object}"),
)
PUSH = Phrasings(
    train=(
        "push the {object} to the {goal}",
        "push the {object} onto the {goal}",
        "slide the {object} to the {goal}",
        "shove the {object} over to the {goal}",
        "please push the {object} until it is on the {goal}",
    ),
    paraphrase=("please slide the {object} onto the {goal}", "push the {object} over until it reaches the {goal}"),
)
PLACE = Phrasings(
    train=(
        "put the {object} in the {goal}",
        "place the {object} into the {goal}",
        "pick up the {object} and place it in the {goal}",
        "drop the {object} into the {goal}",
        "please pick up the {object} and put it into the {goal}",
    ),
    paraphrase=("grab the {object} and drop it in the {goal}", "please place the {object} in the {goal}"),
)
STACK = Phrasings(
    train=(
        "stack the {object} on the {goal}",
        "put the {object} on top of the {goal}",
        "pick up the {object} and stack it on the {goal}",
    ),
    paraphrase=("place the {object} on top of the {goal}", "please stack the {object} on top of the {goal}"),
)
OPEN_DRAWER = Phrasings(
    train=("open the drawer", "pull the drawer open", "pull out the drawer"),
    paraphrase=("please open the drawer", "slide the drawer open"),
)
CLOSE_DRAWER = Phrasings(
    train=("close the drawer", "push the drawer shut", "push in the drawer"),
    paraphrase=("please close the drawer", "slide the drawer shut"),
)
PUT_IN = Phrasings(train=("put the {object} in the {goal}",), paraphrase=("put the {object} into the {goal}",))
PUT_ON = Phrasings(train=("put the {object} on the {goal}",), paraphrase=("lay the {object} on the {goal}",))
STACK_ON = Phrasings(train=("stack the {object} on the {goal}",), paraphrase=("set the {object} on the {goal}",))
PUT_DOWN = Phrasings(train=("put the {object} on the table",), paraphrase=("lay the {object} on the table",))
"""What skills of long-horizon work are called; one wording each, for a planner says them."""
