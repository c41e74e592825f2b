"""Which bytes of a plane's chunk files hold some of its records. Integers only."""

from itertools import pairwise
from typing import NamedTuple

import numpy as np

# A longer run of records is more than one read: it needs no larger buffer.
MOST_READ_BYTES = 256 << 10


class Span(NamedTuple):
    """Bytes [start, end) of a chunk's file, which hold records [first, last) of those
    that are wanted."""

    chunk: int
    start: int
    end: int
    first: int
    last: int


def spans(
    records: np.ndarray, *, record_bytes: int, chunk_neurons: int, block_bytes: int
) -> list[Span]:
    """What to read for ascending record ids: whole blocks, those that touch as one.

    Args:
        block_bytes: reads begin and end on a multiple of it.
    """
    if not records.size:
        return []
    chunk, place = np.divmod(records, chunk_neurons)
    begin = place * record_bytes
    end = -(-(begin + record_bytes) // block_bytes) * block_bytes
    start = begin // block_bytes * block_bytes
    apart = (chunk[1:] != chunk[:-1]) | (start[1:] > end[:-1])
    edges = [0, *(apart.nonzero()[0] + 1).tolist(), len(records)]
    most = max(1, MOST_READ_BYTES // record_bytes)
    found = []
    for first, last in pairwise(edges):
        for low in range(first, last, most):
            high = min(low + most, last)
            found.append(
                Span(int(chunk[low]), int(start[low]), int(end[high - 1]), low, high)
            )
    return found
