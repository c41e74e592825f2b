"""Facts about this machine, for reports. Knows no model and no folder."""

import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from m2jax.cores import cores
from m2jax.memory import memory_bytes, memory_limit_bytes

LIBRARIES = ("jax", "jaxlib", "flax", "orbax-checkpoint", "tensorstore", "numpy")


def machine_facts() -> dict[str, Any]:
    """What a figure measured here must be read with; JSON-able.

    cpu, cores: model, and how many this process may use. memory_bytes,
    memory_limit_bytes: installed, and what cgroups allow (None = no less). backend,
    device, devices: JAX's, the first one's kind, how many. versions: None where a
    library is not installed. commit: see `commit`.
    """
    devices = jax.local_devices()
    return {
        "cpu": cpu_model(),
        "cores": cores(),
        "memory_bytes": memory_bytes(),
        "memory_limit_bytes": memory_limit_bytes(),
        "backend": jax.default_backend(),
        "device": devices[0].device_kind,
        "devices": len(devices),
        "os": f"{platform.system()} {platform.release().split('-')[0]}",
        "versions": {
            "python": platform.python_version(),
            **{name: installed(name) for name in ("m2jax", *LIBRARIES)},
        },
        "commit": commit(),
    }


def installed(name: str) -> str | None:
    """Version of a distribution, which is not imported; None where it is absent."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.machine()


def commit() -> str | None:
    """Commit of the checkout that this package runs from, "-dirty" if files differ.

    None where it is installed elsewhere, or git cannot say.
    """
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe"]
    options = ["--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(
            command + options, capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
