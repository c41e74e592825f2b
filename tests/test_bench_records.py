"""scripts/bench_records.py: both ways in turn, and what they moved."""

import json
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "scripts"))

import bench_records


def test_the_page_holds_both_ways_beside_each_other(tmp_path, monkeypatch):
    page = tmp_path / "toy.md"
    monkeypatch.setattr(sys, "argv", ["bench.py", "--toy", "--out", str(page)])
    bench_records.main()
    raw = tmp_path / "bench" / "toy.json"
    found = json.loads(raw.read_text())
    for rows in found["rows"].values():
        layers, records = rows
        assert (layers["reads"], records["reads"]) == ("layers", "records")
        assert (layers["slots"], records["slots"] > 0) == (0, True)
        # Layers that are not pinned are read whole: 704 records of 384 bytes each.
        [run] = layers["runs"]
        assert run["ssd_bytes"] % (704 * 384) == 0 < run["ssd_bytes"]
        [run] = records["runs"]
        assert 0 < run["hits"] < 1
        # Of the 176 that a layer wants those that have no slot, in whole blocks.
        assert run["ssd_bytes"] >= 8 * 176 * 384 * (1 - run["hits"]) * 0.99
        assert run["waited_s"] < run["token_s"]
    again = tmp_path / "again.md"
    command = ["bench.py", "--from-json", str(raw), "--out", str(again)]
    monkeypatch.setattr(sys, "argv", command)
    bench_records.main()
    assert again.read_text() == page.read_text().replace("toy.json", "again.json")
