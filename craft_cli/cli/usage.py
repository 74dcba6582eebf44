"""The `--help` of a command, and the error for an unknown flag."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

from typer.core import TyperCommand, TyperGroup

_ELSEWHERE = {
    "learning-rate": ("lr", "adapter-lr"),
    "head-learning-rate": ("head-lr", "classifier-lr"),
    "per-device-train-batch-size": ("batch-size", "bs", "batch", "train-batch-size", "micro-batch-size"),
    "per-device-eval-batch-size": ("eval-batch-size", "batch-size", "batch"),
    "num-train-epochs": ("epochs", "epoch", "num-epochs", "n-epochs"),
    "max-steps": ("steps", "iters", "num-steps"),
    "gradient-accumulation-steps": ("accumulate", "grad-accum", "accumulation-steps", "gradient-accumulation"),
    "max-seq-length": ("max-length", "max-len", "seq-len", "cutoff-len", "sequence-len", "block-size"),
    "output-dir": ("output", "out", "save-dir", "run", "o"),
    "output": ("output-dir", "out"),
    "input": ("input-file", "file", "test-file"),
    "model": ("model-name", "model-name-or-path", "base-model", "pretrained"),
    "data-dir": ("data", "data-path", "dataset-dir"),
    "dataset-name": ("dataset", "dataset-id"),
    "dataset-config-name": ("dataset-config", "subset"),
    "train-file": ("train", "train-data", "training-file"),
    "validation-file": ("eval-file", "val-file", "valid-file", "dev-file", "eval-data"),
    "validation-share": ("val-split", "test-size", "val-set-size"),
    "text-columns": ("text", "text-column", "text-field", "columns"),
    "label-column": ("label", "labels", "target", "label-name"),
    "rank": ("r", "lora-r", "lora-rank"),
    "alpha": ("lora-alpha",),
    "targets": ("target-modules", "modules"),
    "init-from": ("adapter", "resume-from"),
    "resume": ("resume-from-checkpoint", "continue"),
    "warmup-ratio": ("warmup", "warmup-steps"),
    "weight-decay": ("wd",),
    "early-stopping-patience": ("patience",),
    "num-processes": ("gpus", "nproc", "num-gpus", "nproc-per-node"),
    "load-in-4bit": ("4bit", "qlora"),
    "load-in-8bit": ("8bit",),
    "use-cpu": ("cpu", "no-cuda", "device"),
    "report-to": ("wandb", "tensorboard", "logger"),
    "recipe": ("config", "yaml"),
}
"""Flag names of other tools."""
_SHORT = {"integer": "N", "int": "N", "float": "NUMBER"}
_WIDEST, _NAMES = 100, 38


def meant(name: str, known: Iterable[str]) -> str | None:
    """The flag that was probably meant.

    Args:
        name: the unknown flag, such as `--lr`.
        known: existing flags.
    """
    names = [flag[2:] for flag in known if flag.startswith("--") and not flag.startswith("--no-")]
    word = name.lstrip("-").replace("_", "-").lower()
    for flag, others in _ELSEWHERE.items():
        if word in others and flag in names:
            return f"--{flag}"
    parts = set(word.split("-"))
    close = [flag for flag in names if parts <= set(flag.split("-"))]
    close = sorted(close, key=len) or get_close_matches(word, names, n=1)
    return f"--{close[0]}" if close else None


class Command(TyperCommand):
    """A command with help for any width, the most used flags first, and suggestions for flag names of other tools."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse as typer does; the error for an unknown flag suggests the right one."""
        try:
            return super().parse_args(ctx, args)
        except Exception as error:
            given = getattr(error, "option_name", None)
            if given is not None and hasattr(error, "possibilities"):
                wanted = meant(given, [name for parameter in self.params for name in parameter.opts])
                error.possibilities = []
                error.message = f"no such option: {given}" + (f"; did you mean {wanted}?" if wanted else "")  # type: ignore[attr-defined]
            raise

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print usage, an example, and groups of options; long names have their help below them."""
        from rich.text import Text

        from craft_cli.cli import console

        width = min(console.out.width, _WIDEST)

        def write(text: str, style: str = "", indent: int = 0) -> None:
            for line in console.wrapped(text.split(" "), width - indent):
                console.out.print(Text(" " * indent + line, style), soft_wrap=True)

        write(" ".join(["Usage:", ctx.command_path, "[OPTIONS]", *filter(None, map(_place, self.params))]), "bold")
        console.out.print()
        for paragraph in (self.help or "").strip().split("\n\n"):
            write(" ".join(paragraph.split()))
        if self.epilog:
            console.out.print()
            write("Examples:", "bold")
            for line in self.epilog.splitlines():
                console.out.print(Text(f"  {line}"), soft_wrap=True)
        groups: dict[str, list[Any]] = {}
        for parameter in self.get_params(ctx):
            if not getattr(parameter, "hidden", False):
                kind = "Arguments" if parameter.param_type_name == "argument" else "Options"
                groups.setdefault(getattr(parameter, "rich_help_panel", None) or kind, []).append(parameter)
        groups["Options"] = groups.pop("Options", [])  # --json and --help
        for group, parameters in groups.items():
            console.out.print()
            write(f"{group}:", "bold")
            for parameter in parameters:
                self._explain(parameter, width)
        if any(getattr(parameter, "secondary_opts", None) for parameter in self.params):
            console.out.print()
            write("--no-SWITCH turns off a switch of a recipe or a resumed run, such as --no-bf16.")

    def _explain(self, parameter: Any, width: int) -> None:
        from rich.text import Text

        from craft_cli.cli import console

        names, text = named(parameter), helped(parameter)
        column = _NAMES if width >= 80 else 4
        beside = console.cell_len(names) + 4 <= column
        lines = console.wrapped(text.split(" "), width - column)
        head = Text(f"  {names}", "cyan")
        if beside and lines:
            head += Text(" " * (column - head.cell_len) + lines.pop(0), "default")
        console.out.print(head, soft_wrap=True)
        for line in lines:
            console.out.print(Text(" " * column + line), soft_wrap=True)


class Group(TyperGroup):
    """Flags that are not given are False, not None, because typer passes None through pydantic, a slow import."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse as typer does."""
        for parameter in self.get_params(ctx):
            if parameter.default is None and getattr(parameter, "is_flag", False):
                parameter.default = False
        return super().parse_args(ctx, args)


def _place(parameter: Any) -> str:
    """The placeholder of an argument."""
    if parameter.param_type_name != "argument":
        return ""
    name = named(parameter) + ("..." if parameter.nargs == -1 else "")
    return name if parameter.required else f"[{name}]"


def named(parameter: Any) -> str:
    """An option with its placeholder: `-v, --verbose`, `--seed N`; a switch has none."""
    if parameter.param_type_name == "argument":
        return str(parameter.metavar or parameter.name).strip("[].").upper()
    names = ", ".join(sorted(parameter.opts, key=len))
    return names if parameter.is_flag else f"{names} {takes(parameter)}"


def takes(parameter: Any) -> str:
    """The placeholder of an option's value; older versions of typer store its type elsewhere."""
    if parameter.metavar:
        return str(parameter.metavar)
    kept = getattr(parameter, "type_descriptor", None)
    return _SHORT.get(getattr(kept.annotation, "__name__", "") if kept else parameter.type.name, "TEXT")


def helped(parameter: Any) -> str:
    """The help of a parameter, with its default if it has one."""
    default = parameter.default
    if isinstance(parameter.show_default, str):
        default = parameter.show_default
    elif not parameter.show_default or callable(default) or default in (None, False, True, ..., ()):
        default = None
    return " ".join((parameter.help or "").split()) + (f" [{default}]" if default else "")
