"""Both products by a Pallas kernel for Hopper GPUs, for up to MOST_TOKENS tokens.

A block is 128 threads, which read records where they lie, as words (`words`):

    project     a few words of a row a thread, of several rows at once; x stays in
                registers; a warp sums its quarter of a row, XLA adds the four
    accumulate  a few columns a thread, over a share of the rows; XLA adds the shares

Every sum is made in float32, in an order that plane, W and K decide alone: what a row
or a token gives hangs neither on those beside it nor on where its record lies.

It takes no more tokens, which are a matrix product, no W above MOST_WIDTH, and no rows
that do not fill 128 threads: W must be a multiple of 1024 for q4 and r4, of 256 for
bfloat16, else of 128. A CPU runs it under `plgpu.force_gpu_interpret_mode()` only.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from m2jax.kernels.sparse_swiglu.words import (
    LANES,
    ONES,
    PIECES,
    WARPS,
    by_piece,
    in_order,
    kind_of,
    layout,
    load,
    pieces_of,
    spread,
    words_of,
)

MOST_TOKENS = 16
MOST_WIDTH = 16384
THREADS = WARPS * LANES
GROUPS = (16, 32, 64, 128)
# Words that a thread loads at once at most: 16 bytes.
VECTOR = 4
# Registers of a thread: words of gate or up that are under way, and values of x.
GATE_WORDS, X_VALUES = 8, 64
# Rows of a block, for gate and up, and tokens at most that a row is widened once for.
BLOCK_ROWS, TOGETHER = 8, 4
# Down: rows under way at once, and columns of a thread, fewer where their sums for
# all tokens are more than DOWN_SUMS.
DOWN_ROWS, DOWN_VALUES, DOWN_SUMS = 8, 16, 128
# Blocks that share the down columns: four for each of 132 multiprocessors.
DOWN_BLOCKS = 528


def project_gpu(
    x: Array,
    records: Array,
    scales: Array | None,
    *,
    plane: str,
    slots: Array | None,
    ids: Array | None,
) -> tuple[Array, Array]:
    rows = records.shape[0] if slots is None else slots.shape[0]
    tokens = x.shape[0]
    if 0 in (rows, tokens):
        return (jnp.zeros((tokens, rows), jnp.float32),) * 2
    kind = kind_of(records, scales)
    words = words_of(records, kind)
    row = words.shape[2]
    shape = _shape(row, _vector(row, VECTOR), _groups(scales))
    some = min(_floor(GATE_WORDS * THREADS // row), BLOCK_ROWS, rows)
    together = _floor(X_VALUES * THREADS // (row * PIECES[kind]))
    together = min(together, TOGETHER, 1 << (tokens - 1).bit_length())
    x = jnp.pad(
        by_piece(x, kind, plane=plane), [(0, -tokens % together), *[(0, 0)] * 2]
    )
    sizes = {"rows": rows, "some": some, "together": together}
    both = _call(
        partial(_project, kind=kind, **sizes),
        [x.reshape(*x.shape[:2], *shape), words.reshape(-1, 3, *shape)],
        None if scales is None else scales.reshape(-1, 3, 2, *shape[:2]),
        slots,
        ids,
        grid=(1, pl.cdiv(rows, some * _rounds(some))),
        shape=(rows, 2, x.shape[0], WARPS),
    )
    both = both.sum(axis=3).transpose(1, 2, 0)[:, :tokens]
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
    tokens, rows = h.shape
    kind = kind_of(records, scales)
    words = words_of(records, kind)
    row = words.shape[2]
    if 0 in h.shape:
        return jnp.zeros((tokens, row * PIECES[kind]), jnp.float32)
    # Tokens take no part in how rows are shared out, so that one alone gives the same.
    vector = _vector(row, min(VECTOR, DOWN_VALUES // PIECES[kind]))
    some = min(DOWN_ROWS, rows)
    share = pl.cdiv(rows * row // (THREADS * vector), DOWN_BLOCKS * some) * some
    vector = min(vector, _floor(DOWN_SUMS // (PIECES[kind] * tokens)))
    columns = row // (THREADS * vector)
    shape = _shape(THREADS * vector, vector, _groups(scales) // columns)
    shares = pl.cdiv(rows, share)
    sums = _call(
        partial(_accumulate, kind=kind, rows=rows, some=some, share=share),
        [h.T, words.reshape(-1, 3, columns, *shape)],
        None if scales is None else scales.reshape(-1, 3, 2, columns, *shape[:2]),
        slots,
        ids,
        grid=(columns, shares),
        shape=(shares, tokens, PIECES[kind], columns, *shape),
    )
    y = sums.sum(axis=0).reshape(tokens, PIECES[kind], row)
    return in_order(y, kind, plane=plane)


def why_not_gpu(tokens: int, records: Array, scales: Array | None) -> str | None:
    """What the kernel takes instead of these; None where it takes them."""
    width = records.shape[1] // 3 * (1 if scales is None else 2)
    row = THREADS * PIECES[kind_of(records, scales)]
    if tokens > MOST_TOKENS:
        return f"takes up to {MOST_TOKENS} tokens, not {tokens}"
    if width > MOST_WIDTH:
        return f"takes W up to {MOST_WIDTH}, not {width}"
    if width % row:
        return f"takes W that is a multiple of {row}, not {width}"
    group = 0 if scales is None else width // scales.shape[2]
    if group not in (0, *GROUPS):
        return f"takes groups of {', '.join(map(str, GROUPS))}, not of {group}"
    return None


def _groups(scales: Array | None) -> int:
    """Groups of half a row, 0 for none."""
    return 0 if scales is None else scales.shape[2] // 2


def _shape(row: int, vector: int, groups: int) -> tuple[int, int, int, int]:
    """Words of a row as [WARPS, groups of a warp, threads of a group, vector]."""
    threads = row // (groups * vector) if groups else LANES
    return WARPS, row // (WARPS * threads * vector), threads, vector


def _floor(count: int) -> int:
    """The largest power of two that is not more; 1 for less."""
    return 1 << max(count, 1).bit_length() - 1


def _vector(row: int, most: int) -> int:
    return next(v for v in (4, 2, 1) if v <= most and row % (THREADS * v) == 0)


def _rounds(some: int) -> int:
    return max(BLOCK_ROWS // some, 1)


def _call(
    body: Callable,
    operands: list[Array],
    scales: Array | None,
    slots: Array | None,
    ids: Array | None,
    *,
    grid: tuple[int, int],
    shape: tuple[int, ...],
) -> Array:
    """The kernel `body`, which gets by their names the operands that not all have."""
    named = {}
    if scales is not None:
        # The compiler loads what it knows to be constant anew for every use.
        named = {"scales": scales, "ones": jnp.full(1, ONES, jnp.uint32)}
    if slots is not None:
        named["slots"] = jnp.clip(jnp.asarray(slots), 0, operands[1].shape[0] - 1)
        if scales is not None and ids is not None:
            named["ids"] = jnp.clip(jnp.asarray(ids), 0, scales.shape[0] - 1)

    def kernel(first_ref, words_ref, *refs):
        body(first_ref, words_ref, dict(zip(named, refs)), refs[-1])

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct(shape, jnp.float32),
        grid=grid,
        grid_names=("column", "share"),
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            # Nothing is both read and written.
            unsafe_no_auto_barriers=True,
        ),
    )(*operands, *named.values())


def _project(x_ref, words_ref, refs, out_ref, *, kind, rows, some, together):
    tokens, shape = x_ref.shape[0], x_ref.shape[2:]
    first = lax.axis_index("share") * (some * _rounds(some))
    ones = refs["ones"][0] if kind == "codes" else None

    def load_x(begin):
        return [
            [load(x_ref.at[begin + t, i], shape) for i in range(PIECES[kind])]
            for t in range(together)
        ]

    kept = load_x(0) if tokens == together else None

    def some_rows(i):
        # The last rows are done again where fewer than `some` are left.
        begin = jnp.minimum(first + i * some, rows - some)
        places = [(begin + row, part) for row in range(some) for part in range(2)]
        loaded = [_loaded(words_ref, refs, shape, k, (part,)) for k, part in places]

        def some_tokens(j):
            xs = load_x(j * together) if kept is None else kept
            for (k, part), (words, scales) in zip(places, loaded):
                pieces = pieces_of(words, kind, ones)
                for t in range(together):
                    total = _row_sum(xs[t], pieces, scales, shape)
                    out_ref[k, part, j * together + t] = total

        _repeat(tokens // together, some_tokens)

    _repeat(_rounds(some), some_rows)


def _row_sum(x: list[Array], pieces: list[Array], scales: list[Array], shape) -> Array:
    """[WARPS]: what each warp has of a row, a group's sum times the group's scale."""
    halves = max(len(scales), 1)
    total = None
    for half in range(halves):
        products = [a * b for a, b in zip(x[half::halves], pieces[half::halves])]
        part = jnp.sum(sum(products[1:], start=products[0]), axis=3)
        if scales:
            part = part * spread(scales[half], shape, 3)
        total = part if total is None else total + part
    return jnp.sum(jnp.sum(total, axis=2), axis=1)


def _accumulate(h_ref, words_ref, refs, out_ref, *, kind, rows, some, share):
    tokens, shape = h_ref.shape[1], words_ref.shape[3:]
    column, mine = lax.axis_index("column"), lax.axis_index("share")
    ones = refs["ones"][0] if kind == "codes" else None
    zero = plgpu.layout_cast(jnp.zeros(shape, jnp.float32), layout(*shape[2:]))

    def some_rows(i, sums):
        sums = list(sums)
        begin = mine * share + i * some
        last = jnp.minimum(begin, rows - some)
        ks = [last + row for row in range(some)]
        loaded = [_loaded(words_ref, refs, shape, k, (2,), (column,)) for k in ks]
        for k, (words, scales) in zip(ks, loaded):
            pieces = pieces_of(words, kind, ones)
            for t in range(tokens):
                # Rows before `begin` are read again where fewer than `some` are left.
                by = jnp.where(k >= begin, h_ref[k, t], 0.0)
                factors = [spread(scale * by, shape, 4) for scale in scales] or [by]
                for j, piece in enumerate(pieces):
                    sums[t * len(pieces) + j] += piece * factors[j % len(factors)]
        return tuple(sums)

    sums = (zero,) * (tokens * PIECES[kind])
    sums = lax.fori_loop(0, share // some, some_rows, sums)
    for i, total in enumerate(sums):
        out_ref[(mine, *divmod(i, PIECES[kind]), column)] = total


def _loaded(words_ref, refs, shape, k, part, column=()) -> tuple[Array, list[Array]]:
    """Words of a part of the k-th row, and the scales of both its halves."""
    slot = refs["slots"][k] if "slots" in refs else k
    words = load(words_ref.at[(slot, *part, *column)], shape)
    if "scales" not in refs:
        return words, []
    at = refs["ids"][k] if "ids" in refs else k
    halves = [refs["scales"].at[(at, *part, half, *column)] for half in range(2)]
    return words, [load(half, shape, 2).astype(jnp.float32) for half in halves]


def _repeat(times: int, work: Callable) -> None:
    if times == 1:
        work(0)
    else:
        lax.fori_loop(0, times, lambda i, _: work(i) or (), ())
