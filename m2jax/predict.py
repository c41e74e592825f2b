"""Tokens a second to expect from bytes and bandwidths, with and without drafts.

Links work at the same time, so a pass takes as long as its slowest one; arithmetic is
taken to keep up. Numbers only.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from m2jax.layout import Layout
from m2jax.plan import MemoryPlan
from m2jax.units import parse_rate

# Drafted tokens that are compared.
SIZES = (3, 7, 15, 31, 63)
# Halvings of [0, 1]: a double has no finer one.
BISECTIONS = 53


def expected_tokens(acceptance: float, drafted: int) -> float:
    """Tokens of one sweep, if each drafted token is right with this chance:

    1 + a + .. + a^k
    """
    return sum(acceptance**place for place in range(drafted + 1))


@dataclass(frozen=True)
class Rates:
    """Bytes a second: SSD to DRAM, DRAM to device, and what the device reads of its
    own memory; infinity where that is not known."""

    ssd: float
    link: float
    hbm: float

    @classmethod
    def parse(cls, text: str) -> "Rates":
        """From "3GB,25GB,900GB".

        Raises:
            ValueError: not three sizes.
        """
        parts = text.split(",")
        if len(parts) != 3:
            raise ValueError(
                f"--rates {text}: want bytes a second of SSD, link and HBM, as in "
                "3GB,25GB,900GB"
            )
        return cls(*(parse_rate(part, name="--rates") or 0 for part in parts))


@dataclass(frozen=True)
class Moved:
    """Bytes of one pass over the layers.

    ssd, link: over each. hbm: read by the device.
    """

    ssd: float
    link: float
    hbm: float

    def seconds(self, rates: Rates) -> float:
        return max(self._each(rates).values())

    def bound(self, rates: Rates) -> str:
        """The link that takes longest: "ssd", "link" or "memory"."""
        each = self._each(rates)
        return max(each, key=lambda name: each[name])

    def _each(self, rates: Rates) -> dict[str, float]:
        return {
            "ssd": self.ssd / rates.ssd,
            "link": self.link / rates.link,
            "memory": self.hbm / rates.hbm,
        }


@dataclass(frozen=True)
class Passes:
    """What a plan's passes move.

    plain: one token. sweep: verifies a draft. draft: one drafted token.
    """

    plain: Moved
    sweep: Moved
    draft: Moved


def passes_of(
    plan: MemoryPlan,
    layout: Layout,
    *,
    kind: str,
    link_bytes: float | None = None,
    ssd_bytes: float | None = None,
) -> Passes:
    """Bytes of each pass under a plan.

    Args:
        kind: of draft: "base", "ngram", or another model (`plan.footprint.draft`).
        link_bytes: DRAM to device of a plain token, as replayed; None = no record hit.
        ssd_bytes: the same of SSD to DRAM; None = as planned.
    """
    place, foot = plan.placement, plan.footprint
    whole = [sum(map(layout.plane_bytes, planes)) for planes in place.used]
    streamed = sum(
        layout.plane_bytes(plane)
        for layer in range(len(place.used))
        for plane in place.streamed(layer)
    )
    base = len(whole) * layout.plane_bytes("q4") + foot.dense
    reads = {"base": base, "ngram": 0}.get(kind, foot.draft)
    link = plan.link_bytes_per_token if link_bytes is None else link_bytes
    return Passes(
        plain=Moved(
            plan.ssd_bytes_per_token if ssd_bytes is None else ssd_bytes,
            link,
            foot.dense + foot.records + link + plan.in_place_bytes_per_token,
        ),
        sweep=Moved(
            plan.ssd_bytes_per_token,
            0 if place.in_place else streamed,
            foot.dense + sum(whole),
        ),
        draft=Moved(0, 0, reads),
    )


@dataclass(frozen=True)
class Expected:
    """What drafting so many tokens a sweep gives at an acceptance.

    acceptance: chance that a drafted token is right. tokens_per_s: None without rates.
    """

    acceptance: float
    drafted: float
    tokens_per_sweep: float
    ssd_bytes_per_token: float
    link_bytes_per_token: float
    tokens_per_s: float | None


def expect(
    passes: Passes,
    acceptance: float,
    *,
    rates: Rates | None,
    sizes: Sequence[int] = SIZES,
) -> Expected:
    """With the number of drafted tokens that is best; without rates the largest."""
    return max(
        (
            _at(
                passes,
                acceptance,
                drafted,
                expected_tokens(acceptance, drafted),
                rates=rates,
            )
            for drafted in sizes
        ),
        key=lambda found: found.tokens_per_s or found.drafted,
    )


def expect_accepted(
    passes: Passes,
    accepted: float,
    drafted: float | None = None,
    *,
    rates: Rates | None,
) -> Expected:
    """Where so many drafted tokens of a sweep are right, as a run reports it.

    The acceptance follows.

    Args:
        accepted, drafted: tokens a sweep, on average. drafted: None = the least of
            SIZES that holds those that are right.

    Raises:
        ValueError: fewer than none, more than can be drafted, or more right than
            drafted.
    """
    if not 0 <= accepted <= SIZES[-1]:
        raise ValueError(
            f"--accepted {accepted:g}: want 0 to {SIZES[-1]} drafted tokens a sweep"
        )
    if drafted is None:
        drafted = next(size for size in SIZES if size >= accepted)
    # NaN is refused too.
    if not accepted <= drafted <= SIZES[-1]:
        raise ValueError(
            f"--drafted {drafted:g}: want {accepted:g} (those that are right) to "
            f"{SIZES[-1]} tokens a sweep"
        )
    low, high, most = 0.0, 1.0, ceil(drafted)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        if expected_tokens(middle, most) < accepted + 1:
            low = middle
        else:
            high = middle
    return _at(passes, high, drafted, accepted + 1, rates=rates)


def _at(
    passes: Passes,
    acceptance: float,
    drafted: float,
    tokens: float,
    *,
    rates: Rates | None,
) -> Expected:
    rate = None
    if rates is not None:
        cost = drafted * passes.draft.seconds(rates) + passes.sweep.seconds(rates)
        rate = tokens / cost
    return Expected(
        acceptance,
        drafted,
        tokens,
        passes.sweep.ssd / tokens,
        passes.sweep.link / tokens,
        rate,
    )
