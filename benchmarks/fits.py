"""What fits where: the memory of an update for models of several shapes, as craft estimates it for a GPU.

    python benchmarks/fits.py [--shapes NAME,NAME] [--json FILE]

The models have random weights. Two shallow versions of each shape are built, with 2 and 4 layers, and `training/memory.py` measures what
each keeps for the backward pass, as `craft train --dry-run` does. The cost of a layer is half of the difference, which gives the cost of the
full depth. Rows are shorter, and what grows with a row is multiplied. This way, shapes of several billion parameters need little memory and
time here. The method is CRAFT on query and value, and all tokens of a language model are targets. Encoders are stored in float32, language
models in bfloat16, in which a run with --bf16 keeps them.

The estimate counts weights, trained parameters with their optimizer, and activations. It leaves out the CUDA context, the fragmentation of
the allocator, and the growth of the heap that an estimate for the CPU includes.
"""

from __future__ import annotations

import json
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import measure

from craft_cli.training.memory import _Kept

BERT, LLAMA = "bert", "llama"


@dataclass(frozen=True)
class Shape:
    """A model and the batch that it is trained on.

    Attributes:
        config: settings of its transformers configuration.
        rows: rows of a batch.
        tokens: tokens of a row.
        measured: tokens of a measured row. It fills a chunk of the loss of a language model, which does not grow with the row.
    """

    family: str
    config: dict[str, int]
    rows: int
    tokens: int
    measured: int

    @property
    def layers(self) -> int:
        """Layers of the full model."""
        return self.config["num_hidden_layers"]


def encoder(layers: int, width: int, heads: int) -> Shape:
    """RoBERTa's shapes; a classifier of 32 texts of 128 tokens."""
    config = {
        "num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": heads, "intermediate_size": 4 * width,
        "vocab_size": 50265, "max_position_embeddings": 514,
    }  # fmt: skip
    return Shape(BERT, config, 32, 128, 128)


def decoder(layers: int, width: int, heads: int, kv: int, inner: int, vocabulary: int) -> Shape:
    """Llama's shapes; 8 rows of 1,024 tokens."""
    config = {
        "num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": heads, "num_key_value_heads": kv,
        "intermediate_size": inner, "vocab_size": vocabulary, "max_position_embeddings": 2048,
        "tie_word_embeddings": layers < 32,  # only the largest has an output embedding of its own
    }  # fmt: skip
    return Shape(LLAMA, config, 8, 1024, 256 if vocabulary > 2**16 else 512)


SHAPES = {
    "RoBERTa-base": encoder(12, 768, 12),
    "RoBERTa-large": encoder(24, 1024, 16),
    "SmolLM2-135M": decoder(30, 576, 9, 3, 1536, 49152),
    "Llama-3.2-1B": decoder(16, 2048, 32, 8, 8192, 128256),
    "Llama-3.2-3B": decoder(28, 3072, 24, 8, 8192, 128256),
    "Llama-3.1-8B": decoder(32, 4096, 32, 8, 14336, 128256),
}
FLAGS = {"no flag": (), "--bf16": ("bf16",), "--gradient-checkpointing": ("recompute",), "both": ("bf16", "recompute")}
IN_4_BIT = "both and --load-in-4bit"
CARDS = (8, 12, 16, 24, 40, 80)
"""GiB of memory of common GPUs."""


def main() -> None:
    """Estimate the shapes with every combination of flags, and print the table."""
    given = measure.arguments(__doc__, shapes={"default": ",".join(SHAPES)})
    wanted = ["SmolLM2-135M"] if given.small else given.shapes.split(",")
    found: list[dict[str, Any]] = []
    for name in wanted:
        shape = SHAPES[name]
        _, few = measure.peak_memory(estimates, shape, 2, given.small)
        _, more = measure.peak_memory(estimates, shape, 4, given.small)
        full = {part: size + (more[part] - size) // 2 * (shape.layers - 2) for part, size in few.items()}
        for flags, on in FLAGS.items():
            precision = "bf16" if "bf16" in on else "float32"
            longer = shape.tokens // shape.measured
            fixed, row, largest = (full[f"{precision} {part}"] for part in ("fixed", "row", "largest"))
            kept = _Kept(fixed, longer * row, longer * largest, growth=1.0)
            inputs = full[f"{precision} number"] * shape.tokens * shape.config["hidden_size"]
            deep = (shape.layers, inputs) if "recompute" in on else ()
            result = {
                "shape": name, "flags": flags, "rows": shape.rows, "tokens": shape.tokens,
                "weights": full[f"{precision} weights"], "trained": full[f"{precision} trained"],
                "activations": kept.of(shape.rows, *deep),
            }  # fmt: skip
            found.append(result)
            if flags == "both":
                found.append(result | {"flags": IN_4_BIT, "weights": result["weights"] - full["bf16 in 4 bits"]})
        measure.write(given.json, found)
    table(found)


def estimates(shape: Shape, layers: int, small: bool) -> dict[str, int]:
    """Bytes of the parts of craft's estimate for a shallow version of a shape, in float32 and with --bf16."""
    import torch
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    torch.manual_seed(0)
    tokens = 16 if small else shape.measured
    with tempfile.TemporaryDirectory() as folder:
        config = AutoConfig.for_model(shape.family, **shape.config | {"num_hidden_layers": layers})
        auto: Any = AutoModel if shape.family == BERT else AutoModelForCausalLM
        dtype = torch.float32 if shape.family == BERT else torch.bfloat16
        auto.from_config(config, dtype=dtype).save_pretrained(folder)
        _tokenizer(folder)
        labels = [{"label": "a"}, {"label": "b"}] if shape.family == BERT else [{}]
        text = "x " * (tokens - 3)
        lines = [{"text": f"{number} {text}"} | label for number in range(8) for label in labels]
        (Path(folder) / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return {
            f"{precision} {part}": size
            for precision in ("float32", "bf16")
            for part, size in _estimate(shape, folder, tokens, bf16=precision == "bf16").items()
        }


def _estimate(shape: Shape, folder: str, tokens: int, *, bf16: bool) -> dict[str, int]:
    from accelerate.state import AcceleratorState

    from craft_cli.config import RunConfig
    from craft_cli.training import memory
    from craft_cli.training.progress import Listener
    from craft_cli.training.setup import make_accelerator, set_up

    run = RunConfig.build({
        "model": folder, "train_file": str(Path(folder) / "rows.jsonl"), "eval_strategy": "no", "ranks": "64,64,2",
        "use_cpu": True, "dry_run": True, "max_seq_length": tokens, "cache_dir": str(Path(folder) / "cache"),
        "head_start": "random" if shape.family == BERT else "auto", "num_train_epochs": 1, "bf16": bf16,
    })  # fmt: skip
    AcceleratorState._reset_state(reset_partial_state=True)  # or the precision of the first one stays
    with ExitStack() as held, mock.patch.object(memory, "_ON_CPU", 1.0):
        training = set_up(run, make_accelerator(run), Listener(), held, Path(folder))
        model, own = training.model, {id(tensor) for tensor in training.trainable}
        model.train()
        assert max(training.prepared.train.lengths) >= tokens - 4
        kept = memory._kept(training, training.accelerator.autocast)
        return {
            "fixed": kept.fixed, "row": kept.row, "largest": kept.largest, "number": model.dtype.itemsize,
            "weights": sum(tensor.nbytes for tensor in model.parameters() if id(tensor) not in own),
            "trained": 4 * sum(tensor.nbytes for tensor in training.trainable),
            "in 4 bits": memory._quantised(model, own),
        }  # fmt: skip


def _tokenizer(folder: str) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"[UNK]": 0, "[PAD]": 1, "x": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="[UNK]", pad_token="[PAD]", eos_token="[PAD]"
    ).save_pretrained(folder)


def total(row: dict[str, Any]) -> int:
    """Bytes of an update."""
    return sum(int(row[part]) for part in ("weights", "trained", "activations"))


def table(found: list[dict[str, Any]]) -> None:
    """A row for each shape, with the smallest card for each combination of flags."""
    flags = [*FLAGS, IN_4_BIT]
    rows = []
    for name in dict.fromkeys(row["shape"] for row in found):
        those = {row["flags"]: row for row in found if row["shape"] == name}
        first = those["no flag"]
        rows.append([name, f"{first['rows']} x {first['tokens']:,}", *(_cell(those[one]) for one in flags)])
    print()
    measure.table(("shape", "batch", *flags), rows)
    print(
        f"\nGiB of an update, and the smallest of {', '.join(map(str, CARDS))} GiB that holds it with a tenth to spare"
    )


def _cell(row: dict[str, Any]) -> str:
    needed = total(row) / 2**30
    card = next((size for size in CARDS if needed <= 0.9 * size), None)
    return f"{needed:.1f} ({card or 'more'})"


if __name__ == "__main__":
    main()
