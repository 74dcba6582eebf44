"""Kill a training again and again, resume it, and compare the end with that of a training that was never cut.

    python tests/training/torture.py --kills 60

Half of the kills (-9) come at a random time, half at a random event: an update's second batch, an optimizer step, a batch of
an evaluation, a file being synced or renamed. A cut run may be cut again, and now and then SIGTERM comes instead. Everything
is drawn from a seed. Exact means: adapter, recipe and metrics.jsonl equal to the byte, and the same summary.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # children are forked
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
warnings.simplefilter("ignore")
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
sys.path.insert(0, str(Path(__file__).parent.parent))

import torch  # noqa: E402
from accelerate import Accelerator  # noqa: E402
from conftest import build_pico, opinions, write_rows  # noqa: E402

from craft_cli.api import train as training  # noqa: E402
from craft_cli.config import RunConfig  # noqa: E402
from craft_cli.tasks import inference  # noqa: E402
from craft_cli.training import checkpoint as training_state  # noqa: E402
from craft_cli.training import run as runs  # noqa: E402

SETTINGS = {
    "model": "../base", "task": "sst2", "data_dir": "../data", "ranks": "6,5,2", "use_cpu": True, "output_dir": "out",
    "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "num_train_epochs": 4, "logging_steps": 1,
    "eval_steps": 4, "save_steps": 3, "per_device_eval_batch_size": 8, "head_learning_rate": 3e-2, "learning_rate": 3e-2,
    "cache_dir": "../factors", "early_stopping_patience": 9,
}  # fmt: skip


class Events:
    """Counts what happens in a child, by kind, and kills it at a certain count."""

    def __init__(self, kill_at: int | None) -> None:
        self.kill_at, self.count, self.kinds = kill_at, 0, Counter[str]()

    def happened(self, kind: str) -> None:
        self.count += 1
        self.kinds[kind] += 1
        if self.count == self.kill_at:
            Path("killed").write_text(kind)
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(self, place: Any, name: str, kind: str) -> None:
        former = getattr(place, name)

        def watched(*arguments: Any, **options: Any) -> Any:
            self.happened(kind)
            return former(*arguments, **options)

        setattr(place, name, watched)


def child(settings: dict[str, Any], kill_at: int | None) -> None:
    events = Events(kill_at)
    events.watch(os, "fsync", "writing a file or folder")
    events.watch(os, "replace", "putting a file in its place")
    events.watch(Path, "rename", "putting a checkpoint or adapter in its place")
    events.watch(shutil, "rmtree", "deleting an old checkpoint")
    events.watch(Accelerator, "backward", "gradient accumulation")
    events.watch(torch.optim.AdamW, "step", "the optimizer step")
    events.watch(inference, "collate", "evaluation")
    training.train(RunConfig.build(settings))
    Path("events").write_text(json.dumps([events.count, events.kinds]))


def forked(work: Callable[[], None], folder: Path, kill: Callable[[int], None] = lambda pid: None) -> int:
    """Run `work` in a child in this folder; its exit code, negative for a signal."""
    folder.mkdir(parents=True, exist_ok=True)
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.chdir(folder)
            work()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        except BaseException:
            Path("error").write_text(traceback.format_exc())
        finally:
            os._exit(code)
    kill(pid)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


def after(seconds: float, number: signal.Signals) -> Callable[[int], None]:
    def kill(pid: int) -> None:
        time.sleep(seconds)
        os.kill(pid, number)  # it may have ended, but nobody has waited for it yet

    return kill


def outcome(folder: Path) -> dict[str, Any]:
    """Everything a training leaves that must not hang on how it came about."""
    out = folder / "out"
    found: dict[str, Any] = {
        path.name: path.read_bytes()
        for path in [*(out / "adapter").iterdir(), out / "metrics.jsonl", out / "recipe.yaml"]
    }
    results = json.loads((out / "all_results.json").read_text())
    del results["seconds"]
    last = training_state.read_checkpoint(training_state.checkpoints(runs.Run(out))[0])
    found |= {"last step": last.step, "last metrics": last.metrics, "journal": last.record["journal"]}
    found |= {f"random numbers of {kind}": state for kind, state in last.record["rng"][0].items()}
    found["optimizer"] = {name: tensor.tolist() for name, tensor in last.optimizer.items()}
    return found | results


def prepare(place: Path) -> None:
    def work() -> None:
        build_pico("bert", Path("base"), hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
        write_rows(Path("data/train.jsonl"), opinions(45, 1))
        write_rows(Path("data/validation.jsonl"), opinions(23, 2))

    assert forked(work, place) == 0


def torture(place: Path, kills: int, seed: int, tell: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """Cut trainings until there were so many kills.

    Returns:
        `kills`, `terms` (SIGTERMs obeyed), `runs`, `exact` (runs that ended as the uncut one) and `where` (kills by event).
    """
    draw = random.Random(seed)
    prepare(place)
    began = time.perf_counter()
    assert forked(lambda: child(SETTINGS, None), place / "uncut") == 0, (place / "uncut/error").read_text()
    lasts = time.perf_counter() - began
    expected = outcome(place / "uncut")
    total = json.loads((place / "uncut/events").read_text())[0]
    result: dict[str, Any] = {"kills": 0, "terms": 0, "runs": 0, "exact": 0, "where": Counter[str]()}
    while result["kills"] < kills:
        folder = place / f"run-{result['runs']}"
        result["runs"] += 1
        resume: dict[str, Any] = {}
        for _ in range(draw.choice([1, 1, 1, 2, 2, 3])):
            way, moment = draw.choice(["event", "event", "event", "time", "time", "term"]), draw.random()
            settings = SETTINGS | resume
            if way == "event":
                at = 1 + int(moment * total)
                code = forked(partial(child, settings, at), folder)
            else:
                number = signal.SIGKILL if way == "time" else signal.SIGTERM
                code = forked(partial(child, settings, None), folder, after(moment * lasts, number))
            resume = {"resume": True}
            if code == -signal.SIGKILL:
                result["kills"] += 1
                note = folder / "killed"
                result["where"][note.read_text() if note.is_file() else "any time"] += 1
                note.unlink(missing_ok=True)
            elif code in (143, -signal.SIGTERM):
                result["terms"] += 1
            elif code == 0:
                break
            else:
                raise SystemExit(f"{folder}: exit {code}\n" + (folder / "error").read_text())
        code = forked(lambda: child(SETTINGS | {"resume": True}, None), folder)
        if code:
            raise SystemExit(f"{folder}: exit {code}\n" + (folder / "error").read_text())
        found = outcome(folder)
        different = [name for name in expected | found if expected.get(name) != found.get(name)]
        leftovers = [str(path) for path in (folder / "out").rglob("*.part")] + list((folder / "out").rglob("*.old"))
        if different or leftovers:
            tell(f"{folder}: different {different}, left over {leftovers}")
        else:
            result["exact"] += 1
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", help="where to work; a temporary folder without")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(options.folder or temporary).resolve()
        result = torture(place, options.kills, options.seed, lambda line: print(line, file=sys.stderr))
    print(json.dumps(result, indent=2))
    raise SystemExit(0 if result["exact"] == result["runs"] else 1)


if __name__ == "__main__":
    main()
