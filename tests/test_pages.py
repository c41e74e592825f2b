"""The pages in docs/ are what their scripts make of the figures that are kept."""

import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "scripts"))

import bench_gpu
import bench_host
import bench_peers
import bench_records
import bench_ssd
import gpu_tables
import simulate_dram
import speculation

DOCS = Path(__file__).parents[1] / "docs"
PAGES = [
    (bench_peers, "performance", ["WORK"]),
    (bench_peers, "performance-avx2", ["WORK"]),
    (bench_peers, "performance-vnni", ["WORK"]),
    (bench_gpu, "gpu", ["WORK"]),
    (bench_ssd, "ssd", []),
    (bench_host, "host", []),
    (bench_records, "dram", []),
    (speculation, "speculation", []),
    (simulate_dram, "simulation", []),
]


@pytest.mark.parametrize(
    ("script", "name", "given"), PAGES, ids=[name for _, name, _ in PAGES]
)
def test_a_page_is_what_its_script_makes_of_the_figures(
    script, name, given, tmp_path, monkeypatch
):
    raw, page = DOCS / "bench" / f"{name}.json", tmp_path / f"{name}.md"
    if not raw.exists():
        assert not (DOCS / f"{name}.md").exists()
        pytest.skip("not measured yet")
    command = [*given, "--from-json", str(raw), "--out", str(page)]
    monkeypatch.setattr(sys, "argv", [script.__name__, *command])
    script.main()
    assert page.read_text() == (DOCS / f"{name}.md").read_text()
    assert list(tmp_path.iterdir()) == [page]


def test_the_curve_goes_through_what_was_measured(monkeypatch):
    found = json.loads((DOCS / "bench" / "gpu.json").read_text())
    [row] = [row for row in found["benches"] if gpu_tables._loads(row)]
    tg = row["m2jax"]["results"][1]
    # 32 layers of 2752 records of 6144 bytes: what a token loads if nothing hits.
    most = 32 * 2752 * 6144
    own = 1 - tg["bytes_per_token"]["dram_to_hbm"] / most
    assert f"Measured: {own:.0%} of" in gpu_tables._curve(row)
    monkeypatch.setattr(gpu_tables, "HIT_RATIOS", (own,))
    *_, rate, _ = gpu_tables._curve(row).split("|")
    assert rate.strip() == f"{tg['tokens_per_s_mean']:.0f}"
