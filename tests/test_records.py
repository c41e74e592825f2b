"""Single records: what is asked of the disk, and what DRAM keeps of it."""

import os
import shutil
import threading
import time
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import m2jax
from m2jax.aligned import aligned_buffer
from m2jax.cache.policy import LRU
from m2jax.cache.reading import READ_ATTEMPTS, DramCounters
from m2jax.cache.records import RecordTier
from m2jax.errors import StoreError, TierFailed
from m2jax.spans import MOST_READ_BYTES, spans
from m2jax.store import DirectChunks, SlowChunks, TensorStoreChunks, open_store
from m2jax.store.records import RecordReads
from tests.budgets import smallest
from tests.faulty_store import FaultyStore, chunk_file, cut, flip, raises, remove

WAYS = [TensorStoreChunks, DirectChunks]
PROMPT = [1, 17, 5, 80, 33, 2, 64]


@given(
    ids=st.sets(st.integers(0, 199)),
    record_bytes=st.sampled_from([24, 384, 3000, 4096, 6144, 200_000]),
    block_bytes=st.sampled_from([1, 512, 4096]),
)
def test_spans_hold_each_record_once_in_whole_blocks(ids, record_bytes, block_bytes):
    records = np.array(sorted(ids), np.int32)
    found = spans(
        records, record_bytes=record_bytes, chunk_neurons=64, block_bytes=block_bytes
    )
    held = [n for span in found for n in range(span.first, span.last)]
    assert held == list(range(len(records)))
    for span in found:
        assert span.start % block_bytes == span.end % block_bytes == 0
        most = max(MOST_READ_BYTES, record_bytes) + 2 * block_bytes * 200
        assert span.end - span.start <= most
        first, last = records[span.first], records[span.last - 1]
        assert {first // 64, last // 64} == {span.chunk}
        # No block that no record needs, at either end.
        assert 0 <= first % 64 * record_bytes - span.start < block_bytes
        assert 0 <= span.end - (last % 64 + 1) * record_bytes < block_bytes
    for one, other in pairwise(found):
        if one.chunk == other.chunk and one.last - one.first < 64:
            touching = one.end >= other.start
            long = (other.last - one.first) * record_bytes > MOST_READ_BYTES
            assert not touching or long


def places(records, **sizes) -> list[tuple[int, int, int]]:
    return [(s.chunk, s.start, s.end) for s in spans(records, **sizes)]


def test_whole_blocks_are_read_and_those_that_touch_as_one():
    records = np.array([0, 1, 3, 10, 11, 15])
    sizes = {"record_bytes": 6144, "chunk_neurons": 8}
    assert places(records, **sizes, block_bytes=4096) == [
        # 1 ends on the block on which 3 begins, but for one block between.
        (0, 0, 12288),
        (0, 16384, 24576),
        (1, 12288, 24576),
        (1, 40960, 49152),
    ]
    assert places(records, **sizes, block_bytes=1)[1:3] == [
        (0, 18432, 24576),
        (1, 12288, 24576),
    ]
    # No run goes on in the next chunk's file.
    assert places(np.array([7, 8]), **sizes, block_bytes=4096) == [
        (0, 40960, 49152),
        (1, 0, 8192),
    ]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("plane", ["q4", "w16"])
def test_records_are_the_rows_of_the_whole_plane(tiny_store, way, plane):
    store = open_store(tiny_store)
    chunks, layout = way(store), store.layout
    shape = (layout.padded_neurons, layout.record_bytes(plane))
    whole = aligned_buffer(shape)
    chunks.read(1, plane, whole)
    generator = np.random.default_rng(0)
    for count in (0, 1, 20, layout.neurons):
        ids = np.sort(generator.permutation(layout.neurons)[:count]).astype(np.int32)
        slots = generator.permutation(layout.neurons)[:count].astype(np.int32)
        out = np.zeros((layout.neurons, shape[1]), np.uint8)
        read = chunks.read_records(1, plane, ids, out, slots)
        assert np.array_equal(out[slots], whole[ids])
        # The rows of others are as they were.
        assert not np.delete(out, slots, axis=0).any()
        assert read >= count * shape[1]
        assert read % (4096 if way is DirectChunks else shape[1]) == 0
    chunks.close()


@pytest.fixture
def harmed(tiny_store, tmp_path):
    """A store of which a test may break the chunk of layer 1, plane r4."""
    store = open_store(shutil.copytree(tiny_store, tmp_path / "store"))
    return store, chunk_file(store, 1, "r4")


def read_some(chunks, ids=(3, 40, 41)):
    ids = np.array(ids, np.int32)
    out = np.zeros((len(ids), chunks._store.layout.record_bytes("r4")), np.uint8)
    chunks.read_records(1, "r4", ids, out, np.arange(len(ids), dtype=np.int32))


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("damage", [flip, cut, remove], ids=lambda d: d.__name__)
def test_a_damaged_chunk_is_named_before_its_first_record_is_used(harmed, way, damage):
    store, path = harmed
    damage(path)
    with pytest.raises(StoreError, match=r"neurons/01/r4/c/0/0"):
        read_some(way(store))


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_a_chunk_that_became_short_is_named(harmed, way):
    store, path = harmed
    chunks = way(store)
    read_some(chunks)
    os.truncate(path, 4096)
    with pytest.raises(StoreError, match=r"neurons/01/r4/c/0/0"):
        read_some(chunks, ids=(3, 87))


def test_an_error_waits_for_the_reads_beside_it(tmp_path):
    """A late read would write into rows that by then are another record's."""
    paths = [tmp_path / "0", tmp_path / "short"]
    paths[1].touch()
    paths[0].write_bytes(bytes(range(64)) * 64)
    reads = RecordReads(depth=2, flags=0)
    out = np.zeros((65, 64), np.uint8)
    ids = np.arange(65, dtype=np.int32)
    with pytest.raises(OSError, match="ends after 0 bytes"):
        reads.read(paths, ids, out, ids, chunk_neurons=64)
    assert np.array_equal(out[:64], np.tile(np.arange(64, dtype=np.uint8), (64, 1)))
    reads.close()


@pytest.fixture
def held_reads(tmp_path, monkeypatch):
    """Reads of a file of 64 records, all its paths, and what lets them go on."""
    path, go_on = tmp_path / "0", threading.Event()
    path.write_bytes(bytes(range(64)) * 64)
    preadv = os.preadv

    def held(*given):
        assert go_on.wait(20)
        return preadv(*given)

    monkeypatch.setattr("m2jax.store.records.os.preadv", held)
    monkeypatch.setattr("m2jax.store.records.TIMEOUT_S", 0.05)
    reads = RecordReads(depth=2, flags=0)
    yield reads, [path, path], go_on
    go_on.set()
    reads.close()


def read_all(reads: RecordReads, paths, out: np.ndarray) -> None:
    ids = np.arange(len(out), dtype=np.int32)
    reads.read(paths, ids, out, ids, chunk_neurons=64)


def test_reads_that_never_end_are_given_up_and_waited_for_before_others(held_reads):
    reads, paths, go_on = held_reads
    first, second = (np.zeros((64, 64), np.uint8) for _ in range(2))
    with pytest.raises(TimeoutError, match="no answer from the SSD"):
        read_all(reads, paths, first)
    begun = list(reads._late)
    # The disk is still away: nothing more is asked of it.
    with pytest.raises(TimeoutError, match="no answer from the SSD"):
        read_all(reads, paths, second)
    assert reads._late == begun
    go_on.set()
    read_all(reads, paths, second)
    assert all(read.done() for read in begun)
    assert np.array_equal(first, second)
    assert not reads._late


def test_reads_that_an_interrupt_left_are_waited_for_before_others(
    held_reads, monkeypatch
):
    """Also one that comes before all of them are begun."""
    reads, paths, go_on = held_reads
    submit, submitted = reads._pool.submit, []

    def interrupted(*given):
        if submitted:
            raise KeyboardInterrupt
        submitted.append(submit(*given))
        # Begun: it can no longer be cancelled.
        while not submitted[-1].running():
            time.sleep(0.001)
        return submitted[-1]

    out = np.zeros((128, 64), np.uint8)
    with monkeypatch.context() as patch:
        patch.setattr(reads._pool, "submit", interrupted)
        with pytest.raises(KeyboardInterrupt):
            read_all(reads, paths, out)
    with pytest.raises(TimeoutError):
        read_all(reads, paths, out)
    go_on.set()
    read_all(reads, paths, out)
    assert submitted[0].done()


def test_emulated_reads_take_their_time(tiny_store):
    store = open_store(tiny_store)
    now = [0.0]
    slow = SlowChunks(TensorStoreChunks(store), 10**6)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("m2jax.store.slow.time.perf_counter", lambda: now[0])
        patch.setattr(
            "m2jax.store.slow.time.sleep", lambda s: now.__setitem__(0, now[0] + s)
        )
        ids = np.arange(50, dtype=np.int32)
        out = np.empty((50, store.layout.record_bytes("r4")), np.uint8)
        read = slow.read_records(0, "r4", ids, out, ids)
    assert now[0] == pytest.approx(read / 10**6)


def record_tier(read, *, slots: int = 6) -> RecordTier:
    return RecordTier(
        read,
        {(0, "q4"): slots},
        {"q4": 8},
        neurons=40,
        policy=LRU,
        counters=DramCounters(),
        allocate=aligned_buffer,
    )


def test_only_what_has_no_slot_is_read():
    asked: list[int] = []

    def read(layer, plane, ids, out, slots):
        assert (layer, plane) == (0, "q4")
        assert np.all(np.diff(ids) > 0)
        out[slots] = ids[:, None] + np.arange(8)
        asked.extend(ids.tolist())
        return 100 * len(ids)

    tier = record_tier(read)
    generator = np.random.default_rng(0)
    accesses = loads = 0
    for _ in range(100):
        ids = generator.permutation(12)[: generator.integers(1, 7)].astype(np.int32)
        here = set(tier._directory[0, "q4"].resident().tolist())
        asked.clear()
        rows, places = tier.rows(0, "q4", ids)
        assert np.array_equal(rows[places], ids[:, None] + np.arange(8))
        assert set(asked) == set(ids.tolist()) - here
        assert len(asked) == len(set(asked))
        accesses, loads = accesses + len(ids), loads + len(asked)
    counters = tier._counters
    assert (counters.accesses, counters.hits) == (accesses, accesses - loads)
    assert counters.read_bytes == 100 * loads
    assert 0 < loads < accesses


def test_after_a_failed_read_nothing_counts_as_here(short_waits):
    fails = [True]
    asked: list[list[int]] = []

    def read(layer, plane, ids, out, slots):
        asked.append(ids.tolist())
        if fails[0]:
            # Some rows came, and nobody knows which.
            out[slots[:1]] = 255
            raise TierFailed("planted")
        out[slots] = ids[:, None]
        return len(ids)

    tier = record_tier(read)
    fails[0] = False
    tier.rows(0, "q4", np.array([1, 2, 3, 4], np.int32))
    fails[0] = True
    with pytest.raises(TierFailed, match="layer 0, plane q4"):
        tier.rows(0, "q4", np.array([5, 6, 7, 1], np.int32))
    assert asked[1:] == [[5, 6, 7]] * READ_ATTEMPTS
    assert tier._counters.retries == READ_ATTEMPTS - 1
    fails[0] = False
    for ids in ([5, 6, 7, 1], [2, 3, 4]):
        rows, places = tier.rows(0, "q4", np.array(ids, np.int32))
        assert rows[places, 0].tolist() == ids
    assert asked[-2:] == [[1, 5, 6, 7], [2, 3, 4]]


@pytest.mark.parametrize("at", ["touch", "add"])
def test_after_an_interrupt_before_a_read_nothing_counts_as_here(at, monkeypatch):
    """One that comes once slots are given, and before their records are read."""

    def read(layer, plane, ids, out, slots):
        out[slots] = ids[:, None]
        return len(ids)

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    tier = record_tier(read)
    tier.rows(0, "q4", np.array([1, 2, 3, 4], np.int32))
    late = {"touch": tier._directory[0, "q4"].policy, "add": tier._counters}[at]
    with monkeypatch.context() as patch:
        patch.setattr(late, at, interrupted)
        with pytest.raises(KeyboardInterrupt):
            tier.rows(0, "q4", np.array([5, 6, 7, 1], np.int32))
    for ids in ([5, 6, 7, 1], [2, 3, 4]):
        rows, places = tier.rows(0, "q4", np.array(ids, np.int32))
        assert rows[places, 0].tolist() == ids


@pytest.fixture
def by_record(tiny_store):
    """An engine that reads single records, its reads, and what it must say."""
    store = open_store(tiny_store)
    faulty = FaultyStore(TensorStoreChunks(store))
    engine = m2jax.load(
        tiny_store,
        mix="25/25/50",
        reads="records",
        chunks=faulty,
        **budgets(tiny_store),
    )
    with m2jax.load(tiny_store, mix="25/25/50") as resident:
        wanted = resident.generate(PROMPT, max_new_tokens=8, ignore_eos=True)
    yield engine, faulty, wanted
    engine.close()


def budgets(store) -> dict[str, int]:
    def load(**options):
        return m2jax.load(store, mix="25/25/50", reads="records", **options)

    hbm = smallest(lambda: load(hbm=1))
    return {"hbm": hbm, "dram": smallest(lambda: load(hbm=hbm, dram=1)) + 10_000}


def test_tokens_read_records_and_prompts_whole_layers(by_record):
    engine, _, wanted = by_record
    done = engine.generate(PROMPT, max_new_tokens=8, ignore_eos=True)
    assert (done.token_ids, done.logprobs) == (wanted.token_ids, wanted.logprobs)
    decode, place = done.stats.decode, engine.plan.placement
    assert decode.dram_accesses == 7 * sum(
        engine.specs[layer].wanted[plane]
        for plane, counts in place.dram_slots.items()
        for layer, n in enumerate(counts)
        if n
    )
    assert 0 < decode.dram_hits < decode.dram_accesses
    # Buffered reads ask for the records and nothing else.
    sizes = {p: engine.runner.tiers.record_bytes[p] for p in place.dram_slots}
    misses = decode.dram_accesses - decode.dram_hits
    assert min(sizes.values()) * misses <= decode.ssd_read_bytes
    assert decode.ssd_read_bytes <= max(sizes.values()) * misses
    assert engine.draft == "none"


def test_after_a_prompt_no_layer_is_read_for_another(by_record):
    engine, faulty, _ = by_record
    before = len(faulty.reads)
    engine.logits(PROMPT)
    engine.runner.tiers.dram._pool.submit(int).result()
    passing = [
        (layer, plane)
        for layer in engine.plan.placement.dram_layers
        for plane in engine.plan.placement.streamed(layer)
    ]
    assert sorted(faulty.reads[before:]) == sorted(passing)


def test_a_text_goes_on_after_a_failed_read_of_records(by_record, short_waits):
    engine, faulty, wanted = by_record
    engine.generate(PROMPT, max_new_tokens=4, ignore_eos=True)
    prompt_reads = len(faulty.reads)
    engine.generate(PROMPT, max_new_tokens=1, ignore_eos=True)
    skip = len(faulty.reads) - prompt_reads + 2
    faulty.break_next(raises(TierFailed("planted")), count=None, skip=skip)
    with pytest.raises(TierFailed, match="planted"):
        engine.generate(PROMPT, max_new_tokens=8, ignore_eos=True)
    faulty.heal()
    done = engine.generate(PROMPT, max_new_tokens=8, ignore_eos=True)
    assert (done.token_ids, done.logprobs) == (wanted.token_ids, wanted.logprobs)


@pytest.mark.parametrize("draft", ["base", "ngram", "some/store"])
def test_records_and_drafts_are_refused_together(tiny_store, draft):
    with pytest.raises(ValueError, match=rf"--reads records: .*--draft {draft}"):
        m2jax.load(tiny_store, reads="records", draft=draft)


@pytest.mark.parametrize("reads", ["chunks", "", None, 3])
def test_other_ways_to_read_are_refused(tiny_store, reads):
    with pytest.raises(ValueError, match=r"--reads .*: want layers or records"):
        m2jax.load(tiny_store, reads=reads)


def test_where_dram_holds_all_no_records_are_read(tiny_store):
    hbm = smallest(lambda: m2jax.load(tiny_store, reads="records", hbm=1))
    with m2jax.load(tiny_store, reads="records", hbm=hbm) as engine:
        assert not engine.plan.placement.dram_slots
        assert engine.plan.ssd_bytes_per_token == 0


def test_planes_that_tokens_want_whole_are_resident_at_the_smallest_hbm(tiny_store):
    """Of some layers, beside planes that only whole passes use."""
    load = partial(
        m2jax.load,
        tiny_store,
        mix="0/100/0,50/0/0,0/25/75",
        planes=("w16",),
        in_place=False,
    )
    hbm = smallest(lambda: load(reads="records", hbm=1))
    dram = smallest(lambda: load(reads="records", hbm=hbm, dram=1))
    done = []
    for opened in (partial(load, reads="records", hbm=hbm, dram=dram), load):
        with opened() as engine:
            done.append(engine.generate(PROMPT, max_new_tokens=4, ignore_eos=True))
    assert done[0].token_ids == done[1].token_ids
    assert done[0].logprobs == done[1].logprobs


def test_where_tokens_want_nothing_of_what_passes_layers_are_pinned(tiny_store):
    load = partial(
        m2jax.load,
        tiny_store,
        mix="0/0/100",
        planes=("w16",),
        distance=0,
        in_place=False,
    )
    hbm = smallest(lambda: load(reads="records", hbm=1))
    least = smallest(lambda: load(reads="records", hbm=hbm, dram=1))
    plans = []
    for reads in ("layers", "records"):
        with load(reads=reads, hbm=hbm, dram=2 * least) as engine:
            plans.append(engine.plan)
    assert plans[0].placement.fixed == 1
    assert plans[0] == plans[1]
