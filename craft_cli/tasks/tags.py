"""Tags of words and the entities they mean: schemes, and what conlleval counts."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from craft_cli.errors import DataError

OUTSIDE = "O"
READ = ("B-", "I-", "E-", "S-")
"""How the tags begin that `entities_of` reads."""
_TAG = re.compile("([BIESLUM])[-_](.+)", re.DOTALL)
_UNREAD = {
    r"[BIESLUM][-_]": "names no kind; write one behind it, such as B-person",
    r"o|[bi][-_].+": "write O, B- and I- in capitals",
    r"\*\)*|\(.*\*\)*": "has the brackets of CoNLL-2005 and CoNLL-2012; write O, B-... and I-... in their place",
}
"""Tags that look like no name of a kind, and what to do."""
_AS_IOBES = {"L": "E", "U": "S", "M": "I"}

Entity = tuple[str, int, int]  # its kind, its first word and its last


def entities_of(tags: Sequence[str]) -> list[Entity]:
    """The entities of a sentence with tags in IOB1, IOB2 or IOBES; illegal sequences are read as conlleval does."""
    found: list[Entity] = []
    for place, (before, tag) in enumerate(zip([OUTSIDE, *tags], tags, strict=False)):
        if tag[0] in "IE" and before[0] in "BI" and tag[2:] == before[2:]:
            kind, first, _ = found.pop()
            found.append((kind, first, place))
        elif tag != OUTSIDE:
            found.append((tag[2:], place, place))
    return found


def entity_metrics(gold: Sequence[Sequence[str]], found: Sequence[Sequence[str]]) -> dict[str, float]:
    """Micro averages over entities, and accuracy of words; 0 where there is nothing to count."""
    kinds = {kind for row in (*gold, *found) for kind, _, _ in entities_of(row)}
    right = [tag == other for rows in zip(gold, found, strict=True) for tag, other in zip(*rows, strict=True)]
    return _rates(_counted(gold, found, kinds)["overall"]) | {"accuracy": sum(right) / max(len(right), 1)}


def by_kind(gold: Sequence[Sequence[str]], found: Sequence[Sequence[str]], kinds: Sequence[str]) -> dict[str, Any]:
    """Precision, recall, f1 and support (entities in the gold) of each kind."""
    counted = _counted(gold, found, kinds)["entities"]
    return {kind: _rates(counted.get(kind, {})) for kind in kinds}


def _counted(gold: Sequence[Sequence[str]], found: Sequence[Sequence[str]], kinds: Iterable[str]) -> dict[str, Any]:
    """What nervaluate counts, where an entity is right if its kind and both its ends are."""
    from nervaluate import Evaluator

    names = ("label", "start", "end")
    spans = [[[dict(zip(names, it, strict=True)) for it in entities_of(row)] for row in rows] for rows in (gold, found)]
    evaluator = Evaluator(*spans, list(kinds), loader="dict")
    evaluator.strategies = {"strict": evaluator.strategies["strict"]}
    return evaluator.evaluate()


def _rates(counts: Mapping[str, Any]) -> dict[str, float]:
    strict = counts.get("strict")  # None where nothing was counted
    rates = {name: float(getattr(strict, name, 0)) for name in ("precision", "recall", "f1")}
    return rates | {"support": getattr(strict, "possible", 0)}


def one_form(rows: Sequence[Sequence[str]], place: Callable[[int], str]) -> list[list[str]]:
    """All tags as `B-`, `I-`, `E-` or `S-` and a kind; without a prefix neighbours of one kind are one entity.

    Raises:
        DataError: some tags have a prefix and others none, or they are numbers, or of a scheme that is not read.
    """
    with_prefix: bool | None = None
    found = []
    for row, tags in enumerate(rows):
        form = []
        for tag in tags:
            if not tag.strip():
                raise DataError(f"{place(row)}: a word without a tag; write O where there is no entity")
            parts = _TAG.fullmatch(tag)
            if tag == OUTSIDE:
                form.append(tag)
                continue
            if problem := next((told for form, told in _UNREAD.items() if re.fullmatch(form, tag)), ""):
                raise DataError(f"{place(row)}: tag '{tag}'{'' if problem[0] in 'nh' else ':'} {problem}")
            if tag.isdecimal():
                raise DataError(
                    f"{place(row)}: tag {tag} is a number without a name: write names such as B-person, or use a data set "
                    "whose features name them (ClassLabel)"
                )
            if with_prefix is None:
                with_prefix = parts is not None
            if with_prefix != (parts is not None):
                raise DataError(f"{place(row)}: tag '{tag}' has {'a' if parts else 'no'} prefix such as B- or I-; tags before it have {'none' if parts else 'one'}")  # fmt: skip
            form.append(f"{_AS_IOBES.get(parts[1], parts[1])}-{parts[2]}" if parts else f"I-{tag}")
        found.append(form)
    return found


def scheme(rows: Sequence[Sequence[str]], tags: Sequence[Sequence[str]], origin: str) -> str:
    """A note on the scheme of all these tags, in one form and as they were, where it is not plain IOB2."""
    used = {tag for row in tags for tag in row} - {OUTSIDE}
    if used and not any(_TAG.fullmatch(tag) for tag in used):
        note = f"the tags of {origin} have no B- or I-: neighbouring words of one kind are read as one entity"
        outside = any(OUTSIDE in row for row in tags)
        return note if outside else f"{note}; no tag is O, so every word is part of an entity"
    letters = {tag[0] for tag in used}
    if letters - set("BI"):
        name = "BILOU" if letters & set("LU") else "BMES" if "M" in letters else "IOBES"
        return f"the tags of {origin} are {name}; they are learned as IOB2"
    begun = needless = 0  # I- that begin an entity; B- that follow no word of their kind
    for row in rows:
        for before, tag in zip([OUTSIDE, *row], row, strict=False):
            alone = tag != OUTSIDE and before[2:] != tag[2:]
            begun += alone and tag[0] == "I"
            needless += alone and tag[0] == "B"
    if begun and not needless:
        return f"the tags of {origin} are IOB1; they are learned as IOB2"
    if begun:
        return f"{begun:,} tags I-... of {origin} follow no tag of their kind; each is read as the beginning of an entity, as conlleval does"
    return ""
