"""The DRAM tier when reads fail, hang or are interrupted: what comes after is right."""

import errno
import signal
import threading
import time
from concurrent.futures import Future, wait
from contextlib import ExitStack, closing

import numpy as np
import pytest

from m2jax.cache import dram
from m2jax.cache.reading import READ_ATTEMPTS
from m2jax.errors import StoreError, TierFailed
from tests.dram_tiers import Gate, Rows, rows_of, settle, tier_of, visit
from tests.faulty_store import FaultyStore, raises

pytestmark = pytest.mark.usefixtures("short_waits")


@pytest.fixture
def tier():
    """Makes tiers that are closed at the end of the test."""
    with ExitStack() as stack:
        yield lambda *store, **sizes: stack.enter_context(
            closing(tier_of(*store, **sizes))
        )


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


def test_a_failure_that_another_thread_forgets_meanwhile_is_still_told(tier):
    """A sweep begins while a thread that stages ahead of it waits for the read."""
    store = FaultyStore(Rows())
    store.break_next(raises(StoreError("c/0: missing")))
    cold = tier(store, layers=2, fixed=0, ring=1)

    class ForgottenWhileWaiting(Future):
        def result(self, timeout=None):
            wait([self])
            cold.forget_failures()
            return super().result(timeout)

    def submit(work, *args):
        future = ForgottenWhileWaiting()
        try:
            future.set_result(work(*args))
        except StoreError as error:
            future.set_exception(error)
        return future

    cold._pool.submit = submit
    with pytest.raises(StoreError, match="missing"):
        cold.rows(0)
    assert np.array_equal(visit(cold, 0), rows_of(0, "q4"))


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
    broken = raises(OSError(errno.EIO, "Input/output error"))
    store.break_next(broken, count=None, skip=1)
    cold.rows(0)
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
