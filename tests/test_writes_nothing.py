"""Nothing is written while tokens are made, however small the budgets."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from m2jax.store import open_store
from tests.conftest import CACHE
from tests.drafting import budgets

IO = Path("/proc/self/io")
# What one process of these tests has compiled, none compiles again.
COMPILED = {
    "JAX_COMPILATION_CACHE_DIR": str(CACHE / "m2jax" / "xla"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}
MIX, TOKENS = "25/25/50", 8
# A process of its own: what the tests' own writes to one another is no run's. The first
# texts compile.
CHILD = """
import json, sys
from pathlib import Path
import m2jax

store, options = sys.argv[1], json.loads(sys.argv[2])

def written():
    lines = Path("/proc/self/io").read_text().splitlines()
    facts = dict(line.split(": ") for line in lines)
    return {name: int(facts[name]) for name in ("wchar", "write_bytes")}

with m2jax.load(store, **options) as engine:
    def text():
        prompt, count = [1, 17, 5, 80], int(sys.argv[3])
        return engine.generate(prompt, max_new_tokens=count, ignore_eos=True)
    text(), text()
    before = written()
    decode = text().stats.decode
    after = written()
print(json.dumps({"before": before, "after": after, "read": decode.ssd_read_bytes}))
"""


def files_of(folder: Path) -> dict[Path, tuple[int, int, int]]:
    """Of all that lies in it: inode, size, time of the last change."""
    return {
        path: (found.st_ino, found.st_size, found.st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        for found in [path.stat()]
    }


@pytest.mark.skipif(not IO.exists(), reason="no /proc/self/io here")
@pytest.mark.parametrize("draft", ["none", "base"])
def test_tokens_from_the_ssd_are_made_without_a_write(draft, tiny_store, tmp_path):
    options = {"mix": MIX, "context": 128, "draft": draft, **budgets(tiny_store, MIX)}
    before = files_of(tiny_store)
    done = subprocess.run(
        [sys.executable, "-c", CHILD, tiny_store, json.dumps(options), str(TOKENS)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, **COMPILED, "HOME": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    # Each sweep reads a layer anew: DRAM holds fewer than there are.
    assert found["read"] > sum(map(open_store(tiny_store).layout.plane_bytes, ["r4"]))
    assert found["after"] == found["before"]
    assert files_of(tiny_store) == before
    assert not list(tmp_path.iterdir())
