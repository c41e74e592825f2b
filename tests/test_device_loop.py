"""Decoding in one program that fetches what is not on the device: by the CUDA kernels
that fetch, compiled for the CPU where there is no GPU."""

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m2jax.cache import manager
from m2jax.cache.fetched import Directory, empty_directory
from m2jax.cache.mapped import MappedMemory
from m2jax.cache.policy import LRU, POLICIES
from m2jax.cache.residency import Residency
from m2jax.cache.trace import Trace
from m2jax.draft.loop import Speculation
from m2jax.engine import Engine
from m2jax.kernels import cuda
from m2jax.runner import Runner
from tests.budgets import Model, assert_same, generate, look
from tests.cuda_on_cpu import build
from tests.kernel_cases import ON_GPU

COMPILER = build.compiler()
pytestmark = pytest.mark.skipif(
    COMPILER is None and not ON_GPU, reason="no C++ compiler here"
)
PAPER = ("25/25/50", "base")
# A mix, and what part of all that does not fit is on the device nevertheless.
CASES = [
    (("0/100/0", "base"), 0.4),
    (PAPER, 0),
    (("20/20/20", "none"), 0.6),
    (("0/0/100,20/20/20,0/25/75", "base"), 0.8),
    (("0/25/75,25/0/75,25/25/50", "base"), 0.2),
]
give_slots = jax.jit(cuda.give_slots, static_argnames="policy", donate_argnums=0)


class Driver:
    """What of a GPU's client registers memory."""

    def dma_map(self, start: int, nbytes: int) -> None: ...
    def dma_unmap(self, start: int) -> None: ...


class Reachable(MappedMemory):
    """Memory that the kernels on this CPU read."""

    def __init__(self) -> None:
        super().__init__()
        self._client, self._registers = Driver(), True


@pytest.fixture(scope="module")
def fetching():
    """Engines made from now on fetch by themselves, if they copy at all."""
    if ON_GPU:
        yield
        return
    assert COMPILER is not None
    library = build.load(COMPILER)
    build.register(library)
    library.emulated_host_memory(0, 1 << 62)
    ready = cuda.CudaStatus(True, "on this CPU", False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "status", lambda: ready)
        patch.setattr(manager, "MappedMemory", Reachable)
        yield
    library.emulated_host_memory(0, 0)


@pytest.fixture(scope="module")
def model_of(tiny_store: Path, fetching) -> Callable[[tuple[str, str]], Model]:
    return cache(lambda mixed: Model(tiny_store, *mixed))


def moved(engine: Engine, kind: str = "greedy") -> list[int]:
    """Bytes over the link, accesses and hits of two texts."""
    counts = []
    for _ in range(2):
        decode = generate(engine, kind).stats.decode
        counts += [decode.hbm_load_bytes, decode.hbm_accesses, decode.hbm_hits]
        counts += [decode.dram_accesses, decode.dram_hits, decode.ssd_read_bytes]
    return counts


def test_rows_within_a_buffer_have_an_address_of_their_own(fetching):
    memory = Reachable()
    buffers = [memory.buffer((1, 4096))[0] for _ in range(3)]
    for buffer in buffers:
        rows = buffer[1024:3072].reshape(16, 128)
        address = memory.address(rows)
        assert address is not None
        low, high = np.asarray(address).tolist()
        assert low + (high << 32) == rows.ctypes.data
    assert memory.address(buffers[0][8:136].reshape(1, 128)) is None
    assert memory.address(np.zeros((1, 128), np.uint8)) is None
    memory.close()


@pytest.mark.parametrize(("mixed", "share"), CASES, ids=str)
def test_what_is_said_and_moved_is_what_the_host_loop_says_and_moves(
    mixed, share, model_of
):
    model = model_of(mixed)
    room = int(share * (model.whole_hbm - 1 - model.smallest_hbm))
    ours, theirs = (model.load(hbm=model.smallest_hbm + room) for _ in range(2))
    assert ours.runner.on_device
    theirs.record(Trace())
    assert not theirs.runner.on_device
    counts = moved(ours)
    assert counts == moved(theirs)
    assert counts[0] > 0
    assert_same(look(ours), model.seen("greedy"))


@pytest.mark.parametrize("policy", POLICIES)
def test_pools_of_more_slots_than_a_step_wants(policy, model_of):
    model = model_of(PAPER)
    ours, theirs = (model.with_pools(policy=policy) for _ in range(2))
    theirs.record(Trace())
    counts = moved(ours, "sampled")
    assert counts == moved(theirs, "sampled")
    assert counts[0] > 0
    assert_same(look(ours, "sampled"), model.seen("sampled"))


def test_host_and_program_may_take_turns(model_of):
    model = model_of(PAPER)
    engine = model.with_pools()
    for trace in (None, Trace(), None, Trace(), None):
        engine.record(trace)
        assert_same(look(engine), model.seen("greedy"))


def test_pools_are_written_in_place(model_of, monkeypatch):
    engine = model_of(PAPER).with_pools()
    steps, compiled = engine.runner.steps, []
    program = steps.generate_on_device

    def noted(*given, **options):
        compiled.append(program.lower(*given, **options).compile())
        return program(*given, **options)

    monkeypatch.setitem(steps.__dict__, "generate_on_device", noted)
    generate(engine)
    pools = list(engine.runner.tiers._pools.values())
    assert compiled[0].memory_analysis().alias_size_in_bytes > sum(
        pool.nbytes for pool in pools
    )
    copied = re.findall(r"= (\w+\[[\d,]+\])\S* copy\(", compiled[0].as_text())
    kinds = {np.dtype(np.uint8): "u8", np.dtype(np.uint16): "u16"}
    shapes = {f"{kinds[p.dtype]}[{p.shape[0]},{p.shape[1]}]" for p in pools}
    assert not shapes & set(copied)


def test_drafts_leave_single_tokens_to_the_program(model_of, monkeypatch):
    """As where every choice is close; the host's loop is not run."""
    model = model_of(PAPER)
    wanted = {kind: model.seen(kind).token_ids for kind in ("greedy", "sampled")}
    engine = model.with_pools(draft="base")
    assert engine.runner.on_device
    monkeypatch.setattr(Speculation, "_round", lambda *_: ([], [], True))
    monkeypatch.setattr(Runner, "decode", None)
    for kind, token_ids in wanted.items():
        assert generate(engine, kind).token_ids == token_ids


def test_a_run_that_is_given_up_leaves_no_trace(model_of, monkeypatch):
    model = model_of(PAPER)
    engine = model.with_pools()
    generate(engine)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(engine.runner.tiers.in_program, "end", interrupted)
        with pytest.raises(KeyboardInterrupt):
            generate(engine)
    assert_same(look(engine), model.seen("greedy"))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("neurons", [7, 40, 2100])
def test_a_directory_decides_as_residency_does(neurons, policy, fetching):
    rng = np.random.default_rng(0)
    # Some are wanted often, so that LFU has more than ties.
    chance = rng.random(neurons) ** 3
    chance /= chance.sum()
    for wanted in (1, neurons // 3, neurons):
        for slots in sorted({wanted, (wanted + neurons) // 2, neurons}):
            theirs = Residency(neurons, slots, POLICIES[policy](neurons))
            ours = empty_directory(neurons, slots)
            for _ in range(9):
                ids = rng.choice(neurons, wanted, replace=False, p=chance)
                ids = ids.astype(np.int32)
                decided = theirs.plan(ids)
                after, at, loads, count = give_slots(ours, ids, policy=policy)
                ours = Directory(*after)
                assert np.array_equal(at, decided.slots)
                loaded = np.flatnonzero(loads >= 0)
                assert np.array_equal(loaded, decided.load_positions)
                assert count == decided.load_positions.size
                resident = np.flatnonzero(np.asarray(ours.slot_of) >= 0)
                assert np.array_equal(resident, theirs.resident())


def test_high_priorities_are_told_apart(fetching):
    """Of a pool after many steps: every digit of a priority counts."""
    rng = np.random.default_rng(0)
    priority = rng.permutation(np.int32(1) << np.arange(31, dtype=np.int32))
    theirs = Residency(31, 20, LRU(31))
    theirs.plan(np.arange(20))
    theirs.policy.priority[:] = priority
    slot_of = jnp.full(31, -1, jnp.int32).at[:20].set(jnp.arange(20))
    in_order, counts = jnp.arange(20, dtype=jnp.int32), jnp.array([20, 1], jnp.int32)
    ours = Directory(slot_of, in_order, jnp.asarray(priority), counts)
    ids = np.arange(15, 28, dtype=np.int32)
    _, at, *_ = give_slots(ours, ids, policy="lru")
    assert np.array_equal(at, theirs.plan(ids).slots)
