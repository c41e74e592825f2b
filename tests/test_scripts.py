"""The measuring scripts run at toy size, so that they cannot rot."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import pytest

SCRIPTS = Path(__file__).parent.parent / "scripts"


@pytest.fixture(autouse=True)
def one_cache(monkeypatch):
    """What one script compiles, another of the run does not; nor itself, for a second
    engine."""
    monkeypatch.setenv(
        "JAX_COMPILATION_CACHE_DIR", jax.config.jax_compilation_cache_dir
    )
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")


@pytest.mark.parametrize(
    ("script", "says"),
    [
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


def test_the_report_on_drafts_is_made_at_toy_size(tmp_path):
    page = tmp_path / "speculation.md"
    command = [sys.executable, SCRIPTS / "speculation.py", "--toy", "--out", page]
    subprocess.run(command, check=True, capture_output=True)
    text, found = page.read_text(), tmp_path / "bench" / "speculation.json"
    for part in ("Gain", "Acceptance", "Rounding", "What a window of tokens wants"):
        assert f"## {part}" in text
    assert "nan" not in text
    gains = json.loads(found.read_text())["gains"]
    assert all(row["same_ids"] for gain in gains for row in gain["prompts"])
    again = tmp_path / "again.md"
    subprocess.run([*command[:2], "--from-json", found, "--out", again], check=True)
    assert again.read_text() == text


def test_the_report_on_caches_is_made_at_toy_size(tmp_path):
    page = tmp_path / "simulation.md"
    command = [sys.executable, SCRIPTS / "simulate_dram.py", "--toy", "--out", page]
    subprocess.run(command, check=True, capture_output=True)
    text, found = page.read_text(), tmp_path / "bench" / "simulation.json"
    for part in ("Policies of the HBM", "DRAM by layer", "Choice among equals"):
        assert f"## {part}" in text
    assert "nan" not in text
    model = json.loads(found.read_text())["models"]["SwiGLU"]
    layers, neurons, record_bytes = 8, model["neurons"], 1.5 * 256
    tokens = model["policies"][0]["tokens"]
    for row in model["dram"]:
        moved, budget = row["ssd_bytes_per_token"], row["budget"]
        planes = 1 if row["mix"] == "0/100/0" else 1 + 4
        everything = layers * neurons * planes * record_bytes
        # What is not pinned is read by every token, what is pinned once.
        whole = everything * (1 - budget + budget / tokens)
        assert moved["whole_layers"] == pytest.approx(whole)
        assert moved["belady"] == min(moved.values())
        # Chunks are read whole layers at most.
        assert moved["pinned"] <= moved["whole_layers"]
        if row["mix"] == "0/100/0":
            assert moved["pinned"] == moved["whole_layers"]
            assert moved["lru"] == everything
    for row in model["choice"]:
        assert (row["leeway"] == 0) == (row["swapped_share"] == 0)
        assert row["swapped_share"] <= row["leeway"]
    again = tmp_path / "again.md"
    subprocess.run([*command[:2], "--from-json", found, "--out", again], check=True)
    assert again.read_text() == text


def test_the_report_on_speed_is_made_at_toy_size(tmp_path):
    """Of m2jax alone: the peers are no part of this environment."""
    page = tmp_path / "performance.md"
    script = SCRIPTS / "bench_peers.py"
    command = [sys.executable, script, tmp_path / "work", "--toy", "--out", page]
    subprocess.run(command, check=True, capture_output=True)
    text, found = page.read_text(), tmp_path / "bench" / "performance.json"
    assert "## Resident" in text
    assert "| 0/100/0 " in text
    assert "nan" not in text
    for row in json.loads(found.read_text())["resident"]:
        results = row["m2jax"]["results"]
        assert [result["test"] for result in results] == ["pp32", "tg8"]


def test_the_report_on_an_accelerator_is_made_at_toy_size(tmp_path):
    """The first setting and the first product of it: a whole run takes minutes."""
    page = tmp_path / "gpu.md"
    command = [sys.executable, SCRIPTS / "bench_gpu.py", tmp_path / "work", "--toy"]
    command += ["--seconds", "1", "--out", page]
    subprocess.run(command, check=True, capture_output=True)
    text = page.read_text()
    found = json.loads((tmp_path / "bench" / "gpu.json").read_text())
    [row], [product] = found["benches"], found["kernels"]
    results = row["m2jax"]["results"]
    assert [result["test"] for result in results] == ["pp16", "tg8"]
    assert product["us"] > 0
    for part in ("A model", "What the machine moves", "Kernels"):
        assert f"## {part}" in text
    assert "| 0/25/75, dense 4, --hbm 100KiB --draft none " in text
    assert "The time was limited" in text


def test_kernels_are_timed_at_toy_size():
    command = [sys.executable, SCRIPTS / "bench_kernels.py", "--hidden", "128"]
    command += ["--neurons", "64", "--tokens", "1,20", "--repeats", "1"]
    done = subprocess.run(command, check=True, capture_output=True)
    rows = json.loads(done.stdout)["milliseconds"]
    assert [row["tokens"] for row in rows] == [1, 20]
    assert all(row[f"{bits} bits"] > 0 for row in rows for bits in (4, 8, 16))
    assert all(rows[1][mix] > 0 for mix in ("0/25/75", "25/25/50"))


def test_a_checkpoint_becomes_the_gguf_of_the_same_weights(tmp_path):
    import gguf
    import numpy as np
    from safetensors.numpy import load_file

    source, out = tmp_path / "hf", tmp_path / "model.gguf"
    shape = ["--layers", "1", "--hidden", "64", "--ffn", "96", "--vocab", "40"]
    shape += ["--heads", "4", "--kv-heads", "2", "--dtype", "float16"]
    python = sys.executable
    make = [python, SCRIPTS / "make_checkpoint.py", source, *shape]
    subprocess.run(make, check=True, capture_output=True)
    write = [python, SCRIPTS / "make_gguf.py", source, out, "--type", "F16"]
    subprocess.run(write, check=True, capture_output=True)
    weights = load_file(next(source.glob("*.safetensors")))
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(out).tensors}
    assert len(found) == len(weights)
    up = weights["model.layers.0.mlp.up_proj.weight"]
    assert np.array_equal(found["blk.0.ffn_up.weight"].data, up)
    # Rotary pairs stand side by side: row 1 of a head is the first of its second half.
    query = weights["model.layers.0.self_attn.q_proj.weight"]
    half = 64 // 4 // 2
    assert np.array_equal(found["blk.0.attn_q.weight"].data[1], query[half])
