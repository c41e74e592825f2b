"""Files that appear whole or not at all, and their digests. Knows no store."""

import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

HASH_BLOCK_BYTES = 1 << 20


def put(target: Path, write: Callable[[Path], None], *, scratch: Path) -> None:
    """Makes a file or folder appear at once.

    Args:
        target: final path; what stands there is replaced.
        write: writes file or folder to the path it is given, and syncs it.
        scratch: a path on the same filesystem that nothing else uses.
    """
    write(scratch)
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.is_dir():
        shutil.rmtree(target)
    os.rename(scratch, target)


def lock_file(path: Path) -> int:
    """Descriptor of a file, made if it is not there, whose lock this process now holds;
    the kernel frees it when its owner dies.

    Raises:
        BlockingIOError: another process holds it.
    """
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Its last owner may have removed it between our opening and locking.
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(fd), os.stat(path)):
                    return fd
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


def write_synced(path: Path, data: bytes | memoryview) -> None:
    """Writes a new file and waits until its bytes are on disk."""
    with open(path, "xb", buffering=0) as file:
        view = memoryview(data).cast("B")
        while view:
            view = view[file.write(view) :]
        os.fsync(file.fileno())


def sha256_file(path: Path) -> tuple[int, str]:
    """Size in bytes and hex digest, read in blocks."""
    digest, size = hashlib.sha256(), 0
    buffer = bytearray(HASH_BLOCK_BYTES)
    view = memoryview(buffer)
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(view[:count])
            size += count
    return size, digest.hexdigest()


def sync_path(path: Path) -> None:
    """Waits until a file's bytes, or a folder's names, are on disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def list_files(root: Path) -> dict[str, int]:
    """Sizes in bytes of all files under a folder, by path relative to it.

    Links to folders are not followed.

    Raises:
        ValueError: a link leads out of the folder.
    """
    real = Path(os.path.realpath(root))
    sizes: dict[str, int] = {}
    waiting = [""]
    while waiting:
        prefix = waiting.pop()
        with os.scandir(root / prefix) as entries:
            for entry in entries:
                path = prefix + entry.name
                if entry.is_symlink():
                    leads = Path(os.path.realpath(entry.path))
                    if not leads.is_relative_to(real):
                        raise ValueError(
                            f"{path}: a link that leads out of the folder, to {leads}; "
                            "put the files themselves there"
                        )
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(path + "/")
                elif entry.is_file():
                    sizes[path] = entry.stat().st_size
    return sizes
