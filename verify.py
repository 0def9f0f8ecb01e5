"""The verb ``brachium verify``: a checkpoint or an episode store, proven or refused."""

from __future__ import annotations

from pathlib import Path

from .errors import ConfigError, NotFoundError


def verify(
    *,
    checkpoint: str | None = None,
    store: str | None = None,
    decode: bool = False,
    remove: bool = False,
    threads: int = 2,
    dry_run: bool = False,
) -> int:
    """Check a checkpoint (weights, golden batches, checksums) or an episode store (every byte against its checksum).

    Args:
        checkpoint: Folder of a checkpoint: it is loaded strictly, and its golden batches are replayed.
        store: Folder of a store. Exit code 1 says that something in it is damaged.
        decode: Of a store, decode every frame too, which finds what was broken before it was stored; much slower.
        remove: Take damaged episodes out of the store's newest version, so that the rest trains without errors.
        threads: Segments of a store at once.
        dry_run: With `remove`, only say which episodes would go.

    Raises:
        ConfigError: Neither is given, or both.
    """
    if (checkpoint is None) == (store is None):
        raise ConfigError(
            "expected a checkpoint or a store to verify, and one of them alone. Type: brachium verify FOLDER, "
            "brachium verify checkpoint=FOLDER, or brachium verify store=FOLDER"
        )
    if checkpoint is not None:
        from .vla.verify import verify_checkpoint

        return verify_checkpoint(checkpoint)
    from .datasets.verify import verify as verify_store

    return verify_store(store=str(store), decode=decode, remove=remove, threads=threads, dry_run=dry_run)


def named(words: list[str]) -> list[str]:
    """Words of the command line with a folder that was typed alone as what it is; NotFoundError for none."""

    def name(word: str) -> str:
        if "=" in word or word.startswith(("-", "~", "+")):
            return word
        if not Path(word).exists():
            raise NotFoundError(f"no checkpoint and no episode store at {word}. Type: brachium list checkpoints")
        is_checkpoint = (Path(word) / "recipe.json").exists() or (Path(word) / "model.safetensors").exists()
        return f"{'checkpoint' if is_checkpoint else 'store'}={word}"

    return [name(word) for word in words]
