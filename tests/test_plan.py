"""What lies where: budgets are obeyed, and the smallest that is named really works."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from m2jax.cache.dram import DramTier
from m2jax.errors import DoesNotFit
from m2jax.kv import block_sizes, capacity_for, kv_bytes
from tests.plan_cases import ENOUGH, Case, even, share, uneven
from tests.small_configs import tiny


@given(uneven, share, share, st.integers(0, 5))
def test_no_plan_needs_more_than_its_budgets(case, hbm_share, dram_share, distance):
    low = case.smallest_hbm()
    hbm = low + int((case.whole - low) * hbm_share)
    dram = case.least_dram + int(case.layers * case.layer_bytes * dram_share)
    plan = case.plan(hbm, dram, distance=distance)
    assert plan.footprint.hbm <= hbm
    assert plan.footprint.dram <= dram


@given(uneven, st.integers(1, 9), st.integers(1, 9), st.integers(0, 3))
def test_budgets_one_byte_short_of_whole_layers_are_obeyed_too(
    case, hbm_layers, dram_layers, distance
):
    hbm = case.smallest_hbm() + hbm_layers * case.layer_bytes - 1
    dram = case.least_dram + dram_layers * case.layer_bytes - 1
    plan = case.plan(hbm, dram, distance=distance)
    assert plan.footprint.hbm <= hbm
    assert plan.footprint.dram <= dram


@given(uneven)
def test_the_smallest_hbm_budget_that_is_named_works_and_one_byte_less_does_not(case):
    named = case.smallest_hbm()
    assert case.plan(named, ENOUGH).footprint.hbm <= named
    with pytest.raises(DoesNotFit):
        case.plan(named - 1, ENOUGH)


@given(uneven.filter(lambda case: case.layers > 2), share)
def test_the_smallest_dram_budget_that_is_named_works_and_one_byte_less_does_not(
    case, hbm_share
):
    low = case.smallest_hbm()
    hbm = low + int((case.whole - 1 - low) * min(hbm_share, 1))
    named = case.smallest_dram(hbm)
    assert case.plan(hbm, named).footprint.dram <= named
    if named > 1:
        with pytest.raises(DoesNotFit):
            case.plan(hbm, named - 1)


@given(uneven, share)
def test_every_pool_holds_a_wanted_set_or_nothing(case, hbm_share):
    low = case.smallest_hbm()
    hbm = low + int((case.whole - low) * hbm_share)
    placement = case.plan(hbm, ENOUGH).placement
    whole = case.layout.padded_neurons
    for plane, slots in placement.slots.items():
        for spec, count in zip(case.specs, slots, strict=True):
            if plane not in spec.wanted:
                assert count == 0
            elif spec.dense(plane):
                assert count in (0, whole)
            else:
                least, most = spec.wanted[plane], case.neurons
                assert count in (0, whole) or least <= count <= most


@given(even, share)
def test_while_ssd_reads_remain_pools_take_no_room_that_whole_planes_could(
    case, hbm_share
):
    low = case.smallest_hbm()
    hbm = low + int((case.whole - low) * hbm_share)
    plan = case.plan(hbm, case.least_dram)
    layout, whole = case.layout, case.layout.padded_neurons
    room = hbm - plan.footprint.hbm
    rest = []
    for plane, counts in plan.placement.slots.items():
        for count in counts:
            if not case.specs[0].dense(plane) and count < whole:
                room += count * layout.record_bytes(plane)
                rest.append(layout.plane_bytes(plane))
    if plan.ssd_bytes_per_token and rest:
        assert room < min(rest)
    if case.in_place:
        assert all(
            count in (0, whole)
            for counts in plan.placement.slots.values()
            for count in counts
        )


@given(uneven, share, share, st.integers(0, 5))
def test_dram_takes_the_layers_that_are_not_resident(
    case, hbm_share, dram_share, distance
):
    low = case.smallest_hbm()
    hbm = low + int((case.whole - low) * hbm_share)
    dram = case.least_dram + int(case.layers * case.layer_bytes * dram_share)
    placement = case.plan(hbm, dram, distance=distance).placement
    passing = [layer for layer in range(case.layers) if placement.streamed(layer)]
    assert list(placement.dram_layers) == passing
    assert placement.resident == (not passing)
    assert placement.fixed <= len(passing)
    assert placement.ring <= distance + 1 + case.in_place
    assert placement.ring > 0 or placement.fixed == len(passing)


@given(uneven, share, share)
def test_the_two_largest_layers_that_pass_have_room_in_transit(
    case, hbm_share, dram_share
):
    low = case.smallest_hbm()
    hbm = low + int((case.whole - low) * hbm_share)
    dram = case.least_dram + int(case.layers * case.layer_bytes * dram_share)
    plan = case.plan(hbm, dram)
    assert plan.footprint.staging == case.in_transit(plan)


def test_what_becomes_resident_leaves_no_larger_layers_in_transit():
    # With room for 15 planes of codes a second pass would take a layer's r4 and w16,
    # which leaves two layers of five planes; the first leaves w16 alone.
    case = Case(3, 64, ("25/25/50",), "base", 0, 16)
    layer, plane = case.layer_bytes, case.layout.plane_bytes("q4")
    assert layer == 6 * plane
    always = case.whole - 3 * layer
    plan = case.plan(always + 16 * plane, 5 * plane)
    assert case.in_transit(plan) == plan.footprint.staging == 8 * plane
    assert plan.footprint.hbm <= always + 16 * plane


def test_no_pool_has_slots_that_never_fill():
    # 36 neurons in 64 records: the others are padding.
    case = Case(9, 36, ("50/0/0",), "none", 0, 16)
    counts = {
        count
        for hbm in range(case.smallest_hbm(), case.whole, 1000)
        for count in case.plan(hbm, ENOUGH).placement.slots["w16"]
    }
    assert {36, 64} <= counts <= {0, *range(18, 37), 64}


@given(uneven, share, share, st.integers(0, 5))
def test_the_dram_tier_allocates_what_the_plan_says(
    case, hbm_share, dram_share, distance
):
    low = case.smallest_hbm()
    hbm = low + int((case.whole - low) * hbm_share)
    dram = case.least_dram + int(case.layers * case.layer_bytes * dram_share)
    plan = case.plan(hbm, dram, distance=distance)
    place, layout = plan.placement, case.layout
    tier = DramTier(
        lambda layer, plane, out: None,
        place.dram_layers,
        {plane: (place.whole, layout.record_bytes(plane)) for plane in place.slots},
        {layer: place.streamed(layer) for layer in place.dram_layers},
        fixed=place.fixed,
        ring=place.ring,
    )
    assert tier.held_bytes == plan.footprint.dram
    tier.close()


@given(uneven)
def test_a_budget_for_everything_makes_everything_resident(case):
    whole = case.whole
    assert case.plan(whole, 1).placement.resident
    if case.layers > 2:
        assert not case.plan(whole - 1, ENOUGH).placement.resident


@given(even, share, share)
def test_more_memory_never_moves_more_bytes(case, first, second):
    low = case.smallest_hbm()
    less, more = sorted(
        low + int((case.whole - low) * hbm_share) for hbm_share in (first, second)
    )
    dram = case.least_dram
    assert (
        case.plan(more, dram).ssd_bytes_per_token
        <= case.plan(less, dram).ssd_bytes_per_token
    )


@given(st.integers(1, 3000))
def test_the_kv_cache_of_the_plan_holds_the_padded_blocks_of_the_longest_prompt(
    context: int,
):
    case = Case(2, 64, ("0/0/100",), "base", 0, context)
    config = tiny("llama", num_hidden_layers=2)
    needed = kv_bytes(config, capacity_for(sum(block_sizes(context))))
    assert case.plan(ENOUGH, 1).footprint.kv == needed


def test_a_plan_without_neurons_needs_no_more_than_its_dense_part():
    case = Case(3, 64, ("0/0/0",), "base", 1000, 16)
    plan = case.plan(case.whole, 1)
    assert plan.placement.resident
    assert plan.footprint.records == plan.footprint.staging == 0
    with pytest.raises(DoesNotFit):
        case.plan(case.whole - 1, 1)
