"""What every head promises, for every YAML of the group; and closed forms of each kind."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import brachium
from brachium.errors import ConfigError
from brachium.vla.backbones.hf import HFBackbone
from brachium.vla.backbones.octo import OctoBackbone
from brachium.vla.heads.base import Context, HeadInputs
from brachium.vla.heads.diffusion import DiffusionHead, cosine_alphas
from brachium.vla.heads.expert import ExpertHead
from brachium.vla.heads.regression import RegressionHead
from brachium.vla.heads.vocabulary import VocabularyHead
from brachium.vla.recipe import instantiate

from .lerobot_models import smooth_chunks
from .test_families import CONFIGS, SIDE
from .test_prefix import inputs, make_octo

FOLDER = Path(brachium.__file__).parent / "conf" / "model" / "head"


def read_node(name):
    """A YAML of the group over the one that it begins with."""
    node = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    first, *_ = node.pop("defaults", ["_self_"])
    return {**(read_node(first) if first != "_self_" else {}), **node}


NODES = {path.stem: read_node(path.stem) for path in sorted(FOLDER.glob("*.yaml"))}
SMALL = {"width": 48, "depth": 2, "heads": 2, "mlp": 48, "draws": 8}
H, A, B = 4, 3, 3
EVERY = pytest.mark.parametrize("name", list(NODES))
POOLED = ("flow", "diffusion", "octo", "dit", "groot", "regression", "tokenized", "fast", "beast")
"""Heads that a context without a prefix is enough for."""
LEARNT = {}


def small(name):
    """A YAML's head with small sizes, its tokenizer fitted."""
    node = dict(NODES[name])
    node |= {k: v for k, v in SMALL.items() if k in node}
    if node["_target_"].endswith("ExpertHead"):
        node["heads"] = None
    if "tokenizer" in node:
        tokenizer = dict(node["tokenizer"])
        if "bins" in tokenizer:
            tokenizer["bins"] = 24
        if "vocabulary" in tokenizer:
            tokenizer |= {"vocabulary": 100, "scale": 6.0}
            node["skip"] = min(node.get("skip", 0), 30)
            node = {k: v for k, v in node.items() if k != "last" and (k != "skip" or v)}
        if name not in LEARNT:
            LEARNT[name] = instantiate(tokenizer).fit([torch.from_numpy(smooth_chunks(60, H, A))])
        node["tokenizer"] = {**tokenizer, **(LEARNT[name] or {})}
    return node


def make_backbone(kind="smolvlm"):
    if kind == "octo":
        return make_octo()
    torch.manual_seed(0)
    config = {**CONFIGS[kind], "text_config": {**CONFIGS[kind]["text_config"], "vocab_size": 160}}
    config |= {"model_type": kind.removesuffix("2") if kind == "paligemma2" else kind, "_resolved": True}
    made = HFBackbone(config=config, image_size=SIDE[kind]).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(4.0 if parameter.ndim > 1 else 1.0)
    return made


@pytest.fixture(scope="module")
def backbone():
    return make_backbone()


def inputs_of(backbone, context_dim=6, dims=None):
    dims = dims or {"tiny": A, "other": 2}
    if backbone is None:
        return HeadInputs(context_dim=context_dim, action_horizon=H, action_dims=dims)
    return HeadInputs(
        context_dim=context_dim,
        token_dim=backbone.width,
        layers=backbone.layers,
        vocabulary=backbone.vocabulary,
        action_horizon=H,
        action_dims=dims,
    )


def make_head(name, backbone, seed=0, **more):
    torch.manual_seed(seed)
    node = {**small(name), **more}
    if backbone is not None and not backbone.vocabulary and node["_target_"].endswith("VocabularyHead"):
        node["rows"] = "own"
    made = instantiate(node, inputs=inputs_of(backbone))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return made.eval()


def context_of(backbone, seed=0, b=B):
    vector = torch.randn(b, 6, generator=torch.Generator().manual_seed(seed + 10))
    if backbone is None:
        return Context(vector=vector)
    return Context(vector=vector, prefix=backbone.read(*inputs(b=b, seed=seed)), backbone=backbone)


def chunks(seed=1, b=B):
    return torch.from_numpy(smooth_chunks(b, H, A, seed))


def everything(b=B):
    return torch.ones(b, H, dtype=torch.bool), torch.ones(A, dtype=torch.bool)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def noise_of(b=B, seed=5):
    return torch.randn(b, H, A, generator=generator(seed))


@EVERY
def test_what_is_masked_has_no_say(name, backbone):
    """Not in the loss, nor in any gradient: not even as NaN."""
    made = make_head(name, backbone)
    with torch.no_grad():
        context = context_of(backbone)
    step_mask = torch.arange(H) < torch.tensor([4, 2, 1])[:, None]
    dims = torch.tensor([True, False, True])
    results = []
    for value in (0.0, math.nan, 1e9):
        actions = torch.where(step_mask[:, :, None] & dims, chunks(), value)
        made.zero_grad()
        loss = made.loss(context, actions, step_mask, dims, "tiny", generator())
        assert loss.shape == (B,)
        loss.sum().backward()
        results.append((loss.detach(), {k: p.grad.clone() for k, p in made.named_parameters() if p.grad is not None}))
    for loss, gradients in results[1:]:
        torch.testing.assert_close(loss, results[0][0], rtol=0, atol=0)
        assert gradients.keys() == results[0][1].keys()
        for key, gradient in gradients.items():
            torch.testing.assert_close(gradient, results[0][1][key], rtol=1e-5, atol=1e-7)
    assert not [k for k in results[0][1] if ".other." in k]  # another robot's parts learn nothing


@EVERY
@torch.no_grad()
def test_a_chunk_is_a_function_of_its_row_alone(name, backbone):
    made = make_head(name, backbone)
    context, dims = context_of(backbone), torch.tensor([True, False, True])
    noise = noise_of()
    together = made.sample(context, noise, dims, "tiny")
    assert together.shape == (B, H, A)
    assert together.isfinite().all()
    if not made.fills:  # else the model leaves the dimension out
        assert (together[:, :, 1] == 0).all()
    torch.testing.assert_close(made.sample(context, noise, dims, "tiny"), together, rtol=0, atol=0)
    for row in range(B):
        index = torch.tensor([row])
        prefix = context.prefix.rows(index)
        alone = Context(vector=context.vector[index], prefix=prefix, backbone=backbone)
        torch.testing.assert_close(
            made.sample(alone, noise[index], dims, "tiny")[0], together[row], atol=1e-4, rtol=1e-4
        )
    other = made.sample(context_of(backbone, seed=7), noise, dims, "tiny")
    assert (other - together).abs().max() > 1e-4  # or it does not look at its context


@EVERY
def test_one_batch_is_learnt(name, backbone):
    made = make_head(name, backbone).train()
    with torch.no_grad():
        context = context_of(backbone)
    target, (steps, dims) = chunks(), everything()
    trained = list(made.parameters())
    if made.reads == "layers" and isinstance(made, VocabularyHead):
        backbone = make_backbone()  # the language model itself must learn to say it
        trained += list(backbone.parameters())
    pooled = name in ("flow", "diffusion", "octo")  # one vector says it all, so it takes longer to tell samples apart
    optimizer = torch.optim.Adam(trained, lr=6e-3 if pooled else 3e-3)

    @torch.no_grad()
    def learnt():
        made.eval()
        got = made.sample(context_of(backbone), noise_of(), dims, "tiny")
        made.train()
        if not made.discrete:
            return (got - target).abs().mean() < 0.15  # always answering their mean gives 0.35
        tokens, real, _ = made.tokenizer.encode(target, steps)
        return torch.allclose(got, made.tokenizer.decode(tokens, real, H, A), rtol=1.3e-6, atol=1e-5)

    for step in range(600 if pooled else 260):
        if step % 20 == 0 and learnt():
            assert step, "nothing was to be learnt"
            return
        if isinstance(made, VocabularyHead):
            context = context_of(backbone)
        loss = made.loss(context, target, steps, dims, "tiny", generator(step)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert learnt()


@pytest.mark.parametrize("name", POOLED)
@torch.no_grad()
def test_a_vector_is_enough_for_heads_that_say_so(name):
    made = make_head(name, None)
    one = made.sample(context_of(None), noise_of(), everything()[1], "tiny")
    two = made.sample(context_of(None, seed=3), noise_of(), everything()[1], "tiny")
    assert one.isfinite().all()
    assert (one - two).abs().max() > 1e-4


@pytest.mark.parametrize("name", sorted(set(NODES) - set(POOLED)))
def test_heads_that_need_a_prefix_say_so(name):
    with pytest.raises(ConfigError, match=r"set model\.points=false"):
        make_head(name, None)


@pytest.mark.parametrize("kind", ["octo", "paligemma", "paligemma2", "qwen2_5_vl", "qwen3_vl"])
@EVERY
def test_every_head_on_every_other_backbone(name, kind):
    """One step of training the whole and one chunk; `benchmarks/matrix.py` learns a batch in every cell."""
    backbone = make_backbone(kind)
    made = make_head(name, backbone)
    backbone.train()
    loss = made.loss(context_of(backbone), chunks(), *everything(), "tiny", generator()).mean()
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in (*made.parameters(), *backbone.parameters()) if p.grad is not None)
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in backbone.parameters())
    backbone.eval()
    with torch.no_grad():
        assert made.sample(context_of(backbone), noise_of(), everything()[1], "tiny").isfinite().all()


@pytest.mark.parametrize("name", ["pi0", "pi05", "smolvla", "dit"])
@torch.no_grad()
def test_draws_share_what_was_read(name, backbone):
    """The loss of several draws is the mean of the losses of each, on the same noise and times."""
    made, context = make_head(name, backbone), context_of(backbone)
    noise, t = torch.randn(3 * B, H, A, generator=generator(1)), torch.rand(3 * B, generator=generator(2))
    together = made.loss_at(context, chunks(), *everything(), "tiny", noise, t)
    each = [made.loss_at(context, chunks(), *everything(), "tiny", noise[k::3], t[k::3]) for k in range(3)]
    torch.testing.assert_close(together, torch.stack(each).mean(0), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["pi0", "pi05", "smolvla", "dit", "parallel"])
def test_insulation_cuts_the_gradient_of_the_head_exactly(name):
    backbone = make_backbone()
    made = make_head(name, backbone)
    for insulated in (True, False):
        backbone.zero_grad()
        context = context_of(backbone)
        context = context.detach() if insulated else context
        made.loss(context, chunks(), *everything(), "tiny", generator()).sum().backward()
        grads = [p.grad for p in backbone.parameters() if p.grad is not None]
        moved = sum(float(g.abs().sum()) for g in grads)
        if not insulated:
            assert moved > 0
        elif name != "parallel":  # parallel decoding runs the language model itself, after the cut
            assert moved == 0


def test_gates_of_a_modulated_expert_start_closed():
    """adaRMS begins as the identity: at the start the expert's layers change nothing (pi0.5)."""
    backbone = make_backbone()
    torch.manual_seed(0)
    made = ExpertHead(inputs=inputs_of(backbone), width=32, mlp=48, time="modulated", state_token=False)
    x = torch.randn(B, 5, 32)
    with torch.no_grad():
        condition = torch.randn(B, 1, 32)
        key, value = (torch.randn(B, 1, 7, 12) for _ in range(2))
        out = made.layers[0](x, condition, key, value, torch.zeros(B, 5, 12), None)
    torch.testing.assert_close(out, x, rtol=0, atol=0)


def gaussian_answer(mean, std, alphas, predict):
    """E[what is predicted | x] of data ~ N(mean, std^2) at a level: what a perfect network answers."""

    def answer(pooled, x, level, embodiment):
        kept = alphas[level][:, None, None].double()
        alpha, sigma = kept.sqrt(), (1 - kept).sqrt()
        noise = sigma / (kept * std**2 + sigma**2) * (x.double() - alpha * mean)
        data = (x.double() - sigma * noise) / alpha
        return {"noise": noise, "sample": data, "velocity": alpha * noise - sigma * data}[predict].float()

    return answer


@pytest.mark.parametrize("predict", ["noise", "velocity", "sample"])
@pytest.mark.parametrize(("sampler", "steps"), [("ddim", 50), ("ddim", None), ("ddpm", None)])
@torch.no_grad()
def test_diffusion_samples_a_gaussian(sampler, steps, predict, monkeypatch):
    options = {"levels": 100, "sampler": sampler, "steps": steps, "predict": predict, "width": 8}
    made = DiffusionHead(inputs=inputs_of(None, dims={"tiny": 1}), **options)
    monkeypatch.setattr(made, "_answer", gaussian_answer(0.4, 0.3, made.alphas, predict))
    noise = torch.randn(4000, H, 1, generator=generator(3))
    got = made.sample(Context(vector=torch.zeros(4000, 6)), noise, torch.ones(1, dtype=torch.bool), "tiny")
    assert got.mean().item() == pytest.approx(0.4, abs=0.02)
    assert got.std().item() == pytest.approx(0.3, abs=0.03)
    if sampler == "ddim":  # deterministic, so affine in the noise
        torch.testing.assert_close(got, 0.4 + 0.3 * noise, atol=0.12, rtol=0)
    else:
        correlation = torch.corrcoef(torch.stack([got.flatten(), noise.flatten()]))[0, 1]
        assert correlation < 0.6


def test_the_noise_levels_follow_a_squared_cosine():
    for levels in (20, 100):
        alphas = cosine_alphas(levels).double().numpy()
        t = np.arange(1, levels + 1) / levels
        wanted = (np.cos((t + 0.008) / 1.008 * np.pi / 2) / np.cos(0.008 / 1.008 * np.pi / 2)) ** 2
        np.testing.assert_allclose(alphas[:-1], wanted[:-1], rtol=1e-5)
        assert 0 < alphas[-1] < alphas[-2]


@pytest.mark.parametrize("predict", ["noise", "velocity", "sample"])
def test_the_true_answer_has_no_loss(monkeypatch, predict):
    made = DiffusionHead(inputs=inputs_of(None), width=8, draws=3, predict=predict)
    data = chunks()[:1].expand(5, -1, -1)

    def true(pooled, x, level, embodiment):
        kept = made.alphas[level][:, None, None]
        alpha, sigma = kept.sqrt(), (1 - kept).sqrt()
        noise = (x - alpha * data[:1]) / sigma
        return {"noise": noise, "sample": data[:1] + 0 * x, "velocity": alpha * noise - sigma * data[:1]}[predict]

    monkeypatch.setattr(made, "_answer", true)
    loss = made.loss(Context(vector=torch.zeros(5, 6)), data, *everything(5), "tiny", generator())
    assert loss.max() < 1e-6
    monkeypatch.setattr(made, "_answer", lambda *args: true(*args) + 0.5)
    loss = made.loss(Context(vector=torch.zeros(5, 6)), data, *everything(5), "tiny", generator())
    torch.testing.assert_close(loss, torch.full((5,), 0.25), atol=1e-4, rtol=0)


@torch.no_grad()
def test_regression_errors_by_loops():
    steps, dims = torch.arange(H) < torch.tensor([4, 2, 1])[:, None], torch.tensor([True, False, True])
    for error, power in (("l1", 1), ("mse", 2)):
        made = make_head("regression", None, error=error)
        context = context_of(None)
        got = made.loss(context, chunks(), steps, dims, "tiny", generator())
        said = made(context, "tiny", A)
        for b in range(B):
            places = [(h, a) for h in range(H) for a in range(A) if steps[b, h] and dims[a]]
            wanted = sum(abs(said[b, h, a] - chunks()[b, h, a]) ** power for h, a in places) / len(places)
            torch.testing.assert_close(got[b], wanted)


def two_modes(name, steps=250):
    """Share of samples near either of two answers to the same question."""
    torch.manual_seed(0)
    node = small(name)
    if "tokenizer" in node and "Fast" in node["tokenizer"]["_target_"]:
        pytest.skip("fitted to other chunks")
    made = instantiate({**node, **({"draws": 4} if "draws" in node else {})}, inputs=inputs_of(None, dims={"tiny": 1}))
    target = torch.where(torch.arange(64) % 2 == 0, 0.8, -0.8).reshape(64, 1, 1).expand(-1, H, -1).contiguous()
    mask, dims = torch.ones(64, H, dtype=torch.bool), torch.ones(1, dtype=torch.bool)
    optimizer = torch.optim.Adam(made.parameters(), lr=3e-3)
    for step in range(steps):
        loss = made.loss(Context(vector=torch.zeros(64, 6)), target, mask, dims, "tiny", generator(step)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        noise = torch.randn(400, H, 1, generator=generator(9))
        got = made.eval().sample(Context(vector=torch.zeros(400, 6)), noise, dims, "tiny").mean(1).flatten()
    return [float(((got - mode).abs() < 0.3).float().mean()) for mode in (-0.8, 0.8)]


@pytest.mark.parametrize("name", ["flow", "dit", "diffusion"])
def test_heads_that_sample_keep_both_modes(name):
    low, high = two_modes(name)
    assert low > 0.3
    assert high > 0.3
    assert low + high > 0.85


def test_regression_answers_between_two_modes_and_greedy_tokens_take_one():
    low, high = two_modes("regression", 150)
    assert low + high < 0.05
    low, high = two_modes("tokenized", 150)
    assert max(low, high) > 0.95


# The language model as head.


@torch.no_grad()
@pytest.mark.parametrize("kind", ["smolvlm", "paligemma", "octo"])
@pytest.mark.parametrize("name", ["rt2", "pi0_fast"])
def test_what_it_says_is_the_greedy_argmax_of_whole_passes(name, kind):
    backbone = make_backbone(kind)
    made, context = make_head(name, backbone), context_of(backbone)
    if kind == "octo" and name == "rt2":
        with torch.no_grad():
            made.out.weight.mul_(20.0)
    dims = torch.tensor([True, False, True])
    got = made.sample(context, noise_of(), dims, "tiny")
    grammar, values, p = made.tokenizer.grammar, made.tokenizer.values(H, 2), context.prefix.states.shape[1]
    seen = set()
    for row in range(B):
        index, tokens, left = torch.tensor([row]), [], values
        prefix = context.prefix.rows(index)
        while left:
            states = prefix.states[:, -1]
            if tokens:
                said = made._embed(backbone, torch.tensor([tokens]))
                states = backbone.extend(prefix, said, torch.ones(1, len(tokens), dtype=torch.bool)).states[:, -1]
                assert states.shape[0] == 1
            logits = made.out(states) if made.embedding is not None else backbone.next_words(states)[:, made.words]
            tokens.append(int(logits[0].masked_fill(grammar.writes > left, -torch.inf).argmax()))
            left -= int(grammar.writes[tokens[-1]])
        whole = torch.tensor([tokens])
        wanted = made.tokenizer.decode(whole, torch.ones_like(whole, dtype=torch.bool), H, 2)
        torch.testing.assert_close(got[row][:, dims], wanted[0])
        seen |= set(tokens)
    assert p == context.prefix.states.shape[1]
    assert len(seen) > 1


@torch.no_grad()
def test_the_loss_over_the_vocabulary_counts_what_is_said_around_the_action(backbone):
    options = {"over": "vocabulary", "begin": [2], "preamble": [7, 9], "end": [11, 3], "skip": 5, "smoothing": 0.0}
    made, context = make_head("rt2", backbone, **options), context_of(backbone)
    steps = torch.arange(H) < torch.tensor([4, 2, 4])[:, None]
    got = made.loss(context, chunks(), steps, everything()[1], "tiny", generator())
    held = chunks().clone()
    held[1, 2:] = held[1, 1]
    tokens, _, _ = made.tokenizer.encode(held, steps)
    words = backbone.vocabulary - 1 - 5 - tokens
    for row in range(B):
        said = torch.cat([torch.tensor([2, 7, 9]), words[row], torch.tensor([11, 3])])
        index = torch.tensor([row])
        after = backbone.extend(
            context.prefix.rows(index), backbone.embed(said[None, :-1]), torch.ones(1, len(said) - 1, dtype=torch.bool)
        )
        states = after.states[0, -len(said) + 1 :]
        logs = backbone.next_words(states).log_softmax(-1)
        each = -logs.gather(1, said[1:, None])[:, 0]  # the begin word is given, not said
        keep = torch.ones(len(each), dtype=torch.bool)
        keep[2 : 2 + H * A] = steps[row].repeat_interleave(A)
        torch.testing.assert_close(got[row], each[keep].mean(), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_forced_words_stand_before_the_action_in_decoding_too(backbone):
    plain, made = (make_head("rt2", backbone, **o) for o in ({}, {"begin": [2], "preamble": [7, 9]}))
    context = context_of(backbone)
    forced = backbone.embed(torch.tensor([[2, 7, 9]]).expand(B, -1))
    longer = backbone.extend(context.prefix, forced, torch.ones(B, 3, dtype=torch.bool))
    wanted = plain.sample(
        Context(vector=context.vector, prefix=longer, backbone=backbone), noise_of(), everything()[1], "tiny"
    )
    torch.testing.assert_close(made.sample(context, noise_of(), everything()[1], "tiny"), wanted)
    assert (plain.sample(context, noise_of(), everything()[1], "tiny") - wanted).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("flow", {"solver": "huen"}, "Did you mean 'heun'"),
        ("flow", {"steps": 0}, "at least 1 solver step"),
        ("pi0", {"time": "fuse"}, "Did you mean 'fused'"),
        ("pi0", {"activation": "relu"}, "unknown activation 'relu'"),
        ("pi0", {"heads": 3, "every": 0}, "every and joint_every from 1"),
        ("dit", {"width": 33}, "an even width"),
        ("diffusion", {"sampler": "dpm"}, "unknown sampler 'dpm'"),
        ("diffusion", {"predict": "epsilon"}, "unknown predict 'epsilon'"),
        ("diffusion", {"steps": 99}, "1 to 20 steps"),
        ("regression", {"decode": "paralel"}, "Did you mean 'parallel'"),
        ("regression", {"error": "l2"}, "unknown error 'l2'"),
        ("rt2", {"rows": "mine"}, "unknown rows 'mine'"),
        ("rt2", {"rows": "own", "begin": [1]}, "words of its own"),
        ("rt2", {"skip": 150}, "do not fit into a vocabulary of 160 words"),
        ("rt2", {"over": "words"}, "unknown over 'words'"),
    ],
)
def test_settings_that_cannot_be(name, options, says, backbone):
    with pytest.raises(ConfigError, match=says):
        make_head(name, backbone, **options)


def test_an_expert_without_a_state_to_take_as_a_token(backbone):
    with pytest.raises(ConfigError, match="state_token=true needs"):
        ExpertHead(inputs=inputs_of(backbone, context_dim=0))
    with pytest.raises(ConfigError, match="would see nothing"):
        RegressionHead(inputs=inputs_of(None, context_dim=0))


def test_octo_is_a_backbone_of_the_same_protocol():
    assert isinstance(make_backbone("octo"), OctoBackbone)
