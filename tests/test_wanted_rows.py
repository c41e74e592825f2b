"""Kernels of a few tokens, each of which wants only some rows: what those that are left
out would have given changes nothing, to the last bit."""

from functools import partial

import numpy as np
import pytest

from m2jax.kernels import native
from m2jax.kernels.sparse_swiglu import accumulate, project
from tests.kernel_cases import (
    DTYPES,
    assert_equal_but_for_rounding,
    form_for,
    normal,
    records_of,
)

pytestmark = pytest.mark.skipif(
    not native.status().ready, reason=f"no C++ kernels: {native.status().about}"
)
PLANES = ["q4", "r4", *DTYPES]


@pytest.mark.parametrize("tokens", [1, 3, 9, 40])
@pytest.mark.parametrize("share", [0.02, 0.2, 1.0])
@pytest.mark.parametrize("plane", PLANES)
def test_what_is_wanted_is_the_same_whatever_else_is(plane, tokens, share):
    records, scales, values = records_of(150, 160, plane=plane)
    x = normal(tokens, 160, seed=2)
    wanted = np.random.default_rng(0).random((tokens, 150)) < share
    kind = "w16" if plane in DTYPES else plane
    name = form_for("cpu_ffi", tokens, plane=plane)
    form = partial(project, plane=kind, implementation=name)
    some = form(x, records, scales, wanted=wanted)
    whole = form(x, records, scales, wanted=np.ones_like(wanted))
    for matrix in range(2):
        assert np.array_equal(
            np.asarray(some[matrix])[wanted], np.asarray(whole[matrix])[wanted]
        )
        expected = x.astype(np.float64) @ values[:, matrix].T
        assert_equal_but_for_rounding(whole[matrix], expected)


# Halves of 32 columns and of 16; rows that end within a tile.
@pytest.mark.parametrize("width", [96, 160, 640])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.3])
@pytest.mark.parametrize("plane", PLANES)
def test_columns_that_a_token_takes_no_part_in_are_as_if_they_were_added(
    plane, share, width
):
    """Beside tokens that take all rows, others are not taken for ones of few."""
    records, scales, values = records_of(150, width, plane=plane)
    kind = "w16" if plane in DTYPES else plane
    draw = np.random.default_rng(1)
    few = normal(2, 150, seed=3) * (draw.random((2, 150)) < share)
    many = normal(6, 150, seed=4)
    form = partial(accumulate, plane=kind, implementation="cpu_ffi")
    alone = np.asarray(form(few, records, scales))
    beside = np.asarray(form(np.concatenate([few, many]), records, scales))
    expected = few.astype(np.float64) @ values[:, 2]
    assert_equal_but_for_rounding(alone, expected)
    if native.are_few(8, "numbers" if plane in DTYPES else "codes"):
        assert np.array_equal(alone, beside[:2])
