"""The CUDA kernels: compiled once a machine where nvcc is, then called through XLA's
FFI on a GPU.

`status()` says whether they are there and, if not, why. Nothing else depends on them:
every op has an XLA form.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from m2jax.kernels.cuda.build import CudaStatus, is_compiled, status

# More are a matrix product, which is XLA's work: by these kernels they would be taken a
# few at a time, with the weights read anew for each few.
MOST_TOKENS = 64
# A warp reads rows of 16 bytes a lane.
ROW_BYTES = 16
# Floats of a row, and groups of a tile of neurons, that shared memory holds on any card
# since Volta: 96 KiB.
MOST_WIDTH, MOST_GROUPS = 20 << 10, 768
# Tensor cores: a row's bytes are read so many at once, by one scale; and the weights of
# a row for which a token's x, 8 bytes each, and 8 KiB beside fit the same 96 KiB.
TENSOR_BYTES, MOST_TENSOR_WIDTH = 64, 11 << 10
# Of a layer with pools: one block's shared memory holds sets of them and of the slots.
MOST_NEURONS = 56 << 10

__all__ = [
    "MOST_NEURONS",
    "MOST_TOKENS",
    "CudaStatus",
    "call",
    "fill_from_host",
    "give_slots",
    "is_compiled",
    "on_tensor_cores",
    "rows_from_host",
    "status",
    "why_not",
]


def why_not(
    tokens: int, width: int, rows: Array, scales: Array | None, *, matrices: int
) -> str | None:
    """What the kernels take instead of this product; None where they take it.

    Args:
        width: of a row. rows: [N, R]. scales: [.., groups]. matrices: rows in each
            record.
    """
    row_bytes = rows.shape[1] // matrices * rows.dtype.itemsize
    groups = 0 if scales is None else scales.shape[-1]
    if tokens > MOST_TOKENS:
        return f"takes up to {MOST_TOKENS} tokens, not {tokens}"
    if width > MOST_WIDTH:
        return f"takes rows of up to {MOST_WIDTH} weights, not {width}"
    if row_bytes % ROW_BYTES:
        return f"takes rows of whole {ROW_BYTES} bytes, not of {row_bytes}"
    if groups > MOST_GROUPS:
        return f"takes up to {MOST_GROUPS} groups a row, not {groups}"
    return None


def on_tensor_cores(
    rows: Array, scales: Array | None, *, matrices: int, width: int
) -> bool:
    """Whether this device's tensor cores take a product that the kernels take.

    Args:
        rows: [N, R]. scales: [.., groups]. matrices: rows in each record. width: of a
            row.
    """
    row_bytes = rows.shape[1] // matrices * rows.dtype.itemsize
    if rows.dtype == jnp.uint8:
        taken = scales is not None and width // scales.shape[-1] >= TENSOR_BYTES
    else:
        taken = rows.dtype == jnp.uint16
    return (
        status().tensor
        and taken
        and width <= MOST_TENSOR_WIDTH
        and row_bytes % TENSOR_BYTES == 0
    )


def call(
    name: str,
    shapes: jax.ShapeDtypeStruct | Sequence[jax.ShapeDtypeStruct],
    x: Array,
    rows: Array,
    scales: Array | None,
    slots: Array | None,
    ids: Array | None,
    **attributes,
):
    """The kernel `name` as part of a traced program; None stands for an empty array.

    Raises:
        RuntimeError: the kernels are not there.
    """
    _check_ready()
    none = jnp.zeros(0, jnp.int32)
    return jax.ffi.ffi_call(name, shapes)(
        x,
        rows,
        jnp.zeros((0, 0, 0), jnp.float16) if scales is None else scales,
        none if slots is None else slots,
        none if ids is None else ids,
        **attributes,
    )


def rows_from_host(
    address: Array, ids: Array, row: jax.ShapeDtypeStruct, *, rows: int
) -> Array:
    """Rows of memory that the device may read, as part of a traced program.

    The memory must be registered with the driver, and stay as it is until the result
    is ready.

    Args:
        address: uint32 [2], low word first, of the first row.
        ids: int32 [K] rows; one that is none leaves its place undefined.
        row: shape [R] and dtype of a row, whole 16 bytes.
        rows: how many there are.

    Returns:
        [K, R].
    """
    _check_ready()
    shape = jax.ShapeDtypeStruct((ids.shape[0], *row.shape), row.dtype)
    name = "m2jax_cuda_rows_from_host"
    return jax.ffi.ffi_call(name, shape)(address, ids, rows=np.int64(rows))


def fill_from_host(
    pool: Array, address: Array, ids: Array, slots: Array, *, rows: int
) -> Array:
    """The pool with such rows in its slots, in the same memory: donate it.

    Args:
        pool: [S, R]. address, ids, rows: as above.
        slots: int32 [K], distinct; one of S or more takes nothing.

    Returns:
        [S, R].
    """
    _check_ready()
    shape = jax.ShapeDtypeStruct(pool.shape, pool.dtype)
    filled = jax.ffi.ffi_call(
        "m2jax_cuda_fill_from_host", shape, input_output_aliases={0: 0}
    )
    return filled(pool, address, ids, slots, rows=np.int64(rows))


def give_slots(
    directory: Sequence[Array], ids: Array, *, policy: str
) -> tuple[tuple[Array, ...], Array, Array, Array]:
    """A slot of a pool for every wanted neuron, as part of a traced program.

    Args:
        directory: slot_of int32 [F], -1 = none; neuron_in [S]; priority [F], the lowest
            goes first; counts [2]: slots taken, and wanted sets so far. Donate them.
            F is at most MOST_NEURONS.
        ids: int32 [K] distinct, K <= S.
        policy: "lru" or "lfu".

    Returns:
        The directory in which all have slots, in the same memory; int32 [K] slots;
        int32 [K] ids that must be loaded there, -1 where they are; int32, how many.
    """
    _check_ready()
    like = [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in directory]
    row = jax.ShapeDtypeStruct(ids.shape, ids.dtype)
    given = jax.ffi.ffi_call(
        "m2jax_cuda_slots",
        (*like, row, row, row, jax.ShapeDtypeStruct((1,), ids.dtype)),
        input_output_aliases={place: place for place in range(len(like))},
    )
    *after, slots, loads, _, loaded = given(
        *directory, ids, by_count=np.bool_(policy == "lfu")
    )
    return tuple(after), slots, loads, loaded[0]


def _check_ready() -> None:
    if not status().ready:
        raise RuntimeError(f"no CUDA kernels: {status().about}")
