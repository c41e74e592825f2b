"""Who scores best, by every implementation, against NumPy's stable sort."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m2jax.kernels import selection

NAMES = sorted(selection.BEST)
# Few values, so that there are ties. XLA takes subnormal numbers for 0.
few = st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.5, np.inf, -np.inf])
rows = st.integers(1, 40).flatmap(
    lambda count: st.lists(
        st.lists(
            few | st.floats(width=32, allow_nan=False, allow_subnormal=False),
            min_size=count,
            max_size=count,
        ),
        min_size=1,
        max_size=5,
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
    found = selection.levels(
        jnp.asarray(scores), jnp.array(ends, jnp.int32), implementation=name
    )
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
    found = np.asarray(selection.best(jnp.asarray(scores), ends, implementation=name))
    assert found.shape == (len(scores), ends[-1])
    for row, ids in zip(scores, found, strict=True):
        best = ranked(row)
        for begin, end in zip([0, *ends], ends):
            assert set(ids[begin:end]) == set(best[begin:end])
