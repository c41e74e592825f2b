"""Which implementation serves, that figures say so, and what a named one refuses."""

from functools import partial

import jax
import numpy as np
import pytest

from m2jax.kernels import choice, linear, native, sparse_swiglu, toolchain
from tests.kernel_cases import (
    DTYPES,
    ON_GPU,
    assert_equal_but_for_rounding,
    normal,
    records_of,
)

pytestmark = pytest.mark.skipif(ON_GPU, reason="of the C++ kernels")
W = normal(20, 64, seed=0).astype(np.float16)


@pytest.fixture(autouse=True)
def nothing_served(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(choice, "_served", {})


@pytest.fixture
def no_blocks(monkeypatch: pytest.MonkeyPatch):
    """As on a CPU without C++ kernels for blocks of tokens."""
    assert native.status().ready
    ready = native.NativeStatus(True, "as if")
    monkeypatch.setattr(native, "status", lambda: ready)


@pytest.mark.usefixtures("no_blocks")
def test_what_stands_in_for_a_shape_is_noted_with_the_reason():
    for tokens in (1, 33, 40):
        linear.linear(normal(tokens, 64, seed=1), W)
    why = "cpu_ffi takes up to 32 tokens by numbers on this CPU, not 33"
    assert choice.report() == {
        "compiled": True,
        "about": "as if",
        "ops": {"linear": {"cpu_ffi": None, "xla_blocked": why}},
    }


def test_what_serves_without_a_compiler_is_noted_with_the_reason(monkeypatch):
    missing = native.NativeStatus(False, "no C++ compiler here")
    monkeypatch.setattr(native, "status", lambda: missing)
    linear.linear(normal(1, 64, seed=1), W)
    assert choice.report() == {
        "compiled": False,
        "about": "no C++ compiler here",
        "ops": {"linear": {"xla_blocked": "no C++ compiler here"}},
    }


def test_switched_off_kernels_are_named_as_that(monkeypatch):
    monkeypatch.setenv(toolchain.SWITCH, "0")
    monkeypatch.setattr(native, "status", native.build.status.__wrapped__)
    assert choice.report()["about"] == "switched off by M2JAX_NATIVE=0"


def test_what_was_asked_for_by_name_is_no_news():
    linear.linear(normal(1, 64, seed=1), W, implementation="xla")
    assert choice.report()["ops"] == {}


@pytest.mark.usefixtures("no_blocks")
def test_who_asks_for_cpp_kernels_at_a_shape_that_they_do_not_take_is_refused():
    records, scales, _ = records_of(20, 64, plane="q4")
    x, h = normal(33, 64, seed=2), normal(33, 20, seed=3)
    form, own = {"implementation": "cpu_ffi"}, {"plane": "q4"}
    told = "takes up to 32 tokens by {} on this CPU, not 33; name another, or None"
    with pytest.raises(NotImplementedError, match=told.format("numbers")):
        linear.linear(x, normal(20, 64, seed=0), **form)
    with pytest.raises(NotImplementedError, match=told.format("codes")):
        sparse_swiglu.project(x, records, scales, **own, **form)
    with pytest.raises(NotImplementedError, match=told.format("codes")):
        sparse_swiglu.accumulate(h, records, scales, **own, **form)
    with pytest.raises(NotImplementedError, match=told.format("codes")):
        sparse_swiglu.whole(x, {"q4": records}, scales, activation="silu", **form)


@pytest.mark.usefixtures("no_blocks")
def test_who_asks_for_none_is_served_at_any_shape():
    records, scales, values = records_of(20, 64, plane="q4")
    x = normal(33, 64, seed=2)
    gate, _ = jax.jit(partial(sparse_swiglu.project, plane="q4"))(x, records, scales)
    assert_equal_but_for_rounding(gate, x.astype(np.float64) @ values[:, 0].T)
    y = jax.jit(linear.linear)(x, x)
    assert_equal_but_for_rounding(y, x.astype(np.float64) @ x.T)


@pytest.mark.parametrize(
    ("tokens", "width", "plane", "told"),
    [
        (65, 64, "q4", "takes up to 64 tokens, not 65"),
        (1, 24 << 10, "q4", "takes rows of up to 20480 weights, not 24576"),
        (1, 12, "float16", "takes rows of whole 16 bytes, not of 24"),
        (1, 64, "float32", "takes down columns of 16 bits or of codes, not of float32"),
    ],
)
def test_who_asks_for_cuda_kernels_at_a_shape_that_they_do_not_take_is_refused(
    tokens, width, plane, told
):
    records, scales, _ = records_of(3, width, plane=plane)
    h = normal(tokens, 3, seed=3)
    form = {"implementation": "cuda_ffi", "plane": "w16" if plane in DTYPES else plane}
    with pytest.raises(NotImplementedError, match=f"'cuda_ffi' {told}; name another"):
        sparse_swiglu.accumulate(h, records, scales, **form)
