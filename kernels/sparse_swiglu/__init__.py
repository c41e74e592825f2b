"""The feed-forward block over neuron records, one precision plane at a time.

A record is gate row | up row | down column, each W weights. Per plane the weights are

    q4    s (16 n - 128)     n: nibbles 0..15, s: scale of the weight's group
    r4    s (n - 8)          what turns a q4 value into the INT8 value
    w16   the checkpoint's own numbers

and two products are needed, both linear, so that a mixed-precision feed-forward block
is a sum of one pair of calls per plane:

    project     gate[t, n] = sum_d x[t, d] G[n, d];  up likewise with U
    accumulate  y[t, d] = sum_n h[t, n] D[n, d]

`implementation=`: "xla" is the oracle, "xla_blocked" widens a tile of records at a
time, "cpu_ffi" is a C++ kernel that reads records where they lie. None: see
`kernels.choice`.
"""

from jax import Array

from m2jax.kernels.choice import default_implementation
from m2jax.kernels.sparse_swiglu import native, reference

PROJECT = {
    "xla": reference.of_picked(reference.project_xla),
    "xla_blocked": reference.of_picked(reference.project_blocked),
    "cpu_ffi": native.project_native,
}
ACCUMULATE = {
    "xla": reference.of_picked(reference.accumulate_xla),
    "xla_blocked": reference.of_picked(reference.accumulate_blocked),
    "cpu_ffi": native.accumulate_native,
}

__all__ = ["ACCUMULATE", "PROJECT", "accumulate", "default_implementation", "project"]


def _choose(table: dict, implementation: str | None):
    if implementation is None:
        implementation = default_implementation()
    if implementation not in table:
        raise ValueError(
            f"sparse_swiglu: implementation {implementation!r}: want one of "
            f"{sorted(table)}"
        )
    return table[implementation]


def project(
    x: Array,
    records: Array,
    scales: Array | None,
    *,
    plane: str,
    slots: Array | None = None,
    ids: Array | None = None,
    implementation: str | None = None,
) -> tuple[Array, Array]:
    """Gate and up pre-activations of the neurons whose records are given.

    Args:
        x: [T, W] float32.
        records: [N, R]: uint8 for q4 and r4 (R = 3 W / 2, low nibbles are the first
            half of a row), the numbers themselves for w16 (R = 3 W, float32, float16,
            or bfloat16 bits as uint16).
        scales: [N, 3, groups] float16; None for w16.
        plane: "q4", "r4" or "w16".
        slots: int32 [K] records that take part, in their order; None = all N.
        ids: int32 [K] rows of `scales` that belong to them; None = all.

    Returns:
        gate, up: [T, K] float32.
    """
    form = _choose(PROJECT, implementation)
    return form(x, records, scales, plane=plane, slots=slots, ids=ids)


def accumulate(
    h: Array,
    records: Array,
    scales: Array | None,
    *,
    plane: str,
    slots: Array | None = None,
    ids: Array | None = None,
    implementation: str | None = None,
) -> Array:
    """The sum of down columns weighted by activations.

    Args:
        h: [T, K] float32; zero where a neuron does not take part.
        records, scales, plane, slots, ids: as for `project`.

    Returns:
        y: [T, W] float32.
    """
    form = _choose(ACCUMULATE, implementation)
    return form(h, records, scales, plane=plane, slots=slots, ids=ids)
