"""Multiple choice: which of several continuations a model finds likelier.

Questions are JSON lines in the form of ARC ({"query", "choices", "gold"}), PIQA
({"goal", "sol1", "sol2"}, labels in a file beside) or BLiMP ({"sentence_good",
"sentence_bad"}). Prints nothing.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from m2jax.strict_json import parse_json, show

if TYPE_CHECKING:
    from m2jax.engine import Engine

MOST_CHOICES = 64
# Nearer than this, in nats, float32 sums do not tell two choices apart.
TIE = 1e-6

Progress = Callable[[int, int], None]


class Question(NamedTuple):
    """context: what all choices follow; "" where each is a text of its own."""

    context: str
    choices: tuple[str, ...]
    gold: int


def read_questions(path: Path) -> list[Question]:
    """Questions of a file; its form is that of its first line.

    Raises:
        ValueError: missing, a folder, not UTF-8, no questions, or a line that is none;
        names it. OSError: the machine could not read it.
    """
    facts = []
    # Not splitlines(): U+2028 and the like may stand inside a string.
    for number, line in enumerate(_read(path, "JSON lines").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            fact = parse_json(line.encode())
        except ValueError as error:
            raise ValueError(f"{path}: line {number}: {error}") from None
        if not isinstance(fact, dict):
            raise ValueError(f"{path}: line {number}: want an object")
        facts.append((f"{path}: line {number}", fact))
    if not facts:
        raise ValueError(f"{path}: has no questions")
    first = facts[0][1]
    if "choices" in first:
        return [_arc(where, fact) for where, fact in facts]
    if "sol1" in first:
        labels = _labels(path, len(facts))
        return [_piqa(w, fact, gold) for (w, fact), gold in zip(facts, labels)]
    if "sentence_good" in first:
        return [_blimp(where, fact) for where, fact in facts]
    raise ValueError(
        f"{facts[0][0]}: fields {', '.join(map(str, first))}: want choices and gold, "
        "sol1 and sol2, or sentence_good and sentence_bad"
    )


def _read(path: Path, wanted: str) -> str:
    try:
        return path.read_bytes().decode()
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise ValueError(f"{path}: a folder; want a file of {wanted}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8, byte {error.start}") from None


def _text(fact: dict[str, Any], field: str, where: str) -> str:
    value = fact.get(field)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{where}: {field}: want text, got {show(value)}")
    return value


def _arc(where: str, fact: dict[str, Any]) -> Question:
    choices, gold = fact.get("choices"), fact.get("gold")
    if not isinstance(choices, list) or not 2 <= len(choices) <= MOST_CHOICES:
        raise ValueError(f"{where}: choices: want 2 to {MOST_CHOICES} texts")
    texts = tuple(_text({"choices": choice}, "choices", where) for choice in choices)
    if type(gold) is not int or not 0 <= gold < len(texts):
        raise ValueError(f"{where}: gold: want 0 to {len(texts) - 1}, got {show(gold)}")
    return Question(_text(fact, "query", where) + "\nAnswer:", texts, gold)


def _piqa(where: str, fact: dict[str, Any], gold: int) -> Question:
    sides = (_text(fact, "sol1", where), _text(fact, "sol2", where))
    return Question(_text(fact, "goal", where), sides, gold)


def _labels(path: Path, count: int) -> list[int]:
    """0 or 1 a line, from `<name>_labels.lst` or `<name>-labels.lst` beside."""
    beside = [path.with_name(f"{path.stem}{mark}labels.lst") for mark in "_-"]
    found = next((one for one in beside if one.is_file()), None)
    if found is None:
        raise ValueError(f"{path}: the right answers are wanted in {beside[0]}")
    lines = _read(found, "labels").split()
    if len(lines) != count or not set(lines) <= {"0", "1"}:
        raise ValueError(f"{found}: want {count} lines of 0 or 1, got {len(lines)}")
    return [int(line) for line in lines]


def _blimp(where: str, fact: dict[str, Any]) -> Question:
    sides = (_text(fact, "sentence_good", where), _text(fact, "sentence_bad", where))
    return Question("", sides, 0)


def score_questions(
    engine: "Engine",
    questions: list[Question],
    *,
    limit: int | None = None,
    progress: Progress = lambda done, total: None,
) -> dict[str, Any]:
    """How often the right choice is the likeliest.

    A choice's log-likelihood given its context, as it is (by sum) or divided by its
    UTF-8 bytes or by its tokens. Equal choices share the point. A question too long for
    the engine's context loses the beginning of its context.

    Args:
        limit: only the first so many. progress: questions done and in all.

    Returns:
        questions, chance, cut_questions, and for each of accuracy_by_sum,
        accuracy_per_byte and accuracy_per_token its value and, under <name>_error, its
        standard error; picks: the likeliest choice a byte of each question.

    Raises:
        ValueError: no tokenizer, a limit below 1, a choice longer than the context.
        NumericalError: the model's probabilities hold NaN.
    """
    if engine.tokenizer is None:
        raise ValueError("questions need a tokenizer, and this store has none")
    if limit is not None and limit < 1:
        raise ValueError(f"--limit {limit}: want 1 or more")
    chosen = questions[:limit]
    points: dict[str, list[float]] = {"by_sum": [], "per_byte": [], "per_token": []}
    picks, cut = [], 0
    for number, question in enumerate(chosen):
        scored = [_score(engine, question.context, text) for text in question.choices]
        cut += any(one.cut for one in scored)
        sums = [one.logprob for one in scored]
        sizes = [len(text.encode()) for text in question.choices]
        by = {
            "by_sum": sums,
            "per_byte": [total / size for total, size in zip(sums, sizes)],
            "per_token": [total / one.tokens for total, one in zip(sums, scored)],
        }
        for name, values in by.items():
            points[name].append(_point(values, question.gold))
        picks.append(max(range(len(sizes)), key=lambda n: by["per_byte"][n]))
        progress(number + 1, len(chosen))
    chance = sum(1 / len(question.choices) for question in chosen) / len(chosen)
    facts: dict[str, Any] = {
        "questions": len(chosen),
        "chance": chance,
        "cut_questions": cut,
    }
    for name, got in points.items():
        mean = sum(got) / len(got)
        facts[f"accuracy_{name}"] = mean
        facts[f"accuracy_{name}_error"] = _error(got, mean)
    return {**facts, "picks": picks}


class _Scored(NamedTuple):
    logprob: float
    tokens: int
    cut: bool


def _score(engine: "Engine", context: str, choice: str) -> _Scored:
    """log p of a choice's tokens after its context.

    Both are tokenised as one text, so that tokens join where they would in it; what
    they share with the tokens of the context alone is context.
    """
    tokenizer = engine.tokenizer
    assert tokenizer is not None
    before = tokenizer.encode(context) if context else []
    whole = tokenizer.encode(f"{context} {choice}" if context else choice)
    first = 0
    while first < min(len(before), len(whole) - 1) and before[first] == whole[first]:
        first += 1
    # Nothing stands before the first token of all: it cannot be scored.
    first = max(first, 1)
    if len(whole) < 2:
        raise ValueError(f"choice {show(choice)}: one token and nothing before it")
    room = engine.context
    if len(whole) - first >= room:
        raise ValueError(
            f"choice {show(choice)} has {len(whole) - first} tokens, the context "
            f"holds {room}: give a larger --context"
        )
    cut = max(0, len(whole) - room)
    logprobs = engine.logprobs(whole[cut:])
    taken = logprobs[first - cut - 1 :]
    return _Scored(float(taken.sum(dtype="float64")), len(taken), cut > 0)


def _point(values: list[float], gold: int) -> float:
    """1 for the likeliest choice, a share of it among equals."""
    best = max(values)
    equal = [place for place, value in enumerate(values) if best - value <= TIE]
    return 1 / len(equal) if gold in equal else 0.0


def _error(points: list[float], mean: float) -> float | None:
    if len(points) < 2:
        return None
    spread = sum((point - mean) ** 2 for point in points) / (len(points) - 1)
    return math.sqrt(spread / len(points))
