"""How likely given tokens are: teacher-forced passes over a runner's layers."""

from collections.abc import Iterator, Sequence

import jax
import numpy as np
from jax import Array

from m2jax.errors import NumericalError
from m2jax.ffn_spec import FfnSpec
from m2jax.kv import LayerKV, block_sizes
from m2jax.output import Compared
from m2jax.passage import begin
from m2jax.runner import Runner


def logits(runner: Runner, ids: Sequence[int]) -> Iterator[Array]:
    """Logits after each of T tokens, in blocks [t, V] that joined are [T, V]."""
    left = len(ids)
    for x in runner.prefill(ids, _new_kv(runner, ids)):
        block = runner.steps.logits(runner.head, runner.embed, x)
        yield block[: min(left, x.shape[0])]
        left -= x.shape[0]


def target_logprobs(runner: Runner, ids: Sequence[int]) -> np.ndarray:
    """log p(ids[t] | ids[:t]) for t = 1 .. T-1: float32 [T - 1]."""
    xs = runner.prefill(ids, _new_kv(runner, ids))
    embed = runner.embed
    parts = [
        runner.steps.target_logprobs(runner.head, embed, x, block)
        for x, block in zip(xs, _targets(ids, xs), strict=True)
    ]
    return _joined(parts, len(ids) - 1)


def compare(
    runner: Runner, ids: Sequence[int], reference: Sequence[FfnSpec]
) -> Compared:
    """Every token but the first under the runner's mix and under another one, both in
    one sweep over the layers: NumPy [T - 1].

    Args:
        reference: one spec a layer; the plan's demand must have its planes.
    """
    own, other = (
        begin(ids, runner.steps, runner.embed, _new_kv(runner, ids, 2), specs=specs)
        for specs in (runner.steps.specs, reference)
    )
    for layer, params, planes in runner.layers_in_turn():
        own.through(layer, params, planes)
        other.through(layer, params, planes)
        jax.block_until_ready((own.xs, other.xs))
    embed = runner.embed
    parts = [
        runner.steps.compare(runner.head, embed, x, y, block)
        for x, y, block in zip(own.xs, other.xs, _targets(ids, own.xs), strict=True)
    ]
    return Compared(*(_joined(field, len(ids) - 1) for field in zip(*parts)))


def _new_kv(runner: Runner, ids: Sequence[int], sequences: int = 1) -> list[LayerKV]:
    return runner.new_kv(sum(block_sizes(len(ids))), sequences=sequences)


def _targets(ids: Sequence[int], xs: list[Array]) -> list[np.ndarray]:
    """What comes after each position, in the blocks of `xs`; 0 after the last."""
    sizes = [x.shape[0] for x in xs]
    targets = np.zeros(sum(sizes), np.int32)
    targets[: len(ids) - 1] = ids[1:]
    return np.split(targets, np.cumsum(sizes)[:-1])


def _joined(parts: Sequence[Array], count: int) -> np.ndarray:
    found = np.concatenate([np.asarray(part) for part in parts])[:count]
    if not np.all(np.isfinite(found)):
        raise NumericalError("the model's log-probabilities hold NaN or infinity")
    return found
