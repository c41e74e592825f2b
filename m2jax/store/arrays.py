"""Reads whole planes of neuron records from SSD by TensorStore. Knows no cache."""

import hashlib
import threading
from typing import Any, Protocol

import numpy as np
import tensorstore as ts

from m2jax.errors import StoreError, TierFailed
from m2jax.store.machine_errors import machine_error
from m2jax.store.paths import array_metadata, array_path, chunk_path
from m2jax.store.reader import Store
from m2jax.store.records import RecordReads

READS_IN_FLIGHT = 32
COPY_THREADS = 2
# Of single records. Of more, threads wait for Python's lock.
RECORDS_IN_FLIGHT = 8


class ChunkStore(Protocol):
    """Where bytes of neuron records come from, and where they can fail."""

    def read(self, layer: int, plane: str, out: np.ndarray) -> None:
        """Fills `out`, uint8 [padded_neurons, record_bytes], with a layer's plane."""
        ...

    def read_records(
        self,
        layer: int,
        plane: str,
        ids: np.ndarray,
        out: np.ndarray,
        slots: np.ndarray,
    ) -> int:
        """Fills rows `slots` of `out`, uint8 [S, record_bytes], with a plane's records
        `ids`, integers, ascending; returns the bytes asked of the disk."""
        ...


class TensorStoreChunks:
    """A ChunkStore over the store's zarr arrays; any thread may read.

    how: by which the bytes come, for reports.
    why: what speaks against `DirectChunks`, for reports.

    Args:
        store: an open store.
        verify: compare the sha256 of every chunk with the manifest when it is first
            read, before its bytes are handed on.
    """

    how = "buffered"
    _flags = 0

    def __init__(self, store: Store, *, verify: bool = True, why: str | None = None):
        self.why = why
        self._records = RecordReads(depth=RECORDS_IN_FLIGHT, flags=self._flags)
        self._store = store
        self._verify = verify
        self._verified: set[tuple[int, str]] = set()
        self._arrays: dict[tuple[int, str], Any] | None = None
        self._opening = threading.Lock()

    def read(self, layer: int, plane: str, out: np.ndarray) -> None:
        """Fills `out` with a layer's plane, straight from SSD.

        Args:
            out: uint8 [padded_neurons, record_bytes], C-contiguous.

        Raises:
            StoreError: a chunk is missing, of another size, or its sha256 differs.
            TierFailed: the machine could not read.
        """
        layout = self._store.layout
        wanted = (layout.padded_neurons, layout.record_bytes(plane))
        if out.dtype != np.uint8 or out.shape != wanted or not out.flags.carray:
            raise ValueError(
                f"out: want writeable C-contiguous uint8 {wanted}, "
                f"got {out.dtype} {out.shape}"
            )
        if plane not in self._store.planes:
            raise ValueError(
                f"{self._store.path}: has no plane {plane}, only "
                f"{', '.join(self._store.planes)}"
            )
        self._fill(layer, plane, out)
        if self._verify and (layer, plane) not in self._verified:
            self._check(layer, plane, out)
            self._verified.add((layer, plane))

    def read_records(
        self,
        layer: int,
        plane: str,
        ids: np.ndarray,
        out: np.ndarray,
        slots: np.ndarray,
    ) -> int:
        """Fills rows of `out` with some of a plane's records, straight from SSD. One
        call at a time, beside any number of `read`.

        Args:
            ids: integer [M] of neurons, ascending. out: uint8 [S, record_bytes],
                C-contiguous. slots: integer [M], the row of each.

        Returns:
            Bytes asked of the disk: of direct reads, whole blocks.

        Raises:
            StoreError: a chunk is missing, of another size, or its sha256 differs.
            TierFailed: the machine could not read.
        """
        array, layout = array_path(layer, plane, self._store.config), self._store.layout
        names = [chunk_path(array, chunk) for chunk in range(layout.num_chunks)]
        if self._verify and (layer, plane) not in self._verified:
            for name in names:
                self._store.check_file(name)
            self._verified.add((layer, plane))
        paths = [self._store.path / name for name in names]
        try:
            return self._records.read(
                paths, ids, out, slots, chunk_neurons=layout.chunk_neurons
            )
        except OSError as error:
            raise self._explain(layer, plane, error) from error

    def close(self) -> None:
        """Ends its threads; no more reads after that."""
        self._records.close()

    def _fill(self, layer: int, plane: str, out: np.ndarray) -> None:
        array = self._open()[layer, plane]
        try:
            ts.array(out, copy=False, write=True).write(array).result()
        except ValueError as error:
            raise self._explain(layer, plane, error) from error

    def _open(self) -> dict[tuple[int, str], Any]:
        """Every array of the store, opened at first use."""
        with self._opening:
            if self._arrays is None:
                context = ts.Context(
                    {
                        "file_io_concurrency": {"limit": READS_IN_FLIGHT},
                        "data_copy_concurrency": {"limit": COPY_THREADS},
                        "cache_pool": {"total_bytes_limit": 0},
                    }
                )
                self._arrays = {
                    (layer, plane): self._open_array(layer, plane, context)
                    for layer in range(self._store.config.num_layers)
                    for plane in self._store.planes
                }
            return self._arrays

    def _open_array(self, layer: int, plane: str, context: ts.Context) -> Any:
        name = array_path(layer, plane, self._store.config)
        # An entry of the manifest's own table: its metadata must not lie either.
        self._store.check_file(f"{name}/zarr.json")
        spec = {
            "driver": "zarr3",
            "kvstore": {"driver": "file", "path": str(self._store.path / name)},
            "metadata": array_metadata(self._store.layout, plane),
            "fill_missing_data_reads": False,
            "recheck_cached_metadata": False,
            "recheck_cached_data": False,
        }
        try:
            return ts.open(spec, open=True, read=True, context=context).result()
        except ValueError as error:
            raise self._failed(name, error) from error

    def _check(self, layer: int, plane: str, out: np.ndarray) -> None:
        """Compares every chunk in `out` with the manifest."""
        array = array_path(layer, plane, self._store.config)
        for chunk, rows in enumerate(np.split(out, self._store.layout.num_chunks)):
            path = chunk_path(array, chunk)
            wanted = self._store.files[path].sha256
            got = hashlib.sha256(rows.data).hexdigest()
            if got != wanted:
                raise StoreError(
                    f"{path}: layer {layer}, plane {plane}, chunk {chunk}: "
                    f"sha256 {got}, manifest says {wanted}; "
                    'run "m2jax verify STORE", then convert again',
                    path=self._store.path / path,
                )

    def _explain(self, layer: int, plane: str, error: Exception) -> StoreError:
        """A failed read: a damaged chunk if a look at the files shows one."""
        array = array_path(layer, plane, self._store.config)
        for chunk in range(self._store.layout.num_chunks):
            problem = self._store.size_problem(chunk_path(array, chunk))
            if problem is not None:
                return StoreError(
                    f"{problem} (layer {layer}, plane {plane}, chunk {chunk}); "
                    'run "m2jax verify STORE", then convert again',
                    path=self._store.path / chunk_path(array, chunk),
                )
        return self._failed(array, error)

    def _failed(self, array: str, error: Exception) -> TierFailed:
        cause = error if isinstance(error, OSError) else machine_error(error)
        return TierFailed(
            f"{array}: could not be read: {cause.strerror or cause}",
            path=self._store.path / array,
        )
