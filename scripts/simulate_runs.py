"""Wanted sets recorded on text and replayed, as plain JSON values.

Everything is counted, nothing is timed: the same weights and texts give the same
figures on any machine, but for the rounding of the traces' own arithmetic.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from simulate_tiers import by_pool, dram, dram_of_whole_planes, sweeps
from speculation_runs import NAMES, prompts

import m2jax
from m2jax.cache.policy import LRU
from m2jax.cache.residency import Residency
from m2jax.cache.simulate import simulate
from m2jax.cache.trace import Trace
from m2jax.layout import Layout
from m2jax.recording import record_text
from m2jax.store import open_store

MIXES = ("0/25/75", "25/25/50")
POLICIES = ("lru", "lfu", "random", "belady")
# Slots of every pool, as multiples of the wanted set.
HELD = (1.0, 1.25, 1.5, 2.0, 3.0)
# What a choice among equals may swap: of the wanted set, the last ranks.
LEEWAYS = (0.0, 0.05, 0.1, 0.2, 0.4)
CHOSEN, RANKED = 25, 35
HELD_BY_CHOICE = (1.0, 1.5, 2.0)
Say = Callable[[str], None]


@dataclass(frozen=True)
class Sizes:
    """How much is measured: everything, or next to nothing."""

    toy: bool

    @property
    def length(self) -> int:
        return 16 if self.toy else 128

    @property
    def texts(self) -> int:
        """Pieces of each text."""
        return 1 if self.toy else 2

    @property
    def mixes(self) -> tuple[str, ...]:
        return MIXES[-1:] if self.toy else MIXES


def measured(store: Path, sizes: Sizes, say: Say) -> dict[str, Any]:
    """All tables of one model."""
    layout, config = open_store(store).layout, open_store(store).config
    found: dict[str, Any] = {
        "layers": config.num_layers,
        "neurons": layout.neurons,
        "policies": [],
        "dram": [],
        "sweeps": [],
    }
    for mix in sizes.mixes:
        say(f"trace at {mix}")
        trace = recorded(store, mix, sizes)
        say(f"policies at {mix}")
        found["policies"] += policies(trace, layout, mix)
        say(f"DRAM at {mix}")
        found["dram"] += dram(trace, layout, config, mix)
        found["sweeps"] += sweeps(trace, layout, mix)
    tokens = found["policies"][0]["tokens"]
    found["dram"] += dram_of_whole_planes(layout, config, tokens)
    say("choice among equals")
    wide = recorded(store, f"0/{RANKED}/{100 - RANKED}", sizes)
    found["choice"] = choices(wide, layout)
    return found


def recorded(store: Path, mix: str, sizes: Sizes) -> Trace:
    """Wanted sets of pieces of three texts as they stand, one after another."""
    with m2jax.load(store, mix=mix, context=sizes.length, draft="none") as engine:
        windows = [
            window
            for name in NAMES
            for window in prompts(engine, name, length=sizes.length, count=sizes.texts)
        ]
        return record_text(engine, windows)


def policies(trace: Trace, layout: Layout, mix: str) -> list[dict[str, Any]]:
    """Hit ratio and loads a token of every policy at several numbers of slots."""
    tokens = len({entry.step for entry in trace.entries()})
    rows = []
    wanted = {pool: sets[0].size for pool, sets in by_pool(trace).items()}
    for held in HELD:
        slots = {
            pool: min(layout.neurons, round(held * count))
            for pool, count in wanted.items()
        }
        row: dict[str, Any] = {"mix": mix, "held": held, "tokens": tokens}
        for policy in POLICIES:
            found = simulate(trace, neurons=layout.neurons, slots=slots, policy=policy)
            row[policy] = {
                "hit_ratio": found.hit_ratio,
                "link_bytes_per_token": sum(
                    pool.rows * layout.record_bytes(plane)
                    for (_, plane), pool in found.pools.items()
                )
                / tokens,
            }
        rows.append(row)
    return rows


def choices(trace: Trace, layout: Layout) -> list[dict[str, Any]]:
    """What a choice among equals would load: of the last ranks of the wanted set, and
    as many after them, neurons that have a slot are taken first.

    Not what the engine does: tokens would depend on what the cache holds.

    Args:
        trace: of a mix that ranks RANKED percent, best first.
    """
    count = round(layout.neurons * CHOSEN / 100)
    ranked = by_pool(trace)
    rows = []
    for held, leeway in product(HELD_BY_CHOICE, LEEWAYS):
        slots, free = round(held * count), round(leeway * count)
        loads = swapped = 0
        for sets in ranked.values():
            directory = Residency(layout.neurons, slots, LRU(layout.neurons))
            present = np.zeros(layout.neurons, bool)
            for ids in sets:
                wanted = choose(ids, present, count=count, free=free)
                loads += directory.plan(wanted).load_positions.size
                swapped += count - np.isin(wanted, ids[:count]).sum()
                present[:] = False
                present[directory.resident()] = True
        steps = sum(map(len, ranked.values()))
        rows.append(
            {
                "held": held,
                "leeway": leeway,
                "loads_per_set": loads / steps,
                "load_share": loads / (steps * count),
                "swapped_share": float(swapped / (steps * count)),
            }
        )
    return rows


def choose(
    ids: np.ndarray, present: np.ndarray, *, count: int, free: int
) -> np.ndarray:
    """`count` of ranked ids: all but the last `free` ranks as they are; for those, and
    as many that follow, present ones first, then by rank.

    Args:
        ids: int32 [count + free or more], best first.
        present: bool [F].
    """
    sure, doubtful = ids[: count - free], ids[count - free : count + free]
    order = np.argsort(~present[doubtful], kind="stable")
    return np.concatenate([sure, doubtful[order[:free]]])
