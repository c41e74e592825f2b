"""The bundled weights against what transformers says in float32."""

import json
from pathlib import Path

import numpy as np
import pytest

import m2jax
from m2jax.engine import Engine

GOLDEN = json.loads((Path(__file__).parent / "golden_pystories8M.json").read_text())
PROMPTS = [pytest.param(p, id=p["prompt"][:12]) for p in GOLDEN["prompts"]]
WINDOWS = [pytest.param(w, id=str(w["offset"])) for w in GOLDEN["windows"]["windows"]]
# 1e-4 is promised, and the file's logits have four digits after the point.
LOGIT_BOUND = 1.5e-4
# The file's means have five digits after the point; the worst here is 1e-5.
NLL_BOUND = 5e-5


@pytest.fixture(scope="module")
def engine(bundled_store: Path) -> Engine:
    return m2jax.load(bundled_store, mix="100/0/0")


@pytest.mark.parametrize("known", PROMPTS)
def test_prompts_are_cut_into_the_same_tokens(known, engine):
    assert engine.encode(known["prompt"]) == known["prompt_ids"]


@pytest.mark.parametrize("known", PROMPTS)
def test_the_best_next_tokens_and_their_logits_are_those_of_transformers(known, engine):
    logits = engine.logits(known["prompt_ids"])[-1]
    best = np.argsort(-logits)[:5]
    assert best.tolist() == [token for token, _ in known["last_position_top5"]]
    wanted = np.array([logit for _, logit in known["last_position_top5"]])
    assert np.abs(logits[best] - wanted).max() <= LOGIT_BOUND


@pytest.mark.parametrize("known", PROMPTS)
def test_greedy_text_is_that_of_transformers(known, engine):
    # In runs of few tokens, as other tests have them compiled.
    stream = engine.stream(known["prompt"], max_new_tokens=40, ignore_eos=True)
    text = "".join(stream)
    assert stream.result().token_ids == known["greedy_ids"]
    assert text == known["greedy_text"]


@pytest.mark.parametrize("window", WINDOWS)
def test_windows_of_real_text_are_as_likely_as_to_transformers(window, engine):
    logprobs = engine.logprobs(window["ids"])
    assert logprobs.shape == (len(window["ids"]) - 1,)
    assert abs(-logprobs.mean(dtype=float) - window["mean_nll"]) <= NLL_BOUND
