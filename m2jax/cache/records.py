"""Records in DRAM by neuron: of each plane those that were wanted last, the others read
from SSD when they are wanted.

The other way to keep a plane in DRAM than `dram`, which knows whole layers. Knows
neurons and slots; nothing of devices.
"""

import time
from collections.abc import Callable, Mapping

import numpy as np

from m2jax.cache.policy import Policy
from m2jax.cache.reading import DramCounters, ReadRecords, read_with_retries
from m2jax.cache.residency import Plan, Residency
from m2jax.timeline import Timeline, span

Place = tuple[int, str]


class RecordTier:
    """A slot pool in DRAM for each (layer, plane).

    Args:
        read: reads records into rows (`ChunkStore.read_records`).
        slots: (layer, plane) to S.
        record_bytes: plane to R.
        neurons: F.
        policy: makes the eviction policy of a pool.
        counters: where reads are counted.
        allocate: makes uint8 memory of the given shape.
    """

    def __init__(
        self,
        read: ReadRecords,
        slots: Mapping[Place, int],
        record_bytes: Mapping[str, int],
        *,
        neurons: int,
        policy: Callable[[int], Policy],
        counters: DramCounters,
        allocate: Callable[[tuple[int, int]], np.ndarray],
    ):
        self._read, self._counters = read, counters
        self.timeline: Timeline | None = None
        self._pools = {
            (layer, plane): allocate((count, record_bytes[plane]))
            for (layer, plane), count in slots.items()
        }
        self._directory = {
            place: Residency(neurons, count, policy(neurons))
            for place, count in slots.items()
        }

    @property
    def held_bytes(self) -> int:
        return sum(pool.nbytes for pool in self._pools.values())

    def __contains__(self, place: Place) -> bool:
        return place in self._pools

    def rows(
        self, layer: int, plane: str, ids: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Some of a plane's records, read if they are not here.

        Args:
            ids: int32 [K] distinct, no more than the pool has slots.

        Returns:
            The pool, uint8 [S, R], and int32 [K], the row of each. They stay until the
            next call for the same layer and plane.

        Raises:
            StoreError: the bytes are damaged. TierFailed: the reads kept failing.
        """
        pool, directory = self._pools[layer, plane], self._directory[layer, plane]
        try:
            plan = directory.plan(ids)
            self._load(layer, plane, ids, plan)
        except BaseException:
            # Nobody knows which of the rows came.
            directory.reset()
            raise
        return pool, plan.slots

    def _load(self, layer: int, plane: str, ids: np.ndarray, plan: Plan) -> None:
        """Reads what a plan gave slots to."""
        loads = plan.load_positions.size
        self._counters.add(accesses=len(ids), hits=len(ids) - loads)
        if not loads:
            return
        start = time.perf_counter()
        missing = ids[plan.load_positions]
        order = np.argsort(missing)
        about = {"layer": layer, "plane": plane, "records": loads}
        with span(self.timeline, "wait for SSD", **about):
            read = read_with_retries(
                *(self._read, layer, plane),
                *(missing[order], self._pools[layer, plane], plan.load_slots[order]),
                count=self._counters.retried,
            )
        self._counters.add(read_bytes=read, waited_s=time.perf_counter() - start)
