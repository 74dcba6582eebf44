"""How long `craft` takes to start, in fresh processes that take turns.

    python benchmarks/startup.py [--rounds 10] [--small] [--json FILE]

The goal: the help of every command within 0.3 s, and within twice the time of a Typer app that can do nothing; and
`craft inspect` of an adapter without transformers.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import measure
from typer.main import get_command

import craft_cli as craft
from craft_cli.cli import app
from craft_cli.models.loading import quiet_transformers

EMPTY = "empty Typer app --help"
EMPTY_APP = """
import typer

app = typer.Typer()

@app.command()
def main(name: str = "world") -> None:
    "Greet."
    print(name)

app()
"""
HEAVY = ("torch", "transformers", "datasets", "accelerate", "sklearn", "scipy", "pyarrow", "matplotlib")
WATCHED = """
import json, sys
from craft_cli.cli import app
try:
    app(sys.argv[2:], prog_name="craft")
except SystemExit as end:
    assert not end.code
print(json.dumps([name for name in json.loads(sys.argv[1]) if name in sys.modules]), file=sys.stderr)
"""


def main() -> None:
    """Time every command's help, and `craft inspect` of an adapter."""
    given = measure.arguments(__doc__, rounds={"type": int, "default": 10})
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "empty.py").write_text(EMPTY_APP)
        adapter = str(pico_adapter(folder))
        craft_command = ("-m", "craft_cli")
        commands: dict[str, tuple[str, ...]] = {
            "python -c pass": ("-c", "pass"),
            EMPTY: (str(folder / "empty.py"), "--help"),
            "craft --help": (*craft_command, "--help"),
        }
        for command in get_command(app).commands:  # type: ignore[attr-defined]  # it is a group
            commands[f"craft {command} --help"] = (*craft_command, command, "--help")
        if not given.small:
            commands["python -c 'import torch'"] = ("-c", "import torch")
        commands["craft inspect ADAPTER"] = (*craft_command, "inspect", adapter)

        arms = {name: partial(run, *command) for name, command in commands.items()}
        seconds = measure.in_turn(arms, 1 if given.small else given.rounds, warm=0 if given.small else 1)
        imports = json.loads(run("-c", WATCHED, json.dumps(HEAVY), "inspect", adapter, "--json").splitlines()[-1])

    results = {
        name: {"seconds": statistics.median(each), "ratio": measure.ratio(each, seconds[EMPTY])}
        for name, each in seconds.items()
    }
    rows = [[f"`{name}`", f"{row['seconds']:.3f}", f"{row['ratio']:.2f}"] for name, row in results.items()]
    measure.table(["command", "seconds", "x empty Typer app"], rows)
    print(f"\n`craft inspect ADAPTER` imports, of {', '.join(HEAVY)}: {', '.join(imports) or 'none'}")
    measure.write(given.json, {"commands": results, "inspect_imports": imports})


def run(*command: str) -> str:
    """Run python with these arguments to its end; gives what it wrote to stderr. Compiled code is kept, as always."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=True, env=kept)
    return done.stderr


def pico_adapter(folder: Path) -> Path:
    """The folder of an adapter of a BERT of a few thousand random weights."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16)
    model = BertForSequenceClassification(config)
    with quiet_transformers():
        model.save_pretrained(folder / "base")
    factors = craft.decompose(str(folder / "base"), ranks="4,4,2", cache_dir=str(folder / "factors"))
    craft.attach(model, factors).save(folder / "adapter")
    return folder / "adapter"


if __name__ == "__main__":
    main()
