"""`craft merge`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import typer

from craft_cli.cli import completion
from craft_cli.cli.options import JsonFlag, asks_hub, reports_errors, with_settings

Adapter = Annotated[
    str | None,
    typer.Argument(
        help="Run, adapter, or hub id of an adapter.", show_default="the latest run", autocompletion=completion.runs
    ),
]


@reports_errors
@asks_hub
@with_settings("trust_remote_code", "allow_other_base")
def command(
    path: Adapter = None,
    output_dir: Annotated[
        str | None,
        typer.Option(
            "--output-dir",
            "--output",
            "-o",
            help="Output folder.",
            show_default="merged (or peft, gguf, adapter-copy), in the run",
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output of an earlier merge.")] = False,
    output_format: Annotated[
        str,
        typer.Option(
            "--format", help="checkpoint; peft: a LoRA for PEFT; gguf: one for llama.cpp; adapter: a copy to share."
        ),
    ] = "checkpoint",
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Dtype of the weights: float32, float16 or bfloat16.", show_default="the base's; of a gguf float32"
        ),
    ] = None,
    max_shard_size: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Maximum size of a weight file.", show_default="5GB")
    ] = None,
    trim: Annotated[
        bool, typer.Option("--trim", help="For a LoRA: drop directions that are zero to numerical precision.")
    ] = False,
    tolerance: Annotated[
        float | None,
        typer.Option(
            metavar="PART",
            help="For a LoRA: allowed relative error of a dense change (superlora).",
            show_default="1e-6",
        ),
    ] = None,
    no_head: Annotated[
        bool,
        typer.Option("--no-head", help="For a LoRA: omit the trained head, for vLLM; the LoRA then gives embeddings."),
    ] = False,
    push_to_hub: Annotated[
        str | None, typer.Option(metavar="OWNER/NAME", help="Also upload to this Hub repository.")
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="With --push-to-hub: create the repository as private.")
    ] = False,
    json: JsonFlag = False,
    **settings: Any,
) -> None:
    """Merge an adapter into a plain Hugging Face checkpoint for any tool, or export it as a LoRA or a copy to share."""
    from craft_cli.cli import console

    with console.status("starting") as progress:
        from craft_cli.api.merge import merge

        result = merge(
            path,
            output_dir,
            overwrite=overwrite,
            format=output_format,
            dtype=dtype,
            max_shard_size=max_shard_size,
            trim=trim,
            tolerance=tolerance,
            head=not no_head,
            push_to_hub=push_to_hub,
            private=private,
            progress=progress,
            notice=console.note,
            **{name: bool(value) for name, value in settings.items()},
        )
    if json:
        console.print_json(asdict(result))
        return
    _show(result)


def _show(result: Any) -> None:
    """Print what was written."""
    from craft_cli.cli import console

    if result.format == "adapter":
        console.facts({"copied": result.output, "files": ", ".join(result.files), "uploaded": result.repository})
        if result.hint:
            console.note(result.hint)
        return
    lora = result.rank is not None
    console.facts(
        {
            "exported" if lora else "merged": result.output,
            "files": ", ".join(result.files),
            "weights": f"{result.tensors_changed} changed, "
            + (f"as a LoRA of rank {result.rank}" if lora else result.dtype),
            "verified": f"logits differ by {result.difference:.1e} of the largest (allowed {result.tolerance:.0e})"
            + ("; {} of {} greedy tokens are the same".format(*result.greedy) if result.greedy else ""),
            "threshold": result.threshold and _threshold(result.threshold, lora=lora),
            **{program: console.Verbatim(command) for program, command in result.serve.items()},
            "uploaded": result.repository,
        }
    )
    if result.hint:
        console.note(result.hint)


def _threshold(value: float, *, lora: bool) -> str:
    used = "other tools assume 0.5" if lora else "used by craft eval and predict; other tools assume 0.5"
    return f"labels are predicted above {value:g} ({used})"
