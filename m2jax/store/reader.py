"""Opens a store: manifest, sizes, the dense part. Knows no bytes of neurons."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from m2jax.config import ModelConfig
from m2jax.errors import StoreError, TierFailed
from m2jax.layout import Layout
from m2jax.params import NEURON_DTYPES, dense_banks
from m2jax.store.dense import load_bank
from m2jax.store.files import list_files, sha256_file
from m2jax.store.manifest import (
    MAX_MANIFEST_BYTES,
    FileEntry,
    Manifest,
    bytes_to_manifest,
)
from m2jax.store.paths import (
    MANIFEST,
    STORE_FOLDERS,
    TOKENIZER_FOLDER,
    bank_path,
)
from m2jax.store.unfinished import finished_percent

_REPAIR = 'run "m2jax verify STORE", then convert again'
LISTINGS = 10
_DENSE_DTYPES = ("float16", "bfloat16", "float32")


@dataclass(frozen=True)
class Store:
    """A complete store, its manifest read and the size of every file checked."""

    path: Path
    manifest: Manifest

    @property
    def config(self) -> ModelConfig:
        return self.manifest.config

    @property
    def layout(self) -> Layout:
        return self.manifest.layout

    @property
    def files(self) -> Mapping[str, FileEntry]:
        return self.manifest.files

    @property
    def planes(self) -> tuple[str, ...]:
        """Planes it has; `convert --planes` may have left some out."""
        return self.layout.planes

    @property
    def digest(self) -> str:
        """sha256 (hex) by which its calibration part knows it."""
        return self.manifest.digest

    def dense(self, bank: str) -> dict[str, np.ndarray]:
        """Arrays of one bank of the dense part, checked against the manifest.

        Args:
            bank: `embed`, `head` or `layers/<layer>`, as `params.dense_banks` names it.

        Raises:
            StoreError: a byte differs, or an array is not what the model wants.
        """
        wanted = dense_banks(self.config, self.layout)[bank]
        folder = bank_path(bank)
        for path in self.bank_files(bank):
            self.check_file(path)
        try:
            arrays = load_bank(self.path / folder)
        except OSError as error:
            raise self._failed(folder, error) from error
        got = {name: array.shape for name, array in arrays.items()}
        if got != wanted:
            raise StoreError(
                f"{folder}: want arrays {wanted}, got {got}; convert again",
                path=self.path / folder,
            )
        for name, array in arrays.items():
            dtypes = [NEURON_DTYPES[name]] if name in NEURON_DTYPES else _DENSE_DTYPES
            if array.dtype.name not in dtypes:
                raise StoreError(
                    f"{folder}: {name}: want dtype {' or '.join(dtypes)}, "
                    f"got {array.dtype.name}; convert again",
                    path=self.path / folder,
                )
        return arrays

    def bank_files(self, bank: str) -> list[str]:
        """Paths of a bank's files."""
        prefix = bank_path(bank) + "/"
        return sorted(path for path in self.files if path.startswith(prefix))

    def tokenizer_folder(self) -> Path | None:
        """Folder of the tokenizer's files, their bytes checked; None if it has none."""
        paths = [path for path in self.files if path.startswith(f"{TOKENIZER_FOLDER}/")]
        for path in paths:
            self.check_file(path)
        return self.path / TOKENIZER_FOLDER if paths else None

    def size_problem(self, path: str) -> str | None:
        """What is wrong with a file's presence and size, or None."""
        wanted = self.files[path].bytes
        try:
            got = os.stat(self.path / path).st_size
        except (FileNotFoundError, NotADirectoryError):
            return f"{path}: missing, manifest says {wanted:,} bytes"
        except OSError as error:
            raise self._failed(path, error) from error
        if got != wanted:
            return f"{path}: {got:,} bytes, manifest says {wanted:,}"
        return None

    def problem(self, path: str) -> str | None:
        """What is wrong with a file, every byte compared, or None."""
        found = self.size_problem(path)
        if found is not None:
            return found
        wanted = self.files[path].sha256
        try:
            _, got = sha256_file(self.path / path)
        except OSError as error:
            raise self._failed(path, error) from error
        return None if got == wanted else f"{path}: sha256 {got}, want {wanted}"

    def sizes(self) -> dict[str, int]:
        """Bytes of every file that lies in the folder, listed or not.

        Raises:
            StoreError: a link leads out of the store.
        """
        try:
            return self._list_files()
        except ValueError as error:
            raise StoreError(f"{self.path}: {error}", path=self.path) from None
        except OSError as error:
            raise self._failed(str(error.filename), error) from error

    def _list_files(self) -> dict[str, int]:
        """Twice and more if a folder vanishes: another process replaces calibration."""
        for _ in range(LISTINGS - 1):
            try:
                return list_files(self.path)
            except FileNotFoundError:
                continue
        return list_files(self.path)

    def _failed(self, path: str, error: OSError) -> TierFailed:
        return TierFailed(f"{path}: {error.strerror or error}", path=self.path / path)

    def check_file(self, path: str) -> None:
        """Raises StoreError unless every byte of a file is the manifest's."""
        found = self.problem(path)
        if found is not None:
            raise StoreError(f"{found}; {_REPAIR}", path=self.path / path)


def read_store(path: str | Path) -> Store:
    """A store by its manifest alone; no other file is looked at.

    Raises:
        ValueError: the path is missing, or nothing that m2jax wrote.
        StoreError: the store is unfinished, or its manifest damaged.
    """
    folder = Path(path)
    if not folder.exists():
        raise ValueError(
            f"{folder}: no such folder; want a store, made by m2jax convert"
        )
    if not folder.is_dir():
        raise ValueError(f"{folder}: a file; want a store, a folder")
    try:
        with open(folder / MANIFEST, "rb") as file:
            data = file.read(MAX_MANIFEST_BYTES + 1)
    except FileNotFoundError:
        raise _no_manifest(folder) from None
    except OSError as error:
        raise TierFailed(
            f"{folder / MANIFEST}: {error.strerror}", path=folder
        ) from error
    if len(data) > MAX_MANIFEST_BYTES:
        raise StoreError(
            f"{MANIFEST}: larger than {MAX_MANIFEST_BYTES:,} bytes", path=folder
        )
    return Store(folder, bytes_to_manifest(data))


def open_store(path: str | Path) -> Store:
    """A complete store; its files are there and as long as the manifest says.

    Raises:
        ValueError: the path is missing, or nothing that m2jax wrote.
        StoreError: unfinished, damaged or of an unknown version; names the first file.
    """
    store = read_store(path)
    sizes = store.sizes()
    for name, entry in store.files.items():
        if sizes.get(name) != entry.bytes:
            found = store.size_problem(name)
            if found is not None:
                raise StoreError(f"{found}; {_REPAIR}", path=store.path / name)
    return store


def _no_manifest(folder: Path) -> Exception:
    percent = finished_percent(folder)
    if percent is not None:
        return StoreError(
            f"{folder}: incomplete ({percent} %): run m2jax convert SRC {folder} "
            "to resume",
            path=folder,
        )
    if (folder / "config.json").exists():
        return ValueError(
            f"{folder}: a Hugging Face checkpoint, no store; "
            f"run m2jax convert {folder} STORE first"
        )
    if any((folder / name).is_dir() for name in STORE_FOLDERS):
        return StoreError(
            f"{folder}: {MANIFEST} is missing; convert again", path=folder
        )
    return ValueError(f"{folder}: no store: it has no {MANIFEST}")
