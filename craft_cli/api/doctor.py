"""Check the installation and the machine, from versions to one real training step and merge.

It is meant for broken installations. Heavy imports happen inside the check they concern, and an exception becomes that
check's finding, so that the other checks still run.
"""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import re
import shutil
import tempfile
import textwrap
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from craft_cli import __version__
from craft_cli.api.pico import save_pico, save_rows
from craft_cli.config import RunConfig
from craft_cli.errors import CraftError, below_home
from craft_cli.installation import DISTRIBUTION, collision

State = Literal["ok", "note", "broken"]

SHOWN = ("transformers", "accelerate", "datasets", "safetensors", "huggingface-hub")
OPTIONAL = ("tensorboard", "wandb", "mlflow", "bitsandbytes", "peft", "optuna", "gguf")
HUB_SECONDS = 3.0
"""Timeout in seconds for the Hub, including name resolution."""
LITTLE_SPACE = 10**9
"""Free bytes below which a cache gets a note."""

_COUNTING_SECONDS = 3.0


@dataclass(frozen=True)
class Finding:
    """The finding of a check.

    Attributes:
        name: name of the check.
        state: `ok`, `note` (works, with a remark) or `broken`.
        told: the finding, in one line.
    """

    name: str
    state: State
    told: str


Check = Callable[[], tuple[State, str]]


def examine(progress: Callable[[str], None] = lambda what: None) -> list[Finding]:
    """Check this installation and machine, without leaving files behind.

    Args:
        progress: called with the name of each check before it runs.

    Returns:
        The findings, in reading order.
    """
    checks: dict[str, Check] = {
        "craft": _craft,
        "torch": _torch,
        "packages": _packages,
        "optional": _optional,
        "devices": _devices,
        "precision": _precision,
        "demo models": _demos,
        "processes": _processes,
        "hub": _hub,
        "factor cache": _factor_cache,
        "hub cache": _hub_cache,
    }
    with _quiet():
        found = [_finding(name, check, progress) for name, check in checks.items()]
        try:
            scratch = tempfile.TemporaryDirectory(prefix="craft-doctor-", ignore_cleanup_errors=True)
        except OSError as error:
            return [*found, Finding("training", "broken", f"cannot create a temporary folder: {_reason(error)}")]
        with scratch as name:
            folder = Path(name)
            found.append(_finding("training", partial(_training, folder), progress))
            found.append(_finding("merge", partial(_merge, folder), progress))
    return found


def _finding(name: str, check: Check, progress: Callable[[str], None]) -> Finding:
    progress(f"checking: {name}")
    try:
        return Finding(name, *check())
    except Exception as error:
        return Finding(name, "broken", _reason(error))


def _reason(error: Exception) -> str:
    """An exception in one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror + (f": {error.filename}" if error.filename else "")
    message = " ".join(str(error).split())
    if isinstance(error, CraftError):
        return message
    return textwrap.shorten(
        f"{type(error).__name__}: {message}" if message else type(error).__name__, 240, placeholder=" ..."
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence library warnings; the checks report what matters in them."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


# -- versions -----------------------------------------------------------------------------------------------------------


def _craft() -> tuple[State, str]:
    summary = f"{__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    reason = collision()
    return ("note", f"{summary}; {reason}") if reason else ("ok", summary)


def _torch() -> tuple[State, str]:
    import torch

    hip, cuda = torch.version.hip, torch.version.cuda
    return "ok", f"{torch.__version__}, built for {f'ROCm {hip}' if hip else f'CUDA {cuda}' if cuda else 'the CPU'}"


def _packages() -> tuple[State, str]:
    """Versions of the main libraries; all requirements are compared with the ranges in craft's metadata."""
    from packaging.requirements import Requirement

    versions = ", ".join(f"{name} {found}" for name in SHOWN if (found := _version(name)))
    try:
        required = [Requirement(line) for line in metadata.requires(DISTRIBUTION) or []]
    except metadata.PackageNotFoundError:
        return "note", f"{versions}; {DISTRIBUTION} is not installed, so its requirements were not checked"
    wrong = []
    for requirement in required:
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        found = _version(requirement.name)
        if found is None or not requirement.specifier.contains(found, prereleases=True):
            wrong.append((requirement, found or "missing"))
    if wrong:
        mismatches = ", ".join(f"{requirement.name} is {found}" for requirement, found in wrong)
        return "broken", f"{mismatches}: pip install {' '.join(repr(str(requirement)) for requirement, _ in wrong)}"
    return "ok", versions


def _optional() -> tuple[State, str]:
    versions = {name: _version(name) for name in OPTIONAL}
    there = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    missing = ", ".join(name for name, version in versions.items() if not version)
    return "ok", "; ".join(part for part in (there, missing and f"not installed: {missing}") if part)


def _demos() -> tuple[State, str]:
    from craft_cli.models.demo import demos_at_hand

    return "ok", "; ".join(f"{name}: {told}" for name, told in demos_at_hand().items())


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


# -- the machine --------------------------------------------------------------------------------------------------------


def _devices() -> tuple[State, str]:
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parts = [f"{cores} CPU core{'s' if cores > 1 else ''}"]
    with contextlib.suppress(AttributeError, OSError, ValueError):  # not on every system
        parts[0] += f" with {os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB"
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    for number in range(torch.cuda.device_count() if available else 0):
        gpu = torch.cuda.get_device_properties(number)
        parts.append(f"GPU {number}: {gpu.name} with {gpu.total_memory / 2**30:.0f} GiB")
    if torch.backends.mps.is_available():
        parts.append("MPS, which craft does not use")
    if available or not (torch.version.hip or torch.version.cuda):
        return "ok", "; ".join([*parts, *([] if available else ["no GPU"])])
    why = f" ({_first_sentence(str(said[0].message))})" if said else ""
    return "note", "; ".join([*parts, f"no GPU that this torch build can use{why}"])


def _precision() -> tuple[State, str]:
    """Whether `--bf16`, `--fp16` and quantized bases work here, by computing products."""
    import torch

    gpu = torch.cuda.is_available()
    for dtype in (torch.bfloat16, torch.float16) if gpu else (torch.bfloat16,):
        _multiply(dtype, "cuda" if gpu else "cpu")
    emulated = gpu and not torch.cuda.is_bf16_supported(including_emulation=False)
    quantised = gpu and torch.version.cuda and _version("bitsandbytes")
    usable = ["float32", "bf16 (emulated, so slow)" if emulated else "bf16"]
    usable += ["fp16"] * gpu + ["8 and 4 bit"] * bool(quantised)
    missing = [] if gpu else ["fp16 requires a GPU"]
    missing += [] if quantised else ["8 and 4 bit require CUDA and bitsandbytes"]
    return "ok", "; ".join([", ".join(usable), *missing])


def _multiply(dtype: Any, device: str) -> None:
    """Compute a small product under autocast, and check its dtype and value."""
    import torch

    left = torch.arange(64.0, device=device).reshape(8, 8) / 64  # (8, 8), exact in either dtype
    with torch.autocast(device, dtype=dtype):
        product = left @ torch.eye(8, device=device)
    if product.dtype != dtype or not torch.equal(product.float(), left):
        raise CraftError(f"a product in {dtype} on {device} is wrong")


def _processes() -> tuple[State, str]:
    import torch
    from torch import distributed

    if not distributed.is_available():
        return "note", "this torch has no torch.distributed, so --num-processes is limited to 1"
    backends = {"gloo": distributed.is_gloo_available(), "nccl": distributed.is_nccl_available()}
    summary = "torch.distributed with " + (
        " and ".join(name for name, there in backends.items() if there) or "no backend"
    )
    if torch.cuda.device_count() > 1 and not backends["nccl"]:
        return "note", f"{summary}: training on several GPUs requires nccl"
    return ("ok" if any(backends.values()) else "note"), summary


# -- hub and caches -----------------------------------------------------------------------------------------------------


def _hub() -> tuple[State, str]:
    """Whether the Hub answers a request without a token."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        return "note", "offline mode is on (HF_HUB_OFFLINE): cached and local models only"
    split = urlsplit(constants.ENDPOINT)
    shown = f"{split.scheme}://{split.netloc.rpartition('@')[2]}"  # without credentials before the @
    answer: list[Any] = []

    def ask() -> None:
        try:
            began = time.perf_counter()
            status = get_session().head(constants.ENDPOINT, timeout=HUB_SECONDS).status_code
            answer.extend([status, time.perf_counter() - began])
        except Exception as error:
            answer.append(error)

    asking = threading.Thread(target=ask, daemon=True)  # the client's timeout does not cover name resolution
    asking.start()
    asking.join(HUB_SECONDS)
    if answer and not isinstance(answer[0], Exception):
        status, seconds = answer
        if status < 500 and status not in (403, 407):  # these two come from a proxy
            return "ok", f"{shown} answers in {1000 * seconds:.0f} ms"
        reason = f"it answers with HTTP status {status}"
    elif answer and "timeout" not in type(answer[0]).__name__.lower():
        reason = type(answer[0]).__name__ if split.username else _first_sentence(str(answer[0]) or repr(answer[0]))
    else:
        reason = f"no answer in {HUB_SECONDS:g} s"
    return "note", f"{shown} cannot be reached ({reason}): cached and local models only"


def _factor_cache() -> tuple[State, str]:
    from craft_cli.files import cache_folder

    return _cache(cache_folder(), "set XDG_CACHE_HOME or pass --cache-dir")


def _hub_cache() -> tuple[State, str]:
    from huggingface_hub import constants

    return _cache(Path(constants.HF_HUB_CACHE), "set HF_HOME or HF_HUB_CACHE")


def _cache(folder: Path, remedy: str) -> tuple[State, str]:
    """Whether a cache folder can be written, or created if it does not exist."""
    shown = below_home(folder)
    place = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    try:
        with tempfile.NamedTemporaryFile(dir=place, prefix=".craft-doctor-") as file:
            file.write(bytes(4096))
            file.flush()
            os.fsync(file.fileno())
        free = shutil.disk_usage(place).free
    except OSError as error:
        return "broken", f"{shown} cannot be written ({error.strerror}): {remedy}"
    used, complete = _used(folder) if place == folder else (0, True)
    summary = f"{shown}: {'' if complete else 'more than '}{_size(used)} used, {_size(free)} free"
    return ("note", f"{summary}, which is low") if free < LITTLE_SPACE else ("ok", summary)


def _used(folder: Path) -> tuple[int, bool]:
    """Total bytes of the files in a folder, and whether all were counted in time."""
    total, until = 0, time.monotonic() + _COUNTING_SECONDS
    for parent, _, files in os.walk(folder):
        for file in files:
            with contextlib.suppress(OSError):  # deleted in the meantime
                total += os.lstat(os.path.join(parent, file)).st_size
        if time.monotonic() > until:
            return total, False
    return total, True


# -- one training step and merge ----------------------------------------------------------------------------------------


def _training(folder: Path) -> tuple[State, str]:
    """Train a pico model for one update and evaluation, as `craft train` does, with all its files in `folder`."""
    import torch

    from craft_cli.api.train import train
    from craft_cli.models.loading import quiet_transformers

    with quiet_transformers():
        save_pico(folder / "model")
    save_rows(folder / "train.jsonl", 8)
    save_rows(folder / "validation.jsonl", 4)
    config = RunConfig.build({
        "model": str(folder / "model"), "data_dir": str(folder), "cache_dir": str(folder / "cache"),
        "output_dir": str(folder / "run"), "ranks": "4,4,2", "learning_rate": 0.1, "max_steps": 1,
        "per_device_train_batch_size": 8,
    })  # fmt: skip
    began = time.perf_counter()
    result = train(config, runs=folder / "runs")
    assert result.updates == 1
    seconds = time.perf_counter() - began
    device = "GPU" if torch.cuda.is_available() else "CPU"
    return "ok", f"one update and evaluation of a pico BERT on the {device}, {seconds:.1f} s"


def _merge(folder: Path) -> tuple[State, str]:
    """Merge the run of `_training`, as `craft merge` does."""
    updated = folder / "run" / "checkpoints" / "step-1"
    if not updated.is_dir():
        return "note", "skipped: there is no run to merge"
    from craft_cli.api.merge import merge

    merged = merge(updated)
    return "ok", f"logits differ by {merged.difference:.1e} of the largest (allowed {merged.tolerance:.0e})"


def _size(count: float) -> str:
    """Format a number of bytes for reading."""
    units = ["bytes", "kB", "MB", "GB", "TB"]
    while count >= 999.5 and len(units) > 1:
        count /= 1000
        units.pop(0)
    return f"{count:.0f} {units[0]}" if count >= 99.5 or units[0] == "bytes" else f"{count:.2g} {units[0]}"


def _first_sentence(text: str) -> str:
    """The first sentence of a long message."""
    return re.sub(r"^\[Errno -?\d+\] ", "", " ".join(text.split()).split(". ")[0].rstrip("."))
