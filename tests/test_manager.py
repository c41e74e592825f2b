"""Where the tiers meet: whatever is wanted, the device has the store's bytes of it."""

import errno
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m2jax.cache import reading
from m2jax.cache.access import Records
from m2jax.cache.manager import TierManager
from m2jax.errors import TierFailed
from m2jax.plan import Placement
from tests.faulty_store import FaultyStore, raises

LAYERS, NEURONS, WHOLE, WANTED = 4, 20, 24, 6
RECORD_BYTES = {"q4": 24, "r4": 24, "w16": 96}
BROKEN_DISK = OSError(errno.EIO, "Input/output error")


class Rows:
    """Random bytes for every layer and plane."""

    def read(self, layer: int, plane: str, out: np.ndarray) -> None:
        out[:] = rows_of(layer, plane)


def rows_of(layer: int, plane: str) -> np.ndarray:
    generator = np.random.default_rng([layer, *plane.encode()])
    return generator.integers(0, 256, (WHOLE, RECORD_BYTES[plane]), np.uint8)


@pytest.fixture(autouse=True, scope="module")
def short_waits():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "BACK_OFF_S", 0.0001)
        yield


def placement(
    *,
    q4: int,
    r4: list[int],
    w16: list[int],
    fixed: int,
    ring: int,
    in_place: bool,
) -> Placement:
    """q4 resident in the first `q4` layers; slots of r4 and w16 by layer."""
    slots = {
        "q4": tuple(WHOLE if layer < q4 else 0 for layer in range(LAYERS)),
        "r4": tuple(r4),
        "w16": tuple(w16),
    }
    passing = tuple(
        layer
        for layer in range(LAYERS)
        if any(slots[plane][layer] < WHOLE for plane in slots)
    )
    fixed = min(fixed, len(passing))
    used = (("q4", "r4", "w16"),) * LAYERS
    # In place two layers may be in use.
    ring = min(ring + in_place, len(passing) - fixed)
    return Placement(used, slots, WHOLE, passing, fixed, ring, in_place)


slots_by_layer = st.lists(
    st.sampled_from([0, WANTED, WANTED + 1, NEURONS, WHOLE]),
    min_size=LAYERS,
    max_size=LAYERS,
)
placements = st.builds(
    placement,
    q4=st.integers(0, LAYERS),
    r4=slots_by_layer,
    w16=slots_by_layer,
    fixed=st.integers(0, LAYERS),
    ring=st.integers(1, 3),
    in_place=st.booleans(),
)
seeds = st.integers(0, 1 << 30)
policies = st.sampled_from(["lru", "lfu"])


def manager_of(store: FaultyStore, place: Placement, policy: str) -> TierManager:
    tiers = TierManager(
        store.read,
        place,
        RECORD_BYTES,
        neurons=NEURONS,
        original_dtype="float16",
        wanted=({"q4": NEURONS, "r4": WANTED, "w16": WANTED},) * LAYERS,
        policy=policy,
    )
    tiers.load_resident(lambda nbytes: None)
    return tiers


def bytes_of(place: Placement, records: Callable[[str, int], int]) -> int:
    """Of so many records of each layer's plane, by the plane and its slots."""
    return sum(
        records(plane, slots) * RECORD_BYTES[plane]
        for plane, counts in place.slots.items()
        for slots in counts
    )


def assert_step_is_right(tiers: TierManager, generator: np.random.Generator) -> None:
    """A decode step: the records that its slots name are those of the store, and are
    still those when the next layer's are there, too."""
    before: list[tuple[Records, np.ndarray]] = []
    for layer in range(LAYERS):
        if layer >= 2:
            tiers.computed(layer - 2)
        with tiers.layer(layer) as access:
            base = access.base()
            assert base is not None
            assert np.array_equal(base, rows_of(layer, "q4"))
            for records, expected in before:
                assert np.array_equal(records, expected)
            before = [(base, rows_of(layer, "q4"))]
            for plane in ("r4", "w16"):
                # Hot neurons, so that there are hits.
                chances = 1.0 / (1 + np.arange(NEURONS))
                ids = generator.choice(
                    NEURONS, WANTED, replace=False, p=chances / chances.sum()
                ).astype(np.int32)
                seen = ids if access.needs_ids(plane) else None
                records, slots = access.wanted(plane, jnp.asarray(ids), seen)
                found = np.asarray(records)[ids if slots is None else slots]
                assert np.array_equal(found.view(np.uint8), rows_of(layer, plane)[ids])
    for layer in range(LAYERS)[-2:]:
        tiers.computed(layer)


@settings(deadline=None, max_examples=60)
@given(placements, policies, seeds)
def test_whatever_is_wanted_its_slots_hold_the_bytes_of_the_store(place, policy, seed):
    tiers = manager_of(FaultyStore(Rows()), place, policy)
    generator = np.random.default_rng(seed)
    for _ in range(4):
        assert_step_is_right(tiers, generator)
        for layer in range(LAYERS):
            for plane, whole in tiers.whole_planes(layer).items():
                stored = rows_of(layer, plane)
                assert np.array_equal(np.asarray(whole).view(np.uint8), stored)
            tiers.computed(layer)
    tiers.close()


@settings(deadline=None, max_examples=40)
@given(placements, policies, seeds, st.lists(st.integers(0, 30), max_size=4))
def test_steps_after_steps_that_failed_are_right(place, policy, seed, skips):
    store = FaultyStore(Rows())
    tiers = manager_of(store, place, policy)
    generator = np.random.default_rng(seed)
    for skip in skips:
        store.break_next(raises(BROKEN_DISK), count=None, skip=skip)
        try:
            for _ in range(3):
                assert_step_is_right(tiers, generator)
        except TierFailed:
            tiers.abandon()
        store.heal()
        tiers.dram.forget_failures()
        assert_step_is_right(tiers, generator)
    tiers.close()


@settings(deadline=None, max_examples=40)
@given(placements, policies, seeds)
def test_counters_say_what_was_wanted_and_what_crossed(place, policy, seed):
    tiers = manager_of(FaultyStore(Rows()), place, policy)
    generator = np.random.default_rng(seed)
    steps = 3
    for _ in range(steps):
        assert_step_is_right(tiers, generator)
    link, pools = tiers.link, tiers._directory
    whole = bytes_of(place, lambda plane, slots: WHOLE * (slots == WHOLE))
    assert link.startup_bytes == whole
    assert link.accesses == steps * LAYERS * (NEURONS + 2 * WANTED)
    assert 0 <= link.hits <= link.accesses
    if place.resident:
        assert link.hits == link.accesses
        assert link.load_bytes == 0
    streamed = steps * bytes_of(
        place,
        lambda plane, slots: (WHOLE if plane == "q4" else WANTED) * (slots == 0),
    )
    if place.in_place:
        streamed = 0
    # Each load crosses once; a transfer has padding, up to the wanted set.
    least = sum(
        RECORD_BYTES[plane] * pools[layer, plane].loads for layer, plane in pools
    )
    most = sum(RECORD_BYTES[plane] * steps * WANTED for _, plane in pools)
    assert streamed + least <= link.load_bytes <= streamed + most
    tiers.close()


@settings(deadline=None, max_examples=40)
@given(placements, seeds)
def test_held_bytes_are_pools_whole_planes_and_two_layers_in_transit(place, seed):
    tiers = manager_of(FaultyStore(Rows()), place, "lru")
    generator = np.random.default_rng(seed)
    for _ in range(2):
        assert_step_is_right(tiers, generator)
    records = bytes_of(place, lambda plane, slots: slots)
    in_transit = sum(WHOLE * size for size in RECORD_BYTES.values())
    most = 0 if place.in_place else 2 * in_transit
    assert records <= tiers.held_bytes <= records + most
    tiers.close()


def test_in_place_the_device_sees_the_dram_buffers():
    place = placement(
        q4=0, r4=[0] * LAYERS, w16=[WHOLE] * LAYERS, fixed=1, ring=2, in_place=True
    )
    tiers = manager_of(FaultyStore(Rows()), place, "lru")
    for layer in range(LAYERS):
        planes = tiers.whole_planes(layer)
        area = tiers.dram._area(layer)
        assert area is not None
        rows = tiers.dram._cut(area.memory, layer)
        for plane in ("q4", "r4"):
            seen = planes[plane].unsafe_buffer_pointer()
            assert seen == rows[plane].ctypes.data
        tiers.computed(layer)
    tiers.close()


@settings(deadline=None, max_examples=30)
@given(placements, seeds)
def test_layers_staged_while_the_one_before_computes_are_those_of_the_store(
    place, seed
):
    tiers = manager_of(FaultyStore(Rows()), place, "lru")
    records = bytes_of(place, lambda plane, slots: slots)
    for sweep in range(3):
        for layer in range(LAYERS):
            planes = tiers.whole_planes(layer)
            tiers.stage_after(layer)
            if sweep and not place.in_place and tiers.dram.is_pinned(layer + 1):
                assert layer + 1 in tiers._begun
            for plane, whole in planes.items():
                stored = rows_of(layer, plane)
                assert np.array_equal(np.asarray(whole).view(np.uint8), stored)
            tiers.computed(layer)
            if sweep == 1 and layer == seed % LAYERS:
                # The sweep is given up.
                tiers.forget_ahead()
                break
    in_transit = sum(WHOLE * size for size in RECORD_BYTES.values())
    assert tiers.held_bytes <= records + 2 * in_transit
    assert not tiers._begun
    tiers.close()


def test_staged_layers_of_a_sweep_that_is_not_made_are_given_back():
    slots = [0] * LAYERS
    place = placement(q4=0, r4=slots, w16=slots, fixed=0, ring=1, in_place=True)
    tiers = manager_of(FaultyStore(Rows()), place, "lru")
    generator = np.random.default_rng(0)
    for _ in range(3):
        tiers.stage_ahead()
        tiers.forget_ahead()
        assert_step_is_right(tiers, generator)
    tiers.close()


def test_the_first_buffer_that_a_sweep_gives_free_is_read_into_at_once():
    """Before the sweep comes to a layer that was not staged for it."""
    slots = [0] * LAYERS
    place = placement(q4=0, r4=slots, w16=slots, fixed=0, ring=2, in_place=True)
    tiers = manager_of(FaultyStore(Rows()), place, "lru")
    tiers.stage_ahead()
    tiers.whole_planes(0)
    assert tiers.dram._area(3) is None
    tiers.computed(0)
    tiers.whole_planes(1)
    assert tiers.dram._area(3) is not None
    tiers.close()


def test_staged_layers_are_not_read_again():
    """Copied to the device, they are in no buffer any more; the next layers are."""
    slots = [0] * LAYERS
    place = placement(q4=0, r4=slots, w16=slots, fixed=0, ring=2, in_place=False)
    tiers = manager_of(FaultyStore(Rows()), place, "lru")
    tiers.stage_ahead()
    tiers._ahead[1].result()
    for layer in range(2):
        tiers.whole_planes(layer)
        assert {area.layer for area in tiers.dram._ring} == {2, 3}
    tiers.close()


def test_a_computation_that_failed_keeps_nothing_open(monkeypatch):
    place = placement(q4=4, r4=[6] * 4, w16=[24] * 4, fixed=4, ring=0, in_place=False)
    ended, tiers = [], manager_of(FaultyStore(Rows()), place, "lru")
    tiers.end_reads = lambda: ended.append("reads")
    monkeypatch.setattr(tiers.memory, "close", lambda: ended.append("memory"))

    def fail(arrays):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(jax, "block_until_ready", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        tiers.close()
    assert ended == ["memory", "reads"]
