"""One safetensors file: its checked header, rows of its tensors. Knows no model."""

from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from m2jax.strict_json import parse_json

# What Git leaves where large files were not fetched.
LFS_POINTER, MAX_POINTER_BYTES = b"version https://git-lfs", 1024
MAX_HEADER_BYTES = 100_000_000
READ_BLOCK_BYTES = 16 << 20
DTYPES: dict[str, np.dtype] = {
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype(np.float32),
}


@dataclass(frozen=True)
class Tensor:
    """Where a tensor lies.

    dtype: as the header spells it ("BF16"); perhaps none that we read.
    offset: of its first byte, from the start of the file.
    """

    name: str
    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows [start, stop) of the first axis, in the tensor's own dtype.

        Not by mmap: mapped pages would count as the process's memory.

        Raises:
            OSError: the file cannot be read, or ends early.
        """
        dtype = DTYPES[self.dtype]
        stop = self.shape[0] if stop is None else stop
        rows = np.empty((stop - start, *self.shape[1:]), dtype)
        row_bytes = dtype.itemsize * int(np.prod(self.shape[1:], dtype=np.int64))
        view = rows.view(np.uint8).reshape(-1).data
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self.offset + start * row_bytes)
            while view:
                count = file.readinto(view[:READ_BLOCK_BYTES])
                if not count:
                    raise OSError(f"{self.path}: ends within tensor {self.name}")
                view = view[count:]
        return rows


def read_header(path: Path) -> tuple[bytes, dict[str, Tensor]]:
    """The raw header, and every tensor of a file.

    Raises:
        ValueError: the header is cut, too long, not JSON, or its offsets overlap, leave
            holes or pass the end of the file.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        prefix = file.read(8)
        if prefix == LFS_POINTER[:8] and size < MAX_POINTER_BYTES:
            raise ValueError(
                f"{path}: a Git LFS pointer, not the file; run git lfs pull"
            )
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > size - 8:
            raise ValueError(
                f"{path}: its header wants {length + 8:,} bytes, it has {size:,}: it "
                "is cut short or no safetensors file: download it again"
            )
        if length > MAX_HEADER_BYTES:
            raise ValueError(
                f"{path}: header of {length:,} bytes; at most {MAX_HEADER_BYTES:,}"
            )
        header = file.read(length)
    try:
        fields = parse_json(header.rstrip(b" "))
        # Sees overlaps, holes, wrong sizes and files longer or shorter than they say.
        with safe_open(path, framework="numpy"):
            pass
    except (ValueError, SafetensorError) as error:
        raise ValueError(
            f"{path}: bad safetensors header: {error}; download it again"
        ) from None
    fields.pop("__metadata__", None)
    return header, {
        name: Tensor(
            name=name,
            path=path,
            dtype=entry["dtype"],
            shape=tuple(entry["shape"]),
            offset=8 + length + entry["data_offsets"][0],
        )
        for name, entry in fields.items()
    }
