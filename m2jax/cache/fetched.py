"""The link within a program on the device: records that it fetches from DRAM by itself,
and slot pools whose directories it keeps.

A directory decides what `residency.Residency` decides, slot by slot; see there.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from m2jax.kernels import cuda


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["address"],
    meta_fields=["rows", "like"],
)
@dataclass(frozen=True)
class HostRows:
    """[N, R] records in DRAM, where the device may read them.

    address: see `cuda.rows_from_host`. rows: N. like: shape [R] and dtype of a record.
    """

    address: Array
    rows: int
    like: jax.ShapeDtypeStruct

    def take(self, ids: Array) -> Array:
        """The records of ids [K]: [K, R]."""
        return cuda.rows_from_host(self.address, ids, self.like, rows=self.rows)

    def whole(self) -> Array:
        """[N, R]."""
        return self.take(jnp.arange(self.rows, dtype=jnp.int32))


class Directory(NamedTuple):
    """Which neurons have a slot, all int32; see `Residency`.

    slot_of: [F], -1 = none. neuron_in: [S]. priority: [F], the lowest goes first.
    counts: [2], slots below the first are taken; wanted sets so far.
    """

    slot_of: Array
    neuron_in: Array
    priority: Array
    counts: Array


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["records", "directory"],
    meta_fields=["policy"],
)
@dataclass(frozen=True)
class Pool:
    """records: [S, R] in slots. policy: "lru" or "lfu"."""

    records: Array
    directory: Directory
    policy: str


class Taken(NamedTuple):
    """Records [S, R] that hold the wanted ones; their slots, int32 [K], None where all
    are wanted; the pool, if there is one; int32, how many records were loaded into it.
    """

    records: Array
    slots: Array | None
    pool: Pool | None
    loads: Array | int = 0


def empty_directory(neurons: int, slots: int) -> Directory:
    return Directory(
        slot_of=jnp.full(neurons, -1, jnp.int32),
        neuron_in=jnp.zeros(slots, jnp.int32),
        priority=jnp.zeros(neurons, jnp.int32),
        counts=jnp.zeros(2, jnp.int32),
    )


def take(source: Array | HostRows, pool: Pool | None, ids: Array | None) -> Taken:
    """The wanted records of one layer's plane, as part of a traced program.

    Args:
        source: the plane whole on the device, or where the device fetches it.
        pool: its slots, where it has some.
        ids: int32 [K] distinct; None = all.
    """
    if not isinstance(source, HostRows):
        return Taken(source, ids, pool)
    if ids is None:
        return Taken(source.whole(), None, pool)
    if pool is None:
        return Taken(source.take(ids), jnp.arange(ids.shape[0]), pool)
    directory, slots, missing, loads = cuda.give_slots(
        pool.directory, ids, policy=pool.policy
    )
    records = cuda.fill_from_host(
        pool.records, source.address, missing, slots, rows=source.rows
    )
    pool = replace(pool, records=records, directory=Directory(*directory))
    return Taken(records, slots, pool, loads)
