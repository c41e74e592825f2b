"""How much memory this machine and its accelerator have left."""

from pathlib import Path

import jax

MARGIN_BYTES = 1 << 30
SHARE = 0.8


def free_dram_bytes() -> int:
    """Bytes that may still be allocated: the system's or the cgroup's, the lesser."""
    meminfo = dict(
        line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines()
    )
    free = int(meminfo["MemAvailable"].split()[0]) * 1024
    limits = [_cgroup_free(*files) for files in _CGROUP_FILES]
    return min([free, *(limit for limit in limits if limit is not None)])


_CGROUP_FILES = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    (
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        "memory.stat",
        "total_inactive_file",
    ),
)


def _cgroup_free(limit: str, usage: str, stat: str, cache: str) -> int | None:
    """What this process's memory cgroup has left, page cache counted as free."""
    folder = _cgroup_folder(limit)
    if folder is None:
        return None
    try:
        most = (folder / limit).read_text().strip()
        if most == "max":
            return None
        used = int((folder / usage).read_text())
        fields = dict(line.split() for line in (folder / stat).read_text().splitlines())
    except (OSError, ValueError):
        return None
    return max(0, int(most) - used + int(fields.get(cache, 0)))


def _cgroup_folder(limit: str) -> Path | None:
    """The folder of this process's own memory cgroup, v1 or v2."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        _, controllers, path = line.split(":", 2)
        root = Path("/sys/fs/cgroup")
        if "memory" in controllers.split(","):
            root = root / "memory"
        elif controllers:
            continue
        for folder in (root / path.lstrip("/"), root):
            if (folder / limit).exists():
                return folder
    return None


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
