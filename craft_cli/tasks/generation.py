"""Answers written token by token, and how those are judged that the data knows."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from craft_cli.errors import ConfigError, ModelError

MAX_NEW_TOKENS = 256
MATCHES = "exact_match"
"""The share of answers that are those of the data."""
ENDED, STOPPED, FULL = "end", "stop", "length"
"""Why an answer is over: the model ended it, a stop string came, or it has as many tokens as were allowed."""


@dataclass(frozen=True)
class Generation:
    """How answers are written.

    Attributes:
        max_new_tokens: of an answer.
        temperature: 0 takes the likeliest token each time; above, one is drawn.
        top_p: drawn from the likeliest tokens that have this probability together.
        seed: of what is drawn.
        stop: texts that end an answer, which does not keep them.

    Raises:
        ConfigError: a value that cannot be.
    """

    max_new_tokens: int = MAX_NEW_TOKENS
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 42
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ConfigError(f"--max-new-tokens: expected 1 or more, not {self.max_new_tokens}")
        if not 0.0 <= self.temperature <= 100.0:
            raise ConfigError(f"--temperature: expected a number from 0 to 100, not {self.temperature}")
        if not 0.0 < self.top_p <= 1.0:
            raise ConfigError(f"--top-p: expected a number above 0 and at most 1, not {self.top_p}")
        if not all(self.stop):
            raise ConfigError("--stop: an empty text would end every answer at once")


@dataclass(frozen=True)
class Answer:
    """What a model wrote.

    Attributes:
        text: without the tokens and texts that ended it.
        tokens: that were written, with the one that ended it.
        why: one of `ENDED`, `STOPPED`, `FULL`.
    """

    text: str
    tokens: int
    why: str


@torch.no_grad()
def write_answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    ends: Sequence[int],
    settings: Generation,
    *,
    batch_size: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
    streamer: Any = None,
) -> list[Answer]:
    """An answer to each prompt, in their order.

    Args:
        model: a language model of transformers.
        tokenizer: of it; its padding is settled.
        prompts: token ids of each.
        ends: tokens that end an answer.
        settings: how.
        batch_size: prompts at once; those of similar length go together.
        progress: called with (prompts done, prompts in all).
        streamer: of transformers, for one prompt at a time.

    Raises:
        ModelError: there is no room for an answer, or the scores of the tokens are not finite.
    """
    was_training = model.training
    model.eval()
    order = sorted(range(len(prompts)), key=lambda number: -len(prompts[number]))
    found: dict[int, Answer] = {}
    try:
        with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
            torch.manual_seed(settings.seed)
            for start in range(0, len(order), batch_size):
                rows = order[start : start + batch_size]
                written = _write(model, tokenizer, [prompts[row] for row in rows], ends, settings, streamer)
                found |= dict(zip(rows, written, strict=True))
                progress(len(found), len(prompts))
    finally:
        model.train(was_training)
    return [found[number] for number in range(len(prompts))]


def _write(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    ends: Sequence[int],
    settings: Generation,
    streamer: Any,
) -> list[Answer]:
    """The answers to prompts that are computed together, the shorter ones padded on the left."""
    width = max(map(len, prompts))
    room = _room(positions_of(model), width, settings.max_new_tokens)
    ids = torch.full((len(prompts), width), tokenizer.pad_token_id)
    mask = torch.zeros_like(ids)
    for number, prompt in enumerate(prompts):
        ids[number, width - len(prompt) :] = torch.tensor(prompt)
        mask[number, width - len(prompt) :] = 1
    draws = settings.temperature > 0
    options: dict[str, Any] = {"do_sample": draws}
    if draws:
        options |= {"temperature": settings.temperature, "top_p": settings.top_p, "top_k": 0}
    if settings.stop:
        options |= {"stop_strings": list(settings.stop), "tokenizer": tokenizer}
    with (
        warnings.catch_warnings()
    ):  # of settings in the checkpoint's generation_config.json that greedy decoding leaves alone
        warnings.filterwarnings("ignore", module="transformers")
        out = model.generate(
            input_ids=ids.to(model.device), attention_mask=mask.to(model.device), max_new_tokens=room, use_cache=True,
            eos_token_id=list(ends), pad_token_id=tokenizer.pad_token_id, streamer=streamer, **_plain(model, draws), **options,
        )  # fmt: skip
    return [_answer(row.tolist(), tokenizer, ends, settings, room) for row in out[:, width:].cpu()]


def _plain(model: Any, draws: bool) -> dict[str, Any]:
    """What takes back the checkpoint's own settings of generation, so that an answer depends on ours alone."""
    return {"repetition_penalty": 1.0, "num_beams": 1} | (
        {} if draws else {"temperature": None, "top_p": None, "top_k": None}
    )


def positions_of(model: Any) -> int | None:
    """So many tokens may prompt and answer have together; None where any number of them can be told apart."""
    found: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return found


def _room(positions: int | None, width: int, wanted: int) -> int:
    """So many tokens may be written behind a prompt of this width.

    Raises:
        ModelError: none.
    """
    room = wanted if positions is None else min(wanted, positions - width)
    if room < 1:
        raise ModelError(
            f"a prompt of {width:,} tokens leaves no room for an answer: the model has {positions:,} positions"
        )
    return room


def _answer(ids: list[int], tokenizer: Any, ends: Sequence[int], settings: Generation, room: int) -> Answer:
    """What was written for one prompt; what follows its end is padding."""
    end = next((number for number, token in enumerate(ids) if token in ends), None)
    if end is not None:
        return Answer(decoded(tokenizer, ids[:end]), end + 1, ENDED)
    text = decoded(tokenizer, ids)
    places = [text.find(stop) for stop in settings.stop if stop in text]
    if places:
        while len(ids) > 1 and any(stop in decoded(tokenizer, ids[:-1]) for stop in settings.stop):
            ids = ids[:-1]
        return Answer(text[: min(places)], len(ids), STOPPED)
    return Answer(text, min(len(ids), room), FULL)


def decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    """Tokens as a text, as they stand; of the tokens that mean no text nothing."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


class Matcher:
    """Whether an answer is the one of the data: after blanks around it are gone, or by a part of both.

    Args:
        pattern: a regular expression; its first group is compared, or all that it matches where it has none, in its last match.

    Raises:
        ConfigError: it is none.
    """

    def __init__(self, pattern: str | None = None) -> None:
        try:
            self._pattern = re.compile(pattern) if pattern else None
        except re.error as error:
            raise ConfigError(f"--answer-pattern: no regular expression ({error})") from error

    def part(self, text: str) -> str | None:
        """What is compared of an answer; None where the pattern is not in it."""
        if self._pattern is None:
            return text.strip()
        found = list(self._pattern.finditer(text))
        if not found:
            return None
        return str(found[-1].group(1 if self._pattern.groups else 0) or "").strip()

    def matches(self, answer: str, wanted: str) -> bool:
        """Whether both have the same part."""
        part = self.part(answer)
        return part is not None and part == self.part(wanted)


def judged(answers: Sequence[Answer], wanted: Sequence[str], pattern: str | None) -> tuple[float, list[dict[str, Any]]]:
    """The share of answers that are those of the data, and each answer for people.

    Args:
        answers: that were written.
        wanted: those of the data.
        pattern: by which they are compared, see `Matcher`.
    """
    matcher = Matcher(pattern)
    rows = [
        {
            "wanted": gold, "answer": answer.text, "match": matcher.matches(answer.text, gold), "tokens": answer.tokens,
            "stopped": answer.why,
        }
        for answer, gold in zip(answers, wanted, strict=True)
    ]  # fmt: skip
    return sum(bool(row["match"]) for row in rows) / max(len(rows), 1), rows
