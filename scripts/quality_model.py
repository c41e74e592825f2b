"""A store under measurement: what mixes cost on texts to search and to judge on."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from m2jax.calibrate.evaluator import Evaluator
from m2jax.calibrate.search import Cost, search_mixes, total_cost
from m2jax.divergence import Divergence
from m2jax.engine import Engine
from m2jax.layer_mixes import format_mixes
from m2jax.loading import load
from m2jax.mix import ALL_16, PrecisionMix
from m2jax.store import open_store

TEXTS = Path(__file__).parent / "data" / "text"
JUDGED = ("python", "stories")


class Sizes:
    """How much is measured: everything, or next to nothing."""

    def __init__(self, *, toy: bool):
        self.toy = toy
        self.window = 32 if toy else 256
        self.judged_windows = 2 if toy else 12
        self.quantiser_windows = 1 if toy else 6
        self.search_windows = 1 if toy else 4
        self.calibration_tokens = 128 if toy else 8192
        self.joint_limit = 3 if toy else 10
        self.shares = (0, 50, 100) if toy else (0, 10, 25, 50, 100)
        self.epochs = 1 if toy else 15
        self.entropy_step = 50.0 if toy else 5.0


def cut(engine: Engine, name: str, *, length: int, count: int) -> list[list[int]]:
    """The first windows of a text, each behind a BOS where there is one."""
    tokenizer = engine.tokenizer
    assert tokenizer is not None
    ids = tokenizer.encode((TEXTS / f"{name}.txt").read_text(), add_bos=False)
    front = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    step = length - len(front)
    return [front + ids[n * step : (n + 1) * step] for n in range(count)]


def open_all(store: Path, window: int, **options: Any) -> Engine:
    return load(
        store,
        **{"mix": ALL_16, "scorer": "none", **options},
        planes=("q4", "r4", "w16"),
        context=window,
    )


class Model:
    """A store, its engine and what its mixes cost on every text."""

    def __init__(self, store: Path, sizes: Sizes, **options: Any):
        self.store, self.sizes = store, sizes
        self.engine = open_all(store, sizes.window, **options)
        self.layers = self.engine.config.num_layers
        self.judges = self.judges_of(sizes.judged_windows)
        both = [
            window
            for name in JUDGED
            for window in self._windows(f"{name}_calibration", sizes.search_windows)
        ]
        self.calibration = Evaluator(self.engine, both)
        self.probe = functools.cache(self.calibration.probe)
        self.joint = functools.cache(self.calibration.kl)
        self._judged: dict[tuple[str, str], dict[str, Any]] = {}

    def judges_of(self, windows: int) -> dict[str, Evaluator]:
        """One a text that quality is judged on, of so many windows."""
        return {
            name: Evaluator(self.engine, self._windows(name, windows))
            for name in JUDGED
        }

    def _windows(self, name: str, count: int) -> list[list[int]]:
        return cut(self.engine, name, length=self.sizes.window, count=count)

    def quality(
        self, mixes: Sequence[PrecisionMix], *, ranker: str = "base"
    ) -> dict[str, Any]:
        """Bits, bytes a token and, per text, the figures of `Divergence`."""
        key = (format_mixes(mixes), ranker)
        if key not in self._judged:
            texts = {}
            for name, judge in self.judges.items():
                judge.ranker = ranker
                figures = Divergence()
                figures.add(judge.compare(mixes))
                texts[name] = figures.summary()
            self._judged[key] = texts
        return {
            "mix": format_mixes(mixes),
            "bits": self.bits(mixes),
            "bytes_per_token": self.moved(mixes),
            "texts": self._judged[key],
        }

    def bits(self, mixes: Sequence[PrecisionMix]) -> float:
        return total_cost(mixes, self.bit_costs)

    @property
    def bit_costs(self) -> list[Cost]:
        share = 1 / self.layers
        return [Cost(16 * share, 8 * share, 4 * share)] * self.layers

    def moved(self, mixes: Sequence[PrecisionMix]) -> float:
        """Bytes of r4 and w16 records a token where none is hit, q4 being resident."""
        layout = open_store(self.store).layout
        costs = [
            Cost(
                layout.neurons * layout.record_bytes("w16"),
                layout.neurons * layout.record_bytes("r4"),
                0,
            )
        ]
        return total_cost(mixes, costs * self.layers)

    def same(self, mix: str) -> tuple[PrecisionMix, ...]:
        return (PrecisionMix.parse(mix),) * self.layers

    def searched(self, bits: float, *, skip: bool) -> tuple[PrecisionMix, ...]:
        return search_mixes(
            self.probe,
            self.joint,
            self.bit_costs,
            budget=bits,
            allow_skip=skip,
            shares=self.sizes.shares,
            joint_limit=self.sizes.joint_limit,
        ).mixes
