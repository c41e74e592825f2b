"""What calibration found out about a model, kept beside its store. Knows no results.

`calibration/index.json` names the parts, the sha256 of their files and the manifest
they belong to; every part is one folder, named by its content. A part is written apart
and renamed, then the index is replaced: killed at any point, the store has the old part
or the new one, whole.
"""

import fcntl
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from m2jax.errors import StoreError, TierFailed
from m2jax.store.calibration_index import (
    FOLDER,
    PARTS,
    Index,
    bytes_to_index,
    calibration_files,
    check_part,
    checked_name,
    folder_name,
    index_to_bytes,
)
from m2jax.store.entries import FileEntry
from m2jax.store.files import list_files, put, sha256_file, sync_path, write_synced
from m2jax.store.reader import Store
from m2jax.strict_json import MAX_JSON_BYTES, canonical_json, parse_json

INDEX = "index.json"
LOCK = ".lock"
FACTS = "facts.json"
# A part is written in moments: who holds the lock for longer than this hangs.
LOCK_WAIT_S = 60.0
_HALF_WRITTEN = ".half-written"
_PART = re.compile(rf"(?:{'|'.join(PARTS)})-[0-9a-f]{{12}}")
_OURS = re.compile(rf"{_PART.pattern}|\..*\{_HALF_WRITTEN}")


def repair(parts: Iterable[str] = ()) -> str:
    """What makes damaged parts whole again; without parts, a damaged index."""
    commands = {"search-mix" if part == "mix" else "calibrate" for part in parts}
    names = " and ".join(f"m2jax {name}" for name in sorted(commands or {"calibrate"}))
    return f"delete STORE/calibration, or run {names} again"


def calibration_index(store: Store) -> Index:
    """The parts a store has; {} without calibration. Only the index is looked at.

    Raises:
        StoreError: missing beside parts, damaged, of an unknown version, or of another
        model.
    """
    path = store.path / FOLDER / INDEX
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_JSON_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        if not _has_parts(path.parent):
            return {}
        # A writer makes the index before its first part.
        if path.exists():
            return calibration_index(store)
        raise StoreError(
            f"{path}: missing, and there are parts; {repair()}", path=path
        ) from None
    except OSError as error:
        raise TierFailed(f"{path}: {error.strerror}", path=path) from error
    try:
        if len(data) > MAX_JSON_BYTES:
            raise ValueError(f"larger than {MAX_JSON_BYTES:,} bytes")
        index, model = bytes_to_index(data)
    except ValueError as error:
        raise StoreError(f"{path}: {error}; {repair()}", path=path) from None
    if model != store.digest:
        raise StoreError(
            f"{store.path / FOLDER}: the calibration belongs to another model; "
            f"{repair()}",
            path=path,
        )
    return index


def _has_parts(root: Path) -> bool:
    try:
        return any(_PART.fullmatch(name) for name in os.listdir(root))
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise TierFailed(f"{root}: {error.strerror}", path=root) from error


def read_part(store: Store, part: str) -> Path | None:
    """Folder of a part, every byte checked; None if the store has no such part.

    Raises:
        StoreError: index or part are damaged, or belong to another model.
        TierFailed: the machine could not read.
    """
    check_part(part)
    index = calibration_index(store)
    while part in index:
        found = part_problems(store, part, index[part])
        if not found:
            return store.path / FOLDER / folder_name(part, index[part])
        # Another process may have replaced the part since the index was read.
        before, index = index, calibration_index(store)
        if index.get(part) == before[part]:
            raise StoreError(f"{found[0]}; {repair([part])}", path=store.path / FOLDER)
    return None


def part_problems(store: Store, part: str, files: Mapping[str, FileEntry]) -> list[str]:
    """What is wrong with a part's files, one line a file.

    Raises:
        TierFailed: the machine could not read.
    """
    paths = calibration_files({part: dict(files)})
    found = (file_problem(store, path, entry) for path, entry in paths.items())
    return [problem for problem in found if problem is not None]


def file_problem(store: Store, path: str, entry: FileEntry) -> str | None:
    """What is wrong with one of `calibration_files`, every byte compared, or None."""
    try:
        got = FileEntry(*sha256_file(store.path / path))
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return f"{path}: missing, the index says {entry.bytes:,} bytes"
    except OSError as error:
        raise TierFailed(f"{path}: {error.strerror}", path=store.path / path) from error
    if got.bytes != entry.bytes:
        return f"{path}: {got.bytes:,} bytes, the index says {entry.bytes:,}"
    return None if got == entry else f"{path}: sha256 {got.sha256}, want {entry.sha256}"


def check_writable(store: Store) -> None:
    """Raises TierFailed where `write_part` could not write; touches nothing."""
    root = store.path / FOLDER
    folder = root if root.exists() else store.path
    if not (folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)):
        raise TierFailed(
            f"{folder}: cannot be written: want a folder, and the right to write there",
            path=folder,
        )


def write_part(store: Store, part: str, write: Callable[[Path], None]) -> None:
    """Makes or replaces a part.

    An index that is damaged, missing or of another model is replaced whole: its parts
    are gone.

    Args:
        write: writes the part's files into the new folder it is given.

    Raises:
        ValueError: no such part, no file written, or another process holds the lock.
        TierFailed: the store cannot be written; what was there stays.
    """
    check_part(part)
    root = store.path / FOLDER
    try:
        root.mkdir(exist_ok=True)
        with _locked(root):
            scratch = root / f".{part}{_HALF_WRITTEN}"
            shutil.rmtree(scratch, ignore_errors=True)
            try:
                scratch.mkdir()
                write(scratch)
                _keep(store, part, scratch)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
    except StoreError:
        raise
    except OSError as error:
        raise TierFailed(
            f"{root}: cannot be written: {error.strerror or error}; what was there "
            "is kept",
            path=root,
        ) from error


def read_json_part(store: Store, part: str) -> dict[str, Any] | None:
    """Facts that `write_json_part` kept; None if the store has no such part.

    Raises:
        As `read_part`; and StoreError if the part is something else than facts.
    """
    folder = read_part(store, part)
    if folder is None:
        return None
    path = folder / FACTS
    try:
        facts = parse_json(path.read_bytes())
    except FileNotFoundError:
        # Replaced by another process since it was checked, or no facts at all.
        if read_part(store, part) != folder:
            return read_json_part(store, part)
        raise StoreError(f"{path}: no such file; {repair([part])}", path=path) from None
    except ValueError as error:
        raise StoreError(f"{path}: {error}; {repair([part])}", path=path) from None
    if not isinstance(facts, dict):
        raise StoreError(f"{path}: want a JSON object; {repair([part])}", path=path)
    return facts


def write_json_part(store: Store, part: str, facts: Mapping[str, Any]) -> None:
    """Keeps a JSON object as a part.

    Raises:
        As `write_part`; and ValueError where facts hold NaN or infinity.
    """
    data = canonical_json(dict(facts))
    write_part(store, part, lambda folder: write_synced(folder / FACTS, data))


def _keep(store: Store, part: str, scratch: Path) -> None:
    """Puts a written part in its place, names it in the index, removes what is old."""
    root = store.path / FOLDER
    files: dict[str, FileEntry] = {}
    for name in sorted(list_files(scratch)):
        sync_path(scratch / name)
        entry = FileEntry(*sha256_file(scratch / name))
        files[checked_name(name)] = entry
    if not files:
        raise ValueError(f"part {part}: no file was written")
    for folder, _, _ in os.walk(scratch, topdown=False):
        sync_path(Path(folder))
    index = _usable(store)
    if not (root / INDEX).exists():
        # Parts without an index are damage, so a first writer must not be killed there.
        _put_index(store, index)
    # The same content as before is left where it is: `put` would remove it first.
    if part_problems(store, part, files):
        put(root / folder_name(part, files), lambda _: None, scratch=scratch)
        sync_path(root)
    index = {**index, part: files}
    _put_index(store, index)
    kept = {folder_name(name, entries) for name, entries in index.items()}
    for path in root.iterdir():
        if path.is_dir() and _OURS.fullmatch(path.name) and path.name not in kept:
            shutil.rmtree(path, ignore_errors=True)


def _put_index(store: Store, index: Index) -> None:
    root = store.path / FOLDER
    data = index_to_bytes(index, model=store.digest)
    half = root / f".{INDEX}{_HALF_WRITTEN}"
    half.unlink(missing_ok=True)
    put(root / INDEX, lambda path: write_synced(path, data), scratch=half)
    sync_path(root)


def _usable(store: Store) -> Index:
    """The index, or nothing where it is missing, damaged or of another model: it is
    replaced whole."""
    try:
        return calibration_index(store)
    except TierFailed:
        raise
    except StoreError:
        return {}


@contextmanager
def _locked(root: Path) -> Iterator[None]:
    """One writer at a time; the lock goes with its process."""
    fd = os.open(root / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    deadline_s = time.monotonic() + LOCK_WAIT_S
    try:
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline_s:
                    raise ValueError(
                        f"{root}: another process is writing calibration results and "
                        "does not end; stop it and run this again"
                    ) from None
                time.sleep(0.05)
        yield
    finally:
        os.close(fd)
