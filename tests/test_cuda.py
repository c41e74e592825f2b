"""The CUDA kernels: that they compile wherever nvcc is; on a GPU, the invariants."""

import shutil

import jax
import numpy as np
import pytest

from m2jax.cache import device
from m2jax.cache.mapped import MappedMemory
from m2jax.kernels import cuda, sparse_swiglu
from m2jax.kernels.cuda import build
from tests.kernel_cases import ON_GPU, PLANES, assert_bits_hang_on_nothing_beside

gpu_only = pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
NVCC = shutil.which("nvcc")


@pytest.mark.skipif(NVCC is None, reason="no nvcc here")
def test_they_compile(tmp_path, monkeypatch):
    """For tensor cores; the emulation of test_cuda_on_cpu compiles the other forms."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert NVCC is not None
    library = build._built(NVCC, "sm_80").read_bytes()
    assert all(name.encode() in library for name in build.HANDLERS)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"M2JAX_NATIVE": "0"}, "switched off"),
        ({"CUDA_HOME": "/nowhere", "PATH": ""}, "/nowhere, PATH"),
    ],
)
def test_without_them_xla_serves(monkeypatch, settings, said):
    monkeypatch.setattr(build, "USUAL_FOLDER", "/nowhere")
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    found = build.status.__wrapped__()
    assert not found.ready
    assert said in found.about


@pytest.mark.gpu
@gpu_only
def test_they_are_there_and_used_on_a_gpu():
    assert cuda.status().ready, cuda.status().about
    assert sparse_swiglu.default_implementation() == "cuda_ffi"


@pytest.mark.gpu
@gpu_only
@pytest.mark.parametrize("plane", PLANES)
def test_a_result_hangs_neither_on_places_nor_on_tokens_beside(plane):
    form = {"plane": plane, "implementation": "cuda_ffi"}
    assert_bits_hang_on_nothing_beside(1500, 160, **form)


@pytest.mark.gpu
@gpu_only
def test_the_device_fetches_rows_of_mapped_memory():
    memory = MappedMemory()
    rows = memory.buffer((50, 96))
    rows[:] = np.random.default_rng(0).integers(0, 256, rows.shape, np.uint8)
    address = memory.address(rows)
    assert address is not None
    # The last one is padding.
    ids, slots = np.array([49, 0, 7, -1], np.int32), np.array([2, 5, 0, 6], np.int32)
    pool = device.init_pool(6, np.zeros(96, np.uint8))
    lay = pool.unsafe_buffer_pointer()
    load = np.stack([np.arange(4, dtype=np.int32), slots, ids])
    pool, named = device.fill_from_host(pool, load, address, rows=50)
    assert pool.unsafe_buffer_pointer() == lay
    assert np.array_equal(named, load[0])
    wanted = np.zeros((6, 96), np.uint8)
    wanted[slots[:3]] = rows[ids[:3]]
    assert np.array_equal(pool, wanted)
    like = jax.ShapeDtypeStruct((96,), np.uint8)
    some = device.from_host(address, ids[:3], like=like, rows=50)
    assert np.array_equal(some, rows[ids[:3]])
    memory.close()


def test_a_cpu_maps_no_memory():
    if ON_GPU:
        pytest.skip("a GPU does")
    memory = MappedMemory()
    rows = memory.buffer((3, 16))
    assert rows.shape == (3, 16)
    assert memory.nbytes == 0
    assert memory.address(rows) is None
    memory.close()
