"""What covers patches, where to look, names without their priors: against counting by hand."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from brachium.errors import ConfigError, StoreError
from brachium.vla.card import model_card, recipe_hash
from brachium.vla.ground import Grounding
from brachium.vla.looking import Looks, PatchNames, looking_loss, middles, token_labels
from brachium.vla.optim import Optimization
from brachium.vla.pretrain_data import Mixture, corpus_of, names_of, record_all, words_of
from brachium.vla.probe import linear_probe
from brachium.vla.questions import IGNORE, NamePriors, QuestionEncoder, Speller
from brachium.vla.tokenizer import subword_tokenizer

from .conftest import SIZE, make_model, make_recipe, record_scenes

NAMES = ("blue ball", "drawer", "green cube", "red cube")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return record_scenes(tmp_path_factory.mktemp("looking") / "store", range(16), questions=True)


@pytest.fixture(scope="module")
def tokenizer(store):
    return subword_tokenizer({*corpus_of([store]), *NAMES, "what is left of the red cubes?"}, size=360)


@pytest.fixture(scope="module")
def mixture(store, tokenizer):
    options = Grounding(store="", optimization=Optimization(batch_size=4), sentences=2, heldout=4, word_dropout=0.0)
    return Mixture(
        [store],
        tokenizer=tokenizer,
        max_tokens=8,
        length=24,
        questions=2,
        options=options,
        grids=((2, 2), (4, 4)),
        names=names_of([store]),
        device=torch.device("cpu"),
    )


def looks_of(shown, things, views, **more):
    b, n, m, _ = shown.shape
    given = {
        "words": torch.zeros(b, n, m, 2, dtype=torch.bool),
        "named": torch.ones(b, n, m, dtype=torch.bool),
        "centre": torch.full((b, n, m, 2), math.nan),
        "middles": torch.zeros(b, n, m, 2),
        **more,
    }
    return Looks(shown=shown, things=things, views=views, **given)


# Texts.


def test_a_speller_is_the_tokenizer(tokenizer):
    texts = ("where is red?", "what is left of the red cubes?", "Zürich <loc07>")
    spell = Speller(tokenizer)
    for known in (False, True):
        if known:
            spell.learn(texts)
        for text in texts:
            assert spell(text) == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_tokens_within_characters_write_them(tokenizer):
    spell, text = Speller(tokenizer), "what is left of the red cubes?"
    ids = spell(text)
    for words in ("red cube", "left", "what"):
        start = text.index(words)
        found = spell.within(text, start, start + len(words))
        assert words in tokenizer.decode([ids[k] for k in found])
        assert len(found) <= 2
    assert spell.within(text, 0, 0) == []


def test_mentions_become_bits_where_words_stand_and_where_the_answer_is_said(tokenizer):
    encode = QuestionEncoder(tokenizer, 24)
    question = "what is left of the red cubes?"
    start = question.index("red cube")
    asked = [{"start": start, "end": start + 8, "things": [2, 5], "view": 0}]
    meant = [{"start": 0, "end": 9, "things": [1], "view": 1}]
    made = encode(question, "blue ball", asked, meant)
    assert made is not None
    (at,) = np.nonzero(made.looks[0])[0]
    assert tokenizer.decode([made.tokens[at]]).strip() == "cubes"
    assert made.looks[0, at] == 0b100100
    said = np.nonzero(made.looks[1])[0]
    assert tokenizer.decode(made.targets[said]).strip() == "blue ball"
    assert set(made.looks[1, said]) == {0b10}
    assert set(made.views[1, said]) == {1}


# Labels and losses.


def test_token_labels_by_counting():
    rng = np.random.default_rng(0)
    cover = rng.integers(0, 12, (3, 2, 8, 8))
    shown, most = token_labels(torch.from_numpy(cover), (2, 4))
    assert shown.shape == (3, 2, 8, 8)
    for b, n, m in np.ndindex(3, 2, 8):
        row, column = divmod(m, 4)
        cells = cover[b, n, 4 * row : 4 * row + 4, 2 * column : 2 * column + 2].ravel()
        counts = [int((cells == k).sum()) for k in range(8)]
        assert shown[b, n, m].tolist() == [c >= 1 for c in counts]
        assert int(most[b, n, m]) == (int(np.argmax(counts)) if max(counts) >= 1 else 8)


def test_patches_to_look_at_and_their_loss_by_hand():
    shown = torch.zeros(1, 2, 3, 8, dtype=torch.bool)
    shown[0, 0, 1, 4] = shown[0, 0, 2, 4] = shown[0, 1, 0, 4] = shown[0, 1, 2, 1] = True
    things, views = (torch.zeros(1, 2, 1, 3, dtype=torch.uint8) for _ in range(2))
    things[0, 0, 0, 1] = 0b10000
    things[0, 1, 0, 2], views[0, 1, 0, 2] = 0b10010, 1
    looks = looks_of(shown, things, views)
    assert looks.patches(0)[0, 0].tolist() == [[False] * 6, [False, True, True, False, False, False], [False] * 6]
    assert looks.patches(1)[0, 0, 2].tolist() == [False, False, False, True, False, True]
    share = torch.full((1, 1, 3, 6), 0.1)
    loss, shares = looking_loss([share, 2 * share], looks)
    assert float(loss) == pytest.approx(-math.log(0.2 + 1e-4) - math.log(0.4 + 1e-4), rel=1e-5)
    assert [float(s) for s in shares] == pytest.approx([0.2, 0.4])
    alone, _ = looking_loss([share[..., :3], share[..., :3]], looks)  # without the second camera
    assert float(alone) == pytest.approx(-math.log(0.2 + 1e-4), rel=1e-5)


def test_middles_by_counting():
    rng = np.random.default_rng(1)
    places = torch.from_numpy(rng.uniform(-0.2, 1.2, (3, 2, 5, 2)).astype(np.float32))
    places[0, 0, 1] = math.nan
    counted = torch.from_numpy(rng.random((3, 2, 5)) < 0.9)
    spelt = torch.from_numpy((rng.random((3, 5, 4)) < 0.7).astype(np.float32))
    wanted = torch.zeros(3, 2, 6, 4)
    for b, n, k in np.ndindex(3, 2, 5):
        u, v = places[b, n, k].tolist()
        if counted[b, n, k] and 0 <= u < 1 and 0 <= v < 1:
            wanted[b, n, int(v * 2) * 3 + int(u * 3)] += spelt[b, k]
    assert torch.equal(middles(places, counted, spelt, (2, 3)), wanted)
    assert float(wanted.max()) > 1  # two of a kind in one token


def test_patch_names_by_hand():
    shown = torch.zeros(1, 1, 2, 8, dtype=torch.bool)
    none = torch.zeros(1, 2, 1, 1, dtype=torch.uint8)
    words = torch.tensor([[[[True, False], [True, True]]]])
    named, centre = torch.tensor([[[True, False]]]), torch.tensor([[[[0.5, 0.25], [math.nan, math.nan]]]])
    heads = PatchNames(3, 2).requires_grad_(requires_grad=False)
    tokens = torch.randn(1, 1, 2, 3)
    two = torch.tensor([[[[2.0, 0.0], [1.0, 1.0]]]])
    given = looks_of(shown, none, none, words=words, named=named, centre=centre, middles=two)
    entropy, middle, counted = heads(tokens, given)
    missed = (heads.middles(tokens[0, 0, 0]) - two[0, 0, 0]).square().sum()
    assert float(counted) == pytest.approx(float(missed), rel=1e-5)
    p = heads.words(tokens[0, 0, 0]).sigmoid()
    assert float(entropy) == pytest.approx(float(-(p[0].log() + (1 - p[1]).log())), rel=1e-5)
    guess = heads.centre(tokens[0, 0, 0])
    assert float(middle) == pytest.approx(float((guess - torch.tensor([0.5, 0.25])).abs().sum()), rel=1e-5)


def test_labels_of_a_batch_are_those_of_the_scenes(mixture, store):
    """Each thing's square lies where its label says: tokens that show it, what they say of it, and its middle."""
    batch = mixture.make(0)
    assert batch.texts.shape[1] == batch.commands + 2
    assert (batch.texts != 0).any(0).any(0)[0]  # no longer than its longest text
    objects = {tuple(np.round(row[:3], 5)): row for row in store.lowdim("objects").reshape(-1, 9)}
    for scene in range(4):
        labels = batch.scenes.objects[scene].flatten(0, 1).numpy()
        assert all(tuple(np.round(row[:3], 5)) in objects for row in labels)
        for camera in range(2):
            seen = batch.looks.shown[scene, camera].sum(-1)
            named = batch.looks.words[scene, camera].sum(-1)
            assert torch.equal(seen, named)  # names of one word
            place = batch.looks.centre[scene, camera].isfinite().all(-1)
            assert torch.equal(place, seen > 0)
        first = tuple(np.round(batch.scenes.objects[scene, 0, 0, :3].numpy(), 5))
        frame = next(
            k for k, rows in enumerate(store.lowdim("objects")) if first in {tuple(r) for r in rows[:, :3].round(5)}
        )
        wanted = torch.zeros(2, 4, len(mixture.words))
        for k, (row, pixels) in enumerate(zip(store.lowdim("objects")[frame], store.lowdim("pixels")[frame])):
            for camera in range(2):
                u, v = row[3 + 3 * camera], row[4 + 3 * camera]
                name = ("red", "green", "blue")[k]
                wanted[camera, 2 * int(v * 2) + int(u * 2), mixture.words.index(name)] += pixels[camera] >= 8
        assert torch.equal(batch.looks.middles[scene], wanted)
    cells = torch.tensor([[0.25, 0.25], [0.75, 0.25], [0.25, 0.75], [0.75, 0.75]])
    apart = (batch.looks.centre - cells).abs().nan_to_num().amax(-1)
    assert float(apart.max()) < 0.25 + 6 / SIZE
    looked = batch.looks.things[:, 0, : batch.commands]
    assert ((looked > 0).sum(-1) == 2).all()  # both names of each command


def test_questions_alone(mixture):
    batch = mixture.make(1)
    alone = batch.questions_only()
    assert torch.equal(alone.texts, batch.texts[:, batch.commands :])
    assert alone.commands == 0
    assert alone.looks.things.shape[2] == alone.looks.views.shape[2] == 2


# Priors.


def test_priors_are_log_frequencies_over_a_fair_guess(tokenizer):
    priors = NamePriors(tokenizer, NAMES)
    word = {w: tokenizer(w, add_special_tokens=False)["input_ids"][0] for name in NAMES for w in name.split()}
    sequence = [word["red"], 3], [IGNORE, word["cube"]]
    rows = [priors.index("shape", *sequence, learn=True) for _ in range(30)]
    priors.index("shape", [word["red"], 3], [IGNORE, word["ball"]], learn=True)
    table = priors.table()
    assert set(rows[0]) == {0, 1}
    kinds = [word["ball"], word["cube"], word["drawer"]]
    counts = np.array([1.1, 30.1, 0.1])
    np.testing.assert_allclose(table[1, kinds], np.log(3 * counts / counts.sum()), rtol=1e-5)
    others = [k for k in range(len(tokenizer)) if k not in kinds]
    assert not table[0].any()
    assert not table[1, others].any()
    assert set(priors.index("color", *sequence, learn=False)) == {0}  # never seen: says nothing


def test_few_cases_say_nothing(tokenizer):
    priors = NamePriors(tokenizer, NAMES)
    word = tokenizer("cube", add_special_tokens=False)["input_ids"][0]
    priors.index("shape", [5], [word], learn=True)
    assert not priors.table().any()


# Scores and cards.


def test_a_probe_reads_what_a_line_can_read(mixture):
    """Features that are the names themselves are read to the last patch; constant features only by chance."""
    encoder = make_model(make_recipe(points=True)).encoder

    class Names:
        grid = (4, 4)

        def normalise(self, images):
            return images

        def look(self, images):
            flat = images.float() / 255
            squares = flat.unflatten(1, (4, 8)).unflatten(3, (4, 8)).permute(0, 1, 3, 2, 4, 5)
            return (squares - 90 / 255).abs().amax((3, 4)).flatten(1, 2) * self.scale

    patches = Names()
    encoder.backbone = None
    object.__setattr__(encoder, "backbone", patches)
    patches.scale = 1.0
    clear = linear_probe(encoder, mixture)
    patches.scale = 0.0
    blind = linear_probe(encoder, mixture)
    assert clear["kind"] > 0.75
    assert blind["kind"] <= blind["chance/kind"] + 1e-9


def test_the_card_shows_every_score():
    notes = {
        "metrics": {
            "eval/heldout/accuracy/color": 0.913,
            "blind/heldout/accuracy/color": 0.2,
            "eval/heldout/px/front": 0.5,
        }
        | {"eval/heldout/px_p90/front": 2.25},
        "probe": {"color": 0.8, "chance/color": 0.2},
        "seconds": 120.0,
        "scenes": 12,
        "stores": {"arm": "abc"},
        "optimization": {"steps": 5, "batch_size": 4, "seed": 0},
        "seeing": None,
        "parameters": 1_000_000,
        "recipe": "123456789abc",
        "remark": "Another seed: 90 %.",
    }
    card = model_card(notes)
    for text in (
        "| What color is the cube? | 91 % | 20 % |",
        "| front camera | 0.50, 2.25 |",
        "123456789abc",
        "arm (abc)",
        "makes it again.\n  Another seed: 90 %.\n",
    ):
        assert text in card
    assert "license: apache-2.0" in card.splitlines()[1]
    options = Optimization(steps=3, batch_size=2)
    one = recipe_hash({"left": 1}, {"a": 1, "b": [2]}, options)
    assert one == recipe_hash({"left": 1}, {"b": [2], "a": 1}, options)
    others = [({"left": 2}, {"a": 1, "b": [2]}, options), ({"left": 1}, {"a": 2, "b": [2]}, options)]
    others.append(({"left": 1}, {"a": 1, "b": [2]}, replace(options, seed=1)))
    assert one not in [recipe_hash(*other) for other in others]


# Recording and refusals.


def test_scenes_are_recorded_for_every_robot_and_test(tmp_path):
    calls = []

    def recorder(*, env, out, episodes, seed=0):
        calls.append((env(), out, episodes, seed))

    def make(name):
        return lambda split="train": (name, split)

    stores, tests = record_all({"a": make("a"), "b": make("b")}, recorder, {"a": 7, "b": 3}, tmp_path)
    assert stores == [str(tmp_path / "a"), str(tmp_path / "b")]
    assert [(c[0], c[2]) for c in calls] == [
        (("a", "train"), 7),
        (("b", "train"), 3),
        (("a", "pair"), 150),
        (("a", "paraphrase"), 150),
    ]
    assert set(tests) == {"pair", "paraphrase"}
    assert [c[3] for c in calls] == [0, 100_000, 2_000_000, 2_000_000]  # no table is drawn for two robots
    with pytest.raises(ConfigError, match="expected robots of"):
        record_all({"a": make("a")}, recorder, {"c": 1}, tmp_path)


def test_stores_whose_labels_do_not_fit(store, tokenizer, tmp_path):
    options = {"tokenizer": tokenizer, "max_tokens": 8, "questions": 2, "names": names_of([store])}
    options |= {"options": Grounding(store="", heldout=4), "device": torch.device("cpu")}
    with pytest.raises(StoreError, match="do not fit image tokens"):
        Mixture([store], length=24, grids=((2, 2), (3, 3)), **options)
    with pytest.raises(StoreError, match="longer than 3 tokens"):
        Mixture([store], length=3, grids=((2, 2), (4, 4)), **options)
    plain = record_scenes(tmp_path / "plain", range(6))
    with pytest.raises(StoreError, match="without questions"):
        Mixture([plain], length=24, grids=((2, 2), (4, 4)), **options)


def test_things_without_a_name_are_no_target(store, mixture):
    assert words_of(names_of([store])) == ("blue", "green", "red")
    spelt = mixture._spelt(["red", None])
    assert spelt[0].tolist() == [False, False, True, False]
    assert spelt[1].tolist() == [False, False, False, True]
    assert not spelt[2:].any()
