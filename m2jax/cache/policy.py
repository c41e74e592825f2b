"""Who is evicted first: a priority per neuron of one (layer, plane) pool.

Knows neither slots nor who is resident; `Residency` breaks ties by the lowest slot.
There is no class for ATU: it is LRU in a pool of S = K slots.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np


class Policy(Protocol):
    """What a `Residency` asks.

    priority: int64 [F], below 2**63 - 1. Of the residents that are not wanted, the
        lowest goes first; what a neuron without a slot has is ignored.
    """

    priority: np.ndarray

    def touch(self, wanted: np.ndarray) -> None:
        """Notes one step: integer [K] ids, all of which have slots by now."""
        ...

    def reset(self) -> None:
        """Forgets every step."""
        ...


class LRU:
    """Evicts the neuron that was last wanted longest ago.

    priority[i] = the last step that wanted neuron i
    """

    def __init__(self, neurons: int):
        self.priority = np.zeros(neurons, np.int64)
        self._step = 0

    def touch(self, wanted: np.ndarray) -> None:
        self._step += 1
        self.priority[wanted] = self._step

    def reset(self) -> None:
        self.priority.fill(0)
        self._step = 0


class LFU:
    """Evicts the neuron that the fewest steps wanted.

    priority[i] = steps that wanted neuron i, whether it was resident between or not

    Counts never age: what was hot in a long text stays so in the next one.
    """

    def __init__(self, neurons: int):
        self.priority = np.zeros(neurons, np.int64)

    def touch(self, wanted: np.ndarray) -> None:
        self.priority[wanted] += 1

    def reset(self) -> None:
        self.priority.fill(0)


class Random:
    """Evicts anyone, with equal chances: the floor that a policy must beat."""

    def __init__(self, neurons: int, *, seed: Sequence[int]):
        self._seed = tuple(seed)
        self.priority = np.zeros(neurons, np.int64)
        self.reset()

    def touch(self, wanted: np.ndarray) -> None:
        self._draw()

    def reset(self) -> None:
        self._generator = np.random.default_rng(self._seed)
        self._draw()

    def _draw(self) -> None:
        size = self.priority.size
        self.priority[:] = self._generator.integers(1 << 62, size=size)


class Belady:
    """Evicts the neuron that is wanted again last: no policy makes fewer loads.

    priority[i] = -(the next step that wants neuron i)

    Args:
        neurons: F.
        future: the int32 [K] wanted sets of every step, in order.

    Raises:
        ValueError: from `touch`, when a step is not the one that the future foretold.
    """

    def __init__(self, neurons: int, *, future: Sequence[np.ndarray]):
        self.priority = np.empty(neurons, np.int64)
        self._future = future
        self._next_uses = next_uses(future)
        self.reset()

    def touch(self, wanted: np.ndarray) -> None:
        if self._step == len(self._future):
            raise ValueError(f"step {self._step}: the future has {self._step} steps")
        if not np.array_equal(wanted, self._future[self._step]):
            raise ValueError(f"step {self._step}: not the wanted set of the future")
        self.priority[wanted] = -self._next_uses[self._step]
        self._step += 1

    def reset(self) -> None:
        self.priority.fill(-len(self._future))
        self._step = 0


def next_uses(future: Sequence[np.ndarray]) -> list[np.ndarray]:
    """For each id of each wanted set, the next step that wants it; len(future) if none.

    Returns:
        One int64 [K] array a step, in the order of its ids.
    """
    if not future:
        return []
    ids = np.concatenate(future)
    sizes = [wanted.size for wanted in future]
    steps = np.repeat(np.arange(len(future)), sizes)
    # Stable: equal ids stand in the order of their steps.
    order = np.argsort(ids, kind="stable")
    again = np.full(ids.size, len(future), np.int64)
    same = ids[order[1:]] == ids[order[:-1]]
    again[order[:-1][same]] = steps[order[1:][same]]
    return np.split(again, np.cumsum(sizes)[:-1])


POLICIES: dict[str, Callable[[int], Policy]] = {"lru": LRU, "lfu": LFU}
