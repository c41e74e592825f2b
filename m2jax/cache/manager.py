"""The only place where the tiers meet: wanted neurons in, device arrays out.

Asks the DRAM tier for rows, the directory (`Residency`) for slots, and the device for
copies; counts what moved. Knows nothing of attention, tokens or text.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from threading import Lock
from typing import Protocol

import jax
import numpy as np
from jax import Array

from m2jax.aligned import aligned_buffer
from m2jax.cache.access import LayerAccess
from m2jax.cache.device import as_it_lies, init_pool, record_view
from m2jax.cache.dram import (
    DramTier,
    LayerBuffer,
)
from m2jax.cache.in_program import InProgram
from m2jax.cache.mapped import MappedMemory
from m2jax.cache.policy import POLICIES
from m2jax.cache.reading import Read, ReadRecords, no_records, read_with_retries
from m2jax.cache.records import RecordTier
from m2jax.cache.residency import Residency
from m2jax.cache.trace import Trace
from m2jax.timeline import Timeline, span

# As many layers may be in transit, see `plan.STAGING_BUFFERS`.
STAGED_AHEAD = 2


class PlacementLike(Protocol):
    """What of `plan.Placement` the manager uses."""

    @property
    def used(self) -> Sequence[Sequence[str]]: ...
    @property
    def slots(self) -> Mapping[str, tuple[int, ...]]: ...
    @property
    def whole(self) -> int: ...
    @property
    def dram_layers(self) -> tuple[int, ...]: ...
    @property
    def fixed(self) -> int: ...
    @property
    def ring(self) -> int: ...
    @property
    def dram_slots(self) -> Mapping[str, tuple[int, ...]]: ...
    @property
    def in_place(self) -> bool: ...
    def streamed(self, layer: int) -> Sequence[str]: ...


@dataclass
class LinkCounters:
    """DRAM to device since the start.

    accesses, hits: records wanted by decode steps, and those that were there.
    load_bytes: all that crossed, padding of transfers included; start-up apart.
    startup_bytes: resident planes, once, from SSD straight to the device.
    startup_retries: of these reads.
    """

    accesses: int = 0
    hits: int = 0
    load_bytes: int = 0
    startup_bytes: int = 0
    startup_retries: int = 0


@dataclass
class TierManager:
    """Tiers of one engine.

    Args:
        read: fills a buffer with one layer's plane.
        placement: slots per plane and layer, and what DRAM holds.
        record_bytes: plane to bytes of a record.
        neurons: F. original_dtype: that of plane w16.
        wanted: per layer, plane to records that a decode step wants; F = the whole
            plane.
        policy: name of the eviction policy of every pool.
        trace: where the wanted sets are noted, under `step`; None = nowhere.
        timeline: where the tiers' events are noted (`profile`); None = nowhere.
        read_records: reads some of a plane's records; wanted where the placement keeps
            records in DRAM.
        end_reads: lets go of what the reads need; called by `close`.
    """

    read: Read
    placement: PlacementLike
    record_bytes: Mapping[str, int]
    neurons: int
    original_dtype: str
    wanted: Sequence[Mapping[str, int]]
    policy: str
    link: LinkCounters = field(default_factory=LinkCounters)
    trace: Trace | None = None
    step: int = 0
    timeline: Timeline | None = None
    read_records: ReadRecords = no_records
    end_reads: Callable[[], None] = lambda: None

    def __post_init__(self) -> None:
        place = self.placement
        self.memory = MappedMemory()
        self.dram = DramTier(
            self.read,
            place.dram_layers,
            {plane: (place.whole, size) for plane, size in self.record_bytes.items()},
            {layer: place.streamed(layer) for layer in place.dram_layers},
            fixed=place.fixed,
            ring=place.ring,
            allocate=self.memory.buffer,
            # After a prompt tokens read records, and there may be no other prompt.
            cyclic=not place.dram_slots,
        )
        self.records = RecordTier(
            self.read_records,
            {
                (layer, plane): count
                for plane, counts in place.dram_slots.items()
                for layer, count in enumerate(counts)
                if count
            },
            self.record_bytes,
            neurons=self.neurons,
            policy=POLICIES[self.policy],
            counters=self.dram.counters,
            allocate=self.memory.buffer,
        )
        self._passing = frozenset(place.dram_layers)
        self._whole: dict[tuple[int, str], Array] = {}
        self._pools: dict[tuple[int, str], Array] = {}
        self._directory: dict[tuple[int, str], Residency] = {}
        self._staged_bytes = [0, 0]
        self.peak_staged_bytes = 0
        self._ahead: dict[int, Future[dict[str, Array]]] = {}
        # Visits whose planes are on their way.
        self._begun: dict[int, tuple[ExitStack, dict[str, Array]]] = {}
        # Held by whoever takes all layers in turn.
        self.at_work = Lock()
        self._stager = ThreadPoolExecutor(1, thread_name_prefix="m2jax-stage")
        self.in_program = InProgram(self)

    def load_resident(self, progress: Callable[[int], None]) -> None:
        """Brings whole planes to the device and makes the empty pools.

        Args:
            progress: called with the bytes of each plane that arrived.
        """
        count = self.dram.counters.retried
        for plane, slots in self.placement.slots.items():
            size = self.record_bytes[plane]
            for layer, held in enumerate(slots):
                if held == self.placement.whole:
                    buffer = aligned_buffer((held, size))
                    read_with_retries(self.read, layer, plane, buffer, count=count)
                    rows = as_it_lies(self._view(plane, buffer))
                    self._whole[layer, plane] = jax.block_until_ready(rows)
                    self.link.startup_bytes += buffer.nbytes
                    progress(buffer.nbytes)
                elif held:
                    self._make_pool(layer, plane)
        self.link.startup_retries = self.dram.counters.retries

    @property
    def held_bytes(self) -> int:
        """On the device now, with the most that was ever in transit."""
        arrays = [*self._whole.values(), *self._pools.values()]
        return sum(array.nbytes for array in arrays) + self.peak_staged_bytes

    def dense(self, layer: int, plane: str) -> bool:
        """Whether every step wants the layer's whole plane."""
        return self.wanted[layer].get(plane) == self.neurons

    def whole_planes(self, layer: int) -> dict[str, Array]:
        """Every plane that the layer uses, whole: resident, or from DRAM. Those from
        DRAM may lie there until `computed(layer)`."""
        if layer in self._ahead:
            awaited = "transfer" if self.dram.is_here(layer) else "wait for SSD"
            with span(self.timeline, awaited, layer=layer):
                planes = self._ahead.pop(layer).result()
            # Into the buffer of the layer before it, which no visit has asked for yet;
            # after an earlier one, those still staged would be read again.
            if not self._ahead:
                self.dram.prefetch_after(layer)
            return planes
        if layer in self._begun:
            visit, planes = self._begun.pop(layer)
            visit.close()
            return planes
        with self.layer(layer, whole=True) as access:
            return {plane: access.whole(plane) for plane in self.placement.used[layer]}

    def stage_ahead(self) -> None:
        """While something else computes: the next sweep's first layers come to the
        device, as many as may be in transit. Only that sweep may follow, or
        `forget_ahead`."""
        for layer in self.placement.dram_layers[:STAGED_AHEAD]:
            self._ahead[layer] = self._stager.submit(self._stage, layer)

    def stage_after(self, layer: int) -> None:
        """Begins to copy the next layer to the device, if its rows are in DRAM: a copy
        waits for all that was dispatched before it, so call this before the layer's
        own compute, and when the layer before it is held no more."""
        following = layer + 1
        here = following in self._passing and self.dram.is_here(following)
        staged = following in self._ahead or following in self._begun
        if not here or staged or self.placement.in_place:
            return
        with ExitStack() as visit:
            access = visit.enter_context(self.layer(following, whole=True))
            used = self.placement.used[following]
            planes = {plane: access.whole(plane) for plane in used}
            self._begun[following] = visit.pop_all(), planes

    def forget_ahead(self) -> None:
        """There is no sweep after all."""
        for staged in self._ahead.values():
            staged.cancel()
        wait(self._ahead.values())
        for layer in self._ahead:
            self.computed(layer)
        self._ahead.clear()
        for visit, _ in self._begun.values():
            visit.close()
        self._begun.clear()

    def _stage(self, layer: int) -> dict[str, Array]:
        with self.layer(layer, whole=True) as access:
            staged = {p: access.whole(p) for p in self.placement.used[layer]}
        self.dram.prefetch_after(layer)
        return staged

    @contextmanager
    def layer(self, layer: int, *, whole: bool = False) -> Iterator[LayerAccess]:
        """A visit to one layer, in step order: starts the reads of the layers after
        it, waits for its DRAM rows, and frees the buffer when the device has copied;
        where it sees the rows in place, `computed` does.

        Args:
            whole: whole planes are asked for. Else, where DRAM keeps records, they
                alone are: no layer is read.
        """
        buffers: LayerBuffer = {}
        if layer in self._passing and (whole or not self.placement.dram_slots):
            buffers = self.dram.rows(layer)
        access = LayerAccess(self, layer, buffers)
        try:
            yield access
        finally:
            awaited = [*access.staged]
            # Rows that stay need not be waited for.
            if not self.dram.is_pinned(layer):
                awaited += access.fetching
            if awaited:
                with span(self.timeline, "transfer", layer=layer):
                    jax.block_until_ready(awaited)
            if not access.lent:
                self.dram.release(layer)
            self._staged_bytes.append(sum(array.nbytes for array in access.staged))
            del self._staged_bytes[0]
            self.peak_staged_bytes = max(
                self.peak_staged_bytes, sum(self._staged_bytes)
            )

    def is_here(self, layer: int) -> bool:
        """Whether a visit to the layer need not wait for the SSD."""
        return layer not in self._passing or self.dram.is_here(layer)

    def computed(self, layer: int) -> None:
        """All that was to be computed from the layer's rows is done: their buffer may
        be read into again."""
        self.dram.release(layer)

    def resident(self, layer: int, plane: str) -> Array:
        """A plane that is on the device whole; KeyError where it is not."""
        return self._whole[layer, plane]

    def profile(self, timeline: Timeline | None) -> None:
        """Notes in `timeline` from now on what the tiers do; None stops it."""
        self.timeline = self.dram.timeline = self.records.timeline = timeline

    def count_resident_steps(self, steps: int, plane: str) -> None:
        """Notes that so many steps read a plane whole, which every layer has on the
        device."""
        wanted = steps * sum(at == plane for _, at in self._whole) * self.neurons
        self.link.accesses += wanted
        self.link.hits += wanted

    def abandon(self) -> None:
        """After a step that failed: frees DRAM buffers, empties the pools' directory.

        A donated pool may be gone and its slots unknown, so every pool starts anew.
        """
        self.forget_ahead()
        self.dram.release_all()
        self.in_program.forget_all()
        for (layer, plane), directory in self._directory.items():
            directory.reset()
            self._pools[layer, plane] = self._empty_pool(layer, plane)

    def close(self) -> None:
        """Lets go of everything, also where a computation had failed."""
        with ExitStack() as stack:
            stack.callback(self.end_reads)
            stack.callback(self.memory.close)
            stack.callback(lambda: jax.block_until_ready(list(self._pools.values())))
            stack.callback(self.dram.close)
            stack.callback(self._stager.shutdown, wait=True, cancel_futures=True)

    def _empty_pool(self, layer: int, plane: str) -> Array:
        row = np.empty(self.record_bytes[plane], np.uint8)
        row = record_view(row, plane=plane, original_dtype=self.original_dtype)
        return init_pool(self.placement.slots[plane][layer], row)

    def _make_pool(self, layer: int, plane: str) -> None:
        slots = self.placement.slots[plane][layer]
        policy = POLICIES[self.policy](self.neurons)
        self._directory[layer, plane] = Residency(self.neurons, slots, policy)
        self._pools[layer, plane] = self._empty_pool(layer, plane)

    def _view(self, plane: str, rows: np.ndarray) -> np.ndarray:
        return record_view(rows, plane=plane, original_dtype=self.original_dtype)
