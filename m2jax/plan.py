"""What lies where: from demand and budgets to a placement. Integers only.

Greedy by bytes saved a token on the slowest link: first planes that every step wants
whole; then others whole, as long as DRAM does not hold the rest; then slots for the
wanted set of each layer (S = K), then more slots, evenly.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from m2jax.budgets import fill_slots, least_records, split_dram, split_records
from m2jax.config import ModelConfig
from m2jax.demand import Demand
from m2jax.errors import DoesNotFit
from m2jax.kv import block_sizes, capacity_for, kv_bytes
from m2jax.layout import PLANES, Layout
from m2jax.units import format_bytes

STAGING_BUFFERS = 2
DEFAULT_DISTANCE = 2
LAYERS, RECORDS = "layers", "records"


@dataclass(frozen=True)
class Placement:
    """Where each layer's records live while the engine runs.

    used: per layer, the planes that it uses at all.
    slots: plane to slots per layer: N = whole plane resident, 0 = streamed each step.
    whole: N, the records of a whole plane (padding included).
    dram_layers: layers that pass through DRAM, in order. fixed: how many of the first
    of them are pinned. ring: DRAM buffers for the others. in_place: the device sees
    DRAM, so that nothing is in transit.
    dram_slots: where tokens read single records, plane to slots in DRAM per layer; the
    ring is for prompts then. Else empty.
    """

    used: tuple[tuple[str, ...], ...]
    slots: dict[str, tuple[int, ...]]
    whole: int
    dram_layers: tuple[int, ...]
    fixed: int
    ring: int
    in_place: bool = False
    dram_slots: dict[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def resident(self) -> bool:
        """Everything the mix wants is on the device: decoding needs no host loop."""
        return not self.dram_layers

    def streamed(self, layer: int) -> list[str]:
        """Planes that a layer uses and that are not wholly on the device."""
        return [p for p in self.used[layer] if self.slots[p][layer] < self.whole]


@dataclass(frozen=True)
class Footprint:
    """Bytes by purpose. Device: dense, kv, records (planes and pools), staging, and
    draft (another model)."""

    dense: int
    kv: int
    records: int
    staging: int
    dram_fixed: int
    dram_ring: int
    dram_records: int = 0
    draft: int = 0

    @property
    def hbm(self) -> int:
        return self.dense + self.kv + self.records + self.staging + self.draft

    @property
    def dram(self) -> int:
        return self.dram_fixed + self.dram_ring + self.dram_records


@dataclass(frozen=True)
class MemoryPlan:
    """A placement and what it costs.

    hbm_budget_bytes, dram_budget_bytes: as asked, or what was free.
    ssd_bytes_per_token: read each step, exactly; of single records at most, that is
    if none hits, and whole blocks not counted. link_bytes_per_token: DRAM to device
    at most, that is if no sparse load hits. in_place_bytes_per_token: read by the
    device where they lie in DRAM. sequences: KV caches that may be held at once.
    """

    placement: Placement
    footprint: Footprint
    hbm_budget_bytes: int
    dram_budget_bytes: int
    context: int
    ssd_bytes_per_token: int
    link_bytes_per_token: int
    in_place_bytes_per_token: int = 0
    sequences: int = 1

    @property
    def positions(self) -> int:
        """Of the largest KV cache: the context, padded to whole blocks."""
        return sum(block_sizes(self.context))


def make_plan(
    config: ModelConfig,
    layout: Layout,
    demand: Demand,
    *,
    dense_bytes: int,
    context: int,
    hbm_bytes: int,
    dram_bytes: int,
    distance: int = DEFAULT_DISTANCE,
    sequences: int = 1,
    beside: int = 0,
    in_place: bool = False,
    reads: str = LAYERS,
) -> MemoryPlan:
    """Fills the budgets.

    Args:
        dense_bytes: attention, norms, embeddings, scales: always on the device.
        context: positions the KV cache must hold.
        hbm_bytes, dram_bytes: what each tier may hold.
        distance: layers the SSD reads run ahead, as far as DRAM allows.
        sequences: KV caches held at once.
        beside: device bytes of a draft model, within the budget.
        in_place: the device is a CPU: it needs no copy of what lies in DRAM.
        reads: what a token reads from SSD: "layers" whole, or the "records" that it
            wants and finds nowhere.

    Raises:
        DoesNotFit: naming the smallest budget that works.
    """
    layers = range(config.num_layers)
    whole = layout.padded_neurons
    used = tuple(tuple(p for p in PLANES if p in demand.wanted[n]) for n in layers)
    layer_bytes = [sum(map(layout.plane_bytes, planes)) for planes in used]
    # The longest prompt is padded to whole blocks.
    capacity = capacity_for(sum(block_sizes(context)))
    cache_bytes = sequences * kv_bytes(config, capacity)
    always = dense_bytes + cache_bytes + beside
    transit = partial(_in_transit, buffers=0 if in_place else STAGING_BUFFERS)
    by_record = reads == RECORDS
    # Where misses alone are read, pools save reads as well as whole planes do.
    enough = by_record and not in_place
    fill = partial(
        *(fill_slots, layout, demand),
        dram=sum(layer_bytes) if enough else dram_bytes,
        pools=not in_place,
    )

    def in_transit(slots: dict[str, tuple[int, ...]]) -> int:
        return transit(_streamed_bytes(layout, used, slots))

    if always + sum(layer_bytes) <= hbm_bytes:
        slots = {
            plane: tuple(whole if plane in used[layer] else 0 for layer in layers)
            for plane in demand.planes
        }
        staging = 0
    else:
        held = [
            [
                p
                for p in used[n]
                if p in demand.drafting or (by_record and demand.dense(n, p))
            ]
            for n in layers
        ]
        rest = _bytes_but(layout, used, held)
        staging = transit(rest)
        resident = sum(layer_bytes) - sum(rest)
        smallest = always + resident + staging
        if smallest > hbm_bytes:
            draft = beside + (resident if demand.drafting else 0)
            planes = 0 if demand.drafting else resident
            raise DoesNotFit(
                f"an HBM budget of {format_bytes(hbm_bytes)} is too small: the "
                f"smallest that works is {format_bytes(smallest, up=True)} "
                f"({smallest} bytes; dense part {format_bytes(dense_bytes)}, "
                f"KV cache for {context} positions {format_bytes(cache_bytes)}, "
                f"{f'draft {format_bytes(draft)}, ' if draft else ''}"
                f"{f'whole planes {format_bytes(planes)}, ' if planes else ''}"
                f"layers in transit {format_bytes(staging)}); "
                "a smaller --context or --dense needs less"
                f"{', and so does --reads layers' if planes else ''}"
            )
        # Of single records, `held` has every plane that is wanted whole already.
        if not by_record:
            staging = _transit_beside_whole(
                *(layout, demand, used, transit),
                room=hbm_bytes - always,
                otherwise=staging,
            )
        slots = fill(room=hbm_bytes - always - staging)
        # What became resident is never in transit: others have its room. If larger
        # layers are in transit then, not in place of what is resident.
        while (needed := in_transit(slots)) < staging:
            staging, kept = needed, slots
            slots = fill(room=hbm_bytes - always - staging)
            if in_transit(slots) > staging:
                slots = fill(room=hbm_bytes - always - staging, kept=kept)
    left = _streamed_bytes(layout, used, slots)
    streamed = {layer: size for layer, size in enumerate(left) if size}
    passing = tuple(streamed)
    # Two layers may be in use: in place they keep their buffers until all is computed.
    in_use, dram_slots = 1 + in_place, {}
    # Where tokens want nothing of what passes, there are no records to keep.
    wants = any(
        demand.wanted[layer][plane]
        for layer in passing
        for plane in used[layer]
        if slots[plane][layer] < whole
    )
    if by_record and wants and sum(left) > dram_bytes:
        fixed = 0
        ring, dram_slots = split_records(
            layout, demand, slots, streamed, budget=dram_bytes, used=in_use
        )
    else:
        fixed, ring = split_dram(
            streamed, budget=dram_bytes, used=in_use, distance=distance
        )
    placement = Placement(
        used, slots, whole, passing, fixed, ring, in_place, dram_slots
    )
    pinned, passed = passing[:fixed], passing[fixed:]
    from_dram = sum(
        least_records(layout, demand, layer, plane) * layout.record_bytes(plane)
        for layer in passing
        for plane in placement.streamed(layer)
    )
    footprint = Footprint(
        dense=dense_bytes,
        kv=cache_bytes,
        records=_slot_bytes(layout, slots),
        staging=staging,
        dram_fixed=sum(streamed[layer] for layer in pinned),
        dram_ring=ring * max((streamed[layer] for layer in passed), default=0),
        dram_records=_slot_bytes(layout, dram_slots),
        draft=beside,
    )
    return MemoryPlan(
        placement=placement,
        footprint=footprint,
        hbm_budget_bytes=hbm_bytes,
        dram_budget_bytes=dram_bytes,
        context=context,
        ssd_bytes_per_token=from_dram
        if dram_slots
        else sum(streamed[layer] for layer in passed),
        link_bytes_per_token=0 if in_place else from_dram,
        in_place_bytes_per_token=from_dram if in_place else 0,
        sequences=sequences,
    )


def _in_transit(layer_bytes: list[int], *, buffers: int) -> int:
    return sum(sorted(layer_bytes)[len(layer_bytes) - buffers :])


def _transit_beside_whole(
    layout: Layout,
    demand: Demand,
    used: tuple[tuple[str, ...], ...],
    transit: Callable[[list[int]], int],
    *,
    room: int,
    otherwise: int,
) -> int:
    """Bytes in transit when the first planes, wanted whole by all layers, are resident:
    what never moves needs no room to pass."""
    layers, staging = range(len(used)), otherwise
    for count, plane in enumerate(demand.planes, start=1):
        if not all(demand.dense(layer, plane) for layer in layers):
            break
        whole = demand.planes[:count]
        resident = len(used) * sum(map(layout.plane_bytes, whole))
        rest = transit(_bytes_but(layout, used, [whole] * len(used)))
        if resident + rest <= room:
            staging = rest
    return staging


def _bytes_but(
    layout: Layout,
    used: tuple[tuple[str, ...], ...],
    others: Sequence[Sequence[str]],
) -> list[int]:
    """Bytes of each layer's planes without some of its planes."""
    return [
        sum(layout.plane_bytes(p) for p in planes if p not in but)
        for planes, but in zip(used, others)
    ]


def _slot_bytes(layout: Layout, slots: Mapping[str, Sequence[int]]) -> int:
    """Of whole planes and pools."""
    return sum(
        count * layout.record_bytes(plane)
        for plane, counts in slots.items()
        for count in counts
    )


def _streamed_bytes(
    layout: Layout,
    used: tuple[tuple[str, ...], ...],
    slots: dict[str, tuple[int, ...]],
) -> list[int]:
    """Bytes of each layer's planes that are not wholly resident."""
    whole = layout.padded_neurons
    return [
        sum(layout.plane_bytes(p) for p in planes if slots[p][layer] < whole)
        for layer, planes in enumerate(used)
    ]
