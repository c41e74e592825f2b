"""The mixed-precision feed-forward block: who is computed at which precision, and how.

    h_c = act(G_c x) * (U_c x)          for each precision class c of neurons
    y   = sum_c D_c^T h_c

The base pass (plane `q4`) covers all neurons: it ranks them, it is the 4-bit class, and
the 8-bit class is its correction by plane `r4`. Pure functions over arrays; knows no
slots' owners, tiers or files.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from m2jax.ffn_spec import FfnSpec
from m2jax.kernels.sparse_swiglu import ACTIVATIONS, accumulate, project, whole
from m2jax.ranking import ClassIds, Scores, classes_of


class NeuronRows(NamedTuple):
    """Records of one plane on the device, and where the wanted ones lie.

    records: [S, R]. slots: int32 [K] rows of the wanted records in the order of their
    ids; None where records are the whole plane in the order of neurons.
    """

    records: Array | np.ndarray
    slots: Array | np.ndarray | None

    def project(
        self, h: Array, scales: Array | None, *, plane: str, ids: Array | None = None
    ) -> tuple[Array, Array]:
        """Gate and up of the wanted neurons; see `kernels.sparse_swiglu`."""
        records, slots = self._arrays()
        return project(h, records, scales, plane=plane, slots=slots, ids=ids)

    def accumulate(
        self, h: Array, scales: Array | None, *, plane: str, ids: Array | None = None
    ) -> Array:
        """The wanted neurons' down columns, weighted by h."""
        records, slots = self._arrays()
        return accumulate(h, records, scales, plane=plane, slots=slots, ids=ids)

    def _arrays(self) -> tuple[Array, Array | None]:
        slots = None if self.slots is None else jnp.asarray(self.slots)
        return jnp.asarray(self.records), slots


class BasePass(NamedTuple):
    """Gate and up pre-activations of all neurons from plane q4, [T, N] each."""

    gate: Array
    up: Array


def pad_width(h: Array, *, spec: FfnSpec) -> Array:
    """[T, D] -> [T, W]: zeros meet the zero padding of the rows."""
    return jnp.pad(h, [(0, 0), (0, spec.width - h.shape[1])])


def base_pass(h: Array, q4: Array, scales: Array, *, spec: FfnSpec) -> BasePass:
    """[T, D] normalised input -> pre-activations of all neurons."""
    return BasePass(*project(pad_width(h, spec=spec), q4, scales, plane="q4"))


class Norms(NamedTuple):
    """What scorers know of a neuron beforehand; see `params.neuron_shapes`.

    down_norm: float32 [N]. noise: float32 [N, 3].
    """

    down_norm: Array
    noise: Array


def base_scores(base: BasePass, h: Array, norms: Norms, *, spec: FfnSpec) -> Scores:
    """What the base pass says of each neuron, [T, N].

    Kept are those of most weight in the output; precise those of most expected error,
    which is not the same: where |act| is small and its slope is not, 4 bits err most.

        base: kept     |act(gate) * up| * ||down||
              precise  ||h||^2 (act'(gate)^2 up^2 noise_gate + act(gate)^2 noise_up)
                       + (act(gate) * up)^2 noise_down
        gate: |act(gate)| * ||down|| for both

    Source: kept: M2Cache, arXiv:2410.14740, section 5.2, by the base plane. precise:
    ours, first order in the rounding of q4; halves the KL of mix 0/25/75
    (docs/quality.md).
    """
    act = ACTIVATIONS[spec.activation]
    a, slope = jax.jvp(act, (base.gate,), (jnp.ones_like(base.gate),))
    if spec.scorer == "gate":
        return Scores(jnp.abs(a) * norms.down_norm[None, :])
    both = a * base.up
    of_gate, of_up, of_down = norms.noise.T[:, None, :]
    power = jnp.sum(jnp.square(h), axis=1, keepdims=True)
    precise = power * (
        jnp.square(slope * base.up) * of_gate + jnp.square(a) * of_up
    ) + (jnp.square(both) * of_down)
    return Scores(jnp.abs(both) * norms.down_norm[None, :], precise)


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
        base: the base pass, where it ranks or q4 is whole.
        ids: who is in which class.
        planes: of those that `spec.wanted` names: whole where every neuron is wanted,
            else by slots, in the order of `ids.by_plane`.
        scales: [N, 3, groups].

    Returns:
        [1, D] float32.
    """
    h = pad_width(h, spec=spec)
    if spec.uniform and spec.counts.kept:
        records = {plane: jnp.asarray(planes[plane].records) for plane in spec.wanted}
        y = whole(h, records, scales, activation=spec.activation)
        return y[:, : spec.hidden_size]
    y = jnp.zeros_like(h)
    if spec.counts.k8 + spec.counts.k4:
        if base is None:
            y = y + _picked_classes(h, ids, planes, scales, spec=spec)
        else:
            y = y + _base_classes(h, base, ids, planes, scales, spec=spec)
    if spec.counts.k16:
        rows = planes["w16"]
        gate, up = rows.project(h, None, plane="w16")
        h16 = ACTIVATIONS[spec.activation](gate) * up
        y = y + rows.accumulate(h16, None, plane="w16")
    return y[:, : spec.hidden_size]


def _base_classes(
    h: Array,
    base: BasePass,
    ids: ClassIds,
    planes: dict[str, NeuronRows],
    scales: Array,
    *,
    spec: FfnSpec,
) -> Array:
    """The 8- and 4-bit classes from the base pass over all neurons: [1, W]."""
    base_h = _base_class(base, ids, spec=spec)
    y = jnp.zeros_like(h)
    if spec.counts.k8:
        h8 = _class_8(h, base, ids, planes["r4"], scales, spec=spec)
        y = y + planes["r4"].accumulate(h8, scales, plane="r4", ids=ids.of8)
        base_h = base_h.at[:, ids.of8].set(h8)
    return y + planes["q4"].accumulate(base_h, scales, plane="q4")


def _picked_classes(
    h: Array,
    ids: ClassIds,
    planes: dict[str, NeuronRows],
    scales: Array,
    *,
    spec: FfnSpec,
) -> Array:
    """The 8- and 4-bit classes from their own records alone: [1, W]."""
    act, k8 = ACTIVATIONS[spec.activation], spec.counts.k8
    rows, named = planes["q4"], ids.by_plane("q4")
    gate, up = rows.project(h, scales, plane="q4", ids=named)
    y = jnp.zeros_like(h)
    if k8:
        residual = planes["r4"]
        more_gate, more_up = residual.project(h, scales, plane="r4", ids=ids.of8)
        gate = gate.at[:, :k8].add(more_gate)
        up = up.at[:, :k8].add(more_up)
    both = act(gate) * up
    if k8:
        y = y + residual.accumulate(both[:, :k8], scales, plane="r4", ids=ids.of8)
    return y + rows.accumulate(both, scales, plane="q4", ids=named)


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
) -> Array:
    """Activations of the 8-bit class, [1, k8]."""
    gate, up = base.gate[:, ids.of8], base.up[:, ids.of8]
    more_gate, more_up = r4.project(h, scales, plane="r4", ids=ids.of8)
    return ACTIVATIONS[spec.activation](gate + more_gate) * (up + more_up)


def feed_forward_block(
    h: Array,
    planes: dict[str, Array],
    scales: Array,
    norms: Norms,
    predicted: Array | None,
    *,
    spec: FfnSpec,
) -> Array:
    """The block for T tokens at once, each with its own classes, from whole planes.

    Args:
        h: [T, D] normalised input.
        planes: [N, R] records of every plane that `spec.wanted` names.
        predicted: scores [T, F] where `spec.predicted`.

    Returns:
        [T, D] float32: what `feed_forward` gives token by token, but for rounding.
    """
    if spec.uniform and spec.counts.kept:
        used = {plane: planes[plane] for plane in spec.wanted}
        y = whole(pad_width(h, spec=spec), used, scales, activation=spec.activation)
        return y[:, : spec.hidden_size]
    k16, k8, k4 = spec.counts
    base = None
    if "q4" in spec.wanted:
        base = base_pass(h, planes["q4"], scales, spec=spec)
    if not spec.ranked:
        scores = Scores(-jnp.arange(spec.neurons, dtype=jnp.float32)[None, :])
    elif spec.predicted:
        assert predicted is not None
        scores = Scores(predicted)
    else:
        assert base is not None
        scores = base_scores(base, h, norms, spec=spec)
    edges = jnp.asarray(np.cumsum(spec.counts), jnp.int32)
    bits = classes_of(scores.of_neurons(spec.neurons), edges)
    bits = jnp.pad(bits, [(0, 0), (0, scales.shape[0] - spec.neurons)])
    used = {
        plane: planes[plane]
        for plane, count in (("q4", k8 + k4), ("r4", k8), ("w16", k16))
        if count
    }
    return class_sum(h, base, bits, used, scales, spec=spec)


def class_sum(
    h: Array,
    base: BasePass | None,
    bits: Array,
    planes: dict[str, Array],
    scales: Array,
    *,
    spec: FfnSpec,
) -> Array:
    """The block with every neuron's class given: [T, D] float32.

    Args:
        h: [T, D]. base: the base pass, where plane q4 is among `planes`.
        bits: int32 [T or 1, N]: 16, 8, 4, or 0 for none.
        planes: [N, R] of every plane that a class needs: q4 for 8 and 4, r4, w16.
    """
    act = ACTIVATIONS[spec.activation]
    h = pad_width(h, spec=spec)
    y = jnp.zeros_like(h)
    if "q4" in planes:
        assert base is not None
        part = jnp.where(bits == 4, act(base.gate) * base.up, 0)
        if "r4" in planes:
            is8 = jnp.broadcast_to(bits == 8, base.gate.shape)
            gate, up = project(h, planes["r4"], scales, plane="r4", wanted=is8)
            h8 = jnp.where(is8, act(base.gate + gate) * (base.up + up), 0)
            part = part + h8
            y = y + accumulate(h8, planes["r4"], scales, plane="r4")
        y = y + accumulate(part, planes["q4"], scales, plane="q4")
    if "w16" in planes:
        is16 = jnp.broadcast_to(bits == 16, (h.shape[0], bits.shape[1]))
        gate, up = project(h, planes["w16"], None, plane="w16", wanted=is16)
        h16 = jnp.where(is16, act(gate) * up, 0)
        y = y + accumulate(h16, planes["w16"], None, plane="w16")
    return y[:, : spec.hidden_size]
