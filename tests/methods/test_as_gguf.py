"""A LoRA for llama.cpp: names, layout and order of rows as its own converter has them, and the change that it makes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from conftest import classifier, failure, invoke, shake
from picos import families
from transformers import AutoModelForCausalLM

import craft_cli as craft
from craft_cli.errors import ConfigError, CraftError
from craft_cli.methods import as_gguf
from craft_cli.methods.as_gguf import ARCHITECTURES
from craft_cli.models import demo

Make = Callable[..., Path]
KIND = "AutoModelForCausalLM"
DECODERS = [
    pytest.param(one.values[0], marks=() if one.values[0] in ("llama", "falcon") else pytest.mark.slow)
    for one in families(KIND, ARCHITECTURES)
]


def adapted_one(base: Path, scale: float = 0.3, **options: Any) -> Any:
    """A model with a shaken adapter on every projection, saved in the folder `saved`."""
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    ranks = {} if "method" in options else {"ranks": (6, 5, 2)}
    adapter = craft.attach(model, **({"targets": "all-linear"} | ranks | options))
    shake(adapter, scale)
    adapter.save("saved")
    return model


def stored(folder: str = "lora") -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Fields and tensors of the file."""
    reader = gguf.GGUFReader(Path(folder) / "adapter.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return fields, {tensor.name: np.array(tensor.data) for tensor in reader.tensors}


def as_converted(weight: np.ndarray, module: str, config: Any) -> np.ndarray:
    """A weight (d_out, d_in) as llama.cpp's convert_hf_to_gguf.py stores it; its reshapes, taken over."""
    kind, shape = config.model_type, weight.shape
    if kind in ("llama", "mistral", "smollm3", "granite") and module.endswith(("q_proj", "k_proj")):
        heads = config.num_attention_heads if module.endswith("q_proj") else config.num_key_value_heads
        return weight.reshape(heads, 2, shape[0] // heads // 2, shape[1]).swapaxes(1, 2).reshape(shape)
    if not module.endswith("query_key_value"):
        return weight
    heads, width = config.num_attention_heads, config.hidden_size
    if kind in ("bloom", "gpt_neox"):
        parts = weight.reshape(heads, 3, width // heads, width)
        return np.concatenate([parts[:, part].reshape(-1, width) for part in range(3)])
    groups, size = config.num_kv_heads, width // heads  # falcon
    parts = weight.reshape(groups, heads // groups + 2, size, width)
    query, key, value = parts[:, :-2], parts[:, [-2]], parts[:, [-1]]
    return np.concatenate([part.reshape(-1, width) for part in (query, key, value)])


@pytest.mark.parametrize("family", DECODERS)
def test_it_makes_the_change_that_merging_does(family: str, pico: Make) -> None:
    base = pico(family, kind=KIND)
    model = adapted_one(base)
    craft.merge("saved", "merged")
    result = craft.merge("saved", "lora", format="gguf")
    assert result.difference <= result.tolerance == 1e-5
    assert result.greedy == (16, 16)
    fields, tensors = stored()
    assert fields["general.architecture"] == ARCHITECTURES[family]
    assert (fields["general.type"], fields["adapter.type"]) == ("adapter", "lora")
    assert fields["adapter.lora.alpha"] == float(result.rank or 0)
    merged = AutoModelForCausalLM.from_pretrained("merged").state_dict()
    names = gguf.get_tensor_name_map(
        next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == ARCHITECTURES[family]), 3
    )
    before = AutoModelForCausalLM.from_pretrained(base).state_dict()
    changed = [name for name in before if not torch.equal(before[name], merged[name]) and name != "lm_head.weight"]
    assert len(tensors) == 2 * len(changed) > 0
    for name in changed:
        module = name.removesuffix(".weight")
        told = names.get_name(module)
        a, b = (tensors[f"{told}.weight.lora_{which}"] for which in "ab")
        assert a.shape[0] == b.shape[1] == result.rank
        difference = (merged[name] - before[name]).numpy()
        wanted = as_converted(difference.T if family == "gpt2" else difference, module, model.config)
        np.testing.assert_allclose(b @ a, wanted, atol=2e-6 * max(1.0, float(before[name].abs().max())))


def test_what_is_said_and_written(pico_lm: Make) -> None:
    base = pico_lm()
    adapted_one(base, targets="query,value")
    done = invoke("merge", "saved", "--format", "gguf", "-o", "lora")
    assert done.exit_code == 0, done.stderr
    assert "llama.cpp  llama-server -m MODEL.gguf --lora lora/adapter.gguf" in done.stdout
    assert "Ollama     ollama create tuned -f lora/Modelfile" in done.stdout
    assert f"python convert_hf_to_gguf.py {base.resolve()} --outfile MODEL.gguf" in " ".join(done.stderr.split())
    assert "16 of 16 greedy tokens are the same" in done.stdout
    assert Path("lora/Modelfile").read_text().splitlines()[1:] == ["FROM ./MODEL.gguf", "ADAPTER ./adapter.gguf"]
    assert "for llama.cpp" in Path("lora/README.md").read_text()
    certificate = json.loads(Path("lora/merge.json").read_text())
    assert certificate["greedy_tokens"] == {"alike": 16, "compared": 16}
    assert list(certificate["sha256"]) == ["adapter.gguf"]
    assert {path.name for path in Path("lora").iterdir()} == {
        ".craft.json", "Modelfile", "README.md", "adapter.gguf", "merge.json",
    }  # fmt: skip
    whole = craft.merge("saved", "merged")
    assert whole.serve["llama.cpp"] == "python convert_hf_to_gguf.py merged --outfile model.gguf"


def test_half_precision_halves_it_and_a_wrong_one_is_refused(pico_lm: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    adapted_one(pico_lm(), targets="query,value")
    craft.merge("saved", "lora", format="gguf")
    half = craft.merge("saved", "half", format="gguf", dtype="float16")
    assert (half.dtype, half.tolerance) == ("float16", 1e-2)
    assert 1e-5 < half.difference < 1e-2
    whole, rounded = stored()[1], stored("half")[1]
    assert all(np.array_equal(rounded[name], tensor.astype(np.float16)) for name, tensor in whole.items())
    monkeypatch.setattr(as_gguf, "_read", lambda path: (2.0, {name: torch.from_numpy(t) for name, t in whole.items()}))
    with pytest.raises(CraftError, match="logits differ from the adapted one's"):
        craft.merge("saved", "wrong", format="gguf")
    assert not Path("wrong").exists()


def test_a_dense_change_needs_its_tolerance(pico_lm: Make) -> None:
    adapted_one(pico_lm(), 0.05, method="superlora", targets="query,value", rank=4)
    with pytest.raises(CraftError, match="is dense: a smaller LoRA has a relative error of"):
        craft.merge("saved", "lora", format="gguf")
    assert craft.merge("saved", "lora", format="gguf", tolerance=0.9).difference > 1e-5


def test_what_llama_cpp_does_not_run_is_refused(pico: Make) -> None:
    adapter = craft.attach(classifier(pico()), targets="query,value", ranks=(6, 5, 2))
    shake(adapter)
    adapter.save("classifier")
    told = failure("merge", "classifier", "--format", "gguf", "-o", "lora")
    assert "llama.cpp does not run a BertForSequenceClassification and its trained head" in told
    adapted_one(pico("opt", kind=KIND))
    told = failure("merge", "saved", "--format", "gguf", "-o", "lora")
    assert "llama.cpp does not support models of type 'opt'" in told


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"dtype": "bfloat16"}, "dtype: a LoRA for llama.cpp is float32 or float16"),
        ({"max_shard_size": "1MB"}, "max_shard_size is for checkpoints"),
        ({"head": False}, "a language model has no trained head"),
    ],
)
def test_options_that_do_not_go_with_it(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        craft.merge("saved", format="gguf", **options)


def test_without_its_package_the_way_is_told(pico_lm: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    adapted_one(pico_lm(), targets="query,value")
    monkeypatch.setattr(as_gguf, "find_spec", lambda name: None)
    with pytest.raises(CraftError, match="pip install gguf"):
        craft.merge("saved", "lora", format="gguf")


def test_the_demo_is_served_from_its_own_file(pico_lm: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from craft_cli.models import hub

    base, file = pico_lm(), tmp_path / "the base.gguf"
    file.touch()
    monkeypatch.setattr(hub, "demo_folder", lambda model: base)
    monkeypatch.setattr(as_gguf, "demo_gguf", lambda: file)
    adapted_one(base, targets="query,value")
    record = json.loads(Path("saved/adapter_config.json").read_text())
    record["base_model"] |= {"model": demo.DEMO_LLM, "revision": None}
    Path("saved/adapter_config.json").write_text(json.dumps(record))
    result = craft.merge("saved", "lora", format="gguf")
    assert result.serve["llama.cpp"] == f"llama-server -m '{file}' --lora lora/adapter.gguf"
    assert result.hint is None
    assert Path("lora/Modelfile").read_text() == f"FROM {file}\nADAPTER ./adapter.gguf\n"
