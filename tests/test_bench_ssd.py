"""scripts/bench_ssd.py: what it reads is what it says, and its page is made."""

import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from m2jax.aligned import aligned_buffer
from m2jax.spans import spans
from m2jax.store import TensorStoreChunks, open_store

SCRIPTS = Path(__file__).parents[1] / "scripts"
sys.path.append(str(SCRIPTS))

import bench_ssd  # noqa: E402
import ssd_scattered  # noqa: E402


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("share", [0.05, 0.5, 1.0])
def test_so_many_records_are_wanted_in_such_groups(share, group):
    generator = np.random.default_rng(3)
    found = ssd_scattered.some_records(
        generator, neurons=11008, share=share, group=group
    )
    assert found.size == group * round(share * 11008 / group)
    assert (np.diff(found) > 0).all()
    assert found[-1] < 11008
    whole = found.reshape(-1, group)
    assert (whole == whole[:, :1] + np.arange(group)).all()
    assert not (whole[:, 0] % group).any()


@pytest.mark.parametrize("flags", [os.O_DIRECT, 0])
def test_the_wanted_records_arrive_where_a_whole_plane_has_them(tiny_store, flags):
    store = open_store(tiny_store)
    layout = store.layout
    record = layout.record_bytes("r4")
    right = np.empty((layout.padded_neurons, record), np.uint8)
    TensorStoreChunks(store).read(1, "r4", right)
    out = aligned_buffer((layout.num_chunks, layout.chunk_bytes("r4")))
    out.fill(0)
    ids = np.array([0, 5, 6, layout.neurons - 1])
    wanted = spans(
        ids,
        record_bytes=record,
        chunk_neurons=layout.chunk_neurons,
        block_bytes=4096 if flags else 1,
    )
    with (
        ThreadPoolExecutor(2) as pool,
        ssd_scattered.opened(store, 1, "r4", flags) as fds,
    ):
        ssd_scattered.read_spans(pool, 2, fds, wanted, out)
    assert np.array_equal(out.reshape(-1, record)[ids], right[ids])


def test_the_page_is_made_at_toy_size(tmp_path, monkeypatch):
    page = tmp_path / "ssd.md"
    monkeypatch.setattr(sys, "argv", ["bench_ssd.py", "--toy", "--out", str(page)])
    bench_ssd.main()
    text, raw = page.read_text(), tmp_path / "bench" / "ssd.json"
    found = json.loads(raw.read_text())
    assert [row["plane"] for row in found["whole_layers"]] == ["q4", "r4", "w16"]
    for row in found["whole_layers"]:
        assert all(rate > 0 for rates in row["bytes_per_s"].values() for rate in rates)
    some = found["scattered"]
    for row in some["rows"]:
        useful, asked = row["useful_bytes"][0], row["asked_bytes"][0]
        assert 0 < useful <= asked <= some["plane_bytes"]
    for part in ("## Whole layers", "## Some of the records", "| direct x 32 "):
        assert part in text
    assert "nan" not in text
    again = tmp_path / "again" / "ssd.md"
    again.parent.mkdir()
    command = ["bench_ssd.py", "--from-json", str(raw), "--out", str(again)]
    monkeypatch.setattr(sys, "argv", command)
    bench_ssd.main()
    assert again.read_text() == text
