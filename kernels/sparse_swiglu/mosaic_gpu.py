"""Both products by a Pallas Mosaic GPU kernel (Hopper), for up to MOST_TOKENS tokens.

A block of 128 threads reads records where they lie, as words of 32 bits: ROWS of them
at once for gate and up, DOWN_ROWS for down. A nibble is widened in place: at bit 4 i of
a word, under the exponent of 2^23, it is the float32 2^23 + 16^i n. What 16^i is too
much goes exactly into x, or out of y.

    project     a thread keeps a few words of a row: warps sum theirs, XLA four warps
    accumulate  a thread keeps a few columns of a share of the rows; XLA sums the shares

Every sum is made in an order that only N or K and W decide. The reference serves more
tokens and rows that are no whole words for all threads: W must be a multiple of 1024
for q4 and r4, of 256 for bfloat16, else of 128. On a CPU: under
`plgpu.force_gpu_interpret_mode()`.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from m2jax.kernels.sparse_swiglu import reference

MOST_TOKENS = 16
WARPS, LANES = 4, 32
THREADS = WARPS * LANES
# Words that a thread loads at once: 16 bytes.
VECTOR = 4
# Tokens for which a row is widened once: their x stays in registers.
TOKENS = 4
# Rows whose words are under way at once, and how often a block loads so many.
ROWS, ROUNDS = 4, 2
# The same for down columns, whose sums a thread keeps: [tokens, weights of its words].
COLUMN_VECTOR, DOWN_ROWS = 2, 8
# Blocks that share the down columns; 132 multiprocessors hold four each.
DOWN_BLOCKS = 528
# What a code counts in its group's scale.
STEPS = {"q4": 16.0, "r4": 1.0}
# Bits of 2^23, whose next float32 is 2^23 + 1.
ONES = 0x4B000000
# Where the nibbles of a word are widened: the last four after a shift by 12 bits.
PLACES = (0, 1, 2, 3, 1, 2, 3, 4)
WAIT = False


def project_gpu(
    x: Array,
    records: Array,
    scales: Array | None,
    *,
    plane: str,
    slots: Array | None,
    ids: Array | None,
) -> tuple[Array, Array]:
    options = {"plane": plane, "slots": slots, "ids": ids}
    if not _serves(x.shape[0], records, scales):
        form = reference.of_picked(reference.project_xla)
        return form(x, records, scales, **options)
    rows = records.shape[0] if slots is None else slots.shape[0]
    tokens = x.shape[0]
    if 0 in (rows, tokens):
        return (jnp.zeros((tokens, rows), jnp.float32),) * 2
    words, kind = _words(records, scales)
    vector = next(v for v in (VECTOR, 2, 1) if words.shape[2] % (THREADS * v) == 0)
    shape = _shape(words.shape[2], vector, scales)
    chunk = min(TOKENS, 1 << (tokens - 1).bit_length())
    x = _permuted(x, kind) * _weights(plane, kind)
    x = jnp.pad(x, [(0, -tokens % chunk), (0, 0), (0, 0)])
    body = partial(_project_body, kind=kind, rows=rows, chunk=chunk)
    found = _call(
        body,
        [x.reshape(*x.shape[:2], *shape), words.reshape(-1, 3, *shape)],
        scales if scales is None else scales.reshape(-1, 3, 2, *shape[:2]),
        **{"slots": slots, "ids": ids},
        grid=(pl.cdiv(rows, min(ROWS, rows) * ROUNDS),),
        out_shape=(rows, 2, x.shape[0], WARPS),
    )
    both = found.sum(axis=3).transpose(1, 2, 0)[:, :tokens]
    return both[0], both[1]


def accumulate_gpu(
    h: Array,
    records: Array,
    scales: Array | None,
    *,
    plane: str,
    slots: Array | None,
    ids: Array | None,
) -> Array:
    options = {"plane": plane, "slots": slots, "ids": ids}
    if not _serves(h.shape[0], records, scales):
        form = reference.of_picked(reference.accumulate_xla)
        return form(h, records, scales, **options)
    tokens, rows = h.shape
    width = _width(records, scales)
    if 0 in h.shape:
        return jnp.zeros((tokens, width), jnp.float32)
    words, kind = _words(records, scales)
    each = THREADS * COLUMN_VECTOR
    vector = COLUMN_VECTOR if words.shape[2] % each == 0 else 1
    columns = words.shape[2] // (THREADS * vector)
    shape = _shape(THREADS * vector, vector, scales, columns=columns)
    some = min(DOWN_ROWS, rows)
    share = pl.cdiv(pl.cdiv(rows * columns, DOWN_BLOCKS), some) * some
    shares = pl.cdiv(rows, share)
    body = partial(_accumulate_body, kind=kind, rows=rows, share=share)
    sums = _call(
        body,
        [h.T, words.reshape(-1, 3, columns, *shape)],
        scales if scales is None else scales.reshape(-1, 3, 2, columns, *shape[:2]),
        **{"slots": slots, "ids": ids},
        grid=(columns, shares),
        out_shape=(shares, tokens, PIECES[kind], columns, *shape),
    )
    y = sums.sum(axis=0).reshape(tokens, PIECES[kind], -1) * _weights(plane, kind)
    return _restored(y, kind)


# Weights of a word, by what records hold.
PIECES = {"codes": 8, "uint16": 2, "float16": 1, "float32": 1}


def _width(records: Array, scales: Array | None) -> int:
    return records.shape[1] // 3 * (1 if scales is None else 2)


def _serves(tokens: int, records: Array, scales: Array | None) -> bool:
    kind = str(records.dtype) if scales is None else "codes"
    width = _width(records, scales)
    if tokens > MOST_TOKENS or width % (THREADS * PIECES[kind]):
        return False
    return scales is None or width // scales.shape[2] in (16, 32, 64, 128)


def _words(records: Array, scales: Array | None) -> tuple[Array, str]:
    """[N, R] as [N, 3, words]: of 32 bits where that is more than one weight."""
    records = jnp.asarray(records)
    kind = str(records.dtype) if scales is None else "codes"
    if PIECES[kind] > 1:
        bytes_each = records.dtype.itemsize
        records = records.reshape(records.shape[0], -1, 4 // bytes_each)
        records = lax.bitcast_convert_type(records, jnp.uint32)
    return records.reshape(records.shape[0], 3, -1), kind


def _shape(
    words: int, vector: int, scales: Array | None, *, columns: int = 1
) -> tuple[int, int, int, int]:
    """Words as [WARPS, groups, threads of a group, vector]."""
    if scales is None:
        threads = LANES
    else:
        threads = columns * words // (scales.shape[2] // 2) // vector
    return WARPS, words // (WARPS * threads * vector), threads, vector


def _permuted(x: Array, kind: str) -> Array:
    """[T, W] -> [T, weights of a word, words]."""
    tokens, pieces = x.shape[0], PIECES[kind]
    if kind == "codes":
        # Byte i of a word: its low nibble of the first half, its high of the second.
        x = x.reshape(tokens, 2, -1, 4).transpose(0, 3, 1, 2)
        return x.reshape(tokens, pieces, -1)
    return x.reshape(tokens, -1, pieces).swapaxes(1, 2)


def _restored(y: Array, kind: str) -> Array:
    """Undoes `_permuted`."""
    tokens, pieces = y.shape[:2]
    if kind == "codes":
        y = y.reshape(tokens, 4, 2, -1).transpose(0, 2, 3, 1)
        return y.reshape(tokens, -1)
    return y.swapaxes(1, 2).reshape(tokens, -1)


def _weights(plane: str, kind: str) -> Array:
    """What the pieces of `_pieces` must be multiplied by; powers of two."""
    if kind != "codes":
        return jnp.ones((1, 1, 1), jnp.float32)
    places = [STEPS[plane] / 16.0**place for place in PLACES]
    return jnp.array(places, jnp.float32).reshape(1, -1, 1)


def _call(
    body: Callable,
    operands: list[Array],
    scales: Array | None,
    *,
    slots: Array | None,
    ids: Array | None,
    grid: tuple[int, ...],
    out_shape: tuple[int, ...],
) -> Array:
    """The kernel `body`, which is told the names of the operands that are there."""
    # ONES as an operand, because the compiler loads a constant anew for every use.
    ones = None if scales is None else jnp.full(1, ONES, jnp.uint32)
    named = {"scales": scales, "ones": ones}
    if slots is not None:
        named["slots"] = jnp.clip(jnp.asarray(slots), 0, operands[1].shape[0] - 1)
        if scales is not None and ids is not None:
            named["ids"] = jnp.clip(jnp.asarray(ids), 0, scales.shape[0] - 1)
    named = {name: array for name, array in named.items() if array is not None}

    def kernel(first_ref, words_ref, *refs):
        body(first_ref, words_ref, dict(zip(named, refs)), refs[-1])

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct(out_shape, jnp.float32),
        grid=grid,
        grid_names=("column", "share")[-len(grid) :],
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            # No memory is both read and written.
            unsafe_no_auto_barriers=True,
        ),
    )(*operands, *named.values())


def _layout(threads: int, vector: int, axes: int = 4) -> plgpu.Layout:
    """Where [WARPS, groups, threads, vector] lies, or its sums over the last axes."""
    tile = (WARPS, LANES // threads, threads, vector)
    made = plgpu.Layout.TILED(
        plgpu.Tiling((tile, (1, 1, 1, vector))),
        warp_dims=(-8,),
        lane_dims=(-7, -6),
        vector_dim=-1,
        _check_canonical=False,
    )
    made = made.to_mgpu().canonicalize()
    if axes < 4:
        made = made.reduce(range(axes, 4))
    return plgpu.Layout.TILED(
        made.tiling, made.warp_dims, made.lane_dims, made.vector_dim
    )


def _project_body(x_ref, words_ref, refs, out_ref, *, kind, rows, chunk):
    tokens, shape = x_ref.shape[0], x_ref.shape[2:]
    some = min(ROWS, rows)
    first = lax.axis_index("share") * (some * ROUNDS)
    ones = refs["ones"][0] if kind == "codes" else None

    def load_x(begin):
        return [
            [_load(x_ref.at[begin + t, i], shape) for i in range(PIECES[kind])]
            for t in range(chunk)
        ]

    kept = load_x(0) if tokens == chunk else None

    def some_rows(round_):
        begin = jnp.minimum(first + round_ * some, rows - some)
        each = [(begin + row, part) for row in range(some) for part in range(2)]
        loaded = [_loaded(words_ref, refs, shape, k, (part,)) for k, part in each]
        loaded = _all_there(loaded)

        def some_tokens(i):
            xs = load_x(i * chunk) if kept is None else kept
            for (k, part), (words, scales) in zip(each, loaded):
                pieces = _pieces(words, kind, ones)
                for t in range(chunk):
                    total = _row_sum(xs[t], pieces, scales, shape)
                    out_ref[k, part, i * chunk + t] = total

        _repeat(tokens // chunk, some_tokens)

    _repeat(ROUNDS, some_rows)


def _row_sum(x: list[Array], pieces: list[Array], scales: list[Array], shape) -> Array:
    """[WARPS] sums over a row, each group's multiplied by its scale."""
    total = None
    for half in range(max(len(scales), 1)):
        step = max(len(scales), 1)
        products = [a * b for a, b in zip(x[half::step], pieces[half::step])]
        part = sum(products[1:], start=products[0])
        part = jnp.sum(part, axis=3)
        if scales:
            part = part * _spread(scales[half], shape, 3)
        total = part if total is None else total + part
    return jnp.sum(jnp.sum(total, axis=2), axis=1)


def _accumulate_body(h_ref, words_ref, refs, out_ref, *, kind, rows, share):
    tokens, shape = h_ref.shape[1], words_ref.shape[3:]
    column = lax.axis_index("column")
    some = min(DOWN_ROWS, rows)
    first = lax.axis_index("share") * share
    ones = refs["ones"][0] if kind == "codes" else None
    zero = plgpu.layout_cast(jnp.zeros(shape, jnp.float32), _layout(*shape[-2:]))

    def some_rows(round_, sums):
        sums = list(sums)
        begin = first + round_ * some
        last = jnp.minimum(begin, rows - some)
        ks = [last + row for row in range(some)]
        loaded = [_loaded(words_ref, refs, shape, k, (2,), (column,)) for k in ks]
        loaded = _all_there(loaded)
        for k, (words, scales) in zip(ks, loaded):
            pieces = _pieces(words, kind, ones)
            for t in range(tokens):
                # The last rows are read again where fewer than `some` are left.
                by = jnp.where(k >= begin, h_ref[k, t], 0.0)
                factors = [_spread(scale * by, shape, 4) for scale in scales] or [by]
                for i, piece in enumerate(pieces):
                    sums[t * len(pieces) + i] += piece * factors[i % len(factors)]
        return tuple(sums)

    sums = (zero,) * (tokens * PIECES[kind])
    sums = lax.fori_loop(0, share // some, some_rows, sums)
    for i, total in enumerate(sums):
        out_ref[(lax.axis_index("share"), *divmod(i, PIECES[kind]), column)] = total


def _loaded(words_ref, refs, shape, k, part, column=()) -> tuple[Array, list[Array]]:
    """Words of a part of the k-th row, and the scales of both its halves."""
    slot = refs["slots"][k] if "slots" in refs else k
    words = _load(words_ref.at[(slot, *part, *column)], shape)
    if "scales" not in refs:
        return words, []
    at = refs["ids"][k] if "ids" in refs else k
    halves = [refs["scales"].at[(at, *part, half, *column)] for half in range(2)]
    return words, [_load(half, shape, 2).astype(jnp.float32) for half in halves]


def _load(ref, shape: tuple[int, ...], axes: int = 4) -> Array:
    # What Mosaic calls optimized is for shared memory.
    layout = _layout(*shape[-2:], axes)
    return plgpu.load(ref, layout=layout, optimized=False)


def _spread(scales: Array, shape: tuple[int, ...], axes: int) -> Array:
    """[WARPS, groups] over their groups."""
    spread = lax.broadcast_in_dim(scales, shape[:axes], (0, 1))
    return plgpu.layout_cast(spread, _layout(*shape[2:], axes))


def _all_there(loaded: list) -> list:
    return lax.optimization_barrier(loaded) if WAIT else loaded


def _pieces(words: Array, kind: str, ones: Array | None) -> list[Array]:
    """The weights of words as float32, a list by their places."""
    if kind == "codes":
        words = [words] * 4 + [words >> 12] * 4
        return [_nibble(w, place, ones) for w, place in zip(words, PLACES)]
    if kind == "uint16":
        bits = [words << 16, words & np.uint32(0xFFFF0000)]
        return [lax.bitcast_convert_type(b, jnp.float32) for b in bits]
    return [words.astype(jnp.float32)]


def _nibble(words: Array, place: int, ones: Array) -> Array:
    """16^place (n - 8), exactly."""
    bits = (words & (15 << 4 * place)) | ones
    zero = 2.0**23 + 8 * 16.0**place
    return lax.bitcast_convert_type(bits, jnp.float32) - zero


def _repeat(times: int, work: Callable) -> None:
    if times == 1:
        work(0)
    else:
        lax.fori_loop(0, times, lambda i, _: work(i) or (), ())
