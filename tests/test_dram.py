"""The DRAM tier: what it reads when, and whose buffer it reuses."""

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from m2jax.aligned import aligned_buffer
from m2jax.cache.dram import DramTier
from tests.dram_tiers import (
    SHAPES,
    WAIT_S,
    Gate,
    Rows,
    rows_of,
    settle,
    tier_of,
    visit,
)
from tests.faulty_store import FaultyStore


@pytest.fixture
def tier():
    """Makes tiers that are closed at the end of the test."""
    with ExitStack() as stack:
        yield lambda *store, **sizes: stack.enter_context(
            closing(tier_of(*store, **sizes))
        )


@given(
    layers=st.integers(1, 7),
    fixed=st.integers(0, 7),
    ring=st.integers(1, 4),
    sweeps=st.integers(1, 3),
)
def test_every_visit_sees_the_layer_that_it_asks_for(layers, fixed, ring, sweeps):
    tier = tier_of(
        FaultyStore(Rows()), layers=layers, fixed=min(fixed, layers), ring=ring
    )
    for _ in range(sweeps):
        for layer in range(layers):
            assert np.array_equal(visit(tier, layer), rows_of(layer, "q4"))
    tier.close()


@given(st.lists(st.integers(0, 5), max_size=12), st.integers(0, 5), st.integers(1, 3))
def test_layers_may_be_visited_in_any_order(order, fixed, ring):
    tier = tier_of(FaultyStore(Rows()), layers=6, fixed=fixed, ring=ring)
    for layer in order:
        assert np.array_equal(visit(tier, layer), rows_of(layer, "q4"))
    tier.close()


def test_each_layer_brings_its_own_planes():
    planes = {3: ["q4"], 5: ["q4", "w16"], 6: ["w16"]}
    tier = DramTier(Rows().read, [3, 5, 6], SHAPES, planes, fixed=0, ring=2)
    for layer in (3, 5, 6):
        buffers = tier.rows(layer)
        for plane in planes[layer]:
            assert np.array_equal(buffers[plane], rows_of(layer, plane))
        tier.release(layer)
    tier.close()


@pytest.mark.parametrize("ring", [1, 2, 3, 4])
def test_reads_run_as_far_ahead_as_the_ring_reaches(tier, ring: int):
    store = FaultyStore(Rows())
    cold = tier(store, layers=6, fixed=0, ring=ring)
    cold.rows(2)
    settle(cold)
    assert sorted(layer for layer, _ in store.reads) == list(range(2, 2 + ring))


def test_after_the_last_layer_the_first_is_read_ahead(tier):
    store = FaultyStore(Rows())
    cold = tier(store, layers=4, fixed=0, ring=2)
    cold.rows(3)
    settle(cold)
    assert [layer for layer, _ in store.reads] == [3, 0]


def test_prefetch_returns_before_its_reads_end(tier):
    gate = Gate()
    store = FaultyStore(Rows(), fault=gate, when=lambda number: True)
    cold = tier(store, layers=4, fixed=0, ring=3)
    cold.prefetch_after(3)
    assert gate.begun.acquire(timeout=WAIT_S)
    gate.open.set()


def test_while_a_layer_is_awaited_the_next_one_is_read(tier):
    gate = Gate()
    store = FaultyStore(Rows(), fault=gate, when=lambda number: True)
    cold = tier(store, layers=4, fixed=0, ring=2)
    with ThreadPoolExecutor(1) as pool:
        awaited = pool.submit(cold.rows, 0)
        assert gate.begun.acquire(timeout=WAIT_S)
        assert gate.begun.acquire(timeout=WAIT_S)
        assert not cold.is_here(0)
        assert not awaited.done()
        gate.open.set()
        assert np.array_equal(awaited.result()["q4"], rows_of(0, "q4"))
    settle(cold)
    assert cold.is_here(0)
    assert [cold.is_here(layer) for layer in (1, 2)] == [True, False]


def test_pinned_layers_are_read_once_and_the_others_each_sweep(tier):
    store = FaultyStore(Rows())
    mixed = tier(store, layers=5, fixed=2, ring=1)
    for _ in range(4):
        for layer in range(5):
            visit(mixed, layer)
    settle(mixed)
    read = [layer for layer, _ in store.reads]
    assert [read.count(layer) for layer in range(5)] == [1, 1, 4, 4, 4]


def test_a_hit_is_an_access_to_rows_read_for_an_earlier_one(tier):
    mixed = tier(FaultyStore(Rows()), layers=5, fixed=2, ring=2)
    for _ in range(4):
        for layer in range(5):
            visit(mixed, layer)
    assert mixed.counters.accesses == 20
    assert mixed.counters.hits == 2 * 3


def test_bytes_read_are_counted_as_the_store_gave_them(tier):
    store = FaultyStore(Rows())
    mixed = tier(store, layers=5, fixed=2, ring=2)
    for layer in range(5):
        visit(mixed, layer)
    settle(mixed)
    assert store.read_bytes > 0
    assert mixed.counters.read_bytes == store.read_bytes


def test_held_bytes_are_those_of_pinned_layers_and_ring(tier):
    layer_bytes = SHAPES["q4"][0] * SHAPES["q4"][1]
    mixed = tier(FaultyStore(Rows()), layers=5, fixed=2, ring=2)
    assert mixed.held_bytes == 4 * layer_bytes


def test_a_ring_longer_than_its_layers_is_not_allocated(tier):
    layer_bytes = SHAPES["q4"][0] * SHAPES["q4"][1]
    short = tier(FaultyStore(Rows()), layers=3, fixed=1, ring=9)
    assert short.held_bytes == 3 * layer_bytes


def test_a_buffer_in_use_is_not_overwritten_by_reads_ahead(tier):
    mixed = tier(FaultyStore(Rows()), layers=6, fixed=0, ring=3)
    for layer in range(6):
        rows = mixed.rows(layer)["q4"]
        settle(mixed)
        assert np.array_equal(rows, rows_of(layer, "q4"))
        mixed.release(layer)


def test_the_oldest_buffer_is_passed_over_while_it_is_in_use(tier):
    mixed = tier(FaultyStore(Rows()), layers=6, fixed=0, ring=2)
    for layer in (0, 5):
        mixed.rows(layer)
        mixed.release(layer)
    rows = mixed.rows(0)["q4"]
    settle(mixed)
    assert np.array_equal(rows, rows_of(0, "q4"))


def test_buffers_start_on_disk_blocks():
    for rows in range(1, 40):
        buffer = aligned_buffer((rows, 24))
        assert buffer.ctypes.data % 4096 == 0
        assert buffer.shape == (rows, 24)


def test_no_thread_is_left_after_close():
    before = set(threading.enumerate())
    tier = tier_of(FaultyStore(Rows()), layers=4, fixed=1, ring=2)
    visit(tier, 0)
    tier.close()
    assert set(threading.enumerate()) <= before
