"""One run of AdamW: the jitted step, and its state in a folder.

Knows no text and no command line.
"""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array
from jax.typing import DTypeLike
from train_model import EMBEDDING, Weights, apply, mean_loss

from m2jax.config import ModelConfig
from m2jax.store.dense import load_bank, save_bank
from m2jax.store.files import sync_path

BETA1, BETA2 = 0.9, 0.95
CLIP = 1.0
# The cosine ends at this share of the peak rate.
END_RATE = 0.05
CHECKPOINT = "step-{:09d}"


class Recipe(NamedTuple):
    """What a step does but for its data. rate: the peak of the learning rate."""

    steps: int
    rate: float
    warmup_steps: int
    weight_decay: float
    freeze_embedding: bool
    dtype: DTypeLike


class State(NamedTuple):
    """weights: float32, by name. moments: the optimiser's. step: steps made."""

    weights: Weights
    moments: Any
    step: int


class Run:
    """The compiled functions of one recipe; holds no arrays."""

    def __init__(self, config: ModelConfig, recipe: Recipe):
        self._optimiser = make_optimiser(recipe)

        def loss_of(weights: Weights, ids: Array) -> Array:
            logits, _ = apply(config, weights, ids[:, :-1], dtype=recipe.dtype)
            return mean_loss(logits, ids[:, 1:])

        def advance(weights: Weights, moments: Any, ids: Array) -> Any:
            import optax

            loss, slopes = jax.value_and_grad(loss_of)(weights, ids)
            # optax 0.2.8 mixes dtypes: counts of int32 with float rates.
            with jax.numpy_dtype_promotion("standard"):
                moves, moments = self._optimiser.update(slopes, moments, weights)
                return optax.apply_updates(weights, moves), moments, loss

        self._loss = jax.jit(loss_of)
        self._advance = jax.jit(advance, donate_argnums=(0, 1))

    def begin(self, weights: Weights) -> State:
        return State(weights, self._optimiser.init(weights), 0)

    def advance(self, state: State, ids: np.ndarray) -> tuple[State, Array]:
        """One step on windows [B, T + 1]; `state` is donated, do not use it again.

        Returns:
            The next state, and the loss before the step.
        """
        weights, moments, loss = self._advance(state.weights, state.moments, ids)
        return State(weights, moments, state.step + 1), loss

    def loss(self, state: State, batches: list[np.ndarray]) -> float:
        """Mean loss of some windows, in nats a token."""
        return float(np.mean([self._loss(state.weights, ids) for ids in batches]))


def make_optimiser(recipe: Recipe) -> Any:
    """AdamW after clipping; warm-up, then a cosine; matrices alone decay."""
    try:
        import optax
    except ModuleNotFoundError:
        raise NotImplementedError(
            "training needs optax: pip install -e '.[train]'"
        ) from None
    warmup = min(recipe.warmup_steps, recipe.steps)
    rate = optax.warmup_cosine_decay_schedule(
        0.0,
        recipe.rate,
        warmup,
        max(recipe.steps, warmup + 1),
        END_RATE * recipe.rate,
    )

    def matrices(weights: Mapping[str, Any]) -> dict[str, bool]:
        return {name: array.ndim > 1 for name, array in weights.items()}

    def frozen(weights: Mapping[str, Any]) -> dict[str, bool]:
        return {n: recipe.freeze_embedding and n == EMBEDDING for n in weights}

    return optax.chain(
        optax.clip_by_global_norm(CLIP),
        optax.adamw(
            rate, b1=BETA1, b2=BETA2, weight_decay=recipe.weight_decay, mask=matrices
        ),
        optax.masked(optax.set_to_zero(), frozen),
    )


def save(state: State, folder: Path) -> None:
    """Writes a checkpoint that is there whole or not at all; removes older ones."""
    leaves = jax.tree.leaves((state.weights, state.moments))
    arrays = {f"{n:06d}": np.asarray(leaf) for n, leaf in enumerate(leaves)}
    scratch = folder / "half-written"
    shutil.rmtree(scratch, ignore_errors=True)
    save_bank(scratch, arrays)
    before = _checkpoints(folder)
    os.rename(scratch, folder / CHECKPOINT.format(state.step))
    sync_path(folder)
    for old in before:
        shutil.rmtree(old)


def restore(start: State, folder: Path) -> State:
    """The newest checkpoint of a folder; `start` where there is none.

    Args:
        start: the state that the run began with; gives names and shapes.
    """
    found = _checkpoints(folder)
    if not found:
        return start
    tree = jax.tree.structure((start.weights, start.moments))
    arrays = load_bank(found[-1])
    # Copied: the step donates them, and these lie in Orbax's memory.
    leaves = [jax.numpy.array(arrays[name], copy=True) for name in sorted(arrays)]
    weights, moments = jax.tree.unflatten(tree, leaves)
    return State(weights, moments, int(found[-1].name.rpartition("-")[2]))


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob(CHECKPOINT.format(0).replace("0" * 9, "*")))
