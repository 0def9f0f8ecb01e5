"""The word tokenizer and the fixed-length instruction encoder."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from brachium.vla.tokenizer import BEGIN, END, PAD, UNKNOWN, InstructionEncoder, word_tokenizer


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_special_tokens_come_first_and_words_are_sorted():
    tokenizer = word_tokenizer(["b a", "c"])
    assert tokenizer.convert_ids_to_tokens(range(len(tokenizer))) == [PAD, UNKNOWN, BEGIN, END, "a", "b", "c"]


def test_case_and_order_of_the_corpus_do_not_matter():
    first, second = word_tokenizer(["Push the Mug", "stop"]), word_tokenizer(["STOP", "push THE mug", "push the mug"])
    assert first.get_vocab() == second.get_vocab()
    assert ids(first, "PUSH the mug") == ids(first, "push The MUG")


def test_unknown_words_become_unknown():
    tokenizer = word_tokenizer(["push the mug"])
    assert tokenizer.convert_ids_to_tokens(ids(tokenizer, "push a zebra mug")) == ["push", UNKNOWN, UNKNOWN, "mug"]


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=30))
def test_no_word_of_the_corpus_is_unknown(text):
    tokenizer = word_tokenizer([text])
    assert tokenizer.unk_token_id not in [i for i in ids(tokenizer, text) if UNKNOWN not in text.lower()]


def test_a_word_whose_lower_case_depends_on_the_place_is_known():
    tokenizer = word_tokenizer(["ΟΔΟΣ"])  # Python ends its lower case with another sigma
    assert tokenizer.unk_token_id not in ids(tokenizer, "ΟΔΟΣ")


def test_saved_and_loaded_it_is_the_same(tmp_path):
    tokenizer = word_tokenizer(["push the red mug, please!"])
    tokenizer.save_pretrained(str(tmp_path))
    loaded = AutoTokenizer.from_pretrained(str(tmp_path))
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert (loaded.pad_token_id, loaded.unk_token_id) == (tokenizer.pad_token_id, tokenizer.unk_token_id)
    assert ids(loaded, "Please push, zebra!") == ids(tokenizer, "Please push, zebra!")


def test_instructions_are_padded_on_the_left_and_lose_their_beginning():
    tokenizer = word_tokenizer(["a b c d e"])
    encode = InstructionEncoder(tokenizer, 3)
    rows = encode(["a", "a b c d e", ""])
    assert rows.dtype == np.int64
    assert tokenizer.convert_ids_to_tokens(rows[0]) == [PAD, PAD, "a"]
    assert tokenizer.convert_ids_to_tokens(rows[1]) == ["c", "d", "e"]
    assert rows[2].tolist() == [encode.pad] * 3


def test_a_caller_cannot_change_the_cache():
    encode = InstructionEncoder(word_tokenizer(["a b"]), 4)
    before = encode(["a b"]).copy()
    encode(["a b"])[:] = 99
    np.testing.assert_array_equal(encode(["a b"]), before)


@pytest.mark.parametrize("text", ["<pad> push", "<bos>", "\x00", "🤖 mug", "a" * 10_000])
def test_hostile_text_still_gives_valid_ids(text):
    tokenizer = word_tokenizer(["push the mug"])
    row = InstructionEncoder(tokenizer, 5)([text])
    assert row.shape == (1, 5)
    assert row.min() >= 0
    assert row.max() < len(tokenizer)
