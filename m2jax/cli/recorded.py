"""Where `m2jax simulate` finds the wanted sets that it replays."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from m2jax.cache.trace import Trace


@dataclass(frozen=True)
class Recorded:
    """A trace, the file it is from, and the mix it was recorded with, if known."""

    trace: "Trace"
    path: str
    mix: str | None = None


def read_trace(folder: Path, given: Path | None, *, neurons: int) -> Recorded:
    """The trace in the file that was given, or the one that the store keeps.

    Args:
        neurons: F of the model.

    Raises:
        ValueError: there is none, or it is of another model.
    """
    from m2jax.cache.trace import Trace
    from m2jax.store import open_store
    from m2jax.store.calibration import read_json_part, read_part

    if given is not None:
        try:
            return Recorded(Trace.load(given, neurons=neurons), str(given))
        except FileNotFoundError:
            raise ValueError(f"{given}: no such file; m2jax trace makes one") from None
        except IsADirectoryError:
            raise ValueError(f"{given}: a folder; want a trace's file") from None
    store = open_store(folder)
    part = read_part(store, "trace")
    if part is None:
        raise ValueError(
            f"{folder}: has no trace; give one made by m2jax trace, or run m2jax "
            "calibrate"
        )
    report = read_json_part(store, "report")
    path = part / "trace.npz"
    return Recorded(
        Trace.load(path, neurons=neurons),
        str(path),
        None if report is None else str(report["mix"]),
    )
