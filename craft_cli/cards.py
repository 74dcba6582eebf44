"""The model card: README.md of an adapter's folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def model_card(record: Mapping[str, Any], base_model: str, ranks: str, parameters: Mapping[str, int]) -> str:
    """What was trained on what, with which result, and how to use it.

    Args:
        record: the adapter's training record (task, data, epoch, metrics, recipe).
        base_model: hub id, folder or `demo`.
        ranks: OUT,IN,LAYERS.
        parameters: `adapter` and `head`, numbers trained.
    """
    metrics = "\n".join(f"| {name} | {value:.4f} |" for name, value in record["metrics"].items())
    recipe = "\n".join(f"{key}: {value}" for key, value in record["recipe"].items())
    return f"""---
library_name: craft
base_model: {base_model}
tags:
- craft
- text-classification
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
{recipe}
```
"""
