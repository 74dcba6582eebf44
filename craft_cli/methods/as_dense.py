"""An adapter's change in the dense weights of its base, written tensor by tensor."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from craft_cli.models.checkpoint import Checkpoint
from craft_cli.models.shards import Entry, shard_bytes, write_shards
from craft_cli.models.streaming import StreamedBase
from craft_cli.models.views import View


class _Checkpoint:
    """A plain checkpoint, written tensor by tensor into `folder`."""

    rank: int | None = None

    def __init__(
        self, base: StreamedBase, folder: Path, dtype: torch.dtype | None, max_shard_size: str | int | None
    ) -> None:
        self.changed: list[str] = []
        self.dtype = dtype or getattr(torch, base.saved.factors.dtype)
        self._slices = {target: p.slices().detach() for target, p in base.adapter().items()}
        self._base = base
        changes = base.changes()
        entries = {}
        for name, shape in base.shapes.items():
            kind = base.dtypes[name]
            if kind.is_floating_point:  # the head was trained in float32; it follows the rest
                kind = self.dtype if dtype or name in base.saved.head else kind
            entries[name] = Entry(shape, kind, partial(self._tensor, name, kind, changes.get(name, ())))
        write_shards(folder, entries, shard_bytes(max_shard_size))
        config = base.model.config
        config.architectures = [type(base.model).__name__]
        config.dtype = self.dtype
        config.save_pretrained(folder)
        for file in base.checkpoint.tokenizer_files():
            shutil.copyfile(file, folder / file.name)
        self._reader = Checkpoint(str(folder), None, folder).open()

    def read(self, name: str) -> Tensor:
        return self._reader.read(name)

    def _tensor(self, name: str, dtype: torch.dtype, changes: Sequence[tuple[View, str, int]]) -> Tensor:
        """A tensor as it is written: the change is added in float32 (or wider), then rounded once."""
        before = self._base.read(name)
        if not changes:
            return before.to(dtype)
        weight = before.to(torch.promote_types(before.dtype, torch.float32), copy=True)
        for view, target, layer in changes:
            _, u_out, u_in = self._base.saved.factors.decompositions[target].factors
            view.add_to_weight(weight, u_out @ self._slices[target][layer] @ u_in.T)
        after = weight.to(dtype)
        if not torch.equal(after, before.to(dtype)):
            self.changed.append(name)
        return after
