"""How many rows a transfer has. Integers only: the engine and its simulator ask."""

MIN_LOAD_BUCKET = 16


def load_bucket(loads: int, *, wanted: int) -> int:
    """Rows of the transfer that carries so many loads: few sizes, few compilations.

    Four sizes an octave, since padding crosses the link too; never more than `wanted`,
    the records of a step. No loads, no transfer.
    """
    if not loads:
        return 0
    octave = MIN_LOAD_BUCKET
    while 2 * octave < loads:
        octave *= 2
    quarter = octave // 4
    return min(wanted, max(octave, -(-loads // quarter) * quarter))
