"""DRAM under recorded wanted sets: whole layers, or only chunks that are asked for.

Knows no text and no model, only who was wanted and how large a record is.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np

from m2jax.cache.policy import LFU, LRU, Belady, Policy
from m2jax.cache.residency import Residency
from m2jax.cache.simulate import Pool
from m2jax.cache.trace import Trace
from m2jax.config import ModelConfig
from m2jax.layout import Layout, make_layout

# For DRAM: with the least pools, and with larger ones, that ask for less.
HELD_BEFORE_DRAM = (1.0, 2.0)
# Neurons of a read, and DRAM as a share of the bytes that pass.
CHUNKS = (1, 4, 16, 64)
BUDGETS = (0.25, 0.5, 0.75)
# Tokens that one sweep verifies.
SWEEPS = (1, 4, 16)
# Hidden size and neurons of a layer.
PUBLISHED = {
    "Llama 3.2 1B": (2048, 8192),
    "Llama 3.1 8B": (4096, 14336),
    "Llama 3.1 70B": (8192, 28672),
}


def by_pool(trace: Trace) -> dict[Pool, list[np.ndarray]]:
    """The wanted sets of every (layer, plane), in the order of steps."""
    pools: dict[Pool, list[np.ndarray]] = {}
    for entry in trace.entries():
        pools.setdefault((entry.layer, entry.plane), []).append(entry.wanted)
    return pools


def loaded(sets: Sequence[np.ndarray], *, neurons: int, slots: int) -> list[np.ndarray]:
    """What an LRU pool asks of DRAM at each step: ids that have no slot."""
    directory = Residency(neurons, slots, LRU(neurons))
    return [wanted[directory.plan(wanted).load_positions] for wanted in sets]


def dram(
    trace: Trace, layout: Layout, config: ModelConfig, mix: str
) -> list[dict[str, Any]]:
    """SSD bytes a token: whole layers, and chunks that hold a load."""
    pools = by_pool(trace)
    rows = []
    for held in HELD_BEFORE_DRAM:
        asked = {
            pool: loaded(sets, neurons=layout.neurons, slots=round(held * sets[0].size))
            for pool, sets in pools.items()
        }
        for chunk in CHUNKS:
            read = {
                pool: [np.unique(ids // chunk) for ids in sets]
                for pool, sets in asked.items()
            }
            rows += _budgets(read, layout, config, mix=mix, held=held, chunk=chunk)
    return rows


def dram_of_whole_planes(
    layout: Layout, config: ModelConfig, tokens: int
) -> list[dict[str, Any]]:
    """The same where every token wants all of plane r4 (mix 0/100/0): a cyclic scan,
    which is the same at any size of chunk."""
    chunk = max(CHUNKS)
    every = np.arange(-(-layout.neurons // chunk))
    read = {(layer, "r4"): [every] * tokens for layer in range(config.num_layers)}
    return list(_budgets(read, layout, config, mix="0/100/0", held=0.0, chunk=chunk))


def _budgets(
    read: dict[Pool, list[np.ndarray]],
    layout: Layout,
    config: ModelConfig,
    *,
    mix: str,
    held: float,
    chunk: int,
) -> Iterator[dict[str, Any]]:
    """One row a budget: bytes a token from cold, by what DRAM keeps.

    What is pinned is read once. Between two layers every scheme keeps as much, so that
    Belady reads least; what a layer asks for lies beside it while it is in use.

    Args:
        read: of every (layer, plane) and step, the chunks that hold what is asked for.
    """
    layers, chunks = config.num_layers, -(-layout.neurons // chunk)
    planes = sorted({plane for _, plane in read})
    tokens = len(next(iter(read.values())))
    size = {plane: chunk * layout.record_bytes(plane) for plane in planes}
    of_layer = sum(chunks * size[plane] for plane in planes)
    asked = sum(
        size[plane] * ids.size for (_, plane), sets in read.items() for ids in sets
    )
    for budget in BUDGETS:
        pinned = int(budget * layers)
        whole = of_layer * (pinned + tokens * (layers - pinned))
        bytes_of: dict[str, int] = {"whole_layers": whole, "pinned": 0}
        for (layer, plane), sets in read.items():
            every = np.concatenate(sets)
            count = np.unique(every).size if layer < pinned else every.size
            bytes_of["pinned"] += size[plane] * count
        for plane in planes:
            # Every plane has the same share of DRAM, every layer's chunks may use it.
            slots, ids = int(budget * layers * chunks) + chunks, layers * chunks
            future = [
                (layer * chunks + read[layer, plane][step]).astype(np.int32)
                for step, layer in product(range(tokens), range(layers))
            ]
            makers: dict[str, Callable[[], Policy]] = {
                "lru": lambda: LRU(layers * chunks),
                "lfu": lambda: LFU(layers * chunks),
                "belady": lambda future=future: Belady(layers * chunks, future=future),
            }
            for name, make in makers.items():
                directory = Residency(ids, slots, make())
                for wanted in future:
                    directory.plan(wanted)
                bytes_of.setdefault(name, 0)
                bytes_of[name] += directory.loads * size[plane]
        yield {
            "mix": mix,
            "held": held,
            "chunk": chunk,
            "budget": budget,
            "asked_share": asked / (tokens * layers * of_layer),
            "ssd_bytes_per_token": {k: total / tokens for k, total in bytes_of.items()},
        }


def sweeps(trace: Trace, layout: Layout, mix: str) -> list[dict[str, Any]]:
    """Share of a layer's chunks that hold a record wanted by any token of a sweep."""
    rows = []
    for chunk in CHUNKS:
        shares: dict[int, list[float]] = {width: [] for width in SWEEPS}
        for sets in by_pool(trace).values():
            count = -(-layout.neurons // chunk)
            for width, found in shares.items():
                for start in range(0, len(sets) - width + 1, width):
                    union = np.concatenate(sets[start : start + width]) // chunk
                    found.append(np.unique(union).size / count)
        share = {width: float(np.mean(of)) for width, of in shares.items()}
        rows.append({"mix": mix, "chunk": chunk, "share": share})
    return rows


def stores(config: ModelConfig) -> list[dict[str, Any]]:
    """Chunks of published shapes: neurons of one, and bytes of a record and a chunk."""
    rows = []
    for name, (hidden, neurons) in PUBLISHED.items():
        layout = make_layout(
            replace(config, hidden_size=hidden, intermediate_size=neurons),
            original_dtype="bfloat16",
            group_size=64,
        )
        rows.append(
            {
                "model": name,
                "chunk_neurons": layout.chunk_neurons,
                **{
                    plane: {
                        "record_bytes": layout.record_bytes(plane),
                        "chunk_bytes": layout.chunk_bytes(plane),
                    }
                    for plane in ("r4", "w16")
                },
            }
        )
    return rows
