"""Reads of some of a plane's records beside reads of all, for `bench_ssd.py`.

By `m2jax.spans`, as the engine's own `store.records` reads them, but into the places
that a read of all would fill, by any number of threads, with files open already.
"""

import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from m2jax.aligned import ALIGN_BYTES, aligned_buffer
from m2jax.disk import drop_cached
from m2jax.spans import Span, spans
from m2jax.store import DirectChunks, Store
from m2jax.store.paths import array_path, chunk_path

SHARES = (0.05, 0.1, 0.25, 0.5)
# 4: as if neurons that are wanted together lay side by side.
GROUPS = (1, 4)
WAYS = (("direct", 1), ("direct", 8), ("direct", 32), ("buffered", 8), ("buffered", 32))
SEED = 0


def some_records(
    generator: np.random.Generator, *, neurons: int, share: float, group: int
) -> np.ndarray:
    """int64 ids, ascending: `share` of the neurons, in random aligned groups."""
    groups = max(1, round(share * neurons / group))
    first = np.sort(generator.permutation(neurons // group)[:groups]) * group
    return (first[:, None] + np.arange(group)).reshape(-1)


@contextmanager
def opened(store: Store, layer: int, plane: str, flags: int) -> Iterator[list[int]]:
    """Descriptors of the chunk files of a layer's plane, in order."""
    array = array_path(layer, plane, store.config)
    found: list[int] = []
    try:
        for chunk in range(store.layout.num_chunks):
            path = store.path / chunk_path(array, chunk)
            found.append(os.open(path, os.O_RDONLY | flags))
        yield found
    finally:
        for fd in found:
            os.close(fd)


def read_spans(
    pool: ThreadPoolExecutor,
    depth: int,
    fds: Sequence[int],
    wanted: Sequence[Span],
    out: np.ndarray,
) -> None:
    """Reads them into the places in `out`, uint8 [num_chunks, chunk_bytes], that a read
    of all would fill; by `depth` threads of the pool."""
    view, chunk_bytes = out.reshape(-1).data, out.shape[1]
    jobs = [
        (fds[chunk], start, view[chunk * chunk_bytes + start :][: end - start])
        for chunk, start, end, *_ in wanted
    ]

    def share(reader: int) -> None:
        for fd, start, place in jobs[reader::depth]:
            if os.preadv(fd, [place], start) != len(place):
                raise OSError(f"a short read at {start}")

    list(pool.map(share, range(depth)))


def fetched_bytes() -> int:
    """What the kernel had fetched from disks for this process so far, read-ahead
    included."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["read_bytes"])


def measure(store: Store, plane: str, *, repeats: int, layers: int) -> dict[str, Any]:
    """Times reads of one layer at a time, in turn, whole and in part.

    Returns:
        plane, record_bytes, plane_bytes; whole_s: of `DirectChunks`, a layer each.
        rows: share, group, way, depth; and of each layer read reads, useful_bytes,
        asked_bytes (whole blocks), fetched_bytes (see above; 0 where the filesystem
        does not count), seconds (the list of reads made ready in time, too).
    """
    layout, generator = store.layout, np.random.default_rng(SEED)
    record = layout.record_bytes(plane)
    chunks = DirectChunks(store, verify=False)
    out = aligned_buffer((layout.num_chunks, layout.chunk_bytes(plane)))
    out.fill(0)
    rows: dict[tuple, dict[str, Any]] = {}
    whole_s = []
    with ThreadPoolExecutor(max(depth for _, depth in WAYS)) as pool:
        for layer in [*range(layers)] * repeats:
            begun = time.perf_counter()
            chunks.read(layer, plane, out.reshape(-1, record))
            whole_s.append(time.perf_counter() - begun)
            for share in SHARES:
                for group in GROUPS:
                    ids = some_records(
                        generator, neurons=layout.neurons, share=share, group=group
                    )
                    for way, depth in WAYS:
                        key = (share, group, way, depth)
                        names = ("share", "group", "way", "depth")
                        row = rows.setdefault(key, dict(zip(names, key)))
                        once = _read_once(
                            store, layer, plane, ids, way, depth, pool, out
                        )
                        for name, value in once.items():
                            row.setdefault(name, []).append(value)
    chunks.close()
    return {
        "plane": plane,
        "record_bytes": record,
        "plane_bytes": layout.plane_bytes(plane),
        "whole_s": whole_s,
        "rows": list(rows.values()),
    }


def _read_once(
    store: Store,
    layer: int,
    plane: str,
    ids: np.ndarray,
    way: str,
    depth: int,
    pool: ThreadPoolExecutor,
    out: np.ndarray,
) -> dict[str, float]:
    layout, direct = store.layout, way == "direct"
    record = layout.record_bytes(plane)
    with opened(store, layer, plane, os.O_DIRECT if direct else 0) as fds:
        for fd in fds:
            drop_cached(fd)
        before, begun = fetched_bytes(), time.perf_counter()
        wanted = spans(
            ids,
            record_bytes=record,
            chunk_neurons=layout.chunk_neurons,
            block_bytes=ALIGN_BYTES if direct else 1,
        )
        read_spans(pool, depth, fds, wanted, out)
        spent_s = time.perf_counter() - begun
        fetched = fetched_bytes() - before
    return {
        "reads": len(wanted),
        "useful_bytes": ids.size * record,
        "asked_bytes": sum(span.end - span.start for span in wanted),
        "fetched_bytes": fetched,
        "seconds": spent_s,
    }
