"""Compares every byte of a store with its manifest."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from m2jax.errors import StoreError
from m2jax.store.reader import Store, read_store

THREADS = 2

# Bytes done, bytes in all, what is at work.
Progress = Callable[[int, int, str], None]


def verify_store(path: str | Path, progress: Progress | None = None) -> Store:
    """Reads every file of a store.

    Args:
        progress: called after every file, by one thread at a time.

    Raises:
        ValueError: the path is missing, or nothing that m2jax wrote.
        StoreError: names the first bad file and says how many there are.
    """
    store = read_store(path)
    store.sizes()
    total = sum(entry.bytes for entry in store.files.values())
    lock = threading.Lock()
    done = 0

    def check(name: str) -> str | None:
        nonlocal done
        found = store.problem(name)
        with lock:
            done += store.files[name].bytes
            if progress is not None:
                progress(done, total, name)
        return found

    pool = ThreadPoolExecutor(THREADS)
    try:
        found = list(pool.map(check, sorted(store.files)))
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    bad = [problem for problem in found if problem is not None]
    if bad:
        more = f"; {len(bad)} bad files in all" if len(bad) > 1 else ""
        raise StoreError(f"{bad[0]}{more}; convert again", path=store.path)
    return store
