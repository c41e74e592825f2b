"""Files that are replaced whole or not at all. Knows no format."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file beside `path` that takes its place, bytes on disk, if the body ends well.

    Raises:
        OSError: names `path`, which holds what it held before.
    """
    # Not the name and more: that could be too long. Not `tempfile`: its files are for
    # their owner alone, and this one gets what the umask allows.
    partial = path.with_name(f".m2jax-{os.getpid()}-{secrets.token_hex(8)}.tmp")
    try:
        with partial.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        why = error.strerror or str(error)
        raise OSError(error.errno, why, str(path)) from error
    finally:
        with suppress(OSError):
            partial.unlink()
