"""Plans for this machine: unset budgets filled in, refused where there is no room."""

import jax

from m2jax.arguments import as_integer, shown
from m2jax.config import ModelConfig
from m2jax.errors import DoesNotFit
from m2jax.layout import Layout
from m2jax.memory import default_budgets, free_device_bytes, free_dram_bytes
from m2jax.plan import DEFAULT_DISTANCE, LAYERS, Demand, MemoryPlan, make_plan
from m2jax.units import format_bytes

DEFAULT_CONTEXT = 4096


def plan_for(
    config: ModelConfig,
    layout: Layout,
    demand: Demand,
    *,
    dense_bytes: int,
    hbm: int | None,
    dram: int | None,
    context: int | None,
    distance: int = DEFAULT_DISTANCE,
    sequences: int = 1,
    beside: int = 0,
    in_place: bool | None = None,
    reads: str = LAYERS,
) -> MemoryPlan:
    """`make_plan` with unset budgets filled in from what is free.

    Args:
        beside: bytes on the device that a draft model takes of the budget.
        in_place: whether the device sees DRAM; None = a CPU does.
        reads: what a token reads from SSD, see `make_plan`.
    """
    free_hbm, free_dram = default_budgets()
    if context is None:
        context = min(config.context, DEFAULT_CONTEXT)
    context = as_integer(
        context,
        name="--context",
        low=1,
        high=config.context,
        want=f"1 to {config.context}, the model's own",
    )
    distance = as_integer(
        distance, name="--prefetch", want="a distance of 0 or more layers"
    )
    if in_place is not None and not isinstance(in_place, bool):
        raise ValueError(f"in_place {shown(in_place)}: want True, False or None")
    return make_plan(
        config,
        layout,
        demand,
        dense_bytes=dense_bytes,
        context=context,
        hbm_bytes=free_hbm if hbm is None else hbm,
        dram_bytes=free_dram if dram is None else dram,
        distance=distance,
        sequences=sequences,
        beside=beside,
        in_place=jax.default_backend() == "cpu" if in_place is None else in_place,
        reads=reads,
    )


def check_free(plan: MemoryPlan) -> None:
    """Refuses what this machine cannot hold, before anything is allocated.

    Raises:
        DoesNotFit: the plan needs more than is free (in a cgroup: than it allows).
    """
    need_hbm, need_dram = plan.footprint.hbm, plan.footprint.dram
    if jax.default_backend() == "cpu":
        need_hbm, need_dram = 0, need_hbm + need_dram
    for need, free, name in (
        (need_hbm, free_device_bytes(), "the device"),
        (need_dram, free_dram_bytes(), "this machine (or its memory cgroup)"),
    ):
        if need > free:
            raise DoesNotFit(
                f"the plan needs {format_bytes(need)}, {name} has "
                f"{format_bytes(free)} free; give smaller --hbm and --dram budgets"
            )
