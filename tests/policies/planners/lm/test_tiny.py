"""The model in numpy against transformers with the same weights; the tiny language model against joint scoring."""

import json

import numpy as np
import pytest

from brachium.errors import CheckpointError, ConfigError, NotFoundError
from brachium.policies.planners.lm.base import Choices
from brachium.policies.planners.lm.llama import NumpyLlama, log_softmax
from brachium.policies.planners.lm.tiny import TinyLM
from brachium.policies.planners.lm.words import ANSWER, END, SPECIAL, WordTokenizer, split_words

TEXTS = ["put the red cube in the blue bowl", "open the drawer ; close it", "is it , red ?", "in ( a , b )"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random model with grouped queries in transformers' own files."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    path = tmp_path_factory.mktemp("llama")
    tokenizer = WordTokenizer.of(TEXTS)
    tokenizer.save(path)
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        initializer_range=0.4,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    return path


def test_logits_are_those_of_transformers(folder):
    import torch
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ours = NumpyLlama.load(folder)
    tokens = np.random.default_rng(0).integers(0, ours.vocabulary, (3, 21))
    with torch.no_grad():
        expected = theirs(torch.from_numpy(tokens)).logits.numpy()
    found, cache = ours(tokens)
    np.testing.assert_allclose(found, expected, atol=2e-4, rtol=1e-4)
    assert cache.length == 21


def test_reading_in_parts_is_reading_at_once(folder):
    model = NumpyLlama.load(folder)
    tokens = np.random.default_rng(1).integers(0, model.vocabulary, (1, 17))
    whole, _ = model(tokens)
    first, cache = model(tokens[:, :9])
    second, cache = model(tokens[:, 9:16], cache)
    third, _ = model(tokens[:, 16:], cache)
    np.testing.assert_allclose(np.concatenate([first, second, third], axis=1), whole, atol=1e-4)


def test_the_tokenizer_is_the_same_in_the_tokenizers_package(folder):
    from transformers import AutoTokenizer

    theirs, ours = AutoTokenizer.from_pretrained(folder), WordTokenizer.load(folder)
    for text in (*TEXTS, f"put it {ANSWER} close {END}", "RED  cube?"):
        assert theirs(text, add_special_tokens=False)["input_ids"] == ours.encode(text), text


def test_words_and_signs_are_told_apart():
    assert split_words("<parse> Put it, in(a, b) => x</s>") == [
        *("<parse>", "put", "it", ",", "in", "(", "a", ",", "b", ")", "=>", "x", "</s>")
    ]
    tokenizer = WordTokenizer.of(["put it"])
    assert tokenizer.vocabulary[: len(SPECIAL)] == SPECIAL
    assert tokenizer.unknown("put the plaid it , plaid") == ["the", "plaid", ","]


def test_scores_are_those_of_joint_scoring(folder):
    lm = TinyLM(folder)
    prompt, options = "is it red ?", ["put the cube", "close", "in the blue bowl ; open", "the drawer"]
    found = lm.score(prompt, options)
    for text, scored in zip(options, found):
        asked = [lm.tokenizer.begin, *lm.tokenizer.encode(prompt)]
        written = lm.tokenizer.encode(text)
        logits, _ = lm.model(np.array([asked + written]))
        logprobs = log_softmax(logits[0])
        expected = sum(logprobs[len(asked) - 1 + k, token] for k, token in enumerate(written))
        assert scored.logprob == pytest.approx(expected, abs=1e-4)
        assert scored.tokens == len(written)


def test_scores_add_up_to_one_over_all_words(folder):
    lm = TinyLM(folder)
    words = [lm.tokenizer.vocabulary[k] for k in range(len(lm.tokenizer))]
    total = sum(np.exp(s.logprob) for s in lm.score("put the", words))
    assert total == pytest.approx(1.0, abs=1e-4)


def test_greedy_writing_takes_the_likeliest_word_each_time(folder):
    lm = TinyLM(folder)
    found = lm.generate("put the red", max_tokens=6)
    text = "put the red"
    for word in found.text.split():
        scores = lm.score(text, list(lm.tokenizer.vocabulary))
        assert lm.tokenizer.vocabulary[int(np.argmax([s.logprob for s in scores]))] == word
        text += f" {word}"


def test_choices_are_the_only_thing_that_can_be_written(folder):
    lm = TinyLM(folder)
    options = ("put the cube", "put the cube in the drawer", "close it", "open the blue bowl")
    for seed in range(40):
        found = lm.generate("is it red ?", choices=Choices(options=options), temperature=1.5, seed=seed)
        assert found.text in options
        assert found.complete
    plan = Choices(options=options, separator=" ;", repeat=3)
    for seed in range(20):
        found = lm.generate("is it red ?", choices=plan, temperature=1.5, seed=seed)
        assert all(part.strip() in options for part in found.text.split(";"))


def test_draws_depend_on_their_seed(folder):
    lm = TinyLM(folder)
    texts = [lm.generate("put", temperature=2.0, seed=seed, max_tokens=8).text for seed in (1, 1, 2, 3, 4)]
    assert texts[0] == texts[1]
    assert len(set(texts)) > 1


def test_what_it_cannot_do_is_told(folder, tmp_path):
    lm = TinyLM(folder)
    with pytest.raises(ConfigError, match=r"does not know the words \['plaid'\]"):
        lm.score("put the plaid cube", ["open"])
    with pytest.raises(ConfigError, match="writes no JSON"):
        lm.generate("put", json_schema={})
    with pytest.raises(NotFoundError, match="brachium train-lm"):
        TinyLM(tmp_path / "none")
    with pytest.raises(CheckpointError, match=r"tokenizer.json"):
        TinyLM(tmp_path)
    WordTokenizer.of(TEXTS).save(tmp_path)
    with pytest.raises(CheckpointError, match="expected a language model"):
        TinyLM(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match="type llama, got 'gpt2'"):
        TinyLM(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "hidden_size": 64}))
    with pytest.raises(CheckpointError, match="of shape"):
        TinyLM(tmp_path)
    with pytest.raises(ConfigError, match="at most 48 words"):
        lm.generate("put the " * 40)
