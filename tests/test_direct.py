"""Reads past the page cache: the same bytes, and only where that works and pays."""

import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

import m2jax
from m2jax.aligned import aligned_buffer
from m2jax.errors import TierFailed
from m2jax.store import (
    DirectChunks,
    TensorStoreChunks,
    choose_chunks,
    direct,
    open_store,
    raw_rate,
)
from m2jax.store.paths import array_path, chunk_path


@pytest.fixture
def store(tiny_store: Path):
    return open_store(tiny_store)


def buffer_for(store, plane: str) -> np.ndarray:
    layout = store.layout
    return aligned_buffer((layout.padded_neurons, layout.record_bytes(plane)))


@pytest.mark.parametrize("plane", ["q4", "r4", "w16"])
def test_the_bytes_are_those_of_tensorstore(store, plane):
    one, other = buffer_for(store, plane), buffer_for(store, plane)
    for layer in range(store.config.num_layers):
        TensorStoreChunks(store).read(layer, plane, one)
        other.fill(0)
        DirectChunks(store).read(layer, plane, other)
        assert np.array_equal(one, other)


def test_the_page_cache_stays_as_empty_as_it_was(store):
    path = store.path / chunk_path(array_path(1, "w16", store.config), 0)
    size = path.stat().st_size
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
        direct.drop_cached(fd)
        if direct.cached_pages(fd, size):
            pytest.skip("this filesystem keeps what it holds")
        DirectChunks(store, verify=False).read(1, "w16", buffer_for(store, "w16"))
        assert direct.cached_pages(fd, size) == 0
        TensorStoreChunks(store, verify=False).read(1, "w16", buffer_for(store, "w16"))
        assert direct.cached_pages(fd, size) > 0
    finally:
        os.close(fd)


def test_the_rate_of_the_stores_own_files_or_which_one_failed(store, tmp_path):
    start = time.perf_counter()
    rate = raw_rate(store, plane="w16", least_s=0.05)
    spent_s = time.perf_counter() - start
    assert spent_s > 0.05
    assert rate > store.layout.chunk_bytes("w16") / spent_s
    broken = open_store(shutil.copytree(store.path, tmp_path / "store"))
    path = broken.path / chunk_path(array_path(1, "w16", broken.config), 0)
    path.unlink()
    with pytest.raises(TierFailed, match=f"{path.relative_to(tmp_path)}: No such"):
        raw_rate(broken, plane="w16", least_s=0.05)


def test_the_rate_is_that_of_the_plane_that_is_asked_for(store, monkeypatch):
    read = []
    monkeypatch.setattr(direct, "read_direct", lambda path, out: read.append(path))
    for plane in store.planes:
        read.clear()
        raw_rate(store, plane=plane, least_s=0.001)
        assert {path.parts[-4] for path in read} == {plane}
    with pytest.raises(ValueError, match="plane 'q2': want one of the store's, q4"):
        raw_rate(store, plane="q2")


def test_memory_that_begins_elsewhere_is_filled_too(store):
    layout = store.layout
    shape = (layout.padded_neurons, layout.record_bytes("q4"))
    raw = np.zeros(shape[0] * shape[1] + 4097, np.uint8)
    start = 1 - raw.ctypes.data % 4096 + 4096
    odd = raw[start : start + shape[0] * shape[1]].reshape(shape)
    assert odd.ctypes.data % 4096 == 1
    right = buffer_for(store, "q4")
    DirectChunks(store).read(0, "q4", odd)
    TensorStoreChunks(store).read(0, "q4", right)
    assert np.array_equal(odd, right)


@pytest.mark.parametrize(
    ("seconds", "cached", "why"),
    [
        ({os.O_DIRECT: 1.0, 0: 2.0}, False, None),
        ({os.O_DIRECT: 1.2, 0: 1.0}, False, None),
        ({os.O_DIRECT: 2.0, 0: 1.0}, False, "a direct read takes 2.0 times as long"),
        # Accepted, and the page cache is used all the same.
        (
            {os.O_DIRECT: 1.0, 0: 2.0},
            True,
            "direct reads fill the page cache all the same",
        ),
        # Refused, as by tmpfs before Linux 6.6.
        ({0: 2.0}, False, "a direct read failed: Invalid argument"),
    ],
)
def test_the_faster_way_is_taken_and_the_slower_explained(
    store, monkeypatch, seconds, cached, why
):
    def timed(path, buffer, flags):
        if flags not in seconds:
            raise OSError(22, "Invalid argument")
        return seconds[flags]

    monkeypatch.setattr(direct, "_seconds", timed)
    monkeypatch.setattr(direct, "_was_cached", lambda path, size: cached)
    chosen = choose_chunks(store)
    assert type(chosen) is (TensorStoreChunks if why else DirectChunks)
    assert chosen.how == ("buffered" if why else "direct")
    assert chosen.why == why


@pytest.mark.parametrize("kind", [DirectChunks, TensorStoreChunks])
def test_the_text_is_the_same_and_the_engine_says_how_it_reads(
    tiny_store, monkeypatch, kind
):
    monkeypatch.setattr("m2jax.loading.choose_chunks", kind)
    ids = [3, 17, 5, 80, 33]
    with m2jax.load(tiny_store, mix="25/25/50") as whole:
        right = whole.generate(ids, max_new_tokens=12, ignore_eos=True).token_ids
        hbm = whole.plan.footprint.hbm
    with m2jax.load(
        tiny_store, mix="25/25/50", hbm=hbm - 1, dram=2**16, draft="none"
    ) as engine:
        assert engine.ssd_reads == kind.how
        given = engine.generate(ids, max_new_tokens=12, ignore_eos=True)
    assert given.token_ids == right
    assert given.stats.request.ssd_read_bytes > 0
    assert given.stats.to_json()["tiers"]["ssd"]["how"] == kind.how
