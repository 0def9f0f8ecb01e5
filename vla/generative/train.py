"""The verbs ``brachium train-visual`` and ``train-video``: from demonstrations to generated subgoals and a policy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..optim import Optimization
from .generator import Guidance
from .parts import Plan, node_of, train_parts
from .stages import Augmentation


def train_visual(
    *,
    store: str,
    head: Callable[..., Any],
    editor: Optimization,
    policy: Optimization,
    progress: Optimization,
    augmentation: Augmentation,
    guidance: Guidance,
    encoder: str = "nano",
    init: str | None = None,
    out: str = "outputs/visual",
    cameras: Sequence[str] = ("front",),
    size: int = 48,
    ahead: int = 8,
    spread: int = 1,
    goals: int = 12,
    action_horizon: int = 4,
    widths: Sequence[int] = (64, 128, 192),
    patch: int = 4,
    width: int = 64,
    heldout: float = 0.1,
    samples: int = 8,
    resume: bool = False,
) -> int:
    """Train an editor of images that makes subgoals, and a policy without language that reaches them (SuSIE).

    Parts are trained one after the other: editor, policy, progress filter. A part that is finished is not trained again
    by the same command with ``resume=true``, one that was interrupted goes on to the same numbers, bit for bit.

    Args:
        store: Episode store with demonstrations.
        head: Makes the policy's action head.
        editor: Training of the editor.
        policy: Training of the policy.
        progress: Training of the filter that ranks candidates.
        augmentation: What is done to inputs in training.
        guidance: How samples are drawn for ``samples.png``; the planner has its own.
        encoder: Pretrained model that reads instructions: ``nano``, which comes with brachium, or a folder that
            ``brachium pretrain`` made.
        init: Checkpoint of ``brachium train-visual`` that all parts go on from, for example on more data; null to begin
            from nothing.
        out: Folder for the checkpoint, logs and saves.
        cameras: Cameras whose future is generated; the present is seen by all.
        size: Side of generated images [pixels].
        ahead: Steps from the present to a subgoal.
        spread: Targets of the editor lie `ahead` steps ahead, give or take so many.
        goals: Goals of the policy lie 1 to this many steps ahead.
        action_horizon: Steps of a chunk of actions.
        widths: Channels of the editor's levels.
        patch: Side of the patches that the editor works on [pixels].
        width: Channels of the policy.
        heldout: Share of episodes kept for held-out losses and samples.
        samples: Held-out samples to draw.
        resume: Go on from what is saved in `out`.
    """
    generator = {"size": size, "frames": 1, "steps": ahead, "widths": list(widths), "patch": patch}
    acting = {"head": node_of(head), "action_horizon": action_horizon, "width": width}
    plan = Plan(
        "visual",
        store,
        encoder,
        out,
        list(cameras),
        generator,
        acting,
        augmentation,
        goals,
        spread,
        heldout,
        resume,
        editor.seed,
    )
    if init is not None:
        plan.begin_with(init)
    return train_parts(plan, {"generator": editor, "policy": policy, "progress": progress}, guidance, samples)


def train_video(
    *,
    store: str,
    head: Callable[..., Any],
    video: Optimization,
    inverse: Optimization,
    progress: Optimization,
    augmentation: Augmentation,
    guidance: Guidance,
    encoder: str = "nano",
    init: str | None = None,
    video_init: str | None = None,
    out: str = "outputs/video",
    cameras: Sequence[str] = ("front",),
    size: int = 48,
    frames: int = 6,
    steps: int = 2,
    action_horizon: int = 4,
    widths: Sequence[int] = (64, 128, 192),
    patch: int = 4,
    width: int = 64,
    heldout: float = 0.1,
    samples: int = 8,
    resume: bool = False,
) -> int:
    """Train a model of short videos, and inverse dynamics that follow them (UniPi).

    Parts are trained one after the other: video model, inverse dynamics, progress filter. A part that is finished is
    not trained again by the same command with ``resume=true``, one that was interrupted goes on to the same numbers.

    Args:
        store: Episode store with demonstrations.
        head: Makes the action head of the inverse dynamics.
        video: Training of the video model.
        inverse: Training of the inverse dynamics.
        progress: Training of the filter that ranks candidates by their last frame.
        augmentation: What is done to inputs in training.
        guidance: How samples are drawn for ``samples.png``; the planner has its own.
        encoder: Pretrained model that reads instructions: ``nano``, which comes with brachium, or a folder.
        init: Checkpoint of ``brachium train-visual`` that all parts begin with, as far as they are alike: the editor
            becomes a video model whose layers along time begin as the identity; null to begin from nothing.
        video_init: Checkpoint of ``brachium train-video`` that the video model goes on from instead.
        out: Folder for the checkpoint, logs and saves.
        cameras: Cameras whose future is generated; the present is seen by all.
        size: Side of generated images [pixels].
        frames: Frames of a video, beside the present.
        steps: Steps of control from one frame to the next.
        action_horizon: Steps of a chunk of actions.
        widths: Channels of the video model's levels.
        patch: Side of the patches that the video model works on [pixels].
        width: Channels of the inverse dynamics.
        heldout: Share of episodes kept for held-out losses and samples.
        samples: Held-out samples to draw.
        resume: Go on from what is saved in `out`.
    """
    generator = {"size": size, "frames": frames, "steps": steps, "widths": list(widths), "patch": patch}
    acting = {"head": node_of(head), "action_horizon": action_horizon, "width": width}
    # The next frame is 1 to `steps` steps ahead when it is pursued; a little more where the robot is slower.
    plan = Plan(
        "video",
        store,
        encoder,
        out,
        list(cameras),
        generator,
        acting,
        augmentation,
        steps + 1,
        0,
        heldout,
        resume,
        video.seed,
    )
    if init is not None:
        plan.begin_with(init)
    if video_init is not None:
        plan.begin_with(video_init, ("generator",))
    return train_parts(plan, {"generator": video, "policy": inverse, "progress": progress}, guidance, samples)
