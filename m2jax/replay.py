"""What a plan would move for recorded wanted sets, by policy. Numbers only.

Pools and policies are replayed by the engine's own directory (`cache.simulate`); planes
that are copied whole, and records of planes without a pool, are counted as the engine
copies them. Bytes agree with a run's, as integers.
"""

from dataclasses import dataclass
from functools import partial

import numpy as np

from m2jax.aligned import ALIGN_BYTES
from m2jax.cache.simulate import Pool, hit_ratio, simulate
from m2jax.cache.trace import Trace
from m2jax.demand import Demand
from m2jax.layout import Layout
from m2jax.plan import Placement
from m2jax.spans import spans

# LRU in pools of S = K slots: what the paper's adjacent-token update holds.
ATU = "atu"
REPLAYED = (ATU, "lru", "lfu", "random", "belady")


@dataclass(frozen=True)
class Replayed:
    """One policy over a trace, from cold.

    tokens: decode steps. accesses, hits, loads: records that are wanted by id, over all
    steps. link_bytes: DRAM to device over all steps, with whole planes and the padding
    of transfers. ssd_bytes: read from SSD, whole blocks, where DRAM keeps single
    records; None where it keeps layers, whatever the policy.
    """

    policy: str
    tokens: int
    accesses: int
    hits: int
    loads: int
    link_bytes: int
    ssd_bytes: int | None = None

    @property
    def hit_ratio(self) -> float | None:
        return hit_ratio(self.hits, self.accesses)

    @property
    def link_bytes_per_token(self) -> float:
        return self.link_bytes / self.tokens

    @property
    def ssd_bytes_per_token(self) -> float | None:
        return None if self.ssd_bytes is None else self.ssd_bytes / self.tokens


def named(demand: Demand) -> dict[Pool, int]:
    """Records that a step wants by id, by (layer, plane); what a trace records.

    Raises:
        ValueError: none.
    """
    found = {
        (layer, plane): count
        for layer, wanted in enumerate(demand.wanted)
        for plane, count in wanted.items()
        if count and not demand.dense(layer, plane)
    }
    if not found:
        raise ValueError(
            "this mix wants whole planes only: there are no wanted sets to record or "
            'to replay; "m2jax plan --rates" predicts its speed, or give another --mix'
        )
    return found


def check_trace(trace: Trace, demand: Demand) -> int:
    """Refuses a trace that is not of this demand.

    Returns:
        Its tokens, that is steps.

    Raises:
        ValueError: see `named`; or sets are missing, or of another size.
    """
    wanted = named(demand)
    hint = "give the --mix and --scorer that it was recorded with, or record it again"
    steps: dict[Pool, int] = dict.fromkeys(wanted, 0)
    for step, layer, plane, ids in trace.entries():
        where = f"the trace: step {step}, layer {layer}, plane {plane}"
        if (layer, plane) not in wanted:
            raise ValueError(f"{where}: the mix wants no such set; {hint}")
        if ids.size != wanted[layer, plane]:
            raise ValueError(
                f"{where}: {ids.size} records, the mix wants {wanted[layer, plane]}; "
                f"{hint}"
            )
        steps[layer, plane] += 1
    tokens = max(steps.values())
    for (layer, plane), count in steps.items():
        if count < tokens or not tokens:
            raise ValueError(
                f"the trace: has {count} sets of layer {layer}, plane {plane}, and "
                f"{tokens} of others; {hint}"
            )
    return tokens


def replay(
    trace: Trace,
    placement: Placement,
    demand: Demand,
    layout: Layout,
    *,
    policy: str,
    seed: int = 0,
) -> Replayed:
    """What the engine would have loaded under a placement.

    Args:
        policy: one of REPLAYED. seed: of "random".

    Raises:
        ValueError: see `check_trace`.
    """
    tokens = check_trace(trace, demand)
    pools: dict[Pool, int] = {}
    accesses = hits = link_bytes = 0
    for layer, wanted in enumerate(demand.wanted):
        for plane, count in wanted.items():
            slots, size = placement.slots[plane][layer], layout.record_bytes(plane)
            if demand.dense(layer, plane):
                if not slots and not placement.in_place:
                    link_bytes += tokens * layout.plane_bytes(plane)
            elif 0 < slots < placement.whole:
                pools[layer, plane] = count if policy == ATU else slots
            else:
                accesses += tokens * count
                hits += tokens * count * bool(slots)
                if not slots and not placement.in_place:
                    link_bytes += tokens * count * size
    pooled, direct = Trace(), Trace()
    for entry in trace.entries():
        if (entry.layer, entry.plane) in pools:
            pooled.record(*entry)
        elif not placement.slots[entry.plane][entry.layer]:
            direct.record(*entry)
    by = partial(
        simulate,
        neurons=demand.neurons,
        policy="lru" if policy == ATU else policy,
        seed=seed,
    )
    found = by(pooled, slots=pools)
    ssd_bytes = None
    if placement.dram_slots:
        # DRAM is asked for what the device lacks.
        for entry in found.missed.entries():
            direct.record(*entry)
        slots = {
            (layer, plane): count
            for plane, counts in placement.dram_slots.items()
            for layer, count in enumerate(counts)
        }
        ssd_bytes = _blocks(by(direct, slots=slots).missed, layout)
    accesses, hits = accesses + found.accesses, hits + found.hits
    return Replayed(
        policy=policy,
        tokens=tokens,
        accesses=accesses,
        hits=hits,
        loads=accesses - hits,
        link_bytes=link_bytes
        + sum(
            pool.rows * layout.record_bytes(plane)
            for (_, plane), pool in found.pools.items()
        ),
        ssd_bytes=ssd_bytes,
    )


def _blocks(missed: Trace, layout: Layout) -> int:
    """Bytes of direct reads of the records that are missed."""
    return sum(
        span.end - span.start
        for entry in missed.entries()
        for span in spans(
            np.sort(entry.wanted),
            record_bytes=layout.record_bytes(entry.plane),
            chunk_neurons=layout.chunk_neurons,
            block_bytes=ALIGN_BYTES,
        )
    )
