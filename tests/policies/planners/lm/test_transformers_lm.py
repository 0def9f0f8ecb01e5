"""Models of transformers with random weights: scores against whole passes, what is written against what is allowed."""

from __future__ import annotations

import importlib.util
import json
from typing import Any

import numpy as np
import pytest
import tiny_lm

from brachium.errors import ConfigError, NotFoundError
from brachium.policies.planners.lm.base import Choices
from brachium.policies.planners.lm.transformers_lm import TransformersLM

SKILLS = (" put the red cube in the bowl.", " put the red cube", " open the drawer.\n", " done.", "1", "\n\n", " dönë")
PROMPTS = (
    "I would: 1.",
    "Human: how would you sort the cubes? Robot: I would: 1. ",  # a space that the next word takes along
    "Robot: I would: 1. open the dr",  # half a word
    "done.",  # a full stop that a line end merges with
)
CASES = [
    ("llama", "words", True),
    ("llama", "space", True),
    ("qwen2", "words", False),
    ("qwen2", "whole", False),
    ("gemma3", "words", True),
    ("gpt2", "whole", False),
    ("mamba", "words", False),
]


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    """Models this small gain nothing from a second thread, and wait for it where the machine is busy."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[Any, str] = {}

    def folder(kind: str, cut: str, bos: bool, template: bool = False) -> str:
        key = (kind, cut, bos, template)
        if key not in made:
            path = tmp_path_factory.mktemp("lm")
            made[key] = tiny_lm.make_lm(path, kind, tiny_lm.make_tokenizer(cut, bos=bos, template=template))
        return made[key]

    return folder


def likelihood(lm: TransformersLM, ids: list[int]) -> float:
    """log p of all tokens but the first, by one pass over everything, without anything of the class."""
    import torch

    with torch.inference_mode():
        logits = lm.model(input_ids=torch.tensor([ids])).logits[0].double()
    steps = torch.log_softmax(logits[:-1], -1)
    return float(steps[range(len(ids) - 1), ids[1:]].sum())


@pytest.mark.parametrize(("kind", "cut", "bos"), CASES)
def test_scores_are_those_of_whole_passes(folders: Any, kind: str, cut: str, bos: bool) -> None:
    lm = TransformersLM(folders(kind, cut, bos), batch_size=3)
    merged = 0
    for prompt in PROMPTS[:2] if kind == "mamba" else PROMPTS:  # that one is slow
        before = list(lm.tokenizer(prompt).input_ids)
        alone = {start: likelihood(lm, [2] * start + before) for start in (0, 1)}
        for text, found in zip(SKILLS, lm.score(prompt, SKILLS)):
            joint = list(lm.tokenizer(prompt + text).input_ids)
            merged += joint[: len(before)] != before
            start = int(before[0] != joint[0])  # not even the first token is the same
            expected = likelihood(lm, [2] * start + joint) - alone[start]
            assert found.logprob == pytest.approx(expected, abs=1e-4), text
            assert found.estimator == "exact"
            assert found.tokens >= len(joint) - len(before)
    assert merged > 0, "no boundary was unstable: the test tests too little"
    assert lm._cache_is_sound == {False: kind != "mamba"}


def test_a_score_does_not_depend_on_the_others(folders: Any) -> None:
    lm = TransformersLM(folders("llama", "words", True), batch_size=4)
    for prompt in PROMPTS[1:3]:
        together = lm.score(prompt, SKILLS)
        for text, found in zip(SKILLS, together):
            (alone,) = lm.score(prompt, [text])
            assert alone.logprob == pytest.approx(found.logprob, abs=1e-4)


def test_the_prompt_is_read_once(folders: Any) -> None:
    lm = TransformersLM(folders("llama", "words", True), batch_size=4)
    lm.score("I would: 1.", [" done."])  # the cache is tried
    prompt, read = "I would: 1. open the drawer. " * 8 + "2.", []
    hook = lm.model.get_input_embeddings().register_forward_hook(lambda module, args, out: read.append(args[0].numel()))
    lm.score(prompt, [" put the red cube in the bowl.", " put the blue cube in the drawer.", " done."] * 4)
    hook.remove()
    assert read[0] == len(lm.tokenizer(prompt).input_ids)
    assert len(read) == 1 + 3
    assert max(read[1:]) < 4 * 12


def test_edges_of_scoring(folders: Any) -> None:
    lm = TransformersLM(folders("qwen2", "words", False))
    assert lm.score("I would:", []) == []
    (nothing,) = lm.score("I would:", [""])
    assert (nothing.logprob, nothing.tokens) == (0.0, 0)
    (found,) = lm.score("", ["done."])
    ids = [lm.tokenizer.eos_token_id, *lm.tokenizer("done.").input_ids]
    assert found.logprob == pytest.approx(likelihood(lm, ids), abs=1e-4)
    with pytest.raises(ConfigError, match="reads at most 256 tokens, got"):
        lm.score("1" * 300, ["2"])
    assert lm.usage.calls == 3
    assert lm.usage.transcript[1]["prompt"] == "I would:"


def test_a_cache_that_goes_wrong_is_not_used(folders: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import DynamicCache

    lm = TransformersLM(folders("llama", "words", True))
    right = [s.logprob for s in lm.score(PROMPTS[0], SKILLS)]
    repeat = DynamicCache.batch_repeat_interleave

    def damaged(self: Any, n: int) -> None:
        repeat(self, n)
        self.crop(self.get_seq_length() - 1)

    monkeypatch.setattr(DynamicCache, "batch_repeat_interleave", damaged)
    lm = TransformersLM(folders("llama", "words", True))
    assert [s.logprob for s in lm.score(PROMPTS[0], SKILLS)] == pytest.approx(right, abs=1e-4)
    assert lm._cache_is_sound == {False: False}


@pytest.mark.parametrize(("kind", "cut", "bos"), CASES)
def test_greedy_writing_takes_the_likeliest_token(folders: Any, kind: str, cut: str, bos: bool) -> None:
    import torch

    lm = TransformersLM(folders(kind, cut, bos))
    ids = list(lm.tokenizer("I would: 1.").input_ids)
    n, total, written = len(ids), 0.0, []
    with torch.inference_mode():
        for _ in range(6):
            steps = torch.log_softmax(lm.model(input_ids=torch.tensor([ids])).logits[0, -1].double(), -1)
            ids.append(int(steps.argmax()))
            total += float(steps.max())
            written.append(ids[-1])
            if ids[-1] == 2:
                break
    found = lm.generate("I would: 1.", max_tokens=6)
    assert found.tokens == len(ids) - n
    assert found.logprob == pytest.approx(total, abs=1e-3)
    assert found.complete == (ids[-1] == 2)
    assert found.text == lm._cutter.text(written)


@pytest.mark.parametrize(("kind", "cut", "bos"), [*CASES[:2], CASES[3]])
def test_choices_are_kept_and_all_come(folders: Any, kind: str, cut: str, bos: bool) -> None:
    lm = TransformersLM(folders(kind, cut, bos))
    options = (
        " put the red cube",
        " put the red cube in the bowl.",
        " done.",
        " open it" if cut == "space" else " dönë",
    )
    for end in ("", "\n\n"):
        choices = Choices(options=options, separator="\n", end=end, repeat=2, may_be_empty=True)
        language = {"", *options, *(f"{a}\n{b}" for a in options for b in options)}
        seen = set()
        for seed in range(5):
            found = lm.generate("I would: 1.", choices=choices, temperature=30.0, seed=seed, max_tokens=80)
            assert found.complete
            assert found.text in language
            seen.add(found.text)
        assert len(seen) > 2
        assert any("\n" in text for text in seen)


def test_a_constrained_text_has_the_likelihood_it_is_told_to_have(folders: Any) -> None:
    lm = TransformersLM(folders("qwen2", "words", False))
    choices = Choices(options=(" put the red cube", " open the drawer", " done"), end="\n")
    found = lm.generate("I would: 1.", choices=choices)
    (scored,) = lm.score("I would: 1.", [found.text + "\n"])
    assert found.logprob == pytest.approx(scored.logprob, abs=1e-3)
    assert found.tokens == scored.tokens


def test_seeds(folders: Any) -> None:
    lm = TransformersLM(folders("llama", "words", True))
    texts = [lm.generate("I would:", temperature=5.0, seed=seed, max_tokens=10).text for seed in (0, 0, 1, 2)]
    assert texts[0] == texts[1]
    assert len(set(texts)) == 3
    short = lm.generate("I would:", choices=Choices(options=(" put the red cube in the bowl",), end="\n"), max_tokens=3)
    assert not short.complete
    assert short.tokens == 3


def test_chat(folders: Any) -> None:
    """The template's text is read as it stands: the first token of a text is not put there twice."""
    lm = TransformersLM(folders("llama", "words", True, True))
    assert "chat" in lm.capabilities
    whole = "<s>user\nsort the cubes</s><s>assistant\n"
    ids = lm.tokenizer(whole, add_special_tokens=False).input_ids
    joint = lm.tokenizer(whole + "done.", add_special_tokens=False).input_ids
    (found,) = lm.score("sort the cubes", ["done."])
    assert found.logprob == pytest.approx(likelihood(lm, joint) - likelihood(lm, ids), abs=1e-4)
    thinks = TransformersLM(folders("llama", "words", True, True), thinking=True)
    assert thinks.score("sort the cubes", ["done."])[0].logprob != pytest.approx(found.logprob, abs=1e-3)
    plain = TransformersLM(folders("llama", "words", True, True), chat=False)
    assert "chat" not in plain.capabilities
    (bare,) = plain.score("sort the cubes", ["done."])
    before, after = (plain.tokenizer("sort the cubes" + more).input_ids for more in ("", "done."))
    assert bare.logprob == pytest.approx(likelihood(plain, after) - likelihood(plain, before), abs=1e-4)


PICTURE = np.arange(40 * 40 * 3, dtype=np.uint8).reshape(40, 40, 3)


@pytest.mark.parametrize(("kind", "chat"), [("llava", True), ("qwen", True), ("qwen", False)])
def test_images(tmp_path: Any, kind: str, chat: bool) -> None:
    import torch

    lm = TransformersLM(tiny_lm.make_vlm(tmp_path, kind), batch_size=2, chat=chat)
    assert "images" in lm.capabilities
    blind = lm.score("what is it?", [" red", " a red cube.", "1"])
    images = [PICTURE, 255 - PICTURE]
    token = lm.processor.image_token
    marks = {"llava": "<image>" * 2, "qwen": f"<|vision_start|>{token}<|vision_end|>" * 2}[kind]
    prompt = "what is it?" if chat or kind == "llava" else marks + "what is it?"
    text = f"<s>user\n{marks}what is it?</s><s>assistant\n" if chat else marks + "what is it?"
    found = lm.score(prompt, [" red", " a red cube.", "1"], images=images)
    for scored, more in zip(found, [" red", " a red cube.", "1"]):
        sums = []
        for whole in (text, text + more):
            inputs = lm.processor(text=[whole], images=images, return_tensors="pt")
            with torch.inference_mode():
                logits = lm.model(**inputs).logits[0].double()
            ids = inputs["input_ids"][0]
            sums.append(float(torch.log_softmax(logits[:-1], -1)[range(len(ids) - 1), ids[1:]].sum()))
        assert scored.logprob == pytest.approx(sums[1] - sums[0], abs=1e-4)
    assert [s.logprob for s in found] != pytest.approx([s.logprob for s in blind], abs=1e-2)
    again = lm.score("what is it?", [" red", " a red cube.", "1"])
    assert [s.logprob for s in again] == pytest.approx([s.logprob for s in blind], abs=1e-5), "images are remembered"
    assert lm._cache_is_sound == {True: True, False: True}
    choices = Choices(options=(" red cube", " red", " bowl"), end="\n")
    texts = {lm.generate(prompt, choices=choices, images=images, temperature=9.0, seed=i).text for i in range(7)}
    assert texts == set(choices.options)
    with pytest.raises(ConfigError, match=r"expected images \(height, width, 3\) of uint8"):
        lm.score("what?", ["1"], images=[np.zeros((4, 4), np.uint8)])


def test_what_is_asked_in_vain(folders: Any, tmp_path: Any) -> None:
    lm = TransformersLM(folders("llama", "words", True))
    with pytest.raises(ConfigError, match=r"expected a language model with 'images', got .* Take an image-text model"):
        lm.score("what?", ["1"], images=[PICTURE])
    with pytest.raises(ConfigError, match="choices or json_schema, got both"):
        lm.generate("x", choices=Choices(options=("a",), end="."), json_schema={"type": "object"})
    with pytest.raises(ConfigError, match="no chat template"):
        TransformersLM(lm.name, chat=True)
    with pytest.raises(ConfigError, match=r"unknown dtype 'float33'. Did you mean 'float32'"):
        TransformersLM(lm.name, dtype="float33")
    with pytest.raises(ConfigError, match="unknown device 'gpuu'"):
        TransformersLM(lm.name, device="gpuu")
    with pytest.raises(NotFoundError, match=r"no such folder(.|\n)*Type a folder with config.json"):
        TransformersLM(str(tmp_path / "nothing"))
    with pytest.raises(NotFoundError, match=r"Type a folder with config.json"):
        TransformersLM("nobody/no-such-model")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no_such_type"}))
    with pytest.raises(ConfigError, match="no_such_type"):
        TransformersLM(str(tmp_path))


SCHEMA = {
    "type": "object",
    "properties": {"skill": {"enum": ["put", "open"]}, "n": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["skill", "n"],
    "additionalProperties": False,
}


@pytest.mark.skipif(importlib.util.find_spec("llguidance") is None, reason="llguidance is not installed")
def test_json_of_a_schema(folders: Any) -> None:
    lm = TransformersLM(folders("llama", "words", True))
    assert "json_schema" in lm.capabilities
    seen = set()
    for seed in range(8):
        found = lm.generate("Say it.", json_schema=SCHEMA, temperature=20.0, seed=seed)
        assert found.complete
        said = json.loads(found.text)
        assert sorted(said) == ["n", "skill"]
        assert 0 <= said["n"] <= 99
        seen.add(said["skill"])
    assert seen == {"put", "open"}
    with pytest.raises(ConfigError, match="expected a JSON schema"):
        lm.generate("Say it.", json_schema={"type": "no such type"})


@pytest.mark.skipif(importlib.util.find_spec("llguidance") is not None, reason="llguidance is installed")
def test_json_without_the_package(folders: Any) -> None:
    lm = TransformersLM(folders("llama", "words", True))
    assert "json_schema" not in lm.capabilities
    with pytest.raises(ConfigError, match="pip install llguidance"):
        lm.generate("Say it.", json_schema=SCHEMA)
