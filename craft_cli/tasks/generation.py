"""Generate answers, and compare them with the reference answers."""

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
"""Share of answers equal to the reference."""
ENDED, STOPPED, FULL = "end", "stop", "length"
"""Why an answer ended: an end token, a stop string, or the maximum number of tokens."""


@dataclass(frozen=True)
class Generation:
    """Generation settings.

    Attributes:
        max_new_tokens: maximum tokens of an answer.
        temperature: sampling temperature; 0 is greedy decoding.
        top_p: sample from the most likely tokens with this total probability.
        seed: random seed of the sampling.
        stop: strings that end an answer; they are removed from it.

    Raises:
        ConfigError: a value is out of range.
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
        if not 0 <= self.seed < 1 << 63:
            raise ConfigError(f"--seed: expected a whole number from 0 to {(1 << 63) - 1}, not {self.seed}")
        if not all(self.stop):
            raise ConfigError("--stop: an empty text would end every answer at once")


@dataclass(frozen=True)
class Answer:
    """A generated answer.

    Attributes:
        text: the text, without end token and stop string.
        tokens: number of generated tokens, including the end token.
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
    """Generate an answer to each prompt, in order.

    Args:
        model: a transformers language model.
        tokenizer: its tokenizer, with a padding token.
        prompts: token ids of each prompt.
        ends: tokens that end an answer.
        settings: generation settings.
        batch_size: prompts per batch; prompts of similar length are batched together.
        progress: called with (prompts done, total prompts).
        streamer: a transformers streamer, for a single prompt.

    Raises:
        ModelError: a prompt leaves no room for an answer, or the logits are not finite.
    """
    was_training = model.training
    model.eval()
    order = sorted(range(len(prompts)), key=lambda number: -len(prompts[number]))
    answers: dict[int, Answer] = {}
    try:
        with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
            torch.manual_seed(settings.seed)
            for start in range(0, len(order), batch_size):
                rows = order[start : start + batch_size]
                written = _write(model, tokenizer, [prompts[row] for row in rows], ends, settings, streamer)
                answers |= dict(zip(rows, written, strict=True))
                progress(len(answers), len(prompts))
    finally:
        model.train(was_training)
    return [answers[number] for number in range(len(prompts))]


def _write(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    ends: Sequence[int],
    settings: Generation,
    streamer: Any,
) -> list[Answer]:
    """Generate the answers of one batch, with shorter prompts padded on the left."""
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
    with warnings.catch_warnings():  # generation_config.json may set sampling options that greedy decoding ignores
        warnings.filterwarnings("ignore", module="transformers")
        out = model.generate(
            input_ids=ids.to(model.device), attention_mask=mask.to(model.device), max_new_tokens=room, use_cache=True,
            eos_token_id=list(ends), pad_token_id=tokenizer.pad_token_id, streamer=streamer, **_plain(model, draws), **options,
        )  # fmt: skip
    return [_answer(row.tolist(), tokenizer, ends, settings, room) for row in out[:, width:].cpu()]


def _plain(model: Any, draws: bool) -> dict[str, Any]:
    """Arguments that override the checkpoint's generation_config.json, so that answers depend only on `settings`."""
    return {"repetition_penalty": 1.0, "num_beams": 1} | (
        {} if draws else {"temperature": None, "top_p": None, "top_k": None}
    )


def positions_of(model: Any) -> int | None:
    """Maximum tokens of prompt and answer together; None if unlimited."""
    positions: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return positions


def _room(positions: int | None, width: int, wanted: int) -> int:
    """The number of tokens that can follow a prompt of this width.

    Raises:
        ModelError: there is no room.
    """
    room = wanted if positions is None else min(wanted, positions - width)
    if room < 1:
        raise ModelError(
            f"a prompt of {width:,} tokens leaves no room for an answer: the model has {positions:,} positions"
        )
    return room


def _answer(ids: list[int], tokenizer: Any, ends: Sequence[int], settings: Generation, room: int) -> Answer:
    """Extract the answer to one prompt; everything after its end is padding."""
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
    """Decode tokens without cleanup, skipping special tokens."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


class Matcher:
    """Compare an answer with the reference: stripped of whitespace, or only the part that a pattern matches.

    Args:
        pattern: a regular expression. Its last match is compared: the first group, or the whole match if there is no group.

    Raises:
        ConfigError: the pattern is not a valid regular expression.
    """

    def __init__(self, pattern: str | None = None) -> None:
        try:
            self._pattern = re.compile(pattern) if pattern else None
        except re.error as error:
            raise ConfigError(f"--answer-pattern: invalid regular expression ({error})") from error

    def part(self, text: str) -> str | None:
        """The part of an answer to compare; None if the pattern does not match."""
        if self._pattern is None:
            return text.strip()
        matches = list(self._pattern.finditer(text))
        if not matches:
            return None
        return str(matches[-1].group(1 if self._pattern.groups else 0) or "").strip()

    def matches(self, answer: str, wanted: str) -> bool:
        """Whether both answers have the same part."""
        part = self.part(answer)
        return part is not None and part == self.part(wanted)


def judged(answers: Sequence[Answer], wanted: Sequence[str], pattern: str | None) -> tuple[float, list[dict[str, Any]]]:
    """The share of answers equal to the reference, and a record of each answer.

    Args:
        answers: generated answers.
        wanted: reference answers.
        pattern: pattern for the comparison, see `Matcher`.
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
