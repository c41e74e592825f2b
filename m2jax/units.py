"""Bytes as people write them."""

import math
import re

from m2jax.arguments import as_integer, shown

UNITS = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
DECIMAL = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def parse_bytes(text: str | int | None, *, name: str) -> int | None:
    """Bytes of "8GiB", "500MB" or 4096; None stays None.

    A bare number in text needs a unit: "8" is refused, since 8 bytes is never meant.
    """
    if text is None:
        return None
    if not isinstance(text, str):
        want = "a positive number of bytes, as in 8GiB or 500MB"
        return as_integer(text, name=name, low=1, want=want)
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?i?B)\s*", text, re.IGNORECASE)
    units = {unit.lower(): size for unit, size in {**UNITS, **DECIMAL}.items()}
    if not match or match[2].lower() not in units:
        raise ValueError(
            f"{name} {text!r}: want a number and a unit ({', '.join(UNITS)}, "
            f"{', '.join(DECIMAL)}), as in 8GiB"
        )
    size = float(match[1]) * units[match[2].lower()]
    if not 1 <= size < 1 << 62:
        raise ValueError(
            f"{name} {shown(text)}: want a number of bytes from 1 to {1 << 22} TiB"
        )
    return int(size)


def parse_rate(text: str | None, *, name: str) -> float | None:
    """Bytes a second of "3GB/s" or "500MB"; None stays None.

    Raises:
        ValueError: no number with a unit.
    """
    if text is None:
        return None
    found = parse_bytes(re.sub(r"\s*/\s*s\s*$", "", text), name=name)
    assert found is not None
    return float(found)


def format_bytes(size: int, *, up: bool = False) -> str:
    """Three digits and a binary unit; `up` rounds so that the text still suffices."""
    unit, scale = "B", 1
    for name, value in UNITS.items():
        if size >= value:
            unit, scale = name, value
    if unit == "B":
        return f"{size} B"
    digits = 0 if size / scale >= 100 else 1 if size / scale >= 10 else 2
    number = size / scale
    if up:
        number = math.ceil(number * 10**digits) / 10**digits
    return f"{number:.{digits}f} {unit}"
