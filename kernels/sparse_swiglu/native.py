"""Both products by the C++ kernels, for one token or a few (`kernels/native`)."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from m2jax.kernels.native import MOST_TOKENS, STEPS, call
from m2jax.kernels.sparse_swiglu import reference
from m2jax.kernels.sparse_swiglu.activation import ACTIVATIONS


def _ids(ids: Array | None) -> Array:
    """None, the records as they lie, is no id."""
    return jnp.zeros(0, jnp.int32) if ids is None else ids


def _rows(records: Array, slots: Array | None) -> int:
    return records.shape[0] if slots is None else slots.shape[0]


def project_native(
    x: Array,
    records: Array,
    scales: Array | None,
    *,
    plane: str,
    slots: Array | None,
    ids: Array | None,
) -> tuple[Array, Array]:
    if x.shape[0] > MOST_TOKENS:
        picked = reference.picked(records, scales, slots, ids)
        return reference.project_blocked(x, *picked, plane=plane)
    rows = _rows(records, slots)
    if 0 in (rows, *x.shape):
        return (jnp.zeros((x.shape[0], rows), jnp.float32),) * 2
    shape = jax.ShapeDtypeStruct((2, x.shape[0], rows), jnp.float32)
    if scales is None:
        both = call("m2jax_project_numbers", shape, x, records, _ids(slots))
    else:
        arrays = (x, records, scales, _ids(slots), _ids(ids))
        both = call("m2jax_project_nibbles", shape, *arrays, step=STEPS[plane])
    return both[0], both[1]


def accumulate_native(
    h: Array,
    records: Array,
    scales: Array | None,
    *,
    plane: str,
    slots: Array | None,
    ids: Array | None,
) -> Array:
    if h.shape[0] > MOST_TOKENS:
        picked = reference.picked(records, scales, slots, ids)
        return reference.accumulate_blocked(h, *picked, plane=plane)
    width = records.shape[1] // 3 * (1 if scales is None else 2)
    shape = jax.ShapeDtypeStruct((h.shape[0], width), jnp.float32)
    if 0 in h.shape:
        return jnp.zeros(shape.shape, shape.dtype)
    if scales is None:
        return call("m2jax_accumulate_numbers", shape, h, records, _ids(slots))
    arrays = (h, records, scales, _ids(slots), _ids(ids))
    return call("m2jax_accumulate_nibbles", shape, *arrays, step=STEPS[plane])


def whole_native(
    x: Array, planes: Mapping[str, Array], scales: Array, *, activation: str
) -> Array:
    """One token, planes q4 and maybe r4."""
    shape = jax.ShapeDtypeStruct(x.shape, jnp.float32)
    q4 = planes["q4"]
    r4 = planes.get("r4", jnp.zeros((0, q4.shape[1]), jnp.uint8))
    kind = np.int64(list(ACTIVATIONS).index(activation))
    return call("m2jax_swiglu_nibbles", shape, x, q4, r4, scales, activation=kind)
