"""The location of a projection of one layer inside a module's weight.

A view is (module path, rows, transposed): BERT's `query` is a whole weight; GPT-2's fused, transposed `c_attn` holds
query, key and value as thirds of its output; GPT-NeoX interleaves them head by head. For reading, adapting and merging, all
are matrices (d_out, d_in) in the orientation of `nn.Linear`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Rows:
    """A regular pattern of output rows: `size` rows from `start` in each of `count` equal parts.

    A plain range is one part. Query, key and value interleaved by head are `Rows(which * head_size, head_size, heads)`.
    """

    start: int
    size: int
    count: int = 1

    def of(self, tensor: Tensor, dim: int) -> Tensor:
        """A view of these rows of `tensor` along `dim`, which becomes (count, size)."""
        parts = tensor.unflatten(dim, (self.count, -1))
        narrowed: Tensor = parts.narrow(dim + 1 if dim >= 0 else dim, self.start, self.size)
        return narrowed

    def ranges(self, total: int, start: int, stop: int) -> Iterator[slice]:
        """Rows start..stop of the selection, as ranges of the `total` stored rows."""
        stride = total // self.count
        while start < stop:
            part, offset = divmod(start, self.size)
            take = min(self.size - offset, stop - start)
            first = part * stride + self.start + offset
            yield slice(first, first + take)
            start += take


@dataclass(frozen=True)
class View:
    """One layer's projection: the matrix (d_out, d_in) inside the weight of `module`.

    Attributes:
        module: path of the module, relative to the base model.
        rows: its output rows. Default: all.
        transposed: whether the weight is stored as (d_in, d_out), as in `transformers`' Conv1D.
    """

    module: str
    rows: Rows | None = None
    transposed: bool = False

    def fits(self, stored: tuple[int, ...]) -> bool:
        """Whether a stored weight of this shape has these rows."""
        if len(stored) != 2 or self.rows is None:
            return len(stored) == 2
        rows, total = self.rows, stored[1 if self.transposed else 0]
        whole = rows.count > 0 and total % rows.count == 0
        return whole and min(rows.start, rows.size - 1) >= 0 and rows.start + rows.size <= total // rows.count

    def shape(self, stored: tuple[int, ...]) -> tuple[int, int]:
        """Shape (d_out, d_in) of the view into a stored weight of this shape."""
        d_out, d_in = reversed(stored) if self.transposed else stored
        return (self.rows.size * self.rows.count if self.rows else d_out), d_in

    def read(self, weight: Tensor) -> Tensor:
        """The matrix (d_out, d_in) in the module's weight; a copy if the rows are interleaved."""
        matrix = weight.T if self.transposed else weight
        return self.rows.of(matrix, 0).flatten(0, 1) if self.rows else matrix

    def add_to_weight(self, weight: Tensor, delta: Tensor) -> None:
        """Weight += delta (d_out, d_in) in place, added in float32 or wider and rounded once to the weight's dtype."""
        matrix = weight.T if self.transposed else weight
        if self.rows:
            matrix = self.rows.of(matrix, 0)
            delta = delta.unflatten(0, (self.rows.count, self.rows.size))
        matrix.copy_(matrix.to(delta.dtype) + delta)

    def add_to_output(self, output: Tensor, hidden: Tensor, basis: Tensor) -> Tensor:
        """The module's output (..., stored rows) with hidden (tokens, r) @ basis (r, d_out) added at these rows."""
        if self.rows is None and output.dtype == hidden.dtype:
            # the product is added while it is computed, not in a separate pass
            return torch.addmm(output.reshape(-1, output.shape[-1]), hidden, basis).view(output.shape)
        delta = hidden @ basis
        if self.rows is None:  # such as float32 from a quantized layer
            return output + delta.view(output.shape)
        delta = delta.view(*output.shape[:-1], self.rows.count, self.rows.size)
        self.rows.of(output, -1).add_(delta)
        return output

    def stored_shape(self, root: nn.Module) -> tuple[int, ...]:
        """Shape of the module's weight in `root`, even if bitsandbytes has packed it."""
        weight = self.module_of(root).get_parameter("weight")
        return tuple(getattr(getattr(weight, "quant_state", None), "shape", weight.shape))

    def module_of(self, root: nn.Module) -> nn.Module:
        """The module.

        Raises:
            AttributeError: `root` has no such module.
        """
        return root.get_submodule(self.module)


def layer_of(module: str) -> str:
    """The path of a module's layer: `encoder.layer.3` for `encoder.layer.3.attention.self.query`."""
    match = re.match(r"(.*?\.)?\d+(?=\.)", module)
    assert match, module
    return match[0]
