"""The model card: README.md of an adapter's folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

DEMO_ID = "sentence-transformers/all-MiniLM-L6-v2"
"""Where the demo model comes from."""


def model_card(record: Mapping[str, Any], base_model: str, ranks: str, parameters: Mapping[str, int]) -> str:
    """What was trained on what, with which result, and how to use it.

    Args:
        record: the adapter's training record (task, data, epoch, metrics, recipe).
        base_model: hub id, folder or `demo`.
        ranks: OUT,IN,LAYERS.
        parameters: `adapter` and `head`, numbers trained.
    """
    import yaml

    metadata: dict[str, Any] = {"library_name": "craft", "tags": ["craft", "text-classification"]}
    if not Path(base_model).is_absolute():  # the hub links to ids only
        metadata["base_model"] = DEMO_ID if base_model == "demo" else base_model
    metrics = "\n".join(f"| {name} | {value:.4f} |" for name, value in record["metrics"].items())
    return f"""---
{yaml.safe_dump(metadata, sort_keys=False).strip()}
---

# CRAFT adapter on {base_model}

Task: {record["task"]}. Labels: {", ".join(record["labels"])}.
Trained numbers: {parameters["adapter"]:,} in the transforms (ranks {ranks}, OUT,IN,LAYERS), {parameters["head"]:,} in the head.

| validation | epoch {record["epoch"]:g} |
|---|---|
{metrics}

Method: frozen Tucker factors of the stacked attention weights, one small trained matrix for each mode
(arXiv 2602.17510). The folder holds transforms, factors and head; with the base model that is everything.

    craft eval PATH         # again, on the same data
    craft merge PATH        # a plain Hugging Face checkpoint, for any tool

## Recipe

```yaml
{yaml.safe_dump(record["recipe"], sort_keys=False, allow_unicode=True).strip()}
```
"""
