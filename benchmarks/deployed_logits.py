"""For each supported family: the logits of the adapted model against the merged one and the LoRA, by the tools themselves.

    python benchmarks/deployed_logits.py [--ranks 24,24,4] [--json FILE]

A small model of every family is made with random weights, adapted with random transforms on query, key, value and output,
and exported. The merged folder is loaded with plain transformers, the LoRA with peft (attached, and merged by
`merge_and_unload(safe_merge=True)`). Prints the largest difference of any logit, beside the largest logit and the change
that the adapter made: the table of the README.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import peft
import torch
from transformers import AutoModelForSequenceClassification
from transformers.utils import logging

import craft_cli as craft
from craft_cli.api.predictor import load_adapted
from craft_cli.models.families import TARGETS

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from conftest import PICO, build_pico, shake, token_batch

WIDER = {"hidden_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 192}
SIZES: dict[str, dict[str, Any]] = dict.fromkeys(PICO, WIDER) | {
    "distilbert": {"dim": 96, "n_layers": 4, "n_heads": 4, "hidden_dim": 192},
    "gpt2": {"n_embd": 96, "n_layer": 4, "n_head": 4},
    "llama": WIDER | {"num_key_value_heads": 2, "head_dim": 24},
}


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(**token_batch(8, 24)).logits


def base_model(folder: Path) -> Any:
    torch.manual_seed(3)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    model.config.pad_token_id = 0
    return model


def measure(family: str, ranks: str) -> dict[str, Any]:
    base = build_pico(family, Path(family), initializer_range=0.02, **SIZES[family])
    model = base_model(base)
    plain = logits(model)
    adapter = craft.attach(model, craft.decompose(str(base), TARGETS, ranks))
    shake(adapter, 0.1)
    adapter.save("adapter")
    craft.merge("adapter", "merged", overwrite=True)
    lora = craft.merge("adapter", "lora", format="peft", overwrite=True)
    adapted = logits(load_adapted(Path("adapter"))[0])
    attached = peft.PeftModel.from_pretrained(base_model(base), "lora")
    found = {"family": family, "largest": float(adapted.abs().max()), "change": float((adapted - plain).abs().max())}
    found["merged"] = float(
        (logits(AutoModelForSequenceClassification.from_pretrained("merged")) - adapted).abs().max()
    )
    found["lora"] = float((logits(attached) - adapted).abs().max())
    found["lora merged"] = float((logits(attached.merge_and_unload(safe_merge=True)) - adapted).abs().max())
    return found | {"rank": lora.rank}


def main() -> None:
    """Measure all families and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", default="24,24,4")
    parser.add_argument("--json")
    arguments = parser.parse_args()
    file = Path(arguments.json).resolve() if arguments.json else None
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        os.environ["XDG_CACHE_HOME"] = folder
        rows = [measure(family, arguments.ranks) for family in PICO]
        os.chdir("/")
    print("| family | largest logit | changed by | merged | LoRA in peft | LoRA merged by peft | rank |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        differences = " | ".join(f"{row[name]:.1e}" for name in ("merged", "lora", "lora merged"))
        print(f"| {row['family']} | {row['largest']:.2f} | {row['change']:.2f} | {differences} | {row['rank']} |")
    if file:
        file.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
