"""What calibration found out about a model, kept beside its store.

`calibration/index.json` names the parts, the sha256 of their files and the manifest
they belong to; every part is one folder, named by its content. A part is written apart
and renamed, then the index is replaced: killed at any point, the store has the old part
or the new one, whole.
"""

import fcntl
import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from m2jax.errors import StoreError, TierFailed
from m2jax.store.files import list_files, put, sha256_file, sync_path, write_synced
from m2jax.store.manifest import FileEntry
from m2jax.store.reader import Store
from m2jax.strict_json import canonical_json, parse_json, show

FOLDER = "calibration"
INDEX = "index.json"
LOCK = ".lock"
FORMAT, VERSION = "m2jax-calibration", 1
PARTS = ("mix", "order", "predictors-0", "predictors-1", "report", "trace")
FACTS = "facts.json"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_REPAIR = "delete STORE/calibration, or run m2jax calibrate again"

# Part to its files.
Index = dict[str, dict[str, FileEntry]]


def calibration_index(store: Store) -> Index:
    """The parts a store has; {} without calibration.

    Raises:
        StoreError: damaged, of an unknown version, or of another model.
    """
    path = store.path / FOLDER / INDEX
    try:
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise TierFailed(f"{path}: {error.strerror}", path=path) from error
    try:
        raw = parse_json(data)
        parts = _checked(raw)
        digest = raw.pop("sha256")
        if digest != _digest(raw) or data != canonical_json({**raw, "sha256": digest}):
            raise ValueError("sha256: the index's own checksum does not match")
    except ValueError as error:
        raise StoreError(f"{path}: {error}; {_REPAIR}", path=path) from None
    if raw["model"] != store.manifest.digest:
        raise StoreError(
            f"{store.path / FOLDER}: is the calibration of another model; {_REPAIR}",
            path=path,
        )
    return parts


def read_part(store: Store, part: str) -> Path | None:
    """Folder of a part, every byte checked; None if the store has no such part."""
    files = calibration_index(store).get(part)
    if files is None:
        return None
    folder = store.path / FOLDER / _folder_name(part, files)
    problems = part_problems(store, part, files)
    if problems:
        raise StoreError(f"{problems[0]}; {_REPAIR}", path=folder)
    return folder


def part_problems(store: Store, part: str, files: Mapping[str, FileEntry]) -> list[str]:
    """What is wrong with a part's files."""
    found = []
    for name, entry in files.items():
        path = store.path / FOLDER / _folder_name(part, files) / name
        try:
            got = FileEntry(*sha256_file(path))
        except (FileNotFoundError, NotADirectoryError):
            found.append(f"{path}: missing")
            continue
        except OSError as error:
            raise TierFailed(f"{path}: {error.strerror}", path=path) from error
        if got.bytes != entry.bytes:
            found.append(f"{path}: {got.bytes:,} bytes, index says {entry.bytes:,}")
        elif got != entry:
            found.append(f"{path}: sha256 {got.sha256}, want {entry.sha256}")
    return found


def write_part(store: Store, part: str, write: Callable[[Path], None]) -> None:
    """Makes or replaces a part.

    Args:
        write: writes the part's files into the new folder it is given.

    Raises:
        TierFailed: the store cannot be written; what was there stays.
    """
    if part not in PARTS:
        raise ValueError(f"part {part!r}: want one of {PARTS}")
    root = store.path / FOLDER
    try:
        root.mkdir(exist_ok=True)
        with _locked(root):
            _write_part(store, root, part, write)
    except OSError as error:
        if isinstance(error, StoreError):
            raise
        raise TierFailed(f"{root}: {error.strerror or error}", path=root) from error


def read_json_part(store: Store, part: str) -> dict[str, Any] | None:
    """Facts that `write_json_part` kept; None if the store has no such part."""
    folder = read_part(store, part)
    return None if folder is None else parse_json((folder / FACTS).read_bytes())


def write_json_part(store: Store, part: str, facts: Mapping[str, Any]) -> None:
    """Keeps a JSON object as a part."""
    data = canonical_json(dict(facts))
    write_part(store, part, lambda folder: write_synced(folder / FACTS, data))


def _write_part(
    store: Store, root: Path, part: str, write: Callable[[Path], None]
) -> None:
    scratch = root / f".{part}.half-written"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    write(scratch)
    files = {}
    for name in sorted(list_files(scratch)):
        sync_path(scratch / name)
        files[name] = FileEntry(*sha256_file(scratch / name))
    target = root / _folder_name(part, files)
    put(target, lambda _: None, scratch=scratch)
    sync_path(root)
    body = {
        "format": FORMAT,
        "version": VERSION,
        "model": store.manifest.digest,
        "parts": {
            name: {
                path: {"bytes": entry.bytes, "sha256": entry.sha256}
                for path, entry in entries.items()
            }
            for name, entries in {**_usable(store), part: files}.items()
        },
    }
    data = canonical_json({**body, "sha256": _digest(body)})
    half = root / f".{INDEX}.half-written"
    half.unlink(missing_ok=True)
    put(root / INDEX, lambda path: write_synced(path, data), scratch=half)
    sync_path(root)
    kept = {
        _folder_name(name, entries)
        for name, entries in {**_usable(store), part: files}.items()
    }
    for entry in root.iterdir():
        if entry.is_dir() and entry.name not in kept:
            shutil.rmtree(entry, ignore_errors=True)


def _usable(store: Store) -> Index:
    """The index, or nothing where it is damaged or of another model: replaced whole."""
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
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{root}: another process is writing calibration results; wait for it"
            ) from None
        yield
    finally:
        os.close(fd)


def _folder_name(part: str, files: Mapping[str, FileEntry]) -> str:
    content = {name: entry.sha256 for name, entry in files.items()}
    return f"{part}-{_digest(content)[:12]}"


def _checked(raw: Any) -> Index:
    """The parts of an index whose every field is as it must be."""
    fields = {"format", "version", "model", "parts", "sha256"}
    if not isinstance(raw, dict) or raw.keys() != fields:
        raise ValueError(f"want an object with the fields {sorted(fields)}")
    if raw["format"] != FORMAT:
        raise ValueError(f"format: want {FORMAT!r}, got {show(raw['format'])}")
    if type(raw["version"]) is not int or raw["version"] != VERSION:
        raise ValueError(
            f"version: this m2jax reads {VERSION}, got {show(raw['version'])}"
        )
    if not isinstance(raw["model"], str) or not isinstance(raw["parts"], dict):
        raise ValueError("model or parts: wrong type")
    index: Index = {}
    for part, files in raw["parts"].items():
        if part not in PARTS or not isinstance(files, dict) or not files:
            raise ValueError(f"parts: {show(part)} is no part with files")
        index[part] = {name: _entry(name, entry) for name, entry in files.items()}
    return index


def _entry(name: str, raw: Any) -> FileEntry:
    if not all(_NAME.fullmatch(piece) for piece in name.split("/")):
        raise ValueError(f"parts: file name {show(name)}")
    if not isinstance(raw, dict) or raw.keys() != {"bytes", "sha256"}:
        raise ValueError(f"parts: {name}: want bytes and sha256")
    size, digest = raw["bytes"], raw["sha256"]
    if type(size) is not int or size < 0:
        raise ValueError(f"parts: {name}: bytes {show(size)}")
    if not isinstance(digest, str) or not _SHA256.fullmatch(digest):
        raise ValueError(f"parts: {name}: sha256 {show(digest)}")
    return FileEntry(size, digest)


def _digest(body: Any) -> str:
    return hashlib.sha256(canonical_json(body)).hexdigest()
