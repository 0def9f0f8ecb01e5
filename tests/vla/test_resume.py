"""Saves: whole or not at all, in one piece or in parts, and what is said of one that is damaged."""

import os
import signal

import pytest
import torch

from brachium.errors import CheckpointError, DiskSpaceError
from brachium.vla import resume
from brachium.vla.parallel import ALONE
from brachium.vla.resume import NOTE, Saves

from .test_loop import assert_same, make_batch, make_loop, state_of

TENSORS = {"weight/a": torch.arange(12.0).reshape(6, 2), "step": torch.tensor(3.0), "whole": torch.arange(4)}


@pytest.fixture
def parts(tmp_path):
    """A save in parts, as FSDP writes it, by one process."""
    saves = Saves(tmp_path, "act", ALONE)
    saves._write_parts(TENSORS, {"step": "3"})
    return saves


def test_a_save_in_parts_is_read_back(parts):
    metadata, shapes = parts.read_metadata()
    assert metadata == {"step": "3"}
    assert shapes == {key: tuple(value.shape) for key, value in TENSORS.items()}
    into = {key: torch.zeros_like(value) for key, value in TENSORS.items()}
    parts.read(into)
    for key, value in TENSORS.items():
        assert torch.equal(into[key], value)
    parts.write(TENSORS, {"step": "4"})  # of weights that are in one piece: a file takes the folder's place
    assert not parts.parts.exists()
    assert parts.read_metadata()[0] == {"step": "4"}


def test_a_missing_part_is_named(parts):
    lost = next(file for file in parts.parts.iterdir() if file.suffix == ".distcp")
    content = lost.read_bytes()
    lost.unlink()
    with pytest.raises(CheckpointError, match=rf"saved by 1 processes in 2 files; missing are \['{lost.name}'\]"):
        parts.read_metadata()
    lost.write_bytes(content[:-7])
    with pytest.raises(CheckpointError, match=rf"\['{lost.name}'\] are not of the size that was written"):
        parts.read_metadata()


@pytest.mark.parametrize("damage", ["note", "metadata"])
def test_damaged_notes(parts, damage):
    file = parts.parts / (NOTE if damage == "note" else ".metadata")
    size = file.stat().st_size
    file.write_bytes(b"\x80" * size)
    with pytest.raises(CheckpointError, match="is damaged"):
        parts.read_metadata()


def test_a_crash_while_a_folder_is_replaced_leaves_the_old_one(parts):
    parts.parts.rename(parts.parts.with_name("resume-act.old"))
    assert parts.read_metadata()[0] == {"step": "3"}
    parts.remove()
    assert parts.path is None


def full(*args, **more):
    raise OSError(28, "No space left on device")


def test_a_full_disk_leaves_the_save_before_and_training_goes_on(tmp_path, monkeypatch, capsys):
    """The save of step 10 fails half-way; at the end everything is there all the same."""
    loop = make_loop(tmp_path)
    loop.step = 5
    loop.save()
    before = loop.saves.file.read_bytes()
    loop.step = 0

    def half(tensors, path, metadata):
        path.write_bytes(b"half")
        full()

    monkeypatch.setattr(resume, "save_file", half)
    loop.run()
    told = capsys.readouterr().err
    assert "could not be written ([Errno 28] No space left on device); the one before it stays" in told
    assert "Training goes on" in told
    assert loop.step == 20
    assert loop.saves.file.read_bytes() == before
    assert not list(tmp_path.glob("*.partial"))


def test_a_full_disk_when_one_wants_to_stop_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(resume, "save_file", full)
    with pytest.raises(DiskSpaceError, match="there is none before it"):
        make_loop(tmp_path).save()


def test_a_full_disk_in_parts(parts, monkeypatch):
    from torch.distributed import checkpoint

    monkeypatch.setattr(checkpoint, "save", full)

    class Part(torch.Tensor):
        def to_local(self):
            return self

    with pytest.raises(DiskSpaceError, match="the one before it stays at"):
        parts.write({"weight/a": torch.zeros(3).as_subclass(Part)}, {"step": "9"})
    assert parts.read_metadata()[0] == {"step": "3"}
    assert not parts.parts.with_name("resume-act.partial").exists()


def test_sigterm_saves_the_step_it_came_in(tmp_path):
    """As Slurm sends it, and systems that shut down: the run ends after the step, and goes on from there."""
    whole = make_loop(tmp_path / "whole")
    whole.run()

    def batch(step):
        if step == 9:
            os.kill(os.getpid(), signal.SIGTERM)
        return make_batch(step)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        make_loop(tmp_path / "parts", batch=batch).run()
    assert signal.getsignal(signal.SIGTERM) is before
    resumed = make_loop(tmp_path / "parts", resume=True)
    assert 0 < resumed.step < 20
    resumed.run()
    assert_same(state_of(whole), state_of(resumed))
