"""Who writes a store, and what is finished in it. Knows no tensors.

A journal line is appended only when the files it lists are on disk, so that whatever it
says survives a kill at any moment.
"""

import contextlib
import json
import os
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from m2jax.store.entries import FileEntry, entries_to_json
from m2jax.store.files import lock_file
from m2jax.store.paths import WORK_FOLDER
from m2jax.store.unfinished import JOURNAL, read_journal
from m2jax.strict_json import canonical_json

FORMAT = "m2jax-convert"
VERSION = 1
LOCK = "lock"


@contextlib.contextmanager
def claim(store: Path) -> Iterator[None]:
    """Holds the store's lock; the kernel frees it when its owner dies.

    Raises:
        ValueError: another process holds it; names its host and process id.
    """
    path = store / WORK_FOLDER / LOCK
    try:
        fd = lock_file(path)
    except BlockingIOError:
        raise ValueError(
            f"{store}: is being written by {_owner(path)}; wait for it, or stop it"
        ) from None
    try:
        me = json.dumps({"host": socket.gethostname(), "pid": os.getpid()})
        os.ftruncate(fd, 0)
        os.pwrite(fd, me.encode(), 0)
        yield
    finally:
        os.close(fd)


def _owner(path: Path) -> str:
    try:
        owner = json.loads(path.read_bytes()[:4096])
        return f"process {int(owner['pid'])} on host {str(owner['host'])[:255]}"
    except (OSError, ValueError, TypeError, KeyError):
        return "another process"


class Journal:
    """The append-only list of finished files.

    Args:
        store: the folder; its lock is held.
        header: source fingerprint, options and total of this conversion.

    Raises:
        ValueError: the journal there is of another source or of other options.
    """

    def __init__(self, store: Path, header: Mapping[str, Any]):
        self._path = store / WORK_FOLDER / JOURNAL
        wanted = {"format": FORMAT, "version": VERSION, **header}
        finished = read_journal(store)
        if finished.header is not None:
            _check_header(finished.header, wanted, store)
        self.files: dict[str, FileEntry] = finished.files
        self.payload_bytes = finished.payload_bytes
        # "a": every line goes to the end; a torn last one is cut off first.
        self._file = open(self._path, "ab", buffering=0)  # noqa: SIM115
        try:
            self._file.truncate(finished.good_bytes)
            if finished.header is None:
                self._append(canonical_json(wanted))
        except BaseException:
            self._file.close()
            raise

    def _append(self, line: bytes) -> None:
        """A nearly full disk takes a piece, and refuses the next."""
        rest = memoryview(line)
        while rest:
            rest = rest[self._file.write(rest) :]

    def record(self, files: Mapping[str, FileEntry], *, payload_bytes: int) -> None:
        """Notes files that are finished and on disk, in one line."""
        self.files.update(files)
        self.payload_bytes += payload_bytes
        line = {
            "files": entries_to_json(files),
            "payload_bytes": payload_bytes,
        }
        self._append(canonical_json(line))

    def close(self) -> None:
        self._file.close()


def _check_header(
    found: Mapping[str, Any], wanted: Mapping[str, Any], store: Path
) -> None:
    same_options = found.get("options") == wanted["options"]
    if same_options and any(
        found.get(field) != wanted[field] for field in ("format", "version")
    ):
        raise ValueError(
            f"{store}: was started by another version of m2jax; start fresh with "
            "--overwrite"
        )
    if not same_options:
        raise ValueError(
            f"{store}: was started with {_spelled(found.get('options'))}, now "
            f"{_spelled(wanted['options'])}; use the same, or start fresh with "
            "--overwrite"
        )
    if found != wanted:
        raise ValueError(
            f"{store}: the source differs since this conversion was started (it was "
            f"{found.get('source_name')!r}); give it back as it was, or start fresh "
            "with --overwrite"
        )


def _spelled(options: Any) -> str:
    if not isinstance(options, dict):
        return "other options"
    return ", ".join(f"{name} {value}" for name, value in sorted(options.items()))
