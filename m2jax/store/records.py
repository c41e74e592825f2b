"""Reads of some of a plane's records: the disk blocks that hold them.

A record seldom begins and ends on a block, so a direct read goes to a buffer of whole
blocks first. Knows files and bytes; nothing of who wants which record, or why.
"""

import os
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

import numpy as np

from m2jax.aligned import ALIGN_BYTES, aligned_buffer
from m2jax.spans import MOST_READ_BYTES, Span, spans

# Tried three times, it is given up when a layer's read is.
TIMEOUT_S = 40.0
_NO_BYTES = memoryview(b"")


class RecordReads:
    """Reads records of chunk files by several threads at once, one call at a time.

    Args:
        depth: how many reads are in flight.
        flags: of `os.open`, beside O_RDONLY.
    """

    def __init__(self, *, depth: int, flags: int):
        self._flags, self._depth = flags, depth
        self._block_bytes = ALIGN_BYTES if flags & os.O_DIRECT else 1
        self._own = threading.local()
        # Of a call that was given up or interrupted: reads, and the files they read.
        self._late: list[Future[Exception | None]] = []
        self._files: dict[int, int] = {}
        self._pool = ThreadPoolExecutor(depth, thread_name_prefix="m2jax-records")

    def close(self) -> None:
        """Ends its threads; no more reads after that."""
        self._pool.shutdown(wait=True)
        self._close_files()

    def read(
        self,
        paths: Sequence[Path],
        records: np.ndarray,
        out: np.ndarray,
        slots: np.ndarray,
        *,
        chunk_neurons: int,
    ) -> int:
        """Reads records into rows of `out`; returns when no read goes on. Whoever is
        interrupted may be too early: the next call waits.

        Args:
            paths: the plane's chunk files, in order.
            records: integer [M], ascending.
            out: uint8 [S, R]. slots: integer [M], the row of each record.

        Returns:
            Bytes asked of the disk.

        Raises:
            OSError: a file could not be read, ends before a record does, or nothing
                came in TIMEOUT_S.
        """
        record_bytes = out.shape[1]
        wanted = spans(
            records,
            record_bytes=record_bytes,
            chunk_neurons=chunk_neurons,
            block_bytes=self._block_bytes,
        )
        begin = (records % chunk_neurons * record_bytes).tolist()
        places = (slots.astype(np.int64) * record_bytes).tolist()
        # Copies between arrays let go of Python's lock, and then wait for it.
        rows = out.reshape(-1).data
        # A late read must not meet the next use of rows that it still writes to.
        _await_all(self._late)
        self._close_files()
        for chunk in {span.chunk for span in wanted}:
            self._files[chunk] = os.open(paths[chunk], os.O_RDONLY | self._flags)
        files = dict(self._files)

        def share(some: list[Span]) -> Exception | None:
            try:
                for span in some:
                    found = self._bytes(files[span.chunk], span)
                    for n in range(span.first, span.last):
                        at, to = begin[n] - span.start, places[n]
                        rows[to : to + record_bytes] = found[at : at + record_bytes]
            except Exception as error:
                # Others still write: raised when they have ended.
                return error
            return None

        # Neighbours at once: some disks fetch more than they are asked for.
        shares = [wanted[reader :: self._depth] for reader in range(self._depth)]
        reads: list[Future[Exception | None]] = []
        try:
            # What was begun before an interrupt stays in the list.
            reads.extend(self._pool.submit(share, some) for some in shares if some)
            _await_all(reads)
        finally:
            self._late = [r for r in reads if not r.cancel() and not r.done()]
            if not self._late:
                self._close_files()
        failed = [error for error in (read.result() for read in reads) if error]
        if failed:
            raise failed[0]
        return sum(span.end - span.start for span in wanted)

    def _close_files(self) -> None:
        while self._files:
            os.close(self._files.popitem()[1])

    def _bytes(self, fd: int, span: Span) -> memoryview:
        """What a span holds, in this thread's own buffer."""
        size = span.end - span.start
        buffer: memoryview = getattr(self._own, "buffer", _NO_BYTES)
        if len(buffer) < size:
            room = max(size, MOST_READ_BYTES + 2 * ALIGN_BYTES)
            self._own.buffer = buffer = aligned_buffer((1, room))[0].data
        got = os.preadv(fd, [buffer[:size]], span.start)
        if got != size:
            raise OSError(f"ends after {span.start + got} bytes, {span.end} are wanted")
        return buffer


def _await_all(reads: Sequence[Future[Exception | None]]) -> None:
    if wait(reads, TIMEOUT_S).not_done:
        raise TimeoutError(f"no answer from the SSD in {TIMEOUT_S:.0f} s")
