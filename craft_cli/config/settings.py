"""The settings of a run: one frozen, validated dataclass. Recipes override defaults, flags override recipes.

Every setting is declared here once, with its type, default and help. Flags and recipe keys are generated from it.
pydantic validates the values and is imported only then, so that `--help` stays fast.
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
"""Used until a better one has been chosen on the validation rows."""
MERGED_KEY = "craft"
"""Key in the config.json of a merged model for what only `craft eval` and `craft predict` need."""

GROUPS = (
    "Model and data", "Adapter", "Optimization", "Evaluation and checkpoints", "Processes and precision", "This call only"
)  # fmt: skip


@dataclass(frozen=True)
class RunConfig(MethodOptions):
    """All settings of a training run. The fields are the flags of `craft train` and the keys of a recipe."""

    model: str = setting("roberta-base", "Hub id, local folder, 'demo' or 'demo-llm'.")
    revision: str | None = setting(None, "Branch, tag or commit of a hub model.")
    task: str | None = setting(
        None, "GLUE task (cola, sst2, mrpc, qqp, stsb, mnli, ...), or a sample: opinions, lighthouse (chats)."
    )
    task_type: TaskType | None = setting(
        None, f"Task type of your own data: {', '.join(get_args(TaskType))}; default: detected from the columns."
    )
    data_dir: str | None = setting(None, "Folder with train.* and validation.*, or a dataset saved with save_to_disk.")
    train_file: str | None = setting(None, "Training file (jsonl, json, csv, tsv, parquet, conll; .gz too).")
    validation_file: str | None = setting(None, "Validation file. Default: a share of the training rows is held out.")
    dataset_name: str | None = setting(None, "Dataset on the Hub.")
    dataset_config_name: str | None = setting(None, "Configuration of the dataset.")
    train_split: str | None = setting(None, "Training split. Default: train.")
    validation_split: str | None = setting(None, "Validation split. Default: validation.")
    validation_share: Annotated[float, Gt(0.0), Lt(1.0)] | None = setting(
        None, "Share of the training rows to hold out if there is no validation data. Default: 0.1."
    )
    text_columns: tuple[str, ...] | None = setting(
        None,
        "Text columns (sentence1,sentence2; more than two are joined), the column with words or messages, or prompt,completion.",
    )
    label_column: str | None = setting(None, "Label column.")
    label_separator: str | None = setting(None, "Separator between the labels of a multi-label row, such as ; in a;b.")
    problem_type: ProblemType | None = setting(
        None,
        "For your own data: single_label_classification, multi_label_classification or regression. Default: detected.",
    )
    max_train_samples: Positive | None = setting(None, "Train on this many rows only, with the label proportions kept.")
    max_eval_samples: Positive | None = setting(None, "Evaluate on the first rows only, up to this many.")
    max_seq_length: Positive | None = setting(
        None, "Maximum tokens per example; longer ones are truncated. Default: 128, or 1024 for language models."
    )
    train_on: TrainOn | None = setting(
        None,
        "Tokens a language model is trained on: assistant (every answer), last (the last answer), completion or all. "
        "Default: assistant for messages, completion for prompt and completion, all for plain text.",
    )
    chat_template: str | None = setting(
        None,
        "Chat template for a language model: chatml, zephyr, alpaca or a file. Default: the tokenizer's own.",
    )
    packing: bool = setting(
        False,
        "Pack rows into sequences of up to --max-seq-length tokens, without attention across rows; the batch size then "
        "counts sequences. Language models only.",
    )

    method: MethodName = setting("craft", f"Adapter method: {', '.join(METHOD_OPTIONS)}; see craft methods.")
    targets: tuple[str, ...] = setting(
        ("query", "value"), f"Projections to adapt: {','.join(TARGETS)}, or {ALL_LINEAR}."
    )
    budget: str | int | None = setting(
        None,
        "Most parameters the adapter may train, such as 16k; chooses the largest rank (for craft, ranks) that fits.",
    )
    adapter_factors: Literal["include", "reference"] = setting(
        "include",
        "include: save the factors with the adapter. reference: save only their hash and read them from the cache.",
        free=True,
    )
    init_from: str | None = setting(
        None,
        "Run or adapter to initialize the adapter from (same base, method and ranks). The head is reinitialized.",
    )
    head_start: Literal["auto", "probe", "random"] = setting(
        AUTO,
        "Initialization of the head's last layer. probe: a linear probe, fitted on the frozen base's features; random; "
        "auto: the base checkpoint's own head if it has the labels of the data, else a probe.",
    )

    learning_rate: Rate | None = setting(
        None,
        f"Learning rate of the adapter; 0 trains only the head. Default: {', '.join(f'{r:g} ({n})' for n, r in LEARNING_RATES.items())}.",
    )
    head_learning_rate: Rate = setting(2e-3, "Learning rate of the task head.")
    weight_decay: Rate = setting(
        0.0, "Weight decay on the adapter and the head's matrices; pulls the adapter towards the base model."
    )
    warmup_ratio: Annotated[float, Ge(0.0), Le(1.0)] = setting(0.06, "Share of the updates used for linear warmup.")
    num_train_epochs: Annotated[float, Gt(0.0), Lt(math.inf)] | Auto = setting(
        AUTO, "Passes over the training data. auto: 3 with --task and for language models; otherwise by the number of rows, with early stopping.",
        free=True,
    )  # fmt: skip
    max_steps: Positive | None = setting(None, "Stop after this many updates; overrides --num-train-epochs.", free=True)
    per_device_train_batch_size: Positive | None = setting(
        None, "Training batch size per process. Default: 32, or 8 for language models."
    )
    per_device_eval_batch_size: Positive | None = setting(
        None, "Evaluation batch size per process. Default: 64, or 8 for language models.", free=True
    )
    gradient_accumulation_steps: Positive = setting(1, "Batches per process to accumulate before each update.")
    class_weights: Literal["balanced"] | None = setting(None, "balanced: weight the loss by inverse label frequency.")
    threshold: Annotated[float, Gt(0.0), Lt(1.0)] | Auto = setting(
        AUTO, "Multi-label: predict every label above this probability. auto: the best on the validation rows."
    )
    max_grad_norm: Rate = setting(1.0, "Maximum gradient norm for clipping; 0 turns it off.")
    seed: Annotated[int, Ge(0), Lt(1 << 31)] = setting(42, "Random seed for the head, the data order and dropout.")

    eval_strategy: Strategy = setting(
        "epoch",
        "When to evaluate: epoch, steps (every --eval-steps) or no. The last update is always evaluated.",
        free=True,
    )
    eval_steps: Positive | None = setting(None, "Evaluate every this many updates.", free=True)
    eval_generate: Positive | None = setting(
        None,
        "At each evaluation, generate answers to this many validation rows and report exact_match. Language models only.",
    )
    answer_pattern: str | None = setting(
        None,
        "Regular expression for the part of an answer to compare: its group 1 if it has one, else the whole match.",
    )
    max_new_tokens: Positive | None = setting(None, "Maximum tokens of a generated answer. Default: 256.")
    metric_for_best_model: str | None = setting(
        None,
        "Metric that chooses the best adapter: loss or a metric of the task. Default: its first metric; loss for regression on your own data.",
    )
    calibrate: bool = setting(
        False,
        "Calibrate the scores: scale the head by one temperature, fitted on the validation rows.",
    )
    early_stopping_patience: Positive | None = setting(
        None, "Stop after this many evaluations in a row without improvement.", free=True
    )
    early_stopping_threshold: Rate | None = setting(
        None, "Smallest change of the metric that counts as an improvement.", free=True
    )
    save_strategy: Strategy = setting(
        "epoch",
        "When to save a checkpoint: epoch, steps (every --save-steps) or no (only when interrupted).",
        free=True,
    )
    save_steps: Positive | None = setting(None, "Save a checkpoint every this many updates.", free=True)
    save_total_limit: Positive = setting(2, "Checkpoints to keep; older ones are deleted.", free=True)
    logging_steps: Positive = setting(
        10, "Log to metrics.jsonl every this many updates; without a terminal, to the screen too.", free=True
    )
    report_to: tuple[str, ...] = setting(
        ("none",), f"Trackers to report metrics to, besides metrics.jsonl: {','.join(TRACKERS)} or none.", free=True
    )

    num_processes: Positive | None = setting(
        None, "Processes to start. Default: one per visible GPU, or one on the CPU.", free=True
    )
    fsdp: bool = setting(False, "Shard the base over the processes (FSDP), for models larger than one GPU.", free=True)
    bf16: bool = setting(
        False, "bfloat16 autocast; trained parameters stay float32. A language model stored in bfloat16 stays in it."
    )
    fp16: bool = setting(
        False,
        "float16 autocast with loss scaling; trained parameters stay float32. A language model stored in float16 stays in it.",
    )
    gradient_checkpointing: bool = setting(
        False, "Recompute activations in the backward pass: less memory, more time, same result.", free=True
    )
    torch_compile: bool = setting(
        False, "Compile the model's layers with torch.compile; an error if a layer does not compile as one graph."
    )
    load_in_8bit: bool = setting(False, "Load the base in 8 bits (bitsandbytes, CUDA); factors keep full precision.")
    load_in_4bit: bool = setting(False, "Load the base in 4 bits (bitsandbytes, CUDA); factors keep full precision.")
    use_cpu: bool = setting(False, "Use the CPU even if a GPU is available.", free=True)

    cache_dir: str | None = setting(None, "Cache folder for factors. Default: ~/.cache/craft.")
    output_dir: str | None = setting(None, "Run folder. Default: runs/TASK-MODEL-TIME.")
    overwrite: bool = setting(False, "Replace the run in the output folder.")
    resume: bool = setting(
        False, "Resume the run in --output-dir, or the latest run; the result is the same as without the interruption."
    )
    trust_remote_code: bool = setting(
        False, "Run Python code from the model's repository. Read it first: it runs with your permissions."
    )
    allow_other_base: bool = setting(False, "Accept a base model other than the one the run or adapter was trained on.")
    dry_run: bool = setting(False, "Check everything, including one real training step, then stop.")

    def __post_init__(self) -> None:
        """Convert values in command-line form, such as ranks="32,32,4", and validate each one.

        Raises:
            ConfigError: a value is invalid; one line for each problem.
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
        """All fields in display order, with the method options after `targets`."""
        inherited = {name for method in METHOD_OPTIONS for name in option_names(method)}
        fields = {field.name: field for field in dataclasses.fields(cls)}
        own = [field for name, field in fields.items() if name not in inherited]
        at = [field.name for field in own].index("targets") + 1
        options = dict.fromkeys(name for method in METHOD_OPTIONS for name in option_names(method))
        return [*own[:at], *(fields[name] for name in options), *own[at:]]

    @classmethod
    def groups(cls) -> dict[str, str]:
        """The help group of every field; method options are grouped by the methods that have them."""
        begin = ("model", "method", "learning_rate", "eval_strategy", "num_processes", "cache_dir")
        first = dict(zip(begin, GROUPS, strict=True))
        group, groups = GROUPS[0], {}
        for field in cls.settings():
            group = first.get(field.name, group)
            groups[field.name] = f"Adapter by {', '.join(owners(field.name))}" if owners(field.name) else group
        return groups

    @property
    def method_options(self) -> Any:
        """The options of the chosen method, with its defaults filled in."""
        given = {name: getattr(self, name) for name in option_names(self.method)}
        return METHOD_OPTIONS[self.method](**{name: value for name, value in given.items() if value is not None})

    def settled(self, defaults: Mapping[str, Any]) -> RunConfig:
        """A copy with unset fields filled in from the defaults of the task type."""
        return replace(self, **{name: value for name, value in defaults.items() if getattr(self, name) is None})

    @property
    def adapter_rate(self) -> float:
        """The learning rate of the adapter: the one given, or the default of the method."""
        return LEARNING_RATES[self.method] if self.learning_rate is None else self.learning_rate

    def completed(self, options: Any = None) -> RunConfig:
        """A copy with all options of its method filled in.

        Args:
            options: the method's options, as chosen for the budget; by default those of this run.
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
        """Build the settings from defaults, a previous run, a recipe and flags; later ones override earlier ones.

        Args:
            flags: settings by field name; None means not given.
            recipe: settings by field name.
            former: settings of the previous run, by field name.

        Raises:
            ConfigError: a setting is invalid; one line for each problem, with its flag or key.
        """
        given: dict[str, Any] = {}
        for name in USERS_OWN:
            if name in {**(former or {}), **(recipe or {})}:
                raise ConfigError(
                    f"{name} cannot be set in a recipe, only with the flag {flag(name)}; remove it from the recipe"
                )
        for layer in (
            dict(former or {}),
            dict(recipe or {}),
            {name: value for name, value in (flags or {}).items() if value is not None},
        ):
            if "budget" in layer:  # replaces the ranks of lower layers
                given = {name: value for name, value in given.items() if name not in _SIZES}
            elif any(name in layer for name in _SIZES):
                given.pop("budget", None)
            if layer.get("method", given.get("method")) != given.get(
                "method"
            ):  # options of another method do not apply
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
                problems.append(f"{flag(name)} and --budget cannot be combined; choose one")
        if problems:
            raise ConfigError("\n".join(problems))
        return config

    def recipe(self) -> dict[str, Any]:
        """The recipe that reproduces this run: every setting that matters and is not None."""
        kept, whole = {}, self if self.budget else self.completed()
        for name, group in self.groups().items():
            value = getattr(whole, name)
            if owners(name) and self.method not in owners(name):
                continue
            if group != GROUPS[-1] and value is not None:
                kept[name] = join_names(map(str, value)) if isinstance(value, tuple) else value
        return kept


_SIZES = ("rank", "ranks")
"""The options that a budget sets."""
USERS_OWN = ("trust_remote_code", "allow_other_base")
"""Settings that only the user may give, never a recipe, run or adapter."""


def free_settings() -> set[str]:
    """Names of the settings that a resumed run may change."""
    return {field.name for field in dataclasses.fields(RunConfig) if field.metadata["free"]}


def _strategies(layer: Mapping[str, Any], below: Mapping[str, Any]) -> dict[str, Any]:
    """The strategy implied by a number of steps or epochs given without one, and the other way round."""
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
    """Convert settings to their types and validate each one.

    Raises:
        ConfigError: a value is invalid; one line for each problem, with its flag.
    """
    return parse(given, get_type_hints(RunConfig, include_extras=True)) if given else {}
