"""Nested 4 + 4 bit quantisation of rows. NumPy only; knows no files and no devices.

Per group of consecutive weights one signed scale s, kept as float16, and codes of 8
bits, whose high nibble is plane `q4` and whose low one is plane `r4`:

    INT8 value = s (16 hi + lo - 136)      base value = s (16 hi - 128)

so q4 rounds to the nearest of 16 multiples of 16 s, from -8 to 7, and r4 holds the
rest, -8 to 7. The sign of s turns the group's largest weight to the longer side.
"""

from typing import NamedTuple

import numpy as np

GROUP_SIZES = (128, 64, 32, 16)
CODE_ZERO = 136
BASE_ZERO = 128
# Steps that the largest weight may take: 128 ends on a multiple of 16, 136 makes steps
# smaller. The group takes what leaves less squared error in q4.
REACHES = (128, 136)
# Steps that the other side may take: codes end at 119.
OTHER_REACH = 119


class RowShape(NamedTuple):
    """How a row of D weights is cut into groups.

    group: weights that share a scale.
    width: D rounded up so that each half of the row is whole groups (zero padding).
    """

    group: int
    width: int

    @property
    def groups(self) -> int:
        return self.width // self.group


def row_shape(hidden_size: int, *, group_size: int) -> RowShape:
    """The largest group not above `group_size` that cuts both halves of a row evenly.

    A width that none divides is padded to the next multiple of 2 x 16.
    """
    if group_size not in GROUP_SIZES:
        raise ValueError(f"group size {group_size}: want one of {GROUP_SIZES}")
    for group in GROUP_SIZES:
        if group <= group_size and hidden_size % (2 * group) == 0:
            return RowShape(group, hidden_size)
    group = GROUP_SIZES[-1]
    return RowShape(group, -(-hidden_size // (2 * group)) * 2 * group)


class Quantised(NamedTuple):
    """Rows as codes.

    codes: uint8 [..., W]; a weight of zero has code 136. scales: float16
    [..., W / group], may be negative; a group of zeros has scale 0. error: float32
    [..., W / group], the squared error of plane q4 alone.
    """

    codes: np.ndarray
    scales: np.ndarray
    error: np.ndarray


def quantise_rows(rows: np.ndarray, *, group: int) -> Quantised:
    """Codes, scales and errors of float32 rows.

    Args:
        rows: float32 [..., W], W a multiple of group.

    Raises:
        ValueError: a weight is not finite, or too large for a float16 scale.
    """
    grouped = rows.reshape(*rows.shape[:-1], -1, group)
    top, bottom = grouped.max(axis=-1), grouped.min(axis=-1)
    if not np.all(np.isfinite(top) & np.isfinite(bottom)):
        raise ValueError(
            "weights hold NaN or infinity; the checkpoint is damaged: download it again"
        )
    far, near = np.maximum(top, -bottom), np.minimum(top, -bottom)
    sign = np.where(-bottom >= top, np.float32(1), np.float32(-1))
    found = None
    for reach in REACHES:
        exact = np.maximum(far / np.float32(reach), near / np.float32(OTHER_REACH))
        scales = sign * _not_below(exact)
        codes, error = _coded(grouped, scales)
        if found is None:
            found = codes, scales, error
            continue
        better = error < found[2]
        np.copyto(found[0], codes, where=better[..., None])
        scales = np.where(better, scales, found[1])
        found = found[0], scales, np.minimum(error, found[2])
    assert found is not None
    codes, scales, error = found
    return Quantised(codes.reshape(rows.shape), scales.astype(np.float16), error)


def _not_below(exact: np.ndarray) -> np.ndarray:
    """The next float16 up, as float32: with it no code leaves its range."""
    with np.errstate(over="ignore"):
        scales = exact.astype(np.float16)
    low = scales.astype(np.float32) < exact
    scales = np.where(low, np.nextafter(scales, np.float16(np.inf)), scales)
    if not np.all(np.isfinite(scales)):
        raise ValueError(
            f"weights of {128 * exact.max():.3g} are too large for a float16 scale"
        )
    return scales.astype(np.float32)


def _coded(grouped: np.ndarray, scales: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes of weights [..., groups, group], and the squared error of their q4."""
    inverse = np.zeros_like(scales)
    np.divide(1, scales, out=inverse, where=scales != 0)
    steps = grouped * inverse[..., None]
    codes = np.rint(steps)
    codes += CODE_ZERO
    codes = codes.astype(np.uint8)
    # In steps of s: what q4 alone leaves.
    steps -= (codes & 0xF0).astype(np.float32)
    steps += BASE_ZERO
    error = np.einsum("...g,...g->...", steps, steps) * np.square(scales)
    return codes, error


def pack_nibbles(nibbles: np.ndarray) -> np.ndarray:
    """uint8 values below 16 [..., W] to bytes [..., W / 2].

    Low nibble: the first half of the row; high nibble: the second half.
    """
    half = nibbles.shape[-1] // 2
    return nibbles[..., :half] | (nibbles[..., half:] << 4)


def unpack_nibbles(packed: np.ndarray) -> np.ndarray:
    """The inverse of `pack_nibbles`: bytes [..., W / 2] to values [..., W]."""
    return np.concatenate([packed & 15, packed >> 4], axis=-1)


def split_codes(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes [..., W] to planes q4 and r4, each packed [..., W / 2]."""
    return pack_nibbles(codes >> 4), pack_nibbles(codes & 15)


def dequantise_int8(
    q4: np.ndarray, r4: np.ndarray, scales: np.ndarray, *, group: int
) -> np.ndarray:
    """float32 rows [..., W] from both planes."""
    codes = 16.0 * unpack_nibbles(q4) + unpack_nibbles(r4)
    return _scaled(codes - CODE_ZERO, scales, group=group)


def dequantise_base(q4: np.ndarray, scales: np.ndarray, *, group: int) -> np.ndarray:
    """float32 rows [..., W] from plane q4 alone."""
    return _scaled(16.0 * unpack_nibbles(q4) - BASE_ZERO, scales, group=group)


def _scaled(codes: np.ndarray, scales: np.ndarray, *, group: int) -> np.ndarray:
    grouped = codes.astype(np.float32).reshape(*codes.shape[:-1], -1, group)
    return (grouped * scales.astype(np.float32)[..., None]).reshape(codes.shape)
