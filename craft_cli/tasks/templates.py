"""Conversations to token ids by a tokenizer's chat template, and which of the tokens are to be learned.

Everything is rendered once and tokenised whole. Where an answer begins and ends is found by rendering the conversation up to
it: what stands there must be the beginning of the whole. Templates with `{% generation %}` marks say it themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from craft_cli.data.tokens import IGNORED, near_end
from craft_cli.errors import ConfigError, DataError, ModelError, nearest
from craft_cli.tasks.dialogues import ASSISTANT, COMPLETION, MESSAGES, USER, Conversation

ANSWERS, LAST, ONLY_COMPLETION, ALL = TRAIN_ON = "assistant", "last", "completion", "all"
"""What is learned of a row; see `learned_by_default`."""

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ZEPHYR = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
ALPACA = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] }}\n\n"
    "{% elif message['role'] == 'assistant' %}### Response:\n{{ message['content'] }}{{ eos_token }}\n\n"
    "{% else %}### Instruction:\n{{ message['content'] }}\n\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}### Response:\n{% endif %}"
)
TEMPLATES = {"chatml": CHATML, "zephyr": ZEPHYR, "alpaca": ALPACA}
"""By the words after `--chat-template`, for models without a template of their own."""
_LARGEST = 200_000
"""Characters of a template; the longest of known models has a tenth of it."""


def learned_by_default(form: str) -> str:
    """What is learned of rows of this form: answers, completions, or all of a text."""
    return {MESSAGES: ANSWERS, COMPLETION: ONLY_COMPLETION}.get(form, ALL)


def template_named(name: str) -> str:
    """The chat template of this name, or in this file.

    Raises:
        ConfigError: there is neither.
    """
    if name in TEMPLATES:
        return TEMPLATES[name]
    path = Path(name).expanduser()
    try:
        text = path.read_bytes()[: _LARGEST + 1].decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        known = ", ".join(TEMPLATES)
        raise ConfigError(
            f"--chat-template: '{name}' is neither one of {known} nor a file that can be read ({reason}){nearest(name, TEMPLATES)}"
        ) from error
    if len(text) > _LARGEST or not text.strip():
        raise ConfigError(
            f"--chat-template: {path} is no chat template: it is {'empty' if not text.strip() else 'too long'}"
        )
    return text


@dataclass(frozen=True)
class Rendered:
    """One row in tokens.

    Attributes:
        ids: token ids.
        targets: for each token itself where it is to be learned, else `IGNORED`.
    """

    ids: list[int]
    targets: list[int]


class Renderer:
    """Rows of one form to tokens.

    Args:
        tokenizer: a fast one.
        form: of the rows, see `dialogues`.
        train_on: what is learned, of `TRAIN_ON`.
        template: in the place of the tokenizer's own; empty without.

    Raises:
        ModelError: there is no chat template, or it ends turns by a token that the tokenizer does not have, or the tokenizer cannot tell where its tokens stand in a text.
    """

    def __init__(self, tokenizer: Any, form: str, train_on: str, template: str = "") -> None:
        self._tokenizer, self._form, self._train_on = tokenizer, form, train_on
        self._template = template or None
        name = tokenizer.name_or_path
        if not tokenizer.is_fast:
            raise ModelError(
                f"{name}: its tokenizer cannot tell where a token stands in a text; it needs a tokenizer.json"
            )
        if form == MESSAGES and not (template or tokenizer.chat_template):
            raise ModelError(
                f"{name} has no chat template, which conversations need: give --chat-template ({', '.join(TEMPLATES)} or a file), "
                "or rows of prompt and completion"
            )
        if template == CHATML and "<|im_end|>" not in tokenizer.get_vocab():
            raise ModelError(
                f"{name} has no token <|im_end|>, which ends a turn of chatml: use --chat-template zephyr or alpaca"
            )
        self._marked = form == MESSAGES and "{% generation" in str(template or tokenizer.chat_template).replace(
            "{%-", "{%"
        )

    def prompt(self, row: Sequence[str], place: str) -> list[int]:
        """The tokens that are to be answered.

        Raises:
            DataError: the template refuses the conversation.
        """
        if self._form != MESSAGES:
            return self._ids(row[0], own=True)[0]
        talk = Conversation.of(row[0])
        return self._ids(self._render(talk, talk.prompt, place, ask=True), own=False)[0]

    def row(self, row: Sequence[str], place: str, limit: int) -> Rendered:
        """The tokens of a row, of which those beyond `limit` need not be right.

        Raises:
            DataError: the template refuses the conversation, or does not say where its answers are.
        """
        if self._form != MESSAGES:
            text = near_end("".join(row), self._tokenizer, limit)
            start = len(row[0]) if self._train_on == ONLY_COMPLETION else 0
            ids, spans = self._ids(text, own=True)
            learned = [end > start or start == 0 for _, end in spans]
            return self._finished(self._ended(ids), [*learned, True])
        talk = Conversation.of(row[0])
        if self._marked and self._train_on != ALL:
            return self._by_marks(talk, place)
        text = self._render(talk, talk.messages, place)
        wanted = [(0, len(text))] if self._train_on == ALL else self._answers(talk, text, place)
        ids, spans = self._ids(text, own=False)
        learned = [any(begin < end_of and end > start for start, end_of in wanted) for begin, end in spans]
        if self._train_on != ALL:
            self._drop_blanks(ids, learned)
        return self._finished(ids, learned)

    # -- where the answers are ------------------------------------------------------------------------------------------

    def _answers(self, talk: Conversation, text: str, place: str) -> list[tuple[int, int]]:
        """Where the answers that are learned begin and end in the whole text."""
        messages, spans = talk.messages, []
        turns = [number for number, message in enumerate(messages) if message["role"] == ASSISTANT]
        for turn in self._chosen(talk, turns):
            before = self._render(talk, messages[:turn], place, ask=True)
            after = text if turn == len(messages) - 1 else self._render(talk, messages[: turn + 1], place)
            if not (text.startswith(before) and text.startswith(after) and len(before) < len(after)):
                hint = (
                    "" if self._train_on == LAST else "; --train-on last learns the last answer alone, which may work"
                )
                raise DataError(
                    f"{place}: the chat template writes message {turn + 1} otherwise when others follow, so it does not say where "
                    f"that answer is{hint}"
                )
            spans.append((len(before), len(after)))
        return spans

    def _by_marks(self, talk: Conversation, place: str) -> Rendered:
        """By the template's own marks, with the token behind each that ends the turn."""
        with self._refused(place):
            found = self._tokenizer.apply_chat_template(
                talk.messages, tools=talk.tools or None, chat_template=self._template, tokenize=True, return_dict=True,
                return_assistant_tokens_mask=True,
            )  # fmt: skip
        ids, learned = list(found["input_ids"]), [bool(mask) for mask in found["assistant_masks"]]
        special = set(self._tokenizer.all_special_ids)
        for number in range(1, len(ids)):
            if (
                learned[number - 1]
                and not learned[number]
                and ids[number] in special
                and ids[number - 1] not in special
            ):
                learned[number] = True
        spans = [number for number in range(len(ids)) if learned[number] and not (number and learned[number - 1])]
        turns = [number for number, message in enumerate(talk.messages) if message["role"] == ASSISTANT]
        if len(spans) != len(turns):
            raise DataError(
                f"{place}: the chat template marks {len(spans)} answers of {len(turns)}: give another --chat-template, or --train-on all"
            )
        of_turn = accumulate(number in spans for number in range(len(ids)))  # 1 from the first answer on
        chosen = {turns.index(turn) + 1 for turn in self._chosen(talk, turns)}
        return self._finished(ids, [mask and turn in chosen for mask, turn in zip(learned, of_turn, strict=True)])

    def _chosen(self, talk: Conversation, turns: Sequence[int]) -> Sequence[int]:
        """Which of the answers (numbers of messages) are learned: none that belongs to a prompt."""
        after = [turn for turn in turns if turn >= talk.given]
        only_last = self._train_on == LAST or (self._train_on == ONLY_COMPLETION and not talk.given)
        return after[-1:] if only_last else after

    def _drop_blanks(self, ids: Sequence[int], learned: list[bool]) -> None:
        """What a template writes behind the token that ends a turn is never generated: it is not learned."""
        special = set(self._tokenizer.all_special_ids)
        for number in range(len(ids)):
            ends = learned[number] and not (number + 1 < len(ids) and learned[number + 1])
            if not ends:
                continue
            last = number
            while learned[last] and ids[last] not in special and not self._tokenizer.decode([ids[last]]).strip():
                last -= 1
            if learned[last] and ids[last] in special:
                learned[last + 1 : number + 1] = [False] * (number - last)

    # -- text and tokens ------------------------------------------------------------------------------------------------

    def _render(self, talk: Conversation, messages: Sequence[dict[str, Any]], place: str, *, ask: bool = False) -> str:
        with self._refused(place):
            return str(
                self._tokenizer.apply_chat_template(
                    list(messages), tools=talk.tools or None, chat_template=self._template, tokenize=False,
                    add_generation_prompt=ask,
                )
            )  # fmt: skip

    def _refused(self, place: str) -> Any:
        return _Refused(place)

    def _ids(self, text: str, *, own: bool) -> tuple[list[int], list[tuple[int, int]]]:
        """The tokens of a text and where they stand in it; with those that the tokenizer itself puts around a text, or not.

        A token that the tokenizer puts behind a text is left out: it would come before the answer.
        """
        found = self._tokenizer(text, add_special_tokens=own, return_offsets_mapping=True, verbose=False)
        ids, spans = list(found["input_ids"]), [tuple(span) for span in found["offset_mapping"]]
        while own and ids and spans[-1] == (0, 0) and ids[-1] in self._tokenizer.all_special_ids and len(ids) > 1:
            ids.pop()
            spans.pop()
        return ids, spans

    def _ended(self, ids: list[int]) -> list[int]:
        """With the token that ends a text.

        Raises:
            ModelError: the tokenizer has none.
        """
        if self._tokenizer.eos_token_id is None:
            raise ModelError(
                f"{self._tokenizer.name_or_path}: its tokenizer names no token that ends a text (eos_token)"
            )
        return [*ids, self._tokenizer.eos_token_id]

    @staticmethod
    def _finished(ids: list[int], learned: Sequence[bool]) -> Rendered:
        """The first token follows nothing, so it cannot be learned."""
        targets = [
            token if mask and number else IGNORED for number, (token, mask) in enumerate(zip(ids, learned, strict=True))
        ]
        return Rendered(ids, targets)


class _Refused:
    """Around a template at work: what it raises is about the row."""

    def __init__(self, place: str) -> None:
        self._place = place

    def __enter__(self) -> None:
        return

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, Exception) and not isinstance(
            error, DataError
        ):  # jinja's own, and whatever a template runs into
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise DataError(f"{self._place}: the chat template refuses this conversation ({reason})") from error


def end_tokens(tokenizer: Any, template: str = "", *, chat: bool = True) -> list[int]:
    """The tokens that end an answer: the tokenizer's end of a text, and in a chat that of an assistant's turn by the template."""
    found = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if chat and (template or tokenizer.chat_template):
        talk = Conversation([{"role": USER, "content": "a"}, {"role": ASSISTANT, "content": "b"}], [])
        try:
            renderer = Renderer(tokenizer, MESSAGES, LAST, template)
            learned = [token for token in renderer.row((talk.packed(),), "", 1000).targets if token != IGNORED]
        except (DataError, ModelError):
            learned = []
        if learned and learned[-1] in tokenizer.all_special_ids:
            found.append(learned[-1])
    return list(dict.fromkeys(found))
