"""What a command prints and what a page shows of it, compared; and a page's part of it made anew.

Of numbers, counts must be equal, measurements close; times, sizes, dates, folders and which epoch was the best are free: a page
must be right on other machines too.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

_FREE = (
    (re.compile(r"[│╭╮╰╯─━]+"), " "),
    (re.compile(r"\d{8}-\d{6}|\d{4}-\d\d-\d\d \d\d:\d\d"), "DATE"),
    (re.compile(r"\b[0-9a-f]{16,}\b"), "HASH"),
    (re.compile(r"(?:[~\w.-]*/)+(?=[\w.-]+)"), ""),  # folders
    (re.compile(r"[\d.,]+ (?:s|min|seconds|[KMGk]i?B|bytes)\b"), "SIZE"),
    (re.compile(r"\d+\.\d+\.\d+[\w.+]*"), "VERSION"),
    (re.compile(r"after (epoch|update) \d+"), r"after \1 N"),
    (re.compile(r"^epoch +\d+$"), "epoch N"),
    (re.compile(r"\bbest so far\b"), ""),
    (
        re.compile(r"\d(?:\.\d+)?e-\d+ of the largest"),
        "DIFFERENCE of the largest",
    ),  # rounding; what is allowed is compared
)
BAR = re.compile(r"update +\d+/\d+ |starting$")
"""On a terminal this is a bar."""
_NUMBER = re.compile(r"(?<![\w.])-?\d[\d,]*(?:\.\d+)?(?:e-?\d+)?")


def _comparable(line: str) -> tuple[str, list[str]]:
    """The words of a line with its numbers taken out, and these."""
    for pattern, word in _FREE:
        line = pattern.sub(word, line)
    numbers = _NUMBER.findall(line)
    return " ".join(_NUMBER.sub("#", line).split()), numbers


def _close(shown: str, printed: str) -> bool:
    if "." not in shown + printed and "e" not in shown + printed:
        return shown == printed
    first, second = float(shown.replace(",", "")), float(printed.replace(",", ""))
    measured = all(len(number.partition(".")[2]) >= 4 and "e" not in number for number in (shown, printed))  # metrics
    return abs(first - second) <= 0.05 * max(abs(first), abs(second)) + 0.01 * measured


def alike(shown: str, printed: str, timed: bool = False) -> bool:
    """Whether a printed line says what the page shows.

    Args:
        timed: the last column is of seconds, which are free.
    """
    if timed:
        shown, printed = (" ".join(line.split()[:-1]) for line in (shown, printed))
    (words, numbers), (others, measured) = _comparable(shown), _comparable(printed)
    return words == others and len(numbers) == len(measured) and all(map(_close, numbers, measured))


def _segments(shown: Sequence[str]) -> list[list[str]]:
    """The lines between those of `...`; blank ones are left out."""
    found: list[list[str]] = [[]]
    for line in shown:
        if line.strip() == "...":
            found.append([])
        elif _comparable(line)[0]:
            found[-1].append(line)
    return found


def difference(shown: Sequence[str], printed: Sequence[str]) -> str | None:
    """The first line of a page that was not printed; None where all were, in this order, nothing between them but at `...`."""
    rest = [line for line in printed if _comparable(line)[0]]
    segments = _segments(shown)
    for number, segment in enumerate(segments):
        if not segment:
            continue
        timed = [any(line.rstrip().endswith("seconds") for line in segment[:at]) for at in range(len(segment))]
        last = number == len(segments) - 1
        starts = range(len(rest) - len(segment) + 1)
        starts = starts[:1] if number == 0 else starts[-1:] if last else starts
        at = next((s for s in starts if all(map(alike, segment, rest[s:], timed))), None)
        if at is None:
            where = starts[0] if starts and number in (0, len(segments) - 1) else None
            pairs = zip(segment, rest[where:], timed, strict=False) if where is not None else ()
            wrong = next(((s, p) for s, p, t in pairs if not alike(s, p, t)), None)
            return f"{wrong[0]!r} is now {wrong[1]!r}" if wrong else f"{segment[0]!r} and what follows"
        rest = rest[at + len(segment) :]
    if segments[-1] and len(segments) == 1 and rest:
        return f"{rest[0]!r} is printed but not shown"
    return None


def mostly(shown: Sequence[str], printed: Sequence[str]) -> str | None:
    """As `difference`, where three lines of five are enough."""
    lines = [line for segment in _segments(shown) for line in segment]
    there = sum(any(alike(line, other) or alike(line, other, timed=True) for other in printed) for line in lines)
    return None if there >= 0.6 * len(lines) else f"{len(lines) - there} of {len(lines)} lines are not printed"


def refreshed(shown: list[str], printed: list[str]) -> list[str]:
    """What a page should show now: as much of the output as before, lines that say the same as they are."""
    rest, result = [line.rstrip() for line in printed], []
    parts = re.split(r"^\s*\.\.\.\n", "\n".join(shown) + "\n", flags=re.MULTILINE)
    for number, part in enumerate(parts):
        lines = part.splitlines()
        if number:
            result.append("...")
        if not any(line.strip() for line in lines):
            result += lines
            continue
        start = 0 if number == 0 else _nearest(lines[0], rest)
        stop = len(rest) if number == len(parts) - 1 else start + _nearest(lines[-1], rest[start:]) + 1
        for line in rest[start:stop]:
            result.append(next((old for old in lines if _comparable(old)[0] and alike(old, line)), line))
        rest = rest[stop:]
    return _boxed(result)


_EDGES = {"╭": "╮", "│": "│", "╰": "╯"}


def _boxed(lines: list[str]) -> list[str]:
    """The lines of a box, some of them new, with one right edge."""
    kept = [line.rstrip("╮│╯─ ") or line[:1] if line[:1] in _EDGES else line for line in lines]
    width = max((len(line) for line in kept if line[:1] in _EDGES), default=0) + 1
    padded = []
    for line in kept:
        if edge := _EDGES.get(line[:1]):
            between = " " if len(line) > 1 else ""
            line = (line + between).ljust(width, " " if edge == "│" else "─") + edge
        padded.append(line)
    return padded


def _nearest(line: str, lines: Sequence[str]) -> int:
    ratios = [difflib.SequenceMatcher(None, _comparable(line)[0], _comparable(other)[0]).ratio() for other in lines]
    return max(range(len(ratios)), key=ratios.__getitem__, default=0)
