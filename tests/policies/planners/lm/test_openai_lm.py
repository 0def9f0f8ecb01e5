"""The client against real HTTP servers that speak three dialects over a bigram whose likelihoods are known."""

from __future__ import annotations

import json
import math
import time
from typing import Any

import numpy as np
import pytest
from fake_llm import MODEL, cut, fake_llm, likely, logprob

from brachium.errors import ConfigError, ServerError
from brachium.policies.planners.lm.base import Choices
from brachium.policies.planners.lm.dialects import allows, grammar, pattern
from brachium.policies.planners.lm.estimators import letter_questions
from brachium.policies.planners.lm.openai_lm import OpenAICompatLM

SKILLS = ("put the red cube", "put the green cube", "open the drawer", "done")
AFTER = tuple(f" {skill}" for skill in SKILLS)
QUICK = {"timeout_s": 5.0, "backoff_s": 0.001, "retries": 1}


def connect(server: Any, **options: Any) -> OpenAICompatLM:
    return OpenAICompatLM(server.address, **{**QUICK, **options})


@pytest.mark.parametrize(
    ("kind", "faults", "dialect", "estimator"),
    [
        ("vllm", (), "vllm", "exact"),
        ("vllm", ("strict",), "vllm", "exact"),
        ("vllm", ("strict", "no chat"), "vllm", "exact"),
        ("old_vllm", (), "vllm before 0.12", "exact"),
        ("old_vllm", ("strict",), "vllm before 0.12", "exact"),
        ("llama_cpp", (), "llama.cpp", "letters"),
        ("llama_cpp", ("generated only",), "llama.cpp", "letters"),
        ("llama_cpp", ("generated only", "no letters"), "llama.cpp", "votes"),
        ("ollama", (), "ollama", "votes"),
        ("ollama", ("strict", "no chat"), "ollama", "votes"),
        ("openai", ("strict", "no echo"), "openai", "letters"),
        ("vllm", ("constant",), "vllm", "letters"),
        ("vllm", ("holes",), "vllm", "letters"),
        ("vllm", ("no constraint",), None, "exact"),
        ("llama_cpp", ("no constraint", "no letters"), None, "none"),
    ],
)
def test_a_server_is_found_out(kind: str, faults: Any, dialect: str | None, estimator: str) -> None:
    with fake_llm(kind, faults) as server:
        lm = connect(server)
        assert (lm.dialect and lm.dialect.name) == dialect
        assert lm.estimator == estimator
        assert ("score" in lm.capabilities) == (estimator != "none")
        assert ({"choice", "json_schema"} <= lm.capabilities) == (dialect is not None)
        assert ("chat" in lm.capabilities) == ("no chat" not in faults)
        assert lm.name == f"{MODEL} at http://{server.address}"
        if estimator == "none":
            with pytest.raises(ConfigError, match="with 'score'"):
                lm.score("x", ["a"])
        if dialect is None:
            with pytest.raises(ConfigError, match="with 'choice'"):
                lm.generate("x", choices=Choices(options=SKILLS))


@pytest.mark.parametrize("kind", ["vllm", "old_vllm"])
def test_exact_scores(kind: str) -> None:
    with fake_llm(kind) as server:
        lm = connect(server)
        found = lm.score("I would:", AFTER)
        for text, scored in zip(AFTER, found):
            assert scored.logprob == pytest.approx(logprob("I would:" + text) - logprob("I would:"), abs=1e-9)
            assert scored.tokens == len(cut(text))
            assert scored.estimator == "exact"
        (inside,) = lm.score("put the gr", ["een cube"])  # one word of the two
        assert inside.logprob == pytest.approx(logprob("put the green cube") - logprob("put the gr"), abs=1e-9)
        (bare,) = lm.score("", ["put the red cube"])
        assert bare.logprob == pytest.approx(logprob("put the red cube"), abs=1e-9)
        assert lm.score("x", []) == []
        twice = lm.score("I would:", [AFTER[0], AFTER[0]])
        assert twice == [found[0], found[0]]
        assert lm.usage.calls == 4
        assert lm.usage.transcript[0]["answer"][AFTER[0]] == found[0].logprob


def test_log_probabilities_of_the_generated_token_never_pass_for_the_prompts() -> None:
    """A server that changes its mind after the start: what llama.cpp does would make all options equally likely."""
    with fake_llm("vllm") as server:
        lm = connect(server)
        server.faults.add("generated only")
        with pytest.raises(ServerError, match="expected 4 log-probabilities of a prompt, got 1"):
            lm.score("I would: do", AFTER)
        server.faults = {"holes"}
        with pytest.raises(ServerError, match="expected 4 log-probabilities of a prompt, got 5"):
            lm.score("I would: do", AFTER)


@pytest.mark.parametrize(("kind", "chat"), [("llama_cpp", True), ("vllm", False)])
def test_letters_are_free_of_a_liking_for_places(kind: str, chat: bool) -> None:
    with fake_llm(kind, ["no echo"]) as server:
        lm = connect(server, chat=chat)
        found = lm.score("I would:", AFTER)
        told = [logprob("I would: " + text.strip()) - logprob("I would:") for text in AFTER]
        whole = math.log(sum(map(math.exp, told)))
        assert [s.logprob for s in found] == pytest.approx([t - whole for t in told], abs=1e-9)
        assert {s.estimator for s in found} == {"letters (4 rotations)"}
        backwards = lm.score("I would:", AFTER[::-1])
        assert [s.logprob for s in backwards[::-1]] == pytest.approx([s.logprob for s in found], abs=1e-9)
        first = server.letters(letter_questions("I would:", AFTER)[0])
        gap = first["A"] - first["B"] - (found[0].logprob - found[1].logprob)
        assert gap == pytest.approx(0.7), "the fake likes no place: the test tests nothing"
        server.faults.add("mumbles")
        with pytest.raises(ServerError, match=r"expected a letter from A to D as answer, got ' Well', ','"):
            lm.score("I shall:", AFTER)


def test_votes() -> None:
    with fake_llm("ollama") as server:
        lm = connect(server, samples=40)
        found = lm.score("I would:", AFTER)
        votes = [likely("I would:", [f'{{"answer": ["{t}"]}}' for t in AFTER], 1.0, seed) for seed in range(40)]
        counts = [sum(f'"{t}"' in vote for vote in votes) for t in AFTER]
        assert [s.logprob for s in found] == pytest.approx([math.log((c + 1) / 44) for c in counts])
        assert sum(math.exp(s.logprob) for s in found) == pytest.approx(1.0)
        assert {s.estimator for s in found} == {"votes (40 samples)"}
        assert lm.score("I would:", AFTER) == found, "seeds are not used"


def test_more_options_than_letters() -> None:
    many = [f"go to place {i}" for i in range(25)]
    with fake_llm("llama_cpp") as server:
        lm = connect(server, samples=5)
        assert {s.estimator for s in lm.score("Now", many)} == {"votes (5 samples)"}
        assert {s.estimator for s in lm.score("Now", many[:20])} == {"letters (20 rotations)"}
        with pytest.raises(ConfigError, match="expected at most 20 continuations, got 25"):
            connect(server, samples=0).score("Now", many)


AWKWARD = ('say "hi" (now)', "a|b.c*", "back\\slash", "grün [x]", "two\nlines", "100% $5 ^up^ {3}?", "a-b")


@pytest.mark.parametrize("kind", ["vllm", "old_vllm", "llama_cpp", "ollama", "openai"])
@pytest.mark.parametrize("chat", [True, False])
def test_choices_in_every_dialect(kind: str, chat: bool) -> None:
    with fake_llm(kind) as server:
        lm = connect(server, chat=chat)
        for options in (SKILLS, AWKWARD):
            one = Choices(options=options)
            assert {lm.generate("Now", choices=one, temperature=1e3, seed=s).text for s in range(40)} == set(options)
        few = Choices(options=SKILLS[:3], separator="\n", end=".\n", repeat=2, may_be_empty=True)
        language = {"", *SKILLS[:3], *(f"{a}\n{b}" for a in SKILLS[:3] for b in SKILLS[:3])}
        seen = {lm.generate("Now", choices=few, temperature=1e3, seed=s).text for s in range(60)}
        assert seen <= language
        assert len(seen) > 7
        if kind != "ollama" and kind != "openai":  # what JSON wraps around the text has likelihoods of its own
            found = lm.generate("I would:", choices=Choices(options=AFTER))
            assert found.text == likely("I would:", AFTER, 0.0, 0)
            assert found.complete
            assert found.tokens == len(cut(found.text))
            assert not lm.generate("I would:", choices=Choices(options=AFTER[:2]), max_tokens=2).complete
        said = lm.generate("x", json_schema={"type": "object", "properties": {"a": {"enum": [1, "two"]}}}).text
        assert json.loads(said)["a"] in (1, "two")


def test_patterns_and_grammars_say_the_same() -> None:
    import fake_llm as fake

    for repeat in (1, 2):
        for empty in (False, True):
            choices = Choices(options=AWKWARD[:4], separator="; ", repeat=repeat, may_be_empty=empty)
            texts = {*AWKWARD[:4]} | ({f"{a}; {b}" for a in AWKWARD[:4] for b in AWKWARD[:4]} if repeat == 2 else set())
            texts |= {""} if empty else set()
            assert set(fake.written_out(pattern(choices))) == texts
            assert set(fake.of_grammar(grammar(choices))) == texts
            assert all(allows(choices, text) for text in texts)
            assert not allows(choices, "a|b.c")
            assert not allows(choices, "aXb.c*")


def test_a_server_that_stops_keeping_to_constraints() -> None:
    with fake_llm("vllm") as server:
        lm = connect(server)
        server.faults.add("no constraint")
        with pytest.raises(ServerError, match="expected one of the given options, got ' and so on"):
            lm.generate("Now", choices=Choices(options=SKILLS))


def test_images_go_along() -> None:
    import base64

    import cv2

    picture = np.arange(6 * 5 * 3, dtype=np.uint8).reshape(6, 5, 3)
    with fake_llm("vllm") as server:
        lm = connect(server, images=True)
        assert "images" in lm.capabilities
        lm.generate("What is it?", images=[picture])
        (sent,) = server.pictures
        data = base64.b64decode(sent.removeprefix("data:image/png;base64,"))
        assert np.array_equal(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)[..., ::-1], picture)
        assert {s.estimator for s in lm.score("What?", AFTER, images=[picture])} == {"letters (4 rotations)"}
        assert len(server.pictures) == 1
        with pytest.raises(ConfigError, match="Type images=true"):
            connect(server).generate("What?", images=[picture])
        with pytest.raises(ConfigError, match=r"expected images \(height"):
            lm.generate("What?", images=[picture[..., 0]])
        with pytest.raises(ConfigError, match="images need chat"):
            connect(server, images=True, chat=False)


@pytest.mark.parametrize(
    ("fault", "complaint"),
    [
        ("html", r"/v1/chat/completions: expected JSON, got '<html><body>Welcome"),
        ("truncated", r"/v1/chat/completions: expected JSON, got '\{\"object\""),
        ("fields", r"expected choices\[0\].message.content \(str\) in the answer, got \{\"object\""),
        ("slow", r"/v1/chat/completions: no answer within 0.6 s \(2 tries\)"),
        ("drip", r"/v1/chat/completions: no answer within 0.6 s \(2 tries\)"),
    ],
)
def test_a_server_that_fails(fault: str, complaint: str) -> None:
    with fake_llm("vllm") as server:
        lm = connect(server, timeout_s=0.6)
        server.faults.add(fault)
        begin = time.monotonic()
        with pytest.raises(ServerError, match=complaint) as caught:
            lm.generate("Now")
        assert "\n" not in str(caught.value)
        assert time.monotonic() - begin < 5.0
        if fault == "fields":  # the list of models has all of them
            return
        with pytest.raises(ServerError, match="/v1/models"):
            connect(server, timeout_s=0.6, retries=0)


def test_a_busy_server_is_asked_again() -> None:
    with fake_llm("vllm") as server:
        lm = connect(server, retries=3)
        server.busy, before = 3, len(server.asked)
        assert lm.generate("Now", choices=Choices(options=SKILLS)).text in SKILLS
        assert len(server.asked) - before == 4
        server.busy = 4
        with pytest.raises(ServerError, match=r"status 429: .*busy.* \(4 tries\)"):
            lm.generate("Now")


def test_nobody_there() -> None:
    with fake_llm("vllm") as server:
        address = server.address
    with pytest.raises(ServerError, match=r"nobody there .*Start one, for example: vllm serve MODEL"):
        OpenAICompatLM(address, **QUICK)


def test_the_budget() -> None:
    with fake_llm("vllm") as server:
        used = connect(server).endpoint.calls
        lm = connect(server, max_calls=used + 2)
        lm.generate("a")
        lm.generate("b")
        before = len(server.asked)
        with pytest.raises(ServerError, match=f"the budget of {used + 2} calls is spent: raise max_calls"):
            lm.generate("c")
        assert len(server.asked) == before
        with pytest.raises(ServerError, match="the budget of 5 calls is spent"):  # in the middle of the questions
            connect(server, max_calls=5)


def test_a_server_that_is_away_during_the_questions_is_not_taken_for_one_that_cannot() -> None:
    with fake_llm("vllm") as server:
        used = connect(server).endpoint.calls
        for call in range(used):
            server.asked.clear()
            server.busy_at = call
            with pytest.raises(ServerError, match="status 429"):
                connect(server, retries=0)


def test_answers_are_kept_in_a_file(tmp_path: Any) -> None:
    path = tmp_path / "below" / "answers.jsonl"
    with fake_llm("vllm") as server:
        lm = connect(server, cache=path)
        first = lm.score("I would:", AFTER), lm.generate("Now", choices=Choices(options=SKILLS), seed=3)
        asked = len(server.asked)
        assert (lm.score("I would:", AFTER), lm.generate("Now", choices=Choices(options=SKILLS), seed=3)) == first
        assert len(server.asked) == asked
        lm.generate("Now", choices=Choices(options=SKILLS), seed=4)
        assert len(server.asked) == asked + 1
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) - 30])  # killed while it wrote the last line
        again = connect(server, cache=path)
        before = len(server.asked)
        assert (again.score("I would:", AFTER), again.generate("Now", choices=Choices(options=SKILLS), seed=3)) == first
        assert len(server.asked) == before
        again.generate("Now", choices=Choices(options=SKILLS), seed=4)  # the torn one
        assert len(server.asked) == before + 1
        third = connect(server, cache=path)
        before = len(server.asked)
        third.generate("Now", choices=Choices(options=SKILLS), seed=4)
        assert len(server.asked) == before
        with pytest.raises(ConfigError, match="got the folder"):
            connect(server, cache=tmp_path)


def test_the_key_stays_secret(tmp_path: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    key = "sk-very-secret-123"
    caplog.set_level("DEBUG")
    with fake_llm("vllm", key=key) as server:
        monkeypatch.delenv("OPENAI_API_KEY", raising=False)
        with pytest.raises(ServerError, match="status 401"):
            connect(server)
        monkeypatch.setenv("OPENAI_API_KEY", key)
        lm = connect(server, cache=tmp_path / "answers.jsonl")
        lm.generate("Now")
        server.faults.add("repeats the key")
        with pytest.raises(ServerError, match=r"status 400: who is Bearer \*\*\*\?") as caught:
            lm.generate("Again")
        seen = [str(caught.value), repr(vars(lm)), caplog.text, (tmp_path / "answers.jsonl").read_text()]
        assert all(key not in text for text in [*seen, json.dumps(list(lm.usage.transcript))])
        monkeypatch.setenv("OTHER", key)
        monkeypatch.delenv("OPENAI_API_KEY")
        server.faults.clear()
        assert connect(server, key_env="OTHER").generate("Now").text
        monkeypatch.setenv("OTHER", "schlüssel")
        with pytest.raises(ConfigError, match="environment variable OTHER") as bad:
            connect(server, key_env="OTHER")
        assert "schlüssel" not in str(bad.value)


def test_which_model_and_where() -> None:
    with fake_llm("vllm") as server:
        assert OpenAICompatLM(f"http://{server.address}/v1/", model=MODEL, **QUICK).model == MODEL
        with pytest.raises(ConfigError, match=r"got 'bigrm'. Did you mean 'bigram'\? .* Type model=NAME"):
            connect(server, model="bigrm")
    for address in ("", "ftp://127.0.0.1", "http://user:secret@host:1"):
        with pytest.raises(ConfigError, match="expected an address such as") as caught:
            OpenAICompatLM(address)
        assert "secret" not in str(caught.value)
