"""`m2jax calibrate`, `search-mix`, and what of them other commands show."""

import json
import shutil
from pathlib import Path

import pytest

import m2jax
from m2jax.bundled import SOURCE
from m2jax.store import open_store
from m2jax.store.calibration import calibration_index
from tests.command_line import Commands
from tests.small_checkpoints import make_checkpoint, make_config

TEXT = "".join(f"The dog number {n} saw a red cup.\n" for n in range(80))
SMALL = ("--window", "32", "--tokens", "96")


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """The bundled model's tokenizer and random weights."""
    config = make_config(hidden=32, ffn=64, layers=2, vocab=8192, tied=True)
    make_checkpoint(tmp_path / "source", config)
    for file in SOURCE.glob("*token*.json"):
        shutil.copy(file, tmp_path / "source")
    return m2jax.convert(tmp_path / "source", tmp_path / "store")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def test_calibrate_says_what_it_found_and_info_names_what_is_kept(
    m2jax_command: Commands, store: Path, text: Path
):
    command = ("calibrate", store, "--text", text, *SMALL, "--epochs", "1")
    done = m2jax_command(*command)
    assert done.code == 0
    assert "in the median layer" in done.out
    assert "Scorer base finds of the true top neurons" in done.out
    assert "lookahead 1) finds" in done.out
    facts = m2jax_command("info", store, "--json").facts
    assert {"report", "trace", "predictors-0", "predictors-1"} <= set(
        facts["calibration"]
    )
    assert m2jax_command("verify", store).code == 0
    again = m2jax_command(*command, "--json")
    assert again.facts["predictors"].keys() == {"0", "1"}


def test_a_searched_mix_is_shown_and_used(
    m2jax_command: Commands, store: Path, text: Path
):
    found = m2jax_command(
        "search-mix", store, "--text", text, *SMALL, "--bits", "6", "--json"
    )
    assert found.code == 0
    mix = found.facts["mix"]
    assert found.facts["cost"] <= 6 + 1e-9
    plan = m2jax_command("plan", store, "--json").facts
    assert plan["mix"] == mix
    scored = m2jax_command("perplexity", store, "--text", text, "--json").facts
    assert scored["mix"] == mix
    assert scored["divergence"]["kl_mean"] > 0
    other = m2jax_command("plan", store, "--mix", "0/0/100", "--json").facts
    assert other["mix"] == "0/0/100"


def test_a_mix_for_another_scorer_says_how_to_use_it(
    m2jax_command: Commands, store: Path, text: Path
):
    command = ("search-mix", store, "--text", text, *SMALL, "--bits", "6")
    assert "use it with" not in m2jax_command(*command).out
    shown = m2jax_command(*command, "--scorer", "gate").out
    assert "gate: use it with --scorer gate" in shown


def test_perplexity_shows_what_16_bits_would_say(
    m2jax_command: Commands, store: Path, text: Path
):
    command = ("perplexity", store, "--text", text, "--context", "32")
    shown = m2jax_command(*command, "--mix", "0/0/100").out
    for row in ("KL to 16 bits", "same top token", "16-bit NLL", "worst tokens"):
        assert row in shown
    plain = m2jax_command(*command, "--mix", "0/0/100", "--no-kl", "--json")
    assert plain.facts["divergence"] is None


def test_perplexity_scores_questions(
    m2jax_command: Commands, store: Path, tmp_path: Path
):
    path = tmp_path / "questions.jsonl"
    question = {"query": "What?", "choices": ["a dog", "a cat"], "gold": 0}
    path.write_text("\n".join([json.dumps(question)] * 3))
    command = ("perplexity", store, "--choices", path)
    found = m2jax_command(*command, "--limit", "2", "--json").facts
    assert found["questions"] == 2
    assert found["chance"] == 0.5
    assert "right, by bytes" in m2jax_command(*command).out
    refused = m2jax_command(*command, "--kl")
    assert refused.code == 2
    assert "--kl compares tokens of a --text" in refused.error


def test_a_store_of_fewer_planes_is_scored_without_16_bits(
    m2jax_command: Commands, store: Path, text: Path, tmp_path: Path
):
    small = tmp_path / "small"
    done = m2jax_command(
        "convert", tmp_path / "source", small, "--planes", "q4,r4", "--json"
    )
    assert done.code == 0
    command = ("perplexity", small, "--text", text, "--context", "32")
    assert m2jax_command(*command, "--json").facts["divergence"] is None
    refused = m2jax_command(*command, "--kl")
    assert refused.code == 2
    assert "has no plane w16, only q4, r4" in refused.error
    for name in ("calibrate", "search-mix"):
        options = ("--bits", "5") if name == "search-mix" else ()
        refused = m2jax_command(name, small, "--text", text, *options)
        assert refused.code == 2
        assert "has no plane w16" in refused.error


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["calibrate", "--window", "4000"], "--window"),
        (["calibrate", "--lookahead", "3"], "--lookahead 3"),
        (["calibrate", "--lookahead", "x"], "entry 0"),
        (["calibrate", "--epochs", "0"], "epochs 0"),
        (["calibrate", "--seed", "-1"], "seed -1: want 0 or more"),
        (["calibrate", "--rank", "33"], "rank 33: want 1 to 32"),
        (["calibrate", "--tokens", "9"], "--tokens 9"),
        (["search-mix"], "give a budget"),
        (["search-mix", "--bits", "2"], "smallest possible is 4"),
        (["search-mix", "--bits", "5", "--objective", "x"], "objective 'x'"),
        (["search-mix", "--bytes-per-token", "7"], "--bytes-per-token"),
        (["perplexity", "--choices", "x"], "one of them"),
    ],
)
def test_wrong_options_are_refused_in_one_line(
    options: list[str], told: str, m2jax_command: Commands, store: Path, text: Path
):
    command, *rest = options
    done = m2jax_command(command, store, "--text", text, *rest)
    assert done.code == 2
    assert told in done.error
    assert calibration_index(open_store(store)) == {}


@pytest.mark.parametrize(
    ("data", "told"),
    [(b"short", "want at least"), (b"abc\xe9def" * 99, "not UTF-8 at byte 3")],
)
def test_a_text_that_does_not_serve_is_refused(
    data: bytes, told: str, m2jax_command: Commands, store: Path, text: Path
):
    text.write_bytes(data)
    for command in (["calibrate"], ["search-mix", "--bits", "5"]):
        done = m2jax_command(*command, store, "--text", text)
        assert done.code == 2
        assert told in done.error
    assert calibration_index(open_store(store)) == {}


def test_damaged_and_foreign_calibration_is_named(
    m2jax_command: Commands, store: Path, text: Path, tmp_path: Path
):
    m2jax_command("search-mix", store, "--text", text, *SMALL, "--bits", "5")
    part = next((store / "calibration").glob("mix-*"))
    file = next(path for path in part.iterdir())
    data = file.read_bytes()
    file.write_bytes(data.replace(b"bits", b"bytz", 1))
    for command in (["plan", store], ["verify", store]):
        done = m2jax_command(*command)
        assert done.code == 4
        assert file.name in done.error
    file.write_bytes(data)
    config = make_config(hidden=32, ffn=64, layers=2, vocab=8192, tied=True)
    make_checkpoint(tmp_path / "other", config, seed=1)
    other = m2jax.convert(tmp_path / "other", tmp_path / "other-store")
    shutil.copytree(store / "calibration", other / "calibration")
    done = m2jax_command("plan", other)
    assert done.code == 4
    assert "another model" in done.error
