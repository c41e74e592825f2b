"""A loaded model on calibration windows: what a mix costs, what its neurons do.

Layers are the outer loop and windows the inner one, so a sweep reads each layer once.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax import Array

from m2jax.calibrate.windows import (
    Activations,
    check_classes,
    compiled,
    down_norms,
)
from m2jax.engine import Engine
from m2jax.errors import NumericalError
from m2jax.mix import PrecisionMix
from m2jax.output import Compared

Progress = Callable[[int, int], None]
Planes = dict[str, Array]


class Evaluator:
    """The model on equally long windows of text, beside itself at 16 bits.

    Args:
        engine: loaded with planes=("q4", "r4", "w16").
        windows: token ids, all of one length T >= 2.
        ranker: what orders the neurons; see `windows.RANKERS`.
        replace: maps (layer, planes) to the planes that mixes are computed with; the
            reference keeps the store's own.
    """

    def __init__(
        self,
        engine: Engine,
        windows: Sequence[Sequence[int]],
        *,
        ranker: str = "base",
        replace: Callable[[int, Planes], Planes] | None = None,
    ):
        self._runner = engine.runner
        self._ids = np.array(windows, np.int32)
        if self._ids.ndim != 2 or self._ids.shape[1] < 2:
            raise ValueError("windows: want token ids, all windows equally long")
        self.ranker = ranker
        self.replace = replace
        spec = engine.specs[0]
        self._neurons = spec.neurons
        self._width = spec.width
        self._steps = compiled(engine.config, spec)
        self._norms: dict[int, Array] = {}
        self._streams: list[list[np.ndarray]] = []

    @property
    def windows(self) -> int:
        return self._ids.shape[0]

    @property
    def tokens(self) -> int:
        """Scored tokens."""
        return self._ids.shape[0] * (self._ids.shape[1] - 1)

    def _embedded(self) -> list[Array]:
        steps, embed = self._runner.steps, self._runner.embed
        return [steps.embed(embed, ids) for ids in self._ids]

    def _layers(self, first: int = 0) -> Iterator[tuple[int, Any, Planes]]:
        """Layers from `first` on, each with its whole planes."""
        if self._runner.plan.placement.resident:
            for layer in range(first, len(self._runner.layers)):
                params = self._runner.layers[layer]
                yield layer, params, self._runner.tiers.whole_planes(layer)
            return
        for layer, params, planes in self._runner.layers_in_turn():
            if layer >= first:
                yield layer, params, planes

    def observe(
        self, progress: Progress, *, lookahead: int = 0
    ) -> Iterator[tuple[int, int, Activations]]:
        """Layer, window and its activations at 16 bits (NumPy), layer by layer.

        Args:
            progress: called with layers done and in all.
            lookahead: also score each layer from inputs of so many layers before.

        Raises:
            NumericalError: they hold NaN or infinity; names the layer.
        """
        xs = self._embedded()
        inputs: list[list[np.ndarray]] = [[] for _ in xs]
        for layer, params, planes in self._layers():
            norms = self._down_norms(layer, planes)
            for window, x in enumerate(xs):
                xs[window], seen = self._steps.observed(params, planes, norms, x)
                ahead = tuple(
                    np.asarray(self._steps.ahead(params, planes["q4"], h))
                    for h in reversed(inputs[window])
                )
                seen = Activations(*map(np.asarray, seen[:5]), ahead=ahead)
                _check_finite(f"layer {layer}", seen[:5])
                if lookahead:
                    inputs[window] = [*inputs[window], seen.h][-lookahead:]
                yield layer, window, seen
            jax.block_until_ready(xs)
            progress(layer + 1, len(self._runner.layers))

    def reference(self) -> list[list[np.ndarray]]:
        """Residual streams at 16 bits: before each layer and after the last, a window
        each; computed once and kept in host memory.

        Raises:
            NumericalError: they hold NaN or infinity; names the layer.
        """
        if not self._streams:
            xs = self._embedded()
            streams = [[np.asarray(x) for x in xs]]
            _check_finite("embeddings", streams[0])
            for layer, params, planes in self._layers():
                xs = [self._steps.exact(params, planes["w16"], x) for x in xs]
                streams.append([np.asarray(x) for x in xs])
                _check_finite(f"layer {layer}", streams[-1])
            self._streams = streams
        return self._streams

    def compare(
        self, mixes: Sequence[PrecisionMix | None], *, first: int = 0
    ) -> Compared:
        """Every token under mixes, beside 16 bits: NumPy [tokens] each.

        Args:
            mixes: one a layer; None = this layer at 16 bits with the store's planes.
            first: layers before this one are at 16 bits.
        """
        xs: list[Any] = list(self.reference()[first])
        hs: list[Array | None] = [None] * len(xs)
        for layer, params, planes in self._layers(first):
            mix = mixes[layer]
            if mix is None:
                xs = [self._steps.exact(params, planes["w16"], x) for x in xs]
                jax.block_until_ready(xs)
                continue
            edges = np.cumsum(mix.counts(self._neurons)).astype(np.int32)
            ranker = "none" if _uniform(edges, self._neurons) else self.ranker
            used = self._used(layer, planes, edges, ranker)
            norms = self._down_norms(layer, planes) if ranker == "oracle" else None
            for window, x in enumerate(xs):
                ahead = hs[window] if self._runner.steps.lookahead else None
                xs[window], hs[window] = self._steps.mixed(
                    params, used, norms, x, ahead, edges, ranker=ranker
                )
            jax.block_until_ready(xs)
        return self._compared(xs)

    def _compared(self, xs: list[Array]) -> Compared:
        runner, parts = self._runner, []
        for ids, x, y in zip(self._ids, xs, self.reference()[-1], strict=True):
            targets = np.append(ids[1:], 0).astype(np.int32)
            part = runner.steps.compare(runner.head, runner.embed, x, y, targets)
            parts.append([np.asarray(field)[:-1] for field in part])
        found = Compared(*(np.concatenate(field) for field in zip(*parts)))
        _check_finite("head", [found.reference_logprob])
        return found

    def kl(self, mixes: Sequence[PrecisionMix | None], *, first: int = 0) -> float:
        """Mean KL of the 16-bit model to the mixes, nats a token."""
        return float(np.mean(self.compare(mixes, first=first).kl, dtype=np.float64))

    def probe(self, layer: int, mix: PrecisionMix) -> float:
        """KL where only this layer has the mix and all others are at 16 bits."""
        mixes: list[PrecisionMix | None] = [None] * len(self._runner.layers)
        mixes[layer] = mix
        return self.kl(mixes, first=layer)

    def _down_norms(self, layer: int, planes: Planes) -> Array:
        if layer not in self._norms:
            self._norms[layer] = down_norms(planes["w16"], width=self._width)
        return self._norms[layer]

    def _used(
        self, layer: int, planes: Planes, edges: np.ndarray, ranker: str
    ) -> Planes:
        """Planes that the classes and the ranker need."""
        k16, k8, k4 = np.diff(edges, prepend=0)
        wanted = {
            "q4": k8 + k4 or ranker in ("base", "gate", "magnitude"),
            "r4": k8,
            "w16": k16 or ranker == "oracle",
        }
        if self.replace is not None:
            planes = self.replace(layer, planes)
        check_classes((k16, k8, k4), planes)
        return {plane: planes[plane] for plane, need in wanted.items() if need}


def _check_finite(where: str, fields: Iterable[Array | np.ndarray]) -> None:
    if not all(np.all(np.isfinite(field)) for field in fields):
        raise NumericalError(
            f"{where}: activations hold NaN or infinity on the calibration text; check "
            'the store with "m2jax verify"'
        )


def _uniform(edges: np.ndarray, neurons: int) -> bool:
    counts = np.diff(edges, prepend=0)
    return bool(counts.max() == neurons or edges[-1] == 0)
