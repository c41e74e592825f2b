"""The index of a store's calibration part: bytes to parts and back. Opens no file."""

import re
from collections.abc import Mapping
from typing import Any

from m2jax.store.entries import (
    FileEntry,
    digest_of,
    entries_to_json,
    entry_from_json,
)
from m2jax.strict_json import canonical_json, parse_json, show

FOLDER = "calibration"
FORMAT, VERSION = "m2jax-calibration", 1
PARTS = (
    *("mix", "order", "predictors-0", "predictors-1", "predictors-2"),
    *("report", "thresholds", "trace"),
)
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")

# Part to its files.
Index = dict[str, dict[str, FileEntry]]


def index_to_bytes(index: Index, *, model: str) -> bytes:
    """Canonical JSON, its own digest included.

    Args:
        model: digest of the manifest that the parts belong to.
    """
    parts = {part: entries_to_json(files) for part, files in index.items()}
    body = {"format": FORMAT, "version": VERSION, "model": model, "parts": parts}
    return canonical_json({**body, "sha256": digest_of(body)})


def bytes_to_index(data: bytes) -> tuple[Index, str]:
    """The strict inverse of `index_to_bytes`: the index and its model.

    Raises:
        ValueError: names the field, what was wanted and what came.
    """
    raw = parse_json(data)
    index = _checked(raw)
    digest = raw.pop("sha256")
    if digest != digest_of(raw) or data != canonical_json({**raw, "sha256": digest}):
        raise ValueError("sha256: the index's own checksum does not match")
    return index, raw["model"]


def calibration_files(index: Index) -> dict[str, FileEntry]:
    """Every file of every part, by its path relative to the store."""
    return {
        f"{FOLDER}/{folder_name(part, files)}/{name}": entry
        for part, files in index.items()
        for name, entry in files.items()
    }


def folder_name(part: str, files: Mapping[str, FileEntry]) -> str:
    """Folder of a part: the part and twelve digits of its content's digest."""
    content = {name: entry.sha256 for name, entry in files.items()}
    return f"{part}-{digest_of(content)[:12]}"


def check_part(part: str) -> None:
    """Raises ValueError if there is no such part."""
    if part not in PARTS:
        raise ValueError(f"part {part!r}: want one of {', '.join(PARTS)}")


def _checked(raw: Any) -> Index:
    """The parts of an index whose every field is as it must be."""
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise ValueError(f"want an object of format {FORMAT!r}")
    if type(raw.get("version")) is not int or raw["version"] != VERSION:
        raise ValueError(
            f"version: this m2jax reads {VERSION}, got {show(raw.get('version'))}"
        )
    fields = {"format", "version", "model", "parts", "sha256"}
    if raw.keys() != fields:
        raise ValueError(f"want the fields {', '.join(sorted(fields))}")
    if not isinstance(raw["model"], str) or not isinstance(raw["parts"], dict):
        raise ValueError("model or parts: wrong type")
    index: Index = {}
    for part, files in raw["parts"].items():
        if part not in PARTS or not isinstance(files, dict) or not files:
            raise ValueError(f"parts: {show(part)} is no part with files")
        index[part] = {
            checked_name(name): entry_from_json(entry, where=f"parts: {name}")
            for name, entry in files.items()
        }
    return index


def checked_name(name: str) -> str:
    """The name of a file in a part; ValueError if it could lead out of the part."""
    if not all(_NAME.fullmatch(piece) for piece in name.split("/")):
        raise ValueError(f"parts: {show(name)} is no name of a file")
    return name
