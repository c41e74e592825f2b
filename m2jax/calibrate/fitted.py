"""Trained predictors while others still train: a work folder, a layer at a time.

Knows no training, and no store: `store.predictors` holds their final form.
"""

import dataclasses
import errno
import hashlib
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from m2jax.errors import StoreError, TierFailed
from m2jax.lowrank import Predictor
from m2jax.store import files
from m2jax.store.dense import load_bank, save_bank
from m2jax.strict_json import canonical_json, read_json

FORMAT, VERSION = "m2jax-fit", 1
HEADER, SCRATCH = "header.json", "scratch"
# Of a layer: its predictor, and what is known of it.
BANK, FACTS = "bank", "fitted.json"


@dataclasses.dataclass(frozen=True)
class Fitted:
    """A trained predictor and how good it is on the held-out tokens.

    recall: of the true top-K, by share. sparsity: share of neurons with a score of 0 or
    less, which is how many it would call inactive. epochs: run; the predictor is the
    best of them.
    """

    predictor: Predictor
    recall: dict[float, float]
    sparsity: float
    epochs: int


def open_work(folder: Path, header: Mapping[str, Any]) -> None:
    """Makes the work folder this header's, or sees that it is.

    Raises:
        ValueError: it is another's. TierFailed: it cannot be written.
    """
    wanted = canonical_json({"format": FORMAT, "version": VERSION, **header})
    with _written(folder):
        _open(folder, wanted)


@contextmanager
def _written(folder: Path) -> Iterator[None]:
    """What the machine cannot write, as a TierFailed that names the folder."""
    try:
        yield
    except StoreError:
        raise
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise TierFailed(
            f"{folder}: cannot be written: {error.strerror or error}; "
            f"{'free some space; ' if full else ''}the same command goes on",
            path=folder,
        ) from error


def _open(folder: Path, wanted: bytes) -> None:
    scratch, path = folder / SCRATCH, folder / HEADER
    _remove(scratch)
    if path.exists():
        if canonical_json(read_json(path)) != wanted:
            raise ValueError(
                f"{folder}: was started for another model, text, or with other "
                "options; use the same, or remove the folder to start afresh"
            )
        return
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder}: holds other files; give a folder of its own")
    folder.mkdir(parents=True, exist_ok=True)
    files.put(path, lambda new: files.write_synced(new, wanted), scratch=scratch)
    files.sync_path(folder)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


def keep_layer(folder: Path, layer: int, fitted: Fitted) -> None:
    """Puts a finished layer into the work folder, whole or not at all.

    Raises:
        TierFailed: the machine could not write it.
    """
    facts: dict[str, Any] = {
        "recall": {str(share): value for share, value in fitted.recall.items()},
        "sparsity": fitted.sparsity,
        "epochs": fitted.epochs,
    }

    def write(scratch: Path) -> None:
        scratch.mkdir()
        a, b = fitted.predictor
        save_bank(scratch / BANK, {"a": np.asarray(a), "b": np.asarray(b)})
        facts["sha256"] = _digest(scratch, facts)
        files.write_synced(scratch / FACTS, canonical_json(facts))
        for name in files.list_files(scratch):
            files.sync_path(scratch / name)

    with _written(folder):
        files.put(folder / f"layer-{layer}", write, scratch=folder / SCRATCH)
        files.sync_path(folder)


def _digest(folder: Path, facts: Mapping[str, Any]) -> str:
    """Of the facts and of every byte of the bank beside them."""
    bank = folder / BANK
    digests = {name: files.sha256_file(bank / name) for name in files.list_files(bank)}
    said = canonical_json({"facts": facts, "bank": digests})
    return hashlib.sha256(said).hexdigest()


def finished(folder: Path) -> dict[int, Fitted]:
    """The finished layers of a work folder; a damaged one is as good as none."""
    found = (re.fullmatch(r"layer-(\d+)", path.name) for path in folder.glob("layer-*"))
    layers = sorted(int(match[1]) for match in found if match)
    restored = {layer: _restored(folder / f"layer-{layer}") for layer in layers}
    return {layer: fitted for layer, fitted in restored.items() if fitted is not None}


def _restored(folder: Path) -> Fitted | None:
    try:
        facts = read_json(folder / FACTS)
        if facts.pop("sha256", None) != _digest(folder, facts):
            return None
        bank = load_bank(folder / BANK)
    # Missing files are damage; what the machine cannot read is trained again too.
    except (OSError, ValueError):
        return None
    return Fitted(
        predictor=Predictor(bank["a"], bank["b"]),
        recall={float(share): recall for share, recall in facts["recall"].items()},
        sparsity=facts["sparsity"],
        epochs=facts["epochs"],
    )
