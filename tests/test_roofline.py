"""What bench takes for the least time of a prompt, and of a text with drafts."""

import pytest

from m2jax.bandwidths import Bandwidths
from m2jax.bench import run_bench
from m2jax.step_bytes import step_bytes
from tests.drafting import load

# Memory alone bounds: nothing moves.
MACHINE = Bandwidths(memory=1e9, link={"1048576": 5e8}, ssd=[])
# What a store without a mix of its own is loaded with, as another model here.
MIX = "0/25/75"


@pytest.mark.parametrize("kind", ["base", "ngram", "another model"])
def test_prompts_and_texts_with_drafts_have_rooflines(tiny_store, kind):
    """A pass takes a whole prompt, or what of a draft is right and one token more."""
    draft = kind if kind != "another model" else str(tiny_store)
    with load(tiny_store, mix=MIX, draft=draft, draft_tokens=3) as engine:
        report = run_bench(
            engine, prompt_tokens=(6,), new_tokens=(24,), repeats=1, machine=MACHINE
        )
        of_pass = [step_bytes(engine.runner, engine.specs, n) for n in (6, 28.5)]
        of_draft = engine.draft_bytes(28.5)
        config, records = engine.config, engine.runner.tiers.record_bytes
        neurons = config.num_layers * config.intermediate_size
        of_mix = sum(
            count * records[plane]
            for spec in engine.specs
            for plane, count in spec.wanted.items()
        )
    pp, tg = report["results"]
    assert pp["roofline"]["bound_s"] == pytest.approx(of_pass[0] / 6 / 1e9)
    drafts = tg["drafts"]
    assert drafts["drafted"] > 0 or kind == "ngram"
    passes, drafted = 24 - drafts["accepted"], drafts["drafted"]
    moved = passes * of_pass[1] + drafted * of_draft
    found = tg["roofline"]
    assert found["bytes_per_token"]["memory"] == pytest.approx(moved / 24)
    assert found["bound_s"] == pytest.approx(moved / 24 / 1e9)
    rate = tg["tokens_per_s_mean"]
    assert found["percent"] == pytest.approx(100 * rate * found["bound_s"])
    # All neurons at 4 bits, not the classes of the mix.
    base = of_pass[1] - of_mix + neurons * records["q4"]
    assert of_draft == pytest.approx({"base": base, "ngram": 0}.get(kind, of_pass[1]))
