"""The pictures: training curve and spectra. matplotlib without a window, files only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from craft_cli.errors import ConfigError
from craft_cli.files import write_bytes

_INK, _BLUE, _ORANGE, _GREY = "#222222", "#2563a8", "#d9730d", "#9a9a9a"


def training_curve(
    lines: Sequence[Mapping[str, Any]],
    metric: str,
    path: Path,
    title: str,
    baselines: Mapping[str, Mapping[str, float]],
    best: float,
) -> None:
    """Losses (left axis) and the chosen metric (right axis) over updates, with the best update and what it had to beat."""
    _save(curve_figure(lines, metric, title, baselines, best), path)


def curve_figure(
    lines: Sequence[Mapping[str, Any]],
    metric: str,
    title: str,
    baselines: Mapping[str, Mapping[str, float]],
    best: float,
) -> Any:
    """The same as a figure.

    Args:
        lines: of metrics.jsonl.
        metric: that chose the best update.
        title: above it.
        baselines: metrics by the name of what they are of, drawn as level lines.
        best: epoch of the best evaluation.
    """
    figure, axes = _figure(1)
    left = axes[0]
    steps = [line for line in lines if "loss" in line]
    evaluations = [line for line in lines if f"eval_{metric}" in line]
    left.plot([x["step"] for x in steps], [x["loss"] for x in steps], color=_BLUE, linewidth=1.4, label="training loss")
    left.plot(
        [x["step"] for x in evaluations], [x["eval_loss"] for x in evaluations],
        color=_BLUE, linewidth=1.4, linestyle="--", label="validation loss",
    )  # fmt: skip
    left.set_xlabel("update")
    left.set_ylabel("loss", color=_BLUE)
    left.set_ylim(bottom=0)
    shown = metric
    if metric.startswith("loss"):  # it is drawn already; show what people look at
        names = [name for name in (evaluations[0] if evaluations else {}) if name.startswith("eval_")]
        shown = next((name.removeprefix("eval_") for name in names), metric)
    right = left.twinx()
    right.plot(
        [x["step"] for x in evaluations], [x[f"eval_{shown}"] for x in evaluations],
        color=_ORANGE, marker="o", markersize=3.5, linewidth=1.4, clip_on=False, label=f"validation {shown}",
    )  # fmt: skip
    for (name, metrics), style in zip(baselines.items(), (":", "-."), strict=False):
        if shown in metrics:
            right.axhline(metrics[shown], color=_GREY, linewidth=1.2, linestyle=style, label=name.replace("_", " "))
    for line in [line for line in evaluations if abs(line["epoch"] - best) < 1e-5][:1]:
        right.plot(
            [line["step"]], [line[f"eval_{shown}"]], "o", markersize=9, markerfacecolor="none", color=_INK, clip_on=False,
            label=f"best: update {line['step']:,}",
        )  # fmt: skip
    right.set_ylabel(f"validation {shown}", color=_ORANGE)
    right.spines["top"].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    left.set_title(title, loc="left", fontsize=10, color=_INK)
    return figure


def spectra(decompositions: Mapping[str, Any], path: Path, title: str) -> None:
    """Singular values of every mode, normalised, one panel a mode, one line a projection; ranks kept are marked."""
    _save(spectra_figure(decompositions, title), path)


def spectra_figure(decompositions: Mapping[str, Any], title: str) -> Any:
    """The same as a figure."""
    figure, axes = _figure(3)
    colours = [_BLUE, _ORANGE, "#3a8f4d", "#8a4fa3"]
    for mode, (name, axis) in enumerate(zip(("layer", "out", "in"), axes, strict=True)):
        for colour, (target, decomposition) in zip(colours, decompositions.items(), strict=False):
            values = decomposition.spectra[mode] / max(float(decomposition.spectra[mode][0]), 1e-30)
            rank = decomposition.ranks[mode]
            numbers = range(1, len(values) + 1)
            axis.plot(
                numbers,
                values.tolist(),
                color=colour,
                linewidth=1.4,
                label=target,
                marker="." if len(values) < 50 else "",
            )
            axis.plot([rank], [float(values[rank - 1])], "o", color=colour, markersize=6)
        axis.set_xlabel(f"{name} mode: singular value number")
        axis.set_ylim(0, 1.05)
        axis.set_xlim(left=0)
    axes[0].set_ylabel("singular value / largest")
    axes[2].legend(frameon=False, title="projection (dot: rank kept)", alignment="left")
    figure.suptitle(title, x=0.01, ha="left", fontsize=10, color=_INK)
    return figure


def svg(figure: Any) -> bytes:
    """A figure as SVG, the same bytes for the same figure."""
    import matplotlib

    picture = BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "craft"}):
        figure.savefig(picture, format="svg", metadata={"Date": None, "Creator": None})
    return picture.getvalue()


def _figure(panels: int) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4 if panels == 1 else 4 * panels, 3.8), layout="constrained", dpi=130)
    axes = figure.subplots(1, panels, squeeze=False)[0]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color=_GREY, alpha=0.25)
    return figure, axes


def _save(figure: Any, path: Path) -> None:
    picture = BytesIO()
    try:
        figure.savefig(picture, format=path.suffix.removeprefix(".") or "png")
    except ValueError as error:  # an unknown ending
        raise ConfigError(f"--plot: {path}: {error}") from error
    write_bytes(path, picture.getvalue())
