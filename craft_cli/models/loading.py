"""Models by transformers: a base with a fresh head, or a checkpoint as it is, always in float32."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from craft_cli.errors import ModelError
from craft_cli.files import quoted
from craft_cli.models.checkpoint import CONFIG, Checkpoint, output_names
from craft_cli.models.damage import told_in_one_line
from craft_cli.models.quantization import after_loading, quantization_config


def model_class(name: str) -> Any:
    """A class of transformers: an auto class, or an architecture that an adapter was trained on.

    Raises:
        ModelError: this transformers has none of this name.
    """
    import transformers

    found = getattr(transformers, name, None)
    if not hasattr(found, "from_pretrained") or not (
        name.startswith("AutoModel") or hasattr(found, "base_model_prefix")
    ):
        raise ModelError(f"this transformers ({transformers.__version__}) has no model class {quoted(name)}")
    return found


def load_model(
    checkpoint: Checkpoint,
    class_name: str,
    options: Mapping[str, Any] | None = None,
    dtype: torch.dtype | str = torch.float32,
    **more: Any,
) -> tuple[Any, list[str]]:
    """A model with the head that its class has.

    Args:
        checkpoint: of a base model or of one with a head.
        class_name: see `model_class`.
        options: of the configuration, such as the labels; those of the checkpoint without. A head of another size starts
            anew.
        dtype: of the weights; `auto` keeps the checkpoint's.
        more: for `from_pretrained`.

    Returns:
        The model, and the names of its parameters that the checkpoint does not hold and that are random now.

    Raises:
        ModelError: transformers cannot load it, or it is to be a language model and lacks that head.
    """
    kind = model_class(class_name)
    base_tensors(checkpoint, class_name)
    with told_in_one_line(f"transformers cannot load {checkpoint.name}"), quiet_transformers():
        model, report = kind.from_pretrained(
            checkpoint.folder,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=options is not None,
            trust_remote_code=checkpoint.trusted,
            **(options or {}),
            **more,
        )
    model.config.id2label = output_names(model.config.id2label)
    fresh = sorted(set(report["missing_keys"]) | {entry[0] for entry in report["mismatched_keys"]})
    if fresh and is_language_model(model):
        raise ModelError(
            f"{checkpoint.name} is no language model: it lacks {', '.join(fresh[:3])}; give a checkpoint with that head"
        )
    return model, fresh


def build_empty(config: Any, class_name: str, *, trusted: bool = False, **more: Any) -> Any:
    """A model of random weights: put it on the meta device, or it takes their memory.

    Args:
        config: of transformers.
        class_name: see `model_class`.
        trusted: whether code of the checkpoint may run.
        more: for transformers.

    Raises:
        ModelError: the class does not go with the configuration.
    """
    kind = model_class(class_name)
    if class_name.startswith("AutoModel") and type(config) not in kind._model_mapping and not trusted:
        raise ModelError(f"transformers has no {class_name} for models of type '{config.model_type}'")
    with told_in_one_line(f"no {class_name} can be built as {CONFIG} says"):
        if class_name.startswith("AutoModel"):
            return kind.from_config(config, trust_remote_code=trusted, **more)
        return kind._from_config(config, **more)


RENAMED = {"embed_out.weight": "lm_head.weight"}
"""Names on disk of parameters that transformers calls otherwise: of GPTNeoXForCausalLM."""


def stored_names(stored: Iterable[str], wanted: Collection[str], prefix: str) -> dict[str, str]:
    """The name in a checkpoint of every parameter wanted that it holds.

    As transformers does, a prefix is added to what a base model stores or taken off, and old names of norms are
    understood; what is not wanted (another head) is left.
    """
    found = {}
    for name in stored:
        modern = name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
        for candidate in (modern, prefix + modern, modern.removeprefix(prefix), RENAMED.get(modern, modern)):
            if candidate in wanted:
                found[candidate] = name
                break
    return found


def base_tensors(checkpoint: Checkpoint, class_name: str = "AutoModel") -> dict[str, str]:
    """The parameters of the base model without a head, and what the checkpoint calls them; a pooler may be missing.

    Args:
        checkpoint: of a base model or of one with a head.
        class_name: whose base model it is, see `model_class`: some classes of T5 have no decoder.

    Raises:
        ModelError: config.json and the weights contradict each other: transformers would start what does not fit at
            random, or take any amount of memory for it.
    """
    config = checkpoint.config()
    with told_in_one_line(checkpoint.name), torch.device("meta"):
        empty = build_empty(config, class_name, trusted=checkpoint.trusted)
    reader, head = checkpoint.open(), set(outside_base(empty)) if empty.base_model is empty else set()
    shapes = {
        name: tuple(parameter.shape) for name, parameter in empty.base_model.named_parameters() if name not in head
    }
    found = stored_names(reader.names(), shapes, f"{empty.base_model_prefix}.")
    for name, shape in shapes.items():
        if name not in found and "pooler." not in name:
            raise ModelError(f"{checkpoint.name}: the weights lack {name}, which {CONFIG} asks for")
        if name in found and (stored := reader.shape_and_dtype(found[name])[0]) != shape:
            raise ModelError(f"{checkpoint.name}: {name} is {stored} in the weights, but {shape} by {CONFIG}")
    return found


def load_quantised(
    checkpoint: Checkpoint,
    class_name: str,
    options: Mapping[str, Any],
    bits: int,
    compute: torch.dtype,
    device: torch.device,
) -> tuple[Any, list[str]]:
    """A model whose frozen linear layers have 4 or 8 bits; what is trained stays float32.

    Args:
        checkpoint: in full precision.
        class_name: see `model_class`.
        options: of the configuration.
        bits: 4 or 8.
        compute: dtype in which a 4-bit layer multiplies.
        device: where it computes.

    Returns:
        As `load_model`.

    Raises:
        ModelError: transformers cannot load it, or its family is not supported in so few bits.
    """
    with torch.device("meta"):
        empty = build_empty(checkpoint.config(), class_name, trusted=checkpoint.trusted)
    trained = outside_base(empty)  # of a language model this head is not trained, and is not quantised either
    if is_language_model(empty):
        trained.append(f"{_path_of(empty, empty.get_output_embeddings())}.weight")
    place: dict[str, Any] = {} if device.type == "cpu" else {"device_map": {"": device}}
    while True:
        whole = sorted({name.rpartition(".")[0] for name in trained})
        settings = quantization_config(bits, compute, whole)
        model, fresh = load_model(checkpoint, class_name, options, quantization_config=settings, **place)
        inside = [name for name in fresh if name.rpartition(".")[0] not in whole]
        if not inside:  # else the checkpoint lacks a part of the base, such as a pooler, which is trained too
            after_loading(model)
            return model, fresh
        trained = [*trained, *inside]


def recompute_activations(model: Any) -> None:
    """Keep only what goes into each layer, and compute the rest again in the backward pass.

    Raises:
        ModelError: transformers cannot do this for the model's family.
    """
    if not model.supports_gradient_checkpointing:
        raise ModelError(f"--gradient-checkpointing: transformers has none for {model.config.model_type}")
    # The other way, reentrant, would go through the graph of an adapter's chains once for each layer, and fail.
    options = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):  # its name since transformers 5.24
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


def keep_activations(model: Any) -> None:
    """The opposite of `recompute_activations`."""
    if hasattr(model, "activation_checkpointing_disable"):
        model.activation_checkpointing_disable()
    else:
        model.gradient_checkpointing_disable()


def head_of(model: Any, fresh: Sequence[str]) -> list[str]:
    """The parameters to train in full: all outside the base model, and the fresh ones inside it (a missing pooler)."""
    trained = set(fresh) | set(head_names(model))
    return [name for name, _ in model.named_parameters() if name in trained]


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """The checkpoint's tokenizer; what it pads with is settled by `models.tables.agree_on_padding`.

    Raises:
        ModelError: it has none that transformers can load.
    """
    from transformers import AutoTokenizer

    checkpoint.config()  # checked, before transformers reads it to find the tokenizer's class
    problem = f"{checkpoint.name} holds no tokenizer that transformers can load"
    with told_in_one_line(problem), quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(checkpoint.folder, trust_remote_code=checkpoint.trusted)
    longest = tokenizer.model_max_length
    if not isinstance(longest, (int, float)) or not longest > 0:
        raise ModelError(f"{problem}: its model_max_length is {quoted(longest)}")
    return tokenizer


def check_model(model: Any, told: str) -> None:
    """Refuse what is no loaded transformers model.

    Args:
        model: whatever was given as one.
        told: what to do, for the message.

    Raises:
        TypeError: so.
    """
    from transformers import PreTrainedModel

    if isinstance(model, PreTrainedModel):
        return
    kind = type(model).__name__
    if isinstance(model, (str, Path)):
        kind = f"the name {str(model)!r}"
        told = f"{told}: load it first, by from_pretrained(craft.checkpoint_folder({str(model)!r})) of a class of transformers"
    raise TypeError(f"model: expected a loaded transformers model, not {kind}; {told}")


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No bars and no load report of transformers among our own output."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def class_of(model: Any) -> str:
    """The name by which `model_class` finds a model's class; that of its family's plain model for code of a checkpoint's own."""
    import transformers

    name = type(model).__name__.removeprefix("FSDP")  # which FSDP puts before it
    return name if hasattr(transformers, name) else "AutoModel"


def is_language_model(model: Any) -> bool:
    """Whether its outputs are tokens: then its head is part of what was pre-trained."""
    return model.get_output_embeddings() is not None


def head_names(model: Any) -> list[str]:
    """The parameters of the task head, whatever the family calls it; none of a language model, see `is_language_model`."""
    return [] if is_language_model(model) else outside_base(model)


def outside_base(model: Any) -> list[str]:
    """The parameters outside the base model; what is tied to one inside is none of them.

    Of a class that is its own base model, they are those that the family's plain model does not have.
    """
    if model.base_model is not model:
        inside = {id(parameter) for parameter in model.base_model.parameters()}
        return [name for name, parameter in model.named_parameters() if id(parameter) not in inside]
    with torch.device("meta"):
        plain = {name for name, _ in build_empty(model.config, "AutoModel").named_parameters()}
    return [name for name, _ in model.named_parameters() if name not in plain and not name.startswith("craft.")]


def _path_of(model: Any, module: Any) -> str:
    return next(name for name, other in model.named_modules() if other is module)
