"""What is always on the device: brought there from a store, and its size in bytes.

Attention, norms, embeddings, the neurons' scales, and predictors where they rank.
"""

from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from m2jax.cache.device import STORED_DTYPES, to_device_together
from m2jax.config import ModelConfig
from m2jax.cores import cores
from m2jax.dense_bits import dense_matrices, pack_bank, saved_bytes
from m2jax.layer import LayerParams
from m2jax.layout import Layout
from m2jax.lowrank import Predictor
from m2jax.model import Bank
from m2jax.params import NEURON_DTYPES, dense_banks, layer_name, neuron_shapes
from m2jax.store import Store
from m2jax.store.calibration import read_part
from m2jax.store.predictors import load_predictors, predictor_bytes

ALL_POSITIONS = 2**30
# Banks in memory at once while they are read.
MOST_READ_AHEAD = 8

# Called with what arrived and its bytes.
LoadProgress = Callable[[str, int], None]


def stored_dense_bytes(store: Store, bits: int = 16) -> int:
    """Device bytes of the dense part, from the sizes of its array files.

    A few bytes an array too many: each chunk file ends in a checksum.

    Args:
        bits: of its matrices.
    """
    total, sizes = 0, dict.fromkeys(dense_matrices(store.config, store.layout), 0)
    for path, entry in store.files.items():
        if path.startswith("dense/") and "/c/" in path:
            total += entry.bytes
            name = path.removeprefix("dense/").split("/c/")[0].replace("/state/", "/")
            if name in sizes:
                sizes[name] += entry.bytes
    return total - saved_bytes(store.config, store.layout, bits=bits, sizes=sizes)


def shaped_dense_bytes(
    config: ModelConfig, layout: Layout, *, item_bytes: int, bits: int = 16
) -> int:
    """The same from shapes alone, for a model that is not converted yet."""
    items = {name: np.dtype(kind).itemsize for name, kind in NEURON_DTYPES.items()}
    total = sum(
        int(np.prod(shape)) * items.get(name, item_bytes)
        for bank in dense_banks(config, layout).values()
        for name, shape in bank.items()
    )
    sizes = {
        name: int(np.prod(shape)) * item_bytes
        for name, shape in dense_matrices(config, layout).items()
    }
    return total - saved_bytes(config, layout, bits=bits, sizes=sizes)


def load_dense_part(
    store: Store,
    predictors: list[Predictor] | None,
    progress: LoadProgress,
    bits: int = 16,
) -> tuple[Bank, list[LayerParams], Bank, int]:
    """Embedding, layers and head on the device, and their bytes.

    Args:
        bits: of their matrices.
    """
    total = sum(a.nbytes for predictor in predictors or () for a in predictor)
    config = store.config
    names = [f"layers/{layer_name(n, config)}" for n in range(config.num_layers)]

    def read(name: str, workers: Executor) -> dict[str, np.ndarray]:
        kept = store.dense(name)
        if bits == 16:
            return kept
        return pack_bank(kept, workers, bits=bits, group=store.layout.group)

    with closing(_ahead(read, [*names, "embed", "head"])) as banks:

        def bank() -> Bank:
            nonlocal total
            arrays = to_device_together(
                {name: _as_stored(array) for name, array in next(banks).items()}
            )
            size = sum(array.nbytes for array in arrays.values())
            total += size
            progress("dense part", size)
            return arrays

        layers = []
        for layer in range(config.num_layers):
            arrays = bank()
            shared = {name: arrays.pop(name) for name in neuron_shapes(store.layout)}
            window = config.windows[layer] or ALL_POSITIONS
            layers.append(
                LayerParams(
                    arrays,
                    window=jnp.int32(window),
                    predictor=predictors[layer] if predictors else None,
                    **shared,
                )
            )
        return bank(), layers, bank(), total


def _ahead(
    read: Callable[[str, Executor], dict[str, np.ndarray]], names: list[str]
) -> Generator[dict[str, np.ndarray], None, None]:
    """What `read` gives for each name, in order, a few read at the same time: most of
    that is checksums, for which a core takes longer than the SSD.

    Args:
        read: of a name, with threads for all that is read.
    """
    threads = min(cores(), MOST_READ_AHEAD)
    with (
        ThreadPoolExecutor(cores(), thread_name_prefix="m2jax-pack") as workers,
        ThreadPoolExecutor(threads, thread_name_prefix="m2jax-dense") as pool,
    ):
        waiting = deque(pool.submit(read, name, workers) for name in names[:threads])
        try:
            for name in [*names[threads:], *[None] * threads][: len(names)]:
                yield waiting.popleft().result()
                if name is not None:
                    waiting.append(pool.submit(read, name, workers))
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _as_stored(array: np.ndarray) -> np.ndarray:
    """bfloat16 goes as its bits (see `kernels.linear.widen`)."""
    if array.dtype.name == "bfloat16":
        return array.view(STORED_DTYPES["bfloat16"])
    return array


def _predictor_folder(store: Store, lookahead: int) -> Path:
    folder = read_part(store, f"predictors-{lookahead}")
    if folder is None:
        raise ValueError(
            f"{store.path}: scorer lowrank has no predictors for lookahead {lookahead} "
            "here; train them with m2jax calibrate STORE --text FILE"
        )
    return folder


def stored_predictor_bytes(store: Store, lookahead: int) -> int:
    """Device bytes of the predictors that `load_predictors` would bring."""
    return predictor_bytes(_predictor_folder(store, lookahead))


def load_predictors_part(
    store: Store, lookahead: int, progress: LoadProgress
) -> list[Predictor]:
    """Every layer's predictor, on the device."""
    found = load_predictors(
        _predictor_folder(store, lookahead),
        layers=store.config.num_layers,
        hidden=store.config.hidden_size,
        neurons=store.config.intermediate_size,
    )
    size = sum(array.nbytes for predictor in found for array in predictor)
    progress("predictors", size)
    return [Predictor(**to_device_together({"a": a, "b": b})) for a, b in found]
