"""Write a self-contained HTML page about a run, an adapter, a factor file or several runs, without scripts or links."""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from craft_cli.api.compare import Comparison, Listed
from craft_cli.api.evaluate import Evaluation, evaluate
from craft_cli.api.inspect import Inspection, inspect
from craft_cli.errors import ConfigError, CraftError, figure
from craft_cli.files import read_content, write_bytes
from craft_cli.plots import curve_figure, spectra_figure, svg
from craft_cli.tasks.metrics import averages
from craft_cli.training.progress import BASELINES
from craft_cli.training.run import Run
from craft_cli.tucker.chance import random_curves

_STYLE = """
:root { color-scheme: light; --ink: #1d2430; --soft: #5d6776; --line: #d9dee5; }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: #fff; max-width: 68rem; margin: 2rem auto;
  padding: 0 1.25rem; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 2.25rem 0 .5rem; border-bottom: 1px solid var(--line); padding-bottom: .25rem; }
p.note { color: var(--soft); margin: .25rem 0 .75rem; }
div.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .75rem; text-align: right; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; }
table.facts th { text-align: left; font-weight: 600; color: var(--soft); white-space: nowrap; }
table.facts td { text-align: left; overflow-wrap: anywhere; }
table.heat td { min-width: 5rem; border: 1px solid #fff; }
table.heat td:first-child { min-width: 0; }
table.texts th, table.texts td { text-align: left; vertical-align: top; white-space: pre-wrap; overflow-wrap: anywhere; }
img { max-width: 100%; height: auto; }
pre { background: #f5f7f9; padding: .75rem 1rem; overflow-x: auto; font-size: 13px; }
"""

_ENERGY = "Energy: share of the squared norm kept at the ranks, the same for a random tensor of this shape, and for each mode alone."

_RUNS = "Sorted by metric and score. Numbers: trained parameters of the adapter and the head. Rate: learning rate of the adapter."
_COSINE = "1: the runs change the weights in the same direction; 0: in orthogonal directions."


def write_page(
    path: str | Path | None, file: str | Path, *, evaluated: bool = True, trust_remote_code: bool = False
) -> Inspection:
    """Write the page. A run or adapter is evaluated for the confusion matrix, if its data is available.

    The page of a language model shows the answers of its last evaluation instead.

    Args:
        path: run, adapter or factor file. Default: the latest run.
        file: the HTML file, replaced atomically.
        evaluated: whether to evaluate.
        trust_remote_code: run Python code from the base's repository for the evaluation.

    Raises:
        ConfigError: the path is a model, which has no spectra and no update.
        CraftError: the path is missing or damaged, or the page cannot be written.
    """
    found = inspect(path, trust_remote_code=trust_remote_code)
    if found.kind == "model":
        raise ConfigError(f"--html: {path} is a model; pass a run, or decompose the model and pass the factor file")
    run = Run(Path(found.path)) if found.kind == "run" else None
    parts = [
        f"<h1>{escape(found.path)}</h1>",
        _facts(found.facts),
        _section("Projections", _projections(found.projections), _ENERGY if found.decompositions else ""),
    ]
    if found.decompositions:
        chance = {name: random_curves(kept.shape) for name, kept in found.decompositions.items()}
        title = f"Singular values of the stacked weights of {found.facts['base_model']}"
        picture = _image(spectra_figure(found.decompositions, chance, title), title)
        parts.append(_section("Spectra", picture))
    if found.kind != "factors":
        parts.append(
            _section("Change by layer", _heat(found.projections), "Norm of dW in every layer; darker is more.")
        )
    if run:
        parts.append(_section("Training", _training(run, found.facts)))
    if found.facts.get("learned"):
        parts.append(_section("Answers", _answers(run), "To the first validation rows, at the last evaluation."))
    elif found.kind != "factors":
        confusion = _confusion(found.path, trusted=trust_remote_code) if evaluated else "<p>Not evaluated.</p>"
        parts.append(_section("Confusion", confusion))
    if run and (run.path / "recipe.yaml").is_file():
        recipe = read_content(run.path / "recipe.yaml").decode(errors="replace")
        parts.append(_section("Configuration", f"<pre>{escape(recipe)}</pre>"))
    _write(Path(file), Path(found.path).name, parts)
    return found


def write_runs(folder: str, runs: Sequence[Listed], file: str | Path) -> None:
    """Write a page that lists the runs of a folder.

    Raises:
        FileError: the page cannot be written.
    """
    names = list(dict.fromkeys(name for run in runs for name in run.metrics or {}))
    columns = [
        "run",
        "score",
        "state",
        "model",
        "method",
        "ranks",
        "numbers",
        "head",
        "rate",
        "epochs",
        "task",
        *names,
        "date",
    ]
    rows = []
    for run in runs:
        trained, metrics = run.parameters or {}, run.metrics or {}
        cells = [
            Path(run.run).name, run.score, run.state, run.model, run.method, run.ranks, trained.get("adapter"),
            trained.get("head"), run.learning_rate, run.epochs, run.task, *map(metrics.get, names), run.date,
        ]  # fmt: skip
        rows.append(["" if cell is None else _shown(cell) for cell in cells])
    damaged = "".join(f"<p>{escape(run.problem)}</p>" for run in runs if run.problem)
    _write(Path(file), folder, [f"<h1>{escape(folder)}</h1>", _section("Runs", _table(columns, rows) + damaged, _RUNS)])


def write_comparison(compared: Comparison, file: str | Path) -> None:
    """Write a page that compares runs side by side.

    Raises:
        FileError: the page cannot be written.
    """
    names = [str(number) for number in range(1, len(compared.runs) + 1)]
    legend = _table(["", "run"], [[name, row["run"]] for name, row in zip(names, compared.runs, strict=True)], "facts")
    cells = [["" if value is None else value for value in (name, *values)] for name, values in compared.table()]
    cosines = [
        [name, *("" if value is None else f"{value:.3f}" for value in row)]
        for name, row in zip(names, compared.cosine, strict=True)
    ]
    parts = [
        "<h1>Runs side by side</h1>",
        _section("Runs", legend + "<br>" + _table(["", *names], cells)),
        _section("Cosine of dW", _table(["", *names], cosines), _COSINE),
    ]
    _write(Path(file), "runs side by side", parts)


def _write(file: Path, title: str, parts: Sequence[str]) -> None:
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">"
        f"<title>craft: {escape(title)}</title><style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )
    write_bytes(file.expanduser(), page.encode(errors="backslashreplace"))


def _section(title: str, body: str, note: str = "") -> str:
    explained = f'<p class="note">{escape(note)}</p>' if note else ""
    return f'<h2>{escape(title)}</h2>{explained}<div class="wide">{body}</div>'


def _table(columns: Sequence[Any], rows: Sequence[Sequence[Any]], kind: str = "") -> str:
    head = "".join(f'<th scope="col">{escape(str(column))}</th>' for column in columns)
    body = "".join("<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


def _facts(facts: Mapping[str, Any]) -> str:
    rows = "".join(
        f'<tr><th scope="row">{escape(name.replace("_", " "))}</th><td>{escape(_shown(value))}</td></tr>'
        for name, value in facts.items()
        if value is not None
    )
    return f'<table class="facts"><tbody>{rows}</tbody></table>'


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_shown(entry)}" for name, entry in value.items())
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _projections(rows: Sequence[Mapping[str, Any]]) -> str:
    columns = ["projection", "L x out x in", "numbers"]
    cells = [[row["name"], "x".join(map(str, row["shape"])), f"{row['parameters']:,}"] for row in rows]
    if all("energy" in row for row in rows):
        columns[2:2], columns[4:] = ["ranks OUT,IN,LAYERS"], ["energy", "random", "layer", "out", "in"]
        for line, row in zip(cells, rows, strict=True):
            line.insert(2, ",".join(map(str, row["ranks"])))
            parts = (row["energy"], row["energy_random"], *row["energy_by_mode"].values())
            line += [f"{100 * part:.1f}%" for part in parts]
    return _table(columns, cells)


def _heat(rows: Sequence[Mapping[str, Any]]) -> str:
    largest = max((value for row in rows for value in row["change_by_layer"]), default=0.0) or 1.0
    head = "".join(f'<th scope="col">{escape(row["name"])}</th>' for row in rows)
    body = []
    for layer in range(max(len(row["change_by_layer"]) for row in rows)):
        cells = []
        for row in rows:
            value = row["change_by_layer"][layer]
            cells.append(_shaded(value / largest, f"{value:.3g}"))
        body.append(f"<tr><td>layer {layer}</td>{''.join(cells)}</tr>")
    return f'<table class="heat"><thead><tr><th></th>{head}</tr></thead><tbody>{"".join(body)}</tbody></table>'


def _shaded(part: float, text: str) -> str:
    """A table cell shaded by a fraction."""
    colour = ",".join(str(round(white + part * (dark - white))) for white, dark in ((247, 8), (250, 64), (253, 129)))
    ink = "#fff" if part > 0.55 else "#1d2430"
    return f'<td style="background:rgb({colour});color:{ink}">{escape(text)}</td>'


def _image(figure: Any, text: str) -> str:
    return f'<img alt="{escape(text)}" src="data:image/svg+xml;base64,{b64encode(svg(figure)).decode()}">'


def _training(run: Run, facts: Mapping[str, Any]) -> str:
    file = run.path / "metrics.jsonl"
    try:
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        metric = next(iter(facts.get("metrics") or {"loss": 0}))
        entries = [line for line in lines if isinstance(line, dict)]
        baselines = {name: facts[name] for name in BASELINES if name in facts}
        title = f"Loss and {metric} over the updates of {run.path.name}"
        figure = curve_figure(entries, metric, title, baselines, facts.get("epoch") or 0.0)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return "<p>metrics.jsonl is missing or damaged.</p>"
    return _image(figure, title)


def _answers(run: Run | None) -> str:
    """The answers of the last evaluation, next to the reference answers."""
    samples = run.samples() if run else []
    last = [sample for sample in samples if sample["step"] == samples[-1]["step"]]
    if not last:
        return "<p>None. craft train --eval-generate N generates some at each evaluation.</p>"
    rows = [
        [sample.get(name) for name in ("prompt", "wanted", "answer")] + ["yes" if sample.get("match") else "no"]
        for sample in last
    ]
    matched = sum(bool(sample.get("match")) for sample in last)
    return f"<p>{matched} of {len(last)} match, after update {last[0]['step']:,}.</p>" + _table(
        ["prompt", "reference", "answer", "match"], rows, "texts"
    )


def _confusion(path: str, *, trusted: bool) -> str:
    try:
        result = evaluate(path, use_cpu=True, trust_remote_code=trusted)
    except CraftError as error:
        return f"<p>Not evaluated: {escape(str(error))}</p>"
    return _confusion_table(result)


def _confusion_table(result: Evaluation) -> str:
    metrics = ", ".join(f"{name} {figure(value)}" for name, value in result.metrics.items())
    summary = f"<p>{result.examples:,} examples of {escape(result.data)}: {escape(metrics)}</p>"
    if result.by_label is None:
        return summary + "<p>A regression has no confusion matrix.</p>"
    labels = _table(
        ["label", "precision", "recall", "f1", "support"],
        [
            [
                label,
                *(f"{row[name]:.4f}" if name in row else "" for name in ("precision", "recall", "f1")),
                row["support"],
            ]
            for part in (result.by_label, averages(result.by_label, result.confusion))
            for label, row in part.items()
        ],
    )
    if result.ece is not None:
        labels += f"<p>Expected calibration error: {result.ece:.4f}</p>"
    if result.confusion is None:
        return summary + labels
    note = '<p class="note">Rows: gold labels; columns: predicted labels. Darker: a larger share of the gold label.</p>'
    return summary + note + _confused(result.labels, result.confusion) + "<br>" + labels


def _confused(labels: Sequence[str], matrix: Sequence[Sequence[int]]) -> str:
    head = "".join(f'<th scope="col">{escape(label)}</th>' for label in labels)
    body = "".join(
        f"<tr><td>{escape(label)}</td>{''.join(_shaded(count / (sum(row) or 1), f'{count:,}') for count in row)}</tr>"
        for label, row in zip(labels, matrix, strict=True)
    )
    return f'<table class="heat"><thead><tr><th scope="col">gold, predicted</th>{head}</tr></thead><tbody>{body}</tbody></table>'
