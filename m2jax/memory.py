"""How much memory this machine and its accelerator have left."""

import ctypes
import os
from pathlib import Path
from typing import NamedTuple

import jax

MARGIN_BYTES = 1 << 30
SHARE = 0.8


def memory_bytes() -> int:
    """What is installed."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def free_dram_bytes() -> int:
    """Bytes that may still be allocated: the system's or a cgroup's, the least."""
    meminfo = dict(
        line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines()
    )
    free = int(meminfo["MemAvailable"].split()[0]) * 1024
    return min([free, *(group.free_bytes for group in _memory_cgroups())])


def memory_limit_bytes(
    *,
    cgroups: Path = Path("/proc/self/cgroup"),
    root: Path = Path("/sys/fs/cgroup"),
) -> int | None:
    """The least limit of this process's memory cgroup and those around it.

    None where there is none below the machine's own memory.

    Args:
        cgroups: which cgroups the process is in. root: where they are mounted.
    """
    groups = _memory_cgroups(cgroups=cgroups, root=root)
    limit = min((group.limit_bytes for group in groups), default=memory_bytes())
    return limit if limit < memory_bytes() else None


class _Cgroup(NamedTuple):
    limit_bytes: int
    free_bytes: int


def _memory_cgroups(
    *,
    cgroups: Path = Path("/proc/self/cgroup"),
    root: Path = Path("/sys/fs/cgroup"),
) -> list[_Cgroup]:
    """The process's memory cgroup and those around it that have a limit, v1 and v2."""
    found = []
    for line in _lines(cgroups):
        _, controllers, path = line.split(":", 2)
        if not controllers:
            top, limit, usage, cache = root, *_V2_FILES
        elif "memory" in controllers.split(","):
            top, limit, usage, cache = root / "memory", *_V1_FILES
        else:
            continue
        inner = top / path.lstrip("/")
        for folder in (inner, *inner.parents):
            if folder == top.parent:
                break
            most = "".join(_lines(folder / limit))
            if most.isdigit():
                used = int("".join(_lines(folder / usage)) or 0)
                fields = dict(line.split() for line in _lines(folder / "memory.stat"))
                # Page cache is given up before an allocation fails.
                free = int(most) - used + int(fields.get(cache, 0))
                found.append(_Cgroup(int(most), max(0, free)))
    return found


_V2_FILES = ("memory.max", "memory.current", "inactive_file")
_V1_FILES = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def give_back_freed() -> None:
    """Lets the system have what this process has freed: loading works on copies, and
    the C library keeps their memory."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def free_device_bytes() -> int:
    """Bytes left on the first device; on a CPU that is DRAM."""
    stats = jax.local_devices()[0].memory_stats()
    if jax.default_backend() == "cpu" or not stats or "bytes_limit" not in stats:
        return free_dram_bytes()
    return stats["bytes_limit"] - stats["bytes_in_use"]


def default_budgets() -> tuple[int, int]:
    """HBM and DRAM budgets where none is asked: what is free, less a margin.

    On a CPU both come out of the same memory, so each gets half.
    """
    hbm, dram = free_device_bytes(), free_dram_bytes()
    if jax.default_backend() == "cpu":
        hbm = dram = dram // 2
    return _less_margin(hbm), _less_margin(dram)


def _less_margin(free: int) -> int:
    return max(1, int(max(free - MARGIN_BYTES, free * SHARE)))
