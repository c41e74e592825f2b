"""From a store's path to an engine: opens, plans, fills the device."""

import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from m2jax.bundled import bundled_store
from m2jax.cache.device import STORED_DTYPES, to_device
from m2jax.cache.manager import TierManager
from m2jax.cache.policy import POLICIES
from m2jax.config import ModelConfig
from m2jax.engine import Engine
from m2jax.errors import DoesNotFit
from m2jax.ffn import FfnSpec, make_spec
from m2jax.layout import Layout
from m2jax.memory import default_budgets, free_device_bytes, free_dram_bytes
from m2jax.mix import PrecisionMix
from m2jax.model import Bank
from m2jax.params import layer_name, neuron_shapes
from m2jax.plan import DEFAULT_DISTANCE, MemoryPlan, make_plan
from m2jax.runner import Runner
from m2jax.steps import LayerParams, Steps
from m2jax.store import ChunkStore, Store, TensorStoreChunks, open_store
from m2jax.text import load_tokenizer
from m2jax.units import format_bytes, parse_bytes

DEFAULT_MIX = "25/25/50"
DEFAULT_CONTEXT = 4096
ALL_POSITIONS = 2**30

LoadProgress = Callable[[str, int], None]


def load(
    store: str | Path | None = None,
    *,
    hbm: str | int | None = None,
    dram: str | int | None = None,
    mix: str | PrecisionMix = DEFAULT_MIX,
    scorer: str = "base",
    policy: str = "lru",
    context: int | None = None,
    distance: int = DEFAULT_DISTANCE,
    progress: LoadProgress = lambda what, nbytes: None,
    chunks: ChunkStore | None = None,
) -> Engine:
    """Opens a store within budgets.

    Args:
        store: folder made by `m2jax convert`; None = the bundled model.
        hbm, dram: bytes each tier may hold, as in "8GiB"; None = what is free.
        mix: percent of neurons at 16/8/4 bits; what is missing to 100 is skipped.
        scorer: "base" or "none". policy: "lru" or "lfu".
        context: positions for prompt and text; None = the model's, at most 4096.
        distance: layers that SSD reads run ahead.
        progress: called with what arrived and its bytes.
        chunks: where neuron records are read from; None = the store's own files.

    Raises:
        ValueError: a wrong option. DoesNotFit: budgets too small, naming the smallest.
        StoreError: the store is damaged, unfinished or unreadable.
    """
    start = time.perf_counter()
    if policy not in POLICIES:
        hint = "; belady needs the future" if policy == "belady" else ""
        raise ValueError(f"policy {policy!r}: want one of {sorted(POLICIES)}{hint}")
    opened = open_store(bundled_store(progress) if store is None else store)
    config, layout = opened.config, opened.layout
    spec = make_spec(config, layout, PrecisionMix.parse(mix), scorer=scorer)
    plan = plan_for(
        config,
        layout,
        spec,
        dense_bytes=stored_dense_bytes(opened),
        hbm=parse_bytes(hbm, name="--hbm"),
        dram=parse_bytes(dram, name="--dram"),
        context=context,
        distance=distance,
    )
    check_free(plan)
    folder = opened.tokenizer_folder()
    tokenizer = None
    if folder is not None:
        tokenizer = load_tokenizer(
            folder,
            vocab_size=config.vocab_size,
            bos_token_ids=config.bos_token_ids,
        )
    embed, layers, head, dense_bytes = _dense_part(opened, progress)
    tiers = TierManager(
        (chunks or TensorStoreChunks(opened)).read,
        plan.placement,
        {plane: layout.record_bytes(plane) for plane in spec.wanted},
        neurons=layout.neurons,
        original_dtype=layout.original_dtype,
        wanted_counts=spec.wanted,
        dense=frozenset(plane for plane in spec.wanted if spec.dense(plane)),
        policy=policy,
    )
    try:
        tiers.load_resident(lambda nbytes: progress("neurons", nbytes))
    except BaseException:
        tiers.close()
        raise
    runner = Runner(
        Steps(config, spec),
        embed=embed,
        layers=layers,
        head=head,
        tiers=tiers,
        plan=plan,
        dense_bytes=dense_bytes,
    )
    return Engine(runner, tokenizer, load_s=time.perf_counter() - start)


def plan_for(
    config: ModelConfig,
    layout: Layout,
    spec: FfnSpec,
    *,
    dense_bytes: int,
    hbm: int | None,
    dram: int | None,
    context: int | None,
    distance: int = DEFAULT_DISTANCE,
) -> MemoryPlan:
    """`make_plan` with unset budgets filled in from what is free."""
    free_hbm, free_dram = default_budgets()
    if context is None:
        context = min(config.context, DEFAULT_CONTEXT)
    if not 0 < context <= config.context:
        raise ValueError(
            f"--context {context}: want 1 to {config.context}, the model's own"
        )
    if distance < 0:
        raise ValueError(f"--prefetch {distance}: want 0 or more layers")
    return make_plan(
        config,
        layout,
        spec,
        dense_bytes=dense_bytes,
        context=context,
        hbm_bytes=free_hbm if hbm is None else hbm,
        dram_bytes=free_dram if dram is None else dram,
        distance=distance,
    )


def check_free(plan: MemoryPlan) -> None:
    """Refuses what this machine cannot hold, before anything is allocated.

    Raises:
        DoesNotFit: the plan needs more than is free (in a cgroup: than it allows).
    """
    need_hbm, need_dram = plan.footprint.hbm, plan.footprint.dram
    if jax.default_backend() == "cpu":
        need_hbm, need_dram = 0, need_hbm + need_dram
    for need, free, name in (
        (need_hbm, free_device_bytes(), "the device"),
        (need_dram, free_dram_bytes(), "this machine (or its memory cgroup)"),
    ):
        if need > free:
            raise DoesNotFit(
                f"the plan needs {format_bytes(need)}, {name} has "
                f"{format_bytes(free)} free; give smaller --hbm and --dram budgets"
            )


def stored_dense_bytes(store: Store) -> int:
    """Device bytes of the dense part, from the sizes of its array files.

    A few bytes an array too many: each chunk file ends in a checksum.
    """
    return sum(
        entry.bytes
        for path, entry in store.files.items()
        if path.startswith("dense/") and "/c/" in path
    )


def shaped_dense_bytes(config: ModelConfig, layout: Layout, *, item_bytes: int) -> int:
    """The same from shapes alone, for a model that is not converted yet."""
    from m2jax.params import dense_banks

    sizes = {"scales": 2, "down_norm": 4}
    return sum(
        int(np.prod(shape)) * sizes.get(name, item_bytes)
        for bank in dense_banks(config, layout).values()
        for name, shape in bank.items()
    )


def _dense_part(
    store: Store, progress: LoadProgress
) -> tuple[Bank, list[LayerParams], Bank, int]:
    """Embedding, layers and head on the device, and their bytes."""
    total = 0

    def bank(name: str) -> Bank:
        nonlocal total
        arrays = {key: _to_device(value) for key, value in store.dense(name).items()}
        size = sum(array.nbytes for array in arrays.values())
        total += size
        progress("dense part", size)
        return arrays

    config = store.config
    layers = []
    for layer in range(config.num_layers):
        arrays = bank(f"layers/{layer_name(layer, config)}")
        shared = {name: arrays.pop(name) for name in neuron_shapes(store.layout)}
        window = config.windows[layer] or ALL_POSITIONS
        layers.append(LayerParams(arrays, window=jnp.int32(window), **shared))
    return bank("embed"), layers, bank("head"), total


def _to_device(array: np.ndarray) -> jax.Array:
    """bfloat16 goes as its bits (see `kernels.linear.widen`)."""
    if array.dtype.name == "bfloat16":
        array = array.view(STORED_DTYPES["bfloat16"])
    return to_device(array)
