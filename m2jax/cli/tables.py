"""Rows of text in columns. Knows no units' owners and prints nothing."""

from collections.abc import Sequence

from m2jax.units import format_bytes

NOTHING = "n/a"


def columns(rows: Sequence[tuple[str, str]], *, indent: str = "") -> str:
    """Names and values, the values below one another."""
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{indent}{name.ljust(width)}  {value}" for name, value in rows)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table that also reads well as it is."""
    widths = [
        max(len(row[place]) for row in (header, *rows)) for place in range(len(header))
    ]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths)) + " |"
        for line in lines
    )


def size(count: float | None) -> str:
    """Bytes for people; "n/a" where nothing was counted."""
    return NOTHING if count is None else format_bytes(round(count))


def seconds(value: float | None) -> str:
    if value is None:
        return NOTHING
    return f"{value * 1000:.1f} ms" if value < 1 else f"{value:.2f} s"


def share(value: float | None) -> str:
    """A ratio in [0, 1] as a percentage."""
    return NOTHING if value is None else f"{100 * value:.1f} %"


def number(value: float | None, *, digits: int = 4) -> str:
    return NOTHING if value is None else f"{value:.{digits}f}"
