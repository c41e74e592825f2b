"""Copies of planes in transit: right, their own, and valid until the second after."""

import numpy as np
import pytest

from m2jax.cache.staging import COPIES, Staging


def rows_of(seed: int, dtype: type) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return generator.integers(0, 200, (5, 24)).astype(dtype)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float16, np.float32])
def test_a_copy_is_its_own_until_the_second_after_it(dtype):
    staging = Staging()
    rows = [rows_of(seed, dtype) for seed in range(6)]
    copies = []
    for number, source in enumerate(rows):
        given = source.copy()
        copies.append(staging.copy("q4", given))
        # The DRAM buffer is read into again at once.
        given.fill(0)
        for back in range(min(COPIES, number + 1)):
            copy = copies[number - back]
            assert copy.dtype == dtype
            assert np.array_equal(copy, rows[number - back])


def test_planes_do_not_share_their_buffers():
    staging = Staging()
    one = staging.copy("q4", rows_of(0, np.uint8))
    for seed in range(1, 4):
        staging.copy("r4", rows_of(seed, np.uint8))
    assert np.array_equal(one, rows_of(0, np.uint8))


def test_on_a_cpu_no_memory_is_taken_after_the_first_two():
    staging = Staging()
    places = [
        staging.copy("q4", rows_of(seed, np.uint8)).unsafe_buffer_pointer()
        for seed in range(6)
    ]
    assert places[::2] == [places[0]] * 3
    assert places[1::2] == [places[1]] * 3
