"""Counts, checks and keeps what a search measures, and what it found in the end."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import NamedTuple

from m2jax.calibrate.levels import Cost, total_cost
from m2jax.errors import NumericalError
from m2jax.layer_mixes import format_mixes
from m2jax.mix import PrecisionMix

Mixes = tuple[PrecisionMix, ...]
Progress = Callable[[int, int], None]


class Measured(NamedTuple):
    """One mix a layer, what they cost together, and the KL of the whole model."""

    mixes: Mixes
    cost: float
    kl: float


class Probed(NamedTuple):
    """KL where this layer has the mix and all others are at 16 bits."""

    layer: int
    mix: PrecisionMix
    kl: float


@dataclass(frozen=True)
class Found:
    """What a search found, and all it saw.

    best: the least KL measured. uniform: the least of the same mix in all layers.
    estimate: KL of `candidate`, the additive optimum, as the sum of single layers;
    both None where all neurons at the best class are within the budget.
    evaluated: whole models, in the order measured. probed: single layers.
    """

    best: Measured
    uniform: Measured
    budget: float
    estimate: float | None
    candidate: Measured | None
    evaluated: tuple[Measured, ...]
    probed: tuple[Probed, ...]

    @property
    def mixes(self) -> Mixes:
        return self.best.mixes

    @property
    def kl(self) -> float:
        return self.best.kl

    @property
    def cost(self) -> float:
        return self.best.cost


class Meter:
    """Owns the two measuring functions and the record of what they said."""

    def __init__(
        self,
        probe: Callable[[int, PrecisionMix], float],
        joint: Callable[[Mixes], float],
        costs: Sequence[Cost],
        progress: Progress,
        limit: int,
    ):
        self._probe, self._joint = probe, joint
        self._costs, self._progress = costs, progress
        self._limit, self._probes = limit, 0
        self.probed: list[Probed] = []
        self.seen: dict[Mixes, Measured] = {}

    def expect(self, probes: int) -> None:
        self._probes = probes
        self._progress(0, probes + self._limit)

    def probe(self, layer: int, mix: PrecisionMix) -> float:
        kl = float(self._probe(layer, mix))
        if not isfinite(kl):
            raise NumericalError(f"layer {layer}: KL at mix {mix} is {kl}")
        self.probed.append(Probed(layer, mix, kl))
        self._tick()
        return kl

    def measure(self, mixes: Mixes) -> Measured:
        """Of the whole model; the same mixes once only."""
        if mixes not in self.seen:
            kl = float(self._joint(mixes))
            if not isfinite(kl):
                raise NumericalError(
                    f"KL at mix {format_mixes(mixes)} is {kl}, though no layer by "
                    "itself is to blame"
                )
            self.seen[mixes] = Measured(mixes, total_cost(mixes, self._costs), kl)
            self._tick()
        return self.seen[mixes]

    def _tick(self) -> None:
        done = len(self.probed) + len(self.seen)
        self._progress(done, self._probes + self._limit)

    @property
    def best(self) -> Measured:
        return _least(self.seen.values())

    def found(
        self,
        budget: float,
        *,
        estimate: float | None = None,
        candidate: Measured | None = None,
    ) -> Found:
        done = len(self.probed) + len(self.seen)
        self._progress(done, done)
        return Found(
            best=self.best,
            uniform=_least(m for m in self.seen.values() if len(set(m.mixes)) == 1),
            budget=budget,
            estimate=estimate,
            candidate=candidate,
            evaluated=tuple(self.seen.values()),
            probed=tuple(self.probed),
        )


def _least(measured: Iterable[Measured]) -> Measured:
    return min(measured, key=lambda each: (each.kl, each.cost))
