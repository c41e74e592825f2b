"""Trained predictors as one Orbax checkpoint: `a<layer>` and `b<layer>`, float16."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from m2jax.errors import StoreError
from m2jax.store.dense import load_bank, save_bank
from m2jax.store.files import list_files

BANK = "predictors"


def save_predictors(
    folder: Path, predictors: Mapping[int, tuple[ArrayLike, ArrayLike]]
) -> None:
    """Writes the maps (a [r, D], b [F, r]) of every layer into a folder."""
    arrays = {}
    for layer, (a, b) in predictors.items():
        arrays[f"a{layer}"] = np.asarray(a, np.float16)
        arrays[f"b{layer}"] = np.asarray(b, np.float16)
    save_bank(folder / BANK, arrays)


def load_predictors(
    folder: Path, *, layers: int, hidden: int, neurons: int
) -> Sequence[tuple[np.ndarray, np.ndarray]]:
    """What `save_predictors` wrote, one pair a layer.

    Raises:
        StoreError: damaged, or of a model of another shape.
    """
    try:
        arrays = load_bank(folder / BANK)
    except OSError as error:
        raise StoreError(
            f"{folder / BANK}: {error}; run m2jax calibrate again", path=folder
        ) from error
    names = {f"{matrix}{layer}" for layer in range(layers) for matrix in "ab"}
    if arrays.keys() != names:
        raise StoreError(
            f"{folder}: want predictors of {layers} layers, got {len(arrays) // 2}; "
            "they belong to another model: run m2jax calibrate again",
            path=folder,
        )
    found = []
    for layer in range(layers):
        a, b = arrays[f"a{layer}"], arrays[f"b{layer}"]
        ranks = a.shape[:1] + b.shape[1:]
        if (a.shape[1:], b.shape[:1]) != ((hidden,), (neurons,)) or len({*ranks}) != 1:
            raise StoreError(
                f"{folder}: layer {layer}: want [r, {hidden}] and [{neurons}, r], got "
                f"{list(a.shape)} and {list(b.shape)}; these belong to another "
                "model: run m2jax calibrate again",
                path=folder,
            )
        for matrix in (a, b):
            if matrix.dtype != np.float16 or not np.all(np.isfinite(matrix)):
                raise StoreError(
                    f"{folder}: layer {layer}: want finite float16; run m2jax "
                    "calibrate again",
                    path=folder,
                )
        found.append((a, b))
    return found


def predictor_bytes(folder: Path) -> int:
    """Bytes of the stored arrays, a few a file too many."""
    return sum(size for path, size in list_files(folder).items() if "/c/" in path)
