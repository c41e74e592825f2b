"""What the tests of drafts share: engines, prompts and the budgets that drafts need."""

from pathlib import Path
from typing import Any

import m2jax
from m2jax.engine import Engine
from tests.budgets import smallest

CONTEXT = 128
PROMPT = [1, 17, 5, 80]
GREEDY: dict[str, Any] = {}
SAMPLED: dict[str, Any] = {
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 0.95,
    "repetition_penalty": 1.1,
    "seed": 7,
}


def load(store: Path, **options) -> Engine:
    return m2jax.load(store, **{"mix": "25/25/50", "context": CONTEXT, **options})


def least_hbm(store: Path, mix: str, **options) -> int:
    """The least that `--draft base` works with."""
    return smallest(lambda: load(store, **options, mix=mix, draft="base", hbm=1))


def budgets(store: Path, mix: str) -> dict[str, int]:
    hbm = least_hbm(store, mix)
    dram = smallest(lambda: load(store, mix=mix, draft="base", hbm=hbm, dram=1))
    return {"hbm": hbm, "dram": dram}
