"""Runs a command in a memory cgroup (v1 or v2), its page cache cold. Needs root."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

V1 = Path("/sys/fs/cgroup/memory")
V2 = Path("/sys/fs/cgroup")
DROP = Path("/proc/sys/vm/drop_caches")
TIMEOUT_S = 600


def why_not() -> str | None:
    """Why no command can be caged here; None where one can."""
    if os.geteuid():
        return "a memory cgroup wants root"
    control = V2 / "cgroup.subtree_control"
    if not V1.is_dir() and not (
        control.exists() and "memory" in control.read_text().split()
    ):
        return f"{control}: no memory controller for new cgroups"
    for needed in (V1 if V1.is_dir() else V2, DROP):
        if not os.access(needed, os.W_OK):
            return f"{needed} cannot be written"
    return None


def caged(command: list[str], cap_bytes: int) -> dict[str, Any]:
    """Runs it.

    Returns:
        rc: exit code, 137 where the cap killed it, None where it took too long.
        found: the JSON object of its last line. said: its last words, if it failed.
        peak_bytes: of the cgroup, page cache included.
    """
    old = V1.is_dir()
    group = (V1 if old else V2) / f"m2jax-bench-{os.getpid()}"
    group.mkdir(exist_ok=True)
    limit = "memory.limit_in_bytes" if old else "memory.max"
    (group / limit).write_text(str(cap_bytes))
    subprocess.run(["sync"], check=True)
    DROP.write_text("3")
    procs = group / ("tasks" if old else "cgroup.procs")
    # glibc else keeps blocks that are free: accelerate is killed where it would run.
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"}
    try:
        done = subprocess.run(
            ["sh", "-c", f'echo $$ > {procs}; exec "$@"', "sh", *command],
            capture_output=True,
            text=True,
            check=False,
            timeout=TIMEOUT_S,
            env=env,
        )
        code, lines = done.returncode, done.stdout.splitlines()
        said = done.stderr.splitlines()[-1:] if code else []
    except subprocess.TimeoutExpired:
        code, lines, said = None, [], [f"took over {TIMEOUT_S} s"]
    peak = group / ("memory.max_usage_in_bytes" if old else "memory.peak")
    peak_bytes = int(peak.read_text()) if peak.exists() else None
    group.rmdir()
    found = json.loads(lines[-1]) if code == 0 and lines else None
    return {"rc": code, "found": found, "said": said, "peak_bytes": peak_bytes}
