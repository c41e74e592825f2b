"""The only host loop over layers and tokens.

`prefill` runs a prompt through whole planes, layer by layer; `decode` runs one token
through the wanted records; `decode_resident` many tokens in one program. Text,
sampling options and stop rules are `generate`'s business.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from m2jax.cache.manager import TierManager
from m2jax.cache.trace import Trace
from m2jax.config import ModelConfig
from m2jax.errors import NumericalError
from m2jax.ffn import NeuronRows
from m2jax.kv import LayerKV, block_sizes, capacity_for, init_kv
from m2jax.model import Bank
from m2jax.plan import MemoryPlan
from m2jax.sampling import SamplingMode, SamplingValues
from m2jax.stats import Counters, Held
from m2jax.steps import LayerParams, ResidentCarry, Steps

Progress = Callable[[int, int], None]


class Runner:
    """A model in its tiers: token ids in, logits or tokens out.

    Args:
        steps: the compiled steps of model and mix.
        embed, layers, head: the dense part, on the device.
        tiers: owner of the neurons' bytes.
        plan: what lies where.
        dense_bytes: device bytes of the dense part.
    """

    def __init__(
        self,
        steps: Steps,
        *,
        embed: Bank,
        layers: list[LayerParams],
        head: Bank,
        tiers: TierManager,
        plan: MemoryPlan,
        dense_bytes: int,
    ):
        self.steps, self.tiers, self.plan = steps, tiers, plan
        self.embed, self.layers, self.head = embed, layers, head
        self._dense_bytes = dense_bytes
        self._kv_bytes = 0

    @property
    def config(self) -> ModelConfig:
        return self.steps.config

    @property
    def resident(self) -> bool:
        """Decoding runs without a host loop (never while a trace is recorded)."""
        return self.plan.placement.resident and self.tiers.trace is None

    def record(self, trace: Trace | None) -> None:
        """Notes every wanted set from now on in `trace`; None stops it."""
        self.tiers.trace, self.tiers.step = trace, 0

    def counters(self) -> Counters:
        dram, link = self.tiers.dram.counters, self.tiers.link
        return Counters(
            ssd_read_bytes=dram.read_bytes,
            dram_accesses=dram.accesses,
            dram_hits=dram.hits,
            dram_waited_s=dram.waited_s,
            hbm_accesses=link.accesses,
            hbm_hits=link.hits,
            hbm_load_bytes=link.load_bytes,
        )

    def held(self) -> Held:
        return Held(
            hbm_bytes=self._dense_bytes + self._kv_bytes + self.tiers.held_bytes,
            hbm_budget_bytes=self.plan.hbm_budget_bytes,
            dram_bytes=self.tiers.dram.held_bytes,
            dram_budget_bytes=self.plan.dram_budget_bytes,
            startup_read_bytes=self.tiers.link.startup_bytes,
        )

    def new_kv(self, positions: int) -> list[LayerKV]:
        """Empty caches for so many positions, padded blocks included."""
        kv = init_kv(self.config, capacity_for(positions))
        held = sum(buffer.nbytes for layer in kv for buffer in layer)
        self._kv_bytes = max(self._kv_bytes, held)
        return kv

    def prefill(
        self,
        ids: Sequence[int],
        kv: list[LayerKV],
        progress: Progress = lambda done, total: None,
    ) -> list[Array]:
        """Runs a prompt from position 0: one sweep over the layers.

        Args:
            ids: T token ids.
            kv: written in place (the list's entries are replaced).
            progress: called with layers done and layers in all.

        Returns:
            The residual stream after the last layer, in padded blocks [t, D].
        """
        sizes = block_sizes(len(ids))
        padded = np.zeros(sum(sizes), np.int32)
        padded[: len(ids)] = ids
        starts = np.cumsum([0, *sizes])
        xs = [
            self.steps.embed(self.embed, padded[start:end])
            for start, end in pairwise(starts)
        ]
        self.tiers.dram.forget_failures()
        with self._step():
            for layer, params in enumerate(self.layers):
                planes = self.tiers.whole_planes(layer)
                for block, start in enumerate(starts[:-1]):
                    xs[block], kv[layer] = self.steps.layer_block(
                        params, planes, xs[block], kv[layer], np.int32(start)
                    )
                # At most two layers in transit: the next copy waits for this compute.
                jax.block_until_ready(xs)
                progress(layer + 1, len(self.layers))
        return xs

    def decode(self, token: int, position: int, kv: list[LayerKV]) -> Array:
        """One token at `position` through all layers: [1, D] after the last."""
        x = self.steps.embed(self.embed, np.array([token], np.int32))
        spec, tiers = self.steps.spec, self.tiers
        with self._step():
            before = x
            for layer, params in enumerate(self.layers):
                # At most two layers in transit: wait for the last but one's compute.
                jax.block_until_ready(before)
                before = x
                with tiers.layer(layer) as access:
                    q4 = access.base()
                    attended, kv[layer] = self.steps.attend_and_rank(
                        params, q4, x, kv[layer], np.int32(position)
                    )
                    planes = {} if q4 is None else {"q4": NeuronRows(q4, None)}
                    for plane in spec.wanted.keys() - {"q4"}:
                        ids = attended.ids.by_plane(plane)
                        seen = tiers.needs_ids(layer, plane)
                        records, slots = access.wanted(
                            plane, np.asarray(ids) if seen else None
                        )
                        if slots is None and not spec.dense(plane):
                            slots = ids
                        planes[plane] = NeuronRows(records, slots)
                    x = self.steps.add_feed_forward(params, attended, planes)
            tiers.step += 1
        return x

    def next_token(
        self,
        x: Array,
        seen: Array,
        position: int,
        values: SamplingValues,
        mode: SamplingMode,
    ) -> tuple[int, float, Array]:
        """Token and logprob for `position`, from x [1, D] before it; `seen` updated."""
        token, logprob, seen = self.steps.next_token(
            self.head,
            self.embed["embedding"],
            x,
            seen,
            np.int32(position),
            values,
            mode=mode,
        )
        return _valid(int(token)), float(logprob), seen

    def decode_resident(
        self,
        carry: ResidentCarry,
        limit: int,
        eos: np.ndarray,
        values: SamplingValues,
        mode: SamplingMode,
    ) -> tuple[list[int], list[float], ResidentCarry]:
        """Up to `limit` more tokens after carry.token, without the host.

        Returns:
            The tokens, their logprobs, and the state to go on from.
        """
        planes = [
            self.tiers.whole_planes(layer) for layer in range(self.config.num_layers)
        ]
        carry = carry._replace(count=jnp.int32(0))
        carry = self.steps.generate_resident(
            self.embed,
            self.layers,
            self.head,
            planes,
            carry,
            np.int32(limit),
            eos,
            values,
            mode=mode,
        )
        count = int(carry.count)
        tokens = np.asarray(carry.tokens)[:count].tolist()
        self.tiers.count_resident_steps(count)
        if tokens:
            _valid(tokens[-1])
        return tokens, np.asarray(carry.logprobs)[:count].tolist(), carry

    def logits(self, ids: Sequence[int]) -> Iterator[Array]:
        """Teacher-forced logits, in blocks [t, V] that joined are [T, V]."""
        left = len(ids)
        for x in self.prefill(ids, self.new_kv(sum(block_sizes(left)))):
            block = self.steps.logits(self.head, self.embed["embedding"], x)
            yield block[: min(left, x.shape[0])]
            left -= x.shape[0]

    def target_logprobs(self, ids: Sequence[int]) -> np.ndarray:
        """log p(ids[t] | ids[:t]) for t = 1 .. T-1: float32 [T - 1]."""
        xs = self.prefill(ids, self.new_kv(sum(block_sizes(len(ids)))))
        targets = np.zeros(sum(x.shape[0] for x in xs), np.int32)
        targets[: len(ids) - 1] = ids[1:]
        parts, start = [], 0
        for x in xs:
            block = targets[start : start + x.shape[0]]
            parts.append(
                self.steps.target_logprobs(self.head, self.embed["embedding"], x, block)
            )
            start += x.shape[0]
        found = np.concatenate([np.asarray(part) for part in parts])[: len(ids) - 1]
        if not np.all(np.isfinite(found)):
            raise NumericalError("the model's log-probabilities hold NaN or infinity")
        return found

    def _step(self) -> "_Step":
        return _Step(self.tiers)

    def close(self) -> None:
        self.tiers.close()


class _Step:
    """A pass over the layers; if it fails, the tiers forget what is half done."""

    def __init__(self, tiers: TierManager):
        self._tiers = tiers

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is not None:
            self._tiers.abandon()


def _valid(token: int) -> int:
    if token < 0:
        raise NumericalError(
            "the model's logits hold NaN or infinity: no token can be chosen; "
            'check the store with "m2jax verify"'
        )
    return token
