"""What a run is: defaults < recipe < flags, everything checked, every problem told in its own line."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import yaml
from conftest import failure, invoke
from hypothesis import strategies as st

from craft_cli.config import RunConfig, flag, load_recipe, parse_settings, shipped_recipes
from craft_cli.errors import ConfigError
from craft_cli.methods.craft.ranks import Ranks

TASK = {"task": "sst2"}


def problems(**settings: Any) -> list[str]:
    """The lines told about settings that cannot be used."""
    with pytest.raises(ConfigError) as raised:
        RunConfig.build(TASK | settings)
    return str(raised.value).splitlines()


def recipe_file(text: str) -> str:
    Path("own.yaml").write_text(text, encoding="utf-8")
    return "own.yaml"


def recipe_problem(name: str) -> str:
    with pytest.raises(ConfigError) as raised:
        load_recipe(name)
    message = str(raised.value)
    assert "\n" not in message
    return message


# -- defaults < recipe < flags ------------------------------------------------------------------------------------------


def test_flags_override_the_recipe_and_the_recipe_overrides_the_defaults() -> None:
    recipe = {"task": "mrpc", "seed": 1, "learning_rate": 0.5}
    flags = {"learning_rate": 0.25, "seed": None, "weight_decay": None}
    config = RunConfig.build(flags, recipe)
    assert (config.task, config.seed, config.learning_rate) == ("mrpc", 1, 0.25)
    assert config.weight_decay == RunConfig.weight_decay
    assert config.max_seq_length == RunConfig.max_seq_length


@pytest.mark.parametrize("given", [False, True])
def test_a_switch_that_is_off_overrides_a_recipe_that_turns_it_on(given: bool) -> None:
    assert RunConfig.build({"bf16": given}, TASK | {"bf16": not given}).bf16 is given


def test_the_defaults_are_those_of_the_field() -> None:
    config = RunConfig.build(TASK)
    changed = {field.name for field in dataclasses.fields(RunConfig) if getattr(config, field.name) != field.default}
    assert changed == {"task"}
    assert (config.model, config.targets, config.seed) == ("roberta-base", ("query", "value"), 42)
    assert config.ranks == Ranks(64, 64, 8)


def test_a_config_cannot_be_changed() -> None:
    config = RunConfig.build(TASK)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 1  # type: ignore[misc]


def test_every_setting_has_a_group_and_a_help() -> None:
    assert set(RunConfig.groups()) == {field.name for field in dataclasses.fields(RunConfig)}
    assert all(field.metadata["help"].endswith((".", "?")) for field in dataclasses.fields(RunConfig))


# -- keys and types -----------------------------------------------------------------------------------------------------


def test_an_unknown_key_names_the_nearest_one() -> None:
    with pytest.raises(ConfigError, match=r"unknown key 'learning_rat'; did you mean 'learning_rate'\?"):
        RunConfig.build({}, TASK | {"learning_rat": 1})


def test_an_unknown_key_in_a_recipe_file_names_the_file_too() -> None:
    assert (
        recipe_problem(recipe_file("task: sst2\nrnks: 4,4,2")) == "own.yaml: unknown key 'rnks'; did you mean 'ranks'?"
    )


def test_a_key_which_is_no_text_is_unknown_like_any_other() -> None:
    with pytest.raises(ConfigError, match="unknown key '1'"):
        RunConfig.build({}, yaml.safe_load("{task: sst2, 1: 2}"))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("learning_rate", "fast"),
        ("learning_rate", [1e-3]),
        ("learning_rate", -1e-3),
        ("head_learning_rate", None),
        ("seed", "x"),
        ("seed", 1.5),
        ("seed", -1),
        ("seed", 1 << 31),
        ("max_steps", 0),
        ("max_steps", "1e3"),
        ("warmup_ratio", 1.5),
        ("num_train_epochs", 0),
        ("bf16", "perhaps"),
        ("bf16", 3),
        ("model", 3),
        ("targets", 3),
        ("targets", ["query", 1]),
    ],
)
def test_a_wrong_value_is_told_with_its_flag_and_itself(name: str, value: Any) -> None:
    with pytest.raises(ConfigError) as raised:
        RunConfig.build({}, TASK | {name: value})
    message = str(raised.value)
    assert message.startswith(f"{flag(name)}: ")
    assert str(value) in message
    assert "\n" not in message


@pytest.mark.parametrize("value", [float("inf"), float("nan"), "inf", "nan", "-inf"])
@pytest.mark.parametrize("name", ["learning_rate", "num_train_epochs", "weight_decay", "max_grad_norm"])
def test_a_number_must_be_finite(name: str, value: Any) -> None:
    (line,) = problems(**{name: value})
    assert line.startswith(f"{flag(name)}: ")


def test_all_problems_are_told_at_once_a_line_each() -> None:
    lines = problems(ranks="64,64", seed="x", learning_rate=True, model=1)
    assert [line.split(":")[0] for line in lines] == ["--ranks", "--seed", "--learning-rate", "--model"]


@pytest.mark.parametrize("text", ["1e-5", "3e-3", "1E-5"])
def test_a_number_that_yaml_reads_as_text_is_a_number(text: str) -> None:
    read = yaml.safe_load(f"learning_rate: {text}")
    assert isinstance(read["learning_rate"], str)  # this is why
    assert RunConfig.build({}, TASK | read).learning_rate == float(text)


@pytest.mark.parametrize("value", [True, False])
@pytest.mark.parametrize("name", ["learning_rate", "seed", "max_steps", "num_train_epochs", "model", "task"])
def test_yes_or_no_is_refused_where_something_else_is_wanted(name: str, value: bool) -> None:
    (line,) = problems(**{name: value})
    wanted = "text" if name in ("model", "task") else "a number"
    assert line == f"{flag(name)}: expected {wanted}, not {str(value).lower()}"


def test_lists_are_written_with_commas_or_as_lists() -> None:
    assert (
        parse_settings({"text_columns": "a, b"})
        == parse_settings({"text_columns": ["a", "b"]})
        == {"text_columns": ("a", "b")}
    )
    assert parse_settings({"targets": "query"}) == {"targets": ("query",)}
    assert parse_settings({"ranks": "8, 6,2"}) == parse_settings({"ranks": [8, 6, 2]}) == {"ranks": Ranks(8, 6, 2)}


# -- ranks --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ranks",
    [
        *("64,64", "0,1,1", "a,b,c", "1.5,2,3", "-1,2,3", "64,64,8,8", "", ",,", "64;64;8", "64,64,"),
        *(8, True, 2.5, [8, 8], [8, 8, 0], [8, 8, 2.0], [True, True, True], {"out": 8}, [[8], [8], [2]]),
    ],
)
def test_ranks_are_three_positive_whole_numbers(ranks: Any) -> None:
    (line,) = problems(ranks=ranks)
    assert line.startswith("--ranks: expected three positive integers OUT,IN,LAYERS such as 64,64,8, not ")
    assert str(ranks) in line


def test_ranks_are_out_in_layers_and_lowered_to_their_dimensions() -> None:
    ranks = Ranks.parse("100,90,24")
    assert (ranks.out, ranks.in_, ranks.layers, ranks.by_mode) == (100, 90, 24, (24, 100, 90))
    assert ranks.lowered((12, 96, 768)) == Ranks(96, 90, 12)
    assert Ranks.of_modes(ranks.by_mode) == ranks
    assert str(ranks) == "100,90,24"
    assert (Ranks(64, 64, 8).count_parameters(), Ranks(100, 100, 12).count_parameters()) == (8256, 20144)  # DESIGN 1, 2


# -- contradictions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"bf16": True, "fp16": True}, ("--bf16", "--fp16")),
        ({"data_dir": "d", "train_file": "t.csv", "validation_file": "v.csv"}, ("--data-dir", "--train-file")),
        ({"data_dir": "d", "validation_file": "v.csv"}, ("--data-dir", "--validation-file")),
        ({"train_file": "t.csv"}, ("--train-file", "--validation-file")),
        ({"text_columns": []}, ("--text-columns",)),
    ],
)
def test_contradictions_are_refused(settings: dict[str, Any], named: tuple[str, ...]) -> None:
    (line,) = problems(**settings)
    assert all(name in line for name in named)


def test_something_to_train_on_is_needed() -> None:
    with pytest.raises(ConfigError, match=r"no training data: pass --task.*quickstart"):
        RunConfig.build({"model": "demo"})


def test_contradictions_are_told_together() -> None:
    assert len(problems(bf16=True, fp16=True, text_columns=[])) == 2


# -- recipes ------------------------------------------------------------------------------------------------------------


def test_the_recipe_of_a_run_builds_the_same_run_again() -> None:
    first = RunConfig.build(
        TASK | {"ranks": "4,5,2", "targets": "query,key", "text_columns": "a,b", "learning_rate": 1e-5, "max_steps": 7}
    )
    text = yaml.safe_dump(first.recipe())
    assert RunConfig.build({}, load_recipe(recipe_file(text))) == first


def test_a_recipe_holds_what_matters_and_nothing_of_this_call() -> None:
    config = RunConfig.build(TASK | {"output_dir": "x", "overwrite": True, "dry_run": True, "cache_dir": "y"})
    kept = config.recipe()
    assert not {"output_dir", "overwrite", "dry_run", "cache_dir"} & set(kept)
    assert {"model", "task", "ranks", "targets", "learning_rate", "seed", "bf16"} <= set(kept)
    assert None not in kept.values()


def test_every_shipped_recipe_loads() -> None:
    recipes = shipped_recipes()
    assert len(recipes) == 26
    for name, path in recipes.items():
        settings = load_recipe(name)
        assert settings == load_recipe(str(path))
        flags = {} if {"task", "train_file"} & set(settings) else TASK
        config = RunConfig.build(flags, settings)
        assert all(getattr(config, key) == value for key, value in parse_settings(settings).items())
        assert config.recipe() != RunConfig.build(TASK).recipe()


def test_an_unknown_recipe_names_the_nearest_one() -> None:
    assert "no recipe 'quickstrat'; did you mean 'quickstart'?" in recipe_problem("quickstrat")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("task: [sst2", "invalid YAML"),
        ("task: sst2: 3", "invalid YAML"),
        ("bf16: !!bool maybe", "invalid YAML: 'bf16' is not a valid !!bool"),
        ("seed: !!int ''", "invalid YAML: 'seed' is not a valid !!int"),
        ("seed: !!timestamp x", "invalid YAML: 'seed' is not a valid !!timestamp"),
        ("- task\n- sst2", "expected lines of the form 'key: value'"),
        ("sst2", "expected lines of the form 'key: value'"),
        ("", "expected lines of the form 'key: value'"),
    ],
)
def test_a_recipe_that_is_no_mapping_is_told_with_its_file(text: str, told: str) -> None:
    message = recipe_problem(recipe_file(text))
    assert message.startswith("--recipe: own.yaml: ")
    assert told in message


def test_a_recipe_file_that_does_not_exist_or_is_no_text() -> None:
    assert recipe_problem("no.yaml") == "--recipe: no.yaml: no such file"
    Path("latin.yaml").write_bytes("task: caf\u00e9".encode("latin-1"))
    assert recipe_problem("latin.yaml").startswith("--recipe: latin.yaml: invalid YAML")


def test_paths_in_a_recipe_are_relative_to_it(tmp_path: Path) -> None:
    for folder in ("theirs/base", "theirs/run", "base2"):
        Path(folder).mkdir(parents=True)
    lines = ["train_file: a/train.csv", "validation_file: ../b.csv", "model: base", "init_from: run", "output_dir: out"]
    Path("theirs/own.yaml").write_text("\n".join(lines))
    assert load_recipe("theirs/own.yaml") == {
        "train_file": "theirs/a/train.csv", "validation_file": "theirs/../b.csv", "model": "theirs/base",
        "init_from": "theirs/run", "output_dir": "out",
    }  # fmt: skip
    absolute = f"data_dir: {tmp_path}/x\nmodel: base2\ninit_from: ./run3"
    Path("theirs/own.yaml").write_text(absolute)
    assert load_recipe("theirs/own.yaml") == {"data_dir": f"{tmp_path}/x", "model": "base2", "init_from": "theirs/run3"}
    Path("theirs/own.yaml").write_text("data_dir: ~/x\nmodel: roberta-base")
    assert load_recipe("theirs/own.yaml") == {"data_dir": "~/x", "model": "roberta-base"}
    Path("theirs/own.yaml").write_text("train_file: nowhere.csv\nmodel: demo")
    assert "theirs/nowhere.csv: no such file" in failure("train", "--recipe", "theirs/own.yaml", "--use-cpu")


def test_python_users_give_paths_as_paths() -> None:
    built = RunConfig(model="demo", task="opinions", output_dir=Path("x"), cache_dir=Path("y"))  # type: ignore[arg-type]
    assert (built.output_dir, built.cache_dir) == ("x", "y")
    assert parse_settings({"data_dir": Path("data")}) == {"data_dir": "data"}


def test_a_recipe_never_builds_python_objects() -> None:
    assert "invalid YAML" in recipe_problem(recipe_file("task: !!python/object/apply:os.system ['true']"))


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("eval_strategy: no", "no"), ("save_strategy: NO", None), ("output_dir: 007", "007"), ("revision: 1.10", "1.10"),
        ("revision: 1234567", "1234567"), ("output_dir: 2026-01-02", "2026-01-02"), ("label_separator: y", "y"),
        ("label_column: off", "off"), ("task_type: ~", None), ("bf16: yes", True), ("bf16: off", False), ("seed: 7", 7),
        ("learning_rate: 1e-3", 1e-3), ("text_columns: [on, 12:30]", ("on", "12:30")), ("label_column: 'null'", "null"),
    ],
)  # fmt: skip
def test_what_yaml_1_1_makes_of_words_is_not_what_a_recipe_means(line: str, value: Any) -> None:
    name = line.split(":")[0]
    if line.endswith("NO"):
        assert "--save-strategy" in problems(**load_recipe(recipe_file(line)))[0]
        return
    assert parse_settings(load_recipe(recipe_file(line)))[name] == value


BOMB = "seed: &a0 [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &a{number} [{','.join([f'*a{number - 1}'] * 10)}]\n"
    for number, name in enumerate(["model", "revision", "task", "data_dir", "train_file", "dataset_name"], start=1)
)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (BOMB, "aliases are not supported in a recipe; write the value out"),
        ("seed: &a [*a]", "aliases are not supported in a recipe"),
        ("seed: " + "[" * 5_000, "invalid YAML"),
        (f"model: {'x' * 100_000}", "larger than 100 kB, so it is not a recipe"),
    ],
)
def test_a_recipe_is_small_and_flat(text: str, told: str) -> None:
    message = recipe_problem(recipe_file(text))
    assert told in message
    assert len(message) < 400
    Path("runs/evil").mkdir(parents=True)
    Path("runs/evil/recipe.yaml").write_text(text)
    listed = invoke("inspect", "runs")
    assert len(listed.output) < 2000


def test_a_wrong_value_is_shown_in_part() -> None:
    (told,) = problems(seed="x" * 50_000)
    assert len(told) < 300


def test_names_that_are_not_utf8_are_refused_before_anything_is_done() -> None:
    """Of a file whose name is bytes of another encoding: a recipe could not keep it."""
    assert problems(output_dir="run-\udcff", report_to="none", train_split="\udcfe") == [
        "--train-split: '\\udcfe' is not UTF-8; choose another name",
        "--output-dir: 'run-\\udcff' is not UTF-8; choose another name",
    ]
    assert problems(text_columns=["good", "\udcff"]) == ["--text-columns: '\\udcff' is not UTF-8; choose another name"]


WORDS = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs", "Zl", "Zp"]), min_size=1, max_size=12)
ODD = st.sampled_from(
    ["no", "yes", "on", "null", "~", "007", "1e3", "12:30", "2026-01-02", "0x1f", "1_000", "- a", "a: b", "#"]
)
SETTINGS = st.fixed_dictionaries(
    {"task": st.just("sst2")},
    optional={
        "model": WORDS | ODD, "revision": WORDS | ODD, "label_column": WORDS | ODD, "label_separator": WORDS | ODD,
        "seed": st.integers(0, 2**31), "learning_rate": st.floats(0, 1e6), "max_seq_length": st.integers(1, 10**6),
        "bf16": st.booleans(), "eval_strategy": st.sampled_from(["no", "epoch"]), "num_train_epochs": st.floats(1e-3, 1e6),
        "threshold": st.just("auto") | st.floats(0.01, 0.99), "ranks": st.tuples(*[st.integers(1, 999)] * 3),
    },
)  # fmt: skip


@hypothesis.given(SETTINGS)
@hypothesis.settings(
    max_examples=25, deadline=None, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
def test_any_settings_survive_their_recipe(given: dict[str, Any]) -> None:
    try:
        config = RunConfig.build(given)
    except ConfigError:
        hypothesis.reject()
    for text in (
        yaml.safe_dump(config.recipe()),
        yaml.safe_dump(config.recipe(), allow_unicode=True, default_flow_style=True),
    ):
        again = load_recipe(recipe_file(text))
        assert RunConfig.build({}, again).recipe() == config.recipe()
