"""Pieces of the dense part against plain formulas: norm, rotary embedding, window."""

import jax.numpy as jnp
import numpy as np

from m2jax import kv as kv_module
from m2jax import model, rope
from m2jax.kv import block_sizes, capacity_for
from tests.small_configs import tiny

# float32 against float64, for numbers near 1.
ROUNDING = 1e-5
TOKENS, GROUPS, SHARE, HEAD, CAPACITY = 5, 2, 3, 8, 32


def normal(*shape: int, seed: int) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


def test_rotary_embedding_turns_pairs_as_complex_numbers():
    config = tiny("llama", head_dim=HEAD, rope_theta=5000.0)
    x, positions = normal(TOKENS, 3, HEAD, seed=0), np.array([0, 1, 7, 100, 1000])
    frequency = 5000.0 ** (-np.arange(0, HEAD, 2) / HEAD)
    turn = np.exp(1j * np.outer(positions, frequency))[:, None, :]
    turned = (x[..., : HEAD // 2] + 1j * x[..., HEAD // 2 :]) * turn
    wanted = np.concatenate([turned.real, turned.imag], axis=-1)
    given = rope.rotate(
        jnp.array(x), jnp.array(positions), rope.inverse_frequencies(config)
    )
    # An angle of 1000 radians is rounded to 6e-5.
    assert np.abs(given - wanted).max() < 3e-4
    assert np.abs(given - wanted)[:3].max() < ROUNDING


def test_norm_divides_by_the_root_of_the_mean_square():
    x, weight = normal(TOKENS, 3, HEAD, seed=0), normal(HEAD, seed=1)
    root = np.sqrt(np.mean(x.astype(float) ** 2, axis=-1, keepdims=True) + 0.5)
    given = model.rms_norm(jnp.array(x), jnp.array(weight), eps=0.5)
    assert np.abs(given - x / root * weight).max() < ROUNDING


def test_a_block_is_written_at_its_position_and_nowhere_else():
    config = tiny("llama", num_hidden_layers=1, head_dim=HEAD, num_key_value_heads=2)
    (empty,) = kv_module.init_kv(config, CAPACITY)
    block = normal(2, TOKENS, HEAD, seed=0)
    found = kv_module.write(empty, jnp.array(block), jnp.array(-block), jnp.int32(9))
    wanted = np.zeros((2, CAPACITY, HEAD), np.float32)
    wanted[:, 9 : 9 + TOKENS] = block
    assert np.array_equal(found.keys, wanted)
    assert np.array_equal(found.values, -wanted)


def test_prompts_are_cut_into_few_kinds_of_blocks_that_hold_them():
    for tokens in range(1, 2000):
        sizes = block_sizes(tokens)
        assert sum(sizes[:-1]) < tokens <= sum(sizes)
        assert set(sizes) <= {16, 64, 256, 512}


def test_capacities_are_powers_of_two_that_suffice():
    for positions in range(1, 3000):
        capacity = capacity_for(positions)
        assert capacity >= positions
        assert capacity & (capacity - 1) == 0
        assert capacity == kv_module.MIN_CAPACITY or capacity < 2 * positions
