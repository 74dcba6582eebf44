"""What a run is: one frozen, validated object. Defaults < recipe < flags.

Every setting stands here once, with its type, default and help; the command line and the recipes are made from it.
pydantic validates, but is imported only then, so that `--help` stays fast.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, get_args, get_type_hints

from annotated_types import Ge, Gt, Le, Lt

from craft_cli.config.arguments import in_python
from craft_cli.config.contradictions import TRACKERS, contradictions, flag
from craft_cli.config.names import join_names
from craft_cli.config.options import (
    ALL_LINEAR,
    LEARNING_RATES,
    METHOD_OPTIONS,
    TARGETS,
    MethodName,
    MethodOptions,
    Positive,
    Rate,
    option_names,
    owners,
    setting,
)
from craft_cli.config.parsing import AUTO, Auto, parse
from craft_cli.errors import ConfigError, nearest, plain

ProblemType = Literal["single_label_classification", "multi_label_classification", "regression"]
TaskType = Literal["sequence-classification", "token-classification", "causal-lm"]
TrainOn = Literal["assistant", "last", "completion", "all"]


Strategy = Literal["no", "steps", "epoch"]

THRESHOLD = 0.5
"""Where nothing was found on validation rows."""
MERGED_KEY = "craft"
"""Under it the config.json of a merged model keeps what `craft eval` and `craft predict` need and no other tool looks for."""

GROUPS = (
    "Model and data", "Adapter", "Optimisation", "Evaluation and checkpoints", "Processes and precision", "This call only"
)  # fmt: skip


@dataclass(frozen=True)
class RunConfig(MethodOptions):
    """One training run, fully specified. The fields are the flags of `craft train` and the keys of a recipe."""

    model: str = setting("roberta-base", "Hub id, local folder, 'demo' or 'demo-llm'.")
    revision: str | None = setting(None, "Branch, tag or commit of a hub model.")
    task: str | None = setting(
        None, "A task of GLUE's (cola, sst2, mrpc, qqp, stsb, mnli, ...), or a sample: opinions, lighthouse (chats)."
    )
    task_type: TaskType | None = setting(
        None, f"Kind of task for your own data: {', '.join(get_args(TaskType))}; detected by default."
    )
    data_dir: str | None = setting(None, "Folder with train.* and validation.*, or one saved by datasets.")
    train_file: str | None = setting(None, "Training file (jsonl, json, csv, tsv, parquet, conll; .gz too).")
    validation_file: str | None = setting(None, "Validation file; without, a share of the training rows is held out.")
    dataset_name: str | None = setting(None, "Data set on the hub.")
    dataset_config_name: str | None = setting(None, "Its configuration.")
    train_split: str | None = setting(None, "Split to train on, where it is not called train.")
    validation_split: str | None = setting(None, "Split to evaluate on, where it is not called validation.")
    validation_share: Annotated[float, Gt(0.0), Lt(1.0)] | None = setting(
        None, "Share of the training rows held out without validation data; 0.1 without."
    )
    text_columns: tuple[str, ...] | None = setting(
        None,
        "Text columns (sentence1,sentence2; more than two are joined), the column of words or messages, or prompt,completion.",
    )
    label_column: str | None = setting(None, "Label column.")
    label_separator: str | None = setting(None, "What stands between labels where several apply, as in: a;b.")
    problem_type: ProblemType | None = setting(
        None, "Of own data: single_label_classification, multi_label_classification or regression; found without."
    )
    max_train_samples: Positive | None = setting(
        None, "Use only the first rows for training, of every label its share."
    )
    max_eval_samples: Positive | None = setting(None, "Use only the first rows for evaluation.")
    max_seq_length: Positive | None = setting(
        None, "Tokens kept of each example; 128 by default, 1024 for language models."
    )
    train_on: TrainOn | None = setting(
        None,
        "Of language models what is learned: assistant (every answer), last (the last answer), completion, or all; by default "
        "assistant for messages, completion for prompts with completions, all for texts.",
    )
    chat_template: str | None = setting(
        None,
        "Of language models: chatml, zephyr, alpaca, or a file, in the place of the tokenizer's own chat template.",
    )
    packing: bool = setting(
        False, "Of language models: several rows share a sequence in training, without seeing each other."
    )

    method: MethodName = setting(
        "craft", f"How the change of the weights is written: {', '.join(METHOD_OPTIONS)}; see craft methods."
    )
    targets: tuple[str, ...] = setting(
        ("query", "value"), f"Projections to adapt: {','.join(TARGETS)}, or {ALL_LINEAR}."
    )
    budget: str | int | None = setting(
        None, "Numbers the adapter may train, such as 16k: the rank (of craft the ranks) that fits is chosen."
    )
    adapter_factors: Literal["include", "reference"] = setting(
        "include",
        "reference: the adapter's folder only names its factors, and they are looked for in the cache.",
        free=True,
    )
    init_from: str | None = setting(
        None,
        "Run or adapter to take the trained numbers from (same base, same method and ranks); the head starts anew.",
    )
    head_start: Literal["auto", "probe", "random"] = setting(
        AUTO,
        "Where the head's last layer starts. probe: fitted on what the frozen base makes of the training rows; random; "
        "auto: a checkpoint's own where it has the labels of the data, else a probe.",
    )

    learning_rate: Rate | None = setting(
        None,
        f"Of the adapter; 0 trains the head alone. Without: {', '.join(f'{n} {r:g}' for n, r in LEARNING_RATES.items())}.",
    )
    head_learning_rate: Rate = setting(2e-3, "Of the task head.")
    weight_decay: Rate = setting(0.0, "Pulls K (and the head's matrices) to zero: towards the base model.")
    warmup_ratio: Annotated[float, Ge(0.0), Le(1.0)] = setting(0.06, "Share of the steps with a rising rate.")
    num_train_epochs: Annotated[float, Gt(0.0), Lt(math.inf)] | Auto = setting(
        AUTO, "Passes over the training data; auto: 3 of a known task, and of own data by its rows, with early stopping.",
        free=True,
    )  # fmt: skip
    max_steps: Positive | None = setting(None, "Stop after this many updates, whatever the epochs.", free=True)
    per_device_train_batch_size: Positive | None = setting(
        None, "Examples a process takes at once; 32 by default, 8 for language models."
    )
    per_device_eval_batch_size: Positive | None = setting(
        None, "Examples a process evaluates at once; 64 by default, 8 for language models.", free=True
    )
    gradient_accumulation_steps: Positive = setting(1, "Batches a process adds up for one update.")
    class_weights: Literal["balanced"] | None = setting(None, "balanced: rows of rare labels weigh more.")
    threshold: Annotated[float, Gt(0.0), Lt(1.0)] | Auto = setting(
        AUTO, "Where several labels can apply: above it one does; auto: the best one on the validation rows."
    )
    max_grad_norm: Rate = setting(1.0, "Clip the gradient's norm; 0 does not.")
    seed: Annotated[int, Ge(0)] = setting(42, "Of the head's start, the order of the data and dropout.")

    eval_strategy: Strategy = setting(
        "epoch",
        "When to evaluate: after every epoch, every --eval-steps, or no. The last update is evaluated too.",
        free=True,
    )
    eval_steps: Positive | None = setting(None, "Updates between two evaluations.", free=True)
    eval_generate: Positive | None = setting(
        None,
        "Of language models: write answers to so many validation rows at each evaluation, and compare them (exact_match).",
    )
    answer_pattern: str | None = setting(
        None, "Regular expression; the part of an answer that it finds is compared, its group 1 where it has one."
    )
    max_new_tokens: Positive | None = setting(None, "Tokens of a written answer, at most; 256 by default.")
    metric_for_best_model: str | None = setting(
        None,
        "What chooses the best adapter: loss, or a metric of the task; its first one without, of own numbers loss.",
    )
    calibrate: bool = setting(
        False,
        "Divide the head by one temperature, fitted on the validation rows, so that its scores are probabilities.",
    )
    early_stopping_patience: Positive | None = setting(
        None, "Stop after this many evaluations in a row that are not better.", free=True
    )
    early_stopping_threshold: Rate | None = setting(
        None, "By how much an evaluation must be better to count as better.", free=True
    )
    save_strategy: Strategy = setting(
        "epoch",
        "When to write a checkpoint: after every epoch, every --save-steps, or no (only when interrupted).",
        free=True,
    )
    save_steps: Positive | None = setting(None, "Updates between two checkpoints.", free=True)
    save_total_limit: Positive = setting(2, "Checkpoints kept; older ones are deleted.", free=True)
    logging_steps: Positive = setting(
        10, "Updates between two lines of metrics.jsonl; and of the log, without a terminal.", free=True
    )
    report_to: tuple[str, ...] = setting(
        ("none",), f"Where to report metrics beside metrics.jsonl: {','.join(TRACKERS)} or none.", free=True
    )

    num_processes: Positive | None = setting(None, "Processes to start; all visible GPUs, or one, without.", free=True)
    bf16: bool = setting(False, "bfloat16 autocast; what is trained stays float32.")
    fp16: bool = setting(False, "float16 autocast with loss scaling; what is trained stays float32.")
    gradient_checkpointing: bool = setting(
        False, "Compute activations again in the backward pass: less memory, more time, same result.", free=True
    )
    torch_compile: bool = setting(False, "Compile the model's layers; refused where they do not compile whole.")
    load_in_8bit: bool = setting(False, "Train over the base in 8 bits (bitsandbytes, CUDA); factors stay exact.")
    load_in_4bit: bool = setting(False, "Train over the base in 4 bits (bitsandbytes, CUDA); factors stay exact.")
    use_cpu: bool = setting(False, "Stay on the CPU even where there is a GPU.", free=True)

    cache_dir: str | None = setting(None, "Folder of the factor files; ~/.cache/craft without.")
    output_dir: str | None = setting(None, "Run folder; runs/TASK-MODEL-TIME without.")
    overwrite: bool = setting(False, "Empty an output folder that is not empty.")
    resume: bool = setting(False, "Go on with the run in --output-dir, or with the latest: exactly as if never cut.")
    trust_remote_code: bool = setting(
        False, "Run Python code that comes with the model. Read it first: it can do all that you can."
    )
    allow_other_base: bool = setting(
        False, "Go on although the base is not the one that the run or the adapter was trained on."
    )
    dry_run: bool = setting(False, "Check everything, down to one real step, and stop.")

    def __post_init__(self) -> None:
        """Convert what is given as on the command line, such as ranks="32,32,4", and check each value by itself.

        Raises:
            ConfigError: everything that is wrong, one line each.
        """
        given = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        given = {name: value for name, value in given.items() if value != getattr(type(self), name)}
        try:
            parsed = parse_settings(given)
        except ConfigError as error:
            raise ConfigError(in_python(str(error))) from None
        for name, value in parsed.items():
            object.__setattr__(self, name, value)

    @classmethod
    def settings(cls) -> list[dataclasses.Field[Any]]:
        """Every field, in the order in which they are shown: the options of the methods follow the choice of one."""
        inherited = {name for method in METHOD_OPTIONS for name in option_names(method)}
        fields = {field.name: field for field in dataclasses.fields(cls)}
        own = [field for name, field in fields.items() if name not in inherited]
        at = [field.name for field in own].index("targets") + 1
        options = dict.fromkeys(name for method in METHOD_OPTIONS for name in option_names(method))
        return [*own[:at], *(fields[name] for name in options), *own[at:]]

    @classmethod
    def groups(cls) -> dict[str, str]:
        """The group of every field; each begins with a certain one, and options of methods stand by their owners."""
        begin = ("model", "method", "learning_rate", "eval_strategy", "num_processes", "cache_dir")
        first = dict(zip(begin, GROUPS, strict=True))
        group, found = GROUPS[0], {}
        for field in cls.settings():
            group = first.get(field.name, group)
            found[field.name] = f"Adapter by {', '.join(owners(field.name))}" if owners(field.name) else group
        return found

    @property
    def method_options(self) -> Any:
        """The options of the method chosen, completed by its defaults."""
        given = {name: getattr(self, name) for name in option_names(self.method)}
        return METHOD_OPTIONS[self.method](**{name: value for name, value in given.items() if value is not None})

    def settled(self, defaults: Mapping[str, Any]) -> RunConfig:
        """The same run with the defaults of its kind of work where nothing was given."""
        return replace(self, **{name: value for name, value in defaults.items() if getattr(self, name) is None})

    @property
    def adapter_rate(self) -> float:
        """The learning rate of the adapter: as given, or the method's own."""
        return LEARNING_RATES[self.method] if self.learning_rate is None else self.learning_rate

    def completed(self, options: Any = None) -> RunConfig:
        """The same run with nothing of its method left to a default.

        Args:
            options: the method's, as they were chosen within the budget; those of this run without.
        """
        options = options or self.method_options
        return replace(self, budget=None, learning_rate=self.adapter_rate, **dataclasses.asdict(options))

    @classmethod
    def build(
        cls,
        flags: Mapping[str, Any] | None = None,
        recipe: Mapping[str, Any] | None = None,
        former: Mapping[str, Any] | None = None,
    ) -> RunConfig:
        """Defaults, overridden by those of a former run, by a recipe, by flags.

        Args:
            flags: by field name; None stands for "not given".
            recipe: by field name.
            former: by field name.

        Raises:
            ConfigError: everything that is wrong, one line each, naming the flag or key.
        """
        given: dict[str, Any] = {}
        for name in USERS_OWN:
            if name in {**(former or {}), **(recipe or {})}:
                raise ConfigError(
                    f"{name}: only you can say this, with the flag {flag(name)}: take it out of the recipe"
                )
        for layer in (
            dict(former or {}),
            dict(recipe or {}),
            {name: value for name, value in (flags or {}).items() if value is not None},
        ):
            if "budget" in layer:  # it chooses what those below did
                given = {name: value for name, value in given.items() if name not in _SIZES}
            elif any(name in layer for name in _SIZES):
                given.pop("budget", None)
            if layer.get("method", given.get("method")) != given.get("method"):  # another than below: its options go
                given = {name: value for name, value in given.items() if not owners(name) and name != "learning_rate"}
            given |= layer | _strategies(layer, given)
        names = [field.name for field in dataclasses.fields(cls)]
        for key in given:
            if key not in names:
                raise ConfigError(f"unknown key '{plain(str(key))}'{nearest(str(key), names)}")
        config = cls(**parse_settings(given))
        problems = contradictions(config)
        for name in given:
            if owners(name) and config.method not in owners(name):
                problems.append(f"{flag(name)} is for --method {' or '.join(owners(name))}, not {config.method}")
            if name in _SIZES and given.get("budget"):
                problems.append(f"{flag(name)} and --budget exclude each other")
        if problems:
            raise ConfigError("\n".join(problems))
        return config

    def recipe(self) -> dict[str, Any]:
        """The settings that make a recipe which repeats this run: all that matter and are not None."""
        kept, whole = {}, self if self.budget else self.completed()
        for name, group in self.groups().items():
            value = getattr(whole, name)
            if owners(name) and self.method not in owners(name):
                continue
            if group != GROUPS[-1] and value is not None:
                kept[name] = join_names(map(str, value)) if isinstance(value, tuple) else value
        return kept


_SIZES = ("rank", "ranks")
"""What a budget chooses."""
USERS_OWN = ("trust_remote_code", "allow_other_base")
"""What no recipe, run or adapter may say."""


def free_settings() -> set[str]:
    """Names of the settings that a resumed run may change."""
    return {field.name for field in dataclasses.fields(RunConfig) if field.metadata["free"]}


def _strategies(layer: Mapping[str, Any], below: Mapping[str, Any]) -> dict[str, Any]:
    """What a number of steps or epochs, or a strategy without steps, says of its partner that is not given beside it."""
    implied: dict[str, Any] = {}
    for kind in ("eval", "save"):
        strategy, steps = f"{kind}_strategy", f"{kind}_steps"
        if layer.get(steps) is not None and strategy not in layer:
            implied[strategy] = "steps"
        elif layer.get(strategy) in ("no", "epoch") and steps not in layer and steps in below:
            implied[steps] = None
    if layer.get("num_train_epochs") is not None and "max_steps" not in layer and "max_steps" in below:
        implied["max_steps"] = None
    return implied


def parse_settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by field name, each converted to its type and checked by itself.

    Raises:
        ConfigError: everything that is wrong, one line each, naming the flag.
    """
    return parse(given, get_type_hints(RunConfig, include_extras=True)) if given else {}
