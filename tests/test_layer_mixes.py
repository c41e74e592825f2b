"""The text form of one mix a layer."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from m2jax.layer_mixes import edges_of, format_mixes, mix_from_edges, parse_mixes
from m2jax.mix import PrecisionMix

HALF_A_HUNDREDTH = 0.005
FLOAT = 1e-9

edges = st.lists(st.integers(0, 10_000), min_size=3, max_size=3).map(sorted)
mixes = edges.map(lambda at: mix_from_edges(*at))
runs = st.lists(st.tuples(mixes, st.integers(1, 4)), min_size=1, max_size=6)


@given(runs)
def test_text_gives_the_same_mixes_back(runs):
    layers = tuple(mix for mix, count in runs for _ in range(count))
    text = format_mixes(layers)
    assert parse_mixes(text, len(layers)) == layers
    assert len(text.split(",")) == 1 + sum(a != b for a, b in pairwise(layers))


@given(st.lists(st.floats(0, 1), min_size=4, max_size=4).filter(lambda p: sum(p) > 0.1))
def test_cumulative_shares_are_rounded_to_a_hundredth(parts):
    shares = [min(100, 100 * part / sum(parts)) for part in parts]
    mix = PrecisionMix(*shares[:3])
    (back,) = parse_mixes(format_mixes([mix]), 1)
    assert back.percent16 == pytest.approx(mix.percent16, abs=HALF_A_HUNDREDTH + FLOAT)
    for share, other in zip(shares, (back.percent16, back.percent8, back.percent4)):
        assert share == pytest.approx(other, abs=2 * HALF_A_HUNDREDTH + FLOAT)
    assert parse_mixes(format_mixes([back]), 1) == (back,)


def test_thirds_stay_a_whole():
    third = 100 / 3
    assert format_mixes([PrecisionMix(third, third, third)]) == "33.33/33.34/33.33"
    assert edges_of(PrecisionMix(33.335, 33.335, 33.33))[2] == 10_000
    assert edges_of(PrecisionMix(0, 33.336, 66.656)) == (0, 3334, 9999)


@pytest.mark.parametrize(
    ("text", "layers", "written"),
    [
        ("25/25/50", 3, "25/25/50"),
        ("0/25/75*3,0/50/50", 4, "0/25/75*3,0/50/50"),
        (" 0/25/75 * 2 , 0/50/50", 3, "0/25/75*2,0/50/50"),
        ("0/25/75*4", 4, "0/25/75"),
        ("0/25/75,0/25/75*2,1/0/0", 4, "0/25/75*3,1/0/0"),
        ("12.50/0/0.01", 1, "12.5/0/0.01"),
    ],
)
def test_equal_neighbours_collapse(text, layers, written):
    parsed = parse_mixes(text, layers)
    assert len(parsed) == layers
    assert format_mixes(parsed) == written


def test_a_mix_itself_is_that_of_all_layers():
    mix = PrecisionMix(25, 25, 50)
    assert parse_mixes(mix, 3) == (mix,) * 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0/25/75*3,0/50/50", "for 4 layers, the model has 5"),
        ("0/25/75*3", "for 3 layers, the model has 5"),
        ("0/25/75*0,0/50/50*5", "'0' times"),
        ("0/25/75*-1,0/50/50*6", "'-1' times"),
        ("0/25/75*1.5", "'1.5' times"),
        ("0/25/75*", "'' times"),
        ("0/25/75*99999999999", "times"),
        ("0/25/75,,0/50/50", "want percentages"),
        ("0/25/75,0/60/50", "at most 100"),
        ("", "want percentages"),
    ],
)
def test_wrong_text_is_refused_in_one_line(text, message):
    with pytest.raises(ValueError, match=message) as refused:
        parse_mixes(text, 5)
    assert "\n" not in str(refused.value)


def test_no_layers_have_no_text():
    with pytest.raises(ValueError, match="no mix"):
        format_mixes([])
