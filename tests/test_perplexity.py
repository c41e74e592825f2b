"""Perplexity of the bundled model: known answers, windows, refusals."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest

import m2jax
from m2jax.bundled import SOURCE
from m2jax.engine import Engine
from m2jax.perplexity import perplexity
from m2jax.text import Tokenizer, load_tokenizer

GOLDEN = json.loads((Path(__file__).parent / "golden_pystories8M.json").read_text())
WINDOWS = GOLDEN["windows"]["windows"]
# What two float32 programs may differ by in a mean of 255 values; one token scored too
# many or too few moves it by some hundredths.
NLL_BOUND = 1e-3
# The same logits, summed by NumPy in float64 and by XLA in float32.
SAME_LOGITS_BOUND = 1e-5
CONTEXT = 16
TEXT = (
    "def read_lines(path):\n    with open(path) as file:\n"
    "        return [line.rstrip() for line in file]\n\n\n"
    "Once upon a time there was a very little dog. His name was Max — he liked naïve "
    "cats. One day Max saw a big red ball in the park and wanted to play with it.\n"
)


@pytest.fixture(scope="module")
def engine(bundled_store: Path) -> Engine:
    return m2jax.load(bundled_store, mix="100/0/0")


@pytest.fixture(scope="module")
def without_bos(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """The same model with a tokenizer that puts nothing in front."""
    folder = tmp_path_factory.mktemp("tokenizer")
    shutil.copy(SOURCE / "tokenizer.json", folder)
    (folder / "tokenizer_config.json").write_text('{"add_bos_token": false}')
    tokenizer = load_tokenizer(
        folder, vocab_size=engine.config.vocab_size, bos_token_ids=()
    )
    assert tokenizer is not None
    assert tokenizer.bos_id is None
    return Engine(engine._runner, tokenizer, mixes=engine.mixes, load_s=0.0)


def text_ids(engine: Engine) -> list[int]:
    assert engine.tokenizer is not None
    return engine.tokenizer.encode(TEXT, add_bos=False)


def nll_of_window(engine: Engine, ids: list[int]) -> np.ndarray:
    """-log p of every id after the first, by NumPy from teacher-forced logits."""
    logits = engine.logits(ids)[:-1].astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return -logprobs[np.arange(len(ids) - 1), ids[1:]]


@pytest.mark.parametrize("window", WINDOWS[:2], ids=lambda w: str(w["offset"]))
def test_windows_score_as_in_transformers(engine, window):
    nll = -engine.logprobs(window["ids"]).mean()
    assert abs(nll - window["mean_nll"]) <= NLL_BOUND


def test_a_window_of_text_scores_as_in_transformers(without_bos):
    window = WINDOWS[0]
    text = without_bos.tokenizer.decode(window["ids"])
    assert without_bos.tokenizer.encode(text) == window["ids"]
    found = perplexity(without_bos, text, context=256)
    assert abs(found["nll_per_token"] - window["mean_nll"]) <= NLL_BOUND
    assert found["tokens"] == 255


def test_with_a_bos_every_token_is_scored_once(engine):
    ids, bos = text_ids(engine), engine.tokenizer.bos_id
    starts = range(0, len(ids), CONTEXT - 1)
    windows = [[bos, *ids[start : start + CONTEXT - 1]] for start in starts]
    assert 2 < len(windows[-1]) < CONTEXT
    wanted = np.concatenate([nll_of_window(engine, window) for window in windows])

    found = perplexity(engine, TEXT, context=CONTEXT)
    assert found["tokens"] == len(ids) == len(wanted)
    assert found["windows"] == len(windows)
    assert found["context"] == CONTEXT
    assert abs(found["nll_per_token"] - wanted.mean()) <= SAME_LOGITS_BOUND


def test_without_a_bos_windows_are_scored_from_their_second_token(without_bos):
    ids = text_ids(without_bos)
    starts = range(0, len(ids), CONTEXT)
    windows = [ids[start : start + CONTEXT] for start in starts]
    wanted = np.concatenate([nll_of_window(without_bos, ids) for ids in windows])

    found = perplexity(without_bos, TEXT, context=CONTEXT)
    assert found["tokens"] == len(ids) - len(windows)
    first_bytes = sum(len(without_bos.tokenizer.token_bytes(w[0])) for w in windows)
    assert found["bytes"] == len(TEXT.encode()) - first_bytes
    assert found["windows"] == len(windows)
    assert abs(found["nll_per_token"] - wanted.mean()) <= SAME_LOGITS_BOUND


def test_a_last_window_of_one_token_has_nothing_to_score(without_bos):
    found = perplexity(without_bos, TEXT, context=CONTEXT, max_tokens=CONTEXT + 1)
    assert (found["windows"], found["tokens"]) == (1, CONTEXT - 1)


def test_with_a_bos_a_last_window_of_one_token_is_scored(engine):
    found = perplexity(engine, TEXT, context=CONTEXT, max_tokens=CONTEXT)
    assert (found["windows"], found["tokens"]) == (2, CONTEXT)


def test_bits_are_counted_by_the_bytes_of_the_text(engine):
    found = perplexity(engine, TEXT, context=CONTEXT)
    assert found["bytes"] == len(TEXT.encode()) > len(TEXT)
    bits = found["nll_per_token"] * found["tokens"] / math.log(2)
    assert found["bits_per_byte"] == pytest.approx(bits / len(TEXT.encode()))
    assert found["perplexity"] == pytest.approx(math.exp(found["nll_per_token"]))


def test_max_tokens_reads_a_prefix_of_the_text(engine):
    ids = text_ids(engine)[:9]
    found = perplexity(engine, TEXT, context=CONTEXT, max_tokens=9)
    wanted = nll_of_window(engine, [engine.tokenizer.bos_id, *ids])
    assert found["tokens"] == 9
    assert abs(found["nll_per_token"] - wanted.mean()) <= SAME_LOGITS_BOUND


def test_progress_is_told_after_each_window(engine):
    seen = []
    found = perplexity(
        engine, TEXT, context=CONTEXT, progress=lambda *both: seen.append(both)
    )
    total = found["tokens"]
    assert [done for done, _ in seen[:-1]] == [15 * n for n in range(1, len(seen))]
    assert seen[-1] == (total, total)
    assert {of for _, of in seen} == {total}


@pytest.mark.parametrize(
    ("text", "options", "words"),
    [
        ("", {}, "text has 0 tokens: want at least 2"),
        ("a", {}, "text has 1 tokens: want at least 2"),
        (TEXT, {"context": 1}, "context 1: want 2 to 1024"),
        (TEXT, {"context": 1025}, "context 1025: want 2 to 1024"),
        (TEXT, {"max_tokens": 1}, "max_tokens 1: want 2 or more"),
    ],
)
def test_what_cannot_be_scored_is_refused_in_one_line(engine, text, options, words):
    with pytest.raises(ValueError, match=words) as refusal:
        perplexity(engine, text, **options)
    assert "\n" not in str(refusal.value)


def test_a_store_without_a_tokenizer_is_refused(engine):
    nameless: Tokenizer | None = None
    with pytest.raises(ValueError, match="needs a tokenizer"):
        perplexity(
            Engine(engine._runner, nameless, mixes=engine.mixes, load_s=0.0), TEXT
        )
