"""How long to draft, and whether to: what the pace learns and decides."""

from itertools import pairwise

import numpy as np
import pytest

from m2jax.draft.ngram import look_up
from m2jax.draft.pace import (
    FIRST_PAUSE,
    LEADS,
    MOST_ROWS,
    PRIOR_RIGHT,
    Pace,
    most_drafted,
    rows_for,
)
from m2jax.kernels import native
from m2jax.predict import expected_tokens

MOST = MOST_ROWS - 1
STEP_S, SWEEP_S = 0.001, 0.02


def drafting(*, tokens: int, plain_s: float | None = None) -> Pace:
    """A pace whose rounds of 10 drafted tokens make so many tokens."""
    pace = Pace()
    for _ in range(20):
        note(pace, tokens)
    if plain_s is not None:
        pace.note_plain(plain_s)
    return pace


def note(pace: Pace, tokens: int) -> None:
    pace.note_round(tokens, drafted=10, draft_s=10 * STEP_S, sweep_s=SWEEP_S)


def compiled(pace: Pace, tokens: int) -> None:
    pace.note_round(tokens, drafted=10, draft_s=30, sweep_s=60, compiled=True)


def test_what_a_draft_made_counts_though_its_sweep_was_compiled():
    pace = Pace()
    for tokens in (8, 0, 0):
        note(pace, tokens)
    pace.note_plain(SWEEP_S)
    for _ in range(2):
        compiled(pace, 11)
    assert pace.tokens_per_s == pytest.approx(30 / (5 * (10 * STEP_S + SWEEP_S)))
    assert pace.next(MOST) == MOST


def test_a_compiled_round_says_nothing_while_none_was_timed():
    pace = Pace()
    compiled(pace, 11)
    assert 0 < pace.next(MOST) < MOST


def test_rows_are_few_and_hold_the_draft_and_the_token_before_it():
    rows = [rows_for(drafted) for drafted in range(1, MOST_ROWS)]
    assert len(set(rows)) == 7
    for drafted, count in enumerate(rows, 1):
        assert drafted + 1 <= count <= max(4, 2 * drafted)
    # Above 16, where a sweep is dear, at most a third of them is padding.
    assert all(
        count * 2 / 3 < drafted + 1
        for drafted, count in enumerate(rows, 1)
        if count > 16
    )


@pytest.mark.parametrize("room", range(MOST_ROWS + 2))
def test_a_draft_whose_sweep_fits_is_the_longest_such(room):
    most = most_drafted(room)
    assert most == 0 or rows_for(most) <= room
    assert most == MOST or rows_for(most + 1) > room


def test_a_row_that_costs_a_sweep_ends_a_draft_earlier():
    """As a longer step of drafting would; a sweep that waits for its reads does not."""
    least = []
    for row_s in (0.0, 0.0005):
        pace = Pace()
        for drafted in (7, 15, 23, 31):
            seconds = drafted * STEP_S + SWEEP_S + row_s * (rows_for(drafted) - 20)
            pace.note_round(
                10,
                drafted=drafted,
                draft_s=drafted * STEP_S,
                sweep_s=seconds - drafted * STEP_S,
            )
        assert pace.least_chance == pytest.approx((STEP_S + row_s) * pace.tokens_per_s)
        least.append(pace.least_chance)
    assert least[1] > 1.4 * least[0]


def test_one_slow_sweep_is_no_price_of_a_row():
    pace = Pace()
    for drafted, sweep_s in (
        (7, SWEEP_S),
        (15, SWEEP_S),
        (31, 9 * SWEEP_S),
        (23, SWEEP_S),
    ):
        pace.note_round(10, drafted=drafted, draft_s=drafted * STEP_S, sweep_s=sweep_s)
    assert pace.least_chance == pytest.approx(STEP_S * pace.tokens_per_s)


def test_the_chance_of_a_lead_is_the_share_that_was_right():
    pace = Pace()
    small, large = 1, len(LEADS)
    for _ in range(300):
        pace.note_leads([large, large, small], 3)
        pace.note_leads([large, small, large], 1)
    assert pace.chances[large] > 0.99
    assert pace.chances[small] == pytest.approx(0.5, abs=0.02)
    # The token after a wrong one says nothing.
    assert pace.chances.dtype == np.float32


def test_before_anything_is_seen_a_larger_lead_is_likelier_right():
    chances = Pace().chances
    assert len(chances) == len(LEADS) + 1 == len(PRIOR_RIGHT)
    assert np.all(np.diff(chances) > 0)
    assert chances[0] >= 0.5
    assert chances[-1] < 1


def test_a_draft_ends_where_its_next_token_costs_more_than_one_costs_in_all():
    pace = drafting(tokens=6)
    assert pace.tokens_per_s == pytest.approx(6 / (10 * STEP_S + SWEEP_S))
    # A step's worth of tokens, at that rate.
    assert pace.least_chance == pytest.approx(STEP_S * 6 / 0.03)
    assert drafting(tokens=9).least_chance > pace.least_chance


def test_drafting_pays_while_rounds_are_faster_than_tokens_alone():
    assert drafting(tokens=4, plain_s=0.01).next(MOST) == MOST
    assert drafting(tokens=2, plain_s=0.01).next(MOST) == 0
    # As long as that was not measured, a token alone costs a sweep.
    assert drafting(tokens=2).next(MOST) == MOST
    assert drafting(tokens=1).next(MOST) == 0


def test_it_is_tried_again_after_a_pause_that_doubles_while_it_does_not_pay():
    pace = drafting(tokens=1, plain_s=0.01)
    drafted = []
    for _ in range(200):
        drafted.append(pace.next(MOST))
        if drafted[-1]:
            note(pace, 1)
    tries = np.flatnonzero(drafted)
    starts = [int(t) for t in tries if t - 1 not in tries]
    gaps = np.diff([0, *starts])
    assert gaps[0] == FIRST_PAUSE
    assert all(later > 1.5 * before for before, later in pairwise(gaps))
    assert len(tries) < 20


def test_when_it_pays_again_it_goes_on():
    pace = drafting(tokens=1, plain_s=0.01)
    while not pace.next(MOST):
        pass
    for _ in range(4):
        note(pace, 9)
    assert pace.next(MOST) == MOST


def test_what_could_not_pay_if_all_were_right_is_not_tried():
    pace = drafting(tokens=1, plain_s=1e-5)
    assert not any(pace.next(MOST) for _ in range(1000))


def test_nothing_is_drafted_before_plain_steps_were_timed_where_that_is_asked():
    pace = Pace(probes=3)
    assert [bool(pace.next(MOST)) for _ in range(4)] == [False, False, False, True]


def test_a_fixed_length_is_kept_but_never_above_the_room():
    pace = Pace(fixed=9, probes=3)
    assert [pace.next(most) for most in (63, 9, 4, 0)] == [9, 9, 4, 0]
    assert pace.least_chance == 0


def test_no_more_is_drafted_than_there_is_room_for():
    for most in range(70):
        assert drafting(tokens=9).next(most) <= min(most, MOST)
        assert Pace().next(most) <= most


def test_a_new_text_starts_without_the_pause_of_the_last_one():
    pace = drafting(tokens=1, plain_s=0.01)
    assert pace.next(MOST) == 0
    pace.begin()
    assert pace.next(MOST) > 0


@pytest.mark.parametrize("acceptance", [0.0, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("drafted", [0, 1, 7, 31])
def test_a_round_makes_the_accepted_tokens_and_one_more(acceptance, drafted):
    # Sum over the place of the first wrong token, by its chance.
    stops = sum(
        (place + 1) * acceptance**place * (1 - acceptance) for place in range(drafted)
    )
    wanted = stops + (drafted + 1) * acceptance**drafted
    assert expected_tokens(acceptance, drafted) == pytest.approx(wanted)


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


def test_a_sweep_never_meets_words():
    """Those kernels round to 16 bits, and a token alone to 24: choices would turn."""
    assert native.FEW_BESIDE_BLOCKS["words"]["codes"] >= MOST_ROWS
