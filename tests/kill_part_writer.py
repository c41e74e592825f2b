"""Kills writers of a calibration part at every step; prints what each one left behind.

python -m tests.kill_part_writer STORE FOLDER

A step is anything a writer does to the file system: the interpreter tells of each
before it is done. The parent imports everything once: every try is a forked child.
"""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from m2jax.store.calibration import (
    read_json_part,
    read_part,
    write_json_part,
    write_part,
)
from m2jax.store.files import list_files, write_synced
from m2jax.store.reader import read_store
from tests.kill_converter import fork, wait

STEPS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"}
OLD, NEW = {"mix": "old"}, {"mix": "new"}
MOST_STEPS = 200


def write_report(folder: Path) -> None:
    """A part of more than one file."""
    (folder / "deep").mkdir()
    write_synced(folder / "report.md", b"few neurons matter\n")
    write_synced(folder / "deep" / "numbers.bin", bytes(range(256)))


def dies_at(step: int, action: Callable[[], object]) -> None:
    """Ends this process before the given step; half of what was written is lost."""
    sync, count = os.fsync, 0

    def take_step(fd: int | None = None) -> None:
        nonlocal count
        count += 1
        if count == step:
            if fd is not None and not os.path.isdir(f"/proc/self/fd/{fd}"):
                size = os.fstat(fd).st_size // 2
                os.truncate(os.readlink(f"/proc/self/fd/{fd}"), size)
            os._exit(9)

    def fsync(fd: int) -> None:
        take_step(fd)
        sync(fd)

    os.fsync = fsync
    sys.addaudithook(lambda event, _: take_step() if event in STEPS else None)
    action()


def left_behind(path: Path) -> dict[str, Any]:
    """What a reader finds, and every file, after the next whole write."""
    store = read_store(path)
    report = read_part(store, "report")
    found = {
        "mix": read_json_part(store, "mix"),
        "report": None if report is None else sorted(list_files(report)),
    }
    write_json_part(store, "mix", NEW)
    names = [name.name for name in (path / "calibration").iterdir()]
    return {**found, "after": read_json_part(store, "mix"), "names": sorted(names)}


def kill_at_each(
    whole: Path, folder: Path, action: Callable[[Path], object]
) -> list[dict[str, Any]]:
    results, died = [], 9
    while died == 9 and len(results) < MOST_STEPS:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(whole, folder)
        step = len(results) + 1
        died = wait(fork(lambda at=step: dies_at(at, lambda: action(folder))))
        results.append({"died": died, **left_behind(folder)})
    return results


def main() -> None:
    # Slow, and a kill does not lose what only a power cut would.
    os.fsync = lambda fd: None
    folder = Path(sys.argv[2])
    bare, filled = folder / "bare", folder / "filled"
    for path in (bare, filled):
        path.mkdir()
        # All of a store that calibration looks at.
        shutil.copy(Path(sys.argv[1]) / "manifest.json", path)

    def write(facts: dict[str, str]) -> Callable[[Path], None]:
        return lambda path: write_json_part(read_store(path), "mix", facts)

    def report(path: Path) -> None:
        write_part(read_store(path), "report", write_report)

    report(filled)
    write(OLD)(filled)
    cases = {
        "first": (bare, write(NEW)),
        "replaced": (filled, write(NEW)),
        "the same again": (filled, write(OLD)),
        "several files": (bare, report),
    }
    results = {
        name: kill_at_each(whole, folder / "killed", action)
        for name, (whole, action) in cases.items()
    }
    print(json.dumps(results))


if __name__ == "__main__":
    main()
