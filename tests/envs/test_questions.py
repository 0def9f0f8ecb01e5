"""Questions about scenes: right by an independent reading of the simulator, balanced, and true to their split."""

import re
from collections import Counter, defaultdict

import numpy as np
import pytest

from brachium.envs.language import HELD_OUT_PAIRS
from brachium.envs.questions import LOCATIONS, NOTHING, cover, location, place_words, visible_boxes
from brachium.envs.scenes import Clutter, SceneSampler
from brachium.envs.tasks.drawer import Drawer
from brachium.envs.tasks.place import Place
from brachium.envs.wordings import ASKS
from brachium.errors import ConfigError
from brachium.sim.scene import COLORS, FIXED_KINDS, OBJECT_KINDS

TABLES = (Place(), Drawer(), Clutter(), Clutter())


def sampler(make_arm, split="train", tasks=TABLES, **options):
    return SceneSampler(tasks=tasks, embodiment=make_arm("arm6_ee"), questions=14, split=split, **options)


@pytest.fixture(scope="module")
def asked(make_arm):
    """(scene, names, question) of many scenes, for each split."""
    found = {}
    for split, tables in (("train", 60), ("paraphrase", 15), ("pair", 25)):
        made, found[split] = sampler(make_arm, split), []
        for seed in range(tables):
            for scene in made.sample(seed):
                names = [item.name for item in made.sim.scene.items]
                found[split] += [(scene, names, question) for question in scene.questions]
    return found


def where(scene, names, name, camera=0):
    return scene.objects[names.index(name), 3 + 3 * camera : 5 + 3 * camera]


def test_every_kind_is_asked_and_each_question_once_a_scene(asked):
    assert {q.kind for _, _, q in asked["train"]} == set(ASKS)
    scenes = defaultdict(list)
    for scene, _, question in asked["train"]:
        scenes[id(scene)].append(question.question)
    assert all(len(set(texts)) == len(texts) for texts in scenes.values())


def test_colors_shapes_and_counts_are_those_of_the_scene(asked):
    for scene, names, q in asked["train"]:
        words = q.question.strip("?.").split()
        pairs = [name.split(" ") for name in names if " " in name]
        if q.kind == "color":
            assert [c for c, kind in pairs if kind in words] == [q.answer]
        elif q.kind == "shape":
            assert [kind for c, kind in pairs if c in words] == [q.answer]
        elif q.kind == "count":
            assert sum(kind + "s" in words for _, kind in pairs) == int(q.answer)
        elif q.kind == "caption":
            order = q.answer.split(", ")
            assert sorted(order) == sorted(names)
            assert np.all(np.diff([where(scene, names, name)[0] for name in order]) >= 0)
        elif q.kind in ("leftmost", "rightmost"):
            along = [where(scene, names, name)[0] for name in names]
            assert q.answer == names[int(np.argmin(along) if q.kind == "leftmost" else np.argmax(along))]
        elif q.kind == "exists":
            (k,) = [k for k, word in enumerate(words) if word in COLORS]
            assert (" ".join(words[k : k + 2]) in names) == (q.answer == "yes")


def test_relations_are_those_of_the_front_view(asked):
    axes = {"left": -1, "right": 1, "nearer": -1}
    looked = 0
    for scene, names, q in [row for row in asked["train"] if row[2].kind in axes]:
        named = sorted((q.question.index(n), n) for n in names if f" {n} " in q.question.replace("?", " "))
        (_, a), (_, b) = named
        sign, rows = axes[q.kind], [scene.objects[names.index(name)] for name in (a, b)]
        column = 0 if q.kind == "nearer" else 3  # metres from the robot, or across the image
        apart = rows[0][column] - rows[1][column]
        assert abs(apart) > (0.03 if q.kind == "nearer" else 0.05)
        assert (sign * apart > 0) == (q.answer == "yes")
        looked += 1
    assert looked > 100


def test_location_tokens_lie_where_the_thing_is(asked):
    def read(text):
        return [int(t) for t in re.findall(r"<loc(\d\d)>", text)]

    for scene, names, q in asked["train"]:
        if q.kind in ("point", "box"):
            name = next(n for n in sorted(names, key=len, reverse=True) if n in q.question)
            camera = 0 if " front " in q.question else 1
            u, v = where(scene, names, name, camera) * LOCATIONS
            found = read(q.answer)
            if q.kind == "point":
                assert found == [int(v), int(u)]
            else:
                side = int(scene.cover.shape[1] ** 0.5)
                rows, columns = np.nonzero(scene.cover[camera].reshape(side, side) == names.index(name))
                if len(rows):  # cells of which a thing covers most lie inside its box
                    inner = (np.array([rows.min(), columns.min(), rows.max(), columns.max()]) + 0.5) / side * LOCATIONS
                    assert np.all(np.array(found[:2]) <= inner[:2] + 2)
                    assert np.all(np.array(found[2:]) >= inner[2:] - 2)
        elif q.kind == "detect":
            view = 0 if " front " in q.question else 1
            kind = next(word[:-1] for word in q.question.split() if word[:-1] in (*OBJECT_KINDS, *FIXED_KINDS))
            places = [[int(t) for t in re.findall(r"<loc(\d\d)>", part)] for part in q.answer.split(", ")]
            colors = [part.split(">")[-1].strip() for part in q.answer.split(", ")]
            assert [u for _, u in places] == sorted(u for _, u in places)
            seen = [k for k, name in enumerate(names) if name.endswith(kind) and scene.pixels[k, view] > 0]
            assert len(seen) == len(places)
            for (v, u), color in zip(places, colors):
                assert np.abs(where(scene, names, f"{color} {kind}", view) * LOCATIONS - (u, v)).max() <= 1.0
        elif q.kind == "name_at":
            v, u = read(q.question)
            assert np.abs(where(scene, names, q.answer) * LOCATIONS - (u, v)).max() <= 1.0


def test_answers_say_little_by_themselves(asked):
    """The likeliest answer to each kind, whatever the picture: the most that a reader of text alone is sure of."""
    answers = defaultdict(Counter)
    for _, _, q in asked["train"]:
        answers[q.kind][q.answer] += 1
    for kind, most in {
        "left": 0.6,
        "right": 0.6,
        "nearer": 0.6,
        "color": 0.35,
        "color_at": 0.35,
        "count": 0.5,
        "exists": 0.65,
    }.items():
        assert max(answers[kind].values()) / answers[kind].total() < most, (kind, answers[kind])
    absent = Counter(q.answer for _, _, q in asked["pair"] if q.kind == "exists")
    assert 0.25 < absent["yes"] / absent.total() < 0.75
    assert 0.25 < answers["holding"]["yes"] / answers["holding"].total() < 0.75


def test_splits_keep_what_is_held_out(asked):
    held = [" ".join(pair) for pair in HELD_OUT_PAIRS]
    wordings = {w for _, out in ASKS.values() for w in out}
    for split in ("train", "paraphrase"):
        for _, _, q in asked[split]:
            assert not any(name in f"{q.question} {q.answer}" for name in held)
    plain = {w for w in wordings if "{" not in w}
    assert not plain & {q.question for _, _, q in asked["train"]}
    assert plain & {q.question for _, _, q in asked["paraphrase"]}
    for _, _, q in asked["pair"]:
        if q.kind in ("name_at", "held"):
            assert q.answer in held
        if q.kind in ("left", "point", "box", "place"):
            assert any(name in q.question for name in held)


def test_masks_and_boxes_against_brute_force():
    mask = np.full((6, 8), -1)
    mask[1:3, 2:5] = 0
    mask[5, 7] = 2
    pixels, boxes = visible_boxes(mask, 3)
    np.testing.assert_array_equal(pixels, [6, 0, 1])
    np.testing.assert_allclose(boxes, [[2 / 8, 1 / 6, 5 / 8, 3 / 6], [0, 0, 0, 0], [7 / 8, 5 / 6, 1, 1]], rtol=1e-6)


def test_the_pixels_of_a_thing_have_its_color(make_arm):
    """Masks come from another rendering pass than the pictures."""
    made = sampler(make_arm, tasks=(Place(),), held=0.0)
    hue = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1)}
    right = looked = 0
    for seed in range(8):
        scene = made.sample(seed)[-1]
        masks = made.sim.masks()
        for k, item in enumerate(made.sim.scene.items):
            color = item.name.split(" ")[0]
            pixels = scene.images["front"][masks["front"] == k]
            assert len(pixels) == scene.pixels[k, 0]
            if color in hue and len(pixels) > 10:
                looked += 1
                right += bool(np.argmax(pixels.mean(0)) == np.argmax(hue[color]))
    assert looked > 8
    assert right == looked


def test_small_parts():
    assert location(0.0, 1.0) == "<loc95><loc00>"
    assert location(0.5, 0.25) == "<loc24><loc48>"
    assert place_words(np.array([0.25, -0.1, 0.0])) == "near left"
    assert place_words(np.array([0.45, 0.0, 0.0])) == "far centre"


def test_an_unknown_split(make_arm):
    with pytest.raises(ConfigError, match="unknown split 'pairs'"):
        sampler(make_arm, "pairs")


def test_a_cover_names_what_covers_most_of_a_cell():
    mask = np.full((8, 12), -1)
    mask[:4, :4] = 2
    mask[0, 0] = 0
    mask[4:6, 5:7] = 1  # a quarter of the second cell of the second row
    mask[4, 8:11] = 3  # less than a quarter of the third
    assert cover(mask, 4).tolist() == [2, NOTHING, NOTHING, NOTHING, 1, NOTHING]
    assert cover(np.full((4, 4), -1), 4).tolist() == [NOTHING]


def test_covers_lie_where_things_are(asked):
    for scene, names, _ in asked["train"][::40]:
        side = int(scene.cover.shape[1] ** 0.5)
        front = scene.cover[0].reshape(side, side)
        assert set(np.unique(front)) <= {*range(len(names)), NOTHING}
        for k in np.unique(front[front != NOTHING]):
            rows, columns = np.nonzero(front == k)
            middle = (np.array([columns.mean(), rows.mean()]) + 0.5) / side
            reach = 0.35 if names[k] == "drawer" else 0.12
            assert np.abs(middle - scene.objects[k, 3:5]).max() < reach
