"""The C++ kernels compiled for ARM and run by an emulator, against XLA's forms."""

import shutil
import subprocess
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest

from m2jax.kernels import native, selection
from m2jax.kernels.toolchain import built, library_path, run
from tests.compare_kernels import largest_difference
from tests.kernel_cases import ROUNDING

COMPILER = shutil.which("aarch64-linux-gnu-g++")
EMULATOR = shutil.which("qemu-aarch64")
REPLAY = Path(__file__).parent / "arm" / "replay.cc"
FLAGS = ["-O1", "-std=c++17", "-Wno-psabi", "-w"]
# XLA's numbers of data types.
DTYPES = {"bool": 1, "int32": 4, "int64": 5, "uint8": 6, "uint16": 7}
DTYPES |= {"float16": 10, "float32": 11}

pytestmark = pytest.mark.skipif(
    COMPILER is None or EMULATOR is None,
    reason="needs a cross compiler and an emulator: g++-aarch64-linux-gnu, qemu-user",
)


@pytest.fixture(
    scope="module", params=["armv8-a", "armv8.2-a+dotprod"], ids=["plain", "dotprod"]
)
def program(request) -> Path:
    """Calls the kernels of a CPU with these instructions."""
    assert COMPILER is not None
    sources = [*sorted(native.build.SOURCES.glob("*.cc")), REPLAY]
    flags = [*FLAGS, f"-march={request.param}"]
    headers = sorted(native.build.SOURCES.glob("*.h"))
    target = library_path(COMPILER, [*sources, *headers], flags, [jax.__version__])
    command = [COMPILER, *flags, "-isystem", jax.ffi.include_dir()]
    return built(target, command, sources, [COMPILER, "-rdynamic"])


@pytest.fixture
def calls(program, monkeypatch) -> list[str]:
    """Kernels are the program's from now on; the names of those that were called."""
    called: list[str] = []

    def ffi_call(name: str, shape: jax.ShapeDtypeStruct):
        def replayed(*arrays, **attributes):
            called.append(name)
            given = partial(replay, program, name, shape, **attributes)
            return jax.pure_callback(given, shape, *arrays)

        return replayed

    monkeypatch.setattr(jax.ffi, "ffi_call", ffi_call)
    ready = native.NativeStatus(True, "emulated", "")
    monkeypatch.setattr(native, "status", lambda: ready)
    return called


def replay(
    program: Path, name: str, shape: jax.ShapeDtypeStruct, *arrays, **attributes
) -> np.ndarray:
    """What the handler `name` gives on the emulated CPU."""
    assert COMPILER is not None
    assert EMULATOR is not None
    # Beside the compiler's own libraries lies the system that they are of.
    system = (
        Path(run([COMPILER, "-print-file-name=libc.so.6"]).strip()).resolve().parents[1]
    )
    given = [np.ascontiguousarray(array) for array in arrays]
    lines = [f"{name} {len(given)} {len(attributes)}"]
    for array in (*given, shape):
        kind = np.dtype(array.dtype)
        about = (DTYPES[kind.name], kind.itemsize, len(array.shape), *array.shape)
        lines.append(" ".join(map(str, about)))
    for attribute, value in attributes.items():
        lines.append(f"{attribute} {DTYPES[np.dtype(value.dtype).name]} {value}")
    text = "\n".join(lines).encode() + b"\n"
    done = subprocess.run(
        [EMULATOR, "-L", system, program],
        input=text + b"".join(array.tobytes() for array in given),
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr.decode()
    return np.frombuffer(done.stdout, shape.dtype).reshape(shape.shape)


def test_products_and_attention_are_those_of_xla(calls):
    assert largest_difference((1, 5, 9)) < ROUNDING
    blocks = {*native.build.CODE_BLOCKS, *native.build.NUMBER_BLOCKS}
    ranking = {"m2jax_levels", "m2jax_best"}
    assert {*calls} == {*native.build.HANDLERS} - blocks - ranking


def test_who_scores_best_is_whom_xla_names(calls):
    scores = np.random.default_rng(0).normal(size=(3, 301)).astype(np.float32)
    scores[1, ::3] = 0.5
    scores[2, 7] = -np.inf
    ends = (30, 170)
    ours, theirs = (
        selection.levels(scores, np.array(ends, np.int32), implementation=name)
        for name in ("cpu_ffi", "xla")
    )
    assert np.array_equal(ours, theirs)
    ours, theirs = (
        np.asarray(selection.best(scores, ends, implementation=name))
        for name in ("cpu_ffi", "xla")
    )
    # The order within a class is free.
    for among in (slice(0, 30), slice(30, 170)):
        assert np.array_equal(np.sort(ours[:, among]), np.sort(theirs[:, among]))
    assert {*calls} == {"m2jax_levels", "m2jax_best"}
