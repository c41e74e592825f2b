"""`m2jax perplexity`, `bench` and `doctor`: the library's figures, as text and JSON."""

import json
import re
import shutil
from pathlib import Path

import pytest

import m2jax
from m2jax import disk
from m2jax.bundled import SOURCE
from m2jax.perplexity import perplexity
from m2jax.timeline import Timeline
from tests.command_line import Commands
from tests.full_disk import full_disk
from tests.small_checkpoints import make_checkpoint, make_config

TEXT = "One day, a naïve girl saw a big red cup. " * 4
MIX = "100/0/0"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model's tokenizer and random weights."""
    folder = tmp_path_factory.mktemp("measure")
    config = make_config(hidden=32, ffn=64, layers=1, vocab=8192, tied=True)
    make_checkpoint(folder / "source", config)
    for file in SOURCE.glob("*token*.json"):
        shutil.copy(file, folder / "source")
    return m2jax.convert(folder / "source", folder / "store")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_bytes(TEXT.encode())
    return path


def test_perplexity_is_the_librarys(m2jax_command: Commands, store: Path, text: Path):
    with m2jax.load(store, mix=MIX, context=16, planes=("w16",)) as engine:
        wanted = perplexity(engine, TEXT, context=16, max_tokens=40)
    command = ("perplexity", store, "--text", text, "--mix", MIX)
    options = ("--context", "16", "--max-tokens", "40")
    done = m2jax_command(*command, *options, "--json")
    assert done.code == 0
    assert {name: done.facts[name] for name in wanted} == wanted
    shown = m2jax_command(*command, *options).out
    assert f"{wanted['nll_per_token']:.4f} nats a token" in shown
    assert f"{wanted['tokens']} tokens" in shown


@pytest.mark.parametrize(
    ("data", "options", "told"),
    [
        (b"", [], "0 tokens"),
        (b"abc\xe9def", [], "not UTF-8 at byte 3"),
        (TEXT.encode(), ["--context", "1"], "context 1"),
        (TEXT.encode(), ["--context", "5000"], "--context 5000"),
        (TEXT.encode(), ["--max-tokens", "1"], "max_tokens 1"),
    ],
)
def test_a_text_or_window_that_cannot_be_scored_is_refused(
    m2jax_command: Commands,
    store: Path,
    text: Path,
    data: bytes,
    options: list[str],
    told: str,
):
    text.write_bytes(data)
    done = m2jax_command("perplexity", store, "--text", text, *options)
    assert done.code == 2
    assert told in done.error


def test_bench_is_a_table_and_an_object_with_a_row_for_each_test(
    m2jax_command: Commands, store: Path
):
    command = ("bench", store, "-p", "8,16", "-n", "4", "-r", "2", "--mix", MIX)
    done = m2jax_command(*command, "--json")
    assert done.code == 0
    facts = done.facts
    assert facts["machine"]["backend"] == "cpu"
    assert [result["test"] for result in facts["results"]] == ["pp8", "pp16", "tg4"]
    for result in facts["results"]:
        assert result["repeats"] == 2
        assert result["tokens_per_s_mean"] > 0
        assert result["tokens_per_s_sd"] >= 0
        assert set(result["bytes_per_token"]) == {"ssd_to_dram", "dram_to_hbm"}
        assert result["held_bytes"]["hbm"] > 0
        assert result["milliseconds_per_token"]["compute"] > 0
    # Embedding, attention, norms, feed-forward; the head is the embedding.
    assert (
        facts["model"]["parameters"] == 8192 * 32 + 3 * 32 * 32 + 3 * 32 + 3 * 64 * 32
    )
    assert facts["results"][-1]["roofline"]["percent"] > 0
    assert facts["peak_rss_bytes"] > 2**26
    assert facts["kernels"]["ops"].keys() >= {"linear", "sparse_swiglu", "attention"}
    trace = store.with_name("trace.json")
    lines = m2jax_command(*command, "--profile", trace).out.splitlines()
    assert json.loads(trace.read_bytes())["traceEvents"]
    lines, details = lines[:5], lines[6:]
    assert [line.split(":")[0] for line in details[:3]] == ["pp8", "pp16", "tg4"]
    assert all("ms a token (memory), " in line for line in details[:3])
    assert all("% of it reached; " in line for line in details[:3])
    assert "host" in details[2]
    # Where reads went through the page cache, a line says why.
    kernels, peak = (line for line in details[3:] if not line.startswith("SSD: buff"))
    assert kernels.startswith("kernels: ")
    assert peak.startswith("peak memory ")
    assert len({len(line) for line in lines}) == 1
    assert [line.split(" | ")[-2].strip() for line in lines[2:]] == [
        "pp8",
        "pp16",
        "tg4",
    ]
    assert all(f" {MIX} " in line and "±" in line for line in lines[2:])


def test_bench_says_how_many_drafts_were_right_and_what_they_took(
    m2jax_command: Commands, store: Path
):
    options = ("-p", "0", "-n", "12", "-r", "1", "--draft", "base", "--mix", "0/50/50")
    done = m2jax_command("bench", store, *options, "--draft-tokens", "3")
    detail = next(line for line in done.out.splitlines() if line.startswith("tg12:"))
    assert re.search(
        r"% of it reached; drafts: \d+ of \d+ right, \d\.\d a sweep, "
        r"step [\d.]+ m?s, sweep [\d.]+ m?s; ",
        detail,
    )


def test_a_profile_that_cannot_be_written_costs_no_figures(
    m2jax_command: Commands,
    store: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    write = Timeline.write

    def fail(*args) -> None:
        with full_disk(after_bytes=16):
            write(*args)

    monkeypatch.setattr(Timeline, "write", fail)
    trace = tmp_path / "trace.json"
    command = ("bench", store, "-p", "8", "-n", "0", "-r", "1", "--profile", trace)
    done = m2jax_command(*command)
    assert done.code == 5
    assert done.error == f"{trace}: File too large"
    assert "| pp8" in done.out
    facts = m2jax_command(*command, "--json").facts
    assert facts["error"]["path"] == str(trace)
    assert [result["test"] for result in facts["results"]] == ["pp8"]


def test_without_kl_nothing_is_compared_though_the_mix_has_16_bits(
    m2jax_command: Commands, store: Path, text: Path
):
    command = ("perplexity", store, "--text", text, "--context", "16", "--json")
    command += ("--mix", "25/25/50")
    assert m2jax_command(*command, "--no-kl").facts["divergence"] is None
    assert m2jax_command(*command).facts["divergence"]["kl_mean"] > 0


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["-p", "16,x"], "--prompt-tokens: entry 1"),
        (["-p", "0", "-n", "0"], "nothing to measure"),
        (["-r", "0"], "repeats 0"),
        (["-p", "100", "--context", "64"], "pp100"),
        (["--profile", __file__], "is there already; --overwrite replaces it"),
        (["--profile", "no/such/trace.json"], "no/such: no such folder"),
    ],
)
def test_a_bench_that_cannot_run_is_refused(
    m2jax_command: Commands, store: Path, options: list[str], told: str
):
    done = m2jax_command("bench", store, *options)
    assert done.code == 2
    assert told in done.error


def test_doctor_shows_every_check_and_leaves_nothing_behind(
    m2jax_command: Commands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(disk, "FILE_BYTES", 1 << 20)
    done = m2jax_command("doctor", tmp_path, "--json")
    checks = done.facts["checks"]
    assert {"python", "libraries", "backend", "SSD read, buffered"} <= {
        check["name"] for check in checks
    }
    assert done.code == (0 if all(check["ok"] for check in checks) else 1)
    assert list(tmp_path.iterdir()) == []
    absent = m2jax_command("doctor", tmp_path / "nosuch")
    assert absent.code == 2
    assert "nosuch: no such folder" in absent.error
