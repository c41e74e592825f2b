"""Recorded wanted sets. Knows no policy, slot or hit, so that a replay is exact."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from m2jax.whole_file import whole_file

FORMAT_VERSION = 1
LARGEST_ID = np.iinfo(np.int32).max
# What the .npz holds, and the kind of each dtype. Entry n wants
# ids[offsets[n] : offsets[n + 1]].
FIELDS = {
    "version": "i",
    "steps": "i",
    "layers": "i",
    "planes": "U",
    "offsets": "i",
    "ids": "i",
}


class Entry(NamedTuple):
    """wanted: int32 [K] ids of one layer's plane at one step, as they were given."""

    step: int
    layer: int
    plane: str
    wanted: np.ndarray


class Trace:
    """Wanted sets in the order in which they came."""

    def __init__(self):
        self._entries: list[Entry] = []

    def __len__(self) -> int:
        return len(self._entries)

    def record(self, step: int, layer: int, plane: str, wanted: np.ndarray) -> None:
        """Notes one wanted set; copies the integer [K] ids."""
        ids = np.array(wanted)
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise ValueError(
                f"layer {layer}, plane {plane}: want a list of integer ids, "
                f"got {ids.dtype} {list(ids.shape)}"
            )
        if ids.size and (ids.min() < 0 or ids.max() > LARGEST_ID):
            raise ValueError(
                f"layer {layer}, plane {plane}: ids {ids.min()} to {ids.max()}, "
                f"want [0, {LARGEST_ID}]"
            )
        ids = ids.astype(np.int32, copy=False)
        self._entries.append(Entry(step, layer, plane, ids))

    def entries(self) -> list[Entry]:
        return list(self._entries)

    def save(self, path: str | Path) -> None:
        """Writes one .npz; `path` holds the whole of it or what it held before."""
        entries = self._entries
        sizes = [entry.wanted.size for entry in entries]
        empty = np.empty(0, np.int32)
        with whole_file(Path(path)) as file:
            np.savez(
                file,
                version=np.int64(FORMAT_VERSION),
                steps=np.array([entry.step for entry in entries], np.int64),
                layers=np.array([entry.layer for entry in entries], np.int64),
                planes=np.array([entry.plane for entry in entries], np.str_),
                offsets=np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]),
                ids=np.concatenate([empty, *(entry.wanted for entry in entries)]),
            )

    @classmethod
    def load(cls, path: str | Path, *, neurons: int | None = None) -> "Trace":
        """Reads what `save` wrote.

        Args:
            neurons: F, if known: larger ids are refused. A replay refuses them anyway.

        Raises:
            ValueError: the file is no trace, is damaged, or has ids out of range.
        """
        limit = LARGEST_ID + 1 if neurons is None else neurons
        with Path(path).open("rb") as file:
            try:
                with np.load(file, allow_pickle=False) as archive:
                    fields = {name: archive[name] for name in archive.files}
            # On damage, numpy and zipfile between them raise a dozen types.
            except Exception as error:
                raise ValueError(
                    f"{path}: not a trace, or a damaged one ({error}); record it again"
                ) from error
        fault = _fault(fields, limit)
        if fault:
            raise ValueError(f"{path}: {fault}; record the trace again")
        trace = cls()
        sets = np.split(fields["ids"].astype(np.int32), fields["offsets"][1:-1])
        columns = (fields[name].tolist() for name in ("steps", "layers", "planes"))
        # np.split returns one empty set where there is no entry; zip drops it.
        trace._entries = [Entry(*row) for row in zip(*columns, sets)]
        return trace


def _fault(fields: dict[str, np.ndarray], limit: int) -> str | None:
    """What makes these arrays no trace, if anything does."""
    if set(fields) != set(FIELDS):
        return f"want the fields {', '.join(FIELDS)}; got {', '.join(fields) or 'none'}"
    for name, kind in FIELDS.items():
        array, ndim = fields[name], int(name != "version")
        if array.dtype.kind != kind or array.ndim != ndim:
            return f'field "{name}" is {array.dtype} {list(array.shape)}'
    version, offsets, ids = (fields[name] for name in ("version", "offsets", "ids"))
    if version != FORMAT_VERSION:
        return f"trace version {version}, want {FORMAT_VERSION}"
    lengths = [fields[name].size for name in ("steps", "layers", "planes")]
    if lengths != [offsets.size - 1] * 3:
        return f"steps, layers, planes and offsets disagree: {lengths}, {offsets.size}"
    if offsets[0] != 0 or offsets[-1] != ids.size or np.any(np.diff(offsets) < 0):
        return f'field "offsets" does not cut the {ids.size} ids into wanted sets'
    if ids.size and (ids.min() < 0 or ids.max() >= limit):
        return f"ids {ids.min()} to {ids.max()}, want [0, {limit})"
    return None
