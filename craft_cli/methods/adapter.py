"""CRAFT's adapter: frozen Tucker factors, one small trained matrix for every mode (arXiv 2602.17510).

For one projection with factors G, U_layer, U_out, U_in and transforms J = I + K, layer l's weight changes by

    dW_l = U_out S_l U_in^T                         (d_out, d_in)
    C0   = G x0 U_layer                             (L, r_out, r_in)
    C    = C0 + G x0 (U_layer K_layer)
    E    = C + K_out C
    S    = (C - C0) + K_out C + E K_in^T            (L, r_out, r_in)

K is what is stored and trained. Every term of S carries a K, so at K = 0 the change is exactly zero and no two large
reconstructions are ever subtracted. The dense form this equals is

    dW = G x0 U_layer J_layer x1 U_out J_out x2 U_in J_in  -  G x0 U_layer x1 U_out x2 U_in

This module knows torch only: give it decompositions, a module and views into it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from craft_cli.methods.craft.change import ProjectionAdapter
from craft_cli.models.views import View
from craft_cli.tucker import TuckerTensor


class _Change:
    """The forward hook of one adapted layer: adds the change by the slice that the running forward began with.

    Nothing in it differs between layers but tensors, so that all of them share one compiled graph.
    """

    tensors: tuple[Tensor, Tensor, Tensor] | None = None  # U_in (d_in, r_in), S_l (r_out, r_in), U_out^T (r_out, d_out)

    def __init__(self, view: View) -> None:
        self.view = view

    def __getstate__(self) -> dict[str, object]:
        """For copies and pickles: the tensors of the last forward belong to its graph and stay behind."""
        return {"view": self.view}

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if self.tensors is None:  # disabled
            return output
        u_in, s, u_out_t = self.tensors
        x = inputs[0].reshape(-1, inputs[0].shape[-1])  # (tokens, d_in)
        hidden = x @ u_in @ s.T  # (tokens, r_out)
        return self.view.add_to_output(output, hidden, u_out_t)  # (..., d_out)


class Adapter(nn.Module):
    """The transforms of several projections, and their place in a model.

    Attached, it is a submodule of the model (`root.craft`), so that optimizers, DDP and `.to()` see it. The model's own
    modules stay as they are: forward hooks add  ((x U_in) S_l^T) U_out^T  to the output of each adapted layer, and one
    hook before the model's forward computes S of all layers.

    Args:
        decompositions: of the stacked weight of every projection, by its name.
        init_noise: standard deviation of K at the start.
    """

    ATTRIBUTE = "craft"

    def __init__(self, decompositions: Mapping[str, TuckerTensor], init_noise: float = 0.0) -> None:
        super().__init__()
        self.projections = nn.ModuleDict(
            {name: ProjectionAdapter(decomposition, init_noise) for name, decomposition in decompositions.items()}
        )
        self._views: dict[str, Sequence[View]] = {}
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._changes: dict[str, list[_Change]] = {}
        self._enabled = True

    def items(self) -> Iterator[tuple[str, ProjectionAdapter]]:
        """(name, projection), in the order they were given."""
        for name, projection in self.projections.items():
            assert isinstance(projection, ProjectionAdapter)
            yield name, projection

    def count_parameters(self) -> int:
        """How many numbers the transforms hold: r_layer^2 + r_out^2 + r_in^2 for every projection."""
        return sum(parameter.numel() for parameter in self.parameters())

    # -- in a model -------------------------------------------------------------------------------------------------

    def attach(self, root: nn.Module, views: Mapping[str, Sequence[View]]) -> None:
        """Adapt `root` in place.

        Args:
            root: the module that paths in `views` start from, and whose forward begins a step.
            views: for every projection, one view a layer.

        Raises:
            ValueError: `root` carries an adapter already, is compiled, or a view's weight has not the shape decomposed.
        """
        if hasattr(root, self.ATTRIBUTE):
            raise ValueError("this model carries an adapter already: detach it first")
        if any(getattr(module, "_compiled_call_impl", None) for module in root.modules()):
            raise ValueError("this model is compiled, and compiled code does not see new hooks: attach, then compile")
        for name, projection in self.items():
            shape = projection.decomposition.shape
            found = [view.shape(view.stored_shape(root)) for view in views[name]]
            if (len(found), *found[0]) != shape or len(set(found)) != 1:
                raise ValueError(f"{name}: the model has {len(found)} layers {found[0]}, the factors are for {shape}")
        self.to(next(root.parameters()).device)
        self._views = {name: views[name] for name, _ in self.items()}
        self._handles.append(root.register_forward_pre_hook(self._begin))
        for name, layers in self._views.items():
            self._changes[name] = [_Change(view) for view in layers]
            for change in self._changes[name]:
                self._handles.append(change.view.module_of(root).register_forward_hook(change))
        root.add_module(self.ATTRIBUTE, self)

    def detach(self, root: nn.Module) -> None:
        """Take the adapter off: `root` is the base model again, bit for bit."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._changes.clear()
        self._views = {}
        if getattr(root, self.ATTRIBUTE, None) is self:
            delattr(root, self.ATTRIBUTE)

    def modules_adapted(self) -> list[str]:
        """Paths of the modules that are adapted, from the root it is attached to."""
        return list(dict.fromkeys(view.module for views in self._views.values() for view in views))

    @torch.no_grad()
    def merge(self, root: nn.Module) -> list[str]:
        """Add dW to the weights of `root` and take the adapter off.

        Returns:
            The paths of the modules whose weight changed.

        Raises:
            ValueError: no weight changes; merging nothing is a mistake somewhere before.
        """
        if not self._views:
            raise ValueError("this adapter is attached to no model")
        changed = []
        for name, projection in self.items():
            for view, delta in zip(self._views[name], projection.deltas(), strict=True):
                weight = view.module_of(root).get_parameter("weight").data
                before = weight.clone()
                view.add_to_weight(weight, delta)
                if not torch.equal(before, weight):
                    changed.append(view.module)
        if not changed:
            raise ValueError("merging changes no tensor: the transforms are (or round to) zero")
        self.detach(root)
        return list(dict.fromkeys(changed))

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside, the model computes without the change, bit for bit as before it was attached."""
        before, self._enabled = self._enabled, False
        try:
            yield
        finally:
            self._enabled = before

    def _begin(self, root: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """Before the forward: S of every layer in float32, cast once to the dtype the layers compute in."""
        if not self._enabled:
            for change in (change for changes in self._changes.values() for change in changes):
                change.tensors = None
            return
        device = next(self.parameters()).device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else _compute_dtype(root)
        with torch.autocast(device, enabled=False):
            for name, projection in self.items():
                u_in, u_out_t = projection.u_in.to(dtype), projection.u_out.T.to(dtype)
                for change, s in zip(self._changes[name], projection.slices().to(dtype).unbind(0), strict=True):
                    change.tensors = (u_in, s, u_out_t)


def _compute_dtype(root: nn.Module) -> torch.dtype:
    """The dtype of the model's own floating-point weights (the transforms stay float32 in a bf16 model)."""
    return next(p.dtype for name, p in root.named_parameters() if "craft" not in name and p.is_floating_point())
