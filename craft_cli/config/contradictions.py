"""Checks for settings that cannot be combined."""

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
    """An error for each text that cannot be written to a recipe, such as a file name that is not UTF-8."""
    problems = []
    for text in value if isinstance(value, tuple) else (value,):
        try:
            str(text).encode()
        except UnicodeEncodeError:
            problems.append(f"{flag(name)}: {text!r} is not UTF-8; choose another name")
    return problems


def contradictions(config: RunConfig) -> list[str]:
    """One line for each conflict between settings and for each value that a recipe cannot hold."""
    problems = [
        line for field in dataclasses.fields(config) for line in no_utf8(field.name, getattr(config, field.name))
    ]
    if config.bf16 and config.fp16:
        problems.append("--bf16 and --fp16 cannot be combined; choose one")
    if bool(config.data_dir) + bool(config.train_file or config.validation_file) + bool(config.dataset_name) > 1:
        problems.append("--data-dir, --train-file/--validation-file and --dataset-name cannot be combined; choose one")
    if not (config.task or config.data_dir or config.train_file or config.validation_file or config.dataset_name):
        problems.append("no training data: pass --task, --data-dir or --train-file (or --recipe quickstart)")
    if config.validation_file and not config.train_file and not config.task:
        problems.append("--validation-file requires --train-file")
    if config.train_file and config.task and not config.validation_file:
        problems.append("--train-file with --task requires --validation-file")
    if config.problem_type and config.task:
        problems.append("--problem-type is for your own data; --task sets it already, remove one")
    if config.label_separator and (config.task or config.problem_type not in (None, "multi_label_classification")):
        problems.append("--label-separator is only for multi-label data of your own; remove it")
    if config.dataset_config_name and not config.dataset_name:
        problems.append("--dataset-config-name requires --dataset-name")
    for kind in ("eval", "save"):
        strategy, steps = getattr(config, f"{kind}_strategy"), getattr(config, f"{kind}_steps")
        if strategy == "steps" and steps is None:
            problems.append(f"--{kind}-strategy steps requires --{kind}-steps")
        if strategy != "steps" and steps is not None:
            problems.append(f"--{kind}-steps requires --{kind}-strategy steps")
    if config.eval_strategy == "no":
        problems += [
            f"{flag(name)} requires evaluations: --eval-strategy epoch or steps"
            for name in ("metric_for_best_model", "early_stopping_patience", "calibrate", "eval_generate")
            if getattr(config, name)
        ]
    if config.early_stopping_threshold is not None and config.early_stopping_patience is None:
        problems.append("--early-stopping-threshold requires --early-stopping-patience")
    for name in ("answer_pattern", "max_new_tokens"):
        if getattr(config, name) and not config.eval_generate:
            problems.append(f"{flag(name)} requires --eval-generate")
    if config.load_in_4bit and config.load_in_8bit:
        problems.append("--load-in-4bit and --load-in-8bit cannot be combined; choose one")
    if config.resume and (config.overwrite or config.dry_run):
        problems.append("--resume cannot be combined with --overwrite or --dry-run")
    if config.adapter_factors == "reference" and config.method not in WITH_FACTORS:
        problems.append(f"--adapter-factors reference: --method {config.method} has no factors; remove it")
    if config.init_from:
        for field in dataclasses.fields(config):
            if field.metadata["start"] and getattr(config, field.name) != field.default:
                problems.append(f"--init-from and {flag(field.name)} cannot be combined: both initialize the adapter")
    if config.init_from and config.budget:
        problems.append("--init-from and --budget cannot be combined: --init-from already fixes the rank")
    unknown = [name for name in config.report_to if name not in (*TRACKERS, "none")]
    problems += [f"--report-to: unknown tracker '{name}'{nearest(name, (*TRACKERS, 'none'))}" for name in unknown]
    if "none" in config.report_to and len(config.report_to) > 1:
        problems.append("--report-to: none cannot be combined with trackers")
    if config.text_columns is not None and not config.text_columns:
        problems.append("--text-columns: name at least one column")
    return problems
