"""The CUDA kernels: that they compile wherever nvcc is; on a GPU, the invariants."""

import shutil

import numpy as np
import pytest

from m2jax.kernels import cuda, sparse_swiglu
from m2jax.kernels.cuda import build
from tests.kernel_cases import DTYPES, ON_GPU, PLANES, normal, records_of

gpu_only = pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
NVCC = shutil.which("nvcc")


@pytest.mark.skipif(NVCC is None, reason="no nvcc here")
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_they_compile(architecture, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert NVCC is not None
    library = build._built(NVCC, architecture).read_bytes()
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
    records, scales, _ = records_of(1500, 160, plane=plane)
    form = {
        "plane": "w16" if plane in DTYPES else plane,
        "implementation": "cuda_ffi",
    }
    x, h = normal(9, 160, seed=2), normal(9, 1500, seed=3)
    together, _ = sparse_swiglu.project(x, records, scales, **form)
    sums = sparse_swiglu.accumulate(h, records, scales, **form)
    slots = np.random.default_rng(0).permutation(1500).astype(np.int32)
    pool = np.empty_like(records)
    pool[slots] = records
    for t in range(9):
        one = slice(t, t + 1)
        alone, _ = sparse_swiglu.project(x[one], pool, scales, slots=slots, **form)
        assert np.array_equal(alone[0], together[t])
        y = sparse_swiglu.accumulate(h[one], pool, scales, slots=slots, **form)
        assert np.array_equal(y[0], sums[t])
