"""Both products in plain XLA: the oracle, and a form that widens tile by tile."""

from collections.abc import Callable, Mapping
from functools import wraps

import jax.numpy as jnp
from jax import Array, lax

from m2jax.kernels.linear.reference import exact_matmul, times_rows, widen
from m2jax.kernels.nibbles import nibble_values
from m2jax.kernels.tiles import tile_rows

# float32 values of a tile of `whole_blocked`, and its rows at least.
WHOLE_VALUES, MIN_WHOLE_ROWS = 1 << 22, 32


def picked(
    records: Array, scales: Array | None, slots: Array | None, ids: Array | None
) -> tuple[Array, Array | None]:
    """Copies of the records that take part, and of their scales."""
    if slots is not None:
        records = jnp.asarray(records)[slots]
    if ids is not None and scales is not None:
        scales = scales[ids]
    return records, scales


def of_picked(form):
    """A form of whole arrays that takes slots and ids too."""

    @wraps(form)
    def gathered(x, records, scales, *, plane, slots=None, ids=None):
        return form(x, *picked(records, scales, slots, ids), plane=plane)

    return gathered


def project_xla(
    x: Array, records: Array, scales: Array | None, *, plane: str
) -> tuple[Array, Array]:
    neurons, width = records.shape[0], x.shape[1]
    if scales is None:
        rows = widen(records[:, : 2 * width]).reshape(2 * neurons, width)
        both = times_rows(x, rows)
    else:
        half = width // 2
        packed = records[:, : 2 * half].reshape(neurons, 2, half)
        first, second = nibble_values(packed, scales[:, :2], plane=plane)
        both = times_rows(x[:, :half], first.reshape(-1, half))
        both = both + times_rows(x[:, half:], second.reshape(-1, half))
    both = both.reshape(x.shape[0], neurons, 2)
    return both[..., 0], both[..., 1]


def accumulate_xla(
    h: Array, records: Array, scales: Array | None, *, plane: str
) -> Array:
    if scales is None:
        width = records.shape[1] // 3
        return exact_matmul(h, widen(records[:, 2 * width :]))
    half = records.shape[1] // 3
    first, second = nibble_values(records[:, 2 * half :], scales[:, 2], plane=plane)
    return jnp.concatenate([exact_matmul(h, d) for d in (first, second)], axis=1)


def _tiled(array: Array | None, tile: int) -> Array | None:
    """[N, ...] as [tiles, tile, ...], the last tile filled up with zeros."""
    if array is None:
        return None
    missing = -array.shape[0] % tile
    if missing:
        array = jnp.pad(array, [(0, missing)] + [(0, 0)] * (array.ndim - 1))
    return array.reshape(-1, tile, *array.shape[1:])


def project_blocked(
    x: Array, records: Array, scales: Array | None, *, plane: str
) -> tuple[Array, Array]:
    neurons, tokens = records.shape[0], x.shape[0]
    tile = tile_rows(neurons, 2 * x.shape[1], tokens=tokens)
    if tile == neurons:
        return project_xla(x, records, scales, plane=plane)
    gate, up = lax.map(
        lambda block: project_xla(x, *block, plane=plane),
        (_tiled(records, tile), _tiled(scales, tile)),
    )
    gate = jnp.moveaxis(gate, 0, 1).reshape(tokens, -1)[:, :neurons]
    up = jnp.moveaxis(up, 0, 1).reshape(tokens, -1)[:, :neurons]
    return gate, up


def whole_blocked(
    x: Array, planes: Mapping[str, Array], scales: Array, activation: Callable
) -> Array:
    """The block from planes of codes: a tile of neurons is widened once, the sum of its
    planes, for both products."""
    tokens, width = x.shape
    neurons, half = next(iter(planes.values())).shape[0], width // 2
    tile = min(neurons, max(MIN_WHOLE_ROWS, WHOLE_VALUES // (3 * width)))

    def add(y: Array, block) -> tuple[Array, None]:
        records, tile_scales = block
        halves = [
            nibble_values(packed.reshape(tile, 3, half), tile_scales, plane=plane)
            for plane, packed in records.items()
        ]
        first, second = (sum(same[1:], start=same[0]) for same in zip(*halves))
        gate, up = (
            times_rows(x[:, :half], first[:, row])
            + times_rows(x[:, half:], second[:, row])
            for row in range(2)
        )
        h = activation(gate) * up
        down = [exact_matmul(h, values[:, 2]) for values in (first, second)]
        return y + jnp.concatenate(down, axis=1), None

    tiles = {plane: _tiled(records, tile) for plane, records in planes.items()}
    y = jnp.zeros((tokens, width), jnp.float32)
    return lax.scan(add, y, (tiles, _tiled(scales, tile)))[0]


def accumulate_blocked(
    h: Array, records: Array, scales: Array | None, *, plane: str
) -> Array:
    neurons = records.shape[0]
    width = records.shape[1] // 3 * (1 if scales is None else 2)
    tile = tile_rows(neurons, width, tokens=h.shape[0])
    if tile == neurons:
        return accumulate_xla(h, records, scales, plane=plane)

    def add(y: Array, block) -> tuple[Array, None]:
        h_tile, records_tile, scales_tile = block
        part = accumulate_xla(h_tile.T, records_tile, scales_tile, plane=plane)
        return y + part, None

    y, _ = lax.scan(
        add,
        jnp.zeros((h.shape[0], width), jnp.float32),
        (_tiled(h.T, tile), _tiled(records, tile), _tiled(scales, tile)),
    )
    return y
