"""The picture of the house, drawn from the imports of `craft_cli`.

python docs/house.py            write docs/house.svg
python docs/house.py --check    exit 1 if the picture is out of date

A room is a file or folder at the top level of the package, or `methods/craft`. An arrow points from a room to a room that
it imports. Arrows that follow from others are omitted: if a imports b and b imports c, a can import c too. A room is on the
first floor below all rooms that import it. Its text is the first clause of its docstring.
"""

from __future__ import annotations

import ast
import itertools
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parent.parent / "craft_cli"
PICTURE = Path(__file__).resolve().parent / "house.svg"

APART = "methods/craft"
"""A folder inside a room that is a separate room."""
DOORS = ("__init__", "__main__")
"""Entry points (`import craft_cli`, `python -m craft_cli`), which are not rooms."""
WINGS = {"models": "weights", "data": "rows"}
"""The topic of a room, from which of these it imports: weights, rows, both, or neither."""

Arrows = Mapping[str, set[str]]
"""The rooms that each room imports."""

Cost = tuple[float, ...]
"""Cost of an order of rooms, most important part first."""


# -- the house, from the imports -------------------------------------------------------------------------------------------


def room_of(parts: Sequence[str]) -> str:
    """The room of a module or name, given its path below the package."""
    apart = APART.split("/")
    return APART if list(parts[: len(apart)]) == apart else parts[0]


def imported(path: Path) -> set[str]:
    """The rooms that a file imports, also inside functions."""
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return {room_of(name.split(".")[1:]) for name in names if name.startswith(f"{PACKAGE.name}.")}


def read_house() -> tuple[dict[str, list[Path]], Arrows]:
    """The files of each room, and the rooms that it imports."""
    files: dict[str, list[Path]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if parts[0] not in DOORS:
            files.setdefault(room_of(parts), []).append(path)
    found = {room: set().union(*map(imported, paths)) for room, paths in files.items()}
    return files, {room: {other for other in found[room] if other in files and other != room} for room in files}


def reached(arrows: Arrows, room: str) -> set[str]:
    """All rooms that a room imports, directly or indirectly."""
    return arrows[room].union(*(reached(arrows, other) for other in arrows[room]))


def without_shortcuts(arrows: Arrows) -> Arrows:
    """The arrows that do not follow from others."""
    return {
        room: others - set().union(*(reached(arrows, other) for other in others)) for room, others in arrows.items()
    }


def floor_of(arrows: Arrows, room: str) -> int:
    """Number of the floor, from the top: length of the longest path to a room."""
    above = [other for other in arrows if room in arrows[other]]
    return max((floor_of(arrows, other) + 1 for other in above), default=0)


def wing_of(arrows: Arrows, room: str) -> str:
    """`weights`, `rows`, `both` or `neither`."""
    found = {WINGS[other] for other in {room} | reached(arrows, room) if other in WINGS}
    return found.pop() if len(found) == 1 else "both" if found else "neither"


def purpose(room: str) -> str:
    """The first clause of a room's docstring."""
    path = PACKAGE / room
    source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    text = ast.get_docstring(ast.parse(source.read_text(encoding="utf-8"))) or ""
    first = " ".join(text.split("\n\n")[0].split())
    return first.split(". ")[0].split("; ")[0].rstrip(".")


# -- the layout ------------------------------------------------------------------------------------------------------------

WIDE, TALL, GAP, BETWEEN, MARGIN, LANE = 240, 88, 54, 32, 24, 10
"""Width and height of a box, space between floors and between boxes, margin, and width of an arrow that passes a floor."""


@dataclass(eq=False)
class Spot:
    """A room, or the position where an arrow passes a floor."""

    floor: int
    room: str = ""
    wing: str = ""
    below: list[Spot] = field(default_factory=list)
    above: list[Spot] = field(default_factory=list)
    x: float = 0.0
    """Horizontal center."""

    @property
    def width(self) -> int:
        """Width of the box or the lane."""
        return WIDE if self.room else LANE

    @property
    def top(self) -> int:
        """Vertical position of the upper edge."""
        return MARGIN + self.floor * (TALL + GAP)


def floors_of(arrows: Arrows) -> list[list[Spot]]:
    """The spots of every floor, in the tidiest order."""
    spots = {room: Spot(floor_of(arrows, room), room, wing_of(arrows, room)) for room in sorted(arrows)}
    floors: list[list[Spot]] = [[] for _ in range(1 + max(spot.floor for spot in spots.values()))]
    for spot in spots.values():
        floors[spot.floor].append(spot)
    for room in sorted(arrows):
        for other in sorted(arrows[room]):
            last, end = spots[room], spots[other]
            for number in range(last.floor + 1, end.floor):
                lane = Spot(number)
                floors[number].append(lane)
                last.below.append(lane)
                lane.above.append(last)
                last = lane
            last.below.append(end)
            end.above.append(last)
    return tidiest(floors)


def tidiest(floors: Sequence[Sequence[Spot]]) -> list[list[Spot]]:
    """The order of all floors with the lowest cost, by dynamic programming over the orders of each floor."""
    ways = [(untidiness([], order), [order]) for order in itertools.permutations(floors[0])]
    for floor in floors[1:]:
        orders = itertools.permutations(floor)
        ways = [
            min(((added(cost, untidiness(way[-1], order)), [*way, order]) for cost, way in ways), key=cost_of)
            for order in orders
        ]
    return [list(order) for order in min(ways, key=cost_of)[1]]


def cost_of(way: tuple[Cost, Any]) -> Cost:
    """Only the cost, so that `min` returns the first of equals."""
    return way[0]


def untidiness(upper: Sequence[Spot], lower: Sequence[Spot]) -> Cost:
    """Cost of the lower floor: rooms of rows left of rooms of weights, crossings above it, horizontal distances."""
    pairs = [(one.wing, other.wing) for one, other in itertools.combinations(lower, 2)]
    middle_of = {id(spot): number - (len(lower) - 1) / 2 for number, spot in enumerate(lower)}
    ends = [
        (number - (len(upper) - 1) / 2, middle_of[id(spot)]) for number, one in enumerate(upper) for spot in one.below
    ]
    crossings = sum((a - c) * (b - d) < 0 for (a, b), (c, d) in itertools.combinations(ends, 2))
    return pairs.count(("rows", "weights")), crossings, sum(abs(a - b) for a, b in ends)


def added(one: Cost, other: Cost) -> Cost:
    """The sum of two costs."""
    return tuple(a + b for a, b in zip(one, other, strict=True))


def place(floors: Sequence[Sequence[Spot]]) -> int:
    """Set `x` of all spots to make the arrows as straight as possible; returns the total width."""
    for turn in range(400):
        for floor in floors if turn % 2 else reversed(floors):
            wanted = [mean([(other.x, 1) for other in (*spot.above, *spot.below)]) for spot in floor]
            for spot, x in zip(floor, apart(floor, wanted), strict=True):
                spot.x = x
    everything = [spot for floor in floors for spot in floor]
    left = min(spot.x - spot.width / 2 for spot in everything) - MARGIN
    for spot in everything:
        spot.x = round(spot.x - left + 1e-6)  # rounds halves the same way everywhere
    width = round(max(spot.x + spot.width / 2 for spot in everything)) + MARGIN
    for (spot,) in itertools.takewhile(lambda floor: len(floor) == 1, floors):
        spot.x = width // 2  # alone at the top
    return width


def apart(floor: Sequence[Spot], wanted: Sequence[float]) -> list[float]:
    """The positions nearest to `wanted` that keep order and distance; neighbours that would be too near share a mean."""
    offsets = [0.0]
    for one, other in itertools.pairwise(floor):
        offsets.append(offsets[-1] + (one.width + other.width) / 2 + BETWEEN)
    blocks: list[list[tuple[float, int]]] = []
    for spot, x, offset in zip(floor, wanted, offsets, strict=True):
        blocks.append([(x - offset, len(spot.above) + len(spot.below))])
        while len(blocks) > 1 and mean(blocks[-2]) > mean(blocks[-1]):
            blocks[-2:] = [blocks[-2] + blocks[-1]]
    bases = [mean(block) for block in blocks for _ in block]
    return [base + offset for base, offset in zip(bases, offsets, strict=True)]


def mean(weighted: Sequence[tuple[float, int]]) -> float:
    """Weighted mean; 0 for an empty list."""
    return sum(x * weight for x, weight in weighted) / max(sum(weight for _, weight in weighted), 1)


# -- the drawing ------------------------------------------------------------------------------------------------------------

INK, SOFT, LINE = "#1a1a1a", "#555555", "#6b6b6b"
FILLS = {"both": "#ffffff", "weights": "#b4cfee", "rows": "#fdeec6", "neither": "#e2e2e2"}
MEANING = {"both": "weights and rows", "weights": "weights", "rows": "rows", "neither": "neither"}


def draw() -> str:
    """The picture as SVG; the same imports give the same text."""
    files, every_arrow = read_house()
    arrows = without_shortcuts(every_arrow)
    floors = floors_of(arrows)
    width = place(floors)
    spots = [spot for floor in floors for spot in floor]
    height = floors[-1][0].top + TALL + MARGIN + 54
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="Helvetica, Arial, Liberation Sans, DejaVu Sans, sans-serif">',
        "<title>The rooms of craft_cli and what they import</title>",
        f'<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0 0.5 L8 4 L0 7.5 z" fill="{LINE}"/></marker></defs>',
        f'<rect width="{width}" height="{height}" rx="8" fill="#ffffff"/>',
    ]
    lines += [way(spot, end) for spot in spots if spot.room for end in spot.below]
    lines += [line for spot in spots if spot.room for line in box(spot, files[spot.room])]
    lines += legend(height - MARGIN - 22)
    return "\n".join([*lines, "</svg>", ""])


def box(spot: Spot, files: Sequence[Path]) -> Iterable[str]:
    """The box of a room: name, number of modules, purpose."""
    left, top = round(spot.x - WIDE / 2), spot.top
    is_folder = (PACKAGE / spot.room).is_dir()
    count = sum(path.name != "__init__.py" for path in files)
    yield (
        f'<rect x="{left}" y="{top}" width="{WIDE}" height="{TALL}" rx="5" fill="{FILLS[spot.wing]}" stroke="{INK}" '
        'stroke-width="1.2"/>'
    )
    name = f"{spot.room}/" if is_folder else f"{spot.room}.py"
    yield label(left + 11, top + 22, 15, INK, name, "font-weight='bold'")
    yield label(left + WIDE - 11, top + 22, 11, SOFT, f"{count} module{'' if count == 1 else 's'}", "text-anchor='end'")
    for row, text in enumerate(textwrap.wrap(purpose(spot.room), 34)):
        yield label(left + 11, top + 42 + 16 * row, 12, INK, text)


def label(x: int, y: int, size: int, colour: str, text: str, more: str = "") -> str:
    """A line of text."""
    extra = f" {more}".replace("'", '"') if more else ""
    return f'<text x="{x}" y="{y}" font-size="{size}" fill="{colour}"{extra}>{escape(text)}</text>'


def way(start: Spot, end: Spot) -> str:
    """An arrow: vertical next to the rooms that it passes, curved between the floors."""
    path, spot = "", start
    x, y = port(start, end, start.below), start.top + TALL
    path = f"M{x} {y}"
    while True:
        goal = port(end, spot, end.above) if end.room else round(end.x)
        down = end.top - (1 if end.room else 0)
        half = (y + down) // 2
        path += f" C{x} {half} {goal} {half} {goal} {down}"
        if end.room:
            return f'<path d="{path}" fill="none" stroke="{LINE}" stroke-width="1.5" marker-end="url(#tip)"/>'
        path += f" V{end.top + TALL}"
        x, y, spot, end = goal, end.top + TALL, end, end.below[0]


def port(spot: Spot, other: Spot, all_of_them: Sequence[Spot]) -> int:
    """Horizontal position where an arrow meets the edge of a room; several arrows are side by side, in order."""
    order = sorted(all_of_them, key=lambda one: one.x)
    step = min(44, (WIDE - 40) / len(order))
    return round(spot.x + (order.index(other) - (len(order) - 1) / 2) * step)


def legend(y: int) -> Iterable[str]:
    """The legend of arrows and colours."""
    yield label(
        MARGIN,
        y,
        12,
        SOFT,
        "An arrow points from a room to a room that it imports. Arrows that follow from others are omitted.",
    )
    yield label(MARGIN, y + 22, 12, SOFT, "A room deals with")
    x = MARGIN + 116
    for wing, meaning in MEANING.items():
        yield f'<rect x="{x}" y="{y + 12}" width="18" height="12" rx="2" fill="{FILLS[wing]}" stroke="{INK}"/>'
        yield label(x + 25, y + 22, 12, SOFT, meaning)
        x += 44 + round(6.8 * len(meaning))


def main() -> int:
    """Write the picture, or check it."""
    drawn = draw()
    if sys.argv[1:] == ["--check"]:
        if PICTURE.is_file() and PICTURE.read_text(encoding="utf-8") == drawn:
            return 0
        print(f"{PICTURE.name} is out of date: run `python docs/house.py`", file=sys.stderr)
        return 1
    PICTURE.write_text(drawn, encoding="utf-8", newline="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
