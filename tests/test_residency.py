"""The directory and its policies, against plain Python models of what they promise."""

from collections import OrderedDict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from m2jax.cache.policy import LFU, LRU, POLICIES, Belady, Random
from m2jax.cache.residency import Residency


def ids(values) -> np.ndarray:
    return np.array(values, np.int32)


@st.composite
def streams(draw, *, full_steps: bool = False):
    """(F, S, wanted sets of at most S ids in any order; of S ids if full_steps)."""
    neurons = draw(st.integers(1, 24))
    slots = draw(st.integers(0, neurons))
    least = slots if full_steps else 0
    wanted = st.permutations(range(neurons)).flatmap(
        lambda order: st.integers(least, slots).map(lambda count: ids(order[:count]))
    )
    return neurons, slots, draw(st.lists(wanted, max_size=14))


def random_stream(seed: int, *, neurons: int, slots: int, steps: int):
    """Wanted sets of changing size from a few hot neurons and many cold ones."""
    generator = np.random.default_rng(seed)
    weights = 1 / (1 + generator.permutation(neurons))
    weights /= weights.sum()
    for _ in range(steps):
        count = generator.integers(slots // 2, slots + 1)
        yield ids(generator.choice(neurons, count, replace=False, p=weights))


def every_policy(neurons: int, stream) -> dict:
    return {
        "lru": LRU(neurons),
        "lfu": LFU(neurons),
        "belady": Belady(neurons, future=stream),
        "random": Random(neurons, seed=(5, 0)),
    }


def model_plan(slot_of: dict, order: list, wanted, slots: int) -> tuple[dict, set]:
    """Loads and victims when slots go, in `order`, from neurons that are not wanted."""
    missing = sorted(set(wanted.tolist()) - set(slot_of))
    free = sorted(set(range(slots)) - set(slot_of.values()))[: len(missing)]
    going = [neuron for neuron in order if neuron not in wanted]
    victims = going[: len(missing) - len(free)]
    places = free + sorted(slot_of.pop(neuron) for neuron in victims)
    loads = dict(zip(missing, places, strict=True))
    slot_of.update(loads)
    return loads, set(victims)


def assert_plan_is(plan, wanted, loads: dict, victims: set, slot_of: dict) -> None:
    assert plan.slots.tolist() == [slot_of[neuron] for neuron in wanted.tolist()]
    loaded = wanted[plan.load_positions].tolist()
    assert dict(zip(loaded, plan.load_slots.tolist(), strict=True)) == loads
    assert set(plan.victims.tolist()) == victims


def assert_lru(neurons: int, slots: int, stream) -> None:
    residency = Residency(neurons, slots, LRU(neurons))
    slot_of, recency = {}, OrderedDict()
    for wanted in stream:
        loads, victims = model_plan(slot_of, list(recency), wanted, slots)
        for neuron in victims:
            del recency[neuron]
        for neuron in sorted(wanted.tolist(), key=slot_of.__getitem__):
            recency[neuron] = True
            recency.move_to_end(neuron)
        assert_plan_is(residency.plan(wanted), wanted, loads, victims, slot_of)


def assert_lfu(neurons: int, slots: int, stream) -> None:
    residency = Residency(neurons, slots, LFU(neurons))
    slot_of, uses = {}, dict.fromkeys(range(neurons), 0)
    for wanted in stream:
        order = sorted(slot_of, key=lambda neuron: (uses[neuron], slot_of[neuron]))
        loads, victims = model_plan(slot_of, order, wanted, slots)
        for neuron in wanted.tolist():
            uses[neuron] += 1
        assert_plan_is(residency.plan(wanted), wanted, loads, victims, slot_of)


@given(streams())
def test_lru_is_an_ordered_dict_whose_front_goes_first(stream):
    assert_lru(*stream)


@given(streams())
def test_lfu_evicts_the_fewest_uses_and_then_the_lowest_slot(stream):
    assert_lfu(*stream)


@pytest.mark.parametrize("check", [assert_lru, assert_lfu])
def test_a_pool_of_hundreds_of_slots_follows_the_same_model(check):
    stream = random_stream(3, neurons=900, slots=400, steps=40)
    check(900, 400, stream)


@given(streams())
def test_slots_of_a_plan_hold_the_wanted_neurons_once_its_loads_are_made(stream):
    neurons, slots, sets = stream
    for policy in every_policy(neurons, sets).values():
        residency = Residency(neurons, slots, policy)
        pool = np.full(slots, -1)
        for wanted in sets:
            plan = residency.plan(wanted)
            assert np.all(plan.slots >= 0)
            pool[plan.load_slots] = wanted[plan.load_positions]
            assert pool[plan.slots].tolist() == wanted.tolist()


@given(streams())
def test_a_plan_loads_what_is_missing_and_evicts_only_what_it_does_not_want(stream):
    neurons, slots, sets = stream
    for policy in every_policy(neurons, sets).values():
        residency = Residency(neurons, slots, policy)
        before: set[int] = set()
        for wanted in sets:
            plan = residency.plan(wanted)
            wanted_ids, victims = set(wanted.tolist()), set(plan.victims.tolist())
            loads = wanted[plan.load_positions].tolist()
            assert set(loads) == wanted_ids - before
            assert len(loads) == len(set(loads))
            assert victims <= before - wanted_ids
            assert len(plan.victims) == max(0, len(before) + len(loads) - slots)
            after = residency.resident().tolist()
            assert after == sorted((before - victims) | wanted_ids)
            before = set(after)


@given(streams(), st.randoms(use_true_random=False))
def test_the_order_of_ids_in_a_wanted_set_changes_no_slot(stream, shuffler):
    neurons, slots, sets = stream
    for name, policy in POLICIES.items():
        one = Residency(neurons, slots, policy(neurons))
        two = Residency(neurons, slots, POLICIES[name](neurons))
        for wanted in sets:
            shuffled = wanted.tolist()
            shuffler.shuffle(shuffled)
            first, second = one.plan(wanted), two.plan(ids(shuffled))
            slot_of = dict(zip(shuffled, second.slots.tolist(), strict=True))
            assert first.slots.tolist() == [slot_of[i] for i in wanted.tolist()]
            assert set(first.victims.tolist()) == set(second.victims.tolist())


def test_plans_are_int32_and_list_loads_in_the_order_given():
    residency = Residency(50, 6, LRU(50))
    residency.plan(ids([40, 7, 21, 30]))
    plan = residency.plan(ids([12, 7, 5, 40, 33]))
    assert plan.load_positions.tolist() == [0, 2, 4]
    assert plan.load_slots.tolist() == plan.slots[plan.load_positions].tolist()
    assert plan.victims.tolist() == [21]
    assert {array.dtype for array in plan} == {np.dtype(np.int32)}


@given(streams(full_steps=True))
def test_atu_loads_wanted_minus_previous_wanted(stream):
    neurons, slots, sets = stream
    residency = Residency(neurons, slots, LRU(neurons))
    previous: set[int] = set()
    for wanted in sets:
        loads = wanted[residency.plan(wanted).load_positions].tolist()
        assert set(loads) == set(wanted.tolist()) - previous
        previous = set(wanted.tolist())


@given(streams())
def test_where_k_changes_atu_loads_at_most_wanted_minus_previous_wanted(stream):
    neurons, _, sets = stream
    slots = max((wanted.size for wanted in sets), default=0)
    residency = Residency(neurons, slots, LRU(neurons))
    previous: set[int] = set()
    for wanted in sets:
        loads = set(wanted[residency.plan(wanted).load_positions].tolist())
        assert loads <= set(wanted.tolist()) - previous
        if len(previous) == slots:
            assert loads == set(wanted.tolist()) - previous
        previous = set(wanted.tolist())


@given(streams())
def test_hits_and_accesses_count_neurons(stream):
    neurons, slots, sets = stream
    residency = Residency(neurons, slots, LRU(neurons))
    loads = sum(residency.plan(wanted).load_positions.size for wanted in sets)
    assert residency.accesses == sum(wanted.size for wanted in sets)
    assert residency.hits == residency.accesses - loads
    assert residency.loads == loads


def test_more_wanted_than_slots_is_refused_naming_both():
    residency = Residency(50, 3, LRU(50))
    with pytest.raises(ValueError, match=r"5 neurons .* 3 slots: .* at least 5"):
        residency.plan(ids([4, 9, 1, 30, 2]))


REFUSED = {
    "too many": [6, 1, 2, 3, 4],
    "a hit twice": [11, 11],
    "a load twice": [3, 11, 3],
    "negative": [2, -1],
    "beyond F": [2, 20],
}


@pytest.mark.parametrize("wanted", REFUSED.values(), ids=REFUSED.keys())
def test_a_refused_wanted_set_leaves_directory_policy_and_counters_alone(wanted):
    stream = list(random_stream(8, neurons=20, slots=4, steps=12))
    residency, untouched = (Residency(20, 4, LFU(20)) for _ in range(2))
    for step in [*stream, ids([11, 2])]:
        residency.plan(step)
        untouched.plan(step)
    with pytest.raises(ValueError, match="want"):
        residency.plan(ids(wanted))
    assert (residency.hits, residency.accesses) == (untouched.hits, untouched.accesses)
    for step in stream:
        for got, expected in zip(residency.plan(step), untouched.plan(step)):
            np.testing.assert_array_equal(got, expected)


def test_ids_that_are_not_integers_are_refused():
    with pytest.raises(TypeError, match="float32"):
        Residency(20, 4, LRU(20)).plan(np.array([1.5, 2.5], np.float32))


@pytest.mark.parametrize(("neurons", "slots"), [(0, 0), (5, -1)])
def test_a_pool_of_no_neurons_or_negative_slots_is_refused(neurons, slots):
    with pytest.raises(ValueError, match=f"{slots} slots for {neurons} neurons"):
        Residency(neurons, slots, LRU(neurons))


def test_a_step_that_wants_nothing_loads_nothing_even_without_slots():
    plan = Residency(20, 0, LRU(20)).plan(ids([]))
    assert [array.tolist() for array in plan] == [[], [], [], []]


@pytest.mark.parametrize("name", ["lru", "lfu", "belady", "random"])
def test_after_reset_plans_are_those_of_a_new_pool(name):
    later = list(random_stream(1, neurons=40, slots=12, steps=20))
    used = Residency(40, 12, every_policy(40, later)[name])
    new = Residency(40, 12, every_policy(40, later)[name])
    for wanted in later[:3]:
        used.plan(wanted)
    used.reset()
    assert used.resident().tolist() == []
    for wanted in later:
        for got, expected in zip(used.plan(wanted), new.plan(wanted)):
            np.testing.assert_array_equal(got, expected)


def test_after_reset_a_failed_load_is_planned_again_and_the_counters_go_on():
    residency = Residency(40, 6, LRU(40))
    residency.plan(ids([1, 2, 3]))
    failed = ids([3, 2, 9])
    residency.plan(failed)
    residency.reset()
    assert residency.plan(failed).load_positions.tolist() == [0, 1, 2]
    assert (residency.accesses, residency.hits) == (9, 2)


def test_belady_refuses_a_step_that_its_future_does_not_hold():
    future = [ids([1, 2]), ids([2, 3])]
    policy = Belady(9, future=future)
    policy.touch(future[0])
    with pytest.raises(ValueError, match="step 1: not the wanted set"):
        policy.touch(ids([3, 2]))
    policy.touch(future[1])
    with pytest.raises(ValueError, match="step 2: the future has 2 steps"):
        policy.touch(future[0])
