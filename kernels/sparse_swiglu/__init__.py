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
time; None chooses the blocked form on a CPU and "xla" elsewhere.
"""

from jax import Array

from m2jax.kernels.choice import default_implementation
from m2jax.kernels.sparse_swiglu import reference

PROJECT = {"xla": reference.project_xla, "xla_blocked": reference.project_blocked}
ACCUMULATE = {
    "xla": reference.accumulate_xla,
    "xla_blocked": reference.accumulate_blocked,
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

    Returns:
        gate, up: [T, N] float32.
    """
    return _choose(PROJECT, implementation)(x, records, scales, plane=plane)


def accumulate(
    h: Array,
    records: Array,
    scales: Array | None,
    *,
    plane: str,
    implementation: str | None = None,
) -> Array:
    """The sum of down columns weighted by activations.

    Args:
        h: [T, N] float32; zero where a neuron does not take part.
        records, scales, plane: as for `project`.

    Returns:
        y: [T, W] float32.
    """
    return _choose(ACCUMULATE, implementation)(h, records, scales, plane=plane)
