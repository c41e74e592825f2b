"""Compiled programs that are kept: damage costs one compilation, not all later ones."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import jax, numpy as np
from m2jax.cli.compilation import keep_compiled
keep_compiled()
compiled = []
listen = jax.monitoring.register_event_listener
listen(lambda event, **_: compiled.append(event))
twice = jax.jit(lambda x: 2 * x)
assert float(twice(np.float32(3))) == 6
print(compiled.count('/jax/compilation_cache/cache_hits'))
"""


def hits(cache: Path) -> int:
    """Runs a small program with that cache: how much was found there."""
    environment = {
        **os.environ,
        "XDG_CACHE_HOME": str(cache),
        "JAX_COMPILATION_CACHE_DIR": "",
    }
    done = subprocess.run(
        [sys.executable, "-c", CODE], capture_output=True, text=True, env=environment
    )
    assert (done.returncode, done.stderr) == (0, "")
    return int(done.stdout)


@pytest.mark.parametrize("kept", [0.0, 0.5])
def test_an_entry_that_cannot_be_read_is_made_again(tmp_path: Path, kept: float):
    assert hits(tmp_path) == 0
    (entry,) = (tmp_path / "m2jax" / "xla").glob("jit__lambda*-cache")
    whole = entry.stat().st_size
    os.truncate(entry, int(kept * whole))
    other = entry.with_name("jit_other-0123-cache")
    other.write_bytes(b"other")
    assert hits(tmp_path) == 0
    assert hits(tmp_path) == 1
    assert entry.stat().st_size > 0.9 * whole
    assert other.read_bytes() == b"other"
