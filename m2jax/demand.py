"""What the layers ask of the tiers: which planes, and how many records a step."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from m2jax.ffn_spec import FfnSpec
from m2jax.layout import PLANES


@dataclass(frozen=True)
class Demand:
    """What the layers ask of the tiers.

    neurons: F. wanted: per layer, plane to records that a decode step wants; 0 where
    only whole passes (prefill) use the plane. drafting: planes that must lie on the
    device whole: a draft is made of them.
    """

    neurons: int
    wanted: tuple[Mapping[str, int], ...]
    drafting: tuple[str, ...] = ()

    @property
    def planes(self) -> tuple[str, ...]:
        """Those that any layer uses."""
        return tuple(p for p in PLANES if any(p in layer for layer in self.wanted))

    def dense(self, layer: int, plane: str) -> bool:
        """Whether every step wants the layer's whole plane."""
        return self.wanted[layer].get(plane) == self.neurons


def make_demand(
    specs: Sequence[FfnSpec],
    *,
    passing: Sequence[str] = (),
    drafting: Sequence[str] = (),
) -> Demand:
    """Demand of a model's layers.

    Args:
        passing: planes that whole passes use though no mix may want them.
        drafting: planes that every draft step wants whole.
    """
    neurons = specs[0].neurons
    extra, whole = dict.fromkeys(passing, 0), dict.fromkeys(drafting, neurons)
    wanted = tuple({**extra, **spec.wanted, **whole} for spec in specs)
    return Demand(neurons, wanted, tuple(drafting))
