"""Run a trial: each seed in a separate process, so that a crash affects neither the other runs nor the sweep."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from craft_cli.config import how_to_repeat
from craft_cli.files import write_bytes
from craft_cli.sweeps.plan import Plan
from craft_cli.sweeps.studies import Studies, Taken
from craft_cli.tasks.metrics import lower_is_better
from craft_cli.training.launch import child_environment
from craft_cli.training.resume import comparable
from craft_cli.training.run import Run, checkpoints

TRAIN = (sys.executable, "-m", "craft_cli", "train", "--json")
"""Command of a run."""
RUNS = "runs"
"""Folder of the runs, in the folder of the sweep."""
_LONGEST_REASON = 160


def run_name(trial: str, seed: int) -> str:
    """The folder of a run, in the folder of the runs."""
    return f"{trial}-seed{seed}"


class Work:
    """One trial, from its first seed to its last. Call `poll` until it returns true.

    Args:
        folder: folder of the sweep.
        plan: plan of the sweep.
        studies: studies to report to.
        taken: the trial.
        environment: additional environment variables of its processes.
        flags: flags of its runs that a recipe cannot hold.

    Attributes:
        taken: the trial.
        runs: records of its runs, in the order of the seeds.
        state: `complete`, `pruned` or `failed`; empty before the end, or if it was stopped.
        stopped: whether it was stopped.
    """

    def __init__(
        self,
        folder: Path,
        plan: Plan,
        studies: Studies,
        taken: Taken,
        environment: Mapping[str, str],
        flags: Sequence[str] = (),
    ) -> None:
        self.taken, self.runs, self.state, self.stopped = taken, list[dict[str, Any]](), "", False
        self._folder, self._plan, self._studies, self._flags = folder.resolve(), plan, studies, flags
        self._environment = child_environment() | dict(environment)
        self._process: subprocess.Popen[bytes] | None = None
        self._read, self._pruned, self._logged = 0, False, 0

    @property
    def score(self) -> float | None:
        """Mean over the seeds; None if one is missing."""
        scores = [run["score"] for run in self.runs if run["state"] == "finished"]
        return math.fsum(scores) / len(scores) if len(scores) == len(self._plan.seeds) else None

    @property
    def _seed(self) -> int:
        return self._plan.seeds[len(self.runs)]

    @property
    def _run(self) -> Run:
        return Run(self._folder / RUNS / run_name(self.taken.name, self._seed))

    def poll(self) -> bool:
        """Start, watch or finish the current run; returns whether the trial has ended."""
        if self._process is None:
            if self.state or self.stopped:
                return True
            if self._run.is_running():  # by a worker that only seemed dead, or is just dying
                return False
            if not self._run.results():
                self._start()
                return False
        elif self._process.poll() is None:
            self._watch()
            return False
        return self._ended()

    def repeat(self, runs: Sequence[Mapping[str, Any]]) -> None:
        """Reuse the runs of another trial with the same setting, if there are any."""
        if runs:
            self.runs, self.state = [dict(run) for run in runs], "complete"
            self._studies.runs(self.taken, self.runs)

    def stop(self) -> None:
        """Stop the current run, with a checkpoint."""
        self.stopped = True
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """Kill the current run."""
        self.stopped = True
        self._signal(signal.SIGKILL)
        if self._process:
            self._process.wait()

    def _signal(self, number: signal.Signals) -> None:
        if self._process and self._process.poll() is None:
            self._process.send_signal(number)

    def _start(self) -> None:
        run, name = self._run, run_name(self.taken.name, self._seed)
        recipe = run.path.with_name(f"{name}.yaml")
        write_recipe(recipe, self._plan, self.taken, self._seed)
        again = ["--resume"] if checkpoints(run) else ["--overwrite"] if run.is_ours() else []
        with open(run.path.with_name(f"{name}.log"), "ab") as log:
            self._logged = log.tell()
            self._process = subprocess.Popen(
                [*TRAIN, "--recipe", str(recipe), "--output-dir", f"{RUNS}/{name}", *again, *self._flags],
                cwd=self._folder,  # so that runs/latest is inside the sweep
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log,
                start_new_session=True,  # Ctrl-C reaches only the sweep, which forwards it
            )  # fmt: skip
        self._read = 0

    def _watch(self) -> None:
        """Report the evaluations of the first seed, which decide on pruning."""
        if self._plan.pruner == "none" or self.runs or self._pruned or self.stopped:
            return
        file = self._run.metrics_file
        if not file.is_file() or file.stat().st_size == self._read:
            return
        self._read = file.stat().st_size
        scores = self._evaluations()
        for number, score in enumerate(scores[1:], start=1):  # the initial evaluation is the same for all
            if self._studies.should_prune(self.taken, number, score):
                self._pruned = True
                self._signal(signal.SIGTERM)
                return

    def _evaluations(self) -> list[float]:
        name = f"eval_{self._plan.metric}"
        return [line[name] for line in self._run.metrics() if name in line]

    def _ended(self) -> bool:
        code = self._process.returncode if self._process else 0
        self._process = None
        results = self._run.results()
        if results:
            outcome = self._outcome(results)
        elif self._pruned:
            evaluations = self._evaluations()
            best = min(evaluations) if lower_is_better(self._plan.metric) else max(evaluations)
            outcome = {"state": "pruned", "score": best, "reason": f"pruned after evaluation {len(evaluations) - 1}"}
        elif self.stopped:
            return True
        else:
            log = self._run.path.with_name(f"{self._run.path.name}.log")
            outcome = {"state": "failed", "score": None, "reason": why_failed(log, code, self._logged)}
        self.runs.append({"seed": self._seed, "run": f"{RUNS}/{self._run.path.name}", **outcome})
        self._studies.runs(self.taken, self.runs)
        state = "complete" if outcome["state"] == "finished" else outcome["state"]
        if state == "complete" and len(self.runs) < len(self._plan.seeds):
            return self.stopped
        self.state = state
        return True

    def _outcome(self, results: Mapping[str, Any]) -> dict[str, Any]:
        score = results["metrics"].get(self._plan.metric)
        if score is None or not math.isfinite(score):
            return {"state": "failed", "score": None, "reason": f"its {self._plan.metric} is {score}"}
        kept = ("metrics", "parameters", "epoch", "updates", "seconds")
        return {"state": "finished", "score": score, "reason": ""} | {name: results[name] for name in kept}


def one_step(
    folder: Path, plan: Plan, method: str, setting: Mapping[str, Any], flags: Sequence[str], place: Mapping[str, str]
) -> dict[str, Any]:
    """Estimate trained parameters and seconds of a run with `craft train --dry-run` in a separate process.

    Args:
        folder: folder for its files.
        plan: plan of the sweep.
        method: method of the trial.
        setting: settings of the trial.
        flags: flags of its runs that a recipe cannot hold.
        place: additional environment variables of its process.

    Returns:
        `numbers`, `seconds`, and on failure the `reason`.
    """
    recipe, log = folder / "recipe.yaml", folder / "log"
    recipe.write_text(recipe_text(plan, method, setting, plan.seeds[0], ""), encoding="utf-8")
    with open(log, "wb") as errors:
        done = subprocess.run(
            [*TRAIN, "--recipe", str(recipe), "--dry-run", *flags],
            cwd=folder,
            env=child_environment() | dict(place),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            check=False,
        )
    if done.returncode:
        return {"numbers": None, "seconds": None, "reason": why_failed(log, done.returncode)}
    result = json.loads(done.stdout)
    return {"numbers": result["parameters"]["adapter"], "seconds": result["estimate"], "reason": ""}


def write_recipe(path: Path, plan: Plan, taken: Taken, seed: int) -> None:
    """Write the recipe of a run, with absolute paths."""
    write_bytes(path, recipe_text(plan, taken.method, taken.setting, seed, how_to_repeat(path)).encode())


def recipe_text(plan: Plan, method: str, setting: Mapping[str, Any], seed: int, head: str) -> str:
    """The recipe of a run, with a comment at the top."""
    import yaml

    recipe = plan.run(method, setting, seed).recipe()
    settings = {"num_processes": 1} | {name: comparable(name, value) for name, value in recipe.items()}
    return head + yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)


def why_failed(log: Path, code: int, since: int = 0) -> str:
    """Why a run failed, in a few words: its last error, or how its process ended.

    Args:
        log: log file of the run.
        code: exit code of its process.
        since: offset in the log where this attempt starts.
    """
    text = log.read_bytes()[since:].decode(errors="replace") if log.is_file() else ""
    errors = [line.removeprefix("error: ") for line in text.splitlines() if line.startswith("error: ")]
    if "out of memory" in text.lower().rpartition("error: ")[2] and (errors or code < 0):
        return "out of memory"
    if code == -signal.SIGKILL:
        return "killed (SIGKILL), probably because the system ran out of memory"
    if code < 0:
        return f"killed ({signal.Signals(-code).name})"
    reason = errors[-1] if errors else f"the process exited with code {code}; see {log.name}"
    return reason if len(reason) <= _LONGEST_REASON else f"{reason[:_LONGEST_REASON]}..."
