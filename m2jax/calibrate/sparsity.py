"""How sparse a layer is on real text, and what that means for a cache. NumPy only.

Fed window by window with importances |h16| ||down16||; keeps sums, not activations,
but for the wanted sets of a bounded number of tokens.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from m2jax.cache.simulate import SIMULATED_POLICIES, simulate
from m2jax.cache.trace import Trace

SHARES = (5, 10, 25, 50)
HELD = (90, 95, 99)
UNIONS = (4, 16, 64)
UNION_SHARES = (10, 25)
# Tokens whose wanted sets are kept to order neurons by.
ORDER_TOKENS = 4096
ORDER_SHARE = 25
# Cache sizes, as multiples of the wanted set, whose hit ratio is simulated.
CACHE_SIZES = (1.0, 1.25, 1.5, 2.0, 3.0)
SIMULATED_STEPS = 512


def top_sets(importance: np.ndarray, percent: float) -> np.ndarray:
    """bool [T, F]: the top neurons of each token, at least one; zeros are in none."""
    neurons = importance.shape[1]
    count = max(1, int(neurons * percent / 100 + 0.5))
    if count >= neurons:
        return importance > 0
    places = np.argpartition(-importance, count - 1, axis=1)[:, :count]
    found = np.zeros(importance.shape, bool)
    np.put_along_axis(found, places, True, axis=1)
    return found & (importance > 0)


class LayerSparsity:
    """Sums over the tokens of one layer."""

    def __init__(self, neurons: int):
        self._neurons = neurons
        self._tokens = self._zeros = self._pairs = 0
        self._held = dict.fromkeys(HELD, 0.0)
        self._overlap = dict.fromkeys(SHARES, 0.0)
        self._unions: dict[tuple[int, int], list[float]] = {}
        self._counts = np.zeros(neurons, np.int64)
        self._values: list[np.ndarray] = []
        self._sets: list[np.ndarray] = []
        self._kept = 0

    def add(self, importance: np.ndarray) -> None:
        """Notes a window of adjacent tokens, float32 [T, F]; 0 = activation zero."""
        tokens = len(importance)
        self._tokens += tokens
        self._zeros += int(np.count_nonzero(importance == 0))
        energy = -np.sort(-np.square(importance.astype(np.float64)), axis=1)
        total = energy.sum(axis=1, keepdims=True)
        running = np.cumsum(energy, axis=1) / np.maximum(total, 1e-300)
        for percent in HELD:
            needed = 1 + (running < percent / 100 - 1e-12).sum(axis=1)
            self._held[percent] += float(np.where(total[:, 0] > 0, needed, 0).sum())
        # Evenly spaced quantiles of each token stand for its values.
        places = np.linspace(0, self._neurons - 1, 101).astype(int)
        self._values.append(-np.sort(-importance, axis=1)[:, places].mean(axis=0))
        for percent in SHARES:
            sets = top_sets(importance, percent)
            both = (sets[1:] & sets[:-1]).sum(axis=1)
            either = np.maximum(sets[1:].sum(axis=1), 1)
            self._overlap[percent] += float((both / either).sum())
            if percent == 10:
                self._counts += sets.sum(axis=0)
            if percent in UNION_SHARES:
                self._add_unions(sets, percent)
            if percent == ORDER_SHARE and self._kept < ORDER_TOKENS:
                self._sets.append(np.packbits(sets, axis=1))
                self._kept += tokens
        self._pairs += tokens - 1

    def _add_unions(self, sets: np.ndarray, percent: int) -> None:
        for width in UNIONS:
            whole = len(sets) // width * width
            if whole:
                runs = sets[:whole].reshape(-1, width, self._neurons).any(axis=1)
                shares = runs.mean(axis=1)
                self._unions.setdefault((percent, width), []).extend(shares.tolist())

    def facts(self) -> dict[str, Any]:
        """JSON values.

        zero_share: of activations exactly zero. neurons_for_90, _95, _99: mean share
        of neurons that hold so many percent of a token's sum of squares. overlap: share
        of a token's top set that the token before wanted too. union: share of neurons
        in the top sets of so many adjacent tokens. top_10_taken_by: share of all
        top-10 % places that the most wanted 10 and 25 % of neurons take. gini: of how
        often a neuron is in the top 10 %. threshold: mean importance at that rank.
        """
        counts = np.sort(self._counts)[::-1].astype(np.float64)
        total = max(counts.sum(), 1.0)
        tenth, quarter = (max(1, round(self._neurons * s)) for s in (0.1, 0.25))
        values = np.mean(self._values, axis=0)
        ascending = counts[::-1]
        ranks = np.arange(1, self._neurons + 1)
        gini = float((2 * ranks - self._neurons - 1) @ ascending)
        return {
            "zero_share": self._zeros / (self._tokens * self._neurons),
            **{
                f"neurons_for_{percent}": held / (self._tokens * self._neurons)
                for percent, held in self._held.items()
            },
            "overlap": {
                str(percent): shared / max(1, self._pairs)
                for percent, shared in self._overlap.items()
            },
            "union": {
                str(percent): {
                    str(width): float(np.mean(self._unions[percent, width]))
                    if (percent, width) in self._unions
                    else None
                    for width in UNIONS
                }
                for percent in UNION_SHARES
            },
            "top_10_taken_by": {
                "10": float(counts[:tenth].sum() / total),
                "25": float(counts[:quarter].sum() / total),
            },
            "gini": gini / (self._neurons * total),
            "threshold": {str(percent): float(values[percent]) for percent in SHARES},
        }

    def order(self) -> np.ndarray:
        """int32 [F]: neurons that are wanted together stand together.

        By the first principal direction of who is wanted when, after taking out how
        often each is: a spectral order in the time of a few matrix products.
        """
        if not self._sets:
            return np.arange(self._neurons, dtype=np.int32)
        packed = np.concatenate(self._sets)
        sets = np.unpackbits(packed, axis=1, count=self._neurons).astype(np.float32)
        sets -= sets.mean(axis=0, keepdims=True)
        scale = np.sqrt(np.square(sets).sum(axis=0, keepdims=True))
        sets /= np.maximum(scale, 1e-9)
        direction = np.random.default_rng(0).normal(size=self._neurons)
        direction = direction.astype(np.float32)
        for _ in range(30):
            direction = sets.T @ (sets @ direction)
            direction /= max(float(np.linalg.norm(direction)), 1e-30)
        return np.argsort(direction, kind="stable").astype(np.int32)


def chunk_reads(
    order: np.ndarray, wanted: Sequence[np.ndarray], chunk_neurons: int
) -> float:
    """Mean share of chunks that hold a wanted neuron, for records in an order."""
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    chunks = -(-len(order) // chunk_neurons)
    return float(
        np.mean(
            [len(np.unique(place[ids] // chunk_neurons)) / chunks for ids in wanted]
        )
    )


def expected_hits(trace: Trace, neurons: int) -> list[dict[str, Any]]:
    """Hit ratio of every policy at several numbers of slots, by replay.

    Of the first steps of the trace; the same number of slots in every layer.
    """
    short = Trace()
    most: dict[str, int] = {}
    for entry in trace.entries():
        if entry.step < SIMULATED_STEPS:
            short.record(*entry)
            most[entry.plane] = max(most.get(entry.plane, 0), entry.wanted.size)
    rows = []
    for plane, wanted in most.items():
        of_plane = Trace()
        for entry in short.entries():
            if entry.plane == plane:
                of_plane.record(*entry)
        slots = {min(neurons, round(times * wanted)) for times in CACHE_SIZES}
        for count in sorted(slots):
            ratios = {
                policy: simulate(
                    of_plane, neurons=neurons, slots=count, policy=policy
                ).hit_ratio
                for policy in SIMULATED_POLICIES
            }
            rows.append(
                {"plane": plane, "slots": count, "share": count / neurons, **ratios}
            )
    return rows
