"""The records of a store's episodes as columns: fifty thousand of them open in a moment, and edits are cheap."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

EDITABLE = ("instruction", "success", "tags")
COLUMNS = pa.schema(
    [
        ("id", pa.string()),
        ("segment", pa.dictionary(pa.int32(), pa.string())),
        ("start", pa.int64()),
        ("length", pa.int64()),
        ("instruction", pa.dictionary(pa.int32(), pa.string())),
        ("success", pa.bool_()),
        ("tags", pa.list_(pa.string())),
    ]
)


class EpisodeTable:
    """Records of episodes, one a row, in commit order; immutable.

    Attributes:
        columns: Arrow table with `COLUMNS`, every column in one chunk.
    """

    def __init__(self, columns: pa.Table) -> None:
        self.columns = columns.cast(COLUMNS).unify_dictionaries().combine_chunks()

    @classmethod
    def of(cls, records: Sequence[Mapping[str, Any]]) -> EpisodeTable:
        """Build from dictionaries with the keys of `COLUMNS`."""
        columns = [_array([record[name] for record in records], name) for name in COLUMNS.names]
        return cls(pa.Table.from_arrays(columns, schema=COLUMNS))

    def __len__(self) -> int:
        return int(self.columns.num_rows)

    def numbers(self, name: str) -> np.ndarray:
        """Column `start` or `length`: int64 (episodes,)."""
        return _numbers(self._array(name), np.dtype(np.int64))

    def _array(self, name: str) -> pa.Array:
        column = self.columns[name]
        return column.chunk(0) if column.num_chunks else pa.array([], column.type)

    def coded(self, name: str) -> tuple[np.ndarray, list[str]]:
        """Column `segment` or `instruction` as (code int32 (episodes,), text of each code)."""
        array = self._array(name)
        return _numbers(array.indices, np.dtype(np.int32)), array.dictionary.to_pylist()

    def texts(self, name: str) -> list[str]:
        """Column `id`, `segment` or `instruction`, a string an episode; equal strings share memory."""
        if name == "id":
            return list(self.columns["id"].to_pylist())
        codes, words = self.coded(name)
        return [words[code] for code in codes.tolist()]

    def record(self, row: int) -> dict[str, Any]:
        """One row as a dictionary."""
        return {name: self.columns[name][row].as_py() for name in COLUMNS.names}

    def records(self) -> list[dict[str, Any]]:
        """Every row as a dictionary."""
        return list(self.columns.to_pylist())

    def take(self, rows: np.ndarray) -> EpisodeTable:
        """The rows where `rows`, bool (episodes,), is true."""
        return EpisodeTable(self.columns.filter(_bools(rows.tolist())))


class EpisodeRecords:
    """Records under change: a table, and what log entries did to it. Not safe to share between threads."""

    def __init__(self, base: EpisodeTable | None = None) -> None:
        self._base = base if base is not None else EpisodeTable.of(())
        self._edited: dict[int, dict[str, Any]] = {}
        self._removed: set[int] = set()
        self._added: dict[str, dict[str, Any]] = {}

    @functools.cached_property
    def _rows(self) -> dict[str, int]:
        return {identity: row for row, identity in enumerate(self._base.texts("id"))}

    def __contains__(self, identity: object) -> bool:
        row = self._rows.get(str(identity))
        return identity in self._added or (row is not None and row not in self._removed)

    def add(self, segment: str, episode: Mapping[str, Any]) -> None:
        """Add an episode; one that is there already stays as it is.

        Raises:
            KeyError: A key of the record that is missing.
        """
        if episode["id"] not in self:
            record = {key: episode[key] for key in ("id", "start", "length", *EDITABLE)}
            self._added[episode["id"]] = {**record, "segment": segment}

    def remove(self, identity: str) -> None:
        """Remove an episode, if it is there."""
        if self._added.pop(identity, None) is None and identity in self._rows:
            self._removed.add(self._rows[identity])

    def edit(self, identity: str, changes: Mapping[str, Any]) -> None:
        """Change labels of an episode, if it is there."""
        self._change(identity, {key: changes[key] for key in EDITABLE if key in changes})

    def move(self, identity: str, segment: str, start: int) -> None:
        """Say that an episode now stands elsewhere, if it is there."""
        self._change(identity, {"segment": segment, "start": start})

    def _change(self, identity: str, changes: Mapping[str, Any]) -> None:
        if identity in self._added:
            self._added[identity] |= changes
        elif identity in self:
            self._edited.setdefault(self._rows[identity], {}).update(changes)

    def table(self) -> EpisodeTable:
        """Everything as one table."""
        columns = self._base.columns
        for name in COLUMNS.names:
            changed = {row: edit[name] for row, edit in self._edited.items() if name in edit}
            if changed:
                values = columns[name].to_pylist()
                for row, value in changed.items():
                    values[row] = value
                place = columns.schema.get_field_index(name)
                columns = columns.set_column(place, COLUMNS.field(name), _array(values, name))
        if self._removed:
            keep = np.ones(len(self._base), bool)
            keep[list(self._removed)] = False
            columns = columns.filter(_bools(keep.tolist()))
        if self._added:
            columns = pa.concat_tables([columns, EpisodeTable.of(list(self._added.values())).columns])
        return self._base if columns is self._base.columns else EpisodeTable(columns)


# Arrays are built from their buffers: `pa.array` of Python objects imports pandas where it is installed, which takes a
# second out of the life of a recorder.


def _array(values: Sequence[Any], name: str) -> pa.Array:
    """One column of `COLUMNS`."""
    kind = COLUMNS.field(name).type
    if pa.types.is_integer(kind):
        return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(np.array(values, np.int64).tobytes())])
    if pa.types.is_boolean(kind):
        return _bools(values)
    if pa.types.is_list(kind):
        flat = _texts([text for some in values for text in some])
        return pa.Array.from_buffers(
            kind, len(values), [None, _offsets([len(some) for some in values])], children=[flat]
        )
    texts = _texts(values)
    return texts.dictionary_encode() if pa.types.is_dictionary(kind) else texts


def _numbers(array: pa.Array, dtype: np.dtype) -> np.ndarray:
    """The numbers of an array without gaps; a view of its buffer."""
    data = array.buffers()[1]
    return np.frombuffer(b"" if data is None else data, dtype)[array.offset : array.offset + len(array)]


def _bools(values: Sequence[bool | None]) -> pa.Array:
    bits = [np.array([bool(v) for v in values], bool), np.array([v is not None for v in values], bool)]
    data, valid = (pa.py_buffer(np.packbits(some, bitorder="little").tobytes()) for some in bits)
    return pa.Array.from_buffers(pa.bool_(), len(values), [valid, data])


def _texts(values: Sequence[str]) -> pa.Array:
    encoded = [value.encode() for value in values]
    buffers = [None, _offsets([len(part) for part in encoded]), pa.py_buffer(b"".join(encoded))]
    return pa.Array.from_buffers(pa.string(), len(values), buffers)


def _offsets(lengths: Sequence[int]) -> pa.Buffer:
    return pa.py_buffer(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32).tobytes())
