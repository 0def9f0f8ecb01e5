"""SayCan: what a language model would say, times what the robot can do (Ahn et al. 2022, arXiv 2204.01691)."""

from __future__ import annotations

import math

from ...errors import ConfigError
from ...symbols import SkillLibrary
from .base import Affordance, Candidate, Done, LanguageSubgoal, PlanContext, Proposal
from .lm.base import LanguageModel, Scored
from .lm.prompts import PlanPrompt, TinyPrompt

NORMALIZE = ("none", "tokens")


class ScoringPlanner:
    """Ranks all skills of the library by log p(text | instruction, history) + log p(success | scene).

    Everything is in log space; skills that can hardly succeed are not scored at all, for they could not win. The end of
    an option is scored with it: otherwise the beginning of a longer one would have the better of it.

    Args:
        library: What can be done.
        lm: Scores continuations.
        prompt: Puts the plan so far into words.
        affordance: Success probabilities; all one where None (the language model alone).
        done: What stands for the probability that the work can be ended (0.2 in the open-source tabletop).
        threshold: Skills with less probability are not scored.
        normalize: ``none`` as published, or ``tokens`` for the mean over an option's tokens.
    """

    name = "scoring"

    def __init__(
        self,
        *,
        library: SkillLibrary,
        lm: LanguageModel,
        prompt: PlanPrompt | None = None,
        affordance: Affordance | None = None,
        done: float = 0.2,
        threshold: float = 0.01,
        normalize: str = "none",
    ) -> None:
        if "score" not in lm.capabilities:
            raise ConfigError(f"the scoring planner needs a model that scores; {lm.name} has {sorted(lm.capabilities)}")
        if normalize not in NORMALIZE:
            raise ConfigError(f"expected normalize to be one of {NORMALIZE}, got {normalize!r}")
        if not 0.0 < done <= 1.0:
            raise ConfigError(f"expected done above 0 and at most 1, got {done}")
        self.library, self.lm, self.prompt = library, lm, prompt or TinyPrompt()
        self.affordance, self.done, self.threshold, self.normalize = affordance, done, threshold, normalize

    def propose(self, context: PlanContext) -> Proposal:
        """All skills that may succeed, and the end, best first."""
        if context.scene is None:
            raise ConfigError("the scoring planner needs to know which things are there")
        calls = self.library.calls(context.scene.things)
        can = [1.0] * len(calls)
        if self.affordance is not None:
            can = [float(p) for p in self.affordance.probabilities(context, calls)]
        kept = [(call, p) for call, p in zip(calls, can) if p >= self.threshold]
        texts = [self.prompt.option(call.instruction) for call, _ in kept] + [self.prompt.option(self.prompt.done)]
        said = self.lm.score(self.prompt.next_step(context), texts)
        candidates = [
            self._candidate(LanguageSubgoal(text=call.instruction, call=call), say, p)
            for (call, p), say in zip(kept, said)
        ]
        candidates.append(self._candidate(Done(reason="the model says so"), said[-1], self.done))
        ranked = sorted(candidates, key=lambda c: -c.score)
        return Proposal(candidates=tuple(ranked), raw=f"{len(calls)} skills, {len(kept)} scored")

    def _candidate(self, subgoal: LanguageSubgoal | Done, say: Scored, can: float) -> Candidate:
        logprob = say.logprob / max(1, say.tokens) if self.normalize == "tokens" else say.logprob
        terms = {"say": logprob, "can": math.log(can)}
        return Candidate(subgoal=subgoal, score=sum(terms.values()), terms=terms)
