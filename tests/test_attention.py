"""Attention over a layer's keys and values, by every implementation, against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m2jax.kernels import attention
from tests.test_model import ROUNDING, normal

# "xla_blocked" is "xla" here.
NAMES = ("xla", "cpu_ffi")
EVERYTHING = 1 << 30


def attend(q, keys, values, positions, window, name=None) -> np.ndarray:
    given = jax.jit(attention.attend, static_argnames="implementation")(
        *map(jnp.asarray, (q, keys, values)),
        jnp.asarray(positions, jnp.int32),
        jnp.int32(window),
        implementation=name,
    )
    return np.asarray(given)


def wanted(q, keys, values, positions, window) -> np.ndarray:
    tokens, heads, width = q.shape
    found = np.empty((tokens, heads, width))
    for t, position in enumerate(positions):
        seen = slice(max(0, position - window + 1), position + 1)
        for head in range(heads):
            group = head * len(keys) // heads
            score = keys[group, seen].astype(float) @ q[t, head] / np.sqrt(width)
            share = np.exp(score - score.max())
            found[t, head] = share @ values[group, seen] / share.sum()
    return found


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("window", [1, 8, 150, EVERYTHING])
@pytest.mark.parametrize(
    ("tokens", "start", "capacity", "heads", "groups", "width"),
    [
        *((5, start, 32, 6, 2, 8) for start in (0, 11)),
        # One token, over one span of keys, several, the end of one, a full buffer.
        *((1, start, 512, 4, 4, 64) for start in (0, 127, 128, 300, 511)),
        # Widths that fill no register, or some and a rest; one group for all heads.
        *((3, 200, 256, 5, 1, width) for width in (4, 20, 72, 128)),
        # As many heads as groups; the most of a few, at the buffer's end.
        *((tokens, 280 - tokens, 280, 4, 4, 16) for tokens in (2, 4, 16, 63)),
        # Tiles of queries and keys: one, several and a rest, an odd buffer, its end.
        *((64, 0, 64, 6, 2, 8), (256, 0, 512, 6, 2, 8)),
        *((150, 130, 300, 6, 2, 8), (100, 211, 311, 6, 2, 8)),
    ],
)
def test_a_query_sees_itself_and_the_positions_of_its_window_before_it(
    tokens, start, capacity, heads, groups, width, window, name
):
    q = normal(tokens, heads, width, seed=0)
    keys = normal(groups, capacity, width, seed=1)
    values = normal(groups, capacity, width, seed=2)
    # What lies beyond the last query must not matter.
    keys[:, start + tokens :], values[:, start + tokens :] = 50, 1e6
    positions = start + np.arange(tokens)
    # A block is no few tokens: the default has what stands in.
    form = name if tokens < 64 else None
    given = attend(q, keys, values, positions, window, form)
    differ = given - wanted(q, keys, values, positions, window)
    assert np.abs(differ).max() < ROUNDING


def test_who_asks_for_the_cpp_kernel_at_a_block_is_refused():
    q, keys = normal(64, 2, 8, seed=0), normal(2, 64, 8, seed=1)
    with pytest.raises(
        NotImplementedError, match="takes up to 63 tokens, not 64; name"
    ):
        attend(q, keys, keys, np.arange(64), EVERYTHING, "cpu_ffi")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [1e-4, 30.0, 300.0])
def test_scores_of_every_size_make_shares(name, size):
    q, keys = size * normal(1, 4, 32, seed=0), normal(2, 300, 32, seed=1)
    values = normal(2, 300, 32, seed=2)
    given = attend(q, keys, values, [290], EVERYTHING, name)
    # Scores near 1000 are rounded to 6e-5.
    rounding = ROUNDING * max(1.0, size)
    assert np.abs(given - wanted(q, keys, values, [290], 300)).max() < rounding


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("place", [3, 200])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("where", ["q", "keys", "values"])
def test_what_is_no_number_shows(name, where, bad, place):
    arrays = {
        "q": normal(1, 2, 32, seed=0),
        "keys": normal(2, 256, 32, seed=1),
        "values": normal(2, 256, 32, seed=2),
    }
    if where == "q":
        arrays["q"][0, 0, 5] = bad
    else:
        # Along the query: a score of infinity; one of minus infinity is no weight.
        arrays[where][0, place, 5] = bad * np.sign(arrays["q"][0, 0, 5])
    given = attend(**arrays, positions=[220], window=EVERYTHING, name=name)
    assert not np.isfinite(given[0, 0]).all()
    assert np.isfinite(given[0, 1]).all()


def test_a_token_alone_and_in_a_block_and_in_a_longer_buffer_are_the_same():
    """By the C++ kernel, to the last bit."""
    tokens, start = 16, 250
    q = normal(tokens, 6, 64, seed=0)
    keys, values = (normal(2, 512, 64, seed=seed) for seed in (1, 2))
    positions = start + np.arange(tokens)
    for window in (40, 200, EVERYTHING):
        block = attend(q, keys, values, positions, window, "cpu_ffi")
        short = [array[:, : start + tokens] for array in (keys, values)]
        for t in range(tokens):
            one = attend(q[t : t + 1], *short, positions[t : t + 1], window, "cpu_ffi")
            assert np.array_equal(one[0], block[t])
