"""The model that comes with the package: it fits, it loads as its large relatives do, it knows what its card says.

It is asked about scenes that no training drew. The bounds are well below what the card claims, so that only a broken
model, or one that is not what it says, fails.
"""

import inspect
import json
import re
from collections import defaultdict

import numpy as np
import pytest
from hydra.utils import instantiate
from transformers import AutoModelForImageTextToText

from brachium.cli.compose import Composer, load
from brachium.vla.card import recipe_hash
from brachium.vla.pretrain import settings_of
from brachium.vla.pretrained import SHIPPED, Pretrained, find_pretrained

FOLDER = SHIPPED / "nano"
TABLES = 14


@pytest.fixture(scope="module")
def nano():
    return Pretrained.load("nano")


@pytest.fixture(scope="module")
def scenes():
    sampler = load("env/scenes")()
    return [scene for seed in range(7_000_000, 7_000_000 + TABLES) for scene in sampler.sample(seed)]


def test_it_is_small_and_whole():
    assert find_pretrained("nano") == FOLDER
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) <= 12e6
    notes = json.loads((FOLDER / "brachium.json").read_text())["notes"]
    assert str(FOLDER.parent.parent.parent) not in (FOLDER / "brachium.json").read_text()
    card = (FOLDER / "README.md").read_text()
    for promise in ("license: apache-2.0", notes["recipe"], "no picture", "pairs never named"):
        assert promise in card


def test_the_recipe_on_its_card_is_the_one_of_the_command():
    config = Composer().compose("pretrain").config
    asked = instantiate({**config, "_target_": "builtins.dict", "recorder": None, "scenes": None}, _convert_="all")
    settings = settings_of(**{name: asked[name] for name in inspect.signature(settings_of).parameters})
    notes = json.loads((FOLDER / "brachium.json").read_text())["notes"]
    assert recipe_hash(asked["tables"], settings, asked["optimization"]) == notes["recipe"]
    assert asked["optimization"].noted() == notes["optimization"]


def test_it_is_a_plain_model_of_transformers():
    assert type(AutoModelForImageTextToText.from_pretrained(FOLDER)).__name__ == "SmolVLMForConditionalGeneration"


def test_it_answers_as_its_card_says(nano, scenes):
    right = defaultdict(list)
    for scene in scenes:
        images = list(scene.images.values())
        for question in scene.questions:
            if question.kind in ("color_at", "shape", "left", "right", "nearer", "exists", "holding", "count", "color"):
                right[question.kind].append(nano.answer(images, question.question) == question.answer)
    scores = {kind: float(np.mean(values)) for kind, values in right.items()}
    assert min(len(values) for values in right.values()) >= 10
    for kind in ("left", "right", "nearer", "holding", "color_at"):
        assert scores[kind] > 0.85, scores
    assert np.mean([x for values in right.values() for x in values]) > 0.85, scores


def test_it_points_at_what_is_named(nano, scenes):
    errors = []
    for scene in scenes:
        for sentence in scene.sentences:
            thing = sentence["roles"]["object"]
            u, v, depth = scene.objects[thing, 3:6]
            if scene.pixels[thing, 0] >= 8 and depth > 0 and 0 < u < 1 and 0 < v < 1:
                found = nano.locate(scene.images["front"], sentence["text"])
                errors.append(96 * np.hypot(found.u - u, found.v - v))
    assert len(errors) > 100
    assert np.median(errors) < 1.0
    assert np.quantile(errors, 0.9) < 4.0


def test_location_tokens_in_an_answer_are_a_place(nano, scenes):
    off = []
    for scene in scenes:
        for question in scene.questions:
            if question.kind == "point" and "front" in question.question:
                answer = nano.answer(list(scene.images.values()), question.question)
                said, true = ([int(k) for k in re.findall(r"<loc(\d\d)>", text)] for text in (answer, question.answer))
                assert len(said) == 2
                off.append(np.hypot(*(np.array(said) - true)))
    assert np.median(off) < 4.0
