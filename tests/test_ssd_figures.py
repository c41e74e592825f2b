"""What a run's figures say of reads that went wrong."""

from pathlib import Path

import pytest

import m2jax
from m2jax.cli.figures import figures
from m2jax.store import TensorStoreChunks, open_store
from tests.budgets import pools_first
from tests.faulty_store import FaultyStore, raises

pytestmark = pytest.mark.usefixtures("short_waits")

MIX = "25/25/50"
IDS = [3, 17, 5, 80, 33, 2, 64]


@pytest.fixture
def faulty(tiny_store: Path) -> FaultyStore:
    return FaultyStore(TensorStoreChunks(open_store(tiny_store)))


def fail_twice(faulty: FaultyStore) -> None:
    faulty.break_next(raises(OSError(5, "Input/output error")), count=2, skip=1)


def test_reads_that_were_tried_again_are_in_the_figures(tiny_store, faulty):
    with m2jax.load(tiny_store, mix=MIX) as engine:
        hbm = engine.plan.footprint.hbm - 1
    options = {"hbm": hbm, "dram": 120 << 10, "draft": "none", "chunks": faulty}
    with pools_first(), m2jax.load(tiny_store, mix=MIX, **options) as engine:
        fail_twice(faulty)
        done = engine.generate(IDS, max_new_tokens=8, ignore_eos=True)
        again = engine.generate(IDS, max_new_tokens=8, ignore_eos=True)
    ssd = done.stats.to_json()["tiers"]["ssd"]
    assert (ssd["how"], ssd["retries"], ssd["startup_retries"]) == ("given", 2, 0)
    assert "; 2 reads tried again; waited " in figures(done)
    assert again.stats.request.ssd_retries == 0
    assert "tried again" not in figures(again)


def test_reads_that_were_tried_again_while_loading_are_apart(tiny_store, faulty):
    fail_twice(faulty)
    with m2jax.load(tiny_store, mix=MIX, chunks=faulty) as engine:
        done = engine.generate(IDS, max_new_tokens=2)
    ssd = done.stats.to_json()["tiers"]["ssd"]
    assert (ssd["retries"], ssd["startup_retries"]) == (0, 2)
