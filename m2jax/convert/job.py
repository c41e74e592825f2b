"""One conversion, settled before its first byte is written. Writes nothing."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from m2jax.convert.names import dense_tensors
from m2jax.convert.rows import dense_dtype, widest_dtype
from m2jax.convert.source import Source
from m2jax.layout import ORIGINAL_DTYPES, Layout, check_planes, make_layout
from m2jax.params import NEURON_DTYPES, dense_banks, neuron_shapes
from m2jax.store.entries import FileEntry
from m2jax.store.manifest import Manifest, manifest_to_bytes
from m2jax.store.paths import neuron_files


@dataclass(frozen=True)
class Job:
    """Source, layout and options.

    dtype: of `w16` and the dense part; None keeps the source's. The layout says which
    planes are written.
    """

    source: Source
    layout: Layout
    group_size: int
    dtype: str | None

    def dense_sizes(self) -> list[int]:
        """Bytes of every array of the dense part."""
        tensors = dense_tensors(self.source.config)
        sizes = []
        for bank, shapes in dense_banks(self.source.config, self.layout).items():
            for array, shape in shapes.items():
                if array in NEURON_DTYPES:
                    dtype = np.dtype(NEURON_DTYPES[array])
                else:
                    stack = [self.source.tensors[name] for name in tensors[bank][array]]
                    dtype = dense_dtype(stack, dtype=self.dtype)
                sizes.append(int(np.prod(shape, dtype=np.int64)) * dtype.itemsize)
        return sizes

    def sizes(self) -> list[int]:
        """Bytes of every array and file to be written, the manifest left out."""
        tokenizer = (path.stat().st_size for path in self.source.tokenizer.values())
        neurons = neuron_files(self.source.config, self.layout).values()
        return [*self.dense_sizes(), *neurons, *tokenizer]

    def header(self) -> dict[str, Any]:
        """What a resumed conversion must agree on."""
        return {
            "source": self.source.fingerprint,
            "source_name": self.source.path.resolve().name,
            "options": {
                "group_size": self.group_size,
                "dtype": self.dtype,
                "planes": ",".join(self.layout.planes),
            },
            "layout": {**asdict(self.layout), "planes": list(self.layout.planes)},
            "total_bytes": sum(self.sizes()),
        }

    def manifest(self, files: Mapping[str, FileEntry]) -> bytes:
        """Bytes of the manifest, given every file of the store."""
        source = {
            "name": self.source.path.resolve().name,
            "dtypes": self.source.dtypes(),
        }
        return manifest_to_bytes(
            Manifest(self.source.config, self.layout, source, files)
        )

    def neuron_arrays(self) -> dict[str, np.ndarray]:
        """Zeros for what a layer's bank holds of its neurons."""
        shapes = neuron_shapes(self.layout)
        return {
            name: np.zeros(shapes[name], dtype) for name, dtype in NEURON_DTYPES.items()
        }


def make_job(
    source: Source, *, group_size: int, dtype: str | None, planes: Iterable[str]
) -> Job:
    """Raises ValueError if an option is none of those there are."""
    if dtype is not None and dtype not in ORIGINAL_DTYPES:
        raise ValueError(
            f"dtype {dtype!r}: want {', '.join(ORIGINAL_DTYPES)}, or none to keep it"
        )
    kept = check_planes(planes)
    original = widest_dtype(source.neuron_dtypes())
    if dtype is not None and "w16" in kept:
        original = dtype
    layout = make_layout(
        source.config, original_dtype=original, group_size=group_size, planes=kept
    )
    return Job(source, layout, group_size, dtype)
