"""What is counted of entities, against another conlleval."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import pytest

from craft_cli.tasks.tags import by_kind, entities_of, entity_metrics

LABELS = ("O", "B-minus", "I-minus", "B-plus", "I-plus")


def chunks(tags: Sequence[str]) -> set[tuple[int, int, str]]:
    """The chunks that conlleval.pl counts in B- and I- tags."""
    found, start = set(), None
    for place, (before, tag) in enumerate(zip(["O", *tags], [*tags, "O"], strict=True)):
        same_kind = before[2:] == tag[2:]
        if start is not None and (tag[0] != "I" or not same_kind):
            found.add((start, place - 1, before[2:]))
            start = None
        if tag != "O" and start is None:
            start = place
    return found


def conlleval(gold: Sequence[Sequence[str]], guess: Sequence[Sequence[str]], kind: str | None = None) -> list[float]:
    """Precision, recall and F1, of all entities or of one kind."""
    kept = [
        {(row, *chunk) for row, tags in enumerate(side) for chunk in chunks(tags) if kind in (None, chunk[2])}
        for side in (gold, guess)
    ]
    right = len(kept[0] & kept[1])
    precision, recall = right / max(len(kept[1]), 1), right / max(len(kept[0]), 1)
    return [precision, recall, 2 * precision * recall / max(precision + recall, 1e-9)]


@pytest.mark.parametrize("seed", range(6))
def test_metrics_are_those_of_conlleval(seed: int) -> None:
    draw = random.Random(seed)
    gold, guess = ([draw.choices(LABELS, k=draw.randint(1, 9)) for _ in range(40)] for _ in range(2))
    guess = [[draw.choice((tag, other)) for tag, other in zip(a, a[::-1], strict=True)] for a in gold]
    assert all({(f, t, k) for k, f, t in entities_of(tags)} == chunks(tags) for tags in (*gold, *guess))
    found = entity_metrics(gold, guess)
    assert [found[name] for name in ("precision", "recall", "f1")] == pytest.approx(conlleval(gold, guess))
    right = [a == b for one, other in zip(gold, guess, strict=True) for a, b in zip(one, other, strict=True)]
    assert found["accuracy"] == sum(right) / len(right)
    for kind, row in by_kind(gold, guess, ("minus", "plus")).items():
        assert [row[name] for name in ("precision", "recall", "f1")] == pytest.approx(conlleval(gold, guess, kind))
        assert row["support"] == sum(chunk[2] == kind for tags in gold for chunk in chunks(tags))


@pytest.mark.parametrize(("gold", "guess"), [("O", "O"), ("O", "B-plus"), ("B-plus", "O"), ("", "")])
def test_metrics_without_entities_are_numbers(gold: str, guess: str) -> None:
    rows = [[gold] if gold else []], [[guess] if guess else []]
    found = entity_metrics(*rows)
    assert found["f1"] == found["precision"] == found["recall"] == 0.0
    assert all(math.isfinite(value) for value in found.values())
    table = by_kind(*rows, ("minus", "plus"))
    assert {type(row[name]) for row in (found, *table.values()) for name in ("f1", "precision", "recall")} == {float}
    assert [list(row) for row in table.values()] == [["precision", "recall", "f1", "support"]] * 2
