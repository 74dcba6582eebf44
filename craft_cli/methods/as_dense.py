"""A saved adapter on its base, streamed from disk, and its merged weights, written tensor by tensor."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from craft_cli.config import MERGED_KEY, THRESHOLD
from craft_cli.errors import ModelError
from craft_cli.files import quoted, stamp
from craft_cli.methods.adapter import Adapter
from craft_cli.methods.adapter_folder import SavedAdapter
from craft_cli.methods.base import Chain, delta
from craft_cli.models.checkpoint import GENERATION, Checkpoint, fingerprint
from craft_cli.models.families import layer_views
from craft_cli.models.hub import resolve
from craft_cli.models.identity import base_of
from craft_cli.models.loading import is_language_model
from craft_cli.models.shards import Entry, shard_bytes, write_shards
from craft_cli.models.streaming import StreamedModel, probe
from craft_cli.models.views import View
from craft_cli.tucker import Matrix


class AdaptedBase:
    """The base of a saved adapter, with the adapter's head, streamed from disk.

    Args:
        saved: the adapter.
        trust_remote_code: whether Python code in the base checkpoint may run.
        allow_other_base: whether to accept a base that differs from the one in training.

    Attributes:
        saved: the adapter.
        base: the model, of the class that was trained.
        views: one view per layer, for every projection.
        change: the change of the adapter.

    Raises:
        ModelError: the base is missing, differs, or does not fit the class that was trained.
    """

    def __init__(self, saved: SavedAdapter, *, trust_remote_code: bool = False, allow_other_base: bool = False) -> None:
        self.saved = saved
        base, model = saved.record["base_model"], saved.record["model"]
        checkpoint = resolve(base["model"], base["revision"], trust_remote_code=trust_remote_code)
        self.views = layer_views(checkpoint.config(), saved.frozen.targets)
        self._check_weights(checkpoint, allow_other=allow_other_base)
        layered = [view.module for views in self.views.values() for view in views]
        self.base = StreamedModel(checkpoint, model["architecture"], model, saved.head, layered)
        self._marks = {file: stamp(file) for file in self.base.reader.weight_files()}
        self._check_head()
        self.change = saved.method.build(saved.frozen, saved.options)
        self.change.load(saved.trained)

    @property
    def checkpoint(self) -> Checkpoint:
        """The checkpoint of the base."""
        return self.base.checkpoint

    @property
    def threshold(self) -> float:
        """Multi-label: the probability above which a label is predicted."""
        return float(self.saved.record.get("training", {}).get("threshold", THRESHOLD))

    @property
    def talks(self) -> bool:
        """Whether the adapter was trained on conversations."""
        return self.saved.record.get("training", {}).get("form") == "messages"

    @property
    def chat_template(self) -> str:
        """The chat template in training; empty if it was the tokenizer's own."""
        return str(self.saved.record.get("training", {}).get("chat_template") or "")

    @property
    def kept(self) -> dict[str, Any]:
        """Training settings that evaluation and prediction need: threshold, maximum length, column names."""
        training = self.saved.record.get("training", {})
        data = training.get("data") or {}
        names = ("text_columns", "text_separator", "label_column", "label_separator", "beside")
        settings = {name: training.get(name) for name in ("max_seq_length", "form", "train_on")}
        settings |= {name: data.get(name) for name in names}
        if self.threshold != THRESHOLD:
            settings["threshold"] = self.threshold
        return {name: value for name, value in settings.items() if value}

    def changes(self) -> dict[str, list[tuple[View, str, int]]]:
        """The views that the adapter changes, with their projection and layer, by the name of the tensor."""
        changes: dict[str, list[tuple[View, str, int]]] = {}
        for target, views in self.views.items():
            for layer, view in enumerate(views):
                changes.setdefault(f"{self.base.prefix}{view.module}.weight", []).append((view, target, layer))
        return changes

    def chains(self) -> dict[str, Sequence[Chain]]:
        """The chains of every projection."""
        with torch.no_grad():
            return {target: self.change.chains(target) for target in self.views}

    def changes_something(self) -> bool:
        """Whether the change of any weight is nonzero, before rounding."""
        return any(bool(delta(chain).any()) for chains in self.chains().values() for chain in chains)

    def logits(self, batch: dict[str, Tensor]) -> Tensor:
        """Logits of the adapted model, in float32."""
        return self.base.logits(self.base.read, batch, self._attached())

    @contextmanager
    def _attached(self) -> Iterator[None]:
        adapter = Adapter(self.change)
        adapter.attach(self.base.model.base_model, self.views)
        try:
            yield
        finally:
            adapter.detach(self.base.model.base_model)

    def _check_weights(self, checkpoint: Checkpoint, *, allow_other: bool) -> None:
        reader, wide = checkpoint.open(), getattr(torch, self.saved.frozen.dtype)
        for target, views in self.views.items():
            shape = tuple(self.saved.frozen.shapes[target])
            shapes = {(len(views), *matrix.shape) for matrix in reader.matrices(views)}
            if shapes != {shape}:  # before anything is computed
                raise ModelError(
                    f"{self.saved.path}: the change of {target} is for {shape}, but {checkpoint.name} has "
                    f"{' and '.join(map(str, sorted(shapes))) or 'no layers'}"
                )
            layers = (checkpoint.open().matrices([view])[0] for view in views)  # mapped one after the other
            if not allow_other and fingerprint(_widened(layers, wide)) != self.saved.frozen.fingerprints[target]:
                raise ModelError(
                    f"the weights of this model ({target}) differ from those of {self.saved.frozen.model}, which the "
                    "adapter belongs to"
                )
        if not allow_other:
            kind = self.saved.record["model"]["architecture"]
            self.saved.base.check(base_of(checkpoint, kind), str(self.saved.path))

    def check_unchanged(self) -> None:
        """Refuse base files that were replaced while they were read, since their hashes would be wrong.

        Raises:
            ModelError: a file was replaced.
        """
        for file, mark in self._marks.items():
            if stamp(file) != mark:
                raise ModelError(f"{file} was replaced while it was read; try again")

    def _check_head(self) -> None:
        changed = self.changes()
        for name in self.saved.head:
            if name not in self.base.shapes or name in changed:
                why = "is also adapted" if name in changed else f"{self.checkpoint.name} does not have"
                raise ModelError(f"{self.saved.path}: its head has {quoted(name)}, which {why}")


def _widened(layers: Iterable[Matrix], dtype: torch.dtype) -> Iterator[Tensor]:
    """Weights in a dtype that holds all their values; others as they are: a model may have been loaded in a wider one."""
    for layer in layers:
        weight = layer[:]
        yield weight.to(dtype) if torch.promote_types(weight.dtype, dtype) == dtype else weight


class Dense:
    """A plain checkpoint, written tensor by tensor into `folder`.

    Attributes:
        changed: names of the tensors that differ from the base.
        dtype: dtype of the weights.
        head: names of the trained head's parameters.
    """

    rank: int | None = None

    def __init__(
        self, adapted: AdaptedBase, folder: Path, dtype: torch.dtype | None, max_shard_size: str | int | None
    ) -> None:
        self.changed: list[str] = []
        self.head = list(adapted.saved.head)
        self.dtype = dtype or getattr(torch, adapted.saved.frozen.dtype)
        self._base, self._chains = adapted.base, adapted.chains()
        changes = adapted.changes()
        entries = {}
        for name, shape in adapted.base.shapes.items():
            kind = adapted.base.dtypes[name]
            # the head was trained in float32, but follows the other weights; a change is not rounded to a narrower dtype
            if kind.is_floating_point and (dtype or name in adapted.saved.head or name in changes):
                kind = self.dtype
            entries[adapted.base.name_on_disk(name)] = Entry(
                shape, kind, partial(self._tensor, name, kind, changes.get(name, ()))
            )
        write_shards(folder, entries, shard_bytes(max_shard_size))
        config = adapted.base.model.config
        config.architectures = [type(adapted.base.model).__name__]
        config.dtype = self.dtype
        vars(config).pop(MERGED_KEY, None)  # from a base that is a merged model
        if adapted.kept:
            setattr(config, MERGED_KEY, adapted.kept)
        config.save_pretrained(folder)
        files, generation = adapted.checkpoint.tokenizer_files(), adapted.checkpoint.folder / GENERATION
        if generation.is_file() and is_language_model(adapted.base.model):
            files.append(generation)
        for file in files:
            shutil.copyfile(file, folder / file.name)
        whole = Checkpoint(str(folder), None, folder, adapted.checkpoint.trusted)
        tokens, expected = probe(whole, adapted.base.tables), adapted.base.probe
        if any(not torch.equal(tokens[name], expected[name]) for name in expected):
            raise ModelError(
                f"{folder}: the saved tokenizer gives different tokens from that of {adapted.checkpoint.name}"
            )
        self._reader = whole.open()

    def read(self, name: str) -> Tensor:
        """Read a tensor of the written checkpoint."""
        return self._reader.read(self._base.name_on_disk(name))

    def _tensor(self, name: str, dtype: torch.dtype, changes: Sequence[tuple[View, str, int]]) -> Tensor:
        """A tensor for the checkpoint: the change is added in float32 or wider, then rounded once."""
        before = self._base.read(name)
        if not changes:
            return before.to(dtype)
        weight = before.to(torch.promote_types(before.dtype, torch.float32), copy=True)
        for view, target, layer in changes:
            view.add_to_weight(weight, delta(self._chains[target][layer]))
        after = weight.to(dtype)
        if not torch.equal(after, before.to(dtype)):
            self.changed.append(name)
        return after
