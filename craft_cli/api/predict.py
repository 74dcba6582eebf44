"""Predict for texts without labels, in a stream of any length."""

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
from craft_cli.data.tables import column_named, columns_listed
from craft_cli.data.tokens import Encoded, Unseen
from craft_cli.data.writers import RecordWriter, format_of, open_records, parts_of
from craft_cli.errors import ConfigError, CraftError, DataError, plain
from craft_cli.files import check_inputs
from craft_cli.tasks.generation import Generation

STDIN = "-"
_BATCHES_AT_ONCE = 16
"""Batches sorted by length together; one batch for standard input, so that lines are answered quickly."""


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
    """Predict for texts and return the predictions.

        craft.predict("runs/first", ["great film", "a dull book"])
        # [{"prediction": "positive", "scores": {"negative": 0.19, "positive": 0.81}}, ...]

    Args:
        path: a run, an adapter, the folder of a base checkpoint or a Hub id; None for the latest run.
        texts: a list of strings; of string pairs, for a model of pairs; of word lists, for tags; of user
            messages or message lists, for a language model; or of mappings by column, as in the data.
        max_seq_length: maximum tokens per text. Default: as in training.
        generation: generation settings of a language model. Default: greedy.
        per_device_eval_batch_size: batch size. Default: 64, or 8 for language models.
        use_cpu: use the CPU even if a GPU is available.
        trust_remote_code: run Python code from the model's repository.
        allow_other_base: accept a base that has changed since the training.

    Returns:
        One record per text, as written by `craft predict`: `prediction` and `scores`; for tagged words `prediction`,
        a list of entities, and `text`; for a language model `answer`, `tokens` and `stopped` (`end`, `stop`, `length`).

    Raises:
        TypeError: `texts` is a single string, or contains an unsupported type.
        CraftError: the model or a text is invalid.
    """
    if isinstance(texts, str):
        raise TypeError("texts: expected a list of texts, not a single string; put it into a list")
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
    """The row of a prompt: a user message, the start of a text, or a conversation."""
    if isinstance(text, Mapping):
        return dict(text)
    if not isinstance(text, (str, list, tuple)):
        raise TypeError(
            f"texts: {place} is of type {type(text).__name__}: expected a string, a list of messages or columns"
        )
    return {next(iter(columns), "messages"): text}


def _cells(text: Any, place: str, columns: Sequence[str]) -> dict[str, Any]:
    """Convert a given text to a row with the task's columns."""
    if isinstance(text, Mapping):
        return dict(text)
    if isinstance(text, str):
        return {"text": text}
    if not isinstance(text, (list, tuple)):
        raise TypeError(f"texts: {place} is of type {type(text).__name__}: expected a string, a pair, words or columns")
    parts = [list(text)] if len(columns) < 2 else list(text)
    if len(parts) != max(1, len(columns)):
        raise DataError(f"texts: {place} has {len(parts)} parts, but this model expects {' and '.join(columns)}")
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
    """Predict for the rows of a file or of standard input, as a stream.

    Every prediction starts with its `row` number, from 1, or with the columns to keep. Lines typed at the keyboard are
    answered one by one.

    Args:
        path: a run, an adapter, the folder of a base checkpoint or a Hub id. Default: the latest run.
        input: a file (jsonl, csv, tsv, parquet, conll, or txt with one text per line), or `-` for one text per line on
            standard input. Several texts in one line are separated by tabs.
        output: the output file (.jsonl or .csv). Default: standard output.
        output_format: `jsonl` or `csv`. Default: from the file name.
        text_columns: text columns. Default: those of the training, or by their usual names.
        keep_columns: columns of the input to copy to each prediction.
        max_seq_length: maximum tokens per row. Default: as in training.
        generation: generation settings of a language model. Default: greedy.
        per_device_eval_batch_size: batch size. Default: 64, or 8 for language models.
        use_cpu: use the CPU even if a GPU is available.
        trust_remote_code: run Python code from the model's repository.
        allow_other_base: accept a base that has changed since the training.
        ready: called when the model is loaded.
        progress: called with the number of rows done.
        noticed: called at the end with notes, such as truncated rows.

    Returns:
        The number of rows.

    Raises:
        CraftError: the model or a row is invalid. Earlier predictions are on standard output, but not in a file.
    """
    kind = format_of(Path(output or "standard output"), output_format or (None if output else "jsonl"))
    origin = "standard input" if str(input) == STDIN else str(input)
    if output:
        check_inputs("--output", Path(output).expanduser(), [Path(input).expanduser()])
    by_hand = str(input) == STDIN and at_the_keyboard()
    rows = read_stdin(TEXT) if str(input) == STDIN else read_rows(Path(input).expanduser(), (*SUFFIXES, TEXT))
    kept = None if by_hand else _Kept(rows, origin, keep_columns)  # a missing file is reported before a model is loaded
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
    """Passes rows on, and keeps the columns to copy until each row is answered.

    Raises:
        DataError: there are no rows.
        ConfigError: a column is missing from the first row.
    """

    def __init__(self, rows: Iterator[Row], origin: str, columns: Sequence[str]) -> None:
        first = next(rows, None)
        if first is None:
            raise DataError(f"{origin} has no rows")
        self._rows, self._count = chain([first], rows), 0
        self._waiting = deque[dict[str, Any]]()
        self._columns: list[str] = []
        for name in columns:
            found = column_named(name, list(first.cells))
            if found is None:
                raise ConfigError(
                    f"--keep-columns: {origin} has no column '{name}'; it has {columns_listed(first.cells)}"
                )
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
        """Add the kept columns of the next row to its answer.

        Raises:
            ConfigError: a column has the same name as a field of the answer.
        """
        kept = self._waiting.popleft()
        parts = parts_of(answer)
        if taken := [name for name in kept if name in parts and kept[name] != parts[name]]:
            raise ConfigError(f"--keep-columns: '{taken[0]}' is also a field of the predictions; rename the column")
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
    """Answer rows in batches, in order, and count truncated tokens; there is at least one row.

    Raises:
        ConfigError: generation settings are given, but the model does not generate text.
    """
    task, first = predictor.task, next(rows)
    if generation and not task.generates:
        raise ConfigError(
            f"{predictor.name} does not generate text; remove --max-new-tokens, --temperature, --top-p, --seed and --stop"
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
    """A text stream that removes control characters for a terminal."""

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
            raise CraftError("standard output is closed; pass a file with --output")
        if sys.stdout.isatty():
            yield RecordWriter(_Screen(sys.stdout), kind)  # type: ignore[arg-type]  # has the methods of TextIO that are used
            return
        if kind == "csv" and isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(encoding="utf-8")  # as in files; JSON escapes what the encoding cannot represent
        yield RecordWriter(sys.stdout, kind)
    else:
        with open_records(Path(output).expanduser(), kind) as writer:
            yield writer
