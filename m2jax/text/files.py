"""Reads the files beside a checkpoint's tokenizer. Knows names, not what they mean."""

from pathlib import Path
from typing import Any

from m2jax.strict_json import read_json

MAX_FILE_BYTES = 256 << 20
SPECIAL_FILES = ("special_tokens_map.json", "tokenizer_config.json")


def read_bytes(path: Path, *, limit_bytes: int = MAX_FILE_BYTES) -> bytes:
    """A whole file.

    Raises:
        ValueError: it is empty or larger than limit_bytes.
    """
    if (size := path.stat().st_size) > limit_bytes:
        raise ValueError(f"{path}: {size:,} bytes; at most {limit_bytes:,} are read")
    data = path.read_bytes()
    if not data:
        raise ValueError(f"{path}: empty file; copy it again from the checkpoint")
    return data


def read_text(path: Path, *, limit_bytes: int = MAX_FILE_BYTES) -> str:
    """A whole UTF-8 file; ValueError as read_bytes, or naming the first bad byte."""
    try:
        return read_bytes(path, limit_bytes=limit_bytes).decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 at byte {error.start:,}") from None


def read_optional_json(path: Path) -> dict[str, Any]:
    """A JSON object as m2jax.strict_json reads it; {} where there is no such file."""
    return read_json(path) if path.is_file() else {}


def named_special(folder: Path) -> set[str]:
    """Every token that a checkpoint names as special, in a role or as one more."""
    found = set(special_strings(folder).values())
    for name in SPECIAL_FILES:
        more = read_optional_json(folder / name).get("additional_special_tokens")
        for value in more if isinstance(more, list) else []:
            text = value.get("content") if isinstance(value, dict) else value
            if isinstance(text, str):
                found.add(text)
    return found


def special_strings(folder: Path) -> dict[str, str]:
    """{"bos_token": "<s>", ...}: the tokens that a checkpoint names, as strings.

    tokenizer_config.json wins over special_tokens_map.json; a role named in neither is
    absent.
    """
    found: dict[str, str] = {}
    for name in SPECIAL_FILES:
        for role, value in read_optional_json(folder / name).items():
            text = value.get("content") if isinstance(value, dict) else value
            if role.endswith("_token") and isinstance(text, str):
                found[role] = text
    return found
