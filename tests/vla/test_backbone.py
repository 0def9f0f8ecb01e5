"""The shared image prefix against separate passes through transformers, and pretrained models from disk."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, LlamaConfig

from brachium.errors import CheckpointError, ConfigError
from brachium.vla.backbones.hf import HFBackbone, pack, unpacked
from brachium.vla.tokenizer import load_tokenizer

from .conftest import SIZE, WIDTH, vlm_config

VOCABULARY = 20
CLOSE = {"atol": 2e-5, "rtol": 1e-4}


def make(model_type="smolvlm", seed=0, **options):
    torch.manual_seed(seed)
    return HFBackbone(config=vlm_config(model_type), vocab_size=VOCABULARY, **{"readouts": 3, **options}).eval()


@pytest.fixture(scope="module", params=["smolvlm", "idefics3"])
def backbone(request):
    return make(request.param)


def make_inputs(b=2, k=3, length=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (b, 2, SIZE, SIZE, 3), dtype=torch.uint8, generator=g)
    tokens = torch.randint(4, VOCABULARY, (b, k, length), generator=g)
    keep = torch.randint(0, length + 1, (b, k, 1), generator=g)
    return images, tokens, torch.arange(length) >= length - keep  # padded on the left


def reference(backbone, images, words):
    """Readouts and image states from one plain pass of transformers' own causal model over unpadded embeddings."""
    core = backbone.vlm.model
    pixels = images.permute(0, 1, 4, 2, 3).float() / 255.0
    pixels = (pixels - backbone.pixel_mean) / backbone.pixel_std
    vision = core.vision_model(pixel_values=pixels.flatten(0, 1)).last_hidden_state
    prefix = core.connector(vision).reshape(1, -1, WIDTH)
    embedded = core.text_model.get_input_embeddings()(words)[None]
    sequence = torch.cat([prefix, embedded, backbone.readouts[None]], dim=1)
    plain = torch.ones(sequence.shape[:2], dtype=torch.long)
    states = core.text_model(inputs_embeds=sequence, attention_mask=plain, use_cache=False).last_hidden_state
    return (
        states[0, : prefix.shape[1]],
        states[0, prefix.shape[1] : -len(backbone.readouts)],
        states[0, -len(backbone.readouts) :],
    )


@torch.no_grad()
def test_packed_texts_are_separate_unpadded_passes(backbone):
    images, tokens, mask = make_inputs()
    features = backbone(images, tokens, mask)
    assert not mask.all()
    for b in range(2):
        for k in range(3):
            image, text, readout = reference(backbone, images[b : b + 1], tokens[b, k][mask[b, k]])
            torch.testing.assert_close(features.image[b], image, **CLOSE)
            torch.testing.assert_close(features.text[b, k][mask[b, k]], text, **CLOSE)
            torch.testing.assert_close(features.readout[b, k], readout, **CLOSE)


@torch.no_grad()
def test_padding_has_no_influence(backbone):
    images, tokens, mask = make_inputs(seed=1)
    before = backbone(images, tokens, mask)
    after = backbone(images, torch.where(mask, tokens, 3), mask)
    wider = torch.cat([torch.full((2, 3, 4), 7), tokens], dim=2)
    more = backbone(images, wider, torch.cat([torch.zeros(2, 3, 4, dtype=torch.bool), mask], dim=2))
    for other in (after, more):
        torch.testing.assert_close(before.readout, other.readout, **CLOSE)
        torch.testing.assert_close(before.image, other.image, **CLOSE)
        torch.testing.assert_close(before.text[mask], other.text[:, :, -5:][mask], **CLOSE)


@torch.no_grad()
def test_texts_do_not_see_each_other(backbone):
    images, tokens, mask = make_inputs(seed=2)
    mask[:] = True
    before = backbone(images, tokens, mask)
    tokens[:, 1] = (tokens[:, 1] - 4 + 5) % (VOCABULARY - 4) + 4
    after = backbone(images, tokens, mask)
    for k in (0, 2):
        torch.testing.assert_close(before.readout[:, k], after.readout[:, k], **CLOSE)
        torch.testing.assert_close(before.text[:, k], after.text[:, k], **CLOSE)
    torch.testing.assert_close(before.image, after.image, **CLOSE)
    assert (before.readout[:, 1] - after.readout[:, 1]).abs().max() > 1e-2


@torch.no_grad()
def test_images_words_and_their_order_matter(backbone):
    images, tokens, mask = make_inputs(seed=3)
    mask[:] = True
    readout = backbone(images, tokens, mask).readout
    for other_images, other_tokens in ((255 - images, tokens), (images.flip(1), tokens), (images, tokens.flip(2))):
        assert (backbone(other_images, other_tokens, mask).readout - readout).abs().max() > 1e-3


@torch.no_grad()
def test_a_batch_is_its_rows(backbone):
    images, tokens, mask = make_inputs(b=3)
    whole = backbone(images, tokens, mask)
    for i in range(3):
        alone = backbone(images[i : i + 1], tokens[i : i + 1], mask[i : i + 1])
        torch.testing.assert_close(whole.readout[i], alone.readout[0], **CLOSE)
        torch.testing.assert_close(whole.vision[i], alone.vision[0], **CLOSE)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_the_mask_by_its_rule(data):
    """Position by position: who may see whom, and where each stands."""
    b, k, length = (data.draw(st.integers(1, 3)) for _ in range(3))
    prefix, readouts = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 3))
    real = torch.tensor(data.draw(st.lists(st.booleans(), min_size=b * k * length, max_size=b * k * length)))
    real = real.reshape(b, k, length)
    two_way = data.draw(st.booleans())
    steps, packing = pack(prefix, real, readouts, two_way=two_way)
    mask = unpacked(packing, torch.float32) == 0.0
    each = length + readouts
    total = prefix + k * each
    assert mask.shape == (b, 1, total, total)
    for i in range(b):

        def place(q, i=i):
            """(text or None for the prefix, place in it, real or not)."""
            if q < prefix:
                return None, q, True
            text, inner = divmod(q - prefix, each)
            return text, inner, inner >= length or bool(real[i, text, inner])

        for q in range(total):
            text, inner, valid = place(q)
            if valid and text is not None:
                assert steps[i, q - prefix] == sum(place(prefix + text * each + j)[2] for j in range(inner))
            for seen in range(total):
                other, other_inner, other_valid = place(seen)
                if seen == q:
                    expected = True
                elif text is None:
                    expected = other is None and (two_way or other_inner < inner)
                elif other is None:
                    expected = True
                else:
                    expected = other == text and other_inner < inner and other_valid
                assert bool(mask[i, 0, q, seen]) == expected, (q, seen)


@pytest.mark.parametrize("attention", ["sdpa", "packed"])
def test_kernels_agree(attention):
    """Features and gradients, against the plain kernel with the whole mask."""
    plain, other = make(attention="eager"), make(attention=attention)
    other.load_state_dict(plain.state_dict())
    inputs = make_inputs()
    for name in ("vision", "image", "text", "readout"):
        torch.testing.assert_close(getattr(plain(*inputs), name), getattr(other(*inputs), name), **CLOSE)
    for model in (plain, other):
        features = model(*inputs)
        (features.readout.square().sum() + features.text[inputs[2]].square().sum()).backward()
    for (name, one), two in zip(plain.named_parameters(), other.parameters()):
        if one.grad is not None:
            torch.testing.assert_close(one.grad, two.grad, atol=1e-4, rtol=1e-3, msg=name)


@torch.no_grad()
def test_watched_attention_is_the_plain_kernels():
    plain, packed = make(attention="eager"), make(attention="packed")
    packed.load_state_dict(plain.state_dict())
    images, tokens, mask = make_inputs()
    seen = []
    handles = [
        layer.self_attn.register_forward_hook(lambda module, inputs, output: seen.append(output[1]))
        for layer in plain.family.language_model.layers
    ]
    plain(images, tokens, mask)
    for handle in handles:
        handle.remove()
    watched = packed(images, tokens, mask, (1, 0)).attention
    m, each = 2 * packed.token_grid[0] * packed.token_grid[1], tokens.shape[2] + 3
    for layer, share in zip((1, 0), watched):
        expected = seen[layer][:, 0, m:, :m].unflatten(1, (3, each))[:, :, : tokens.shape[2]]
        torch.testing.assert_close(share, expected, **CLOSE)
    with pytest.raises(ConfigError, match="attention=packed"):
        plain(images, tokens, mask, (0,))
    with pytest.raises(ConfigError, match="layers to watch from 0 to 1"):
        packed(images, tokens, mask, (2,))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_model_loads_as_it_was(backbone, tmp_path, dtype):
    """Published weights are bf16; they are loaded as float32, with the values they have."""
    backbone = make(backbone.vlm.config.model_type)
    for parameter in backbone.parameters():
        parameter.copy_(parameter.to(dtype).float())
    copy.deepcopy(backbone.vlm).to(dtype).save_pretrained(tmp_path)
    loaded = HFBackbone(path=str(tmp_path), readouts=3).eval()
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    loaded.readouts.copy_(backbone.readouts)
    inputs = make_inputs()
    one, two = backbone(*inputs), loaded(*inputs)
    for name in ("vision", "image", "text", "readout"):
        torch.testing.assert_close(getattr(one, name), getattr(two, name), rtol=0, atol=0)
    assert one.grid == two.grid
    again = HFBackbone(config={**loaded.resolved_config(), "_resolved": True}, vocab_size=999, readouts=3).eval()
    again.load_state_dict(loaded.state_dict())
    torch.testing.assert_close(again(*inputs).readout, one.readout, rtol=0, atol=0)


def test_what_cannot_be_loaded(tmp_path, monkeypatch):
    with pytest.raises(CheckpointError, match=r"no model at .*nothing: no such folder"):
        HFBackbone(path=str(tmp_path / "nothing"))
    with pytest.raises(CheckpointError, match=r"is no model: expected config.json.*got an empty folder"):
        HFBackbone(path=str(tmp_path))
    llama = LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=9)
    AutoModelForCausalLM.from_config(llama).save_pretrained(tmp_path / "llama")
    with pytest.raises(CheckpointError, match=r"cannot load a backbone from .*llama.*: expected config.json"):
        HFBackbone(path=str(tmp_path / "llama"))
    with pytest.raises(CheckpointError, match=r"no model at .*lama: no such folder. Did you mean 'llama'"):
        load_tokenizer(str(tmp_path / "lama"))
    with pytest.raises(CheckpointError, match="a file, no folder of a model"):
        load_tokenizer(str(tmp_path / "llama" / "config.json"))
    with pytest.raises(CheckpointError, match=r"llama has no tokenizer: expected one of tokenizer.json"):
        load_tokenizer(str(tmp_path / "llama"))
    (tmp_path / "llama" / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"cannot load a tokenizer from .*llama.*: expected config.json"):
        load_tokenizer(str(tmp_path / "llama"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="a hub name that can be reached; without network, download 'no/such'"):
        HFBackbone(path="no/such")
    with pytest.raises(ConfigError, match="either path"):
        HFBackbone()
    with pytest.raises(ConfigError, match="either path"):
        HFBackbone(path="x", config={})
    with pytest.raises(ConfigError, match="model_type"):
        HFBackbone(config={"scale_factor": 2})
    with pytest.raises(ConfigError, match="no model type 'smolvml'"):
        HFBackbone(config={"model_type": "smolvml"})


def test_a_model_of_an_unknown_family_is_refused():
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 2}
    config = {"model_type": "llava", "image_seq_length": 4, "text_config": text}
    config["vision_config"] = {"model_type": "clip_vision_model", "image_size": 16, "patch_size": 8, **vision}
    with pytest.raises(ConfigError, match=r"llava.*expected one of .*paligemma"):
        HFBackbone(config=config, vocab_size=20)


def test_damaged_or_missing_weights_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    make().vlm.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    gone = next(k for k in weights if "text_model" in k and "q_proj" in k)
    save_file({k: v for k, v in weights.items() if k != gone}, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"1 weights are missing.*q_proj"):
        HFBackbone(path=str(tmp_path))
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="cannot load a backbone"):
        HFBackbone(path=str(tmp_path))


@torch.no_grad()
def test_pixels_are_normalised_by_the_cameras_mean_image():
    backbone = make()
    images = make_inputs(b=8)[0]
    backbone.fit_pixels(images)
    pixels = (images.permute(0, 1, 4, 2, 3).float() / 255 - backbone.pixel_mean) / backbone.pixel_std
    assert backbone.pixel_mean.shape == (2, 3, SIZE, SIZE)
    torch.testing.assert_close(pixels.mean(0), torch.zeros_like(pixels[0]), atol=1e-5, rtol=0)
    assert pixels.std().item() == pytest.approx(1.0, abs=1e-3)
    backbone.fit_pixels(images[:1].expand(4, -1, -1, -1, -1))  # all frames alike: no division by zero
    assert backbone(images[:1], *(x[:1] for x in make_inputs()[1:])).readout.isfinite().all()


@torch.no_grad()
def test_images_of_another_size_are_resized():
    backbone = make()
    _, tokens, mask = make_inputs()
    flat = torch.full((2, 2, 50, 70, 3), 200, dtype=torch.uint8)
    same = torch.full((2, 2, SIZE, SIZE, 3), 200, dtype=torch.uint8)
    torch.testing.assert_close(
        backbone(flat, tokens, mask).readout, backbone(same, tokens, mask).readout, atol=1e-4, rtol=1e-4
    )
