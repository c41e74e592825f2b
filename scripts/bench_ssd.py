"""Reads of a store as the engine makes them, beside raw direct reads; docs/ssd.md.

    .venv/bin/python scripts/bench_ssd.py STORE [--repeats 5] [--out docs/ssd.md]

Whole layers of each plane, beside raw reads of the same files; and some of a plane's
records, beside all of them. A store of some GB is wanted, on the disk in question: the
bundled model's planes are read in a millisecond. Eight layers of a 7B model will do:

    .venv/bin/python scripts/make_checkpoint.py HF --layers 8 --hidden 4096 \
        --ffn 11008 --heads 32 --kv-heads 8 --vocab 512 --dtype float16
    .venv/bin/m2jax convert HF STORE
"""

import argparse
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ssd_scattered
from ssd_tables import report

from m2jax.aligned import aligned_buffer
from m2jax.bundled import bundled_store
from m2jax.disk import drop_cached, filesystem_type
from m2jax.machine import machine_facts
from m2jax.store import DirectChunks, Store, TensorStoreChunks, open_store, raw_rate

ROOT = Path(__file__).parent.parent
BEGUN = time.monotonic()
# As `cache.dram` reads: two layers at once.
LAYERS_AT_ONCE = 2
# As long as `raw_rate` reads.
LEAST_S = 1.0
SCATTERED_REPEATS = 3


def say(line: str) -> None:
    print(f"{time.monotonic() - BEGUN:6.0f} s  {line}", file=sys.stderr, flush=True)


def drop(store: Store) -> None:
    """Takes the store's files out of the page cache."""
    for path in store.files:
        fd = os.open(store.path / path, os.O_RDONLY)
        drop_cached(fd)
        os.close(fd)


def layers_rate(
    store: Store, chunks: TensorStoreChunks, *, plane: str, least_s: float
) -> float:
    """Bytes a second of whole layers, one after the other; passes over all of them,
    each with a cold page cache, until `least_s` are spent."""
    layout, layers = store.layout, range(store.config.num_layers)
    shape = (layout.padded_neurons, layout.record_bytes(plane))
    buffers = [aligned_buffer(shape) for _ in range(LAYERS_AT_ONCE)]
    for buffer in buffers:
        buffer.fill(0)

    def share(reader: int) -> None:
        for layer in layers[reader::LAYERS_AT_ONCE]:
            chunks.read(layer, plane, buffers[reader])

    passes, spent_s = 0, 0.0
    with ThreadPoolExecutor(LAYERS_AT_ONCE) as pool:
        while spent_s < least_s:
            drop(store)
            start = time.perf_counter()
            list(pool.map(share, range(LAYERS_AT_ONCE)))
            spent_s += time.perf_counter() - start
            passes += 1
    return passes * len(layers) * buffers[0].nbytes / spent_s


def whole_layers(store: Store, plane: str, *, repeats: int, least_s: float):
    """Bytes a second of each way, in turn, so that the disk's moods meet all."""
    direct = DirectChunks(store, verify=False)
    other = TensorStoreChunks(store, verify=False)
    rates: dict[str, list[float]] = {"raw": [], "direct": [], "tensorstore": []}
    for _ in range(repeats):
        rates["raw"].append(raw_rate(store, plane=plane, least_s=least_s))
        for name, chunks in (("direct", direct), ("tensorstore", other)):
            rates[name].append(layers_rate(store, chunks, plane=plane, least_s=least_s))
    direct.close()
    return {
        "plane": plane,
        "chunk_bytes": store.layout.chunk_bytes(plane),
        "bytes": store.config.num_layers * store.layout.plane_bytes(plane),
        "bytes_per_s": rates,
    }


def measure(store: Store, *, repeats: int, toy: bool) -> dict[str, Any]:
    config, least_s = store.config, 0.01 if toy else LEAST_S
    found: dict[str, Any] = {
        "machine": machine_facts(),
        "filesystem": filesystem_type(store.path),
        "model": {
            "layers": config.num_layers,
            "hidden": config.hidden_size,
            "neurons": config.intermediate_size,
        },
        "whole_layers": [],
    }
    for plane in store.planes:
        say(f"whole layers of plane {plane}")
        found["whole_layers"].append(
            whole_layers(store, plane, repeats=repeats, least_s=least_s)
        )
    # The plane that a mix wants records of; w16's are four times as long.
    plane = "r4" if "r4" in store.planes else store.planes[-1]
    say(f"some records of plane {plane}")
    found["scattered"] = ssd_scattered.measure(
        store,
        plane,
        repeats=1 if toy else SCATTERED_REPEATS,
        layers=1 if toy else config.num_layers,
    )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("store", type=Path, nargs="?")
    parser.add_argument("--repeats", type=int, default=5, help="of whole layers")
    parser.add_argument("--toy", action="store_true", help="the bundled model, once")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "ssd.md")
    parser.add_argument("--from-json", type=Path, help="only write the page again")
    args = parser.parse_args()
    if args.from_json:
        found = json.loads(args.from_json.read_text())
    elif args.toy:
        found = measure(open_store(bundled_store()), repeats=1, toy=True)
    elif args.store:
        found = measure(open_store(args.store), repeats=args.repeats, toy=False)
    else:
        parser.error("want STORE, --toy or --from-json")
    if not args.from_json:
        raw = args.out.parent / "bench" / f"{args.out.stem}.json"
        raw.parent.mkdir(parents=True, exist_ok=True)
        raw.write_text(json.dumps(found) + "\n")
    args.out.write_text(report(found, args.out.stem))
    say(f"wrote {args.out}")


if __name__ == "__main__":
    main()
