"""Compares every byte of a store with its manifest and its calibration's index."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from m2jax.errors import StoreError, TierFailed
from m2jax.store.calibration import calibration_index, file_problem, repair
from m2jax.store.calibration_index import calibration_files
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
    spoiled: list[str] = []
    index, results = {}, {}
    try:
        index = calibration_index(store)
        results = calibration_files(index)
    except TierFailed:
        raise
    except StoreError as error:
        spoiled = [str(error).removesuffix(f"; {repair()}")]
    files = {**store.files, **results}
    total = sum(entry.bytes for entry in files.values())
    lock = threading.Lock()
    done = 0

    def check(name: str) -> str | None:
        nonlocal done
        if name in results:
            found = file_problem(store, name, results[name])
        else:
            found = store.problem(name)
        with lock:
            done += files[name].bytes
            if progress is not None:
                progress(done, total, name)
        return found

    pool = ThreadPoolExecutor(THREADS)
    try:
        # The calibration comes last: it can be made again, the rest first.
        names = [*sorted(store.files), *sorted(results)]
        found = [*pool.map(check, names), *spoiled]
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    bad = [problem for problem in found if problem is not None]
    if bad:
        more = f"; {len(bad)} bad files in all" if len(bad) > 1 else ""
        advice = "convert again"
        if not any(found[: len(store.files)]):
            wrong = {n for n, problem in zip(names, found) if problem}
            advice = repair(
                part
                for part, entries in index.items()
                if wrong & calibration_files({part: entries}).keys()
            )
        raise StoreError(f"{bad[0]}{more}; {advice}", path=store.path)
    return store
