"""The journal a conversion leaves behind: what is finished. Reads it, never writes.

One JSON object a line. The first tells source, options and total; each later one lists
files that are finished: {"files": {path: {"bytes", "sha256"}}, "payload_bytes"}.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from m2jax.store.entries import FileEntry
from m2jax.store.paths import WORK_FOLDER
from m2jax.strict_json import parse_json

JOURNAL = "journal.jsonl"


@dataclass
class Finished:
    """What a journal holds.

    header: its first line; None if not even that was written whole.
    good_bytes: length of the part that is whole; a torn last line lies behind it.
    """

    header: dict[str, Any] | None = None
    files: dict[str, FileEntry] = field(default_factory=dict)
    payload_bytes: int = 0
    good_bytes: int = 0


def read_journal(store: Path) -> Finished:
    """What is finished in an unfinished store; a torn line ends the reading."""
    finished = Finished()
    try:
        data = (store / WORK_FOLDER / JOURNAL).read_bytes()
    except FileNotFoundError:
        return finished
    for line in data.splitlines(keepends=True):
        try:
            if not line.endswith(b"\n"):
                break
            record = parse_json(line)
            if finished.header is None:
                _ = int(record["total_bytes"]), record["format"]
                finished.header = record
            else:
                files = {
                    path: FileEntry(int(entry["bytes"]), str(entry["sha256"]))
                    for path, entry in record["files"].items()
                }
                finished.payload_bytes += int(record["payload_bytes"])
                finished.files.update(files)
        except (ValueError, TypeError, KeyError, AttributeError):
            break
        finished.good_bytes += len(line)
    return finished


def finished_percent(store: Path) -> int | None:
    """Share of an unfinished conversion that is done, in whole percent below 100.

    None if no conversion was started here.
    """
    if not (store / WORK_FOLDER).is_dir():
        return None
    finished = read_journal(store)
    if finished.header is None:
        return 0
    total = max(1, finished.header["total_bytes"])
    return min(99, 100 * finished.payload_bytes // total)
