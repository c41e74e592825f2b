"""Compiles and registers the C++ kernels. Knows no op but by name."""

import ctypes
import platform
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import jax

from m2jax.kernels.toolchain import (
    SWITCH,
    NotBuilt,
    built,
    cpp_compiler,
    is_switched_off,
    library_path,
)

SOURCES = Path(__file__).parent
HANDLERS = (
    "m2jax_project_nibbles",
    "m2jax_project_numbers",
    "m2jax_accumulate_nibbles",
    "m2jax_accumulate_numbers",
    "m2jax_swiglu_nibbles",
    "m2jax_levels",
    "m2jax_best",
    "m2jax_attend",
)
# For blocks of tokens, where `m2jax_has_blocks` says so: of codes, and of numbers.
BLOCKS = ("", "words", "tiles")
CODE_BLOCKS = ("m2jax_project_block", "m2jax_accumulate_block")
NUMBER_BLOCKS = ("m2jax_project_block_numbers", "m2jax_accumulate_block_numbers")


@dataclass(frozen=True)
class NativeStatus:
    """What became of the C++ kernels.

    ready: whether they are registered. about: which compiler made them for what, or why
    they are not there. blocks: what those for blocks of tokens work with: "tiles",
    the CPU's tile registers; "words", integers of 16 bits, which is for codes alone; ""
    where there are none.
    """

    ready: bool
    about: str
    blocks: str = ""


@lru_cache(maxsize=1)
def status() -> NativeStatus:
    """Registers the kernels, compiled before at first use; takes seconds only then.

    Set M2JAX_NATIVE=0 to do without, CXX to choose the compiler.
    """
    if is_switched_off():
        return NativeStatus(False, f"switched off by {SWITCH}=0")
    try:
        compiler = cpp_compiler()
        path = _built(compiler)
        loaded = ctypes.CDLL(str(path))
        blocks = BLOCKS[loaded.m2jax_has_blocks()]
        more = {"": (), "words": CODE_BLOCKS, "tiles": CODE_BLOCKS + NUMBER_BLOCKS}
        for name in (*HANDLERS, *more[blocks]):
            capsule = jax.ffi.pycapsule(getattr(loaded, name))
            jax.ffi.register_ffi_target(name, capsule, platform="cpu")
    except (NotBuilt, OSError, AttributeError) as error:
        return NativeStatus(False, str(error).splitlines()[0])
    about = f"{Path(compiler).name}, {_vectors()}" + (
        " AMX" if blocks == "tiles" else ""
    )
    return NativeStatus(True, about, blocks)


def is_compiled() -> bool:
    """Whether `status` has nothing to compile: it is there, or cannot be."""
    if status.cache_info().currsize or is_switched_off():
        return True
    try:
        return _target(cpp_compiler()).exists()
    except (NotBuilt, OSError):
        return True


def _flags() -> list[str]:
    machine = "-mcpu=native" if platform.machine() == "aarch64" else "-march=native"
    return ["-O3", machine, "-std=c++17", "-fPIC", "-Wno-psabi"]


def _sources() -> list[Path]:
    return sorted([*SOURCES.glob("*.cc"), *SOURCES.glob("*.h")])


def _target(compiler: str) -> Path:
    """Where the library of these sources, by this compiler, for this CPU lies."""
    return library_path(compiler, _sources(), _flags(), [_cpu(), jax.__version__])


def _built(compiler: str) -> Path:
    """The shared library, compiled if that was not done yet."""
    sources = [file for file in _sources() if file.suffix == ".cc"]
    command = [compiler, *_flags(), "-isystem", jax.ffi.include_dir()]
    return built(_target(compiler), command, sources, [compiler, "-shared"])


def _cpu() -> str:
    """What -march=native looks at, near enough: another CPU needs another library."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    wanted = ("model name", "flags", "Features", "CPU part")
    found = {line.split(":")[0].strip(): line for line in lines if ":" in line}
    return "\n".join(found[name] for name in wanted if name in found)


def _vectors() -> str:
    """The widest vectors that the sources use on this CPU."""
    flags = set(_cpu().split())
    if {"avx512f", "avx512bw"} <= flags:
        return "AVX-512" + (" VNNI" if "avx512_vnni" in flags else "")
    if {"avx2", "fma", "f16c"} <= flags:
        return "AVX2" + (" VNNI" if "avx_vnni" in flags else "")
    return "NEON" if platform.machine() == "aarch64" else "128 bits"
