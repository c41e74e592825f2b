"""From scores to precision classes: who is computed at how many bits.

Pure functions over arrays; what the scores come from is not known here.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from m2jax.ffn_spec import FfnSpec
from m2jax.kernels.selection import best, levels


class ClassIds(NamedTuple):
    """Neuron ids of each precision class, int32 [k16], [k8], [k4].

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
    """Ranked ids [kept], class by class, cut into classes."""
    k16, k8, _ = spec.ranked_counts
    return ClassIds(*jnp.split(ids, [k16, k16 + k8]))


def rank(scores: Scores, *, spec: FfnSpec) -> Array:
    """Ids of the neurons in `spec.ranked_counts`, class by class: int32 [T, their sum].

    Ties go to the lower id.
    """
    kept, precise = scores.of_neurons(spec.neurons)
    ends = np.cumsum(spec.ranked_counts).tolist()
    if precise is None or sum(count > 0 for count in spec.counts) == 1:
        return best(kept, ends)
    if spec.skips:
        among = levels(kept, jnp.array([spec.counts.kept], jnp.int32)) > 0
        precise = jnp.where(among, precise, -1)
    return best(precise, ends)


def classes_of(scores: Scores, edges: Array) -> Array:
    """Bits of each neuron, by rank: scores [T, F] -> int32 [T, F] of 16, 8, 4, 0.

    The classes that `rank` gives, ties to the lower id. Sizes are values, not shapes.

    Args:
        edges: int32 [3]: neurons with 16 bits, with at least 8, with at least 4.
    """
    if scores.precise is None:
        return jnp.array([0, 4, 8, 16])[levels(scores.kept, edges)]
    kept = lax.cond(
        edges[2] < scores.kept.shape[1],
        lambda: levels(scores.kept, edges[2:]) > 0,
        lambda: jnp.ones(scores.kept.shape, bool),
    )
    better = levels(jnp.where(kept, scores.precise, -1), edges[:2])
    return jnp.where(kept, jnp.array([4, 8, 16])[better], 0)
