"""One precision mix a layer: its text form. Knows no model.

Shares count in hundredths of a percent, so that a text gives back the same mixes.
"""

import re
from collections.abc import Sequence
from itertools import groupby

from m2jax.arguments import shown
from m2jax.mix import PrecisionMix

WHOLE = 10_000
"""100 % in hundredths of a percent."""


def mix_from_edges(edge16: int, edge8: int, edge4: int) -> PrecisionMix:
    """From cumulative shares in hundredths: at 16 bits, at 8 or more, at 4 or more."""
    shares = edge16, edge8 - edge16, edge4 - edge8
    return PrecisionMix(*(share / 100 for share in shares))


def edges_of(mix: PrecisionMix) -> tuple[int, int, int]:
    """Cumulative shares in hundredths: rounded so, they are at most 100 % together."""
    edge16 = round(mix.percent16 * 100)
    edge8 = round((mix.percent16 + mix.percent8) * 100)
    edge4 = round((mix.percent16 + mix.percent8 + mix.percent4) * 100)
    return edge16, edge8, edge4


def format_mixes(mixes: Sequence[PrecisionMix]) -> str:
    """ "0/25/75" if all are equal, else one a layer: "0/25/75*3,0/50/50".

    Percentages are rounded to 0.01; `parse_mixes` gives the rounded mixes back.
    """
    if not mixes:
        raise ValueError("no mix to write: want one a layer")
    rounded = [mix_from_edges(*edges_of(mix)) for mix in mixes]
    runs = [(str(mix), len(list(run))) for mix, run in groupby(rounded)]
    if len(runs) == 1:
        return runs[0][0]
    return ",".join(name if count == 1 else f"{name}*{count}" for name, count in runs)


def parse_mixes(
    text: str | PrecisionMix | Sequence[PrecisionMix], layers: int
) -> tuple[PrecisionMix, ...]:
    """One mix a layer from what `format_mixes` writes, or from mixes.

    Args:
        text: one mix for all layers, or as many as there are layers; in text they are
            separated by commas, and "*3" after a mix repeats it.
        layers: of the model.

    Raises:
        ValueError: not a mix, or mixes for another number of layers.
    """
    if isinstance(text, PrecisionMix):
        return (text,) * layers
    if not isinstance(text, str):
        return _one_a_layer(text, layers)
    parts = text.split(",")
    if len(parts) == 1 and "*" not in text:
        return (PrecisionMix.parse(text),) * layers
    mixes: list[PrecisionMix] = []
    for part in parts:
        name, star, count = part.partition("*")
        if star and not re.fullmatch(r"\s*0*[1-9]\d{0,5}\s*", count, re.ASCII):
            raise ValueError(
                f"mix {text!r}: {part.strip()!r} repeats a mix {count.strip()!r} "
                "times; want a whole number from 1, as in 0/25/75*3"
            )
        mixes += [PrecisionMix.parse(name)] * (int(count) if star else 1)
    if len(mixes) != layers:
        raise ValueError(
            f"mix {text!r}: has mixes for {len(mixes)} layers, the model has {layers}; "
            "give one mix for all layers or one a layer"
        )
    return tuple(mixes)


def _one_a_layer(
    mixes: Sequence[PrecisionMix], layers: int
) -> tuple[PrecisionMix, ...]:
    given = mixes if isinstance(mixes, Sequence) else [None]
    if not all(isinstance(mix, PrecisionMix) for mix in given):
        raise ValueError(
            f"mix {shown(mixes)}: want a text as in '0/25/75', a PrecisionMix, or a "
            "sequence of one PrecisionMix a layer"
        )
    if len(mixes) != layers:
        raise ValueError(f"{len(mixes)} mixes: the model has {layers} layers")
    return tuple(mixes)
