"""Reads whole planes past the page cache, straight from the chunk files.

A chunk is a plain file of records, whole disk blocks long, so a read needs no copy and
nothing of zarr. TensorStore's own direct mode reads into a buffer of its own first.
"""

import os
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle, product
from pathlib import Path

import numpy as np

from m2jax.aligned import ALIGN_BYTES, aligned_buffer
from m2jax.disk import cached_pages, drop_cached
from m2jax.errors import TierFailed
from m2jax.store.arrays import ChunkStore, TensorStoreChunks
from m2jax.store.paths import array_path, chunk_path
from m2jax.store.reader import Store

# Enough that the SSD always has the next read at hand.
READS_IN_FLIGHT = 8
# One read tells little, and the page cache is memory that others want: only what is
# clearly faster through it goes through it.
TRIES = 3
SLOWER = 1.5
# Long enough for a rate, see `raw_rate`.
RAW_S = 1.0


class DirectChunks(TensorStoreChunks):
    """A ChunkStore that reads by O_DIRECT; any thread may read."""

    how = "direct"
    _flags = os.O_DIRECT

    def __init__(self, store: Store, *, verify: bool = True):
        super().__init__(store, verify=verify)
        self._pool = ThreadPoolExecutor(READS_IN_FLIGHT, thread_name_prefix="m2jax-io")

    def close(self) -> None:
        super().close()
        self._pool.shutdown(wait=True)

    def _fill(self, layer: int, plane: str, out: np.ndarray) -> None:
        if out.ctypes.data % ALIGN_BYTES:
            return super()._fill(layer, plane, out)
        array = array_path(layer, plane, self._store.config)
        chunks = np.split(out.reshape(-1), self._store.layout.num_chunks)
        paths = [
            self._store.path / chunk_path(array, chunk) for chunk in range(len(chunks))
        ]
        # One by this thread: a plane of a single chunk then waits for no other.
        reads = [
            self._pool.submit(_error_of_read, path, chunk)
            for path, chunk in zip(paths[1:], chunks[1:])
        ]
        own = _error_of_read(paths[0], chunks[0])
        failed = [error for error in (own, *(read.result() for read in reads)) if error]
        if failed:
            raise self._explain(layer, plane, failed[0]) from failed[0]


def _error_of_read(path: Path, out: np.ndarray) -> Exception | None:
    """`read_direct`; its error, which must not end a read while others go on."""
    try:
        read_direct(path, out)
    except Exception as error:
        return error
    return None


def read_direct(path: Path, out: np.ndarray) -> None:
    """Fills `out`, uint8 on a disk block, with a file of just its length.

    Raises:
        OSError: it is shorter or longer, or cannot be read.
    """
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        done, view = 0, out.data.cast("B")
        if os.fstat(fd).st_size != len(view):
            raise OSError(f"has another size than the {len(view)} bytes wanted")
        while done < len(view):
            got = os.preadv(fd, [view[done:]], done)
            if got == 0:
                raise OSError(f"ends after {done} bytes, {len(view)} are wanted")
            done += got
            # What is left after a short read need not begin on a block.
            if done % ALIGN_BYTES:
                raise OSError(f"ends after {done} bytes, {len(view)} are wanted")
    finally:
        os.close(fd)


def raw_rate(store: Store, *, plane: str, least_s: float = RAW_S) -> float:
    """Bytes a second of one plane's chunk files right now, by direct reads and nothing
    else: what reads of its whole layers can at best reach. Chunks of another plane are
    of another size, and their rate is another.

    Args:
        plane: one that the store has.
        least_s: how long to read.

    Raises:
        ValueError: the store has no such plane.
        TierFailed: one of them could not be read so.
    """
    if plane not in store.planes:
        raise ValueError(
            f"plane {plane!r}: want one of the store's, {', '.join(store.planes)}"
        )
    layers, chunks = range(store.config.num_layers), range(store.layout.num_chunks)
    paths = [
        store.path / chunk_path(array_path(layer, plane, store.config), chunk)
        for layer, chunk in product(layers, chunks)
    ]
    buffers = aligned_buffer((READS_IN_FLIGHT, store.layout.chunk_bytes(plane)))
    end = time.perf_counter() + least_s

    def share(reader: int) -> int:
        done = 0
        for path in cycle(paths[reader::READS_IN_FLIGHT]):
            try:
                read_direct(path, buffers[reader])
            except OSError as error:
                raise TierFailed(
                    f"{path}: {error.strerror or error}", path=path
                ) from error
            done += buffers.shape[1]
            if time.perf_counter() > end:
                break
        return done

    start = time.perf_counter()
    with ThreadPoolExecutor(READS_IN_FLIGHT) as pool:
        total = sum(pool.map(share, range(min(READS_IN_FLIGHT, len(paths)))))
    return total / (time.perf_counter() - start)


def choose_chunks(store: Store) -> ChunkStore:
    """Reads past the page cache where that works and is not clearly slower: tried on a
    chunk.

    Slower it is on some network and overlay filesystems; some accept O_DIRECT and fill
    the page cache all the same.
    """
    array = array_path(0, store.planes[0], store.config)
    path = store.path / chunk_path(array, 0)
    buffer = aligned_buffer((1, store.layout.chunk_bytes(store.planes[0])))[0]
    try:
        direct_s = min(_seconds(path, buffer, os.O_DIRECT) for _ in range(TRIES))
        if _was_cached(path, len(buffer)):
            why = "direct reads fill the page cache all the same"
            return TensorStoreChunks(store, why=why)
        buffered_s = min(_seconds(path, buffer, 0) for _ in range(TRIES))
    except OSError as error:
        why = f"a direct read failed: {error.strerror or error}"
        return TensorStoreChunks(store, why=why)
    if direct_s > SLOWER * buffered_s:
        times = direct_s / buffered_s
        why = f"a direct read takes {times:.1f} times as long"
        return TensorStoreChunks(store, why=why)
    return DirectChunks(store)


def _seconds(path: Path, buffer: np.ndarray, flags: int) -> float:
    """Of one cold read."""
    fd = os.open(path, os.O_RDONLY | flags)
    try:
        drop_cached(fd)
        start = time.perf_counter()
        if os.preadv(fd, [buffer.data], 0) != len(buffer):
            raise OSError(f"{path}: a short read")
        return time.perf_counter() - start
    finally:
        os.close(fd)


def _was_cached(path: Path, size: int) -> bool:
    fd = os.open(path, os.O_RDONLY)
    try:
        return cached_pages(fd, size) > 0
    finally:
        os.close(fd)
