"""How budgets are filled: slots on the device, layers in DRAM. Integers only."""

from collections.abc import Mapping, Sequence

from m2jax.demand import Demand
from m2jax.errors import DoesNotFit
from m2jax.layout import Layout
from m2jax.units import format_bytes


def least_records(layout: Layout, demand: Demand, layer: int, plane: str) -> int:
    """Records of a plane that a step copies or a pool must hold."""
    if demand.dense(layer, plane):
        return layout.padded_neurons
    return demand.wanted[layer].get(plane, 0)


def fill_slots(
    layout: Layout,
    demand: Demand,
    *,
    room: int,
    dram: int,
    pools: bool,
    kept: Mapping[str, Sequence[int]] | None = None,
) -> dict[str, tuple[int, ...]]:
    """Slots of every plane and layer within `room` bytes.

    First planes that every step wants whole. Then others whole, until what is left fits
    DRAM: a slot saves bytes of the SSD only with all others of its plane. Then pools.

    Args:
        dram: bytes that DRAM may hold.
        pools: whether slots for some neurons save anything; not where the device sees
            DRAM.
        kept: slots whose whole planes come before all others.
    """
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
    left = sum(layout.plane_bytes(plane) for plane, _ in used)

    def take(plane: str, layer: int, count: int) -> None:
        nonlocal room, left
        more = count - slots[plane][layer]
        cost = more * layout.record_bytes(plane)
        if more and cost <= room:
            slots[plane][layer] = count
            room -= cost
            left -= layout.plane_bytes(plane) * (count == whole)

    first = [(p, n) for p, n in used if kept and kept[p][n] == whole]
    for plane, layer in first + dense:
        take(plane, layer, whole)
    for plane, layer in sorted(pooled, key=lambda place: place[1]):
        if left > dram:
            take(plane, layer, whole)
    others = [place for place in pooled if not slots[place[0]][place[1]]]
    if pools:
        for plane, layer in others:
            take(plane, layer, least_records(layout, demand, layer, plane))
    if all(slots[plane][layer] for plane, layer in dense + pooled):
        # Pools grow by the same number of slots each. One that no neuron is without
        # saves reads only as a whole plane; the largest are the likeliest to become it.
        growth = sum(layout.record_bytes(plane) for plane, _ in others)
        extra = room // growth if growth else 0
        others.sort(key=lambda place: -slots[place[0]][place[1]])
        for plane, layer in others:
            most = min(demand.neurons, slots[plane][layer] + extra)
            take(plane, layer, most)
        for plane, layer in others + used:
            if slots[plane][layer] in (0, demand.neurons):
                take(plane, layer, whole)
    return {plane: tuple(counts) for plane, counts in slots.items()}


def split_dram(
    streamed: dict[int, int], *, budget: int, used: int, distance: int
) -> tuple[int, int]:
    """Layers pinned and ring buffers, for layers of the given bytes in order.

    Args:
        used: layers whose buffers are in use at once.
    """
    sizes = list(streamed.values())
    if sum(sizes) <= budget:
        return len(sizes), 0
    largest = max(sizes)
    ring = min(distance + used, budget // largest, len(sizes))
    if ring < used:
        need = min(used * largest, sum(sizes))
        raise _too_small(budget, need, _layers(used))
    left = budget - ring * largest
    fixed = 0
    for size in sizes[: len(sizes) - ring]:
        if size > left:
            break
        left -= size
        fixed += 1
    return fixed, ring


def split_records(
    layout: Layout,
    demand: Demand,
    slots: Mapping[str, Sequence[int]],
    streamed: Mapping[int, int],
    *,
    budget: int,
    used: int,
) -> tuple[int, dict[str, tuple[int, ...]]]:
    """Ring buffers, and slots in DRAM of every plane that is not on the device whole.

    One buffer more than are in use: prompts are read ahead, tokens need none. Then
    slots for the wanted set of each layer, then more, the same number each.

    Args:
        slots: on the device. streamed: layers that pass through DRAM, and their bytes.
        used: layers whose buffers are in use at once.

    Raises:
        DoesNotFit: naming the smallest budget that works.
    """
    whole = layout.padded_neurons
    places = [
        (plane, layer)
        for layer in streamed
        for plane, count in demand.wanted[layer].items()
        if count and slots[plane][layer] < whole
    ]
    count = {(p, n): least_records(layout, demand, n, p) for p, n in places}
    least = sum(n * layout.record_bytes(p) for (p, _), n in count.items())
    largest = max(streamed.values())
    if used * largest + least > budget:
        what = f"{_layers(used)} for prompts, slots for what a token wants"
        need = min(used * largest + least, sum(streamed.values()))
        raise _too_small(budget, need, what)
    ring = min(used + 1, (budget - least) // largest, len(streamed))
    room = budget - least - ring * largest
    growing = list(places)
    while growing := [place for place in growing if count[place] < demand.neurons]:
        extra = room // sum(layout.record_bytes(plane) for plane, _ in growing)
        if not extra:
            break
        for place in growing:
            more = min(extra, demand.neurons - count[place])
            count[place] += more
            room -= more * layout.record_bytes(place[0])
    layers = range(len(demand.wanted))
    return ring, {
        plane: tuple(count.get((plane, layer), 0) for layer in layers)
        for plane in demand.planes
        if any((plane, layer) in count for layer in layers)
    }


def _layers(count: int) -> str:
    return "one layer" if count == 1 else f"{count} layers"


def _too_small(budget: int, need: int, what: str) -> DoesNotFit:
    return DoesNotFit(
        f"a DRAM budget of {format_bytes(budget)} is too small: the smallest that "
        f"works is {format_bytes(need, up=True)} ({need} bytes, {what})"
    )
