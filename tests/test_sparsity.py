"""What calibration says of neurons, on planted activations, and its text."""

import numpy as np
import pytest

from m2jax.cache.trace import Trace
from m2jax.calibrate.report import report_text
from m2jax.calibrate.sparsity import (
    LayerSparsity,
    chunk_reads,
    expected_hits,
    top_sets,
)
from m2jax.calibrate.text import calibration_windows

NEURONS = 40


def facts_of(*windows: np.ndarray) -> dict:
    layer = LayerSparsity(windows[0].shape[1])
    for window in windows:
        layer.add(window.astype(np.float32))
    return layer.facts()


def test_exact_zeros_are_counted():
    window = np.random.default_rng(0).random((8, NEURONS)) + 0.1
    window[:, ::4] = 0
    assert facts_of(window)["zero_share"] == pytest.approx(0.25)


def test_the_neurons_that_hold_the_energy_are_counted():
    window = np.full((4, NEURONS), 1e-6)
    window[:, :4] = 1
    found = facts_of(window)
    # Four equal neurons hold all: four for 95 %, and for 90 % four too (3.6).
    assert found["neurons_for_90"] == found["neurons_for_95"] == 4 / NEURONS
    even = facts_of(np.ones((4, NEURONS)))
    assert even["neurons_for_90"] == pytest.approx(0.9)
    assert even["neurons_for_99"] == pytest.approx(1.0)


def test_overlap_is_of_adjacent_tokens_within_a_window():
    window = np.full((3, NEURONS), 0.01)
    window[0, :4] = window[1, 2:6] = window[2, 2:6] = 1
    other = np.full((2, NEURONS), 0.01)
    other[:, 20:24] = 1
    # Of four each: two shared, four shared; then four shared in the other window.
    assert facts_of(window)["overlap"]["10"] == pytest.approx(0.75)
    assert facts_of(window, other)["overlap"]["10"] == pytest.approx((2 + 4 + 4) / 12)


def test_unions_grow_with_what_is_new():
    window = np.full((16, NEURONS), 0.01)
    for token in range(16):
        window[token, (4 * token + np.arange(4)) % NEURONS] = 1
    found = facts_of(window)["union"]["10"]
    assert found["4"] == pytest.approx(16 / NEURONS)
    assert found["16"] == pytest.approx(1)
    assert found["64"] is None


def test_skew_is_none_where_all_are_wanted_alike_and_full_where_few_are():
    few = np.full((10, NEURONS), 0.01)
    few[:, :4] = 1
    found = facts_of(few)
    assert found["top_10_taken_by"]["10"] == pytest.approx(1)
    assert found["gini"] == pytest.approx(0.9)
    alike = np.full((10, NEURONS), 0.01)
    for token in range(10):
        alike[token, 4 * token : 4 * token + 4] = 1
    assert facts_of(alike)["gini"] == pytest.approx(0)


def test_zeros_are_in_no_top_set():
    window = np.zeros((2, NEURONS))
    window[0, :3] = 1
    assert top_sets(window, 25).sum(axis=1).tolist() == [3, 0]


def test_an_order_brings_together_what_is_wanted_together():
    generator = np.random.default_rng(0)
    clubs = generator.permutation(NEURONS).reshape(4, 10)
    layer, wanted = LayerSparsity(NEURONS), []
    for _ in range(4):
        window = np.full((64, NEURONS), 0.01, np.float32)
        for token in range(64):
            club = clubs[generator.integers(4)]
            window[token, club] = 1
            wanted.append(club)
        layer.add(window)
    order = layer.order()
    assert sorted(order.tolist()) == list(range(NEURONS))
    stored = chunk_reads(np.arange(NEURONS), wanted, 10)
    assert stored > 0.8
    assert chunk_reads(order, wanted, 10) < 0.6


def test_chunks_are_counted_in_the_given_order():
    wanted = [np.array([0, 1, 2]), np.array([0, 10, 39])]
    assert chunk_reads(np.arange(NEURONS), wanted, 10) == pytest.approx((1 + 3) / 8)
    swapped = np.arange(NEURONS)
    swapped[[1, 39]] = [39, 1]
    # By place: {0, 39, 2} and {0, 10, 1}.
    assert chunk_reads(swapped, wanted, 10) == pytest.approx((2 + 2) / 8)


def test_expected_hits_never_beat_belady_and_grow_with_the_cache():
    generator = np.random.default_rng(1)
    trace = Trace()
    weights = 1 / np.arange(1, NEURONS + 1)
    weights /= weights.sum()
    for step in range(60):
        for layer in range(2):
            ids = generator.choice(NEURONS, 8, replace=False, p=weights)
            trace.record(step, layer, "r4", ids)
    rows = expected_hits(trace, NEURONS)
    assert [row["slots"] for row in rows] == [8, 10, 12, 16, 24]
    for policy in ("lru", "lfu", "belady", "random"):
        ratios = [row[policy] for row in rows]
        assert all(0 < ratio < 1 for ratio in ratios)
        assert all(row[policy] <= row["belady"] for row in rows)
        if policy == "belady":
            assert ratios == sorted(ratios)
    assert expected_hits(Trace(), NEURONS) == []


def report_facts(zero_share: float, overlap: float) -> dict:
    window = np.random.default_rng(0).random((8, NEURONS))
    layer = {**facts_of(window), "zero_share": zero_share}
    layer["overlap"] = {**layer["overlap"], "25": overlap}
    return {
        "tokens": 8,
        "mix": "0/25/75",
        "layers": [layer],
        "hits": [
            {"plane": "r4", "slots": 16, "share": 0.25, "hbm_bytes": 3 << 20}
            | dict.fromkeys(("lru", "lfu", "belady", "random"), 0.5)
        ],
        "scorer_costs": {
            "base": {"read_bytes": 2048, "kept_bytes": 0, "micros": 31.4},
            "lowrank": {"read_bytes": 512, "kept_bytes": 512, "micros": 7.0},
        },
        "recall": {
            "base": [{"25": 0.9}],
            "base, 1 ahead": [{"25": 0.8}],
            "base, 2 ahead": [None],
        },
        "predictors": {"0": [{"recall": {"25": 0.5}, "rank": 8}]},
        "order": {"chunk": 16, "stored": 0.9, "ordered": 0.5, "random": 0.9},
    }


def test_the_report_draws_its_conclusions_from_the_figures():
    dense = report_text(report_facts(0.0, 0.4))
    assert "0.0 % of activations are exactly zero: skipping is lossy" in dense
    assert "wants 40 % of what the token before wanted: a cache must hold" in dense
    assert "ordering pays" in dense
    assert "Scorer base finds of the true top neurons 0.90 at 25 %." in dense
    assert "lookahead 0) finds of the true top neurons 0.50 at 25 %: too lit" in dense
    assert "Scorer base, 1 ahead finds of the true top neurons 0.80 at 25 %." in dense
    assert "2 ahead" not in dense
    sparse = report_text(report_facts(0.7, 0.8))
    assert "70 % of activations are exactly zero: skipping those costs" in sparse
    assert "a small cache pays" in sparse


def test_the_report_has_recall_by_layer_costs_of_scorers_and_hbm_of_slots():
    layers, costs, hits = report_text(report_facts(0.0, 0.4)).split("\n\n")[1:]
    assert layers.splitlines()[0].endswith("recall of 25 %: base, lowrank")
    assert layers.splitlines()[1].endswith("0.90  0.50")
    rows = [line.split() for line in costs.splitlines()]
    assert rows[1:] == [
        ["base", "2.0", "0.0", "31"],
        ["lowrank", "0.5", "0.5", "7"],
    ]
    assert hits.splitlines()[2].split()[:6] == ["r4", "16", "25", "%", "3.00", "MiB"]
    untrained = report_text({**report_facts(0.0, 0.4), "predictors": {}})
    assert "recall of 25 %: base\n" in untrained


class Words:
    """A tokenizer of characters; what is not ASCII comes as its bytes."""

    bos_id = 1

    def encode(self, text: str, *, add_bos: bool = True) -> list[int]:
        return [256 + byte if byte < 128 else byte for byte in text.encode()]

    def token_bytes(self, token: int) -> bytes:
        return bytes([token - 256]) if token >= 256 else bytes([token])


def test_windows_are_equally_long_and_spread_over_the_text():
    text = "".join(chr(32 + n % 90) for n in range(1000))
    found = calibration_windows(Words(), text, length=11, tokens=44)
    assert [len(window) for window in found] == [11] * 4
    assert all(window[0] == 1 for window in found)
    starts = [window[1:] for window in found]
    ids = Words().encode(text)
    assert starts == [ids[at : at + 10] for at in (0, 250, 500, 750)]
    whole = calibration_windows(Words(), text, length=11, tokens=10**6)
    assert [token for window in whole for token in window[1:]] == ids


@pytest.mark.parametrize(
    ("text", "options", "says"),
    [
        ("abc", {}, "has 3 tokens: want at least 10; give a longer one"),
        ("abc" * 9, {"least": 3, "tokens": 33}, "27 tokens: want at least 30"),
        ("abc" * 9, {"length": 1}, "--window 1"),
        ("abc" * 9, {"tokens": 10}, "--tokens 10: want at least 11"),
        ("東京" * 40, {}, "100 % of the text's tokens are unknown or pieces"),
    ],
)
def test_text_that_does_not_serve_is_refused(text, options, says):
    with pytest.raises(ValueError, match=says):
        calibration_windows(Words(), text, **{"length": 11, "tokens": 99, **options})


def test_a_few_foreign_characters_are_no_foreign_text():
    text = "a plain line of text with 東 in it. " * 20
    assert calibration_windows(Words(), text, length=11, tokens=22)


def test_without_a_tokenizer_there_is_no_calibration():
    with pytest.raises(ValueError, match="needs a tokenizer"):
        calibration_windows(None, "text", length=11, tokens=22)
