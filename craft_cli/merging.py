"""Use-case: fold an adapter into its base and write a plain Hugging Face checkpoint."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from craft_cli.checkpoints import Checkpoint
from craft_cli.errors import CraftError, FileError
from craft_cli.files import cannot_write, whole_folder
from craft_cli.models import load_adapted, load_tokenizer, quiet_transformers
from craft_cli.runs import find_adapter, find_run

TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Largest difference allowed between merged and adapted logits, relative to the largest logit. The adapted model is
computed in float32, so the merged one differs by the rounding of its weights to the base's dtype."""

_PROBE = (
    "A short sentence.",
    "An opinion that takes its time, turns round once or twice, and in the end says very little at all.",
    '42 numbers, (brackets) and "quotes": 100 % of it!',
    "Not bad.",
)


@dataclass(frozen=True)
class Merged:
    """What `merge` wrote.

    Attributes:
        output: the folder.
        files: names of its files.
        dtype: of the weights, that of the base.
        tensors_changed: weights that differ from the base's.
        difference: largest difference between merged and adapted logits, relative to the largest logit.
        tolerance: what was allowed.
    """

    output: str
    files: tuple[str, ...]
    dtype: str
    tensors_changed: int
    difference: float
    tolerance: float


def merge(
    path: str | Path | None = None,
    output: str | Path | None = None,
    *,
    overwrite: bool = False,
    progress: Callable[[str], None] = lambda what: None,
) -> Merged:
    """Merge a run's or an adapter's change into the dense weights of its base.

    The result holds weights in the base's dtype, the trained head, the label names and the base's tokenizer files byte
    for byte. It is loaded again with plain transformers and compared with the adapted model before it takes its place.

    Args:
        path: a run or an adapter; the latest run without.
        output: the folder to write; `merged` inside the run, or beside the adapter, without.
        overwrite: replace a folder that is not empty.
        progress: called with what is being done.

    Raises:
        FileError: no adapter there, it is damaged, or the output cannot be written.
        ModelError: its base is missing or another one.
        CraftError: the adapter changes no weight, or the merged model does not compute what the adapted one does.
    """
    found = find_run(None if path is None else str(path))
    adapter_path = find_adapter(found)
    if adapter_path is None:
        raise FileError(f"{found} is neither a run nor an adapter: there is nothing to merge")
    destination = Path(output).expanduser() if output else adapter_path.parent / "merged"

    with whole_folder(destination, overwrite=overwrite) as folder:
        progress("loading base and adapter")
        model, adapter, checkpoint = load_adapted(adapter_path)
        probe = _probe_batch(checkpoint)
        expected = _logits(model, probe)
        dtype = getattr(torch, adapter.factors.dtype)
        if dtype != torch.float32:
            model, adapter, _ = load_adapted(adapter_path, dtype)

        progress("merging")
        try:
            changed = adapter.merge()
        except ValueError as error:
            raise CraftError(f"{adapter_path}: {error}") from error
        _write(model, checkpoint, folder)

        progress("verifying with plain transformers")
        difference = _difference(folder, type(model), probe, expected)
        if not difference <= TOLERANCE[dtype]:
            raise CraftError(
                f"the merged model's logits differ from the adapted one's by {difference:.1e}, more than "
                f"{TOLERANCE[dtype]:.0e}; nothing was written"
            )
        files = tuple(sorted(file.name for file in folder.iterdir()))
    return Merged(str(destination), files, adapter.factors.dtype, len(changed), difference, TOLERANCE[dtype])


def _write(model: Any, checkpoint: Checkpoint, folder: Path) -> None:
    from safetensors import SafetensorError

    try:
        with quiet_transformers():
            model.save_pretrained(folder)
        for file in checkpoint.tokenizer_files():
            shutil.copyfile(file, folder / file.name)
    except (OSError, SafetensorError) as error:
        raise cannot_write(folder, error) from error


def _difference(folder: Path, architecture: Any, probe: dict[str, Tensor], expected: Tensor) -> float:
    """Load the folder as anyone would, strictly, and compare its logits."""
    with quiet_transformers():
        plain, report = architecture.from_pretrained(folder, output_loading_info=True)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[kind]:
            raise CraftError(f"the merged checkpoint has {kind.replace('_', ' ')}: {report[kind]}; please report this")
    actual = _logits(plain.float(), probe)
    return float((actual - expected).abs().max() / expected.abs().max().clamp(min=1e-12))


def _probe_batch(checkpoint: Checkpoint) -> dict[str, Tensor]:
    tokenizer = load_tokenizer(checkpoint)
    limit = min(tokenizer.model_max_length, 64)
    return dict(tokenizer(list(_PROBE), padding=True, truncation=True, max_length=limit, return_tensors="pt"))


@torch.no_grad()
def _logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    return model.eval()(**batch).logits.float()
