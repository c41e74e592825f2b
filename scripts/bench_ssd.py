"""Layer reads as the engine makes them, beside raw direct reads of the store's files.

    .venv/bin/python scripts/bench_ssd.py STORE [--repeats 5]

One JSON object on stdout: GB/s of each, in turn, and the ratio of medians. A store
of some GB is wanted: the bundled model's planes are read in a millisecond.
"""

import argparse
import json
import os
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from m2jax.aligned import aligned_buffer
from m2jax.bundled import bundled_store
from m2jax.machine import machine_facts
from m2jax.store import DirectChunks, Store, TensorStoreChunks, open_store, raw_rate

PLANE = "q4"
# As `cache.dram` reads: two layers at once.
LAYERS_AT_ONCE = 2


def drop(store: Store) -> None:
    """Takes the store's files out of the page cache."""
    for path in store.files:
        fd = os.open(store.path / path, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def buffers_for(store: Store) -> list[np.ndarray]:
    layout = store.layout
    made = [
        aligned_buffer((layout.padded_neurons, layout.record_bytes(PLANE)))
        for _ in range(LAYERS_AT_ONCE + 1)
    ]
    for buffer in made:
        buffer.fill(0)
    return made


def layers_rate(store: Store, chunks: TensorStoreChunks) -> float:
    """Bytes a second of whole layers, one after the other."""
    buffers, layers = buffers_for(store), range(store.config.num_layers)
    drop(store)
    start = time.perf_counter()
    with ThreadPoolExecutor(LAYERS_AT_ONCE) as pool:
        list(
            pool.map(
                lambda layer: chunks.read(layer, PLANE, buffers[layer % len(buffers)]),
                layers,
            )
        )
    return len(layers) * buffers[0].nbytes / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("store", type=Path, nargs="?")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--toy", action="store_true", help="the bundled model, once")
    args = parser.parse_args()
    store = open_store(bundled_store() if args.toy else args.store)
    ways = {
        "raw": lambda: raw_rate(store),
        "direct": lambda: layers_rate(store, DirectChunks(store, verify=False)),
        "tensorstore": lambda: layers_rate(
            store, TensorStoreChunks(store, verify=False)
        ),
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(1 if args.toy else args.repeats):
        for name, measure in ways.items():
            rates[name].append(measure())
    middle = {name: statistics.median(found) for name, found in rates.items()}
    facts = {
        "machine": machine_facts(),
        "bytes": store.config.num_layers * store.layout.plane_bytes(PLANE),
        "bytes_per_s": rates,
        "of_raw": {name: rate / middle["raw"] for name, rate in middle.items()},
    }
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
