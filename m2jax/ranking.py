"""From scores to precision classes: who is computed at how many bits.

Pure functions over arrays; what the scores come from is not known here.
"""

from collections.abc import Callable
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


class Scores(NamedTuple):
    """What ranks a layer's neurons, [T, F or more] each, larger first.

    kept: who is computed, where some are skipped. precise: who of them gets more bits,
    not negative; None = the same.
    """

    kept: Array
    precise: Array | None = None

    def of_neurons(self, count: int) -> "Scores":
        """Without padding."""
        precise = None if self.precise is None else self.precise[:, :count]
        return Scores(self.kept[:, :count], precise)


def split_classes(ids: Array, *, spec: FfnSpec) -> ClassIds:
    """Ranked ids [kept], best first, cut into classes."""
    k16, k8, _ = spec.ranked_counts
    return ClassIds(*jnp.split(ids, [k16, k16 + k8]))


def rank(scores: Scores, *, spec: FfnSpec) -> Array:
    """Ids of the neurons in `spec.ranked_counts`, class by class: int32 [T, their sum].

    Ties go to the lower id.
    """
    kept, precise = scores.of_neurons(spec.neurons)
    if precise is None or sum(count > 0 for count in spec.counts) == 1:
        return lax.top_k(kept, spec.ranked_counts.kept)[1]
    if spec.skips:
        chosen = lax.top_k(kept, spec.counts.kept)[1]
        tokens = jnp.arange(len(kept))[:, None]
        among = jnp.zeros(kept.shape, bool).at[tokens, chosen].set(True)
        precise = jnp.where(among, precise, -1)
    return lax.top_k(precise, spec.ranked_counts.kept)[1]


def classes_of(scores: Scores, edges: Array) -> Array:
    """Bits of each neuron, by rank: scores [T, F] -> int32 [T, F] of 16, 8, 4, 0.

    The classes that `rank` gives, ties to the lower id. Sizes are values, not shapes,
    and XLA:CPU sorts integer keys faster than it ranks floats (4 ms against 8 for
    half of 256 x 704).

    Args:
        edges: int32 [3]: neurons with 16 bits, with at least 8, with at least 4.
    """
    if scores.precise is None:
        best = _best_of(scores.kept)
        kept = best(edges[2])
    else:
        kept = lax.cond(
            edges[2] < scores.kept.shape[1],
            lambda: _best_of(scores.kept)(edges[2]),
            lambda: jnp.ones(scores.kept.shape, bool),
        )
        best = _best_of(jnp.where(kept, scores.precise, -1))
    bits = jnp.where(kept, 4, 0)
    bits = jnp.where(best(edges[1]), 8, bits)
    return jnp.where(best(edges[0]), 16, bits)


def _best_of(scores: Array) -> Callable[[Array], Array]:
    """From how many to who is among the best so many: int32 scalar -> bool [T, F]."""
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

    return best
