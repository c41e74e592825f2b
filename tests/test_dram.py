"""The DRAM tier: what it reads when, whose buffer it reuses, what failures leave."""

import errno
import signal
import threading
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from m2jax.cache import dram
from m2jax.cache.dram import READ_ATTEMPTS, DramTier, aligned_buffer
from m2jax.errors import StoreError, TierFailed
from tests.faulty_store import FaultyStore, raises

SHAPES = {"q4": (6, 24), "w16": (6, 96)}
WAIT_S = 20.0


class Rows:
    """Neuron records that are known: random bytes, drawn from layer and plane."""

    def read(self, layer: int, plane: str, out: np.ndarray) -> None:
        out[:] = rows_of(layer, plane)


def rows_of(layer: int, plane: str) -> np.ndarray:
    generator = np.random.default_rng([layer, len(plane)])
    return generator.integers(0, 256, SHAPES[plane], np.uint8)


class Gate:
    """Stops every read until it is opened."""

    def __init__(self):
        self.begun, self.open = threading.Semaphore(0), threading.Event()

    def __call__(self, layer: int, plane: str) -> None:
        self.begun.release()
        assert self.open.wait(WAIT_S)


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(dram, "BACK_OFF_S", 0.001)


@pytest.fixture
def tier():
    """Makes tiers of one plane over a FaultyStore; closes them."""
    made: list[DramTier] = []

    def make(store: FaultyStore, *, layers: int, fixed: int, ring: int) -> DramTier:
        made.append(tier_of(store, layers=range(layers), fixed=fixed, ring=ring))
        return made[-1]

    yield make
    for one in made:
        one.close()


def tier_of(store: FaultyStore, *, layers, fixed: int, ring: int) -> DramTier:
    return DramTier(
        store.read,
        list(layers),
        {"q4": SHAPES["q4"]},
        {layer: ["q4"] for layer in layers},
        fixed=fixed,
        ring=ring,
    )


def visit(tier: DramTier, layer: int) -> np.ndarray:
    """The engine's way to a layer's rows: a copy of what lay in the buffer."""
    rows = tier.rows(layer)["q4"]
    tier.prefetch_after(layer)
    found = rows.copy()
    tier.release(layer)
    return found


def settle(tier: DramTier) -> None:
    """Waits until no read is in flight."""
    for area in tier._areas():
        if area.future is not None:
            area.future.exception(WAIT_S)


@given(
    layers=st.integers(1, 7),
    fixed=st.integers(0, 7),
    ring=st.integers(1, 4),
    sweeps=st.integers(1, 3),
)
def test_every_visit_sees_the_layer_that_it_asks_for(layers, fixed, ring, sweeps):
    tier = tier_of(
        FaultyStore(Rows()), layers=range(layers), fixed=min(fixed, layers), ring=ring
    )
    for _ in range(sweeps):
        for layer in range(layers):
            assert np.array_equal(visit(tier, layer), rows_of(layer, "q4"))
    tier.close()


@given(st.lists(st.integers(0, 5), max_size=12), st.integers(0, 5), st.integers(1, 3))
def test_layers_may_be_visited_in_any_order(order, fixed, ring):
    tier = tier_of(FaultyStore(Rows()), layers=range(6), fixed=fixed, ring=ring)
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
    cold.prefetch_after(2)
    settle(cold)
    assert cold.distance == ring - 1
    assert sorted(layer for layer, _ in store.reads) == list(range(2, 2 + ring))


def test_after_the_last_layer_the_first_is_read_ahead(tier):
    store = FaultyStore(Rows())
    cold = tier(store, layers=4, fixed=0, ring=2)
    cold.rows(3)
    cold.prefetch_after(3)
    settle(cold)
    assert [layer for layer, _ in store.reads] == [3, 0]


def test_prefetch_returns_before_its_reads_end(tier):
    gate = Gate()
    store = FaultyStore(Rows(), fault=gate)
    cold = tier(store, layers=4, fixed=0, ring=3)
    cold.rows(0)
    store.when = lambda number: True
    cold.prefetch_after(0)
    assert gate.begun.acquire(timeout=WAIT_S)
    gate.open.set()


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
        mixed.prefetch_after(layer)
        settle(mixed)
        assert np.array_equal(rows, rows_of(layer, "q4"))
        mixed.release(layer)


def test_the_oldest_buffer_is_passed_over_while_it_is_in_use(tier):
    mixed = tier(FaultyStore(Rows()), layers=6, fixed=0, ring=2)
    for layer in (0, 5):
        mixed.rows(layer)
        mixed.release(layer)
    rows = mixed.rows(0)["q4"]
    mixed.prefetch_after(0)
    settle(mixed)
    assert np.array_equal(rows, rows_of(0, "q4"))


def test_buffers_start_on_disk_blocks():
    for rows in range(1, 40):
        buffer = aligned_buffer((rows, 24))
        assert buffer.ctypes.data % 4096 == 0
        assert buffer.shape == (rows, 24)


def test_a_read_that_fails_once_is_made_again(tier):
    store = FaultyStore(Rows())
    store.break_next(raises(OSError(errno.EIO, "Input/output error")))
    assert np.array_equal(
        visit(tier(store, layers=2, fixed=0, ring=1), 0), rows_of(0, "q4")
    )


def test_an_interrupted_read_is_made_again(tier):
    store = FaultyStore(Rows())
    store.break_next(raises(InterruptedError(errno.EINTR, "Interrupted system call")))
    assert np.array_equal(
        visit(tier(store, layers=2, fixed=0, ring=1), 0), rows_of(0, "q4")
    )


def test_reads_that_keep_failing_end_after_a_few_attempts_naming_layer_and_plane(tier):
    store = FaultyStore(Rows())
    store.break_next(raises(OSError(errno.EIO, "Input/output error")), count=None)
    cold = tier(store, layers=2, fixed=0, ring=1)
    with pytest.raises(TierFailed, match=r"layer 1, plane q4: .*Input/output error"):
        cold.rows(1)
    assert len(store.reads) == READ_ATTEMPTS


def test_damage_is_not_read_again(tier):
    store = FaultyStore(Rows())
    store.break_next(raises(StoreError("c/0: sha256 differs")), count=None)
    cold = tier(store, layers=2, fixed=0, ring=1)
    with pytest.raises(StoreError, match="sha256 differs"):
        cold.rows(1)
    assert len(store.reads) == 1


@pytest.mark.parametrize("fixed", [0, 3])
def test_rows_come_after_a_failure_once_the_store_is_well(tier, fixed: int):
    store = FaultyStore(Rows())
    cold = tier(store, layers=3, fixed=fixed, ring=2)
    store.break_next(raises(KeyError("a bug")), count=1)
    with pytest.raises(KeyError, match="a bug"):
        cold.rows(0)
    cold.release_all()
    for layer in range(3):
        assert np.array_equal(visit(cold, layer), rows_of(layer, "q4"))


@pytest.mark.parametrize("fixed", [0, 3])
def test_a_read_ahead_that_failed_unawaited_is_forgotten_on_request(tier, fixed: int):
    store = FaultyStore(Rows())
    cold = tier(store, layers=3, fixed=fixed, ring=3)
    cold.rows(0)
    store.break_next(raises(OSError(errno.EIO, "Input/output error")), count=None)
    cold.prefetch_after(0)
    settle(cold)
    store.heal()
    cold.release_all()
    cold.forget_failures()
    for layer in range(3):
        assert np.array_equal(visit(cold, layer), rows_of(layer, "q4"))


def test_a_read_without_an_answer_fails_after_the_time_limit(tier, monkeypatch):
    monkeypatch.setattr(dram, "READ_TIMEOUT_S", 0.05)
    gate = Gate()
    store = FaultyStore(Rows(), fault=gate, when=lambda number: number == 0)
    cold = tier(store, layers=2, fixed=0, ring=1)
    with pytest.raises(TierFailed, match="layer 0: no answer from the SSD"):
        cold.rows(0)
    gate.open.set()
    settle(cold)
    assert np.array_equal(visit(cold, 0), rows_of(0, "q4"))


def test_a_buffer_whose_read_has_no_answer_is_not_waited_for_without_limit(
    tier, monkeypatch
):
    monkeypatch.setattr(dram, "READ_TIMEOUT_S", 0.05)
    gate = Gate()
    store = FaultyStore(Rows(), fault=gate, when=lambda number: number == 0)
    cold = tier(store, layers=2, fixed=0, ring=1)
    with pytest.raises(TierFailed):
        cold.rows(0)
    with pytest.raises(TierFailed, match="layer 0: no answer from the SSD"):
        cold.rows(1)
    gate.open.set()


def test_a_read_whose_wait_was_interrupted_does_not_overwrite_the_next_layer(tier):
    main = threading.main_thread().ident
    assert main is not None

    def interrupt(layer: int, plane: str) -> None:
        # By now the main thread waits for this read.
        time.sleep(0.05)
        signal.pthread_kill(main, signal.SIGINT)
        time.sleep(0.2)

    store = FaultyStore(Rows(), fault=interrupt, when=lambda number: number == 0)
    cold = tier(store, layers=2, fixed=0, ring=1)
    with pytest.raises(KeyboardInterrupt):
        cold.rows(0)
    cold.release_all()
    rows = cold.rows(1)["q4"]
    time.sleep(0.3)
    assert np.array_equal(rows, rows_of(1, "q4"))


def test_no_thread_is_left_after_close():
    before = set(threading.enumerate())
    tier = tier_of(FaultyStore(Rows()), layers=range(4), fixed=1, ring=2)
    visit(tier, 0)
    tier.close()
    assert set(threading.enumerate()) <= before
