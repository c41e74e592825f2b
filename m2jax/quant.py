"""Nested 4 + 4 bit quantisation of rows. NumPy only; knows no files and no devices.

Symmetric per group of consecutive weights: code = round(w / s) + 128 in [1, 255], with
s = max|w| / 127 kept as float16. The high nibble of the code is plane `q4`, the low
one plane `r4`:

    INT8 value = s (16 hi + lo - 128)      base value = s (16 hi - 120.5)

The base value is the midpoint of the 16 codes that share a high nibble.
"""

from typing import NamedTuple

import numpy as np

GROUP_SIZES = (128, 64, 32, 16)
CODE_ZERO = 128
BASE_MIDPOINT = 7.5


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


def quantise_rows(rows: np.ndarray, *, group: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales of float32 rows.

    Args:
        rows: float32 [..., W], W a multiple of group.

    Returns:
        uint8 codes [..., W] and float16 scales [..., W / group]. A group of zeros has
        scale 0 and code 128.

    Raises:
        ValueError: a weight is not finite, or too large for a float16 scale.
    """
    grouped = rows.reshape(*rows.shape[:-1], -1, group)
    largest = np.max(np.abs(grouped), axis=-1)
    if not np.all(np.isfinite(largest)):
        raise ValueError("weights hold NaN or infinity")
    exact = largest / np.float32(127)
    scales = exact.astype(np.float16)
    # Rounded up, so that no code leaves [1, 255].
    low = scales.astype(np.float32) < exact
    scales = np.where(low, np.nextafter(scales, np.float16(np.inf)), scales)
    if not np.all(np.isfinite(scales)):
        raise ValueError(f"weights up to {float(largest.max()):.3g} are too large")
    inverse = np.zeros_like(exact)
    np.divide(1, scales, out=inverse, where=scales > 0, dtype=np.float32)
    codes = grouped * inverse[..., None]
    np.rint(codes, out=codes)
    codes += CODE_ZERO
    return codes.astype(np.uint8).reshape(rows.shape), scales


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
    codes = 16.0 * unpack_nibbles(q4) + BASE_MIDPOINT
    return _scaled(codes - CODE_ZERO, scales, group=group)


def _scaled(codes: np.ndarray, scales: np.ndarray, *, group: int) -> np.ndarray:
    grouped = codes.astype(np.float32).reshape(*codes.shape[:-1], -1, group)
    return (grouped * scales.astype(np.float32)[..., None]).reshape(codes.shape)
