"""The tiers as a program on the device sees them: where it finds every record, and what
it did.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax import Array

from m2jax.cache.fetched import Directory, HostRows, Pool, empty_directory
from m2jax.kernels import cuda

if TYPE_CHECKING:
    from m2jax.cache.manager import TierManager


class InProgram:
    """What a program that runs many steps takes, and what it gives back.

    ready: whether there may be such a program: every record is on the device, or stays
    in DRAM where the device reads it.

    The pools are those of the host's loop, whose directories know nothing of what a
    program does and the other way around: who finds that the other has been there
    begins with an empty one.
    """

    def __init__(self, tiers: "TierManager"):
        self._tiers = tiers
        self._directories: dict[tuple[int, str], Directory] = {}
        place = tiers.placement
        stays = place.fixed == len(place.dram_layers)
        served = not place.dram_layers or tiers.neurons <= cuda.MOST_NEURONS
        self.ready = (
            stays
            and served
            and all(
                tiers.memory.address(rows) is not None
                for layer in place.dram_layers
                for rows in tiers.dram.pinned(layer).values()
            )
        )

    def begin(
        self,
    ) -> tuple[
        list[dict[str, Array | HostRows]], list[dict[str, Pool]], dict[str, Array]
    ]:
        """What the program takes: each layer's planes, its pools, which are to be
        donated, and for `end` a count of loads for each plane that has any. Waits for
        the first read of a layer.

        Raises:
            StoreError: the bytes are damaged. TierFailed: reading failed or timed out.
        """
        tiers = self._tiers
        planes, pools = [], []
        for layer, used in enumerate(tiers.placement.used):
            whole = {
                p: tiers._whole[layer, p] for p in used if self._is_whole(layer, p)
            }
            planes.append({**whole, **self._from_dram(layer)})
            pools.append(
                {p: self._pool(layer, p) for p in used if (layer, p) in tiers._pools}
            )
        for directory in tiers._directory.values():
            directory.reset()
        kinds = {plane for of_layer in pools for plane in of_layer}
        return planes, pools, {plane: jnp.int32(0) for plane in kinds}

    def end(
        self,
        steps: int,
        pools: Sequence[dict[str, Pool]],
        loads: dict[str, Array],
    ) -> None:
        """The program ran so many steps: notes its pools and what moved.

        Args:
            loads: plane to records that went into pools.
        """
        tiers = self._tiers
        for layer, of_layer in enumerate(pools):
            for plane, pool in of_layer.items():
                tiers._pools[layer, plane] = pool.records
                self._directories[layer, plane] = pool.directory
        for layer, used in enumerate(tiers.placement.used):
            for plane in used:
                count = steps * tiers.wanted[layer].get(plane, 0)
                tiers.link.accesses += count
                if self._is_whole(layer, plane) or (layer, plane) in tiers._pools:
                    tiers.link.hits += count
                else:
                    whole = tiers.dense(layer, plane)
                    fetched = steps * tiers.placement.whole if whole else count
                    tiers.link.load_bytes += fetched * tiers.record_bytes[plane]
        for plane, count in jax.device_get(loads).items():
            tiers.link.hits -= int(count)
            tiers.link.load_bytes += int(count) * tiers.record_bytes[plane]
        more = max(0, steps - 1) * len(tiers.placement.dram_layers)
        tiers.dram.counters.add(accesses=more, hits=more)

    def forget(self, layer: int, plane: str) -> None:
        """The host has written to the pool: what a program knows of it is wrong."""
        self._directories.pop((layer, plane), None)

    def forget_all(self) -> None:
        self._directories.clear()

    def _is_whole(self, layer: int, plane: str) -> bool:
        return (layer, plane) in self._tiers._whole

    def _from_dram(self, layer: int) -> dict[str, HostRows]:
        tiers = self._tiers
        if layer not in tiers._passing:
            return {}
        buffers = tiers.dram.rows(layer)
        tiers.dram.release(layer)
        found = {}
        for plane, buffer in buffers.items():
            rows, address = tiers._view(plane, buffer), tiers.memory.address(buffer)
            assert address is not None
            like = jax.ShapeDtypeStruct(rows.shape[1:], rows.dtype)
            found[plane] = HostRows(address, len(rows), like)
        return found

    def _pool(self, layer: int, plane: str) -> Pool:
        tiers, key = self._tiers, (layer, plane)
        records = tiers._pools[key]
        directory = self._directories.pop(key, None)
        if directory is None:
            directory = empty_directory(tiers.neurons, records.shape[0])
        return Pool(records, directory, tiers.policy)
