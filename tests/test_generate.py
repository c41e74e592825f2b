"""A generation: when it ends, what its text is, and what its figures say."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import jax
import pytest

import m2jax
from m2jax.cache.trace import Trace
from m2jax.engine import Engine
from m2jax.runner import Runner
from m2jax.stream import Generation

STORY = "Once upon a time, there was a little dog named"
NEW_TOKENS = 16
IDS = [3, 17, 5, 80, 33, 2, 64, 9, 11]


@pytest.fixture(scope="module")
def engine(bundled_store: Path) -> Engine:
    """Real text: the bundled model, everything resident."""
    return m2jax.load(bundled_store, mix="100/0/0")


@pytest.fixture(scope="module")
def story(engine: Engine) -> Generation:
    """Greedy text; with a stop string that does not come, so that runs are short."""
    return engine.generate(STORY, max_new_tokens=NEW_TOKENS, stop=["\0"])


@pytest.fixture(scope="module")
def tiny(tiny_store: Path) -> Engine:
    """Random weights, no tokenizer, a short context."""
    return m2jax.load(tiny_store, mix="0/25/75", context=40)


@pytest.fixture
def host_loop(tiny: Engine) -> Iterator[Engine]:
    tiny.record(Trace())
    yield tiny
    tiny.record(None)


@pytest.fixture(params=["tiny", "host_loop"])
def either_loop(request: pytest.FixtureRequest) -> Engine:
    """Decoding without the host, and with it."""
    return request.getfixturevalue(request.param)


def test_a_stream_joined_is_the_text_of_generate(engine, story):
    stream = engine.stream(STORY, max_new_tokens=NEW_TOKENS)
    pieces = list(stream)
    assert len(pieces) > 3
    assert "".join(pieces) == story.text == stream.result().text
    assert stream.result().token_ids == story.token_ids


def test_of_a_prompt_only_the_last_row_stays_on_the_device(tiny):
    def rows() -> list[tuple[int, ...]]:
        return [array.shape for array in jax.live_arrays()]

    block = (64, tiny.config.hidden_size)
    before = rows().count(block)
    runs = tiny.stream([3] * 30, max_new_tokens=5, ignore_eos=True)._token_runs()
    next(runs)
    assert rows().count(block) == before
    runs.close()


def test_text_is_what_the_tokens_decode_to_after_the_prompt(engine, story):
    prompt = engine.encode(STORY)
    assert story.prompt_tokens == len(prompt)
    whole = engine.tokenizer.decode([*prompt, *story.token_ids])
    assert whole == engine.tokenizer.decode(prompt) + story.text
    assert len(story.token_ids) == NEW_TOKENS
    assert story.finish_reason == "length"


def test_token_ids_as_a_prompt_give_what_their_text_gives(engine, story):
    ids = engine.encode(STORY)
    done = engine.generate(ids, max_new_tokens=NEW_TOKENS, stop=["\0"])
    assert done.token_ids == story.token_ids
    assert done.text == story.text


@pytest.mark.parametrize("way", ["generate", "stream"])
@pytest.mark.parametrize("boundary", [1, 5, 9])
def test_a_stop_string_over_a_token_boundary_ends_the_text_before_it(
    engine, story, boundary, way
):
    parts = [engine.tokenizer.decode([token]) for token in story.token_ids]
    stop = parts[boundary - 1][-1] + parts[boundary][:2]
    options = {"max_new_tokens": NEW_TOKENS, "stop": [stop]}
    if way == "generate":
        done = engine.generate(STORY, **options)
    else:
        stream = engine.stream(STORY, **options)
        assert "".join(stream) == story.text.split(stop)[0]
        done = stream.result()
    assert done.text == story.text.split(stop)[0]
    assert done.finish_reason == "stop"
    assert len(done.token_ids) <= boundary + 1


def test_a_stop_string_within_the_beginning_of_a_longer_one_is_a_stop(engine, story):
    """Held back until the text ends, by length."""
    tail = story.text[-3:]
    done = engine.generate(
        STORY, max_new_tokens=NEW_TOKENS, stop=[tail + "more", tail[1:]]
    )
    assert done.text == story.text[: story.text.find(tail[1:])]
    assert done.finish_reason == "stop"


def test_a_stop_string_in_the_first_token_leaves_no_text(engine, story):
    first = engine.tokenizer.decode(story.token_ids[:1])
    done = engine.generate(STORY, max_new_tokens=NEW_TOKENS, stop=[first])
    assert (done.text, done.finish_reason) == ("", "stop")
    assert done.token_ids == story.token_ids[:1]


def test_of_several_stop_strings_the_one_that_begins_first_wins(engine, story):
    stops = [story.text[20:24], story.text[8:14], story.text[9:11]]
    done = engine.generate(STORY, max_new_tokens=NEW_TOKENS, stop=stops)
    begins = min(story.text.find(stop) for stop in stops)
    assert done.text == story.text[:begins]


@pytest.mark.parametrize("stop", [[""], "end", [b"end"], 5, iter(["end"])])
def test_a_stop_that_is_no_list_of_texts_is_refused(engine, stop):
    with pytest.raises(ValueError, match="stop"):
        engine.generate(STORY, stop=stop)


def test_an_end_of_text_token_ends_the_text_and_is_kept(either_loop, monkeypatch):
    free = either_loop.generate(IDS, max_new_tokens=14, ignore_eos=True)
    for place in (0, 3):
        ends = (free.token_ids[place],)
        first = free.token_ids.index(ends[0])
        ending = replace(either_loop.config, eos_token_ids=ends)
        monkeypatch.setattr(Runner, "config", property(lambda _, c=ending: c))
        done = either_loop.generate(IDS, max_new_tokens=14)
        assert done.token_ids == free.token_ids[: first + 1]
        assert done.finish_reason == "stop"
        ignoring = either_loop.generate(IDS, max_new_tokens=14, ignore_eos=True)
        assert ignoring.token_ids == free.token_ids
        assert ignoring.finish_reason == "length"


def test_text_held_back_for_a_stop_string_is_shown_when_the_model_ends(
    engine, story, monkeypatch
):
    end = story.token_ids[6]
    tokens = story.token_ids[: story.token_ids.index(end) + 1]
    ending = replace(engine.config, eos_token_ids=(end,))
    monkeypatch.setattr(Runner, "config", property(lambda _: ending))
    text = engine.tokenizer.decode(tokens)
    done = engine.generate(STORY, max_new_tokens=NEW_TOKENS, stop=[text[-3:] + "\0"])
    assert done.token_ids == tokens
    assert done.text == text


def test_no_new_token_is_a_generation_without_work(tiny):
    before = tiny._runner.counters()
    done = tiny.generate(IDS, max_new_tokens=0)
    assert (done.token_ids, done.logprobs) == ([], [])
    assert done.finish_reason == "length"
    assert tiny._runner.counters() == before
    assert done.stats.to_json()["timings"]["ttft_s"] is None


@pytest.mark.parametrize("asked", [31, 32, 10**9])
def test_new_tokens_are_clamped_to_what_the_context_leaves(either_loop, asked):
    stream = either_loop.stream(IDS, max_new_tokens=asked, ignore_eos=True)
    for _ in stream:
        pass
    done = stream.result()
    assert len(done.token_ids) == 40 - len(IDS)
    assert done.finish_reason == "length"


def test_a_prompt_that_fills_the_context_leaves_no_room(tiny):
    prompt = [index % 96 for index in range(40)]
    assert tiny.generate(prompt, max_new_tokens=5).token_ids == []
    assert tiny.logits(prompt).shape == (40, 96)
    assert len(tiny.generate(prompt[:-1], max_new_tokens=5).token_ids) == 1


@pytest.mark.parametrize("length", [41, 400])
def test_a_prompt_longer_than_the_context_is_refused_with_both_numbers(tiny, length):
    prompt = [index % 96 for index in range(length)]
    for run in (tiny.generate, tiny.stream, tiny.logits, tiny.logprobs):
        with pytest.raises(ValueError, match=f"{length} tokens, the context holds 40"):
            run(prompt)


@pytest.mark.parametrize("count", [-1, 1.5, "3", True, None])
def test_a_number_of_new_tokens_that_is_none_is_refused(tiny, count):
    with pytest.raises(ValueError, match="max_new_tokens"):
        tiny.generate(IDS, max_new_tokens=count)


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("", "prompt is empty"),
        ([], "prompt is empty"),
        ([1, 96], "token 1 is 96: want ids from 0 to 95"),
        ([-1], "token 0 is -1"),
        ("text", "no tokenizer"),
    ],
)
def test_a_prompt_that_cannot_be_run_is_refused(tiny, prompt, words):
    with pytest.raises(ValueError, match=words):
        tiny.generate(prompt)


def test_stop_strings_without_a_tokenizer_are_refused(tiny):
    with pytest.raises(ValueError, match="tokenizer"):
        tiny.generate(IDS, stop=["end"])


def test_a_result_is_not_given_before_the_end(tiny):
    stream = tiny.stream(IDS, max_new_tokens=3)
    with pytest.raises(RuntimeError, match="not ended"):
        stream.result()


def test_the_seed_that_is_reported_draws_the_same_tokens_again(host_loop):
    options = {"max_new_tokens": 14, "temperature": 2.0}
    first = host_loop.generate(IDS, **options)
    again = host_loop.generate(IDS, seed=first.seed, **options)
    assert again.token_ids == first.token_ids
    assert again.logprobs == first.logprobs


def test_a_large_penalty_keeps_tokens_of_prompt_and_text_from_coming_again(host_loop):
    options = {"max_new_tokens": 14, "ignore_eos": True}
    free = host_loop.generate(IDS, **options).token_ids
    assert len({*IDS, *free}) < len(IDS) + 14
    done = host_loop.generate(IDS, repetition_penalty=1e6, **options)
    assert len({*IDS, *done.token_ids}) == len(IDS) + 14


def test_two_streams_at_a_time_do_not_disturb_each_other(either_loop):
    prompts = (IDS, IDS[::-1])
    options = {"max_new_tokens": 14, "ignore_eos": True}
    alone = [either_loop.generate(prompt, **options) for prompt in prompts]
    streams = [either_loop.stream(prompt, **options) for prompt in prompts]
    running = [stream._token_runs() for stream in streams]
    together = [[], []]
    for runs in zip(*running, strict=True):
        for tokens, (made, _) in zip(together, runs, strict=True):
            tokens += made
    assert together == [done.token_ids for done in alone]


def test_a_streams_figures_are_of_its_end_whatever_the_engine_does_then(tiny_store):
    with m2jax.load(tiny_store, mix="25/25/50") as engine:
        stream = engine.stream([1, 17, 5], max_new_tokens=6, ignore_eos=True)
        for _ in stream:
            pass
        engine.generate([1, 17, 5], max_new_tokens=20, ignore_eos=True)
        stats = stream.result().stats
        again = engine.generate([1, 17, 5], max_new_tokens=6, ignore_eos=True).stats
    assert stats.request.hbm_accesses == again.request.hbm_accesses > 0
    assert stats.decode.hbm_accesses == again.decode.hbm_accesses
