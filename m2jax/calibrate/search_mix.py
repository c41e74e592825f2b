"""`search-mix`: the precision mix of a store for a budget, measured on text and kept.

Puts the pieces together: text to windows, the model that measures, the search that
decides, the store that keeps. Prints nothing.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from m2jax.calibrate.entropy import search_three
from m2jax.calibrate.evaluator import Evaluator
from m2jax.calibrate.own_text import OwnText
from m2jax.calibrate.search import Cost, search_mixes, total_cost
from m2jax.calibrate.text import calibration_windows, check_window
from m2jax.engine import Engine
from m2jax.errors import TierFailed
from m2jax.layer_mixes import format_mixes
from m2jax.layout import Layout
from m2jax.loading import load
from m2jax.mix import ALL_16, PrecisionMix
from m2jax.preparing import check_planes
from m2jax.store import open_store
from m2jax.store.calibration import check_writable, write_json_part

DEFAULT_TOKENS = 4096
DEFAULT_WINDOW = 256
OBJECTIVES = ("kl", "entropy")
# Of the entropy objective: prompts from the text, and what is generated after each.
PROMPT_TOKENS = 16
PROMPTS = 8
NEW_TOKENS = 64


class NotKept(TierFailed):
    """A mix was found, and the store could not take it; `facts` has all of it."""

    def __init__(self, error: OSError | ValueError, facts: dict[str, Any]):
        super().__init__(
            f"{error}; mix {facts['mix']} was found and not kept: give it as --mix",
            path=getattr(error, "path", None),
        )
        self.facts = facts


# What is being done, measurements made and to be made.
Progress = Callable[[str, int, int], None]


def search_mix(
    store: str | Path,
    text: str,
    *,
    bits: float | None = None,
    bytes_per_token: int | None = None,
    objective: str = "kl",
    scorer: str = "base",
    allow_skip: bool = False,
    tokens: int = DEFAULT_TOKENS,
    window: int = DEFAULT_WINDOW,
    hbm: str | int | None = None,
    dram: str | int | None = None,
    keep: bool = True,
    progress: Progress = lambda what, done, total: None,
) -> dict[str, Any]:
    """Finds a mix within a budget and keeps it as the store's own.

    Args:
        text: calibration text, unlike any that quality is judged on.
        bits: most bits a feed-forward weight has on average, skipped ones included.
        bytes_per_token: most bytes that records of planes r4 and w16 take a token if
            none is hit; plane q4 is taken to be resident. One of these two.
        objective: "kl": least KL to the 16-bit model, layer by layer. "entropy": the
            paper's algorithm 1 on the model's own text, one mix for all layers, of the
            classes that the planes allow; with bits alone, and nothing skipped.
        scorer: what ranks: "base", "gate" or "lowrank".
        allow_skip: whether neurons may be left out.
        tokens, window: how much of the text is used, in windows of this length.
        keep: writes the mix into the store's calibration part.

    Returns:
        mix, objective, budget, unit, cost, kl or entropy, uniform (the best mix that
        is the same in all layers), and every measurement.

    Raises:
        ValueError: a wrong option, a text that does not serve, a budget that no mix
            meets. StoreError: the store is damaged or cannot be written.
            NotKept: it could not when the mix was found. NumericalError: NaN; names
            the layer.
    """
    _check(bits, bytes_per_token, objective, scorer)
    if objective == "entropy":
        _check_entropy(bits, allow_skip=allow_skip)
    opened = open_store(store)
    check_planes(opened, ("q4", "w16"))
    if keep:
        check_writable(opened)
    check_window(window, opened.config.context)
    costs, budget = _costs(
        opened.layout, opened.config.num_layers, opened.planes, bits, bytes_per_token
    )
    with load(
        store,
        mix=ALL_16 if scorer != "lowrank" else PrecisionMix(50, 0, 0),
        scorer=scorer if scorer == "lowrank" else "none",
        planes=opened.planes,
        context=window,
        hbm=hbm,
        dram=dram,
    ) as engine:
        windows = calibration_windows(
            engine.tokenizer, text, length=window, tokens=tokens
        )
        options = {"objective": objective, "scorer": scorer, "tokens": tokens}
        if objective == "entropy":
            assert bits is not None
            facts = _by_entropy(engine, windows, opened.planes, scorer, bits, progress)
            facts["cost"] = total_cost(facts.pop("mixes"), costs)
        else:
            facts = _by_kl(
                Evaluator(engine, windows, ranker=scorer),
                costs,
                budget,
                planes=opened.planes,
                allow_skip=allow_skip,
                progress=progress,
            )
    facts |= {
        **options,
        "budget": budget,
        "unit": "bits a weight" if bytes_per_token is None else "bytes a token",
        "window": window,
        "text_sha256": hashlib.sha256(text.encode()).hexdigest(),
    }
    if keep:
        try:
            write_json_part(opened, "mix", facts)
        except (OSError, ValueError) as error:
            raise NotKept(error, facts) from error
    return facts


def _check(
    bits: float | None, bytes_per_token: int | None, objective: str, scorer: str
) -> None:
    if (bits is None) == (bytes_per_token is None):
        raise ValueError("give a budget: --bits or --bytes-per-token, one of them")
    if objective not in OBJECTIVES:
        raise ValueError(f"objective {objective!r}: want one of {OBJECTIVES}")
    if scorer not in ("base", "gate", "lowrank"):
        raise ValueError(f"scorer {scorer!r}: want base, gate or lowrank")
    if bits is not None and not 0 < bits <= 16:
        raise ValueError(f"--bits {bits:g}: want more than 0 and at most 16")


def _check_entropy(bits: float | None, *, allow_skip: bool) -> None:
    if bits is None:
        raise ValueError("objective entropy wants its budget as --bits")
    if allow_skip:
        raise ValueError("--skip goes with --objective kl: entropy skips no neuron")
    if bits < 4:
        raise ValueError(
            f"--bits {bits:g}: want 4 to 16, since --objective entropy skips no neuron"
        )


def _costs(
    layout: Layout,
    layers: int,
    planes: tuple[str, ...],
    bits: float | None,
    bytes_per_token: int | None,
) -> tuple[list[Cost], float]:
    """What classes cost in each layer, and the most that all may cost together."""
    if bits is not None:
        return [Cost(16 / layers, 8 / layers, 4 / layers)] * layers, float(bits)
    assert bytes_per_token is not None
    of16 = layout.neurons * layout.record_bytes("w16")
    of8 = layout.neurons * layout.record_bytes("r4") if "r4" in planes else 0
    return [Cost(of16, of8, 0)] * layers, float(bytes_per_token)


def _by_kl(
    evaluator: Evaluator,
    costs: list[Cost],
    budget: float,
    *,
    planes: tuple[str, ...],
    allow_skip: bool,
    progress: Progress,
) -> dict[str, Any]:
    found = search_mixes(
        evaluator.probe,
        evaluator.kl,
        costs,
        budget=budget,
        planes=planes,
        allow_skip=allow_skip,
        progress=lambda done, total: progress("measuring mixes", done, total),
    )
    return {
        "mix": format_mixes(found.best.mixes),
        "kl": found.best.kl,
        "cost": found.best.cost,
        "uniform": {
            "mix": format_mixes(found.uniform.mixes),
            "kl": found.uniform.kl,
            "cost": found.uniform.cost,
        },
        "measured": [
            {"mix": format_mixes(one.mixes), "cost": one.cost, "kl": one.kl}
            for one in found.evaluated
        ],
    }


def _by_entropy(
    engine: Engine,
    windows: list[list[int]],
    planes: tuple[str, ...],
    scorer: str,
    bits: float,
    progress: Progress,
) -> dict[str, Any]:
    # Names the layer that gives NaN; the entropy cannot.
    Evaluator(engine, windows[:PROMPTS]).reference()
    own = OwnText(
        engine,
        [window[:PROMPT_TOKENS] for window in windows[:PROMPTS]],
        ranker=scorer,
        new_tokens=NEW_TOKENS,
    )
    found = search_three(
        own.entropy,
        bits=bits,
        planes=planes,
        progress=lambda done, total: progress("generating text", done, total),
    )
    mixes = (found.best.mix,) * engine.config.num_layers
    return {
        "mix": format_mixes(mixes),
        "mixes": mixes,
        "entropy": found.best.entropy,
        "measured": [
            {"mix": str(point.mix), "entropy": point.entropy} for point in found.points
        ],
    }
