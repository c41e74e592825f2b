"""A matrix at 4 or 8 bits."""

from typing import NamedTuple

from jax import Array


class Packed(NamedTuple):
    """Rows of W weights, W = I padded to whole groups, in the nested planes of
    `sparse_swiglu`.

    q4: uint8 [O, W / 2]. r4: the same, with which a weight has 8 bits; None = 4 bits.
    scales: float16 [O, groups].
    """

    q4: Array
    r4: Array | None
    scales: Array

    @property
    def planes(self) -> dict[str, Array]:
        """Those there are, by name."""
        return {"q4": self.q4} | ({} if self.r4 is None else {"r4": self.r4})
