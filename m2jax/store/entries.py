"""What a manifest, an index and a journal say of a file. Opens none."""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from m2jax.strict_json import canonical_json, show

MAX_FILE_BYTES = 1 << 50
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class FileEntry:
    """Size and digest (hex) of one file of the store."""

    bytes: int
    sha256: str


def entries_to_json(files: Mapping[str, FileEntry]) -> dict[str, dict[str, Any]]:
    return {path: asdict(entry) for path, entry in files.items()}


def entry_from_json(raw: Any, *, where: str) -> FileEntry:
    """The strict inverse of one of `entries_to_json`.

    Args:
        where: names it in errors.

    Raises:
        ValueError: names the field, what was wanted and what came.
    """
    raw = want_object(raw, where)
    want_keys(raw, {"bytes", "sha256"}, where)
    size, digest = raw["bytes"], raw["sha256"]
    if type(size) is not int or not 0 <= size <= MAX_FILE_BYTES:
        raise ValueError(f"{where}.bytes: want a size, got {show(size)}")
    if not isinstance(digest, str) or not _SHA256.fullmatch(digest):
        raise ValueError(f"{where}.sha256: want 64 hex digits, got {show(digest)}")
    return FileEntry(size, digest)


def digest_of(body: Any) -> str:
    """sha256 (hex) of a value's canonical JSON."""
    return hashlib.sha256(canonical_json(body)).hexdigest()


def want_object(value: Any, where: str) -> dict[str, Any]:
    """The value; ValueError if it is no object."""
    if not isinstance(value, dict):
        raise ValueError(f"{where}: want an object, got {show(value)}")
    return value


def want_keys(value: dict[str, Any], wanted: set[str], where: str) -> None:
    """Raises ValueError if an object has other keys than those wanted."""
    missing, unknown = wanted - value.keys(), value.keys() - wanted
    if missing:
        raise ValueError(f"{where}: field {min(missing)!r} is missing")
    if unknown:
        raise ValueError(f"{where}: unknown field {show(min(unknown))}")
