"""One visit to a layer: whole planes, or the wanted records, for the device.

What a visit may do with the tiers; `manager` owns them and opens the visits.
"""

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from m2jax.cache.buckets import load_bucket
from m2jax.cache.device import (
    as_it_lies,
    fill,
    fill_from_host,
    from_host,
    in_order,
    to_device,
)
from m2jax.cache.dram import LayerBuffer
from m2jax.cache.residency import Plan
from m2jax.timeline import span

if TYPE_CHECKING:
    from m2jax.cache.manager import TierManager

Records = Array | np.ndarray
Slots = Array | np.ndarray | None


class LayerAccess:
    """What one visit to a layer may take: copies, or on a CPU the rows in place, which
    are valid until `TierManager.computed`.

    staged: copies of whole planes. fetching: what the device makes of rows that it
    fetches itself. lent: whether rows are seen in place.
    """

    def __init__(self, tiers: "TierManager", layer: int, buffers: LayerBuffer):
        self._tiers, self._layer, self._buffers = tiers, layer, buffers
        self.staged: list[Array] = []
        self.fetching: list[Array] = []
        self.lent = False

    def whole(self, plane: str) -> Array:
        """All records of a plane, [N, R], in the order of neurons."""
        resident = self._tiers._whole.get((self._layer, plane))
        if resident is not None:
            return resident
        tiers = self._tiers
        rows = tiers._view(plane, self._buffers[plane])
        if tiers.placement.in_place:
            return self._lend(rows)
        tiers.link.load_bytes += rows.nbytes
        with span(tiers.timeline, "transfer", layer=self._layer, plane=plane):
            self.staged.append(to_device(rows))
        return self.staged[-1]

    def base(self) -> Array | None:
        """Plane q4 where a decode step wants it whole; else None."""
        if not self._tiers.dense(self._layer, "q4"):
            return None
        return self._dense_step("q4")

    def needs_ids(self, plane: str) -> bool:
        """Whether the host must see which records of the plane a step wants: to wait
        for them is to wait for all that was computed before."""
        tiers, key = self._tiers, (self._layer, plane)
        if tiers.dense(*key):
            return False
        if tiers.trace is not None or key in tiers._pools or key in tiers.records:
            return True
        if key in tiers._whole or tiers.placement.in_place:
            return False
        return tiers.memory.address(self._buffers[plane]) is None

    def wanted(
        self, plane: str, named: Array, ids: np.ndarray | None
    ) -> tuple[Records, Slots]:
        """Records of a plane that hold the wanted ones, and their slots.

        Args:
            plane: one that the layer's mix wants.
            named: int32 [K] distinct, on the device.
            ids: the same on the host; None where `needs_ids` says no.

        Returns:
            records [S, R] and int32 slots [K] in the order of ids; slots is None where
            every record of the plane is wanted.
        """
        tiers, key = self._tiers, (self._layer, plane)
        if tiers.dense(*key):
            return self._dense_step(plane), None
        if tiers.trace is not None:
            assert ids is not None
            tiers.trace.record(tiers.step, self._layer, plane, ids)
        count = tiers.wanted[self._layer][plane]
        tiers.link.accesses += count
        if key in tiers._whole:
            tiers.link.hits += count
            return tiers._whole[key], named
        if key not in tiers._pools:
            rows, places = self._rows(plane, ids)
            if places is not ids:
                named = jnp.asarray(places)
            if tiers.placement.in_place:
                return self._lend(rows), named
            tiers.link.load_bytes += count * tiers.record_bytes[plane]
            return self._some(rows, named, places), in_order(count)
        assert ids is not None
        with span(tiers.timeline, "plan", layer=self._layer, plane=plane):
            plan = tiers._directory[key].plan(ids)
        loads = plan.load_positions.size
        tiers.link.hits += count - loads
        if not loads:
            return tiers._pools[key], plan.slots
        rows, places = self._rows(plane, ids[plan.load_positions])
        assert places is not None
        about = {"layer": self._layer, "plane": plane, "records": loads}
        with span(tiers.timeline, "transfer", **about):
            slots = self._load(plane, plan, rows, places)
        return tiers._pools[key], slots

    def _rows(
        self, plane: str, ids: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Rows in DRAM that hold records, and which of them: the ids themselves where
        the plane is there whole."""
        tiers, key = self._tiers, (self._layer, plane)
        if key not in tiers.records:
            return tiers._view(plane, self._buffers[plane]), ids
        assert ids is not None
        pool, places = tiers.records.rows(*key, ids)
        return tiers._view(plane, pool), places

    def _lend(self, rows: np.ndarray) -> Array:
        """The device's view of rows where they lie: the buffer is aligned for it."""
        self.lent = True
        return as_it_lies(rows)

    def _some(
        self, rows: np.ndarray, named: Array, places: np.ndarray | None
    ) -> Records:
        """Copies of some rows, in the order of `named`, which is `places`."""
        address = self._tiers.memory.address(rows)
        if address is None:
            assert places is not None
            return rows[places]
        like = jax.ShapeDtypeStruct(rows.shape[1:], rows.dtype)
        self.fetching.append(from_host(address, named, like=like, rows=len(rows)))
        return self.fetching[-1]

    def _dense_step(self, plane: str) -> Array:
        tiers = self._tiers
        tiers.link.accesses += tiers.neurons
        if (self._layer, plane) in tiers._whole:
            tiers.link.hits += tiers.neurons
        return self.whole(plane)

    def _load(
        self, plane: str, plan: Plan, rows: np.ndarray, places: np.ndarray
    ) -> Array | np.ndarray:
        """Copies the loads into their slots, padded to a transfer bucket.

        Args:
            places: int32 [M], which of `rows` each load is.

        Returns:
            The slots of all that are wanted.
        """
        tiers, key = self._tiers, (self._layer, plane)
        pool = tiers._pools[key]
        tiers.in_program.forget(*key)
        loads = plan.load_positions.size
        wanted = tiers.wanted[self._layer][plane]
        address = tiers.memory.address(rows)
        if address is not None:
            # Padding costs nothing where the device fetches, so there is one size; and
            # one array crosses, because each one costs more than its bytes.
            load = np.full((3, wanted), -1, np.int32)
            load[0] = plan.slots
            load[1] = pool.shape[0]
            load[1, :loads] = plan.load_slots
            load[2, :loads] = places
            tiers._pools[key], slots = fill_from_host(
                pool, load, address, rows=len(rows)
            )
            self.fetching.append(slots)
            tiers.link.load_bytes += loads * tiers.record_bytes[plane]
            return slots
        bucket = load_bucket(loads, wanted=wanted)
        slots = np.empty(bucket, np.int32)
        slots[:loads] = plan.load_slots
        slots[loads:] = pool.shape[0]
        block = np.empty((bucket, rows.shape[1]), rows.dtype)
        # All are in range; mode "raise" would gather into another block first.
        rows.take(places, axis=0, out=block[:loads], mode="clip")
        block[loads:] = 0
        tiers._pools[key] = fill(pool, slots, block)
        tiers.link.load_bytes += block.nbytes
        return plan.slots
