"""`craft doctor`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from craft_cli.cli.options import JsonFlag, asks_hub, reports_errors

if TYPE_CHECKING:
    from craft_cli.api.doctor import Finding

_COLOURS = {"ok": "green", "note": "yellow", "broken": "bold red"}


@reports_errors
@asks_hub
def command(json: JsonFlag = False) -> None:
    """Examine this installation and machine, down to one real training step and merge."""
    from craft_cli.api.doctor import examine
    from craft_cli.cli import console

    with console.status("examining") as progress:
        findings = examine(progress)
    broken = [finding.name for finding in findings if finding.state == "broken"]
    if json:
        console.print_json({"findings": [asdict(finding) for finding in findings], "broken": len(broken)})
    else:
        _show(findings)
        told = f"[bold red]{len(broken)} of {len(findings)} broken:[/] {', '.join(broken)}"
        console.out.print(told if broken else "[bold green]everything works[/]")
    if broken:
        raise SystemExit(1)


def _show(findings: Sequence[Finding]) -> None:
    """Name, state and what was found; on a terminal wrapped between words, elsewhere a line each."""
    from craft_cli.cli import console

    names, states = (max(map(len, texts)) for texts in ([f.name for f in findings], _COLOURS))
    for finding in findings:
        told = {f"{finding.name:<{names}}  {finding.state:<{states}}": finding.told}
        lines = console.hanging(told, console.out.width if console.out.is_terminal else None)
        lines[0].stylize(_COLOURS[finding.state], names + 2, names + 2 + len(finding.state))
        for line in lines:
            console.out.print(line, soft_wrap=True)
