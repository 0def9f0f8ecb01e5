"""Transcripts: what was recorded comes back, and nothing else."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from fake_llm import fake_llm

from brachium.errors import ConfigError, NotFoundError
from brachium.policies.planners.lm.base import Choices
from brachium.policies.planners.lm.openai_lm import OpenAICompatLM
from brachium.policies.planners.lm.replay import RecordingLM, ReplayLM

TEXTS = [" put the red cube", " open the drawer", " done"]
CHOICES = Choices(options=tuple(TEXTS), separator="\n", repeat=2)
IMAGE = np.zeros((4, 4, 3), np.uint8)


@pytest.fixture
def recorded(tmp_path: Any) -> Any:
    """A transcript and what was said."""
    path, said = tmp_path / "below" / "transcript.jsonl", {}
    with fake_llm("vllm") as server:
        lm = RecordingLM(OpenAICompatLM(server.address, images=True), path)
        said["score"] = lm.score("I would:", TEXTS)
        said["letters"] = lm.score("I would:", TEXTS, images=[IMAGE])
        said["choice"] = lm.generate("I would:", choices=CHOICES)
        said["drawn"] = lm.generate("I would:", choices=CHOICES, temperature=9.0, seed=5)
        said["free"] = lm.generate("Say something.", max_tokens=5)
        said["capabilities"], said["name"] = lm.capabilities, lm.name
        assert lm.usage.calls == 5
        again = RecordingLM(lm.lm, path)  # goes on with the file
        said["more"] = again.score("You would:", TEXTS)
    return path, said


def test_what_was_recorded_comes_back(recorded: Any) -> None:
    path, said = recorded
    lm = ReplayLM(path)
    assert (lm.name, lm.capabilities) == (said["name"], said["capabilities"])
    assert lm.generate("I would:", choices=CHOICES, temperature=9.0, seed=5) == said["drawn"]
    assert lm.generate("I would:", choices=CHOICES) == said["choice"]
    assert lm.generate("Say something.", max_tokens=5) == said["free"]
    assert lm.score("I would:", TEXTS) == said["score"]
    assert lm.score("I would:", TEXTS, images=[IMAGE]) == said["letters"] != said["score"]
    assert lm.score("You would:", TEXTS) == said["more"]
    assert lm.score("I would:", [TEXTS[2], TEXTS[0]]) == [said["score"][2], said["score"][0]]
    assert lm.usage.calls == 7
    assert lm.usage.transcript[1]["answer"] == said["choice"].text


def test_what_was_not_recorded(recorded: Any) -> None:
    lm = ReplayLM(recorded[0])
    with pytest.raises(NotFoundError, match=r"at letter 8 it says ' 2\.', the nearest recorded prompt ''.*'I would:'"):
        lm.score("I would: 2.", TEXTS)
    with pytest.raises(NotFoundError, match="holds this prompt, but not with continuation ' fly'"):
        lm.score("I would:", [*TEXTS, " fly"])
    with pytest.raises(NotFoundError, match="but not with these options"):
        lm.generate("I would:", choices=CHOICES, seed=1)
    with pytest.raises(NotFoundError, match="but not with continuation"):
        lm.score("I would:", TEXTS, images=[IMAGE + 1])
    with pytest.raises(NotFoundError, match="but not with continuation"):  # letters depend on each other
        lm.score("I would:", TEXTS[:2], images=[IMAGE])


def test_answers_come_in_their_order(tmp_path: Any) -> None:
    path = tmp_path / "transcript.jsonl"
    with fake_llm("vllm") as server:
        lm = RecordingLM(OpenAICompatLM(server.address), path)
        one = lm.generate("I would:", choices=CHOICES)
        server.constraint = lambda body: [" put the red cube"]
        two = lm.generate("I would:", choices=CHOICES)
    assert one != two
    replay = ReplayLM(path)
    assert [replay.generate("I would:", choices=CHOICES) for _ in range(3)] == [one, two, two]


def test_files(recorded: Any, tmp_path: Any) -> None:
    path, said = recorded
    with pytest.raises(NotFoundError, match=r"no transcript at nowhere.jsonl. Record one with RecordingLM"):
        ReplayLM("nowhere.jsonl")
    whole = path.read_text()
    path.write_text(whole[:-20])  # killed while it wrote the last line
    assert ReplayLM(path).score("I would:", TEXTS) == said["score"]
    lines = whole.splitlines()
    path.write_text("\n".join([lines[0], lines[1][:-5], *lines[2:]]))
    with pytest.raises(ConfigError, match="expected JSON in line 2"):
        ReplayLM(path)
    path.write_text("\n".join(lines[1:]))
    with pytest.raises(ConfigError, match="whose first line names no model"):
        ReplayLM(path)
    path.write_text(whole)
    with fake_llm("vllm") as server:
        other = OpenAICompatLM(server.address)
        with pytest.raises(ConfigError, match="expected a new file or one of bigram at"):
            RecordingLM(other, path)
