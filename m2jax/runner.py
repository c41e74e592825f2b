"""The host loop over layers.

`prefill` runs a prompt through whole planes, layer by layer; `decode` runs one token
through the wanted records; `decode_on_device` many tokens in one program. The loop
over tokens, with its stop rules, is `stream`'s, that of drafts `draft.loop`'s.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from m2jax.cache.manager import LayerAccess, TierManager
from m2jax.cache.trace import Trace
from m2jax.config import ModelConfig
from m2jax.device_loop import LoopCarry
from m2jax.ffn import NeuronRows
from m2jax.kv import LayerKV, capacity_for, init_kv
from m2jax.layer import LayerParams, ranked_ahead
from m2jax.model import Bank
from m2jax.output import checked
from m2jax.passage import Passage, begin
from m2jax.plan import MemoryPlan
from m2jax.ranking import ClassIds, split_classes
from m2jax.sampling import SamplingMode, SamplingValues
from m2jax.stats import Counters, DraftCounters, Held, SsdReads
from m2jax.steps import Steps
from m2jax.timeline import span
from m2jax.turns import in_turn, whole_pass

Progress = Callable[[int, int], None]

# Up to so many tokens a layer is dispatched while the one before it computes. More take
# so long that the host's share is nothing, and two layers of them want more memory.
AHEAD_TOKENS = 64


class Runner:
    """A model in its tiers: token ids in, logits or tokens out.

    Args:
        steps: the compiled steps of model and mix.
        embed, layers, head: the dense part, on the device.
        tiers: owner of the neurons' bytes.
        plan: what lies where.
        dense_bytes: device bytes of the dense part.
        ssd: how the tiers read, for the figures.
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
        ssd: SsdReads,
    ):
        self.steps, self.tiers, self.plan, self.ssd = steps, tiers, plan, ssd
        self.embed, self.layers, self.head = embed, layers, head
        self._dense_bytes = dense_bytes
        self._kv_bytes = 0
        self._closed = False
        self.drafts = DraftCounters()

    @property
    def config(self) -> ModelConfig:
        return self.steps.config

    @property
    def on_device(self) -> bool:
        """Decoding runs without a host loop (never while a trace is recorded)."""
        return self.tiers.in_program.ready and self.tiers.trace is None

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
            ssd_retries=dram.retries,
            hbm_accesses=link.accesses,
            hbm_hits=link.hits,
            hbm_load_bytes=link.load_bytes,
            **asdict(self.drafts),
        )

    def held(self) -> Held:
        return Held(
            hbm_bytes=self._dense_bytes
            + self._kv_bytes
            + self.tiers.held_bytes
            + self.plan.footprint.draft,
            hbm_budget_bytes=self.plan.hbm_budget_bytes,
            dram_bytes=self.tiers.dram.held_bytes + self.tiers.records.held_bytes,
            dram_budget_bytes=self.plan.dram_budget_bytes,
            startup_read_bytes=self.tiers.link.startup_bytes,
            startup_retries=self.tiers.link.startup_retries,
        )

    def new_kv(
        self, positions: int, *, sequences: int = 1, spare: int = 0
    ) -> list[LayerKV]:
        """Empty caches for so many positions, padded blocks included.

        Args:
            sequences: how many of these the caller holds at once, for the figures.
            spare: more positions, as far as the plan has room.
        """
        most = max(capacity_for(positions), capacity_for(self.plan.positions))
        kv = init_kv(self.config, min(capacity_for(positions) + spare, most))
        held = sequences * sum(buffer.nbytes for layer in kv for buffer in layer)
        self._kv_bytes = max(self._kv_bytes, held)
        return kv

    def layers_in_turn(self) -> Iterator[tuple[int, LayerParams, dict[str, Array]]]:
        """One sweep: each layer with its planes, whole. Wait for the compute on them
        before the next: their memory is then read into again.

        If the consumer fails, the tiers forget what is half done.
        """
        self.tiers.dram.forget_failures()
        for layer in in_turn(self.tiers, len(self.layers), [], ahead=False):
            yield layer, self.layers[layer], self.tiers.whole_planes(layer)

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
        return self.sweep(begin(ids, self.steps, self.embed, kv), progress)

    def sweep(
        self, passage: Passage, progress: Progress = lambda done, total: None
    ) -> list[Array]:
        """Takes a piece of text through all layers, each fetched once.

        Returns:
            The residual stream after the last layer, in padded blocks [t, D].
        """
        tiers, count = self.tiers, len(self.layers)
        tokens = sum(x.shape[0] for x in passage.xs)
        # Of copies there would be three in transit.
        ahead = tiers.placement.in_place and tokens <= AHEAD_TOKENS
        tiers.dram.forget_failures()
        for layer in in_turn(tiers, count, passage.xs, ahead=ahead):
            progress(layer, count)
            planes = tiers.whole_planes(layer)
            tiers.stage_after(layer)
            with span(tiers.timeline, "compute", layer=layer):
                passage.through(layer, self.layers[layer], planes)
        progress(count, count)
        return passage.xs

    def decode(self, token: int, position: int, kv: list[LayerKV]) -> Array:
        """One token at `position` through all layers: [1, D] after the last."""
        now = [self.steps.embed(self.embed, np.array([token], np.int32))]
        # Once for all layers: what crosses to a GPU costs by the piece.
        at = jax.device_put(np.int32(position))
        steps, tiers = self.steps, self.tiers
        ahead = None
        for layer in in_turn(tiers, len(self.layers), now):
            params, spec = self.layers[layer], steps.specs[layer]
            following, following_spec = ranked_ahead(
                self.layers, steps.specs, layer, lookahead=steps.lookahead
            )
            with tiers.layer(layer) as access:
                picked = None
                if ahead is not None:
                    # Loads run while the layer before still computes.
                    picked = self._picked(
                        access, split_classes(ahead, spec=spec), layer
                    )
                q4 = access.base() if spec.base_whole else None
                attended, kv[layer], ahead = steps.attend_and_rank(
                    params,
                    q4,
                    now[0],
                    kv[layer],
                    at,
                    ahead,
                    following,
                    spec=spec,
                    following_spec=following_spec,
                )
                if picked is None:
                    picked = self._picked(access, attended.ids, layer)
                if q4 is not None:
                    picked["q4"] = NeuronRows(q4, None)
                now[0] = steps.add_feed_forward(params, attended, picked, spec=spec)
        tiers.step += 1
        return now[0]

    def _picked(
        self, access: LayerAccess, ids: ClassIds, layer: int
    ) -> dict[str, NeuronRows]:
        """Records of every plane but a whole q4 that one token wants of a layer."""
        spec, tiers = self.steps.specs[layer], self.tiers
        planes = {}
        for plane in spec.wanted:
            if plane == "q4" and spec.base_whole:
                continue
            named = ids.by_plane(plane)
            seen = access.needs_ids(plane)
            with span(tiers.timeline, "compute", layer=layer):
                wanted = np.asarray(named) if seen else None
            planes[plane] = NeuronRows(*access.wanted(plane, named, wanted))
        return planes

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
            self.embed,
            x,
            seen,
            np.int32(position),
            values,
            mode=mode,
        )
        with span(self.tiers.timeline, "compute"):
            chosen = int(token)
        return checked(chosen), float(logprob), seen

    def decode_on_device(
        self,
        carry: LoopCarry,
        limit: int,
        eos: np.ndarray,
        values: SamplingValues,
        mode: SamplingMode,
    ) -> tuple[list[int], list[float], LoopCarry]:
        """Up to `limit` more tokens after carry.token, without the host.

        Returns: the tokens, their logprobs, and the state to go on from.
        """
        with whole_pass(self.tiers):
            planes, pools, loads = self.tiers.in_program.begin()
            carry = carry._replace(count=jnp.int32(0), pools=pools, loads=loads)
            with span(self.tiers.timeline, "compute"):
                carry = self.steps.generate_on_device(
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
            self.tiers.in_program.end(count, carry.pools, carry.loads)
        tokens = np.asarray(carry.tokens)[:count].tolist()
        if tokens:
            checked(tokens[-1])
        return tokens, np.asarray(carry.logprobs)[:count].tolist(), carry

    def check_open(self) -> None:
        if self._closed:
            raise RuntimeError("the engine is closed")

    def close(self) -> None:
        """Ends the reader threads; a second time does nothing."""
        if not self._closed:
            self._closed = True
            self.tiers.close()
