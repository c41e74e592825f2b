"""Checks what a caller gives: numbers become Python's own. Knows no model.

Every message is one line that starts with the option's name and shows the value.
"""

import math
import operator
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from m2jax.strict_json import show


def shown(value: object) -> str:
    """A value as a short piece of one line."""
    return re.sub(r"\s*\n\s*", " ", show(value))


def as_integer(
    value: Any, *, name: str, want: str, low: int = 0, high: int | None = None
) -> int:
    """The value as an int: Python's, NumPy's and JAX's integers are, a bool is none.

    Args:
        want: what to ask for where it is none of low to high.
    """
    found = _index(value)
    if found is None or found < low or (high is not None and found > high):
        raise ValueError(f"{name} {shown(value)}: want {want}")
    return found


def as_number(value: Any, *, name: str, want: str) -> float:
    """The value as a finite float: Python's, NumPy's and JAX's real scalars are."""
    # bfloat16 is of kind V; bool, complex, text and time are no numbers here.
    kind = getattr(getattr(value, "dtype", None), "kind", "f")
    scalar = hasattr(value, "__float__") and getattr(value, "ndim", 0) == 0
    if scalar and kind in "iufV" and not isinstance(value, bool):
        try:
            found = float(value)
        except (TypeError, ValueError, OverflowError):
            found = math.nan
        if math.isfinite(found):
            return found
    raise ValueError(f"{name} {shown(value)}: want {want}")


def as_token_ids(value: Any, *, want: str) -> list[int]:
    """Token ids as Python integers, of a sequence of integers or a 1-D array.

    Args:
        want: how the message begins: the argument's name, and what to ask for.
    """
    if hasattr(value, "__array__"):
        array = np.asarray(value)
        if array.ndim == 1 and (array.dtype.kind in "iu" or not array.size):
            return array.tolist()
    elif isinstance(value, Sequence) and not isinstance(
        value, str | bytes | bytearray | memoryview
    ):
        ids = []
        for place, token in enumerate(value):
            index = _index(token)
            if index is None:
                raise ValueError(f"{want}, got {shown(token)} at place {place}")
            ids.append(index)
        return ids
    raise ValueError(f"{want}, got {shown(value)}")


def _index(value: Any) -> int | None:
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None
