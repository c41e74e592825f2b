"""Text for training: which files, in which order, as token ids. Knows no model."""

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from m2jax.text import Tokenizer

SUFFIXES = (".py", ".txt", ".md")
LARGEST_BYTES = 200_000
LONG_LINE_CHARS = 30
MOST_SHARED = 0.3
# One document in so many is kept out of training, by the hash of its text.
HELD_OUT = 64
STORY_END = "<|endoftext|>"
PIECE_CHARS = 100_000


def documents(paths: Iterable[Path], *, without: Iterable[Path]) -> Iterator[str]:
    """Texts of files and of folders' .py, .txt and .md files, each distinct one once.

    A file named by itself is taken whole, cut at <|endoftext|> or into pieces; in
    folders, files above 200 kB are left out.

    Args:
        without: texts that must not be trained on; a document that shares more than
            30 % of its lines above 30 characters with them is dropped.

    Raises:
        ValueError: nothing there, or not UTF-8.
    """
    forbidden = {line for path in without for line in long_lines(read(path))}
    seen: set[bytes] = set()
    for path in paths:
        if not path.exists():
            raise ValueError(f"{path}: no such file or folder")
        for text in _texts(path):
            digest = hashlib.sha256(text.encode()).digest()
            if digest in seen or not text.strip():
                continue
            seen.add(digest)
            lines = long_lines(text)
            shared = sum(line in forbidden for line in lines)
            if shared <= MOST_SHARED * len(lines):
                yield text


def _texts(path: Path) -> Iterator[str]:
    if path.is_file():
        for story in read(path).split(STORY_END):
            text = story.strip()
            for start in range(0, len(text), PIECE_CHARS):
                yield text[start : start + PIECE_CHARS]
        return
    for file in sorted(path.rglob("*")):
        if (
            file.suffix in SUFFIXES
            and file.is_file()
            and file.stat().st_size <= LARGEST_BYTES
        ):
            try:
                yield read(file)
            except ValueError:
                continue


def read(path: Path) -> str:
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8, byte {error.start}") from None


def long_lines(text: str) -> list[str]:
    lines = (line.strip() for line in text.splitlines())
    return [line for line in lines if len(line) > LONG_LINE_CHARS]


def token_streams(
    texts: Iterable[str], tokenizer: Tokenizer, *, eos_id: int
) -> tuple[np.ndarray, np.ndarray]:
    """Training and held-out ids: every document is BOS, its text, EOS."""
    streams: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    front = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    for text in texts:
        ids = [*front, *tokenizer.encode(text, add_bos=False), eos_id]
        chosen = hashlib.sha256(text.encode()).digest()[0] % HELD_OUT == 0
        streams[chosen].append(np.array(ids, np.int32))
    empty = [np.zeros(0, np.int32)]
    return np.concatenate(streams[0] or empty), np.concatenate(streams[1] or empty)


def batch(
    ids: np.ndarray, step: int, *, size: int, length: int, seed: int
) -> np.ndarray:
    """Windows [size, length + 1] of one step; a function of seed and step alone.

    Every epoch passes over all windows in a new order.

    Raises:
        ValueError: the text has fewer windows than a batch.
    """
    windows = (len(ids) - 1) // length
    if windows < size:
        raise ValueError(
            f"the text has {len(ids)} tokens: a batch of {size} windows of {length} "
            f"wants {size * length + 1}; give more text or a smaller --batch"
        )
    epoch, place = divmod(step, windows // size)
    order = np.random.default_rng([seed, epoch]).permutation(windows)
    starts = length * order[place * size : (place + 1) * size]
    return np.stack([ids[start : start + length + 1] for start in starts])
