"""Settings that do not go together."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from craft_cli.config.options import WITH_FACTORS
from craft_cli.errors import nearest

if TYPE_CHECKING:
    from craft_cli.config.settings import RunConfig

TRACKERS = ("tensorboard", "wandb", "mlflow")


def flag(name: str) -> str:
    """The command-line flag of a field."""
    return "--" + name.replace("_", "-")


def no_utf8(name: str, value: object) -> list[str]:
    """A line about a text, or some of several, that no recipe can keep: bytes of another encoding, as a file's name may be."""
    problems = []
    for text in value if isinstance(value, tuple) else (value,):
        try:
            str(text).encode()
        except UnicodeEncodeError:
            problems.append(f"{flag(name)}: {text!r} is no UTF-8; choose another")
    return problems


def contradictions(config: RunConfig) -> list[str]:
    """What in these settings excludes each other or cannot be kept, a line each."""
    problems = [
        line for field in dataclasses.fields(config) for line in no_utf8(field.name, getattr(config, field.name))
    ]
    if config.bf16 and config.fp16:
        problems.append("--bf16 and --fp16 exclude each other")
    if bool(config.data_dir) + bool(config.train_file or config.validation_file) + bool(config.dataset_name) > 1:
        problems.append("--data-dir, --train-file/--validation-file and --dataset-name exclude each other")
    if not (config.task or config.data_dir or config.train_file or config.validation_file or config.dataset_name):
        problems.append("nothing to train on: give --task, --data-dir or --train-file (or --recipe quickstart)")
    if config.validation_file and not config.train_file and not config.task:
        problems.append("--validation-file needs --train-file beside it")
    if config.train_file and config.task and not config.validation_file:
        problems.append("--train-file with --task needs --validation-file beside it")
    if config.problem_type and config.task:
        problems.append("--problem-type is for own data; --task knows its own")
    if config.label_separator and (config.task or config.problem_type not in (None, "multi_label_classification")):
        problems.append("--label-separator: only for own data where several labels can apply to a row; leave it out")
    if config.dataset_config_name and not config.dataset_name:
        problems.append("--dataset-config-name needs --dataset-name")
    for kind in ("eval", "save"):
        strategy, steps = getattr(config, f"{kind}_strategy"), getattr(config, f"{kind}_steps")
        if strategy == "steps" and steps is None:
            problems.append(f"--{kind}-strategy steps needs --{kind}-steps")
        if strategy != "steps" and steps is not None:
            problems.append(f"--{kind}-steps needs --{kind}-strategy steps")
    if config.eval_strategy == "no":
        problems += [
            f"{flag(name)} needs evaluations: --eval-strategy epoch or steps"
            for name in ("metric_for_best_model", "early_stopping_patience", "calibrate", "eval_generate")
            if getattr(config, name)
        ]
    if config.early_stopping_threshold is not None and config.early_stopping_patience is None:
        problems.append("--early-stopping-threshold needs --early-stopping-patience")
    for name in ("answer_pattern", "max_new_tokens"):
        if getattr(config, name) and not config.eval_generate:
            problems.append(f"{flag(name)} needs --eval-generate")
    if config.load_in_4bit and config.load_in_8bit:
        problems.append("--load-in-4bit and --load-in-8bit exclude each other")
    if config.resume and (config.overwrite or config.dry_run):
        problems.append("--resume excludes --overwrite and --dry-run")
    if config.adapter_factors == "reference" and config.method not in WITH_FACTORS:
        problems.append(f"--adapter-factors reference: --method {config.method} has no factors to refer to")
    if config.init_from:
        for field in dataclasses.fields(config):
            if field.metadata["start"] and getattr(config, field.name) != field.default:
                problems.append(f"--init-from and {flag(field.name)} exclude each other: both say where it starts")
    if config.init_from and config.budget:
        problems.append("--init-from and --budget exclude each other: the rank is that of the other run")
    unknown = [name for name in config.report_to if name not in (*TRACKERS, "none")]
    problems += [f"--report-to: unknown tracker '{name}'{nearest(name, (*TRACKERS, 'none'))}" for name in unknown]
    if "none" in config.report_to and len(config.report_to) > 1:
        problems.append("--report-to: none excludes the others")
    if config.text_columns is not None and not config.text_columns:
        problems.append("--text-columns: name one column or more")
    return problems
