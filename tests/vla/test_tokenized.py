"""Heads that write actions as tokens with a decoder of their own: constrained decoding, the cache, the loss."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from brachium.errors import DecodeError
from brachium.vla.action_tokens.base import Grammar
from brachium.vla.action_tokens.fast import FastTokenizer
from brachium.vla.heads.base import Context, HeadInputs
from brachium.vla.heads.tokenized import TokenizedHead
from brachium.vla.heads.written import write

from .lerobot_models import smooth_chunks

ACTION_TOKENS = "brachium.vla.action_tokens"
LEARNT = FastTokenizer(vocabulary=120).fit([torch.from_numpy(smooth_chunks(80, 4, 3))])
TOKENIZERS = {
    "bins": {"_target_": f"{ACTION_TOKENS}.bins.BinTokenizer", "bins": 16},
    "fast": {"_target_": f"{ACTION_TOKENS}.fast.FastTokenizer", "vocabulary": 120, **LEARNT},
    "beast": {"_target_": f"{ACTION_TOKENS}.beast.BeastTokenizer", "points": 3, "degree": 2, "bins": 24},
}
EVERY = pytest.mark.parametrize("name", list(TOKENIZERS))


def head(name="bins", seed=0, horizon=4, **options):
    torch.manual_seed(seed)
    made = TokenizedHead(
        inputs=HeadInputs(context_dim=6, action_horizon=horizon, action_dims={"tiny": 3}),
        tokenizer=TOKENIZERS[name],
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


def full_pass_logits(made, context, tokens, before):
    """Logits of every position from one pass without a cache, by the model's own layers."""
    hidden = torch.cat([made.begin.expand(len(tokens), 1, -1), made.embedding(tokens)], dim=1)
    hidden = hidden + made.position["tiny"][before]
    hidden = torch.cat([made._prefix(context), hidden], dim=1)
    causal = torch.ones(hidden.shape[1], hidden.shape[1], dtype=torch.bool).tril().expand(len(hidden), -1, -1)
    for block in made.blocks:
        hidden, *_ = block(hidden, causal)
    return made.out["tiny"](made.norm(hidden[:, made.prefix :]))


@EVERY
@pytest.mark.parametrize("mask", [(True, True, True), (True, False, True), (False, False, True)])
@torch.no_grad()
def test_cached_sampling_is_the_greedy_argmax_of_full_passes(name, mask):
    made, active = head(name), torch.tensor(mask)
    context = Context(vector=torch.randn(3, 6))
    got = made.sample(context, torch.zeros(3, 4, 3), active, "tiny")
    grammar, values = made.tokenizer.grammar, made.tokenizer.values(4, sum(mask))
    seen = set()
    for b in range(3):
        tokens, before = [], [0]
        while before[-1] < values:
            one = Context(vector=context.vector[b : b + 1])
            row = torch.tensor([tokens], dtype=torch.long)
            logits = full_pass_logits(made, one, row, torch.tensor([before]))[0, -1]
            fits = grammar.writes <= values - before[-1]
            tokens.append(int(logits.masked_fill(~fits, -torch.inf).argmax()))
            before.append(before[-1] + int(grammar.writes[tokens[-1]]))
        row = torch.tensor([tokens])
        wanted = made.tokenizer.decode(row, torch.ones_like(row, dtype=torch.bool), 4, sum(mask))[0]
        torch.testing.assert_close(got[b][:, active], wanted)
        seen |= set(tokens)
    assert (got[:, :, ~active] == 0).all()
    assert len(seen) > 2  # else the model writes one token whatever it sees


@torch.no_grad()
def test_what_is_written_sees_no_future():
    made = head()
    context, (mask, active) = Context(vector=torch.randn(2, 6)), all_active(2)
    one = torch.rand(2, 4, 3) * 2 - 1
    two = one.clone()
    two[:, 2:] *= -1
    seen = []
    handle = made.norm.register_forward_hook(lambda module, inputs, output: seen.append(output))
    for actions in (one, two):
        made.loss(context, actions, mask, active, "tiny", torch.Generator())
    handle.remove()
    torch.testing.assert_close(seen[0][:, :7], seen[1][:, :7])
    assert (seen[0][:, 7:] - seen[1][:, 7:]).abs().max() > 1e-3


@EVERY
@torch.no_grad()
def test_the_loss_is_the_cross_entropy_of_each_next_token_among_those_allowed(name):
    made = head(name, smoothing=0.0)
    active = torch.tensor([True, False, True])
    step_mask = torch.arange(4) < torch.tensor([4, 2, 1])[:, None]
    context = Context(vector=torch.randn(3, 6))
    actions = torch.from_numpy(smooth_chunks(3, 4, 3))
    got = made.loss(context, actions, step_mask, active, "tiny", torch.Generator())
    tokenizer, values = made.tokenizer, made.tokenizer.values(4, 2)
    for b, keep in enumerate((4, 2, 1)):
        held = actions[b, [min(h, keep - 1) for h in range(4)]][None][:, :, active]
        tokens, _, _ = tokenizer.encode(held, torch.ones(1, 4, dtype=torch.bool))
        before = torch.cat([torch.zeros(1, 1, dtype=torch.long), tokenizer.grammar.writes[tokens].cumsum(1)], dim=1)
        one = Context(vector=context.vector[b : b + 1])
        logits = full_pass_logits(made, one, tokens[:, :-1], before[:, :-1])[0]
        fits = tokenizer.grammar.writes <= (values - before[0, :-1])[:, None]
        each = -logits.masked_fill(~fits, -torch.inf).log_softmax(-1).gather(-1, tokens[0, :, None])[:, 0]
        counted = each[: keep * 2] if name == "bins" else each
        torch.testing.assert_close(got[b], counted.mean())


@torch.no_grad()
def test_smoothing_blurs_by_a_normalised_gaussian():
    made = head(smoothing=1.5)
    context, (mask, active) = Context(vector=torch.randn(3, 6)), all_active()
    actions = torch.rand(3, 4, 3) * 2 - 1
    tokens, _, _ = made.tokenizer.encode(actions, mask)
    logs = full_pass_logits(made, context, tokens[:, :-1], torch.arange(12).expand(3, -1)).log_softmax(-1)
    expected = []
    for b in range(3):
        total = 0.0
        for k, centre in enumerate(tokens[b].tolist()):
            weights = torch.exp(-0.5 * ((torch.arange(16) - centre) / 1.5) ** 2)
            total -= (weights / weights.sum() * logs[b, k]).sum()
        expected.append(total / tokens.shape[1])
    got = made.loss(context, actions, mask, active, "tiny", torch.Generator())
    torch.testing.assert_close(got, torch.stack(expected), rtol=1e-4, atol=1e-5)


@EVERY
@settings(max_examples=15, deadline=None)
@given(
    keep=st.integers(1, 4),
    value=st.sampled_from([0.3, -5.0, 1e9, float("nan"), float("inf")]),
    mask=st.lists(st.booleans(), min_size=3, max_size=3).filter(any),
)
def test_masked_steps_and_dimensions_change_nothing(name, keep, value, mask):
    made, active = head(name), torch.tensor(mask)
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
    for parameter in gradients[0]:
        torch.testing.assert_close(gradients[0][parameter], gradients[1][parameter], rtol=1e-5, atol=1e-7)


@EVERY
def test_one_batch_is_learnt(name):
    made = head(name, smoothing=0.5).train()
    optimizer = torch.optim.Adam(made.parameters(), lr=3e-3)
    context, (mask, active) = Context(vector=torch.randn(4, 6)), all_active(4)
    actions = torch.from_numpy(smooth_chunks(4, 4, 3))
    for _ in range(250):
        loss = made.loss(context, actions, mask, active, "tiny", torch.Generator()).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        got = made.sample(context, torch.zeros(4, 4, 3), active, "tiny")
    tokens, real, _ = made.tokenizer.encode(actions, mask)
    torch.testing.assert_close(got, made.tokenizer.decode(tokens, real, 4, 3))


def test_a_vocabulary_that_cannot_finish_is_an_error():
    class Pairs:
        grammar = Grammar.of(torch.tensor([2, 2]))

        def values(self, h, a):
            return h * a

    with pytest.raises(DecodeError, match="no token for a single value"):
        write(Pairs(), lambda token, before: torch.zeros(1, 2), torch.zeros(1, 1, 3), torch.ones(3, dtype=torch.bool))
