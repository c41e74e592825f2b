"""The DRAM tier: whole layers in a fixed area and a ring, filled from SSD by threads.

The first layers are pinned (fixed area): a layer sweep is cyclic, and there LRU would
hit nothing. The others pass through the ring, read as far ahead as it has free buffers.
Knows layers, planes and buffers; nothing of neurons, slots or devices.
"""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass, field
from math import prod

import numpy as np

from m2jax.aligned import aligned_buffer
from m2jax.cache.reading import DramCounters, Read, read_with_retries
from m2jax.errors import TierFailed
from m2jax.timeline import Timeline, span

READ_TIMEOUT_S = 120.0
PINNED_AHEAD = 2

LayerBuffer = dict[str, np.ndarray]


def _no_answer(layer: int | None) -> TierFailed:
    return TierFailed(
        f"layer {layer}: no answer from the SSD in {READ_TIMEOUT_S:.0f} s"
    )


@dataclass
class _Area:
    """Bytes of a layer, which one they hold or await, and whether that is in use.

    rows: the layer's planes in the memory. accessed: whether it was, since it came.
    claimed: when it came; 0 = never.
    """

    memory: np.ndarray
    rows: LayerBuffer = field(default_factory=dict)
    layer: int | None = None
    future: Future[int] | None = None
    in_use: bool = False
    accessed: bool = False
    claimed: int = 0

    @property
    def awaited(self) -> bool:
        """Whether a visit is still to come."""
        return self.future is not None and not self.accessed


@dataclass
class DramTier:
    """Layers of neuron records on their way from SSD to the device.

    Args:
        read: fills a [N, R] buffer with one layer's plane (`ChunkStore.read`).
        layers: the layers that pass through, in the order a step visits them.
        record_shapes: plane to [N, R] of every plane that passes through; of a store
            whole disk blocks, so that each begins on one.
        planes_of: layer to its planes; a subset of record_shapes.
        fixed: how many of the first layers are pinned.
        ring: buffers for the others; those not in use let reads run ahead.
        timeline: where reads and waits are noted; None = nowhere.
        allocate: makes uint8 memory of the given shape.
        cyclic: whether the first layers are asked for again after the last.
    """

    read: Read
    layers: Sequence[int]
    record_shapes: Mapping[str, tuple[int, int]]
    planes_of: Mapping[int, Sequence[str]]
    fixed: int
    ring: int
    counters: DramCounters = field(default_factory=DramCounters)
    timeline: Timeline | None = None
    allocate: Callable[[tuple[int, int]], np.ndarray] = aligned_buffer
    cyclic: bool = True

    def __post_init__(self) -> None:
        pinned = list(self.layers[: self.fixed])
        passing = self.layers[self.fixed :]
        assert not passing or self.ring > 0
        self._order = {layer: place for place, layer in enumerate(self.layers)}
        self._pinned = {
            layer: self._give(_Area(self._allocate(self._bytes_of(layer))), layer)
            for layer in pinned
        }
        # Any layer may come into any of them, whatever planes it has.
        largest = max(map(self._bytes_of, passing), default=0)
        self._ring = [
            _Area(self._allocate(largest)) for _ in range(min(self.ring, len(passing)))
        ]
        self._claims = 0
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="m2jax-ssd")

    def _bytes_of(self, layer: int) -> int:
        return sum(prod(self.record_shapes[plane]) for plane in self.planes_of[layer])

    def _allocate(self, nbytes: int) -> np.ndarray:
        return self.allocate((1, nbytes))[0]

    def _give(self, area: _Area, layer: int) -> _Area:
        area.layer, area.future, area.accessed = layer, None, False
        area.rows = self._cut(area.memory, layer)
        return area

    def _cut(self, memory: np.ndarray, layer: int) -> LayerBuffer:
        """The layer's planes, one behind the other in the memory of an area."""
        planes, start = {}, 0
        for plane in self.planes_of[layer]:
            shape = self.record_shapes[plane]
            end = start + prod(shape)
            planes[plane] = memory[start:end].reshape(shape)
            start = end
        return planes

    @property
    def held_bytes(self) -> int:
        return sum(area.memory.nbytes for area in self._areas())

    def prefetch_after(self, layer: int) -> None:
        """Starts the reads of the layers that follow, one for each free ring buffer.

        Returns at once. After the last layer comes the first, if the order is cyclic.
        """
        place = self._order[layer]
        reach = sum([not area.in_use for area in self._ring])
        most = max(reach, PINNED_AHEAD)
        if not self.cyclic:
            most = min(most, len(self.layers) - 1 - place)
        for step in range(1, most + 1):
            ahead = self.layers[(place + step) % len(self.layers)]
            area = self._pinned.get(ahead)
            # What is there already, or on its way, is not worth a lock.
            if area is not None and area.future is not None:
                continue
            if step <= reach or area is not None:
                self._start(ahead)

    def rows(self, layer: int) -> LayerBuffer:
        """The layer's records, plane to [N, R] bytes; waits for the read if it must,
        and starts those of the layers after it first: the SSD goes on at once.

        The buffers stay valid until `release(layer)`.

        Raises:
            StoreError: the bytes are damaged. TierFailed: reading failed or timed out.
        """
        area, future = self._start(layer)
        area.in_use = True
        start = time.perf_counter()
        try:
            self.prefetch_after(layer)
            with span(self.timeline, "wait for SSD", layer=layer):
                future.result(timeout=READ_TIMEOUT_S)
        except FutureTimeout:
            area.in_use = False
            raise _no_answer(layer) from None
        except BaseException:
            area.in_use = False
            # The next access reads again, but not while an interrupted wait's read
            # still writes to the buffer.
            with self._lock:
                # Another thread may have forgotten the failure already.
                if future.done() and area.future is future:
                    area.future = None
                    area.layer = layer if layer in self._pinned else None
            raise
        finally:
            self.counters.add(waited_s=time.perf_counter() - start)
        self.counters.add(accesses=1, hits=int(area.accessed))
        area.accessed = True
        return area.rows

    def is_here(self, layer: int) -> bool:
        """Whether `rows` would give the records at once."""
        area = self._area(layer)
        future = None if area is None else area.future
        if future is None or not future.done() or future.cancelled():
            return False
        return future.exception() is None

    def is_pinned(self, layer: int) -> bool:
        """Whether the layer's rows stay where they are."""
        return layer in self._pinned

    def pinned(self, layer: int) -> LayerBuffer:
        """The rows of a layer that stays where it is; they may not be read yet."""
        return self._pinned[layer].rows

    def release(self, layer: int) -> None:
        """Nobody reads the layer's rows any more: the ring may reuse the buffer."""
        area = self._area(layer)
        if area is not None:
            area.in_use = False

    def release_all(self) -> None:
        """After a step that was given up."""
        for area in self._areas():
            area.in_use = False

    def forget_failures(self) -> None:
        """Reads that failed unawaited, maybe long ago, will be made again."""
        with self._lock:
            for area in self._areas():
                future = area.future
                if future is not None and future.done() and future.exception():
                    area.future = None

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _areas(self) -> list[_Area]:
        return [*self._pinned.values(), *self._ring]

    def _area(self, layer: int) -> _Area | None:
        if layer in self._pinned:
            return self._pinned[layer]
        return next((area for area in self._ring if area.layer == layer), None)

    def _start(self, layer: int) -> tuple[_Area, Future[int]]:
        """The area that holds or awaits the layer, and its read; claims one and reads
        if there is none."""
        with self._lock:
            area = self._area(layer)
            if area is None:
                area = self._give(self._claim(), layer)
            if area.future is None:
                area.future = self._pool.submit(self._fill, layer, area.rows)
            return area, area.future

    def _claim(self) -> _Area:
        """The oldest ring buffer that nobody uses; of a layer that is still to be
        visited only if there is no other."""
        free = [area for area in self._ring if not area.in_use]
        assert free, "every ring buffer is in use: a release is missing"
        area = min(free, key=lambda area: (area.awaited, area.claimed))
        self._claims += 1
        area.claimed = self._claims
        self._settle(area)
        return area

    def _settle(self, area: _Area) -> None:
        """Ends a read that nobody waited for, so that the buffer can be reused."""
        future = area.future
        if future is None or future.cancel():
            return
        if wait([future], READ_TIMEOUT_S).not_done:
            raise _no_answer(area.layer)

    def _fill(self, layer: int, planes: LayerBuffer) -> int:
        total = 0
        for plane, rows in planes.items():
            with span(self.timeline, "SSD read", layer=layer, plane=plane):
                retried = self.counters.retried
                read_with_retries(self.read, layer, plane, rows, count=retried)
                total += rows.nbytes
        self.counters.add(read_bytes=total)
        return total
