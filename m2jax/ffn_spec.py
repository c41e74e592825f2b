"""Who computes what in a feed-forward block: static facts only, no arrays.

A spec says how many neurons of a layer are in each precision class, what ranks them,
and how many records of each plane a step then wants.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from m2jax.config import Activation, ModelConfig
from m2jax.layout import PLANES, Layout
from m2jax.mix import ClassCounts, PrecisionMix

SCORERS = ("base", "gate", "lowrank", "none")


@dataclass(frozen=True)
class FfnSpec:
    """Static facts of one layer's feed-forward block under a mix.

    neurons: F, without padding. width: record row length. scorer: "base" keeps by
    |h4| * ||down4|| and gives bits by expected error, "gate" ranks by |act(gate4)| *
    ||down4||, "lowrank" by a trained predictor; "none" takes neurons in stored order.
    """

    activation: Activation
    neurons: int
    hidden_size: int
    width: int
    counts: ClassCounts
    scorer: str

    @property
    def ranked(self) -> bool:
        """Whether neurons differ in class and the scorer decides."""
        return not self.uniform and self.scorer != "none"

    @property
    def predicted(self) -> bool:
        """Whether a trained predictor ranks."""
        return self.ranked and self.scorer == "lowrank"

    @property
    def uniform(self) -> bool:
        """Whether all neurons are in one class (or all are skipped)."""
        return max(self.counts) == self.neurons or self.counts.kept == 0

    @property
    def base_whole(self) -> bool:
        """Whether plane q4 is multiplied whole: to rank, or as all neurons use it."""
        _, k8, k4 = self.counts
        return (self.ranked and not self.predicted) or k8 + k4 == self.neurons

    @property
    def base_picked(self) -> bool:
        """Whether only the records of the 8- and 4-bit classes are taken of q4."""
        return self.counts.k8 + self.counts.k4 > 0 and not self.base_whole

    @property
    def skips(self) -> bool:
        """Whether some neurons are in no class."""
        return self.counts.kept < self.neurons

    @property
    def ranked_counts(self) -> ClassCounts:
        """Neurons of each class that are named by id; where q4 is whole and none is
        skipped, the 4-bit class is whoever is not named."""
        k16, k8, k4 = self.counts
        return ClassCounts(k16, k8, k4 if self.skips or self.base_picked else 0)

    @property
    def wanted(self) -> dict[str, int]:
        """Records that one decode step wants of each plane it uses."""
        k16, k8, k4 = self.counts
        all_planes = {
            "q4": self.neurons if self.base_whole else k8 + k4,
            "r4": k8,
            "w16": k16,
        }
        return {plane: count for plane, count in all_planes.items() if count}

    def dense(self, plane: str) -> bool:
        """Whether every step wants the whole plane."""
        return self.wanted.get(plane) == self.neurons


def make_specs(
    config: ModelConfig,
    layout: Layout,
    mixes: Sequence[PrecisionMix],
    *,
    scorer: str,
    planes: Sequence[str] = PLANES,
) -> tuple[FfnSpec, ...]:
    """One spec a layer.

    Args:
        mixes: one a layer. planes: those that the store has.

    Raises:
        ValueError: an unknown scorer, or a mix that wants a plane the store lacks.
    """
    if scorer not in SCORERS:
        raise ValueError(f"scorer {scorer!r}: want one of {SCORERS}")
    specs = tuple(
        FfnSpec(
            activation=config.hidden_act,
            neurons=config.intermediate_size,
            hidden_size=config.hidden_size,
            width=layout.width,
            counts=mix.counts(config.intermediate_size),
            scorer=scorer,
        )
        for mix in mixes
    )
    for layer, (spec, mix) in enumerate(zip(specs, mixes)):
        lacking = [plane for plane in spec.wanted if plane not in planes]
        if lacking:
            bits = {"w16": "16 bits", "r4": "8 bits", "q4": "4 bits"}[lacking[-1]]
            raise ValueError(
                f"mix {mix} (layer {layer}) wants {bits}, and this store has no plane "
                f"{lacking[-1]}, only {', '.join(planes)}: want another mix, or "
                "convert the checkpoint again with all planes"
            )
    return specs


def with_mix(spec: FfnSpec, mix: PrecisionMix) -> FfnSpec:
    """The same layer under another mix."""
    return replace(spec, counts=mix.counts(spec.neurons))
