"""Compiles the CUDA kernels as C++ for a CPU, where the headers beside this file stand
for CUDA's. What is not C++ is rewritten; not a line of arithmetic is."""

import ctypes
import re
import shutil
import tempfile
from pathlib import Path

import jax

from m2jax.kernels.cuda.build import HANDLERS, SOURCES
from m2jax.kernels.toolchain import built, library_path

HERE = Path(__file__).parent
COMPILERS = ("g++", "c++")
# A fiber is entered by a jump from another one's stack, which fortified code forbids.
FLAGS = ["-O1", "-std=c++17", "-fPIC", "-ffp-contract=off", "-w", "-U_FORTIFY_SOURCE"]
REWRITES = [
    (r"(\w+)<<<(.+?)>>>\(", r"emulated::launch(\1, \2)("),
    (
        r"extern __shared__ (\w+) (\w+)\[\];",
        r"auto* \2 = emulated::dynamic_shared<\1>();",
    ),
    (
        r"__shared__ (\w+) (\w+)((\[\w+\])+);",
        r"auto& \2 = emulated::static_shared<\1\3, __LINE__>();",
    ),
    (r"\.Ctx<ffi::PlatformStream<cudaStream_t>>\(\)", ""),
    (r"XLA_FFI_DEFINE_HANDLER_SYMBOL\(", "EMULATED_HANDLER("),
]


def compiler() -> str | None:
    """One that makes programs for this CPU."""
    return next(filter(None, map(shutil.which, COMPILERS)), None)


def rewritten(source: str) -> str:
    """A CUDA source as C++."""
    for pattern, into in REWRITES:
        source = re.sub(pattern, into, source, flags=re.DOTALL)
    return source


def load(with_compiler: str, sources: Path = SOURCES) -> ctypes.CDLL:
    """The kernels, compiled if that was not done yet."""
    ours = [file for file in sorted(HERE.glob("*")) if file.is_file()]
    names = {file.name for file in ours}
    # What is PTX has a stand-in of the same name beside this file.
    files = [file for file in sorted(sources.glob("*.cu*")) if file.name not in names]
    about = [*files, *ours]
    target = library_path(with_compiler, about, FLAGS, [jax.__version__])
    command = [with_compiler, *FLAGS, "-x", "c++", "-I", str(HERE)]
    command += ["-isystem", jax.ffi.include_dir()]
    command += ["-include", "handler.h"]
    with tempfile.TemporaryDirectory() as folder:
        for file in files:
            (Path(folder) / file.name).write_text(rewritten(file.read_text()))
        built(
            target,
            command,
            sorted(Path(folder).glob("*.cu")),
            [with_compiler, "-shared"],
        )
    loaded = ctypes.CDLL(str(target))
    loaded.emulated_host_memory.argtypes = [ctypes.c_uint64, ctypes.c_int64]
    return loaded


def register(loaded: ctypes.CDLL) -> None:
    """Under the names that they have on a GPU."""
    for name in HANDLERS:
        capsule = jax.ffi.pycapsule(getattr(loaded, name))
        jax.ffi.register_ffi_target(name, capsule, platform="cpu")
