"""What a generated subgoal takes from images to actions, in a folder: reader, generator, policy, progress filter.

A folder: ``config.json`` (what to build), ``model.safetensors`` (averaged weights and scales), ``encoder/`` (the
pretrained model that reads instructions), ``others.safetensors`` (frames of other episodes, for an honesty check),
``meta.json`` (versions, data, compute, metrics, checksums), and for people ``samples.png``. Loading is strict.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxtyping import Float, UInt8
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ...errors import BrachiumError, CheckpointError, NotFoundError
from ...spec import EmbodimentSpec
from ..checkpoint import checksums, replace_folder, versions
from ..recipe import require_trusted
from .folder import KINDS
from .generator import FrameGenerator
from .goal_policy import GoalPolicy
from .others import Others
from .progress import ProgressFilter
from .reading import Reader, Reading

FORMAT = 2
FILES = ("config.json", "meta.json", "model.safetensors", "encoder")


class SubgoalSystem(nn.Module):
    """A generator of future frames, a policy that makes them true, and a filter of what the generator offers.

    Args:
        kind: One of `KINDS`.
        embodiment: Who acts.
        cameras: Cameras whose future is generated; the policy sees the present of all.
        reader: Reads instructions; not among the weights, for it is never trained here.
        generator: Arguments of `FrameGenerator` beside cameras, words and roles.
        policy: Arguments of `GoalPolicy` beside the embodiment, vision and the size of goals.
        progress: Arguments of `ProgressFilter`, likewise.
    """

    def __init__(
        self,
        *,
        kind: str,
        embodiment: EmbodimentSpec,
        cameras: Sequence[str],
        reader: Reader,
        generator: Mapping[str, Any],
        policy: Mapping[str, Any],
        progress: Mapping[str, Any],
    ) -> None:
        super().__init__()
        if kind not in KINDS:
            raise CheckpointError(f"expected kind to be one of {KINDS}, got {kind!r}")
        reader.require(embodiment.camera_names)
        require_trusted(dict(policy))
        self.kind, self.embodiment, self.cameras = kind, embodiment, tuple(cameras)
        if not self.cameras:
            raise CheckpointError("expected at least one camera whose future is generated, got none")
        for name in self.cameras:
            embodiment.camera(name)
        self.views = tuple(embodiment.camera_names.index(name) for name in self.cameras)
        self.options = {"generator": dict(generator), "policy": dict(policy), "progress": dict(progress)}
        told = {"cameras": len(self.cameras), "words": reader.width, "roles": reader.roles}
        size = int(generator["size"])
        self.generator = FrameGenerator(**generator, **told)
        self.policy = GoalPolicy(
            embodiment=embodiment,
            vision=reader.vision,
            grid=reader.grid[0],
            goal_size=size,
            goals=self.cameras,
            **policy,
        )
        self.progress = ProgressFilter(size=size, **progress, **told)
        self.others: Others | None = None
        self._reader = (reader,)  # in a tuple, so that its weights are not counted as this module's

    @property
    def reader(self) -> Reader:
        """What reads instructions."""
        return self._reader[0]

    def read(self, images: UInt8[Tensor, "b c height width 3"], texts: Sequence[str]) -> Reading:
        """What texts say about images, in the cameras whose future is generated."""
        return self.reader(images, texts).of(self.views)

    def see(self, images: UInt8[Tensor, "b c height width 3"]) -> Float[Tensor, "b c p v"]:
        """The present as the policy takes it."""
        return self.reader.pretrained.patches(images)

    def save(self, folder: Path, meta: Mapping[str, Any]) -> Path:
        """Write the folder; it appears whole or not at all, and replaces an older one."""
        temporary = folder.with_name(folder.name + ".partial")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        self.reader.pretrained.save(temporary / "encoder")
        if self.others is not None:
            self.others.save(temporary)
        save_file({k: v.contiguous() for k, v in self.state_dict().items()}, temporary / "model.safetensors")
        config = {"format": FORMAT, "kind": self.kind, "embodiment": self.embodiment.to_dict()}
        config |= {"cameras": list(self.cameras), **self.options}
        (temporary / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        told = {**versions(), "sha256": checksums(temporary), **meta}
        (temporary / "meta.json").write_text(json.dumps(told, indent=1, default=str) + "\n")
        replace_folder(folder, temporary)
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> SubgoalSystem:
        """Load a folder that `save` wrote, in evaluation mode.

        Raises:
            NotFoundError: No such folder.
            CheckpointError: Incomplete, damaged, edited, of another format, or weights that do not fit.
        """
        path = Path(folder)
        if not path.is_dir():
            raise NotFoundError(
                f"no checkpoint at {path}. Expected a folder that brachium train-visual or train-video made"
            )
        missing = [name for name in FILES if not (path / name).exists()]
        if missing:
            raise CheckpointError(
                f"{path} is no checkpoint of brachium train-visual or train-video: expected {list(FILES)}, missing "
                f"{missing}"
            )
        try:
            config = json.loads((path / "config.json").read_text())
            told = json.loads((path / "meta.json").read_text())
            if config["format"] != FORMAT:
                raise CheckpointError(f"{path}: expected format {FORMAT}, got {config['format']}: train anew")
            parts = {name: config[name] for name in ("generator", "policy", "progress")}
            embodiment = EmbodimentSpec.from_dict(config["embodiment"])
            found = cls(
                kind=config["kind"],
                embodiment=embodiment,
                cameras=config["cameras"],
                reader=Reader.load(str(path / "encoder")),
                **parts,
            )
            found.others = Others.load(path)
            found.load_state_dict(load_file(path / "model.safetensors"), strict=True)
        except SafetensorError as error:
            raise CheckpointError(f"{path / 'model.safetensors'} is damaged: {error}") from error
        except BrachiumError:
            raise
        except Exception as error:  # whatever a damaged description or another version's leads to
            raise CheckpointError(f"{path}: cannot build the model: {type(error).__name__}: {error}") from error
        now = checksums(path)
        edited = [name for name, digest in dict(told.get("sha256", {})).items() if now.get(name) != digest]
        if edited:
            raise CheckpointError(f"{path}: {edited} are not the files that were saved: train anew, or copy them again")
        return found.eval()
