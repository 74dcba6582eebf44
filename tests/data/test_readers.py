"""Files as Windows, Excel, pandas and Spark write them, and what cannot be read."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import write_rows
from helpers import own, problem, write

from craft_cli.data.readers import rows_of
from craft_cli.data.sources import DataSource
from craft_cli.data.tables import read_file
from craft_cli.data.writers import RecordWriter
from craft_cli.errors import DataError
from craft_cli.tasks.splits import load_splits

ROWS = [["\u201ccaf\u00e9\u201d", "pos"], ["two\nlines, one comma", "neg"], ["plain", "pos"]]
DICTS = [dict(zip(("text", "label"), row, strict=True)) for row in ROWS]


def table(header: list[str] = ["text", "label"], end: str = "\r\n", mark: str = ",") -> str:  # noqa: B006
    text = io.StringIO()
    writer = csv.writer(text, lineterminator=end, delimiter=mark)
    writer.writerow(header)
    writer.writerows(ROWS)
    return text.getvalue()


def texts_and_labels(path: str, **settings: Any) -> list[list[str]]:
    task, (split,) = own(path, **settings)
    return [[*texts, task.labels[label]] for texts, label in zip(split.texts, split.labels or [], strict=True)]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_every_encoding_of_windows_and_every_line_end(encoding: str, end: str) -> None:
    content = table(end=end).encode(encoding)
    if encoding == "utf-16-be":
        content = b"\xfe\xff" + content
    assert texts_and_labels(write("t.CSV", content)) == ROWS
    lines = end.join(json.dumps(row, ensure_ascii=False) for row in DICTS)
    assert texts_and_labels(write("t.jsonl", lines.encode(encoding.replace("utf-16-be", "utf-16")))) == ROWS


def test_a_carriage_return_inside_a_line_is_a_character() -> None:
    rows = rows_of(io.BytesIO(b"a\rb\nc\n"), ".txt", "here")
    assert [(row.place, row.cells["text"]) for row in rows] == [("line 1", "a\rb"), ("line 2", "c")]


def test_lines_of_a_pipe_come_as_they_are_written() -> None:
    code = "from craft_cli.data.readers import read_stdin\nfor row in read_stdin('.txt'): print(row.cells['text'], flush=True)"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ
    )
    assert process.stdin
    assert process.stdout
    for text in (b"one\n", b"two\n"):
        process.stdin.write(text)
        process.stdin.flush()
        assert process.stdout.readline() == text
    process.stdin.close()
    assert process.wait(20) == 0
    process.stdout.close()


def test_the_advice_for_cp1252_gives_the_text_back() -> None:
    path = write("t.csv", table().replace("caf\u00e9", "caf\u00e9 \u20ac5").encode("cp1252"))
    message = problem(own, path)
    assert message.startswith(
        "t.csv, line 2: not UTF-8; convert the file (of Windows: iconv -f cp1252 -t utf-8 t.csv > NEW)"
    )
    with pytest.raises(DataError, match=r"standard input, line 2: not UTF-8; convert it first \(of Windows: pipe it"):
        list(rows_of(io.BytesIO(Path(path).read_bytes()), ".csv", "standard input"))
    converted = subprocess.run(["iconv", "-f", "cp1252", "-t", "utf-8", path], capture_output=True, check=True).stdout
    assert texts_and_labels(write("new.csv", converted))[0] == ["\u201ccaf\u00e9 \u20ac5\u201d", "pos"]


def test_utf16_that_breaks_off_is_told() -> None:
    assert "t.csv, after line " in problem(own, write("t.csv", table().encode("utf-16")[:-1]))


def test_blanks_in_a_header_and_behind_commas() -> None:
    assert texts_and_labels(write("t.csv", table([" text ", "label\t"]))) == ROWS
    spaced = write("s.csv", 'id, text, label\n1, "a, b", neg\n2, c , pos\n')
    assert texts_and_labels(spaced) == [["a, b", "neg"], ["c ", "pos"]]
    assert read_file(Path(spaced)).columns == ["id", "text", "label"]


def test_semicolons_and_tabs_of_excel_and_columns_without_a_name() -> None:
    assert texts_and_labels(write("t.csv", table(mark=";"))) == ROWS
    assert texts_and_labels(write("t.csv", table(mark="\t"))) == ROWS
    assert read_file(Path(write("u.csv", ",text,label,,\n0,a,x,,\n1,b,y,,\n"))).columns == ["text", "label"]


def test_an_empty_cell_is_missing_and_words_for_nothing_are_text() -> None:
    for word in ("nan", "NA", "None", "null", "N/A"):
        assert texts_and_labels(write("t.csv", f"text,label\n{word},{word}\na,x\n")) == [[word, word], ["a", "x"]]
    assert problem(own, write("t.csv", "text,label\na,x\n,y\n")) == "t.csv, line 3: column 'text' has no text"
    assert problem(own, write("t.tsv", "text\tlabel\na\tx\nb\t\n")) == "t.tsv, line 3: column 'label' has no label"


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
@pytest.mark.parametrize("column", ["text", "label", "score"])
def test_a_missing_value_of_any_reader_is_refused_by_its_place(suffix: str, column: str) -> None:
    rows: list[dict[str, Any]] = [{"text": "a", "label": "x", "score": 0.5}, {"text": "b", "label": "y", "score": 1.5}]
    for nothing in (None, float("nan")):
        broken = [rows[0], rows[1] | {column: nothing}]
        if suffix == ".parquet":
            import pyarrow
            from pyarrow import parquet

            cells = pyarrow.Table.from_pylist(
                broken if nothing is None or column == "score" else [*rows, rows[0] | {column: None}]
            )
            parquet.write_table(cells, "t.parquet")
        else:
            lines = [json.dumps(row) for row in broken]
            write(f"t{suffix}", "\n".join(lines) if suffix == ".jsonl" else f"[{','.join(lines)}]")
        message = problem(own, f"t{suffix}", label_column="score" if column == "score" else "label")
        assert message.startswith(f"t{suffix}, {'line' if suffix == '.jsonl' else 'row'} ")
        assert f"column '{column}'" in message


JSON_FORMS = {
    "lines": "\n".join(map(json.dumps, DICTS)) + "\n",
    "list": json.dumps(DICTS, indent=1),
    "data": json.dumps({"version": "1", "data": DICTS}),
    "columns": json.dumps({name: [row[name] for row in DICTS] for name in DICTS[0]}),
    "pandas": json.dumps({name: {str(n): row[name] for n, row in enumerate(DICTS)} for name in DICTS[0]}),
    "index": json.dumps({str(n): row for n, row in enumerate(DICTS)}),
    "split": json.dumps({"columns": ["text", "label"], "index": [0, 1, 2], "data": ROWS}),
}


@pytest.mark.parametrize("form", JSON_FORMS)
def test_every_form_of_json_gives_the_same_rows(form: str) -> None:
    assert texts_and_labels(write("t.json", JSON_FORMS[form])) == ROWS


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (
            '{"train": [{"a": 1}], "test": [{"a": 1}]}',
            "t.json: rows under 'train' and 'test'; write each list to its own file",
        ),
        ('{"a": [1, 2], "b": [1]}', "t.json: columns of different lengths ('a' 2, 'b' 1)"),
        ('{"columns": ["a"], "data": [[1], 1]}', "t.json, row 2: expected a list of 1 cell"),
        ('{"columns": ["a", "b"], "data": [[1, 2], [1, 2, 3]]}', "t.json, row 2: expected a list of 2 cells"),
        ('{"a": {"x": 1}, "b": {"y": 1}}', "t.json: expected a JSON list of objects, not objects by name"),
        ('{"a": 1}\n{"a": \n', "t.json, line 2: not JSON"),
        ('{"a": 1', "t.json: not JSON"),
        ("3", "t.json: expected a JSON list of objects"),
        ("[3]", "t.json, row 1: expected a JSON object"),
    ],
)
def test_json_that_is_none_of_them_is_told(content: str, told: str) -> None:
    assert problem(read_file, Path(write("t.json", content))).startswith(told)


@pytest.mark.parametrize("name", ["dev.jsonl", "val.csv", "valid.tsv", "validation.JSONL"])
def test_validation_rows_are_found_by_their_other_names(name: str) -> None:
    Path("data").mkdir()
    write_rows(Path("data/train.jsonl"), DICTS)
    write(
        f"data/{name}",
        table(mark="\t" if name.endswith("tsv") else ",") if "json" not in name.lower() else JSON_FORMS["lines"],
    )
    if name.endswith("tsv"):
        write(f"data/{name}", "text\tlabel\na\tpos\nb\tneg\nc\tpos\n")
    loaded = load_splits(DataSource(data_dir="data"), ["train", "validation"])
    assert [len(split) for split in loaded.splits.values()] == [3, 3]
    write_rows(Path("data/validation.json"), DICTS)
    assert " and " in problem(load_splits, DataSource(data_dir="data"), ["train", "validation"])


def test_a_saved_data_set_finds_its_dev_split() -> None:
    from datasets import Dataset, DatasetDict

    rows = Dataset.from_list(DICTS)
    DatasetDict({"train": rows, "dev": rows.select(range(2))}).save_to_disk("saved")
    loaded = load_splits(DataSource(data_dir="saved"), ["train", "validation"])
    assert [len(split) for split in loaded.splits.values()] == [3, 2]


@pytest.mark.parametrize("kind", ["binary", "large_binary", "large_string", "dictionary", "string_view"])
def test_every_kind_of_text_in_parquet_is_text(kind: str) -> None:
    import pyarrow
    from pyarrow import parquet

    def column(values: list[str]) -> Any:
        if "binary" in kind:
            return pyarrow.array([value.encode() for value in values], getattr(pyarrow, kind)())
        return (
            pyarrow.array(values).dictionary_encode()
            if kind == "dictionary"
            else pyarrow.array(values, getattr(pyarrow, kind)())
        )

    columns = {name: column([row[name] for row in DICTS]) for name in ("text", "label")}
    parquet.write_table(pyarrow.table(columns), "t.parquet")
    assert texts_and_labels("t.parquet") == ROWS


def test_bytes_in_lists_and_in_saved_data_sets_are_text_too() -> None:
    import pyarrow
    from datasets import Dataset, Features, Sequence, Value
    from pyarrow import parquet

    tokens = {"tokens": [[b"caf\xc3\xa9", b"b"]] * 2, "tags": [[b"B-x", b"O"]] * 2}
    parquet.write_table(pyarrow.table(tokens), "t.parquet")
    features = Features(dict.fromkeys(tokens, Sequence(Value("binary"))))
    Dataset.from_dict(tokens, features).save_to_disk("saved")
    for source in (DataSource(train_file="t.parquet"), DataSource(data_dir="saved")):
        loaded = load_splits(source, ["train"])
        assert loaded.splits["train"].texts[0] == ("caf\u00e9", "b")
        assert loaded.task.labels == ("O", "B-x", "I-x")


def test_cells_that_are_no_text_and_no_label_are_refused_by_their_place() -> None:
    import datetime
    from decimal import Decimal

    import pyarrow
    from pyarrow import parquet

    day = datetime.date(2024, 1, 2)
    columns: dict[str, list[Any]] = {
        "text": ["a", "b"], "label": ["x", "y"], "day": [day, day], "raw": [b"\xff", b"\xfe"], "price": [Decimal("1.50"), Decimal("2.00")],
        "id": [Decimal("12345678901234567890"), Decimal(7)],
    }  # fmt: skip
    parquet.write_table(pyarrow.table(columns), "t.parquet")
    assert own("t.parquet")[0].labels == ("x", "y")  # the others are not looked at
    assert problem(own, "t.parquet", text_columns=("day",)) == "t.parquet, row 1: column 'day' is a date, not a text"
    assert (
        problem(own, "t.parquet", text_columns=("raw",))
        == "t.parquet, row 1: column 'raw' is bytes that are not UTF-8, not a text"
    )
    assert problem(own, "t.parquet", label_column="day") == "t.parquet, row 1: column 'day' has a date, not a label"
    assert own("t.parquet", label_column="price")[1][0].labels == [1.5, 2.0]
    assert own("t.parquet", label_column="id")[0].labels == ("7", "12345678901234567890")


def test_half_a_character_is_refused_by_its_line() -> None:
    good, bad = '{"text": "a", "label": "x"}\n', '{"text": "b\\ud83d", "label": "y"}\n'
    assert problem(own, write("t.jsonl", good + bad)).startswith(
        "t.jsonl, line 2: column 'text' contains an invalid character"
    )
    bad = '{"text": "b", "label": "\\ud83d"}\n'
    assert problem(own, write("t.jsonl", good + bad)).startswith(
        "t.jsonl, line 2: column 'label' contains an invalid character"
    )


def test_lists_of_messages_written_as_text_are_refused() -> None:
    chat = json.dumps([{"role": "user", "content": "hello"}])
    python = str([{"role": "user", "content": "it's"}])
    for cell in (chat, python):
        message = problem(own, str(write_rows(Path("t.jsonl"), [{"text": cell, "label": n % 2} for n in range(4)])))
        assert message.startswith("t.jsonl: column 'text' has lists of messages written as text")
    assert own(write("t.csv", 'text,label\n"[1, 2]",x\n"[3]",y\n'))[1][0].texts == [("[1, 2]",), ("[3]",)]


# -- CoNLL ----------------------------------------------------------------------------------------------------------------


def words_and_tags(content: str) -> list[tuple[list[str], list[str]]]:
    rows = rows_of(io.BytesIO(content.encode()), ".conll", "t.conll")
    return [(row.cells["tokens"], row.cells.get("tags", [])) for row in rows]


@pytest.mark.parametrize(
    "comment",
    [
        "# id 7f3a domain=en",
        "# text = I was O",
        "#sent_id = 3",
        "# newdoc",
        "# text: so it is said",
        "-DOCSTART- -X- O O\n",
    ],
)
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_comments_before_a_sentence_are_no_words(comment: str, end: str) -> None:
    content = f"{comment}\na B-x\nb O\n\n{comment}\nc O\n".replace("\n", end)
    assert words_and_tags(content) == [(["a", "b"], ["B-x", "O"]), (["c"], ["O"])]


def test_a_number_sign_is_a_word() -> None:
    assert words_and_tags("# O\n#tag B-x\na O\n# O\n") == [(["#", "#tag", "a", "#"], ["O", "B-x", "O", "O"])]
    assert words_and_tags("# NN B-NP O\na NN I-NP O\n")[0][0] == ["#", "a"]


def test_columns_that_are_no_words_are_refused() -> None:
    with pytest.raises(DataError, match=r"t\.conll, line 1: the first column holds word numbers"):
        words_and_tags("1\tA\tO\n2\tb\tO\n3\tc\tO\n")
    with pytest.raises(DataError, match=r"t\.conll, line 1: columns are separated by spaces \('a b'\) and by a tab"):
        words_and_tags("a b\tO\n")
    missing = write("t.jsonl", json.dumps({"tokens": ["a", "b"], "tags": ["B-x", ""]}) + "\n")
    assert problem(load_splits, DataSource(train_file=missing), ["train"]) == (
        "t.jsonl, line 1: a word without a tag; write O where there is no entity"
    )


# -- written ----------------------------------------------------------------------------------------------------------------


def test_no_csv_that_is_written_holds_a_formula_or_runs_names_together() -> None:
    names = ['=HYPERLINK("http://x")', "@SUM(1+1)", "-1", "+a", "a,b", "c"]
    file = io.StringIO()
    writer = RecordWriter(file, "csv")
    writer.write([{"prediction": name, "scores": {name: -0.5}} for name in names[:1]])
    header, row = csv.reader(io.StringIO(file.getvalue()))
    assert header == ["prediction", 'score_=HYPERLINK("http://x")']
    assert row == ['\'=HYPERLINK("http://x")', "-0.5"]
    for found, cell in (
        ("@SUM(1+1)", "'@SUM(1+1)"),
        ("-1", "-1"),
        ("+a", "'+a"),
        (["a,b", "c"], '"a,b",c'),
        (["a", "b", "c"], "a,b,c"),
    ):
        file = io.StringIO()
        RecordWriter(file, "csv").write([{"prediction": found}])
        assert list(csv.reader(io.StringIO(file.getvalue())))[1] == [cell]


def test_columns_with_commas_in_their_names(pico: Any) -> None:
    from craft_cli.config import RunConfig

    path = write("t.csv", '"review, full",label\na,x\nb,y\nc,x\nd,y\n')
    given = {"model": str(pico()), "train_file": path, "label_column": "label"}
    for columns in (["review, full"], '"review, full"'):
        config = RunConfig.build(given | {"text_columns": columns})
        assert config.text_columns == ("review, full",)
        assert RunConfig.build(recipe=config.recipe()).text_columns == ("review, full",)
        task, (split,) = own(path, text_columns=config.text_columns)
        assert split.texts[0] == ("a",)
        assert RunConfig.build(given | task.settings()).text_columns == ("review, full",)
