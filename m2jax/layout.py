"""Where the bytes of a neuron lie: planes, records, chunks. Integers only.

A record is gate row | up row | down column of one neuron at one plane. All three have
`width` weights (the hidden size, padded to whole groups).
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from m2jax.config import ModelConfig
from m2jax.quant import RowShape, row_shape

PLANES = ("q4", "r4", "w16")
MATRICES = ("gate", "up", "down")
ORIGINAL_DTYPES = {"float16": 2, "bfloat16": 2, "float32": 4}
CHUNK_ALIGN_BYTES = 4096
CHUNK_TARGET_BYTES = 8 << 20


@dataclass(frozen=True)
class Layout:
    """Sizes of every record, chunk and plane of one model.

    original_dtype: that of plane `w16`: the checkpoint's own, float32 included; kept
        where `w16` itself is not.
    group: weights that share a scale. width: padded row length in weights.
    chunk_neurons: records in a chunk, the same for all planes.
    num_chunks: chunks in one layer's plane.
    planes: those that the store keeps, `q4` always; sizes do not depend on them.
    """

    neurons: int
    original_dtype: str
    group: int
    width: int
    chunk_neurons: int
    num_chunks: int
    planes: tuple[str, ...] = PLANES

    @property
    def padded_neurons(self) -> int:
        """Neurons with the last chunk filled up; the surplus records are zeros."""
        return self.chunk_neurons * self.num_chunks

    @property
    def groups(self) -> int:
        return self.width // self.group

    def record_bytes(self, plane: str) -> int:
        if plane == "w16":
            return 3 * self.width * ORIGINAL_DTYPES[self.original_dtype]
        return 3 * self.width // 2

    def plane_bytes(self, plane: str) -> int:
        """Bytes of one layer's plane, padding included."""
        return self.padded_neurons * self.record_bytes(plane)

    def chunk_bytes(self, plane: str) -> int:
        return self.chunk_neurons * self.record_bytes(plane)


def check_planes(planes: Iterable[str]) -> tuple[str, ...]:
    """Planes that a store may keep, in the order of PLANES.

    Raises:
        ValueError: one is unknown or named twice, or `q4` is not among them.
    """
    given = tuple(planes)
    if set(given) - set(PLANES) or len(set(given)) < len(given) or "q4" not in given:
        raise ValueError(
            f"planes {','.join(given)!r}: want q4, and r4 or w16 or both if you like"
        )
    return tuple(plane for plane in PLANES if plane in given)


def make_layout(
    config: ModelConfig,
    *,
    original_dtype: str,
    group_size: int,
    planes: Iterable[str] = PLANES,
) -> Layout:
    """Chunks of at most 8 MiB whose every plane is a multiple of 4096 bytes.

    Raises:
        ValueError: no such group size, or a store may not have just these planes.
    """
    shape: RowShape = row_shape(config.hidden_size, group_size=group_size)
    widest = 3 * shape.width * ORIGINAL_DTYPES[original_dtype]
    narrowest = 3 * shape.width // 2
    # Smallest run of records that is whole disk blocks on every plane; 64 keeps
    # rows of a chunk in whole vector tiles.
    step = math.lcm(64, CHUNK_ALIGN_BYTES // math.gcd(CHUNK_ALIGN_BYTES, narrowest))
    most = max(step, CHUNK_TARGET_BYTES // widest // step * step)
    num_chunks = math.ceil(config.intermediate_size / most)
    chunk = math.ceil(config.intermediate_size / num_chunks / step) * step
    num_chunks = math.ceil(config.intermediate_size / chunk)
    return Layout(
        neurons=config.intermediate_size,
        original_dtype=original_dtype,
        group=shape.group,
        width=shape.width,
        chunk_neurons=chunk,
        num_chunks=num_chunks,
        planes=check_planes(planes),
    )
