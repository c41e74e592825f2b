"""The directory of one (layer, plane) slot pool. NumPy only; moves no bytes."""

from typing import NamedTuple

import numpy as np

from m2jax.cache.policy import Policy

NEVER_EVICT = np.iinfo(np.int64).max


class Plan(NamedTuple):
    """What one wanted set needs. All int32.

    slots: [K] the slot of each wanted neuron, in the order they were given.
    load_positions: [M] ascending positions in `wanted` of the neurons to load.
    load_slots: [M] where they go: slots[load_positions].
    victims: [<= M] ids that lost their slots.
    """

    slots: np.ndarray
    load_positions: np.ndarray
    load_slots: np.ndarray
    victims: np.ndarray


class Residency:
    """Which neurons have a slot, and which slot.

    Decisions follow from the sequence of wanted *sets* alone: the order of the ids in
    one changes neither slots nor victims.

    Args:
        neurons: F; ids are in [0, F).
        slots: S.
        policy: this pool's own, new.
    """

    def __init__(self, neurons: int, slots: int, policy: Policy):
        if neurons < 1 or slots < 0:
            raise ValueError(
                f"a pool of {slots} slots for {neurons} neurons: "
                "want at least 0 slots and 1 neuron"
            )
        self.neurons = neurons
        self.slots = slots
        self.policy = policy
        self.hits = 0
        self.accesses = 0
        # Slots below this are taken; none is given back but by `reset`.
        self._held = 0
        # intp: with int32 indices NumPy took up to three times as long.
        self._slot_of = np.full(neurons, -1, np.intp)
        # One surplus place stands for "no slot", index -1.
        self._neuron_in = np.zeros(slots + 1, np.intp)
        self._is_wanted = np.zeros(neurons, np.bool_)

    @property
    def loads(self) -> int:
        return self.accesses - self.hits

    def plan(self, wanted: np.ndarray) -> Plan:
        """Gives every wanted neuron a slot: free slots first, then those of victims.

        Victims have the lowest priority of the neurons not wanted; ties: lowest slot.
        Newcomers by ascending id take free slots, then victims' slots, both ascending.
        From here on the loads count as resident: make them, or `reset`.

        Args:
            wanted: int32 [K] distinct ids.

        Raises:
            ValueError: more ids than slots, an id twice or out of range. The directory
                is as it was.
        """
        ids = wanted.astype(np.intp, casting="same_kind")
        self._check(ids)
        slots = self._slot_of[ids]
        load_positions = (slots < 0).nonzero()[0]
        count = load_positions.size
        victims = load_slots = ids[:0]
        if count:
            free = np.arange(self._held, min(self._held + count, self.slots))
            victim_slots = self._choose(count - free.size, keep=slots)
            victims = self._neuron_in[victim_slots]
            self._slot_of[victims] = -1
            self._held += free.size
            newcomers = ids[load_positions]
            ascending = np.sort(newcomers)
            places = np.concatenate([free, victim_slots])
            self._slot_of[ascending] = places
            self._neuron_in[places] = ascending
            load_slots = self._slot_of[newcomers]
            slots[load_positions] = load_slots
        self.policy.touch(ids)
        self.accesses += ids.size
        self.hits += ids.size - count
        return Plan(
            slots=slots.astype(np.int32),
            load_positions=load_positions.astype(np.int32),
            load_slots=load_slots.astype(np.int32),
            victims=victims.astype(np.int32),
        )

    def resident(self) -> np.ndarray:
        """int32 ids that have a slot, ascending."""
        return (self._slot_of >= 0).nonzero()[0].astype(np.int32)

    def reset(self) -> None:
        """Frees every slot and makes the policy new; the counters go on.

        For a load that failed: its donated pool may be gone or half written, so nobody
        knows what any slot holds, and to give back the failed ids would not be enough.
        """
        self._slot_of.fill(-1)
        self._held = 0
        self.policy.reset()

    def _check(self, ids: np.ndarray) -> None:
        if ids.size > self.slots:
            raise ValueError(
                f"{ids.size} neurons are wanted at once, the pool has "
                f"{self.slots} slots: give it at least {ids.size}"
            )
        if not ids.size:
            return
        # As unsigned, a negative id is a huge one.
        if ids.view(np.uintp).max() >= self.neurons:
            raise ValueError(
                f"wanted ids {ids.min()} to {ids.max()}: want [0, {self.neurons})"
            )
        self._is_wanted.fill(False)
        self._is_wanted[ids] = True
        distinct = np.count_nonzero(self._is_wanted)
        if distinct != ids.size:
            raise ValueError(
                f"{ids.size} wanted ids, {distinct} of them distinct: want each once"
            )

    def _choose(self, count: int, *, keep: np.ndarray) -> np.ndarray:
        """`count` taken slots, ascending, none of them in `keep`; -1 is no slot."""
        if not count:
            return keep[:0]
        priority = self.policy.priority[self._neuron_in]
        priority[self._held :] = NEVER_EVICT
        priority[keep] = NEVER_EVICT
        ranked = priority.copy()
        ranked.partition(count - 1)
        last = ranked[count - 1]
        chosen = priority < last
        ties = (priority == last).nonzero()[0]
        chosen[ties[: count - np.count_nonzero(chosen)]] = True
        return chosen.nonzero()[0]
