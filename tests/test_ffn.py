"""The mixed-precision feed-forward block against a direct evaluation in float64."""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from m2jax import ffn
from m2jax.ffn import NeuronRows, Norms, feed_forward, feed_forward_block
from m2jax.ffn_spec import FfnSpec, make_specs
from m2jax.layout import make_layout
from m2jax.mix import ClassCounts, PrecisionMix
from m2jax.quant import dequantise_base, dequantise_int8, quantise_rows, split_codes
from m2jax.ranking import Scores, rank, split_classes
from tests.small_configs import tiny

# float32 sums of 40 products, relative to the largest output; the worst here is 1e-6,
# and one neuron in the wrong class moves an output by 1e-3 or more.
ROUNDING = 1e-5
# Neither the rows nor the neurons fill what they are padded to.
NEURONS, PADDED, HIDDEN, WIDTH, GROUP, TOKENS = 40, 64, 56, 64, 16, 4
SLOTS = 50
MIXES = {
    "100/0/0": "base",
    "0/100/0": "base",
    "0/0/100": "base",
    "25/25/50": "base",
    "20/20/20": "base",
    "0/25/75": "base",
    "50/0/0": "base",
    "0/50/0": "base",
    "20/20/20 ": "none",
    "25/25/50 ": "none",
    "20/20/20  ": "gate",
    "0/50/0 ": "gate",
    "20/20/20   ": "lowrank",
    "25/25/50   ": "lowrank",
    "0/30/20   ": "lowrank",
    "0/100/0   ": "lowrank",
}
ERF = np.vectorize(math.erf)
ACTIVATIONS = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "relu": lambda x: np.maximum(x, 0),
    "gelu": lambda x: x * (1 + ERF(x / math.sqrt(2))) / 2,
}


class Layer(NamedTuple):
    """One layer's neurons: what is stored, and the values [F, 3, D] by bits.

    predictor: [F, D], what the low-rank scorer of these tests multiplies with.
    """

    planes: dict[str, np.ndarray]
    scales: np.ndarray
    norms: Norms
    values: dict[int, np.ndarray]
    predictor: np.ndarray


def norms_of(rows: np.ndarray, base: np.ndarray) -> Norms:
    columns = np.linalg.norm(base[:, 2], axis=-1)
    noise = np.square(rows - base).sum(axis=-1)
    noise[:, :2] *= np.square(columns)[:, None] / HIDDEN
    return Norms(columns.astype(np.float32), noise.astype(np.float32))


@pytest.fixture(scope="module")
def layer() -> Layer:
    generator = np.random.default_rng(0)
    rows = np.zeros((PADDED, 3, WIDTH), np.float32)
    rows[:NEURONS, :, :HIDDEN] = generator.normal(size=(NEURONS, 3, HIDDEN)) / 4
    w16 = rows.astype(np.float16)
    codes, scales, _ = quantise_rows(rows, group=GROUP)
    q4, r4 = split_codes(codes)
    base = dequantise_base(q4, scales, group=GROUP)
    values = {
        32: rows,
        16: w16,
        8: dequantise_int8(q4, r4, scales, group=GROUP),
        4: base,
    }
    planes = {"q4": q4, "r4": r4, "w16": w16}
    return Layer(
        {name: plane.reshape(PADDED, -1) for name, plane in planes.items()},
        scales,
        norms_of(rows, base),
        {
            bits: value[:NEURONS, :, :HIDDEN].astype(float)
            for bits, value in values.items()
        },
        generator.normal(size=(NEURONS, HIDDEN)).astype(np.float32),
    )


@pytest.fixture(scope="module")
def h() -> np.ndarray:
    generator = np.random.default_rng(1)
    return generator.normal(size=(TOKENS, HIDDEN)).astype(np.float32)


def spec_of(mix: str, scorer: str, *, activation: str = "silu") -> FfnSpec:
    counts = PrecisionMix.parse(mix).counts(NEURONS)
    return FfnSpec(activation, NEURONS, HIDDEN, WIDTH, counts, scorer)


def direct(layer: Layer, h: np.ndarray, spec: FfnSpec) -> np.ndarray:
    """[T, D] float64: every neuron at the precision of its class, one by one."""
    act = ACTIVATIONS[spec.activation]

    def hidden(token: np.ndarray, bits: int) -> np.ndarray:
        gate, up, _ = layer.values[bits].transpose(1, 0, 2)
        return act(gate @ token) * (up @ token)

    out = np.zeros((len(h), HIDDEN))
    for t, token in enumerate(h.astype(float)):
        norms = np.linalg.norm(layer.values[4][:, 2], axis=1)
        scores = {
            "base": np.abs(hidden(token, 4)) * norms,
            "gate": np.abs(act(layer.values[4][:, 0] @ token)) * norms,
            "lowrank": layer.predictor.astype(float) @ token,
            "none": -np.arange(NEURONS),
        }
        order = np.argsort(-scores[spec.scorer], kind="stable")
        if spec.scorer == "base":
            kept = order[: spec.counts.kept]
            error = expected_error(layer, token, act)[kept]
            order = kept[np.lexsort([kept, -error])]
        first = 0
        for bits, count in zip((16, 8, 4), spec.counts, strict=True):
            chosen = order[first : first + count]
            weights = hidden(token, bits)[chosen]
            out[t] += weights @ layer.values[bits][chosen, 2]
            first += count
    return out


def expected_error(layer: Layer, token: np.ndarray, act) -> np.ndarray:
    """[F]: variance of a neuron's output if the rounding of q4 were independent noise
    of its true size, to first order; the slope is a difference quotient."""
    gate, up, down = layer.values[4].transpose(1, 0, 2)
    errors = np.square(layer.values[32] - layer.values[4]).sum(axis=2)
    g, u = gate @ token, up @ token
    slope = (act(g + 1e-6) - act(g - 1e-6)) / 2e-6
    through = (slope * u) ** 2 * errors[:, 0] + act(g) ** 2 * errors[:, 1]
    column = np.square(down).sum(axis=1) / HIDDEN
    own = (act(g) * u) ** 2 * errors[:, 2]
    return np.square(token).sum() * through * column + own


def in_slots(plane: np.ndarray, ids: jax.Array, *, seed: int) -> NeuronRows:
    """A pool with the wanted records at random places, rubbish everywhere else."""
    generator = np.random.default_rng(seed)
    slots = generator.permutation(SLOTS)[: len(ids)].astype(np.int32)
    pool = generator.integers(0, 60, (SLOTS, plane.shape[1])).astype(plane.dtype)
    pool[slots] = plane[np.asarray(ids)]
    return NeuronRows(pool, slots)


def by_token(layer: Layer, h: np.ndarray, spec: FfnSpec) -> np.ndarray:
    """[T, D] from `feed_forward`, as a decode step calls it, with pools of slots."""
    used = {plane: layer.planes[plane] for plane in spec.wanted}
    prepare = jax.jit(partial(classes, spec=spec))
    run = jax.jit(partial(feed_forward, spec=spec))
    rows = []
    for t in range(len(h)):
        token = h[t : t + 1]
        base, ids = prepare(
            token, used.get("q4"), layer.scales, layer.norms, layer.predictor
        )
        planes = {
            plane: (
                NeuronRows(records, None)
                if spec.dense(plane)
                else in_slots(records, ids.by_plane(plane), seed=t)
            )
            for plane, records in used.items()
        }
        rows.append(run(token, base, ids, planes, layer.scales))
    return np.concatenate(rows)


def classes(h, q4, scales, norms, predictor, *, spec: FfnSpec):
    base = ffn.base_pass(h, q4, scales, spec=spec) if spec.base_whole else None
    ids = jnp.arange(spec.ranked_counts.kept, dtype=jnp.int32)
    if spec.predicted:
        ids = rank(Scores(h @ predictor.T), spec=spec)[0]
    elif spec.ranked:
        ids = rank(ffn.base_scores(base, h, norms, spec=spec), spec=spec)[0]
    return base, split_classes(ids, spec=spec)


def by_block(layer: Layer, h: np.ndarray, spec: FfnSpec) -> np.ndarray:
    used = {plane: layer.planes[plane] for plane in spec.wanted}
    run = jax.jit(partial(feed_forward_block, spec=spec))
    predicted = h @ layer.predictor.T if spec.predicted else None
    return np.asarray(run(h, used, layer.scales, layer.norms, predicted))


def assert_equal_but_for_rounding(given: np.ndarray, wanted: np.ndarray) -> None:
    assert given.dtype == np.float32
    assert np.abs(given - wanted).max() <= ROUNDING * np.abs(wanted).max()


@pytest.mark.parametrize("mix", MIXES)
def test_one_token_gets_each_neuron_at_the_precision_of_its_class(mix, layer, h):
    spec = spec_of(mix, MIXES[mix])
    assert_equal_but_for_rounding(by_token(layer, h, spec), direct(layer, h, spec))


@pytest.mark.parametrize("mix", MIXES)
def test_each_token_of_a_block_has_its_own_classes(mix, layer, h):
    spec = spec_of(mix, MIXES[mix])
    assert_equal_but_for_rounding(by_block(layer, h, spec), direct(layer, h, spec))


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_the_activation_is_that_of_the_model(activation, layer, h):
    spec = spec_of("20/20/20", "base", activation=activation)
    assert_equal_but_for_rounding(by_block(layer, h, spec), direct(layer, h, spec))


def test_a_mix_that_skips_every_neuron_gives_zeros_and_wants_nothing(layer, h):
    spec = spec_of("0/0/0", "base")
    assert spec.wanted == {}
    assert not by_token(layer, h, spec).any()
    assert not by_block(layer, h, spec).any()


def test_equal_scores_go_to_the_lower_ids(layer):
    spec = spec_of("20/20/20", "base")
    h = np.zeros((1, HIDDEN), np.float32)
    _, ids = classes(h, layer.planes["q4"], *layer[1:3], None, spec=spec)
    assert np.concatenate(ids).tolist() == list(range(24))


def test_padding_is_never_wanted(layer, h):
    spec = spec_of("50/25/24", "base")
    norms = Norms(*(norm.copy() for norm in layer.norms))
    for norm in norms:
        norm[NEURONS:] = 9
    for token in h:
        _, ids = classes(
            token[None], layer.planes["q4"], layer.scales, norms, None, spec=spec
        )
        assert max(map(int, np.concatenate(ids))) < NEURONS


@given(
    st.integers(1, 20000),
    st.tuples(*[st.integers(0, 100)] * 3).filter(lambda shares: sum(shares) <= 100),
)
def test_class_sizes_follow_the_mix_within_one_neuron(neurons, shares):
    counts = PrecisionMix(*shares).counts(neurons)
    assert min(counts) >= 0
    assert counts.kept <= neurons
    assert (counts.kept == neurons) or sum(shares) < 100
    for count, share in zip(counts, shares, strict=True):
        assert abs(count - neurons * share / 100) <= 1


@pytest.mark.parametrize(
    ("mix", "wanted"),
    [
        ("100/0/0", {"w16": 40}),
        ("0/100/0", {"q4": 40, "r4": 40}),
        ("0/0/100", {"q4": 40}),
        ("25/25/50", {"q4": 40, "r4": 10, "w16": 10}),
        ("20/20/20", {"q4": 40, "r4": 8, "w16": 8}),
        ("50/0/0", {"q4": 40, "w16": 20}),
    ],
)
def test_a_step_wants_no_more_records_than_its_mix_computes(mix, wanted):
    assert spec_of(mix, "base").wanted == wanted


@pytest.mark.parametrize("scorer", ["none", "lowrank"])
@pytest.mark.parametrize(
    ("mix", "wanted"),
    [
        ("50/0/0", {"w16": 20}),
        ("20/20/20", {"q4": 16, "r4": 8, "w16": 8}),
        ("25/25/50", {"q4": 30, "r4": 10, "w16": 10}),
        ("0/100/0", {"q4": 40, "r4": 40}),
    ],
)
def test_what_the_base_plane_does_not_rank_is_wanted_neuron_by_neuron(
    mix, wanted, scorer
):
    assert spec_of(mix, scorer).wanted == wanted


def test_a_mix_that_needs_a_plane_the_store_lacks_is_refused():
    config = tiny("llama", intermediate_size=NEURONS)
    layout = make_layout(config, original_dtype="float16", group_size=32)
    mixes = [PrecisionMix.parse(mix) for mix in ("0/50/50", "10/0/90")]
    with pytest.raises(ValueError, match=r"layer 1\) wants 16 bits.* only q4, r4"):
        make_specs(config, layout, mixes, scorer="base", planes=("q4", "r4"))
    with pytest.raises(ValueError, match=r"layer 0\) wants 8 bits.* no plane r4"):
        make_specs(config, layout, mixes[:1], scorer="base", planes=("q4",))
    with pytest.raises(ValueError, match="scorer 'magic'"):
        make_specs(config, layout, mixes, scorer="magic")


def test_the_classes_of_no_neuron_are_empty():
    assert PrecisionMix.parse("0/0/0").counts(NEURONS) == ClassCounts(0, 0, 0)
