"""What lies where: from sizes and budgets to a placement. Integers only.

Greedy by bytes saved a token per byte of HBM: first planes that every step wants whole,
then slots for the wanted set of each layer (S = K), then more slots, evenly.
"""

from dataclasses import dataclass, field

from m2jax.config import ModelConfig
from m2jax.errors import DoesNotFit
from m2jax.ffn import FfnSpec
from m2jax.kv import block_sizes, capacity_for, kv_bytes
from m2jax.layout import Layout
from m2jax.units import format_bytes

STAGING_BUFFERS = 2
DEFAULT_DISTANCE = 2


@dataclass(frozen=True)
class Placement:
    """Where each layer's records live while the engine runs.

    slots: plane to slots per layer: N = whole plane resident, 0 = streamed each step.
    whole: N, the records of a whole plane (padding included).
    dram_layers: layers that pass through DRAM, in order. fixed: how many of the first
    of them are pinned. ring: DRAM buffers for the others.
    """

    slots: dict[str, tuple[int, ...]]
    whole: int
    dram_layers: tuple[int, ...]
    fixed: int
    ring: int

    @property
    def resident(self) -> bool:
        """Everything the mix wants is on the device: decoding needs no host loop."""
        return not self.dram_layers

    def streamed(self, layer: int) -> list[str]:
        """Planes of a layer that are not wholly on the device."""
        return [p for p, slots in self.slots.items() if slots[layer] < self.whole]


@dataclass(frozen=True)
class Footprint:
    """Bytes by purpose. Device: dense, kv, records (planes and pools), staging."""

    dense: int
    kv: int
    records: int
    staging: int
    dram_fixed: int
    dram_ring: int

    @property
    def hbm(self) -> int:
        return self.dense + self.kv + self.records + self.staging

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


def make_plan(
    config: ModelConfig,
    layout: Layout,
    spec: FfnSpec,
    *,
    dense_bytes: int,
    context: int,
    hbm_bytes: int,
    dram_bytes: int,
    distance: int = DEFAULT_DISTANCE,
) -> MemoryPlan:
    """Fills the budgets.

    Args:
        dense_bytes: attention, norms, embeddings, scales: always on the device.
        context: positions the KV cache must hold.
        hbm_bytes, dram_bytes: what each tier may hold.
        distance: layers the SSD reads run ahead, as far as DRAM allows.

    Raises:
        DoesNotFit: naming the smallest budget that works.
    """
    planes = tuple(spec.wanted)
    layers = config.num_layers
    whole = layout.padded_neurons
    layer_bytes = sum(layout.plane_bytes(plane) for plane in planes)
    # The longest prompt is padded to whole blocks.
    capacity = capacity_for(sum(block_sizes(context)))
    cache_bytes = kv_bytes(config, capacity)
    always = dense_bytes + cache_bytes
    if always + layers * layer_bytes <= hbm_bytes:
        slots = dict.fromkeys(planes, (whole,) * layers)
        staging = 0
    else:
        staging = min(STAGING_BUFFERS, layers) * layer_bytes
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
        slots = _fill(layout, spec, layers=layers, room=hbm_bytes - smallest)
        # What became resident is never in transit: a second pass has its room.
        staging = STAGING_BUFFERS * max(
            sum(
                layout.plane_bytes(plane)
                for plane in planes
                if slots[plane][layer] < whole
            )
            for layer in range(layers)
        )
        slots = _fill(layout, spec, layers=layers, room=hbm_bytes - always - staging)
    passing = tuple(
        layer
        for layer in range(layers)
        if any(slots[plane][layer] < whole for plane in planes)
    )
    streamed = {
        layer: sum(
            layout.plane_bytes(plane) for plane in planes if slots[plane][layer] < whole
        )
        for layer in passing
    }
    fixed, ring = _split_dram(streamed, budget=dram_bytes, distance=distance)
    placement = Placement(slots, whole, passing, fixed, ring)
    pinned, passed = passing[:fixed], passing[fixed:]
    footprint = Footprint(
        dense=dense_bytes,
        kv=cache_bytes,
        records=sum(
            slots[plane][layer] * layout.record_bytes(plane)
            for plane in planes
            for layer in range(layers)
        ),
        staging=staging,
        dram_fixed=sum(streamed[layer] for layer in pinned),
        dram_ring=ring * max((streamed[layer] for layer in passed), default=0),
    )
    return MemoryPlan(
        placement=placement,
        footprint=footprint,
        hbm_budget_bytes=hbm_bytes,
        dram_budget_bytes=dram_bytes,
        context=context,
        ssd_bytes_per_token=sum(streamed[layer] for layer in passed),
        link_bytes_per_token=sum(
            (whole if spec.dense(plane) else spec.wanted[plane])
            * layout.record_bytes(plane)
            for layer in passing
            for plane in placement.streamed(layer)
        ),
    )


def _fill(
    layout: Layout, spec: FfnSpec, *, layers: int, room: int
) -> dict[str, tuple[int, ...]]:
    """Slots of every plane and layer within `room` bytes."""
    whole = layout.padded_neurons
    slots = {plane: [0] * layers for plane in spec.wanted}
    order = sorted(spec.wanted, key=lambda plane: not spec.dense(plane))
    for plane in order:
        least = whole if spec.dense(plane) else spec.wanted[plane]
        cost = least * layout.record_bytes(plane)
        for layer in range(layers):
            if cost <= room:
                slots[plane][layer] = least
                room -= cost
    growing = [plane for plane in order if min(slots[plane]) > 0]
    record = sum(
        layout.record_bytes(plane) for plane in growing if not spec.dense(plane)
    )
    if record and all(min(slots[plane]) > 0 for plane in order):
        for plane in growing:
            if spec.dense(plane):
                continue
            # Each plane takes its share of what is left, evenly over the layers.
            share = room * layout.record_bytes(plane) // record
            extra = share // (layers * layout.record_bytes(plane))
            grown = min(whole, spec.wanted[plane] + extra)
            slots[plane] = [grown] * layers
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
