"""HTML of adapters and factors for notebooks: a table with sizes, and a small plot of every mode's spectrum."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from craft_cli.methods.frozen import Frozen
    from craft_cli.methods.model_adapter import ModelAdapter

_WIDTH, _HEIGHT = 120, 32
_NUMBER = ' style="text-align: right"'


def adapter_html(adapter: ModelAdapter) -> str:
    """The adapted model, and the number and size of the trained parameters."""
    settings = {"targets": list(adapter.frozen.targets)} | adapter.method.settings(adapter.frozen, adapter.options)
    trained = adapter.change_state()
    facts = {name: adapter.method.facts(adapter.frozen, settings, trained, name) for name in adapter.frozen.targets}
    every = sum(parameter.numel() for parameter in adapter.model.parameters())
    numbers, head = adapter.count_parameters(), adapter.count_head_parameters()
    size = sum(parameter.numel() * parameter.element_size() for parameter in adapter.parameters())
    description = adapter.description
    sentences = [
        f"<b>{escape(description.title)}</b>, {escape(description.settings)}, on {escape(adapter.frozen.model)} "
        f"({escape(adapter.architecture)}).",
        f"Trained: {numbers:,} parameters in the adapter ({size / 1024:,.0f} KiB) and {head:,} in the head, "
        f"{100 * (numbers + head) / every:.3g} % of {every:,}.",
    ]
    if len(adapter.names) > 1:
        sentences.append(f"Active: {escape(adapter.active)}, of {escape(', '.join(adapter.names))}.")
    return _page(" ".join(sentences), adapter.frozen, facts)


def factors_html(factors: Frozen) -> str:
    """The decomposed projections, and the energy kept in each mode."""
    return _page(f"<b>Factors</b> of {escape(factors.model)}, {escape(factors.dtype)}.", factors, {})


def _page(sentence: str, frozen: Frozen, facts: Mapping[str, Mapping[str, Any]]) -> str:
    modes = list(frozen.spectra(frozen.targets[0]))
    titles = ["projection", "L x out x in", *(["parameters"] if facts else []), *modes]
    rows = []
    for name, shape in frozen.shapes.items():
        cells = [f"<td>{escape(name)}</td>", f"<td>{' x '.join(map(str, shape))}</td>"]
        if facts:
            cells.append(f"<td{_NUMBER}>{facts[name]['parameters']:,}</td>")
        cells += [f"<td>{_spectrum(*frozen.spectra(name)[mode])}</td>" for mode in modes]
        rows.append(f"<tr>{''.join(cells)}</tr>")
    head = "".join(f"<th>{escape(title)}</th>" for title in titles)
    note = "<p>Singular values, the largest on the left. The kept ones are filled, with their share of the energy.</p>"
    return f"<div><p>{sentence}</p><table><tr>{head}</tr>{''.join(rows)}</table>{note if modes else ''}</div>"


def _spectrum(values: Tensor, kept: int) -> str:
    """An SVG area plot of the singular values, with the kept part filled."""
    values = values.double().cpu()
    squares = values.square()
    share = float(squares[:kept].sum() / squares.sum()) if squares.any() else 1.0
    heights = (values / values.max().clamp_min(1e-300)).tolist()
    step = _WIDTH / len(heights)

    def area(count: int) -> str:
        places = range(0, count, max(1, len(heights) // _WIDTH))
        points = [f"{place * step:.1f},{_HEIGHT * (1 - heights[place]):.1f}" for place in places]
        return f"0,{_HEIGHT} {' '.join(points)} {count * step:.1f},{_HEIGHT}"

    return (
        f'<svg width="{_WIDTH}" height="{_HEIGHT}" role="img" aria-label="{kept} of {len(heights)} singular values">'
        f'<polygon points="{area(len(heights))}" fill="none" stroke="gray"/>'
        f'<polygon points="{area(kept)}" fill="currentColor" opacity="0.6"/></svg>'
        f"<br>{kept} of {len(heights)}: {share:.1%}"
    )
