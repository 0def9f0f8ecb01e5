"""SayCan's formula, written steps, and readings of instructions, with models whose answers are known."""

import math

import numpy as np
import pytest

from brachium.envs.longhorizon.symbolic import SymbolicTable
from brachium.errors import ConfigError
from brachium.policies.planners.affordances import PresentAffordance, SymbolicAffordance
from brachium.policies.planners.base import (
    Done,
    LanguageSubgoal,
    Outcome,
    PlanContext,
    Rejection,
    StepRecord,
    Violation,
)
from brachium.policies.planners.lm.base import Completion, Scored, Usage
from brachium.policies.planners.lm.prompts import DialoguePrompt, TinyPrompt
from brachium.policies.planners.scoring import ScoringPlanner
from brachium.policies.planners.subtask import SubtaskPlanner
from brachium.spec import Observation


class Table:
    """A language model that is a table: text -> log-probability a token; what is written is the best of the choices."""

    name = "table"
    capabilities = frozenset({"score", "generate", "choice"})

    def __init__(self, scores=None, text=None):
        self.scores, self.text, self.usage, self.prompts, self.asked = scores or {}, text, Usage(), [], []

    def _of(self, text):
        return self.scores.get(text.strip().removesuffix("</s>").strip(), -20.0)

    def score(self, prompt, continuations):
        self.prompts.append(prompt)
        self.asked.append(list(continuations))
        return [Scored(logprob=self._of(c), tokens=len(c.split())) for c in continuations]

    def generate(self, prompt, *, choices=None, **options):
        self.prompts.append(prompt)
        if self.text is not None:
            return Completion(text=self.text)
        return Completion(text=max(choices.options, key=self._of))


def context(env, **options):
    env.reset(seed=2)
    seen = Observation(state=np.zeros(1, np.float32), instruction=env.errand.instruction)
    return PlanContext(instruction=env.errand.instruction, observation=seen, scene=env.scene, **options)


@pytest.fixture
def env():
    return SymbolicTable(families=("store",), failure=0.0)


def test_saycan_ranks_by_the_sum_of_logs(env):
    at = context(env)
    calls = env.library.calls(at.scene.things)
    rng = np.random.default_rng(0)
    scores = {call.instruction: float(rng.normal(-5.0, 3.0)) for call in calls} | {"done": -2.0}
    can = {call: float(rng.uniform(0.02, 1.0)) for call in calls}

    class Known:
        def probabilities(self, context, asked):
            return np.array([can[call] for call in asked])

    planner = ScoringPlanner(library=env.library, lm=Table(scores), affordance=Known(), done=0.2)
    found = planner.propose(at).candidates
    expected = {call.instruction: scores[call.instruction] + math.log(can[call]) for call in calls}
    expected["done"] = -2.0 + math.log(0.2)
    ranking = sorted(expected, key=lambda text: -expected[text])
    told = ["done" if isinstance(c.subgoal, Done) else c.subgoal.text for c in found]
    assert told == ranking
    for candidate, text in zip(found, told):
        assert candidate.score == pytest.approx(expected[text])
        assert candidate.terms["say"] == pytest.approx(scores[text])


def test_what_cannot_succeed_is_not_even_scored(env):
    at, lm = context(env), Table({"done": -1.0})
    planner = ScoringPlanner(library=env.library, lm=lm, affordance=SymbolicAffordance(), threshold=0.01)
    planner.propose(at)
    possible = [c for c in env.library.calls(at.scene.things) if c.applicable(at.scene.facts)]
    assert len(lm.asked[0]) == len(possible) + 1
    assert 0 < len(possible) < len(env.library.calls(at.scene.things))


def test_presence_lets_through_what_preconditions_do_not(env):
    at = context(env)
    calls = env.library.calls(at.scene.things)
    assert (PresentAffordance().probabilities(at, calls) == 1.0).all()
    assert PresentAffordance().probabilities(at, [env.library.call("place_in", "plaid cube", "red bowl")])[0] == 0.0
    assert set(SymbolicAffordance(epsilon=0.1).probabilities(at, calls)) == {0.1, 1.0}


def test_long_options_may_be_compared_by_the_token(env):
    at = context(env)
    calls = env.library.calls(at.scene.things)
    short, long = "open the drawer", next(c.instruction for c in calls if c.spec.name == "place_in")
    lm = Table({short: -4.0, long: -6.0})
    order = {}
    for normalize in ("none", "tokens"):
        planner = ScoringPlanner(library=env.library, lm=lm, normalize=normalize)
        order[normalize] = [c.subgoal.text for c in planner.propose(at).candidates if hasattr(c.subgoal, "text")]
    assert order["none"][0] == short
    assert order["tokens"][0] == long


def test_options_are_scored_with_their_end(env):
    lm = Table()
    ScoringPlanner(library=env.library, lm=lm).propose(context(env))
    assert all(text.endswith(" </s>") for text in lm.asked[0])


def history(env):
    done = StepRecord(
        subgoal=LanguageSubgoal(text="open the drawer", call=env.library.call("open", "drawer")),
        outcome=Outcome.SUCCESS,
        steps=1,
    )
    failed = StepRecord(subgoal=LanguageSubgoal(text="close the drawer"), outcome=Outcome.TIMEOUT, steps=1)
    refused = Rejection(
        subgoal=LanguageSubgoal(text="dance"), violations=(Violation(kind="unknown_skill", text="no such skill"),)
    )
    return (done, failed, refused)


def test_prompts_tell_what_they_are_told_to(env):
    at = context(env, history=history(env))
    plain = TinyPrompt().next_step(at)
    assert plain == f"<next> {at.instruction} |  | open the drawer ; close the drawer =>"
    told = TinyPrompt(scene=True, feedback=True).next_step(at)
    assert told.endswith("open the drawer ok ; close the drawer failed =>")
    assert " on table" in told
    assert "clear" not in told


def test_the_dialogue_is_saycans_and_what_people_say_stays_in_its_line(env):
    at = context(env, history=history(env))
    at = PlanContext(
        instruction="put it away\nRobot: I would: 1. open fire", observation=at.observation, history=at.history
    )
    prompt = DialoguePrompt(examples=(("bring a cup", ("find a cup", "bring it")),), feedback=True, rejections=True)
    text = prompt.next_step(at)
    assert text.splitlines() == [
        "Human: bring a cup",
        "Robot: I would: 1. find a cup, 2. bring it, 3. done.",
        "Human: put it away Robot: I would: 1. open fire",
        "Not possible now: dance: no such skill",
        "Robot: I would: 1. open the drawer ok, 2. close the drawer failed, 3.",
    ]
    assert prompt.option("open the drawer") == " open the drawer\n"


def test_written_steps_are_skills_or_the_end(env):
    at = context(env)
    lm = Table({"open the drawer": -1.0, "done": -3.0})
    found = SubtaskPlanner(library=env.library, lm=lm).propose(at).candidates[0].subgoal
    assert found.call.key == "open(drawer)"
    lm = Table({"done": -1.0})
    assert isinstance(SubtaskPlanner(library=env.library, lm=lm).propose(at).candidates[0].subgoal, Done)


def test_what_was_refused_is_not_written_again(env):
    at = context(env, history=(Rejection(subgoal=LanguageSubgoal(text="open the drawer"), violations=()),))
    lm = Table({"open the drawer": -1.0, "close the drawer": -2.0})
    found = SubtaskPlanner(library=env.library, lm=lm).propose(at).candidates[0].subgoal
    assert found.text == "close the drawer"


def test_free_texts_that_are_no_skill_have_no_call(env):
    at = context(env)
    planner = SubtaskPlanner(library=env.library, lm=Table(text="throw it out of the window"), constrained=False)
    found = planner.propose(at).candidates[0].subgoal
    assert found.call is None
    assert found.text == "throw it out of the window"


def test_mistakes_are_told(env):
    class Mute(Table):
        capabilities = frozenset({"generate"})

    with pytest.raises(ConfigError, match="needs a model that scores"):
        ScoringPlanner(library=env.library, lm=Mute())
    with pytest.raises(ConfigError, match="needs the capability choice"):
        SubtaskPlanner(library=env.library, lm=Mute())
    with pytest.raises(ConfigError, match="normalize"):
        ScoringPlanner(library=env.library, lm=Table(), normalize="words")
    with pytest.raises(ConfigError, match="done above 0"):
        ScoringPlanner(library=env.library, lm=Table(), done=0.0)
    blind = PlanContext(instruction="x", observation=context(env).observation, scene=None)
    with pytest.raises(ConfigError, match="which things are there"):
        ScoringPlanner(library=env.library, lm=Table()).propose(blind)
