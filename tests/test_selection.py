"""Who scores best, by every implementation, against NumPy's stable sort."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m2jax.kernels import selection

NAMES = sorted(selection.BEST)
# As callers do: by itself a C++ kernel would be compiled anew at each call.
levels = jax.jit(selection.levels, static_argnames="implementation")
best = jax.jit(selection.best, static_argnames=("ends", "implementation"))
# Few values, so that there are ties. XLA takes subnormal numbers for 0.
few = st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.5, np.inf, -np.inf])
# Each shape is compiled: one place, less than a register's, whole ones, and a rest.
rows = st.sampled_from([(1, 1), (5, 7), (4, 32), (2, 41)]).flatmap(
    lambda shape: st.lists(
        st.lists(
            few | st.floats(width=32, allow_nan=False, allow_subnormal=False),
            min_size=shape[1],
            max_size=shape[1],
        ),
        min_size=shape[0],
        max_size=shape[0],
    )
)


def ranked(row: np.ndarray) -> np.ndarray:
    """Ids, best first, ties by the lower id."""
    return np.argsort(-row, kind="stable")


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None)
@given(rows=rows, shares=st.lists(st.floats(0, 1), min_size=1, max_size=3))
def test_levels_count_the_ends_that_a_place_is_below(name, rows, shares):
    scores = np.array(rows, np.float32)
    count = scores.shape[1]
    ends = sorted(round(share * count) for share in shares)
    found = levels(scores, np.array(ends, np.int32), implementation=name)
    for row, level in zip(scores, np.asarray(found), strict=True):
        places = np.empty(count, int)
        places[ranked(row)] = np.arange(count)
        assert level.tolist() == [sum(place < end for end in ends) for place in places]


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None)
@given(rows=rows, shares=st.lists(st.floats(0, 1), min_size=1, max_size=3))
def test_the_best_are_named_class_by_class(name, rows, shares):
    scores = np.array(rows, np.float32)
    ends = sorted(round(share * scores.shape[1]) for share in shares)
    found = np.asarray(best(scores, ends=tuple(ends), implementation=name))
    assert found.shape == (len(scores), ends[-1])
    for row, ids in zip(scores, found, strict=True):
        order = ranked(row)
        for begin, end in zip([0, *ends], ends):
            assert set(ids[begin:end]) == set(order[begin:end])
