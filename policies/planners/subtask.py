"""Plans that a language model writes: the next step, or the whole plan, out of the robot's skills or freely."""

from __future__ import annotations

from ...errors import ConfigError
from ...symbols import SkillCall, SkillLibrary
from .base import Candidate, Done, LanguageSubgoal, PlanContext, Proposal, Subgoal, describe
from .lm.base import Choices, LanguageModel
from .lm.prompts import PlanPrompt, TinyPrompt


class SubtaskPlanner:
    """Generates the next step.

    With scene and feedback in the prompt this is Inner Monologue (Huang et al. 2022, arXiv 2207.05608). Constrained, it
    can write nothing but skills with things of the scene, and not those that were just refused; free, a text that is no
    skill is refused by the gate with the reason.

    Args:
        library: What can be done.
        lm: Writes.
        prompt: Puts the plan so far into words.
        constrained: Write only what the library holds.
        temperature: Of the draws; 0 takes the likeliest word each time.
        max_tokens: Of a step.
    """

    name = "subtask"

    def __init__(
        self,
        *,
        library: SkillLibrary,
        lm: LanguageModel,
        prompt: PlanPrompt | None = None,
        constrained: bool = True,
        temperature: float = 0.0,
        max_tokens: int = 48,
    ) -> None:
        needed = "choice" if constrained else "generate"
        if needed not in lm.capabilities:
            raise ConfigError(f"this planner needs the capability {needed}; {lm.name} has {sorted(lm.capabilities)}")
        self.library, self.lm, self.prompt = library, lm, prompt or TinyPrompt()
        self.constrained, self.temperature, self.max_tokens = constrained, temperature, max_tokens

    def propose(self, context: PlanContext) -> Proposal:
        """One candidate."""
        if context.scene is None:
            raise ConfigError("the subtask planner needs to know which things are there")
        calls = {call.instruction: call for call in self.library.calls(context.scene.things)}
        refused = {describe(rejection.subgoal) for rejection in context.rejections}
        choices = None
        if self.constrained:
            options = [text for text in (*calls, self.prompt.done) if text not in refused]
            choices = Choices(options=tuple(options or [self.prompt.done]))
        found = self.lm.generate(
            self.prompt.next_step(context),
            choices=choices,
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            seed=context.seed + context.step,
        )
        text = " ".join(found.text.split())
        subgoal = self._subgoal(text, calls)
        return Proposal(candidates=(Candidate(subgoal=subgoal, score=found.logprob or 0.0),), raw=text)

    def _subgoal(self, text: str, calls: dict[str, SkillCall]) -> Subgoal:
        if text == self.prompt.done:
            return Done(reason="the model says so")
        return LanguageSubgoal(text=text, call=calls.get(text))
