"""By NumPy: says what is right, and serves where there is no compiler."""

from typing import NamedTuple

import numpy as np

NEVER_EVICT = np.iinfo(np.int64).max


class Plan(NamedTuple):
    """What one wanted set needs. All int32.

    slots: [K] the slot of each wanted neuron, in the order they were given.
    load_positions: [M] ascending positions in `wanted` of the neurons to load.
    load_slots: [M] where they go: slots[load_positions].
    victims: [<= M] ids that lost their slots, by ascending slot.
    """

    slots: np.ndarray
    load_positions: np.ndarray
    load_slots: np.ndarray
    victims: np.ndarray


def give_slots(
    ids: np.ndarray,
    slot_of: np.ndarray,
    neuron_in: np.ndarray,
    priority: np.ndarray,
    *,
    held: int,
) -> Plan:
    refused = refusal(ids, neurons=slot_of.size, slots=neuron_in.size)
    if refused is not None:
        raise refused
    # Not int32: as indices these take NumPy up to three times as long.
    slots = slot_of[ids].astype(np.intp)
    load_positions = (slots < 0).nonzero()[0]
    count = load_positions.size
    victims = load_slots = ids[:0]
    if count:
        free = np.arange(held, min(held + count, neuron_in.size))
        leaving = count - free.size
        victim_slots = _chosen(neuron_in[:held], priority, keep=slots, count=leaving)
        victims = neuron_in[victim_slots]
        slot_of[victims] = -1
        newcomers = ids[load_positions]
        ascending = np.sort(newcomers)
        places = np.concatenate([free, victim_slots])
        slot_of[ascending] = places
        neuron_in[places] = ascending
        load_slots = slot_of[newcomers]
        slots[load_positions] = load_slots
    found = slots, load_positions, load_slots, victims
    return Plan(*(array.astype(np.int32) for array in found))


def refusal(ids: np.ndarray, *, neurons: int, slots: int) -> ValueError | None:
    """Why there are no slots for ids; None where there are."""
    if ids.size > slots:
        return ValueError(
            f"{ids.size} neurons are wanted at once, the pool has "
            f"{slots} slots: give it at least {ids.size}"
        )
    if not ids.size:
        return None
    # As unsigned, a negative id is a huge one.
    if ids.view(np.uint64).max() >= neurons:
        return ValueError(f"wanted ids {ids.min()} to {ids.max()}: want [0, {neurons})")
    is_wanted = np.zeros(neurons, np.bool_)
    is_wanted[ids] = True
    distinct = np.count_nonzero(is_wanted)
    if distinct != ids.size:
        return ValueError(
            f"{ids.size} wanted ids, {distinct} of them distinct: want each once"
        )
    return None


def _chosen(
    neuron_in: np.ndarray, priority: np.ndarray, *, keep: np.ndarray, count: int
) -> np.ndarray:
    """`count` of the taken slots, ascending, none of them in `keep`; -1 is no slot."""
    if not count:
        return keep[:0]
    # One surplus place stands for "no slot", index -1.
    order = np.full(neuron_in.size + 1, NEVER_EVICT)
    order[:-1] = priority[neuron_in.astype(np.intp)]
    order[keep] = NEVER_EVICT
    ranked = order.copy()
    ranked.partition(count - 1)
    last = ranked[count - 1]
    chosen = order < last
    ties = (order == last).nonzero()[0]
    chosen[ties[: count - np.count_nonzero(chosen)]] = True
    return chosen.nonzero()[0]
