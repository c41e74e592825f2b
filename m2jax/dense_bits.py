"""The dense part's matrices at fewer bits: made when they are loaded, sizes beforehand.

Same planes as the neurons' (`quant`), so the same kernels multiply them. A store keeps
the checkpoint's own numbers, and any of them serves at any of these.
"""

from collections.abc import Mapping
from concurrent.futures import Executor

import numpy as np

from m2jax.arguments import as_integer
from m2jax.config import ModelConfig
from m2jax.layout import Layout
from m2jax.model import RESIDUAL, SCALES, packed_names
from m2jax.params import Shapes, dense_banks
from m2jax.quant import quantise_rows, row_shape, split_codes

DENSE_BITS = (16, 8, 4)
MATRICES = ("embedding", "qkv", "o", "lm_head")
# Weights worked on at once: so many that threads rarely wait for Python's lock.
BLOCK_WEIGHTS = 1 << 20


def check_dense(bits: int) -> int:
    """The bits as an int, if they are some of DENSE_BITS."""
    want = f"one of {DENSE_BITS} bits"
    found = as_integer(bits, name="--dense", want=want)
    if found not in DENSE_BITS:
        raise ValueError(f"--dense {bits}: want {want}")
    return found


def pack_bank(
    arrays: Mapping[str, np.ndarray], workers: Executor, *, bits: int, group: int
) -> dict[str, np.ndarray]:
    """A bank with its matrices at 8 or 4 bits, under `model.packed_names`.

    Args:
        workers: as many as there are cores, whoever else packs: NumPy's work of many
            threads more than that stands in its own way.

    Raises:
        ValueError: a weight is too large for a float16 scale; names the array.
    """
    packed: dict[str, np.ndarray] = {}
    for name, array in arrays.items():
        if name not in MATRICES:
            packed[name] = array
            continue
        try:
            packed |= _pack(name, array, workers, bits=bits, group=group)
        except ValueError as error:
            raise ValueError(f"--dense {bits}: {name}: {error}") from None
    return packed


def _pack(
    name: str, array: np.ndarray, workers: Executor, *, bits: int, group: int
) -> dict[str, np.ndarray]:
    rows, inputs = array.shape
    shape = row_shape(inputs, group_size=group)
    q4 = np.empty((rows, shape.width // 2), np.uint8)
    r4 = np.empty_like(q4 if bits == 8 else q4[:0])
    scales = np.empty((rows, shape.groups), np.float16)
    step = max(1, BLOCK_WEIGHTS // shape.width)

    def work(start: int) -> None:
        block = slice(start, min(start + step, rows))
        padded = np.zeros((block.stop - start, shape.width), np.float32)
        padded[:, :inputs] = array[block]
        codes, scales[block], _ = quantise_rows(padded, group=shape.group)
        q4[block], rest = split_codes(codes)
        if bits == 8:
            r4[block] = rest

    list(workers.map(work, range(0, rows, step)))
    made = {name: q4, name + RESIDUAL: r4, name + SCALES: scales}
    return {part: made[part] for part in packed_names(name, bits)}


def saved_bytes(
    config: ModelConfig, layout: Layout, *, bits: int, sizes: Mapping[str, int]
) -> int:
    """Device bytes that fewer bits save.

    Args:
        sizes: bytes of every matrix as it is kept, by "bank/name".
    """
    if bits == 16:
        return 0
    packed = sum(
        _packed_bytes(shape, bits=bits, group=layout.group)
        for shape in dense_matrices(config, layout).values()
    )
    return sum(sizes[name] for name in dense_matrices(config, layout)) - packed


def dense_matrices(config: ModelConfig, layout: Layout) -> Shapes:
    """Shapes of all matrices of the dense part, by "bank/name"."""
    return {
        f"{bank}/{name}": shape
        for bank, shapes in dense_banks(config, layout).items()
        for name, shape in shapes.items()
        if name in MATRICES
    }


def _packed_bytes(shape: tuple[int, ...], *, bits: int, group: int) -> int:
    rows, inputs = shape
    row = row_shape(inputs, group_size=group)
    return rows * (row.width * bits // 8 + 2 * row.groups)
