"""Reads prompts and texts exactly as they are. Knows no tokenizer."""

import os
import sys
from pathlib import Path

from m2jax.cli.options import parse_integers

MAX_TEXT_BYTES = 256 << 20


def read_prompt(
    prompt: str | None, prompt_file: Path | None, token_ids: str | None
) -> str | list[int]:
    """The one prompt that was given.

    Raises:
        ValueError: none or several are given; one is empty or no UTF-8.
    """
    given = [value for value in (prompt, prompt_file, token_ids) if value is not None]
    if len(given) != 1:
        raise ValueError(
            f"{len(given) or 'no'} prompts: give one of --prompt TEXT, --prompt-file "
            "FILE and --token-ids 1,2,3"
        )
    if token_ids is not None:
        if not token_ids.strip():
            raise ValueError(
                "--token-ids: the prompt is empty: want at least one token"
            )
        return parse_integers(token_ids, name="--token-ids")
    if prompt_file is not None:
        text = read_text_file(prompt_file)
    elif prompt == "-":
        if sys.stdin is None:
            raise ValueError("--prompt - reads stdin, and stdin is closed")
        text = _decode(sys.stdin.buffer.read(MAX_TEXT_BYTES + 1), name="stdin")
    else:
        text = _decode(os.fsencode(prompt or ""), name="--prompt")
    if not text:
        raise ValueError("the prompt is empty; give some text, or token ids")
    return text


def read_text_file(path: Path) -> str:
    """A whole file.

    Raises:
        ValueError: it is missing, a folder, too long, or not UTF-8 (with the offset).
        OSError: the machine could not read it.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_TEXT_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise ValueError(f"{path}: a folder; want a file of text") from None
    return _decode(data, name=str(path))


def _decode(data: bytes, *, name: str) -> str:
    if len(data) > MAX_TEXT_BYTES:
        raise ValueError(f"{name}: more than {MAX_TEXT_BYTES:,} bytes; cut it up")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: not UTF-8 at byte {error.start:,}") from None
