"""Chats with a language model: history, the base beside the tuned model, files, pipes and terminals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import build_pico_lm, failure, write_rows
from typer.testing import CliRunner

import craft_cli as craft
from craft_cli.api.chat import _Stream
from craft_cli.cli import app
from craft_cli.errors import ConfigError, CraftError, DataError

Make = Callable[..., Path]
SHORT = craft.Generation(max_new_tokens=12)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose model greets back, with 160 positions."""
    folder = tmp_path_factory.mktemp("tuned")
    names = ("ann", "bob", "cat", "dan")
    rows = [
        {"messages": [{"role": "user", "content": f"{name} {n}"}, {"role": "assistant", "content": f"no {name}"}]}
        for n in range(4)
        for name in names
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        write_rows(Path("train.jsonl"), rows)
        base = build_pico_lm("llama", folder / "base")
        craft.train(
            model=str(base), train_file="train.jsonl", validation_file="train.jsonl", ranks="12,12,3", output_dir="out",
            use_cpu=True, targets="query,key,value,output", learning_rate=3e-2, max_steps=8, eval_strategy="no",
        )  # fmt: skip
    return folder / "out"


def said(chat: craft.Chat) -> list[str]:
    return [f"{message['role']}: {message['content']}" for message in chat.messages]


def test_an_answer_is_that_of_predict_over_the_whole_history(tuned: Path) -> None:
    chat, heard = craft.Chat(tuned, generation=SHORT, system="be kind"), list[str]()
    first = chat.ask("ann 1", heard.append)
    assert first.text == "".join(heard) != ""
    second = chat.ask("bob 2")
    talk = [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "ann 1"},
        {"role": "assistant", "content": first.text},
        {"role": "user", "content": "bob 2"},
    ]
    assert chat.messages[:-1] == talk
    (expected,) = craft.predict(tuned, [talk], generation=SHORT)
    assert second.text == expected["answer"]
    chat.reset()
    assert said(chat) == ["system: be kind"]
    chat.system("")
    assert chat.ask("ann 1").text == craft.predict(tuned, ["ann 1"], generation=SHORT)[0]["answer"]


def test_the_base_answers_beside_the_tuned_model(tuned: Path) -> None:
    chat = craft.Chat(tuned, generation=SHORT)
    heard: list[tuple[bool, str]] = []
    mine, base = chat.compare("ann 1", lambda of_base, part: heard.append((of_base, part)))
    (expected,) = craft.predict(tuned.parent / "base", ["ann 1"], generation=SHORT)
    assert base.text == expected["answer"] != mine.text
    assert base.text == "".join(part for of_base, part in heard if of_base)
    assert said(chat) == ["user: ann 1", f"assistant: {mine.text}"]
    chat.reset()
    chat.base = True
    assert chat.ask("ann 1").text == base.text
    with pytest.raises(ConfigError, match="has no adapter to switch off"):
        craft.Chat(tuned.parent / "base").compare("a")


def test_the_oldest_turns_are_dropped_where_the_model_sees_no_more(tuned: Path) -> None:
    told: list[str] = []
    chat = craft.Chat(tuned, generation=craft.Generation(max_new_tokens=4), noticed=told.append)
    for number in range(8):
        chat.ask(f"ann {number} " + "x" * 20)
    assert told == ["the model sees 160 tokens: the oldest turns are left out from now on"]
    assert len(chat.messages) == 16
    with pytest.raises(CraftError, match="leaves no room"):
        chat.ask("y" * 200)
    assert len(chat.messages) == 16
    chat.ask("still here")


def test_a_saved_conversation_is_training_data_again(tuned: Path) -> None:
    chat = craft.Chat(tuned, generation=SHORT, system="be kind")
    with pytest.raises(DataError, match="the conversation is empty"):
        chat.save("talks.jsonl")
    chat.ask("ann 1")
    with pytest.raises(ConfigError, match=r"end the name of talks\.txt in \.jsonl"):
        chat.save("talks.txt")
    write_rows(
        Path("talks.jsonl"), [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]
    )
    assert chat.save("talks.jsonl") == 2
    rows = [json.loads(line) for line in Path("talks.jsonl").read_text().splitlines()]
    assert rows[1] == {"messages": chat.messages}
    found = craft.evaluate(tuned, validation_file="talks.jsonl")
    assert found.examples == 2


def test_control_c_ends_the_answer_and_keeps_what_was_written(tuned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chat, heard, put = craft.Chat(tuned, generation=SHORT), list[str](), _Stream.put
    chat.base = True  # it does not end soon

    def interrupted(stream: _Stream, value: Any) -> None:
        put(stream, value)
        if stream.tokens == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(_Stream, "put", interrupted)
        answer = chat.ask("ann 1", heard.append)
    assert (answer.why, answer.tokens) == ("interrupted", 5)
    assert answer.text == "".join(heard) == chat.messages[-1]["content"]
    chat.reset()
    assert chat.ask("ann 1").text.startswith(answer.text)


def test_a_model_of_prompts_takes_each_line_by_itself(pico_lm: Make) -> None:
    base = pico_lm(template="")
    chat = craft.Chat(base, generation=SHORT)
    assert not chat.remembers
    first = chat.ask("the film").text
    assert chat.ask("the film").text == first
    assert chat.save("rows.jsonl") == 2
    assert json.loads(Path("rows.jsonl").read_text().splitlines()[0]) == {"prompt": "the film", "completion": first}
    with pytest.raises(ConfigError, match="takes no system message"):
        chat.system("be kind")


def test_a_model_of_labels_is_refused(run: Path) -> None:
    assert "chooses among labels and writes no answers: use craft predict" in failure("chat", str(run), "--use-cpu")


def piped(run: Path, *lines: str, options: tuple[str, ...] = ()) -> Any:
    arguments = ["chat", str(run), "--use-cpu", "--max-new-tokens", "12", *options]
    return CliRunner().invoke(app, arguments, input="".join(f"{line}\n" for line in lines))


def test_in_a_pipe_each_line_gets_its_answer(tuned: Path) -> None:
    chat = craft.Chat(tuned, generation=SHORT)
    mine, base = chat.compare("ann 1")
    result = piped(tuned, "ann 1", "", "/reset", "/base", "ann 1", "/save talk.jsonl")
    assert result.stdout == f"{mine.text}\n{base.text}\n"
    assert "saved to talk.jsonl, which has 1 row now" in result.stderr
    assert json.loads(Path("talk.jsonl").read_text())["messages"][1]["content"] == base.text
    both = piped(tuned, "ann 1", options=("--compare",)).stdout
    assert both == f"tuned: {mine.text}\nbase: {base.text}\n"


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("/rest", "unknown command /rest; did you mean '/reset'?"),
        ("/save", "/save needs the name of a file"),
        ("/reset it", "/reset takes no argument; remove 'it'"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_line(line: str, told: str, tuned: Path) -> None:
    result = piped(tuned, line)
    assert result.exit_code == 1
    assert told in result.stderr


def test_control_characters_never_reach_a_terminal_and_words_stay_whole() -> None:
    from craft_cli.cli import chat, console

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(console.out, "_width", 20)
        with console.out.capture() as shown:
            show = chat._words()
            for part in ("a light", "house\x1b[2J on ", "the wide sea ", "\n", "twenty cells of text on", " two", "\n"):
                show(part)
    assert shown.get() == "a lighthouse�[2J on\nthe wide sea \ntwenty cells of text\non two\n"
