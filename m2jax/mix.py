"""The precision mix: what share of a layer's neurons is computed at which bits."""

import re
from dataclasses import dataclass
from typing import NamedTuple

from m2jax.arguments import as_number


class ClassCounts(NamedTuple):
    """Neurons of one layer in each precision class; what is left is skipped."""

    k16: int
    k8: int
    k4: int

    @property
    def kept(self) -> int:
        return self.k16 + self.k8 + self.k4


@dataclass(frozen=True)
class PrecisionMix:
    """Percent of neurons at 16 / 8 / 4 bits, by score; the rest is skipped."""

    percent16: float
    percent8: float
    percent4: float

    def __post_init__(self) -> None:
        for name, share in list(vars(self).items()):
            want = "a number from 0 to 100"
            object.__setattr__(self, name, as_number(share, name=name, want=want))
        shares = (self.percent16, self.percent8, self.percent4)
        if not all(0 <= share <= 100 for share in shares) or sum(shares) > 100 + 1e-9:
            raise ValueError(
                f"mix {self}: want three percentages from 0 to 100, together at most "
                "100, as in 25/25/50 (16 / 8 / 4 bits; what is missing is skipped)"
            )

    @classmethod
    def parse(cls, text: "str | PrecisionMix") -> "PrecisionMix":
        """From "25/25/50"."""
        if isinstance(text, PrecisionMix):
            return text
        number = r"\s*(\d+(?:\.\d+)?)\s*"
        match = re.fullmatch("/".join([number] * 3), text)
        if not match:
            raise ValueError(
                f"mix {text!r}: want percentages at 16/8/4 bits, as in 25/25/50"
            )
        return cls(*(float(part) for part in match.groups()))

    def counts(self, neurons: int) -> ClassCounts:
        """Class sizes of a layer: cumulative shares, each rounded half up."""
        edges = []
        total = 0.0
        for share in (self.percent16, self.percent8, self.percent4):
            total += share
            edges.append(min(neurons, int(neurons * total / 100 + 0.5)))
        return ClassCounts(edges[0], edges[1] - edges[0], edges[2] - edges[1])

    def __str__(self) -> str:
        return f"{self.percent16:g}/{self.percent8:g}/{self.percent4:g}"


ALL_16 = PrecisionMix(100, 0, 0)
ALL_4 = PrecisionMix(0, 0, 100)
