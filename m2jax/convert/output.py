"""The store as it grows: what is finished stays, what is half written never shows.

The only module of the conversion that writes; every chunk and bank passes through
`files.put`, where tests make it fail.
"""

import hashlib
import itertools
import os
import shutil
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from m2jax.convert.journal import Journal
from m2jax.errors import TierFailed
from m2jax.store import files
from m2jax.store.dense import save_bank
from m2jax.store.entries import FileEntry
from m2jax.store.paths import MANIFEST, STORE_FOLDERS, WORK_FOLDER, bank_path

# Bytes done, bytes in all, what is at work.
Progress = Callable[[int, int, str], None]


class Output:
    """One store being written; its lock is held. Threads may write at once.

    Args:
        store: its folder.
        header: what the journal must agree on: source, options, total_bytes.
        progress: called after every file, by one thread at a time.
    """

    def __init__(
        self, store: Path, header: Mapping[str, Any], *, progress: Progress | None
    ):
        self._store = store
        self._scratch = store / WORK_FOLDER / "tmp"
        self._journal = Journal(store, header)
        shutil.rmtree(self._scratch, ignore_errors=True)
        self._total_bytes = int(header["total_bytes"])
        self._progress = progress
        self._lock = threading.Lock()
        self._counter = itertools.count()
        try:
            self._scratch.mkdir()
            self._report("")
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._journal.close()

    def has(self, path: str) -> bool:
        """True if a file is finished and still as long as it was."""
        entry = self._journal.files.get(path)
        try:
            return entry is not None and _size(self._store / path) == entry.bytes
        except FileNotFoundError:
            return False

    def has_bank(self, bank: str) -> bool:
        prefix = bank_path(bank) + "/"
        paths = [path for path in list(self._journal.files) if path.startswith(prefix)]
        return bool(paths) and all(self.has(path) for path in paths)

    def file(self, path: str, data: bytes | memoryview) -> None:
        """Writes one file, unless it is finished."""
        if self.has(path):
            return
        view = memoryview(data).cast("B")
        self._put(path, lambda scratch: files.write_synced(scratch, view))
        entry = FileEntry(len(view), hashlib.sha256(view).hexdigest())
        self._record({path: entry}, payload_bytes=len(view), what=path)

    def bank(self, bank: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Writes one bank of the dense part."""
        entries: dict[str, FileEntry] = {}

        def write(scratch: Path) -> None:
            save_bank(scratch, arrays)
            for name in files.list_files(scratch):
                files.sync_path(scratch / name)
                size, digest = files.sha256_file(scratch / name)
                entries[f"{bank_path(bank)}/{name}"] = FileEntry(size, digest)

        self._put(bank_path(bank), write)
        payload = sum(array.nbytes for array in arrays.values())
        self._record(entries, payload_bytes=payload, what=bank_path(bank))

    def finish(self, manifest: Callable[[Mapping[str, FileEntry]], bytes]) -> None:
        """Writes the manifest, which makes the folder a store, and cleans up.

        Args:
            manifest: its bytes, given every finished file.
        """
        # Names must be on disk before the manifest is: a rename is, once synced.
        for folder, _, _ in os.walk(self._store, topdown=False):
            files.sync_path(Path(folder))
        data = manifest(self._journal.files)
        self._put(MANIFEST, lambda scratch: files.write_synced(scratch, data))
        files.sync_path(self._store)
        self.close()
        remove_work(self._store)

    def _put(self, path: str, write: Callable[[Path], None]) -> None:
        scratch = self._scratch / str(next(self._counter))
        try:
            files.put(self._store / path, write, scratch=scratch)
        except OSError as error:
            left = max(0, self._total_bytes - self._journal.payload_bytes)
            raise TierFailed(
                f"{self._store / path}: {error.strerror or error}; about {left:,} "
                "bytes were still to be written; what is finished is kept: run the "
                "same conversion again to resume",
                path=self._store / path,
            ) from error

    def _record(
        self, entries: Mapping[str, FileEntry], *, payload_bytes: int, what: str
    ) -> None:
        with self._lock:
            self._journal.record(entries, payload_bytes=payload_bytes)
            self._report(what)

    def _report(self, what: str) -> None:
        if self._progress is not None:
            done = min(self._journal.payload_bytes, self._total_bytes)
            self._progress(done, self._total_bytes, what)


def clear(store: Path) -> None:
    """Removes a store's files, finished or not; the manifest first. Keeps the lock."""
    for path in (store / MANIFEST, store / WORK_FOLDER / "journal.jsonl"):
        path.unlink(missing_ok=True)
    for name in STORE_FOLDERS:
        if (store / name).exists():
            shutil.rmtree(store / name)


def remove_work(store: Path) -> None:
    """Removes lock, journal and half-written files; the caller holds the lock."""
    shutil.rmtree(store / WORK_FOLDER, ignore_errors=True)


def _size(path: Path) -> int:
    return os.stat(path).st_size
