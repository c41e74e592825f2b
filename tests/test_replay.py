"""A replay under a plan moves over the link what the engine moves, to the byte."""

from functools import partial
from pathlib import Path

import pytest

from m2jax.cache.trace import Trace
from m2jax.demand import make_demand
from m2jax.engine import Engine
from m2jax.recording import record_generated
from m2jax.replay import Replayed, replay
from m2jax.store import DirectChunks
from m2jax.stream import Generation
from tests.budgets import Model, smallest

PROMPT = [1, 17, 5]
NEW_TOKENS = 16


def run_and_replay(
    engine: Engine, trace: Trace, model: Model
) -> tuple[Generation, Replayed]:
    """What an engine moves, and what a replay under its plan does."""
    run = engine.generate(PROMPT, max_new_tokens=NEW_TOKENS, ignore_eos=True)
    plan, demand = engine.plan.placement, make_demand(engine.specs)
    return run, replay(trace, plan, demand, model.store.layout, policy=engine.policy)


@pytest.mark.parametrize(
    ("mix", "scorer"),
    [
        # Plane q4 by need, too: pools in some layers, no slots in others.
        ("20/20/20", "none"),
        # Neurons left out; a whole q4.
        ("20/20/20", "base"),
        # Layers that differ, and one that wants nothing of a plane.
        ("0/25/75,25/25/50,10/0/60", "base"),
    ],
)
@pytest.mark.parametrize(
    ("policy", "in_place"), [("lru", False), ("lfu", False), ("lru", True)]
)
def test_bytes_of_a_replay_are_those_of_the_run(
    mix: str, scorer: str, policy: str, in_place: bool, tiny_store: Path
):
    model = Model(tiny_store, mix, scorer, in_place=in_place)
    trace = record_generated(model.resident, [PROMPT], new_tokens=NEW_TOKENS)
    room = model.whole_hbm - model.smallest_hbm
    moved = []
    for share in (0.0, 0.3, 0.6, 0.999):
        engine = model.load(hbm=model.smallest_hbm + int(share * room), policy=policy)
        run, found = run_and_replay(engine, trace, model)
        assert found.tokens == NEW_TOKENS - 1
        assert found.link_bytes == run.stats.decode.hbm_load_bytes
        moved.append(found.link_bytes)
    assert not any(moved) if in_place else (moved[0] > moved[-1] > 0)


@pytest.mark.parametrize(
    ("mix", "scorer"),
    [("25/25/50", "base"), ("20/20/20", "base"), ("0/25/75,25/0/75,0/25/75", "base")],
)
@pytest.mark.parametrize("policy", ["lru", "lfu"])
def test_records_that_a_replay_reads_are_those_of_the_run(
    mix: str, scorer: str, policy: str, tiny_store: Path
):
    """Behind no pools, pools, and what is between."""
    model = Model(tiny_store, mix, scorer)
    trace = record_generated(model.resident, [PROMPT], new_tokens=NEW_TOKENS)
    load = partial(model.load, reads="records", policy=policy)
    least = smallest(lambda: load(hbm=1))
    read = set()
    for share in (0.0, 0.3, 0.6):
        hbm = least + int(share * (model.whole_hbm - least))
        dram = smallest(lambda hbm=hbm: load(hbm=hbm, dram=1))
        chunks = DirectChunks(model.store)
        engine = load(hbm=hbm, dram=dram + 2000, chunks=chunks)
        assert engine.plan.placement.dram_slots
        run, found = run_and_replay(engine, trace, model)
        assert found.link_bytes == run.stats.decode.hbm_load_bytes
        assert found.ssd_bytes == run.stats.decode.ssd_read_bytes > 0
        read.add(found.ssd_bytes)
        engine.close()
    assert len(read) > 1
