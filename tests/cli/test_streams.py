"""What reaches stdout, stderr and the terminal: valid JSON, no control characters; and streams that are closed or full."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import invoke
from hypothesis import given
from hypothesis import strategies as st

from craft_cli.cli import console
from craft_cli.cli.training_console import TrainingConsole
from craft_cli.data.writers import RecordWriter
from craft_cli.errors import as_json

Make = Callable[..., Path]
EVIL = "\x1b]52;c;Y3VybA==\x07\x1b[2J\x9b31m\u202e"


def anything() -> Any:
    leaf = st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters())
    return st.recursive(
        leaf, lambda part: st.lists(part) | st.dictionaries(st.text(st.characters()), part), max_leaves=8
    )


def refuse(name: str) -> None:
    raise AssertionError(f"{name} is no JSON")


@given(anything(), st.booleans())
def test_json_is_valid_and_printable_whatever_it_holds(content: Any, ascii: bool) -> None:
    text = as_json(content, ascii=ascii, indent=2)
    read = json.loads(text.encode(), parse_constant=refuse)
    assert all(letter.isprintable() or letter == "\n" for letter in text)
    assert text.isascii() or not ascii
    assert read == json.loads(json.dumps(content), parse_constant=lambda _: None)


@pytest.mark.parametrize("encoding", ["utf-8", "cp1252", "ascii"])
def test_labels_stay_distinct_on_a_stream_of_any_encoding(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding, errors="backslashreplace", write_through=True)
    monkeypatch.setattr(sys, "stdout", stream)
    rows = [{"label": "好评"}, {"label": "差评"}]
    console.print_json({"rows": rows, "loss": float("nan"), "best": [float("-inf")]})
    assert json.loads(raw.getvalue(), parse_constant=refuse) == {"rows": rows, "loss": None, "best": [None]}
    raw.seek(0)
    raw.truncate()
    RecordWriter(stream, "jsonl").write(rows)
    assert [json.loads(line) for line in raw.getvalue().splitlines()] == rows
    raw.seek(0)
    raw.truncate()
    console.table(["label", "f1"], [["好评", 1.0], ["差评", 0.5]])
    shown = raw.getvalue().decode(encoding).splitlines()
    assert shown[-1].split()[0] != shown[-2].split()[0]


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def test_control_characters_reach_no_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    for stream in (io.StringIO(), Terminal()):
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setattr(sys, "stderr", stream)
        console.say(f"going on with {EVIL}")
        console.note(EVIL)
        console.fail(EVIL)
        console.facts({EVIL: EVIL, "path": Path(EVIL)})
        console.table(["label", EVIL], [[EVIL, EVIL]])
        console.mistakes_table([{"place": f"{EVIL}, line 1", "label": EVIL, "prediction": EVIL, "texts": [EVIL]}])
        console.print_json({EVIL: EVIL})
        listener = TrainingConsole()
        listener._updates = 1
        listener.evaluated(0, 0.0, {EVIL: 1.0}, best=True)
        for letter in ("\x1b]", "\x1b[2J", "\x07", "\x9b", "\u202e"):
            assert letter not in stream.getvalue()


def test_labels_of_a_stranger_do_not_steer_the_terminal(run: Path) -> None:
    """Every command that shows a label of an adapter."""
    path = run / "adapter" / "adapter_config.json"
    path.write_text(path.read_text().replace('"LABEL_0"', json.dumps(EVIL)).replace('"negative"', json.dumps(EVIL)))
    assert json.dumps(EVIL)[1:-1] in path.read_text()
    Path("t.txt").write_text("good film\n")
    for command in (
        ["inspect", "run"], ["inspect", "run", "--json"], ["predict", "run", "--input", "t.txt"],
        ["eval", "run", "--task", "sst2", "--data-dir", "data", "--confusion"],
        ["eval", "run", "--task", "sst2", "--data-dir", "data", "--json"],
    ):  # fmt: skip
        done = invoke(*command)
        assert not {"\x1b", "\x07", "\x9b"} & set(done.output), command


def test_a_page_shows_names_and_runs_nothing(run: Path) -> None:
    evil = "\"><img src=x onerror=alert(1)><script>alert(1)</script>'&lt;\ud800"
    path = run / "adapter" / "adapter_config.json"
    path.write_text(path.read_text().replace('"LABEL_0"', json.dumps(evil)).replace('"negative"', json.dumps(evil)))
    run.rename(folder := run.with_name("run<img src=x onerror=alert(1)>"))
    recipe = {"task": "sst2", "model": evil.replace("\ud800", "")}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, allow_unicode=True))
    done = invoke("inspect", folder.name, "--html", "page.html")
    assert done.exit_code == 0, done.output
    tags: list[str] = []

    class Reads(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            tags.append(tag)
            assert not [name for name, _ in attrs if name.startswith("on")]

    Reads().feed(Path("page.html").read_text(encoding="utf-8"))
    assert "table" in tags
    assert "script" not in tags


# -- a user without a home ----------------------------------------------------------------------------------------------


def nowhere() -> Path:
    raise RuntimeError("Could not determine home directory.")


@pytest.mark.usefixtures("run")
def test_a_user_without_a_home_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `docker run --user 54321`: no line in /etc/passwd, no HOME."""
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", nowhere)
    Path("t.txt").write_text("good film\n")
    train = [
        "train",
        "--model",
        "base",
        "--task",
        "sst2",
        "--data-dir",
        "data",
        "--ranks",
        "4,4,2",
        "--use-cpu",
        "--max-steps",
        "1",
    ]
    refused = invoke(*train)
    assert refused.exit_code == 1
    assert "this user has no home directory; pass --cache-dir, or set HOME or XDG_CACHE_HOME" in refused.stderr
    for command in (
        [*train, "--cache-dir", "factors", "--output-dir", "out"], ["inspect", "run"], ["inspect", "base"], ["merge", "run"],
        ["predict", "run", "--input", "t.txt"], ["eval", "run", "--task", "sst2", "--data-dir", "data"], ["recipes"], ["methods"],
    ):  # fmt: skip
        done = invoke(*command)
        assert done.exit_code == 0, (command, done.output)


# -- streams that are closed, gone or full ------------------------------------------------------------------------------


def shell(line: str) -> subprocess.CompletedProcess[str]:
    """A line of bash in which `craft` is ours."""
    craft = f'craft() {{ "{sys.executable}" -m craft_cli "$@"; }}; set -o pipefail; '
    return subprocess.run(["bash", "-c", craft + line], capture_output=True, text=True, timeout=240, check=False)


def test_messages_to_a_reader_that_is_gone_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        for _ in range(3):
            console.say("still training")
            console.note("still training")


def test_results_to_a_reader_that_is_gone_end_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        with pytest.raises(BrokenPipeError):
            console.facts({"a": 1})
        console.discard(stream)
        after = io.StringIO()
        monkeypatch.setattr(sys, "stdout", after)
        console.facts({"b": 2})
    assert after.getvalue() == "b  2\n"  # and nothing of what could not be written


@pytest.mark.usefixtures("run")
def test_closed_and_full_streams_are_named() -> None:
    Path("t.txt").write_text("the film was good\n")
    done = shell("craft predict run <&-")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines() == ["error: standard input is closed; pass a file with --input"]
    done = shell("craft recipes --json >/dev/full")
    assert done.returncode == 1
    assert done.stderr.splitlines() == ["error: cannot write to standard output: No space left on device"]


@pytest.mark.slow
@pytest.mark.usefixtures("run")
def test_more_closed_streams() -> None:
    Path("t.txt").write_text("the film was good\n")
    done = shell("craft predict run --input t.txt >&-")
    assert done.stderr.splitlines() == ["error: standard output is closed; pass a file with --output"]
    done = shell("craft eval run --task sst2 --data-dir data --json >&-")
    assert done.stderr.splitlines() == ["error: standard output is closed, so --json cannot be printed"]
    train = "craft train --model base --task sst2 --data-dir data --ranks 4,4,2 --use-cpu --num-train-epochs 3"
    assert shell(f"{train} --output-dir closed <&- >&- 2>&-").returncode == 0
    assert (Path("closed/all_results.json")).is_file()
    assert {path.read_bytes()[:1] for path in Path("closed").glob("*.json*")} == {b"{"}
    done = shell(f"{train} --output-dir gone --logging-steps 1 2>&1 | head -3")
    assert done.returncode == 0, done.stdout
    assert Path("gone/all_results.json").is_file()
