"""By C++: a library of its own, which compiles in a second for any device's host."""

import ctypes
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np

from m2jax.kernels.directory.reference import Plan, refusal
from m2jax.kernels.toolchain import (
    SWITCH,
    NotBuilt,
    built,
    cpp_compiler,
    is_switched_off,
    library_path,
)

SOURCE = Path(__file__).parent / "directory.cc"
FLAGS = ("-O3", "-std=c++17", "-fPIC")
INT32, INT64 = np.dtype(np.int32), np.dtype(np.int64)
SIZE, ARRAY = ctypes.c_int64, ctypes.c_void_p
# What makes a view of any buffer: `ndarray.ctypes` takes four times as long.
VIEW = ctypes.c_char * 0


def prepare() -> str | None:
    """Compiles it if that was not done yet. Returns why it is not there, or None.

    Set M2JAX_NATIVE=0 to do without, CXX to choose the compiler.
    """
    if is_switched_off():
        return f"switched off by {SWITCH}=0"
    if compiled() is not None:
        return None
    try:
        compiler = cpp_compiler()
        command = [compiler, *FLAGS]
        path = built(_target(compiler), command, [SOURCE], [compiler, "-shared"])
        _load(path)
    except (NotBuilt, OSError, AttributeError) as error:
        return str(error).splitlines()[0]
    compiled.cache_clear()
    return None


@lru_cache(maxsize=1)
def compiled() -> Callable[..., int] | None:
    """What `prepare` has left here, maybe in another process; compiles nothing."""
    if is_switched_off():
        return None
    try:
        path = _target(cpp_compiler())
        return _load(path) if path.exists() else None
    except (NotBuilt, OSError, AttributeError):
        return None


def give_slots(
    ids: np.ndarray,
    slot_of: np.ndarray,
    neuron_in: np.ndarray,
    priority: np.ndarray,
    *,
    held: int,
) -> Plan:
    call = compiled()
    if call is None:
        raise RuntimeError("the directory was not compiled: `prepare` says why")
    neurons, slots, size = slot_of.size, neuron_in.size, ids.size
    assert slot_of.dtype == neuron_in.dtype == INT32
    assert priority.dtype == ids.dtype == INT64
    assert priority.size == neurons
    found = np.empty((4, size), INT32)
    views = map(VIEW.from_buffer, (slot_of, neuron_in, priority, ids, found))
    loads = call(neurons, slots, size, held, *views)
    if loads < 0:
        refused = refusal(ids, neurons=neurons, slots=slots)
        assert refused is not None
        raise refused
    leaving = max(0, loads - (slots - held))
    return Plan(found[0], found[1, :loads], found[2, :loads], found[3, :leaving])


def _target(compiler: str) -> Path:
    return library_path(compiler, [SOURCE], FLAGS, [])


def _load(path: Path) -> Callable[..., int]:
    # PyDLL keeps the interpreter's lock: to get it back from a thread that copies
    # would take longer than the call.
    call = ctypes.PyDLL(str(path)).m2jax_give_slots
    call.argtypes = [*[SIZE] * 4, *[ARRAY] * 5]
    call.restype = SIZE
    return call
