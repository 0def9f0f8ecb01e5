"""Pushing and pulling: an object store in a folder, HTTP, and a stand-in for the Hub."""

import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from brachium.datasets import commitlog
from brachium.datasets.store import EpisodeStore
from brachium.errors import StoreError

from .conftest import fill, make_embodiment, make_schema, run, serve

pytest.importorskip("obstore", reason="type: uv pip install obstore")


@pytest.fixture
def store(tmp_path):
    made = EpisodeStore.create(tmp_path / "s", make_schema(size=(8, 8)))
    fill(made, (4, 2, 7), episodes_per_segment=2)
    return made.refresh()


def same(one, two):
    assert one.fingerprint == two.fingerprint
    frames = np.arange(one.total_frames)
    for camera in one.embodiment.camera_names:
        np.testing.assert_array_equal(one.read_images(camera, frames), two.read_images(camera, frames))
    for field in one.schema.fields:
        np.testing.assert_array_equal(one.lowdim(field), two.lowdim(field))
    assert [dict(e.meta) for e in one.episodes] == [dict(e.meta) for e in two.episodes]


def test_there_and_back_and_what_is_new(store, tmp_path, capsys):
    far, out = tmp_path / "far", tmp_path / "back"
    far.mkdir()
    words = ["push", f"store={store.path}", f"to=file://{far}"]
    assert "nothing was sent" in run(capsys, *words, "--dry-run")
    assert not list(far.iterdir())
    run(capsys, *words)
    run(capsys, "pull", f"source=file://{far}", f"out={out}")
    same(store, EpisodeStore.open(out))
    assert "all checksums fit" in run(capsys, "verify", f"store={out}")
    same(store, EpisodeStore.open(far))  # what is there is a store, too
    before = {f: f.stat().st_mtime_ns for f in far.rglob("*") if f.is_file()}
    fill(store, (3,), seed=5)
    run(capsys, "edit", f"store={store.path}", "where.episodes=[0]", "remove=true")
    run(capsys, *words)
    assert all(f.stat().st_mtime_ns == t for f, t in before.items())  # nothing is sent twice
    run(capsys, "pull", f"source=file://{far}", f"out={out}")
    same(store.refresh(), EpisodeStore.open(out))
    same(store, EpisodeStore.open(out, version=store.version))  # with the episode that was removed since
    assert EpisodeStore.open(out).version == store.refresh().version


def test_an_interrupted_pull_goes_on(store, tmp_path, capsys, monkeypatch):
    far, out = tmp_path / "far", tmp_path / "back"
    far.mkdir()
    run(capsys, "push", f"store={store.path}", f"to=file://{far}")
    asked = []
    real = EpisodeStore

    def stop(self, segment):
        asked.append(segment)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return pull_segment(self, segment)

    from brachium.datasets.remote import RemoteStore

    pull_segment = RemoteStore.pull_segment
    with monkeypatch.context() as patch:
        patch.setattr(RemoteStore, "pull_segment", stop)
        run(capsys, "pull", f"source=file://{far}", f"out={out}", code=130)
    assert not list((out / "_log").iterdir())
    run(capsys, "pull", f"source=file://{far}", f"out={out}")
    same(store, real.open(out))


def test_copies_that_went_two_ways_are_not_mixed(store, tmp_path, capsys):
    far, other = tmp_path / "far", tmp_path / "other"
    far.mkdir()
    run(capsys, "push", f"store={store.path}", f"to=file://{far}")
    run(capsys, "pull", f"source=file://{far}", f"out={other}")
    fill(store, (3,), seed=1)
    fill(EpisodeStore.open(other), (5,), seed=2)
    run(capsys, "push", f"store={store.path}", f"to=file://{far}")
    for words in (["push", f"store={other}", f"to=file://{far}"], ["pull", f"source=file://{far}", f"out={other}"]):
        assert "both changed" in run(capsys, *words, code=2)
    assert [e.length for e in EpisodeStore.open(far).episodes] == [4, 2, 7, 3]
    assert [e.length for e in EpisodeStore.open(other).episodes] == [4, 2, 7, 5]
    fill(store, (2,), seed=3)
    assert "the newer one" in run(capsys, "pull", f"source=file://{far}", f"out={store.path}", code=2)


def test_every_version_comes_along(store, tmp_path, capsys):
    for k in range(70):
        commitlog.commit(store.path, [{"action": "edit", "id": store.episodes[0].id, "instruction": f"{k}"}], after=k)
    with serve(store.path) as (url, _):
        run(capsys, "pull", f"source={url}", f"out={tmp_path / 'o'}")
    assert EpisodeStore.open(tmp_path / "o", version=5).episodes[0].instruction == "2"
    with pytest.raises(StoreError, match="is a store already"):
        EpisodeStore.create(tmp_path / "o", store.schema)


def test_a_part_is_not_pushed(store, tmp_path, capsys):
    other = replace(store.schema, embodiment=replace(make_embodiment(cameras=()), name="other_arm"))
    store.set_schema(other)
    assert "a part of a store" in run(capsys, "push", f"store={store.path}@other_arm", f"to=file://{tmp_path}", code=2)


def test_pull_over_http(store, tmp_path, capsys):
    with serve(store.path) as (url, _):
        run(capsys, "pull", f"source={url}", f"out={tmp_path / 'o'}")
    same(store, EpisodeStore.open(tmp_path / "o"))


def test_places_that_will_not_do(store, tmp_path, capsys):
    other = EpisodeStore.create(tmp_path / "other", make_schema(size=(8, 8)))
    fill(other, (1,))
    (tmp_path / "far").mkdir()
    run(capsys, "push", f"store={other.path}", f"to=file://{tmp_path / 'far'}")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    for words, hint in (
        (["push", f"store={store.path}", f"to=file://{tmp_path / 'far'}"], "another store"),
        (["push", f"store={store.path}", "to=outputs/x"], "begins with s3://"),
        (["push", f"store={store.path}", "to=http://x/y"], "cannot be written"),
        (["pull", f"source=file://{tmp_path / 'far'}", f"out={store.path}"], "another store"),
        (["pull", f"source=file://{tmp_path / 'far'}", f"out={tmp_path / 'full'}"], "no episode store"),
        (["pull", f"source=file://{tmp_path / 'full'}", f"out={tmp_path / 'o'}"], "no episode store there"),
    ):
        assert hint in run(capsys, *words, code=2)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The calls of huggingface_hub that are used, on a folder."""
    import huggingface_hub

    root = tmp_path / "hub"

    class Api:
        def create_repo(self, name, *, repo_type, private, exist_ok):
            assert (repo_type, private, exist_ok) == ("dataset", True, True)
            (root / name).mkdir(parents=True, exist_ok=True)

        def list_repo_files(self, name, *, repo_type):
            return [str(f.relative_to(root / name)) for f in (root / name).rglob("*") if f.is_file()]

        def hf_hub_download(self, name, file, *, repo_type):
            return str(root / name / file)

        def create_commit(self, name, operations, *, commit_message, repo_type):
            self.commits.append((commit_message, len(operations)))
            for operation in operations:
                target = root / name / operation.path_in_repo
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(operation.path_or_fileobj, target)

    Api.commits = []

    def download(name, *, repo_type, local_dir):
        if not (root / name).exists():
            raise OSError("404")
        shutil.copytree(root / name, local_dir, dirs_exist_ok=True)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return SimpleNamespace(root=root, commits=Api.commits)


def test_the_hub(store, hub, tmp_path, capsys):
    words = ["push", f"store={store.path}", "to=hf://datasets/me/arms"]
    run(capsys, *words)
    run(capsys, "pull", "source=hf://datasets/me/arms", f"out={tmp_path / 'o'}")
    same(store, EpisodeStore.open(tmp_path / "o"))
    run(capsys, *words)
    fill(store, (3,), seed=5)
    run(capsys, *words)
    assert [message.partition(":")[0] for message, _ in hub.commits] == ["Version 2", "Version 3"]
    assert hub.commits[1][1] < hub.commits[0][1]
    run(capsys, "pull", "source=hf://datasets/me/arms", f"out={tmp_path / 'o'}")
    same(store.refresh(), EpisodeStore.open(tmp_path / "o"))
    other = EpisodeStore.create(tmp_path / "other", make_schema(size=(8, 8)))
    fill(other, (1,))
    assert "another store" in run(capsys, "push", f"store={other.path}", words[2], code=2)
    assert "cannot pull" in run(capsys, "pull", "source=hf://datasets/me/none", f"out={tmp_path / 'n'}", code=2)
