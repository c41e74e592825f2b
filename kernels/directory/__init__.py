"""Which wanted neurons get which slots of a pool, and who leaves for them.

`give_slots(ids, slot_of, neuron_in, priority, held=)` decides and notes it in its
arrays. "numpy" says what is right; "native" is C++ that decides the same, to the last
victim. None: "native" where that was compiled before. Knows neither pools nor JAX.
"""

import numpy as np

from m2jax.kernels.directory import native, reference
from m2jax.kernels.directory.native import prepare
from m2jax.kernels.directory.reference import Plan

FORMS = {"numpy": reference.give_slots, "native": native.give_slots}

__all__ = ["FORMS", "Plan", "default_form", "give_slots", "prepare"]


def default_form() -> str:
    return "numpy" if native.compiled() is None else "native"


def give_slots(
    ids: np.ndarray,
    slot_of: np.ndarray,
    neuron_in: np.ndarray,
    priority: np.ndarray,
    *,
    held: int,
    implementation: str | None = None,
) -> Plan:
    """Gives every wanted neuron a slot: free slots first, then those of victims.

    Victims have the lowest priority of the neurons not wanted; ties: lowest slot.
    Newcomers by ascending id take free slots, then victims' slots, both ascending.

    Args:
        ids: int64 [K] distinct.
        slot_of: int32 [F], -1 = none; neuron_in: int32 [S]. Both are updated.
        priority: int64 [F], below 2**63 - 1.
        held: slots below this are taken, the others free.

    Raises:
        ValueError: more ids than slots, an id twice or out of range. Nothing has
            changed.
    """
    form = FORMS[implementation or default_form()]
    return form(ids, slot_of, neuron_in, priority, held=held)
