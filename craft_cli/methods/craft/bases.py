"""Whether a model in memory is the base that factors were made of: transforms mean nothing on other weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from craft_cli.models.checkpoint import fingerprint
from craft_cli.errors import ModelError
from craft_cli.methods.craft.factors import Factors
from craft_cli.models.quantization import TOLERANCE, dense_weight, kind_of
from craft_cli.tucker import TuckerTensor, mode_product
from craft_cli.models.views import View


def check_base(model: Any, factors: Factors, views: Mapping[str, Sequence[View]]) -> None:
    """Refuse a model with other weights than those decomposed.

    The sha256 is compared in the dtype of the checkpoint, which a model loaded in a wider one converts to exactly. A
    model loaded in a narrower dtype or quantised is rounded, so there the core it gives must be the stored one to that
    precision.

    Raises:
        ModelError: other weights.
    """
    checkpoint_dtype = getattr(torch, factors.dtype)
    for target, decomposition in factors.decompositions.items():
        try:
            modules = [view.module_of(model.base_model) for view in views[target]]
            weights = [dense_weight(module) for module in modules]
        except AttributeError as error:
            raise ModelError(f"this model has no projection '{target}' where its family keeps it: {error}") from error
        layers = [view.read(weight) for view, weight in zip(views[target], weights, strict=True)]
        same_shape = (len(layers), *layers[0].shape) == decomposition.shape
        kind = kind_of(modules[0])
        if kind:
            same = same_shape and _same_core(layers, decomposition, TOLERANCE[kind])
        elif same_shape and torch.promote_types(layers[0].dtype, checkpoint_dtype) == layers[0].dtype:
            same = fingerprint(layers, checkpoint_dtype) == factors.fingerprints[target]
        else:
            same = same_shape and _same_core(layers, decomposition, torch.finfo(layers[0].dtype).eps)
        if not same:
            raise ModelError(
                f"the factors are of {factors.model}; this model has other weights ({target}), on which they mean nothing"
            )


def _same_core(layers: Sequence[Tensor], decomposition: TuckerTensor, tolerance: float) -> bool:
    u_layer, u_out, u_in = (factor.to(layers[0].device) for factor in decomposition.factors)
    stack = torch.stack([u_out.T @ layer.float() @ u_in for layer in layers])  # (L, r_out, r_in)
    core = mode_product(stack, u_layer.T, 0)
    expected = decomposition.core.to(core.device)
    return bool((core - expected).norm() <= tolerance * expected.norm())
