"""How long to draft, and whether to, from what was measured. Numbers only.

A draft is worth going on with as long as the chance that its next token counts, the
product of the chances of all before it, pays for the step and for its row in the sweep:
chance / their seconds above the tokens a second that drafting makes in all. The chance
of a token follows from its lead, how far the draft prefers it to the next best, by what
came of such leads before.
"""

import statistics
from collections import deque
from collections.abc import Sequence
from itertools import combinations

import numpy as np

# Rows that a sweep may have: few, since each is a program of its own. The first row is
# the text's last token, the others are drafted.
ROWS = (4, 8, 16, 24, 32, 48, 64)
MOST_ROWS = ROWS[-1]
# Leads, in nats, between which tokens are right about equally often.
LEADS = (0.05, 0.15, 0.4, 1.0, 2.5)
# As if so many tokens of each lead had been right and wrong before the first.
PRIOR_RIGHT = (2.2, 2.6, 3.2, 3.8, 3.95, 7.95)
PRIOR_WRONG = (1.8, 1.4, 0.8, 0.2, 0.05, 0.05)
# What was seen of leads fades by this factor a text; much of it is the model's own.
FADING = 0.9
SAMPLES = 8
# Rounds to judge by, and before anything is known how many tokens to draft.
LEAST_ROUNDS, FIRST_COUNT, FIRST_CHANCE = 2, 7, 0.3
# Plain steps before drafting is tried again; doubled each time it does not pay.
FIRST_PAUSE, LONGEST_PAUSE = 8, 512


def rows_for(drafted: int) -> int:
    """Rows of the sweep that verifies so many."""
    return next(rows for rows in ROWS if rows > drafted)


def most_drafted(room: int) -> int:
    """Tokens whose sweep writes no more than so many positions."""
    return max((rows for rows in ROWS if rows <= room), default=1) - 1


class Pace:
    """Owns what one engine has seen of its drafts; outlives a text.

    Args:
        fixed: always draft so many, whatever it costs; None: choose.
        probes: plain steps to time before anything is drafted. Where a plain step
            costs a sweep anyway, none are needed.
    """

    def __init__(self, *, fixed: int | None = None, probes: int = 0):
        self._fixed, self._probes = fixed, probes
        self._right = np.array(PRIOR_RIGHT)
        self._wrong = np.array(PRIOR_WRONG)
        self._plain: deque[float] = deque(maxlen=SAMPLES)
        self._step: deque[float] = deque(maxlen=SAMPLES)
        self._sweep: deque[tuple[int, float]] = deque(maxlen=SAMPLES)
        self._rounds: deque[tuple[int, float]] = deque(maxlen=SAMPLES)
        self._pause, self._waited = FIRST_PAUSE, -1

    def begin(self) -> None:
        """A new text: it may be easier or harder than the last one."""
        self._right = np.maximum(self._right * FADING, PRIOR_RIGHT)
        self._wrong = np.maximum(self._wrong * FADING, PRIOR_WRONG)
        self._pause, self._waited = FIRST_PAUSE, -1
        while len(self._rounds) > LEAST_ROUNDS:
            self._rounds.popleft()

    @property
    def chances(self) -> np.ndarray:
        """Chance that a token is right, by its lead's place among LEADS: float32."""
        return (self._right / (self._right + self._wrong)).astype(np.float32)

    @property
    def least_chance(self) -> float:
        """Where a draft ends: its next token would count too seldom."""
        if self._fixed is not None:
            return 0.0
        if not self._step or not self._rounds:
            return FIRST_CHANCE
        seconds = statistics.median(self._step) + self._row_s
        return min(seconds * self.tokens_per_s, 0.9)

    @property
    def _sweep_s(self) -> float:
        return statistics.median(seconds for _, seconds in self._sweep)

    @property
    def _row_s(self) -> float:
        """What a row adds to a sweep: the median slope of the last ones, two by two.
        Nothing where the slowest link sets the time, at most an equal share of it."""
        slopes = [
            (b_s - a_s) / (b - a)
            for (a, a_s), (b, b_s) in combinations(self._sweep, 2)
            if a != b
        ]
        if not slopes:
            return 0.0
        share = statistics.median(seconds / rows for rows, seconds in self._sweep)
        return min(max(statistics.median_low(slopes), 0.0), share)

    @property
    def tokens_per_s(self) -> float:
        """Of the last rounds, draft and sweep together."""
        tokens, seconds = map(sum, zip(*self._rounds))
        return tokens / seconds

    def next(self, most: int) -> int:
        """Most tokens to draft now, at most `most`; 0 = one plain step."""
        if most < 1:
            return 0
        if self._fixed is not None:
            return min(self._fixed, most)
        if self._probes > 0:
            self._probes -= 1
            return 0
        if self._waited >= 0:
            return self._rest(most)
        if self._is_hopeless() or not self._pays():
            self._waited = 0
            self._rounds.clear()
            return self._rest(most)
        return min(MOST_ROWS - 1 if self._rounds else FIRST_COUNT, most)

    def _pays(self) -> bool:
        """Whether the last rounds were faster than a token at a time: one sweep each,
        as long as that was not measured."""
        if len(self._rounds) < LEAST_ROUNDS:
            return True
        plain = statistics.median(self._plain) if self._plain else self._sweep_s
        pays = self.tokens_per_s * plain >= 1
        if pays:
            self._pause = FIRST_PAUSE
        return pays

    def _is_hopeless(self) -> bool:
        """Whether drafts could not be faster if every token of them were right."""
        if not (self._plain and self._step and self._sweep):
            return False
        drafted = MOST_ROWS - 1
        cost = drafted * statistics.median(self._step) + self._sweep_s
        return (drafted + 1) / cost * statistics.median(self._plain) < 1

    def _rest(self, most: int) -> int:
        """While it does not pay: seldom a short draft, to see whether it does again."""
        if self._waited < self._pause or self._is_hopeless():
            self._waited += 1
            return 0
        self._waited, self._pause = -1, min(2 * self._pause, LONGEST_PAUSE)
        return min(FIRST_COUNT, most)

    def note_plain(self, seconds: float) -> None:
        """One token alone took so long."""
        self._plain.append(seconds)

    def note_round(
        self,
        tokens: int,
        *,
        drafted: int,
        draft_s: float,
        sweep_s: float,
        compiled: bool = False,
    ) -> None:
        """One round: tokens it made, and the seconds of its two parts.

        Args:
            compiled: XLA compiled in it: its tokens count, at what such a round takes
                otherwise, as soon as that is known.
        """
        if not compiled:
            self._step.append(draft_s / drafted)
            self._sweep.append((rows_for(drafted), sweep_s))
        elif self._step:
            draft_s = drafted * statistics.median(self._step)
            sweep_s = self._sweep_s
        else:
            return
        self._rounds.append((tokens, draft_s + sweep_s))

    def note_leads(self, leads: Sequence[int], accepted: int) -> None:
        """What came of a draft, by the places of its tokens' leads among LEADS.

        Args:
            leads: of each token; [] where the drafter knows none.
            accepted: how many were right, up to the first wrong one.
        """
        np.add.at(self._right, np.array(leads[:accepted], np.int64), 1)
        if accepted < len(leads):
            self._wrong[leads[accepted]] += 1
