"""The compiled form of a pool's directory: it decides what NumPy decides."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from m2jax import compiled_kernels
from m2jax.cache.policy import LFU, LRU
from m2jax.compiled_kernels import prepare_kernels
from m2jax.kernels import directory, native
from m2jax.kernels.directory import FORMS
from m2jax.kernels.directory.native import compiled


class Drawn:
    """Any priorities at all, new ones each step: as of Belady and of Random."""

    def __init__(self, neurons: int, *, high: int, steps: tuple[int, ...] = (1,)):
        self.priority = np.zeros(neurons, np.int64)
        self._generator = np.random.default_rng(high)
        self._high, self._steps = high, steps

    def touch(self, wanted: np.ndarray) -> None:
        low, high, size = -self._high, self._high, self.priority.size
        self.priority.fill(0)
        for step in self._steps:
            self.priority += step * self._generator.integers(low, high, size)


POLICIES = {
    "lru": LRU,
    "lfu": LFU,
    "ties": lambda neurons: Drawn(neurons, high=3),
    "digits": lambda neurons: Drawn(neurons, high=2, steps=(1, 1 << 20, 1 << 40)),
    "whole range": lambda neurons: Drawn(neurons, high=(1 << 63) - 1),
}


@pytest.fixture(scope="module", autouse=True)
def built():
    assert directory.prepare() is None


def run(form: str, policy, neurons: int, slots: int, steps) -> list:
    """All that a form decides of steps; None in them empties the pool."""
    policy = policy(neurons)
    slot_of, neuron_in = np.full(neurons, -1, np.int32), np.zeros(slots, np.int32)
    held, done = 0, []
    for ids in steps:
        if ids is None:
            slot_of.fill(-1)
            held = 0
            continue
        try:
            plan = FORMS[form](ids, slot_of, neuron_in, policy.priority, held=held)
        except ValueError as error:
            done.append(str(error))
        else:
            assert {array.dtype for array in plan} == {np.dtype(np.int32)}
            done.append([array.tolist() for array in plan])
            held += plan.load_positions.size - plan.victims.size
            policy.touch(ids)
        done.append((held, slot_of.tolist(), neuron_in[:held].tolist()))
    return done


@st.composite
def runs(draw):
    """(F, S, steps) where a step keeps a share of the last one, or is refused: too
    many ids, one twice, one out of range."""
    neurons = draw(st.integers(1, 160))
    slots = draw(st.one_of(st.just(neurons), st.integers(1, neurons)))
    most = draw(st.one_of(st.just(slots), st.integers(0, slots)))
    generator = np.random.default_rng(draw(st.integers(0, 1 << 32)))
    steps, last = [], np.zeros(0, np.int64)
    kinds = st.sampled_from(["set"] * 12 + ["full"] * 3 + ["reset", "many", "bad"])
    for kind in draw(st.lists(kinds, max_size=24)):
        if kind == "reset":
            steps.append(None)
            continue
        count = most if kind == "full" else int(generator.integers(0, most + 1))
        if kind == "many":
            count = min(slots + 1, neurons)
        kept = generator.permutation(last)[: int(generator.random() * count)]
        others = np.setdiff1d(np.arange(neurons), kept)
        fresh = generator.permutation(others)[: count - kept.size]
        ids = generator.permutation(np.concatenate([kept, fresh]))
        if kind == "bad" and count:
            ids[generator.integers(count)] = generator.choice([-1, neurons, ids[0]])
        steps.append(ids)
        last = ids if kind in ("set", "full") else last
    return neurons, slots, steps


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES.keys())
@given(runs())
def test_the_compiled_form_decides_what_numpy_decides(policy, steps):
    assert run("native", policy, *steps) == run("numpy", policy, *steps)


@pytest.mark.parametrize("slots", [2752, 5504, 11008])
@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES.keys())
def test_so_it_does_for_a_7b_layer(policy, slots):
    generator = np.random.default_rng(0)
    order, steps = generator.permutation(11008), []
    for _ in range(12):
        generator.shuffle(order[:2752])
        order[2200:] = generator.permutation(order[2200:])
        steps.append(order[:2752].copy())
    forms = (run(form, policy, 11008, slots, steps) for form in FORMS)
    native_form, numpy_form = forms
    assert native_form == numpy_form


def test_what_is_refused_changes_nothing_in_either_form():
    for form in FORMS:
        for ids in ([1, 2, 3, 4], [1, 1], [7, 1], [1, -1]):
            before = run(form, LRU, 6, 3, [np.array([5, 2])])
            *after, why, state = run(form, LRU, 6, 3, [np.array([5, 2]), np.array(ids)])
            assert "want" in why
            assert [*after, state] == [*before, before[-1]]


def test_a_device_without_kernels_of_its_own_has_it_all_the_same(monkeypatch, tmp_path):
    """As on a GPU without nvcc, on a machine that compiled nothing before."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(compiled_kernels, "must_compile", lambda: False)
    monkeypatch.setattr(compiled_kernels, "why_slow", lambda: "no nvcc here")
    monkeypatch.setattr(native.build, "built", None)
    compiled.cache_clear()
    assert directory.default_form() == "numpy"
    prepare_kernels()
    assert directory.default_form() == "native"


@pytest.mark.parametrize("setting", ["M2JAX_NATIVE=0", "CXX=no-such-compiler"])
def test_without_a_compiler_numpy_serves(monkeypatch, setting):
    monkeypatch.setenv(*setting.split("="))
    compiled.cache_clear()
    assert directory.default_form() == "numpy"
    assert directory.prepare() is not None
    assert directory.default_form() == "numpy"
    compiled.cache_clear()


def test_it_loads_no_jax():
    program = "import sys, m2jax.cache.residency; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
