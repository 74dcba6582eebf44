"""A classifier whose weights stay on disk: the base of an adapter, read tensor by tensor, run layer by layer.

The model is transformers' own, built without weights. What lies outside the layers (embeddings, norms, the head) is read
for a forward; each layer's weights are read when it is called and dropped after it. So a checkpoint larger than memory
can be merged, and what was written can still be compared with the adapted model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from craft_cli.errors import ModelError
from craft_cli.files import quoted
from craft_cli.methods.adapter import Adapter
from craft_cli.methods.adapter_folder import SavedAdapter
from craft_cli.models.checkpoint import Checkpoint, fingerprint
from craft_cli.models.families import layer_views
from craft_cli.models.hub import resolve
from craft_cli.models.loading import load_tokenizer
from craft_cli.models.views import View

Read = Callable[[str], Tensor]

_PROBE = (
    "A short sentence.",
    "An opinion that takes its time, turns round once or twice, and in the end says very little at all.",
    '42 numbers, (brackets) and "quotes": 100 % of it!',
    "Not bad.",
)


class StreamedBase:
    """The base of a saved adapter, with the adapter's head, as transformers would load it.

    Attributes:
        saved: the adapter.
        checkpoint: the base.
        model: the classifier, its parameters on the meta device.
        shapes: shape of every tensor of the classifier, by its name there.
        dtypes: of the stored ones, the head's from the adapter.

    Raises:
        ModelError: the base is missing, is another one, or does not fit the classifier.
    """

    def __init__(self, saved: SavedAdapter) -> None:
        self.saved = saved
        record = saved.record
        self.checkpoint = resolve(record["base_model"]["model"], record["base_model"]["revision"])
        self.model = _skeleton(self.checkpoint, record["model"])
        self.views = layer_views(self.model.config, saved.factors.targets)
        self.reader = self.checkpoint.open()
        self._check_weights()
        state = self.model.state_dict()
        self.shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        self._check_head()
        self._buffers = {name: tensor for name, tensor in state.items() if not tensor.is_meta}
        self._stored = self._stored_names()
        self.dtypes = {name: self.reader.shape_and_dtype(stored)[1] for name, stored in self._stored.items()}
        self.dtypes |= {name: tensor.dtype for name, tensor in (self._buffers | dict(saved.head)).items()}

    def read(self, name: str) -> Tensor:
        """A tensor of the classifier: the adapter's head, or as the base stores it."""
        if name in self.saved.head:
            return self.saved.head[name]
        return self.reader.read(self._stored[name]) if name in self._stored else self._buffers[name]

    def changes(self) -> dict[str, list[tuple[View, str, int]]]:
        """Which views, of which projection and layer, the adapter changes in a tensor, by the tensor's name."""
        found: dict[str, list[tuple[View, str, int]]] = {}
        for target, views in self.views.items():
            for layer, view in enumerate(views):
                found.setdefault(f"{self.prefix}{view.module}.weight", []).append((view, target, layer))
        return found

    @property
    def prefix(self) -> str:
        """Of the base model's tensors among those of the classifier, `bert.` for example."""
        return f"{self.model.base_model_prefix}."

    def probe(self) -> dict[str, Tensor]:
        """Token ids of a few sentences."""
        tokenizer = load_tokenizer(self.checkpoint)
        limit = min(tokenizer.model_max_length, 64)
        return dict(tokenizer(list(_PROBE), padding=True, truncation=True, max_length=limit, return_tensors="pt"))

    def adapter(self) -> Adapter:
        """The adapter, to be attached."""
        adapter = Adapter(self.saved.factors.decompositions)
        with torch.no_grad():
            for target, projection in adapter.items():
                for mode, k in projection.transforms.items():
                    k.copy_(self.saved.transforms[target][mode])
        return adapter

    @torch.no_grad()
    def logits(self, read: Read, batch: Mapping[str, Tensor], adapter: Adapter | None = None) -> Tensor:
        """Logits (rows, labels) in float32, with tensors by `read`.

        Args:
            read: gives a tensor of the classifier by its name.
            batch: the model's inputs.
            adapter: attach this one for the forward.
        """
        blocks = sorted({self.prefix + _layer_of(view.module) for views in self.views.values() for view in views})
        outside = [name for name in self.shapes if not any(name.startswith(f"{block}.") for block in blocks)]
        handles = []
        _fill(self.model, outside, read)
        for block in blocks:
            inside = [name for name in self.shapes if name.startswith(f"{block}.")]
            module = self.model.get_submodule(block)
            handles.append(module.register_forward_pre_hook(lambda *_, names=inside: _fill(self.model, names, read)))
            handles.append(module.register_forward_hook(lambda *_, names=inside: _empty(self.model, names)))
        try:
            if adapter is not None:
                adapter.attach(self.model.base_model, self.views)
            logits: Tensor = self.model.eval()(**batch).logits
            return logits.float()
        finally:
            if adapter is not None:
                adapter.detach(self.model.base_model)
            for handle in handles:
                handle.remove()
            _empty(self.model, [name for name in self.shapes if name not in self._buffers])

    def _check_weights(self) -> None:
        for target, views in self.views.items():
            shape = self.saved.factors.decompositions[target].shape
            found = {(len(views), *matrix.shape) for matrix in self.reader.matrices(views)}
            if found != {shape}:  # before anything is computed of the factors
                raise ModelError(
                    f"{self.saved.path}: the factors of {target} are for {shape}, {self.checkpoint.name} has "
                    f"{' and '.join(map(str, sorted(found))) or 'no layers'} there"
                )
            layers = (self.checkpoint.open().matrices([view])[0] for view in views)  # mapped one after the other
            if fingerprint(layers) != self.saved.factors.fingerprints[target]:
                raise ModelError(
                    f"the factors are of {self.saved.factors.model}; this model has other weights ({target}), "
                    "on which they mean nothing"
                )

    def _check_head(self) -> None:
        changed = self.changes()
        for name in self.saved.head:
            if name not in self.shapes or name in changed:
                why = "its transforms change" if name in changed else f"{self.checkpoint.name} lacks"
                raise ModelError(f"{self.saved.path}: its head holds {quoted(name)}, which {why}")

    def _stored_names(self) -> dict[str, str]:
        """The name in the checkpoint of every tensor of the classifier that is not in the adapter's head.

        As transformers does, a prefix is added to what a base model stores or taken off, and old names of norms are
        understood; what the classifier does not have (another head) is left.
        """
        found = {}
        for stored in self.reader.names():
            name = stored.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
            for candidate in (name, self.prefix + name, name.removeprefix(self.prefix)):
                if candidate in self.shapes and candidate not in self.saved.head:
                    found[candidate] = stored
                    break
        for name, shape in self.shapes.items():
            if name in self.saved.head:
                has: tuple[int, ...] | None = tuple(self.saved.head[name].shape)
            elif name in found:
                has = self.reader.shape_and_dtype(found[name])[0]
            else:
                has = shape if name in self._buffers else None
            if has != shape:
                what = f"is {has}, not {shape}" if has else "is missing"
                raise ModelError(f"{self.checkpoint.name}: {name} {what}, so transformers could not load it either")
        return found


def _skeleton(checkpoint: Checkpoint, record: Mapping[str, Any]) -> Any:
    """The classifier that `from_pretrained` would build, without weights."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForSequenceClassification

    config = checkpoint.config()
    config.id2label = {int(number): label for number, label in record["id2label"].items()}
    config.label2id = {label: number for number, label in config.id2label.items()}
    config.problem_type = record["problem_type"]
    try:
        with init_empty_weights(include_buffers=False):
            model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32).eval()
    except (ValueError, KeyError, AssertionError, RuntimeError, ImportError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(f"{checkpoint.name}: {reason}") from error
    pad, tokens = record["pad_token_id"], model.get_input_embeddings().num_embeddings
    if (
        pad is not None and not -tokens <= pad < tokens
    ):  # as torch counts them; transformers could not load the merged one
        raise ModelError(f"the adapter pads with token {pad}, but {checkpoint.name} has {tokens} tokens")
    model.config.pad_token_id = pad
    return model


def _layer_of(module: str) -> str:
    """The path of the layer that a module lies in: `encoder.layer.3` of `encoder.layer.3.attention.self.query`."""
    match = re.match(r"(.*?\.)?\d+(?=\.)", module)
    assert match, module
    return match[0]


def _fill(model: nn.Module, names: Iterable[str], read: Read) -> None:
    for name in names:
        _place(model, name, read(name))


def _empty(model: nn.Module, names: Iterable[str]) -> None:
    for name in names:
        _place(model, name, None)


def _place(model: nn.Module, name: str, tensor: Tensor | None) -> None:
    """Give a tensor of the model a value in float32, or none: then only its shape is left."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if leaf in module._parameters:
        present = module.get_parameter(leaf)
        value = torch.empty_like(present, device="meta") if tensor is None else tensor.float()
        module._parameters[leaf] = nn.Parameter(value, requires_grad=False)
    elif tensor is not None:
        module._buffers[leaf] = tensor
