"""`m2jax trace`: wanted sets of text that is written, or as it stands, in a file."""

from pathlib import Path

import numpy as np
import pytest

import m2jax
from m2jax.cache.trace import Trace
from m2jax.recording import record_generated, record_text
from m2jax.runner import Runner
from tests.command_line import Commands

PROMPTS = ("-p", "Once upon a time", "-p", "def main():")


@pytest.fixture
def recorded(m2jax_command: Commands, bundled_store: Path, tmp_path: Path) -> Path:
    out = tmp_path / "trace.npz"
    command = ("trace", bundled_store, *PROMPTS, "-n", "4", "--out", out)
    assert m2jax_command(*command).code == 0
    return out


def test_a_text_as_it_stands_wants_what_it_wanted_when_it_was_written(
    tiny_store: Path,
):
    with m2jax.load(tiny_store, mix="25/25/50") as engine:
        written = engine.generate([1], max_new_tokens=9, ignore_eos=True).token_ids
        generated = record_generated(engine, [[1], [5]], new_tokens=9)
        again = record_text(engine, [[1, *written[:-1]], [5, 3]])
    first = again.entries()[: 8 * 3 * 2]
    assert len(again) == 9 * 3 * 2
    for one, two in zip(generated.entries(), first):
        assert one[:3] == two[:3]
        assert np.array_equal(one.wanted, two.wanted)


def test_a_text_is_recorded_in_windows(
    m2jax_command: Commands, bundled_store: Path, tmp_path: Path
):
    out, text = tmp_path / "trace.npz", tmp_path / "text.txt"
    text.write_text("One day, a girl saw a big red cup. " * 8)
    options = ("--text", text, "-n", "40", "--window", "16", "--out", out)
    facts = m2jax_command("trace", bundled_store, *options, "--json").facts
    # Two windows; of each the first token is its prompt.
    assert facts["tokens"] == 2 * 15
    assert len(Trace.load(out)) == facts["wanted_sets"] == 2 * 15 * 8


def test_a_trace_is_replaced_only_when_asked_and_only_whole(
    m2jax_command: Commands,
    bundled_store: Path,
    recorded: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    before = recorded.read_bytes()
    command = ("trace", bundled_store, *PROMPTS, "-n", "3", "--out", recorded)
    done = m2jax_command(*command)
    assert done.code == 2
    assert "--overwrite replaces it" in done.error
    with monkeypatch.context() as patch:
        patch.setattr(Runner, "decode", lambda *_: 1 / 0)
        assert m2jax_command(*command, "--overwrite").code == 1
    assert recorded.read_bytes() == before
    assert [path.name for path in recorded.parent.iterdir()] == [recorded.name]
    assert m2jax_command(*command, "--overwrite").code == 0
    assert len(Trace.load(recorded)) == 2 * 2 * 8


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ((), "give --prompt TEXT (one or several) or --text FILE"),
        (("-p", "a", "--text", "b"), "give --prompt TEXT"),
        (("-p", "a", "-n", "1"), "--tokens 1: want 2 or more"),
        (("--text", "no/such"), "no/such: no such file"),
        (("-p", "a", "--mix", "0/100/0"), "wants whole planes only"),
        (("-p", "a", "--out", "."), "is a folder"),
        (("-p", "a", "--out", "/dev/null", "--overwrite"), "is no regular file"),
        (("--text", __file__, "--temperature", "nan"), "temperature nan"),
        (("-p", "a", "--out", "no/such/folder/t"), "no such folder"),
    ],
)
def test_what_cannot_be_recorded_is_refused_in_one_line(
    options: tuple[str, ...],
    told: str,
    bundled_store: Path,
    m2jax_command: Commands,
    tmp_path: Path,
):
    out = () if "--out" in options else ("--out", tmp_path / "t")
    done = m2jax_command("trace", bundled_store, *options, *out)
    assert done.code == 2
    assert told in done.error
    assert not (tmp_path / "t").exists()


def test_a_trace_may_have_the_longest_name(tmp_path: Path):
    path = tmp_path / ("t" * 255)
    Trace().save(path)
    assert len(Trace.load(path)) == 0
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
