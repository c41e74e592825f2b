"""Weights to records and dense arrays, in NumPy. Reads the source, writes nowhere.

Every weight is checked to be finite, in the dtype it is kept in.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import ml_dtypes
import numpy as np

from m2jax.convert.names import neuron_tensors
from m2jax.convert.safetensors_file import DTYPES, Tensor
from m2jax.convert.source import Source
from m2jax.layout import MATRICES, Layout
from m2jax.quant import dequantise_base, quantise_rows, split_codes

# Weights worked on at once: their float32 copies stay within a core's cache.
BLOCK_WEIGHTS = 1 << 18
KEPT_DTYPES = {dtype.name: dtype for dtype in DTYPES.values()}


class Records(NamedTuple):
    """One chunk of a layer: records by plane, uint8 [chunk_neurons, record_bytes].

    planes: those that the layout keeps.

    scales: float16 [chunk_neurons, 3, groups]. down_norm: float32 [chunk_neurons], the
    L2 norm of the down column as plane q4 alone gives it; padding is zero there.
    noise: float32 [chunk_neurons, 3], see `params.neuron_shapes`.
    """

    planes: dict[str, np.ndarray]
    scales: np.ndarray
    down_norm: np.ndarray
    noise: np.ndarray


def widest_dtype(names: Iterable[str]) -> str:
    """The narrowest dtype that holds all of them exactly."""
    kinds = set(names)
    return kinds.pop() if len(kinds) == 1 else "float32"


def dense_dtype(tensors: Sequence[Tensor], *, dtype: str | None) -> np.dtype:
    """What a stack of tensors is kept in: `dtype` or, if None, their own."""
    own = [DTYPES[tensor.dtype].name for tensor in tensors]
    return KEPT_DTYPES[dtype or widest_dtype(own)]


def dense_array(tensors: Sequence[Tensor], *, dtype: str | None) -> np.ndarray:
    """Tensors stacked along the first axis, in `dtype` or, if None, their own.

    Raises:
        ValueError: a weight is not finite, or too large for `dtype`.
    """
    rows = sum(tensor.shape[0] for tensor in tensors)
    shape = (rows, *tensors[0].shape[1:])
    out = np.empty(shape, dense_dtype(tensors, dtype=dtype))
    done = 0
    for tensor in tensors:
        row_weights = max(1, int(np.prod(tensor.shape[1:], dtype=np.int64)))
        step = max(1, BLOCK_WEIGHTS * 16 // row_weights)
        for start in range(0, tensor.shape[0], step):
            stop = min(start + step, tensor.shape[0])
            block = tensor.read(start, stop)
            check_finite(block, tensor=tensor)
            out[done + start : done + stop] = cast(block, out.dtype, tensor=tensor)
        done += tensor.shape[0]
    return out


def chunk_records(
    source: Source, layer: int, chunk: int, down: np.ndarray, *, layout: Layout
) -> Records:
    """The records of one chunk: gate row | up row | down column of each neuron.

    Args:
        down: the layer's down matrix [D, F] in its own dtype.

    Returns:
        Records; neurons beyond F, if the chunk is the last, are zero bytes.

    Raises:
        ValueError: names the tensor that holds NaN, infinity or a too large weight.
    """
    tensors = {
        matrix: source.tensors[name] for matrix, name in neuron_tensors(layer).items()
    }
    start = chunk * layout.chunk_neurons
    stop = min(start + layout.chunk_neurons, layout.neurons)
    weights = {
        "gate": tensors["gate"].read(start, stop),
        "up": tensors["up"].read(start, stop),
        "down": down[:, start:stop].T,
    }
    kept = KEPT_DTYPES[layout.original_dtype]
    neurons, width, half = layout.chunk_neurons, layout.width, layout.width // 2
    original = np.zeros((neurons if "w16" in layout.planes else 0, 3, width), kept)
    q4 = np.zeros((neurons, 3, half), np.uint8)
    r4 = np.zeros((neurons, 3, half), np.uint8)
    scales = np.zeros((neurons, 3, layout.groups), np.float16)
    down_norm = np.zeros(neurons, np.float32)
    noise = np.zeros((neurons, 3), np.float32)
    step = max(1, BLOCK_WEIGHTS // width)
    for index, matrix in enumerate(MATRICES):
        tensor = tensors[matrix]
        for low in range(0, stop - start, step):
            block = weights[matrix][low : low + step]
            rows = slice(low, low + len(block))
            padded = np.zeros((len(block), width), np.float32)
            padded[:, : block.shape[1]] = block
            try:
                codes, scales[rows, index], error = quantise_rows(
                    padded, group=layout.group
                )
            except ValueError as error:
                raise ValueError(f"{tensor.path}: {tensor.name}: {error}") from None
            noise[rows, index] = error.sum(axis=-1)
            q4[rows, index], r4[rows, index] = split_codes(codes)
            if "w16" in layout.planes:
                original[rows, index, : block.shape[1]] = cast(
                    block, kept, tensor=tensor
                )
            if matrix == "down":
                base = dequantise_base(
                    q4[rows, index], scales[rows, index], group=layout.group
                )
                down_norm[rows] = np.sqrt(np.einsum("nw,nw->n", base, base))
    made = {"q4": q4, "r4": r4, "w16": original.view(np.uint8)}
    planes = {plane: made[plane].reshape(neurons, -1) for plane in layout.planes}
    # Gate and up act through the down column, per square of their input's mean weight.
    noise[:, :2] *= np.square(down_norm)[:, None] / tensors["gate"].shape[1]
    return Records(planes, scales, down_norm, noise)


def cast(block: np.ndarray, dtype: np.dtype, *, tensor: Tensor) -> np.ndarray:
    """The block in another dtype; a finite weight that would become infinite raises."""
    if block.dtype == dtype:
        return block
    with np.errstate(over="ignore"):
        result = block.astype(dtype)
    if not _finite(result):
        raise ValueError(
            f"{tensor.path}: {tensor.name}: holds weights too large for {dtype.name}; "
            "convert with dtype bfloat16 or float32"
        )
    return result


def check_finite(block: np.ndarray, *, tensor: Tensor) -> None:
    if not _finite(block):
        raise ValueError(
            f"{tensor.path}: {tensor.name}: weights hold NaN or infinity; the "
            "checkpoint is damaged: download it again"
        )


def _finite(block: np.ndarray) -> bool:
    """True if no exponent is all ones: on 16-bit floats faster than isfinite."""
    if block.dtype == np.float32:
        return bool(np.isfinite(block).all())
    exponent = 0x7F80 if block.dtype == ml_dtypes.bfloat16 else 0x7C00
    bits = block.view(np.uint16) & np.uint16(exponent)
    return not block.size or int(bits.max()) != exponent
