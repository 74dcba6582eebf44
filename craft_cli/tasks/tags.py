"""Tagging schemes, entities, and the counts of conlleval."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from craft_cli.errors import DataError

OUTSIDE = "O"
READ = ("B-", "I-", "E-", "S-")
"""Tag prefixes that `entities_of` reads."""
_TAG = re.compile("([BIESLUM])[-_](.+)", re.DOTALL)
_UNREAD = {
    r"[BIESLUM][-_]": " has no entity type; add one, such as B-person",
    r"o|[bi][-_].+": ": write O, B- and I- in capitals",
    r"\*\)*|\(.*\*\)*": " uses the brackets of CoNLL-2005 and CoNLL-2012; write O, B-... and I-... instead",
}
"""Unsupported tags, with what follows the tag in the message."""
_AS_IOBES = {"L": "E", "U": "S", "M": "I"}

Entity = tuple[str, int, int]  # type, first word, last word


def entities_of(tags: Sequence[str]) -> list[Entity]:
    """The entities of a sentence with tags in IOB1, IOB2 or IOBES; illegal sequences are read as in conlleval."""
    entities: list[Entity] = []
    for place, (before, tag) in enumerate(zip([OUTSIDE, *tags], tags, strict=False)):
        if tag[0] in "IE" and before[0] in "BI" and tag[2:] == before[2:]:
            kind, first, _ = entities.pop()
            entities.append((kind, first, place))
        elif tag != OUTSIDE:
            entities.append((tag[2:], place, place))
    return entities


def entity_metrics(gold: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> dict[str, float]:
    """Micro averages over entities, and word accuracy; 0 if there is nothing to count."""
    kinds = {kind for row in (*gold, *predicted) for kind, _, _ in entities_of(row)}
    right = [tag == other for rows in zip(gold, predicted, strict=True) for tag, other in zip(*rows, strict=True)]
    return _rates(_counted(gold, predicted, kinds)["overall"]) | {"accuracy": sum(right) / max(len(right), 1)}


def by_kind(gold: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]], kinds: Sequence[str]) -> dict[str, Any]:
    """Precision, recall, f1 and support (gold entities) of each entity type."""
    counted = _counted(gold, predicted, kinds)["entities"]
    return {kind: _rates(counted.get(kind, {})) for kind in kinds}


def _counted(gold: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]], kinds: Iterable[str]) -> dict[str, Any]:
    """Strict counts of nervaluate: an entity is correct if its type and both boundaries are."""
    from nervaluate import Evaluator

    names = ("label", "start", "end")
    spans = [
        [[dict(zip(names, it, strict=True)) for it in entities_of(row)] for row in rows] for rows in (gold, predicted)
    ]
    evaluator = Evaluator(*spans, list(kinds), loader="dict")
    evaluator.strategies = {"strict": evaluator.strategies["strict"]}
    return evaluator.evaluate()


def _rates(counts: Mapping[str, Any]) -> dict[str, float]:
    strict = counts.get("strict")  # missing if nothing was counted
    rates = {name: float(getattr(strict, name, 0)) for name in ("precision", "recall", "f1")}
    return rates | {"support": getattr(strict, "possible", 0)}


def one_form(rows: Sequence[Sequence[str]], place: Callable[[int], str]) -> list[list[str]]:
    """Normalize tags to `B-`, `I-`, `E-` or `S-` and a type; without prefixes, adjacent words of one type form one entity.

    Raises:
        DataError: only some tags have a prefix, or tags are numbers, or the scheme is not supported.
    """
    with_prefix: bool | None = None
    forms = []
    for row, tags in enumerate(rows):
        form = []
        for tag in tags:
            if not tag.strip():
                raise DataError(f"{place(row)}: a word without a tag; write O where there is no entity")
            parts = _TAG.fullmatch(tag)
            if tag == OUTSIDE:
                form.append(tag)
                continue
            if problem := next((problem_text for form, problem_text in _UNREAD.items() if re.fullmatch(form, tag)), ""):
                raise DataError(f"{place(row)}: tag '{tag}'{problem}")
            if tag.isdecimal():
                raise DataError(
                    f"{place(row)}: tag {tag} is a number without a name: write names such as B-person, or use a dataset "
                    "with ClassLabel features"
                )
            if with_prefix is None:
                with_prefix = parts is not None
            if with_prefix != (parts is not None):
                raise DataError(f"{place(row)}: tag '{tag}' has {'a' if parts else 'no'} prefix such as B- or I-; tags before it have {'none' if parts else 'one'}")  # fmt: skip
            form.append(f"{_AS_IOBES.get(parts[1], parts[1])}-{parts[2]}" if parts else f"I-{tag}")
        forms.append(form)
    return forms


def scheme(rows: Sequence[Sequence[str]], tags: Sequence[Sequence[str]], origin: str) -> str:
    """A note about the tagging scheme, if it is not plain IOB2."""
    used = {tag for row in tags for tag in row} - {OUTSIDE}
    if used and not any(_TAG.fullmatch(tag) for tag in used):
        note = f"the tags of {origin} have no B- or I-: adjacent words of one type are read as one entity"
        outside = any(OUTSIDE in row for row in tags)
        return note if outside else f"{note}; no tag is O, so every word is part of an entity"
    letters = {tag[0] for tag in used}
    if letters - set("BI"):
        name = "BILOU" if letters & set("LU") else "BMES" if "M" in letters else "IOBES"
        return f"the tags of {origin} are {name}; they are converted to IOB2"
    begun = needless = 0  # I- at the start of an entity; B- that does not follow a word of its type
    for row in rows:
        for before, tag in zip([OUTSIDE, *row], row, strict=False):
            alone = tag != OUTSIDE and before[2:] != tag[2:]
            begun += alone and tag[0] == "I"
            needless += alone and tag[0] == "B"
    if begun and not needless:
        return f"the tags of {origin} are IOB1; they are converted to IOB2"
    if begun:
        return f"{begun:,} tags I-... of {origin} do not follow a tag of their type; each is read as the start of an entity, as in conlleval"
    return ""
