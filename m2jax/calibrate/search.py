"""Finds the precision mix of each layer with the least KL to the 16-bit model.

Decisions only: the model is two functions that measure a KL; knows no jax, no files.

    1. sweep   each layer alone, at mixes of two neighbouring classes
    2. add     those losses up; solve for the best mixes under the budget, exactly
    3. verify  on the whole model, beside uniform mixes of equal cost
    4. refine  weigh the sum by what was measured, solve again, measure; repeat
"""

from collections.abc import Callable, Sequence
from math import isfinite

import numpy as np

from m2jax.calibrate.additive import Additive, sweep, weights_of
from m2jax.calibrate.allocation import fits
from m2jax.calibrate.levels import (
    Cost,
    Levels,
    layer_cost,
    total_cost,
    uniform_mixes,
)
from m2jax.calibrate.meter import Found, Measured, Meter, Mixes, Progress
from m2jax.mix import PrecisionMix

__all__ = ["Cost", "Found", "Measured", "layer_cost", "search_mixes", "total_cost"]

SHARES = (0, 5, 10, 25, 50, 75, 100)
# The paper's: measured wherever it uses the budget up.
PAPER = PrecisionMix(25, 25, 50)
# A draw of weights often solves to mixes that were measured before.
MAX_DRAWS = 32


def search_mixes(
    probe: Callable[[int, PrecisionMix], float],
    joint: Callable[[Mixes], float],
    costs: Sequence[Cost],
    *,
    budget: float,
    planes: Sequence[str] = ("q4", "r4", "w16"),
    allow_skip: bool = False,
    min_kept: float = 0,
    shares: Sequence[float] = SHARES,
    step: float | None = 5,
    joint_limit: int = 24,
    seed: int = 0,
    progress: Progress = lambda done, total: None,
) -> Found:
    """The mixes of least measured KL under a budget; never worse than uniform ones.

    Calls `probe` layer by layer, at the default shares 12 times each (18 with
    skipping), and `joint` at most joint_limit times. If all neurons at the best class
    are within the budget, that is the answer, after one call of `joint`.

    Args:
        probe: KL where only this layer has the mix and all others are at 16 bits. The
            sweep is the same at any budget: `functools.cache` it to search for several.
        joint: KL with one mix a layer.
        costs: one a layer; the budget limits the sum of the layers' costs.
        budget: in the unit of costs; met up to 1e-9 of it.
        planes: of the store; they say which classes there are.
        allow_skip: whether neurons may be left out, down to min_kept percent.
        shares: percentages to sweep; 0 and 100 are added.
        step: percent between the shares that layers may get; losses between swept
            shares are interpolated. None: swept shares only.
        joint_limit: half of it at most goes to uniform mixes.
        seed: of the draws in step 4; the same measurements give the same result.
        progress: called with measurements made, and to be made at most.

    Raises:
        ValueError: a budget below the cheapest mixes; a wrong share, step or limit.
        NumericalError: a KL that is not finite; names the layer, or the mixes.
    """
    _check(costs, budget, joint_limit)
    levels = Levels.of_planes(planes, allow_skip=allow_skip, min_kept=min_kept)
    hundredths = [_hundredths(share, "share") for share in shares]
    fine = None if step is None else _hundredths(step, "step", least=1)
    total = Cost(*(sum(of) for of in zip(*costs)))
    cheapest = levels.cheapest()
    least = layer_cost(cheapest, total)
    if not fits(least, budget):
        hint = "" if allow_skip or not least else "; with --skip, less is possible"
        raise ValueError(
            f"a budget of {budget:g} is too small: the smallest possible is "
            f"{least:g}, with every layer at {cheapest}{hint}"
        )
    points = levels.points(hundredths)
    mixes = sweep(levels, points)
    meter = Meter(probe, joint, costs, progress, joint_limit)
    if fits(layer_cost(levels.highest(), total), budget):
        meter.measure((levels.highest(),) * len(costs))
        return meter.found(budget)

    meter.expect(len(costs) * len(mixes))
    swept = [[meter.probe(n, mix) for mix in mixes] for n in range(len(costs))]
    model = Additive.from_sweeps(levels, points, np.array(swept), costs, step=fine)
    alike = uniform_mixes(levels, hundredths, total, budget=budget)
    alike = _worth_measuring(model, alike)[: joint_limit // 2]
    for mix in alike:
        meter.measure((mix,) * len(costs))
    first = model.solve(budget=budget)
    candidate = meter.measure(first)
    _refine(meter, model, budget, limit=joint_limit, seed=seed)
    return meter.found(budget, estimate=model.estimate(first), candidate=candidate)


def _check(costs: Sequence[Cost], budget: float, joint_limit: int) -> None:
    for layer, cost in enumerate(costs):
        if not (isfinite(sum(cost)) and cost.of16 >= cost.of8 >= cost.of4 >= 0):
            raise ValueError(
                f"layer {layer}: {cost}: want costs from 0 that grow with the bits"
            )
    if not costs:
        raise ValueError("no costs: want one a layer")
    if not isfinite(budget):
        raise ValueError(f"budget {budget}: want a finite number")
    if joint_limit < 2:
        raise ValueError(
            f"joint_limit {joint_limit}: want 2 or more, for a uniform mix and another"
        )


def _hundredths(percent: float, name: str, *, least: int = 0) -> int:
    if not least / 100 <= percent <= 100:
        raise ValueError(
            f"{name} {percent}: want a percentage from {least / 100:g} to 100"
        )
    return round(percent * 100)


def _worth_measuring(
    model: Additive, mixes: Sequence[PrecisionMix]
) -> list[PrecisionMix]:
    """The plain one (fewest at 16 bits and skipped), the paper's, then by estimate."""

    def rank(mix: PrecisionMix) -> tuple[int, float]:
        return (mix != plain) + (mix not in (plain, PAPER)), estimates[mix]

    layers = len(model.base)
    estimates = {mix: model.estimate([mix] * layers) for mix in mixes}
    plain = min(
        mixes,
        key=lambda mix: (-mix.percent16 - mix.percent8 - mix.percent4, mix.percent16),
    )
    return sorted(mixes, key=rank)


def _refine(
    meter: Meter, model: Additive, budget: float, *, limit: int, seed: int
) -> None:
    """Measures what the weighted sum thinks best, learning from each measurement.

    First at the most probable weights; if that was measured before, at weights drawn
    from those still possible (Thompson sampling), which moves shares between the
    layers and classes that the measurements say least of.
    """
    random = np.random.default_rng(seed)
    while len(meter.seen) < limit and meter.best.kl > 0:
        losses = np.stack([model.losses(mixes) for mixes in meter.seen])
        kls = np.array([measured.kl for measured in meter.seen.values()])
        for draw in range(MAX_DRAWS):
            weights = weights_of(losses, kls, random if draw else None)
            mixes = model.solve(weights, budget=budget)
            if mixes not in meter.seen:
                meter.measure(mixes)
                break
        else:
            return
