"""A policy's chunks, faster: what may be computed, compiled or recorded beforehand, and in which precision.

Nothing of it changes what a checkpoint holds; results are those of the plain model within the tolerance of the
precision (float32: about 1e-5 of an action's range; bfloat16 and float8: see ``docs/performance.md``).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..console import log
from ..errors import ConfigError, did_you_mean
from ..spec import Guidance, Observation
from .backbones.hf import HFBackbone
from .backbones.resize import Images
from .checkpoint import predict
from .float8 import use_float8
from .heads.expert import ExpertHead
from .heads.expert_steps import Seen, StepPlan, step
from .heads.solvers import Guide
from .model import VLAModel, stack_images
from .parallel import repeated_layers

PRECISIONS = ("float32", "bf16", "fp8")
MULTIPLE = 16
"""Prompts are cut to a multiple of so many tokens: few shapes, and little padding that is read for nothing."""
SHAPES = 256
"""Shapes and layers that one piece of code is compiled for: sizes of batches, lengths of prompts, every layer."""
WARM = 3
"""Chunks before one is recorded: libraries choose their kernels, and allocate, in the first."""


@dataclass(frozen=True, kw_only=True)
class Acceleration:
    """How chunks are computed.

    Args:
        precision: ``float32``, ``bf16`` (weights too), or ``fp8``: bf16, and the language model's linear layers in
            float8 (e4m3), which needs an NVIDIA GPU of compute capability 8.9 or later.
        compile: Compile what repeats (torch.compile): on a CPU a flow-matching expert's solver step, on a GPU also the
            layers of vision tower and language model. The first chunks take tens of seconds.
        graph: Record the whole chunk as a CUDA graph, once for each shape, and play it. CUDA alone.
    """

    precision: str = "float32"
    compile: bool = False
    graph: bool = False

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ConfigError(f"unknown precision {self.precision!r}. {did_you_mean(self.precision, PRECISIONS)}")

    def check(self, device: torch.device) -> None:
        """Raise ConfigError for what a device cannot do."""
        if self.graph and device.type != "cuda":
            raise ConfigError(f"acceleration.graph=true records a CUDA graph: expected device=cuda, got {device.type}")
        if self.precision == "fp8":
            least = (8, 9)
            if device.type != "cuda" or torch.cuda.get_device_capability(device) < least:
                raise ConfigError(
                    "acceleration.precision=fp8 needs an NVIDIA GPU of compute capability 8.9 or later (Ada, Hopper, "
                    f"Blackwell), got {device.type}. Type: acceleration.precision=bf16"
                )


PLAIN = Acceleration()


class QuickSampler:
    """Chunks of a model that has been made fast. The model is changed, and is good for nothing else afterwards.

    Args:
        model: On its device; its weights stay as they are from now on.
        embodiment: Whose chunks.
        acceleration: How.

    Raises:
        ConfigError: The device cannot do it.
    """

    def __init__(self, model: VLAModel, embodiment: str, acceleration: Acceleration) -> None:
        acceleration.check(model.device)
        backbone: Any = model.encoder.backbone
        hf = isinstance(backbone, HFBackbone)
        if acceleration.graph and (not hf or model.recipe.points or len(backbone.family.positions(1)[0]) > 1):
            raise ConfigError(
                "acceleration.graph=true records models on SmolVLM and PaliGemma that do not point; this one takes "
                "numbers from the host on its way. Type: acceleration.graph=false"
            )
        if acceleration.precision == "fp8" and "language" not in getattr(backbone, "parts", {}):
            raise ConfigError(
                f"acceleration.precision=fp8 is for language models of transformers, got {type(backbone).__name__}. "
                "Type: acceleration.precision=bf16"
            )
        self._multiple = MULTIPLE if hf else None  # others place words by their column, and cannot be cut
        if acceleration.compile:
            torch._dynamo.config.recompile_limit = max(SHAPES, torch._dynamo.config.recompile_limit)
            whole = torch._dynamo.config.accumulated_recompile_limit
            torch._dynamo.config.accumulated_recompile_limit = max(16 * SHAPES, whole)
        self.model, self.embodiment, self.acceleration = model.eval(), embodiment, acceleration
        self.spec = model.spec(embodiment)
        self._recorded: dict[Any, _Recording] = {}
        self._records = acceleration.graph and not getattr(model.head, "discrete", False)
        if acceleration.graph and not self._records:
            log(f"{type(model.head).__name__} decodes token by token: its chunks are not recorded as a CUDA graph")
        if acceleration.precision != "float32":
            _use_bf16(model)
        if acceleration.precision == "fp8":
            use_float8(model.encoder.backbone.parts["language"])
        self._plan: StepPlan | None = None
        if isinstance(model.head, ExpertHead):
            with torch.no_grad(), self._autocast():
                self._plan = StepPlan(model.head, embodiment)
            if acceleration.compile:
                self._plan.step = _Compiled(self._plan)
        elif acceleration.compile and hasattr(model.head, "net"):
            model.head.net.compile()
        if acceleration.compile and model.device.type == "cuda":
            for layer in repeated_layers(model.encoder):
                layer.compile(dynamic=False)

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.acceleration.precision == "float32":
            return nullcontext()
        # Without a graph weights are cast once a chunk; inside one the cache would hold what the graph owns.
        return torch.autocast(self.model.device.type, torch.bfloat16, cache_enabled=not self._records)

    @torch.no_grad()
    def predict(self, observation: Observation, noise: np.ndarray, guidance: Guidance | None = None) -> np.ndarray:
        """Chunks float32 (b, h, a), as `checkpoint.predict` gives."""
        model, device = self.model, self.model.device
        if self._plan is not None:
            model.head.plans[self.embodiment] = self._plan
        images = stack_images(observation.images, self.spec, device)
        state = torch.from_numpy(np.array(observation.state, np.float32)).to(device)
        tokens = model.tokens(observation.instruction, state, self.embodiment, multiple=self._multiple)
        guide = None if guidance is None else model.guide(guidance, self.embodiment, state)
        given = (images, tokens, state, torch.from_numpy(np.asarray(noise, np.float32)).to(device), guide)
        differentiates = guide is not None and guide.gradient == "vjp" and not model.max_delay
        found = self._played(given) if self._records and not differentiates else self._compute(*given)
        return np.asarray(found.float().cpu().numpy())

    def _compute(self, images: Images, tokens: Tensor, state: Tensor, noise: Tensor, guide: Guide | None) -> Tensor:
        with self._autocast():
            encoding = self.model.encode(images, tokens, state, self.embodiment)
            return self.model.chunk(encoding, state, noise, self.embodiment, guide)

    def _played(self, given: tuple[Any, ...]) -> Tensor:
        """The chunk by the graph of its shapes, which is recorded when they come for the first time."""
        *tensors, guide = given
        leaves, shape = tree_flatten(tensors)
        how = None
        if guide is not None:
            leaves += [guide.target, guide.weight]
            how = (guide.limit, guide.gradient)
        key = (tuple(tuple(leaf.shape) for leaf in leaves), how)
        if key not in self._recorded:

            def run(held: list[Tensor]) -> Tensor:
                led = None
                if how is not None:
                    led = Guide(target=held[-2], weight=held[-1], limit=how[0], gradient=how[1])
                images, tokens, state, noise = tree_unflatten(held[: shape.num_leaves], shape)
                return self._compute(images, tokens, state, noise, led)

            self._recorded[key] = _Recording(run, leaves)
        return self._recorded[key](leaves)


class _Recording:
    """A function of tensors as a CUDA graph."""

    def __init__(self, run: Callable[[list[Tensor]], Tensor], given: list[Tensor]) -> None:
        self.held = [tensor.clone() for tensor in given]
        with torch.cuda.device(self.held[0].device):
            beside = torch.cuda.Stream()
            beside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(beside):
                for _ in range(WARM):
                    run(self.held)
            torch.cuda.current_stream().wait_stream(beside)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.found = run(self.held)

    def __call__(self, given: list[Tensor]) -> Tensor:
        """Play it on other inputs of the same shapes."""
        with torch.cuda.device(self.held[0].device):
            for mine, theirs in zip(self.held, given):
                mine.copy_(theirs)
            self.graph.replay()
        return self.found


class _Compiled:
    """A plan's step, compiled; what is differentiated (guidance by a vector-Jacobian product) takes the plain one."""

    def __init__(self, plan: StepPlan) -> None:
        self.plain = plan.step
        frozen = _Frozen(plan)
        # Weights that are constants can be laid out as the CPU's kernels want them; GPUs read them as they are.
        options: Any = {"freezing": True} if plan.weights.enter.device.type == "cpu" else None
        self.quick: Any = torch.compile(frozen, dynamic=False, fullgraph=True, options=options)

    def __call__(self, *args: Any) -> Tensor:
        found: Tensor = self.plain(*args) if torch.is_grad_enabled() else self.quick(*args)
        return found


class _Frozen(nn.Module):
    """A plan's step with its weights as constants."""

    def __init__(self, plan: StepPlan) -> None:
        super().__init__()
        leaves, self.shape = tree_flatten(plan.weights)
        self.names = [f"weight{k}" if leaf is not None else "" for k, leaf in enumerate(leaves)]
        for name, leaf in zip(self.names, leaves):
            if name:
                self.register_buffer(name, leaf.detach())
        self.kinds, self.eps = plan.kinds, plan.head.norm.eps

    def forward(self, x: Tensor, told: Tensor | None, condition: Any, seen: Seen) -> Tensor:
        """See `step`."""
        held = [getattr(self, name) if name else None for name in self.names]
        return step(tree_unflatten(held, self.shape), self.kinds, self.eps, x, told, condition, seen)


def _use_bf16(model: VLAModel) -> None:
    """Weights of matrices, which are most of them, in bfloat16; norms and what stands alone keep their digits."""
    point = model.encoder.point_readout  # computes in float32 wherever it is: places need the digits
    exact = set() if point is None else set(point.modules())
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.Embedding)) and module not in exact:
            module.to(torch.bfloat16)


def sampler_of(
    model: VLAModel, embodiment: str, acceleration: Acceleration | None
) -> Callable[[Observation, np.ndarray, Guidance | None], np.ndarray]:
    """What predicts a model's chunks: itself, or with an acceleration a `QuickSampler`."""
    if acceleration is not None and acceleration != PLAIN:
        return QuickSampler(model, embodiment, acceleration).predict
    return lambda observation, noise, guidance: predict(model, embodiment, observation, noise, guidance)
