"""Pipelines of diffusers as imaginers: tiny random ones, built on the spot."""

import json
from functools import partial

import numpy as np
import pytest
import torch

from brachium.errors import ConfigError, NotFoundError
from brachium.policies.planners.base import PlanContext
from brachium.policies.planners.diffusers_models import DiffusersEditor, DiffusersVideo
from brachium.policies.planners.video import VideoPlanner
from brachium.policies.planners.visual import VisualPlanner

from .test_subgoals import make_system, observation

diffusers = pytest.importorskip("diffusers", reason="the extra brachium[diffusers] is not installed")


def autoencoder(kind="AutoencoderKL"):
    torch.manual_seed(0)
    return getattr(diffusers, kind)(
        block_out_channels=[8, 8] if kind == "AutoencoderKL" else [32, 32],
        down_block_types=["DownEncoderBlock2D"] * 2,
        **({"up_block_types": ["UpDecoderBlock2D"] * 2, "norm_num_groups": 4} if kind == "AutoencoderKL" else {}),
        latent_channels=4,
        layers_per_block=1,
    )


@pytest.fixture(scope="module")
def pix2pix(tmp_path_factory):
    """InstructPix2Pix with a few thousand random weights, saved as a folder."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    folder = tmp_path_factory.mktemp("pix2pix")
    letters = [chr(k) for k in range(33, 127)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: k for k, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16)
    torch.manual_seed(0)
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(words),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=16,
            bos_token_id=len(words) - 2,
            eos_token_id=len(words) - 1,
        )
    )
    net = diffusers.UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        sample_size=16,
        in_channels=8,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    pipeline = diffusers.StableDiffusionInstructPix2PixPipeline(
        vae=autoencoder(),
        text_encoder=text,
        tokenizer=tokenizer,
        unet=net,
        scheduler=diffusers.DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(str(folder / "pipeline"))
    return str(folder / "pipeline")


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    """Stable Video Diffusion with a few thousand random weights, saved as a folder."""
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(0)
    net = diffusers.UNetSpatioTemporalConditionModel(
        block_out_channels=(32, 32),
        layers_per_block=1,
        sample_size=16,
        in_channels=8,
        out_channels=4,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        cross_attention_dim=16,
        num_attention_heads=4,
        projection_class_embeddings_input_dim=96,
        addition_time_embed_dim=32,
    )
    seeing = CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=16,
            projection_dim=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=224,
            intermediate_size=16,
            patch_size=56,
        )
    )
    pipeline = diffusers.StableVideoDiffusionPipeline(
        vae=autoencoder("AutoencoderKLTemporalDecoder"),
        image_encoder=seeing,
        unet=net,
        scheduler=diffusers.EulerDiscreteScheduler(prediction_type="v_prediction", use_karras_sigmas=True),
        feature_extractor=CLIPImageProcessor(),
    )
    folder = tmp_path_factory.mktemp("film") / "pipeline"
    pipeline.save_pretrained(str(folder))
    return str(folder)


def test_an_editor_of_diffusers_takes_the_place_of_the_own_one(pix2pix):
    editor = partial(DiffusersEditor, path=pix2pix, ahead=5, size=32, options={"num_inference_steps": 2})
    planner = VisualPlanner(system=make_system(), editor=editor, candidates=2)
    context = PlanContext(instruction="go right", observation=observation(), seed=4)
    found, again = planner.propose(context), planner.propose(context)
    first = found.candidates[0].subgoal
    assert first.images["front"].shape == (32, 32, 3)
    assert first.images["front"].dtype == np.uint8
    assert first.horizon == 5
    assert found.candidates[0].score >= found.candidates[1].score
    assert not np.array_equal(first.images["front"], found.candidates[1].subgoal.images["front"])
    assert np.array_equal(first.images["front"], again.candidates[0].subgoal.images["front"])


def test_a_video_model_of_diffusers_takes_the_place_of_the_own_one(film):
    options = {"num_frames": 4, "num_inference_steps": 1, "height": 32, "width": 32, "decode_chunk_size": 2}
    model = partial(DiffusersVideo, path=film, ahead=4, frames=2, size=32, options=options)
    planner = VideoPlanner(system=make_system(frames=3), model=model, candidates=1, follow=None)
    subgoal = planner.propose(PlanContext(instruction="go", observation=observation())).candidates[0].subgoal
    assert subgoal.frames["front"].shape == (2, 32, 32, 3)
    assert subgoal.steps == 2


def test_what_is_no_pipeline_or_does_not_fit_is_refused(pix2pix, tmp_path):
    system = make_system()
    with pytest.raises(NotFoundError, match="no diffusers pipeline"):
        DiffusersEditor(system=system, path=str(tmp_path))
    with pytest.raises(ConfigError, match=r"takes no \['guidance'\]"):
        DiffusersEditor(system=system, path=pix2pix, options={"guidance": 7.5})
    with pytest.raises(ConfigError, match="multiple of frames"):
        DiffusersVideo(system=system, path=pix2pix, ahead=5, frames=2)
    with pytest.raises(ConfigError, match="expected dtype"):
        DiffusersEditor(system=system, path=pix2pix, dtype="float12")
