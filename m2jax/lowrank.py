"""The `lowrank` scorer: two thin matrices that guess which neurons a token wants.

Knows neither how they are trained (`calibrate.fit`) nor where they lie.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from m2jax.kernels.linear import linear

# A rank of D / 8 costs 5.7 % of the 16-bit FFN bytes at F = 2.75 D, half of the
# published 1024 at D = 4096.
HIDDEN_PER_RANK = 8
RANK_MULTIPLE = 8


class Predictor(NamedTuple):
    """One layer's scorer. a: [r, D] float16; b: [F, r] float16."""

    a: Array | np.ndarray
    b: Array | np.ndarray


def predict(predictor: Predictor, x: Array) -> Array:
    """Scores of all neurons; only their order means anything.

        score[t, i] = sum_j b[i, j] (sum_d a[j, d] x[t, d])

    Args:
        x: [T, D] float32, the normalised FFN input of the layer it was trained with.

    Returns:
        [T, F] float32, accumulated in float32; may be negative.

    Source: Deja Vu, arXiv:2310.17157; M2Cache, arXiv:2410.14740, section 5.2.
    """
    inner = linear(x, jnp.asarray(predictor.a))
    return linear(inner, jnp.asarray(predictor.b))


def default_rank(hidden: int, neurons: int) -> int:
    """Rank of a layer's predictor unless one is asked for.

    D / 8, in whole multiples of 8, at least 8 and at most min(D, F).

    Args:
        hidden: D. neurons: F, without padding.
    """
    wanted = round(hidden / HIDDEN_PER_RANK / RANK_MULTIPLE) * RANK_MULTIPLE
    return min(max(wanted, RANK_MULTIPLE), hidden, neurons)
