"""One token at a time: as likely as in one block, and compiled once."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import m2jax
from m2jax import kv
from m2jax.cache.trace import Trace
from m2jax.engine import Engine
from m2jax.steps import Steps
from m2jax.store import TensorStoreChunks, open_store
from m2jax.stream import Generation
from tests.dram_tiers import WAIT_S, Gate, settle
from tests.faulty_store import FaultyStore
from tests.reference_model import forward

FIXTURES = Path(__file__).parent / "fixtures" / "parity"
IDS = [3, 17, 5, 80, 33, 2, 64, 9, 11]
# What two float32 programs, one a token and one a block, may differ by in a logprob.
ROUNDING = 1e-4


@pytest.fixture(scope="module")
def tiny(tiny_store: Path) -> Engine:
    return m2jax.load(tiny_store, mix="0/25/75", context=40)


def assert_decoded_as_teacher_forced(
    engine: Engine, prompt: list[int], done: Generation
) -> None:
    forced = engine.logprobs([*prompt, *done.token_ids])[len(prompt) - 1 :]
    assert np.abs(forced - done.logprobs).max() <= ROUNDING


def test_tokens_one_by_one_are_as_likely_as_in_one_block(bundled_store):
    engine = m2jax.load(bundled_store, mix="100/0/0")
    done = engine.generate(IDS, max_new_tokens=16, ignore_eos=True)
    assert_decoded_as_teacher_forced(engine, IDS, done)


def test_a_sliding_window_holds_one_by_one_as_in_one_block(tmp_path):
    store = m2jax.convert(FIXTURES / "mistral_window", tmp_path / "store")
    engine = m2jax.load(store, mix="100/0/0")
    assert set(engine.config.windows) == {8}
    engine.record(Trace())
    done = engine.generate(IDS[:3], max_new_tokens=13, ignore_eos=True)
    assert_decoded_as_teacher_forced(engine, IDS[:3], done)


def test_a_prompt_in_several_blocks_gives_the_logits_of_one(tiny, monkeypatch):
    prompt = [index * 7 % 96 for index in range(37)]
    whole = tiny.logits(prompt)
    monkeypatch.setattr(kv, "BLOCK_SIZES", (4, 16))
    assert kv.block_sizes(37) == [16, 16, 16]
    blocks = tiny.logits(prompt)
    assert blocks.shape == whole.shape
    # Rounding may exchange neurons whose scores nearly tie: that moves few positions.
    worst = np.abs(blocks - whole).max(-1)
    assert np.median(worst) < ROUNDING


def test_logprobs_are_the_log_softmax_of_the_logits(tiny):
    logits = tiny.logits(IDS).astype(float)
    wanted = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    found = tiny.logprobs(IDS)
    assert np.abs(found - wanted[np.arange(len(IDS) - 1), IDS[1:]]).max() < ROUNDING
    assert tiny.logprobs(IDS[:1]).shape == (0,)


def test_a_mix_that_skips_every_neuron_is_a_model_without_feed_forward(tiny_store):
    engine = m2jax.load(tiny_store, mix="0/0/0")
    wanted = forward(FIXTURES / "smollm2", np.array(IDS), mix=(0, 0, 0))
    assert np.abs(engine.logits(IDS) - wanted).max() < ROUNDING
    resident = engine.generate(IDS, max_new_tokens=5, ignore_eos=True)
    engine.record(Trace())
    hosted = engine.generate(IDS, max_new_tokens=5, ignore_eos=True)
    assert hosted.token_ids == resident.token_ids


def test_a_decode_compiles_every_step_once(tiny_store):
    engine = m2jax.load(tiny_store, mix="0/25/75", context=40)
    runner = engine._runner
    runner.steps = Steps(runner.steps.config, runner.steps.specs)
    engine.record(Trace())
    steps = ("attend_and_rank", "add_feed_forward", "next_token", "layer_block")
    for prompt, count in ((IDS, 3), (IDS[:4], 9), (IDS[::-1], 14)):
        engine.generate(prompt, max_new_tokens=count, ignore_eos=True)
        compiled = {name: getattr(runner.steps, name)._cache_size() for name in steps}
        assert compiled == dict.fromkeys(steps, 1)
        # A block of the prompt, and a token.
        assert runner.steps.embed._cache_size() == 2


def test_a_resident_decode_compiles_one_program(tiny):
    generate = tiny._runner.steps.generate_on_device
    tiny.generate(IDS, max_new_tokens=14, ignore_eos=True)
    before = generate._cache_size()
    tiny.generate(IDS[:4], max_new_tokens=9, ignore_eos=True)
    tiny.generate(IDS[::-1], max_new_tokens=16, ignore_eos=True)
    assert generate._cache_size() == before


def test_the_layer_before_gives_its_buffer_to_the_next_while_one_is_awaited(tiny_store):
    """So that with two buffers, one of them computed, two reads are in flight."""
    layout = open_store(tiny_store).layout
    layer_bytes = layout.plane_bytes("q4") + layout.plane_bytes("r4")
    whole = m2jax.load(tiny_store, mix="0/100/0", context=40).plan.footprint.hbm
    gate = Gate()
    faulty = FaultyStore(TensorStoreChunks(open_store(tiny_store)), fault=gate)
    with (
        m2jax.load(
            tiny_store,
            mix="0/100/0",
            context=40,
            hbm=whole - 3 * layer_bytes,
            dram=2 * layer_bytes,
            draft="none",
            in_place=True,
            chunks=faulty,
        ) as engine,
        ThreadPoolExecutor(1) as pool,
    ):
        assert engine.plan.placement.ring == 2
        stream = engine.stream(IDS, max_new_tokens=4, ignore_eos=True)
        runs = stream._token_runs()
        next(runs)
        settle(engine.runner.tiers.dram)
        faulty.when = lambda number: True
        token = pool.submit(next, runs)
        try:
            # Layer 0 is here and computed; 1 is awaited, and 2 begun.
            begun = [gate.begun.acquire(timeout=WAIT_S) for _ in range(2)]
            assert begun == [True, True]
            assert [layer for layer, _ in faulty.reads[-2:]] == [1, 2]
        finally:
            gate.open.set()
        assert token.result()
