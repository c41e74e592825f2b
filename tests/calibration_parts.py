"""Parts of a calibration with random content."""

import random
from collections.abc import Callable
from pathlib import Path

# Name to bytes; Orbax too writes folders, names with underscores and empty files.
FILES = {"a.bin": 3000, "deep/under/b.bin": 70, "_METADATA": 0}


def some_files(seed: int) -> Callable[[Path], None]:
    """Writes FILES into the folder it is given."""

    def write(folder: Path) -> None:
        for name, size in FILES.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(random.Random(seed).randbytes(size))

    return write
