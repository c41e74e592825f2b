"""Kills conversions and resumes them; run as a program, it prints what came of each.

python -m tests.kill_converter SOURCE FOLDER

The parent imports everything once and never converts: every try is a forked child.
"""

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from m2jax import layout
from m2jax.convert import convert
from m2jax.store import files
from m2jax.store.dense import _quiet_orbax
from tests.small_checkpoints import SMALL_CHUNK_TARGET_BYTES, digests, tree

MOMENTS = ("before", "half", "after")
WRITES = (1, 2, 5, 9, 14, 21, 30, -1)
RANDOM_KILLS = 20
SIGNALLED_AFTER_LINES = (1, 8, 28)


def fork(action: Callable[[], object]) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 70
    try:
        action()
        status = 0
    except KeyboardInterrupt:
        status = 130
    finally:
        os._exit(status)


def wait(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def convert_and_die(source: Path, target: Path, moment: str, write: int) -> None:
    """Converts until the n-th file or folder is put in its place."""
    whole, count = files.put, 0

    def put(path: Path, fill: Callable[[Path], None], *, scratch: Path) -> None:
        nonlocal count
        count += 1
        if count != write and not (write == -1 and path.name == "manifest.json"):
            whole(path, fill, scratch=scratch)
            return
        if moment == "half":
            scratch.write_bytes(b"half a file")
        if moment == "after":
            whole(path, fill, scratch=scratch)
        os._exit(9)

    files.put = put
    convert(source, target)


def journal_lines(target: Path) -> list[dict]:
    """Whole lines of the journal, the header left out."""
    try:
        text = (target / ".m2jax-convert" / "journal.jsonl").read_text()
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in text.splitlines()[1:]]


def finished(target: Path) -> dict[str, tuple[int, int]]:
    """Size and time of the files that the journal says are finished."""
    names = {name for line in journal_lines(target) for name in line["files"]}
    return {name: stamp for name, stamp in tree(target).items() if name in names}


def resume(source: Path, target: Path, wanted: dict[str, str]) -> dict:
    """Goes on after a kill, and compares with an uninterrupted conversion."""
    before = finished(target)
    status = wait(fork(lambda: convert(source, target)))
    after = tree(target)
    return {
        "finished": len(before),
        "resumed": status,
        "identical": digests(target) == wanted,
        "rewritten": sorted(name for name in before if before[name] != after.get(name)),
        "leftover": sorted(name for name in after if name.startswith(".")),
    }


def kill_at_writes(source: Path, folder: Path, wanted: dict[str, str]) -> list[dict]:
    results = []
    for index, write in enumerate(WRITES):
        for moment in MOMENTS[index % 3 :][:1] if write != -1 else MOMENTS:
            target = folder / f"{moment}{write}"
            arguments = (source, target, moment, write)
            died = wait(fork(lambda a=arguments: convert_and_die(*a)))
            result = {"case": f"{moment} write {write}", "died": died}
            results.append({**result, **resume(source, target, wanted)})
    return results


def kill_at_random(source: Path, folder: Path, wanted: dict[str, str]) -> list[dict]:
    """SIGKILLs one conversion again and again; a finished one makes room for a new."""
    seeded = random.Random(0)
    results, kills = [], 0
    while kills < RANDOM_KILLS:
        target, before = folder / f"random{len(results)}", kills
        while kills < RANDOM_KILLS and not (target / "manifest.json").exists():
            pid = fork(lambda t=target: convert(source, t))
            time.sleep(seeded.uniform(0, 0.5))
            os.kill(pid, signal.SIGKILL)
            wait(pid)
            kills += 1
        result = {"case": f"SIGKILL x {kills - before}", "died": -9}
        if not (target / "manifest.json").exists():
            result.update(resume(source, target, wanted))
        else:
            wait(fork(lambda t=target: convert(source, t)))
            left = [n for n in tree(target) if n.startswith(".")]
            result |= {"finished": 0, "resumed": 0, "rewritten": [], "leftover": left}
            result["identical"] = digests(target) == wanted
        results.append(result)
    return results


def interrupt(source: Path, folder: Path, wanted: dict[str, str]) -> list[dict]:
    """SIGINT while the embedding, a layer and the last bank are being written."""
    results = []
    for lines in SIGNALLED_AFTER_LINES:
        target = folder / f"interrupted{lines}"
        pid = fork(lambda t=target: convert(source, t))
        while len(journal_lines(target)) < lines:
            time.sleep(0.001)
        start = time.monotonic()
        os.kill(pid, signal.SIGINT)
        died = wait(pid)
        result = {"case": f"SIGINT after {lines}", "died": died}
        result["seconds"] = time.monotonic() - start
        results.append({**result, **resume(source, target, wanted)})
    return results


def main() -> None:
    source, folder = Path(sys.argv[1]), Path(sys.argv[2])
    layout.CHUNK_TARGET_BYTES = SMALL_CHUNK_TARGET_BYTES
    with _quiet_orbax():
        pass  # Imports Orbax once, for all children.
    assert wait(fork(lambda: convert(source, folder / "whole"))) == 0
    wanted = digests(folder / "whole")
    results = [
        *kill_at_writes(source, folder, wanted),
        *kill_at_random(source, folder, wanted),
        *interrupt(source, folder, wanted),
    ]
    print(json.dumps(results))


if __name__ == "__main__":
    main()
