"""Damage base folders, run folders and recipes, and use them: every error must be one line of ours.

    python tests/api/fuzz_folders.py MADE SEED COUNT KIND

MADE holds base models (`bert`, `gpt2`, `llama`, `sharded`), a trained run `run` with checkpoints, and `data`. KIND is `base`,
`run` or `recipe`. Works in the current folder and prints one JSON object: how many uses succeeded and were refused, what
went wrong.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "methods"))
sys.path.insert(0, str(Path(__file__).parent.parent))

import yaml
from conftest import invoke
from fuzz import mutated_bytes, mutated_header, mutated_json

import craft_cli as craft
from craft_cli.api.compare import list_runs
from craft_cli.api.report import write_page
from craft_cli.config import RunConfig, load_recipe
from craft_cli.errors import CraftError
from craft_cli.models.hub import resolve
from craft_cli.models.loading import load_model, load_tokenizer
from craft_cli.training.resume import inherited_settings

ODD_FILES = [b"[" * 100_000, b'{"a":' * 50_000, b"\xff\xfe", b"", b"5", b"{}", b"[]", b'"x"', b"null"]
ODD_LINES = [
    "5",
    "[]",
    "null",
    '"x"',
    '{"step": "x"}',
    '{"step": null}',
    '{"x": 1}',
    "[" * 100_000,
    '{"step": 1e400}',
    "{",
]
ODD_YAML = [
    "[" * 3000, "{" * 3000, "&a [*a]", "a: &a [*a, *a]\nmodel: *a", "? [1,2]\n: 3", "- 1", "5", "", "<<: [1]", "task: [1,2]",
    "model: !!python/object/apply:os.system ['x']", "model: {a: b}", "seed: .nan", "ranks: [[1]]", "targets: {a: 1}", "1: 2",
    "null: 3", "task: 5\nmodel: 2020-01-01", "seed: 1e400", "trust_remote_code: true", "num_train_epochs: -.inf",
]  # fmt: skip
SECONDS = 60


class Slow(Exception):
    """Longer than any use should take."""


def alarm(*_: Any) -> None:
    raise Slow(f"more than {SECONDS} s")


def mutate_json(path: Path, draw: random.Random) -> None:
    how = draw.randrange(8)
    if how == 0:
        path.write_bytes(mutated_bytes(path.read_bytes(), draw))
    elif how == 1:
        path.write_bytes(draw.choice(ODD_FILES))
    else:
        content = json.loads(path.read_text())
        for _ in range(draw.randint(1, 3)):
            if content:
                content = mutated_json(content, draw)
        path.write_text(json.dumps(content))


def mutate_yaml(path: Path, draw: random.Random) -> None:
    how = draw.random()
    if how < 0.3:
        path.write_bytes(mutated_bytes(path.read_bytes(), draw))
    elif how < 0.6:
        path.write_text(draw.choice(ODD_YAML))
    else:
        path.write_text(json.dumps(mutated_json(yaml.safe_load(path.read_text()), draw)))


def mutate(path: Path, draw: random.Random) -> None:
    if path.suffix == ".safetensors":
        change = mutated_bytes if draw.random() < 0.5 else mutated_header
        path.write_bytes(change(path.read_bytes(), draw))
    elif path.suffix == ".yaml":
        mutate_yaml(path, draw)
    elif path.suffix == ".jsonl":
        lines = path.read_text().splitlines()
        at = draw.randrange(len(lines))
        lines[at] = (
            draw.choice(ODD_LINES) if draw.random() < 0.6 else json.dumps(mutated_json(json.loads(lines[at]), draw))
        )
        path.write_text("\n".join(lines) + "\n")
    else:
        mutate_json(path, draw)


def base_uses(made: Path, draw: random.Random) -> tuple[str, dict[str, Callable[[], Any]]]:
    case = Path(shutil.copytree(made / draw.choice(["bert", "gpt2", "llama", "sharded"]), "case"))
    names = ["config.json", "config.json", "tokenizer.json", "tokenizer_config.json"]
    file = draw.choice([*(case / name for name in names), *sorted(case.glob("model*"))])
    mutate(file, draw)

    def load() -> None:
        checkpoint = resolve("case")
        tokenizer = load_tokenizer(checkpoint)
        tokenizer.model_max_length = 20
        model, _ = load_model(checkpoint, "AutoModelForSequenceClassification", {"num_labels": 2})
        craft.attach(model, craft.decompose("case", ranks="4,4,2", cache_dir="cache"))

    def train() -> None:
        given = {"model": "case", "task": "sst2", "data_dir": str(made / "data"), "ranks": "4,4,2", "use_cpu": True,
                 "max_steps": 1, "output_dir": "out", "overwrite": True, "save_strategy": "no"}  # fmt: skip
        craft.train(RunConfig.build(given))

    uses: dict[str, Callable[[], Any]] = {"inspect": lambda: craft.inspect("case"), "load": load}
    return f"{file.name}", uses | ({"train": train} if draw.random() < 0.2 else {})


def run_uses(made: Path, draw: random.Random) -> tuple[str, dict[str, Callable[[], Any]]]:
    case = Path(shutil.copytree(made / "run", "case"))
    names = ["recipe.yaml", "recipe.yaml", "metrics.jsonl", "all_results.json"]
    inside = [path for path in case.glob("checkpoints/*/*") if path.suffix in (".json", ".jsonl", ".safetensors")]
    file = draw.choice([*(case / name for name in names), *sorted(inside)])
    mutate(file, draw)

    def resume() -> None:
        given = {"resume": True, "output_dir": "case", "max_steps": draw.choice([4, 5]), "use_cpu": True}
        craft.train(RunConfig.build(given, {}, inherited_settings(given)))

    return str(file.relative_to(case)), {
        "list": lambda: list_runs(Path()),
        "inspect": lambda: craft.inspect("case"),
        "page": lambda: write_page("case", "page.html", evaluated=False),
        "compare": lambda: craft.compare(["case", made / "run"]),
        "resume": resume,
    }


def recipe_uses(made: Path, draw: random.Random) -> tuple[str, dict[str, Callable[[], Any]]]:
    case = Path(shutil.copy(made / "run" / "recipe.yaml", "case.yaml"))
    mutate(case, draw)

    def build() -> None:
        RunConfig.build({"max_steps": 1}, load_recipe("case.yaml")).recipe()

    def command() -> None:
        done = invoke("train", "--recipe", "case.yaml", "--max-steps", "1", "--dry-run", "--use-cpu")
        if done.exception and not isinstance(done.exception, SystemExit):
            raise done.exception
        if "unexpected" in done.stderr:
            raise AssertionError(done.stderr[:300])

    return "recipe", {"build": build} | ({"command": command} if draw.random() < 0.1 else {})


KINDS = {"base": base_uses, "run": run_uses, "recipe": recipe_uses}


def main() -> None:
    made, seed, count, kind = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    resource.setrlimit(resource.RLIMIT_AS, (12 << 30, 12 << 30))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    signal.signal(signal.SIGALRM, alarm)
    draw, tally, problems, examples = random.Random(seed), Counter[str](), Counter[str](), dict[str, str]()
    for number in range(count):
        shutil.rmtree("case", ignore_errors=True)
        what, uses = KINDS[kind](made, draw)
        for name, use in uses.items():
            signal.alarm(SECONDS)
            try:
                use()
                tally["succeeded"] += 1
            except CraftError as error:
                tally["refused"] += 1
                if not all(letter.isprintable() or letter == "\n" for letter in str(error)) or len(str(error)) > 5000:
                    problems["not one line"] += 1
                    examples.setdefault("not one line", f"{number} {what} {name}: {str(error)[:200]!r}")
            except BaseException as error:
                places = [place for place in traceback.extract_tb(error.__traceback__) if "craft_cli" in place.filename]
                where = f"{Path(places[-1].filename).name}:{places[-1].lineno}" if places else "?"
                key = f"{type(error).__name__} at {where}"
                problems[key] += 1
                examples.setdefault(key, f"{number} {what} {name}: {str(error)[:200]!r}")
            finally:
                signal.alarm(0)
    print(json.dumps({"cases": count, **tally, "problems": dict(problems), "examples": examples}))


if __name__ == "__main__":
    main()
