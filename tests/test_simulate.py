"""Traces on disk, and their replay through the engine's own policies."""

import itertools
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from m2jax.cache.policy import POLICIES
from m2jax.cache.residency import Residency
from m2jax.cache.simulate import SIMULATED_POLICIES, simulate
from m2jax.cache.trace import Trace

NEURONS = 48


def random_trace(seed: int, *, steps: int = 12, largest: int = 16) -> Trace:
    """Two layers, planes r4 and w16, hot and cold neurons, sets of changing size."""
    generator = np.random.default_rng(seed)
    weights = 1 / (1 + generator.permutation(NEURONS)) ** generator.uniform(0, 2)
    trace = Trace()
    for step, layer, plane in itertools.product(range(steps), (0, 1), ("r4", "w16")):
        count = generator.integers(1, largest + 1)
        wanted = generator.choice(
            NEURONS, count, replace=False, p=weights / sum(weights)
        )
        trace.record(step, layer, plane, wanted.astype(np.int32))
    return trace


def trace_of(sets) -> Trace:
    trace = Trace()
    for step, wanted in enumerate(sets):
        trace.record(step, 3, "w16", np.array(wanted, np.int32))
    return trace


def plain(trace: Trace) -> list:
    return [(*entry[:3], entry.wanted.tolist()) for entry in trace.entries()]


def fewest_loads(sets, slots: int) -> int:
    """By trying everything that may be kept."""
    costs = {frozenset(): 0}
    for wanted in map(frozenset, sets):
        following = {}
        for held, cost in costs.items():
            others = held - wanted
            spare = min(len(others), slots - len(wanted))
            for kept in itertools.combinations(sorted(others), spare):
                state = wanted | frozenset(kept)
                loads = cost + len(wanted - held)
                following[state] = min(loads, following.get(state, loads))
        costs = following
    return min(costs.values())


@pytest.mark.parametrize("policy", POLICIES)
def test_a_replay_loads_what_the_recording_run_loaded(policy):
    slots = {(0, "r4"): 16, (0, "w16"): 30, (1, "r4"): 17, (1, "w16"): 48}
    run = {
        pool: Residency(NEURONS, s, POLICIES[policy](NEURONS))
        for pool, s in slots.items()
    }
    trace = Trace()
    for entry in random_trace(4, steps=40).entries():
        trace.record(*entry)
        run[entry.layer, entry.plane].plan(entry.wanted)
    result = simulate(trace, neurons=NEURONS, slots=slots, policy=policy)
    assert {pool: residency.loads for pool, residency in run.items()} == {
        pool: counts.loads for pool, counts in result.pools.items()
    }


def test_belady_never_loads_more_than_any_other_policy_on_200_traces():
    for seed in range(200):
        trace, slots = random_trace(seed), 16 + seed % 20
        results = {
            policy: simulate(trace, neurons=NEURONS, slots=slots, policy=policy).pools
            for policy in SIMULATED_POLICIES
        }
        for pool, best in results["belady"].items():
            for other in results.values():
                assert best.loads <= other[pool].loads, seed


@given(
    st.integers(2, 4).flatmap(
        lambda slots: st.tuples(
            st.just(slots),
            st.lists(
                st.lists(st.integers(0, 6), unique=True, max_size=slots), max_size=9
            ),
        )
    )
)
def test_belady_loads_as_few_as_trying_everything(case):
    slots, sets = case
    result = simulate(trace_of(sets), neurons=7, slots=slots, policy="belady")
    assert result.loads == fewest_loads(sets, slots)


@pytest.mark.parametrize("policy", SIMULATED_POLICIES)
def test_with_a_slot_for_every_neuron_each_is_loaded_once(policy):
    trace = random_trace(7)
    result = simulate(trace, neurons=NEURONS, slots=NEURONS, policy=policy)
    for pool, counts in result.pools.items():
        sets = [e.wanted for e in trace.entries() if (e.layer, e.plane) == pool]
        assert counts.loads == np.unique(np.concatenate(sets)).size


def test_totals_are_sums_over_pools_and_hits_and_loads_make_accesses():
    trace = random_trace(2)
    result = simulate(trace, neurons=NEURONS, slots=20, policy="lru")
    wanted = [entry.wanted.size for entry in trace.entries()]
    assert set(result.pools) == {(0, "r4"), (0, "w16"), (1, "r4"), (1, "w16")}
    assert result.accesses == sum(wanted) == result.hits + result.loads
    assert result.loads == sum(pool.loads for pool in result.pools.values())
    assert result.hit_ratio == result.hits / sum(wanted)
    for pool in result.pools.values():
        assert pool.accesses == pool.hits + pool.loads
        assert pool.hit_ratio == pool.hits / pool.accesses


def test_pools_do_not_disturb_each_other():
    together = random_trace(9)
    result = simulate(together, neurons=NEURONS, slots=18, policy="lfu")
    for pool, counts in result.pools.items():
        alone = Trace()
        for entry in together.entries():
            if (entry.layer, entry.plane) == pool:
                alone.record(*entry)
        single = simulate(alone, neurons=NEURONS, slots=18, policy="lfu")
        assert single.pools == {pool: counts}


def test_random_eviction_depends_on_the_seed_alone():
    trace = random_trace(6, steps=60)
    loads = [
        simulate(trace, neurons=NEURONS, slots=20, policy="random", seed=seed).loads
        for seed in (1, 1, 2, 3)
    ]
    assert loads[0] == loads[1]
    assert len(set(loads)) > 1


def test_where_nothing_is_wanted_there_is_no_hit_ratio():
    result = simulate(trace_of([[], []]), neurons=5, slots=0, policy="belady")
    assert (result.accesses, result.hit_ratio) == (0, None)
    assert simulate(Trace(), neurons=5, slots=2, policy="lru").hit_ratio is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"policy": "fifo"}, '"fifo": want one of lru, lfu, belady, random'),
        ({"slots": 2}, "step 1, layer 3, plane w16: 3 neurons .* 2 slots"),
        ({"slots": {(0, "w16"): 5}}, "layer 3, plane w16: no slots"),
        ({"neurons": 6}, r"step 1, layer 3, plane w16: .* want \[0, 6\)"),
    ],
)
def test_a_replay_that_cannot_be_is_refused_naming_the_pool(change, message):
    arguments = {"neurons": 9, "slots": 3, "policy": "lru", **change}
    with pytest.raises(ValueError, match=message):
        simulate(trace_of([[4], [0, 6, 2]]), **arguments)


def test_a_trace_survives_its_file(tmp_path):
    trace = random_trace(11)
    trace.record(99, 1, "q4", np.array([], np.int32))
    trace.save(tmp_path / "run")
    again = Trace.load(tmp_path / "run", neurons=NEURONS)
    assert plain(again) == plain(trace)
    assert len(again) == 49
    assert {entry.wanted.dtype for entry in again.entries()} == {np.dtype(np.int32)}


def test_an_empty_trace_survives_its_file(tmp_path):
    Trace().save(tmp_path / "empty.npz")
    assert plain(Trace.load(tmp_path / "empty.npz")) == []


def test_a_trace_keeps_ids_whose_buffer_is_used_again():
    buffer = np.array([7, 3, 5], np.int32)
    trace = Trace()
    trace.record(0, 0, "r4", buffer)
    buffer[:] = 1
    assert trace.entries()[0].wanted.tolist() == [7, 3, 5]


@pytest.mark.parametrize(
    "wanted", [[[1, 2]], [1.5], [True, False], [-1, 4], [1 << 31]], ids=str
)
def test_what_is_no_list_of_ids_is_not_recorded(wanted):
    trace = Trace()
    with pytest.raises(ValueError, match=r"layer 2, plane r4: .*want"):
        trace.record(0, 2, "r4", np.array(wanted))
    assert len(trace) == 0


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "trace.npz"
    random_trace(5, steps=2, largest=5).save(path)
    return path


def test_a_trace_cut_anywhere_is_refused(saved):
    content = saved.read_bytes()
    for length in range(len(content)):
        saved.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"trace\.npz: .*record"):
            Trace.load(saved)


def test_no_flipped_bit_changes_a_trace_unseen(saved):
    content, expected = saved.read_bytes(), plain(Trace.load(saved))
    refused = 0
    for position in range(len(content)):
        damaged = bytearray(content)
        damaged[position] ^= 1 << position % 8
        saved.write_bytes(damaged)
        try:
            seen = plain(Trace.load(saved))
        except ValueError:
            refused += 1
        else:
            assert seen == expected
    assert refused > len(content) // 2


DAMAGE = {
    "no ids": ({"ids": None}, "want the fields version, .* got"),
    "extra field": ({"slots": np.array([3])}, "want the fields"),
    "later version": ({"version": np.int64(2)}, "trace version 2, want 1"),
    "float ids": ({"ids": np.array([1.0, 2.0, 5.0])}, '"ids" is float64'),
    "flat": ({"ids": np.array([[1, 2, 5]])}, r'"ids" is int64 \[1, 3\]'),
    "negative id": ({"ids": np.array([1, -2, 5])}, r"ids -2 to 5, want \[0, 48\)"),
    "id of F": ({"ids": np.array([1, 2, 48])}, r"ids 1 to 48, want \[0, 48\)"),
    "short layers": ({"layers": np.array([0])}, "disagree"),
    "no offsets": ({"offsets": np.array([], np.int64)}, "disagree"),
    "falling offsets": ({"offsets": np.array([0, 4, 3])}, "does not cut the 3 ids"),
    "offsets short of ids": ({"offsets": np.array([0, 1, 2])}, "does not cut"),
    "late start": ({"offsets": np.array([1, 2, 3])}, "does not cut"),
}


@pytest.mark.parametrize(("change", "message"), DAMAGE.values(), ids=DAMAGE.keys())
def test_a_file_with_other_fields_is_refused_naming_them(tmp_path, change, message):
    fields = {
        "version": np.int64(1),
        "steps": np.array([0, 1]),
        "layers": np.array([0, 0]),
        "planes": np.array(["r4", "r4"]),
        "offsets": np.array([0, 1, 3]),
        "ids": np.array([1, 2, 5], np.int32),
    }
    path = tmp_path / "trace.npz"
    np.savez(path, **fields)
    assert len(Trace.load(path, neurons=NEURONS)) == 2
    fields.update(change)
    np.savez(path, **{name: a for name, a in fields.items() if a is not None})
    with pytest.raises(ValueError, match=message):
        Trace.load(path, neurons=NEURONS)


def test_a_pickle_in_a_trace_is_not_run(tmp_path):
    ran = tmp_path / "ran"

    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(ran),)

    np.savez(tmp_path / "trace.npz", ids=np.array([Payload()], object))
    with pytest.raises(ValueError, match="not a trace"):
        Trace.load(tmp_path / "trace.npz")
    assert not ran.exists()


def test_a_single_array_is_not_a_trace(tmp_path):
    np.save(tmp_path / "one.npy", np.arange(5))
    with pytest.raises(ValueError, match=r"one\.npy: not a trace"):
        Trace.load(tmp_path / "one.npy")


def test_a_trace_that_is_not_there_is_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent"):
        Trace.load(tmp_path / "absent.npz")


def test_a_save_that_fails_leaves_nothing_behind(tmp_path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(IsADirectoryError):
        random_trace(1).save(tmp_path / "taken")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]
