"""`merge.json`: what was merged, and that the result computes what the adapted model does."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from craft_cli import __version__
from craft_cli.errors import CraftError
from craft_cli.files import sha256_of
from craft_cli.methods.as_dense import AdaptedBase, Dense
from craft_cli.methods.as_lora import LoraWriter
from craft_cli.models.cards import public_name

CERTIFICATE = "merge.json"


def verified(actual: Tensor, expected: Tensor, tolerance: float) -> dict[str, float]:
    """The largest difference of logits, absolute, and relative to the largest of them.

    Raises:
        CraftError: it is above the tolerance, or some logits are not finite.
    """
    if not expected.isfinite().all():
        raise CraftError(
            "the adapted model's logits are not finite: check the weights of its base, or train again with a lower "
            "--learning-rate; nothing was written"
        )
    if not actual.isfinite().all():
        raise CraftError(
            "the merged model's logits are not finite: its numbers are too large for the dtype of its weights; "
            "write them with --dtype bfloat16 or float32; nothing was written"
        )
    absolute = float((actual - expected).abs().max())
    relative = absolute / max(float(expected.abs().max()), 1e-12)
    if not relative <= tolerance:
        raise CraftError(
            f"the merged model's logits differ from the adapted one's by {relative:.1e}, more than {tolerance:.0e}; "
            "nothing was written"
        )
    return {"absolute": absolute, "relative": relative}


def certificate(
    adapted: AdaptedBase,
    written: Dense | LoraWriter,
    folder: Path,
    difference: Mapping[str, float],
    allowed: float,
) -> dict[str, Any]:
    """What merge.json says: what was merged, into what, and how exact it is.

    Raises:
        ModelError: the base was replaced meanwhile.
    """
    adapted.check_unchanged()
    frozen = adapted.saved.frozen.sha256()
    return {
        "base": {
            "model": public_name(adapted.checkpoint),
            "revision": adapted.checkpoint.revision,
            "sha256": {file.name: sha256_of(file) for file in adapted.base.reader.weight_files()},
        },
        "adapter": {"sha256": adapted.saved.sha256},
        **({"factors": {"sha256": frozen}} if frozen else {}),
        "dtype": str(written.dtype).removeprefix("torch."),
        "tensors_changed": sorted(written.changed),
        "head": written.head,
        "largest_logit_difference": dict(difference),
        "tolerance": {"relative": allowed},
        "sha256": {file.name: sha256_of(file) for file in sorted(folder.glob("*.safetensors"))},
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Of what has written a folder."""
    import safetensors
    import transformers

    return {
        "craft": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "safetensors": safetensors.__version__,
    }
