"""The directory of one (layer, plane) slot pool. NumPy only; moves no bytes."""

import numpy as np

from m2jax.cache.policy import Policy
from m2jax.kernels.directory import Plan, give_slots

__all__ = ["Plan", "Residency"]


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
        self._slot_of = np.full(neurons, -1, np.int32)
        self._neuron_in = np.zeros(slots, np.int32)

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
        ids = wanted.astype(np.int64, casting="same_kind", order="C")
        plan = give_slots(
            ids,
            self._slot_of,
            self._neuron_in,
            self.policy.priority,
            held=self._held,
        )
        loads = plan.load_positions.size
        self._held += loads - plan.victims.size
        self.policy.touch(ids)
        self.accesses += ids.size
        self.hits += ids.size - loads
        return plan

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
