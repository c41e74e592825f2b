"""What one token's step reads of the device's own memory. Knows no rates."""

from collections.abc import Sequence

from m2jax.ffn_spec import FfnSpec
from m2jax.kv import kv_bytes
from m2jax.runner import Runner


def step_bytes(runner: Runner, specs: Sequence[FfnSpec], positions: float) -> float:
    """Bytes of the dense part less the embedding (one row of it, where it is not the
    output matrix too), of keys and values, and of the wanted records of every plane.

    Args:
        specs: one a layer: the runner's own, or of another mix.
        positions: that the token sees.
    """
    read = runner.plan.footprint.dense + positions * kv_bytes(runner.config, 1)
    if not runner.config.tie_embeddings:
        read -= sum(array.nbytes for array in runner.embed.values())
    records = runner.tiers.record_bytes
    return read + sum(
        count * records[plane] for spec in specs for plane, count in spec.wanted.items()
    )
