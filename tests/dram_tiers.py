"""Small DRAM tiers over records that are known, and the engine's way to use them."""

import threading

import numpy as np

from m2jax.cache.dram import DramTier
from tests.faulty_store import FaultyStore

SHAPES = {"q4": (6, 24), "w16": (6, 96)}
WAIT_S = 20.0


class Rows:
    """Neuron records that are known: random bytes, drawn from layer and plane."""

    def read(self, layer: int, plane: str, out: np.ndarray) -> None:
        out[:] = rows_of(layer, plane)


def rows_of(layer: int, plane: str) -> np.ndarray:
    generator = np.random.default_rng([layer, len(plane)])
    return generator.integers(0, 256, SHAPES[plane], np.uint8)


class Gate:
    """Stops every read until it is opened."""

    def __init__(self):
        self.begun, self.open = threading.Semaphore(0), threading.Event()

    def __call__(self, layer: int, plane: str) -> None:
        self.begun.release()
        assert self.open.wait(WAIT_S)


def tier_of(store: FaultyStore, *, layers: int, fixed: int, ring: int) -> DramTier:
    """One plane, layers 0, 1 and so on."""
    return DramTier(
        store.read,
        range(layers),
        {"q4": SHAPES["q4"]},
        {layer: ["q4"] for layer in range(layers)},
        fixed=fixed,
        ring=ring,
    )


def visit(tier: DramTier, layer: int) -> np.ndarray:
    """The engine's way to a layer's rows: a copy of what lay in the buffer."""
    rows = tier.rows(layer)["q4"]
    found = rows.copy()
    tier.release(layer)
    return found


def settle(tier: DramTier) -> None:
    """Waits until no read is in flight."""
    for area in tier._areas():
        if area.future is not None:
            area.future.exception(WAIT_S)
