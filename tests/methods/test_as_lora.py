"""What leaves craft, by the tools that take it: transformers' pipeline, ONNX, the real peft, the hub."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from accelerate import init_empty_weights
from conftest import build_pico, classifier, failure, invoke, save_tokenizer, shake, token_batch
from helpers import endpoint, logits, saved_adapter
from huggingface_hub import ModelCard
from loopback_hub import LoopbackHub, card_problem
from picos import FUSED, PICO, families
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    pipeline,
)

import craft_cli as craft
from craft_cli.api.predictor import load_adapted
from craft_cli.files.marker import MARKER
from craft_cli.methods.base import delta
from craft_cli.models.loading import head_of
from craft_cli.models.shards import Entry, write_shards

Make = Callable[..., Path]


def expected(path: str = "adapter") -> torch.Tensor:
    return logits(load_adapted(Path(path))[0])


def apart(found: torch.Tensor, right: torch.Tensor) -> float:
    """Largest difference, relative to the largest logit where that is above one."""
    return float((found - right).abs().max() / right.abs().max().clamp(min=1.0))


def relative(found: torch.Tensor, right: torch.Tensor) -> float:
    return float((found - right).abs().max() / right.abs().max())


# -- the checkpoint -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("asked", [None, "float32", "bfloat16", "float16"])
def test_weights_are_added_in_float32_and_rounded_once(stored: torch.dtype, asked: str | None, tmp_path: Path) -> None:
    base = build_pico("gpt2", tmp_path / "base", dtype=stored)
    result = craft.merge(saved_adapter(base), "merged", dtype=asked)
    dtype = getattr(torch, asked) if asked else stored
    merged, original = load_file("merged/model.safetensors"), load_file(base / "model.safetensors")
    assert {tensor.dtype for tensor in merged.values()} == {dtype}
    assert json.loads(Path("merged/config.json").read_text())["dtype"] == result.dtype == str(dtype)[6:]
    _, adapter, _ = load_adapted(Path("adapter"))
    dense = original["h.1.attn.c_attn.weight"].float()  # (24, 72), transposed; query and value are its thirds
    for name, start in (("query", 0), ("value", 48)):
        dense[:, start : start + 24] += delta(adapter.change.chains(name)[1]).detach().T
    assert torch.equal(merged["transformer.h.1.attn.c_attn.weight"], dense.to(dtype))
    assert torch.equal(merged["transformer.wte.weight"], original["wte.weight"].to(dtype))
    plain = AutoModelForSequenceClassification.from_pretrained("merged")
    assert plain.dtype == dtype


def test_a_sharded_base_and_a_sharded_result(pico: Make, tmp_path: Path) -> None:
    base = build_pico("bert", tmp_path / "base", max_shard_size="8KB")
    assert len(list(base.glob("*.safetensors"))) > 2
    result = craft.merge(saved_adapter(base), "merged", max_shard_size="10KB")
    index = json.loads(Path("merged/model.safetensors.index.json").read_text())
    files = sorted(path.name for path in Path("merged").glob("*.safetensors"))
    assert sorted(set(index["weight_map"].values())) == files
    assert len(files) > 2
    for file in files:
        with safe_open(f"merged/{file}", framework="pt") as shard:
            assert {name for name, where in index["weight_map"].items() if where == file} == set(shard.keys())
            sizes = [shard.get_tensor(name).nbytes for name in shard.keys()]  # noqa: SIM118
            assert sum(sizes) <= 10_000 or len(sizes) == 1
    plain, report = AutoModelForSequenceClassification.from_pretrained("merged", output_loading_info=True)
    assert not any(report.values())
    assert relative(logits(plain), expected()) <= result.tolerance == 1e-5
    assert "--max-shard-size: expected a size" in failure(
        "merge", "adapter", "-o", "other", "--max-shard-size", "large"
    )


def test_old_names_of_norms_and_a_pretraining_head_are_understood(pico: Make, tmp_path: Path) -> None:
    model = AutoModelForMaskedLM.from_pretrained(pico())
    base = build_pico("bert", tmp_path / "base")
    state = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor.clone()
        for name, tensor in model.state_dict().items()
        if not name.startswith("cls.predictions.decoder")
    }
    save_file(state, base / "model.safetensors", metadata={"format": "pt"})
    fresh_model, report = AutoModelForSequenceClassification.from_pretrained(base, output_loading_info=True)
    head = head_of(fresh_model, sorted(report["missing_keys"]))  # the masked language model has no pooler
    assert "bert.pooler.dense.weight" in head
    saved_adapter(base, head=head)
    craft.merge("adapter", "merged")
    plain, report = AutoModelForSequenceClassification.from_pretrained("merged", output_loading_info=True)
    assert not any(report.values())
    assert relative(logits(plain), expected()) <= 1e-5
    craft.merge("adapter", "lora", format="peft")
    assert json.loads(Path("lora/adapter_config.json").read_text())["modules_to_save"] == ["bert.pooler", "classifier"]
    assert apart(logits(with_peft(base)), expected()) <= 1e-6


def test_the_certificate_says_what_the_model_was_made_of(pico: Make) -> None:
    base = pico()
    craft.merge(saved_adapter(base), "merged")
    found = json.loads(Path("merged/merge.json").read_text())
    digest = lambda path: hashlib.sha256(Path(path).read_bytes()).hexdigest()  # noqa: E731
    assert found["base"] == {
        "model": base.name, "revision": None, "sha256": {"model.safetensors": digest(base / "model.safetensors")}
    }  # fmt: skip
    assert found["adapter"]["sha256"] == digest("adapter/adapter_model.safetensors")
    assert found["sha256"] == {"model.safetensors": digest("merged/model.safetensors")}
    merged, original = load_file("merged/model.safetensors"), load_file(base / "model.safetensors")
    changed = {name for name in original if not torch.equal(merged[f"bert.{name}"], original[name])}
    assert {f"bert.{name}" for name in changed} == set(found["tensors_changed"])
    assert 0 < found["largest_logit_difference"]["relative"] <= found["tolerance"]["relative"] == 1e-5
    assert found["versions"]["torch"] == torch.__version__
    assert {"craft", "python", "transformers", "safetensors"} < set(found["versions"])


def test_what_cannot_be_merged(pico: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = craft.attach(classifier(pico()), craft.decompose(str(pico()), ranks=(6, 5, 2)))
    adapter.save("zero")
    assert "merging changes no tensor" in failure("merge", "zero")
    assert "merging changes no tensor" in failure("merge", "zero", "--format", "peft")
    saved_adapter(pico())
    assert "--format: expected checkpoint, peft, gguf or adapter, not 'onnx'" in failure(
        "merge", "adapter", "--format", "onnx"
    )
    assert "--dtype: expected float32, float16, bfloat16" in failure("merge", "adapter", "--dtype", "int8")
    assert "--dtype is not for --format peft" in failure("merge", "adapter", "--format", "peft", "--dtype", "float16")
    assert "--trim is for --format peft" in failure("merge", "adapter", "--trim")
    assert "--push-to-hub: expected OWNER/NAME, not 'a/b/c'" in failure("merge", "adapter", "--push-to-hub", "a/b/c")
    monkeypatch.setattr("craft_cli.models.views.View.add_to_weight", lambda view, weight, delta: weight.add_(0.5))
    assert "logits differ from the adapted one's" in failure("merge", "adapter")


def test_the_pipeline_takes_it(pico: Make) -> None:
    craft.merge(saved_adapter(pico()), "merged")
    classify: Any = pipeline("text-classification", "merged", top_k=None)
    (found,) = classify(["the film was great"])
    tokens = AutoTokenizer.from_pretrained("merged")("the film was great", return_tensors="pt")
    with torch.no_grad():
        scores = load_adapted(Path("adapter"))[0].eval()(**tokens).logits.softmax(1)[0]
    assert {row["label"]: pytest.approx(row["score"], abs=1e-5) for row in found} == {
        "no": float(scores[0]), "yes": float(scores[1])
    }  # fmt: skip


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert"])
@pytest.mark.slow
def test_onnx_takes_it(family: str, pico: Make) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    craft.merge(saved_adapter(pico(family)), "merged")
    model = AutoModelForSequenceClassification.from_pretrained("merged", attn_implementation="eager").eval()
    batch = token_batch()
    with warnings.catch_warnings():  # the exporter's own
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model, (batch["input_ids"], batch["attention_mask"]), "model.onnx", dynamo=True, verbose=False,
            input_names=list(batch), output_names=["logits"],
        )  # fmt: skip
    session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(["logits"], {name: tensor.numpy() for name, tensor in batch.items()})
    assert relative(torch.from_numpy(np.asarray(found)), expected()) <= 1e-4


# -- the LoRA -----------------------------------------------------------------------------------------------------------


def with_peft(base: Path, folder: str = "lora") -> Any:
    """The base with a LoRA, as a user of peft would load it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a key that peft does not know, or does not find, is a warning
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")  # peft's own
        model = classifier(base)
        model.config.pad_token_id = 0
        return peft.PeftModel.from_pretrained(model, folder)


@pytest.mark.parametrize("trim", [False, True])
@pytest.mark.parametrize("family", families("AutoModelForSequenceClassification"))
def test_peft_computes_the_same_attached_and_merged(family: str, trim: bool, pico: Make) -> None:
    base = pico(family)
    saved_adapter(base, ("query", "key", "value", "output"))
    result = craft.merge("adapter", "lora", format="peft", trim=trim)
    assert set(os.listdir("lora")) == {
        "adapter_config.json", "adapter_model.safetensors", "merge.json", "README.md", MARKER
    }  # fmt: skip
    right = expected()
    model = with_peft(base)
    assert apart(logits(model), right) <= 3e-6
    assert apart(logits(model.merge_and_unload(safe_merge=True)), right) <= 3e-6
    tensors = load_file("lora/adapter_model.safetensors")
    ranks = {tensor.shape[0] for name, tensor in tensors.items() if "lora_A" in name}
    assert ranks == {result.rank} == {15 if family in FUSED else 5}  # query, key and value share a weight
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    own = {name.removesuffix(".weight") for name in peft.get_peft_model_state_dict(with_peft(base))}
    assert own == {name.removesuffix(".weight") for name in tensors}


def test_a_lora_is_trimmed_to_its_numerical_rank(pico: Make) -> None:
    base = pico()
    model = classifier(base)
    adapter = craft.attach(model, craft.decompose(str(base), ranks=(6, 5, 2)))
    with torch.no_grad():
        for name in adapter.change.shapes:
            k = adapter.change.trained()[f"transform.{name}.in"]
            k.copy_(torch.outer(torch.randn(5), torch.randn(5)))  # of rank one, and so is the change
    adapter.save("adapter")
    assert craft.merge("adapter", "whole", format="peft").rank == 5
    assert craft.merge("adapter", "lora", format="peft", trim=True).rank == 1
    assert apart(logits(with_peft(base)), expected()) <= 1e-6
    assert (
        Path("lora/adapter_model.safetensors").stat().st_size < Path("whole/adapter_model.safetensors").stat().st_size
    )


def test_what_is_said_of_vllm(pico: Make) -> None:
    base = pico("llama")
    saved_adapter(base)
    done = invoke("merge", "adapter", "-o", "lora", "--format", "peft")
    assert done.exit_code == 0, done.stderr
    assert "vLLM accepts --max-lora-rank 1, 8, 16, 32, 64, 128, 256, 320, 512: rank 5 needs 8" in done.stderr
    assert "modules_to_save" in done.stderr  # vLLM refuses a trained head in a LoRA
    assert "vllm serve" not in done.stdout
    assert "vLLM      vllm serve merged --runner pooling" in invoke("merge", "adapter", "-o", "merged").stdout
    whole = classifier(base)
    whole.save_pretrained("whole")
    save_tokenizer(Path("whole"))
    base = Path("whole").resolve()
    saved_adapter(base, head=())
    result = craft.merge("adapter", "headless", format="peft")
    assert result.serve["vLLM"] == f"vllm serve {base} --enable-lora --max-lora-rank 8 --lora-modules tuned=headless"
    assert json.loads(Path("headless/adapter_config.json").read_text())["modules_to_save"] is None
    saved_adapter(pico())
    encoder = craft.merge("adapter", "bert", format="peft")
    assert encoder.serve == {}
    assert "it serves no bert with LoRA" in str(encoder.hint)


# -- the hub ------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Use 'content:DeprecationWarning")  # huggingface_hub's own
def test_nothing_is_uploaded_unless_asked_for_and_then_all(
    pico: Make, hub: LoopbackHub, signed_in: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved_adapter(pico())
    with endpoint(hub):
        assert invoke("merge", "adapter").exit_code == 0
        assert hub.requests == []
        done = invoke("merge", "adapter", "-o", "out", "--push-to-hub", "someone/tuned", "--json")
        assert done.exit_code == 0, done.stderr
        assert json.loads(done.stdout)["repository"] == "someone/tuned"
        files = {path.name: path.read_bytes() for path in Path("out").iterdir() if path.name != MARKER}
        assert {name: hub.uploads["someone/tuned"][name] for name in files} == files
        monkeypatch.delenv("HF_TOKEN")
        refused = invoke("merge", "adapter", "-o", "again", "--push-to-hub", "someone/tuned")
    assert refused.exit_code == 1
    assert len([line for line in refused.stderr.splitlines() if not line.startswith("note: ")]) == 1
    assert "again is complete: run `hf auth login`" in refused.stderr
    assert Path("again/merge.json").is_file()


# -- cards --------------------------------------------------------------------------------------------------------------


def test_cards_are_valid_and_say_how_to_load(pico: Make, hub: LoopbackHub, data_dir: Path, tmp_path: Path) -> None:
    base = build_pico("bert", tmp_path / "base")
    (base / "README.md").write_text("---\nlicense: mit\n---\n# A base\n")
    settings = ("--model", str(base), "--task", "sst2", "--data-dir", str(data_dir), "--ranks", "6,5,2")
    run = ("--output-dir", "run", "--num-train-epochs", "1", "--use-cpu", "--learning-rate", "0.01")
    assert invoke("train", *settings, *run).exit_code == 0
    assert invoke("merge", "run").exit_code == 0
    assert invoke("merge", "run", "--format", "peft").exit_code == 0
    libraries = {"adapter": "craft", "merged": "transformers", "peft": "peft"}
    for folder, library in libraries.items():
        card = ModelCard.load(Path("run", folder, "README.md"))
        with endpoint(hub):
            card.validate()
        assert card.data.library_name == library
        assert card.data.license == "mit"
        (accuracy, loss) = card.data.eval_results
        metrics = json.loads(Path("run/all_results.json").read_text())["metrics"]
        assert (accuracy.metric_type, accuracy.metric_value) == ("accuracy", pytest.approx(metrics["accuracy"]))
        assert (loss.metric_type, loss.dataset_name) == ("loss", "sst2")
        for said in ("With plain transformers", "With craft", "With PEFT", "130 in the transforms", "50 in the head"):
            assert said in card.content, (folder, said)
    assert [request.path for request in hub.requests] == ["/api/validate-yaml"] * 3
    assert card_problem("---\nlicense: [mit]\n---\n") == "license must be a string"


# -- memory -------------------------------------------------------------------------------------------------------------


PEAK = """
import sys
import craft_cli as craft
craft.merge(sys.argv[1], sys.argv[1] + "-merged", max_shard_size="256MB")
(line,) = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]  # ru_maxrss is inherited
print(int(line.split()[1]) * 1024)
"""


def peak(adapter: str) -> int:
    """Bytes of memory that merging takes at most, the interpreter with all its modules included."""
    done = subprocess.run(
        [sys.executable, "-c", PEAK, adapter], capture_output=True, text=True, check=False, timeout=200
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.slow
def test_a_large_checkpoint_merges_in_the_memory_of_a_shard(pico: Make, tmp_path: Path) -> None:
    saved_adapter(pico("llama")).rename("small")
    sizes = {
        "hidden_size": 2048, "num_hidden_layers": 10, "num_attention_heads": 16, "num_key_value_heads": 4,
        "head_dim": 128, "intermediate_size": 6144, "vocab_size": 12288
    }  # fmt: skip
    base = tmp_path / "base"
    base.mkdir()
    config = AutoConfig.for_model("llama", **(PICO["llama"] | sizes))
    with init_empty_weights():
        shapes = {name: tuple(tensor.shape) for name, tensor in AutoModel.from_config(config).state_dict().items()}
    draw = lambda shape: torch.randn(shape) * 0.02  # noqa: E731
    write_shards(base, {n: Entry(shape, torch.float32, partial(draw, shape)) for n, shape in shapes.items()}, 256000000)
    config.save_pretrained(base)
    save_tokenizer(base)
    weights = sum(file.stat().st_size for file in base.glob("*.safetensors"))
    assert weights > 2e9
    model = classifier(base)
    model.config.pad_token_id = 0
    adapter = craft.attach(model, craft.decompose(str(base), ranks=(16, 16, 4)))
    shake(adapter, 0.05)
    adapter.save("adapter")
    del model, adapter
    interpreter, merging = peak("small"), peak("adapter")
    print(f"{interpreter / 1e6:.0f} MB for a pico model, {merging / 1e6:.0f} MB for {weights / 1e6:.0f} MB of weights")
    assert merging - interpreter < 1.5 * 256e6, f"{(merging - interpreter) / 1e6:.0f} MB above the interpreter"
    index = json.loads(Path("adapter-merged/model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) >= 8
