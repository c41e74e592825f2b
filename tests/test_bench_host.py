"""scripts/bench_host.py: its visits are the engine's, and its page is made."""

import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "scripts"))

import bench_host


def run(monkeypatch, *options: object) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_host.py", *map(str, options)])
    bench_host.main()


def test_the_page_has_a_row_for_each_mix_and_policy(tmp_path, monkeypatch):
    page = tmp_path / "host.md"
    run(monkeypatch, "--toy", "--out", page)
    raw = tmp_path / "bench" / "host.json"
    found = json.loads(raw.read_text())["results"]
    assert len(found) == 2 * 2 * len(bench_host.WAYS)
    for row in found:
        assert 0 < row["min_us"] <= row["p10_us"] <= row["median_us"] <= row["p90_us"]
        assert row["plans_us"] > 0
        assert 0.8 <= row["hit_ratio"] < 1
        # Of one plane, or of two.
        planes = len(bench_host.MIXES[row["mix"]])
        missed = (1 - row["hit_ratio"]) * 64 * planes
        assert row["loads_per_visit"] == pytest.approx(missed, abs=0.1)
    text = page.read_text()
    assert [text.count(f"| {mix} ") for mix in bench_host.MIXES] == [2, 2]
    again = tmp_path / "again.md"
    run(monkeypatch, "--from-json", raw, "--out", again)
    assert again.read_text() == text


def test_only_copies_write_to_the_pools(monkeypatch):
    filled = []
    fill = bench_host.access.fill
    monkeypatch.setattr(
        bench_host.access, "fill", lambda *given: filled.append(1) or fill(*given)
    )
    monkeypatch.setattr(sys, "argv", ["bench_host.py", "--toy"])
    sizes = bench_host.parse_arguments()
    for way in bench_host.WAYS:
        filled.clear()
        bench_host.measure("0/25/75", "lru", way, sizes)
        assert bool(filled) == (way == "with copies")
