"""The frozen factors of a model's projections, their files, and the cache of these files.

A cache entry is found by the sha256 of the stacked weights, never by name. HOSVD factors are nested, so an entry serves
every request for some of its projections at the same or smaller ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from craft_cli.errors import FileError
from craft_cli.files import checksum, entries_of, read_header, read_tensors, write_tensors
from craft_cli.methods.cache import SAME, FrozenCache, Kept, Serves
from craft_cli.methods.craft.ranks import Ranks
from craft_cli.methods.html import factors_html
from craft_cli.models.checkpoint import MOST_LAYERS
from craft_cli.models.stacks import Shape, Weights, read_identity
from craft_cli.tucker import MODES, TuckerTensor, mode_product, orthonormal

KIND = "factors"


@dataclass(frozen=True, eq=False, repr=False)
class Factors(Kept):
    """The decompositions of some projections of a model.

    Attributes:
        decompositions: decompositions by projection, in the order of the request.
        path: the file of the factors.
    """

    decompositions: Mapping[str, TuckerTensor]
    path: Path | None = field(default=None)

    @property
    def targets(self) -> tuple[str, ...]:
        """The decomposed projections."""
        return tuple(self.decompositions)

    def __repr__(self) -> str:
        """One line with the model, the shapes and the ranks."""
        stacks = [f"{name} {'x'.join(map(str, shape))} at {self.ranks(name)}" for name, shape in self.shapes.items()]
        return f"<Factors of {self.model}: {', '.join(stacks)} (OUT,IN,LAYERS)>"

    def _repr_html_(self) -> str:
        """HTML for notebooks, with shapes and spectra."""
        return factors_html(self)

    def spectra(self, target: str) -> dict[str, tuple[Tensor, int]]:
        """See `Frozen`."""
        decomposition = self.decompositions[target]
        return dict(zip(MODES, zip(decomposition.spectra, decomposition.ranks, strict=True), strict=True))

    def ranks(self, target: str) -> Ranks:
        """The ranks of one projection."""
        return Ranks.of_modes(self.decompositions[target].ranks)

    def select(self, targets: tuple[str, ...], ranks: Ranks) -> Factors:
        """Select projections, and truncate to ranks (reduced to the dimensions).

        Raises:
            ValueError: a rank exceeds the stored one.
        """
        chosen = {}
        for target in targets:
            decomposition = self.decompositions[target]
            chosen[target] = decomposition.truncated(ranks.lowered(decomposition.shape).by_mode)
        return replace(
            self, decompositions=chosen, fingerprints={target: self.fingerprints[target] for target in targets}
        )

    @property
    def shapes(self) -> dict[str, Shape]:
        """Shape (L, d_out, d_in) of every projection's stack."""
        return {target: decomposition.shape for target, decomposition in self.decompositions.items()}

    def tensors(self) -> dict[str, Tensor]:
        """Core, factors and spectra, by their names in a file."""
        return factor_tensors(self.decompositions)

    def sha256(self) -> str:
        """The sha256 of all tensors, by which an adapter refers to them."""
        return checksum(self.tensors())

    def resembles(self, target: str, layers: Sequence[Tensor], tolerance: float) -> bool:
        """Whether the core of these layers equals the stored one within a relative tolerance; see `Frozen`."""
        decomposition = self.decompositions[target]
        u_layer, u_out, u_in = (factor.to(layers[0].device) for factor in decomposition.factors)
        stack = torch.stack([u_out.T @ layer.float() @ u_in for layer in layers])  # (L, r_out, r_in)
        core = mode_product(stack, u_layer.T, 0)
        expected = decomposition.core.to(core.device)
        return bool((core - expected).norm() <= tolerance * expected.norm())

    def belong_to(self, weights: Weights, tolerance: float = SAME) -> bool:
        """See `Kept`."""
        for target, stack in weights.stacks.items():
            if self.shapes.get(target) != weights.shapes[target]:
                return False
            decomposition = self.decompositions[target]
            u_layer, u_out, u_in = decomposition.factors
            projected, total = [], 0.0
            for matrix in stack:
                layer = matrix[:].to("cpu", torch.float32)
                projected.append(u_out.T @ layer @ u_in)  # (r_out, r_in)
                total += float(layer.double().square().sum())
            core = mode_product(torch.stack(projected), u_layer.T, 0)
            if not all(map(orthonormal, decomposition.factors)):
                return False
            if not (core - decomposition.core).norm() <= tolerance * max(core.norm(), decomposition.core.norm()):
                return False
            energies = [float(spectrum.double().square().sum()) for spectrum in decomposition.spectra]
            if any(abs(energy - total) > 10 * tolerance * total for energy in energies):
                return False
        return True

    def save(self, path: str | Path) -> None:
        """Write one safetensors file: `TARGET.core`, `TARGET.factor.MODE`, `TARGET.spectrum.MODE`, float32.

        Raises:
            FileError: the file cannot be written.
        """
        write_tensors(Path(path), KIND, factor_tensors(self.decompositions), self.identity() | self.contents())

    def contents(self) -> dict[str, Any]:
        """See `Kept`."""
        return {
            "targets": list(self.targets),
            "shapes": {target: list(d.shape) for target, d in self.decompositions.items()},
            "ranks": {target: list(d.ranks) for target, d in self.decompositions.items()},
        }

    @classmethod
    def load(cls, path: str | Path) -> Factors:
        """Read a factor file.

        Raises:
            FileError: the file does not exist, is damaged, or is of another kind.
        """
        path = Path(path)
        tensors, header = read_tensors(path, KIND)
        return from_tensors(tensors, header, path)


def factor_tensors(decompositions: Mapping[str, TuckerTensor]) -> dict[str, Tensor]:
    """All tensors of some decompositions, by their names in a file."""
    tensors = {}
    for target, decomposition in decompositions.items():
        tensors[f"{target}.core"] = decomposition.core
        for mode, factor, spectrum in zip(MODES, decomposition.factors, decomposition.spectra, strict=True):
            tensors[f"{target}.factor.{mode}"] = factor
            tensors[f"{target}.spectrum.{mode}"] = spectrum
    return tensors


def from_tensors(tensors: Mapping[str, Tensor], header: Mapping[str, Any], path: Path) -> Factors:
    """Parse the tensors of `factor_tensors` and the header of `Factors.identity`.

    Raises:
        FileError: a tensor or a header entry is missing or invalid.
    """
    with entries_of(path):
        identity = read_identity(header)
        decompositions = {
            target: TuckerTensor(
                tensors[f"{target}.core"],
                _by_mode(tensors, f"{target}.factor"),
                _by_mode(tensors, f"{target}.spectrum"),
            )
            for target in header["targets"]
        }
        for target, decomposition in decompositions.items():
            for tensor in (decomposition.core, *decomposition.factors, *decomposition.spectra):
                if tensor.dtype != torch.float32 or not torch.isfinite(tensor).all():
                    raise ValueError(f"{target} has values that are not finite float32 numbers")
            if decomposition.shape[0] > MOST_LAYERS:
                raise ValueError(f"{target} has {decomposition.shape[0]} layers, more than {MOST_LAYERS}")
        return Factors(**identity, decompositions=decompositions, path=path)


def _by_mode(tensors: Mapping[str, Tensor], prefix: str) -> tuple[Tensor, Tensor, Tensor]:
    layer, out, in_ = (tensors[f"{prefix}.{mode}"] for mode in MODES)
    return layer, out, in_


class FactorCache(FrozenCache[Factors]):
    """The cached factors.

    Args:
        folder: cache folder. Default: `~/.cache/craft`, or under XDG_CACHE_HOME.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        super().__init__(folder, KIND, Factors.load)

    def ranks_at(self, path: Path, fingerprints: Mapping[str, str]) -> dict[str, Ranks]:
        """The ranks of the entry at `path`, which its replacement must include; empty if there is no valid entry."""
        try:
            header = read_header(path, KIND)
            if header["sha256"] != dict(fingerprints):
                return {}
            return {target: Ranks.of_modes(tuple(header["ranks"][target])) for target in fingerprints}
        except (FileError, KeyError, TypeError):
            return {}


def serving(fingerprints: Mapping[str, str], ranks: Ranks) -> Serves:
    """Whether an entry's header has these projections of the same weights, at these ranks or larger."""

    def serves(header: Mapping[str, Any]) -> bool:
        for target, fingerprint in fingerprints.items():
            if header["sha256"].get(target) != fingerprint:
                return False
            shape, kept = header["shapes"][target], header["ranks"][target]
            if any(need > have for need, have in zip(ranks.lowered(tuple(shape)).by_mode, kept, strict=True)):
                return False
        return True

    return serves
