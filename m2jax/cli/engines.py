"""Loads an engine with progress, and says so when memory runs out under it."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from m2jax.bundled import bundled_store
from m2jax.cli.compilation import keep_compiled
from m2jax.cli.errors import OutOfMemory, is_out_of_memory
from m2jax.cli.options import EngineOptions
from m2jax.cli.progress import Activity
from m2jax.cli.session import Session
from m2jax.units import format_bytes

if TYPE_CHECKING:
    from m2jax.engine import Engine

SMALLER = 0.8


@contextmanager
def open_engine(
    session: Session, store: Path | None, options: EngineOptions
) -> Iterator[tuple["Engine", Path]]:
    """An engine and its store's folder; the bundled model's where `store` is None.

    Raises:
        OutOfMemory: with the budgets, the need, and what to do.
    """
    engine = None
    try:
        with Activity(session.console, "load") as activity:
            keep_compiled()
            from m2jax.loading import load

            folder = bundled_store() if store is None else store
            engine = load(folder, **asdict(options), progress=activity.add)
        with engine:
            yield engine, folder
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise _out_of_memory(error, options, engine) from error


def _out_of_memory(
    error: Exception, options: EngineOptions, engine: "Engine | None"
) -> OutOfMemory:
    budgets = f"--hbm {options.hbm or 'unset'} and --dram {options.dram or 'unset'}"
    wanted = re.search(r"allocat\w* ([\d.]+ ?\w+)", str(error))
    what = f" (an allocation of {wanted[1]} failed)" if wanted else ""
    if engine is None:
        return OutOfMemory(
            f"out of memory while loading with {budgets}{what}; give smaller budgets, "
            'as "m2jax plan" shows them'
        )
    plan = engine.plan
    hbm, dram = plan.footprint.hbm, plan.footprint.dram
    return OutOfMemory(
        f"out of memory{what}: the plan needs {format_bytes(hbm)} of HBM "
        f"(budget {format_bytes(plan.hbm_budget_bytes)}) and {format_bytes(dram)} of "
        f"DRAM (budget {format_bytes(plan.dram_budget_bytes)}); try --hbm "
        f"{format_bytes(int(hbm * SMALLER)).replace(' ', '')}, or a --context below "
        f"{plan.context}"
    )
