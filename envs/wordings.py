"""How questions about scenes are worded: in training, and in wordings that are held out of it."""

from __future__ import annotations

ASKS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "color": (
        (
            "what color is the {a}?",
            "which color does the {a} have?",
            "what is the color of the {a}?",
            "name the color of the {a}.",
            "the {a} has which color?",
        ),
        ("the {a} is of what color?", "which is the color of the {a}?"),
    ),
    "color_at": (
        (
            "what color is the thing at {at}?",
            "which color does the thing at {at} have?",
            "name the color of the thing at {at}.",
            "at {at} there is which color?",
        ),
        ("what is the color of the thing at {at}?", "the thing at {at} has which color?"),
    ),
    "shape": (
        (
            "what is the {a} thing?",
            "which shape is the {a} thing?",
            "what kind of thing is {a}?",
            "name the shape of the {a} thing.",
            "the {a} thing is of which kind?",
        ),
        ("the {a} thing is what?", "what is the shape of the {a} thing?"),
    ),
    "name_at": (
        (
            "what is at {at}?",
            "which thing lies at {at}?",
            "name the thing at {at}.",
            "the thing at {at} is what?",
        ),
        ("which thing is at {at}?", "what is the thing at {at}?"),
    ),
    "exists": (
        (
            "is there a {a}?",
            "can you see a {a}?",
            "does a {a} lie on the table?",
            "is a {a} on the table?",
        ),
        ("do you see a {a}?", "is there a {a} on the table?"),
    ),
    "count": (
        (
            "how many {a}s are there?",
            "count the {a}s.",
            "what is the count of {a}s?",
            "how many {a}s can you see?",
            "how many {a}s lie on the table?",
            "what is the number of {a}s?",
        ),
        ("count the {a}s on the table.", "how many {a}s are on the table?"),
    ),
    "left": (
        (
            "is the {a} left of the {b}?",
            "is the {a} to the left of the {b}?",
            "does the {a} stand left of the {b}?",
            "is the {a} standing left of the {b}?",
        ),
        ("does the {a} lie left of the {b}?", "does the {a} stand to the left of the {b}?"),
    ),
    "right": (
        (
            "is the {a} right of the {b}?",
            "is the {a} to the right of the {b}?",
            "does the {a} stand right of the {b}?",
            "is the {a} standing right of the {b}?",
        ),
        ("does the {a} lie right of the {b}?", "does the {a} stand to the right of the {b}?"),
    ),
    "nearer": (
        (
            "is the {a} nearer to the robot than the {b}?",
            "is the {a} closer to the robot than the {b}?",
            "does the {a} stand nearer to the robot than the {b}?",
        ),
        ("does the {a} lie nearer to the robot than the {b}?", "does the {a} stand closer to the robot than the {b}?"),
    ),
    "leftmost": (
        ("what is the leftmost thing?", "which thing is leftmost?", "name the leftmost thing."),
        ("the leftmost thing is what?", "which is the leftmost thing?"),
    ),
    "rightmost": (
        ("what is the rightmost thing?", "which thing is rightmost?", "name the rightmost thing."),
        ("the rightmost thing is what?", "which is the rightmost thing?"),
    ),
    "holding": (
        (
            "is the gripper holding something?",
            "is something in the gripper?",
            "does the gripper hold something?",
            "is there a thing in the gripper?",
        ),
        ("does the gripper hold a thing?", "is there something in the gripper?"),
    ),
    "held": (
        ("what is the gripper holding?", "what is in the gripper?", "name the thing in the gripper."),
        ("which thing does the gripper hold?", "which thing is in the gripper?"),
    ),
    "drawer": (
        ("is the drawer open?", "does the drawer stand open?", "has the drawer been opened?"),
        ("is the drawer pulled open?", "has the drawer been pulled open?"),
    ),
    "point": (
        (
            "where is the {a} in the {view} view?",
            "point to the {a} in the {view} view.",
            "the {a} is where in the {view} view?",
            "find the {a} in the {view} view.",
        ),
        ("locate the {a} in the {view} view.", "where in the {view} view is the {a}?"),
    ),
    "box": (
        (
            "box of the {a} in the {view} view?",
            "box the {a} in the {view} view.",
            "what is the box of the {a} in the {view} view?",
        ),
        ("give the box of the {a} in the {view} view.", "where is the box of the {a} in the {view} view?"),
    ),
    "detect": (
        (
            "where are the {a}s in the {view} view?",
            "find all {a}s in the {view} view.",
            "point to all {a}s in the {view} view.",
        ),
        ("point to the {a}s in the {view} view.", "find the {a}s in the {view} view."),
    ),
    "match": (
        (
            "{at} in the front view is where in the wrist view?",
            "find {at} of the front view in the wrist view.",
            "what is at {at} in the front view is where in the wrist view?",
        ),
        ("where in the wrist view is {at} of the front view?", "{at} of the front view is where in the wrist view?"),
    ),
    "place": (
        (
            "where on the table is the {a}?",
            "on which part of the table is the {a}?",
            "which part of the table has the {a}?",
            "the {a} is in which part of the table?",
            "which place on the table does the {a} have?",
        ),
        ("the {a} is where on the table?", "the {a} is on which part of the table?"),
    ),
    "gripper": (
        (
            "where is the gripper?",
            "what is the place of the gripper?",
            "at which place is the gripper?",
            "what is the position of the gripper?",
            "the gripper is at which position?",
        ),
        ("at which position is the gripper?", "the gripper is at which place?"),
    ),
    "caption": (
        (
            "what is on the table?",
            "describe the table.",
            "name the things on the table.",
            "what lies on the table?",
            "which things lie on the table?",
        ),
        ("which things are on the table?", "name what is on the table."),
    ),
}
"""Kind of question -> (wordings of training, held-out wordings)."""
HOLDING: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "holder": (
        (
            "what is the {a} in or on?",
            "what does the {a} rest in or on?",
            "what is under or around the {a}?",
            "name what the {a} is in or on.",
        ),
        ("the {a} is in or on what?", "what is the thing that the {a} rests in or on?"),
    ),
    "within": (
        ("is the {a} in or on the {b}?", "does the {a} rest in or on the {b}?", "is the {b} under or around the {a}?"),
        ("does the {b} hold the {a}?",),
    ),
    "present": (
        ("is there a {a}?", "can you see a {a}?", "does a {a} lie on the table?", "is a {a} on the table?"),
        ("do you see a {a}?", "is there a {a} on the table?"),
    ),
}
"""Questions about what holds what, for tables on which things are in and on others."""
