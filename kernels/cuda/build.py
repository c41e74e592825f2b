"""Compiles and registers the CUDA kernels. Knows no op but by name."""

import ctypes
import os
import shutil
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax

from m2jax.kernels.toolchain import (
    SWITCH,
    NotBuilt,
    built,
    is_switched_off,
    library_path,
)

SOURCES = Path(__file__).parent
HANDLERS = (
    "m2jax_cuda_project",
    "m2jax_cuda_accumulate",
    "m2jax_cuda_rows_from_host",
    "m2jax_cuda_fill_from_host",
    "m2jax_cuda_slots",
)
COMPILER = "nvcc"
FOLDERS = ("CUDA_HOME", "CUDA_PATH")
USUAL_FOLDER = "/usr/local/cuda"
# Of an architecture; and the first whose tensor cores take bfloat16.
PREFIX, TENSOR_CORES = "sm_", 80


@dataclass(frozen=True)
class CudaStatus:
    """What became of the CUDA kernels.

    ready: whether they are registered. about: which compiler made them for what, or why
    they are not there. tensor: whether the device multiplies bfloat16 on tensor cores.
    """

    ready: bool
    about: str
    tensor: bool = False


@lru_cache(maxsize=1)
def status() -> CudaStatus:
    """Registers the kernels, compiled before at first use; takes half a minute only
    then.

    Set M2JAX_NATIVE=0 to do without, CUDA_HOME to choose the toolkit.
    """
    if is_switched_off():
        return CudaStatus(False, f"switched off by {SWITCH}=0")
    try:
        compiler, target = _compiler(), _architecture()
        loaded = ctypes.CDLL(str(_built(compiler, target)))
        for name in HANDLERS:
            capsule = jax.ffi.pycapsule(getattr(loaded, name))
            jax.ffi.register_ffi_target(name, capsule, platform="CUDA", **_traits())
    except (NotBuilt, OSError, AttributeError) as error:
        return CudaStatus(False, str(error).splitlines()[0])
    tensor = int(target.removeprefix(PREFIX)) >= TENSOR_CORES
    return CudaStatus(True, f"{Path(compiler).name}, {target}", tensor)


def is_compiled() -> bool:
    """Whether `status` has nothing to compile: it is there, or cannot be."""
    if status.cache_info().currsize or is_switched_off():
        return True
    try:
        return _target(_compiler(), _architecture()).exists()
    except (NotBuilt, OSError):
        return True


def _traits() -> dict[str, Any]:
    """That XLA may record the launches. Not public, so it may be missing."""
    try:
        from jaxlib.xla_client import CustomCallTargetTraits
    except ImportError:
        return {}
    return {"traits": CustomCallTargetTraits.COMMAND_BUFFER_COMPATIBLE}


def _compiler() -> str:
    chosen = [os.environ[name] for name in FOLDERS if os.environ.get(name)]
    for folder in chosen:
        found = shutil.which(COMPILER, path=f"{folder}/bin")
        if found:
            return found
    found = shutil.which(COMPILER) or shutil.which(COMPILER, path=f"{USUAL_FOLDER}/bin")
    if found:
        return found
    looked = ", ".join([*chosen, "PATH", USUAL_FOLDER])
    raise NotBuilt(f"no {COMPILER} here (looked in {looked})")


def _architecture() -> str:
    """ "sm_90" of the first device."""
    capability = getattr(jax.local_devices()[0], "compute_capability", None)
    if not isinstance(capability, str) or jax.default_backend() != "gpu":
        raise NotBuilt("no CUDA device here")
    return f"{PREFIX}{capability.replace('.', '')}"


def _flags(architecture: str) -> list[str]:
    return [
        *("-O3", "-std=c++17", "--expt-relaxed-constexpr", "-Xcompiler", "-fPIC"),
        f"-arch={architecture}",
    ]


def _target(compiler: str, architecture: str) -> Path:
    sources = sorted([*SOURCES.glob("*.cu"), *SOURCES.glob("*.cuh")])
    return library_path(compiler, sources, _flags(architecture), [jax.__version__])


def _built(compiler: str, architecture: str) -> Path:
    """The shared library, compiled if that was not done yet."""
    return built(
        _target(compiler, architecture),
        [compiler, *_flags(architecture), "-isystem", jax.ffi.include_dir()],
        sorted(SOURCES.glob("*.cu")),
        [compiler, "-shared", "-Xcompiler", "-fPIC", f"-arch={architecture}"],
    )
