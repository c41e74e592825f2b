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

# Of one chunk: a thread opens its file once for them.
MOST_SPANS = 32
_NO_BYTES = np.empty(0, np.uint8)


class RecordReads:
    """Reads records of chunk files by several threads at once.

    Args:
        depth: how many reads are in flight.
        flags: of `os.open`, beside O_RDONLY.
    """

    def __init__(self, *, depth: int, flags: int):
        self._flags = flags
        self._block_bytes = ALIGN_BYTES if flags & os.O_DIRECT else 1
        self._own = threading.local()
        self._pool = ThreadPoolExecutor(depth, thread_name_prefix="m2jax-records")

    def close(self) -> None:
        """Ends its threads; no more reads after that."""
        self._pool.shutdown(wait=True)

    def read(
        self,
        paths: Sequence[Path],
        records: np.ndarray,
        out: np.ndarray,
        slots: np.ndarray,
        *,
        chunk_neurons: int,
    ) -> int:
        """Reads records into rows of `out`; returns when no read goes on.

        Args:
            paths: the plane's chunk files, in order.
            records: integer [M], ascending.
            out: uint8 [S, R]. slots: integer [M], the row of each record.

        Returns:
            Bytes asked of the disk.

        Raises:
            OSError: a file could not be read, or ends before a record does.
        """
        record_bytes = out.shape[1]
        wanted = spans(
            records,
            record_bytes=record_bytes,
            chunk_neurons=chunk_neurons,
            block_bytes=self._block_bytes,
        )
        begin = (records % chunk_neurons * record_bytes).tolist()
        places = slots.tolist()

        def share(some: list[Span]) -> Exception | None:
            try:
                fd = os.open(paths[some[0].chunk], os.O_RDONLY | self._flags)
                try:
                    for span in some:
                        bytes_ = self._bytes(fd, span)
                        for n in range(span.first, span.last):
                            at = begin[n] - span.start
                            out[places[n]] = bytes_[at : at + record_bytes]
                finally:
                    os.close(fd)
            except Exception as error:
                # Others still write: raised when they have ended.
                return error
            return None

        reads: list[Future[Exception | None]] = []
        try:
            # What was begun before an interrupt stays in the list.
            reads.extend(self._pool.submit(share, some) for some in _by_file(wanted))
            wait(reads)
        finally:
            # Also who was interrupted: a late read must not meet the rows' next use.
            wait([read for read in reads if not read.cancel()])
        failed = [error for error in (read.result() for read in reads) if error]
        if failed:
            raise failed[0]
        return sum(span.end - span.start for span in wanted)

    def _bytes(self, fd: int, span: Span) -> np.ndarray:
        """What a span holds, in this thread's own buffer."""
        size = span.end - span.start
        buffer: np.ndarray = getattr(self._own, "buffer", _NO_BYTES)
        if len(buffer) < size:
            room = max(size, MOST_READ_BYTES + 2 * ALIGN_BYTES)
            self._own.buffer = buffer = aligned_buffer((1, room))[0]
        got = os.preadv(fd, [buffer[:size].data], span.start)
        if got != size:
            raise OSError(f"ends after {span.start + got} bytes, {span.end} are wanted")
        return buffer


def _by_file(wanted: Sequence[Span]) -> list[list[Span]]:
    """Runs of spans of one chunk, none too long for one thread."""
    runs: list[list[Span]] = []
    for span in wanted:
        if runs and runs[-1][0].chunk == span.chunk and len(runs[-1]) < MOST_SPANS:
            runs[-1].append(span)
        else:
            runs.append([span])
    return runs
