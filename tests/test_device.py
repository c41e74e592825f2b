"""Slot pools: what fill writes, that nothing else is copied, that nothing aliases."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from m2jax.aligned import aligned_buffer
from m2jax.cache.buckets import MIN_LOAD_BUCKET, load_bucket
from m2jax.cache.device import (
    STORED_DTYPES,
    fill,
    init_pool,
    record_view,
    to_device,
    to_device_together,
)

LARGEST_PADDING = 1.25


def random_bytes(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def test_fill_writes_the_rows_it_is_given_and_leaves_the_other_slots():
    before, rows = random_bytes(7, 24), random_bytes(3, 24, seed=1)
    slots = np.array([5, 0, 3], np.int32)
    after = np.asarray(fill(jnp.array(before), slots, rows))
    wanted = before.copy()
    wanted[slots] = rows
    assert np.array_equal(after, wanted)


def test_fill_drops_padding_rows():
    before, rows = random_bytes(7, 24), random_bytes(4, 24, seed=1)
    slots = np.array([2, 7, 6, 7], np.int32)
    after = np.asarray(fill(jnp.array(before), slots, rows))
    wanted = before.copy()
    wanted[[2, 6]] = rows[[0, 2]]
    assert np.array_equal(after, wanted)


def test_fill_takes_the_buffer_of_the_pool_it_is_given():
    pool = jnp.array(random_bytes(64, 48))
    place = pool.unsafe_buffer_pointer()
    after = fill(pool, np.array([1], np.int32), random_bytes(1, 48, seed=1))
    assert pool.is_deleted()
    assert after.unsafe_buffer_pointer() == place


@pytest.mark.parametrize("dtype", ["uint8", *{t.name for t in STORED_DTYPES.values()}])
def test_fill_needs_no_second_pool_in_memory(dtype: str):
    pool = jax.ShapeDtypeStruct((512, 384), dtype)
    rows = jax.ShapeDtypeStruct((16, 384), dtype)
    slots = jax.ShapeDtypeStruct((16,), "int32")
    analysis = fill.lower(pool, slots, rows).compile().memory_analysis()
    pool_bytes = 512 * 384 * np.dtype(dtype).itemsize
    assert analysis.alias_size_in_bytes == pool_bytes
    assert analysis.temp_size_in_bytes < pool_bytes / 4


def test_a_device_array_keeps_its_numbers_when_the_buffer_it_came_from_is_reused():
    # Page-aligned, so that a runtime that can share memory would.
    buffer = aligned_buffer((256, 96))
    buffer[:] = random_bytes(256, 96)
    wanted = buffer.copy()
    array = to_device(buffer)
    buffer[:] = 255 - buffer
    assert np.array_equal(np.asarray(array), wanted)


def test_arrays_that_are_placed_together_are_copies_of_what_they_were():
    kinds = {"a": np.uint8, "b": np.float16, "c": np.float32, "none": np.float32}
    shapes = {"a": (7, 13), "b": (3, 5, 2), "c": (11,), "none": (0, 4)}
    arrays = {name: random_bytes(*shapes[name]).astype(kinds[name]) for name in kinds}
    wanted = {name: array.copy() for name, array in arrays.items()}
    placed = to_device_together(arrays)
    for array in arrays.values():
        array[...] = 0
    assert list(placed) == list(wanted)
    for name, array in wanted.items():
        assert placed[name].dtype == array.dtype
        assert np.array_equal(np.asarray(placed[name]), array)


def test_a_float_view_of_a_buffer_is_copied_to_the_device_too():
    buffer = aligned_buffer((64, 96))
    buffer[:] = np.random.default_rng(0).normal(size=(64, 48)).astype("f2").view("u1")
    rows = record_view(buffer, plane="w16", original_dtype="float16")
    wanted = rows.copy()
    array = to_device(rows)
    buffer[:] = 0
    assert np.array_equal(np.asarray(array), wanted)


@pytest.mark.parametrize("name", STORED_DTYPES)
def test_original_rows_are_viewed_in_their_own_dtype_without_a_copy(name: str):
    buffer = random_bytes(5, 96)
    view = record_view(buffer, plane="w16", original_dtype=name)
    assert view.dtype == STORED_DTYPES[name]
    assert np.shares_memory(view, buffer)
    assert np.array_equal(view.view(np.uint8), buffer)


def test_nibble_planes_stay_bytes():
    buffer = random_bytes(5, 96)
    assert record_view(buffer, plane="r4", original_dtype="bfloat16") is buffer


def test_an_empty_pool_has_the_shape_and_dtype_of_its_records():
    pool = init_pool(9, np.empty(48, np.float16))
    assert (pool.shape, pool.dtype) == ((9, 48), jnp.float16)


@given(st.integers(1, 1 << 20))
def test_a_transfer_holds_its_loads_and_little_padding(loads: int):
    bucket = load_bucket(loads, wanted=1 << 30)
    assert bucket >= loads
    assert bucket == MIN_LOAD_BUCKET or bucket <= LARGEST_PADDING * loads


def test_transfers_come_in_few_sizes():
    sizes = {load_bucket(loads, wanted=8192) for loads in range(1, 4097)}
    octaves = 4096 // MIN_LOAD_BUCKET
    assert len(sizes) <= 4 * octaves.bit_length()
