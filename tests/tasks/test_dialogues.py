"""Rows of a language model: every layout of them, and which of their tokens are learned."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import write_rows
from transformers import AutoTokenizer

from craft_cli.data.sources import DataSource
from craft_cli.data.tables import read_file
from craft_cli.data.tokens import IGNORED
from craft_cli.errors import ConfigError, DataError, ModelError
from craft_cli.tasks import kind_of_table
from craft_cli.tasks.causal_lm import CausalLM
from craft_cli.tasks.dialogues import COMPLETION, MESSAGES, TEXT, Conversation
from craft_cli.tasks.splits import load_splits
from craft_cli.tasks.templates import TEMPLATES, Renderer, end_tokens, template_named

Make = Callable[..., Path]
TURNS = [
    {"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"},
    {"role": "user", "content": "bye"}, {"role": "assistant", "content": "so long"},
]  # fmt: skip
SHARED = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]


def loaded(rows: Sequence[dict[str, Any]], **source: Any) -> tuple[CausalLM, Any]:
    path = write_rows(Path("rows.jsonl"), list(rows))
    found = load_splits(DataSource(train_file=str(path), **source), ["train"])
    assert isinstance(found.task, CausalLM)
    return found.task, found.splits["train"]


def learned(folder: Path, row: Sequence[str], form: str, train_on: str, template: str = "") -> list[str]:
    """The parts of a row that are learned."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = Renderer(tokenizer, form, train_on, template).row(row, "row 1", 1000)
    assert all(target in (IGNORED, token) for token, target in zip(found.ids, found.targets, strict=True))
    parts: list[str] = []
    open_part: list[int] = []
    for target in [*found.targets, IGNORED]:
        if target != IGNORED:
            open_part.append(target)
        elif open_part:
            parts.append(str(tokenizer.decode(open_part)))
            open_part = []
    return parts


@pytest.mark.parametrize(
    ("row", "form", "columns"),
    [
        ({"messages": TURNS[1:3]}, MESSAGES, ("messages",)),
        ({"conversations": SHARED}, MESSAGES, ("conversations",)),
        ({"messages": json.dumps(TURNS[1:3]), "id": 4}, MESSAGES, ("messages",)),
        ({"prompt": TURNS[1:2], "completion": TURNS[2:3]}, MESSAGES, ("prompt", "completion")),
        ({"instruction": "hi", "input": "", "output": "hello"}, MESSAGES, ("instruction", "output")),
        ({"question": "hi", "answer": "hello"}, MESSAGES, ("question", "answer")),
        ({"Question": "hi", "ANSWER": "hello"}, MESSAGES, ("Question", "ANSWER")),
    ],
)
def test_the_same_conversation_in_every_layout(row: dict[str, Any], form: str, columns: tuple[str, ...]) -> None:
    task, split = loaded([row])
    assert (task.form, task.text_columns) == (form, columns)
    talk = Conversation.of(split.texts[0][0])
    assert talk.messages == [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    assert split.labels == ["hello"]


def test_prompts_with_completions_and_texts_stay_as_they_are() -> None:
    task, split = loaded([{"prompt": " a", "completion": " b\n"}])
    assert (task.form, split.texts, split.labels) == (COMPLETION, [(" a", " b\n")], [" b\n"])
    task, split = loaded([{"text": "once upon"}])
    assert (task.form, split.texts) == (TEXT, [("once upon",)])
    task, _ = loaded([{"body": "once upon", "id": 1}], task_type="causal-lm", text_columns=("body",))
    assert task.form == TEXT
    alpaca = {"instruction": "add", "input": "1 2", "output": "3"}
    assert Conversation.of(loaded([alpaca])[1].texts[0][0]).messages[0]["content"] == "add\n\n1 2"


@pytest.mark.parametrize(
    "row", [{"text": "a", "label": "b"}, {"sentence": "a", "label": 1}, {"question": "a", "sentence": "b", "label": 0}]
)
def test_texts_with_labels_are_no_answers(row: dict[str, Any]) -> None:
    path = write_rows(Path("rows.jsonl"), [row])
    assert kind_of_table(read_file(path), DataSource(train_file=str(path))).__name__ == "SequenceClassification"


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"messages": "hello"}, "column 'messages' is hello, not a list of messages"),
        ({"messages": []}, "not a list of messages"),
        ({"messages": [TURNS[1], "x"]}, "message 2 is x, not a mapping with role and content"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "message 1 has the role 'robot'; use system, user, assistant, tool"),
        ({"messages": [TURNS[1], TURNS[2], TURNS[2]]}, "message 3 of assistant follows one of assistant: roles are out of order"),
        ({"messages": [TURNS[1], TURNS[0], TURNS[2]]}, "message 2 of system follows one of user"),
        ({"messages": [TURNS[2]]}, "message 1 of assistant comes first"),
        ({"messages": TURNS[:2]}, "ends with a message of user, so its last answer is missing"),
        ({"messages": [TURNS[1], {"role": "assistant", "content": " "}]}, "message 2, from the assistant, is empty"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}, TURNS[2]]}, "message 1 has content that is not text"),
    ],
)  # fmt: skip
def test_a_malformed_row_is_refused_by_file_and_line(row: dict[str, Any], told: str) -> None:
    with pytest.raises(DataError) as refused:
        loaded([{"messages": TURNS}, row])
    assert str(refused.value).startswith("rows.jsonl, line 2: ")
    assert told in str(refused.value)


def test_an_empty_completion_and_a_tool_that_is_no_list_are_refused() -> None:
    with pytest.raises(DataError, match=r"line 1: column 'completion' has no answer"):
        loaded([{"prompt": "a", "completion": " "}])
    with pytest.raises(DataError, match=r"line 1: column 'tools' is x, not a list of tools"):
        loaded([{"messages": TURNS, "tools": "x"}])


# -- what is learned -----------------------------------------------------------------------------------------------------

WHOLE = "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nhello<|im_end|>\n" \
    "<|im_start|>user\nbye<|im_end|>\n<|im_start|>assistant\nso long<|im_end|>\n"  # fmt: skip
MARKED = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FORGETS = (  # writes earlier answers otherwise, as templates do that leave out what was thought
    "{% for message in messages %}{% if message['role'] == 'assistant' and not loop.last %}<|im_start|>assistant\n(it){% else %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("template", ["", MARKED])
def test_answers_are_learned_with_the_token_that_ends_them(template: str, pico_lm: Make) -> None:
    row = (Conversation(TURNS, []).packed(),)
    folder = pico_lm()
    assert learned(folder, row, MESSAGES, "assistant", template) == ["hello<|im_end|>", "so long<|im_end|>"]
    assert learned(folder, row, MESSAGES, "last", template) == ["so long<|im_end|>"]
    assert learned(folder, row, MESSAGES, "completion", template) == ["so long<|im_end|>"]
    assert learned(folder, row, MESSAGES, "all", template) == [WHOLE.removeprefix("<|im_start|>")]
    asked = (Conversation(TURNS, [], given=4).packed(),)
    assert learned(folder, asked, MESSAGES, "assistant", template) == ["so long<|im_end|>"]


def test_the_tokens_are_those_of_transformers(pico_lm: Make) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(pico_lm())
    renderer = Renderer(tokenizer, MESSAGES, "assistant")
    row = (Conversation(TURNS, []).packed(),)
    theirs = tokenizer.apply_chat_template(TURNS, tokenize=True, return_dict=True)["input_ids"]
    assert renderer.row(row, "", 1000).ids == theirs
    theirs = tokenizer.apply_chat_template(TURNS[:-1], tokenize=True, return_dict=True, add_generation_prompt=True)[
        "input_ids"
    ]
    assert renderer.prompt(row, "") == theirs


def test_completions_and_texts_end(pico_lm: Make) -> None:
    folder = pico_lm()
    assert learned(folder, ("ab", " cd"), COMPLETION, "completion") == [" cd<|end|>"]
    assert learned(folder, ("ab", " cd"), COMPLETION, "all") == ["b cd<|end|>"]
    assert learned(folder, ("ab",), TEXT, "all") == ["b<|end|>"]


def test_a_token_over_the_boundary_is_learned(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE({"a": 0, "b": 1, "c": 2, "bc": 3, "[E]": 4}, [("b", "c")]))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="[E]")
    found = Renderer(tokenizer, COMPLETION, "completion").row(("ab", "ca"), "", 100)
    assert (found.ids, found.targets) == ([0, 3, 0, 4], [IGNORED, 3, 0, 4])


@pytest.mark.parametrize("side", ["left", "right"])
def test_of_a_long_row_only_the_start_is_tokenized(side: str, pico_lm: Make) -> None:
    """The same targets, whichever side the tokenizer truncates for others."""
    tokenizer: Any = AutoTokenizer.from_pretrained(pico_lm())
    tokenizer.truncation_side = side
    talk = Conversation([{"role": "user", "content": "a"}, {"role": "assistant", "content": "word " * 50_000}], [])
    for form, train_on, row in (
        (MESSAGES, "assistant", (talk.packed(),)), (COMPLETION, "completion", ("say: ", "word " * 50_000)),
    ):  # fmt: skip
        whole = Renderer(tokenizer, form, train_on).row(row, "row 1", 1_000_000)
        start = Renderer(tokenizer, form, train_on).row(row, "row 1", 40)
        assert len(start.ids) < 0.5 * len(whole.ids)
        assert (start.ids[:40], start.targets[:40]) == (whole.ids[:40], whole.targets[:40])
        assert len(start.ids) > 40


def test_a_prompt_that_no_model_takes_is_refused(pico_lm: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before all of it is tokenized, which takes 100 bytes for each of it."""
    monkeypatch.setattr("craft_cli.tasks.templates._LONGEST", 100)
    renderer = Renderer(AutoTokenizer.from_pretrained(pico_lm()), MESSAGES, "assistant")
    talk = Conversation([{"role": "user", "content": "word " * 90}], [])
    with pytest.raises(DataError, match=r"in\.txt, line 1: the prompt has more than 100 tokens; shorten it"):
        renderer.prompt((talk.packed(),), "in.txt, line 1")
    with pytest.raises(DataError, match="more than 100 tokens"):
        Renderer(AutoTokenizer.from_pretrained(pico_lm()), TEXT, "all").prompt(("word " * 90,), "")


def test_a_template_that_rewrites_earlier_turns_is_refused_with_the_turn(pico_lm: Make) -> None:
    row = (Conversation(TURNS, []).packed(),)
    with pytest.raises(DataError, match=r"row 1: the chat template renders message 3 differently.*--train-on last"):
        learned(pico_lm(), row, MESSAGES, "assistant", FORGETS)
    assert learned(pico_lm(), row, MESSAGES, "last", FORGETS) == ["so long<|im_end|>"]


def test_a_template_that_raises_is_refused_with_the_row(pico_lm: Make) -> None:
    row = (Conversation(TURNS, []).packed(),)
    with pytest.raises(DataError, match=r"row 1: the chat template rejects this conversation \(no system\)"):
        learned(pico_lm(), row, MESSAGES, "assistant", "{{ raise_exception('no system') }}")


def test_what_ends_an_answer(pico_lm: Make) -> None:
    tokenizer = AutoTokenizer.from_pretrained(pico_lm())
    names = lambda ids: tokenizer.convert_ids_to_tokens(ids)  # noqa: E731
    assert names(end_tokens(tokenizer)) == ["<|end|>", "<|im_end|>"]
    assert names(end_tokens(tokenizer, chat=False)) == ["<|end|>"]
    assert names(end_tokens(tokenizer, TEMPLATES["zephyr"])) == ["<|end|>"]


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_templates_that_come_with_craft_end_every_answer(name: str, pico_lm: Make) -> None:
    ended = "<|im_end|>" if name == "chatml" else "<|end|>"
    parts = learned(pico_lm(), (Conversation(TURNS, []).packed(),), MESSAGES, "assistant", template_named(name))
    assert parts == [f"hello{ended}", f"so long{ended}"]


def test_a_model_without_a_template_asks_for_one(pico_lm: Make) -> None:
    tokenizer = AutoTokenizer.from_pretrained(pico_lm("llama", template=""))
    with pytest.raises(ModelError, match=r"has no chat template.*--chat-template \(chatml, zephyr, alpaca or a file\)"):
        Renderer(tokenizer, MESSAGES, "assistant")
    with pytest.raises(
        ConfigError,
        match=r"'chatm' is neither one of chatml, zephyr, alpaca nor a readable file.*did you mean 'chatml'",
    ):
        template_named("chatm")
    Path("mine.jinja").write_text("{{ messages }}")
    assert template_named("mine.jinja") == "{{ messages }}"
