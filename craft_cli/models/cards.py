"""Model cards: the README.md of an output, with the metadata block of the Hub."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from craft_cli.errors import figure, plain
from craft_cli.models.checkpoint import CARD, Checkpoint
from craft_cli.models.demo import DEMO, DEMO_LLM

DEMO_IDS = {DEMO: "sentence-transformers/all-MiniLM-L6-v2", DEMO_LLM: "HuggingFaceTB/SmolLM2-135M-Instruct"}
"""Where the demo models come from."""

HEADLESS = "peft without head"

_WHAT = {
    "adapter": "{title} adapter on {base}",
    "checkpoint": "{base}, fine-tuned with {title}",
    "peft": "LoRA on {base}, exported from a {title} adapter",
    HEADLESS: "LoRA on {base}, exported from a {title} adapter without its head",
    "gguf": "LoRA on {base} for llama.cpp, made from a {title} adapter",
}

_PIPELINES = {
    "text-classification": ("SEQUENCE_CLASSIFICATION", "SEQ_CLS"),
    "token-classification": ("TOKEN_CLASSIFICATION", "TOKEN_CLS"),
    "text-generation": ("CAUSAL_LM", "CAUSAL_LM"),
    "question-answering": ("QUESTION_ANSWERING", "QUESTION_ANS"),
}
"""Hub pipelines: the name of their model mapping in transformers, and PEFT's task type."""

_USE = {
    "adapter": """With craft (the Python package `lora-craft`; the folder is PATH):

    craft eval PATH                          # evaluate on the same data
    craft predict PATH                       # predict texts from standard input

    adapter = craft_cli.load(model, "PATH")  # on a fresh {fresh}

With plain transformers: `craft merge PATH` writes an ordinary checkpoint.
With PEFT: `craft merge PATH --format peft` writes a LoRA.""",
    "checkpoint": """With plain transformers (the folder is PATH):

    from transformers import pipeline
    pipeline("{pipeline}", "PATH"{options})({text})
{differences}
With craft: `craft eval PATH --task TASK` or `craft predict PATH`. With PEFT: not needed, the adapter is merged.""",
    "peft": """With PEFT (the folder is PATH):

    import peft, transformers

    base = transformers.{architecture}.from_pretrained({loaded})
    model = peft.PeftModel.from_pretrained(base, "PATH")

With plain transformers: `model.merge_and_unload(safe_merge=True).save_pretrained(...)`, or `craft merge` of the adapter.
With craft: load the original adapter.{labels}""",
    HEADLESS: """The trained head is omitted: the LoRA gives the hidden states of the adapted model, for embeddings. The metrics
above were measured with the head. With PEFT (the folder is PATH):

    import peft, transformers

    base = transformers.{architecture}.from_pretrained({base!r})
    model = peft.PeftModel.from_pretrained(base, "PATH")
    hidden = model.get_base_model().base_model(**batch).last_hidden_state

With craft: run `craft merge` on the original adapter for a checkpoint with the head, or `craft merge --format peft` for a
LoRA with the head.""",
    "gguf": """With llama.cpp, on a GGUF of the base, quantised or not (MODEL.gguf; the folder is PATH):

    llama-server -m MODEL.gguf --lora PATH/adapter.gguf

With Ollama: put the name of that GGUF into the Modelfile, then `ollama create tuned -f PATH/Modelfile`.
With transformers or PEFT: `craft merge` of the adapter that this was made from writes a checkpoint, `--format peft` a LoRA.""",
}

_USE_WRITER = {
    "adapter": """With craft (the Python package `lora-craft`; the folder is PATH):

    craft chat PATH                          # --compare shows the base's answers beside
    craft predict PATH                       # questions from standard input
    craft eval PATH                          # evaluate on the same data

With plain transformers: `craft merge PATH` writes an ordinary checkpoint.
With PEFT and vLLM: `craft merge PATH --format peft` writes a LoRA.""",
    "checkpoint": """With plain transformers (the folder is PATH):

    from transformers import AutoTokenizer, {architecture}

    model = {architecture}.from_pretrained("PATH")
    tokenizer = AutoTokenizer.from_pretrained("PATH")
{writes}

With craft: `craft chat PATH` or `craft predict PATH`. With PEFT: not needed, the adapter is merged.""",
    "peft": """With PEFT (the folder is PATH):

    import peft
    from transformers import AutoTokenizer, {architecture}

    base = {architecture}.from_pretrained({base!r})
    model = peft.PeftModel.from_pretrained(base, "PATH")
    tokenizer = AutoTokenizer.from_pretrained({base!r})
{writes}

With plain transformers: `model.merge_and_unload(safe_merge=True).save_pretrained(...)`, or `craft merge` of the adapter.
With craft: load the adapter that this was made from.""",
}
"""The same of models that write."""
_ASKS = """    messages = [{"role": "user", "content": "some question"}]
    inputs = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )"""
_BEGINS = """    inputs = tokenizer("the beginning of a text", return_tensors="pt")"""
_WRITES = """
    output = model.generate(**inputs, max_new_tokens=256, do_sample=False)
    print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))"""
_LEARNED = {
    "assistant": "every answer of the assistant and the token that ends it",
    "last": "the last answer of each conversation and the token that ends it",
    "completion": "the completion of each prompt and the token that ends it",
    "all": "all of each row",
}
"""What a language model has learned, by `train_on`."""


@dataclass(frozen=True)
class Description:
    """A description of a method, for headers, cards and lists.

    Attributes:
        title: display name.
        size: rank or ranks in flag form: `64,64,8`.
        settings: rank or ranks with their names.
        trained: location of the trained parameters, as part of a sentence.
        source: one sentence for the model card, with the paper.
    """

    title: str
    size: str
    settings: str
    trained: str
    source: str


def pipeline_of(architecture: str) -> str | None:
    """The Hub pipeline of a model class, from the mappings of transformers; None if there is none."""
    from transformers.models.auto import modeling_auto

    for pipeline, (mapping, _) in _PIPELINES.items():
        if architecture in getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES").values():
            return pipeline
    return None


def peft_type(architecture: str) -> str | None:
    """PEFT's task type of a model class; None if there is none."""
    pipeline = pipeline_of(architecture)
    return _PIPELINES[pipeline][1] if pipeline else None


def learned(training: Mapping[str, Any]) -> str | None:
    """What a language model has learned of its rows, for people; None where nothing is known."""
    return _LEARNED.get(str(training.get("train_on")))


def public_name(base: Checkpoint) -> str:
    """The public name of a base: a Hub id, or a folder name without its path."""
    if base.name in DEMO_IDS:
        return DEMO_IDS[base.name]
    return Path(base.name).name if Path(base.name).is_absolute() else base.name


def without_folders(value: Any) -> Any:
    """Settings for upload, with only the last part of every path."""
    if isinstance(value, Mapping):
        return {name: without_folders(part) for name, part in value.items()}
    if isinstance(value, list):
        return [without_folders(part) for part in value]
    is_path = isinstance(value, str) and (value.startswith("~") or Path(value).is_absolute())
    return (Path(value).name or value) if is_path else value


def _inline(text: str) -> str:
    """Escape a name for a line of Markdown."""
    return re.sub(r"([\\`*\[\]<>|])", r"\\\1", plain(text)).replace("&", "&amp;")


def model_card(record: Mapping[str, Any], method: Description, base: Checkpoint, *, form: str = "adapter") -> str:
    """Write a model card: the training, its results, and how to use the model.

    Args:
        record: the adapter's description, as in adapter_config.json.
        method: that it was trained by.
        base: the checkpoint it was trained on.
        form: `adapter`, `checkpoint`, `peft`, `gguf` or `HEADLESS`.
    """
    import yaml
    from huggingface_hub import EvalResult, ModelCardData

    training, model = record.get("training") or {}, record["model"]
    name = public_name(base)
    generates = pipeline_of(model["architecture"]) == "text-generation"
    task = training.get("task", "not recorded")
    pipeline = (form != HEADLESS and pipeline_of(model["architecture"])) or "feature-extraction"
    data: dict[str, Any] = {
        "library_name": {"adapter": "craft", "checkpoint": "transformers", "gguf": "gguf"}.get(form, "peft"),
        "pipeline_tag": pipeline,
        "tags": ["craft", pipeline] + (["lora"] if form in ("peft", HEADLESS, "gguf") else []),
    }
    if not Path(base.name).is_absolute():  # the Hub links only to ids
        data["base_model"] = name
        data["base_model_relation"] = "adapter" if form != "checkpoint" else "finetune"
    licence = base_licence(base)
    if licence:
        data["license"] = licence
    metrics = training.get("metrics", {})
    if metrics and form != HEADLESS:
        data["model_name"] = f"{name.rpartition('/')[2]}-{task}"
        data["eval_results"] = [
            EvalResult(pipeline, task, task, metric, float(f"{value:.6g}")) for metric, value in metrics.items()
        ]
    labels = ", ".join(map(_inline, model["id2label"].values()))
    taught = f"Learned: {learned(training) or 'not recorded'}" if generates else f"Labels: {labels}"
    head = "" if generates else f", {record['parameters']['head']:,} in the head"
    parts = [
        f"---\n{ModelCardData(**data).to_yaml()}\n---",
        "# " + _WHAT[form].format(title=method.title, base=_inline(name)),
        f"Task: {task}. {taught}. Data: {_inline(_data(training))}.",
        f"Trained parameters: {record['parameters']['adapter']:,} {method.trained} {', '.join(record['targets'])} "
        f"({method.settings}){head}.",
        f"Licence: {licence or 'that of the base model'}. Base model: {name}"
        + (f", revision {base.revision}." if base.revision else "."),
    ]
    if training.get("problem_type") == "multi_label_classification":
        parts.append(f"Labels are predicted above a probability of {training['threshold']:g}.")
    if training.get("temperature", 1.0) != 1.0:
        parts.append(f"Calibrated: the head is divided by the temperature {training['temperature']:.3g}.")
    if metrics:
        baselines = training.get("baselines") or {}
        titles = [f"epoch {training.get('epoch', 0):g}", *(name.replace("_", " ") for name in baselines)]
        rows = [
            [metric, figure(value), *(figure(row[metric]) if metric in row else "" for row in baselines.values())]
            for metric, value in metrics.items()
        ]
        lines = [["validation", *titles], ["---"] * (len(titles) + 1), *rows]
        parts.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
    parts.append("## Use")
    parts.append(
        (_USE | _USE_WRITER if generates else _USE)[form].format(
            architecture=model["architecture"],
            fresh=f"{model['architecture']} with num_labels={model['num_labels']}",
            base=name,
            loaded=_with_labels(name, model),
            labels=f" PEFT's layout has no place for label names; they are, in order:\n{labels}.",
            writes=(_BEGINS if training.get("form") in ("completion", "text") else _ASKS) + _WRITES,
            pipeline=pipeline,
            **_in_a_pipeline(training, pipeline),
        )
    )
    parts.append(f"Method: {method.title}, {method.source}.")
    if training.get("recipe"):
        settings = {key: without_folders(value) for key, value in training["recipe"].items()}
        recipe = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True, width=math.inf).strip()
        parts.append(f"## Recipe\n\n```yaml\n{recipe}\n```")
    return "\n\n".join(parts) + "\n"


def _with_labels(name: str, model: Mapping[str, Any]) -> str:
    """Arguments of `from_pretrained` for a base that gets a new head."""
    return f"\n        {name!r}, num_labels={model['num_labels']}, pad_token_id={model['pad_token_id']}\n    "


def _in_a_pipeline(training: Mapping[str, Any], pipeline: str) -> dict[str, str]:
    """Arguments of a transformers pipeline that predicts as craft does, and remaining differences."""
    options, text, differences = "", '"some text"', []
    if pipeline == "text-classification":
        if training.get("max_seq_length"):
            options += f", truncation=True, max_length={training['max_seq_length']}"
        if training.get("problem_type") == "multi_label_classification":
            options += ", top_k=None"
            differences.append(f"It returns the score of every label; predict those above {training['threshold']:g}.")
        columns: Sequence[str] = (training.get("data") or {}).get("text_columns") or ()
        if len(columns) == 2:
            text = '{"text": "one text", "text_pair": "another"}'
            differences.append(f"The first text is the training data's {columns[0]}, the second its {columns[1]}.")
        if len(columns) > 2:
            between = str((training.get("data") or {}).get("text_separator") or "")
            text = repr(between.join(f"text {number}" for number in range(1, len(columns) + 1)))
            differences.append(
                f"Its texts are the training data's {_inline(', '.join(columns))}, with {between!r} between them."
            )
    lines = "".join(f"\n{line}" for line in differences)
    return {"options": options, "text": text, "differences": f"{lines}\n" if lines else ""}


def base_licence(base: Checkpoint) -> str | None:
    """The license in the base's own card, if there is one."""
    from huggingface_hub import ModelCard

    try:
        found = ModelCard.load(base.folder / CARD).data.get("license")
    except Exception:  # a missing or damaged card of the base must not prevent ours
        return None
    return found if isinstance(found, str) else None


def _data(training: Mapping[str, Any]) -> str:
    data = training.get("data") or {}
    named = [data.get("dataset_name"), data.get("dataset_config_name")]
    files = [Path(str(data[key])).name for key in ("data_dir", "train_file", "validation_file") if data.get(key)]
    found = [str(part) for part in [*named, *files] if part]
    return ", ".join(found) or (f"the task's own ({training['task']})" if training.get("task") else "not recorded")
