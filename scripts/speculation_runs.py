"""How much of a draft is right, as plain JSON values; what the runs share."""

from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

import m2jax
from m2jax.cache.trace import Trace
from m2jax.draft.drafters import BaseDrafter
from m2jax.draft.loop import Speculation
from m2jax.draft.pace import Pace
from m2jax.engine import Engine

TEXTS = Path(__file__).parent / "data" / "text"
NAMES = ("python", "stories", "english")
TARGETS = ("100/0/0", "0/100/0", "25/25/50")
LENGTHS = (2, 4, 8, 16, 32)
TEMPERATURES = (0.0, 0.6, 1.0)
UNION_MIXES = ("25/25/50", "0/25/75", "0/10/90")
WINDOWS = (1, 2, 4, 8, 16, 32)
CONTEXT = 512

Say = Callable[[str], None]


class Sizes:
    """How much is measured: everything, or next to nothing."""

    def __init__(self, *, toy: bool):
        self.toy = toy
        self.prompt = 16 if toy else 128
        self.new = 8 if toy else 128
        self.prompts = 1 if toy else 4
        self.gain_prompts = 1 if toy else 20
        self.lengths = (4,) if toy else LENGTHS
        self.temperatures = TEMPERATURES[:1] if toy else TEMPERATURES
        self.targets = TARGETS[:1] if toy else TARGETS
        self.repeats = 1 if toy else 3


def prompts(engine: Engine, name: str, *, length: int, count: int) -> list[list[int]]:
    """Evenly spread over a text, each behind a BOS."""
    tokenizer = engine.tokenizer
    assert tokenizer is not None
    front = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    ids = tokenizer.encode((TEXTS / f"{name}.txt").read_text(), add_bos=False)
    step = (len(ids) - length) // count
    width = length - len(front)
    return [front + ids[n * step : n * step + width] for n in range(count)]


def run(engine: Engine, prompt: list[int], sizes: Sizes, **options: Any):
    return engine.generate(
        prompt, max_new_tokens=sizes.new, ignore_eos=True, seed=0, **options
    )


def acceptance(store: Path, sizes: Sizes, say: Say) -> list[dict[str, Any]]:
    """Drafted tokens that were right and tokens a sweep, by target, draft and text."""
    found = []
    for mix, length in product(sizes.targets, sizes.lengths):
        say(f"acceptance at {mix}, {length} drafted")
        with m2jax.load(
            store, mix=mix, context=CONTEXT, draft="base", draft_tokens=length
        ) as engine:
            found += [
                {"mix": mix, "drafted": length, **row}
                for row in _accepted(engine, sizes)
            ]
    return found


def _accepted(engine: Engine, sizes: Sizes) -> Iterator[dict[str, Any]]:
    for name, temperature in product(NAMES, sizes.temperatures):
        decodes = [
            run(engine, prompt, sizes, temperature=temperature).stats.decode
            for prompt in prompts(
                engine, name, length=sizes.prompt, count=sizes.prompts
            )
        ]
        sweeps = sum(decode.sweeps for decode in decodes)
        drafted = sum(decode.drafted for decode in decodes)
        accepted = sum(decode.accepted for decode in decodes)
        yield {
            "text": name,
            "temperature": temperature,
            "accepted_per_sweep": accepted / max(sweeps, 1),
            "accepted_share": accepted / max(drafted, 1),
        }


def widths(store: Path, sizes: Sizes, say: Say) -> list[dict[str, Any]]:
    """The base plane rounded to its top 3 and 2 bits as the draft."""
    found = []
    for bits in (4, 3, 2):
        say(f"a draft of {bits} bits")
        with m2jax.load(store, mix="100/0/0", context=CONTEXT, draft="base") as engine:
            drafter = BaseDrafter(engine.runner)
            drafter._planes = [
                {"q4": _top_bits(planes["q4"], bits)} for planes in drafter._planes
            ]
            count = sizes.lengths[-2] if len(sizes.lengths) > 1 else sizes.lengths[0]
            engine._speculation = Speculation(
                engine.runner, drafter, Pace(fixed=count), kind="base"
            )
            found += [
                {"bits": bits, "drafted": count, **row}
                for row in _accepted(engine, sizes)
            ]
    return found


def _top_bits(q4: Any, bits: int) -> Any:
    """Nibbles rounded to multiples of 2^(4 - bits), within -8 .. 7 about 8."""
    step = 1 << (4 - bits)
    packed = np.asarray(q4)

    def rounded(nibbles: np.ndarray) -> np.ndarray:
        signed = nibbles.astype(np.int32) - 8
        near = step * np.floor(signed / step + 0.5).astype(np.int32)
        return (np.clip(near, -8, 8 - step) + 8).astype(np.uint8)

    return jnp.asarray(rounded(packed & 15) | (rounded(packed >> 4) << 4))


def coupling(store: Path, sizes: Sizes, say: Say) -> list[dict[str, Any]]:
    """Chance that a drafted token stands: by rejection sampling, and by the same noise
    for both models, which gives the same text whatever is drafted."""
    say("rejection against common noise")
    found = []
    with (
        m2jax.load(store, mix="100/0/0", context=CONTEXT, draft="none") as target,
        m2jax.load(store, mix="0/0/100", context=CONTEXT, draft="none") as draft,
    ):
        for temperature, name in product(sizes.temperatures, NAMES):
            if temperature == 0:
                continue
            both, same = [], []
            for prompt in prompts(
                target, name, length=sizes.prompt, count=sizes.prompts
            ):
                text = run(target, prompt, sizes, temperature=temperature)
                ids = [*prompt, *text.token_ids]
                p, q = (
                    _softmax(engine.logits(ids)[len(prompt) - 1 : -1] / temperature)
                    for engine in (target, draft)
                )
                both.append(np.minimum(p, q).sum(axis=1))
                noise = np.random.default_rng(0).gumbel(size=p.shape)
                tiny = np.finfo(np.float32).tiny
                same.append(
                    np.argmax(np.log(p + tiny) + noise, axis=1)
                    == np.argmax(np.log(q + tiny) + noise, axis=1)
                )
            found.append(
                {
                    "text": name,
                    "temperature": temperature,
                    "rejection": float(np.mean(np.concatenate(both))),
                    "common_noise": float(np.mean(np.concatenate(same))),
                }
            )
    return found


def _softmax(logits: np.ndarray) -> np.ndarray:
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    return shifted / shifted.sum(axis=1, keepdims=True)


def rounding(store: Path, sizes: Sizes, say: Say) -> list[dict[str, Any]]:
    """How far logprobs of the same text differ between sweeps and single tokens."""
    say("rounding")
    found = []
    for mix in sizes.targets:
        with (
            m2jax.load(store, mix=mix, context=CONTEXT, draft="none") as plain,
            m2jax.load(
                store, mix=mix, context=CONTEXT, draft="base", draft_tokens=15
            ) as drafting,
        ):
            worst = 0.0
            for name in NAMES:
                for prompt in prompts(
                    plain, name, length=sizes.prompt, count=sizes.prompts
                ):
                    one, many = (
                        run(engine, prompt, sizes, temperature=1.0)
                        for engine in (plain, drafting)
                    )
                    assert one.token_ids == many.token_ids
                    differ = np.abs(np.subtract(one.logprobs, many.logprobs))
                    worst = max(worst, float(differ.max()))
            found.append({"mix": mix, "largest_difference": worst})
    return found


def unions(store: Path, sizes: Sizes, say: Say) -> list[dict[str, Any]]:
    """Share of a layer's neurons that a window of tokens wants above 4 bits."""
    found = []
    for mix in UNION_MIXES[: len(sizes.targets)]:
        say(f"unions at {mix}")
        with m2jax.load(store, mix=mix, context=CONTEXT, draft="none") as engine:
            shares: dict[int, list[float]] = {window: [] for window in WINDOWS}
            for name in NAMES:
                for prompt in prompts(
                    engine, name, length=sizes.prompt, count=max(1, sizes.prompts // 2)
                ):
                    trace = Trace()
                    engine.record(trace)
                    run(engine, prompt, sizes)
                    engine.record(None)
                    _add_unions(shares, trace, engine.specs[0].neurons)
        found.append(
            {
                "mix": mix,
                "share": {w: float(np.mean(s)) for w, s in shares.items() if s},
            }
        )
    return found


def _add_unions(shares: dict[int, list[float]], trace: Trace, neurons: int) -> None:
    wanted: dict[int, dict[int, set[int]]] = {}
    for entry in trace.entries():
        of_step = wanted.setdefault(entry.layer, {}).setdefault(entry.step, set())
        of_step.update(entry.wanted.tolist())
    for steps in wanted.values():
        sets = [steps[step] for step in sorted(steps)]
        for window in shares:
            for start in range(0, len(sets) - window + 1, window):
                union = set().union(*sets[start : start + window])
                shares[window].append(len(union) / neurons)
