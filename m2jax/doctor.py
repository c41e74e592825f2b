"""What this machine has for m2jax, and what is wrong with it. Prints nothing.

Imports no flax: the pair of versions that cannot be imported is one of the findings.
"""

import os
import platform
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from shutil import disk_usage
from typing import Any

import jax

from m2jax import bandwidths, disk
from m2jax.cores import cores
from m2jax.kernels import cuda, linear, native, sparse_swiglu
from m2jax.machine import (
    LIBRARIES,
    cpu_model,
    installed,
)
from m2jax.memory import free_device_bytes, free_dram_bytes, memory_limit_bytes
from m2jax.units import format_bytes

EXTRAS = {
    "sentencepiece": ("sentencepiece", "reads tokenizer.model"),
    "huggingface_hub": ("hub", "downloads checkpoints by hub id"),
}
# By backend: what is compiled for it, in which language, by what.
COMPILED = {
    "cpu": (native, "C++", "g++ or clang++"),
    "gpu": (cuda, "CUDA", "NVIDIA's CUDA toolkit, which has nvcc"),
}
NVIDIA = Path("/proc/driver/nvidia")
NOT_AVAILABLE = "n/a: "


@dataclass(frozen=True)
class Check:
    """One finding. ok: False where m2jax cannot run, or not as this machine could.

    value: what was found; "n/a: reason" where that could not be seen, which is no
    fault. hint: what to do, or "".
    """

    name: str
    ok: bool
    value: str
    hint: str = ""


def examine(folder: Path) -> dict[str, Any]:
    """Looks at the software, the device, and the tiers; takes about 5 s.

    Args:
        folder: where the stores are or will be; its disk is measured with a temporary
            file, of which nothing stays. The rates are kept for `bench`; where the disk
            cannot be measured now, its earlier ones stay.

    Returns:
        checks: of each Check its fields. ok: whether all are.
    """
    of_disk, ways = check_disk(folder)
    rates = bandwidths.measured(ways)
    if folder.is_dir():
        rates = bandwidths.keep(folder, rates)
    if rates.best_ssd is not None and not ways:
        value = f"{rates.best_ssd / 1e9:.2f} GB/s at most, measured before"
        of_disk.append(Check("SSD read, kept", True, value))
    checks = [
        check_python(),
        check_libraries({name: installed(name) for name in LIBRARIES}),
        *check_extras(),
        check_backend(),
        check_kernels(),
        Check("cpu", True, f"{cpu_model()}, {cores()} cores usable"),
        check_dram(),
        *check_rates(rates),
        *of_disk,
    ]
    return {
        "checks": [asdict(check) for check in checks],
        "ok": all(check.ok for check in checks),
    }


def check_python() -> Check:
    wanted = metadata.metadata("m2jax")["Requires-Python"]
    found = platform.python_version()
    ok = _number(found) >= _number(wanted)
    return Check("python", ok, found, "" if ok else f"m2jax needs Python {wanted}")


def check_libraries(found: Mapping[str, str | None]) -> Check:
    """Versions against what m2jax asks for, and pairs known not to work.

    Args:
        found: distribution to version, None where it is not installed.
    """
    hints = []
    for requirement in metadata.requires("m2jax") or []:
        floor = re.fullmatch(r"([\w-]+)>=([\d.]+)", requirement)
        if not floor or floor[1] not in found:
            continue
        version = found[floor[1]]
        if version is None or _number(version) < _number(floor[2]):
            hints.append(f"pip install -U '{requirement}'")
    jax_version, flax_version = found.get("jax"), found.get("flax")
    if (
        jax_version
        and flax_version
        and _number(jax_version) >= (0, 11)
        and _number(flax_version) < (0, 12, 9)
    ):
        hints.append(
            f"flax {flax_version} cannot be imported with jax {jax_version}: "
            "pip install -U 'flax>=0.12.9'"
        )
    listed = ", ".join(f"{name} {found[name] or 'missing'}" for name in found)
    return Check("libraries", not hints, listed, "; ".join(hints))


def check_extras() -> list[Check]:
    checks = []
    for name, (extra, use) in EXTRAS.items():
        version = installed(name)
        hint = "" if version else f"{use}: pip install -e '.[{extra}]'"
        checks.append(Check(name, True, version or "not installed", hint))
    return checks


def check_backend(*, nvidia: Path = NVIDIA) -> Check:
    """What JAX runs on.

    Args:
        nvidia: where the driver lists its GPUs.
    """
    try:
        devices = jax.local_devices()
        backend = jax.default_backend()
    except RuntimeError as error:
        return Check("backend", False, _not_available(error), _gpu_hint())
    value = f"{backend}: {len(devices)} x {devices[0].device_kind}"
    if backend != "cpu":
        value += f", {format_bytes(free_device_bytes())} free on the first"
    gpus = nvidia / "gpus"
    if backend != "cpu" or not gpus.is_dir() or not any(gpus.iterdir()):
        return Check("backend", True, value)
    asked = os.environ.get("JAX_PLATFORMS") == "cpu"
    hint = f"an NVIDIA GPU is here, but JAX runs on the CPU: {_gpu_hint()}"
    return Check("backend", asked, value, hint)


def _gpu_hint() -> str:
    platforms = os.environ.get("JAX_PLATFORMS")
    if platforms:
        return f"JAX_PLATFORMS={platforms} is set; unset it to let JAX choose"
    return "pip install -e '.[cuda]'"


def check_kernels() -> Check:
    chosen = {
        "linear": linear.default_implementation(),
        "sparse_swiglu": sparse_swiglu.default_implementation(),
    }
    value = ", ".join(f"{op}: {name}" for op, name in chosen.items())
    backend = jax.default_backend()
    if backend not in COMPILED:
        return Check("kernels", True, value)
    kernels, language, compilers = COMPILED[backend]
    found = kernels.status()
    if found.ready:
        return Check("kernels", True, f"{value} ({found.about})")
    return Check(
        "kernels",
        True,
        value,
        f"no {language} kernels, XLA's forms are several times slower: {found.about}; "
        f"install {compilers}",
    )


def check_dram() -> Check:
    limit = memory_limit_bytes()
    value = f"{format_bytes(free_dram_bytes())} free"
    if limit is not None:
        value += f", a memory cgroup allows {format_bytes(limit)} in all"
    return Check("DRAM", True, value)


def check_rates(rates: bandwidths.Bandwidths) -> list[Check]:
    """Memory, the device's own, and the link."""
    checks = [Check("memory, all cores", True, f"read {rates.memory / 1e9:.1f} GB/s")]
    if rates.device is not None:
        value = f"read {rates.device / 1e9:.1f} GB/s"
        checks.append(Check("device memory", True, value))
    for kind, link in (("pageable", rates.link), ("pinned", rates.mapped_link)):
        links = ", ".join(
            f"{format_bytes(int(size))}: {rate / 1e9:.1f} GB/s"
            for size, rate in link.items()
        )
        if links:
            checks.append(Check(f"host to device, {kind}", True, links))
    return checks


def check_disk(
    folder: Path, *, file_bytes: int = disk.FILE_BYTES
) -> tuple[list[Check], list[disk.WayToRead]]:
    """The SSD tier: filesystem and room, direct I/O, and the rates of reads."""
    try:
        kind, free = disk.filesystem_type(folder), disk_usage(folder).free
        room = Check("SSD", True, f"{kind}, {format_bytes(free)} free at {folder}")
    except OSError as error:
        value = _not_available(error)
        room = Check("SSD", True, value, f"{folder}: name a folder that is there")
    try:
        ways = disk.measure_ways(folder, file_bytes=file_bytes)
    except OSError as error:
        value = _not_available(error)
        hint = f"name a folder to write in, with {format_bytes(2 * file_bytes)} free"
        names = ("direct I/O", "SSD read")
        return [room, *(Check(name, True, value, hint) for name in names)], []
    works, hint = "works", ""
    if not any(way.direct for way in ways):
        works, hint = "does not work here", "reads go through the page cache"
    checks = [room, Check("direct I/O", True, works, hint)]
    for direct, name in ((True, "SSD read, direct"), (False, "SSD read, buffered")):
        rates = ", ".join(
            f"{format_bytes(way.bytes)} x {way.in_flight}: {way.bytes_per_s / 1e9:.2f}"
            for way in ways
            if way.direct is direct
        )
        if rates:
            checks.append(Check(name, True, f"{rates} GB/s"))
    return checks, ways


def _not_available(error: Exception) -> str:
    reason = error.strerror if isinstance(error, OSError) else None
    first = (reason or str(error) or type(error).__name__).splitlines()[0]
    return f"{NOT_AVAILABLE}{first}"


def _number(version: str) -> tuple[int, ...]:
    """ "0.12.8", ">=3.11" -> (0, 12, 8), (3, 11)."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])
