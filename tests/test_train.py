"""scripts/train.py at toy size: it learns, resumes, and what it writes is a model."""

import importlib
import json
import random
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import m2jax
from m2jax.bundled import SOURCE
from tests.small_tokenizers import WORDS

SCRIPTS = Path(__file__).parents[1] / "scripts"
sys.path.append(str(SCRIPTS))
train, text, run, files, model = (
    importlib.import_module(name)
    for name in ("train", "train_text", "train_run", "train_files", "train_model")
)
PARITY = Path(__file__).parent / "fixtures" / "parity"
WEIGHTS = "model.safetensors"
# Weights near 0.02 lose up to 2^-11 of themselves as float16; logits here are near 1.
FLOAT16_ATOL = 1e-3


def sentences(seed: int, count: int) -> str:
    rng = random.Random(seed)
    lines = (" ".join(rng.choices(WORDS, k=9)) for _ in range(count))
    return "\n".join(lines)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    path.write_text(sentences(1, 300))
    return path


def options(out: Path, corpus: Path, *more: str) -> list[str]:
    line = [str(out), "--toy", "--text", str(corpus), "--lr", "1e-2", *more]
    return line if "--from" in more else [*line, "--tokenizer", str(SOURCE)]


class Stopped(BaseException):
    """Stands for the kill of a process."""


def stop_at_call(monkeypatch: pytest.MonkeyPatch, owner, name: str, call: int) -> None:
    """The call-th call of a function does not begin."""
    real, calls = getattr(owner, name), []

    def counted(*args, **kwargs):
        calls.append(None)
        if len(calls) == call:
            raise Stopped
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, counted)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, corpus: Path):
    """A folder trained without a break, what was said, and its float32 weights."""
    out = tmp_path_factory.mktemp("finished") / "model"
    lines: list[str] = []
    kept = {}
    real = train.write_folder
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            train,
            "write_folder",
            lambda out, raw, weights, **rest: (
                kept.update(weights),
                real(out, raw, weights, **rest),
            ),
        )
        train.train(train.arguments(options(out, corpus)), lines.append)
    return out, lines, kept


def held_out_losses(lines: list[str]) -> list[float]:
    return [float(line.split()[-1]) for line in lines if "held-out loss" in line]


def test_the_loss_falls(finished):
    before, after = held_out_losses(finished[1])
    # Eleven words: from ln 8192 = 9 towards ln 11 = 2.4.
    assert after < before - 2


def test_a_step_says_loss_speed_and_time_left(finished):
    (said,) = (line for line in finished[1] if line.startswith("step 10/20  loss "))
    assert "tokens/s  eta " in said


@pytest.mark.parametrize(
    ("owner", "name", "call", "goes_on_at"),
    [
        (run.Run, "advance", 3, 0),
        (run, "sync_path", 2, 16),  # the second checkpoint is there, the first too
        (run, "_checkpoints", 3, 8),  # the second is written and not yet named
        (train, "write_folder", 1, 16),
    ],
)
def test_a_killed_run_goes_on_to_the_bytes_of_one_that_was_not(
    owner, name, call, goes_on_at, finished, corpus, tmp_path
):
    args = train.arguments(options(tmp_path / "model", corpus))
    with pytest.MonkeyPatch.context() as patch:
        stop_at_call(patch, owner, name, call)
        with pytest.raises(Stopped):
            train.train(args, lambda _: None)
    assert not (args.out / "config.json").exists()
    kept = list((args.out / train.WORK).glob("step-*"))
    assert len(kept) <= (2 if name == "sync_path" else 1)
    said: list[str] = []
    train.train(args, said.append)
    assert any(line.startswith(f"step {goes_on_at}  held-out") for line in said)
    assert {file.name for file in args.out.iterdir()} >= {"config.json", WEIGHTS}
    for file in args.out.iterdir():
        assert file.read_bytes() == (finished[0] / file.name).read_bytes()


def own_logits(config, weights, ids, *, dtype=jnp.float32):
    apply = jax.jit(lambda w, i: model.apply(config, w, i, dtype=dtype))
    return jax.device_get(apply(weights, jnp.asarray(ids)))


def engine_logits(folder: Path, store: Path, ids: list[int]) -> np.ndarray:
    with m2jax.load(m2jax.convert(folder, store), mix="100/0/0", context=32) as engine:
        return engine.logits(ids)


def test_the_engine_computes_the_logits_of_the_trained_model(finished, tmp_path):
    out, _, weights = finished
    ids = [1, *np.random.default_rng(2).integers(5, 8000, 20).tolist()]
    _, config, _ = files.read_checkpoint(out)
    own, _ = own_logits(config, weights, [ids])
    found = engine_logits(out, tmp_path / "store", ids)
    np.testing.assert_allclose(found, own[0], atol=FLOAT16_ATOL, rtol=0)


def test_a_silu_model_goes_on_with_relu_untied_and_its_embedding_kept(tmp_path, corpus):
    first, second = tmp_path / "silu", tmp_path / "relu"
    assert train.main(options(first, corpus, "--untied", "--steps", "2")) == 0
    more = ("--from", str(first), "--hidden-act", "relu", "--freeze-embedding")
    assert train.main(options(second, corpus, *more)) == 0
    before, after = load_file(first / WEIGHTS), load_file(second / WEIGHTS)
    config = json.loads((second / "config.json").read_text())
    assert config["hidden_act"] == "relu"
    assert config["tie_word_embeddings"] is False
    same = {name for name in before if np.array_equal(before[name], after[name])}
    assert same == {model.EMBEDDING}
    ids = [1, *np.random.default_rng(3).integers(5, 8000, 20).tolist()]
    _, facts, weights = files.read_checkpoint(second)
    own, zeros = own_logits(facts, weights, [ids])
    assert np.all((zeros > 0.1) & (zeros < 0.9))
    found = engine_logits(second, tmp_path / "store", ids)
    np.testing.assert_allclose(found, own[0], atol=FLOAT16_ATOL, rtol=0)


def test_products_in_bfloat16_give_nearly_the_same_logits(finished):
    _, config, weights = files.read_checkpoint(finished[0])
    ids = np.random.default_rng(4).integers(5, 8000, (1, 21))
    exact, _ = own_logits(config, weights, ids)
    rough, _ = own_logits(config, weights, ids, dtype=jnp.bfloat16)
    error = np.abs(rough - exact).max() / np.abs(exact).max()
    # 2^-8 a rounding, some twenty in a row.
    assert 0 < error < 0.05


@pytest.mark.parametrize("bad", [5, 8])  # 8: a checkpoint would be due
def test_a_loss_that_is_no_number_stops_the_run_and_names_its_step(
    bad, corpus, tmp_path, capsys, monkeypatch
):
    real = run.Run.advance

    def advance(self, state, ids):
        state, loss = real(self, state, ids)
        return state, loss * jnp.float32(np.nan if state.step == bad else 1)

    monkeypatch.setattr(run.Run, "advance", advance)
    out = tmp_path / "model"
    assert train.main(options(out, corpus)) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == f"error: step {bad}: the loss is nan; lower --lr"
    # Nor is there a checkpoint of it to go on from.
    assert [path.name for path in (out / train.WORK).iterdir()] == [train.OPTIONS]


BAD = {
    "too short": (lambda _: ["--batch", "4000"], "the text has "),
    "no such text": (lambda _: ["--text", "nowhere"], "nowhere: no such file"),
    "not UTF-8": (lambda p: ["--text", str(p / "latin.txt")], "not UTF-8, byte 2"),
    "no tokenizer": (lambda p: ["--tokenizer", str(p)], "no tokenizer.json"),
    "other overlap": (lambda _: ["--exclude-overlap", "gone"], "gone: no such file"),
    "not plain LLaMA": (
        lambda _: ["--tokenizer", str(SOURCE), "--from", str(PARITY / "qwen3")],
        "only plain LLaMA is trained",
    ),
    "heads": (lambda _: ["--heads", "3"], "hidden_size"),
    "size of a part": (lambda _: ["--text", "x=-1"], "want PATH or PATH=MB"),
    "options changed": (lambda _: ["--seed", "7"], "begun with seed 0, now 7"),
    "full folder": (lambda _: [], "is not empty"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_code_2(
    case, corpus, tmp_path, capsys, monkeypatch
):
    (tmp_path / "latin.txt").write_bytes(b"na\xefve")
    out = tmp_path / "model"
    if case == "options changed":
        stop_at_call(monkeypatch, run.Run, "advance", 1)
        with pytest.raises(Stopped):
            train.main(options(out, corpus))
    elif case == "full folder":
        out.mkdir()
        (out / "mine.txt").write_text("mine")
    capsys.readouterr()
    more, says = BAD[case]
    assert train.main([*options(out, corpus), *more(tmp_path)]) == 2
    assert says in capsys.readouterr().err
    assert not (out / "config.json").exists()


def test_a_changed_text_is_not_trained_on_midway(corpus, tmp_path, capsys):
    copy, out = tmp_path / "text.txt", tmp_path / "model"
    copy.write_text(corpus.read_text())
    with pytest.MonkeyPatch.context() as patch:
        stop_at_call(patch, run.Run, "advance", 1)
        with pytest.raises(Stopped):
            train.main(options(out, copy))
    copy.write_text(corpus.read_text().replace("dog", "cat"))
    assert train.main(options(out, copy)) == 2
    assert "begun with text's digest" in capsys.readouterr().err


def test_a_file_that_repeats_held_out_lines_is_dropped(tmp_path):
    lines = [f"{n} {sentences(n, 1)}" for n in range(200)]
    (tmp_path / "held.txt").write_text("\n".join(lines[:100]))
    folder = tmp_path / "texts"
    folder.mkdir()
    for name, held in (("copied", 100), ("above", 31), ("below", 29), ("other", 0)):
        mine = lines[:held] + [f"{name} {line}" for line in lines[100 : 200 - held]]
        (folder / f"{name}.txt").write_text("\n".join(mine))
    found = text.documents([text.Source(folder)], without=[tmp_path / "held.txt"])
    assert [one.splitlines()[-1].split()[0] for one in found] == ["below", "other"]


def test_equal_texts_count_once_and_large_files_of_a_folder_not_at_all(tmp_path):
    for name, content in (("a", "x = 1"), ("b", "x = 1"), ("c", "#" * 200_001)):
        (tmp_path / f"{name}.py").write_text(content)
    twice = [text.Source(tmp_path), text.Source(tmp_path)]
    assert list(text.documents(twice, without=[])) == ["x = 1"]


def test_a_part_of_a_source_is_as_large_as_asked(tmp_path):
    for n in range(40):
        (tmp_path / f"{n}.txt").write_text(f"{n:04d}" * 250)
    source = text.parse_source(f"{tmp_path}=0.0105")
    assert len(list(text.documents([source], without=[]))) == 10


def test_an_epoch_passes_every_window_once_in_an_order_of_its_seed():
    ids = np.arange(12 * 8 + 1, dtype=np.int32)

    def epoch(number: int, seed: int) -> np.ndarray:
        steps = range(4 * number, 4 * number + 4)
        return np.concatenate(
            [text.batch(ids, s, size=3, length=8, seed=seed) for s in steps]
        )

    for number in (0, 1):
        starts = epoch(number, 5)[:, 0]
        assert sorted(starts) == list(range(0, 96, 8))
    assert np.array_equal(epoch(1, 5), epoch(1, 5))
    assert not np.array_equal(epoch(0, 5), epoch(1, 5))
    assert not np.array_equal(epoch(0, 5), epoch(0, 6))


def test_held_out_text_is_never_trained_on():
    tokenizer = files.find_tokenizer(SOURCE)
    for count in (1, 3, 400):
        texts = [f"{n} {sentences(n, 3)}" for n in range(count)]
        ids, held = text.token_streams(texts, tokenizer, eos_id=2)
        whole = sum(len(tokenizer.encode(one, add_bos=False)) + 2 for one in texts)
        assert len(ids) + len(held) == whole
        assert 0 < len(held) < 0.1 * whole or count == 3
        if count == 400:
            ends = [tokenizer.decode(part.tolist()) for part in (ids, held)]
            shared = [one for one in texts if one in ends[0] and one in ends[1]]
            assert not shared
