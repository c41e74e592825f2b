"""The engine's invariants: nothing a person sees depends on where the weights lay."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from m2jax.cache.dram import DramTier
from m2jax.cache.simulate import simulate
from m2jax.cache.trace import Trace
from m2jax.engine import Engine
from m2jax.errors import DoesNotFit
from m2jax.store import TensorStoreChunks
from tests.budgets import (
    NEW_TOKENS,
    PLACES,
    Model,
    assert_same,
    few_examples,
    generate,
    look,
    pools_first,
    smallest,
)
from tests.faulty_store import FaultyStore

MIXES = [
    ("100/0/0", "base"),
    ("0/100/0", "base"),
    ("0/0/100", "base"),
    ("25/25/50", "base"),
    ("20/20/20", "base"),
    ("0/25/75", "base"),
    ("25/25/50", "gate"),
    ("25/25/50", "none"),
    ("20/20/20", "none"),
    ("0/25/75", "none"),
]
# Layers that differ; of the last, the middle one has other planes than its neighbours.
UNEVEN = [
    ("0/25/75,25/25/50,10/0/60", "base"),
    ("0/0/100,20/20/20,20/0/0", "none"),
    ("0/25/75,25/0/75,0/25/75", "base"),
]
PAPER = ("25/25/50", "base")
# Where two layers for prompts and slots take less than all three layers; one, copied.
EVEN = [PAPER, ("0/25/75", "base"), ("20/20/20", "none"), ("0/25/75", "none")]
BY_RECORD = [(mixed, in_place) for mixed in EVEN for in_place in (True, False)]
BY_RECORD += [(UNEVEN[0], False), (UNEVEN[2], False)]
# The device's loop takes seconds to compile; without a scorer it has no other pieces.
IN_ONE_PROGRAM = [*MIXES[:8], *UNEVEN, ("0/0/100,0/0/0,20/20/20", "base")]


@pytest.fixture(scope="module")
def model_of(tiny_store: Path) -> Callable[[tuple[str, str]], Model]:
    return cache(lambda mixed: Model(tiny_store, *mixed))


@pytest.fixture(scope="module")
def paper(model_of) -> Model:
    return model_of(PAPER)


@pytest.mark.parametrize("mixed", IN_ONE_PROGRAM, ids=str)
def test_decoding_in_one_program_says_what_the_host_loop_says(mixed, model_of):
    model = model_of(mixed)
    given = look(model.resident)
    assert len(set(given.token_ids)) > 2
    assert_same(given, model.seen("greedy"))


@pytest.mark.parametrize("mixed", UNEVEN, ids=str)
def test_layers_that_differ_say_the_same_from_every_tier(mixed, model_of):
    model = model_of(mixed)
    step = (model.whole_hbm - model.smallest_hbm) // 3
    for hbm in (model.smallest_hbm + step, model.whole_hbm - 1):
        dram = smallest(lambda hbm=hbm: model.load(hbm=hbm, dram=1))
        assert_same(look(model.load(hbm=hbm, dram=dram)), model.seen("greedy"))


def test_sampling_in_one_program_says_what_the_host_loop_says(paper):
    assert_same(look(paper.resident, "sampled"), paper.seen("sampled"))


@pytest.mark.parametrize("mixed", MIXES + UNEVEN, ids=str)
def test_the_smallest_hbm_budget_says_what_everything_resident_says(mixed, model_of):
    model = model_of(mixed)
    engine = model.load(hbm=model.smallest_hbm)
    assert_same(look(engine), model.seen("greedy"))
    with pytest.raises(DoesNotFit):
        model.load(hbm=model.smallest_hbm - 1)


@pytest.mark.parametrize("mixed", MIXES, ids=str)
def test_slots_over_the_smallest_dram_say_what_everything_resident_says(
    mixed, model_of
):
    model = model_of(mixed)
    engine = model.with_pools(dram=model.smallest_pooled_dram, distance=0)
    assert_same(look(engine), model.seen("greedy"))
    with pytest.raises(DoesNotFit):
        model.with_pools(dram=model.smallest_pooled_dram - 1)


@pytest.mark.parametrize("mixed", MIXES + UNEVEN, ids=str)
def test_rows_used_in_place_say_what_everything_resident_says(mixed, model_of):
    model = model_of(mixed)
    hbm = smallest(lambda: model.load(hbm=1, in_place=True))
    dram = smallest(lambda: model.load(hbm=hbm, dram=1, in_place=True))
    engine = model.load(hbm=hbm, dram=dram, distance=0, in_place=True)
    assert_same(look(engine), model.seen("greedy"))
    assert engine.runner.counters().hbm_load_bytes == 0
    with pytest.raises(DoesNotFit):
        model.load(hbm=hbm - 1, in_place=True)
    with pytest.raises(DoesNotFit):
        model.load(hbm=hbm, dram=dram - 1, in_place=True)


@pytest.mark.parametrize(("mixed", "in_place"), BY_RECORD, ids=str)
def test_single_records_say_what_everything_resident_says(mixed, in_place, model_of):
    load = partial(model_of(mixed).load, reads="records", in_place=in_place)
    hbm = smallest(lambda: load(hbm=1))
    least = smallest(lambda: load(hbm=hbm, dram=1))
    # Held whole, nothing is read.
    most = load(hbm=hbm).plan.footprint.dram
    for dram in (least, (least + most) // 2):
        engine = load(hbm=hbm, dram=dram)
        assert engine.plan.placement.dram_slots
        assert_same(look(engine), model_of(mixed).seen("greedy"))
        assert engine.runner.counters().ssd_read_bytes > 0
        engine.close()
    with pytest.raises(DoesNotFit):
        load(hbm=hbm - 1, dram=least)
    with pytest.raises(DoesNotFit):
        load(hbm=hbm, dram=least - 1)


@few_examples(max_examples=16)
@given(kind=st.sampled_from(["greedy", "sampled"]), **PLACES)
def test_the_cache_is_invisible(
    paper, pools, in_place, hbm, dram, policy, distance, kind
):
    room = paper.whole_hbm - 1 - paper.smallest_hbm
    with pools_first() if pools else nullcontext():
        engine = paper.load(
            hbm=paper.smallest_hbm + int(hbm * room),
            dram=paper.smallest_dram * 5 + int(dram * 1e6),
            policy=policy,
            distance=distance,
            in_place=in_place,
        )
    assert_same(look(engine, kind), paper.seen(kind))
    # Again, from the state that the first run left.
    assert_same(look(engine, kind), paper.seen(kind))


def test_the_bundled_model_says_the_same_from_every_tier(bundled_store):
    model = Model(bundled_store, "0/25/75", "base")
    wanted = look(model.resident)
    half = (model.smallest_hbm + model.whole_hbm) // 2
    for in_place in (False, True):
        assert_same(look(model.load(hbm=half, in_place=in_place)), wanted)
    dram = model.smallest_dram * 3
    engine = model.load(hbm=model.smallest_hbm, dram=dram, policy="lfu")
    assert_same(look(engine), wanted)


def test_prompts_as_long_as_the_context_keep_within_the_smallest_budget(model_of):
    # Padded to blocks, 70 tokens take more positions than the context has.
    base = model_of(("0/0/100", "base"))
    named = smallest(lambda: base.load(hbm=1, context=70))
    engine = base.load(hbm=named, context=70)
    generate(engine, prompt=list(range(68)), max_new_tokens=2)
    engine.logits(list(range(70)))
    assert engine._runner.held().hbm_bytes <= named


@pytest.mark.parametrize("name", ["add_feed_forward", "layer_block"])
def test_a_buffer_is_given_back_when_all_was_computed_from_it(
    model_of, monkeypatch, name
):
    base = model_of(("0/0/100", "base"))
    hbm = smallest(lambda: base.load(hbm=1, in_place=True))
    engine = base.load(hbm=hbm, in_place=True)
    steps = engine._runner.steps
    step = getattr(steps, name)
    heavy = jnp.ones((1200, 1200))

    @partial(jax.jit, static_argnames="spec")
    def slowly(*arrays, spec):
        (x, *others), tree = jax.tree.flatten(step(*arrays, spec=spec))
        for _ in range(3):
            x = x + (heavy @ (heavy * x[0, 0]))[0, 0] * 0
        return jax.tree.unflatten(tree, [x, *others])

    made, ready, early = [], [], []

    def dispatch(*arrays, spec):
        early.append(bool(made) and not made[-1].is_ready())
        found = slowly(*arrays, spec=spec)
        made.append(jax.tree.leaves(found)[0])
        return found

    def released(tier, layer):
        if layer < len(made):
            last = (len(made) - 1 - layer) // layers * layers + layer
            ready.append(made[last].is_ready())
        release(tier, layer)

    layers, release = engine.config.num_layers, DramTier.release
    generate(engine, max_new_tokens=3)
    monkeypatch.setitem(steps.__dict__, name, dispatch)
    monkeypatch.setattr(DramTier, "release", released)
    generate(engine, max_new_tokens=4)
    assert len(ready) >= 3 * layers
    assert all(ready)
    # And the next layer did not wait for that.
    assert any(early)


def recorded(engine: Engine, *kinds: str) -> Trace:
    trace = Trace()
    engine.record(trace)
    for kind in kinds:
        generate(engine, kind)
    engine.record(None)
    return trace


def test_a_trace_does_not_depend_on_budgets_or_policy(paper):
    engines = [
        paper.resident,
        paper.load(hbm=paper.smallest_hbm),
        paper.with_pools(policy="lru"),
        paper.with_pools(policy="lfu"),
    ]
    first, *others = [recorded(engine, "greedy").entries() for engine in engines]
    assert {entry.plane for entry in first} == {"r4", "w16"}
    assert len(first) == (NEW_TOKENS - 1) * 3 * 2
    for other in others:
        for one, two in zip(first, other, strict=True):
            assert one[:3] == two[:3]
            assert np.array_equal(one.wanted, two.wanted)


@pytest.mark.parametrize("policy", ["lru", "lfu"])
def test_a_replay_of_a_trace_loads_what_the_run_loaded(policy, paper):
    engine = paper.with_pools(policy=policy)
    trace = recorded(engine, "greedy", "sampled", "greedy")
    slots = engine.plan.placement.slots
    directory = engine._runner.tiers._directory
    result = simulate(
        trace,
        neurons=engine.specs[0].neurons,
        slots={(layer, plane): slots[plane][layer] for layer, plane in directory},
        policy=policy,
    )
    assert result.pools.keys() == directory.keys()
    for pool, replayed in result.pools.items():
        assert replayed.loads == directory[pool].loads
        assert replayed.hits == directory[pool].hits
        assert replayed.accesses == directory[pool].accesses
    assert 0 < result.loads < result.accesses


@pytest.mark.parametrize("policy", ["lru", "lfu"])
def test_every_slot_holds_the_bytes_of_the_neuron_that_its_directory_names(
    policy, paper
):
    engine = paper.with_pools(policy=policy, dram=paper.smallest_pooled_dram)
    generate(engine, "sampled", max_new_tokens=20)
    layout, chunks = paper.store.layout, TensorStoreChunks(paper.store)
    tiers = engine._runner.tiers
    evicted = 0
    for (layer, plane), directory in tiers._directory.items():
        size = layout.padded_neurons, layout.record_bytes(plane)
        stored = np.empty(size, np.uint8)
        chunks.read(layer, plane, stored)
        pool = np.asarray(tiers._pools[layer, plane]).view(np.uint8)
        ids = directory.resident()
        slots = directory._slot_of[ids]
        assert len(set(slots.tolist())) == len(ids)
        assert np.array_equal(pool[slots], stored[ids])
        evicted += directory.loads - len(ids)
    assert evicted > 0


def test_counters_of_the_tiers_are_what_the_store_saw(paper):
    store = FaultyStore(TensorStoreChunks(paper.store))
    engine = paper.with_pools(
        dram=2 * paper.smallest_pooled_dram, distance=1, chunks=store
    )
    place = engine.plan.placement
    assert (place.fixed, place.ring) == (0, 2)
    at_start = store.read_bytes
    assert generate(engine).stats.held.startup_read_bytes == at_start
    done = generate(engine)
    # A read ahead may still be on its way.
    engine.close()
    read = engine._runner.counters().ssd_read_bytes
    assert read == store.read_bytes - at_start
    assert done.stats.request.dram_accesses == NEW_TOKENS * 3
    assert done.stats.request.dram_hits == 0
    per_step = engine.plan.ssd_bytes_per_token
    assert abs(done.stats.decode.ssd_read_bytes - (NEW_TOKENS - 1) * per_step) <= (
        2 * per_step
    )


def test_every_access_to_pinned_layers_but_the_first_is_a_dram_hit(paper):
    engine = paper.with_pools()
    assert engine.plan.placement.fixed == 3
    first, second = generate(engine).stats, generate(engine).stats
    assert first.request.dram_hits == (NEW_TOKENS - 1) * 3
    assert second.to_json()["tiers"]["dram"]["hit_ratio"] == 1
    assert second.request.ssd_read_bytes == 0
