"""Rows of a .json file in its common layouts: a list, a list under a key, columns, or JSON lines."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from craft_cli.data.cells import Row
from craft_cli.errors import DataError


def objects(lines: Iterable[tuple[int, str]], origin: str) -> Iterator[Row]:
    """Read JSON lines; empty lines are skipped.

    Raises:
        DataError: a line is not a JSON object.
    """
    for number, text in lines:
        if text.strip():
            try:
                cells = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{origin}, line {number}: not JSON ({error})") from error
            if not isinstance(cells, dict):
                raise DataError(f"{origin}, line {number}: expected one JSON object per line")
            yield Row(f"line {number}", cells)


def rows(lines: Iterable[tuple[int, str]], origin: str) -> Iterator[Row]:
    """Read a file that is one JSON value, or JSON lines.

    Raises:
        DataError: the layout is not supported.
    """
    held = list(lines)
    try:
        content = json.loads("".join(line for _, line in held))
    except (ValueError, RecursionError) as error:
        if _is_object(held):
            yield from objects(held, origin)
            return
        raise DataError(f"{origin}: not JSON ({error})") from error
    for number, cells in enumerate(_listed(content, origin), start=1):
        if not isinstance(cells, dict):
            raise DataError(f"{origin}, row {number}: expected a JSON object")
        yield Row(f"row {number}", cells)


def _is_object(lines: list[tuple[int, str]]) -> bool:
    """Whether the first line is a complete JSON object."""
    first = next((text for _, text in lines if text.strip()), "")
    try:
        return isinstance(json.loads(first), dict)
    except (ValueError, RecursionError):
        return False


def _listed(content: Any, origin: str) -> Iterable[Any]:
    if isinstance(content, list):
        return content
    if not isinstance(content, dict) or not content:
        raise DataError(f"{origin}: expected a JSON list of objects")
    if isinstance(content.get("columns"), list) and isinstance(content.get("data"), list):  # pandas, orient="split"
        return _of_split(list(map(str, content["columns"])), content["data"], origin)
    below = {name: value for name, value in content.items() if _are_objects(value)}
    if len(below) > 1:
        raise DataError(f"{origin}: rows under {' and '.join(map(repr, below))}; write each list to its own file")
    if below:
        return next(iter(below.values()))  # {"data": [...]}
    if all(isinstance(value, list) for value in content.values()):
        return _across(content, origin)
    if all(isinstance(value, dict) for value in content.values()):
        return _of_pandas(content, origin)
    return [content]  # one object


def _are_objects(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(part, dict) for part in value)


def _of_split(columns: list[str], data: list[Any], origin: str) -> list[dict[str, Any]]:
    for number, cells in enumerate(data, start=1):
        if not isinstance(cells, list) or len(cells) != len(columns):
            cells_of = "cell" if len(columns) == 1 else "cells"
            raise DataError(f"{origin}, row {number}: expected a list of {len(columns):,} {cells_of}, one per column")
    return [dict(zip(columns, cells, strict=True)) for cells in data]


def _across(columns: Mapping[str, list[Any]], origin: str) -> list[dict[str, Any]]:
    """`{"text": [...], "label": [...]}`."""
    lengths = {name: len(values) for name, values in columns.items()}
    if len(set(lengths.values())) > 1:
        lengths_of = ", ".join(f"'{name}' {length:,}" for name, length in lengths.items())
        raise DataError(f"{origin}: columns of different lengths ({lengths_of})")
    return [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]


def _of_pandas(content: Mapping[str, Mapping[str, Any]], origin: str) -> list[dict[str, Any]]:
    """Read the output of `DataFrame.to_json`: columns by row, or rows by column (`orient="index"`)."""
    if all(name.isdecimal() for name in content):
        return [dict(cells) for cells in content.values()]
    places = list(next(iter(content.values())))
    if not all(list(cells) == places and all(map(str.isdecimal, cells)) for cells in content.values()):
        raise DataError(f"{origin}: expected a JSON list of objects, not objects by name")
    return [{name: cells[place] for name, cells in content.items()} for place in places]
