"""Which implementation serves, and that a run's figures say so."""

import numpy as np
import pytest

from m2jax.kernels import choice, linear, native, toolchain
from tests.kernel_cases import ON_GPU, normal

pytestmark = pytest.mark.skipif(ON_GPU, reason="of the C++ kernels")
W = normal(20, 64, seed=0).astype(np.float16)


@pytest.fixture(autouse=True)
def nothing_served(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(choice, "_served", {})


def test_what_stands_in_for_a_shape_is_noted_with_the_reason(monkeypatch):
    assert native.status().ready
    ready = native.NativeStatus(True, "as if")
    monkeypatch.setattr(native, "status", lambda: ready)
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
