"""Whether a folder may become a store, and whether it fits there. Writes nothing."""

import logging
import math
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from m2jax.errors import DoesNotFit
from m2jax.store.files import list_files
from m2jax.store.manifest import FORMAT
from m2jax.store.paths import MANIFEST, WORK_FOLDER

log = logging.getLogger("m2jax")

State = Literal["empty", "foreign", "unfinished", "complete"]
DISK_BLOCK_BYTES = 4096


def target_state(target: Path) -> State:
    """What lies at a path; "empty" also if nothing does."""
    if not target.exists():
        return "empty"
    if not target.is_dir():
        return "foreign"
    manifest = target / MANIFEST
    if manifest.is_file() and FORMAT.encode() in manifest.read_bytes():
        return "complete"
    if (target / WORK_FOLDER).is_dir():
        return "unfinished"
    return "foreign" if any(target.iterdir()) else "empty"


def check_target(target: Path, source: Path, *, overwrite: bool) -> State:
    """The state of a folder that may be written to.

    Raises:
        ValueError: it holds the source, a complete store and `overwrite` is false,
            something that is not ours, or a link that leads out of it.
    """
    if source.resolve().is_relative_to(target.resolve()):
        raise ValueError(
            f"{target}: holds the source {source}; give the store a folder of its own"
        )
    state = target_state(target)
    if state == "foreign":
        what = "a folder with other files" if target.is_dir() else "a file"
        raise ValueError(
            f"{target}: {what}, no store; give a new path, nothing there is removed"
        )
    if state == "complete" and not overwrite:
        raise ValueError(
            f"{target}: is a complete store already; --overwrite replaces it"
        )
    if state != "empty":
        list_files(target)
    return state


def check_space(target: Path, sizes: Iterable[int], *, present: Iterable[int]) -> None:
    """Compares what a store takes with what the disk has free.

    Args:
        sizes: bytes of every file to be.
        present: bytes of files already there that stay, or make room.

    Raises:
        DoesNotFit: gives both figures.
    """
    need = max(0, _disk_bytes(sizes) - _disk_bytes(present))
    parent = target.absolute()
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    log.info("%s: needs %s bytes, %s are free", target, f"{need:,}", f"{free:,}")
    if need > free:
        raise DoesNotFit(
            f"{target}: the store needs {need:,} more bytes, the disk has {free:,} "
            "free; free space or give a path on another disk"
        )


def _disk_bytes(sizes: Iterable[int]) -> int:
    """With whole disk blocks, and one more for the folder most files have alone."""
    return sum(
        (math.ceil(size / DISK_BLOCK_BYTES) + 1) * DISK_BLOCK_BYTES for size in sizes
    )
