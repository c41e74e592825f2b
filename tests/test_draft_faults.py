"""Faults under a draft and its sweep: named, stopped, forgotten by the next request."""

import errno
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import m2jax
from m2jax.draft import loop
from m2jax.draft.drafters import BaseDrafter
from m2jax.engine import Engine
from m2jax.errors import StoreError, TierFailed
from m2jax.store import Store, TensorStoreChunks, open_store
from tests.faulty_store import FaultyStore, cut, damages, delays, raises, remove

pytestmark = pytest.mark.usefixtures("short_waits")

MIX = "25/25/50"
IDS = [3, 17, 5, 80, 33, 2, 64]
# Reads of one sweep: three layers of planes r4 and w16.
SWEEP = 6
BROKEN_DISK = OSError(errno.EIO, "Input/output error")


@pytest.fixture(scope="module")
def whole_hbm(tiny_store: Path) -> int:
    return m2jax.load(tiny_store, mix=MIX).plan.footprint.hbm


@pytest.fixture(scope="module")
def right(tiny_store: Path) -> list[int]:
    return tokens_of(m2jax.load(tiny_store, mix=MIX))


@pytest.fixture(
    params=[(1, False), (2, False), (3, False), (2, True)],
    ids=["ring of 1", "ring of 2", "ring of 3", "ring of 2 in place"],
)
def drafting(
    request, tiny_store: Path, whole_hbm: int, tmp_path: Path
) -> Iterator[tuple[Engine, FaultyStore, Store]]:
    """An engine that drafts 3 tokens a sweep from a store that can fail."""
    ring, in_place = request.param
    store = open_store(shutil.copytree(tiny_store, tmp_path / "store"))
    faulty = FaultyStore(TensorStoreChunks(store))
    layer_bytes = sum(map(store.layout.plane_bytes, ("r4", "w16")))
    with m2jax.load(
        store.path,
        mix=MIX,
        # Plane q4, and two layers in transit where they are copied.
        hbm=whole_hbm - (3 if in_place else 1) * layer_bytes,
        # A byte less than all layers: the ring is used.
        dram=min(ring * layer_bytes, 3 * layer_bytes - 1),
        in_place=in_place,
        draft="base",
        draft_tokens=3,
        chunks=faulty,
    ) as engine:
        yield engine, faulty, store


def tokens_of(engine: Engine) -> list[int]:
    return engine.generate(IDS, max_new_tokens=24, ignore_eos=True).token_ids


# The prompt's sweep comes first, then one a round.
@pytest.mark.parametrize("skip", [SWEEP, SWEEP + 1, 2 * SWEEP + 3])
def test_after_io_errors_without_end_the_next_request_is_right(skip, drafting, right):
    engine, faulty, _ = drafting
    assert tokens_of(engine) == right
    faulty.break_next(raises(BROKEN_DISK), count=None, skip=skip)
    with pytest.raises(TierFailed, match="Input/output error"):
        tokens_of(engine)
    faulty.heal()
    assert tokens_of(engine) == right


@pytest.mark.parametrize("damage", [cut, remove])
def test_damage_in_the_middle_of_a_text_stops_it(damage, drafting):
    engine, faulty, store = drafting
    tokens_of(engine)
    faulty.break_next(damages(store, damage), skip=2 * SWEEP)
    with pytest.raises(StoreError, match="neurons/0"):
        tokens_of(engine)


def test_a_slow_read_is_waited_for(drafting, right):
    engine, faulty, _ = drafting
    faulty.break_next(delays(0.1), count=2, skip=2 * SWEEP)
    assert tokens_of(engine) == right


@pytest.mark.parametrize("error", [RuntimeError("a bug"), KeyboardInterrupt()])
def test_after_a_draft_that_failed_the_next_request_is_right(
    error, drafting, right, monkeypatch
):
    engine, _, _ = drafting
    with monkeypatch.context() as patch:

        def fail(drafter, text, count, pace, meanwhile):
            meanwhile()
            raise error

        patch.setattr(BaseDrafter, "propose", fail)
        with pytest.raises(type(error)):
            tokens_of(engine)
    assert tokens_of(engine) == right


def test_an_interrupt_between_draft_and_sweep_leaves_nothing_staged(
    drafting, right, monkeypatch
):
    engine, _, _ = drafting

    def interrupted(*args, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop, "begin", interrupted)
        with pytest.raises(KeyboardInterrupt):
            tokens_of(engine)
    assert not engine.runner.tiers._ahead
    assert tokens_of(engine) == right


def test_the_first_layers_come_while_a_draft_is_made(drafting, monkeypatch):
    engine, _, _ = drafting
    tiers = engine.runner.tiers
    ahead = []
    propose = BaseDrafter.propose

    def noted(*args):
        before = dict(tiers._ahead)
        made = propose(*args)
        ahead.append((before, list(tiers._ahead)))
        return made

    monkeypatch.setattr(BaseDrafter, "propose", noted)
    tokens_of(engine)
    assert ahead
    assert all(entry == ({}, [0, 1]) for entry in ahead)


def test_a_text_left_halfway_leaves_the_next_one_right(drafting, right):
    engine, _, _ = drafting
    stream = engine.stream(IDS, max_new_tokens=24, ignore_eos=True)
    next(stream._token_runs())
    del stream
    assert tokens_of(engine) == right


def test_no_thread_is_left_behind(tiny_store, whole_hbm):
    before = set(threading.enumerate())
    with m2jax.load(tiny_store, mix=MIX, hbm=whole_hbm - 1, draft="base") as engine:
        tokens_of(engine)
    left = {thread.name for thread in set(threading.enumerate()) - before}
    assert not any(name.startswith("m2jax") for name in left)
