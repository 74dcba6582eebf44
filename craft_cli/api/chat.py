"""Chat with a language model, with a history, and compare it with its base."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from transformers import TextStreamer

from craft_cli.api.predictor import load_predictor
from craft_cli.data.sources import Split
from craft_cli.errors import ConfigError, DataError
from craft_cli.files import cannot_write, read_content, write_bytes
from craft_cli.models.tables import tables_of
from craft_cli.tasks.dialogues import ASSISTANT, MESSAGES, SYSTEM, USER, Layout, read_row
from craft_cli.tasks.generation import Answer, Generation, positions_of

INTERRUPTED = "interrupted"
"""Reason for the end of an answer, besides those of `tasks.generation`: Ctrl-C."""
Heard = Callable[[str], None]


class Chat:
    """A conversation with a trained language model, or with any other.

        chat = craft.Chat("runs/first")
        print(chat.ask("Why is the sea salty?").text)
        print(chat.compare("And the lakes?"))

    A model trained on prompts or texts, or without a chat template, continues each text separately.

    Args:
        path: a run, an adapter, the folder of a base checkpoint or a Hub id. Default: the latest run.
        system: system message. Default: the template's own.
        generation: generation settings. Default: greedy.
        use_cpu: use the CPU even if a GPU is available.
        trust_remote_code: run Python code from the model's repository.
        allow_other_base: accept a base that has changed since the training.
        noticed: called when the oldest turns no longer fit into the model's context.

    Attributes:
        name: name of the model.
        messages: messages of the conversation, with the system message first, if there is one.
        base: whether the base answers, the same model with its adapter disabled.
        remembers: whether there is a history; otherwise each text is separate.

    Raises:
        ConfigError: the model does not generate text, or does not support a system message.
        CraftError: the model is invalid.
    """

    def __init__(
        self,
        path: str | Path | None = None,
        *,
        system: str | None = None,
        generation: Generation | None = None,
        use_cpu: bool = False,
        trust_remote_code: bool = False,
        allow_other_base: bool = False,
        noticed: Callable[[str], None] = lambda what: None,
    ) -> None:
        self._predictor = load_predictor(
            path, use_cpu=use_cpu, trust_remote_code=trust_remote_code, allow_other_base=allow_other_base
        )
        task, tokenizer = self._predictor.task, self._predictor.tokenizer
        self.name = self._predictor.name
        if not task.generates:
            raise ConfigError(f"{self.name} chooses among labels and writes no answers: use craft predict")
        self._task, self.remembers = task.in_chat(tokenizer)
        self._settings = generation or Generation()
        tables = tables_of(self._predictor.model, self.name)
        self._positions = tables.limit(positions_of(self._predictor.model) or 1 << 62)
        self._noticed, self._dropped = noticed, 0
        self.messages: list[dict[str, str]] = []
        self.base = False
        if system is not None:
            self.system(system)

    # -- asking ---------------------------------------------------------------------------------------------------------

    def ask(self, text: str, heard: Heard = lambda part: None) -> Answer:
        """Answer a user message; both are added to the conversation.

        Ctrl-C ends the answer: the text so far is kept, and `why` is `interrupted`.

        Args:
            text: the user message.
            heard: called with each part of the answer as it is generated.

        Raises:
            CraftError: the template rejects the conversation, or there is no room for an answer.
        """
        answer = self._write(self._asked(text), self.base, heard)
        self._keep(text, answer)
        return answer

    def compare(self, text: str, heard: Callable[[bool, str], None] = lambda base, part: None) -> tuple[Answer, Answer]:
        """Answer with the tuned model and with its base; only the tuned answer is added to the conversation.

        Args:
            text: the user message.
            heard: called with whether the base is answering, and with each part as it is generated.

        Raises:
            ConfigError: there is no adapter.
            CraftError: as for `ask`.
        """
        self.check_adapter()
        asked = self._asked(text)
        tuned = self._write(asked, False, partial(heard, False))
        base = self._write(asked, True, partial(heard, True))
        self._keep(text, tuned)
        return tuned, base

    def check_adapter(self) -> None:
        """Check that there is an adapter, so that base and tuned model differ.

        Raises:
            ConfigError: there is no adapter to disable.
        """
        if self._predictor.adapter is None:
            raise ConfigError(f"{self.name} has no adapter to switch off: name the run or the adapter")

    def _asked(self, text: str) -> Split:
        """The prompt: as much of the conversation as fits, and the text."""
        room = min(self._settings.max_new_tokens, self._positions // 4)
        for dropped in range(self._dropped, len(self._turns) + 1, 2):
            asked = Split([self._row(text, dropped)], None, "the chat", place=lambda row: "the chat")
            (prompt,) = self._task.prompts(asked, self._predictor.tokenizer)
            if len(prompt) + room <= self._positions:
                if dropped and not self._dropped:
                    self._noticed(
                        f"the model sees {self._positions:,} tokens: the oldest turns are left out from now on"
                    )
                self._dropped = dropped
                break
        return asked

    def _row(self, text: str, dropped: int) -> tuple[str, ...]:
        if not self.remembers:
            return (text,)
        system = self.messages[: len(self.messages) - len(self._turns)]
        seen = [*system, *self._turns[dropped:], {"role": USER, "content": text}]
        return read_row({"messages": seen}, Layout(MESSAGES, ("messages",)), lambda: "the chat", answered=False)

    @property
    def _turns(self) -> Sequence[dict[str, str]]:
        """The messages without the system message."""
        return self.messages[1:] if self.messages and self.messages[0]["role"] == SYSTEM else self.messages

    def _write(self, asked: Split, of_base: bool, heard: Heard) -> Answer:
        predictor, stream = self._predictor, _Stream(self._predictor.tokenizer, heard)
        with self._switched_off() if of_base else nullcontext():
            try:
                (answer,) = predictor.write(asked, self._task, self._settings, streamer=stream)
            except KeyboardInterrupt:
                stream.end()
                return Answer(stream.text, stream.tokens, INTERRUPTED)
        return answer

    def _switched_off(self) -> Any:
        self.check_adapter()
        assert self._predictor.adapter is not None
        return self._predictor.adapter.disabled()

    def _keep(self, text: str, answer: Answer) -> None:
        """Ignore an empty answer, which no template supports."""
        if answer.text.strip():
            self.messages += [{"role": USER, "content": text}, {"role": ASSISTANT, "content": answer.text}]

    # -- the conversation -----------------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Clear the conversation; the system message is kept."""
        del self.messages[len(self.messages) - len(self._turns) :]
        self._dropped = 0

    def system(self, text: str) -> None:
        """Set the system message; an empty one means the template's own.

        Raises:
            ConfigError: the model continues separate texts, without a system message.
        """
        if not self.remembers:
            raise ConfigError(f"{self.name} continues texts: it takes no system message")
        self.messages = [*([{"role": SYSTEM, "content": text}] if text else []), *self._turns]

    def save(self, file: str | Path) -> int:
        """Append the conversation to a training file, as a row of `messages`, or rows of `prompt` and `completion`.

        Args:
            file: a jsonl file, created if missing.

        Returns:
            The number of rows in the file.

        Raises:
            ConfigError: the file name does not end in .jsonl.
            DataError: the conversation is empty.
            FileError: the file cannot be written.
        """
        path = Path(file).expanduser()
        if path.suffix != ".jsonl":
            raise ConfigError(f"a conversation is saved as jsonl: end the name of {path} in .jsonl")
        if not self._turns:
            raise DataError("the conversation is empty, so there is nothing to save")
        try:
            former = read_content(path) if path.exists() else b""
            rows = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in self._rows()).encode()
            write_bytes(path, former + (b"\n" if former and not former.endswith(b"\n") else b"") + rows)
        except OSError as error:
            raise cannot_write(path, error) from error
        return former.count(b"\n") + rows.count(b"\n") + bool(former and not former.endswith(b"\n"))

    def _rows(self) -> Iterator[dict[str, Any]]:
        if self.remembers:
            yield {"messages": self.messages}
            return
        for said, answer in zip(self.messages[::2], self.messages[1::2], strict=True):
            yield {"prompt": said["content"], "completion": answer["content"]}


class _Stream(TextStreamer):
    """Streams an answer, word by word."""

    def __init__(self, tokenizer: Any, heard: Heard) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        self._heard, self.text, self.tokens = heard, "", -1

    def put(self, value: Any) -> None:
        """Receive tokens, first those of the prompt."""
        self.tokens += 1
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """The text that will not change any more."""
        self.text += text
        if text:
            self._heard(text)
