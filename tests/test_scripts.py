"""The measuring scripts run at toy size, so that they cannot rot."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parent.parent / "scripts"


@pytest.mark.parametrize(
    ("script", "says"),
    [
        ("bench_host.py", "median_us"),
        ("profile_step.py", "one program"),
        ("bench_readme.py", "DRAM to HBM a token"),
    ],
)
def test_a_script_runs_at_toy_size(script, says):
    done = subprocess.run(
        [sys.executable, SCRIPTS / script, "--toy"],
        check=True,
        capture_output=True,
        text=True,
    )
    assert says in done.stdout
