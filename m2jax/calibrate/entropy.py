"""The paper's search for the precision mix: least entropy of the model's own text.

Decisions only: the model is one function that measures an entropy; knows no jax. The
mix is the same in all layers. Low entropy is not correctness, since a text that repeats
itself has little of it: this is here to reproduce the paper; `search` minimises KL.
"""

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from math import floor, isfinite
from typing import NamedTuple

from m2jax.errors import NumericalError
from m2jax.layer_mixes import WHOLE, mix_from_edges
from m2jax.mix import PrecisionMix

Measure = Callable[[PrecisionMix], float]
Progress = Callable[[int, int], None]

BITS = (16, 8, 4)
# A share is rounded down to 0.01 percent, but not for the rounding of floats.
SLACK = 1e-6


class Point(NamedTuple):
    """A mix for all layers and its entropy, in nats a generated token."""

    mix: PrecisionMix
    entropy: float


@dataclass(frozen=True)
class LineSearch:
    """All points in the order measured, and the first of least entropy."""

    points: tuple[Point, ...]
    best: Point


def search_three(
    measure: Measure,
    *,
    bits: float = 8,
    step: float = 5,
    planes: Collection[str] = ("q4", "r4", "w16"),
    progress: Progress = lambda done, total: None,
) -> LineSearch:
    """Algorithm 1 with three classes, all neurons computed, at constant bits.

        r16 = t,   r8 = (bits - 4 - 12 t) / 4,   r4 = 1 - t - r8

    t goes from its least value (0 up to 8 bits, where that is plain INT8) to its
    largest, (bits - 4) / 12, by step; both ends are measured, no share is negative.
    At 8 bits the paper's 25/25/50 is t = 25 %. Cumulative shares are rounded down to
    0.01 percent: never over the budget.

    Args:
        measure: entropy of the model's own generation under a mix.
        bits: on average a weight, from 4 to 16.
        step: of t, in percent.
        planes: of the store. Without r4 there is no 8-bit class, and of these mixes
            only the last, r16 = (bits - 4) / 12.

    Raises:
        ValueError: bits no such mix has, or a step that is no percentage.
        NumericalError: an entropy that is not finite.

    Source: M2Cache, arXiv:2410.14740, section 5.2; three classes are ours.
    """
    if not 4 <= bits <= 16:
        raise ValueError(
            f"{bits:g} bits: want 4 to 16, what mixes of 16, 8 and 4 bits that skip "
            "no neuron have"
        )
    last, mixes = (bits - 4) / 12, []
    first = max(0.0, (bits - 8) / 8) if "r4" in planes else last
    for t in _steps(first, last, step):
        edge8 = t + (bits - 4 - 12 * t) / 4
        mixes.append(mix_from_edges(_hundredths(t), _hundredths(edge8), WHOLE))
    return _least(measure, mixes, progress)


def search_two(
    measure: Measure,
    *,
    high: int = 16,
    low: int = 4,
    bits: float = 8,
    step: float = 5,
    progress: Progress = lambda done, total: None,
) -> LineSearch:
    """Algorithm 1 as the paper has it: two precisions, a constant number of bytes.

        r_low = (bits - high * r_high) / low;   what is left is skipped

    The printed algorithm starts at r_high = 0 and repeats r_high += s, r_low -= s * n,
    n = high / low, then measures, until r_low < 0. Here it differs in three guards:

    - the start, all that the budget gives at low precision, is measured too;
    - shares are at most 100 % together: with a budget above `low` bits it starts where
      no neuron is skipped, since r_low would be more than all;
    - the last point is where r_low is 0, never one where it is negative.

    Args:
        measure: entropy of the model's own generation under a mix.
        high, low: bits, of 16, 8 and 4.
        bits: on average a weight, skipped ones included: above 0, at most `high`.
        step: of r_high, in percent.

    Raises:
        ValueError: not two such precisions, or bits no such mix has.
        NumericalError: an entropy that is not finite.

    Source: M2Cache, arXiv:2410.14740, section 5.2, algorithm 1.
    """
    if high not in BITS or low not in BITS or high <= low:
        raise ValueError(
            f"precisions {high} and {low}: want two of 16, 8 and 4, the higher first"
        )
    if not 0 < bits <= high:
        raise ValueError(f"{bits:g} bits: want more than 0 and at most {high}")
    mixes = []
    start = max(0.0, (bits - low) / (high - low))
    for share in _steps(start, bits / high, step):
        at_high = _hundredths(share)
        kept = _hundredths(share + (bits - high * share) / low)
        edges = {high: at_high, low: kept}
        edges.setdefault(16, 0)
        edges.setdefault(8, edges[16])
        edges.setdefault(4, kept)
        mixes.append(mix_from_edges(edges[16], edges[8], edges[4]))
    return _least(measure, mixes, progress)


def _hundredths(share: float) -> int:
    return min(WHOLE, max(0, floor(share * WHOLE + SLACK)))


def _steps(first: float, last: float, step: float) -> list[float]:
    """first, then multiples of the step that lie between, then last."""
    if not 0.01 <= step <= 100:
        raise ValueError(f"step {step}: want a percentage from 0.01 to 100")
    inner = (count * step / 100 for count in range(1, floor(100 / step) + 1))
    return [first, *(t for t in inner if first < t < last), last]


def _least(
    measure: Measure, mixes: Iterable[PrecisionMix], progress: Progress
) -> LineSearch:
    distinct = list(dict.fromkeys(mixes))
    points = []
    for done, mix in enumerate(distinct, start=1):
        entropy = float(measure(mix))
        if not isfinite(entropy):
            raise NumericalError(f"mix {mix}: the entropy is {entropy}")
        points.append(Point(mix, entropy))
        progress(done, len(distinct))
    return LineSearch(tuple(points), min(points, key=lambda point: point.entropy))
