"""What a run that was broken off goes on from: written whole or not at all, read with any number of processes.

Of weights that are in one piece it is a safetensors file. Of weights that are in parts (FSDP) it is a folder, which
each process writes its parts into (`torch.distributed.checkpoint`); a later run puts them together for as many
processes as it has, or for one.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..console import human_bytes, log
from ..errors import BrachiumError, CheckpointError, DiskSpaceError
from .parallel import Processes

NOTE = "save.json"


class Saves:
    """The save of one stage.

    Args:
        folder: Of the run.
        name: Of the stage.
        processes: Who save together.
    """

    def __init__(self, folder: Path, name: str, processes: Processes) -> None:
        self.processes, self.folder = processes, folder
        self.file, self.parts = folder / f"resume-{name}.safetensors", folder / f"resume-{name}"

    @property
    def path(self) -> Path | None:
        """Where there is a save; a crash while it was replaced leaves the old one."""
        old = self.parts.with_name(f"{self.parts.name}.old")
        places = (self.file, self.parts / NOTE, old / NOTE)
        return next((p if p == self.file else p.parent for p in places if p.exists()), None)

    def remove(self) -> None:
        """Remove the save, before any process writes another."""
        if self.processes.main:
            self.remove_here()
        self.processes.wait()

    def remove_here(self) -> None:
        """Remove the save; by one process."""
        self.file.unlink(missing_ok=True)
        for folder in (self.parts, *(self.parts.with_name(self.parts.name + end) for end in (".old", ".partial"))):
            shutil.rmtree(folder, ignore_errors=True)

    def write(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        """Write a save; the old one stays until the new one is whole.

        Raises:
            DiskSpaceError: No room. The old save is still there.
        """
        if self.processes.main:
            self.folder.mkdir(parents=True, exist_ok=True)
        problem = ""
        try:
            if any(hasattr(tensor, "to_local") for tensor in tensors.values()):
                self._write_parts(tensors, metadata)
            elif self.processes.main:
                self._write_file(tensors, metadata)
        except (OSError, SafetensorError) as error:
            problem = str(error)
        except BaseException as error:  # what torch.distributed.checkpoint raises is no Exception
            if type(error).__name__ != "CheckpointException":
                raise
            problem = str(error).strip().splitlines()[-1]
        if self.processes.any(bool(problem)):
            self._clear()
            size = sum(t.numel() * t.element_size() for t in tensors.values())
            raise DiskSpaceError(
                f"{self.folder}: a save of about {human_bytes(size)} could not be written "
                f"({problem or 'by another process'}); "
                + (f"the one before it stays at {self.path}" if self.path else "there is none before it")
            )

    def _write_file(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        temporary = self.file.with_suffix(".partial")
        save_file({k: v.contiguous() for k, v in tensors.items()}, temporary, dict(metadata))
        temporary.replace(self.file)
        shutil.rmtree(self.parts, ignore_errors=True)

    def _write_parts(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        from torch.distributed import checkpoint

        temporary = self.parts.with_name(f"{self.parts.name}.partial")
        if self.processes.main:
            shutil.rmtree(temporary, ignore_errors=True)
        self.processes.wait()
        with _quiet():
            checkpoint.save(dict(tensors), checkpoint_id=temporary, no_dist=self.processes.world == 1)
        problem: OSError | None = None
        try:
            if self.processes.main:
                self._put_in_place(temporary, metadata)
        except OSError as error:  # the others are waiting
            problem = error
        self.processes.wait()
        if problem is not None:
            raise problem

    def _put_in_place(self, temporary: Path, metadata: Mapping[str, str]) -> None:
        sizes = {file.name: file.stat().st_size for file in sorted(temporary.iterdir())}
        note = {"metadata": dict(metadata), "files": sizes, "processes": self.processes.world}
        (temporary / NOTE).write_text(json.dumps(note, indent=1) + "\n")
        old = self.parts.with_name(f"{self.parts.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if self.parts.exists():
            self.parts.rename(old)
        temporary.rename(self.parts)
        shutil.rmtree(old, ignore_errors=True)
        self.file.unlink(missing_ok=True)

    def _clear(self) -> None:
        """Remove what a save that failed has left."""
        if self.processes.main:
            self.file.with_suffix(".partial").unlink(missing_ok=True)
            shutil.rmtree(self.parts.with_name(f"{self.parts.name}.partial"), ignore_errors=True)

    # -- reading -------------------------------------------------------------------------------------------------------

    def read_metadata(self) -> tuple[dict[str, str], dict[str, tuple[int, ...]]]:
        """What was noted, and the shape of every tensor.

        Raises:
            CheckpointError: Damaged, or a part is missing.
        """
        path = self.path
        assert path is not None
        try:
            if path == self.file:
                with safe_open(path, "pt") as file:
                    shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
                    return dict(file.metadata()), shapes
            note = json.loads((path / NOTE).read_text())
            self._require_whole(path, note)
            from torch.distributed.checkpoint import FileSystemReader

            known: Mapping[str, Any] = FileSystemReader(path).read_metadata().state_dict_metadata
            return dict(note["metadata"]), {key: tuple(entry.size) for key, entry in known.items()}
        except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
            if isinstance(error, BrachiumError):
                raise
            raise CheckpointError(f"{path} is damaged: {error}\nType resume=false to start anew.") from error

    def _require_whole(self, path: Path, note: Mapping[str, Any]) -> None:
        there = {file.name: file.stat().st_size for file in path.iterdir()}
        missing = sorted(set(note["files"]) - set(there))
        short = sorted(name for name, size in note["files"].items() if there.get(name, size) != size)
        if missing or short:
            raise CheckpointError(
                f"{path} was saved by {note['processes']} processes in {len(note['files'])} files; "
                + (f"missing are {missing}" if missing else f"{short} are not of the size that was written")
                + ".\nCopy all of the folder, or type resume=false to start anew."
            )

    def read(self, into: Mapping[str, Tensor]) -> None:
        """Read tensors in place, each this process's part of it."""
        path = self.path
        assert path is not None
        try:
            if path == self.file:
                saved = load_file(path)
                for key, tensor in into.items():
                    _put(tensor, saved[key])
                return
            from torch.distributed import checkpoint

            state = dict(into)
            with _quiet():
                checkpoint.load(state, checkpoint_id=path, no_dist=self.processes.world == 1)
        except (SafetensorError, KeyError, ValueError, OSError) as error:
            raise CheckpointError(f"{path} is damaged: {error}\nType resume=false to start anew.") from error
        except BaseException as error:
            if type(error).__name__ != "CheckpointException":
                raise
            last = str(error).strip().splitlines()[-1]
            raise CheckpointError(f"{path} is damaged: {last}\nType resume=false to start anew.") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the advice that `torch.distributed.checkpoint` gives its own callers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@torch.no_grad()
def _put(tensor: Any, value: Tensor) -> None:
    """Copy a whole tensor into one, or this process's part of it."""
    if not hasattr(tensor, "to_local"):
        tensor.copy_(value)
        return
    from torch.distributed.tensor import distribute_tensor

    given = value.to(tensor.device, tensor.dtype)
    tensor.to_local().copy_(
        distribute_tensor(given, tensor.device_mesh, tensor.placements, src_data_rank=None).to_local()
    )


def say_failed(error: DiskSpaceError) -> None:
    """A save in the midst of training that failed: the work goes on, and the next one may find room."""
    log(f"WARNING: {error}\nTraining goes on. Free some space: the next save comes as usual")
