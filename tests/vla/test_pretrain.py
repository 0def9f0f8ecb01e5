"""Pretraining: texts and targets, losses by hand, a batch learnt by heart, resuming, saving, loading, asking."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoTokenizer

from brachium.errors import CheckpointError, ConfigError, NotFoundError, SpecMismatchError, StoreError
from brachium.vla.checkpoint import load_checkpoint
from brachium.vla.optim import Optimization
from brachium.vla.pretrain import Seeing, pretrain
from brachium.vla.pretrain_data import corpus_of
from brachium.vla.pretrained import Pretrained
from brachium.vla.questions import (
    IGNORE,
    QuestionEncoder,
    blurred_targets,
    choices,
    language_loss,
    location_tokens,
    score,
)
from brachium.vla.tokenizer import subword_tokenizer
from brachium.vla.train import train

from .conftest import SIZE, make_embodiment, make_recipe, record_demos, record_scenes

FAST = Optimization(
    steps=6, batch_size=4, warmup=2, precision="float32", log_every=3, save_every=2, lr=3e-3, ema=0.9, seed=1
)


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    return record_scenes(tmp_path_factory.mktemp("asked") / "store", range(16), questions=True)


@pytest.fixture(scope="module")
def tokenizer(asked):
    return subword_tokenizer(corpus_of([asked]), size=330)


def run(store, out, **options):
    options = {"model": make_recipe(points=True), "optimization": FAST, "seeing": Seeing(), "heldout": 4, **options}
    settings = {"vocabulary": 330, "length": 24, "sentences": 2, "questions": 2, "watch": (0, 1), "device": "cpu"}
    return pretrain(stores=[str(store.path)], out=str(out), **{**settings, **options})


@pytest.fixture(scope="module")
def made(asked, tmp_path_factory):
    out = tmp_path_factory.mktemp("made")
    seeing = Seeing(optimization=replace(FAST, steps=3))
    run(asked, out, seeing=seeing, tests={"again": str(asked.path)})
    return out


# Texts.


def test_every_text_can_be_written_and_read(tokenizer):
    for text in ("where is red?", "Zürich <loc07><loc95>", "日本", "{a}  b"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids).strip() == text.lower()
    assert tokenizer.tokenize("where is red?") == ["Ġwhere", "Ġis", "Ġred", "?"]
    assert (tokenizer.pad_token_id, tokenizer.convert_tokens_to_ids("<image>")) == (0, 1)
    places = location_tokens(tokenizer)
    assert sorted(places.values()) == list(range(96))


def test_the_same_texts_give_the_same_tokens(asked, tokenizer):
    again = subword_tokenizer(sorted(corpus_of([asked]), reverse=True), size=330)
    assert again.get_vocab() == tokenizer.get_vocab()


def test_only_the_answer_is_a_target(tokenizer):
    encode = QuestionEncoder(tokenizer, 12)
    made = encode("where is red?", "<loc07><loc95>")
    tokens, targets = made.tokens, made.targets
    words = tokenizer.convert_ids_to_tokens(tokens)
    assert words[-8:] == ["Ġwhere", "Ġis", "Ġred", "?", "<bos>", "<loc07>", "<loc95>", "<eos>"]
    shown = [(w, t) for w, t in zip(words, targets) if t != IGNORE]
    assert [w for w, _ in shown] == ["<bos>", "<loc07>", "<loc95>"]
    assert tokenizer.convert_ids_to_tokens([t for _, t in shown]) == ["<loc07>", "<loc95>", "<eos>"]
    assert QuestionEncoder(tokenizer, 7)("where is red?", "<loc07><loc95>") is None


def test_the_loss_by_hand():
    logits = torch.tensor([[1.0, 2.0, 0.0], [0.0, 0.0, 3.0]])
    targets = torch.tensor([1, 0])
    by_hand = [
        -2.0 + math.log(math.e + math.exp(2.0) + 1.0),
        -0.0 + math.log(2.0 + math.exp(3.0)),
    ]
    assert float(language_loss(logits, targets, torch.eye(3))) == pytest.approx(sum(by_hand) / 2)


def test_places_share_their_target_with_neighbours(tokenizer):
    blurred = blurred_targets(tokenizer, 1.0)
    places = {place: token for token, place in location_tokens(tokenizer).items()}
    torch.testing.assert_close(blurred.sum(1), torch.ones(len(tokenizer)))
    row = blurred[places[40]]
    weights = {k: math.exp(-0.5 * k * k) for k in range(-40, 56)}
    assert float(row[places[41]]) == pytest.approx(weights[1] / sum(weights.values()), rel=1e-5)
    word = tokenizer.convert_tokens_to_ids("Ġred")
    assert torch.equal(blurred[word], torch.eye(len(tokenizer))[word])
    assert torch.equal(blurred_targets(tokenizer, 0.0), torch.eye(len(tokenizer)))
    logits, targets = torch.randn(5, len(tokenizer)), torch.tensor([places[40], word, 3, 4, 5])
    sharp = torch.nn.functional.cross_entropy(logits, targets)
    assert float(language_loss(logits, targets, torch.eye(len(tokenizer)))) == pytest.approx(float(sharp), rel=1e-5)


def test_scores():
    locations = {10: 0, 11: 5, 12: 95}
    predicted = [[1, 9], [2, 9], [10, 11, 9], [3, 10, 9]]
    wanted = [[1, 9], [1, 9], [11, 11, 9], [11, 10, 9]]
    found = score(predicted, wanted, ["color", "color", "point", "point"], locations)
    assert found["accuracy/color"] == 0.5
    assert found["accuracy/point"] == 0.0
    assert found["tokens_off/point"] == pytest.approx((5.0 + 96.0) / 2)


def test_choices_are_read_where_targets_are():
    logits = torch.zeros(1, 2, 3, 4)
    logits[0, 0, 1, 3] = logits[0, 1, 2, 2] = 1.0
    targets = torch.full((1, 2, 3), IGNORE)
    targets[0, 0, 1], targets[0, 1, 2] = 3, 1
    assert choices(logits, targets) == ([[3], [2]], [[3], [1]])


# Training.


def test_a_few_scenes_are_learnt_by_heart(asked, tmp_path):
    few = record_scenes(tmp_path / "few", range(6), questions=True)
    # One of the six is held out; `again` shows all of them.
    learn = replace(FAST, steps=300, batch_size=5, lr=5e-3, warmup=10, ema=0.8, muon=1.0)
    run(few, tmp_path / "out", optimization=learn, heldout=1, tests={"again": str(few.path)}, single=0.2)
    metrics = json.loads((tmp_path / "out" / "scores.json").read_text())["metrics"]
    assert metrics["eval/again/accuracy/left"] >= 5 / 6 - 1e-6
    assert metrics["eval/again/tokens_off/point"] < 25  # 48 by chance
    assert metrics["eval/again/px/front"] < 6


def test_the_first_stage_learns_to_fill_in(asked, tmp_path):
    seeing = Seeing(optimization=replace(FAST, steps=60, batch_size=8, lr=5e-3))
    run(asked, tmp_path / "out", seeing=seeing)
    rows = [json.loads(line) for line in (tmp_path / "out" / "log-see.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert np.mean(losses[-3:]) < 0.75 * losses[0]


@pytest.mark.parametrize("options", [{}, {"muon": 1.0}, {"seeing": True}], ids=["adamw", "muon", "seeing"])
def test_an_interrupted_pretraining_goes_on_to_the_same_weights(asked, tmp_path, monkeypatch, options):
    import brachium.vla.pretrain as module

    some = {"optimization": replace(FAST, muon=options.get("muon", 0.0))}
    some["seeing"] = Seeing(optimization=replace(FAST, steps=2) if options.get("seeing") else None)
    run(asked, tmp_path / "whole", **some)
    torch.manual_seed(17)  # another process would begin elsewhere
    original = module.pretraining_loss
    calls = []

    def stop(*args, **options):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(module, "pretraining_loss", stop)
        with pytest.raises(KeyboardInterrupt):
            run(asked, tmp_path / "halves", **some)
    torch.manual_seed(18)
    run(asked, tmp_path / "halves", resume=True, **some)
    for name in ("model.safetensors", "pointing.safetensors"):
        assert (tmp_path / "halves" / "model" / name).read_bytes() == (
            tmp_path / "whole" / "model" / name
        ).read_bytes(), name


# The result.


def test_the_folder_is_a_hugging_face_model(made):
    model = AutoModelForImageTextToText.from_pretrained(str(made / "model"))
    ours = Pretrained.load(made / "model").encoder.backbone.vlm
    assert type(model).__name__ == "SmolVLMForConditionalGeneration"
    for (name, theirs), mine in zip(model.state_dict().items(), ours.state_dict().values()):
        assert torch.equal(theirs, mine), name
    tokenizer = AutoTokenizer.from_pretrained(str(made / "model"))
    assert model.config.text_config.vocab_size == len(tokenizer)


def test_scores_are_noted_with_what_text_alone_gives(made):
    notes = json.loads((made / "scores.json").read_text())
    for key in ("eval/heldout/accuracy/left", "eval/again/px/front", "blind/heldout/accuracy/left"):
        assert 0 <= notes["metrics"][key] < 100
    assert notes["scenes"] == 12
    assert Pretrained.load(made / "model").notes["parameters"] == notes["parameters"]


def test_an_answer_is_what_greedy_decoding_gives(made, asked):
    """Against the teacher-forced pass: each token is the likeliest after those before it."""
    model = Pretrained.load(made / "model")
    image = asked.read_images("front", np.array([0]))[0]
    said = model.answer(image, "is red left of green?")
    assert said == model.answer([image], "is red left of green?")
    encode = QuestionEncoder(model.tokenizer, 32)
    tokens = encode.prompt("is red left of green?")
    features = model.encoder.backbone(
        torch.from_numpy(image)[None, None], torch.tensor([[tokens]]), torch.ones(1, 1, len(tokens), dtype=torch.bool)
    )
    first = int(model.encoder.backbone.next_words(features.text[0, 0, -1]).argmax())
    assert [first] == [*encode.spell(said), encode.end][:1]


def test_a_place_is_what_the_point_readout_says(made, asked):
    """Of the phrase alone, in one image, as in the pass over all cameras."""
    model = Pretrained.load(made / "model")
    images = [asked.read_images(name, np.array([0]))[0] for name in ("front", "wrist")]
    ids = model.tokenizer("the red cube", add_special_tokens=False)["input_ids"]
    for view, image in enumerate(images):
        pixels = torch.from_numpy(image)[None, None]
        found = model.locate(image, "the red cube", view=view)
        assert 0 <= found.visible <= 1
        features = model.encoder.read(pixels, torch.tensor([[ids]]))
        twice = {"vision": features.vision.expand(-1, 2, -1, -1), "tokens": features.tokens.expand(-1, 2, -1, -1)}
        alike = replace(features, **twice)
        points = model.encoder.point_readout(alike, torch.zeros(1, len(model.encoder.body)))
        assert (found.u, found.v) == pytest.approx(tuple(points.uv[0, 0, 0, view].clamp(0, 1).tolist()), abs=1e-6)
    for phrase, view, words in ((" ", 0, "what to find"), ("red", 2, "a view from 0 to 1")):
        with pytest.raises((ConfigError, SpecMismatchError), match=words):
            model.locate(images[0], phrase, view=view)


@pytest.mark.parametrize("surround", [0, 8])
def test_a_head_is_trained_on_it(made, tmp_path, surround):
    demos = record_demos(tmp_path / "store", range(4))
    options = {
        "model": make_recipe(points=True, surround=surround),
        "optimization": FAST,
        "heldout": 0.3,
        "device": "cpu",
    }
    train(store=str(demos.path), out=str(tmp_path / "out"), encoder=str(made / "model"), **options)
    model = load_checkpoint(tmp_path / "out" / "checkpoint")
    given = Pretrained.load(made / "model").encoder.state_dict()
    for name, weight in model.encoder.state_dict().items():
        assert torch.equal(weight, given[name]), name


def test_robots_of_other_joints_share_an_encoder_and_other_cameras_do_not(made, tmp_path):
    options = {"model": make_recipe(points=True), "optimization": FAST, "heldout": 0.3, "device": "cpu"}
    more = make_embodiment(names=("x", "y", "z", "grip", "elbow", "wrist"))
    demos = record_demos(tmp_path / "store", range(4), spec=more)
    train(store=str(demos.path), out=str(tmp_path / "out"), encoder=str(made / "model"), **options)
    one = record_demos(tmp_path / "one", range(4), spec=make_embodiment(cameras=("front",)))
    with pytest.raises(SpecMismatchError, match=r"trained for cameras \('front', 'wrist'\)"):
        train(store=str(one.path), out=str(tmp_path / "two"), encoder=str(made / "model"), **options)


# Refusals.


def test_stores_that_cannot_be_used(asked, scenes, tmp_path):
    with pytest.raises(ConfigError, match="nothing to pretrain on"):
        pretrain(stores=[], model=make_recipe(points=True), optimization=FAST, seeing=Seeing(), out=str(tmp_path / "o"))
    with pytest.raises(StoreError, match="without questions"):
        run(scenes, tmp_path / "o")
    with pytest.raises(NotFoundError, match="no episode store"):
        pretrain(
            stores=[str(tmp_path / "none")],
            model=make_recipe(points=True),
            optimization=FAST,
            seeing=Seeing(),
            out=str(tmp_path / "o"),
        )
    for wrong in ({"watch": [0]}, {"heldout": 0}):
        with pytest.raises(ConfigError, match="two layers to watch"):
            run(asked, tmp_path / "o", **wrong)
    for wrong in ({"points": False}, {"backbone": {"_target_": "x", "path": "somewhere"}}):
        with pytest.raises(ConfigError, match="makes a new model that points"):
            run(asked, tmp_path / "o", model=replace(make_recipe(points=True), **wrong))
    assert not (tmp_path / "o").exists()
    other = record_scenes(tmp_path / "other", range(8), spec=make_embodiment(cameras=("front",)), questions=True)
    with pytest.raises(SpecMismatchError, match="cannot train one model"):
        run(asked, tmp_path / "o", tests={"other": str(other.path)})


def _wider(path):
    """Weights of a version with another width."""
    tensors = load_file(path)
    tensors["point_readout.position.0.weight"] = torch.zeros(3, 5)
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda p: (p / "pointing.safetensors").unlink(), "no pretrained model.*missing"),
        (lambda p: (p / "pointing.safetensors").write_bytes(b"123"), "is damaged"),
        (lambda p: (p / "brachium.json").write_text("{"), "is damaged"),
        (lambda p: (p / "brachium.json").write_text('{"format": 7}'), "expected format 1, got 7"),
        (lambda p: (p / "model.safetensors").write_bytes(b"123"), "cannot load a backbone"),
        (lambda p: _wider(p / "pointing.safetensors"), "pointing.safetensors does not fit"),
    ],
)
def test_a_damaged_folder(made, tmp_path, damage, words):
    copy = Path(shutil.copytree(made / "model", tmp_path / "model"))
    damage(copy)
    with pytest.raises(CheckpointError, match=words):
        Pretrained.load(copy)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(NotFoundError, match="no pretrained model at"):
        Pretrained.load(tmp_path / "none")


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (np.zeros((8, 8, 3), np.float32), r"uint8 \(height, width, 3\), got float32"),
        (np.zeros((8, 8), np.uint8), "got "),
        ([], "1 to 2 images"),
        ([np.zeros((8, 8, 3), np.uint8)] * 3, "1 to 2 images"),
        ([np.zeros((8, 8, 3), np.uint8), np.zeros((9, 8, 3), np.uint8)], "of one size"),
        (["front.png"], "got str"),
    ],
)
def test_images_of_the_wrong_kind(made, images, words):
    with pytest.raises(SpecMismatchError, match=words):
        Pretrained.load(made / "model").answer(images, "where is red?")


def test_no_question(made):
    with pytest.raises(ConfigError, match="expected a question"):
        Pretrained.load(made / "model").answer(np.zeros((SIZE, SIZE, 3), np.uint8), "  ")
