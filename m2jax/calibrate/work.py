"""The work folder of a calibration: one process a store, and nothing left behind."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from m2jax.errors import TierFailed
from m2jax.store.files import lock_file

FOLDER = ".m2jax-calibrate"
LOCK = "lock"


@contextmanager
def claimed(store: Path) -> Iterator[Path]:
    """The work folder, locked; the lock goes with its process.

    Removed at the end, unless it holds layers that an interrupted run has finished.

    Raises:
        ValueError: another process has it. TierFailed: the folder cannot be written.
    """
    work = store / FOLDER
    try:
        fd = lock_file(work / LOCK)
    except BlockingIOError:
        raise ValueError(f"{work}: another process calibrates this store") from None
    except OSError as error:
        raise TierFailed(f"{work}: {error.strerror}", path=work) from error
    try:
        yield work
    finally:
        if not any(work.glob("lookahead-*/layer-*")):
            shutil.rmtree(work, ignore_errors=True)
        os.close(fd)


def remove_layers(work: Path) -> None:
    """Drops what was kept for a resumed run: its results are in the store."""
    for folder in work.glob("lookahead-*"):
        shutil.rmtree(folder, ignore_errors=True)
