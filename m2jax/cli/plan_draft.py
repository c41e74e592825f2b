"""What `m2jax plan` says of drafts: bytes a sweep, and tokens/s to expect."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from m2jax.cli.tables import number, share, size
from m2jax.layout import Layout

if TYPE_CHECKING:
    from m2jax.plan import MemoryPlan
    from m2jax.predict import Rates

# Chances that a drafted token is right, for which a plan says what follows.
ACCEPTANCES = (0.9, 0.95, 0.98)


def check_draft(draft: str) -> None:
    """Refuses what a plan cannot know.

    Raises:
        ValueError: another model, or no draft at all.
    """
    if draft not in ("auto", "base", "ngram", "none"):
        raise ValueError(f"--draft {draft}: want auto, base, ngram or none in a plan")


def draft_facts(
    made: "MemoryPlan",
    layout: Layout,
    *,
    kind: str,
    rates: "Rates | None",
    accepted: float | None = None,
    drafted: float | None = None,
) -> dict[str, Any]:
    """What a draft would give, by how often it is right.

    Args:
        accepted: drafted tokens of a sweep that are right; None: by ACCEPTANCES.
        drafted: with accepted; see `expect_accepted`.
    """
    from m2jax.predict import expect, expect_accepted, passes_of

    passes = passes_of(made, layout, kind=kind)
    facts: dict[str, Any] = {
        "kind": kind,
        "plain_tokens_per_s": None
        if rates is None
        else 1 / passes.plain.seconds(rates),
    }
    if kind != "none":
        facts["sweep_bytes"] = {
            "ssd_to_dram": passes.sweep.ssd,
            "dram_to_hbm": passes.sweep.link,
        }
        expected = (
            [expect(passes, acceptance, rates=rates) for acceptance in ACCEPTANCES]
            if accepted is None
            else [expect_accepted(passes, accepted, drafted, rates=rates)]
        )
        facts["expected"] = [asdict(found) for found in expected]
    return facts


def draft_rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    rows, plain = [("draft", facts["kind"])], facts["plain_tokens_per_s"]
    if plain is not None:
        rows.append(("  without", f"{number(plain, digits=2)} tokens/s predicted"))
    for found in facts.get("expected", ()):
        rate, drafted = found["tokens_per_s"], found["drafted"]
        rows.append(
            (
                f"  if {share(found['acceptance'])} is right",
                f"{drafted:g} drafted, {found['tokens_per_sweep']:.1f} tokens a "
                f"sweep; a token moves {size(int(found['ssd_bytes_per_token']))} from "
                f"SSD, {size(int(found['link_bytes_per_token']))} to HBM"
                + ("" if rate is None else f"; {number(rate, digits=2)} tokens/s"),
            )
        )
    return rows
