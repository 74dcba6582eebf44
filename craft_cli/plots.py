"""Plots: training curve, spectra and sweeps, written to files with matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any

from craft_cli.errors import ConfigError
from craft_cli.files import reason_of, write_bytes

_INK, _BLUE, _ORANGE, _GREY = "#222222", "#2563a8", "#d9730d", "#9a9a9a"
_COLOURS = (_BLUE, _ORANGE, "#3a8f4d", "#8a4fa3", "#b3323c", "#4a4a4a", "#a07d1c", "#2a9d9d")
_MARKERS = "osD^vPX*"
_STYLES = ("-", "--", "-.", ":")
"""Line styles and markers, so that plots are readable without color."""


def training_curve(
    lines: Sequence[Mapping[str, Any]],
    metric: str,
    path: Path,
    title: str,
    baselines: Mapping[str, Mapping[str, float]],
    best: float,
) -> None:
    """Losses (left axis) and the chosen metric (right axis) over updates, with the best update and the baselines."""
    _save(curve_figure(lines, metric, title, baselines, best), path)


def curve_figure(
    lines: Sequence[Mapping[str, Any]],
    metric: str,
    title: str,
    baselines: Mapping[str, Mapping[str, float]],
    best: float,
) -> Any:
    """The training curve as a figure.

    Args:
        lines: lines of metrics.jsonl.
        metric: metric that chose the best update.
        title: title of the plot.
        baselines: metrics by baseline, drawn as horizontal lines.
        best: epoch of the best evaluation.
    """
    figure, axes = _figure(1)
    left = axes[0]
    steps = [line for line in lines if "loss" in line]
    evaluations = [line for line in lines if f"eval_{metric}" in line]
    left.plot([x["step"] for x in steps], [x["loss"] for x in steps], color=_BLUE, linewidth=1.4, label="training loss")
    left.plot(
        [x["step"] for x in evaluations], [x["eval_loss"] for x in evaluations],
        color=_BLUE, linewidth=1.4, linestyle="--", marker="s", markersize=3, label="validation loss",
    )  # fmt: skip
    left.set_xlabel("update")
    left.set_ylabel("loss", color=_BLUE)
    left.set_ylim(bottom=0)
    shown = metric
    if metric.startswith("loss"):  # the loss is already drawn; show the main metric
        names = [name for name in (evaluations[0] if evaluations else {}) if name.startswith("eval_")]
        shown = next((name.removeprefix("eval_") for name in names), metric)
    right = left.twinx()
    right.plot(
        [x["step"] for x in evaluations], [x[f"eval_{shown}"] for x in evaluations],
        color=_ORANGE, marker="o", markersize=3.5, linewidth=1.4, clip_on=False, label=f"validation {shown}",
    )  # fmt: skip
    for (name, metrics), style in zip(baselines.items(), (":", "-.", (0, (1, 4)), (0, (6, 3))), strict=False):
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


def spectra(decompositions: Mapping[str, Any], chance: Mapping[str, Any], path: Path, title: str) -> None:
    """Singular values with one panel per mode and one line per projection, compared with a random tensor."""
    _save(spectra_figure(decompositions, chance, title), path)


def spectra_figure(decompositions: Mapping[str, Any], chance: Mapping[str, Any], title: str) -> Any:
    """The spectra as a figure.

    Args:
        decompositions: decompositions by projection.
        chance: positions and singular values of a random tensor by projection and mode; the same for equal shapes.
        title: title of the plot.
    """
    figure, axes = _figure(3)
    for mode, (name, axis) in enumerate(zip(("layer", "output", "input"), axes, strict=True)):
        shapes: dict[tuple[int, ...], str] = {}
        for target, decomposition in decompositions.items():
            shapes.setdefault(decomposition.shape, target)
        for shape, target in shapes.items():
            numbers, values = chance[target][mode]
            named = f" of {'x'.join(map(str, shape))}" if len(shapes) > 1 else ""
            axis.plot(numbers, values, color=_GREY, linewidth=2.5, alpha=0.7, label=f"random tensor{named}")
        for number, (target, decomposition) in enumerate(decompositions.items()):
            values = decomposition.spectra[mode] / max(float(decomposition.spectra[mode][0]), 1e-30)
            rank = decomposition.ranks[mode]
            style = {"color": _COLOURS[number % len(_COLOURS)], "linestyle": _STYLES[number % len(_STYLES)]}
            marker = _MARKERS[number % len(_MARKERS)]
            axis.plot(range(1, len(values) + 1), values.tolist(), linewidth=1.4, **style)
            axis.plot([rank], [float(values[rank - 1])], marker, color=style["color"], markersize=7)
            axis.plot([], [], marker=marker, markersize=7, linewidth=1.4, label=target, **style)
        axis.set_xlabel(f"index of the singular value ({name} mode)")
        axis.set_ylim(0, 1.05)
        axis.set_xlim(left=0)
    axes[0].set_ylabel("singular value / largest")
    handles, labels = axes[2].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=9,
        title="projection; the marker is the rank", title_fontsize=9,
    )  # fmt: skip
    figure.suptitle(title, x=0.01, ha="left", fontsize=10, color=_INK)
    return figure


def scores(
    points: Mapping[str, Sequence[Mapping[str, Any]]],
    path: Path,
    *,
    across: str,
    up: str,
    title: str,
    lower_is_better: bool,
    envelope: bool = False,
) -> None:
    """Plot scores of settings with their standard deviations, one color per method.

    Args:
        points: points by method; each has `x`, `mean`, `std` (None for one seed) and `chosen`.
        path: file of the plot.
        across: label of the logarithmic x axis.
        up: label of the y axis.
        title: title of the plot.
        lower_is_better: whether lower scores are better.
        envelope: whether to connect the best scores at each x by a line.
    """
    figure, axes = _figure(1)
    axis = axes[0]
    axis.set_xscale("log")
    choose = min if lower_is_better else max
    places = sorted({it["x"] for settings in points.values() for it in settings})
    aside = (places[-1] / places[0]) ** 0.012 if envelope else 1.0  # methods with the same rate, side by side
    for number, (method, settings) in enumerate(points.items()):
        settings = [{**it, "x": it["x"] * aside ** (number - (len(points) - 1) / 2)} for it in settings]
        style = {"color": _COLOURS[number % len(_COLOURS)], "marker": _MARKERS[number % len(_MARKERS)]}
        best = {x: choose(it["mean"] for it in settings if it["x"] == x) for x in sorted({it["x"] for it in settings})}
        if envelope and len(best) > 1:
            axis.plot(list(best), list(best.values()), color=style["color"], linewidth=1.2, alpha=0.6)
        for strong in (False, True):  # the best at each x in front of the others
            shown = [it for it in settings if (it["mean"] == best[it["x"]]) == strong]
            axis.errorbar(
                [it["x"] for it in shown],
                [it["mean"] for it in shown],
                yerr=[it["std"] or 0.0 for it in shown],
                **style, linestyle="", markersize=5 if strong else 4, capsize=2.5 if strong else 0, elinewidth=1.0,
                alpha=0.9 if strong else 0.3, label=method if strong else None,
            )  # fmt: skip
        for it in settings:
            if it["chosen"]:
                axis.plot([it["x"]], [it["mean"]], "o", markersize=12, markerfacecolor="none", color=_INK)
    axis.margins(x=0.08, y=0.12)
    if len(places) == 1:
        axis.set_autoscalex_on(False)  # it warns about a single place
        axis.set_xlim(places[0] / 2, places[0] * 2)
    _plain_ticks(axis, places)
    axis.set_xlabel(across)
    axis.set_ylabel(up)
    handles, labels = axis.get_legend_handles_labels()
    if any(it["chosen"] for settings in points.values() for it in settings):
        handles += axis.plot([], [], "o", markersize=9, markerfacecolor="none", color=_INK, linestyle="")
        labels += ["best of its method" if len(points) > 1 else "best"]
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    axis.set_title(title, loc="left", fontsize=10, color=_INK)
    _save(figure, path)


def _plain_ticks(axis: Any, values: Sequence[float]) -> None:
    """Plain numbers on a logarithmic axis; the values themselves if they are few and far apart."""
    from matplotlib.ticker import MaxNLocator, NullLocator

    if len(values) <= 6 and all(high >= 1.3 * low for low, high in pairwise(values)):
        axis.xaxis.set_minor_locator(NullLocator())
        axis.set_xticks(values, [_tick(value) for value in values])
        return
    axis.xaxis.set_major_formatter(lambda value, _: _tick(value))
    if values[-1] < 3 * values[0]:  # too close for powers of ten and their multiples
        axis.xaxis.set_major_locator(MaxNLocator(5))
        axis.xaxis.set_minor_locator(NullLocator())
        return
    narrow = values[-1] < 30 * values[0]
    axis.xaxis.set_minor_formatter(lambda value, _: _tick(value) if narrow and f"{value:e}"[0] in "235" else "")


def _tick(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:g}"


def svg(figure: Any) -> bytes:
    """A figure as SVG, the same bytes for the same figure."""
    import matplotlib

    picture = BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "craft"}):
        _literal(figure).savefig(picture, format="svg", metadata={"Date": None, "Creator": None})
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
        _literal(figure).savefig(picture, format=path.suffix.removeprefix(".") or "png")
    except ValueError as error:  # an unknown file extension
        raise ConfigError(f"--plot: {path}: {reason_of(error)}") from error
    write_bytes(path, picture.getvalue())


def _literal(figure: Any) -> Any:
    """The figure with all text as it is: a folder's name may hold what matplotlib would read as a formula."""
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        text.set_parse_math(False)
    return figure
