"""Weighing answers: what one pass over many texts says is what each text alone says, and it is right about scenes."""

import numpy as np
import pytest
import torch

from brachium.envs.scenes import Clutter, SceneSampler
from brachium.errors import ConfigError
from brachium.sim.scene import COLORS
from brachium.vla.pretrained import Pretrained
from brachium.vla.weigh import AnswerScorer


@pytest.fixture(scope="module")
def nano():
    return Pretrained.load("nano")


@pytest.fixture(scope="module")
def scenes(make_arm):
    sampler = SceneSampler(tasks=(Clutter(most=4),), embodiment=make_arm("arm6_ee"), poses=1)
    return [sampler.sample(seed)[0] for seed in range(12)]


def views(scene):
    return [scene.images["front"], scene.images["wrist"]]


def test_answers_are_as_likely_as_the_model_says_one_by_one(nano, scenes):
    """Oracle: each answer's tokens scored in a pass of its own, by the model's plain next-word distribution."""
    asked = [("is there a red cube?", ("yes", "no")), ("what color is the cube?", ("red", "green", "blue"))]
    found = AnswerScorer(nano)(views(scenes[0]), asked)
    begin, end = nano.tokenizer.bos_token_id, nano.tokenizer.eos_token_id
    pixels = torch.from_numpy(np.stack(views(scenes[0])))[None]
    for (question, answers), weights in zip(asked, found):
        totals = []
        for answer in answers:
            spell = nano.tokenizer.backend_tokenizer.encode
            before = [*spell(question, add_special_tokens=False).ids, begin]
            after = [*spell(answer, add_special_tokens=False).ids, end]
            row = torch.tensor([[before + after]])
            with torch.no_grad():
                states = nano.encoder.backbone(pixels, row, torch.ones_like(row, dtype=torch.bool)).text[0, 0]
                says = nano.encoder.backbone.next_words(states).float().log_softmax(-1)
            totals.append(sum(float(says[len(before) - 1 + k, token]) for k, token in enumerate(after)))
        expected = np.exp(np.array(totals) - max(totals))
        assert weights == pytest.approx(expected / expected.sum(), abs=1e-5)
        assert weights.sum() == pytest.approx(1.0)


def test_many_questions_need_several_passes_and_come_out_the_same(nano, scenes, monkeypatch):
    asked = [(f"is there a {color} cube?", ("yes", "no")) for color in COLORS]
    scorer = AnswerScorer(nano)
    whole = scorer(views(scenes[1]), asked)
    monkeypatch.setattr("brachium.vla.weigh.AT_ONCE", 5)
    assert np.allclose(np.stack(scorer(views(scenes[1]), asked)), np.stack(whole), atol=1e-5)


def test_it_knows_what_is_there(nano, scenes):
    scorer, right, cases = AnswerScorer(nano), 0, 0
    for scene in scenes:
        names = [name for name in scene.names if name and name.split()[1] in ("cube", "ball", "cylinder")]
        asked = [f"{color} {kind}" for color in ("red", "green", "yellow") for kind in ("cube", "ball")]
        weights = scorer(views(scene), [(f"is there a {name}?", ("yes", "no")) for name in asked])
        right += sum((weight[0] > 0.5) == (name in names) for name, weight in zip(asked, weights))
        cases += len(asked)
    assert right / cases > 0.9


def test_a_question_needs_answers(nano, scenes):
    with pytest.raises(ConfigError, match="got none"):
        AnswerScorer(nano)(views(scenes[0]), [("is there a red cube?", ())])
