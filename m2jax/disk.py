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
from itertools import product
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from m2jax.units import format_bytes

BLOCK_BYTES = 4 << 20
FILE_BYTES = 128 << 20
WRITE_S = 2.0
# Of each way to read.
READ_S = 0.2
READ_BYTES = (64 << 10, 1 << 20, 4 << 20)
READ_DEPTHS = (1, 8)


class WayToRead(NamedTuple):
    """One way to read a file, and its rate. direct: past the page cache."""

    bytes: int
    in_flight: int
    direct: bool
    bytes_per_s: float


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


def measure_ways(folder: Path, *, file_bytes: int = FILE_BYTES) -> list[WayToRead]:
    """Writes an unnamed temporary file and reads it back: in blocks of several sizes,
    one or more at once, direct and buffered.

    Buffered means cold: the page cache is dropped before. Direct ones are missing where
    that does not work. The file is smaller where writing takes over WRITE_S.

    Raises:
        OSError: the folder cannot be written, or the disk is full, or would soon be.
    """
    free = shutil.disk_usage(folder).free
    if free < 2 * file_bytes:
        raise OSError(errno.ENOSPC, f"{format_bytes(free)} free is too little")
    found = []
    with tempfile.TemporaryFile(dir=folder) as file:
        size = _fill(file, file_bytes)
        for wanted in (True, False):
            fd = os.open(f"/proc/self/fd/{file.fileno()}", os.O_RDONLY)
            try:
                if wanted and not _go_direct(fd):
                    continue
                for block, depth in product(READ_BYTES, READ_DEPTHS):
                    buffers = [mmap.mmap(-1, block) for _ in range(depth)]
                    rate = _read_rate(fd, size, buffers)
                    found.append(WayToRead(block, depth, wanted, rate))
            finally:
                os.close(fd)
    return found


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
    """Bytes a second; whole passes, but for one that would take much longer."""
    block = len(buffers[0])

    def share(reader: int) -> int:
        step, done = len(buffers) * block, 0
        for offset in range(reader * block, size, step):
            got = os.preadv(fd, [buffers[reader]], offset)
            if got != block:
                raise OSError(f"read {got} bytes at {offset}, wanted {block}")
            done += got
            if time.perf_counter() > end:
                break
        return done

    total, spent_s = 0, 0.0
    with ThreadPoolExecutor(len(buffers)) as pool:
        while spent_s < READ_S:
            drop_cached(fd)
            start = time.perf_counter()
            end = start + 2 * READ_S
            total += sum(pool.map(share, range(len(buffers))))
            spent_s += time.perf_counter() - start
    return total / spent_s
