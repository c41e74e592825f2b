"""Models, mixes and budgets to plan for."""

import re
from dataclasses import dataclass
from itertools import cycle, islice

import pytest
from hypothesis import strategies as st

from m2jax.demand import make_demand
from m2jax.errors import DoesNotFit
from m2jax.ffn_spec import FfnSpec
from m2jax.layout import Layout
from m2jax.mix import PrecisionMix
from m2jax.plan import MemoryPlan, make_plan
from tests.small_configs import tiny

MIXES = [
    "100/0/0",
    "0/100/0",
    "0/0/100",
    "25/25/50",
    "20/20/20",
    "0/25/75",
    "50/0/0",
    "1/98/1",
]
CHUNK = 64
ENOUGH = 1 << 40


@dataclass(frozen=True)
class Case:
    """A model, its mixes and what is always on the device.

    mixes: of the layers in turn, begun again where there are more.
    """

    layers: int
    neurons: int
    mixes: tuple[str, ...]
    scorer: str
    dense_bytes: int
    context: int
    in_place: bool = False

    @property
    def layout(self) -> Layout:
        chunks = -(-self.neurons // CHUNK)
        return Layout(self.neurons, "float16", 32, 128, CHUNK, chunks)

    @property
    def specs(self) -> list[FfnSpec]:
        """One a layer."""
        return [self._spec(mix) for mix in islice(cycle(self.mixes), self.layers)]

    def _spec(self, mix: str) -> FfnSpec:
        counts = PrecisionMix.parse(mix).counts(self.neurons)
        return FfnSpec("silu", self.neurons, 128, 128, counts, self.scorer)

    @property
    def layer_bytes(self) -> int:
        """Of the largest layer."""
        return max(sum(map(self.layout.plane_bytes, s.wanted)) for s in self.specs)

    def plan(self, hbm: int, dram: int, *, distance: int = 2) -> MemoryPlan:
        config = tiny(
            "llama",
            num_hidden_layers=self.layers,
            intermediate_size=self.neurons,
            max_position_embeddings=4096,
        )
        return make_plan(
            config,
            self.layout,
            make_demand(self.specs),
            dense_bytes=self.dense_bytes,
            context=self.context,
            hbm_bytes=hbm,
            dram_bytes=dram,
            distance=distance,
            in_place=self.in_place,
        )

    def in_transit(self, plan: MemoryPlan) -> int:
        """Bytes of the two largest layers that pass."""
        passing = [
            sum(map(self.layout.plane_bytes, plan.placement.streamed(layer)))
            for layer in plan.placement.dram_layers
        ]
        return sum(sorted(passing, reverse=True)[: 0 if self.in_place else 2])

    @property
    def least_dram(self) -> int:
        """DRAM bytes that are always enough: of the layers in use at once."""
        return (1 + self.in_place) * self.layer_bytes

    @property
    def whole(self) -> int:
        """HBM bytes with everything resident."""
        return self.plan(ENOUGH, 1).footprint.hbm

    def smallest_hbm(self) -> int:
        return smallest(lambda: self.plan(1, ENOUGH))

    def smallest_dram(self, hbm: int) -> int:
        return smallest(lambda: self.plan(hbm, 1))


def smallest(plan) -> int:
    """The bytes that a refusal names."""
    with pytest.raises(DoesNotFit) as caught:
        plan()
    found = re.search(r"\((\d+) bytes", str(caught.value))
    assert found is not None
    return int(found[1])


def cases(mixes: st.SearchStrategy[tuple[str, ...]]) -> st.SearchStrategy[Case]:
    return st.builds(
        Case,
        layers=st.integers(1, 9),
        neurons=st.integers(1, 400),
        mixes=mixes,
        scorer=st.sampled_from(["base", "none"]),
        dense_bytes=st.integers(0, 100_000),
        context=st.integers(1, 1000),
        in_place=st.booleans(),
    )


even = cases(st.tuples(st.sampled_from(MIXES)))
uneven = cases(st.lists(st.sampled_from(MIXES), min_size=1, max_size=4).map(tuple))
share = st.floats(0, 1.1)
