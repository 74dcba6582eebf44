"""Rows for language models: a conversation, a prompt with its completion, or a text, detected from the columns.

A row is stored as a tuple of texts: the JSON of a `Conversation`, a prompt and its completion, or the text.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from craft_cli.data.cells import as_list, described, is_missing, whole_text
from craft_cli.data.tables import column_named
from craft_cli.errors import DataError
from craft_cli.tasks.texts import text_of

if TYPE_CHECKING:
    from craft_cli.data.tables import Table

Place = Callable[[], str]

MESSAGES, COMPLETION, TEXT = FORMS = "messages", "completion", "text"

SYSTEM, USER, ASSISTANT, TOOL = ROLES = "system", "user", "assistant", "tool"
_CALLED = {
    "human": USER, "gpt": ASSISTANT, "model": ASSISTANT, "bot": ASSISTANT, "developer": SYSTEM, "ipython": TOOL, "function": TOOL,
    "function_call": ASSISTANT, "observation": TOOL,
}  # fmt: skip
"""Other names for roles."""

_LISTS = ("messages", "conversations", "conversation", "dialog", "dialogue")
_PAIRS = (("prompt", "completion"), ("prompt", "response"))
_TURNS = (
    ("instruction", "output"), ("instruction", "response"), ("question", "answer"), ("query", "response"),
    ("input", "output"),
)  # fmt: skip
"""Columns of a question and its answer, joined by a chat template; alpaca has an `input` besides the instruction."""
ASKED = (*_LISTS, *dict.fromkeys(pair[0] for pair in (*_PAIRS, *_TURNS)), "text")
"""Usual column names of prompts."""


@dataclass(frozen=True)
class Layout:
    """The columns of a table that hold the parts of a row.

    Attributes:
        form: one of `FORMS`.
        columns: one column of messages or texts, or one of questions and one of answers.
        beside: the column with the input of an instruction (alpaca's `input`); empty if there is none.
    """

    form: str
    columns: tuple[str, ...]
    beside: str = ""


@dataclass(frozen=True)
class Conversation:
    """Messages in the form that chat templates expect.

    Attributes:
        messages: each with `role`, `content` and further keys of the template (`tool_calls`).
        tools: tool descriptions; empty if there are none.
        given: number of messages that form the prompt, if prompt and completion are separate; else 0.
    """

    messages: list[dict[str, Any]]
    tools: list[Any]
    given: int = 0

    def packed(self) -> str:
        """Serialize to text."""
        return json.dumps(
            {"messages": self.messages, "tools": self.tools, "given": self.given}, ensure_ascii=False, default=str
        )

    @classmethod
    def of(cls, text: str) -> Conversation:
        """Parse the result of `packed`."""
        return cls(**json.loads(text))

    @property
    def prompt(self) -> list[dict[str, Any]]:
        """The messages before the last answer."""
        end = len(self.messages)
        while end and self.messages[end - 1]["role"] == ASSISTANT:
            end -= 1
        return self.messages[:end]

    @property
    def answer(self) -> str:
        """The text of the last answer; empty if the last message is not an answer."""
        last = self.messages[len(self.prompt) :]
        return str(last[-1].get("content") or "") if last else ""


def layout_of(columns: Sequence[str], first: Mapping[str, Any], wanted: Sequence[str] = ()) -> Layout | None:
    """Detect the layout from the column names and the first row; None if it is unknown.

    Args:
        columns: column names of the table.
        first: cells of the first row.
        wanted: columns that the user gave: one of conversations or texts, or those of prompt and completion.
    """
    written = {name.casefold(): name for name in reversed(columns)}  # column names match in any case

    def there(names: Sequence[str]) -> tuple[str, ...] | None:
        return tuple(written[name] for name in names) if set(names) <= written.keys() else None

    if len(wanted) == 2:
        known = tuple(name.casefold() for name in wanted) in _TURNS
        return Layout(MESSAGES if known or is_conversation(first.get(wanted[0])) else COMPLETION, tuple(wanted))
    for name in wanted or [written[name] for name in _LISTS if name in written]:
        if is_conversation(first.get(name)):
            return Layout(MESSAGES, (name,))
    if wanted:
        return Layout(TEXT, tuple(wanted))
    for pair in filter(None, map(there, _PAIRS)):
        return Layout(MESSAGES if is_conversation(first.get(pair[0])) else COMPLETION, pair)
    for turns in filter(None, map(there, _TURNS)):
        beside = written.get("input", "")
        return Layout(MESSAGES, turns, "" if beside in turns else beside)
    text = there(["text"])
    return Layout(TEXT, text) if text else None


def rows_of(table: Table, layout: Layout) -> list[tuple[str, ...]]:
    """Read the rows of a table.

    Raises:
        DataError: a row is malformed.
    """
    used = [*layout.columns, *filter(None, [layout.beside]), *([TOOLS] if TOOLS in table.columns else [])]
    cells = {name: table.column(name) for name in dict.fromkeys(used)}
    count = len(cells[used[0]])
    return [
        read_row({name: column[row] for name, column in cells.items()}, layout, partial(table.place, row))
        for row in range(count)
    ]


TOOLS = "tools"
"""The column of tool descriptions."""


def read_row(cells: Mapping[str, Any], layout: Layout, place: Place, *, answered: bool = True) -> tuple[str, ...]:
    """Read a row.

    Args:
        cells: cells by column.
        layout: layout of the rows.
        place: returns the location of the row, for messages.
        answered: whether the row must have an answer; otherwise it is a prompt.

    Raises:
        DataError: the row is malformed.
    """
    first = layout.columns[0]
    if layout.form != MESSAGES:
        names = layout.columns if answered else layout.columns[:1]
        texts = tuple(_completion(cells.get(name), name, place) for name in names)
        if layout.form == COMPLETION and answered and not texts[1].strip():
            raise DataError(f"{place()}: column '{layout.columns[1]}' has no answer")
        return texts
    tools = as_list(cells.get(TOOLS))
    if not is_missing(tools) and not isinstance(tools, (list, tuple)):
        raise DataError(f"{place()}: column '{TOOLS}' is {described(tools)}, not a list of tools")
    given, alone = 0, len(layout.columns) == 1
    if is_conversation(cells.get(first)) or (alone and answered):
        messages = _messages(cells.get(first), first, place)
        if not alone:
            given = len(messages)
            messages += _messages(cells.get(layout.columns[1]), layout.columns[1], place)
    else:
        question = text_of(cells.get(first), first, place)
        more = cells.get(layout.beside) if layout.beside else None
        if not is_missing(more) and str(more).strip():
            question += f"\n\n{text_of(more, layout.beside, place)}"
        messages = [{"role": USER, "content": question}]
        if answered:
            messages.append(
                {"role": ASSISTANT, "content": text_of(cells.get(layout.columns[1]), layout.columns[1], place)}
            )
    _check_order(messages, place, answered=answered)
    return (Conversation(messages, list(tools or []) if not is_missing(tools) else [], given).packed(),)


def _completion(value: Any, column: str, place: Place) -> str:
    """The text of a cell, with leading and trailing whitespace kept, because it is trained on."""
    return "" if value == "" else text_of(value, column, place)


def is_conversation(cell: Any) -> bool:
    """Whether a cell holds messages."""
    messages = as_list(cell)
    return isinstance(messages, (list, tuple)) and bool(messages) and isinstance(messages[0], Mapping)


def _messages(cell: Any, column: str, place: Place) -> list[dict[str, Any]]:
    """Read the messages in a cell, with roles as in chat templates.

    Raises:
        DataError: the cell is not a list of messages.
    """
    items = as_list(cell)
    if not isinstance(items, (list, tuple)) or not items:
        raise DataError(f"{place()}: column '{column}' is {described(cell)}, not a list of messages")
    messages = []
    for number, message in enumerate(items, start=1):
        if not isinstance(message, Mapping):
            raise DataError(f"{place()}: message {number} is {described(message)}, not a mapping with role and content")
        fields = {name: value for name, value in message.items() if not is_missing(value)}
        role = fields.pop("role", fields.pop("from", None))
        content = fields.pop("content", fields.pop("value", None))
        role = _CALLED.get(role, role) if isinstance(role, str) else role
        if role not in ROLES:
            raise DataError(f"{place()}: message {number} has the role {role!r}; use {', '.join(ROLES)}")
        messages.append({"role": role, "content": _content(content, number, place), **fields})
    return messages


def _content(content: Any, number: int, place: Place) -> str:
    """The text of a message; several text parts are joined by newlines."""
    if isinstance(content, (list, tuple)):
        parts = [part.get("text") if isinstance(part, Mapping) else part for part in content]
        texts = [part for part in parts if isinstance(part, str)]
        if len(texts) < len(parts):
            raise DataError(f"{place()}: message {number} has content that is not text, which craft does not support")
        content = "\n".join(texts)
    if content is None:
        return ""
    if not isinstance(content, str):
        raise DataError(f"{place()}: the content of message {number} is {described(content)}, not a text")
    if not whole_text(content):
        raise DataError(f"{place()}: message {number} contains an invalid character (a lone surrogate); remove it")
    return content


def _check_order(messages: Sequence[Mapping[str, Any]], place: Place, *, answered: bool) -> None:
    """Check the order of roles and the answers of a conversation.

    Raises:
        DataError: roles are out of order, an answer is empty, or there is no answer.
    """
    before = ""
    for number, message in enumerate(messages, start=1):
        role = message["role"]
        follows = {SYSTEM: ("",), USER: ("", SYSTEM, ASSISTANT), ASSISTANT: (USER, TOOL), TOOL: (ASSISTANT, TOOL)}[role]
        if before not in follows:
            where = f"follows one of {before}" if before else "comes first"
            raise DataError(f"{place()}: message {number} of {role} {where}: roles are out of order")
        if role == ASSISTANT and not message["content"].strip() and not message.get("tool_calls"):
            raise DataError(f"{place()}: message {number}, from the assistant, is empty")
        before = role
    if answered and before != ASSISTANT:
        raise DataError(f"{place()}: the conversation ends with a message of {before}, so its last answer is missing")
    if not answered and before not in (USER, TOOL):
        raise DataError(f"{place()}: the conversation ends with a message of {before}: there is nothing to answer")


def as_text(row: Sequence[str], form: str) -> str:
    """A row for people: roles before their messages, a text as it is."""
    if form != MESSAGES:
        return "".join(row)
    return "\n".join(f"{message['role']}: {message['content']}" for message in Conversation.of(row[0]).messages)


def waiting(cells: Mapping[str, Any], columns: Sequence[str], beside: str, *, speaks: bool) -> Layout | None:
    """The layout of rows that wait for an answer: the columns of the training, or what they are usually called."""
    name = next(filter(None, (column_named(name, list(cells)) for name in (*columns[:1], *ASKED))), None)
    if name is None:
        return None
    beside = beside or ("input" if name.casefold() == "instruction" else "")
    return Layout(MESSAGES if speaks or is_conversation(cells[name]) else TEXT, (name,), beside)
