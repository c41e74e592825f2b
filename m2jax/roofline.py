"""How near a run came to what the machine can move, and where the rest went."""

from typing import Any

import jax

from m2jax.bandwidths import Bandwidths
from m2jax.engine import Engine
from m2jax.step_bytes import step_bytes
from m2jax.timeline import Timeline

# What the main thread does between the events it notes: Python, and dispatch.
HOST = "host"
COMPUTE = "compute"
# Compute that a timeline shows by names of its own.
COMPUTED = ("draft", "verify")


def roofline(
    engine: Engine,
    machine: Bandwidths,
    *,
    passes: float,
    drafted: float,
    ssd_bytes: float,
    link_bytes: float,
    positions: float,
    tokens_per_s: float,
    ssd_bytes_per_s: float | None = None,
) -> dict[str, Any]:
    """Least seconds a token by each link, which one bounds it, and percent reached.

        least_s = bytes a token / bytes a second;  bound_s = the largest of them

    A pass takes one token, a prompt or a draft that is verified through the layers, and
    reads of the device's memory at least what one token wants, once. Links work at the
    same time, and reads go on while tokens are drafted; on a CPU the copy to the
    "device" and its reads share the memory, so their times add up. Arithmetic is not in
    it, which is what long prompts of resident models take time for.

    The rates are measured too, so more than 100 percent is possible: the disk was
    faster in the run than beside it, or a CPU's caches held what counts as memory's.

    Args:
        passes, drafted: a token: passes over the layers, and drafted tokens.
        ssd_bytes, link_bytes: moved a token, as measured.
        positions: that a pass sees, on average.
        ssd_bytes_per_s: of the SSD in this run; None = the machine's best.

    Returns:
        bytes_per_token, bytes_per_s, least_s: by "ssd", "link" and "memory" (None where
        the rate is not known); bound: one of these; bound_s; percent.
    """
    step = step_bytes(engine.runner, engine.specs, positions)
    moved = {
        "ssd": ssd_bytes,
        "link": link_bytes,
        "memory": passes * step + drafted * engine.draft_bytes(positions),
    }
    rates = {
        "ssd": ssd_bytes_per_s or machine.best_ssd,
        "link": machine.best_link,
        "memory": machine.device_memory,
    }
    least = {name: moved[name] / rate if rate else None for name, rate in rates.items()}
    times = {name: seconds for name, seconds in least.items() if seconds is not None}
    if jax.default_backend() == "cpu":
        times["memory"] += times.pop("link")
    bound = max(times, key=lambda name: times[name])
    return {
        "bytes_per_token": moved,
        "bytes_per_s": rates,
        "least_s": least,
        "bound": bound,
        "bound_s": times[bound],
        "percent": 100 * tokens_per_s * times[bound],
    }


def where_time_went(
    timeline: Timeline, *, thread: str, wall_s: float, tokens: int
) -> dict[str, float]:
    """Milliseconds a token of each thing that the main thread did or waited for; drafts
    and their verification are compute.

    Args:
        wall_s: of the whole run. tokens: those of a prompt, or passes of a text.
    """
    spent = timeline.seconds(thread)
    computed = [spent.pop(name, 0.0) for name in (COMPUTE, *COMPUTED)]
    if any(computed):
        spent[COMPUTE] = sum(computed)
    spent[HOST] = wall_s - sum(spent.values())
    return {name: 1e3 * seconds / tokens for name, seconds in spent.items()}
