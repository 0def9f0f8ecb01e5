"""Reading a prefix and going on from it: every family and Octo against one pass over everything, and what must not
matter."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import T5Config, T5EncoderModel

from brachium.errors import ConfigError
from brachium.vla.attention import Rotary, additive, attend, block_mask
from brachium.vla.backbones.hf import HFBackbone
from brachium.vla.backbones.octo import OctoBackbone

from .test_families import CONFIGS, SIDE, make_vlm, own_forward

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
CAUSAL = ("smolvlm", "qwen2_5_vl", "qwen3_vl")
NAMES = (*CONFIGS, "octo")


def make_octo(**options):
    torch.manual_seed(0)
    options = {"width": 24, "depth": 3, "heads": 3, "stem": (8, 16), "image_size": 16, "readouts": 2, **options}
    made = OctoBackbone(vocab_size=40, **options).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(3.0 if parameter.ndim > 1 else 1.0)
    return made


@pytest.fixture(scope="module", params=NAMES)
def backbone(request, tmp_path_factory):
    if request.param == "octo":
        return make_octo()
    folder = tmp_path_factory.mktemp(request.param)
    make_vlm(request.param).save_pretrained(folder)
    made = HFBackbone(path=str(folder), image_size=SIDE[request.param], readouts=2).eval()
    made.name = request.param
    return made


def inputs(b=3, n=2, length=6, side=20, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (b, n, side, side, 3), dtype=torch.uint8, generator=generator)
    tokens = torch.randint(5, 40, (b, length), generator=generator)
    mask = torch.arange(length) >= torch.tensor([0, 2, 4, 1])[:b, None]
    return images, tokens, mask


@torch.no_grad()
@pytest.mark.parametrize("name", list(CONFIGS))
def test_a_prompt_is_the_models_own_pass(name, tmp_path):
    """What transformers computes for images and one prompt; PaliGemma's prefix sees itself both ways."""
    vlm = make_vlm(name)
    vlm.save_pretrained(tmp_path)
    backbone = HFBackbone(path=str(tmp_path), image_size=SIDE[name]).eval()
    vlm.set_attn_implementation("eager")
    images, tokens, mask = inputs()
    prefix = backbone.read(images, tokens, mask)
    for b in range(3):
        words = tokens[b][mask[b]]
        if name.startswith("paligemma"):
            ids = torch.cat([torch.ones(32, dtype=torch.long), words])[None]
            pixels = backbone.normalise(images[b : b + 1]).flatten(0, 1)
            states = vlm.model(input_ids=ids, pixel_values=pixels, token_type_ids=torch.zeros_like(ids))
            states = states.last_hidden_state[0]
        else:
            states = own_forward(name, vlm, backbone, images[b], words)
        real = prefix.states[b][prefix.mask[b]]
        torch.testing.assert_close(real, states, atol=2e-5, rtol=1e-4)
        assert prefix.next[b] == (len(states) if len(backbone.family.positions(2)[0]) == 1 else 2 * 5 + len(words))


@torch.no_grad()
@pytest.mark.parametrize("two_way", [False, True])
def test_going_on_is_one_pass_over_everything(backbone, two_way):
    """Keys and values of the prefix are all that the rest needs: in one step, in several, and with padding between."""
    images, tokens, mask = inputs()
    prefix = backbone.read(images, tokens, mask)
    generator = torch.Generator().manual_seed(1)
    more = torch.randn(3, 4, backbone.width, generator=generator)
    real = torch.ones(3, 4, dtype=torch.bool)
    after = backbone.extend(prefix, more, real, two_way=two_way)
    p = prefix.mask.shape[1]
    states, keys = whole_pass(backbone, prefix, images, tokens, mask, more, two_way)
    torch.testing.assert_close(after.states[:, p:], states[:, p:], **CLOSE)
    torch.testing.assert_close(after.states[:, :p], prefix.states, rtol=0, atol=0)
    for got, wanted in zip(after.keys, keys):
        torch.testing.assert_close(got[:, :, p:], wanted[:, :, p:], **CLOSE)
    assert torch.equal(after.next, prefix.next + 4)
    if not two_way:
        step = prefix
        for k in range(4):
            step = backbone.extend(step, more[:, k : k + 1], real[:, :1])
        torch.testing.assert_close(step.states, after.states, **CLOSE)
        gaps = torch.tensor([[True, False, True, True, False, True]]).expand(3, -1)
        wide = torch.full((3, 6, backbone.width), 7.0)
        wide[:, gaps[0]] = more
        spread = backbone.extend(prefix, wide, gaps)
        torch.testing.assert_close(spread.states[:, p:][:, gaps[0]], after.states[:, p:], **CLOSE)


def whole_pass(backbone, prefix, images, tokens, mask, more, two_way):
    """The prefix's sequence and what follows in one pass without a cache; states and keys."""
    entered, kept = {}, {}
    b, p, q = len(mask), prefix.mask.shape[1], more.shape[1]
    if isinstance(backbone, OctoBackbone):
        handle = backbone.blocks[0].register_forward_pre_hook(lambda m, args: entered.update(x=args[0], who=args[1]))
        backbone.read(images, tokens, mask)
        handle.remove()
        sequence, seen = torch.cat([entered["x"], more], dim=1), entered["who"]
    else:
        language = backbone.family.language_model
        handle = language.register_forward_pre_hook(lambda m, a, k: entered.update(k), with_kwargs=True)
        backbone.read(images, tokens, mask)
        handle.remove()
        sequence, seen = torch.cat([entered["inputs_embeds"], more], dim=1), entered["attention_mask"][:, 0] == 0
    who = torch.zeros(b, p + q, p + q, dtype=torch.bool)
    who[:, :p, :p] = seen
    who[:, p:, :p] = prefix.mask[:, None]
    who[:, p:, p:] = torch.ones(q, q, dtype=torch.bool) if two_way else torch.ones(q, q, dtype=torch.bool).tril()
    steps = prefix.next[:, None] + torch.arange(q)
    if isinstance(backbone, OctoBackbone):
        positions = torch.cat([torch.arange(p).expand(b, -1), steps], dim=1)
        keys, x = [], sequence
        for block in backbone.blocks:
            x, key, _ = block(x, who, backbone.rotary, positions, None, None)
            keys.append(key)
        return backbone.norm(x), keys
    before = entered["position_ids"]
    before = before[None] if before.ndim == 2 else before
    positions = torch.cat([before, steps.expand(len(before), -1, -1)], dim=2)
    from transformers import DynamicCache

    cache = DynamicCache()
    deep = {k: v for k, v in entered.items() if k in ("deepstack_visual_embeds",)}
    if deep:
        deep["visual_pos_masks"] = nn.functional.pad(entered["visual_pos_masks"], (0, q))
    states = backbone.family.language_model(
        inputs_embeds=sequence,
        position_ids=positions[0] if len(positions) == 1 else positions,
        attention_mask=additive(who, torch.float32)[:, None],
        past_key_values=cache,
        use_cache=True,
        **deep,
    ).last_hidden_state
    kept["keys"] = [layer.keys for layer in cache.layers]
    return states, kept["keys"]


@torch.no_grad()
def test_what_stands_in_padding_or_in_a_camera_that_is_not_there_changes_nothing(backbone):
    images, tokens, mask = inputs()
    here = torch.tensor([[True, True], [True, False], [False, True]])
    before = backbone.read(images, tokens, mask, image_mask=here)
    other = torch.where(here[:, :, None, None, None], images, 255 - images)
    after = backbone.read(other, torch.where(mask, tokens, 39 - tokens % 7), mask, image_mask=here)
    for row in range(3):
        real = before.mask[row]
        torch.testing.assert_close(after.states[row][real], before.states[row][real], rtol=0, atol=0)
        for got, wanted in zip((*after.keys, *after.values), (*before.keys, *before.values)):
            torch.testing.assert_close(got[row][:, real], wanted[row][:, real], rtol=0, atol=0)
    assert not torch.equal(after.mask, backbone.read(images, tokens, mask).mask)
    changed = backbone.read(255 - images, tokens, mask, image_mask=here)
    assert (changed.states - before.states)[before.mask].abs().max() > 1e-3  # or it sees nothing at all


@torch.no_grad()
def test_a_row_does_not_depend_on_what_is_read_beside_it(backbone):
    images, tokens, mask = inputs()
    together = backbone.read(images, tokens, mask)
    for row in range(3):
        alone = backbone.read(images[row : row + 1], tokens[row : row + 1], mask[row : row + 1])
        real = together.mask[row]
        torch.testing.assert_close(alone.states[0][real], together.states[row][real], **CLOSE)


@torch.no_grad()
def test_extra_tokens_see_the_prompt_and_are_not_seen_by_it(backbone):
    images, tokens, mask = inputs()
    generator = torch.Generator().manual_seed(3)
    extra = torch.randn(3, 2, backbone.width, generator=generator)
    one = backbone.read(images, tokens, mask, extra=extra)
    two = backbone.read(images, tokens, mask, extra=extra.flip(2))
    place = one.spans["extra"]
    assert place.stop - place.start == 2
    text = one.spans["text"]
    torch.testing.assert_close(one.states[:, text][mask], two.states[:, text][mask], **CLOSE)
    assert (one.states[:, place] - two.states[:, place]).abs().min() > 0
    readouts = one.spans["readouts"]
    assert (one.states[:, readouts] - two.states[:, readouts]).abs().max() > 1e-4
    other = backbone.read(images, (tokens - 4) % 35 + 5, mask, extra=extra)
    if not isinstance(backbone, OctoBackbone):
        assert (one.states[:, place] - other.states[:, place]).abs().max() > 1e-4


def test_detaching_cuts_all_gradients_and_repeating_copies_rows(backbone):
    images, tokens, mask = inputs()
    prefix = backbone.read(images, tokens, mask)
    assert prefix.states.requires_grad
    assert all(k.requires_grad for k in prefix.keys[1:])
    cut = prefix.detach()
    assert not any(t.requires_grad for t in (cut.states, *cut.keys, *cut.values))
    twice = cut.repeat(2)
    for row in range(6):
        torch.testing.assert_close(twice.states[row], cut.states[row // 2], rtol=0, atol=0)
        torch.testing.assert_close(twice.keys[1][row], cut.keys[1][row // 2], rtol=0, atol=0)
    assert not backbone.read(images, tokens, mask, keep=False).keys


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_block_masks_by_brute_force(data):
    b, q, k = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 5)), data.draw(st.integers(1, 6))

    def numbers(count):
        return torch.tensor(data.draw(st.lists(st.integers(-2, 3), min_size=b * count, max_size=b * count)))

    asking, known = numbers(q).reshape(b, q), numbers(k).reshape(b, k)
    real = numbers(k).reshape(b, k) > 0
    got = block_mask(asking, known, real)
    for row in range(b):
        for i in range(q):
            for j in range(k):
                assert bool(got[row, i, j]) == (bool(real[row, j]) and int(known[row, j]) <= int(asking[row, i]))


@torch.no_grad()
def test_attention_by_loops():
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, 3, 6, generator=generator)
    key, value = (torch.randn(2, 2, 5, 6, generator=generator) for _ in range(2))
    seen = torch.rand(2, 3, 5, generator=generator) < 0.6
    seen[:, :, 0] = True
    got = attend(query, key, value, seen).unflatten(2, (4, 6))
    for b in range(2):
        for h in range(4):
            for i in range(3):
                places = [j for j in range(5) if seen[b, i, j]]
                scores = torch.stack([query[b, h, i] @ key[b, h // 2, j] / 6**0.5 for j in places])
                wanted = sum(w * value[b, h // 2, j] for w, j in zip(scores.softmax(0), places))
                torch.testing.assert_close(got[b, i, h], wanted, **CLOSE)


def test_a_rotation_depends_on_distance_alone():
    rotary = Rotary(frequencies=torch.tensor([1.0, 0.1, 0.01]))
    query, key = torch.randn(1, 1, 1, 6), torch.randn(1, 1, 1, 6)
    products = [(rotary(query, torch.tensor([[a + 5]])) * rotary(key, torch.tensor([[a]]))).sum() for a in (0, 3, 40)]
    torch.testing.assert_close(products[0], products[1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(products[0], products[2], atol=1e-4, rtol=1e-4)
    angle = torch.tensor([[2]])
    first = rotary(torch.tensor([1.0, 0, 0, 0, 0, 0]).reshape(1, 1, 1, 6), angle).flatten()
    torch.testing.assert_close(
        first[[0, 3]], torch.tensor([2.0]).cos().new_tensor([-0.41615, 0.90930]), atol=1e-4, rtol=0
    )


@torch.no_grad()
def test_layers_can_be_cut_off_and_the_rotary_base_set(tmp_path):
    make_vlm("smolvlm").save_pretrained(tmp_path)
    whole = HFBackbone(path=str(tmp_path), image_size=16).eval()
    cut = HFBackbone(path=str(tmp_path), image_size=16, layers=2, rope_theta=100.0).eval()
    images, tokens, mask = inputs()
    assert (cut.layers.count, whole.layers.count) == (2, 3)
    short, long = cut.read(images, tokens, mask), whole.read(images, tokens, mask)
    assert len(short.keys) == 2
    torch.testing.assert_close(short.values[0], long.values[0])  # values are not turned
    assert (short.keys[0] - long.keys[0]).abs().max() > 1e-3
    again = HFBackbone(config={**cut.resolved_config(), "_resolved": True}, image_size=16).eval()
    again.load_state_dict(cut.state_dict())
    torch.testing.assert_close(again.read(images, tokens, mask).states, short.states, **CLOSE)
    with pytest.raises(ConfigError, match="layers: expected 1 to 3, got 4"):
        HFBackbone(path=str(tmp_path), image_size=16, layers=4)


@torch.no_grad()
def test_octo_reads_words_with_a_frozen_t5(tmp_path):
    config = T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, pad_token_id=0)
    t5 = T5EncoderModel(config).eval()
    t5.save_pretrained(tmp_path)
    made = make_octo(path=str(tmp_path))
    assert not any(p.requires_grad for p in made.words.parameters())
    images, tokens, mask = inputs()
    seen = {}
    handle = made.from_words.register_forward_pre_hook(lambda m, args: seen.update(states=args[0]))
    made.read(images, tokens, mask)
    handle.remove()
    wanted = made.words(input_ids=tokens, attention_mask=mask.long()).last_hidden_state
    torch.testing.assert_close(seen["states"], wanted)
    made.train()
    made.requires_grad_(True)
    assert not made.words.training
    assert not any(p.requires_grad for p in made.words.parameters())
    made.eval()
    again = make_octo(config={**made.resolved_config(), "_resolved": True})
    again.load_state_dict(made.state_dict())
    torch.testing.assert_close(again.read(images, tokens, mask).states, made.read(images, tokens, mask).states)


def test_octo_drops_cameras_and_words_in_training_alone():
    made = make_octo(drop=0.5)
    images, tokens, mask = inputs(b=4, n=3)
    assert made.read(images, tokens, mask).mask[:, 6:].all()
    made.train()
    torch.manual_seed(0)
    masks = torch.stack([made.read(images, tokens, mask).mask for _ in range(60)])
    patches = masks[:, :, 6:-2].unflatten(2, (3, -1))
    assert torch.equal(patches.all(3), patches.any(3))  # whole cameras
    assert patches.any(3).any(2).all()  # never all of them
    assert 0.4 < patches.float().mean() < 0.7
    told = masks[:, :, :6].any(2).float().mean()
    assert 0.4 < told < 0.6


def test_octo_cannot_speak_and_says_what_does_not_fit():
    made = make_octo(cameras=1)
    images, tokens, mask = inputs()
    with pytest.raises(ConfigError, match="2 cameras and 6 words"):
        made.read(images, tokens, mask)
    for call, given_ in ((made.embed, tokens), (made.next_words, torch.zeros(2, made.width))):
        with pytest.raises(ConfigError, match="rows=own"):
            call(given_)
    with pytest.raises(ConfigError, match="image_size as a multiple of 4"):
        make_octo(image_size=18)


@torch.no_grad()
def test_octo_rules_say_who_sees_whom():
    """Found by changing one token at a time: the task sees itself, observations the task too, readouts everything."""
    made = make_octo()
    images, tokens, _ = inputs(b=1)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    extra = torch.randn(1, 2, made.width, generator=torch.Generator().manual_seed(3))
    spans = made.read(images, tokens, mask, extra=extra).spans
    kinds = {name: kind for kind, names in enumerate((("text",), ("images", "extra"), ("readouts",))) for name in names}
    entered = {}
    handle = made.blocks[0].register_forward_pre_hook(lambda module, args: entered.update(who=args[1]))
    made.read(images, tokens, mask, extra=extra)
    handle.remove()
    for asker, rows in spans.items():
        for known, columns in spans.items():
            block = entered["who"][0, rows, columns]
            assert bool(block.all()) == bool(block.any()) == (kinds[known] <= kinds[asker]), (asker, known)
