"""Replays a trace through the policies the engine runs. Knows no bytes and no clock."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from m2jax.cache.buckets import load_bucket
from m2jax.cache.policy import POLICIES, Belady, Policy, Random
from m2jax.cache.residency import Residency
from m2jax.cache.trace import Entry, Trace

Pool = tuple[int, str]
SIMULATED_POLICIES = (*POLICIES, "belady", "random")


def hit_ratio(hits: int, accesses: int) -> float | None:
    """hits / accesses in [0, 1]; None where nothing was wanted."""
    return hits / accesses if accesses else None


@dataclass(frozen=True)
class PoolResult:
    """One (layer, plane) over the whole trace. accesses = hits + loads, in neurons.

    rows: records that crossed the link: loads, and the padding of their transfers.
    """

    accesses: int
    hits: int
    loads: int
    rows: int

    @property
    def hit_ratio(self) -> float | None:
        return hit_ratio(self.hits, self.accesses)


@dataclass(frozen=True)
class SimulationResult:
    """pools: by (layer, plane), in the order in which the trace first names them.
    missed: the loads of every step, sets that the tier behind is asked for."""

    pools: dict[Pool, PoolResult]
    missed: Trace

    @property
    def accesses(self) -> int:
        return sum(pool.accesses for pool in self.pools.values())

    @property
    def hits(self) -> int:
        return sum(pool.hits for pool in self.pools.values())

    @property
    def loads(self) -> int:
        return sum(pool.loads for pool in self.pools.values())

    @property
    def hit_ratio(self) -> float | None:
        return hit_ratio(self.hits, self.accesses)


def simulate(
    trace: Trace,
    *,
    neurons: int,
    slots: int | Mapping[Pool, int],
    policy: str,
    seed: int = 0,
) -> SimulationResult:
    """What every pool would have loaded, from cold.

    Args:
        neurons: F.
        slots: S of every pool, or S by (layer, plane).
        policy: "lru", "lfu", "belady" (the fewest loads possible) or "random".
        seed: of "random"; the others draw nothing.

    Raises:
        ValueError: an unknown policy, a pool without slots or with fewer than a step
            wants, ids out of range.
    """
    if policy not in SIMULATED_POLICIES:
        raise ValueError(
            f'unknown policy "{policy}": want one of {", ".join(SIMULATED_POLICIES)}'
        )
    by_pool: dict[Pool, list[Entry]] = {}
    for entry in trace.entries():
        by_pool.setdefault((entry.layer, entry.plane), []).append(entry)
    pools: dict[Pool, PoolResult] = {}
    missed = Trace()
    for number, (pool, entries) in enumerate(by_pool.items()):
        where = f"layer {pool[0]}, plane {pool[1]}"
        if isinstance(slots, Mapping) and pool not in slots:
            raise ValueError(f"{where}: no slots are given")
        future = [entry.wanted for entry in entries]
        residency = Residency(
            neurons,
            slots[pool] if isinstance(slots, Mapping) else slots,
            _make_policy(policy, neurons, future, seed=(seed, number)),
        )
        rows = 0
        for entry in entries:
            try:
                loaded = residency.plan(entry.wanted).load_positions
            except ValueError as error:
                raise ValueError(f"step {entry.step}, {where}: {error}") from error
            rows += load_bucket(loaded.size, wanted=entry.wanted.size)
            if loaded.size:
                missed.record(entry.step, *pool, entry.wanted[loaded])
        pools[pool] = PoolResult(
            residency.accesses, residency.hits, residency.loads, rows
        )
    return SimulationResult(pools, missed)


def _make_policy(
    name: str, neurons: int, future: list[np.ndarray], *, seed: tuple[int, int]
) -> Policy:
    if name == "belady":
        return Belady(neurons, future=future)
    if name == "random":
        return Random(neurons, seed=seed)
    return POLICIES[name](neurons)
