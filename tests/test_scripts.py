"""The measuring scripts run at toy size, so that they cannot rot."""

import json
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


def test_the_report_on_quality_is_made_at_toy_size(tmp_path):
    page = tmp_path / "quality.md"
    command = [sys.executable, SCRIPTS / "quality.py", "--toy", "--out", page]
    subprocess.run(command, check=True, capture_output=True)
    text, found = page.read_text(), tmp_path / "bench" / "quality.json"
    for part in "abcdef":
        assert f"## ({part})" in text
    assert "nan" not in text
    models = json.loads(found.read_text())["models"]
    assert models.keys() == {"SwiGLU", "ReLU"}
    exact, *_ = (r for r in models["ReLU"]["quality"] if r["mix"] == "100/0/0")
    assert exact["texts"]["python"]["kl_mean"] == 0
    assert page.with_suffix(".svg").stat().st_size > 10_000
    # The page can be written again from the figures alone.
    again = tmp_path / "again.md"
    subprocess.run([*command[:2], "--from-json", found, "--out", again], check=True)
    assert again.read_text() == text.replace("quality.svg", "again.svg")
