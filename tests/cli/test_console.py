"""Every table of every command at 40, 60, 80 and 120 columns: no word and no number is broken; bars keep count and time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import invoke
from helpers import Screen, at, whole_at_any_width
from rich.cells import cell_len
from typer.main import get_command

import craft_cli as craft
from craft_cli.cli import app, console, doctor
from craft_cli.cli.training_console import TrainingConsole
from craft_cli.training.progress import Memory, Plan

WIDTHS = (40, 60, 80, 120)
Call = Callable[[], None]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Call]]:
    """What commands ask the console to lay out, and a function that does it again."""
    found: list[tuple[str, Call]] = []
    for name in ("table", "facts", "header", "line"):
        real = getattr(console, name)

        def noted(*arguments: Any, name: str = name, real: Any = real, **options: Any) -> None:
            found.append((name, lambda: real(*arguments, **options)))
            real(*arguments, **options)

        monkeypatch.setattr(console, name, noted)
    return found


def check_all(calls: list[tuple[str, Call]], least: int) -> None:
    assert sum(name == "table" for name, _ in calls) >= least
    for _, shown in calls:
        whole_at_any_width(shown)


def test_tables_of_models_factors_runs_and_methods(run: Path, calls: list[tuple[str, Call]]) -> None:
    craft.decompose("base", ranks="6,5,2", cache_dir="factors")
    factors = str(next(Path("factors").glob("*.safetensors")))
    for command in (
        ["inspect", "base"], ["inspect", factors], ["inspect", "run"], ["inspect", "--compare", "run", "run", "run"],
        ["inspect", "."], ["inspect", "base", "--budget", "300"], ["decompose", "base", "--ranks", "6,5,2"],
        ["methods", "--model", "base", "--budget", "2k"], ["recipes"],
    ):  # fmt: skip
        done = invoke(*command)
        assert done.exit_code == 0, done.output
    check_all(calls, 12)


def test_tables_of_an_evaluation(run: Path, calls: list[tuple[str, Call]]) -> None:
    done = invoke("eval", "run", "--task", "sst2", "--data-dir", "data", "--report", "--confusion", "--worst", "5")
    assert done.exit_code == 0, done.output
    check_all(calls, 4)
    label = {"precision": 0.5, "recall": 0.25, "f1": 0.3333, "support": 1234}
    names = ["account closed", "card", "a very long name of a label that fills a line", "transfer", "refund", "top-up"]
    calls.clear()
    console.label_table(dict.fromkeys(names, label), [[1000] * 6] * 6)
    console.table(["gold (down), predicted", *names], [[name, *[1000] * 6] for name in names])
    check_all(calls, 2)


PLAN = Plan(
    model="sentence-transformers/all-mpnet-base-v2",
    task="own",
    labels=("account_closed", "card_arrival", "transfer"),
    train_examples=12_345,
    eval_examples=1_234,
    tokens="median 19, longest 44; padding 3.6% (unsorted 44.8%)",
    method="CRAFT",
    targets=("query", "value"),
    sizes="ranks 64,64,6 (OUT,IN,LAYERS)",
    adapter_parameters=16_456,
    head_parameters=770,
    head_start=", fitted first",
    devices="1 x CPU",
    effective_batch="32 = 32 a device",
    updates=100,
    evaluations=4,
    memory=Memory(1_200_000_000, 90_000_000, 270_000, 210_000_000, 800_000_000, 32, 44, {}),
    length="100 at most: 4 epochs, from the number of rows; stops early after 2 evaluations without improvement",
    done=0,
    output="runs/own-all-mpnet-base-v2-20261128-060122",
)


def test_the_plan_and_the_evaluations_of_a_training() -> None:
    def shown() -> None:
        listener = TrainingConsole()
        listener.started(PLAN)
        listener.evaluated(100, 2.0, {"accuracy": 0.7455, "f1": 0.5123, "loss": 0.6812}, best=True)

    whole_at_any_width(shown)
    assert "runs/own-all-mpnet-base-v2-20261128-060122" in at(60, shown)


def test_the_findings_of_the_doctor() -> None:
    from craft_cli.api.doctor import Finding

    findings = [
        Finding("Python", "ok", "3.12.4"),
        Finding("a training step", "note", f"one update in 0.3 s, with {'many words ' * 12}"),
        Finding("home", "broken", "/a/path/that/is/longer/than/any/line/of/forty/columns/could/be"),
    ]
    whole_at_any_width(lambda: doctor._show(findings))


def test_columns_are_left_out_in_their_order() -> None:
    shown = lambda: console.table(  # noqa: E731
        ["run", "state", "rate", "seconds"], [["first-run", "finished", 0.001, 1234.5]], drop=("seconds", "rate")
    )
    headings = {width: at(width, shown).splitlines()[0].split() for width in (40, 34, 26)}
    assert headings == {40: ["run", "state", "rate", "seconds"], 34: ["run", "state", "rate"], 26: ["run", "state"]}
    assert "too narrow for: seconds, rate" in at(26, shown)
    assert at(19, shown).split() == ["first-run", "state", "finished", "rate", "0.0010", "seconds", "1234"]


@pytest.fixture
def bars(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], str]]:
    """A function of the width: how a bar stands there."""
    monkeypatch.setattr(console.err, "_file", Screen())
    monkeypatch.setattr(console.err, "_color_system", None)
    progress = console.Bars()
    details = ["loss 0.6826", "accuracy 0.7455", "1,234 examples/s"]
    progress.show("training", 1_234, 12_340, details, "2 h 5 min")

    def drawn(width: int) -> str:
        monkeypatch.setattr(console.err, "_width", width)
        with console.err.capture() as captured:
            console.err.print(*progress.get_renderables())
        return captured.get()

    yield drawn
    progress.stop()


@pytest.mark.parametrize("width", [*WIDTHS, 34, 200])
def test_a_bar_keeps_count_and_time_left(bars: Callable[[int], str], width: int) -> None:
    text = bars(width).rstrip()
    assert cell_len(text) <= width
    assert text.startswith("training ")
    assert "1,234/12,340 2 h 5 min" in text
    details = [name for name in ("loss 0.6826", "accuracy 0.7455", "1,234 examples/s") if name in text]
    assert len(details) == {34: 0, 40: 0, 60: 1, 80: 2}.get(width, 3)
    assert ("━" in text) == (width >= 60)


COMMANDS: dict[str, Any] = get_command(app).commands  # type: ignore[attr-defined]


@pytest.mark.parametrize("width", WIDTHS)
def test_help_names_every_flag_whole_at_any_width(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console.out, "_width", width)
    for name in (name for name in COMMANDS if name != "recipes"):
        done = invoke(name, "--help")
        assert done.exit_code == 0
        lines = done.stdout.splitlines()
        shown = [line.split()[0] for line in lines if line.startswith("  --")]
        flags = [it.opts[-1] for it in COMMANDS[name].params if it.param_type_name == "option" and len(it.opts) == 1]
        assert sorted(shown) == sorted(flags)
        assert all(len(line) <= width or line.startswith("  craft ") for line in lines), done.stdout
        assert "bool" not in done.stdout.replace("boolean", "")


def test_help_of_train_begins_with_ten_flags_and_an_example() -> None:
    lines = invoke("train", "--help").stdout.splitlines()
    first = lines.index("Most used:")
    assert len([line for line in lines[first : lines.index("Model and data:")] if line.startswith("  --")]) == 10
    examples = [line.split()[1:] for line in lines[:first] if line.startswith("  craft ")]
    assert len(examples) == 2
    for words in examples:
        COMMANDS[words[0]].make_context("craft", words[1:])
