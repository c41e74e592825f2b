"""A piece of text on its way through the layers, in blocks, from whole planes."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import jax
import numpy as np
from jax import Array

from m2jax.ffn_spec import FfnSpec
from m2jax.kv import LayerKV, block_sizes
from m2jax.layer import LayerParams
from m2jax.model import Bank
from m2jax.steps import Steps


@dataclass
class Passage:
    """State of one prompt between two layers.

    specs: one a layer. starts: position of each block. xs: residual stream of each
    block, [t, D]. before: input of the feed-forward block of the layer before, [t, D],
    where predictors look ahead.
    """

    steps: Steps
    specs: Sequence[FfnSpec]
    starts: list[Array]
    kv: list[LayerKV]
    xs: list[Array]
    before: list[Array | None]

    def through(
        self, layer: int, params: LayerParams, planes: dict[str, Array]
    ) -> None:
        """Takes all blocks through one layer, given its whole planes."""
        spec = self.specs[layer]
        used = {plane: planes[plane] for plane in spec.wanted}
        for block, start in enumerate(self.starts):
            self.xs[block], h, self.kv[layer] = self.steps.layer_block(
                params,
                used,
                self.xs[block],
                self.kv[layer],
                start,
                self.before[block],
                spec=spec,
            )
            # Layer 0 has none before it: it is ranked from its own input.
            if self.steps.lookahead:
                self.before[block] = h


def begin(
    ids: Sequence[int],
    steps: Steps,
    embed: Bank,
    kv: list[LayerKV],
    *,
    specs: Sequence[FfnSpec] | None = None,
    start: int = 0,
    sizes: Sequence[int] | None = None,
) -> Passage:
    """Embeds a prompt, padded to whole blocks.

    Args:
        kv: written in place (the list's entries are replaced).
        specs: one a layer; None = those of the steps.
        start: position of the first id.
        sizes: tokens of each block, together at least the ids; None = `block_sizes`.
    """
    sizes = block_sizes(len(ids)) if sizes is None else sizes
    padded = np.zeros(sum(sizes), np.int32)
    padded[: len(ids)] = ids
    bounds = [int(bound) for bound in np.cumsum([0, *sizes])]
    xs = [steps.embed(embed, padded[first:end]) for first, end in pairwise(bounds)]
    return Passage(
        steps,
        steps.specs if specs is None else specs,
        # On the device once: every layer asks for them.
        [jax.device_put(np.int32(start + bound)) for bound in bounds[:-1]],
        kv,
        xs,
        [None] * len(xs),
    )
