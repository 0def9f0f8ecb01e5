"""Action tokenizers: bins, FAST and BEAST against scipy, a published implementation, and fuzzed tokens."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.fft import dct
from scipy.interpolate import BSpline

from brachium.errors import CheckpointError, ConfigError, DecodeError
from brachium.vla.action_tokens.beast import BeastTokenizer
from brachium.vla.action_tokens.bins import BinTokenizer
from brachium.vla.action_tokens.fast import FastTokenizer, dct_matrix

from .lerobot_models import PublishedFast, smooth_chunks

H, A = 12, 3


def fitted_fast(vocabulary=200, scale=10.0, seed=0):
    chunks = torch.from_numpy(smooth_chunks(200, H, A, seed))
    return FastTokenizer(
        scale=scale, vocabulary=vocabulary, **FastTokenizer(scale=scale, vocabulary=vocabulary).fit([chunks])
    )


FAST, BINS, BEAST = fitted_fast(), BinTokenizer(bins=64), BeastTokenizer(points=6, bins=512, reach=1.5)
EVERY = pytest.mark.parametrize("made", [BINS, FAST, BEAST], ids=["bins", "fast", "beast"])


def steps(b=1, h=H):
    return torch.ones(b, h, dtype=torch.bool)


@EVERY
def test_what_is_written_comes_back_as_close_as_the_tokenizer_allows(made):
    chunks = torch.from_numpy(smooth_chunks(40, H, A, seed=3))
    tokens, real, counts = made.encode(chunks, steps(40))
    assert torch.equal(real, counts)
    got = made.decode(tokens, real, H, A)
    error = (got - chunks).abs()
    if made is BINS:
        assert error.max() <= 1 / 64 + 1e-6
    elif made is FAST:  # rounding errors of uniform distribution, which an orthonormal transform leaves as large
        assert error.square().mean().sqrt() == pytest.approx(0.1 / 12**0.5, rel=0.25)
        assert error.max() < 0.05 * H**0.5 + 1e-6
    else:
        again = made.decode(*made.encode(got, steps(40))[:2], H, A)
        assert (again - got).abs().max() < 2 * made.reach / 512 + 1e-5


@EVERY
def test_every_token_says_how_many_values_it_writes(made):
    chunks = torch.from_numpy(smooth_chunks(40, H, A, seed=4))
    tokens, real, _ = made.encode(chunks, steps(40))
    written = torch.where(real, made.grammar.writes[tokens], 0).sum(1)
    assert (written == made.values(H, A)).all()
    before, inside = made.grammar.before(tokens)
    allowed = made.grammar.allowed(made.values(H, A) - before, inside)
    chosen = allowed.gather(-1, tokens[..., None])[..., 0]
    assert chosen[real].all()


PUBLISHED = FastTokenizer(
    tokenizer=PublishedFast(smooth_chunks(300, H, A)).bpe_tokenizer.backend_tokenizer.to_str(), lowest=-60
)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_walk_through_a_published_vocabulary_is_an_action(data):
    """Its tokens are bytes, and may cut a value in two; those that are no text are never allowed."""
    test_any_walk_through_allowed_tokens_is_an_action.hypothesis.inner_test(PUBLISHED, data)


@EVERY
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_walk_through_allowed_tokens_is_an_action(made, data):
    """Constrained decoding can go wherever the model likes: what comes out decodes, and is written again the same."""
    left, inside, tokens = made.values(H, A), False, []
    while left or inside:
        allowed = made.grammar.allowed(torch.tensor(left), torch.tensor(inside)).nonzero().flatten()
        token = int(allowed[data.draw(st.integers(0, len(allowed) - 1))])
        tokens.append(token)
        left, inside = left - int(made.grammar.writes[token]), bool(made.grammar.leaves[token])
    row = torch.tensor([tokens])
    got = made.decode(row, torch.ones_like(row, dtype=torch.bool), H, A)
    assert got.shape == (1, H, A)
    assert got.isfinite().all()


@EVERY
@settings(max_examples=60, deadline=None)
@given(tokens=st.lists(st.integers(-3, 600), min_size=1, max_size=60))
def test_garbage_is_an_error_or_an_action_never_silence(made, tokens):
    row = torch.tensor([tokens])
    try:
        got = made.decode(row, torch.ones_like(row, dtype=torch.bool), H, A)
    except DecodeError:
        return
    assert got.shape == (1, H, A)
    assert int(made.grammar.writes[row].sum()) == made.values(H, A)


@pytest.mark.parametrize("h", [1, 2, 7, 16, 50])
def test_the_transform_is_the_orthonormal_dct(h):
    x = np.random.default_rng(h).normal(size=(h, 4))
    np.testing.assert_allclose(dct_matrix(h).double().numpy() @ x, dct(x, axis=0, norm="ortho"), atol=1e-5)
    np.testing.assert_allclose((dct_matrix(h) @ dct_matrix(h).T).numpy(), np.eye(h), atol=1e-5)


def test_a_published_tokenizer_writes_and_reads_the_same(tmp_path):
    """Byte-level vocabularies cut characters in two; the oracle is written anew on transformers and scipy."""
    theirs = PublishedFast(smooth_chunks(300, H, A))
    ours = FastTokenizer(path=theirs.save(tmp_path))
    chunks = smooth_chunks(60, H, A, seed=9)
    tokens, real, _ = ours.encode(torch.from_numpy(chunks), steps(60))
    wanted = theirs(chunks)
    assert [row[mask].tolist() for row, mask in zip(tokens, real)] == wanted
    assert len({len(row) for row in wanted}) > 3
    np.testing.assert_allclose(ours.decode(tokens, real, H, A).numpy(), theirs.decode(wanted, H, A), atol=1e-5)
    again = FastTokenizer(**ours.fit([]))
    assert torch.equal(again.encode(torch.from_numpy(chunks), steps(60))[0], tokens)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(-40, 40), min_size=H * A, max_size=H * A))
def test_byte_pair_encoding_loses_nothing(numbers):
    lowest, highest = FAST._range
    wanted = torch.tensor(numbers).clamp(lowest, highest).reshape(1, H, A)
    chunk = torch.einsum("kh,bka->bha", dct_matrix(H), wanted.float() / FAST.scale)
    tokens, real, _ = FAST.encode(chunk, steps())
    got = FAST.frequencies(FAST.decode(tokens, real, H, A))
    assert torch.equal(got, wanted)


def test_fast_is_short_where_actions_are_smooth():
    chunks = torch.from_numpy(smooth_chunks(100, H, A, seed=5))
    rows = FAST.encode(chunks, steps(100))[1].sum(1).float()
    assert rows.mean() < 0.75 * H * A


def test_fitting_is_a_function_of_the_data():
    one, two, other = (fitted_fast(seed=seed) for seed in (0, 0, 1))
    assert one.bpe.to_str() == two.bpe.to_str()
    assert one.bpe.to_str() != other.bpe.to_str()


@pytest.mark.parametrize("degree", [0, 1, 3])
@pytest.mark.parametrize("points", [4, 6])
def test_a_spline_comes_back_exactly(degree, points):
    made = BeastTokenizer(points=points, degree=degree, ridge=0.0)
    control = np.random.default_rng(points).normal(size=(points, A))
    inner = np.linspace(0, 1, points - degree + 1)
    knots = np.r_[[0.0] * degree, inner, [1.0] * degree]
    spline = BSpline(knots, control, degree)(np.linspace(0, 1 - (degree == 0) * 1e-9, 24))
    got = made.control(torch.from_numpy(spline.astype(np.float32))[None])[0]
    np.testing.assert_allclose(got, control, atol=1e-4)
    torch.testing.assert_close(made.basis(24).sum(1), torch.ones(24))


def test_fitting_the_reach_keeps_every_control_point():
    chunks = torch.from_numpy(smooth_chunks(50, H, A))
    made = BeastTokenizer(points=6, bins=4096, **BeastTokenizer(points=6).fit([chunks]))
    spline = torch.einsum("hp,bpa->bha", made.basis(H), made.control(chunks))
    got = made.decode(*made.encode(chunks, steps(50))[:2], H, A)
    assert (got - spline).abs().max() <= made.reach / 4096 + 1e-5


@pytest.mark.parametrize("bins", [2, 5, 16, 256])
def test_bins_decode_to_their_centres_and_encode_back(bins):
    made = BinTokenizer(bins=bins)
    every = torch.arange(bins)[None]
    centres = made.decode(every, torch.ones_like(every, dtype=torch.bool), bins, 1)
    edges = torch.linspace(-1.0, 1.0, bins + 1, dtype=torch.float64)
    torch.testing.assert_close(centres.flatten().double(), (edges[:-1] + edges[1:]) / 2, rtol=0, atol=1e-6)
    assert torch.equal(made.encode(centres, steps(1, bins))[0], every)


@settings(max_examples=100, deadline=None)
@given(value=st.floats(-1.0, 1.0, width=32), bins=st.integers(2, 300))
def test_a_bin_is_off_by_half_its_width_at_most(value, bins):
    made, x = BinTokenizer(bins=bins), torch.full((1, 2, 2), value)
    assert (made.decode(*made.encode(x, steps(1, 2))[:2], 2, 2) - x).abs().max() <= 1.0 / bins + 1e-6


def test_what_lies_outside_falls_in_the_outermost_bins():
    x = torch.tensor([-1e9, -1.0001, -1.0, 1.0, 1.0001, 1e9, -torch.inf, torch.inf]).reshape(1, -1, 1)
    assert BinTokenizer(bins=16).encode(x, steps(1, 8))[0].tolist() == [[0, 0, 0, 15, 15, 15, 0, 15]]


def test_bins_of_padded_steps_do_not_count():
    mask = torch.tensor([[True, True, False]])
    counts = BinTokenizer(bins=4).encode(torch.zeros(1, 3, 2), mask)[2]
    assert counts.tolist() == [[True, True, True, True, False, False]]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: BinTokenizer(bins=1), "at least 2 bins"),
        (lambda: BeastTokenizer(points=3, degree=3), "below points"),
        (lambda: BeastTokenizer(points=5).basis(4), "at most as many points as steps"),
        (lambda: FastTokenizer(scale=0), "scale above 0"),
        (lambda: FastTokenizer().size, "has no vocabulary yet"),
        (lambda: FastTokenizer(vocabulary=5).fit([torch.from_numpy(smooth_chunks(9, H, A))]), "raise tokenizer.vocab"),
    ],
)
def test_settings_that_cannot_be(make, says):
    with pytest.raises(ConfigError, match=says):
        make()


def test_folders_that_hold_no_tokenizer(tmp_path):
    with pytest.raises(CheckpointError, match="expected a folder with"):
        FastTokenizer(path=str(tmp_path))
    (tmp_path / "processor_config.json").write_text("{}")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"missing \['scale', 'min_token'\]"):
        FastTokenizer(path=str(tmp_path))
