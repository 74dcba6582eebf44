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
    """Check this installation and machine, including one real training step and merge."""
    from craft_cli.api.doctor import examine
    from craft_cli.cli import console

    with console.status("examining") as progress:
        findings = examine(progress)
    broken = [finding.name for finding in findings if finding.state == "broken"]
    if json:
        console.print_json({"findings": [asdict(finding) for finding in findings], "broken": len(broken)})
    else:
        _show(findings)
        summary = f"[bold red]{len(broken)} of {len(findings)} broken:[/] {', '.join(broken)}"
        console.out.print(summary if broken else "[bold green]everything works[/]")
    if broken:
        raise SystemExit(1)


def _show(findings: Sequence[Finding]) -> None:
    """Print name, state and finding, wrapped at words on a terminal, one line per finding in a file."""
    from craft_cli.cli import console

    names, states = (max(map(len, texts)) for texts in ([f.name for f in findings], _COLOURS))
    for finding in findings:
        by_check = {f"{finding.name:<{names}}  {finding.state:<{states}}": finding.told}
        lines = console.hanging(by_check, console.out.width if console.out.is_terminal else None)
        lines[0].stylize(_COLOURS[finding.state], names + 2, names + 2 + len(finding.state))
        for line in lines:
            console.out.print(line, soft_wrap=True)
