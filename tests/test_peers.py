"""What runs the peers, without them: stand-ins for their libraries, rows that are
given, and a cage around a trivial command."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "scripts"))

import bench_peers
import peer_cage
import peer_tables

SCRIPTS = Path(__file__).parents[1] / "scripts"
STAND_INS = Path(__file__).parent / "fixtures" / "peers"
MIB = 1 << 20


@pytest.fixture
def cage(tmp_path, monkeypatch):
    """Skips where there can be none. The machine's page cache stays as it is."""
    monkeypatch.setattr(peer_cage, "DROP", tmp_path / "drop_caches")
    peer_cage.DROP.touch()
    if reason := peer_cage.why_not():
        pytest.skip(reason)
    yield
    assert peer_cage.DROP.read_text() == "3"
    assert not list(peer_cage.V2.glob(f"**/m2jax-bench-{os.getpid()}"))


def of_python(text: str) -> list[str]:
    return [sys.executable, "-c", text]


@pytest.mark.usefixtures("cage")
def test_a_command_in_the_cage_gives_its_last_line_and_its_peak():
    text = "print('loading'); x = bytearray(20 << 20); print('{\"rate\": 2.5}')"
    done = peer_cage.caged(of_python(text), 256 * MIB)
    assert (done["rc"], done["found"], done["said"]) == (0, {"rate": 2.5}, [])
    assert done["peak_bytes"] is None or 20 * MIB < done["peak_bytes"] <= 256 * MIB


@pytest.mark.usefixtures("cage")
def test_a_command_over_the_cap_is_killed_and_said_to_be():
    done = peer_cage.caged(of_python("x = b'1' * (400 << 20); print('{}')"), 64 * MIB)
    assert done["rc"] in (137, -9)
    assert done["found"] is None


@pytest.mark.usefixtures("cage")
def test_a_command_that_fails_says_why():
    done = peer_cage.caged(of_python("raise SystemExit('no such model')"), 256 * MIB)
    assert (done["rc"], done["found"], done["said"]) == (1, None, ["no such model"])


def with_stand_ins(script: str, *options: object) -> dict:
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / script), *map(str, options)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(STAND_INS)},
    )
    return json.loads(done.stdout)


def test_llama_cpp_is_timed_after_its_warm_up():
    found = with_stand_ins("peer_llama.py", "m.gguf", "-p", 32, "-n", 4, "-r", 3)
    assert [len(found[f"{what}_tokens_per_s"]) for what in ("prompt", "new")] == [3, 3]
    assert found["read_bytes"] >= 0
    assert not with_stand_ins("peer_llama.py", "m.gguf", "-p", 0)["prompt_tokens_per_s"]


def test_accelerate_is_timed_by_what_more_tokens_take(tmp_path):
    found = with_stand_ins("peer_accelerate.py", tmp_path / "hf", "-n", 2)
    # The stand-in takes a quarter of a second a token, whatever the prompt takes.
    assert found == {"new_tokens_per_s": [4.0]}


def test_every_row_under_a_cap_is_run_kept_and_shown(tmp_path, monkeypatch):
    asked = []

    def caged(command: list[str], cap_bytes: int) -> dict:
        asked.append(command)
        assert cap_bytes == int(bench_peers.CAP_SHARE * 2_000_000_000)
        if "bench" in command:
            drafts = {"drafted": 10, "accepted": 9, "step_s": 0.1, "sweep_s": 1.0}
            found = {"results": [{"tokens_per_s_mean": 2.0, "drafts": drafts}]}
        else:
            prompt = "512" in command
            found = {
                "prompt_tokens_per_s": [8.0] if prompt else [],
                "new_tokens_per_s": [] if prompt else [0.5],
            }
        return {"rc": 0, "found": found, "said": [], "peak_bytes": None}

    monkeypatch.setattr(bench_peers, "caged", caged)
    with (tmp_path / "Q8_0.gguf").open("wb") as file:
        file.truncate(2_000_000_000)
    args = argparse.Namespace(llama="llama", accelerate="hf", cap_repeats=1)
    kept = []
    bench_peers.capped(tmp_path, args, lambda found: kept.append(json.dumps(found)))
    assert [len(json.loads(found)["rows"]) for found in kept] == list(range(1, 9))
    found = json.loads(kept[-1])
    own = [command for command in asked if "bench" in command]
    assert [command[command.index("--mix") + 1] for command in own] == [
        *("0/100/0", "0/25/75", "0/25/75", "0/0/100", "0/100/0")
    ]
    table = peer_tables.capped_table(found)
    lines = {line.split("|")[1].strip(): line for line in table.splitlines()}
    assert lines[peer_tables.LLAMA].split("|")[2].strip() == "0.500"
    beside = [cell.strip() for cell in lines[peer_tables.DRAFTING].split("|")[2:5]]
    assert beside == ["2.000", "4.0", "4.0"]
    prompt = lines["m2jax 0/100/0" + peer_tables.PROMPT].split("|")
    assert [cell.strip() for cell in prompt[2:5]] == ["2.000", "0.2", ""]
    assert "9 of 10 drafted tokens were right" in peer_tables.drafts_table(found)
    # One that was killed has no rate, and stands there all the same.
    killed = {"rows": [{**row, "found": None} for row in found["rows"]]}
    assert peer_tables.capped_table(killed).count("does not run at this cap") == 8
    assert peer_tables.drafts_table(killed) == ""


def test_bench_takes_the_options_that_it_is_given():
    from typer.main import get_command

    from m2jax.cli.app import app

    command = bench_peers.bench(Path("store"), "--mix", "0/25/75", "--dense", 4)
    command += ["--hbm", "3B", "--dram", "132MiB", "--draft", "base", "-r", "1"]
    group = get_command(app)
    sub = group.commands[command[3]]
    sub.make_context("bench", [*command[4:], "-p", "0", "-n", "24", "--context", "64"])
