"""Messages, docstrings, comments and pages use the plain idiom of the field: a list of turns that must not come back."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

BANNED = {
    # speech
    r"\btold\b": "reported, passed, shown",
    r"\btells?\b": "reports, shows",
    r"\bsaid\b": "reported",
    r"\bspeaks? of\b": "refers to",
    r"\bin silence\b": "silently",
    r"\bmeans? nothing\b": "is not valid",
    r": so[.;]": "what raises the error",
    # interruptions and order
    r"\bcut\b": "truncated, interrupted, split",
    r"\b(go|goes|going|went|gone) on\b": "continue, resume",
    r"\b(was|is|are|were) over\b": "ended",
    r"\bas if (it had )?never\b": "exactly as an uninterrupted run",
    r"\bmeanwhile\b": "in the meantime, or nothing",
    r"\bformer\b": "previous",
    r"\bgiv(e|es|en|ing) way\b": "is replaced",
    r"\bhalf there\b|\bby halves\b": "incomplete",
    r"\b(make|makes|made) \w+ again\b": "recreate",
    # who and whose
    r"\bstrangers?\b": "an untrusted source",
    r"\b(nobody|somebody|whoever)\b": "name who: the user, another process",
    r"\bof (ours|GLUE's|craft's|peft's)\b": "a GLUE task, craft's ...",
    r"(?<!your\s)(?<!user's\s)(?<!users'\s)\bown data\b": "your own data",
    r"\bas \w+ (has|have) (it|them)\b": "as in ...",
    # defaults and conditions
    r"(?<!rows\s)\bwithout(?=[.;:)]|$)": "default: ...",
    r"\bwhatever (the|its|their|a|else|that|these|those|comes)\b": "regardless of",
    r"\bexcludes? (each other|the others)\b": "cannot be combined",
    r"\bgive --": "pass --",
    r"\bmay not be\b": "cannot be, must not be",
    r"(?<!here\s)\b(is|was) no (?!longer|more|different|such)": "is not a",
    r"\banother than\b": "different from",
    r"\bof another \w+ than\b": "of a different ... than",
    r"\bin (the|its) place of\b": "instead of",
    # quantities
    r"\bso many\b": "this many",
    r"\bnothing else\b": "only",
    r"\b(a|one) (line|row|file) each\b": "one ... per ...",
    r"\bonce a (forward|run|epoch|update|row)\b": "once per",
    # verbs that plain English does not use here
    r"\btaken for\b": "predicted as",
    r"\b(lies?|lay|lying)\b": "is, is stored",
    r"\bstands? (in|beside|by|here|there|on|under|before|last|first|once|between|at|below)\b": "is, comes",
    r"\b(is|are|was|were) looked for\b": "is searched for, is resolved",
    r"\bnoticed\b": "detected",
    r"\bmend(s|ed)?\b": "fix",
    r"\bbeside (it|each other|them|that)\b": "next to it, side by side",
    # the field's nouns
    r"\btrained numbers\b|\bnumbers (trained|it trains|that are trained)\b": "trained parameters",
    r"\bnumbers of (the|an) adapter\b": "parameters of the adapter",
    r"\bdata sets?\b": "dataset",
    r"\bkinds? of work\b": "task type",
    r"\bseveral labels (can )?appl": "multi-label",
    r"\bwhat was taken\b": "the confusion matrix",
}
"""Turns as regular expressions, each with its plainer form."""

_FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


def files() -> list[Path]:
    pages = [ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "docs").glob("*.ipynb")]
    return sorted([*(ROOT / "craft_cli").rglob("*.py"), *pages, *(ROOT / "recipes").glob("*.yaml")])


def spoken(path: Path) -> Iterator[tuple[int, str]]:
    """The prose of a file as (line, text): comments, docstrings and strings of several words, or a page without its fences."""
    source = path.read_text()
    if path.suffix != ".py":
        # fences hold data, and outputs whose words are checked in the code
        yield 1, _FENCE.sub(lambda fence: "\n" * fence[0].count("\n"), source)
        return
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value.strip():
            yield node.lineno, node.value


def turns(path: Path) -> Iterator[str]:
    for line, text in spoken(path):
        # code and the names of arguments are not prose
        plain = re.sub(r"`[^`\n]*`|^ +\w+:", lambda code: "_" * len(code[0]), text, flags=re.MULTILINE)
        for turn, hint in BANNED.items():
            for match in re.finditer(turn.replace(" ", r"\s+"), plain, re.IGNORECASE | re.MULTILINE):
                at = line + plain[: match.start()].count("\n")
                yield f"{path.relative_to(ROOT)}:{at}: '{' '.join(match[0].split())}'; write: {hint}"


@pytest.mark.parametrize("path", files(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_words_are_plain(path: Path) -> None:
    assert not (found := list(turns(path))), "\n" + "\n".join(found)
