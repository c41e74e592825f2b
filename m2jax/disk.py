"""What the disk under one folder can do. Knows no store; leaves no file behind."""

import ctypes
import errno
import fcntl
import mmap
import os
import re
import shutil
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from m2jax.units import format_bytes

BLOCK_BYTES = 4 << 20
FILE_BYTES = 128 << 20
READS_IN_FLIGHT = 4
WRITE_S = 2.0
READ_S = 1.0


class ReadRate(NamedTuple):
    """How a file was read back. direct: past the page cache, as a check showed."""

    bytes_per_s: float
    direct: bool
    file_bytes: int


def filesystem_type(
    folder: Path, *, mounts: Path = Path("/proc/self/mountinfo")
) -> str:
    """As `mount` names it ("ext4", "tmpfs"); "unknown" where nothing says."""
    folder = folder.resolve()
    longest, found = -1, "unknown"
    for line in mounts.read_text().splitlines():
        fields, _, rest = line.partition(" - ")
        # Spaces and the like stand as octal escapes there.
        point = re.sub(
            r"\\(\d{3})", lambda code: chr(int(code[1], 8)), fields.split()[4]
        )
        # Of two mounts on one point the later hides the earlier.
        if folder.is_relative_to(point) and len(point) >= longest:
            longest, found = len(point), rest.split()[0]
    return found


def measure_reads(folder: Path, *, file_bytes: int = FILE_BYTES) -> ReadRate:
    """Writes an unnamed temporary file, drops it from the page cache, reads it back.

    BLOCK_BYTES a read, READS_IN_FLIGHT at once; direct where that works. The file is
    smaller where writing takes over WRITE_S; reading is repeated for READ_S.

    Raises:
        OSError: the folder cannot be written, or the disk is full, or would soon be.
    """
    free = shutil.disk_usage(folder).free
    if free < 2 * file_bytes:
        raise OSError(errno.ENOSPC, f"{format_bytes(free)} free is too little")
    with tempfile.TemporaryFile(dir=folder) as file:
        size = _fill(file, file_bytes)
        fd = os.open(f"/proc/self/fd/{file.fileno()}", os.O_RDONLY)
        try:
            direct = _go_direct(fd)
            buffers = [mmap.mmap(-1, BLOCK_BYTES) for _ in range(READS_IN_FLIGHT)]
            return ReadRate(_read_rate(fd, size, buffers), direct, size)
        finally:
            os.close(fd)


def _fill(file: BinaryIO, most_bytes: int) -> int:
    block = os.urandom(BLOCK_BYTES)
    end = time.perf_counter() + WRITE_S
    written = 0
    while written < most_bytes and (not written or time.perf_counter() < end):
        file.write(block)
        file.flush()
        os.fsync(file.fileno())
        written += BLOCK_BYTES
    return written


def _go_direct(fd: int) -> bool:
    """Turns O_DIRECT on for fd if reads then leave nothing in the page cache.

    That O_DIRECT is accepted shows little: tmpfs does so since Linux 6.6, and other
    filesystems fall back to buffered reads without a word.
    """
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_DIRECT)
        drop_cached(fd)
        with mmap.mmap(-1, BLOCK_BYTES) as buffer:
            os.preadv(fd, [buffer], 0)
        if cached_pages(fd, BLOCK_BYTES) == 0:
            return True
    except OSError:
        pass
    fcntl.fcntl(fd, fcntl.F_SETFL, flags)
    return False


def drop_cached(fd: int) -> None:
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def cached_pages(fd: int, size: int) -> int:
    """Pages of the file's first `size` bytes that the page cache holds."""
    with mmap.mmap(fd, size, prot=mmap.PROT_READ) as mapped:
        pages = np.zeros(-(-size // mmap.PAGESIZE), np.uint8)
        view = np.frombuffer(mapped, np.uint8)
        libc = ctypes.CDLL(None, use_errno=True)
        failed = libc.mincore(
            ctypes.c_void_p(view.ctypes.data),
            ctypes.c_size_t(size),
            ctypes.c_void_p(pages.ctypes.data),
        )
        del view
    if failed:
        raise OSError(ctypes.get_errno(), "mincore")
    return int(np.count_nonzero(pages & 1))


def _read_rate(fd: int, size: int, buffers: Sequence[mmap.mmap]) -> float:
    """Bytes a second over whole passes."""

    def share(reader: int) -> None:
        step = len(buffers) * BLOCK_BYTES
        for offset in range(reader * BLOCK_BYTES, size, step):
            got = os.preadv(fd, [buffers[reader]], offset)
            if got != BLOCK_BYTES:
                raise OSError(f"read {got} bytes at {offset}, wanted {BLOCK_BYTES}")

    passes, spent_s = 0, 0.0
    with ThreadPoolExecutor(len(buffers)) as pool:
        while spent_s < READ_S:
            drop_cached(fd)
            start = time.perf_counter()
            list(pool.map(share, range(len(buffers))))
            spent_s += time.perf_counter() - start
            passes += 1
    return passes * size / spent_s
