"""Policies of LeRobot against our models with the same weights: every number on the way, and the files both ways."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from brachium.__main__ import main
from brachium.errors import CheckpointError
from brachium.spec import Observation
from brachium.vla.checkpoint import load_checkpoint, predict
from brachium.vla.exchange.lerobot import read_lerobot, write_lerobot
from brachium.vla.model import stack_images

from . import lerobot_models as peers

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
TEXTS = ("put the red cube in the bowl", "push it")


@pytest.fixture(scope="module")
def patched():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module", params=["pi0", "pi05", "smolvla"])
def pair(request, tmp_path_factory, patched):
    """(kind, their policy, its normaliser, its unnormaliser, our model)."""
    folder = tmp_path_factory.mktemp(request.param)
    policy, _, config = peers.make_lerobot(request.param, folder, patched)
    path, before, after = peers.save_lerobot(policy, config, folder / "policy", peers.statistics())
    ours = read_lerobot(
        path, tokenizer=peers.text_tokenizer(), control_hz=10.0, options={"vision_heads": 2, "head_dim": 8}
    )
    return request.param, policy, before, after, ours


def observation(seed=0):
    rng = np.random.default_rng(seed)
    return Observation(
        images={n: rng.integers(0, 256, (2, *size, 3), dtype=np.uint8) for n, size in peers.CAMERAS.items()},
        state=rng.normal(0, 0.7, (2, peers.STATE)).astype(np.float32),
        instruction=TEXTS,
    )


def their_inputs(policy, before, seen):
    """What their model is called with: images, their masks, tokens, their mask, and the normalised state."""
    batch = {f"observation.images.{k}": torch.from_numpy(v).permute(0, 3, 1, 2) / 255.0 for k, v in seen.images.items()}
    kind = policy.name
    state = before._normalize_observation({"observation.state": torch.from_numpy(seen.state)}, inverse=False)
    state = state["observation.state"]
    texts = [f"{text}\n" for text in seen.instruction]
    if kind in ("pi05", "pi0_fast"):
        bins = np.digitize(state.numpy(), bins=np.linspace(-1, 1, 256 + 1)[:-1]) - 1
        end = "\nAction: " if kind == "pi05" else "\n"
        texts = [f"Task: {t}, State: {' '.join(map(str, row))};{end}" for t, row in zip(seen.instruction, bins)]
    asked = peers.text_tokenizer()(texts, padding="max_length", max_length=100, padding_side="right")
    tokens, mask = torch.tensor(asked["input_ids"]), torch.tensor(asked["attention_mask"]).bool()
    images, masks = policy.prepare_images(batch) if kind == "smolvla" else policy._preprocess_images(batch)
    return images, masks, tokens, mask, torch.nn.functional.pad(state, (0, peers.PAD - peers.STATE))


def our_context(ours, seen):
    """Our context, and the sequence that entered the language model."""
    name = next(iter(ours.embodiments))
    entered = {}
    language = ours.encoder.backbone.family.language_model
    handle = language.register_forward_pre_hook(lambda module, args, kwargs: entered.update(kwargs), with_kwargs=True)
    state = torch.from_numpy(seen.state)
    images = stack_images(seen.images, ours.embodiments[name], torch.device("cpu"))
    encoding = ours.encode(images, ours.tokens(seen.instruction, state, name), state, name)
    handle.remove()
    return name, ours.context(encoding, state, name), entered["inputs_embeds"]


def real_rows(tensor, mask):
    """Rows of (b, q, ...) where the mask is True, one example after the other."""
    return torch.cat([row[m] for row, m in zip(tensor, mask)])


def their_prefix(policy, inputs):
    """Embedded prefix, its mask, and the keys and values of every layer."""
    from lerobot.policies.common.vla_utils import make_att_2d_masks, prepare_attention_masks_4d

    images, masks, tokens, mask, state = inputs
    extra = {"state": state} if policy.name == "smolvla" else {}
    embedded, real, blocks = policy.model.embed_prefix(images, masks, tokens, mask, **extra)
    seen = make_att_2d_masks(real, blocks)
    positions = torch.cumsum(real, dim=1) - 1
    if policy.name == "smolvla":
        model = policy.model.vlm_with_expert
    else:
        model, seen = policy.model.paligemma_with_expert, prepare_attention_masks_4d(seen)
        model.paligemma.model.language_model.config._attn_implementation = "eager"
    _, cache = model.forward(
        attention_mask=seen,
        position_ids=positions,
        past_key_values=None,
        inputs_embeds=[embedded, None],
        use_cache=True,
    )
    return embedded, real, cache


@torch.no_grad()
def test_the_prefix_is_theirs(pair):
    kind, policy, before, _, ours = pair
    seen = observation()
    embedded, real, cache = their_prefix(policy, their_inputs(policy, before, seen))
    _, context, entered = our_context(ours, seen)
    prefix = context.prefix
    torch.testing.assert_close(real_rows(entered, prefix.mask), real_rows(embedded, real), **CLOSE)
    assert len(prefix.keys) == len(cache.layers) == (4 if kind == "smolvla" else 3)
    for key, value, layer in zip(prefix.keys, prefix.values, cache.layers):
        for own, their in ((key, layer.keys), (value, layer.values)):
            found, wanted = own.transpose(1, 2), their.transpose(1, 2)
            torch.testing.assert_close(real_rows(found, prefix.mask), real_rows(wanted, real), **CLOSE)


def chunk(seed=1):
    generator = torch.Generator().manual_seed(seed)
    action = torch.randn(2, peers.CHUNK, peers.ACTION, generator=generator)
    noise = torch.randn(2, peers.CHUNK, peers.PAD, generator=generator)
    return action, noise, torch.tensor([0.3, 0.85])


@torch.no_grad()
def test_velocity_and_loss_are_theirs(pair):
    kind, policy, before, _, ours = pair
    seen = observation()
    *asked, state = their_inputs(policy, before, seen)
    action, noise, time = chunk()
    wide = torch.nn.functional.pad(action, (0, peers.PAD - peers.ACTION))
    errors = policy.model.forward(*asked, *([] if kind == "pi05" else [state]), wide, noise, time)
    name, context, _ = our_context(ours, seen)
    steps, dims = torch.ones(2, peers.CHUNK, dtype=torch.bool), torch.arange(peers.PAD) < peers.ACTION
    mixed = time[:, None, None] * noise + (1 - time[:, None, None]) * wide
    velocity = ours.head.velocity(ours.head.prepare(context, 1), mixed, time, name)
    _, real, cache = their_prefix(policy, (*asked, state))
    if kind != "smolvla":
        policy.model.paligemma_with_expert.gemma_expert.model.config._attn_implementation = "eager"
    extra = {"state": state} if kind == "pi0" else {}
    theirs = policy.model.denoise_step(prefix_pad_masks=real, past_key_values=cache, x_t=mixed, timestep=time, **extra)
    torch.testing.assert_close(velocity, theirs, **CLOSE)
    loss = ours.head.loss_at(context, wide, steps, dims, name, noise, time)
    torch.testing.assert_close(loss, errors[..., : peers.ACTION].mean((1, 2)), **CLOSE)
    twice = ours.head.loss_at(
        context, wide, steps, dims, name, noise.repeat_interleave(3, 0), time.repeat_interleave(3)
    )
    torch.testing.assert_close(twice, loss, **CLOSE)


@torch.no_grad()
def test_ten_step_actions_are_theirs(pair):
    kind, policy, before, after, ours = pair
    seen = observation()
    *asked, state = their_inputs(policy, before, seen)
    _, noise, _ = chunk()
    extra = [] if kind == "pi05" else [state]
    wanted = policy.model.sample_actions(*asked, *extra, noise=noise)[..., : peers.ACTION]
    wanted = after._normalize_action(wanted, inverse=True)
    got = predict(ours, next(iter(ours.embodiments)), seen, noise.numpy())
    assert np.abs(wanted.numpy()).max() > 0.1
    np.testing.assert_allclose(got, wanted.numpy(), atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def fast_pair(tmp_path_factory, patched):
    """PI0-FAST: (their policy, its normaliser, our model)."""
    folder = tmp_path_factory.mktemp("pi0_fast")
    policy, _, config = peers.make_lerobot("pi0_fast", folder, patched)
    path, before, _ = peers.save_lerobot(policy, config, folder / "policy", peers.statistics())
    published = policy.action_tokenizer.save(folder / "fast")
    options = {"vision_heads": 2, "action_tokenizer_name": published}
    ours = read_lerobot(path, tokenizer=peers.text_tokenizer(), control_hz=10.0, options=options)
    return policy, before, ours


@torch.no_grad()
def test_the_prefix_of_pi0_fast_is_theirs(fast_pair):
    policy, before, ours = fast_pair
    seen = observation()
    images, masks, tokens, mask, _ = their_inputs(policy, before, seen)
    embedded, real, *_ = policy.model.embed_prefix_fast(images, masks, tokens, mask)
    _, context, entered = our_context(ours, seen)
    torch.testing.assert_close(real_rows(entered, context.prefix.mask), real_rows(embedded, real), **CLOSE)


@torch.no_grad()
def test_the_loss_of_pi0_fast_is_theirs(fast_pair):
    from lerobot.processor import ActionTokenizerProcessorStep

    policy, before, ours = fast_pair
    seen = observation()
    images, masks, tokens, mask, _ = their_inputs(policy, before, seen)
    action = torch.from_numpy(peers.smooth_chunks(2, seed=5))
    with pytest.MonkeyPatch.context() as patch:
        text = peers.text_tokenizer()
        asks = text.encode
        both = {"encode": lambda t, **k: [*asks(t, add_special_tokens=False), 3] if t == "|" else asks(t, **k)}
        for name, value in both.items():
            patch.setattr(text, name, value)  # openpi ends with EOS, which LeRobot asks its tokenizer to add
        patch.setattr("lerobot.processor.tokenizer_processor.AutoTokenizer", peers.Given(text))
        step = ActionTokenizerProcessorStep(
            action_tokenizer_input_object=policy.action_tokenizer, max_action_tokens=40, fast_skip_tokens=128
        )
        said, real = step._tokenize_action(action)
    wanted = policy.model.forward(images, masks, tokens, mask, said, real)["loss"]
    name, context, _ = our_context(ours, seen)
    steps, dims = torch.ones(2, peers.CHUNK, dtype=torch.bool), torch.ones(peers.ACTION, dtype=torch.bool)
    each = ours.head.loss(context, action, steps, dims, name, torch.Generator())
    counts = real[:, 1:].sum(1)
    assert len(set(counts.tolist())) > 1
    torch.testing.assert_close((each * counts).sum() / counts.sum(), wanted, **CLOSE)


@torch.no_grad()
def test_what_pi0_fast_says_freely_is_what_theirs_says(fast_pair):
    """Their sampler puts the begin token into the two-way prompt, unlike their training; so does this test."""
    policy, before, ours = fast_pair
    seen = observation()
    images, masks, tokens, mask, _ = their_inputs(policy, before, seen)
    wanted = policy.model.sample_actions_fast_kv_cache(images, masks, tokens, mask, max_decoding_steps=16)
    state, name = torch.from_numpy(seen.state), "pi0_fast"
    asked = ours.tokens(seen.instruction, state, name)
    asked = torch.cat([asked, torch.full((2, 1), ours.head.begin[0])], dim=1)
    pictures = stack_images(seen.images, ours.embodiments[name], torch.device("cpu"))
    context = ours.context(ours.encode(pictures, asked, state, name), state, name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ours.head, "begin", [])
        got = ours.head.speak(context, 16)
    ends = [row.index(peers.BAR) if peers.BAR in row else len(row) for row in wanted.tolist()]
    for own, their, end in zip(got.tolist(), wanted.tolist(), ends):
        assert own[:end] == their[:end]
    assert max(ends) > 4


# Files, both ways, by the commands.


@pytest.fixture(scope="module")
def imported(tmp_path_factory, patched):
    """Kind -> (their folder, their class, our checkpoint, folder of the tokenizer), made when first asked for."""
    found = {}

    def get(kind):
        if kind not in found:
            folder = tmp_path_factory.mktemp(f"files-{kind}")
            policy, made, config = peers.make_lerobot(kind, folder, patched)
            path, _, _ = peers.save_lerobot(policy, config, folder / "policy", peers.statistics())
            peers.text_tokenizer().save_pretrained(folder / "words")
            (folder / "words" / "config.json").write_text("{}")
            options = ["+options.vision_heads=2", "+options.head_dim=8"] if kind == "smolvla" else []
            options = options or ["+options.vision_heads=2"]
            if kind == "pi0_fast":
                options.append(f"+options.action_tokenizer_name={policy.action_tokenizer.save(folder / 'fast')}")
            words = [f"policy={path}", f"tokenizer={folder / 'words'}", f"out={folder / 'ours'}", "control_hz=10"]
            assert main(["import-policy", *words, *options]) == 0
            found[kind] = (path, made, folder / "ours", folder / "words")
        return found[kind]

    return get


@pytest.mark.parametrize("kind", peers.KINDS)
def test_a_policy_comes_in_and_goes_out_the_same(kind, imported, tmp_path, capsys):
    """LeRobot loads what we export from what it wrote, with the same weights to the bit and its own normalisation."""
    path, made, checkpoint, _ = imported(kind)
    assert main(["verify", str(checkpoint)]) == 0
    config = json.loads((path / "config.json").read_text())
    write_lerobot(load_checkpoint(checkpoint), tmp_path / "theirs", kind, config)
    before, after = load_file(path / "model.safetensors"), load_file(tmp_path / "theirs" / "model.safetensors")
    dead = {k for k in before if "gemma_expert.lm_head" in k}
    assert all(torch.equal(after[k], v) for k, v in before.items() if k not in dead)
    one, two = made.from_pretrained(path), made.from_pretrained(tmp_path / "theirs", strict=True)
    mine, other = one.state_dict(), two.state_dict()
    assert mine.keys() == other.keys()
    assert all(torch.equal(mine[k], other[k]) for k in mine if k not in dead)
    assert "Warning" not in capsys.readouterr().out  # what their loader prints where it goes on with random weights
    stats = load_file(tmp_path / "theirs" / "policy_preprocessor_step_0_normalizer_processor.safetensors")
    wanted = peers.statistics()
    names = ("q01", "q99") if kind == "pi05" else ("mean", "std")
    for feature, values in wanted.items():
        for name in names:
            torch.testing.assert_close(stats[f"{feature}.{name}"], values[name], atol=1e-6, rtol=1e-5)


def test_the_export_command_says_what_has_no_place(imported, tmp_path, capsys):
    _, _, checkpoint, _ = imported("pi0")
    words = ["export-policy", f"checkpoint={checkpoint}", f"out={tmp_path / 'x'}"]
    assert main([*words, "kind=pi0"]) == 0
    for kind in ("smolvla", "pi05"):
        assert main([*words, f"kind={kind}"]) == 2
        assert f"a {kind} has no place for" in capsys.readouterr().err
    assert main([*words, "kind=pi00"]) == 2
    assert "Did you mean 'pi0'" in capsys.readouterr().err


def edited(path, target, change):
    shutil.copytree(path, target)
    weights = load_file(target / "model.safetensors")
    change(weights)
    save_file(weights, target / "model.safetensors")
    return target


EXPERT = "model.paligemma_with_expert.gemma_expert.model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda w: w.pop(EXPERT), "1 missing:\n    paligemma_with_expert.gemma_expert.model.layers.1.self_attn.q_proj"),
        (lambda w: w.update(extra=torch.zeros(1)), "1 unexpected:\n    extra"),
        (lambda w: w.update({EXPERT: torch.zeros(3, 3)}), "expected (64, 32), got (3, 3)"),
    ],
)
def test_weights_that_do_not_fit_are_listed(imported, tmp_path, capsys, change, says):
    path, _, _, words = imported("pi0")
    bad = edited(path, tmp_path / "bad", change)
    options = [f"tokenizer={words}", "control_hz=10", "+options.vision_heads=2", f"out={tmp_path / 'out'}"]
    assert main(["import-policy", f"policy={bad}", *options]) == 2
    said = capsys.readouterr().err
    assert "do not fit the model they are for" in said
    assert says in said
    assert not (tmp_path / "out").exists()


def test_a_policy_without_statistics_or_rate_says_what_to_type(imported, tmp_path, capsys, demos):
    path, _, _, words = imported("pi0")
    bare = tmp_path / "bare"
    shutil.copytree(path, bare, ignore=lambda folder, names: [n for n in names if "normalizer" in n])
    typed = [f"policy={bare}", f"tokenizer={words}", "+options.vision_heads=2", f"out={tmp_path / 'out'}"]
    assert main(["import-policy", *typed]) == 2
    assert "give control_hz=HZ" in capsys.readouterr().err
    assert main(["import-policy", *typed, "control_hz=10"]) == 2
    assert "no statistics of observation.state" in capsys.readouterr().err
    assert main(["import-policy", *typed, f"store={demos.path}"]) == 0
    assert list(load_checkpoint(tmp_path / "out").embodiments) == ["tiny"]


def test_statistics_and_weights_of_openpi_are_read_too(imported, tmp_path):
    """No configuration, no prefix before the names, statistics in assets; the kind shows in the names."""
    path, _, checkpoint, _ = imported("pi0")
    folder = tmp_path / "openpi"
    (folder / "assets" / "robot").mkdir(parents=True)
    weights = load_file(path / "model.safetensors")
    save_file({k.removeprefix("model."): v for k, v in weights.items()}, folder / "model.safetensors")
    stats = {"state": "observation.state", "actions": "action"}
    values = peers.statistics()
    noted = {name: {k: values[key][k].tolist() for k in ("mean", "std", "q01", "q99")} for name, key in stats.items()}
    (folder / "assets" / "robot" / "norm_stats.json").write_text(json.dumps({"norm_stats": noted}))
    wanted = load_checkpoint(checkpoint)
    spec = next(iter(wanted.embodiments.values()))
    options = {"vision_heads": 2, "chunk_size": peers.CHUNK}
    got = read_lerobot(folder, tokenizer=peers.text_tokenizer(), control_hz=10.0, embodiment=spec, options=options)
    assert got.recipe.head["time"] == "fused"
    seen, noise = observation(), chunk()[1].numpy()
    np.testing.assert_allclose(predict(got, "pi0", seen, noise), predict(wanted, "pi0", seen, noise), atol=1e-6)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda folder: None, "no policy at"),
        (lambda folder: folder.mkdir(), "expected model.safetensors"),
        (lambda folder: broken(folder, b"no weights"), "is damaged"),
        (lambda folder: broken(folder, None, {"type": "act"}), "policies of type 'act' cannot be converted"),
    ],
)
def test_folders_that_hold_no_policy(make, says, tmp_path, imported, capsys):
    words = imported("pi0")[3]
    make(tmp_path / "policy")
    assert main(["import-policy", f"policy={tmp_path / 'policy'}", f"tokenizer={words}", "control_hz=10"]) == 2
    assert says in capsys.readouterr().err


def broken(folder, weights, config=None):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config or {}))
    if weights is not None:
        (folder / "model.safetensors").write_bytes(weights)
    else:
        save_file({"x": torch.zeros(1)}, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("kind", "options", "says"),
    [
        ("pi0", {"use_relative_actions": True}, "pi0 with use_relative_actions=True is not converted"),
        ("pi0", {"max_period": 8.0}, "expected max_period=4.0"),
        ("smolvla", {"adapt_to_pi_aloha": True}, "adapt_to_pi_aloha=True is not converted"),
        ("pi0", {"normalization_mapping": {"STATE": "QUANTILE10"}}, "normalisation QUANTILE10 of STATE"),
    ],
)
def test_configurations_that_mean_something_else_are_refused(kind, options, says, imported):
    path = imported(kind)[0]
    options = {"vision_heads": 2, "head_dim": 8, **options}
    with pytest.raises(CheckpointError, match=says):
        read_lerobot(path, tokenizer=peers.text_tokenizer(), control_hz=10.0, options=options)


def test_the_normalisation_is_that_of_the_configuration(imported):
    options = {"vision_heads": 2, "normalization_mapping": {"STATE": "QUANTILES", "ACTION": "MIN_MAX"}}
    got = read_lerobot(imported("pi0")[0], tokenizer=peers.text_tokenizer(), control_hz=10.0, options=options)
    assert (got.recipe.state_normalization, got.recipe.action_normalization) == ("quantile", "min_max")
    assert "path" not in load_checkpoint(imported("pi0_fast")[2]).recipe.head["tokenizer"]
