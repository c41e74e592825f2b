"""Faults under a running engine: named, stopped, and forgotten by the next request."""

import errno
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import m2jax
from m2jax.cache import dram
from m2jax.engine import Engine
from m2jax.errors import NumericalError, StoreError, TierFailed
from m2jax.store import Store, TensorStoreChunks, open_store
from tests.budgets import pools_first
from tests.faulty_store import (
    FaultyStore,
    chunk_file,
    cut,
    damages,
    delays,
    flip,
    raises,
    remove,
    swap,
)

pytestmark = pytest.mark.usefixtures("short_waits")

MIX = "25/25/50"
IDS = [3, 17, 5, 80, 33, 2, 64]
NEW_TOKENS = 8
LAST_LAYER = 2
PASSING = ["r4", "w16"]
# Of one step, where nothing is pinned: three layers of two planes.
READS = 6
DAMAGES = [flip, cut, remove]
BROKEN_DISK = OSError(errno.EIO, "Input/output error")


@pytest.fixture(scope="module")
def whole_hbm(tiny_store: Path) -> int:
    return m2jax.load(tiny_store, mix=MIX).plan.footprint.hbm


@pytest.fixture(scope="module")
def right(tiny_store: Path, whole_hbm: int) -> list[int]:
    """The tokens of a store that is well."""
    return tokens_of(m2jax.load(tiny_store, mix=MIX, hbm=whole_hbm - 1))


def tokens_of(engine: Engine) -> list[int]:
    done = engine.generate(IDS, max_new_tokens=NEW_TOKENS, ignore_eos=True)
    return done.token_ids


Loaded = tuple[Engine, FaultyStore, Store]
Load = Callable[..., Loaded]


@pytest.fixture
def load(tiny_store: Path, whole_hbm: int, tmp_path: Path) -> Iterator[Load]:
    """A copy of the store behind a FaultyStore; r4 and w16 pass through DRAM."""
    made: list[Engine] = []

    def load(*, fixed: int = 0, ring: int = 1, in_place: bool = False) -> Loaded:
        store = open_store(shutil.copytree(tiny_store, tmp_path / "store"))
        faulty = FaultyStore(TensorStoreChunks(store))
        layer_bytes = sum(map(store.layout.plane_bytes, PASSING))
        with pools_first():
            engine = m2jax.load(
                store.path,
                mix=MIX,
                hbm=whole_hbm - 1,
                dram=(fixed + ring) * layer_bytes,
                distance=max(ring - 1, 0),
                draft="none",
                in_place=in_place,
                chunks=faulty,
            )
        made.append(engine)
        place = engine.plan.placement
        assert (place.fixed, place.ring) == (fixed, ring)
        assert all(place.streamed(layer) == PASSING for layer in range(3))
        return engine, faulty, store

    yield load
    for engine in made:
        engine.close()


def assert_stops(engine: Engine, error: type[Exception], *words: str) -> None:
    """A generation ends with the error, and its stream has no result."""
    stream = engine.stream(IDS, max_new_tokens=NEW_TOKENS, ignore_eos=True)
    with pytest.raises(error) as caught:
        for _ in stream:
            pass
    assert caught.type is error
    assert len(str(caught.value).splitlines()) == 1
    for word in words:
        assert word in str(caught.value)
    assert list(stream) == []
    with pytest.raises(RuntimeError, match="failed"):
        stream.result()


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_before_the_first_read_stops_the_generation(damage, load):
    engine, _, store = load()
    damage(chunk_file(store, LAST_LAYER, "r4"))
    for _ in range(2):
        assert_stops(engine, StoreError, "neurons/02/r4/c/0/0")


def test_chunks_swapped_between_layers_stop_the_generation(load):
    engine, _, store = load()
    swap(chunk_file(store, 1, "r4"), chunk_file(store, LAST_LAYER, "r4"))
    assert_stops(engine, StoreError, "neurons/01/r4/c/0/0", "sha256")


def test_chunks_swapped_between_planes_stop_the_generation(load):
    engine, _, store = load()
    swap(chunk_file(store, 1, "r4"), chunk_file(store, 1, "q4"))
    assert_stops(engine, StoreError, "neurons/01/r4/c/0/0", "sha256")


@pytest.mark.parametrize("damage", [cut, remove])
@pytest.mark.parametrize(("ring", "in_place"), [(1, False), (2, False), (2, True)])
def test_damage_in_the_middle_of_a_generation_stops_it(damage, ring, in_place, load):
    engine, faulty, store = load(ring=ring, in_place=in_place)
    tokens_of(engine)
    faulty.break_next(damages(store, damage), skip=4 * READS + 3)
    assert_stops(engine, StoreError, "neurons/0", "/c/0/0")


@pytest.mark.parametrize("plane", ["q4", "r4"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_to_what_becomes_resident_stops_the_loading(
    damage, plane, tiny_store, tmp_path
):
    store = open_store(shutil.copytree(tiny_store, tmp_path / "store"))
    damage(chunk_file(store, LAST_LAYER, plane))
    with pytest.raises(StoreError, match=f"neurons/02/{plane}/c/0/0"):
        m2jax.load(store.path, mix=MIX)


@pytest.mark.parametrize("bank", ["embed", "layers/01", "head"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_to_the_dense_part_stops_the_loading(damage, bank, tiny_store, tmp_path):
    store = open_store(shutil.copytree(tiny_store, tmp_path / "store"))
    files = [path for path in store.bank_files(bank) if "/c/" in path]
    largest = max(files, key=lambda path: store.files[path].bytes)
    damage(store.path / largest)
    with pytest.raises(StoreError, match=largest):
        m2jax.load(store.path, mix=MIX)


def test_a_load_that_failed_leaves_no_thread(tiny_store, tmp_path):
    store = open_store(shutil.copytree(tiny_store, tmp_path / "store"))
    flip(chunk_file(store, 1, "q4"))
    before = set(threading.enumerate())
    with pytest.raises(StoreError):
        m2jax.load(store.path, mix=MIX)
    left = {thread.name for thread in set(threading.enumerate()) - before}
    assert not any(name.startswith("m2jax") for name in left)


@pytest.mark.parametrize(("ring", "in_place"), [(1, False), (2, True)])
@pytest.mark.parametrize("skip", [0, 1, 7])
def test_an_io_error_that_passes_is_not_seen_in_the_tokens(
    skip, ring, in_place, load, right
):
    engine, faulty, _ = load(ring=ring, in_place=in_place)
    faulty.break_next(raises(BROKEN_DISK), skip=skip)
    assert tokens_of(engine) == right


@pytest.mark.parametrize(
    ("fixed", "ring", "in_place"),
    [(0, 1, False), (0, 2, False), (1, 1, False), (0, 2, True)],
)
def test_after_io_errors_without_end_the_next_request_is_right(
    fixed, ring, in_place, load, right
):
    engine, faulty, _ = load(fixed=fixed, ring=ring, in_place=in_place)
    for skip in (0, 1, 2, 5, 20):
        faulty.break_next(raises(BROKEN_DISK), count=None, skip=skip)
        assert_stops(engine, TierFailed, "layer ", "Input/output error")
        faulty.heal()
        assert tokens_of(engine) == right


def test_a_slow_read_is_waited_for(load, right):
    engine, faulty, _ = load(ring=2)
    faulty.break_next(delays(0.2), count=2, skip=4)
    done = engine.generate(IDS, max_new_tokens=NEW_TOKENS, ignore_eos=True)
    assert done.token_ids == right
    assert done.stats.to_json()["tiers"]["ssd"]["waited_s"] >= 0.2


@pytest.mark.parametrize("ring", [1, 2])
def test_a_read_without_an_answer_fails_requests_until_it_comes(
    ring, load, right, monkeypatch
):
    engine, faulty, _ = load(ring=ring)
    tokens_of(engine)
    hung = threading.Event()
    faulty.break_next(lambda layer, plane: bool(hung.wait(20)), skip=4)
    monkeypatch.setattr(dram, "READ_TIMEOUT_S", 0.1)
    for _ in range(3):
        assert_stops(engine, TierFailed, "no answer from the SSD")
    monkeypatch.setattr(dram, "READ_TIMEOUT_S", 20)
    hung.set()
    assert tokens_of(engine) == right


@pytest.mark.parametrize("error", [RuntimeError, MemoryError, KeyError])
@pytest.mark.parametrize(("fixed", "ring"), [(0, 1), (0, 2), (1, 1)])
def test_after_an_unforeseen_error_in_a_reader_the_next_request_is_right(
    error, fixed, ring, load, right
):
    engine, faulty, _ = load(fixed=fixed, ring=ring)
    faulty.break_next(raises(error("a bug")), count=None, skip=5)
    assert_stops(engine, error, "a bug")
    faulty.heal()
    assert tokens_of(engine) == right


def test_after_a_failure_every_slot_is_filled_anew(load, right):
    engine, faulty, _ = load()
    assert tokens_of(engine) == right
    directories = engine._runner.tiers._directory.values()
    assert all(directory.resident().size for directory in directories)
    faulty.break_next(raises(BROKEN_DISK), count=None, skip=10)
    assert_stops(engine, TierFailed)
    assert not any(directory.resident().size for directory in directories)
    faulty.heal()
    assert tokens_of(engine) == right


def test_a_read_error_while_loading_passes_or_is_named(tiny_store):
    faulty = FaultyStore(TensorStoreChunks(open_store(tiny_store)))
    faulty.break_next(raises(BROKEN_DISK), skip=2)
    m2jax.load(tiny_store, mix=MIX, chunks=faulty).close()
    faulty.break_next(raises(BROKEN_DISK), count=None, skip=2)
    with pytest.raises(TierFailed, match=r"layer 2, plane q4: .*Input/output error"):
        m2jax.load(tiny_store, mix=MIX, chunks=faulty)


@pytest.mark.parametrize("place", [0, 24, 47, slice(None)], ids=str)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("where", ["final norm", "attention of the middle layer"])
def test_a_weight_that_is_no_number_fails_the_request_and_not_the_next(
    where, bad, place, load, right
):
    engine, _, _ = load(fixed=3, ring=0)
    runner = engine._runner
    layers, head = runner.layers, runner.head
    if where == "final norm":
        runner.head = head | {"norm": head["norm"].at[place].set(bits_of(bad))}
    else:
        bank = layers[1].attention
        broken = bank | {"ffn_norm": bank["ffn_norm"].at[place].set(bits_of(bad))}
        runner.layers = [layers[0], layers[1]._replace(attention=broken), layers[2]]
    assert_stops(engine, NumericalError, "NaN or infinity")
    for run in (engine.logits, engine.logprobs):
        with pytest.raises(NumericalError, match="NaN or infinity"):
            run(IDS)
    runner.layers, runner.head = layers, head
    assert tokens_of(engine) == right


def bits_of(number: float) -> np.uint16:
    """bfloat16 bits, as the device holds them."""
    return np.uint16(np.float32(number).view(np.uint32) >> 16)


def test_a_number_that_is_none_stops_the_resident_loop_too(tiny_store, right):
    engine = m2jax.load(tiny_store, mix=MIX)
    runner = engine._runner
    kept, bank = runner.embed, runner.embed["embedding"]
    # The row of a token that the model chooses: prefill is well, the loop is not.
    rows = jnp.where(jnp.arange(len(bank))[:, None] == right[1], bits_of(np.nan), bank)
    assert right[1] not in IDS
    runner.embed = kept | {"embedding": rows}
    assert_stops(engine, NumericalError)
    runner.embed = kept
    assert tokens_of(engine) == right


def test_reads_ahead_that_failed_unawaited_are_no_failure_of_the_next_request(
    load, right
):
    engine, faulty, _ = load(fixed=3, ring=0)
    faulty.break_next(raises(BROKEN_DISK), count=None, skip=2)
    assert_stops(engine, TierFailed, "Input/output error")
    for area in engine._runner.tiers.dram._areas():
        if area.future is not None:
            area.future.exception(20)
    faulty.heal()
    assert tokens_of(engine) == right
