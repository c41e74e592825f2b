"""What this machine moves in a second: memory, link, SSD. Measured, kept, read again.

`doctor` measures anew; `bench` and `simulate` take what was kept, or measure.
"""

import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from m2jax import disk
from m2jax.cache.device import to_device
from m2jax.cache.mapped import MappedMemory
from m2jax.cores import cores
from m2jax.machine import cpu_model
from m2jax.memory import free_device_bytes, free_dram_bytes
from m2jax.user_cache import cache_folder
from m2jax.whole_file import whole_file

FILE = "bandwidths.json"
VERSION = 2
MEMORY_BYTES = 256 << 20
LINK_BYTES = (1 << 20, 64 << 20)
DEVICE_BYTES = 1 << 30
# So many that their dispatch is hidden.
DEVICE_READS = 8
LEAST_S = 0.2


@dataclass(frozen=True)
class Bandwidths:
    """Bytes a second.

    memory: read by all cores at once. link: host to device, by bytes of a transfer,
    from pageable memory; mapped_link: from memory registered with the device's driver,
    as that of the DRAM tier is where that works. ssd: one entry a way of reading:
    {"bytes", "in_flight", "direct", "bytes_per_s"}. device: its own memory, read by
    itself; None on a CPU, whose it is.
    """

    memory: float
    link: dict[str, float]
    ssd: list[dict[str, Any]]
    mapped_link: dict[str, float] = field(default_factory=dict)
    device: float | None = None

    @property
    def best_link(self) -> float:
        return max({**self.link, **self.mapped_link}.values())

    @property
    def device_memory(self) -> float:
        return self.device or self.memory

    @property
    def best_ssd(self) -> float | None:
        return max((entry["bytes_per_s"] for entry in self.ssd), default=None)


def measured(ways: list[disk.WayToRead]) -> Bandwidths:
    """Memory and link now, beside what `disk.measure_ways` found."""
    plain, mapped = link_rates()
    return Bandwidths(
        memory_rate(),
        plain,
        [way._asdict() for way in ways],
        mapped,
        device_rate(),
    )


def measure(folder: Path) -> Bandwidths:
    """Takes about 5 s, and writes a temporary file in `folder`.

    Without room for that the disk's rates are missing.
    """
    try:
        ways = disk.measure_ways(folder)
    except OSError:
        ways = []
    return measured(ways)


def kept(folder: Path) -> Bandwidths:
    """What was measured before on this machine and disk, else `measure`, and kept."""
    return recalled(folder) or keep(folder, measure(folder))


def recalled(folder: Path) -> Bandwidths | None:
    """What was measured before on this machine and disk; None if nothing was."""
    try:
        return Bandwidths(**_read()[_key(folder)])
    except (KeyError, TypeError):
        return None


def keep(folder: Path, found: Bandwidths) -> Bandwidths:
    """Notes what was measured; without a folder to write in it is not kept.

    Returns:
        What holds now: where no disk could be measured, with its earlier rates.
    """
    earlier = None if found.ssd else recalled(folder)
    if earlier is not None:
        found = replace(found, ssd=earlier.ssd)
    everything = {**_read(), _key(folder): asdict(found)}
    with suppress(OSError):
        target = cache_folder() / FILE
        target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with whole_file(target) as file:
            text = json.dumps({"version": VERSION, "measured": everything})
            file.write(text.encode())
    return found


def _read() -> dict[str, Any]:
    try:
        found = json.loads((cache_folder() / FILE).read_text())
        if found["version"] == VERSION:
            return dict(found["measured"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return {}


def _key(folder: Path) -> str:
    device = jax.local_devices()[0].device_kind
    return f"{cpu_model()}, {cores()} cores; {device}; disk {folder.stat().st_dev}"


def memory_rate() -> float:
    """Bytes a second that all cores together read from memory."""
    size = min(MEMORY_BYTES, free_dram_bytes() // 8) // 8
    values = np.ones(size, np.int64)
    parts = np.array_split(values, cores())
    with ThreadPoolExecutor(len(parts)) as pool:
        return values.nbytes / _least_s(lambda: list(pool.map(np.max, parts)))


def link_rates() -> tuple[dict[str, float], dict[str, float]]:
    """Bytes a second from host memory to the device, by the size of a transfer; on a
    CPU those of a copy in memory.

    Returns:
        From pageable memory, and from mapped memory: empty where nothing is mapped.
    """
    plain, mapped = {}, {}
    for size in LINK_BYTES:
        rows, target = np.ones((1, size), np.uint8), np.zeros((1, size), np.uint8)
        if jax.default_backend() == "cpu":
            plain[str(size)] = size / _least_s(partial(np.copyto, target, rows))
            continue
        plain[str(size)] = size / _least_s(partial(_bring, rows))
        memory = MappedMemory()
        rows = memory.buffer((1, size))
        rows[:] = 1
        if memory.nbytes:
            mapped[str(size)] = size / _least_s(partial(_bring, rows))
        memory.close()
    return plain, mapped


def _bring(rows: np.ndarray) -> None:
    jax.block_until_ready(to_device(rows))


def device_rate() -> float | None:
    """Bytes a second that an accelerator reads of its memory; None on a CPU."""
    if jax.default_backend() == "cpu":
        return None
    size = min(DEVICE_BYTES, free_device_bytes() // 4) // 4
    values, total = jnp.ones(size, jnp.float32), jax.jit(jnp.sum)

    def read() -> None:
        jax.block_until_ready([total(values) for _ in range(DEVICE_READS)])

    return DEVICE_READS * values.nbytes / _least_s(read)


def _least_s(work: Callable[[], object]) -> float:
    for _ in range(3):
        work()
    least, end = float("inf"), time.perf_counter() + LEAST_S
    while (start := time.perf_counter()) < end:
        work()
        least = min(least, time.perf_counter() - start)
    return least
