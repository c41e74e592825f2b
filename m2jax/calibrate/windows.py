"""One layer on one window of calibration text, at 16 bits or under any mix.

Pure functions. A window is a whole sequence of at most one block, so no KV cache
outlives a layer; class sizes are values, not shapes, so one program serves every mix.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from m2jax import model
from m2jax.calibrate.levels import BITS, NEEDS
from m2jax.config import ModelConfig
from m2jax.ffn import (
    ACTIVATIONS,
    BasePass,
    base_pass,
    base_scores,
    class_sum,
    pad_width,
)
from m2jax.ffn_spec import FfnSpec
from m2jax.kernels.linear import widen
from m2jax.kernels.sparse_swiglu import accumulate, project
from m2jax.kv import LayerKV
from m2jax.layer import LayerParams
from m2jax.lowrank import predict
from m2jax.ranking import Scores, classes_of

# "magnitude" is base without its errors: one score for all, as in the paper; "oracle"
# is that by the 16-bit weights; "random" is the floor of any scorer.
RANKERS = ("base", "magnitude", "gate", "lowrank", "oracle", "random", "none")


class Activations(NamedTuple):
    """A layer's feed-forward block at 16 bits on a window of T tokens.

    h: [T, D] normalised input. importance: [T, F] |h16| ||down16||, zero where the
    activation is. base, gate: [T, F] scores of the 4-bit plane, for who is kept;
    precise: [T, F] base scores for who gets more bits. ahead: the base scores that the
    inputs of 1, 2, .. layers before give.
    """

    h: Array | np.ndarray
    importance: Array | np.ndarray
    base: Array | np.ndarray
    gate: Array | np.ndarray
    precise: Array | np.ndarray
    ahead: tuple[Array | np.ndarray, ...] = ()


def down_norms(w16: Array, *, width: int) -> Array:
    """L2 norms of the original down columns: [N, R] -> [N] float32."""
    return jnp.sqrt(jnp.sum(jnp.square(widen(w16[:, 2 * width :])), axis=1))


def attend_window(
    params: LayerParams, x: Array, *, config: ModelConfig
) -> tuple[Array, Array]:
    """Attention over a whole sequence [T, D]: residual stream, normalised input."""
    shape = (config.num_kv_heads, x.shape[0], config.head_dim)
    empty = LayerKV(jnp.zeros(shape, jnp.float32), jnp.zeros(shape, jnp.float32))
    x, h, _ = model.attend(
        params.attention, x, empty, jnp.int32(0), params.window, config=config
    )
    return x, h


def exact_layer(
    params: LayerParams,
    w16: Array,
    x: Array,
    *,
    config: ModelConfig,
    spec: FfnSpec,
) -> Array:
    """A layer at 16 bits: [T, D] -> [T, D]."""
    x, h = attend_window(params, x, config=config)
    h = pad_width(h, spec=spec)
    gate, up = project(h, w16, None, plane="w16")
    h16 = ACTIVATIONS[spec.activation](gate) * up
    return x + accumulate(h16, w16, None, plane="w16")[:, : spec.hidden_size]


def observed_layer(
    params: LayerParams,
    planes: dict[str, Array],
    norms: Array,
    x: Array,
    *,
    config: ModelConfig,
    spec: FfnSpec,
) -> tuple[Array, Activations]:
    """`exact_layer`, and what calibration wants to see of it."""
    x, h = attend_window(params, x, config=config)
    wide = pad_width(h, spec=spec)
    gate, up = project(wide, planes["w16"], None, plane="w16")
    h16 = ACTIVATIONS[spec.activation](gate) * up
    base = base_pass(h, planes["q4"], params.scales, spec=spec)
    scores = _score("base", base, h, params, spec)
    seen = Activations(
        h=h,
        importance=(jnp.abs(h16) * norms[None, :])[:, : spec.neurons],
        base=scores.kept,
        gate=_score("gate", base, h, params, spec).kept,
        precise=jnp.asarray(scores.precise),
    )
    y = accumulate(h16, planes["w16"], None, plane="w16")[:, : spec.hidden_size]
    return x + y, seen


def _score(
    kind: str, base: BasePass, h: Array, params: LayerParams, spec: FfnSpec
) -> Scores:
    found = base_scores(base, h, params.norms, spec=replace(spec, scorer=kind))
    return found.of_neurons(spec.neurons)


def ahead_scores(params: LayerParams, q4: Array, h: Array, *, spec: FfnSpec) -> Array:
    """Base scores [T, F] of a layer's neurons for the input [T, D] of one before it."""
    base = base_pass(h, q4, params.scales, spec=spec)
    return _score("base", base, h, params, spec).kept


def check_classes(counts: Sequence[int], planes: Collection[str]) -> None:
    """Refuses classes whose planes are missing: they would be computed as nothing.

    Args:
        counts: neurons at 16, 8 and 4 bits.

    Raises:
        ValueError: names the class and the plane.
    """
    for bits, count in zip(BITS, counts, strict=True):
        missing = NEEDS[bits].difference(planes)
        if count and missing:
            raise ValueError(
                f"{count} neurons at {bits} bits want plane {', '.join(missing)}, and "
                f"there is only {', '.join(planes)}: want a mix without that class"
            )


def mixed_layer(
    params: LayerParams,
    planes: dict[str, Array],
    norms: Array | None,
    x: Array,
    before: Array | None,
    edges: Array,
    *,
    config: ModelConfig,
    spec: FfnSpec,
    ranker: str,
) -> tuple[Array, Array]:
    """A layer under any mix: [T, D] -> [T, D], and its normalised input.

    Args: see `mixed_feed_forward`.
    """
    x, h = attend_window(params, x, config=config)
    y = mixed_feed_forward(
        params, planes, norms, h, before, edges, spec=spec, ranker=ranker
    )
    return x + y, h


def mixed_feed_forward(
    params: LayerParams,
    planes: dict[str, Array],
    norms: Array | None,
    h: Array,
    before: Array | None,
    edges: Array,
    *,
    spec: FfnSpec,
    ranker: str,
) -> Array:
    """The feed-forward block under any mix: [T, D] -> [T, D].

    Args:
        planes: those that the classes need (`check_classes`: class sizes are values,
            so it is not seen here), and q4 or w16 where the ranker does.
        norms: of `down_norms`, for the oracle.
        before: input of the layer before, where a predictor looks ahead.
        edges: int32 [3]: neurons with 16 bits, with at least 8, with at least 4.
        ranker: one of RANKERS.
    """
    base = None
    if "q4" in planes:
        base = base_pass(h, planes["q4"], params.scales, spec=spec)
    neurons = spec.neurons
    if ranker == "none":
        scores = Scores(-jnp.arange(neurons, dtype=jnp.float32)[None, :])
    elif ranker in ("base", "gate", "magnitude"):
        assert base is not None
        kind = "gate" if ranker == "gate" else "base"
        scores = _score(kind, base, h, params, spec)
        if ranker == "magnitude":
            scores = Scores(scores.kept)
    elif ranker == "lowrank":
        assert params.predictor is not None
        scores = Scores(predict(params.predictor, h if before is None else before))
    elif ranker == "oracle":
        assert norms is not None
        gate, up = project(pad_width(h, spec=spec), planes["w16"], None, plane="w16")
        h16 = ACTIVATIONS[spec.activation](gate) * up
        scores = Scores(jnp.abs(h16) * norms[None, :])
    else:
        scores = Scores(jax.random.uniform(jax.random.key(0), (h.shape[0], neurons)))
    bits = classes_of(scores.of_neurons(neurons), edges)
    bits = jnp.pad(bits, [(0, 0), (0, params.scales.shape[0] - neurons)])
    return class_sum(h, base, bits, planes, params.scales, spec=spec)


class Compiled(NamedTuple):
    """The layer functions, jitted for one model."""

    exact: Callable
    observed: Callable
    mixed: Callable
    ahead: Callable


@lru_cache(maxsize=4)
def compiled(config: ModelConfig, spec: FfnSpec) -> Compiled:
    bound = {"config": config, "spec": spec}
    return Compiled(
        exact=jax.jit(partial(exact_layer, **bound)),
        observed=jax.jit(partial(observed_layer, **bound)),
        mixed=jax.jit(partial(mixed_layer, **bound), static_argnames="ranker"),
        ahead=jax.jit(partial(ahead_scores, spec=spec)),
    )
