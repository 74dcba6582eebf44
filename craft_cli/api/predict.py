"""Use-case: predict for texts without labels, row after row, however many there are."""

from __future__ import annotations

import io
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import Any, TextIO

from craft_cli.api.predictor import Predictor, load_predictor
from craft_cli.data.opened import ending
from craft_cli.data.readers import SUFFIXES, TEXT, Row, read_rows, read_stdin
from craft_cli.data.tables import column_named
from craft_cli.data.tokens import Encoded, Unseen
from craft_cli.data.writers import RecordWriter, format_of, open_records, parts_of
from craft_cli.errors import ConfigError, CraftError, DataError, plain
from craft_cli.files import check_inputs
from craft_cli.tasks.generation import Generation

STDIN = "-"
_BATCHES_AT_ONCE = 16
"""Batches whose rows are sorted by length together; from standard input it is one, so that lines are answered soon."""


def predict(
    path: str | Path | None,
    texts: Sequence[Any],
    *,
    max_seq_length: int | None = None,
    generation: Generation | None = None,
    per_device_eval_batch_size: int | None = None,
    use_cpu: bool = False,
    trust_remote_code: bool = False,
    allow_other_base: bool = False,
) -> list[dict[str, Any]]:
    """Predict for texts, and give the answers.

        craft.predict("runs/first", ["great film", "a dull book"])
        # [{"prediction": "positive", "scores": {"negative": 0.19, "positive": 0.81}}, ...]

    Args:
        path: a run, an adapter, a checkpoint's folder or a hub id; the latest run for None.
        texts: a string each; a pair of strings where the model takes pairs; a list of words where it tags them; for a
            language model what a user says or a list of messages; or a mapping of columns as in the data.
        max_seq_length: tokens kept; as in training without.
        generation: how a language model writes its answers; the likeliest token each time without.
        per_device_eval_batch_size: texts at once; 64 without, of language models 8.
        use_cpu: stay on the CPU.
        trust_remote_code: run Python code that comes with the model.
        allow_other_base: take an adapter whose base is not as it was in training.

    Returns:
        For each text what `craft predict` writes: `prediction` and `scores`; where words are tagged `prediction`, a list of
        entities, and `text`; of a language model `answer`, `tokens` and `stopped` (`end`, `stop`, `length`).

    Raises:
        TypeError: `texts` is a single string, or holds something else than texts.
        CraftError: the model or a text cannot be used.
    """
    if isinstance(texts, str):
        raise TypeError("texts: expected a list of texts, not a single string: put it into a list")
    predictor = load_predictor(
        path, use_cpu=use_cpu, trust_remote_code=trust_remote_code, allow_other_base=allow_other_base
    )
    places = [f"text {number}" for number in range(1, len(texts) + 1)]
    columns = predictor.task.text_columns
    cells = _to_answer if predictor.task.generates else _cells
    rows = [Row(place, cells(text, place, columns)) for place, text in zip(places, texts, strict=True)]
    if not rows:
        return []
    in_lines = all(isinstance(text, str) for text in texts) and not predictor.task.generates
    blocks = _answers(
        predictor, iter(rows), "texts", in_lines, (), max_seq_length, per_device_eval_batch_size, len(rows), generation
    )
    return [answer for block, _ in blocks for answer in block]


def _to_answer(text: Any, place: str, columns: Sequence[str]) -> dict[str, Any]:
    """What a language model is to answer: what a user says or a text begins with, or a conversation."""
    if isinstance(text, Mapping):
        return dict(text)
    if not isinstance(text, (str, list, tuple)):
        raise TypeError(
            f"texts: {place} is of type {type(text).__name__}: expected a string, a list of messages or columns"
        )
    return {next(iter(columns), "messages"): text}


def _cells(text: Any, place: str, columns: Sequence[str]) -> dict[str, Any]:
    """A text of the caller's as a row of the task's columns."""
    if isinstance(text, Mapping):
        return dict(text)
    if isinstance(text, str):
        return {"text": text}
    if not isinstance(text, (list, tuple)):
        raise TypeError(f"texts: {place} is of type {type(text).__name__}: expected a string, a pair, words or columns")
    parts = [list(text)] if len(columns) < 2 else list(text)
    if len(parts) != max(1, len(columns)):
        raise DataError(f"texts: {place} has {len(parts)} parts, this model takes {' and '.join(columns)}")
    return dict(zip(columns or ("tokens",), parts, strict=True))


def predict_file(
    path: str | Path | None = None,
    *,
    input: str | Path = STDIN,
    output: str | Path | None = None,
    output_format: str | None = None,
    text_columns: Sequence[str] | None = None,
    keep_columns: Sequence[str] = (),
    max_seq_length: int | None = None,
    generation: Generation | None = None,
    per_device_eval_batch_size: int | None = None,
    use_cpu: bool = False,
    trust_remote_code: bool = False,
    allow_other_base: bool = False,
    ready: Callable[[], None] = lambda: None,
    progress: Callable[[int], None] = lambda rows: None,
    noticed: Callable[[str], None] = lambda what: None,
) -> int:
    """Predict for the rows of a file or of standard input; neither rows nor predictions are ever held whole.

    Every prediction begins with its `row`, counted from 1, or with the columns that are kept in its place. At the keyboard
    every line is answered as soon as it is typed.

    Args:
        path: a run, an adapter, a checkpoint's folder or a hub id; the latest run without.
        input: a file (jsonl, csv, tsv, parquet, conll, or txt with a text a line), or `-` for texts a line on standard
            input. Several texts in one line are divided by tabs.
        output: the file to write (.jsonl or .csv); standard output without.
        output_format: `jsonl` or `csv`, where the file's name does not say it.
        text_columns: as in training without, or as columns are usually called.
        keep_columns: columns of the input to repeat beside each answer.
        max_seq_length: tokens kept; as in training without.
        generation: how a language model writes its answers; the likeliest token each time without.
        per_device_eval_batch_size: rows at once; 64 without, of language models 8.
        use_cpu: stay on the CPU.
        trust_remote_code: run Python code that comes with the model.
        allow_other_base: take an adapter whose base is not as it was in training.
        ready: called when the model is loaded.
        progress: called with the number of rows done.
        noticed: called at the end with what the user should know: rows that were cut.

    Returns:
        How many rows there were.

    Raises:
        CraftError: the model or a row cannot be used. What was predicted before is on standard output, but in no file.
    """
    kind = format_of(Path(output or "standard output"), output_format or (None if output else "jsonl"))
    origin = "standard input" if str(input) == STDIN else str(input)
    if output:
        check_inputs("--output", Path(output).expanduser(), [Path(input).expanduser()])
    by_hand = str(input) == STDIN and at_the_keyboard()
    rows = read_stdin(TEXT) if str(input) == STDIN else read_rows(Path(input).expanduser(), (*SUFFIXES, TEXT))
    kept = None if by_hand else _Kept(rows, origin, keep_columns)  # a missing file is told before a model is loaded
    predictor = load_predictor(
        path, use_cpu=use_cpu, trust_remote_code=trust_remote_code, allow_other_base=allow_other_base
    )
    ready()
    kept = kept or _Kept(rows, origin, keep_columns)
    in_lines = origin == "standard input" or ending(Path(origin)) == TEXT
    batch = per_device_eval_batch_size or int(predictor.task.defaults["per_device_eval_batch_size"])
    soon = predictor.task.generates or str(input) == STDIN
    at_once = 1 if by_hand else batch * (1 if soon else _BATCHES_AT_ONCE)
    answers = _answers(
        predictor, kept, origin, in_lines, text_columns or (), max_seq_length, batch, at_once, generation
    )
    done = 0
    unseen = Unseen()
    with _writer(output, kind) as writer:
        for block, encoded in answers:
            writer.write(map(kept.beside, block))
            if encoded:
                unseen.add(encoded)
            done += len(block)
            progress(done)
    if note := unseen.note(origin, max_seq_length):
        noticed(note)
    return done


def at_the_keyboard() -> bool:
    """Whether standard input is a terminal."""
    return bool(sys.stdin and sys.stdin.isatty())


class _Kept:
    """Passes rows on, and remembers of each until it is answered what is to stand beside the answer.

    Raises:
        DataError: there are no rows.
        ConfigError: the first row has no such column.
    """

    def __init__(self, rows: Iterator[Row], origin: str, columns: Sequence[str]) -> None:
        first = next(rows, None)
        if first is None:
            raise DataError(f"{origin} holds no rows")
        self._rows, self._count = chain([first], rows), 0
        self._waiting = deque[dict[str, Any]]()
        self._columns: list[str] = []
        for name in columns:
            found = column_named(name, list(first.cells))
            if found is None:
                raise ConfigError(f"--keep-columns: {origin} has no column '{name}'; it has {', '.join(first.cells)}")
            self._columns.append(found)

    def __iter__(self) -> _Kept:
        return self

    def __next__(self) -> Row:
        row = next(self._rows)
        self._count += 1
        names = self._columns
        self._waiting.append({name: row.cells.get(name) for name in names} if names else {"row": self._count})
        return row

    def beside(self, answer: dict[str, Any]) -> dict[str, Any]:
        """The answer to the next row, with what is kept of the row before it.

        Raises:
            ConfigError: a column is called as a part of the answer.
        """
        kept = self._waiting.popleft()
        parts = parts_of(answer)
        if taken := [name for name in kept if name in parts and kept[name] != parts[name]]:
            raise ConfigError(f"--keep-columns: a part of the answer is called '{taken[0]}' too: rename the column")
        return kept | answer


def _answers(
    predictor: Predictor,
    rows: Iterator[Row],
    origin: str,
    in_lines: bool,
    columns: Sequence[str],
    max_seq_length: int | None,
    batch_size: int | None,
    at_once: int,
    generation: Generation | None,
) -> Iterator[tuple[list[dict[str, Any]], Encoded | None]]:
    """The answers for so many rows at once, in their order, and the tokens that were scored; there is one row at least.

    Raises:
        ConfigError: settings of written answers, where a label is chosen.
    """
    task, first = predictor.task, next(rows)
    if generation and not task.generates:
        raise ConfigError(
            f"{predictor.name} chooses among labels: leave out --max-new-tokens, --temperature, --top-p, --seed and --stop"
        )
    read = task.reader(first, origin, plain=in_lines, columns=columns)
    rows = chain([first], rows)
    while block := list(islice(rows, at_once)):
        split = read(block)
        if task.generates:
            answers = predictor.write(split, task, generation or Generation(), batch_size)
            yield [{"answer": answer.text, "tokens": answer.tokens, "stopped": answer.why} for answer in answers], None
            continue
        encoded = predictor.encode(split, task, max_seq_length)
        scores = predictor.scores(encoded, task, batch_size, place=split.place_of)
        yield list(task.records(scores, split)), encoded


class _Screen:
    """A terminal that no label steers."""

    def __init__(self, file: TextIO) -> None:
        self._file, self.encoding = file, file.encoding

    def write(self, text: str) -> None:
        self._file.write(plain(text, "\n"))

    def flush(self) -> None:
        self._file.flush()


@contextmanager
def _writer(output: str | Path | None, kind: str) -> Iterator[RecordWriter]:
    if output is None:
        if sys.stdout is None:
            raise CraftError("standard output is closed: give a file with --output")
        if sys.stdout.isatty():
            yield RecordWriter(_Screen(sys.stdout), kind)  # type: ignore[arg-type]  # a TextIO for what is used of it
            return
        if kind == "csv" and isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(encoding="utf-8")  # as files have it; JSON escapes what the encoding does not have
        yield RecordWriter(sys.stdout, kind)
    else:
        with open_records(Path(output).expanduser(), kind) as writer:
            yield writer
