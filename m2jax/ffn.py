"""The mixed-precision feed-forward block: who is computed at which precision, and how.

    h_c = act(G_c x) * (U_c x)          for each precision class c of neurons
    y   = sum_c D_c^T h_c

The base pass (plane `q4`) covers all neurons: it ranks them, it is the 4-bit class, and
the 8-bit class is its correction by plane `r4`. Pure functions over arrays; knows no
slots' owners, tiers or files.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from m2jax.config import Activation, ModelConfig
from m2jax.kernels.sparse_swiglu import accumulate, project
from m2jax.layout import Layout
from m2jax.mix import ClassCounts, PrecisionMix

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
}
SCORERS = ("base", "none")


@dataclass(frozen=True)
class FfnSpec:
    """Static facts of one layer's feed-forward block under a mix.

    neurons: F, without padding. width: record row length. scorer: "base" ranks by
    |h4| * ||down4||; "none" takes neurons in stored order.
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
        return not self.uniform and self.scorer == "base"

    @property
    def uniform(self) -> bool:
        """Whether all neurons are in one class (or all are skipped)."""
        return max(self.counts) == self.neurons or self.counts.kept == 0

    @property
    def uses_base(self) -> bool:
        return self.ranked or self.counts.k8 + self.counts.k4 > 0

    @property
    def skips(self) -> bool:
        """Whether some neurons are in no class."""
        return self.counts.kept < self.neurons

    @property
    def ranked_counts(self) -> ClassCounts:
        """Neurons of each class that are named by id; where none is skipped, the 4-bit
        class is whoever is not named."""
        k16, k8, k4 = self.counts
        return ClassCounts(k16, k8, k4 if self.skips else 0)

    @property
    def wanted(self) -> dict[str, int]:
        """Records that one decode step wants of each plane it uses."""
        all_planes = {
            "q4": self.neurons if self.uses_base else 0,
            "r4": self.counts.k8,
            "w16": self.counts.k16,
        }
        return {plane: count for plane, count in all_planes.items() if count}

    def dense(self, plane: str) -> bool:
        """Whether every step wants the whole plane."""
        return self.wanted.get(plane) == self.neurons


def make_spec(
    config: ModelConfig, layout: Layout, mix: PrecisionMix, *, scorer: str
) -> FfnSpec:
    if scorer == "lowrank":
        raise NotImplementedError(
            "scorer 'lowrank' needs a trained predictor, and this version cannot train "
            f"one; use one of {SCORERS}"
        )
    if scorer not in SCORERS:
        raise ValueError(f"scorer {scorer!r}: want one of {SCORERS}")
    return FfnSpec(
        activation=config.hidden_act,
        neurons=config.intermediate_size,
        hidden_size=config.hidden_size,
        width=layout.width,
        counts=mix.counts(config.intermediate_size),
        scorer=scorer,
    )


class NeuronRows(NamedTuple):
    """Records of one plane on the device, and where the wanted ones lie.

    records: [S, R]. slots: int32 [K] rows of the wanted records in the order of their
    ids; None where records are the whole plane in the order of neurons.
    """

    records: Array | np.ndarray
    slots: Array | np.ndarray | None

    def take(self) -> Array:
        records = jnp.asarray(self.records)
        return records if self.slots is None else records[self.slots]


class BasePass(NamedTuple):
    """Gate and up pre-activations of all neurons from plane q4, [T, N] each."""

    gate: Array
    up: Array


class ClassIds(NamedTuple):
    """Neuron ids of each precision class, int32 [k16], [k8], [k4], best first.

    of4 is empty where no neuron is skipped (`FfnSpec.ranked_counts`).
    """

    of16: Array
    of8: Array
    of4: Array

    def by_plane(self, plane: str) -> Array:
        return self.of16 if plane == "w16" else self.of8


def split_classes(ids: Array, *, spec: FfnSpec) -> ClassIds:
    """Ranked ids [kept], best first, cut into classes."""
    k16, k8, _ = spec.ranked_counts
    return ClassIds(*jnp.split(ids, [k16, k16 + k8]))


def pad_width(h: Array, *, spec: FfnSpec) -> Array:
    """[T, D] -> [T, W]: zeros meet the zero padding of the rows."""
    return jnp.pad(h, [(0, 0), (0, spec.width - h.shape[1])])


def base_pass(h: Array, q4: Array, scales: Array, *, spec: FfnSpec) -> BasePass:
    """[T, D] normalised input -> pre-activations of all neurons."""
    return BasePass(*project(pad_width(h, spec=spec), q4, scales, plane="q4"))


def rank(base: BasePass, down_norm: Array, *, spec: FfnSpec) -> Array:
    """Ids of the neurons in `spec.ranked_counts`, best first: int32 [T, their sum].

        score = |act(gate) * up| * ||down||, ties to the lower id

    Source: M2Cache, arXiv:2410.14740, section 5.2, with the score of the base plane.
    """
    h = ACTIVATIONS[spec.activation](base.gate) * base.up
    scores = (jnp.abs(h) * down_norm[None, :])[:, : spec.neurons]
    return lax.top_k(scores, spec.ranked_counts.kept)[1]


def feed_forward(
    h: Array,
    base: BasePass | None,
    ids: ClassIds,
    planes: dict[str, NeuronRows],
    scales: Array,
    *,
    spec: FfnSpec,
) -> Array:
    """The block for one token, with only the wanted records.

    Args:
        h: [1, D] normalised input.
        base: the base pass, where the mix uses one.
        ids: who is in which class.
        planes: of those that `spec.wanted` names: q4 whole; r4 and w16 whole where
            every neuron is wanted, else by slots, in the order of their class's ids.
        scales: [N, 3, groups].

    Returns:
        [1, D] float32.
    """
    h = pad_width(h, spec=spec)
    y = jnp.zeros_like(h)
    if base is not None and spec.counts.k8 + spec.counts.k4:
        base_h = _base_class(base, ids, spec=spec)
        if spec.counts.k8:
            h8, residual, r4_scales = _class_8(
                h, base, ids, planes["r4"], scales, spec=spec
            )
            y = y + accumulate(h8, residual, r4_scales, plane="r4")
            base_h = h8 if spec.dense("r4") else base_h.at[:, ids.of8].set(h8)
        y = y + accumulate(base_h, planes["q4"].take(), scales, plane="q4")
    if spec.counts.k16:
        rows = planes["w16"].take()
        gate, up = project(h, rows, None, plane="w16")
        h16 = ACTIVATIONS[spec.activation](gate) * up
        y = y + accumulate(h16, rows, None, plane="w16")
    return y[:, : spec.hidden_size]


def _base_class(base: BasePass, ids: ClassIds, *, spec: FfnSpec) -> Array:
    """[1, N] activations of the 4-bit class, zero for the 16-bit and the skipped."""
    h4 = ACTIVATIONS[spec.activation](base.gate) * base.up
    if not spec.skips:
        return h4.at[:, ids.of16].set(0) if spec.counts.k16 else h4
    return jnp.zeros_like(h4).at[:, ids.of4].set(h4[:, ids.of4])


def _class_8(
    h: Array,
    base: BasePass,
    ids: ClassIds,
    r4: NeuronRows,
    scales: Array,
    *,
    spec: FfnSpec,
) -> tuple[Array, Array, Array]:
    """Activations of the 8-bit class [1, k8 or N], its r4 records and their scales."""
    gate, up = base
    if not spec.dense("r4"):
        gate, up, scales = gate[:, ids.of8], up[:, ids.of8], scales[ids.of8]
    residual = r4.take()
    more_gate, more_up = project(h, residual, scales, plane="r4")
    h8 = ACTIVATIONS[spec.activation](gate + more_gate) * (up + more_up)
    return h8, residual, scales


def feed_forward_block(
    h: Array,
    planes: dict[str, Array],
    scales: Array | None,
    down_norm: Array | None,
    *,
    spec: FfnSpec,
) -> Array:
    """The block for T tokens at once, each with its own classes, from whole planes.

    Args:
        h: [T, D] normalised input.
        planes: [N, R] records of every plane that `spec.wanted` names.

    Returns:
        [T, D] float32: what `feed_forward` gives token by token, but for rounding.
    """
    act = ACTIVATIONS[spec.activation]
    k16, k8, k4 = spec.counts
    h = pad_width(h, spec=spec)
    y = jnp.zeros_like(h)
    if not spec.counts.kept:
        return y[:, : spec.hidden_size]
    tokens, neurons = h.shape[0], next(iter(planes.values())).shape[0]
    base = None
    if spec.uses_base:
        base = BasePass(*project(h, planes["q4"], scales, plane="q4"))
    by_rank = np.repeat(np.array([16, 8, 4], np.int32), spec.counts)
    if spec.ranked:
        assert base is not None
        assert down_norm is not None
        ids = rank(base, down_norm, spec=spec)
        rest = jnp.full((tokens, neurons), 0 if spec.skips else 4, jnp.int32)
        rows = jnp.arange(tokens)[:, None]
        bits = rest.at[rows, ids].set(by_rank[: spec.ranked_counts.kept])
    else:
        bits = jnp.pad(by_rank, (0, neurons - len(by_rank)))[None, :]
    if k8 + k4:
        assert base is not None
        part = jnp.where(bits == 4, act(base.gate) * base.up, 0)
        if k8:
            gate, up = project(h, planes["r4"], scales, plane="r4")
            h8 = act(base.gate + gate) * (base.up + up)
            h8 = jnp.where(bits == 8, h8, 0)
            part = part + h8
            y = y + accumulate(h8, planes["r4"], scales, plane="r4")
        y = y + accumulate(part, planes["q4"], scales, plane="q4")
    if k16:
        gate, up = project(h, planes["w16"], None, plane="w16")
        h16 = jnp.where(bits == 16, act(gate) * up, 0)
        y = y + accumulate(h16, planes["w16"], None, plane="w16")
    return y[:, : spec.hidden_size]
