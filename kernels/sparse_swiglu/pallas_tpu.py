"""Both products by a Pallas kernel for TPUs, for up to MOST_TOKENS tokens.

A step of the grid reads a block of records, widens it to float32 and multiplies. Where
`slots` pick records, a block is PICKED of them, one operand each, whose place comes
from the prefetched slots. Any other backend interprets the kernel, slowly; which of
the two it is, is settled when the program is lowered.

It takes no more tokens, which are a matrix product, no W above MOST_WIDTH, whose blocks
do not fit, and no rows that are not whole lanes: W must be a multiple of 256 for q4 and
r4, of 128 for w16. A copy with padding would cost what the reference costs.

Never run on a TPU: interpreted, and compiled for one. There whole planes are read where
they lie, float16 apart, but XLA first copies a pool that slots pick from, as
[S, 3, R / 384, 128]: a record of [S, R] is a row of a tile and cannot be read alone.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

MOST_TOKENS = 64
MOST_WIDTH = 8192
LANES = 128
# Rows of a tile of bytes.
TILE_ROWS = 32
# Picked records of a block.
PICKED = 16
# W times the whole records of a block: what is widened must fit a core's 16 MiB.
BLOCK_VALUES = 1 << 18
# What a code counts in its group's scale.
STEPS = {"q4": 16, "r4": 1}


def project_tpu(
    x: Array,
    records: Array,
    scales: Array | None,
    *,
    plane: str,
    slots: Array | None,
    ids: Array | None,
) -> tuple[Array, Array]:
    options = {"plane": plane, "slots": slots, "ids": ids}
    rows = records.shape[0] if slots is None else slots.shape[0]
    if 0 in (rows, x.shape[0]):
        return (jnp.zeros((x.shape[0], rows), jnp.float32),) * 2
    both = _product(_project_step, slice(0, 2), x, records, scales, rows, **options)
    both = both.transpose(1, 2, 0, 3).reshape(2, x.shape[0], -1)[..., :rows]
    return both[0], both[1]


def accumulate_tpu(
    h: Array,
    records: Array,
    scales: Array | None,
    *,
    plane: str,
    slots: Array | None,
    ids: Array | None,
) -> Array:
    options = {"plane": plane, "slots": slots, "ids": ids}
    if 0 in h.shape:
        return jnp.zeros((h.shape[0], _width(records, scales)), jnp.float32)
    rows = h.shape[1]
    return _product(_accumulate_step, slice(2, 3), h, records, scales, rows, **options)


def _width(records: Array, scales: Array | None) -> int:
    return records.shape[1] // 3 * (1 if scales is None else 2)


def why_not_tpu(tokens: int, records: Array, scales: Array | None) -> str | None:
    """What the kernel takes instead of these; None where it takes them."""
    width = _width(records, scales)
    if tokens > MOST_TOKENS:
        return f"takes up to {MOST_TOKENS} tokens, not {tokens}"
    if width > MOST_WIDTH:
        return f"takes W up to {MOST_WIDTH}, not {width}"
    if records.shape[1] % (3 * LANES):
        step = LANES if scales is None else 2 * LANES
        return f"takes W that is a multiple of {step}, not {width}"
    if scales is not None and LANES % (width // scales.shape[2]):
        group = width // scales.shape[2]
        return f"takes groups that divide {LANES}, not of {group}"
    return None


def _product(
    step: Callable,
    part: slice,
    x: Array,
    records: Array,
    scales: Array | None,
    rows: int,
    *,
    plane: str,
    slots: Array | None,
    ids: Array | None,
) -> Array:
    """All that is around the kernel `step`, which takes `part` of gate, up, down.

    Returns:
        [blocks, 2, T, B] for gate and up, [T, W] for down.
    """
    tokens, width = x.shape[0], _width(records, scales)
    records = jnp.asarray(records)
    kind = str(records.dtype) if scales is None else "codes"
    if kind == "float16":  # Mosaic has none.
        records = lax.bitcast_convert_type(records, jnp.uint16)
    parts = part.stop - part.start
    at = part.start // parts  # in blocks
    if slots is None:
        most = BLOCK_VALUES // width // TILE_ROWS * TILE_ROWS
        block = min(rows, max(TILE_ROWS, most))
        slots = jnp.zeros(1, jnp.int32)  # Mosaic takes no empty array.
        operands = [records]
        size = (block, parts * records.shape[1] // 3)
        specs = [pl.BlockSpec(size, lambda k, _: (k, at))]
    else:
        block = PICKED
        slots = jnp.clip(jnp.asarray(slots), 0, records.shape[0] - 1)
        slots = jnp.pad(slots, (0, -rows % block))
        operands = [records.reshape(records.shape[0], 3, -1, LANES)] * block
        size = (None, parts, *operands[0].shape[2:])
        specs = [
            pl.BlockSpec(size, lambda k, slots, i=i: (slots[k * block + i], at, 0, 0))
            for i in range(block)
        ]
    blocks = pl.cdiv(rows, block)
    if scales is not None:
        scales = scales if ids is None else scales[ids]
        scales = scales[:, part].reshape(rows, -1).astype(jnp.float32) * STEPS[plane]
        operands.append(scales)
        specs.append(pl.BlockSpec((block, scales.shape[1]), lambda k, _: (k, 0)))
    if step is _project_step:
        x_spec = pl.BlockSpec((tokens, width), lambda k, _: (0, 0))
        shape = (blocks, parts, tokens, block)
        out_spec = pl.BlockSpec((None, *shape[1:]), lambda k, _: (k, 0, 0, 0))
    else:
        x = jnp.pad(x, [(0, 0), (0, -rows % block)])
        x = x.reshape(tokens, blocks, block).swapaxes(0, 1)
        x_spec = pl.BlockSpec((None, tokens, block), lambda k, _: (k, 0, 0))
        shape = (tokens, width)
        out_spec = pl.BlockSpec(shape, lambda k, _: (0, 0))
    call = partial(
        pl.pallas_call,
        partial(step, kind=kind, rows=rows),
        jax.ShapeDtypeStruct(shape, jnp.float32),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(blocks,),
            in_specs=[x_spec, *specs],
            out_specs=out_spec,
        ),
    )
    return lax.platform_dependent(
        slots, x, *operands, tpu=call(), default=call(interpret=True)
    )


def _project_step(_, x_ref, *refs, kind: str, rows: int):
    *refs, out_ref = refs
    for row, pieces in enumerate(_widened(refs, kind, parts=2)):
        each = pieces[0].shape[1]
        out_ref[row] = sum(
            _dot(x_ref[:, i * each : (i + 1) * each], piece, contract=1)
            for i, piece in enumerate(pieces)
        )


def _accumulate_step(_, h_ref, *refs, kind: str, rows: int):
    *refs, y_ref = refs
    step = pl.program_id(0)

    @pl.when(step == 0)
    def _():
        y_ref[...] = jnp.zeros_like(y_ref)

    (pieces,) = _widened(refs, kind, parts=1)
    block, each = pieces[0].shape
    row = step * block + lax.broadcasted_iota(jnp.int32, (block, 1), 0)
    for i, piece in enumerate(pieces):
        # What lies beyond the last row may be NaN, which zeros in h do not hide.
        piece = jnp.where(row < rows, piece, 0)
        y_ref[:, i * each : (i + 1) * each] += _dot(h_ref[...], piece, contract=0)


def _dot(x: Array, w: Array, *, contract: int) -> Array:
    """x @ w.T (contract 1) or x @ w (contract 0), as exact as float32."""
    dimensions = (((1,), (contract,)), ((), ()))
    return lax.dot_general(x, w, dimensions, precision=lax.Precision.HIGHEST)


def _widened(refs, kind: str, *, parts: int) -> list[list[Array]]:
    """For each part its rows in float32: two halves of codes or all numbers, [B, _]."""
    *stored, scale_ref = refs if kind == "codes" else (*refs, None)
    stored = [_integers(ref[...]) for ref in stored]
    rows = stored[0]
    if rows.ndim > 2:
        rows = jnp.stack(stored).reshape(len(stored), -1)
    cut = jnp.split(rows, parts, axis=1)
    if scale_ref is None:
        return [[_numbers(bits, kind)] for bits in cut]
    scales = jnp.split(scale_ref[...], 2 * parts, axis=1)
    return [
        [
            (nibbles - 8).astype(jnp.float32) * _spread(scales[at], codes.shape[1])
            for at, nibbles in ((2 * part, codes & 15), (2 * part + 1, codes >> 4))
        ]
        for part, codes in enumerate(cut)
    ]


def _integers(stored: Array) -> Array:
    return stored if stored.dtype == jnp.float32 else stored.astype(jnp.int32)


def _spread(scales: Array, columns: int) -> Array:
    """[B, groups] -> [B, columns], each scale over its group, tile by tile."""
    rows, groups = scales.shape
    group = columns // groups  # divides LANES
    each = jnp.split(scales, groups, axis=1)
    lane = lax.broadcasted_iota(jnp.int32, (rows, LANES), 1)
    tiles = []
    for first in range(0, groups, LANES // group):
        tile = jnp.broadcast_to(each[first], (rows, LANES))
        for i in range(1, LANES // group):
            tile = jnp.where(lane >= i * group, each[first + i], tile)
        tiles.append(tile)
    return jnp.concatenate(tiles, axis=1)


def _numbers(bits: Array, kind: str) -> Array:
    """w16 in float32: float32 as it is, others from their bits as int32."""
    if kind == "float32":
        return bits
    if kind == "uint16":
        return lax.bitcast_convert_type(bits << 16, jnp.float32)
    size = bits & 0x7FFF
    # Exponents of 5 bits to 8; the last one means no number.
    exponents = jnp.where(size < 0x7C00, 112 << 23, 224 << 23)
    value = lax.bitcast_convert_type((size << 13) + exponents, jnp.float32)
    # By value: a TPU takes the smallest float32 for zero.
    value = jnp.where(size < 0x400, size.astype(jnp.float32) * 2.0**-24, value)
    return jnp.where(bits < 0x8000, value, -value)
