"""Multiple choice: questions of every form, and who scores them right."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

import m2jax
from m2jax.choices import Question, read_questions, score_questions

ARC = {"query": "Question: What barks?", "choices": ["a cat", "a dog"], "gold": 1}
PIQA = {"goal": "sweep", "sol1": "use a broom", "sol2": "use a spoon"}
BLIMP = {"sentence_good": "Dogs bark.", "sentence_bad": "Dogs barks.", "UID": "x"}


class Letters:
    """A tokenizer of characters, BOS 0 in front."""

    def encode(self, text: str, *, add_bos: bool = True) -> list[int]:
        return [0] * add_bos + [ord(letter) for letter in text]


class Table:
    """An engine that knows the log-probability of every character."""

    def __init__(self, table: dict[str, float], *, context: int = 100):
        self.tokenizer, self.context = Letters(), context
        self._table = table
        self.seen: list[str] = []

    def logprobs(self, ids: list[int]) -> np.ndarray:
        assert len(ids) <= self.context
        self.seen.append("".join(map(chr, ids)))
        return np.array(
            [self._table.get(chr(token), -1.0) for token in ids[1:]], np.float32
        )


def write(path: Path, *facts: object) -> Path:
    path.write_text("\n".join(map(json.dumps, facts)) + "\n")
    return path


def test_every_form_is_read(tmp_path):
    assert read_questions(write(tmp_path / "arc.jsonl", ARC)) == [
        Question("Question: What barks?\nAnswer:", ("a cat", "a dog"), 1)
    ]
    (tmp_path / "piqa_labels.lst").write_text("0\n1\n")
    found = read_questions(write(tmp_path / "piqa.jsonl", PIQA, PIQA))
    assert [question.gold for question in found] == [0, 1]
    assert found[0][:2] == ("sweep", ("use a broom", "use a spoon"))
    assert read_questions(write(tmp_path / "blimp.jsonl", BLIMP)) == [
        Question("", ("Dogs bark.", "Dogs barks."), 0)
    ]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "has no questions"),
        (b"{]\n", "line 1: not JSON"),
        (b"[1]\n", "line 1: want an object"),
        (
            json.dumps(ARC).encode() + b"\n" + b"[" * 100_000,
            "line 2: nested too deeply",
        ),
        (b'{"gold": 1, "gold": 0}', "line 1: key 'gold' appears twice"),
        (b'{"question": "?", "answer": "4"}\n', "line 1: fields question, answer"),
        (b"\xff{}", "not UTF-8, byte 0"),
        (json.dumps({**ARC, "gold": 2}).encode(), "line 1: gold: want 0 to 1, got 2"),
        (json.dumps({**ARC, "gold": True}).encode(), "line 1: gold"),
        (json.dumps({**ARC, "choices": ["one"]}).encode(), "choices: want 2 to"),
        (json.dumps({**ARC, "choices": ["a", 5]}).encode(), "choices: want text"),
        (json.dumps({**ARC, "query": " "}).encode(), "query: want text"),
        (json.dumps(PIQA).encode(), "right answers are wanted in .*_labels.lst"),
        (json.dumps(BLIMP).encode() + b"\n{}", "line 2: sentence_good: want text"),
    ],
)
def test_a_file_of_no_questions_is_refused_in_one_line(content, says, tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=says) as caught:
        read_questions(path)
    assert "\n" not in str(caught.value)


def test_a_path_that_is_no_file_is_refused_in_one_line(tmp_path):
    with pytest.raises(ValueError, match=r"none\.jsonl: no such file"):
        read_questions(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="a folder; want a file of JSON lines"):
        read_questions(tmp_path)


def test_a_line_ends_where_json_lines_end(tmp_path):
    query = "one\u2028two\x85three"
    line = json.dumps({**ARC, "query": query}, ensure_ascii=False)
    (tmp_path / "arc.jsonl").write_bytes(f"{line}\r\n{line}\r\n".encode())
    found = read_questions(tmp_path / "arc.jsonl")
    assert [question.context for question in found] == [f"{query}\nAnswer:"] * 2


def test_labels_that_are_no_text_are_named(tmp_path):
    path = write(tmp_path / "piqa.jsonl", PIQA)
    (tmp_path / "piqa_labels.lst").write_bytes(b"0\xff\n")
    with pytest.raises(ValueError, match=r"piqa_labels\.lst: not UTF-8, byte 1"):
        read_questions(path)


def test_labels_must_be_one_a_question(tmp_path):
    path = write(tmp_path / "piqa.jsonl", PIQA)
    (tmp_path / "piqa-labels.lst").write_text("0\n1\n")
    with pytest.raises(ValueError, match="want 1 lines of 0 or 1, got 2"):
        read_questions(path)


def test_choices_are_scored_after_their_context_alone():
    engine = Table({"a": -1.0, "b": -2.0, "c": -30.0})
    found = score_questions(engine, [Question("ccc", ("aa", "b"), 1)])
    assert engine.seen == ["\0ccc aa", "\0ccc b"]
    # The space (-1) is the choice's: sums -3 and -3 share the point.
    assert found["accuracy_by_sum"] == 0.5
    # -3 / 2 against -3 / 1.
    assert found["accuracy_per_byte"] == 0
    assert found["picks"] == [0]
    # -3 / 3 against -3 / 2.
    assert found["accuracy_per_token"] == 0


def test_a_sentence_without_context_is_scored_from_its_first_token():
    engine = Table({"a": -1.0, "b": -3.0})
    found = score_questions(engine, [Question("", ("ab", "bb"), 0)])
    assert engine.seen == ["\0ab", "\0bb"]
    assert found["accuracy_by_sum"] == 1


def test_bytes_count_as_utf8():
    engine = Table({"é": -1.5, "a": -1.0})
    found = score_questions(engine, [Question("", ("éé", "aa"), 0)])
    assert found["accuracy_per_byte"] == 1
    assert found["accuracy_per_token"] == 0


def test_a_long_context_loses_its_beginning_and_is_counted():
    engine = Table({}, context=8)
    found = score_questions(
        engine, [Question("0123456789", ("a", "b"), 0), Question("0", ("a", "b"), 0)]
    )
    assert engine.seen[0] == "456789 a"
    assert found["cut_questions"] == 1
    with pytest.raises(ValueError, match="has 9 tokens, the context holds 8"):
        score_questions(engine, [Question("x", ("a" * 8, "b"), 0)])


def test_means_have_standard_errors_and_chance_is_said():
    engine = Table({"a": -1.0, "b": -2.0})
    questions = [Question("", ("a", "b"), gold) for gold in (0, 0, 0, 1)]
    questions += [Question("", ("a", "b", "b", "b"), 0)]
    found = score_questions(engine, questions)
    assert found["questions"] == 5
    assert found["accuracy_by_sum"] == pytest.approx(0.8)
    assert found["accuracy_by_sum_error"] == pytest.approx(math.sqrt(0.2 / 5))
    assert found["chance"] == pytest.approx((4 * 0.5 + 0.25) / 5)
    few = score_questions(engine, questions, limit=1)
    assert few["questions"] == 1
    assert few["accuracy_by_sum_error"] is None
    with pytest.raises(ValueError, match="--limit 0"):
        score_questions(engine, questions, limit=0)


def test_the_bundled_model_prefers_its_own_language(bundled_store):
    engine = m2jax.load(bundled_store, mix="0/100/0", context=128)
    questions = [
        Question("Once upon a time, there was a little", ("girl", "zqx"), 0),
        Question("import numpy as", ("elephant", "np"), 1),
        Question("", ("She was very happy.", "Happy very was she the."), 0),
    ]
    found = score_questions(engine, questions)
    assert found["accuracy_per_byte"] == found["accuracy_by_sum"] == 1
    assert found["cut_questions"] == 0
