"""Actions as tokens: bins, constrained decoding, the cache, the loss."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from brachium.errors import DecodeError
from brachium.vla.heads.base import Context
from brachium.vla.heads.tokenized import BEGIN, TokenizedHead


def head(bins=16, action_dims=None, seed=0, horizon=4, **options):
    torch.manual_seed(seed)
    made = TokenizedHead(
        context_dim=6,
        token_dim=0,
        action_horizon=horizon,
        action_dims=action_dims or {"tiny": 3},
        bins=bins,
        width=16,
        heads=2,
        **options,
    )
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return made.eval()


def all_active(b=3, horizon=4, dims=3):
    return torch.ones(b, horizon, dtype=torch.bool), torch.ones(dims, dtype=torch.bool)


@settings(max_examples=100, deadline=None)
@given(value=st.floats(-1.0, 1.0, width=32), bins=st.integers(2, 300))
def test_a_round_trip_is_off_by_half_a_bin_at_most(value, bins):
    made = CODECS.setdefault(bins, head(bins))
    x = torch.full((1, 4, 3), value)
    assert (made.decode(made.encode(x)) - x).abs().max() <= 1.0 / bins + 1e-6


CODECS: dict[int, TokenizedHead] = {}


@pytest.mark.parametrize("bins", [2, 5, 16, 256])
def test_bins_decode_to_their_centres_and_encode_back(bins):
    made = head(bins)
    every = torch.arange(bins).reshape(1, -1, 1)
    centres = made.decode(every).flatten()
    edges = torch.linspace(-1.0, 1.0, bins + 1, dtype=torch.float64)
    torch.testing.assert_close(centres.double(), (edges[:-1] + edges[1:]) / 2, rtol=0, atol=1e-6)
    torch.testing.assert_close(made.encode(made.decode(every)), every)


def test_what_lies_outside_falls_in_the_outermost_bins():
    made = head(16)
    x = torch.tensor([-1e9, -1.0001, -1.0, 1.0, 1.0001, 1e9, -torch.inf, torch.inf]).reshape(1, -1, 1)
    assert made.encode(x).flatten().tolist() == [0, 0, 0, 15, 15, 15, 0, 15]


@pytest.mark.parametrize("bad", [-1, 16, 2**40])
def test_what_is_no_bin_is_an_error(bad):
    with pytest.raises(DecodeError, match=r"expected action bins in 0\.\.15"):
        head(16).decode(torch.tensor([[[3, bad]]]))


def test_begin_is_never_written_even_if_it_is_likeliest():
    made = head(16)
    with torch.no_grad():
        made.out["tiny"].bias[BEGIN] = 1e6
    _, active = all_active()
    chunk = made.sample(Context(vector=torch.randn(3, 6)), torch.zeros(3, 4, 3), active, "tiny")
    assert chunk.abs().max() < 1.0
    torch.testing.assert_close(made.decode(made.encode(chunk)), chunk)


def full_pass_logits(made, context, tokens, active):
    """Logits of every position from one pass without a cache, by the model's own layers."""
    hidden = made.embedding(tokens) + made._positions("tiny", active)[: tokens.shape[1]]
    hidden = torch.cat([made._prefix(context), hidden], dim=1)
    for block in made.blocks:
        hidden, _ = block(hidden, None)
    return made.out["tiny"](made.norm(hidden[:, made.prefix :]))


@pytest.mark.parametrize("mask", [(True, True, True), (True, False, True), (False, False, True)])
@torch.no_grad()
def test_cached_sampling_is_the_greedy_argmax_of_full_passes(mask):
    made, active = head(16), torch.tensor(mask)
    context = Context(vector=torch.randn(3, 6))
    got = made.sample(context, torch.zeros(3, 4, 3), active, "tiny")
    tokens = torch.full((3, 1), BEGIN)
    for _ in range(4 * sum(mask)):
        logits = full_pass_logits(made, context, tokens, active)[:, -1]
        tokens = torch.cat([tokens, logits[:, 1:].argmax(-1, keepdim=True) + 1], dim=1)
    bins = (tokens[:, 1:] - 1).reshape(3, 4, sum(mask))
    torch.testing.assert_close(got[:, :, active], made.decode(bins))
    assert (got[:, :, ~active] == 0).all()
    assert len(bins.unique()) > 2  # else the model writes one token whatever it sees


@torch.no_grad()
def test_a_block_sees_no_future():
    made = head()
    x = torch.randn(2, 6, 16)
    y, _ = made.blocks[0](x, None)
    x[:, 4:] += 1.0
    z, _ = made.blocks[0](x, None)
    torch.testing.assert_close(y[:, :4], z[:, :4])
    assert (y[:, 4:] - z[:, 4:]).abs().max() > 1e-3


@torch.no_grad()
def test_the_loss_is_the_cross_entropy_of_each_next_bin():
    made = head(16, smoothing=0.0)
    active = torch.tensor([True, False, True])
    step_mask = torch.arange(4) < torch.tensor([4, 2, 1])[:, None]
    context = Context(vector=torch.randn(3, 6))
    actions = torch.rand(3, 4, 3) * 2 - 1
    got = made.loss(context, actions, step_mask, active, "tiny", torch.Generator())
    bins = made.encode(actions)[:, :, active].flatten(1)
    tokens = torch.cat([torch.full((3, 1), BEGIN), bins[:, :-1] + 1], dim=1)
    logits = full_pass_logits(made, context, tokens, active)[..., 1:]
    each = torch.nn.functional.cross_entropy(logits.transpose(1, 2), bins, reduction="none").reshape(3, 4, 2)
    for b, keep in enumerate((4, 2, 1)):
        torch.testing.assert_close(got[b], each[b, :keep].mean())


@torch.no_grad()
def test_smoothing_blurs_by_a_normalised_gaussian():
    made, sharp = head(16, smoothing=1.5), head(16, smoothing=0.0)
    context, (mask, active) = Context(vector=torch.randn(3, 6)), all_active()
    actions = torch.rand(3, 4, 3) * 2 - 1
    bins = sharp.encode(actions).flatten(1)
    tokens = torch.cat([torch.full((3, 1), BEGIN), bins[:, :-1] + 1], dim=1)
    logs = full_pass_logits(made, context, tokens, active)[..., 1:].log_softmax(-1)
    expected = []
    for b in range(3):
        total = 0.0
        for k, centre in enumerate(bins[b].tolist()):
            weights = torch.exp(-0.5 * ((torch.arange(16) - centre) / 1.5) ** 2)
            total -= (weights / weights.sum() * logs[b, k]).sum()
        expected.append(total / bins.shape[1])
    got = made.loss(context, actions, mask, active, "tiny", torch.Generator())
    torch.testing.assert_close(got, torch.stack(expected), rtol=1e-4, atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(keep=st.integers(1, 4), value=st.floats(-5, 5), mask=st.lists(st.booleans(), min_size=3, max_size=3).filter(any))
def test_masked_steps_and_dimensions_change_nothing(keep, value, mask):
    made, active = head(), torch.tensor(mask)
    step_mask = (torch.arange(4) < keep).expand(2, 4)
    context = Context(vector=torch.randn(2, 6, generator=torch.Generator().manual_seed(1)))
    actions = torch.rand(2, 4, 3, generator=torch.Generator().manual_seed(2)) * 2 - 1
    other = torch.where(step_mask[:, :, None] & active, actions, torch.full_like(actions, value))
    gradients, losses = [], []
    for x in (actions, other):
        made.zero_grad()
        loss = made.loss(context, x, step_mask, active, "tiny", torch.Generator())
        loss.sum().backward()
        losses.append(loss.detach())
        gradients.append({k: p.grad.clone() for k, p in made.named_parameters() if p.grad is not None})
    torch.testing.assert_close(losses[0], losses[1], rtol=0, atol=0)
    for name in gradients[0]:
        torch.testing.assert_close(gradients[0][name], gradients[1][name], rtol=1e-5, atol=1e-7)


def test_one_batch_is_learnt():
    made = head(16, smoothing=0.5).train()
    optimizer = torch.optim.Adam(made.parameters(), lr=3e-3)
    context, (mask, active) = Context(vector=torch.randn(4, 6)), all_active(4)
    actions = torch.rand(4, 4, 3) * 2 - 1
    for _ in range(200):
        loss = made.loss(context, actions, mask, active, "tiny", torch.Generator()).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        got = made.sample(context, torch.zeros(4, 4, 3), active, "tiny")
    assert (got - actions).abs().max() <= 1.0 / 16 + 1e-6
