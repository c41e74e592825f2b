"""Files that a command writes: what could not be written is refused before it works."""

import os
from pathlib import Path


def check_out(out: Path, *, overwrite: bool) -> None:
    """Refuses a file that cannot be made, or that is there and shall not be replaced.

    Raises:
        ValueError: says why.
    """
    if out.is_dir():
        raise ValueError(f"{out}: is a folder; want the name of a file")
    if out.exists() and not out.is_file():
        raise ValueError(f"{out}: is no regular file; want the name of one")
    if out.exists() and not overwrite:
        raise ValueError(f"{out}: is there already; --overwrite replaces it")
    if not out.parent.is_dir():
        raise ValueError(f"{out.parent}: no such folder; make it first")
    if not os.access(out.parent, os.W_OK | os.X_OK):
        raise ValueError(f"{out.parent}: cannot be written; choose another folder")
