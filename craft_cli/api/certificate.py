"""`merge.json`: the record of a merge, and the check that the result computes the same as the adapted model."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from craft_cli import __version__
from craft_cli.errors import CraftError
from craft_cli.files import sha256_of
from craft_cli.methods.as_dense import AdaptedBase, Dense
from craft_cli.methods.as_gguf import GgufWriter
from craft_cli.methods.as_lora import LoraWriter
from craft_cli.models.cards import public_name

CERTIFICATE = "merge.json"
_LONGEST = 64


WRITTEN = 4
"""Tokens of a greedy continuation; each requires a forward with weights read from disk."""


@dataclass(frozen=True)
class Probe:
    """A few texts with the logits of the adapted model.

    Attributes:
        batch: model inputs; for a language model they include its greedy continuations.
        expected: the adapted model's logits, float32.
        asked: for a language model, the rows of the logits that choose a token of the continuation.
        tokens: the tokens chosen there.
    """

    batch: Mapping[str, Tensor]
    expected: Tensor
    asked: Tensor | None = None
    tokens: Tensor | None = None


@dataclass(frozen=True)
class Difference:
    """The difference between a merged model and the adapted one.

    Attributes:
        absolute: the largest difference of the logits.
        relative: the same, relative to the largest logit.
        greedy: for a language model, the number of equal greedy tokens, and the total.
    """

    absolute: float
    relative: float
    greedy: tuple[int, int] | None = None


def continued(adapted: AdaptedBase) -> Probe:
    """The texts to compare merged and adapted model on; a language model continues each by `WRITTEN` tokens.

    The merged model then needs a single forward, because with the same preceding tokens it chooses as in greedy decoding.
    """
    base, batch = adapted.base, adapted.base.probe
    if not base.model.can_generate() or base.model.config.is_encoder_decoder:
        return Probe(batch, adapted.logits(batch))
    kept = max(base.tables.limit(_LONGEST) - WRITTEN + 1, 1)
    rows = [ids[mask.bool()][:kept] for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    written: list[Tensor] = []
    while True:
        batch = {
            "input_ids": pad_sequence(rows, batch_first=True),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in rows], batch_first=True),
        }
        expected = adapted.logits(batch)  # (tokens of all rows, vocabulary)
        ends = torch.tensor([len(row) for row in rows]).cumsum(0)
        written.append(expected[ends - 1].argmax(dim=-1))
        if len(written) == WRITTEN:
            asked = (ends[:, None] - torch.arange(WRITTEN, 0, -1)).flatten()
            return Probe(batch, expected, asked, torch.stack(written, dim=1).flatten())
        rows = [torch.cat([row, token[None]]) for row, token in zip(rows, written[-1], strict=True)]


def verified(actual: Tensor, probe: Probe, tolerance: float) -> Difference:
    """Compare the merged model's logits with those of the adapted one.

    Raises:
        CraftError: the difference exceeds the tolerance, or some logits are not finite.
    """
    expected = probe.expected
    if not expected.isfinite().all():
        raise CraftError(
            "the adapted model's logits are not finite: check the weights of its base, or train with a lower "
            "--learning-rate; nothing was written"
        )
    if not actual.isfinite().all():
        raise CraftError(
            "the merged model's logits are not finite: its weights are too large for their dtype; "
            "write them with --dtype bfloat16 or float32; nothing was written"
        )
    absolute = float((actual - expected).abs().max())
    relative = absolute / max(float(expected.abs().max()), 1e-12)
    if not relative <= tolerance:
        raise CraftError(
            f"the merged model's logits differ from the adapted one's by {relative:.1e}, more than {tolerance:.0e}; "
            "nothing was written"
        )
    if probe.asked is None or probe.tokens is None:
        return Difference(absolute, relative)
    alike = int((actual[probe.asked].argmax(dim=-1) == probe.tokens).sum())
    return Difference(absolute, relative, (alike, len(probe.tokens)))


def certificate(
    adapted: AdaptedBase,
    written: Dense | LoraWriter | GgufWriter,
    folder: Path,
    difference: Difference,
    allowed: float,
) -> dict[str, Any]:
    """The contents of merge.json: the adapter, the base, and the measured difference.

    Raises:
        ModelError: the base was replaced during the merge.
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
        "largest_logit_difference": {"absolute": difference.absolute, "relative": difference.relative},
        "tolerance": {"relative": allowed},
        **(
            {"greedy_tokens": dict(zip(("alike", "compared"), difference.greedy, strict=True))}
            if difference.greedy
            else {}
        ),
        "sha256": {file.name: sha256_of(file) for file in _tensors(folder)},
        "versions": versions(),
    }


def _tensors(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".gguf"))


def versions() -> dict[str, str]:
    """Versions of the libraries that wrote a folder."""
    import safetensors
    import transformers

    return {
        "craft": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "safetensors": safetensors.__version__,
    }
