"""From scores to precision classes: who is computed at how many bits.

Pure functions over arrays; what the scores come from is not known here.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from m2jax.ffn_spec import FfnSpec


class ClassIds(NamedTuple):
    """Neuron ids of each precision class, int32 [k16], [k8], [k4], best first.

    of4 is empty where it is whoever is not named (`FfnSpec.ranked_counts`).
    """

    of16: Array
    of8: Array
    of4: Array

    def by_plane(self, plane: str) -> Array:
        """Whose records of a plane are wanted, where not all are."""
        if plane == "q4":
            return jnp.concatenate([self.of8, self.of4])
        return self.of16 if plane == "w16" else self.of8


def split_classes(ids: Array, *, spec: FfnSpec) -> ClassIds:
    """Ranked ids [kept], best first, cut into classes."""
    k16, k8, _ = spec.ranked_counts
    return ClassIds(*jnp.split(ids, [k16, k16 + k8]))


def rank(scores: Array, *, spec: FfnSpec) -> Array:
    """Ids of the neurons in `spec.ranked_counts`, best first: int32 [T, their sum].

    Ties go to the lower id.
    """
    return lax.top_k(scores[:, : spec.neurons], spec.ranked_counts.kept)[1]


def classes_of(scores: Array, edges: Array) -> Array:
    """Bits of each neuron, by rank: [T, F] scores -> int32 [T, F] of 16, 8, 4, 0.

    The classes that `rank` gives, ties to the lower id. Sizes are values, not shapes,
    and XLA:CPU sorts integer keys faster than it ranks floats (4 ms against 8 for
    half of 256 x 704).

    Args:
        edges: int32 [3]: neurons with 16 bits, with at least 8, with at least 4.
    """
    raw = lax.bitcast_convert_type(scores, jnp.int32)
    # Order of the floats as order of integers; -0 is 0.
    keys = jnp.where(scores == 0, 0, raw ^ ((raw >> 31) & 0x7FFFFFFF))
    ordered = jnp.sort(keys, axis=1)
    neurons = scores.shape[1]

    def best(count: Array) -> Array:
        place = jnp.clip(neurons - count, 0, neurons - 1)
        least = lax.dynamic_slice_in_dim(ordered, place, 1, axis=1)
        above, level = keys > least, keys == least
        room = count - jnp.sum(above, axis=1, keepdims=True)
        return above | (level & (jnp.cumsum(level, axis=1) <= room))

    bits = jnp.where(best(edges[2]), 4, 0)
    bits = jnp.where(best(edges[1]), 8, bits)
    return jnp.where(best(edges[0]), 16, bits)
