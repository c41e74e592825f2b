"""A ChunkStore whose n-th read goes wrong on purpose. Counts what it handed out."""

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from m2jax.store import ChunkStore, Store

Fault = Callable[[int, str], None]


@dataclass
class FaultyStore:
    """Passes reads on; `fault(layer, plane)` runs before those that `when` names.

    when: which reads are hit, by their number from 0; set it anew at any time.
    reads: (layer, plane) of every read that was begun, in order.
    read_bytes: of the reads that ended well.
    """

    inner: ChunkStore
    fault: Fault = lambda layer, plane: None
    when: Callable[[int], bool] = lambda number: False
    reads: list[tuple[int, str]] = field(default_factory=list)
    read_bytes: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def read(self, layer: int, plane: str, out: np.ndarray) -> None:
        self._begin(layer, plane)
        self.inner.read(layer, plane, out)
        with self._lock:
            self.read_bytes += out.nbytes

    def read_records(
        self,
        layer: int,
        plane: str,
        ids: np.ndarray,
        out: np.ndarray,
        slots: np.ndarray,
    ) -> int:
        self._begin(layer, plane)
        read = self.inner.read_records(layer, plane, ids, out, slots)
        with self._lock:
            self.read_bytes += read
        return read

    def _begin(self, layer: int, plane: str) -> None:
        with self._lock:
            number = len(self.reads)
            self.reads.append((layer, plane))
        if self.when(number):
            self.fault(layer, plane)

    def break_next(self, fault: Fault, *, count: int | None = 1, skip: int = 0) -> None:
        """Lets `skip` reads pass, then hits `count` of them (None: all that follow)."""
        first = len(self.reads) + skip
        end = None if count is None else first + count
        self.fault = fault
        self.when = lambda number: number >= first and (end is None or number < end)

    def heal(self) -> None:
        self.when = lambda number: False


def raises(error: BaseException) -> Fault:
    def fault(layer: int, plane: str) -> None:
        raise error

    return fault


def delays(seconds: float) -> Fault:
    return lambda layer, plane: time.sleep(seconds)


def damages(store: Store, damage: Callable[[Path], None]) -> Fault:
    """Harms the first chunk file of what is about to be read."""
    return lambda layer, plane: damage(chunk_file(store, layer, plane))


def chunk_file(store: Store, layer: int, plane: str) -> Path:
    return store.path / f"neurons/{layer:02}/{plane}/c/0/0"


def flip(path: Path) -> None:
    """One bit, in the middle."""
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 8]))


def cut(path: Path) -> None:
    """The last byte."""
    os.truncate(path, path.stat().st_size - 1)


def remove(path: Path) -> None:
    path.unlink()


def swap(first: Path, second: Path) -> None:
    kept = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(kept)
