"""The hooks that add the change of any method to a model. This module depends only on torch.

An attached adapter is a submodule of the model, so that optimizers, DDP and `.to()` see it. The model's own modules do
not change. A forward hook on each adapted layer adds x @ chain to its output.

The chains of a projection are computed for its first layer. The other layers reuse them while a module with several of
these layers runs, or for one backward pass if activations are recomputed. A layer called alone computes its own chains.
So every call, of any part of the model, uses the current parameters. They must stay the same only during one forward or
backward pass.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode_stack
from torch.utils.checkpoint import CheckpointFunction, _CachedTorchDispatchMode, _CachingTorchDispatchMode

from craft_cli.errors import ModelError
from craft_cli.methods.base import Chain, Change, delta
from craft_cli.models.views import View

_REENTRANT = {CheckpointFunction.forward.__code__, CheckpointFunction.backward.__code__}
_SELECTIVE = (_CachingTorchDispatchMode, _CachedTorchDispatchMode)
_Call = tuple[FrameType, nn.Module]
_NOT_FINITE = "the change is not finite: train with a lower learning rate"


class _Layer:
    """The forward hook of one adapted layer.

    When compiled, only tensors differ between layers, so that all layers share one graph.
    """

    fed: Chain | None = None
    """The chain for a compiled block, set by its caller."""
    in_compiled_block = False

    def __init__(self, adapter: Adapter, projection: str, number: int, view: View) -> None:
        self.adapter, self.projection, self.number, self.view = adapter, projection, number, view
        self.dropout = adapter.change.dropout

    def __getstate__(self) -> dict[str, object]:
        """The state for copies and pickles, without compiled code and the tensors of its last call."""
        return {name: value for name, value in vars(self).items() if name not in ("fed", "in_compiled_block")}

    def __call__(
        self, module: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor], output: Tensor
    ) -> Tensor:
        x = inputs[0] if inputs else next(iter(named.values()))
        if not torch.compiler.is_compiling():
            chain = self.adapter.chain(self.projection, self.number, x)
        elif self.in_compiled_block:
            chain = self.fed
        else:  # the user compiled the whole model, which merges equal computations
            chain = self.adapter.chain(self.projection, self.number, x, traced=True)
        if chain is None:  # disabled
            return output
        if self.dropout:
            x = functional.dropout(x, self.dropout, module.training)
        hidden = x.reshape(-1, x.shape[-1])  # (tokens, d_in)
        for matrix in chain[:-1]:
            hidden = hidden @ matrix  # (tokens, r)
        return self.view.add_to_output(output, hidden, chain[-1])  # (..., d_out)


class Adapter(nn.Module):
    """A change that can be attached to a model.

    Args:
        change: the change, of any method.
    """

    ATTRIBUTE = "craft"

    def __init__(self, change: Change) -> None:
        super().__init__()
        self.change = change
        self._views: dict[str, Sequence[View]] = {}
        self._layers: list[_Layer] = []
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._running: dict[int, list[_Call]] = {}  # by thread: calls of modules with several layers
        self._ready: dict[tuple[Any, ...], Sequence[Chain]] = {}
        self._enabled = True

    def __getstate__(self) -> dict[str, Any]:
        """The state for copies and pickles, without the chains of a running forward."""
        return {**super().__getstate__(), "_running": {}, "_ready": {}}

    def count_parameters(self) -> int:
        """The number of trained parameters, without the head."""
        return sum(parameter.numel() for parameter in self.parameters())

    # -- in a model -------------------------------------------------------------------------------------------------

    def attach(self, root: nn.Module, views: Mapping[str, Sequence[View]]) -> None:
        """Adapt `root` in place.

        Args:
            root: the module that paths in `views` are relative to.
            views: one view per layer, for every projection.

        Raises:
            ValueError: `root` already has an adapter, is compiled, or a weight has another shape.
        """
        if hasattr(root, self.ATTRIBUTE):
            raise ValueError("this model already has an adapter: detach it first")
        if any(getattr(module, "_compiled_call_impl", None) for module in root.modules()):
            raise ValueError("this model is compiled, and compiled code ignores new hooks: attach first, then compile")
        for name, shape in self.change.shapes.items():
            layers = [view.shape(view.stored_shape(root)) for view in views[name]]
            if (len(layers), *layers[0]) != shape or len(set(layers)) != 1:
                raise ValueError(
                    f"{name}: the model has {len(layers)} layers {layers[0]}, but the change is for {shape}"
                )
        self.to(next(root.parameters()).device)
        self._views = {name: views[name] for name in self.change.shapes}
        for name, adapted in self._views.items():
            self._layers += [_Layer(self, name, number, view) for number, view in enumerate(adapted)]
        for layer in self._layers:
            module = layer.view.module_of(root)
            self._handles.append(module.register_forward_hook(layer, with_kwargs=True))
        for path in self._containers():
            module = root.get_submodule(path)
            self._handles.append(module.register_forward_pre_hook(self._enter))
            self._handles.append(module.register_forward_hook(self._leave, always_call=True))
        root.add_module(self.ATTRIBUTE, self)

    def detach(self, root: nn.Module) -> None:
        """Remove the adapter, so that `root` is the base model, bit for bit."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._layers, self._views = [], [], {}
        self._running, self._ready = {}, {}
        if getattr(root, self.ATTRIBUTE, None) is self:
            delattr(root, self.ATTRIBUTE)

    def modules_adapted(self) -> list[str]:
        """Paths of the adapted modules, relative to the root."""
        return list(dict.fromkeys(layer.view.module for layer in self._layers))

    @torch.no_grad()
    def changes_something(self) -> bool:
        """Whether the change of any weight is nonzero, before rounding."""
        return any(bool(delta(chain).any()) for name in self._views for chain in self.change.chains(name))

    @torch.no_grad()
    def merge(self, root: nn.Module) -> list[str]:
        """Add dW to the weights of `root` and remove the adapter.

        Returns:
            The paths of the modules whose weight changed.

        Raises:
            ValueError: no weight changes (an earlier mistake), the change is not finite, or the adapter is detached.
        """
        if not self._views:
            raise ValueError("this adapter is not attached to a model")
        changed = []
        chains = {name: self.change.chains(name) for name in self._views}
        if not all(delta(chain).isfinite().all() for layers in chains.values() for chain in layers):
            raise ValueError(_NOT_FINITE)
        for name, views in self._views.items():
            for view, chain in zip(views, chains[name], strict=True):
                weight = view.module_of(root).get_parameter("weight").data
                before = weight.clone()
                view.add_to_weight(weight, delta(chain))
                if not torch.equal(before, weight):
                    changed.append(view.module)
        if not changed:
            raise ValueError("merging changes no tensor: the trained parameters are zero or round to zero")
        self.detach(root)
        return list(dict.fromkeys(changed))

    @torch.no_grad()
    def merge_into(self, state: dict[str, Tensor], prefix: str = "") -> None:
        """Replace the adapted weights in a `state_dict` with merged copies; the model does not change.

        Args:
            state: weights by name.
            prefix: prefix of the root's names in it.

        Raises:
            ModelError: the change is not finite.
        """
        copied = set()
        for projection, views in self._views.items():
            for view, chain in zip(views, self.change.chains(projection), strict=True):
                change = delta(chain)
                if not change.isfinite().all():
                    raise ModelError(_NOT_FINITE)
                name = f"{prefix}{view.module}.weight"
                if name not in copied:
                    state[name] = state[name].detach().clone()
                    copied.add(name)
                view.add_to_weight(state[name], change.to(state[name].device))

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside the block, the model computes without the change, bit for bit as before it was attached."""
        before, self._enabled = self._enabled, False
        try:
            yield
        finally:
            self._enabled = before

    # -- in a forward -----------------------------------------------------------------------------------------------

    def chain(self, projection: str, layer: int, x: Tensor, *, traced: bool = False) -> Chain | None:
        """The chain of one layer, in the dtype that the layer computes the input `x` in; None if disabled.

        Raises:
            ModelError: reentrant gradient checkpointing, which gives wrong gradients.
        """
        if not self._enabled:
            return None
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        if traced:
            return self._compute(projection, dtype, device)[layer]
        thread, backward = threading.get_ident(), torch._C._current_graph_task_id()  # -1 outside a backward pass
        shared = backward != -1 or self._runs_in(thread)
        key = (thread, backward, projection, torch.is_grad_enabled(), dtype)
        chains = self._ready.get(key) if shared else None
        if chains is None:
            if backward != -1 or (self.training and not torch.is_grad_enabled()):
                _refuse_reentrant()
            with _outside_of_checkpoints():
                chains = self._compute(projection, dtype, device)
            if shared:
                self._ready[key] = chains
        return chains[layer]

    def feed(self, block: nn.Module, path: str) -> None:
        """Pass the chains of its layers to a compiled block, which cannot compute them.

        Args:
            block: the block, compiled in place.
            path: its path, relative to the root.
        """
        layers = [layer for layer in self._layers if layer.view.module.startswith(f"{path}.")]
        compiled: Callable[..., Any] = block._compiled_call_impl  # type: ignore[assignment]

        def call(*arguments: Any, **options: Any) -> Any:
            x = next(one for one in (*arguments, *options.values()) if isinstance(one, Tensor))
            for layer in layers:
                layer.fed = self.chain(layer.projection, layer.number, x)
            return compiled(*arguments, **options)

        for layer in layers:
            layer.in_compiled_block = True
        block._compiled_call_impl = call

    def _compute(self, projection: str, dtype: torch.dtype, device: str) -> Sequence[Chain]:
        with torch.autocast(device, enabled=False):
            return self.change.chains(projection, dtype)

    def _containers(self) -> list[str]:
        """Paths of the modules with several layers of a projection, including the root."""
        counts: dict[str, int] = {"": 2}
        for views in self._views.values():
            for path in {path for view in views for path in _above(view.module)}:
                held = sum(view.module.startswith(f"{path}.") for view in views)
                counts[path] = max(counts.get(path, 0), held)
        return [path for path, held in counts.items() if held > 1]

    def _enter(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if torch.compiler.is_compiling():
            return
        thread, backward = threading.get_ident(), torch._C._current_graph_task_id()
        if not self._runs_in(thread):  # remove chains of earlier passes, and of backward passes in any thread
            self._forget(lambda key: key[1] != backward if key[1] != -1 else key[0] == thread)
        self._running.setdefault(thread, []).append((sys._getframe(1), module))

    def _leave(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        thread = threading.get_ident()
        calls = self._running.get(thread, [])
        for place in reversed(range(len(calls))):
            if calls[place][1] is module:
                del calls[place:]
                break
        if not calls:
            self._end_pass(thread)

    def _runs_in(self, thread: int) -> bool:
        """Whether a module with several layers is running in this thread.

        torch calls no forward hook for a module that Ctrl-C ended, so its frame is checked.
        """
        calls = self._running.get(thread)
        if calls and _has_ended(calls[0][0]):
            self._end_pass(thread)
            return False
        return bool(calls)

    def _end_pass(self, thread: int) -> None:
        self._running.pop(thread, None)
        self._forget(lambda key: key[1] == -1 and key[0] == thread)

    def _forget(self, gone: Callable[[tuple[Any, ...]], bool]) -> None:
        for key in list(self._ready):
            if gone(key):
                self._ready.pop(key, None)


def _has_ended(frame: FrameType) -> bool:
    """Whether the call of a frame has returned or raised; if so, clear its variables."""
    try:
        frame.clear()
    except RuntimeError:  # it is executing
        return False
    return True


@contextmanager
def _outside_of_checkpoints() -> Iterator[None]:
    """Inside the block, a surrounding activation checkpoint neither saves nor recomputes anything."""
    with ExitStack() as stack:
        modes = _get_current_dispatch_mode_stack()
        if any(isinstance(mode, _SELECTIVE) for mode in modes):
            stack.enter_context(_disable_current_modes())
        if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor))
        yield


def _above(path: str) -> list[str]:
    """All parent paths of a module, without the root."""
    parts = path.split(".")
    return [".".join(parts[:length]) for length in range(1, len(parts))]


def _refuse_reentrant() -> None:
    """Refuse reentrant checkpointing: it runs a forward without autograd, and repeats it in the backward pass.

    Raises:
        ModelError: the current call is inside reentrant checkpointing.
    """
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code in _REENTRANT:
            raise ModelError(
                "reentrant gradient checkpointing gives an adapter no gradient or a wrong one: enable it with "
                'gradient_checkpointing_kwargs={"use_reentrant": False}'
            )
        frame = frame.f_back  # type: ignore[assignment]
