"""Loading with another model as the draft: refused before anything is in memory, and
what was begun is ended where a later step fails."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

import m2jax
from m2jax import planning
from m2jax.errors import DoesNotFit, StoreError
from m2jax.store import Store, TensorStoreChunks, open_store
from tests.budgets import smallest
from tests.drafting import load
from tests.faulty_store import FaultyStore, raises


class Chunks:
    """Reads of a store, and whether they were ended."""

    def __init__(self, store: Store):
        self._chunks, self.closed = TensorStoreChunks(store), False

    def read(self, layer: int, plane: str, out: np.ndarray) -> None:
        self._chunks.read(layer, plane, out)

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[Chunks]:
    """Every reader that is made of a store from now on."""
    made: list[Chunks] = []

    def choose(store: Store) -> Chunks:
        made.append(Chunks(store))
        return made[-1]

    monkeypatch.setattr("m2jax.loading.choose_chunks", choose)
    return made


@contextmanager
def no_thread_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    left = {thread.name for thread in set(threading.enumerate()) - before}
    assert not any(name.startswith("m2jax") for name in left)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"draft_tokens": 64}, "--draft-tokens 64: want 1 to 63"),
        ({"draft_tokens": 0}, "--draft-tokens 0: want 1 to 63"),
        ({"draft_tokens": 20, "context": 16}, "--draft-tokens 20: want 1 to 15"),
        ({"context": 1 << 30}, "--context"),
        ({"distance": -1}, "--prefetch"),
        ({"policy": "belady"}, "policy 'belady'"),
        ({"dram": "some"}, "--dram"),
        ({"emulate_ssd": "fast"}, "--emulate-ssd"),
        ({"in_place": "yes"}, "in_place"),
    ],
    ids=str,
)
def test_a_wrong_option_is_refused_before_the_draft_model_is_loaded(
    options, says, tiny_store, opened
):
    assert_refused_at_once(ValueError, says, opened, tiny_store, **options)


def test_another_vocabulary_is_refused_before_either_model_is_loaded(
    bundled_store, tiny_store, opened
):
    says = r"--draft .*: has \d+ tokens, the model has"
    assert_refused_at_once(ValueError, says, opened, bundled_store, draft=tiny_store)


def test_budgets_that_hold_only_the_draft_are_refused_before_it_is_loaded(
    tiny_store, opened
):
    with load(tiny_store, mix="0/25/75", draft="none") as draft:
        alone = draft.plan.footprint.hbm
    opened.clear()
    hbm = smallest(lambda: load(tiny_store, draft=tiny_store, hbm=alone)) - 1
    assert hbm > alone
    assert_refused_at_once(DoesNotFit, "is too small", opened, tiny_store, hbm=hbm)


def test_a_machine_with_room_for_one_of_the_models_is_refused_at_once(
    tiny_store, opened, monkeypatch
):
    with load(tiny_store, draft=tiny_store) as engine:
        need = engine.plan.footprint.hbm + engine.plan.footprint.dram
        assert engine.plan.footprint.draft > 0
    opened.clear()
    budgets = {"hbm": need, "dram": need}
    monkeypatch.setattr(planning, "free_dram_bytes", lambda: need)
    load(tiny_store, draft=tiny_store, **budgets).close()
    opened.clear()
    monkeypatch.setattr(planning, "free_dram_bytes", lambda: need - 1)
    assert_refused_at_once(DoesNotFit, "free", opened, tiny_store, **budgets)


def assert_refused_at_once(
    error: type[Exception], says: str, opened: list[Chunks], store: Path, **options
) -> None:
    came: list[str] = []
    options = {"draft": store, "progress": lambda what, _: came.append(what), **options}
    with no_thread_left(), pytest.raises(error, match=says):
        load(store, **options)
    assert came == []
    assert opened == []


@pytest.mark.usefixtures("short_waits")
def test_the_draft_model_is_closed_where_the_target_cannot_be_read(tiny_store, opened):
    faulty = FaultyStore(TensorStoreChunks(open_store(tiny_store)))
    faulty.break_next(raises(StoreError("damaged")), count=None)
    with no_thread_left(), pytest.raises(StoreError, match="damaged"):
        load(tiny_store, draft=tiny_store, chunks=faulty)
    assert [chunks.closed for chunks in opened] == [True]


# The draft model's dense part and neurons come first, then the target's.
@pytest.mark.parametrize("last", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", [RuntimeError("a bug"), KeyboardInterrupt()])
def test_what_was_begun_is_ended_whatever_ends_the_loading(
    last, kind, tiny_store, opened
):
    came: list[str] = []

    def progress(what: str, nbytes: int) -> None:
        if came[-1:] != [what]:
            came.append(what)
        if len(came) == last:
            raise kind

    with no_thread_left(), pytest.raises(type(kind)):
        load(tiny_store, draft=tiny_store, progress=progress)
    assert len(opened) == last // 2
    assert all(chunks.closed for chunks in opened)


def test_an_engine_that_is_closed_has_ended_both_models(tiny_store, opened):
    with no_thread_left():
        m2jax.load(tiny_store, draft=tiny_store).close()
    assert [chunks.closed for chunks in opened] == [True, True]
