"""Drafts on the command line: generate, bench and plan say what they gave."""

import json
from pathlib import Path

import pytest

import m2jax
from m2jax.predict import Rates, expect, expected_tokens
from tests.command_line import Commands

PROMPT = ("--token-ids", "1,17,5,80")
TIGHT = ("--mix", "100/0/0", "--context", "64")


@pytest.fixture(scope="module")
def hbm(tiny_store: Path) -> str:
    """A byte less than the mix needs: with plane q4 whole, w16 passes through."""
    with m2jax.load(tiny_store, mix="100/0/0", context=64) as engine:
        assert engine.draft == "none"
        return f"{engine.plan.footprint.hbm - 1}B"


def test_generate_gives_the_same_tokens_and_says_what_was_right(
    m2jax_command: Commands, tiny_store: Path, hbm: str
):
    command = ("generate", tiny_store, *PROMPT, *TIGHT, "-n", "20", "--ignore-eos")
    tight = (*command, "--hbm", hbm)
    plain = m2jax_command(*tight, "--draft", "none", "--json").facts
    found = m2jax_command(*tight, "--draft", "base", "--draft-tokens", "4", "--json")
    drafts = found.facts["drafts"]
    assert found.facts["token_ids"] == plain["token_ids"]
    assert plain["drafts"]["sweeps"] == 0
    assert drafts["sweeps"] > 0
    # A sweep gives the tokens accepted and one more; one may be decoded alone.
    assert 19 - 1 <= drafts["accepted"] + drafts["sweeps"] <= 19
    assert drafts["accepted_share"] == drafts["accepted"] / drafts["drafted"]
    shown = m2jax_command(*tight, "--draft", "base", "--draft-tokens", "4").err
    assert f"{drafts['sweeps']} sweeps" in shown


def test_bench_measures_with_the_draft_that_is_asked_for(
    m2jax_command: Commands, tiny_store: Path
):
    command = ("bench", tiny_store, *TIGHT, "-p", "0", "-n", "12", "-r", "1")
    facts = m2jax_command(*command, "--draft", "base", "--json").facts
    (result,) = facts["results"]
    assert facts["settings"]["draft"] == "base"
    assert result["drafts"]["accepted"] <= result["drafts"]["drafted"]
    table = m2jax_command(*command, "--draft", "ngram").out
    assert "| ngram |" in table


def test_an_ssd_may_be_slowed(m2jax_command: Commands, tiny_store: Path):
    """What is read a token takes its time at least, and the tokens stay the same."""
    with m2jax.load(tiny_store, mix="100/0/0", context=64) as engine:
        need = engine.plan.footprint
    # All layers pass, and DRAM holds two of the three.
    hbm, dram = need.hbm - need.records, need.records * 2 // 3
    budgets = ("--hbm", f"{hbm}B", "--dram", f"{dram}B")
    command = ("generate", tiny_store, *PROMPT, *TIGHT, "-n", "4", *budgets)
    command = (*command, "--draft", "none", "--ignore-eos", "--json")
    free = m2jax_command(*command).facts
    slow = m2jax_command(*command, "--emulate-ssd", "1MB").facts
    assert slow["token_ids"] == free["token_ids"]
    read = slow["bytes_per_token"]["ssd_to_dram"]
    assert read > 0
    # Reads run ahead: the first of three gaps may be shorter.
    assert slow["timings"]["tpot_s"] >= 0.5 * read / 1e6


def test_a_plan_says_what_drafts_would_give(
    m2jax_command: Commands, tiny_store: Path, hbm: str
):
    command = ("plan", tiny_store, *TIGHT, "--hbm", hbm, "--json")
    facts = m2jax_command(*command, "--rates", "1GB,10GB,100GB").facts["draft"]
    assert facts["kind"] == "base"
    for found in facts["expected"]:
        tokens = expected_tokens(found["acceptance"], found["drafted"])
        assert found["tokens_per_sweep"] == pytest.approx(tokens)
        moved = facts["sweep_bytes"]["dram_to_hbm"] / tokens
        assert found["link_bytes_per_token"] == pytest.approx(moved)
        assert found["tokens_per_s"] > 0
    rates = [found["tokens_per_s"] for found in facts["expected"]]
    assert rates == sorted(rates)
    plain = m2jax_command(*command, "--draft", "none").facts["draft"]
    assert plain == {"kind": "none", "plain_tokens_per_s": None}
    assert "right" in m2jax_command(*command[:-1]).out


def test_a_prediction_is_bytes_over_the_slowest_link():
    from m2jax.predict import Moved, Passes

    rates = Rates(ssd=1e9, link=10e9, hbm=100e9)
    sweep, draft = Moved(2_000_000_000, 4_000_000_000, 8), Moved(0, 0, 10**9)
    passes = Passes(plain=sweep, sweep=sweep, draft=draft)
    assert sweep.seconds(rates) == 2
    found = expect(passes, 1.0, rates=rates, sizes=(3, 7))
    assert found.drafted == 7
    assert found.tokens_per_s == pytest.approx(8 / (2 + 7 * 0.01))
    assert found.ssd_bytes_per_token == 2e9 / 8
    # Where a draft is always wrong, a short one wastes least.
    assert expect(passes, 0.0, rates=rates, sizes=(3, 7)).drafted == 3


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("generate", "--draft-tokens", "70"), "--draft-tokens 70: want 1 to 63"),
        (("generate", "--draft", "no/such/store"), "no/such/store"),
        (("generate", "--draft", "base", "--mix", "0/0/100"), "--draft base"),
        (("generate", "--emulate-ssd", "7"), "--emulate-ssd"),
        (("plan", "--draft", "magic"), "--draft magic"),
        (("plan", "--rates", "1GB"), "--rates 1GB: want bytes a second"),
        (("plan", "--rates", "1GB,2GB,x"), "--rates 'x'"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(
    options, told, m2jax_command: Commands, tiny_store: Path
):
    name, *rest = options
    prompt = PROMPT if name == "generate" else ()
    done = m2jax_command(name, tiny_store, *prompt, *rest)
    assert done.code in (2, 4)
    assert told in done.error
    assert json.loads(m2jax_command(name, tiny_store, *prompt, *rest, "--json").out)[
        "error"
    ]["message"]
