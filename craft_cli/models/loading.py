"""Load transformers models: a base with a new head, or a checkpoint with its own, by default in float32."""

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
    """A transformers class: an auto class, or an architecture that an adapter was trained on.

    Raises:
        ModelError: the installed transformers has no such class.
    """
    import transformers

    found = getattr(transformers, name, None)
    if not hasattr(found, "from_pretrained") or not (
        name.startswith("AutoModel") or hasattr(found, "base_model_prefix")
    ):
        raise ModelError(
            f"the installed transformers ({transformers.__version__}) has no model class {quoted(name)}; upgrade it"
        )
    return found


def load_model(
    checkpoint: Checkpoint,
    class_name: str,
    options: Mapping[str, Any] | None = None,
    dtype: torch.dtype | str = torch.float32,
    **more: Any,
) -> tuple[Any, list[str]]:
    """Load a model with the head of its class.

    Args:
        checkpoint: a base checkpoint, with or without a head.
        class_name: see `model_class`.
        options: configuration options such as labels. Default: those of the checkpoint. A head with a different size is
            reinitialized.
        dtype: dtype of the weights; `auto` keeps the checkpoint's.
        more: further arguments of `from_pretrained`.

    Returns:
        The model, and the names of parameters missing from the checkpoint, which are random.

    Raises:
        ModelError: transformers cannot load it, or a language modeling head is required but missing.
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
            f"{checkpoint.name} is not a language model: it lacks {', '.join(fresh[:3])}; pass a checkpoint with that head"
        )
    return model, fresh


def stored_in(checkpoint: Checkpoint) -> torch.dtype | None:
    """The dtype of all weights of a checkpoint; None if they differ. Masks and other integers do not count."""
    reader = checkpoint.open()
    dtypes = {dtype for _, dtype in map(reader.shape_and_dtype, reader.names()) if dtype.is_floating_point}
    return dtypes.pop() if len(dtypes) == 1 else None


def build_empty(config: Any, class_name: str, *, trusted: bool = False, **more: Any) -> Any:
    """Build a model with random weights; use the meta device to avoid allocating them.

    Args:
        config: a transformers configuration.
        class_name: see `model_class`.
        trusted: whether code of the checkpoint may run.
        more: further arguments.

    Raises:
        ModelError: the class does not support the configuration.
    """
    kind = model_class(class_name)
    if class_name.startswith("AutoModel") and type(config) not in kind._model_mapping and not trusted:
        raise ModelError(f"transformers has no {class_name} for models of type '{config.model_type}'")
    with told_in_one_line(f"cannot build {class_name} from {CONFIG}"):
        if class_name.startswith("AutoModel"):
            return kind.from_config(config, trust_remote_code=trusted, **more)
        return kind._from_config(config, **more)


RENAMED = {"embed_out.weight": "lm_head.weight"}
"""Checkpoint names that differ from those in transformers: GPTNeoXForCausalLM."""


def stored_names(stored: Iterable[str], wanted: Collection[str], prefix: str) -> dict[str, str]:
    """The checkpoint name of each wanted parameter that exists there.

    As in transformers, the base model's prefix is added or removed, and old names of norms are supported. Other parameters
    (another head) are ignored.
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
    """The parameters of the base model without a head, and their checkpoint names; a pooler may be missing.

    Args:
        checkpoint: a base checkpoint, with or without a head.
        class_name: class with this base model, see `model_class`: some T5 classes have no decoder.

    Raises:
        ModelError: config.json and the weights do not match: transformers would initialize the mismatch at random, or
            allocate any amount of memory for it.
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
            raise ModelError(f"{checkpoint.name}: the weights lack {name}, which {CONFIG} requires")
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
    dtype: torch.dtype = torch.float32,
) -> tuple[Any, list[str]]:
    """Load a model with frozen linear layers in 4 or 8 bits.

    Args:
        checkpoint: a checkpoint in full precision.
        class_name: see `model_class`.
        options: configuration options.
        bits: 4 or 8.
        compute: compute dtype of a 4-bit layer.
        device: device of the model.
        dtype: dtype of all other parameters.

    Returns:
        As `load_model`.

    Raises:
        ModelError: transformers cannot load it, or its family cannot be quantized.
    """
    with torch.device("meta"):
        empty = build_empty(checkpoint.config(), class_name, trusted=checkpoint.trusted)
    trained = outside_base(empty)  # the head of a language model is not trained, and not quantized either
    if is_language_model(empty):
        trained.append(f"{_path_of(empty, empty.get_output_embeddings())}.weight")
    place: dict[str, Any] = {} if device.type == "cpu" else {"device_map": {"": device}}
    while True:
        whole = sorted({name.rpartition(".")[0] for name in trained})
        settings = quantization_config(bits, compute, whole)
        model, fresh = load_model(checkpoint, class_name, options, dtype, quantization_config=settings, **place)
        inside = [name for name in fresh if name.rpartition(".")[0] not in whole]
        if not inside:  # otherwise a part of the base is missing, such as a pooler, and is trained too
            after_loading(model)
            return model, fresh
        trained = [*trained, *inside]


def recompute_activations(model: Any) -> None:
    """Turn on gradient checkpointing: save only the layer inputs, and recompute the rest in the backward pass.

    Raises:
        ModelError: transformers does not support it for the model's family.
    """
    if not model.supports_gradient_checkpointing:
        raise ModelError(
            f"--gradient-checkpointing: transformers does not support it for {model.config.model_type}; remove it"
        )
    # The reentrant variant would backpropagate through an adapter's chains once per layer, and fail.
    options = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):  # the name since transformers 5.24
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
    """Load the checkpoint's tokenizer; `models.tables.agree_on_padding` sets the padding token.

    Raises:
        ModelError: transformers cannot load a tokenizer from it.
    """
    from transformers import AutoTokenizer

    checkpoint.config()  # checked, before transformers reads it to find the tokenizer's class
    problem = f"{checkpoint.name} has no tokenizer that transformers can load"
    with told_in_one_line(problem), quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(checkpoint.folder, trust_remote_code=checkpoint.trusted)
    longest = tokenizer.model_max_length
    if not isinstance(longest, (int, float)) or not longest > 0:
        raise ModelError(f"{problem}: its model_max_length is {quoted(longest)}")
    return tokenizer


def check_model(model: Any, told: str) -> None:
    """Check that an argument is a loaded transformers model.

    Args:
        model: the argument.
        told: what to do, for the message.

    Raises:
        TypeError: it is not a transformers model.
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
    """Silence progress bars and the load report of transformers."""
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
    """The class name of a model for `model_class`; for custom code, the plain model class of its family."""
    import transformers

    name = type(model).__name__.removeprefix("FSDP")  # prefix added by FSDP
    return name if hasattr(transformers, name) else "AutoModel"


def is_language_model(model: Any) -> bool:
    """Whether the outputs are tokens, so that the head was pre-trained."""
    return model.get_output_embeddings() is not None


def head_names(model: Any) -> list[str]:
    """The parameters of the task head in any family; none for a language model, see `is_language_model`."""
    return [] if is_language_model(model) else outside_base(model)


def outside_base(model: Any) -> list[str]:
    """The parameters outside the base model, except those tied to one inside.

    For a class that is its own base model, they are those that the family's plain model does not have.
    """
    if model.base_model is not model:
        inside = {id(parameter) for parameter in model.base_model.parameters()}
        return [name for name, parameter in model.named_parameters() if id(parameter) not in inside]
    with torch.device("meta"):
        plain = {name for name, _ in build_empty(model.config, "AutoModel").named_parameters()}
    return [name for name, _ in model.named_parameters() if name not in plain and not name.startswith("craft.")]


def _path_of(model: Any, module: Any) -> str:
    return next(name for name, other in model.named_modules() if other is module)
