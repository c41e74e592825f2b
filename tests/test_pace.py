"""How many tokens to draft: what the pace chooses, and when it stops."""

import math

import pytest

from m2jax.draft.ngram import look_up
from m2jax.draft.pace import (
    FIRST_PAUSE,
    SIZES,
    Pace,
    expected_tokens,
    rows_for,
)

MOST = SIZES[-1]
STEP_S = 0.001


def seen(*, right: float, sweep_s: float, plain_s: float | None = None) -> Pace:
    """A pace that has seen much: drafted tokens right with this chance."""
    pace = Pace()
    for _ in range(60):
        pace.note_accepted(100, 0 if right == 0 else round(right / (1 - right)))
    pace.note_draft(10, 10 * STEP_S)
    for size in SIZES:
        pace.note_sweep(size, sweep_s)
    if plain_s is not None:
        pace.note_plain(plain_s)
    return pace


@pytest.mark.parametrize("acceptance", [0.0, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("drafted", [0, 1, 7, 31])
def test_a_round_makes_the_accepted_tokens_and_one_more(acceptance, drafted):
    # Sum over the place of the first wrong token, by its chance.
    stops = sum(
        (place + 1) * acceptance**place * (1 - acceptance) for place in range(drafted)
    )
    wanted = stops + (drafted + 1) * acceptance**drafted
    assert expected_tokens(acceptance, drafted) == pytest.approx(wanted)


def test_rows_are_powers_of_two_that_hold_the_draft_and_the_token_before_it():
    for drafted in range(1, 64):
        rows = rows_for(drafted)
        assert math.log2(rows).is_integer()
        assert drafted + 1 <= rows <= max(4, 2 * drafted)


def test_what_was_accepted_is_learned():
    assert seen(right=0.95, sweep_s=1).acceptance == pytest.approx(0.95, abs=0.01)
    assert seen(right=0.5, sweep_s=1).acceptance == pytest.approx(0.5, abs=0.01)


def test_a_draft_is_longer_where_sweeps_are_dear_or_it_is_oftener_right():
    sizes = [seen(right=0.95, sweep_s=s).next(MOST) for s in (0.002, 0.02, 0.2)]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[-1]
    sizes = [seen(right=r, sweep_s=0.02).next(MOST) for r in (0.6, 0.9, 0.98)]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[-1]


def test_the_size_chosen_is_the_best_of_all_by_what_was_measured():
    pace = seen(right=0.93, sweep_s=0.02)
    rates = {
        k: expected_tokens(pace.acceptance, k) / (k * STEP_S + 0.02) for k in SIZES
    }
    assert pace.next(MOST) == max(rates, key=rates.__getitem__)


def test_drafting_stops_where_one_token_alone_is_faster_and_is_tried_again_later():
    pace = seen(right=0.0, sweep_s=0.02, plain_s=0.002)
    drafted = [pace.next(MOST) for _ in range(200)]
    tries = [place for place, count in enumerate(drafted) if count]
    assert set(drafted) == {0, SIZES[0]}
    # Each pause is twice the one before it.
    assert tries == [FIRST_PAUSE - 1, 3 * FIRST_PAUSE - 1]


def test_drafting_goes_on_when_it_pays_again():
    pace = seen(right=0.0, sweep_s=0.02, plain_s=0.01)
    assert pace.next(MOST) == 0
    for _ in range(30):
        pace.note_accepted(20, 20)
    assert pace.next(MOST) > SIZES[0]


def test_nothing_is_drafted_before_plain_steps_were_timed_where_that_is_asked():
    pace = Pace(probes=3)
    assert [bool(pace.next(MOST)) for _ in range(4)] == [False, False, False, True]


def test_a_fixed_length_is_kept_but_never_above_the_room():
    pace = Pace(fixed=9, probes=3)
    assert [pace.next(most) for most in (63, 9, 4, 0)] == [9, 9, 4, 0]


def test_no_more_is_drafted_than_there_is_room_for():
    pace = seen(right=0.99, sweep_s=1.0)
    for most in range(70):
        assert pace.next(most) <= most


def test_look_up_gives_what_followed_the_longest_latest_match():
    text = [1, 2, 3, 4, 9, 9, 2, 3, 4, 7, 8, 5, 2, 3, 4]
    assert look_up(text, 2) == [7, 8]
    assert look_up([5, 1, 2, 3, 6, 7, 2, 3, 8, 1, 2, 3], 3) == [6, 7, 2]


def test_look_up_gives_nothing_where_the_text_repeats_nothing():
    assert look_up([1, 2, 3, 4], 5) == []
    assert look_up([1], 5) == []
    assert look_up([], 5) == []


def test_look_up_gives_no_more_than_asked_and_than_there_is():
    text = [1, 2, 1, 2]
    assert look_up(text, 1) == [1]
    assert look_up(text, 9) == [1, 2]
