"""The mix of a whole model: one precision mix a layer, and its text form.

0/25/75              every layer
0/25/75*3,0/50/50    three layers, then one
"""

import re
from collections.abc import Sequence
from itertools import groupby

from m2jax.mix import PrecisionMix

_PART = re.compile(r"([^*]+?)(?:\*(\d{1,4}))?")


def parse_mixes(text: str, layers: int) -> tuple[PrecisionMix, ...]:
    """One mix a layer.

    Raises:
        ValueError: no mix, or neither one for all layers nor one for each.
    """
    mixes: list[PrecisionMix] = []
    parts = text.split(",")
    for part in parts:
        match = _PART.fullmatch(part.strip())
        if match is None:
            raise ValueError(f"mix {text!r}: want 0/25/75, or 0/25/75*3,0/50/50")
        mixes += [PrecisionMix.parse(match[1])] * int(match[2] or 1)
    if len(parts) == 1 and "*" not in text:
        return tuple(mixes * layers)
    if len(mixes) != layers:
        raise ValueError(
            f"mix {text!r} names {len(mixes)} layers: the model has {layers}"
        )
    return tuple(mixes)


def format_mixes(mixes: Sequence[PrecisionMix]) -> str:
    """What `parse_mixes` reads back as the equal mixes."""
    if len(set(mixes)) == 1:
        return str(mixes[0])
    runs = [(mix, len(list(run))) for mix, run in groupby(mixes)]
    return ",".join(f"{mix}*{count}" if count > 1 else str(mix) for mix, count in runs)
