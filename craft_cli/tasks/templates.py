"""Tokenize conversations with a chat template, and find the tokens to train on.

A conversation is rendered and tokenized once, as a whole. The bounds of an answer are found by rendering the conversation up
to it, which must give a prefix of the whole. Templates with `{% generation %}` mark the answers themselves.
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
"""The parts of a row that can be trained on; see `learned_by_default`."""

_LONGEST = 1 << 20
"""Maximum tokens of a prompt, more than models take; of a longer one only the start is tokenized."""

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
"""Chat templates by the value of `--chat-template`, for models without one."""
_LARGEST = 200_000
"""Maximum characters of a template; the longest known one has a tenth of this."""


def learned_by_default(form: str) -> str:
    """What is trained on by default for a form of rows: answers, completions, or the whole text."""
    return {MESSAGES: ANSWERS, COMPLETION: ONLY_COMPLETION}.get(form, ALL)


def template_named(name: str) -> str:
    """Read a chat template by name or from a file.

    Raises:
        ConfigError: there is no such template.
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
            f"--chat-template: '{name}' is neither one of {known} nor a readable file ({reason}){nearest(name, TEMPLATES)}"
        ) from error
    if len(text) > _LARGEST or not text.strip():
        raise ConfigError(
            f"--chat-template: {path} is not a chat template: it is {'empty' if not text.strip() else 'too long'}"
        )
    return text


@dataclass(frozen=True)
class Rendered:
    """A tokenized row.

    Attributes:
        ids: token ids.
        targets: the token id where it is trained on, else `IGNORED`.
    """

    ids: list[int]
    targets: list[int]


class Renderer:
    """Tokenizes rows of one form.

    Args:
        tokenizer: a fast tokenizer.
        form: form of the rows, see `dialogues`.
        train_on: the parts to train on, one of `TRAIN_ON`.
        template: a chat template to use instead of the tokenizer's; empty for the tokenizer's.

    Raises:
        ModelError: there is no chat template, its end-of-turn token is missing from the tokenizer, or the tokenizer does
            not return offsets.
    """

    def __init__(self, tokenizer: Any, form: str, train_on: str, template: str = "") -> None:
        self._tokenizer, self._form, self._train_on = tokenizer, form, train_on
        self._template = template or None
        name = tokenizer.name_or_path
        if not tokenizer.is_fast:
            raise ModelError(f"{name}: its tokenizer does not return offsets; language models require a tokenizer.json")
        if form == MESSAGES and not (template or tokenizer.chat_template):
            raise ModelError(
                f"{name} has no chat template, which conversations require: pass --chat-template ({', '.join(TEMPLATES)} or a file), "
                "or rows of prompt and completion"
            )
        if template == CHATML and "<|im_end|>" not in tokenizer.get_vocab():
            raise ModelError(
                f"{name} has no token <|im_end|>, the end of a chatml turn: use --chat-template zephyr or alpaca"
            )
        self._marked = form == MESSAGES and "{% generation" in str(template or tokenizer.chat_template).replace(
            "{%-", "{%"
        )

    def prompt(self, row: Sequence[str], place: str) -> list[int]:
        """Tokenize a prompt.

        Raises:
            DataError: the template rejects the conversation, or the prompt is longer than any model takes.
        """
        own, text = self._form != MESSAGES, row[0]
        if not own:
            talk = Conversation.of(row[0])
            text = self._render(talk, talk.prompt, place, ask=True)
        if len(near_end(text, self._tokenizer, _LONGEST, far=4)) < len(text):
            raise DataError(f"{place}: the prompt has more than {_LONGEST:,} tokens; shorten it")
        return self._ids(text, own=own)[0]

    def row(self, row: Sequence[str], place: str, limit: int) -> Rendered:
        """Tokenize a row; tokens beyond `limit` may be incomplete.

        Raises:
            DataError: the template rejects the conversation, or the answers cannot be located.
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
        ids, spans = self._ids(near_end(text, self._tokenizer, limit), own=False)
        learned = [any(begin < end_of and end > start for start, end_of in wanted) for begin, end in spans]
        if self._train_on != ALL:
            self._drop_blanks(ids, learned)
        return self._finished(ids, learned)

    # -- locating the answers -------------------------------------------------------------------------------------------

    def _answers(self, talk: Conversation, text: str, place: str) -> list[tuple[int, int]]:
        """Start and end of the trained answers in the whole text."""
        messages, spans = talk.messages, []
        turns = [number for number, message in enumerate(messages) if message["role"] == ASSISTANT]
        for turn in self._chosen(talk, turns):
            before = self._render(talk, messages[:turn], place, ask=True)
            after = text if turn == len(messages) - 1 else self._render(talk, messages[: turn + 1], place)
            if not (text.startswith(before) and text.startswith(after) and len(before) < len(after)):
                hint = (
                    "" if self._train_on == LAST else "; --train-on last trains on the last answer only, which may work"
                )
                raise DataError(
                    f"{place}: the chat template renders message {turn + 1} differently when others follow, so that answer cannot be "
                    f"located{hint}"
                )
            spans.append((len(before), len(after)))
        return spans

    def _by_marks(self, talk: Conversation, place: str) -> Rendered:
        """Targets from the template's own marks, including the end-of-turn token after each answer."""
        with self._refused(place):
            encoded = self._tokenizer.apply_chat_template(
                talk.messages, tools=talk.tools or None, chat_template=self._template, tokenize=True, return_dict=True,
                return_assistant_tokens_mask=True,
            )  # fmt: skip
        ids, learned = list(encoded["input_ids"]), [bool(mask) for mask in encoded["assistant_masks"]]
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
                f"{place}: the chat template marks {len(spans)} answers of {len(turns)}: pass another --chat-template, or --train-on all"
            )
        of_turn = accumulate(number in spans for number in range(len(ids)))  # 1 from the first answer onwards
        chosen = {turns.index(turn) + 1 for turn in self._chosen(talk, turns)}
        return self._finished(ids, [mask and turn in chosen for mask, turn in zip(learned, of_turn, strict=True)])

    def _chosen(self, talk: Conversation, turns: Sequence[int]) -> Sequence[int]:
        """Message numbers of the answers to train on, without those of a prompt."""
        after = [turn for turn in turns if turn >= talk.given]
        only_last = self._train_on == LAST or (self._train_on == ONLY_COMPLETION and not talk.given)
        return after[-1:] if only_last else after

    def _drop_blanks(self, ids: Sequence[int], learned: list[bool]) -> None:
        """Exclude text after the end-of-turn token from training, because it is never generated."""
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
        """Token ids of a text and their offsets, with or without the tokenizer's special tokens.

        A special token at the end of the text is dropped, because it would come before the answer.
        """
        encoded = self._tokenizer(text, add_special_tokens=own, return_offsets_mapping=True, verbose=False)
        ids, spans = list(encoded["input_ids"]), [tuple(span) for span in encoded["offset_mapping"]]
        while own and ids and spans[-1] == (0, 0) and ids[-1] in self._tokenizer.all_special_ids and len(ids) > 1:
            ids.pop()
            spans.pop()
        return ids, spans

    def _ended(self, ids: list[int]) -> list[int]:
        """Append the end-of-text token.

        Raises:
            ModelError: the tokenizer has no end-of-text token.
        """
        if self._tokenizer.eos_token_id is None:
            raise ModelError(f"{self._tokenizer.name_or_path}: its tokenizer has no end-of-text token (eos_token)")
        return [*ids, self._tokenizer.eos_token_id]

    @staticmethod
    def _finished(ids: list[int], learned: Sequence[bool]) -> Rendered:
        """Ignore the first token, because it has no context to be predicted from."""
        targets = [
            token if mask and number else IGNORED for number, (token, mask) in enumerate(zip(ids, learned, strict=True))
        ]
        return Rendered(ids, targets)


class _Refused:
    """Convert any exception of a template to an error about the row."""

    def __init__(self, place: str) -> None:
        self._place = place

    def __enter__(self) -> None:
        return

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, Exception) and not isinstance(
            error, DataError
        ):  # jinja's own errors, and any other in the template
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise DataError(f"{self._place}: the chat template rejects this conversation ({reason})") from error


def end_tokens(tokenizer: Any, template: str = "", *, chat: bool = True) -> list[int]:
    """The tokens that end an answer: the end-of-text token and, for conversations, the template's end-of-turn token."""
    ends = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if chat and (template or tokenizer.chat_template):
        talk = Conversation([{"role": USER, "content": "a"}, {"role": ASSISTANT, "content": "b"}], [])
        try:
            renderer = Renderer(tokenizer, MESSAGES, LAST, template)
            learned = [token for token in renderer.row((talk.packed(),), "", 1000).targets if token != IGNORED]
        except (DataError, ModelError):
            learned = []
        if learned and learned[-1] in tokenizer.all_special_ids:
            ends.append(learned[-1])
    return list(dict.fromkeys(ends))
