"""Both products by a Pallas Mosaic GPU kernel, for up to MOST_TOKENS tokens."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from m2jax.kernels.sparse_swiglu import reference

MOST_TOKENS = 16
WARPS, LANES = 4, 32
VECTOR = 8
COLUMN_VECTOR = 4
ROWS = 4
STEPS_OF = 2
BLOCKS = 528
DOWN_ROWS = 8
# What a code counts in its group's scale.
STEPS = {"q4": 16.0, "r4": 1.0}
# A float32 with this exponent has a step of 1.
ONES = 0x4B000000


def project_gpu(x, records, scales, *, plane, slots, ids):
    options = {"plane": plane, "slots": slots, "ids": ids}
    if not _serves(x.shape[0], records, scales):
        form = reference.of_picked(reference.project_xla)
        return form(x, records, scales, **options)
    rows = records.shape[0] if slots is None else slots.shape[0]
    tokens = x.shape[0]
    if 0 in (rows, tokens):
        return (jnp.zeros((tokens, rows), jnp.float32),) * 2
    width = _width(records, scales)
    halves = 1 if scales is None else 2
    each = width // halves
    group = each // scales.shape[2] * 2 if scales is not None else LANES * VECTOR
    vector = VECTOR
    shape = (WARPS, each // group // WARPS, group)
    operands = [x.reshape(tokens, halves, *shape)]
    operands.append(jnp.asarray(records).reshape(-1, 3, *shape))
    picked = _picked(operands, records, scales, slots, ids, rows, (halves, *shape[:2]))
    blocks = pl.cdiv(rows, ROWS * STEPS_OF)
    body = partial(
        _project_body, rows=rows, vector=vector, plane=plane, picked=picked
    )
    out = _call(body, (rows, 2, tokens, WARPS), (blocks,), operands)
    both = out.sum(-1).transpose(1, 2, 0)
    return both[0], both[1]


def accumulate_gpu(h, records, scales, *, plane, slots, ids):
    options = {"plane": plane, "slots": slots, "ids": ids}
    if not _serves(h.shape[0], records, scales):
        form = reference.of_picked(reference.accumulate_xla)
        return form(h, records, scales, **options)
    width = _width(records, scales)
    tokens, rows = h.shape
    if 0 in h.shape:
        return jnp.zeros((tokens, width), jnp.float32)
    halves = 1 if scales is None else 2
    each = width // halves
    vector = COLUMN_VECTOR
    group = each // scales.shape[2] * 2 if scales is not None else LANES * vector
    shape = (WARPS, LANES * vector // group, group)
    columns = each // (WARPS * LANES * vector)
    share = pl.cdiv(pl.cdiv(rows * columns, BLOCKS), DOWN_ROWS) * DOWN_ROWS
    splits = pl.cdiv(rows, share)
    operands = [jnp.pad(h, [(0, 0), (0, share * splits - rows)]).T]
    operands.append(jnp.asarray(records).reshape(-1, 3, columns, *shape))
    picked = _picked(
        operands, records, scales, slots, ids, rows, (halves, columns, *shape[:2])
    )
    body = partial(
        _accumulate_body,
        rows=rows,
        share=share,
        vector=vector,
        plane=plane,
        picked=picked,
        halves=halves,
    )
    out = _call(
        body, (splits, tokens, halves, columns, *shape), (columns, splits), operands
    )
    return out.sum(0).reshape(tokens, width)


def _picked(operands, records, scales, slots, ids, rows, scale_shape):
    picked = []
    if scales is not None:
        operands.append(jnp.asarray(scales).reshape(-1, 3, *scale_shape))
        picked.append("scales")
    if slots is not None:
        slots = jnp.asarray(slots, jnp.int32)
        operands.append(jnp.clip(slots, 0, records.shape[0] - 1))
        picked.append("slots")
        if scales is not None and ids is not None:
            ids = jnp.asarray(ids, jnp.int32)
            operands.append(jnp.clip(ids, 0, scales.shape[0] - 1))
            picked.append("ids")
    return tuple(picked)


def _call(body, out_shape, grid, operands):
    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(out_shape, jnp.float32),
        grid=grid,
        grid_names=("i", "j")[: len(grid)],
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            unsafe_no_auto_barriers=True,
        ),
    )(*operands)


def _width(records, scales):
    return records.shape[1] // 3 * (1 if scales is None else 2)


def _serves(tokens, records, scales):
    width = _width(records, scales)
    if tokens > MOST_TOKENS:
        return False
    if scales is None:
        return width % (WARPS * LANES * VECTOR) == 0
    group = width // scales.shape[2]
    if group not in (16, 32, 64, 128):
        return False
    return (width // 2) % (WARPS * LANES * VECTOR) == 0


def _layout(group: int, vector: int, axes: int = 3):
    """How [WARPS, _, group] values lie in a warpgroup, or what is left of them when
    the last axes are summed."""
    lanes = group // vector
    first, second = (WARPS, LANES // lanes, group), (1, 1, vector)
    layout = plgpu.Layout.TILED(
        plgpu.Tiling((first, second)), (-6,), (-5, -4), -1, _check_canonical=False
    ).to_mgpu()
    layout = layout.canonicalize()
    if axes < 3:
        layout = layout.reduce(range(axes, 3))
    return plgpu.Layout.TILED(
        layout.tiling, layout.warp_dims, layout.lane_dims, layout.vector_dim
    )


def _load(ref, layout):
    # What Mosaic calls optimized is for shared memory only.
    return plgpu.load(ref, layout=layout, optimized=False)


def _project_body(x_ref, records_ref, *refs, rows, vector, plane, picked):
    *refs, out_ref = refs
    refs = dict(zip(picked, refs))
    tokens, halves = x_ref.shape[:2]
    group = x_ref.shape[-1]
    layout = _layout(group, vector)
    first = lax.axis_index("i") * (ROWS * STEPS_OF)

    def load_x(t):
        return [_load(x_ref.at[t, i], layout) for i in range(halves)]

    alone = load_x(0) if tokens == 1 else None

    def step(i, _):
        at, stored, factors = [], [], []
        for row in range(ROWS):
            k = jnp.minimum(first + i * ROWS + row, rows - 1)
            slot = refs["slots"][k] if "slots" in refs else k
            at.append(k)
            for part in range(2):
                stored.append(_load(records_ref.at[slot, part], layout))
            if "scales" in refs:
                scale = refs["ids"][k] if "ids" in refs else k
                for part in range(2):
                    factors.append(
                        [
                            _load(
                                refs["scales"].at[scale, part, half],
                                _layout(group, vector, 2),
                            )
                            for half in range(2)
                        ]
                    )

        def token(t, _):
            xs = load_x(t) if alone is None else alone
            for n, bits in enumerate(stored):
                total = None
                for half, value in enumerate(_values(bits, halves)):
                    part = jnp.sum(xs[half] * value, axis=2)
                    if factors:
                        factor = factors[n][half].astype(jnp.float32)
                        part = part * (factor * _factor(plane, half))
                    total = part if total is None else total + part
                out_ref[at[n // 2], n % 2, t] = jnp.sum(total, axis=1)
            return ()

        if tokens == 1:
            token(0, ())
        else:
            lax.fori_loop(0, tokens, token, ())
        return ()

    lax.fori_loop(0, STEPS_OF, step, ())


def _accumulate_body(
    h_ref, records_ref, *refs, rows, share, vector, plane, picked, halves
):
    *refs, out_ref = refs
    refs = dict(zip(picked, refs))
    tokens = h_ref.shape[1]
    shape = records_ref.shape[3:]
    group = shape[-1]
    layout = _layout(group, vector)
    column, split = lax.axis_index("i"), lax.axis_index("j")
    zero = plgpu.layout_cast(jnp.zeros(shape, jnp.float32), layout)

    def step(i, sums):
        loaded = []
        for row in range(DOWN_ROWS):
            n = split * share + i * DOWN_ROWS + row
            k = jnp.minimum(n, rows - 1)
            slot = refs["slots"][k] if "slots" in refs else k
            bits = _load(records_ref.at[slot, 2, column], layout)
            factors = None
            if "scales" in refs:
                scale = refs["ids"][k] if "ids" in refs else k
                factors = [
                    _load(
                        refs["scales"].at[scale, 2, half, column],
                        _layout(group, vector, 2),
                    )
                    for half in range(2)
                ]
            loaded.append((bits, factors, [h_ref[n, t] for t in range(tokens)]))
        sums = list(sums)
        for bits, factors, hs in loaded:
            for half, value in enumerate(_values(bits, halves)):
                for t in range(tokens):
                    by = hs[t]
                    if factors:
                        factor = factors[half].astype(jnp.float32)
                        by = factor * (by * _factor(plane, half))
                        by = plgpu.layout_cast(
                            lax.broadcast_in_dim(by, shape, (0, 1)), layout
                        )
                    sums[t * halves + half] = sums[t * halves + half] + value * by
        return tuple(sums)

    sums = lax.fori_loop(0, share // DOWN_ROWS, step, (zero,) * (tokens * halves))
    for t in range(tokens):
        for half in range(halves):
            out_ref[split, t, half, column] = sums[t * halves + half]


def _factor(plane: str, half: int) -> float:
    """High nibbles are left where they lie, 16 times what they count."""
    return STEPS[plane] / (16.0 if half else 1.0)


def _values(bits: Array, halves: int) -> list[Array]:
    if halves == 2:
        bits = bits.astype(jnp.int32)
        return [
            lax.bitcast_convert_type((bits & mask) | ONES, jnp.float32)
            - (2.0**23 + zero)
            for mask, zero in ((0x0F, 8), (0xF0, 128))
        ]
    if bits.dtype == jnp.uint16:
        return [lax.bitcast_convert_type(bits.astype(jnp.int32) << 16, jnp.float32)]
    return [bits.astype(jnp.float32)]
