"""How many tokens to draft next, from what drafts and sweeps cost. Numbers only.

With acceptance a (chance that a drafted token is the target's) and k tokens drafted,
one round makes 1 + a + .. + a^k tokens in k draft steps and one sweep; `Pace` takes the
k of most tokens a second, or none where one token at a time is faster.
"""

import statistics
from collections import deque

# Drafted tokens; with the one before them, rows of a sweep: 4, 8, 16, 32, 64.
SIZES = (3, 7, 15, 31, 63)
MOST_ROWS = SIZES[-1] + 1
FIRST_SIZE = 7
# What was seen of acceptance fades by this factor a round.
FADING = 0.85
# As if so many drafted tokens had been seen before the first: 4 of 5 right.
PRIOR_RIGHT, PRIOR_WRONG = 4.0, 1.0
SAMPLES = 7
# Plain steps before drafting is tried again; doubled each time it does not pay.
FIRST_PAUSE, LONGEST_PAUSE = 32, 512


def expected_tokens(acceptance: float, drafted: int) -> float:
    """Tokens of one round: (1 - a^(k+1)) / (1 - a)."""
    return sum(acceptance**place for place in range(drafted + 1))


def rows_for(drafted: int) -> int:
    """Rows of the sweep that verifies so many: a power of two, 4 or more."""
    rows = 4
    while rows < drafted + 1:
        rows *= 2
    return rows


class Pace:
    """Owns what one engine has seen of its drafts; outlives a text.

    Args:
        fixed: always draft so many, whatever it costs; None: choose.
        probes: plain steps to measure before anything is drafted. Where a plain step
            costs a sweep anyway, none are needed.
    """

    def __init__(self, *, fixed: int | None = None, probes: int = 0):
        self._fixed, self._probes = fixed, probes
        self._right, self._wrong = PRIOR_RIGHT, PRIOR_WRONG
        self._plain: deque[float] = deque(maxlen=SAMPLES)
        self._step: deque[float] = deque(maxlen=SAMPLES)
        self._sweeps: dict[int, deque[float]] = {}
        self._pause, self._waited = FIRST_PAUSE, 0
        self._paused = False

    @property
    def acceptance(self) -> float:
        """Chance that a drafted token is right, as seen lately."""
        return self._right / (self._right + self._wrong)

    def begin(self) -> None:
        """A new text: what was seen of others counts little."""
        scale = (PRIOR_RIGHT + PRIOR_WRONG) / (self._right + self._wrong)
        if scale < 1:
            self._right, self._wrong = self._right * scale, self._wrong * scale
        self._pause, self._waited, self._paused = FIRST_PAUSE, 0, False

    def next(self, most: int) -> int:
        """Tokens to draft now, at most `most`; 0 = one plain step."""
        if most < 1:
            return 0
        if self._fixed is not None:
            return min(self._fixed, most)
        if self._probes > 0:
            self._probes -= 1
            return 0
        sizes = [size for size in SIZES if size <= most] or [most]
        if not self._sweeps or not self._step:
            return max(size for size in sizes if size <= max(FIRST_SIZE, sizes[0]))
        best = max(sizes, key=self.tokens_per_s)
        if self.tokens_per_s(best) >= self.plain_tokens_per_s:
            self._pause, self._paused = FIRST_PAUSE, False
            return best
        return self._rest(sizes[0])

    def _rest(self, smallest: int) -> int:
        """While it does not pay: seldom a short draft, to see whether it does again."""
        if not self._paused:
            self._paused, self._waited = True, 0
        self._waited += 1
        if self._waited < self._pause:
            return 0
        self._waited, self._pause = 0, min(2 * self._pause, LONGEST_PAUSE)
        return smallest

    def tokens_per_s(self, drafted: int) -> float:
        """Expected with so many drafted a round."""
        cost = drafted * statistics.median(self._step) + self._sweep(drafted)
        return expected_tokens(self.acceptance, drafted) / cost

    @property
    def plain_tokens_per_s(self) -> float:
        """One token at a time; as long as that was not measured, a sweep each."""
        if self._plain:
            return 1 / statistics.median(self._plain)
        return 1 / self._sweep(0)

    def _sweep(self, drafted: int) -> float:
        """Seconds of a sweep: of the nearest size seen."""
        rows = rows_for(drafted)
        nearest = min(self._sweeps, key=lambda seen: (abs(seen - rows), seen))
        return statistics.median(self._sweeps[nearest])

    def note_plain(self, seconds: float) -> None:
        """One token alone took so long."""
        self._plain.append(seconds)

    def note_draft(self, drafted: int, seconds: float) -> None:
        """So many were drafted in so long."""
        self._step.append(seconds / drafted)

    def note_sweep(self, drafted: int, seconds: float) -> None:
        """A sweep that verified so many took so long."""
        times = self._sweeps.setdefault(rows_for(drafted), deque(maxlen=SAMPLES))
        times.append(seconds)

    def note_accepted(self, drafted: int, accepted: int) -> None:
        """So many of the drafted tokens were right, up to the first wrong one."""
        self._right = self._right * FADING + accepted
        self._wrong = self._wrong * FADING + (accepted < drafted)
