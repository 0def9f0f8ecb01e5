"""Every family of models: our packed pass against the own forward of transformers; a step of training each."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from brachium.__main__ import main
from brachium.errors import CheckpointError, ConfigError
from brachium.vla.backbones.hf import HFBackbone
from brachium.vla.checkpoint import load_checkpoint
from brachium.vla.tokenizer import word_tokenizer

from .conftest import TEXTS

VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "vocab_size": 40}
SIGLIP = {"image_size": 16, "patch_size": 4, **VISION}
GEMMA = {**TEXT, "num_key_value_heads": 1, "head_dim": 12, "pad_token_id": 0}
QWEN_TEXT = {**TEXT, "num_key_value_heads": 1, "max_position_embeddings": 256}
QWEN_VISION = {"depth": 2, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
MARKERS = {"image_token_id": 1, "video_token_id": 2, "vision_start_token_id": 3, "vision_end_token_id": 4}
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2]}
CONFIGS = {
    "smolvlm": {
        "scale_factor": 2,
        "image_token_id": 1,
        "pad_token_id": 0,
        "vision_config": SIGLIP,
        "text_config": {"model_type": "llama", "num_key_value_heads": 1, **TEXT},
    },
    "paligemma": {
        "projection_dim": 24,
        "image_token_id": 1,
        "vision_config": {"model_type": "siglip_vision_model", "projection_dim": 24, **SIGLIP},
        "text_config": {"model_type": "gemma", **GEMMA},
    },
    "paligemma2": {
        "projection_dim": 24,
        "image_token_id": 1,
        "vision_config": {"model_type": "siglip_vision_model", "projection_dim": 24, **SIGLIP},
        "text_config": {"model_type": "gemma2", "query_pre_attn_scalar": 12, "sliding_window": 64, **GEMMA},
    },
    "qwen2_5_vl": {
        **MARKERS,
        "vision_config": {
            **QWEN_VISION,
            "hidden_size": 16,
            "intermediate_size": 24,
            "out_hidden_size": 24,
            "window_size": 16,
            "fullatt_block_indexes": [1],
        },
        "text_config": {**QWEN_TEXT, "rope_parameters": ROPE, "rope_scaling": ROPE},
    },
    "qwen3_vl": {
        **MARKERS,
        "vision_config": {
            **QWEN_VISION,
            "hidden_size": 16,
            "intermediate_size": 24,
            "out_hidden_size": 24,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0, 1],
        },
        "text_config": {**QWEN_TEXT, "head_dim": 12, "rope_parameters": ROPE, "rope_scaling": ROPE},
    },
}
SIDE = {"smolvlm": 16, "paligemma": 16, "paligemma2": 16, "qwen2_5_vl": 24, "qwen3_vl": 24}
CLOSE = {"atol": 6e-5, "rtol": 1e-4}


def make_vlm(name, seed=0):
    """A random model of transformers, with weights large enough that a wrong detail shows."""
    torch.manual_seed(seed)
    model_type = "paligemma" if name == "paligemma2" else name
    vlm = AutoModelForImageTextToText.from_config(AutoConfig.for_model(model_type, **CONFIGS[name]))
    with torch.no_grad():
        for parameter in vlm.parameters():
            if parameter.ndim > 1:
                parameter.mul_(5.0)
    return vlm.eval()


@pytest.fixture(scope="module", params=list(CONFIGS))
def saved(request, tmp_path_factory):
    """(name, folder, model) of each family."""
    folder = tmp_path_factory.mktemp(request.param)
    vlm = make_vlm(request.param)
    vlm.save_pretrained(folder)
    word_tokenizer(TEXTS).save_pretrained(folder)
    return request.param, folder, vlm


def own_forward(name, vlm, backbone, images, words):
    """Last states by the model's own forward over image placeholders and words."""
    pixels = backbone.normalise(images[None]).flatten(0, 1)
    n, side = len(pixels), SIDE[name]
    if name == "smolvlm":
        ids = torch.cat([torch.ones(4 * n, dtype=torch.long), words])[None]
        return vlm.model(input_ids=ids, pixel_values=pixels[None]).last_hidden_state[0]
    if name.startswith("paligemma"):
        ids = torch.cat([torch.ones(16 * n, dtype=torch.long), words])[None]
        kinds = (ids != 1).long()  # images see each other, words are causal
        return vlm.model(input_ids=ids, pixel_values=pixels, token_type_ids=kinds).last_hidden_state[0]
    rows = side // 4
    patches = []
    for image in pixels:  # patch by patch, in groups of two by two
        for y in range(0, rows, 2):
            for x in range(0, rows, 2):
                for dy in (0, 1):
                    for dx in (0, 1):
                        patch = image[:, 4 * (y + dy) : 4 * (y + dy) + 4, 4 * (x + dx) : 4 * (x + dx) + 4]
                        patches.append(torch.stack([patch, patch], dim=1).flatten())
    one = torch.tensor([3, *[1] * (rows // 2) ** 2, 4])
    ids = torch.cat([one.repeat(n), words])[None]
    sizes = torch.tensor([[1, rows, rows]] * n)
    kinds = (ids == 1).int()
    inputs = {"input_ids": ids, "pixel_values": torch.stack(patches), "image_grid_thw": sizes}
    inputs |= {"mm_token_type_ids": kinds, "attention_mask": torch.ones_like(ids)}
    return vlm.model(**inputs).last_hidden_state[0]


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "packed"])
@pytest.mark.parametrize("cameras", [1, 2])
def test_a_packed_text_is_the_models_own_pass(saved, cameras, attention):
    name, folder, vlm = saved
    backbone = HFBackbone(path=str(folder), readouts=2, image_size=SIDE[name], attention=attention).eval()
    vlm.set_attn_implementation("eager" if attention == "packed" else "sdpa")  # the latter leaves out Gemma 2's softcap
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (1, cameras, 20, 20, 3), dtype=torch.uint8, generator=generator)
    tokens = torch.randint(5, 40, (1, 3, 6), generator=generator)
    mask = torch.arange(6) >= torch.tensor([0, 2, 5])[:, None]
    features = backbone(images, tokens, mask[None])
    for k in range(3):
        words = tokens[0, k][mask[k]]
        states = own_forward(name, vlm, backbone, images[0], words)
        torch.testing.assert_close(features.image[0], states[: -len(words)], **CLOSE)
        torch.testing.assert_close(features.text[0, k][mask[k]], states[-len(words) :], **CLOSE)
    logits = vlm.lm_head(features.text)
    if name == "paligemma2":
        logits = 30.0 * torch.tanh(logits / 30.0)
    torch.testing.assert_close(backbone.next_words(features.text), logits, rtol=0, atol=0)


@torch.no_grad()
def test_patches_lie_row_by_row(saved):
    """Changing one corner of the image changes the features of that corner's patch first and most."""
    name, folder, _ = saved
    backbone = HFBackbone(path=str(folder), image_size=SIDE[name]).eval()
    rows, columns = backbone.grid
    pixels = torch.zeros(1, 3, SIDE[name], SIDE[name])
    layers = [layer for layer in backbone.modules() if type(layer).__name__.endswith(("EncoderLayer", "VisionBlock"))]
    handles = [layer.register_forward_hook(lambda module, inputs, output: inputs[0]) for layer in layers]
    for row, column in ((0, columns - 1), (rows - 1, 0), (1, 2)):  # without layers, patches are alone
        changed = pixels.clone()
        changed[..., 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] = 1.0
        moved = (backbone.look(changed) - backbone.look(pixels)).abs().sum(-1)[0]
        assert moved.argmax() == row * columns + column
        assert (moved > 1e-6).sum() == 1
    for handle in handles:
        handle.remove()
    assert layers


@pytest.mark.parametrize("tune", ["frozen", "lora", "full"])
def test_one_override_trains_a_policy_on_any_of_them(saved, demos, tmp_path, tune):
    name, folder, vlm = saved
    size = [f"model.backbone.image_size={SIDE[name]}"] if name.startswith("qwen") else []
    command = [f"store={demos.path}", "model/backbone=hf", f"model.backbone.path={folder}", *size, f"out={tmp_path}"]
    command += [f"tune={tune}", "optimization.steps=1", "optimization.batch_size=4"]
    assert main(["train", *command]) == 0
    loaded = load_checkpoint(tmp_path / "checkpoint").encoder.backbone.vlm
    assert type(loaded) is type(vlm)
    before, after = vlm.get_input_embeddings().weight, loaded.get_input_embeddings().weight
    assert torch.equal(before, after) == (tune != "full")


def test_sizes_that_a_tower_cannot_take(saved):
    _, folder, _ = saved
    with pytest.raises(ConfigError, match=r"image_size: (expected a multiple|PaliGemma's)"):
        HFBackbone(path=str(folder), image_size=18)


def test_a_tokenizer_that_belongs_to_another_model(saved, demos, tmp_path, capsys):
    _, _, vlm = saved
    vlm.save_pretrained(tmp_path / "vlm")
    word_tokenizer([f"word{k}" for k in range(60)]).save_pretrained(tmp_path / "vlm")
    command = [f"store={demos.path}", "model/backbone=hf", f"model.backbone.path={tmp_path / 'vlm'}"]
    assert main(["train", *command, f"out={tmp_path / 'run'}"]) == 2
    assert "tokenizer has 64 tokens, but the model embeds 40" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match="do not belong together"):
        HFBackbone(path=str(tmp_path / "vlm"), vocab_size=64)
