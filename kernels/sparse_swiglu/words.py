"""Records as words of 32 bits, and words as numbers, for the kernel for GPUs.

A word of q4 or r4 holds eight nibbles. One is widened where it lies: at bit 4 p of a
word whose other bits are those of 2^23, it makes the float32 2^23 + 16^p n, from which
2^23 + 8 * 16^p is subtracted, exactly. The power of two goes to x or comes out of y.
A word of bfloat16 holds two numbers; a float16 or a float32 counts as a word.

In a block of WARPS warps the words of a row, or of some columns, are [WARPS, groups of
a warp, threads of a group, words of a thread].
"""

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental.pallas import mosaic_gpu as plgpu

WARPS, LANES = 4, 32

# Weights of a word, by what records hold.
PIECES = {"codes": 8, "uint16": 2, "float16": 1, "float32": 1}
# What a code counts in its group's scale.
STEPS = {"q4": 16.0, "r4": 1.0}
# Bits of 2^23.
ONES = 0x4B000000
# p of each nibble of a word: the last four are shifted by SHIFT bits first.
PLACES = (0, 1, 2, 3, 1, 2, 3, 4)
SHIFT = 12


def kind_of(records: Array, scales: Array | None) -> str:
    return str(records.dtype) if scales is None else "codes"


def words_of(records: Array, kind: str) -> Array:
    """[N, R] -> [N, 3, words], the same bytes: XLA makes no copy."""
    records = jnp.asarray(records)
    neurons, size = records.shape
    if PIECES[kind] > 1:
        parts = 4 // records.dtype.itemsize
        size //= parts
        records = records.reshape(neurons, size, parts)
        records = lax.bitcast_convert_type(records, jnp.uint32)
    return records.reshape(neurons, 3, size // 3)


def by_piece(x: Array, kind: str, *, plane: str) -> Array:
    """[T, W] -> [T, PIECES, words], times what `pieces_of` lacks."""
    tokens, pieces = x.shape[0], PIECES[kind]
    if kind != "codes":
        return x.reshape(tokens, -1, pieces).swapaxes(1, 2)
    # Of byte i of a word the low nibble is in the first half of a row.
    x = x.reshape(tokens, 2, -1, 4).transpose(0, 3, 1, 2)
    return x.reshape(tokens, pieces, -1) * _steps(plane)


def in_order(y: Array, kind: str, *, plane: str) -> Array:
    """[T, PIECES, words] -> [T, W], likewise."""
    tokens = y.shape[0]
    if kind != "codes":
        return y.swapaxes(1, 2).reshape(tokens, -1)
    y = (y * _steps(plane)).reshape(tokens, 4, 2, -1)
    return y.transpose(0, 2, 3, 1).reshape(tokens, -1)


def _steps(plane: str) -> Array:
    steps = [STEPS[plane] / 16.0**place for place in PLACES]
    return jnp.array(steps, jnp.float32).reshape(1, -1, 1)


def pieces_of(words: Array, kind: str, ones: Array | None) -> list[Array]:
    """The weights of words as float32; of codes each 16^p (n - 8)."""
    if kind == "codes":
        words = [words] * 4 + [words >> SHIFT] * 4
        return [_nibble(w, place, ones) for w, place in zip(words, PLACES)]
    if kind == "uint16":
        bits = [words << 16, words & np.uint32(0xFFFF0000)]
        return [lax.bitcast_convert_type(b, jnp.float32) for b in bits]
    return [words.astype(jnp.float32)]


def _nibble(words: Array, place: int, ones: Array) -> Array:
    bits = (words & (15 << 4 * place)) | ones
    zero = 2.0**23 + 8 * 16.0**place
    return lax.bitcast_convert_type(bits, jnp.float32) - zero


def load(ref, shape: tuple[int, ...], axes: int = 4) -> Array:
    # What Mosaic calls optimized is for shared memory.
    return plgpu.load(ref, layout=layout(*shape[2:], axes), optimized=False)


def spread(scales: Array, shape: tuple[int, ...], axes: int) -> Array:
    """[WARPS, groups] over the threads, and words, of each group."""
    spread = lax.broadcast_in_dim(scales, shape[:axes], (0, 1))
    return plgpu.layout_cast(spread, layout(*shape[2:], axes))


def layout(threads: int, vector: int, axes: int = 4) -> plgpu.Layout:
    """Who holds what of [WARPS, groups, threads, vector], or of its first axes."""
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
    parts = (made.tiling, made.warp_dims, made.lane_dims, made.vector_dim)
    return plgpu.Layout.TILED(*parts)
