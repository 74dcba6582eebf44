"""Run a model whose weights stay on disk, layer by layer.

The transformers model is built without weights. Weights outside the layers (embeddings, norms, the head) are read for each
forward; the weights of a layer are read when it is called and released afterwards. So a checkpoint larger than memory can
be merged, and the result can still be compared with the original.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from craft_cli.errors import ModelError
from craft_cli.models.checkpoint import Checkpoint
from craft_cli.models.damage import told_in_one_line
from craft_cli.models.loading import RENAMED, base_tensors, build_empty, load_tokenizer, stored_names
from craft_cli.models.tables import Tables, settle_padding, tables_of
from craft_cli.models.views import layer_of

Read = Callable[[str], Tensor]

_PROBE = (
    "A short sentence.",
    "An opinion that takes its time, turns round once or twice, and in the end says very little at all.",
    '42 numbers, (brackets) and "quotes": 100 % of it!',
    "Not bad.",
)


class StreamedModel:
    """A model as transformers would load it from a checkpoint, with some tensors replaced or added.

    Args:
        checkpoint: the base checkpoint.
        class_name: see `models.loading.model_class`.
        told: `id2label`, `problem_type` and `pad_token_id` of its configuration.
        own: tensors to add or replace, by their names in the model.
        layered: paths of modules in the base model, at least one in every layer.

    Attributes:
        checkpoint: the base checkpoint.
        model: the model, with parameters on the meta device.
        reader: reader of the checkpoint's tensors.
        shapes: shape of every tensor of the model, by its name.
        dtypes: stored dtype of every tensor.
        tied: names of tied tensors, which are not stored, with the name of the stored one.

    Raises:
        ModelError: the checkpoint does not match the class.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        class_name: str,
        told: Mapping[str, Any],
        own: Mapping[str, Tensor],
        layered: Sequence[str],
    ) -> None:
        self.checkpoint, self._own = checkpoint, own
        self.model = _skeleton(checkpoint, class_name, told)
        self.reader = checkpoint.open()
        state = self.model.state_dict()
        self.tied: dict[str, str] = self._tied()
        self.shapes = {name: tuple(tensor.shape) for name, tensor in state.items() if name not in self.tied}
        self._blocks = sorted({self.prefix + layer_of(path) for path in layered})
        self._buffers = {name: tensor for name, tensor in state.items() if not tensor.is_meta}
        self._stored = self._stored_names()
        self.dtypes = {name: self.reader.shape_and_dtype(stored)[1] for name, stored in self._stored.items()}
        self.dtypes |= {name: tensor.dtype for name, tensor in (self._buffers | dict(own)).items()}

    @property
    def prefix(self) -> str:
        """Prefix of the base model's tensors, such as `bert.`; empty if the model is its own base."""
        return "" if self.model.base_model is self.model else f"{self.model.base_model_prefix}."

    def read(self, name: str) -> Tensor:
        """A tensor of the model: a replaced one, or the one in the checkpoint."""
        if name in self._own:
            return self._own[name]
        return self.reader.read(self._stored[name]) if name in self._stored else self._buffers[name]

    def name_on_disk(self, name: str) -> str:
        """The checkpoint name of a tensor: the model's name, or the one transformers maps it to."""
        stored = self._stored.get(name, name)
        return stored if stored in RENAMED else name

    @cached_property
    def tables(self) -> Tables:
        """The sizes of the model's embeddings."""
        return tables_of(self.model, self.checkpoint.name)

    @cached_property
    def probe(self) -> dict[str, Tensor]:
        """Token ids of a few sentences."""
        return probe(self.checkpoint, self.tables)

    @torch.no_grad()
    def logits(
        self, read: Read, batch: Mapping[str, Tensor], inside: AbstractContextManager[Any] | None = None
    ) -> Tensor:
        """Compute logits in float32 with tensors from `read`; for a model without a head, the last hidden states.

        Logits per token are returned as (tokens, ...), without padding.

        Args:
            read: returns a tensor of the model by name.
            batch: model inputs.
            inside: context manager for the forward, such as an attached adapter.
        """
        if type(self.model).__name__.endswith("ForMultipleChoice"):  # (rows, choices, length)
            batch = {name: tensor[None] for name, tensor in batch.items()}
        names = [*self.shapes, *self.tied]
        outside = [name for name in names if not any(name.startswith(f"{block}.") for block in self._blocks)]
        handles = []

        def whole(name: str) -> Tensor:
            return read(self.tied.get(name, name))

        _fill(self.model, outside, whole)
        for block in self._blocks:
            inner = [name for name in names if name.startswith(f"{block}.")]
            module = self.model.get_submodule(block)
            handles.append(module.register_forward_pre_hook(lambda *_, inner=inner: _fill(self.model, inner, whole)))
            handles.append(module.register_forward_hook(lambda *_, inner=inner: _empty(self.model, inner)))
        try:
            with inside or nullcontext():
                output = self.model.eval()(**batch)
            logits: Tensor = output.logits if hasattr(output, "logits") else output[0]
            return (logits[batch["attention_mask"].bool()] if logits.ndim == 3 else logits).float()
        finally:
            for handle in handles:
                handle.remove()
            _empty(self.model, [name for name in names if name not in self._buffers])

    def _tied(self) -> dict[str, str]:
        """Tied tensors by configuration, except pairs stored with different values, as in transformers."""
        tied = dict(self.model.all_tied_weights_keys)
        stored = stored_names(self.reader.names(), {*tied, *tied.values()}, self.prefix)
        for name, other in list(tied.items()):
            if name in stored and other in stored:
                one, two = self.reader.read(stored[name]), self.reader.read(stored[other])
                if not torch.equal(one, two):
                    del tied[name]
        return tied

    def _stored_names(self) -> dict[str, str]:
        """The checkpoint name of every tensor that is not replaced; see `stored_names`."""
        wanted = {name for name in self.shapes if name not in self._own}
        found = stored_names(self.reader.names(), wanted, self.prefix)
        for name, shape in self.shapes.items():
            if name in self._own:
                has: tuple[int, ...] | None = tuple(self._own[name].shape)
            elif name in found:
                has = self.reader.shape_and_dtype(found[name])[0]
            else:
                has = shape if name in self._buffers else None
            if has != shape:
                what = f"is {has}, not {shape}" if has else "is missing"
                raise ModelError(f"{self.checkpoint.name}: {name} {what}, so transformers could not load it either")
        return found


def probe(checkpoint: Checkpoint, tables: Tables) -> dict[str, Tensor]:
    """Tokenize a few sentences with a checkpoint's tokenizer, within these tables.

    Raises:
        ModelError: the tokenizer is missing or fails.
    """
    tokenizer = load_tokenizer(checkpoint)
    settle_padding(tokenizer, tables)
    limit = tables.limit(min(tokenizer.model_max_length, 64))
    with told_in_one_line(f"{checkpoint.name}: its tokenizer fails"):
        batch = dict(tokenizer(list(_PROBE), padding=True, truncation=True, max_length=limit, return_tensors="pt"))
    batch["input_ids"] = batch["input_ids"].clamp(max=tables.tokens - 1)  # a tokenizer can return larger ids
    return batch


def _skeleton(checkpoint: Checkpoint, class_name: str, told: Mapping[str, Any]) -> Any:
    """The model that `from_pretrained` would build, without weights."""
    from accelerate import init_empty_weights

    base_tensors(checkpoint, class_name)
    config = checkpoint.config()
    config.id2label = {int(number): label for number, label in told["id2label"].items()}
    config.label2id = {label: number for number, label in config.id2label.items()}
    config.problem_type = told["problem_type"]
    try:
        with init_empty_weights(include_buffers=False):
            model = build_empty(config, class_name, trusted=checkpoint.trusted, dtype=torch.float32).eval()
    except ModelError as error:
        raise ModelError(f"{checkpoint.name}: {error}") from error
    pad, tokens = told["pad_token_id"], model.get_input_embeddings().num_embeddings
    if (
        pad is not None and not -tokens <= pad < tokens
    ):  # torch's index range; transformers could not load the merged model
        raise ModelError(f"the adapter pads with token {pad}, but {checkpoint.name} has {tokens} tokens")
    model.config.pad_token_id = pad
    return model


def _fill(model: nn.Module, names: Iterable[str], read: Read) -> None:
    for name in names:
        _place(model, name, read(name))


def _empty(model: nn.Module, names: Iterable[str]) -> None:
    for name in names:
        _place(model, name, None)


def _place(model: nn.Module, name: str, tensor: Tensor | None) -> None:
    """Set a tensor of the model to a float32 value, or to None to keep only its shape."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if leaf in module._parameters:
        present = module.get_parameter(leaf)
        value = torch.empty_like(present, device="meta") if tensor is None else tensor.float()
        module._parameters[leaf] = nn.Parameter(value, requires_grad=False)
    elif tensor is not None:
        module._buffers[leaf] = tensor
