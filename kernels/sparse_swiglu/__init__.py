"""The feed-forward block over neuron records, one precision plane at a time.

A record is gate row | up row | down column, each W weights. Per plane the weights are

    q4    s (16 n - 128)     n: nibbles 0..15, s: scale of the weight's group
    r4    s (n - 8)          what turns a q4 value into the INT8 value
    w16   the checkpoint's own numbers

and two products are needed, both linear, so that a mixed-precision feed-forward block
is a sum of one pair of calls per plane:

    project     gate[t, n] = sum_d x[t, d] G[n, d];  up likewise with U
    accumulate  y[t, d] = sum_n h[t, n] D[n, d]

Where every neuron of the layer is at the same precision, `whole` is the block in one.

`implementation=`: "xla" is the oracle, "xla_blocked" widens a tile of records at a
time, "cpu_ffi" and "cuda_ffi" are kernels in C++ and CUDA that read records where they
lie, "pallas_tpu" a kernel for TPUs that was never run on one, "mosaic_gpu" one for
Hopper GPUs, with jax 0.11 alone; each for the shapes that it takes. None: see
`kernels.choice`.
"""

from collections.abc import Mapping
from functools import partial

import jax
from jax import Array

from m2jax.kernels.choice import chosen, default_implementation
from m2jax.kernels.sparse_swiglu import cuda, native, reference
from m2jax.kernels.sparse_swiglu.activation import ACTIVATIONS


def _project_tpu(*arrays, **options):
    # Pallas is experimental and takes 50 ms to import: only who asks for it meets it.
    from m2jax.kernels.sparse_swiglu.pallas_tpu import project_tpu

    return project_tpu(*arrays, **options)


def _accumulate_tpu(*arrays, **options):
    from m2jax.kernels.sparse_swiglu.pallas_tpu import accumulate_tpu

    return accumulate_tpu(*arrays, **options)


def _why_not_tpu(tokens: int, *arrays, down: bool) -> str | None:
    from m2jax.kernels.sparse_swiglu.pallas_tpu import why_not_tpu

    return why_not_tpu(tokens, *arrays)


def has_mosaic() -> bool:
    """Whether this jax compiles "mosaic_gpu"."""
    return (0, 11) <= jax.__version_info__ < (0, 12)


def _gpu():
    # 0.12 asks that transfers are whole sectors, which rows and scales are not.
    if not has_mosaic():
        raise NotImplementedError(
            "sparse_swiglu: implementation 'mosaic_gpu' needs jax 0.11, this is "
            f"{jax.__version__}; name another, or None"
        )
    from m2jax.kernels.sparse_swiglu import mosaic_gpu

    return mosaic_gpu


def _project_gpu(*arrays, **options):
    return _gpu().project_gpu(*arrays, **options)


def _accumulate_gpu(*arrays, **options):
    return _gpu().accumulate_gpu(*arrays, **options)


def _why_not_gpu(tokens: int, *arrays, down: bool) -> str | None:
    return _gpu().why_not_gpu(tokens, *arrays)


PROJECT = {
    "xla": reference.of_picked(reference.project_xla),
    "xla_blocked": reference.of_picked(reference.project_blocked),
    "cpu_ffi": native.project_native,
    "cuda_ffi": cuda.project_cuda,
    "pallas_tpu": _project_tpu,
    "mosaic_gpu": _project_gpu,
}
ACCUMULATE = {
    "xla": reference.of_picked(reference.accumulate_xla),
    "xla_blocked": reference.of_picked(reference.accumulate_blocked),
    "cpu_ffi": native.accumulate_native,
    "cuda_ffi": cuda.accumulate_cuda,
    "pallas_tpu": _accumulate_tpu,
    "mosaic_gpu": _accumulate_gpu,
}
WHY_NOT = {
    "cpu_ffi": native.why_not,
    "cuda_ffi": cuda.why_not,
    "pallas_tpu": _why_not_tpu,
    "mosaic_gpu": _why_not_gpu,
}
_chosen = partial(chosen, "sparse_swiglu")

__all__ = [
    "ACCUMULATE",
    "ACTIVATIONS",
    "PROJECT",
    "accumulate",
    "default_implementation",
    "project",
    "whole",
]


def project(
    x: Array,
    records: Array,
    scales: Array | None,
    *,
    plane: str,
    slots: Array | None = None,
    ids: Array | None = None,
    wanted: Array | None = None,
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
        wanted: bool [T, K], whose values are looked at: others may be anything. Only
            "cpu_ffi" gains by it, for a few tokens. None = all.

    Returns:
        gate, up: [T, K] float32.

    Raises:
        ValueError, NotImplementedError: no such implementation; it does not take the
            shape.
    """
    given = x.shape[0], records, scales
    name = _chosen(PROJECT, implementation, WHY_NOT, *given, down=False)
    form = PROJECT[name]
    if name == "cpu_ffi":
        form = partial(form, wanted=wanted)
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

    Raises:
        ValueError, NotImplementedError: as for `project`.
    """
    given = h.shape[0], records, scales
    name = _chosen(ACCUMULATE, implementation, WHY_NOT, *given, down=True)
    return ACCUMULATE[name](h, records, scales, plane=plane, slots=slots, ids=ids)


def whole(
    x: Array,
    planes: Mapping[str, Array],
    scales: Array | None,
    *,
    activation: str,
    implementation: str | None = None,
) -> Array:
    """The block with all records of the given planes.

        y[t, d] = sum_n act(gate[t, n]) up[t, n] D[n, d]

    Args:
        x: [T, W] float32.
        planes: [N, R] records by plane: q4 (4 bits), q4 and r4 (8 bits), or w16 alone.
        scales: as for `project`; w16 does not look at them.
        activation: one of ACTIVATIONS.

    Returns:
        y: [T, W] float32.

    Raises:
        ValueError, NotImplementedError: as for `project`.
    """
    if "w16" in planes:
        scales = None
    given = x.shape[0], next(iter(planes.values())), scales
    name = _chosen(PROJECT, implementation, WHY_NOT, *given, down=False)
    if name == "cpu_ffi":
        y = native.whole_native(x, planes, scales, activation=activation)
        if y is not None:
            return y
    if name == "xla_blocked" and x.shape[0] > 1 and scales is not None:
        return reference.whole_blocked(x, planes, scales, ACTIVATIONS[activation])
    parts = [
        project(x, records, scales, plane=plane, implementation=implementation)
        for plane, records in planes.items()
    ]
    gate, up = (sum(both[1:], start=both[0]) for both in zip(*parts, strict=True))
    h = ACTIVATIONS[activation](gate) * up
    sums = [
        accumulate(h, records, scales, plane=plane, implementation=implementation)
        for plane, records in planes.items()
    ]
    return sum(sums[1:], start=sums[0])
