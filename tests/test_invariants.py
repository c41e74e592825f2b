"""The engine's invariants: nothing a person sees depends on where the weights lay."""

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import m2jax
from m2jax.cache.simulate import simulate
from m2jax.cache.trace import Trace
from m2jax.engine import Engine
from m2jax.errors import DoesNotFit
from m2jax.store import TensorStoreChunks, open_store
from m2jax.stream import Generation
from tests.faulty_store import FaultyStore

MIXES = [
    ("100/0/0", "base"),
    ("0/100/0", "base"),
    ("0/0/100", "base"),
    ("25/25/50", "base"),
    ("20/20/20", "base"),
    ("0/25/75", "base"),
    ("25/25/50", "none"),
    ("20/20/20", "none"),
]
PAPER = ("25/25/50", "base")
PROMPT = [1, 17, 5, 80, 33, 2, 64]
NEW_TOKENS = 12
GREEDY: dict[str, Any] = {}
SAMPLED: dict[str, Any] = {
    "temperature": 1.5,
    "top_k": 30,
    "top_p": 0.95,
    "min_p": 0.001,
    "repetition_penalty": 1.2,
    "seed": 2**63 + 5,
}


class Seen(NamedTuple):
    """All that a run shows of the model."""

    token_ids: list[int]
    logprobs: list[float]
    logits: np.ndarray


class Model:
    """A store under a mix: engines of any budget, and what the resident one says."""

    def __init__(self, store: Path, mix: str, scorer: str):
        self.store = open_store(store)
        self._load = lambda **options: m2jax.load(
            store, mix=mix, scorer=scorer, **options
        )
        self.resident = self._load()
        assert self.resident.plan.placement.resident
        self.whole_hbm = self.resident.plan.footprint.hbm
        self.smallest_hbm = smallest(lambda: self._load(hbm=1))
        self.smallest_dram = smallest(
            lambda: self._load(hbm=self.whole_hbm - 1, dram=1)
        )
        self.seen = cache(lambda kind: look(self.resident, kind))

    def load(self, **options) -> Engine:
        engine = self._load(**options)
        assert not engine.plan.placement.resident
        return engine

    def with_pools(self, **options) -> Engine:
        """Fewer slots than neurons for every sparse plane of every layer."""
        engine = self.load(hbm=self.whole_hbm - 1, **options)
        place = engine.plan.placement
        for plane in engine.plan.placement.slots:
            if not engine.spec.dense(plane):
                assert all(0 < slots < place.whole for slots in place.slots[plane])
        return engine


def smallest(load: Callable[[], Engine]) -> int:
    """The bytes that a refusal names."""
    with pytest.raises(DoesNotFit) as caught:
        load()
    found = re.search(r"\((\d+) bytes", str(caught.value))
    assert found is not None
    return int(found[1])


@pytest.fixture(scope="module")
def model_of(tiny_store: Path) -> Callable[[tuple[str, str]], Model]:
    return cache(lambda mixed: Model(tiny_store, *mixed))


@pytest.fixture(scope="module")
def paper(model_of) -> Model:
    return model_of(PAPER)


def generate(engine: Engine, kind: str = "greedy", **options) -> Generation:
    """Some tokens, with no more bytes held than was asked."""
    chosen = {"greedy": GREEDY, "sampled": SAMPLED}[kind]
    options = {"max_new_tokens": NEW_TOKENS, "ignore_eos": True, **chosen, **options}
    done = engine.generate(options.pop("prompt", PROMPT), **options)
    assert_within_budgets(engine, done)
    return done


def look(engine: Engine, kind: str = "greedy") -> Seen:
    done = generate(engine, kind)
    return Seen(done.token_ids, done.logprobs, engine.logits(PROMPT))


def assert_within_budgets(engine: Engine, done: Generation) -> None:
    held, needed = done.stats.held, engine.plan.footprint
    assert held.hbm_bytes <= needed.hbm <= held.hbm_budget_bytes
    assert held.dram_bytes <= needed.dram <= held.dram_budget_bytes


def assert_same(given: Seen, wanted: Seen) -> None:
    """Bit by bit."""
    assert given.token_ids == wanted.token_ids
    assert given.logprobs == wanted.logprobs
    assert given.logits.dtype == np.float32
    assert np.array_equal(given.logits, wanted.logits)


@pytest.mark.parametrize("mixed", MIXES, ids=str)
def test_the_host_loop_says_what_the_resident_loop_says(mixed, model_of):
    model = model_of(mixed)
    wanted = model.seen("greedy")
    assert len(set(wanted.token_ids)) > 2
    model.resident.record(Trace())
    given = look(model.resident)
    model.resident.record(None)
    assert_same(given, wanted)


@pytest.mark.parametrize("mixed", MIXES, ids=str)
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
    engine = model.with_pools(dram=model.smallest_dram, distance=0)
    assert_same(look(engine), model.seen("greedy"))
    with pytest.raises(DoesNotFit):
        model.with_pools(dram=model.smallest_dram - 1)


@settings(
    max_examples=16,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    database=None,
)
@given(
    hbm=st.sampled_from([0.0, 0.3, 0.8, 1.0]),
    dram=st.floats(0, 1),
    policy=st.sampled_from(["lru", "lfu"]),
    distance=st.integers(0, 3),
    kind=st.sampled_from(["greedy", "sampled"]),
)
def test_the_cache_is_invisible(paper, hbm, dram, policy, distance, kind):
    room = paper.whole_hbm - 1 - paper.smallest_hbm
    engine = paper.load(
        hbm=paper.smallest_hbm + int(hbm * room),
        dram=paper.smallest_dram * 5 + int(dram * 1e6),
        policy=policy,
        distance=distance,
    )
    assert_same(look(engine, kind), paper.seen(kind))
    # Again, from the state that the first run left.
    assert_same(look(engine, kind), paper.seen(kind))


def test_the_bundled_model_says_the_same_from_every_tier(bundled_store):
    model = Model(bundled_store, *PAPER)
    wanted = model.seen("greedy")
    half = (model.smallest_hbm + model.whole_hbm) // 2
    assert_same(look(model.load(hbm=half)), wanted)
    dram = model.smallest_dram * 3
    engine = model.load(hbm=model.smallest_hbm, dram=dram, policy="lfu")
    assert_same(look(engine), wanted)


def test_prompts_as_long_as_the_context_keep_within_the_smallest_budget(paper):
    engine = paper.load(hbm=paper.smallest_hbm, context=100)
    tight = paper.load(
        hbm=smallest(lambda: paper.load(hbm=1, context=100)), context=100
    )
    for one in (engine, tight):
        generate(one, prompt=list(range(96)), max_new_tokens=3)
        one.logits(list(range(90)) + list(range(10)))
        assert one._runner.held().hbm_bytes <= one.plan.footprint.hbm


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
        neurons=engine.spec.neurons,
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
    engine = paper.with_pools(policy=policy, dram=paper.smallest_dram)
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
    engine = paper.with_pools(dram=2 * paper.smallest_dram, distance=1, chunks=store)
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
