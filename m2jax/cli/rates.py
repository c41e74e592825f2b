"""Rates of a machine for predictions: as given, else as measured, and which it was."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from m2jax.cli.progress import Activity
from m2jax.cli.session import Session
from m2jax.cli.tables import size
from m2jax.units import parse_rate

if TYPE_CHECKING:
    from m2jax.bandwidths import Bandwidths
    from m2jax.predict import Rates

Ssd = Annotated[
    str | None,
    typer.Option(
        metavar="RATE",
        help="SSD to DRAM, as in 3GB/s. Unset: as doctor measured it here.",
        show_default=False,
    ),
]
Link = Annotated[
    str | None,
    typer.Option(
        metavar="RATE",
        help="DRAM to HBM, as in 25GB/s. Unset: as doctor measured it here.",
        show_default=False,
    ),
]
Memory = Annotated[
    str | None,
    typer.Option(
        metavar="RATE",
        help="What the device reads of its own memory, as in 900GB/s. Unset: as doctor "
        "measured it here, on a CPU; elsewhere no limit.",
        show_default=False,
    ),
]

GIVEN, KEPT, MEASURED = "given", "measured here before", "measured now"
UNKNOWN = "not known: taken to keep up"


def find_rates(
    session: Session,
    folder: Path,
    *,
    ssd: str | None,
    link: str | None,
    memory: str | None,
) -> tuple["Rates", dict[str, dict[str, Any]]]:
    """Those given, and for the others this machine's.

    Args:
        folder: on the disk whose rate counts.

    Returns:
        The rates; and by "ssd", "link", "memory": bytes_per_s (None = no limit), from.

    Raises:
        ValueError: no rate; or the disk's was not given and cannot be measured.
    """
    given = {
        "ssd": parse_rate(ssd, name="--ssd"),
        "link": parse_rate(link, name="--link"),
        "memory": parse_rate(memory, name="--memory"),
    }
    from m2jax.predict import Rates

    here, how = None, GIVEN
    if None in given.values():
        here, how = _here(session, folder)
    found = {}
    for name, rate in given.items():
        value = _of(here, name) if here and rate is None else rate
        if value is None and name == "ssd":
            raise ValueError(
                f"{folder}: its disk has no room to be measured; give --ssd, as in "
                "--ssd 3GB/s"
            )
        source = GIVEN if rate is not None else how if value is not None else UNKNOWN
        found[name] = {"bytes_per_s": value, "from": source}
    no_limit = float("inf")
    rates = Rates(*(entry["bytes_per_s"] or no_limit for entry in found.values()))
    return rates, found


def _here(session: Session, folder: Path) -> tuple["Bandwidths", str]:
    from m2jax.bandwidths import kept, recalled

    before = recalled(folder)
    if before is not None:
        return before, KEPT
    with Activity(session.console, "measuring this machine's rates", unit="steps"):
        return kept(folder), MEASURED


def _of(here: "Bandwidths", name: str) -> float | None:
    if name == "memory":
        return here.device_memory
    return here.best_ssd if name == "ssd" else here.best_link


def rate_rows(sources: dict[str, dict[str, Any]]) -> list[tuple[str, str]]:
    names = {"ssd": "SSD", "link": "link", "memory": "memory"}
    return [
        (
            names[name],
            f"{size(entry['bytes_per_s'])}/s, {entry['from']}"
            if entry["bytes_per_s"]
            else entry["from"],
        )
        for name, entry in sources.items()
    ]
