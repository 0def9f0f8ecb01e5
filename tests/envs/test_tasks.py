"""What tasks mean: words, held-out pairs, choices of colour, success and failure, and physics that stays calm."""

import itertools
import re

import numpy as np
import pytest

from brachium.envs import language
from brachium.envs.scenes import describe
from brachium.envs.tasks.base import Episode, place_apart, sample_objects
from brachium.envs.tasks.drawer import Drawer
from brachium.envs.tasks.place import Place
from brachium.envs.tasks.push import Push
from brachium.envs.tasks.reach import Reach
from brachium.envs.tasks.stack import Stack
from brachium.errors import ConfigError
from brachium.sim.scene import COLORS, OBJECT_KINDS

TASKS = {
    "reach": Reach(),
    "push": Push(),
    "place": Place(),
    "stack": Stack(),
    "open_drawer": Drawer(),
    "close_drawer": Drawer(close=True),
}
WITH_OBJECTS = ("reach", "push", "place", "stack")
NAME = re.compile(rf"\b({'|'.join(COLORS)}) (cube|cylinder|ball|bowl|zone)\b")
HELD_OUT = {("orange", "cube"), ("blue", "cylinder"), ("purple", "ball")}


def episodes(task, split, count=250):
    return [TASKS[task].sample(np.random.default_rng([seed, 77]), split) for seed in range(count)]


def named(text):
    """(colour, kind) pairs that a sentence names, read with a pattern of our own."""
    return [tuple(pair) for pair in NAME.findall(text)]


def test_the_held_out_pairs_are_these():
    assert set(language.HELD_OUT_PAIRS) == HELD_OUT


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("split", ["train", "paraphrase"])
def test_held_out_pairs_are_never_named_outside_their_split(task, split):
    for episode in episodes(task, split):
        assert not HELD_OUT & set(named(episode.instruction)), episode.instruction
        assert tuple(episode.roles["object"].split()) not in HELD_OUT
        assert tuple(episode.roles["goal"].split()) not in HELD_OUT


def test_a_stack_of_two_cubes_names_no_held_out_pair_either():
    task = Stack(distractors=0)
    for seed in range(150):
        episode = task.sample(np.random.default_rng(seed), "train")
        assert len(episode.scene.items) == 2
        assert not HELD_OUT & set(named(episode.instruction))


@pytest.mark.parametrize("task", WITH_OBJECTS)
def test_the_target_of_the_pair_split_is_always_held_out(task):
    seen = set()
    for episode in episodes(task, "pair"):
        pair = tuple(episode.roles["object"].split())
        assert pair in HELD_OUT
        assert pair == named(episode.instruction)[0]
        seen.add(pair)
    kinds = {item.kind for e in episodes(task, "train") for item in e.scene.items}
    assert seen == {pair for pair in HELD_OUT if pair[1] in kinds}  # each that the task can have


@pytest.mark.parametrize("task", WITH_OBJECTS)
def test_held_out_things_do_stand_on_the_table_in_training(task):
    names = {tuple(i.name.split()) for e in episodes(task, "train", 400) for i in e.scene.items}
    assert names & HELD_OUT


def test_free_scenes_never_name_a_held_out_pair_and_name_what_is_there():
    rng, texts = np.random.default_rng(0), set()
    for seed in range(300):
        task = list(TASKS.values())[seed % len(TASKS)]
        scene = task.sample(np.random.default_rng(seed), "train").scene
        for _ in range(4):
            sentence = describe(scene, rng)
            pairs = named(sentence["text"])
            assert not HELD_OUT & set(pairs), sentence
            items, roles = scene.items, sentence["roles"]
            if pairs:
                assert " ".join(pairs[0]) == items[roles["object"]].name
                assert " ".join(pairs[-1]) == items[roles["goal"]].name
            else:
                assert "drawer" in sentence["text"]
                assert items[roles["object"]].kind == "drawer"
            texts.add(sentence["text"])
    assert len(texts) > 200


def every_sentence(phrasings, templates):
    names = [f"{color} {kind}" for color in COLORS for kind in ("cube", "cylinder", "ball", "bowl", "zone")]
    for template in getattr(phrasings, templates):
        for a, b in itertools.product(names, names):
            yield template.format(object=a, goal=b)


def test_paraphrases_share_no_sentence_with_training_of_any_task():
    groups = [task.phrasings for task in TASKS.values()]
    trained = {s for phrasings in groups for s in every_sentence(phrasings, "train")}
    held = {s for phrasings in groups for s in every_sentence(phrasings, "paraphrase")}
    assert len(trained) > 10_000
    assert not trained & held
    for task in TASKS:
        assert not {e.instruction for e in episodes(task, "paraphrase", 60)} & trained
        assert {e.instruction for e in episodes(task, "train", 60)} <= trained


@pytest.mark.parametrize("task", WITH_OBJECTS)
@pytest.mark.parametrize("split", language.SPLITS)
def test_only_the_words_tell_the_target_among_at_least_three_colours(task, split):
    for episode in episodes(task, split, 100):
        movable = [i for i in episode.scene.items if i.kind in OBJECT_KINDS]
        assert len({i.name.split()[0] for i in movable}) == len(movable) >= 3
        goals = [i for i in episode.scene.items if i.kind in ("bowl", "zone")]
        assert len({i.name.split()[0] for i in goals}) == len(goals)
        assert len(goals) in (0, 2)
        for name in {episode.roles["object"], episode.roles["goal"]}:
            assert name in episode.instruction


@pytest.mark.parametrize("task", WITH_OBJECTS)
def test_every_allowed_colour_and_place_in_the_list_is_asked_for(task):
    drawn = episodes(task, "train", 300)
    assert {e.roles["object"].split()[0] for e in drawn} == set(COLORS) - ({"orange"} if task == "stack" else set())
    spots = np.array([[i.x, i.y] for e in drawn for i in e.scene.items if i.name == e.roles["object"]])
    assert np.all(spots.max(axis=0) - spots.min(axis=0) > [0.12, 0.25])  # a fixed place would need no eyes


@pytest.mark.parametrize("task", TASKS)
def test_things_stand_apart_on_the_table(task):
    for episode in episodes(task, "train", 100):
        for a, b in itertools.combinations(episode.scene.items, 2):
            assert np.hypot(a.x - b.x, a.y - b.y) > a.footprint + b.footprint, (a.name, b.name)
        assert len({i.name for i in episode.scene.items}) == len(episode.scene.items)


@pytest.mark.parametrize("task", TASKS)
def test_nothing_touches_anything_but_the_table_at_the_start(make_env, task):
    env = make_env(task, images=False)
    for seed in range(12):
        env.reset(seed=seed)
        model, data = env.sim.model, env.sim.data
        for contact in data.contact:
            bodies = {model.body(model.geom_bodyid[g]).name for g in contact.geom}
            assert "world" in bodies, bodies
            assert contact.dist > -1e-3


def test_too_many_things_are_a_clear_error():
    rng = np.random.default_rng(0)
    with pytest.raises(ConfigError, match="at most 6 objects of different colours, got 8"):
        Reach(objects=(8, 8)).sample(rng, "train")
    with pytest.raises(ConfigError, match="at most 6 things of different colours, got 9"):
        Place(bowls=9).sample(rng, "train")
    with pytest.raises(ConfigError, match="no room on the table"):
        place_apart(rng, sample_objects(rng, 6, ("cube",), "train"), gap=0.3)


# -- success and failure, by putting things there ---------------------------------------------------------------------


def put(env, name, position):
    """Move a free object; it rests for a moment."""
    joint = env.sim.data.joint(name)
    joint.qpos[:3] = position
    joint.qpos[3:] = [1, 0, 0, 0]
    joint.qvel[:] = 0
    env.sim.settle()


def over(env, name, height, x=0.0):
    """A place `height` [m] over a thing, `x` [m] beside it."""
    return env.sim.position(name) + np.array([x, 0.0, height])


def verdict(env):
    episode: Episode = env.episode
    return env.task.success(env.sim, episode), env.task.failure(env.sim, episode)


def ready(make_env, task, seed=1):
    env = make_env(task, images=False)
    env.reset(seed=seed)
    assert verdict(env) == (False, "")
    movable = [i.name for i in env.sim.scene.items if i.kind in OBJECT_KINDS]
    target, goal = env.episode.roles["object"], env.episode.roles["goal"]
    return env, target, goal, next(n for n in movable if n not in (target, goal))


def test_place_succeeds_in_the_named_bowl_only(make_env):
    env, target, goal, other = ready(make_env, "place")
    wrong = next(i.name for i in env.sim.scene.items if i.kind == "bowl" and i.name != goal)
    home = {name: env.sim.position(name) for name in (target, other)}
    put(env, target, over(env, goal, 0.014))
    assert verdict(env) == (True, "")
    put(env, target, over(env, goal, 0.064))  # held over it
    assert verdict(env) == (False, "")
    put(env, target, over(env, wrong, 0.014))
    assert verdict(env) == (False, "wrong goal")
    put(env, target, home[target])
    put(env, other, over(env, goal, 0.014))
    assert verdict(env) == (False, "wrong object")
    put(env, other, over(env, wrong, 0.014))  # no harm
    assert verdict(env) == (False, "")
    put(env, target, [0.9, 0, -0.3])
    assert verdict(env) == (False, "off the table")


def test_push_succeeds_on_the_named_zone_only(make_env):
    env, target, goal, other = ready(make_env, "push")
    wrong = next(i.name for i in env.sim.scene.items if i.kind == "zone" and i.name != goal)
    put(env, target, over(env, wrong, 0.02))
    assert verdict(env) == (False, "")  # may still be pushed on
    put(env, target, over(env, goal, 0.02, x=0.044))
    assert verdict(env) == (True, "")
    put(env, target, over(env, goal, 0.02, x=0.046))
    assert not verdict(env)[0]
    put(env, other, over(env, goal, 0.02))
    assert verdict(env) == (False, "wrong object")


def test_reach_fails_at_another_object(make_env):
    env, target, _, other = ready(make_env, "reach")
    for name, expected in ((target, (True, "")), (other, (False, "wrong object"))):
        env.sim.load(env.sim.scene, over(env, name, 0.035))
        assert verdict(env) == expected


def test_stack_needs_a_cube_at_rest_on_the_named_one(make_env):
    env, target, goal, other = ready(make_env, "stack")
    size = env.sim.scene.items[0].size
    put(env, target, over(env, goal, 2 * size))
    assert verdict(env) == (True, "")
    env.sim.data.joint(target).qvel[2] = 0.1
    assert verdict(env) == (False, "")
    put(env, target, over(env, goal, 3 * size))  # in the air
    assert verdict(env) == (False, "")
    put(env, target, over(env, other, 2 * size))  # on another one
    assert verdict(env) == (False, "")
    put(env, goal, [0.9, 0, -0.3])
    assert verdict(env) == (False, "off the table")


@pytest.mark.parametrize(("task", "inside", "outside"), [("open_drawer", 0.08, 0.05), ("close_drawer", 0.005, 0.03)])
def test_the_drawer_is_judged_by_its_opening(make_env, task, inside, outside):
    env = make_env(task, images=False)
    env.reset(seed=0)
    for opening, expected in ((inside, True), (outside, False)):
        env.sim.data.joint("drawer").qpos[0] = opening
        env.sim.settle()
        assert verdict(env) == (expected, "")
