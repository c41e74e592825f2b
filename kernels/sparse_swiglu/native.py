"""Both products by the C++ kernels (`kernels/native`)."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from m2jax.kernels import native
from m2jax.kernels.native import STEPS, are_few, call
from m2jax.kernels.sparse_swiglu.activation import ACTIVATIONS
from m2jax.kernels.sparse_swiglu.reference import picked

# Where a kernel could take a second plane, or be told what is wanted.
NO_RECORDS = np.zeros((0, 0), np.uint8)
ALL_WANTED = np.zeros((0, 0), bool)


def _ids(ids: Array | None) -> Array:
    """None, the records as they lie, is no id."""
    return jnp.zeros(0, jnp.int32) if ids is None else ids


def _kind(scales: Array | None) -> str:
    return "numbers" if scales is None else "codes"


def why_not(
    tokens: int, records: Array, scales: Array | None, *, down: bool
) -> str | None:
    return native.why_not(tokens, _kind(scales))


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
    wanted: Array | None = None,
) -> tuple[Array, Array]:
    rows = _rows(records, slots)
    if 0 in (rows, *x.shape):
        return (jnp.zeros((x.shape[0], rows), jnp.float32),) * 2
    if not are_few(x.shape[0], _kind(scales)):
        records, scales = picked(records, scales, slots, ids)
        return project_block(x, {plane: records}, scales)
    shape = jax.ShapeDtypeStruct((2, x.shape[0], rows), jnp.float32)
    flags = ALL_WANTED if wanted is None else wanted
    if scales is None:
        both = call("m2jax_project_numbers", shape, x, records, _ids(slots), flags)
    else:
        arrays = (x, records, NO_RECORDS, scales, _ids(slots), _ids(ids), flags)
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
    width = records.shape[1] // 3 * (1 if scales is None else 2)
    shape = jax.ShapeDtypeStruct((h.shape[0], width), jnp.float32)
    if 0 in h.shape:
        return jnp.zeros(shape.shape, shape.dtype)
    if not are_few(h.shape[0], _kind(scales)):
        records, scales = picked(records, scales, slots, ids)
        return accumulate_block(h, {plane: records}, scales)
    if scales is None:
        return call("m2jax_accumulate_numbers", shape, h, records, _ids(slots))
    arrays = (h, records, NO_RECORDS, scales, _ids(slots), _ids(ids))
    return call("m2jax_accumulate_nibbles", shape, *arrays, step=STEPS[plane])


def project_block(
    x: Array, planes: Mapping[str, Array], scales: Array | None
) -> tuple[Array, Array]:
    """For many tokens; planes: w16, r4, q4, or q4 and r4 whose weights add up."""
    rows = next(iter(planes.values())).shape[0]
    shape = jax.ShapeDtypeStruct((2, x.shape[0], rows), jnp.float32)
    both = _block("m2jax_project_block", shape, x, planes, scales)
    return both[0], both[1]


def accumulate_block(
    h: Array, planes: Mapping[str, Array], scales: Array | None
) -> Array:
    """For many tokens; planes: as for `project_block`."""
    plane, records = next(iter(planes.items()))
    width = records.shape[1] // 3 * (1 if plane == "w16" else 2)
    shape = jax.ShapeDtypeStruct((h.shape[0], width), jnp.float32)
    return _block("m2jax_accumulate_block", shape, h, planes, scales)


def _block(
    name: str,
    shape: jax.ShapeDtypeStruct,
    x: Array,
    planes: Mapping[str, Array],
    scales: Array | None,
) -> Array:
    if "w16" in planes:
        return call(f"{name}_numbers", shape, x, planes["w16"])
    (first, codes), *more = planes.items()
    residual = more[0][1] if more else NO_RECORDS
    return call(name, shape, x, codes, residual, scales, step=STEPS[first])


def whole_native(
    x: Array,
    planes: Mapping[str, Array],
    scales: Array | None,
    *,
    activation: str,
) -> Array | None:
    """The block in one; None where there is no such form."""
    if 0 in (*x.shape, *next(iter(planes.values())).shape):
        return None
    tokens, act = x.shape[0], ACTIVATIONS[activation]
    if not are_few(tokens, _kind(scales)):
        gate, up = project_block(x, planes, scales)
        return accumulate_block(act(gate) * up, planes, scales)
    if "q4" not in planes:
        return None
    q4 = planes["q4"]
    if tokens == 1:
        r4 = planes.get("r4", np.zeros((0, q4.shape[1]), np.uint8))
        shape = jax.ShapeDtypeStruct(x.shape, jnp.float32)
        kind = np.int64(list(ACTIVATIONS).index(activation))
        return call("m2jax_swiglu_nibbles", shape, x, q4, r4, scales, activation=kind)
    if "r4" not in planes:
        return None
    # A code of both planes is widened once.
    arrays = (q4, planes["r4"], scales, _ids(None), _ids(None))
    shape = jax.ShapeDtypeStruct((2, tokens, q4.shape[0]), jnp.float32)
    rows = (x, *arrays, ALL_WANTED)
    gate, up = call("m2jax_project_nibbles", shape, *rows, step=STEPS["q4"])
    shape = jax.ShapeDtypeStruct(x.shape, jnp.float32)
    h = act(gate) * up
    return call("m2jax_accumulate_nibbles", shape, h, *arrays, step=STEPS["q4"])
