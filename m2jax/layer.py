"""One decoder layer: attention, ranking, feed-forward; one token, or a block of them.

Pure functions. The host's loop and the device's run the very same ones.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from m2jax import model
from m2jax.config import ModelConfig
from m2jax.ffn import (
    BasePass,
    NeuronRows,
    Norms,
    base_pass,
    base_scores,
    feed_forward,
    feed_forward_block,
)
from m2jax.ffn_spec import FfnSpec
from m2jax.kv import LayerKV
from m2jax.lowrank import Predictor, predict
from m2jax.model import Bank
from m2jax.ranking import ClassIds, Scores, rank, split_classes


class LayerParams(NamedTuple):
    """What of a layer is always on the device.

    attention: see `params.layer_shapes`. scales: float16 [N, 3, groups]. down_norm,
    noise: see `ffn.Norms`. window: int32 scalar, positions a query sees. predictor:
    ranks this layer's neurons from its own input or, with lookahead, from that of the
    one before.
    """

    attention: Bank
    scales: Array
    down_norm: Array
    noise: Array
    window: Array
    predictor: Predictor | None = None

    @property
    def norms(self) -> Norms:
        return Norms(self.down_norm, self.noise)


class Attended(NamedTuple):
    """What attention and ranking hand to the feed-forward block of one token."""

    x: Array
    h: Array
    base: BasePass | None
    ids: ClassIds


def attend_and_rank(
    params: LayerParams,
    q4: Array | None,
    x: Array,
    kv: LayerKV,
    position: Array,
    ids: Array | None,
    following: Predictor | None,
    *,
    config: ModelConfig,
    spec: FfnSpec,
    following_spec: FfnSpec | None = None,
) -> tuple[Attended, LayerKV, Array | None]:
    """Attention of one token, then who of the layer's neurons is wanted.

    Args:
        q4: the whole plane, where `spec.base_whole`.
        ids: ranked ids, where the layer before has ranked them; else None.
        following, following_spec: of the next layer, if it is ranked here.

    Returns:
        The layer's state, its cache, and the next layer's ranked ids or None.
    """
    x, h, kv = model.attend(
        params.attention, x, kv, position, params.window, config=config
    )
    base = None
    if spec.base_whole and not spec.uniform:
        assert q4 is not None
        base = base_pass(h, q4, params.scales, spec=spec)
    if ids is None:
        ids = _ranked(params, h, base, spec=spec)
    after = None
    if following is not None and following_spec is not None:
        after = rank(Scores(predict(following, h)), spec=following_spec)[0]
    return Attended(x, h, base, split_classes(ids, spec=spec)), kv, after


def _ranked(
    params: LayerParams, h: Array, base: BasePass | None, *, spec: FfnSpec
) -> Array:
    """Ids of one token's neurons by class; in stored order where no one ranks."""
    if not spec.ranked:
        return jnp.arange(spec.ranked_counts.kept, dtype=jnp.int32)
    if spec.predicted:
        assert params.predictor is not None
        scores = Scores(predict(params.predictor, h))
    else:
        assert base is not None
        scores = base_scores(base, h, params.norms, spec=spec)
    return rank(scores, spec=spec)[0]


def add_feed_forward(
    params: LayerParams,
    attended: Attended,
    planes: dict[str, NeuronRows],
    *,
    spec: FfnSpec,
) -> Array:
    """Residual stream [1, D] after the layer."""
    x, h, base, ids = attended
    return x + feed_forward(h, base, ids, planes, params.scales, spec=spec)


def layer_block(
    params: LayerParams,
    planes: dict[str, Array],
    x: Array,
    kv: LayerKV,
    position: Array,
    before: Array | None,
    *,
    config: ModelConfig,
    spec: FfnSpec,
) -> tuple[Array, Array, LayerKV]:
    """A whole layer for T tokens [T, D] at `position`, from whole planes.

    Args:
        before: [T, D] input of the feed-forward block of the layer before, where that
            is what the predictor sees; else None.

    Returns:
        The residual stream, the feed-forward block's input, and the cache.
    """
    x, h, kv = model.attend(
        params.attention, x, kv, position, params.window, config=config
    )
    predicted = None
    if spec.predicted:
        assert params.predictor is not None
        predicted = predict(params.predictor, h if before is None else before)
    y = feed_forward_block(h, planes, params.scales, params.norms, predicted, spec=spec)
    return x + y, h, kv


def ranked_ahead(
    layers: list[LayerParams],
    specs: tuple[FfnSpec, ...],
    layer: int,
    *,
    lookahead: int,
) -> tuple[Predictor | None, FfnSpec | None]:
    """Predictor and spec of the layer after this one, if it is ranked here already."""
    if lookahead == 0 or layer + 1 == len(specs) or not specs[layer + 1].predicted:
        return None, None
    return layers[layer + 1].predictor, specs[layer + 1]
