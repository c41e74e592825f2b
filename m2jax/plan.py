"""What lies where: from demand and budgets to a placement. Integers only.

Greedy by bytes saved a token per byte of HBM: first planes that every step wants whole,
then slots for the wanted set of each layer (S = K), then more slots, evenly.
"""

from dataclasses import dataclass, field

from m2jax.config import ModelConfig
from m2jax.demand import Demand
from m2jax.errors import DoesNotFit
from m2jax.kv import block_sizes, capacity_for, kv_bytes
from m2jax.layout import PLANES, Layout
from m2jax.units import format_bytes

STAGING_BUFFERS = 2
DEFAULT_DISTANCE = 2


@dataclass(frozen=True)
class Placement:
    """Where each layer's records live while the engine runs.

    used: per layer, the planes that it uses at all.
    slots: plane to slots per layer: N = whole plane resident, 0 = streamed each step.
    whole: N, the records of a whole plane (padding included).
    dram_layers: layers that pass through DRAM, in order. fixed: how many of the first
    of them are pinned. ring: DRAM buffers for the others.
    """

    used: tuple[tuple[str, ...], ...]
    slots: dict[str, tuple[int, ...]]
    whole: int
    dram_layers: tuple[int, ...]
    fixed: int
    ring: int

    @property
    def resident(self) -> bool:
        """Everything the mix wants is on the device: decoding needs no host loop."""
        return not self.dram_layers

    def is_resident(self, plane: str) -> bool:
        """Whether the plane is on the device whole, in every layer."""
        return all(count == self.whole for count in self.slots.get(plane, (0,)))

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
    draft: int = 0

    @property
    def hbm(self) -> int:
        return self.dense + self.kv + self.records + self.staging + self.draft

    @property
    def dram(self) -> int:
        return self.dram_fixed + self.dram_ring


@dataclass(frozen=True)
class MemoryPlan:
    """A placement and what it costs.

    hbm_budget_bytes, dram_budget_bytes: as asked, or what was free.
    ssd_bytes_per_token: read each step, exactly. link_bytes_per_token: DRAM to device
    at most, that is if no sparse load hits.
    """

    placement: Placement
    footprint: Footprint
    hbm_budget_bytes: int
    dram_budget_bytes: int
    context: int
    ssd_bytes_per_token: int
    link_bytes_per_token: int
    notes: tuple[str, ...] = field(default=())

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
) -> MemoryPlan:
    """Fills the budgets.

    Args:
        dense_bytes: attention, norms, embeddings, scales: always on the device.
        context: positions the KV cache must hold.
        hbm_bytes, dram_bytes: what each tier may hold.
        distance: layers the SSD reads run ahead, as far as DRAM allows.
        sequences: KV caches held at once.
        beside: device bytes of a draft model, within the budget.

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
    if always + sum(layer_bytes) <= hbm_bytes:
        slots = {
            plane: tuple(whole if plane in used[layer] else 0 for layer in layers)
            for plane in demand.planes
        }
        staging = 0
    else:
        staging = _two_in_transit(layer_bytes)
        smallest = always + staging
        if smallest > hbm_bytes:
            raise DoesNotFit(
                f"an HBM budget of {format_bytes(hbm_bytes)} is too small: the "
                f"smallest that works is {format_bytes(smallest, up=True)} "
                f"({smallest} bytes; dense part {format_bytes(dense_bytes)}, "
                f"KV cache for {context} positions {format_bytes(cache_bytes)}, "
                f"two layers in transit {format_bytes(staging)}); "
                "a smaller --context needs less"
            )
        staging = _transit_beside_whole(
            layout, demand, used, room=hbm_bytes - always, otherwise=staging
        )
        slots = _fill(layout, demand, room=hbm_bytes - always - staging)
        # What became resident is never in transit: a second pass has its room.
        staging = _two_in_transit(_streamed_bytes(layout, used, slots))
        slots = _fill(layout, demand, room=hbm_bytes - always - staging)
    left = _streamed_bytes(layout, used, slots)
    streamed = {layer: size for layer, size in enumerate(left) if size}
    passing = tuple(streamed)
    fixed, ring = _split_dram(streamed, budget=dram_bytes, distance=distance)
    placement = Placement(used, slots, whole, passing, fixed, ring)
    pinned, passed = passing[:fixed], passing[fixed:]
    footprint = Footprint(
        dense=dense_bytes,
        kv=cache_bytes,
        records=sum(
            count * layout.record_bytes(plane)
            for plane, counts in slots.items()
            for count in counts
        ),
        staging=staging,
        dram_fixed=sum(streamed[layer] for layer in pinned),
        dram_ring=ring * max((streamed[layer] for layer in passed), default=0),
        draft=beside,
    )
    return MemoryPlan(
        placement=placement,
        footprint=footprint,
        hbm_budget_bytes=hbm_bytes,
        dram_budget_bytes=dram_bytes,
        context=context,
        ssd_bytes_per_token=sum(streamed[layer] for layer in passed),
        link_bytes_per_token=sum(
            _least(layout, demand, layer, plane) * layout.record_bytes(plane)
            for layer in passing
            for plane in placement.streamed(layer)
        ),
    )


def _two_in_transit(layer_bytes: list[int]) -> int:
    return sum(sorted(layer_bytes)[-STAGING_BUFFERS:])


def _transit_beside_whole(
    layout: Layout,
    demand: Demand,
    used: tuple[tuple[str, ...], ...],
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
        rest = [sum(layout.plane_bytes(p) for p in u if p not in whole) for u in used]
        if resident + _two_in_transit(rest) <= room:
            staging = _two_in_transit(rest)
    return staging


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


def _least(layout: Layout, demand: Demand, layer: int, plane: str) -> int:
    """Records of a plane that a step copies or a pool must hold."""
    if demand.dense(layer, plane):
        return layout.padded_neurons
    return demand.wanted[layer].get(plane, 0)


def _fill(layout: Layout, demand: Demand, *, room: int) -> dict[str, tuple[int, ...]]:
    """Slots of every plane and layer within `room` bytes."""
    whole = layout.padded_neurons
    layers = range(len(demand.wanted))
    slots = {plane: [0] * len(layers) for plane in demand.planes}
    used = [(p, n) for p in demand.planes for n in layers if p in demand.wanted[n]]
    dense = [place for place in used if demand.dense(place[1], place[0])]
    pooled = [
        place
        for place in used
        if place not in dense and demand.wanted[place[1]][place[0]]
    ]
    for plane, layer in dense + pooled:
        least = _least(layout, demand, layer, plane)
        cost = least * layout.record_bytes(plane)
        if cost <= room:
            slots[plane][layer] = least
            room -= cost
    if all(slots[plane][layer] for plane, layer in dense + pooled):
        # Pools grow by the same number of slots each.
        growth = sum(layout.record_bytes(plane) for plane, _ in pooled)
        extra = room // growth if growth else 0
        for plane, layer in pooled:
            grown = min(whole, slots[plane][layer] + extra)
            room -= (grown - slots[plane][layer]) * layout.record_bytes(plane)
            slots[plane][layer] = grown
        for plane, layer in used:
            if not slots[plane][layer] and layout.plane_bytes(plane) <= room:
                slots[plane][layer] = whole
                room -= layout.plane_bytes(plane)
    return {plane: tuple(counts) for plane, counts in slots.items()}


def _split_dram(
    streamed: dict[int, int], *, budget: int, distance: int
) -> tuple[int, int]:
    """Layers pinned and ring buffers, for layers of the given bytes in order."""
    sizes = list(streamed.values())
    if sum(sizes) <= budget:
        return len(sizes), 0
    largest = max(sizes)
    ring = min(distance + 1, budget // largest, len(sizes))
    if ring < 1:
        raise DoesNotFit(
            f"a DRAM budget of {format_bytes(budget)} is too small: the smallest that "
            f"works is {format_bytes(largest, up=True)} ({largest} bytes, one layer)"
        )
    left = budget - ring * largest
    fixed = 0
    for size in sizes[: len(sizes) - ring]:
        if size > left:
            break
        left -= size
        fixed += 1
    return fixed, ring
