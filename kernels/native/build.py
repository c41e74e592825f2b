"""Compiles and registers the C++ kernels. Knows no op but by name."""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import jax

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
# For blocks of tokens, where `m2jax_has_blocks` says so.
BLOCK_HANDLERS = (
    "m2jax_project_block",
    "m2jax_project_block_numbers",
    "m2jax_accumulate_block",
    "m2jax_accumulate_block_numbers",
)
COMPILERS = ("c++", "g++", "clang++")
COMPILE_TIMEOUT_S = 300
SWITCH = "M2JAX_NATIVE"


@dataclass(frozen=True)
class NativeStatus:
    """What became of the C++ kernels.

    ready: whether they are registered. about: which compiler made them for what, or why
    they are not there. blocks: whether those for blocks of tokens are too.
    """

    ready: bool
    about: str
    blocks: bool = False


class _NotBuilt(Exception):
    pass


@lru_cache(maxsize=1)
def status() -> NativeStatus:
    """Registers the kernels, compiled before at first use; takes seconds only then.

    Set M2JAX_NATIVE=0 to do without, CXX to choose the compiler.
    """
    if os.environ.get(SWITCH) == "0":
        return NativeStatus(False, f"switched off by {SWITCH}=0")
    try:
        compiler = _compiler()
        path = _built(compiler)
        loaded = ctypes.CDLL(str(path))
        blocks = bool(loaded.m2jax_has_blocks())
        for name in (*HANDLERS, *(BLOCK_HANDLERS if blocks else ())):
            capsule = jax.ffi.pycapsule(getattr(loaded, name))
            jax.ffi.register_ffi_target(name, capsule, platform="cpu")
    except (_NotBuilt, OSError, AttributeError) as error:
        return NativeStatus(False, str(error).splitlines()[0])
    about = f"{Path(compiler).name}, {_vectors()}" + (" AMX" if blocks else "")
    return NativeStatus(True, about, blocks)


def is_compiled() -> bool:
    """Whether `status` has nothing to compile: it is there, or cannot be."""
    if status.cache_info().currsize or os.environ.get(SWITCH) == "0":
        return True
    try:
        return _target(_compiler()).exists()
    except (_NotBuilt, OSError):
        return True


def _compiler() -> str:
    chosen = os.environ.get("CXX")
    for name in [chosen] if chosen else COMPILERS:
        found = shutil.which(name)
        if found:
            return found
    wanted = chosen or ", ".join(COMPILERS)
    raise _NotBuilt(f"no C++ compiler here (looked for {wanted})")


def _flags() -> list[str]:
    machine = "-mcpu=native" if platform.machine() == "aarch64" else "-march=native"
    return ["-O3", machine, "-std=c++17", "-fPIC", "-Wno-psabi"]


def _sources() -> list[Path]:
    return sorted([*SOURCES.glob("*.cc"), *SOURCES.glob("*.h")])


def _target(compiler: str) -> Path:
    """Where the library of these sources, by this compiler, for this CPU lies."""
    return _folder() / f"kernels-{_digest(compiler, tuple(_flags()))}.so"


@lru_cache(maxsize=4)
def _digest(compiler: str, flags: tuple[str, ...]) -> str:
    """Of all that the library hangs on. Asks the compiler its version."""
    version = _run([compiler, "--version"]).splitlines()[0]
    files = _sources()
    about = [version, *flags, jax.__version__, _cpu(), *map(str, files)]
    digest = hashlib.sha256("\n".join(about).encode())
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _built(compiler: str) -> Path:
    """The shared library, compiled if that was not done yet."""
    target = _target(compiler)
    if target.exists():
        return target
    include = ["-isystem", jax.ffi.include_dir()]
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:

        def compiled(source: Path) -> str:
            made = str(Path(folder) / f"{source.stem}.o")
            _run([compiler, *_flags(), *include, "-c", str(source), "-o", made])
            return made

        sources = [file for file in _sources() if file.suffix == ".cc"]
        with ThreadPoolExecutor(len(sources)) as pool:
            objects = list(pool.map(compiled, sources))
        linked = Path(folder) / target.name
        _run([compiler, "-shared", *objects, "-o", str(linked)])
        # Several processes may do this at once; the last one's file stays.
        os.replace(linked, target)
    return target


def _folder() -> Path:
    """Where only this user writes: what lies there is run."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = Path(base).expanduser() / "m2jax" / "kernels"
    folder.mkdir(parents=True, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise _NotBuilt(f"{folder}: belongs to another user")
    folder.chmod(0o700)
    return folder


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S
        )
    except subprocess.TimeoutExpired as error:
        raise _NotBuilt(f"{command[0]} took over {COMPILE_TIMEOUT_S} s") from error
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if "error" in line]
        reason = said[0] if said else f"exit code {done.returncode}"
        raise _NotBuilt(f"{Path(command[0]).name} failed: {reason}")
    return done.stdout


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
