"""Text for training: which files, in which order, as token ids. Knows no model."""

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

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


class Source(NamedTuple):
    """A file or folder of text; of most_bytes, a random part of its documents."""

    path: Path
    most_bytes: int | None = None


def parse_source(text: str) -> Source:
    """PATH, or PATH=MB for a part of so many megabytes (10^6 bytes)."""
    name, _, size = text.rpartition("=")
    if not name or Path(text).exists():
        return Source(Path(text))
    try:
        most_bytes = round(float(size) * 1e6)
    except (ValueError, OverflowError):
        return Source(Path(text))
    if most_bytes <= 0:
        raise ValueError(f"--text {text}: want PATH or PATH=MB, MB above 0")
    return Source(Path(name), most_bytes)


def documents(sources: Iterable[Source], *, without: Iterable[Path]) -> Iterator[str]:
    """Texts of files and of folders' .py, .txt and .md files, each distinct one once.

    A file named by itself is taken whole, cut at <|endoftext|> or into pieces; in
    folders, files above 200 kB or not UTF-8 are left out.

    Args:
        without: texts that must not be trained on; a document that shares more than
            30 % of its lines above 30 characters with them is dropped.

    Raises:
        ValueError: nothing there, or not UTF-8.
    """
    forbidden = {line for path in without for line in long_lines(read(path))}
    seen: set[bytes] = set()
    for source in sources:
        if not source.path.exists():
            raise ValueError(f"{source.path}: no such file or folder")
        found: dict[bytes, str] = {}
        for text in _texts(source.path):
            digest = _digest(text)
            if digest not in seen and text.strip() and not _overlaps(text, forbidden):
                seen.add(digest)
                found[digest] = text
        yield from _part(found, source.most_bytes)


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _overlaps(text: str, forbidden: set[str]) -> bool:
    lines = long_lines(text)
    return sum(line in forbidden for line in lines) > MOST_SHARED * len(lines)


def _part(found: dict[bytes, str], most_bytes: int | None) -> Iterator[str]:
    """All, or documents in the order of their hashes while the bytes last."""
    if most_bytes is None:
        yield from found.values()
        return
    for digest in sorted(found):
        most_bytes -= len(found[digest].encode())
        if most_bytes < 0:
            return
        yield found[digest]


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
    """The text of a file; ValueError if it is missing or not UTF-8."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8, byte {error.start}") from None


def long_lines(text: str) -> list[str]:
    """What the overlap rule compares: stripped lines above 30 characters."""
    lines = (line.strip() for line in text.splitlines())
    return [line for line in lines if len(line) > LONG_LINE_CHARS]


def token_streams(
    texts: Iterable[str], tokenizer: Tokenizer, *, eos_id: int
) -> tuple[np.ndarray, np.ndarray]:
    """Training and held-out ids: every document is BOS, its text, EOS.

    Held out is one document in 64, by the hash of its text; where that is none, the
    last 64th of all ids.
    """
    streams: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    front = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    for text in texts:
        ids = [*front, *tokenizer.encode(text, add_bos=False), eos_id]
        streams[_digest(text)[0] % HELD_OUT == 0].append(np.array(ids, np.int32))
    empty = [np.zeros(0, np.int32)]
    train, held = (np.concatenate(stream or empty) for stream in streams)
    if not len(train):
        train, held = held, train
    if not len(held):
        cut = len(train) - -(-len(train) // HELD_OUT)
        train, held = train[:cut], train[cut:]
    return train, held


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
            f"the text has {len(ids):,} tokens to train on, a batch of {size} windows "
            f"of {length} wants {size * length + 1:,}; give more text or a smaller "
            "--batch"
        )
    epoch, place = divmod(step, windows // size)
    order = np.random.default_rng([seed, epoch]).permutation(windows)
    starts = length * order[place * size : (place + 1) * size]
    return np.stack([ids[start : start + length + 1] for start in starts])


def held_out_batches(
    ids: np.ndarray, *, size: int, length: int, most: int
) -> list[np.ndarray]:
    """Up to `most` batches of equal shape, evenly spread over the held-out ids.

    Fewer or shorter windows where the ids are few; none below two ids.
    """
    length = min(length, len(ids) - 1)
    if length < 1:
        return []
    windows = (len(ids) - 1) // length
    size = min(size, windows)
    count = min(most, windows // size)
    chosen = np.linspace(0, windows - 1, count * size).astype(int)
    rows = np.stack([ids[length * n : length * n + length + 1] for n in chosen])
    return list(rows.reshape(count, size, length + 1))
