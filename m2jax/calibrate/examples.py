"""Activations at 16 bits as training examples of predictors, a layer at a time."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from m2jax.calibrate.evaluator import Evaluator
from m2jax.calibrate.fitted import finished
from m2jax.calibrate.predictor import LABEL_SHARE, Examples, pack_labels
from m2jax.store import Store

# One window in so many is held out of training, to measure recall on.
HELD_OUT = 16


def examples(
    evaluator: Evaluator, ahead: int, store: Store, work: Path
) -> Iterator[tuple[int, Examples]]:
    """Each layer's examples, lazily; layers that are trained already are left out."""
    relu = store.config.hidden_act == "relu"
    share = None if relu else LABEL_SHARE
    inputs: list[list[np.ndarray]] = []
    labels: list[np.ndarray] = []
    held: list[np.ndarray] = []
    done = finished(work) if work.exists() else {}
    count = evaluator.windows
    for layer, window, seen in evaluator.observe(lambda done, total: None):
        if window == 0:
            inputs, labels, held = [*inputs, []][-ahead - 1 :], [], []
        inputs[-1].append(np.asarray(seen.h))
        importance = np.asarray(seen.importance)
        if _is_held_out(window, count):
            held.append(importance)
        else:
            labels.append(pack_labels(importance, share=share))
        if window + 1 == count and layer not in done:
            # Layers before the first are seen by nobody: the first sees itself.
            by_window = inputs[0]
            yield (
                layer,
                Examples(
                    np.concatenate(
                        [
                            h
                            for w, h in enumerate(by_window)
                            if not _is_held_out(w, count)
                        ]
                    ),
                    np.concatenate(labels),
                    np.concatenate(
                        [h for w, h in enumerate(by_window) if _is_held_out(w, count)]
                    ),
                    np.concatenate(held),
                ),
            )


def _is_held_out(window: int, count: int) -> bool:
    return window % min(HELD_OUT, count) == min(HELD_OUT, count) - 1
