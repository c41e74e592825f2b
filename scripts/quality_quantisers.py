"""Ways to quantise feed-forward rows, each as what the rows read back as.

A variant maps float32 rows [n, W] to the float32 rows that its codes stand for, at 4
or at 8 bits. Used by `quality.py`; groups run along W.
"""

from collections.abc import Callable

import numpy as np

from m2jax.quant import dequantise_base, dequantise_int8, quantise_rows, split_codes

Rows = np.ndarray
# Factors of the largest weight that a clipping quantiser tries as its range.
CLIPS = np.linspace(0.7, 1.0, 13)


def grouped(rows: Rows, group: int) -> Rows:
    return rows.reshape(*rows.shape[:-1], -1, group)


def largest(rows: Rows, group: int) -> Rows:
    return np.abs(grouped(rows, group)).max(axis=-1, keepdims=True)


def to_float16(scales: Rows) -> Rows:
    return scales.astype(np.float16).astype(np.float32)


def rounded(rows: Rows, scales: Rows, *, most: int, group: int) -> Rows:
    """Round to nearest on `scales` [.., groups, 1], codes in [-most, most]."""
    scales = np.maximum(to_float16(scales), 1e-12)
    codes = np.clip(np.rint(grouped(rows, group) / scales), -most, most)
    return (codes * scales).reshape(rows.shape)


def int8(rows: Rows, group: int) -> Rows:
    """Plain INT8: one float16 scale a group, codes -127 .. 127."""
    return rounded(rows, largest(rows, group) / 127, most=127, group=group)


def int4(rows: Rows, group: int) -> Rows:
    """Plain INT4: one float16 scale a group, codes -7 .. 7."""
    return rounded(rows, largest(rows, group) / 7, most=7, group=group)


def stored(rows: Rows, group: int) -> tuple[Rows, Rows]:
    """The store's planes: q4 alone and q4 + r4, from one 8-bit code."""
    codes, scales, _ = quantise_rows(rows, group=group)
    q4, r4 = split_codes(codes)
    return (
        dequantise_base(q4, scales, group=group),
        dequantise_int8(q4, r4, scales, group=group),
    )


def top_bits(rows: Rows, group: int) -> tuple[Rows, Rows]:
    """Plain INT8 codes -127 .. 127; q4 is their top 4 bits, read at the middle."""
    scales = np.maximum(to_float16(largest(rows, group) / 127), 1e-12)
    codes = np.clip(np.rint(grouped(rows, group) / scales), -127, 127)
    base = 16 * np.floor(codes / 16) + 7.5
    return (base * scales).reshape(rows.shape), (codes * scales).reshape(rows.shape)


def half_steps(rows: Rows, scales: Rows, group: int) -> Rows:
    """16 levels at odd multiples of half a step: (n + 1/2) s, n = -8 .. 7."""
    scales = np.maximum(to_float16(scales), 1e-12)
    codes = np.clip(np.floor(grouped(rows, group) / scales), -8, 7)
    return ((codes + 0.5) * scales).reshape(rows.shape)


def with_residual(rows: Rows, base: Rows, scales: Rows, group: int) -> Rows:
    """base plus its own error, in 16 levels over one step of the base."""
    scales = np.maximum(to_float16(scales), 1e-12)
    left = grouped(rows - base, group)
    codes = np.clip(np.floor(left / (scales / 16)), -8, 7)
    return base + ((codes + 0.5) * scales / 16).reshape(rows.shape)


def one_sign(rows: Rows, group: int) -> tuple[Rows, Rows]:
    """As the store, with positive scales: both sides must end at 119 steps."""
    scales = np.maximum(to_float16(largest(rows, group) / 119), 1e-12)
    codes = np.clip(np.rint(grouped(rows, group) / scales), -119, 119)
    high = np.floor((codes + 8) / 16)
    return (16 * high * scales).reshape(rows.shape), (codes * scales).reshape(
        rows.shape
    )


def clipped(
    rows: Rows, group: int, *, weights: Rows | None = None
) -> tuple[Rows, Rows]:
    """Half-step INT4 whose range is clipped for least squared error, and a residual.

    Args:
        weights: [W] or None: what the squared error of each column counts.
    """
    top = largest(rows, group)
    counts = np.ones(rows.shape[-1], np.float32) if weights is None else weights
    best = np.full(top.shape, np.inf, np.float32)
    chosen = top / 8
    for clip in CLIPS:
        scales = clip * top / 8
        error = grouped((half_steps(rows, scales, group) - rows) ** 2 * counts, group)
        total = error.sum(axis=-1, keepdims=True)
        chosen = np.where(total < best, scales, chosen)
        best = np.minimum(total, best)
    base = half_steps(rows, chosen, group)
    return base, with_residual(rows, base, chosen, group)


def clipped_msb(rows: Rows, group: int) -> tuple[Rows, Rows]:
    """`top_bits`, its range clipped for least squared error of q4."""
    top = largest(rows, group)
    best = np.full(top.shape, np.inf, np.float32)
    both = [np.zeros_like(rows), np.zeros_like(rows)]
    for clip in CLIPS:
        limit = np.broadcast_to(clip * top, grouped(rows, group).shape)
        cut = np.clip(grouped(rows, group), -limit, limit).reshape(rows.shape)
        made = top_bits(cut.astype(np.float32), group)
        error = grouped((made[0] - rows) ** 2, group).sum(axis=-1, keepdims=True)
        better = np.broadcast_to(error < best, grouped(rows, group).shape)
        better = better.reshape(rows.shape)
        both = [np.where(better, new, old) for new, old in zip(made, both)]
        best = np.minimum(error, best)
    return both[0], both[1]


def gguf_rows(rows: Rows, kind: str) -> Rows:
    """llama.cpp's Q4_0 or Q8_0 (blocks of 32), by its own package."""
    import gguf

    number = getattr(gguf.GGMLQuantizationType, kind)
    return gguf.dequantize(gguf.quantize(rows, number), number)


# Measured at every group size, the others at the default one.
EVERY_GROUP = (
    "separate, round to nearest",
    "nested, signed scale (the store's)",
    "nested, top bits",
)
# Rows of a matrix ("gate", "up", "down") of a layer to what they read back as.
Variant = Callable[[Rows, str, int], Rows]


def variants(
    group: int, energy: Callable[[str, int], Rows]
) -> dict[tuple[str, int], Variant]:
    """(name, bits) to the variant.

    Args:
        energy: matrix and layer to the mean square of what its columns are multiplied
            with on calibration text, [W].
    """

    def part(make: Callable, place: int) -> Variant:
        return lambda rows, matrix, layer: make(rows, group)[place]

    def plain(make: Callable) -> Variant:
        return lambda rows, matrix, layer: make(rows, group)

    def weighed(place: int) -> Variant:
        return lambda rows, matrix, layer: clipped(
            rows, group, weights=energy(matrix, layer)
        )[place]

    pairs: dict[str, tuple[Variant, Variant]] = {
        "separate, round to nearest": (plain(int4), plain(int8)),
        "nested, signed scale (the store's)": (part(stored, 0), part(stored, 1)),
        "nested, rounded, positive scale": (part(one_sign, 0), part(one_sign, 1)),
        "nested, top bits": (part(top_bits, 0), part(top_bits, 1)),
        "q4 clipped by weight error + residual": (part(clipped, 0), part(clipped, 1)),
        "the same, by activations": (weighed(0), weighed(1)),
        "nested, top bits, clipped for q4": (
            part(clipped_msb, 0),
            part(clipped_msb, 1),
        ),
    }
    return {
        (name, bits): made
        for name, (at4, at8) in pairs.items()
        for bits, made in ((4, at4), (8, at8))
    }
