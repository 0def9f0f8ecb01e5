"""Long-horizon work as facts: invariants of the table, meanings, wordings, and luck that depends on the seed alone."""

import itertools
import re

import numpy as np
import pytest

from brachium.envs.longhorizon.chains import draw_way
from brachium.envs.longhorizon.domain import facts_of, tabletop_skills, universe
from brachium.envs.longhorizon.families import EVERY, FAMILIES, LONG, sample
from brachium.envs.longhorizon.symbolic import WAIT, SymbolicTable
from brachium.envs.longhorizon.wordings import POLITE, WORDINGS
from brachium.errors import ConfigError
from brachium.policies.planners.goals import goals_of
from brachium.policies.planners.search import search
from brachium.symbols import Literal


def number_of(env, text):
    return np.array([env.instructions.index(text)], np.float32)


@pytest.mark.parametrize("seed", range(40))
def test_effects_agree_with_the_table_laid_anew(seed):
    """The effects of skills against facts computed from places: two ways that know nothing of each other."""
    rng, library = np.random.default_rng(seed), tabletop_skills()
    scene = sample(rng, families=tuple(EVERY)).scene
    facts = scene.facts
    places = {f.args[0]: f.args[1] for f in facts if f.pred in ("on", "in")}
    is_open = Literal("open", ("drawer",)) in facts
    for _ in range(30):
        assert facts == facts_of(places, scene.things, is_open)
        calls = [c for c in library.calls(scene.things) if c.applicable(facts)]
        call = calls[int(rng.integers(len(calls)))]
        facts = call.apply(facts)
        if call.spec.name in ("open", "close"):
            is_open = call.spec.name == "open"
        else:
            places[call.args[0]] = call.args[1] if len(call.args) == 2 else "table"
        assert all(facts.__contains__(p) == p.value for p in (Literal(s.pred, s.args, s.value) for s in call.success))


@pytest.mark.parametrize("family", EVERY)
def test_meanings_are_the_goals(family):
    """What the planners' language of goals makes of a meaning, against what whoever drew the work had in mind."""
    rng = np.random.default_rng(7)
    for _ in range(40):
        errand = sample(rng, families=(family,))
        found = goals_of(errand.meaning, errand.scene, errand.past)
        assert {frozenset(goal) for goal in found} == {frozenset(goal) for goal in errand.goals}


@pytest.mark.parametrize("family", FAMILIES)
def test_ways_lead_to_a_goal(family):
    """Drawn ways, against what facts and effects say, and against the shortest."""
    library = tabletop_skills()
    for seed in range(12):
        rng = np.random.default_rng(seed)
        errand = sample(rng, families=(family,))
        way, facts = draw_way(rng, library, errand), errand.scene.facts
        for then, call in way:
            assert then == facts
            assert call.applicable(facts)
            facts = call.apply(facts)
        reached = [all((Literal(w.pred, w.args) in facts) == w.value for w in goal) for goal in errand.goals]
        assert any(reached), f"{errand.instruction}: {[call for _, call in way]}"
        assert len(way) <= len(search(library, errand.scene, errand.goals).calls) + 3


def test_a_way_that_is_too_long_is_cut():
    errand = sample(np.random.default_rng(0), families=("sort_many",))
    assert len(draw_way(np.random.default_rng(0), tabletop_skills(), errand, most=3)) == 3


@pytest.mark.parametrize(("family", "least"), [*((f, 2) for f in FAMILIES), *((f, 5) for f in LONG)])
def test_work_takes_two_to_eight_skills_and_long_work_five(family, least):
    rng, library = np.random.default_rng(3), tabletop_skills()
    for _ in range(8):
        errand = sample(rng, families=(family,))
        found = search(library, errand.scene, errand.goals)
        assert found.optimal
        assert least <= len(found.calls) <= 8


def spelled(template):
    """All sentences of a wording, with X for what is filled in, as lists of words."""
    parts = re.split(r"(\([^()]*\|[^()]*\))", template)
    options = [part[1:-1].split("|") if part.startswith("(") and "|" in part else [part] for part in parts]
    for chosen in itertools.product(*options):
        yield re.sub(r"[^A-Za-z ]", " ", re.sub(r"\{[a-z_]+\}", " X ", "".join(chosen))).split()


def distance(a, b):
    """Words that must be changed, added or left out (Levenshtein)."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (x != y))
    return row[-1]


def test_held_out_wordings_differ_from_all_training_ones_in_known_words():
    training = {tuple(words) for train, _ in WORDINGS.values() for text in train for words in spelled(text)}
    known = {word for words in training for word in words} | set(" ".join(POLITE).split())
    for family, (_, held_out) in WORDINGS.items():
        for text in held_out:
            for words in spelled(text):
                assert set(words) <= known, (family, words)
                near = (t for t in training if abs(len(t) - len(words)) < 2)
                assert min((distance(words, t) for t in near), default=9) >= 2, (family, words)


def test_no_two_skills_are_called_the_same():
    calls = tabletop_skills().calls(universe())
    assert len({call.instruction for call in calls}) == len(calls)


def test_the_same_seed_is_the_same_episode_whatever_was_run_before():
    env, other = SymbolicTable(disturbance=1.0), SymbolicTable(disturbance=1.0)
    other.reset(seed=5)
    for seed in (1, 2):
        first, _ = env.reset(seed=seed)
        second, _ = other.reset(seed=seed)
        assert first["instruction"] == second["instruction"]
        calls = [c for c in env.library.calls(env.scene.things) if c.applicable(env.facts)]
        for call in calls[:8]:
            for each in (env, other):
                each.step(number_of(each, call.instruction))
            assert env.facts == other.facts


def test_failures_come_as_often_as_asked():
    env = SymbolicTable(failure=0.2, families=("single",))
    failed = 0
    for seed in range(1500):
        env.reset(seed=seed)
        call = next(c for c in env.library.calls(env.scene.things) if c.applicable(env.facts))
        before = env.facts
        env.step(number_of(env, call.instruction))
        failed += env.facts != call.apply(before)
    assert 240 <= failed <= 360, "a fifth of 1500, four standard deviations wide"


def test_what_is_impossible_changes_nothing_and_is_counted():
    env = SymbolicTable(failure=0.0, families=("store",))
    env.reset(seed=3)
    before = env.facts
    name = "open the drawer" if Literal("open", ("drawer",)) in before else "close the drawer"
    *_, info = env.step(number_of(env, name))
    assert info["invalid"]
    assert env.facts == before
    *_, info = env.step(np.array([WAIT], np.float32))
    assert not info["invalid"]
    assert env.facts == before


def test_somebody_interferes_once_and_the_table_stays_sound():
    env = SymbolicTable(disturbance=1.0, failure=0.0)
    seen = 0
    for seed in range(60):
        env.reset(seed=seed)
        for _ in range(8):
            before = env.facts
            env.step(np.array([WAIT], np.float32))
            seen += env.facts != before
        places = {f.args[0]: f.args[1] for f in env.facts if f.pred in ("on", "in")}
        assert env.facts == facts_of(places, env.scene.things, Literal("open", ("drawer",)) in env.facts)
    assert 20 <= seen <= 60


def test_mistakes_are_told():
    with pytest.raises(ConfigError, match="Did you mean 'sort'"):
        SymbolicTable(families=("sorts",))
    with pytest.raises(ConfigError, match="failure from 0 to 1"):
        SymbolicTable(failure=1.5)
    with pytest.raises(ConfigError, match="unknown split"):
        SymbolicTable(split="pair")
    env = SymbolicTable()
    with pytest.raises(ConfigError, match="before reset"):
        env.step(np.zeros(1, np.float32))
    env.reset(seed=0)
    with pytest.raises(ConfigError, match="number of a skill call"):
        env.step(np.array([1e6], np.float32))
